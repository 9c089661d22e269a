"""The shapes that matter: gpt-oss-20b and -120b, decoding and reading a prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from make_checkpoint import SIZES
from mxmoe.config import ModelConfig

__all__ = ["PHASES", "Shape", "shapes"]

# New tokens that pass through an op at a time.
PHASES = {"decode": 1, "decode x16": 16, "prefill 512": 512, "prefill 2048": 2048}
_QUICK_PHASES = ("decode", "prefill 512")
_QUICK_SIZE = "20b"


@dataclass(frozen=True)
class Shape:
    """One shape of one op.

    Attributes
    ----------
    size : {"20b", "120b"}
    phase : str
        A key of `PHASES`.
    what : str
        Which of the op's weights, or how many keys: whatever the op distinguishes.
    mode : str
        How weights, activations or the cache are held.
    full : bool
        Left out unless everything is asked for.
    """

    size: str
    phase: str
    what: str = ""
    mode: str = ""
    full: bool = False

    def __str__(self) -> str:
        return ", ".join(part for part in (self.size, self.phase, self.what, self.mode) if part)

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""
        return SIZES[self.size]

    @property
    def num_tokens(self) -> int:
        """New tokens."""
        return PHASES[self.phase]


def shapes(
    whats: Iterable[str] = ("",), modes: Iterable[str] = ("",), *, full_whats: Iterable[str] = (),
    full_modes: Iterable[str] = (), both_sizes: bool = True,
) -> list[Shape]:  # fmt: skip
    """Return every combination; 20b with a token and with 512, of `whats` and `modes`, is the quick selection.

    `full_whats` and `full_modes` come in addition when everything is asked for; ops that are the same in both models
    leave the second one out with `both_sizes`.
    """
    whats, modes = list(whats), list(modes)
    sizes = list(SIZES)[1:] if both_sizes else [_QUICK_SIZE]
    found = []
    for size, phase, what, mode in product(sizes, PHASES, [*whats, *full_whats], [*modes, *full_modes]):
        quick = size == _QUICK_SIZE and phase in _QUICK_PHASES and what in whats and mode in modes
        found.append(Shape(size, phase, what, mode, full=not quick))
    return found
