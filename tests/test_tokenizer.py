"""The tokenizer, the streaming decoder and stop strings."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from mxmoe.tokenizer import StopStrings, StreamDecoder, Tokenizer, TokenizerError
from small_tokenizer import SPECIAL, backend

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data" / "gpt-oss-tokenizer.json.gz"
SMALL = Tokenizer(backend())

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

TEXTS = [
    "", " ", "\n\n  \t", "Hello, world!", "naïve Grüße", "e\u0301", "日本語のテキスト", "🦀👩‍👩‍👧‍👦🏳️‍🌈",
    "مرحبا بالعالم", "\x00\x01\x7f\x85", "\u200b\ufeff\u2028\u2029", "\ufffd",
    "\U0010ffff\ue000", "a\r\nb\rc", "<|end|>", "<|start|>assistant<|channel|>final<|message|>",
    "<|endoftext|><|return|><|call|><|constrain|>json", "<|reserved_200000|>",
    "<|unknown|>", "  x  " * 50, "1234567890" * 9,
]  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    path = Path(os.environ.get("MXMOE_TOKENIZER_JSON", PUBLISHED))
    if not path.is_file():
        pytest.skip(f"the published tokenizer is not here: {path} (MXMOE_TOKENIZER_JSON may name it)")
    if path.suffix == ".gz":
        unpacked = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
        unpacked.write_bytes(gzip.decompress(path.read_bytes()))
        path = unpacked
    return Tokenizer.from_file(path)


@pytest.fixture(params=["small", "published"])
def tokenizer(request):
    return SMALL if request.param == "small" else request.getfixturevalue("published")


def stream(tokenizer, token_ids):
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(i) for i in token_ids), decoder.finish()]


def ids_of_bytes(data):
    """The tokens of single bytes."""
    by_bytes = {SMALL.token_bytes(i): i for i in range(SMALL.vocab_size)}
    return [by_bytes[bytes([byte])] for byte in data]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(tokenizer, text):
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == text.encode()
    assert "".join(stream(tokenizer, token_ids)) == text


@given(st.text())
def test_any_generated_text_comes_back(text):
    token_ids = SMALL.encode(text)
    assert SMALL.decode(token_ids) == text
    assert "".join(stream(SMALL, token_ids)) == text


@settings(max_examples=300)
@given(st.text())
def test_any_generated_text_comes_back_published(published, text):
    assert published.decode(published.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_special_tokens_in_a_text_stay_text(tokenizer, text):
    assert not any(map(tokenizer.is_special, tokenizer.encode(text)))


def test_every_special_tokens_spelling_stays_text(tokenizer):
    assert len(tokenizer.special_tokens) >= len(SPECIAL)
    for name, token_id in tokenizer.special_tokens.items():
        for text in (name, f"a{name}b", f" {name} ", name * 3):
            token_ids = tokenizer.encode(text)
            assert token_id not in token_ids and tokenizer.decode(token_ids) == text


def test_control_tokens_stay_text_even_if_the_file_calls_them_ordinary():
    unmarked = backend(special=[])
    unmarked.add_tokens([AddedToken(name, special=False, normalized=False) for name in SPECIAL])
    unmarked.encode_special_tokens = True
    assert unmarked.encode("a<|end|>b").tokens == ["a", "<|end|>", "b"]  # what must not happen
    tokenizer = Tokenizer(unmarked)
    assert tokenizer.special("<|end|>") not in tokenizer.encode("a<|end|>b")
    assert set(tokenizer.special_tokens) == set(SPECIAL)


def test_special_tokens_of_the_published_tokenizer(published):
    assert published.vocab_size == 200_019
    for name, token_id in {
        "<|endoftext|>": 199_999, "<|return|>": 200_002, "<|constrain|>": 200_003, "<|channel|>": 200_005,
        "<|start|>": 200_006, "<|end|>": 200_007, "<|message|>": 200_008, "<|call|>": 200_012,
    }.items():  # fmt: skip
        assert published.special(name) == token_id
        assert published.is_special(token_id)
        assert published.token_bytes(token_id) == name.encode()


def test_special_tokens_are_spelled_or_skipped():
    token_ids = [SMALL.special("<|start|>"), *SMALL.encode("user"), SMALL.special("<|end|>")]
    assert SMALL.decode(token_ids) == "<|start|>user<|end|>" == "".join(stream(SMALL, token_ids))
    assert SMALL.decode(token_ids, skip_special_tokens=True) == "user"
    decoder = StreamDecoder(SMALL, skip_special_tokens=True)
    assert "".join(map(decoder.push, token_ids)) == "user"


def test_token_bytes_cover_every_byte_and_agree_with_the_library():
    assert len(ids_of_bytes(range(256))) == 256
    library = backend()
    for token_id in range(SMALL.vocab_size):
        expected = library.decode([token_id], skip_special_tokens=False)
        assert SMALL.token_bytes(token_id).decode(errors="replace") == expected


@pytest.mark.parametrize("token_id", [-1, 400, 2**31, 2**63, 2**80])
def test_ids_outside_the_vocabulary(token_id):
    for call in (SMALL.token_bytes, lambda i: SMALL.decode([i]), StreamDecoder(SMALL).push):
        with pytest.raises(TokenizerError, match=rf"token id {token_id} is not in the vocabulary of 400 tokens"):
            call(token_id)


def test_unknown_special_token():
    with pytest.raises(TokenizerError, match=r"no special token '<\|nothing\|>'; it has: .*<\|end\|>"):
        SMALL.special("<|nothing|>")
    with pytest.raises(TokenizerError, match="it has: none"):
        Tokenizer(backend(special=[])).special("<|end|>")


def test_lone_surrogates_are_an_error():
    with pytest.raises(ValueError, match=r"lone surrogate U\+D800 at character 2"):
        SMALL.encode("ab\ud800")


def test_a_files_truncation_and_padding_are_not_obeyed(tmp_path):
    made = backend()
    made.enable_truncation(4)
    made.enable_padding(length=8)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("one two three four five")) == "one two three four five"
    assert len(tokenizer.encode("a")) == 1


def broken_files():
    good = json.loads(backend().to_str())

    def changed(**parts):
        return json.dumps(good | parts)

    without_merge_parts = good["model"] | {"merges": [["\u0120", "no such token"]]}
    return {
        "empty": "",
        "not JSON": "{",
        "a list": "[]",
        "a number": "7",
        "null": "null",
        "no model": "{}",
        "binary": b"\x80\x81\xff",
        "zeros": b"\0" * 100,
        "cut off": json.dumps(good)[:3000],
        "model is a word": changed(model="BPE"),
        "unknown model": changed(model={"type": "Unheard", "vocab": {}}),
        "no vocabulary": changed(model={"type": "BPE", "merges": []}),
        "vocabulary is a list": changed(model=good["model"] | {"vocab": ["a", "b"]}),
        "ids are words": changed(model=good["model"] | {"vocab": {"a": "b"}}),
        "ids are negative": changed(model=good["model"] | {"vocab": {"a": -1}}),
        "merge of unknown tokens": changed(model=without_merge_parts),
        "merges are numbers": changed(model=good["model"] | {"merges": [1, 2]}),
        "unknown decoder": changed(decoder={"type": "Unheard"}),
        "no decoder": changed(decoder=None),
        "another decoder": changed(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
        "another model": changed(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, added_tokens=[]),
        "added tokens are words": changed(added_tokens=["<|end|>"]),
        "added token without id": changed(added_tokens=[{"content": "<|end|>"}]),
        "wrong version": changed(version="99"),
        "bad pattern": changed(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "("},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
    }


BROKEN = broken_files()


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_give_one_clear_error(tmp_path, name):
    path = tmp_path / "tokenizer.json"
    content = BROKEN[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenizerError, match=r"tokenizer file .*tokenizer\.json: .") as caught:
        Tokenizer.from_file(path)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(TokenizerError, match="cannot be read"):
            Tokenizer.from_file(path)


def test_good_files_load(tmp_path):
    backend().save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path / "tokenizer.json", str(tmp_path / "tokenizer.json")):
        assert Tokenizer.from_file(path).encode("naïve") == SMALL.encode("naïve")


@pytest.mark.parametrize("character", ["é", "日", "🦀", "\U0010ffff"])
def test_no_half_characters(character):
    pieces = stream(SMALL, ids_of_bytes(f"a{character}b".encode()))
    assert pieces == ["a", *[""] * (len(character.encode()) - 1), character, "b", ""]


@pytest.mark.parametrize(
    ("data", "pieces"),
    [
        (b"\xff", ["\ufffd", ""]),
        (b"\xe6\x97", ["", "", "\ufffd"]),
        (b"\xe6\x97a", ["", "", "\ufffda", ""]),
        (b"\xe6\xe6\x97\xa5", ["", "\ufffd", "", "日", ""]),
        (b"\xed\xa0\x80", ["", "", "\ufffd" * 3, ""]),
        (b"\xf0\x9f\xff", ["", "", "\ufffd\ufffd", ""]),
        (b"\xc0\x80", ["\ufffd", "\ufffd", ""]),
    ],
)
def test_bytes_that_are_no_character(data, pieces):
    assert stream(SMALL, ids_of_bytes(data)) == pieces


@settings(max_examples=500)
@given(st.lists(st.one_of(st.integers(0, SMALL.vocab_size - 1), st.sampled_from(ids_of_bytes(range(128, 256))))))
def test_the_stream_is_the_text_of_all_tokens(token_ids):
    text = "".join(stream(SMALL, token_ids))
    assert text == SMALL.decode(token_ids)
    assert text == b"".join(map(SMALL.token_bytes, token_ids)).decode(errors="replace")


def test_the_decoder_starts_anew_after_finish():
    decoder = StreamDecoder(SMALL)
    first, *_ = ids_of_bytes("日".encode())
    assert (decoder.push(first), decoder.finish(), decoder.finish()) == ("", "\ufffd", "")
    assert [decoder.push(i) for i in ids_of_bytes(b"ok")] == ["o", "k"]


def cut(stops, pieces):
    stopper = StopStrings(stops)
    shown = [stopper.push(piece) for piece in pieces]
    return [*shown, stopper.finish()], stopper.stopped


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "stopped"),
    [
        ([], ["a", "b"], ["a", "b", ""], None),
        (["END"], ["one EN", "D two"], ["one ", "", ""], "END"),
        (["END"], ["one EN", "TER"], ["one ", "ENTER", ""], None),
        (["END"], ["one EN"], ["one ", "EN"], None),
        (["END"], ["E", "N", "D", "x"], ["", "", "", "", ""], "END"),
        (["aab"], ["aaa", "b!"], ["a", "", ""], "aab"),
        (["abcde", "bcd"], ["a", "bcd", "e"], ["", "a", "", ""], "bcd"),
        (["bcd", "abcd"], ["xabcd"], ["x", ""], "abcd"),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", "", ""], "\n\n"),
        (["🦀"], ["a🦀b"], ["a", ""], "🦀"),
    ],
)
def test_stop_strings(stops, pieces, shown, stopped):
    assert cut(stops, pieces) == (shown, stopped)


@settings(max_examples=500)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("ab", max_size=4), max_size=8),
)
def test_stop_strings_however_the_text_is_split(stops, pieces):
    text = "".join(pieces)
    ends = [end for end in range(1, len(text) + 1) if text[:end].endswith(tuple(stops))] if stops else []
    expected, stopped = text, None
    if ends:
        stopped = max((s for s in stops if text[: ends[0]].endswith(s)), key=len)
        expected = text[: ends[0] - len(stopped)]
    for split in (pieces, list(text), [text]):
        shown, found = cut(stops, split)
        assert ("".join(shown), found) == (expected, stopped)


@settings(max_examples=200)
@given(st.lists(st.text("abc", min_size=1, max_size=5), max_size=3), st.text("abc", max_size=12))
def test_stop_strings_hold_back_no_more_than_they_must(stops, text):
    stopper = StopStrings(stops)
    shown = stopper.push(text)
    if stopper.stopped is None:
        held = text[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(("stops", "message"), [([""], "''"), (["a", 3], "3"), ("END", "'END'"), ([None], "None")])
def test_bad_stop_strings(stops, message):
    with pytest.raises(ValueError, match=f"stop string.*{message}"):
        StopStrings(stops)
