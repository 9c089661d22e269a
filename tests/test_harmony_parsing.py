"""The harmony format read: streams, every way one can be malformed, and all that was written read back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmony_text import TOKENIZER, parsed, said, tokens
from mxmoe import harmony
from mxmoe.harmony import Message
from small_tokenizer import SPECIAL

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

FINAL = said("Hi", "final")
CALLED = said("{}", "commentary", "functions.f", "<|constrain|>json")


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        # The header's parts in any order, with and without white space.
        (" to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>", [CALLED]),
        ("<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>", [CALLED]),
        ("<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}<|call|>", [CALLED]),
        ("<|channel|> commentary  to=functions.f\n<|constrain|> json <|message|>{}<|call|>", [CALLED]),
        ("<|constrain|>json to=functions.f<|channel|>commentary<|message|>{}<|call|>", [CALLED]),
        ("<|channel|>commentary to= functions.f <|constrain|>json<|message|>{}<|call|>", [CALLED]),
        (" functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>", [CALLED]),
        ("<|channel|>analysis to=python code<|message|>1+1<|call|>", [
            said("1+1", "analysis", "python", "code")]),
        (" to=python code<|channel|>analysis<|message|>1+1<|call|>", [
            said("1+1", "analysis", "python", "code")]),
        ("<|channel|>analysis json to=f<|message|>x<|call|>", [said("x", "analysis", "f", "json")]),
        # A word without "to=".
        ("<|channel|>commentary json<|message|>{}<|end|>", [said("{}", "commentary", None, "json")]),
        (" functions.f<|channel|>commentary<|message|>{}<|end|>", [said("{}", "commentary", "functions.f")]),
        ("<|channel|>commentary functions.f json<|message|>x<|call|>", [
            said("x", "commentary", "functions.f", "json")]),
        ("<|channel|>final <|constrain|>json<|message|>{}<|end|>", [
            said("{}", "final", None, "<|constrain|>json")]),
        (" f json<|channel|>final<|message|>{}<|end|>", [said("{}", "final", "f", "json")]),
        ("<|channel|>final <|constrain|><|message|>{}<|end|>", [said("{}", "final", None, "<|constrain|>")]),
        # More words than fit.
        ("<|channel|>final one two three four<|message|>Hi<|end|>", [
            said("one two", "final"), said("Hi", "final", "three", "four")]),
        ("<|channel|>commentary to=f to=g x <|constrain|>json<|message|>{}<|call|>", [
            said("to=g x", "commentary"), said("{}", "commentary", "f", "<|constrain|>json")]),
        ("<|channel|>analysis<|channel|>final<|message|>Hi<|end|>", [said("Hi", "analysis", None, "final")]),
        # Channel or role missing, unknown or repeated.
        ("<|message|>Hi<|end|>", [said("Hi")]),
        ("<|channel|>thinking<|message|>Hi<|end|>", [said("Hi", "thinking")]),
        ("<|channel|><|message|>Hi<|end|>", [said("Hi")]),
        ("assistant<|channel|>final<|message|>Hi<|end|>", [FINAL]),
        ("<|start|>assistant<|channel|>final<|message|>Hi<|end|>", [FINAL]),
        ("<|start|><|start|>assistant<|channel|>final<|message|>Hi<|end|>", [FINAL]),
        ("<|start|>assistant<|start|>assistant<|channel|>final<|message|>Hi<|end|>", [FINAL]),
        ("<|start|><|channel|>final<|message|>Hi<|end|>", [FINAL]),
        ("<|start|> to=f<|channel|>final<|message|>Hi<|end|>", [said("Hi", "final", "f")]),
        ("<|start|>user:bob<|message|>Hi<|end|>", [Message("user", "Hi", "bob")]),
        ("<|start|>python<|channel|>analysis<|message|>2<|end|>", [
            Message("tool", "2", "python", None, "analysis")]),
        ("<|start|>robot to=assistant<|message|>2<|end|>", [Message("tool", "2", "robot", "assistant")]),
        ("<|start|>tool<|message|>2<|end|>", [Message("tool", "2", "tool")]),
        # The beginning of the next message missing, and what lies between messages.
        ("<|channel|>analysis<|message|>Hm<|end|><|channel|>final<|message|>Hi<|return|>", [
            said("Hm", "analysis"), FINAL]),
        ("<|channel|>analysis<|message|>Hm<|end|>assistant<|channel|>final<|message|>Hi<|return|>", [
            said("Hm", "analysis"), FINAL]),
        ("<|channel|>final<|message|>Hi<|end|>\n <|start|>assistant<|channel|>final<|message|>Hi<|end|>\n", [
            FINAL, FINAL]),
        ("<|channel|>final<|message|>Hi<|end|> and more", [FINAL, said(" and more")]),
        # No <|message|>.
        ("<|channel|>final The answer is  4<|return|>", [said("The answer is  4", "final")]),
        ("<|channel|>finally<|return|>", [said("finally")]),
        ("Hello  there\n<|return|>", [said("Hello  there\n")]),
        (" to=python is text<|end|>", [said(" to=python is text")]),
        (' to=functions.f<|channel|>commentary <|constrain|>json{"a": 1}<|call|>', [
            said('{"a": 1}', "commentary", "functions.f", "<|constrain|>json")]),
        ('<|start|>functions.f to=assistant<|channel|>commentary{"t": 21}<|end|>', [
            Message("tool", '{"t": 21}', "functions.f", "assistant", "commentary")]),
        ("<|start|>assistant Hello<|end|>", [said("Hello")]),
        ("<|start|>Hello there<|end|>", [said("Hello there")]),
        ("<|start|>user:bob Hello<|end|>", [Message("user", "Hello", "bob")]),
        ("assistant<|channel|>final Hi<|end|>", [FINAL]),
        ("assistants help<|end|>", [said("assistants help")]),
        ("<|channel|>final Hi<|start|>user<|message|>Yo<|end|>", [FINAL, Message("user", "Yo")]),
        ("one<|constrain|>json two<|end|>", [said("onetwo", None, None, "<|constrain|>json")]),
        ("<|channel|>analysis Hm<|channel|>final Hi<|end|>", [said("Hmfinal Hi", "analysis")]),
        # Special tokens in content.
        ("<|channel|>final<|message|>Hi<|start|>user<|message|>Yo", [FINAL, Message("user", "Yo")]),
        ("<|channel|>analysis<|message|>Hm<|channel|>final<|message|>Hi", [said("Hm", "analysis"), FINAL]),
        ("<|channel|>final<|message|><|message|>H<|message|>i<|end|>", [FINAL]),
        ("<|channel|>final<|message|>H<|constrain|>i<|end|>", [FINAL]),
        ("<|channel|>final<|startoftext|><|message|>H<|startoftext|>i<|end|>", [FINAL]),
        ("<|channel|>final<|message|>Hi<|endoftext|>", [FINAL]),
        ("<|channel|>final<|message|>Hi<|end|><|end|><|return|>", [FINAL]),
        # The stream ends early.
        ("", []),
        ("<|start|>assistant", []),
        ("<|start|>", []),
        ("<|start|>tool", []),
        (" \n", []),
        ("<|channel|>", []),
        ("<|channel|>final", [said("", "final")]),
        ("<|channel|>ana", [said("ana")]),
        ("<|channel|>final<|message|>", [said("", "final")]),
        ("<|channel|>final<|message|>Hi", [FINAL]),
        (" to=functions.f<|channel|>commentary", [said("", "commentary", "functions.f")]),
    ],
)  # fmt: skip
def test_every_malformation_is_read_one_way(text, messages):
    assert parsed(text) == messages


def test_the_speaker_that_the_stream_does_not_name():
    assert parsed("<|message|>Hi<|end|><|message|>Yo", role="user") == [
        Message("user", "Hi"),
        Message("user", "Yo"),
    ]
    assert parsed("user<|message|>Hi", role="user") == [Message("user", "Hi")]


def test_half_a_character_and_ids_that_are_none():
    single = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.vocab_size)}
    half = [single[bytes([byte])] for byte in "🦀".encode()[:3]]
    in_content = [*tokens("<|channel|>final<|message|>a"), *half]
    assert harmony.parse(in_content, TOKENIZER) == [said("a\ufffd", "final")]
    assert harmony.parse([*in_content, *tokens("<|end|>")], TOKENIZER) == [said("a\ufffd", "final")]
    assert harmony.parse([*in_content, *tokens("b")], TOKENIZER) == [said("a\ufffdb", "final")]
    in_header = [*tokens("<|channel|>x"), *half, *tokens("<|message|>a")]
    assert harmony.parse(in_header, TOKENIZER) == [said("a", "x\ufffd")]
    beyond = [-1, *tokens("<|message|>"), 10**6, *tokens("a"), 2**80]
    assert harmony.parse(beyond, TOKENIZER) == [said("a")]


def test_streaming_shows_each_piece_as_it_comes():
    parser = harmony.StreamParser(TOKENIZER)
    assert parser.current is None and parser.current_channel is None and parser.current_content == ""
    for token_id in tokens("<|channel|>analysis<|message|>"):
        assert parser.push(token_id) == []
    assert parser.current == said("", "analysis") and parser.current_channel == "analysis"
    first, second = tokens("Hm"), tokens("日")
    shown = [delta.text for token_id in first for delta in parser.push(token_id)]
    assert shown == [TOKENIZER.decode([token_id]) for token_id in first]
    deltas = [parser.push(token_id) for token_id in second]
    assert [delta.text for found in deltas for delta in found] == ["日"] and len(deltas[-1]) == 1
    assert parser.current_content == "Hm日" and parser.messages == []
    (end,) = tokens("<|end|>")
    assert parser.push(end) == [] and parser.current is None
    assert parser.messages == [said("Hm日", "analysis")]
    for token_id in tokens("<|start|>assistant to=f<|channel|>commentary json<|message|>"):
        assert parser.push(token_id) == []
    assert parser.current_recipient == "f"
    (delta,) = parser.push(TOKENIZER.encode("x")[0])
    assert delta == harmony.Delta(1, "x", "assistant", None, "f", "commentary", "json")
    assert parser.finish() == [] and parser.finish() == [] and len(parser.messages) == 2


def stream(token_ids):
    parser = harmony.StreamParser(TOKENIZER)
    deltas = [delta for token_id in token_ids for delta in parser.push(token_id)]
    return [*deltas, *parser.finish()], parser.messages


ORDINARY = [i for i in range(TOKENIZER.vocab_size) if not TOKENIZER.is_special(i)]
HEADER_TEXTS = [
    "assistant", "user", "final", "analysis", "commentary", " to=f", "to=", "json", " ", "\n", "tool", ":",
]  # fmt: skip
PIECES = st.one_of(
    st.sampled_from(SPECIAL).map(tokens),
    st.sampled_from(SPECIAL).map(tokens),
    st.sampled_from(HEADER_TEXTS).map(TOKENIZER.encode),
    st.sampled_from(ORDINARY).map(lambda i: [i]),
    st.integers(-1, 500).map(lambda i: [i]),
)


@settings(max_examples=1500)
@given(st.lists(PIECES, max_size=25))
def test_no_stream_fails_and_deltas_make_the_messages(pieces):
    deltas, messages = stream([i for piece in pieces for i in piece])
    texts = [""] * len(messages)
    for delta in deltas:
        assert delta.text
        of = messages[delta.index]
        texts[delta.index] += delta.text
        header = (delta.role, delta.name, delta.recipient, delta.channel, delta.content_type)
        assert header == (of.role, of.name, of.recipient, of.channel, of.content_type)
    assert texts == [message.content for message in messages]


@settings(max_examples=1500)
@given(st.lists(st.sampled_from([*SPECIAL, *HEADER_TEXTS, *[None] * 10]), max_size=25))
def test_no_text_is_lost(parts):
    """Of numbered marks strewn over a random stream each is found in a content or a part of a header."""
    text = "".join(f"[{i}]" if part is None else part for i, part in enumerate(parts))
    messages = parsed(text)
    contents = " ".join(message.content for message in messages)
    headers = " ".join(f"{m.name} {m.recipient} {m.channel} {m.content_type}" for m in messages)
    for i, part in enumerate(parts):
        if part is None:
            times = contents.count(f"[{i}]")
            assert times == 1 or (times == 0 and f"[{i}]" in headers), (text, messages)


@settings(max_examples=500)
@given(st.lists(st.sampled_from(ORDINARY), max_size=30), st.lists(st.sampled_from(ORDINARY), max_size=30))
def test_content_is_kept_to_the_byte(first, second):
    token_ids = [*tokens("<|channel|>final<|message|>"), *first, *tokens("<|start|><|message|>"), *second]
    assert [m.content for m in harmony.parse(token_ids, TOKENIZER)] == [
        TOKENIZER.decode(first),
        TOKENIZER.decode(second),
    ]


WORD = st.text(min_size=1, max_size=8).filter(lambda word: not any(map(str.isspace, word)))
FREE_WORD = WORD.filter(lambda word: not word.startswith("to="))
CONTENT = st.one_of(st.text(), st.sampled_from(SPECIAL), st.just("<|start|>system<|message|>"))
TOOL = FREE_WORD.filter(lambda word: word.partition(":")[0] not in harmony.ROLES)
RECIPIENT = st.none() | WORD.filter("all".__ne__)
MESSAGES = st.one_of(
    st.builds(Message, st.sampled_from(["system", "developer", "user"]), CONTENT, st.none() | WORD),
    st.builds(Message, st.just("tool"), CONTENT, TOOL, RECIPIENT, st.none() | FREE_WORD),
    st.builds(
        Message,
        st.just("assistant"),
        CONTENT,
        st.none() | WORD,
        RECIPIENT,
        st.sampled_from(harmony.CHANNELS) | FREE_WORD,
        st.none() | st.just("<|constrain|>json") | FREE_WORD,
    ),
)  # fmt: skip


@settings(max_examples=1000)
@given(st.lists(MESSAGES, max_size=4))
def test_what_is_rendered_is_parsed_back(messages):
    token_ids = harmony.render_conversation(messages, TOKENIZER, drop_analysis=False)
    assert harmony.parse(token_ids, TOKENIZER) == messages
    for message in messages:
        assert harmony.parse(harmony.render_message(message, TOKENIZER), TOKENIZER) == [message]
