"""Conversations to tokens."""

from __future__ import annotations

from collections.abc import Sequence

from mxmoe.harmony.messages import ROLES, Message
from mxmoe.tokenizer import Tokenizer, TokenizerError

CONTROL_TOKENS = (
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
)


def control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of the format's control tokens.

    Parameters
    ----------
    tokenizer : Tokenizer
        The tokenizer.

    Returns
    -------
    dict of str to int
        The id of each of `CONTROL_TOKENS`.

    Raises
    ------
    TokenizerError
        If the tokenizer lacks one or more, naming them.
    """
    special = tokenizer.special_tokens
    missing = [name for name in CONTROL_TOKENS if name not in special]
    if missing:
        raise TokenizerError(f"the tokenizer lacks special tokens of the harmony format: {', '.join(missing)}")
    return {name: special[name] for name in CONTROL_TOKENS}


def stop_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens at which the model's turn ends.

    Parameters
    ----------
    tokenizer : Tokenizer
        The tokenizer.

    Returns
    -------
    tuple of int
        ``<|return|>`` (done), ``<|call|>`` (a tool call) and, where the tokenizer has it, ``<|endoftext|>``.

    Raises
    ------
    TokenizerError
        If the tokenizer is not one for the harmony format.
    """
    tokens = control_tokens(tokenizer)
    end_of_text = tokenizer.special_tokens.get("<|endoftext|>")
    return (tokens["<|return|>"], tokens["<|call|>"], *([] if end_of_text is None else [end_of_text]))


def render_message(message: Message, tokenizer: Tokenizer) -> list[int]:
    """Write one message as tokens, from ``<|start|>`` to ``<|end|>`` (``<|call|>`` for a tool call).

    Parameters
    ----------
    message : Message
        The message.
    tokenizer : Tokenizer
        A tokenizer with the format's special tokens.

    Returns
    -------
    list of int
        The tokens.

    Raises
    ------
    ValueError
        If the role is unknown, a tool has no name, a part of the header is empty or holds white space, or a
        text holds a lone surrogate.
    TokenizerError
        If the tokenizer lacks special tokens.
    """
    return _render(message, tokenizer, control_tokens(tokenizer))


def render_conversation(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    next_role: str | None = "assistant",
    drop_analysis: bool = True,
    end_with_return: bool = False,
) -> list[int]:
    """Write a conversation as tokens, up to the point where the next speaker writes.

    Parameters
    ----------
    messages : sequence of Message
        The conversation.
    tokenizer : Tokenizer
        A tokenizer with the format's special tokens.
    next_role : str or None
        Who speaks next: ends in ``<|start|>`` and this role; with None, after the last message.
    drop_analysis : bool
        Whether the chain of thought of answered turns is left out: when the last assistant message is in the
        final channel, every analysis message before the conversation's first final one. (The library's rule;
        the chain of thought that led to a tool call is kept while there is no answer.)
    end_with_return : bool
        Whether a last message that is the assistant's final answer ends with ``<|return|>``, as the model
        writes it, for training and scoring; needs ``next_role=None``.

    Returns
    -------
    list of int
        The tokens.

    Raises
    ------
    ValueError
        If a message cannot be written (see :func:`render_message`), `next_role` is unknown, or
        `end_with_return` is asked for together with a `next_role`.
    TokenizerError
        If the tokenizer lacks special tokens.
    """
    if next_role is not None and next_role not in ROLES:
        raise ValueError(f"next_role must be None or one of {', '.join(ROLES)}, but is {next_role!r}")
    if end_with_return and next_role is not None:
        raise ValueError(f"end_with_return needs next_role=None, but next_role is {next_role!r}")
    tokens = control_tokens(tokenizer)
    kept = _without_answered_analysis(messages) if drop_analysis else messages
    token_ids = [token for message in kept for token in _render(message, tokenizer, tokens)]
    if end_with_return and messages and messages[-1].role == "assistant" and messages[-1].channel == "final":
        token_ids[-1] = tokens["<|return|>"]
    if next_role is not None:
        token_ids += [tokens["<|start|>"], *tokenizer.encode(next_role)]
    return token_ids


def _without_answered_analysis(messages: Sequence[Message]) -> Sequence[Message]:
    assistant = [message for message in messages if message.role == "assistant"]
    if not assistant or assistant[-1].channel != "final":
        return messages
    first_final = next(i for i, message in enumerate(messages) if message.channel == "final")
    return [m for i, m in enumerate(messages) if i >= first_final or m.channel != "analysis"]


def _render(message: Message, tokenizer: Tokenizer, tokens: dict[str, int]) -> list[int]:
    # The parts are encoded one by one, not joined: byte-pair merges never cross from one part into the next.
    _check_header(message)
    token_ids = [tokens["<|start|>"]]
    if message.role == "tool":
        token_ids += tokenizer.encode(message.name or "")
    else:
        token_ids += tokenizer.encode(message.role)
        token_ids += tokenizer.encode(f":{message.name}") if message.name is not None else []
    if message.recipient is not None and message.recipient != "all":  # "all" is what no recipient means
        token_ids += tokenizer.encode(f" to={message.recipient}")
    if message.channel is not None:
        token_ids += [tokens["<|channel|>"], *tokenizer.encode(message.channel)]
    if message.content_type is not None:
        constrained = message.content_type.removeprefix("<|constrain|>")
        if constrained != message.content_type:
            token_ids += [*tokenizer.encode(" "), tokens["<|constrain|>"], *tokenizer.encode(constrained)]
        else:
            token_ids += tokenizer.encode(f" {message.content_type}")
    token_ids += [tokens["<|message|>"], *tokenizer.encode(message.content)]
    calls = message.role == "assistant" and message.recipient is not None
    return [*token_ids, tokens["<|call|>"] if calls else tokens["<|end|>"]]


def _check_header(message: Message) -> None:
    if message.role not in ROLES:
        raise ValueError(f"a message's role must be one of {', '.join(ROLES)}, but is {message.role!r}")
    if message.role == "tool" and message.name is None:
        raise ValueError("a tool's message needs the tool's name, such as 'functions.get_weather'")
    if message.role == "tool" and str(message.name).partition(":")[0] in ROLES[:-1]:
        raise ValueError(f"a tool's name must not read as another role, but is {message.name!r}")
    for part in ("name", "recipient", "channel", "content_type"):
        value = getattr(message, part)
        if value is not None and (not isinstance(value, str) or value == "" or any(map(str.isspace, value))):
            raise ValueError(f"a message's {part} must be None or one word without white space, but is {value!r}")
    if not isinstance(message.content, str):
        raise ValueError(f"a message's content must be a string, but is {type(message.content).__name__}")
