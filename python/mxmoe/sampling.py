"""From logits to the next token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Sampler", "SamplingParams", "whole_number"]


def whole_number(name: str, value: object) -> int:
    """Return an integer of Python's or NumPy's as the former; TypeError, naming it, for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is {value!r}; wanted a whole number")
    return int(value)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} is {value!r}; wanted a number")
    return float(value)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    The distribution is sharpened by `temperature`, then cut to the `top_k` likeliest tokens, then to the fewest
    that reach probability `top_p`, then to those with at least `min_p` times the likeliest one's probability.

    Attributes
    ----------
    temperature : float
        0 takes the likeliest token (the lowest id among equals).
    top_p : float
        In (0, 1]; 1 cuts nothing.
    top_k : int
        0 cuts nothing.
    min_p : float
        In [0, 1]; 0 cuts nothing.

    Raises
    ------
    ValueError, TypeError
        When a value is out of range or no number.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        # Comparisons with NaN are false.
        wanted = {
            "temperature": (0.0 <= _number("temperature", self.temperature) < math.inf, "0 or more"),
            "top_p": (0.0 < _number("top_p", self.top_p) <= 1.0, "above 0, up to 1"),
            "top_k": (whole_number("top_k", self.top_k) >= 0, "0 or more"),
            "min_p": (0.0 <= _number("min_p", self.min_p) <= 1.0, "0 to 1"),
        }
        for name, (fits, range_) in wanted.items():
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted {range_}")


class Sampler:
    """Chooses the tokens of one sequence.

    Parameters
    ----------
    params : SamplingParams
    seed : int
        Of the random numbers (NumPy's Philox); the same seed and logits give the same tokens.
    """

    def __init__(self, params: SamplingParams, seed: int = 0) -> None:
        if whole_number("seed", seed) < 0:
            raise ValueError(f"seed is {seed}; wanted 0 or more")
        self.params = params
        self._random = np.random.Generator(np.random.Philox(int(seed)))
        self._coming: list[float] = []  # drawn, but not yet used

    def __call__(self, logits: NDArray[Any]) -> tuple[int, float]:
        """Choose a token.

        Parameters
        ----------
        logits : (vocab_size,) float

        Returns
        -------
        token_id : int
        logprob : float
            Natural logarithm of the token's probability before temperature and cuts.

        Raises
        ------
        ValueError
            When the logits hold a NaN or +infinity, or nothing but -infinity.
        """
        best = int(np.argmax(logits))  # a NaN counts as the largest
        top = float(logits[best])
        if not math.isfinite(top):
            raise ValueError(f"the logits reach {top}; wanted finite numbers: are the weights or a hook broken?")
        shifted = logits.astype(np.float64) - top
        total = math.log(np.exp(shifted).sum())
        token = self._draw(shifted) if self.draws else best
        return token, float(shifted[token]) - total

    @property
    def draws(self) -> bool:
        """Whether a choice uses up a number; the likeliest token needs none."""
        return self.params.temperature != 0.0

    def peek(self, count: int) -> tuple[float, ...]:
        """Return the numbers in [0, 1) that the next `count` draws will use; `take` uses one up."""
        while len(self._coming) < count:
            self._coming.append(float(self._random.random()))
        return tuple(self._coming[:count])

    def take(self) -> float:
        """Use up the number that the next draw would use."""
        self.peek(1)
        return self._coming.pop(0)

    def _draw(self, shifted: NDArray[np.float64]) -> int:
        with np.errstate(over="ignore"):  # a temperature near 0 leaves the likeliest token alone
            x = shifted / self.params.temperature
        # Below e^-50 of the likeliest, all tokens of a vocabulary together vanish in float64's rounding.
        candidates = np.flatnonzero(x > -50.0)
        candidates = candidates[np.argsort(-x[candidates], kind="stable")]
        if self.params.top_k:
            candidates = candidates[: self.params.top_k]
        p = np.exp(x[candidates])
        p /= p.sum()
        if self.params.top_p < 1.0:
            keep = int(np.searchsorted(np.cumsum(p), self.params.top_p)) + 1
            candidates, p = candidates[:keep], p[:keep]
        if self.params.min_p > 0.0:
            keep = int(np.count_nonzero(p >= self.params.min_p * p[0]))
            candidates, p = candidates[:keep], p[:keep]
        cumulative = np.cumsum(p)
        drawn = np.searchsorted(cumulative, self.take() * cumulative[-1], side="right")
        return int(candidates[min(int(drawn), len(candidates) - 1)])
