"""Our rendering and parsing against the openai-harmony library, on the published vocabulary."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import random
from pathlib import Path

import pytest

from mxmoe import harmony
from mxmoe.tokenizer import Tokenizer

peer = pytest.importorskip("openai_harmony")

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "gpt-oss-tokenizer.json.gz"
VOCABULARY_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
NUM_ORDINARY = 199_998
BATCHES = 20
PER_BATCH = 150


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = Path(os.environ.get("MXMOE_TOKENIZER_JSON", PUBLISHED))
    if not path.is_file():
        pytest.skip(f"the published tokenizer is not here: {path} (MXMOE_TOKENIZER_JSON may name it)")
    if path.suffix == ".gz":
        unpacked = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
        unpacked.write_bytes(gzip.decompress(path.read_bytes()))
        path = unpacked
    return Tokenizer.from_file(path)


@pytest.fixture(scope="module")
def encoding(tokenizer, tmp_path_factory):
    """The library; its vocabulary file is written from our tokenizer, and nothing is downloaded."""
    lines = [b"%s %d\n" % (base64.b64encode(tokenizer.token_bytes(i)), i) for i in range(NUM_ORDINARY)]
    vocabulary = b"".join(lines)
    assert hashlib.sha256(vocabulary).hexdigest() == VOCABULARY_SHA256, "not the published vocabulary"
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "o200k_base.tiktoken").write_bytes(vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(folder))
        return peer.load_harmony_encoding(peer.HarmonyEncodingName.HARMONY_GPT_OSS)


WORDS = [
    "the", "Weather", "in", "Rome?", "it's", "DON'T", "x=1;", "12345", "3.14", "naïve", "Ünïcödé",
    "日本語", "مرحبا", "🦀", "👩‍👩‍👧‍👦", "e\u0301", "\u200b", "\ufeff", "\u2028",
    "\x00", "\x1f", "\x85", "<|end|>", "<|start|>assistant",
    "<|channel|>final<|message|>", "<|return|>",
    "<|call|>", "<|endoftext|>", "<|constrain|>json", "<|reserved_200000|>",
    "{\"a\": [1, 2]}", "// comment",
    "null", "\"quoted\"", "\\n", "to=functions.f", "$", "—", "...", "C:\\dir",
]  # fmt: skip
SPACES = [" ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "   \n  ", "\u00a0", "\u3000", ""]


def text(rng, most=12):
    return "".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(rng.randint(0, most)))


def value(rng, depth=0):
    kind = rng.randrange(9 if depth < 2 else 7)
    return [
        lambda: text(rng, 2),
        lambda: rng.randint(-(10**9), 10**9),
        lambda: rng.choice([2**53, -(2**63), 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**30, 0]),
        lambda: rng.choice([0.0, -0.0, 1.0, 0.5, 1e-4, 1e-5, 1.5e-5, 1e-6, -2.5e-7, 1e15, 1e16, 1e21, 123456.789]),
        lambda: rng.choice([True, False]),
        lambda: None,
        lambda: "plain",
        lambda: [value(rng, depth + 1) for _ in range(rng.randrange(3))],
        lambda: {rng.choice("abcd") + str(i): value(rng, depth + 1) for i in range(rng.randrange(3))},
    ][kind]()


def maybe(rng, probability, make):
    return make() if rng.random() < probability else None


def schema(rng, depth=0):
    """A random JSON schema, mostly sensible, sometimes with a part of the wrong kind."""
    made = {}
    kind = rng.choice(["string", "number", "integer", "boolean", "array", "object", "oneOf", "list", "odd"])
    if depth >= 3 and kind in ("array", "object", "oneOf"):
        kind = "string"
    if kind in ("string", "number", "integer", "boolean", "array", "object"):
        made["type"] = kind
    if kind == "list":
        made["type"] = rng.choice([["number", "string"], ["integer", "null"], [], ["string", 3], ["object", "array"]])
    if kind == "odd":
        made |= rng.choice(
            [{}, {"type": "null"}, {"type": 7}, {"$ref": "#/x"}, {"oneOf": "no"}, {"enum": ["a", "b"]}]
        )
    if kind == "array" and rng.random() < 0.8:
        made["items"] = schema(rng, depth + 1)
    if kind == "oneOf":
        made["oneOf"] = [schema(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == "object":
        keys = rng.sample(["city", "unit", "naïve", "with space", "a-b", "x", "items", "type"], rng.randrange(5))
        made["properties"] = {key: schema(rng, depth + 1) for key in keys}
        if rng.random() < 0.7:
            made["required"] = [key for key in keys if rng.random() < 0.5] + rng.choice([[], [3], ["absent"]])
    if kind == "string" and rng.random() < 0.5:
        made["enum"] = rng.choice([["c", "f"], ["a b", "null", '"q"'], [], ["x", 1], [1, 2]])
    shared = rng.choice(["The same.", "Two\nlines."])
    for key, probability, make in (
        ("description", 0.4, lambda: rng.choice([shared, text(rng, 3), 5])),
        ("default", 0.3, lambda: value(rng)),
        ("nullable", 0.2, lambda: rng.choice([True, False, "yes"])),
        ("title", 0.2, lambda: rng.choice(["Title", text(rng, 2), 1])),
        ("examples", 0.2, lambda: rng.choice([["one", "two"], [], [1, "x"], "no"])),
    ):
        if rng.random() < probability:
            made[key] = make()
    if kind == "oneOf" and made["oneOf"] and rng.random() < 0.5:
        made["description"] = made["oneOf"][0]["description"] = shared
    return made


def function(rng):
    parameters = rng.choice([
        lambda: None, lambda: {}, lambda: {"type": "object", "properties": {}}, lambda: schema(rng),
        lambda: {"type": "object", "properties": {f"p{i}": schema(rng, 1) for i in range(rng.randrange(5))}},
    ])()  # fmt: skip
    description = rng.choice(["", "Gets it.", "Two\nlines.\r\nthree\r", text(rng, 5)])
    return harmony.Function(rng.choice(["get_weather", "f", "naïve.name", "x-1"]), description, parameters)


def to_peer(message):
    """Our message as the library's dictionary, its content as plain text."""
    fields = {"role": message.role, "content": message.content}
    for key in ("name", "recipient", "channel", "content_type"):
        if getattr(message, key) is not None:
            fields[key] = getattr(message, key)
    return fields


def opening(rng):
    """The same system and developer message, ours and the library's structured ones."""
    functions = [function(rng) for _ in range(rng.choice([0, 0, 1, 2, 3]))]
    instructions = maybe(rng, 0.7, lambda: rng.choice(["", "Be brief.", text(rng)]))
    effort = rng.choice(["low", "medium", "high", None])
    date = rng.choice([None, "2026-11-22", "2025-01-01"])
    cutoff = rng.choice([None, "2024-06", "2023-12"])
    identity = rng.choice([None, harmony.MODEL_IDENTITY, "", text(rng, 4)])
    channels = rng.choice([harmony.CHANNELS, ("final",), ()])
    ours, theirs = [], []
    if rng.random() < 0.9:
        ours.append(harmony.system_message(effort, date, cutoff, identity, bool(functions), channels))
        content = {
            "type": "system_content",
            "model_identity": identity,
            "reasoning_effort": effort and effort.title(),
            "conversation_start_date": date,
            "knowledge_cutoff": cutoff,
            "channel_config": {"valid_channels": list(channels), "channel_required": True},
        }
        theirs.append({"role": "system", "content": [content]})
    if functions or rng.random() < 0.7:
        ours.append(harmony.developer_message(instructions, functions))
        tools = [{"name": f.name, "description": f.description, "parameters": f.parameters} for f in functions]
        namespace = {"functions": {"name": "functions", "description": None, "tools": tools}}
        content = {
            "type": "developer_content",
            "instructions": instructions,
            "tools": namespace if tools else None,
        }
        theirs.append({"role": "developer", "content": [content]})
    return ours, theirs


def turn(rng):
    """One turn: a user's message, chains of thought, preambles, calls, results and perhaps an answer."""
    made = [harmony.Message("user", text(rng), name=maybe(rng, 0.1, lambda: "bob"))]
    for _ in range(rng.randrange(3)):
        made += [harmony.Message("assistant", text(rng), channel="analysis")] * (rng.random() < 0.8)
        made += [harmony.Message("assistant", text(rng), channel="commentary")] * (rng.random() < 0.2)
        if rng.random() < 0.6:
            tool = rng.choice(["functions.get_weather", "python", "browser.search", "functions.naïve"])
            kind = rng.choice([None, "<|constrain|>json", "json", "code", "<|constrain|>"])
            channel = rng.choice(["commentary", "analysis", None])
            made.append(harmony.Message("assistant", text(rng), None, tool, channel, kind))
            reply_to = rng.choice(["assistant", "all", None])
            made.append(harmony.Message("tool", text(rng), tool, reply_to, channel))
    if rng.random() < 0.7:
        made.append(harmony.Message("assistant", text(rng), channel=rng.choice(["final", "final", None])))
    return made


def conversation(rng):
    ours, theirs = opening(rng)
    for _ in range(rng.randrange(4)):
        messages = turn(rng)
        ours += messages
        theirs += map(to_peer, messages)
    return ours, json.dumps({"messages": theirs})


@pytest.mark.parametrize("seed", range(BATCHES))
def test_rendering_is_the_librarys(tokenizer, encoding, seed):
    rng = random.Random(seed)
    raw = encoding._inner  # takes JSON; the Python classes above it drop nulls from schemas
    for _ in range(PER_BATCH):
        ours, theirs = conversation(rng)
        role = rng.choice(["assistant", "assistant", "user", "tool"])
        drop = rng.random() < 0.8
        config = {"auto_drop_analysis": drop}
        expected = raw.render_conversation_for_completion(theirs, role, config)
        got = harmony.render_conversation(ours, tokenizer, next_role=role, drop_analysis=drop)
        assert got == expected, (tokenizer.decode(got), tokenizer.decode(expected))
        expected = raw.render_conversation(theirs, config)
        assert harmony.render_conversation(ours, tokenizer, next_role=None, drop_analysis=drop) == expected
        if ours:
            expected = raw.render_conversation_for_training(theirs, config)
            got = harmony.render_conversation(
                ours, tokenizer, next_role=None, drop_analysis=drop, end_with_return=True
            )
            assert got == expected


NAMES = ["functions.get_weather", "python", "browser.search", "functions.naïve", "a-b_c", "日本"]


def written(rng, tokenizer):
    """A message as a model may write it after ``<|start|>`` and the role, its header in any order.

    Left out is what the library itself cannot read back: a content type without a recipient (it takes the
    type for the recipient), and a speaker's name after a role.
    """
    special, encode = tokenizer.special, tokenizer.encode
    recipient = rng.choice([None, None, *NAMES])
    kind = rng.choice([None, "json", "code", "<|constrain|>json"]) if recipient else None
    channel = rng.choice(["analysis", "commentary", "final", "final", "other", None])
    to = encode(f" to={recipient}") if recipient else []
    where = [special("<|channel|>"), *encode(channel)] if channel else []
    header = where + to if rng.random() < 0.5 else to + where
    if kind == "<|constrain|>json":
        space = encode(" ") if rng.random() < 0.7 else []
        header += [*space, special("<|constrain|>"), *encode("json")]
    elif kind:
        header += encode(f" {kind}")
    if rng.random() < 0.3:  # any tokens: the bytes need not be UTF-8
        content = [rng.randrange(rng.choice([256, NUM_ORDINARY])) for _ in range(rng.randrange(20))]
    else:
        content = encode(text(rng, 6))
    return [*header, special("<|message|>"), *content]


def stream(rng, tokenizer):
    """A model's turn, or several, with results of tools between."""
    token_ids = written(rng, tokenizer)
    for _ in range(rng.randrange(4)):
        role = rng.choice(["assistant", "assistant", "user", "functions.f to=assistant", "python to=all"])
        end = tokenizer.special(rng.choice(["<|end|>", "<|call|>", "<|return|>"]))
        body = written(rng, tokenizer)
        if not role.startswith(("assistant", "user")):  # a tool's recipient is said already
            body = [tokenizer.special("<|channel|>"), *tokenizer.encode("commentary"), *body]
            start = body.index(tokenizer.special("<|message|>"))
            body = body[:2] + body[start:]
        token_ids += [end, tokenizer.special("<|start|>"), *tokenizer.encode(role), *body]
    if rng.random() < 0.7:
        token_ids.append(tokenizer.special(rng.choice(["<|end|>", "<|call|>", "<|return|>"])))
    return token_ids


@pytest.mark.parametrize("seed", range(BATCHES))
def test_parsing_is_the_librarys(tokenizer, encoding, seed):
    rng = random.Random(1000 + seed)
    for _ in range(PER_BATCH // 3):
        token_ids = stream(rng, tokenizer)
        theirs = encoding.parse_messages_from_completion_tokens(token_ids, peer.Role.ASSISTANT)
        ours = harmony.parse(token_ids, tokenizer)
        assert list(map(to_peer, ours)) == [flat(message) for message in theirs], tokenizer.decode(token_ids)


def flat(message):
    fields = message.to_dict() | {"content": message.content[0].text}
    return {key: part for key, part in fields.items() if part is not None}


@pytest.mark.parametrize("seed", range(BATCHES))
def test_streaming_is_the_librarys(tokenizer, encoding, seed):
    rng = random.Random(2000 + seed)
    for _ in range(PER_BATCH // 10):
        token_ids = stream(rng, tokenizer)
        ours = harmony.StreamParser(tokenizer)
        theirs = peer.StreamableParser(encoding, peer.Role.ASSISTANT)
        valid = "\ufffd" not in tokenizer.decode(token_ids)
        for token_id in token_ids:
            deltas = ours.push(token_id)
            theirs.process(token_id)
            assert ours.current_channel == theirs.current_channel
            assert ours.current_recipient == theirs.current_recipient
            assert len(ours.messages) == len(theirs.messages)
            if valid:  # the library shows at most one invalid byte a token
                assert ours.current_content == theirs.current_content
                shown = theirs.last_content_delta if ours.current is not None else None
                assert "".join(delta.text for delta in deltas) == (shown or "")


@pytest.mark.parametrize("seed", range(BATCHES))
def test_a_rendered_conversation_is_parsed_back_as_the_library_does(tokenizer, encoding, seed):
    rng = random.Random(3000 + seed)
    for _ in range(PER_BATCH // 10):
        messages = [m for _ in range(3) for m in turn(rng) if m.name is None or m.recipient is not None]
        messages = [m for m in messages if m.role != "user" or m.name is None]
        messages = [m for m in messages if m.recipient != "all" and (m.recipient or not m.content_type)]
        token_ids = harmony.render_conversation(messages, tokenizer, next_role=None, drop_analysis=False)
        assert harmony.parse(token_ids, tokenizer) == messages
        theirs = encoding.parse_messages_from_completion_tokens(token_ids, None)
        assert list(map(to_peer, messages)) == [flat(message) for message in theirs]


def test_the_oracle_is_awake(tokenizer, encoding):
    """A conversation with one word changed is not the library's."""
    ours, theirs = conversation(random.Random(5))
    changed = [*ours[:-1], harmony.Message("user", ours[-1].content + " x")]
    expected = encoding._inner.render_conversation(theirs, {"auto_drop_analysis": True})
    assert harmony.render_conversation(ours, tokenizer, next_role=None) == expected
    assert harmony.render_conversation(changed, tokenizer, next_role=None) != expected
