"""One turn of a conversation: harmony messages in, tokens through the model, messages out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mxmoe import harmony
from mxmoe.generate import Model
from mxmoe.tokenizer import Tokenizer, TokenizerError

__all__ = ["Reply", "reply", "reply_batch", "tokenizer_for_chat"]


@dataclass(frozen=True)
class Reply:
    """What the model said in one turn.

    Attributes
    ----------
    messages : list of Message
        Everything, in order.
    token_ids : list of int
    prompt_tokens : int
    finish_reason : {"stop", "length"}
    """

    messages: list[harmony.Message]
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: Literal["stop", "length"]

    @property
    def analysis(self) -> str:
        """The chain of thought."""
        return "\n".join(m.content for m in self.messages if m.channel == "analysis" and m.recipient is None)

    @property
    def text(self) -> str:
        """The answer: the final channel, and whatever the model wrote outside of any channel."""
        return "".join(m.content for m in self.messages if m.channel in ("final", None) and m.recipient is None)

    @property
    def calls(self) -> list[tuple[str, str]]:
        """The function calls: recipient (``functions.NAME``) and arguments as the model wrote them."""
        return [(m.recipient, m.content) for m in self.messages if m.recipient is not None]


def tokenizer_for_chat(model: Model) -> Tokenizer:
    """Return the model's tokenizer; TokenizerError when there is none or it does not know the harmony format."""
    if model.tokenizer is None:
        raise TokenizerError(f"{model.path} has no tokenizer.json; wanted one with the harmony format's tokens")
    harmony.stop_token_ids(model.tokenizer)
    return model.tokenizer


def reply(
    model: Model,
    messages: Sequence[harmony.Message],
    max_new_tokens: int,
    *,
    on_delta: Callable[[harmony.Delta], None] | None = None,
    **sampling: Any,
) -> Reply:
    """Let the model take its turn.

    Parameters
    ----------
    model : Model
        With a tokenizer that has the harmony tokens.
    messages : sequence of Message
        The conversation so far.
    max_new_tokens : int
    on_delta : callable, optional
        Called with every piece of text as it comes.
    **sampling
        temperature, top_p, top_k, min_p, seed as in `Model.generate`.

    Returns
    -------
    Reply
    """
    tokenizer = tokenizer_for_chat(model)
    prompt = harmony.render_conversation(messages, tokenizer)
    parser = harmony.StreamParser(tokenizer)
    stops = harmony.stop_token_ids(tokenizer)
    tokens: list[int] = []
    reason: Literal["stop", "length"] = "length"
    for step in model.generate(prompt, max_new_tokens, stop_token_ids=stops, **sampling):
        tokens.append(step.token_id)
        reason = step.finish_reason or reason
        _emit(parser.push(step.token_id), on_delta)
    _emit(parser.finish(), on_delta)
    return Reply(parser.messages, tokens, len(prompt), reason)


def _emit(deltas: Sequence[harmony.Delta], on_delta: Callable[[harmony.Delta], None] | None) -> None:
    if on_delta is not None:
        for delta in deltas:
            on_delta(delta)


def reply_batch(
    model: Model, conversations: Sequence[Sequence[harmony.Message]], max_new_tokens: int, **sampling: Any
) -> list[Reply]:
    """Let the model take its turn in many conversations side by side; arguments as in `reply`."""
    tokenizer = tokenizer_for_chat(model)
    prompts = [harmony.render_conversation(messages, tokenizer) for messages in conversations]
    stops = harmony.stop_token_ids(tokenizer)
    results = model.generate_batch(prompts, max_new_tokens, stop_token_ids=stops, **sampling)
    return [
        Reply(harmony.parse(result.token_ids, tokenizer), result.token_ids, len(prompt), result.finish_reason)
        for prompt, result in zip(prompts, results, strict=True)
    ]
