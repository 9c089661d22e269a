"""JSON schemas as the TypeScript types that gpt-oss was trained to read.

The layout, its white space included, is that of the ``openai-harmony`` library, since the model has seen no
other.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

_SCALARS = {"number": "number", "integer": "number", "boolean": "boolean"}


def schema_to_typescript(schema: Any) -> str:
    """Write a JSON schema as a TypeScript type.

    Known are ``type`` (one or a list), ``properties``, ``required``, ``items``, ``enum`` of strings,
    ``oneOf``, ``nullable``, ``default``, ``description``, ``title`` and ``examples``; whatever else a schema
    says is left out, and a schema that says nothing known is ``any``.

    Parameters
    ----------
    schema : mapping
        The schema, made of what JSON holds.

    Returns
    -------
    str
        The type; objects and ``oneOf`` take several lines.

    Raises
    ------
    ValueError
        If `schema` is not a mapping, holds what JSON cannot, or is nested too deeply.
    """
    if not isinstance(schema, Mapping):
        raise ValueError(f"a JSON schema must be an object, but is {type(schema).__name__}")
    try:
        # Through JSON and back: no step below can then meet anything that JSON does not have.
        plain = json.loads(json.dumps(dict(schema), allow_nan=False))
        return _type(plain, "")
    except RecursionError:
        raise ValueError("the JSON schema is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"the JSON schema is not valid JSON: {error}") from error


def _type(schema: Any, indent: str) -> str:
    if not isinstance(schema, dict):
        return "any"
    variants = schema.get("oneOf")
    if isinstance(variants, list):
        return "".join(
            f"\n{indent} | {_nullable_type(variant, indent + '   ')}{_trailing_comment(variant)}"
            for variant in variants
        )
    kind = schema.get("type")
    if isinstance(kind, list):
        names = ["number" if name == "integer" else name for name in kind if isinstance(name, str)]
        return " | ".join(names) or "any"
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return f"{_type(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    if kind == "string":
        choices = schema.get("enum")
        named = [f'"{v}"' for v in choices if isinstance(v, str)] if isinstance(choices, list) else []
        return " | ".join(named) or "string"
    return _SCALARS.get(kind, "any") if isinstance(kind, str) else "any"


def _nullable_type(schema: Any, indent: str) -> str:
    written = _type(schema, indent)
    nullable = isinstance(schema, dict) and schema.get("nullable") is True
    return f"{written} | null" if nullable and "null" not in written else written


def _object(schema: dict[str, Any], indent: str) -> str:
    description = schema.get("description")
    head = f"{indent}// {description}\n" if isinstance(description, str) else ""
    properties = schema.get("properties")
    required = schema.get("required")
    names = {n for n in required if isinstance(n, str)} if isinstance(required, list) else set()
    body = ""
    if isinstance(properties, dict):
        for key, value in properties.items():
            body += _property(key if key in names else f"{key}?", value, indent)
    return f"{head}{{\n{body}{indent}}}"


def _property(label: str, schema: Any, indent: str) -> str:
    fields = schema if isinstance(schema, dict) else {}
    comments = _comments_above(fields, indent)
    if isinstance(fields.get("oneOf"), list):
        return comments + _one_of_property(label, fields, indent)
    default = "" if "oneOf" in fields else _default(fields, plain_enum=True)
    written = f"{indent}{label}: {_nullable_type(schema, indent + '    ')},"
    return f"{comments}{written} // {default}\n" if default else f"{comments}{written}\n"


def _comments_above(schema: dict[str, Any], indent: str) -> str:
    lines = []
    title, description, examples = schema.get("title"), schema.get("description"), schema.get("examples")
    if isinstance(title, str):
        lines += [title, None]
    if isinstance(description, str) and "oneOf" not in schema:
        lines.append(description)
    if isinstance(examples, list) and examples:
        lines += ["Examples:", *(f'- "{example}"' for example in examples if isinstance(example, str))]
    return "".join(f"{indent}//\n" if line is None else f"{indent}// {line}\n" for line in lines)


def _one_of_property(label: str, schema: dict[str, Any], indent: str) -> str:
    """Write a property with variants: one a line, the description above if the first has another."""
    variants, description = schema["oneOf"], schema.get("description")
    if not isinstance(description, str):
        description = None
    first = variants[0].get("description") if variants and isinstance(variants[0], dict) else None
    above = description is not None and description != first
    text = f"{indent}// {description}\n" if above else ""
    default = _default(schema, plain_enum=True)
    text += f"{indent}// {default}\n" if default else ""
    text += f"{indent}{label}:\n"
    for i, variant in enumerate(variants):
        unsaid = (description,) if not (i == 0 and above) else None
        comment = _trailing_comment(variant, unsaid=unsaid, plain_enum=True)
        text += f"{indent} | {_nullable_type(variant, indent + '   ')}{comment}\n"
    return f"{text}{indent},\n"


def _trailing_comment(schema: Any, *, unsaid: tuple[str | None, ...] | None = (), plain_enum: bool = False) -> str:
    """Return the comment after a variant; `unsaid` are descriptions to leave out, None leaves out any."""
    if not isinstance(schema, dict):
        return ""
    description = schema.get("description")
    parts = []
    if isinstance(description, str) and unsaid is not None and description not in unsaid:
        parts.append(description)
    parts += [default] if (default := _default(schema, plain_enum=plain_enum)) else []
    return f" // {' '.join(parts)}" if parts else ""


def _default(schema: dict[str, Any], *, plain_enum: bool) -> str:
    """Return ``default: value`` or nothing; `plain_enum` leaves the quotes off an enum's value."""
    if "default" not in schema:
        return ""
    value, choices = schema["default"], schema.get("enum")
    if not isinstance(value, str):
        return f"default: {_json(value)}"
    if not (isinstance(choices, list) and choices):
        return f'default: "{value}"'
    return f"default: {value}" if plain_enum else f"default: {_json(value)}"


def _json(value: Any) -> str:
    """Write a value as compact JSON, its numbers as serde does (``1e-7``, not ``1e-07``)."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_json(k)}:{_json(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_json, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**64:
        value = float(value)
    return _float(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _float(value: float) -> str:
    """Write the shortest decimal that reads back as `value`; an exponent below 1e-5 and from 1e16 on."""
    if value != 0 and 1e-5 <= math.fabs(value) < 1e-4:
        digits, exponent = repr(value).split("e")
        return f"{'-' if value < 0 else ''}0.{'0' * (-int(exponent) - 1)}{digits.strip('-').replace('.', '')}"
    return re.sub(r"e([+-]?)0*", lambda sign: "e" + sign[1].strip("+"), repr(value))
