"""The messages of a conversation, and the texts that open one."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mxmoe.harmony.typescript import schema_to_typescript

ROLES = ("system", "developer", "user", "assistant", "tool")
CHANNELS = ("analysis", "commentary", "final")
REASONING_EFFORTS = ("low", "medium", "high")
MODEL_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Attributes
    ----------
    role : str
        Who speaks: ``"system"``, ``"developer"``, ``"user"``, ``"assistant"`` or ``"tool"``.
    content : str
        The text. Special tokens spelled in it stay text.
    name : str or None
        The tool that speaks, such as ``"functions.get_weather"`` (required for a tool), or the name of a
        speaker.
    recipient : str or None
        Whom it is for: the tool that an assistant calls, ``"assistant"`` for a tool's result.
    channel : str or None
        Of an assistant's or a tool's message: ``"analysis"``, ``"commentary"`` or ``"final"``.
    content_type : str or None
        What `content` is, such as ``"<|constrain|>json"`` for a call's arguments (the token, then the type).
    """

    role: str
    content: str
    name: str | None = None
    recipient: str | None = None
    channel: str | None = None
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class Function:
    """A function the model may call.

    Attributes
    ----------
    name : str
        Its name, without white space.
    description : str
        What it does; each line becomes a comment.
    parameters : mapping or None
        The JSON schema of its argument, an object; None for a function without arguments.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None


def system_message(
    reasoning: str | None = "medium",
    current_date: str | datetime.date | None = None,
    knowledge_cutoff: str | None = "2024-06",
    model_identity: str | None = MODEL_IDENTITY,
    functions: bool = False,
    channels: Sequence[str] = CHANNELS,
) -> Message:
    """Make the system message that opens a conversation.

    Parameters
    ----------
    reasoning : {"low", "medium", "high"} or None
        How long the chain of thought should be.
    current_date : str, datetime.date or None
        Today, as ``YYYY-MM-DD``.
    knowledge_cutoff : str or None
        When the training data ends.
    model_identity : str or None
        The first line. Each of these four is left out when None.
    functions : bool
        Whether the developer message that follows holds functions.
    channels : sequence of str
        The channels the model may write to; empty leaves the whole section out.

    Returns
    -------
    Message
        The message.

    Raises
    ------
    ValueError
        If `reasoning` is none of the three.
    """
    if reasoning is not None and reasoning not in REASONING_EFFORTS:
        raise ValueError(f"reasoning must be one of {', '.join(REASONING_EFFORTS)}, but is {reasoning!r}")
    if isinstance(channels, str):
        raise ValueError(f"channels must be a sequence of names, but is the one string {channels!r}")
    if isinstance(current_date, datetime.date):
        current_date = f"{current_date:%Y-%m-%d}"
    who = [
        *([model_identity] if model_identity is not None else []),
        *([f"Knowledge cutoff: {knowledge_cutoff}"] if knowledge_cutoff is not None else []),
        *([f"Current date: {current_date}"] if current_date is not None else []),
    ]
    sections = ["\n".join(who)] if who else []
    if reasoning is not None:
        sections.append(f"Reasoning: {reasoning}")
    if channels:
        rule = f"# Valid channels: {', '.join(channels)}. Channel must be included for every message."
        if functions:
            rule += "\nCalls to these tools must go to the commentary channel: 'functions'."
        sections.append(rule)
    return Message("system", "\n\n".join(sections))


def developer_message(instructions: str | None = None, functions: Sequence[Function] = ()) -> Message:
    """Make the developer message: instructions and the functions the model may call.

    Parameters
    ----------
    instructions : str or None
        What is elsewhere called the system prompt.
    functions : sequence of Function
        Written as TypeScript types in the namespace ``functions``. Tell :func:`system_message` of them.

    Returns
    -------
    Message
        The message.

    Raises
    ------
    ValueError
        If a function's name or schema cannot be written.
    """
    sections = ["# Instructions", instructions] if instructions is not None else []
    if functions:
        lines = ["## functions\n", "namespace functions {\n"]
        for function in functions:
            lines += _function_lines(function)
        lines.append("} // namespace functions")
        sections += ["# Tools", "\n".join(lines)]
    return Message("developer", "\n\n".join(sections))


def _function_lines(function: Function) -> list[str]:
    if (
        not isinstance(function.name, str)
        or len(function.name.split()) != 1
        or function.name.strip() != function.name
    ):
        raise ValueError(f"a function's name must be one word without white space, but is {function.name!r}")
    if not isinstance(function.description, str):
        found = type(function.description).__name__
        raise ValueError(f"the description of function {function.name!r} must be a string, but is {found}")
    if function.parameters is None:
        signature = "()"
    else:
        try:
            signature = f"(_: {schema_to_typescript(function.parameters)})"
        except ValueError as error:
            raise ValueError(f"parameters of function {function.name!r}: {error}") from error
    comments = [f"// {line}" for line in _lines(function.description)]
    return [*comments, f"type {function.name} = {signature} => any;\n"]


def _lines(text: str) -> list[str]:
    """Split at line feeds alone (``str.splitlines`` also splits at Unicode's separators)."""
    lines = text.split("\n")
    ended, last = lines[:-1], lines[-1]
    return [line.removesuffix("\r") for line in ended] + ([last] if last else [])
