"""Text to token ids and back: a byte-level BPE tokenizer, a streaming decoder and stop strings.

The encoding itself is the ``tokenizers`` library's. What is added here is what generation needs from it: the
exact bytes of every token, text that streams without ever showing half a character, and the promise that a
special token's spelling inside a text (``"<|end|>"`` typed by a user) stays text.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used, or a token that the tokenizer does not have."""


def _byte_of_character() -> dict[str, int]:
    """Map each character of a byte-level vocabulary to the byte it stands for.

    Bytes that print in Latin-1 stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"tokenizer file {path}: cannot be read: {error}") from error
    try:
        return tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        raise TokenizerError(f"tokenizer file {path}: not a valid tokenizer.json: {error}") from error


class Tokenizer:
    """A byte-level BPE tokenizer read from a ``tokenizer.json``.

    Every added token that looks like a control token (``<|...|>``) is treated as special, whatever the file
    says of it: otherwise a user's text could contain one.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
        The tokenizer to wrap. It is changed: special tokens are no longer recognised inside texts.

    Raises
    ------
    TokenizerError
        If `backend` is not byte-level BPE.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        if not isinstance(backend.model, models.BPE) or not isinstance(backend.decoder, decoders.ByteLevel):
            found = f"{type(backend.model).__name__} with decoder {type(backend.decoder).__name__}"
            raise TokenizerError(f"the tokenizer must be a BPE model with a ByteLevel decoder, but is {found}")
        control = [
            AddedToken(token.content, special=True, normalized=False)
            for token in backend.get_added_tokens_decoder().values()
            if token.content.startswith("<|") and token.content.endswith("|>") and not token.special
        ]
        backend.add_special_tokens(control)
        backend.encode_special_tokens = True
        # Some files carry the truncation of a training run, which would cut prompts silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._added = {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()}
        self._special = {
            token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self._special_ids = frozenset(self._special.values())

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Parameters
        ----------
        path : str or Path
            The file.

        Returns
        -------
        Tokenizer
            The tokenizer.

        Raises
        ------
        TokenizerError
            If the file cannot be read, is not a tokenizer, or is not byte-level BPE.
        """
        path = Path(path)
        backend = _load(path)
        try:
            return cls(backend)
        except TokenizerError as error:
            raise TokenizerError(f"tokenizer file {path}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """The number of tokens, special ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens: the id of each by its spelling."""
        return dict(self._special)

    def special(self, name: str) -> int:
        """Return the id of a special token.

        Parameters
        ----------
        name : str
            Its spelling, such as ``"<|end|>"``.

        Returns
        -------
        int
            Its id.

        Raises
        ------
        TokenizerError
            If the tokenizer has no such special token.
        """
        try:
            return self._special[name]
        except KeyError:
            known = ", ".join(sorted(self._special)) or "none"
            raise TokenizerError(f"the tokenizer has no special token {name!r}; it has: {known}") from None

    def is_special(self, token_id: int) -> bool:
        """Return whether `token_id` is a special token (an id outside the vocabulary is not)."""
        return token_id in self._special_ids

    def encode(self, text: str) -> list[int]:
        """Encode a text. The spelling of a special token inside it is encoded as the ordinary text it is.

        Parameters
        ----------
        text : str
            The text, without lone surrogates.

        Returns
        -------
        list of int
            The token ids, without any special token.

        Raises
        ------
        ValueError
            If `text` holds a lone surrogate, which no UTF-8 text has.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds the lone surrogate U+{ord(text[error.start]):04X} at character "
                f"{error.start}, which UTF-8 cannot express"
            ) from error
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for; a special token stands for its spelling.

        Parameters
        ----------
        token_id : int
            The token.

        Returns
        -------
        bytes
            Its bytes: not always whole UTF-8 characters.

        Raises
        ------
        TokenizerError
            If `token_id` is not in the vocabulary.
        """
        added = self._added.get(token_id)
        if added is not None:
            return added.encode()
        try:
            token = self._backend.id_to_token(token_id)
        except OverflowError:
            token = None
        if token is None:
            raise TokenizerError(f"token id {token_id} is not in the vocabulary of {self.vocab_size} tokens")
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError as error:
            raise TokenizerError(
                f"token id {token_id} is {token!r}, and {error.args[0]!r} is no byte-level character"
            ) from None

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Decode tokens to text; bytes that are not UTF-8 become U+FFFD.

        Parameters
        ----------
        token_ids : iterable of int
            The tokens.
        skip_special_tokens : bool
            Whether special tokens are left out instead of being spelled.

        Returns
        -------
        str
            The text.

        Raises
        ------
        TokenizerError
            If a token is not in the vocabulary.
        """
        skipped = self._special_ids if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(i) for i in token_ids if i not in skipped).decode(errors="replace")


class StreamDecoder:
    """Decode tokens as they arrive, never emitting half a character.

    Bytes are held back while they may still become a character, and become U+FFFD once they cannot, so that
    all the pieces together are the text of :meth:`Tokenizer.decode`.

    Parameters
    ----------
    tokenizer : Tokenizer
        Whose tokens arrive.
    skip_special_tokens : bool
        Whether special tokens are left out instead of being spelled.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Add a token and return the text that it completes, often one word, possibly empty.

        Parameters
        ----------
        token_id : int
            The next token.

        Returns
        -------
        str
            The new text.

        Raises
        ------
        TokenizerError
            If `token_id` is not in the vocabulary; the decoder is then as it was before.
        """
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """End the text: return U+FFFD for a character left incomplete, and start anew."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Cut a stream of text at the first stop string, however the text is split into pieces.

    Text that may be the beginning of a stop string is held back until it is clear that it is not. Of several
    stop strings the one that is complete first wins, and of those complete at the same character the longest.

    Parameters
    ----------
    stops : sequence of str
        The stop strings; none means that nothing is held back.

    Raises
    ------
    ValueError
        If a stop string is empty or not a string, or if `stops` is itself a string.

    Attributes
    ----------
    stopped : str or None
        The stop string that ended the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise ValueError(f"stop strings must be a sequence of strings, but got the one string {stops!r}")
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"a stop string must be a non-empty string, but got {stop!r}")
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._held = ""
        self.stopped: str | None = None

    def push(self, text: str) -> str:
        """Add text and return what can be shown: nothing of a stop string, nor anything after it.

        Parameters
        ----------
        text : str
            The next piece.

        Returns
        -------
        str
            The text that is certain not to belong to a stop string.
        """
        if self.stopped is not None:
            return ""
        self._held += text
        ends = [(self._held.index(s) + len(s), s) for s in self._stops if s in self._held]
        if ends:
            end, self.stopped = min(ends, key=lambda found: found[0])
            shown, self._held = self._held[: end - len(self.stopped)], ""
            return shown
        keep = self._possible_beginning()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """End the text: return what was held back, empty if a stop string ended it."""
        rest, self._held = self._held, ""
        return rest

    def _possible_beginning(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), len(self._stops[0]) - 1) if self._stops else 0
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
