"""Generation: one sequence as a stream, or many side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from mxmoe.batch import check_token_ids
from mxmoe.kv_cache import KVCache
from mxmoe.model import Transformer
from mxmoe.sampling import Sampler, SamplingParams, whole_number
from mxmoe.tokenizer import StopStrings, StreamDecoder, Tokenizer, TokenizerError

__all__ = ["Generation", "GenerationStep", "Model"]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationStep:
    """One generated token.

    Attributes
    ----------
    token_id : int
    logprob : float
        Natural logarithm of its probability under the model, before temperature and cuts.
    finish_reason : {"stop", "length"} or None
        Set on the last token: it is a stop token, or no more were asked for.
    """

    token_id: int
    logprob: float
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Generation:
    """All that was generated for one prompt.

    Attributes
    ----------
    token_ids : list of int
        The stop token included.
    logprobs : list of float
    finish_reason : {"stop", "length"}
    text : str or None
        Decoded, without the stop token; up to a stop string. None without a tokenizer.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    text: str | None


class _Sequence:
    """The state of one sequence while it is generated."""

    def __init__(
        self,
        number: int,
        sampler: Sampler,
        max_new_tokens: int,
        stop_token_ids: frozenset[int],
        tokenizer: Tokenizer | None,
        stop: Sequence[str],
    ) -> None:
        self.number, self.sampler, self.left = number, sampler, max_new_tokens
        self.stop_token_ids = stop_token_ids
        self.steps: list[GenerationStep] = []
        self.decoder = StreamDecoder(tokenizer) if tokenizer is not None else None
        self.stop = StopStrings(stop)
        self.text = ""

    def advance(self, token: int, logprob: float) -> tuple[GenerationStep, str]:
        """Take the next token; return it with the text that it completes."""
        self.left -= 1
        shown = ""
        if self.decoder is not None and token not in self.stop_token_ids:
            shown = self.stop.push(self._decode(token))
        reason: FinishReason | None = None
        if token in self.stop_token_ids or self.stop.stopped is not None:
            reason = "stop"
        elif self.left == 0:
            reason = "length"
        if reason is not None and self.decoder is not None:
            shown += self.stop.push(self.decoder.finish()) + self.stop.finish()
        self.text += shown
        step = GenerationStep(token, logprob, reason)
        self.steps.append(step)
        return step, shown

    def _decode(self, token: int) -> str:
        assert self.decoder is not None
        try:
            return self.decoder.push(token)
        except TokenizerError:
            # The embedding may have more rows than the tokenizer has tokens; those stand for nothing.
            return ""

    @property
    def result(self) -> Generation:
        steps = self.steps
        reason = steps[-1].finish_reason or "length"
        text = self.text if self.decoder is not None else None
        return Generation([s.token_id for s in steps], [s.logprob for s in steps], reason, text)


class Model(Transformer):
    """A loaded gpt-oss model; made by `mxmoe.load`. Attributes and `forward` are those of `Transformer`."""

    def generate(
        self,
        token_ids: ArrayLike,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        stop_token_ids: Sequence[int] | None = None,
        cache: KVCache | None = None,
    ) -> Iterator[GenerationStep]:
        """Generate tokens one by one.

        Parameters
        ----------
        token_ids : array_like of int, shape (T,)
            The prompt; with a cache that already holds tokens, what follows them.
        max_new_tokens : int
        temperature, top_p, top_k, min_p
            As in `SamplingParams`; temperature 0 is greedy.
        seed : int
            The same seed gives the same tokens.
        stop_token_ids : sequence of int, optional
            Tokens that end the text; by default those of the checkpoint. The stop token is yielded, too.
        cache : KVCache, optional
            Of one sequence. Afterwards it holds the prompt and every generated token but the last.

        Yields
        ------
        GenerationStep

        Raises
        ------
        ValueError, TypeError
            At the call, not at the first token: a parameter is out of range, an id is outside the vocabulary, or
            prompt and new tokens do not fit in the cache or the model's context.
        """
        params = SamplingParams(temperature, top_p, top_k, min_p)
        ids = check_token_ids(token_ids, self.config.vocab_size)
        _check_count(max_new_tokens)
        if cache is None:
            cache = self.new_cache(_room(ids.size, max_new_tokens, self.config.max_position_embeddings))
        else:
            self.check_cache(cache)
            cache.check_room(0, ids.size + max_new_tokens - 1)
        stop_ids = _stop_ids(stop_token_ids, self.config.eos_token_ids)
        sequence = _Sequence(0, Sampler(params, seed), max_new_tokens, stop_ids, None, ())
        return (step for step, _ in _stream(self, ids, sequence, cache))

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        stop_token_ids: Sequence[int] | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Continue a text, piece by piece.

        Parameters are those of `complete`. Pieces are whole characters, never part of a stop string, and may be
        several characters or none at all.

        Yields
        ------
        str
        """
        tokenizer = _need_tokenizer(self)
        params = SamplingParams(temperature, top_p, top_k, min_p)
        ids = check_token_ids(_encode(tokenizer, prompt), self.config.vocab_size)
        _check_count(max_new_tokens)
        cache = self.new_cache(_room(ids.size, max_new_tokens, self.config.max_position_embeddings))
        stop_ids = _stop_ids(stop_token_ids, self.config.eos_token_ids)
        sequence = _Sequence(0, Sampler(params, seed), max_new_tokens, stop_ids, tokenizer, stop)
        return (text for _, text in _stream(self, ids, sequence, cache) if text)

    def complete(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        stop_token_ids: Sequence[int] | None = None,
        stop: Sequence[str] = (),
    ) -> str:
        """Continue a text.

        Parameters
        ----------
        prompt : str
            Encoded as it stands; special tokens spelled in it stay text.
        max_new_tokens, temperature, top_p, top_k, min_p, seed, stop_token_ids
            As in `generate`.
        stop : sequence of str
            Strings that end the text; the first one found and what follows are left out.

        Returns
        -------
        str
            The continuation, without the prompt.

        Raises
        ------
        ValueError
            The checkpoint has no tokenizer, the prompt is empty, or as in `generate`.
        """
        pieces = self.stream(
            prompt,
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            stop_token_ids=stop_token_ids,
            stop=stop,
        )
        return "".join(pieces)

    def generate_batch(
        self,
        prompts: Sequence[ArrayLike] | Sequence[str],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | Sequence[int] = 0,
        stop_token_ids: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        on_step: Callable[[int, GenerationStep, str], None] | None = None,
    ) -> list[Generation]:
        """Generate for many prompts side by side. Each gets what it would get alone, bit for bit.

        Parameters
        ----------
        prompts : sequence of token id vectors, or of str
        max_new_tokens, temperature, top_p, top_k, min_p, stop_token_ids
            As in `generate`.
        seed : int or sequence of int
            One for each prompt; a single number stands for seed, seed + 1, ...
        stop : sequence of str
            As in `complete`; needs a tokenizer.
        on_step : callable, optional
            Called as ``on_step(number of the prompt, step, text it completes)`` for every token as it comes.

        Returns
        -------
        list of Generation
            In the order of the prompts.

        Raises
        ------
        ValueError
            As in `generate`.
        """
        params = SamplingParams(temperature, top_p, top_k, min_p)
        _check_count(max_new_tokens)
        if isinstance(prompts, str):
            raise TypeError("prompts is a str; wanted a sequence of prompts")
        if len(prompts) == 0:
            return []
        if stop or any(isinstance(p, str) for p in prompts):
            _need_tokenizer(self)
        vocab_size = self.config.vocab_size
        ids = [
            check_token_ids(_encode(_need_tokenizer(self), p) if isinstance(p, str) else p, vocab_size)
            for p in prompts
        ]
        seeds = [seed + i for i in range(len(ids))] if isinstance(seed, int | np.integer) else list(seed)
        if len(seeds) != len(ids):
            raise ValueError(f"seed has {len(seeds)} numbers; wanted {len(ids)}, one for each prompt")
        longest = max(p.size for p in ids)
        room = _room(longest, max_new_tokens, self.config.max_position_embeddings)
        cache = self.new_cache(room, num_sequences=len(ids))
        stop_ids = _stop_ids(stop_token_ids, self.config.eos_token_ids)
        sequences = [
            _Sequence(i, Sampler(params, s), max_new_tokens, stop_ids, self.tokenizer, stop)
            for i, s in enumerate(seeds)
        ]
        _run_batch(self, ids, sequences, cache, on_step)
        return [sequence.result for sequence in sequences]


def _choose(
    model: Model, ids: np.ndarray[Any, Any], sequences: list[_Sequence], cache: KVCache, bounds: list[int]
) -> list[tuple[int, float]]:
    """Run new tokens, and choose what follows each sequence's last one."""
    where: dict[str, Any] = {"cache": cache, "cu_seqlens": bounds, "sequences": [s.number for s in sequences]}
    if model.chooses_on_device:
        ahead = all(s.left > 1 for s in sequences)
        if all(s.sampler.params.temperature == 0.0 for s in sequences):
            token_ids, logprobs = model.likeliest(ids, **where, ahead=ahead)
        else:
            token_ids, logprobs = model.drawn(ids, [s.sampler for s in sequences], **where, ahead=ahead)
        if not np.isfinite(logprobs).all():
            raise ValueError(
                "the logits hold a NaN or infinity; wanted finite numbers: are the weights or a hook broken?"
            )
        return list(zip(token_ids.tolist(), logprobs.tolist(), strict=True))
    logits = model.forward(ids, logits="last", **where)
    return [s.sampler(row) for s, row in zip(sequences, logits, strict=True)]


def _stream(
    model: Model, ids: np.ndarray[Any, Any], sequence: _Sequence, cache: KVCache
) -> Iterator[tuple[GenerationStep, str]]:
    while True:
        step, text = sequence.advance(*_choose(model, ids, [sequence], cache, [0, ids.size])[0])
        yield step, text
        if step.finish_reason is not None:
            return
        ids = np.array([step.token_id])


def _run_batch(
    model: Model,
    prompts: list[np.ndarray[Any, Any]],
    sequences: list[_Sequence],
    cache: KVCache,
    on_step: Callable[[int, GenerationStep, str], None] | None,
) -> None:
    active, new = sequences, prompts
    while active:
        bounds = np.concatenate([[0], np.cumsum([ids.size for ids in new])])
        chosen = _choose(model, np.concatenate(new), active, cache, bounds.tolist())
        going = []
        for sequence, choice in zip(active, chosen, strict=True):
            step, text = sequence.advance(*choice)
            if on_step is not None:
                on_step(sequence.number, step, text)
            if step.finish_reason is None:
                going.append(sequence)
            else:
                cache.reset(sequence.number)
        active = going
        new = [np.array([sequence.steps[-1].token_id]) for sequence in active]


def _check_count(max_new_tokens: int) -> None:
    if whole_number("max_new_tokens", max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; wanted 1 or more")


def _room(prompt: int, new: int, context: int) -> int:
    if prompt + new - 1 > context:
        raise ValueError(
            f"a prompt of {prompt} and {new} new tokens do not fit in the model's context of {context} tokens"
        )
    return max(1, prompt + new - 1)


def _stop_ids(given: Sequence[int] | None, of_checkpoint: tuple[int, ...]) -> frozenset[int]:
    try:
        return frozenset(of_checkpoint if given is None else map(index, given))
    except TypeError:
        raise TypeError(f"stop_token_ids is {given!r}; wanted a sequence of token ids") from None


def _need_tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError(f"{model.path} has no tokenizer.json; wanted one, or token ids instead of text")
    return model.tokenizer


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty; wanted at least one character")
    return ids
