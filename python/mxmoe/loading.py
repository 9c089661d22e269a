"""From a checkpoint to layers: one layer at a time, never two copies of the model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from mxmoe import cuda
from mxmoe.adapters import Adapter, apply_adapter
from mxmoe.checkpoint import Checkpoint, LayerWeights, resolve
from mxmoe.config import ModelConfig
from mxmoe.devices import HOST, Device, Gpu, Host
from mxmoe.generate import Model
from mxmoe.layers import Attention, DecoderLayer, Embedding, ExpertMatrix, Experts, Linear, MoE, RMSNorm
from mxmoe.model import LoadOptions
from mxmoe.packing import prefers_packed
from mxmoe.tokenizer import Tokenizer

__all__ = ["load"]

Array = NDArray[Any]


_CHOICES = {
    "device": ("cpu", "cuda"),
    "dense": ("bf16", "int8"),
    "kv": ("float32", "bf16", "int8"),
    "activations": ("float32", "bf16", "int8"),
    "backend": ("kernels", "reference"),
}
# What the kernels of a GPU do not do.
_CPU_ONLY = (("dense", "int8"), ("activations", "int8"), ("backend", "reference"))


def _resolve_options(
    device: str,
    dense: str | None,
    kv: str | None,
    activations: str | None,
    num_threads: int,
    backend: str,
) -> LoadOptions:
    """Fill in the defaults and check every option; ValueError names the one that is wrong."""
    given = {"device": device, "dense": dense, "kv": kv, "activations": activations, "backend": backend}
    chosen = {name: value for name, value in given.items() if value is not None}
    for name, value in chosen.items():
        if value not in _CHOICES[name]:
            wanted = " or ".join(repr(choice) for choice in _CHOICES[name])
            raise ValueError(f"{name} is {value!r}; wanted {wanted}")
    if isinstance(num_threads, bool) or not isinstance(num_threads, int) or not 0 <= num_threads <= 1024:
        raise ValueError(f"num_threads is {num_threads!r}; wanted 0 (all CPUs) to 1024")
    if device == "cuda":
        for name, value in _CPU_ONLY:
            if chosen.get(name) == value:
                raise ValueError(f"{name} is {value!r}, which only device 'cpu' does; this is 'cuda'")
        chosen.setdefault("kv", "bf16")  # what the tensor cores take
    return LoadOptions(num_threads=num_threads, **cast(dict[str, Any], chosen))


def _device_of(options: LoadOptions, weight_bytes: int) -> Device:
    if options.device == "cuda":
        return Gpu(weight_bytes)
    if options.backend == "reference":
        from mxmoe.reference import ops as reference_ops

        return Host(reference_ops)
    return HOST


class _Builder:
    """Makes layers of a checkpoint's weights."""

    def __init__(self, checkpoint: Checkpoint, options: LoadOptions) -> None:
        self.checkpoint, self.config, self.options = checkpoint, checkpoint.config, options
        self.device = _device_of(options, checkpoint.nbytes)
        self.ops = self.device.ops
        # The int8 form is what the model holds, so the reference computes on the very same codes.
        self.int8_dense = options.dense == "int8"
        # Where the kernels want panels, they are made here, layer by layer, into memory of the model's own.
        packs = self.device is HOST
        self.packed = packs and prefers_packed(options.activations)
        self.packed_dense = {form: packs and prefers_packed(options.activations, form) for form in ("int8", "bf16")}

    def held(self, weight: Array, name: str) -> Any:
        """Bring a weight to where the model is."""
        return self.device.put_weight(weight, name) if isinstance(self.device, Gpu) else weight

    def held_layer(self, i: int) -> tuple[LayerWeights, bool]:
        """Bring a layer's weights to where the model is; what has been copied there leaves the memory here.

        Says also whether a GPU's kernels may fold the scales of the experts into their weights.
        """
        weights = self.checkpoint.layer(i)
        if not isinstance(self.device, Gpu):
            return weights, False
        foldable = cuda.scales_are_foldable(weights.gate_up_scales, weights.down_scales)
        there = {name: self.held(weight, f"layer {i}'s {name}") for name, weight in vars(weights).items()}
        self.checkpoint.release(i)
        return LayerWeights(**there), foldable

    def linear(self, weight: Array, bias: Array | None, name: str, layer: int | None = None) -> Linear:
        """Make a dense layer of a weight, `name` in the checkpoint."""
        scales = None
        # Blocks of 32 along the input; a weight that has no whole number of them stays as it is.
        if self.int8_dense and weight.shape[1] % 32 == 0:
            from mxmoe import ops

            weight, scales = ops.int8_quantize(weight)
        packed = self.packed_dense["bf16" if scales is None else "int8"]
        linear = Linear(self.ops, weight, bias, scales, self.options.activations, packed)
        if linear.packed or scales is not None:
            self.checkpoint.release(layer, [name])  # it has been copied
        return linear

    def expert_matrix(self, weights: dict[str, Array], name: str, layer: int) -> ExpertMatrix:
        """Make a matrix of experts of its parts, which are taken out of `weights`."""
        blocks, scales = f"{name}_blocks", f"{name}_scales"
        matrix = ExpertMatrix(weights.pop(blocks), weights.pop(scales), self.packed)
        if self.packed:
            self.checkpoint.release(layer, [blocks, scales])  # it has been copied
        return matrix

    def norm(self, weight: Array) -> RMSNorm:
        return RMSNorm(self.ops, weight, self.config.rms_norm_eps)

    def layer(self, i: int) -> DecoderLayer:
        w, foldable_scales = self.held_layer(i)
        config, ops = self.config, self.ops
        attention = Attention(
            ops=ops,
            index=i,
            kind=config.layer_types[i],
            q_proj=self.linear(w.q_proj_weight, w.q_proj_bias, "q_proj_weight", i),
            k_proj=self.linear(w.k_proj_weight, w.k_proj_bias, "k_proj_weight", i),
            v_proj=self.linear(w.v_proj_weight, w.v_proj_bias, "v_proj_weight", i),
            o_proj=self.linear(w.o_proj_weight, w.o_proj_bias, "o_proj_weight", i),
            sinks=w.sinks,
            head_dim=config.head_dim,
            sm_scale=config.sm_scale,
            window=config.window(i),
            activations=self.options.activations,
        )
        norms = self.norm(w.input_layernorm), self.norm(w.post_attention_layernorm)
        # The router is small and decides: it stays float32 x bf16 whatever the rest is rounded to.
        router = Linear(ops, w.router_weight, w.router_bias, None, "float32")
        weights = dict(vars(w))
        del w  # so that a matrix of experts can go when it has been packed
        experts = Experts(
            ops=ops,
            gate_up=self.expert_matrix(weights, "gate_up", i),
            gate_up_bias=weights["gate_up_bias"],
            down=self.expert_matrix(weights, "down", i),
            down_bias=weights["down_bias"],
            activations=self.options.activations,
            swiglu_alpha=config.swiglu_alpha,
            swiglu_limit=config.swiglu_limit,
            foldable_scales=foldable_scales,
        )
        mlp = MoE(ops, i, router, experts, config.experts_per_token)
        return DecoderLayer(i, norms[0], attention, norms[1], mlp)

    def lm_head(self) -> Linear:
        return self.linear(self.held(self.checkpoint.lm_head, "lm_head"), None, "lm_head")

    def embed_tokens(self) -> Embedding:
        return Embedding(self.ops, self.held(self.checkpoint.embed_tokens, "embed_tokens"))

    def last_norm(self) -> RMSNorm:
        return self.norm(self.held(self.checkpoint.norm, "norm"))

    def finish(self) -> None:
        """Wait for what is on its way."""
        if isinstance(self.device, Gpu):
            self.device.finish_weights()
            self.checkpoint.release()


@contextmanager
def _progress_bar(title: str, total: int, show: bool | None) -> Iterator[Any]:
    """Yield a function that advances a bar on stderr by some bytes."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    visible = console.is_terminal if show is None else show
    with Progress(*columns, console=console, transient=True, disable=not visible) as progress:
        task = progress.add_task(title, total=total)
        yield lambda n: progress.advance(task, n)


def load(
    name_or_path: str | Path,
    *,
    device: str = "cpu",
    dense: Literal["bf16", "int8"] | None = None,
    kv: Literal["float32", "bf16", "int8"] | None = None,
    activations: Literal["float32", "bf16", "int8"] | None = None,
    num_threads: int = 0,
    backend: Literal["kernels", "reference"] = "kernels",
    adapter: str | Path | None = None,
    progress: bool | None = None,
) -> Model:
    """Load a model.

    Parameters
    ----------
    name_or_path : str or Path
        A folder with a checkpoint in Hugging Face's or OpenAI's original layout; ``"tiny"``, the small model that
        comes with the package; or a name on the Hugging Face hub (``"gpt-oss-20b"`` is short for
        ``"openai/gpt-oss-20b"``), fetched into its usual cache.
    device : {"cpu", "cuda"}
        "cuda" holds weights and KV cache in an NVIDIA GPU's memory and runs there: dense "bf16", kv "bf16" (its
        default), "float32" or "int8", activations "bf16" or "float32". Arrays of its layers are then `mxmoe.cuda`'s.
    dense : {"bf16", "int8"}
        Attention projections and lm_head as stored, or rounded to int8 with a scale per block of 32 while loading.
        A projection whose input is no multiple of 32 stays bf16; `Model.components` and ``mxmoe info`` tell.
    kv : {"float32", "bf16", "int8"}
        Dtype of the KV cache.
    activations : {"bf16", "float32", "int8"}
        What activations are rounded to before they meet a weight; past "float32", attention also rounds what
        meets a bf16 or int8 cache. Defaults of these three: `LoadOptions`.
    num_threads : int
        0 for as many as this process has CPUs.
    backend : {"kernels", "reference"}
        "reference" runs every op in float64 NumPy: slow, exact, for comparing step by step.
    adapter : str or Path, optional
        A folder with a LoRA adapter as PEFT saves it, on attention's projections, the experts' input (see
        `mxmoe.integrations.peft`), the router or lm_head. It is computed beside the layers, whose weights stay as
        stored; in bfloat16, or to its last bit with float32 activations.
    progress : bool, optional
        Show a progress bar on stderr; by default when it is a terminal.

    Returns
    -------
    Model
        Where the kernels in force are made for it (AVX2 and AVX-512), dense layers and experts are held packed (see
        `mxmoe.packing`), in memory of the model's own; else as mapped from the file.

    Raises
    ------
    ConfigError, CheckpointError, TokenizerError
        (all ValueError) when a file is missing, damaged or does not fit; before memory is touched.
    AdapterError
        (ValueError) The same of the adapter, or it has what is not supported.
    ValueError
        An option is unknown, or not to be had on the device.
    RuntimeError
        There is no GPU that can be run on; says what is missing.
    MemoryError
        The GPU has no room; says for what, and how much is free.
    """
    options = _resolve_options(device, dense, kv, activations, num_threads, backend)
    path = resolve(name_or_path, progress=sys.stderr.isatty() if progress is None else progress)
    checkpoint = Checkpoint.open(path)
    config: ModelConfig = checkpoint.config
    if config.head_dim > 256:
        raise ValueError(f"{path}: head_dim is {config.head_dim}; the attention kernels take up to 256")
    lora = None if adapter is None else Adapter.open(adapter, config)
    tokenizer = None
    if checkpoint.tokenizer_path is not None:
        tokenizer = Tokenizer.from_file(checkpoint.tokenizer_path)
    return build_model(checkpoint, options, tokenizer, lora, progress)


def build_model(
    checkpoint: Checkpoint,
    options: LoadOptions,
    tokenizer: Tokenizer | None = None,
    lora: Adapter | None = None,
    progress: bool | None = False,
) -> Model:
    """Make a model of a checkpoint's weights; arguments as `load` has found them."""
    config, build = checkpoint.config, _Builder(checkpoint, options)
    share = checkpoint.nbytes // (config.num_hidden_layers + 1)
    layers, title = [], f"Loading {checkpoint.path.name}"
    with _progress_bar(title, share * (config.num_hidden_layers + 1), progress) as advance:
        # The largest matrix first: what it takes to convert it is given back before the layers come.
        lm_head = build.lm_head()
        advance(share)
        for i in range(config.num_hidden_layers):
            layers.append(build.layer(i))
            advance(share)
        embed_tokens, norm = build.embed_tokens(), build.last_norm()
        build.finish()
    if lora is not None:
        apply_adapter(lora, layers, lm_head, build.device)
        options = replace(options, adapter=lora.path)
    return Model(config, checkpoint.path, options, tokenizer, embed_tokens, layers, norm, lm_head, build.device)
