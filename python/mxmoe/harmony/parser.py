"""What the model writes, as messages, while it writes.

A message is ``<|start|>``, header, ``<|message|>``, content and an end token (``<|end|>``, ``<|return|>``,
``<|call|>`` or ``<|endoftext|>``). Generation begins inside a header, since the prompt ended in
``<|start|>assistant``. A model may break this form anywhere; a parser that gives up would lose its answer, so
each breach has one reading:

============================================  ============================================================
the stream                                    is read as
============================================  ============================================================
the header's parts in any order               the same header
``<|constrain|>`` with or without a space     the same content type
a word without ``to=``                        after a channel or recipient the type, else the recipient
more words in a header than fit               a message of their own before it, in the same channel
an unknown channel, or none                   as written, or None
an unknown role                               a tool of that name
no ``<|start|>``, or no role after it         a header of the parser's role
no ``<|message|>`` before the end             role, known channel, ``to=`` and type; the rest is content
``<|start|>`` or ``<|channel|>`` in content   the end of that message and the beginning of the next header
the stream ends in a header or in content     the end of the message
a header with nothing in it but a role        no message
half a character                              U+FFFD
any other special token, an id that is none   nothing: it carries no text
white space between messages                  nothing
============================================  ============================================================
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mxmoe.harmony.messages import CHANNELS, ROLES, Message
from mxmoe.harmony.render import control_tokens
from mxmoe.tokenizer import Tokenizer, TokenizerError

_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|endoftext|>")
_WORD = re.compile(r"\s*(\S+)")
_CHANNEL = re.compile(rf"\s*({'|'.join(CHANNELS)})\b")
_TYPE = re.compile(r"\s*([\w.+/-]*)")
_RECIPIENT = re.compile(r"\s*to=(\S+)")

# A part of a header: the special token before it ("" where a header has no <|start|>), and its text.
_Part = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a message's content, as it streams.

    Attributes
    ----------
    index : int
        The message it belongs to, by its place in :attr:`StreamParser.messages` once complete.
    text : str
        The new text: whole characters, never empty.
    role, name, recipient, channel, content_type : str or None
        The message's header, as in :class:`~mxmoe.harmony.Message`.
    """

    index: int
    text: str
    role: str
    name: str | None = None
    recipient: str | None = None
    channel: str | None = None
    content_type: str | None = None


class StreamParser:
    """Read tokens, one at a time, as messages; never fail, and lose no text, however malformed the stream.

    The module's table says how each malformation is read.

    Parameters
    ----------
    tokenizer : Tokenizer
        A tokenizer with the format's special tokens.
    role : str
        Who speaks where the stream does not say: at its beginning, after the prompt's ``<|start|>assistant``.

    Raises
    ------
    TokenizerError
        If the tokenizer lacks special tokens.
    ValueError
        If `role` is unknown.

    Attributes
    ----------
    messages : list of Message
        The messages that are complete.
    """

    def __init__(self, tokenizer: Tokenizer, role: str = "assistant") -> None:
        if role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, but is {role!r}")
        self._tokenizer = tokenizer
        self._control = {token_id: name for name, token_id in control_tokens(tokenizer).items()}
        if "<|endoftext|>" in tokenizer.special_tokens:
            self._control[tokenizer.special("<|endoftext|>")] = "<|endoftext|>"
        self._role = role
        self._header: list[tuple[str, bytearray]] = []
        self._open: Message | None = None  # the message whose content is being read, without its content
        self._content: list[str] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.messages: list[Message] = []

    @property
    def current(self) -> Message | None:
        """The message whose content is being read, as far as it goes; None outside of content."""
        return None if self._open is None else replace(self._open, content=self.current_content)

    @property
    def current_channel(self) -> str | None:
        """The channel of the message being read, None if it has none or no content is being read."""
        return None if self._open is None else self._open.channel

    @property
    def current_recipient(self) -> str | None:
        """The recipient of the message being read, None if it has none or no content is being read."""
        return None if self._open is None else self._open.recipient

    @property
    def current_content(self) -> str:
        """The content so far of the message being read, in whole characters."""
        return "".join(self._content)

    def push(self, token_id: int) -> list[Delta]:
        """Read a token.

        Parameters
        ----------
        token_id : int
            The next token.

        Returns
        -------
        list of Delta
            The content it makes known: usually one piece or none; more when it ends a malformed header.
        """
        control = self._control.get(token_id)
        if control is not None:
            return self._push_control(control)
        if self._tokenizer.is_special(token_id):
            return []
        try:
            data = self._tokenizer.token_bytes(token_id)
        except TokenizerError:
            return []
        if self._open is not None:
            return self._add_content(self._decoder.decode(data))
        if not self._header:
            self._header.append(("", bytearray()))
        self._header[-1][1].extend(data)
        return []

    def finish(self) -> list[Delta]:
        """End the stream: a message that was not complete becomes so.

        Returns
        -------
        list of Delta
            The content that had been held back.
        """
        return self._end_message()

    def _push_control(self, control: str) -> list[Delta]:
        if control in _ENDS:
            return self._end_message()
        if control == "<|message|>":
            return self._begin_content() if self._open is None else []
        if control == "<|constrain|>" and self._open is not None:
            return []
        deltas: list[Delta] = []
        if control == "<|start|>" or self._open is not None:
            deltas = self._end_message()
        if control != "<|start|>" and not self._header:
            self._header.append(("", bytearray()))
        self._header.append((control, bytearray()))
        return deltas

    def _take_header(self) -> list[_Part]:
        parts = [(marker, data.decode(errors="replace")) for marker, data in self._header]
        self._header = []
        return parts

    def _begin_content(self) -> list[Delta]:
        header, unread = _read_header(self._take_header(), self._role)
        deltas: list[Delta] = []
        if unread:
            self._open = replace(header, recipient=None, content_type=None)
            deltas = [*self._add_content(unread), *self._end_message()]
        self._open = header
        return deltas

    def _add_content(self, text: str) -> list[Delta]:
        if not text or self._open is None:
            return []
        self._content.append(text)
        of = self._open
        index = len(self.messages)
        return [Delta(index, text, of.role, of.name, of.recipient, of.channel, of.content_type)]

    def _end_message(self) -> list[Delta]:
        deltas: list[Delta] = []
        if self._open is None:
            if (found := _read_broken_header(self._take_header(), self._role)) is None:
                return []
            self._open = replace(found, content="")
            deltas = self._add_content(found.content)
        deltas += self._add_content(self._decoder.decode(b"", final=True))
        self.messages.append(replace(self._open, content=self.current_content))
        self._open, self._content = None, []
        return deltas


def parse(token_ids: Iterable[int], tokenizer: Tokenizer, role: str = "assistant") -> list[Message]:
    """Read tokens as messages: what a model wrote, or a whole rendered conversation.

    Parameters
    ----------
    token_ids : iterable of int
        The tokens, with or without the ``<|start|>`` that opens the first message.
    tokenizer : Tokenizer
        A tokenizer with the format's special tokens.
    role : str
        Who speaks where the tokens do not say.

    Returns
    -------
    list of Message
        The messages; see :class:`StreamParser` for malformed ones.

    Raises
    ------
    TokenizerError
        If the tokenizer lacks special tokens.
    ValueError
        If `role` is unknown.
    """
    parser = StreamParser(tokenizer, role)
    for token_id in token_ids:
        parser.push(token_id)
    parser.finish()
    return parser.messages


def _speaker(word: str) -> tuple[str, str | None]:
    """Return the role and name that a header's first word says."""
    role, _, name = word.partition(":")
    if word in ROLES:
        return word, word if word == "tool" else None
    if role in ROLES and role != "tool" and name:
        return role, name
    return "tool", word


def _read_header(parts: list[_Part], default_role: str) -> tuple[Message, str]:
    """Read a header that ``<|message|>`` closed; return it, and the words that fit no field."""
    header = Message(default_role, "")
    words: list[tuple[str, bool]] = []  # those not yet read, and whether each came after the channel
    after_channel = False
    for marker, text in parts:
        after_channel = after_channel or marker == "<|channel|>"
        here = text.split()
        field = bool(here) and not here[0].startswith("to=")
        if marker == "<|start|>" and field:
            role, name = _speaker(here.pop(0))
            header = replace(header, role=role, name=name)
        elif marker == "" and here[:1] == [default_role]:
            here.pop(0)
        elif marker == "<|channel|>" and field and header.channel is None:
            header = replace(header, channel=here.pop(0))
        elif marker == "<|constrain|>" and header.content_type is None:
            header = replace(header, content_type=marker + (here.pop(0) if field else ""))
        words += [(word, after_channel) for word in here]
    return _assign_words(header, words)


def _assign_words(header: Message, words: list[tuple[str, bool]]) -> tuple[Message, str]:
    """Find recipient and content type among a header's loose words; return it and the words left over."""
    for i, (word, _) in enumerate(words):
        if word.startswith("to="):
            named = i + 1 if word == "to=" else i  # "to= x" means "to=x"
            recipient = words[named][0].removeprefix("to=") if named < len(words) else ""
            header = replace(header, recipient=recipient or None)
            words = words[:i] + words[named + 1 :]
            break
    if words and header.content_type is None:
        word, after_channel = words[-1]
        if after_channel or header.recipient is not None or len(words) > 1:
            header, words = replace(header, content_type=word), words[:-1]
    if words and header.recipient is None:
        header, words = replace(header, recipient=words[-1][0]), words[:-1]
    return header, " ".join(word for word, _ in words)


def _read_broken_header(parts: list[_Part], default_role: str) -> Message | None:
    """Read a header that no ``<|message|>`` closed, and the content in it; None if nothing is there.

    Only what cannot be meant as content is taken as header.
    """
    header, content = Message(default_role, ""), ""
    for marker, text in parts:
        rest = text
        if marker in ("<|start|>", ""):
            header, rest = _broken_speaker(header, marker, text, more=len(parts) > 1)
        elif marker == "<|channel|>" and header.channel is None:
            if match := _CHANNEL.match(text):
                header, rest = replace(header, channel=match[1]), text[match.end() :]
        elif marker == "<|constrain|>" and header.content_type is None and (match := _TYPE.match(text)):
            header, rest = replace(header, content_type=marker + match[1]), text[match.end() :]
        if (marker or len(parts) > 1) and header.recipient is None and (match := _RECIPIENT.match(rest)):
            header, rest = replace(header, recipient=match[1]), rest[match.end() :]
        content += rest if rest == text else rest.lstrip()
    fields = (header.recipient, header.channel, header.content_type)
    named = header.name is not None and header.name != header.role
    return replace(header, content=content) if any(fields) or named or content.strip() else None


def _broken_speaker(header: Message, marker: str, text: str, *, more: bool) -> tuple[Message, str]:
    """Read the role that may open a broken header; return the header and the text after it."""
    match = _WORD.match(text)
    if match is None:
        return header, text
    word, rest = match[1], text[match.end() :]
    next_part_follows = more and not rest.strip()
    goes_on = next_part_follows or _RECIPIENT.match(rest) is not None
    if marker == "":
        return (header, rest) if word == header.role and goes_on else (header, text)
    role, name = _speaker(word)
    if word.startswith("to=") or (role == "tool" and word != "tool" and not goes_on):
        return header, text
    return replace(header, role=role, name=name), rest
