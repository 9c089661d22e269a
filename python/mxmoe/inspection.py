"""Looking inside a forward pass, and changing what is found there."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mxmoe.config import ModelConfig
from mxmoe.devices import HOST, Device

__all__ = ["Hook", "HookContext", "Taps", "site_names"]

Array = NDArray[Any]

_LAYER_SITES = (
    "queries",
    "keys",
    "values",
    "sink_share",
    "attention",
    "attention_residual",
    "router_logits",
    "topk_ids",
    "topk_weights",
    "residual",
)
_READ_ONLY = ("sink_share",)


def site_names(config: ModelConfig) -> list[str]:
    """Return the names of all places of a model that can be captured or hooked, in the order they are computed.

    ``embedding`` (T, H); for every layer i ``layers.i.queries`` (T, Hq, D) and ``layers.i.keys`` (T, Hkv, D) after
    the rotary embedding, ``layers.i.values`` (T, Hkv, D), ``layers.i.sink_share`` (T, Hq), the share of each
    head's attention that went to its sink (read-only), ``layers.i.attention`` (T, Hq, D) before the output
    projection, ``layers.i.attention_residual`` (T, H), the residual stream between attention and experts,
    ``layers.i.router_logits`` (T, E), ``layers.i.topk_ids`` and ``layers.i.topk_weights`` (T, k), and
    ``layers.i.residual`` (T, H), the residual stream after the layer; then ``final_norm`` (rows, H) and ``logits``
    (rows, vocab_size) for the rows whose logits are computed.
    """
    layers = [f"layers.{i}.{site}" for i in range(config.num_hidden_layers) for site in _LAYER_SITES]
    return ["embedding", *layers, "final_norm", "logits"]


@dataclass(frozen=True)
class HookContext:
    """Where a hooked value comes from.

    Attributes
    ----------
    site : str
        Full name of the place.
    layer : int or None
    positions : (T,) int64
        Position of each row's token in its sequence. ``final_norm`` and ``logits`` have only the rows asked for:
        then these are their positions.
    sequences : (T,) int64
        Number of each row's sequence in the cache.
    """

    site: str
    layer: int | None
    positions: NDArray[np.int64]
    sequences: NDArray[np.int64]


HookFunction = Callable[[Array, HookContext], Array | None]


@dataclass(eq=False)
class Hook:
    """A function installed in a model; `remove` takes it out. Also a context manager that removes it at the end."""

    pattern: str
    fn: HookFunction
    installed: list[Hook] = field(repr=False)

    def remove(self) -> None:
        """Take the hook out; a second time does nothing."""
        if self in self.installed:
            self.installed.remove(self)

    def __enter__(self) -> Hook:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def check_pattern(pattern: str, config: ModelConfig, what: str) -> frozenset[str]:
    """Return the sites that a name or glob pattern means; ValueError when there are none."""
    sites = site_names(config)
    if pattern in sites:
        return frozenset((pattern,))
    found = frozenset(fnmatch.filter(sites, pattern))
    if not found:
        raise ValueError(
            f"{what} names {pattern!r}, which matches nothing; sites are embedding, "
            f"layers.0 to layers.{config.num_hidden_layers - 1} with one of {', '.join(_LAYER_SITES)}, "
            "final_norm and logits"
        )
    return found


class Taps:
    """The watchers of one forward pass: hooks that may replace values, and values to be captured.

    They see arrays of the host: what lies elsewhere is brought here and, where there are hooks, back again.
    """

    def __init__(
        self, config: ModelConfig, hooks: Sequence[Hook], capture: Sequence[str] | None, device: Device = HOST
    ) -> None:
        self._device = device
        if isinstance(capture, str):
            raise TypeError(f"capture is the text {capture!r}; wanted a list of sites, such as [{capture!r}]")
        names: set[str] = set()
        for pattern in capture or ():
            names |= check_pattern(pattern, config, "capture")
        # In the order of computation; most passes capture nothing, and should not pay for the list of sites.
        self._captured: dict[str, list[Array]] = {s: [] for s in site_names(config) if s in names} if names else {}
        self._hooks: dict[str, list[HookFunction]] = {}
        for hook in hooks:
            for site in check_pattern(hook.pattern, config, "hook"):
                self._hooks.setdefault(site, []).append(hook.fn)
        self.idle = not self._captured and not self._hooks
        self.positions: NDArray[np.int64] = np.zeros(0, np.int64)
        self.sequences: NDArray[np.int64] = np.zeros(0, np.int64)

    def wants(self, site: str) -> bool:
        """Whether anybody watches `site`."""
        return not self.idle and (site in self._captured or site in self._hooks)

    def __call__(self, site: str, value: Array) -> Array:
        """Show a value to its watchers; return it, or what a hook has put in its place."""
        if not self.wants(site):
            return value
        seen = self._device.get(value)
        for fn in self._hooks.get(site, ()):
            seen = self._apply(fn, site, seen)
        if site in self._captured:
            self._captured[site].append(seen.copy())
        return self._device.put(seen, site) if site in self._hooks else value

    def _apply(self, fn: HookFunction, site: str, value: Array) -> Array:
        layer = int(site.split(".")[1]) if site.startswith("layers.") else None
        read_only = site.rsplit(".", 1)[-1] in _READ_ONLY
        if read_only:
            value.flags.writeable = False
        replaced = fn(value, HookContext(site, layer, self.positions, self.sequences))
        if replaced is None or replaced is value:
            return value
        if read_only:
            raise ValueError(f"the hook on {site} returned a value, but this place is read-only")
        replaced = np.asarray(replaced)
        if replaced.shape != value.shape:
            raise ValueError(f"the hook on {site} returned shape {replaced.shape}; wanted {value.shape} or None")
        if not np.can_cast(replaced.dtype, value.dtype, "same_kind"):
            raise TypeError(f"the hook on {site} returned dtype {replaced.dtype}; wanted {value.dtype} or None")
        return np.ascontiguousarray(replaced, dtype=value.dtype)

    @property
    def captured(self) -> dict[str, Array]:
        """What was captured, rows of all steps one after the other."""
        return {site: np.concatenate(parts) for site, parts in self._captured.items() if parts}
