"""The torch operators: what torch asks of operators, torch.compile, the same bits as mxmoe.ops, errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_cases as cases
from compare import assert_exact
from mxmoe import cuda, ops
from mxmoe.integrations import _torch_define, _torch_ops
from mxmoe.integrations import torch as mx
from torch_cases import dense_arguments, linear_arguments, moe_arguments, normal, paged_arguments

IDS = torch.tensor([1, 7, 0, 7])
BF16 = torch.bfloat16


def rope_arguments(rows: int = 4, **options: Any) -> dict[str, Any]:
    return {"x": normal(rows, 3, 8), "cos": normal(rows, 4), "sin": normal(rows, 4, seed=1), **options}


def group_arguments(*kinds: str, **options: Any) -> dict[str, Any]:
    layers = [linear_arguments(kind) for kind in kinds]
    layers[-1]["bias"] = None
    names = ("weight", "scales", "bias")
    return {"x": layers[0]["x"], "layers": [tuple(layer[name] for name in names) for layer in layers], **options}


def write_arguments(dtype: torch.dtype, rows: int = 3) -> dict[str, Any]:
    named = {"k": normal(rows, 2, 16), "v": normal(rows, 2, 16, seed=1), "slots": torch.arange(5, 5 - rows, -1)}
    named |= {name: torch.zeros((2, 2, 4, 16), dtype=dtype) for name in ("k_cache", "v_cache")}
    if dtype == torch.int8:
        named |= {name: torch.zeros((2, 2, 4)) for name in ("k_scales", "v_scales")}
    return named


ROUTING = {"router_logits": normal(5, 6), "experts_per_token": 2}
STARTS = {"key_starts": torch.tensor([0, 3]), "key_ends": torch.tensor([9, 12], dtype=torch.int32)}
BLOCKS, SCALES = mx.mxfp4_quantize(normal(4, 64))

# One or more calls of every function, by name; of those in OUT also with ``out``.
CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "embedding float32": lambda: {"token_ids": IDS, "weight": normal(8, 6)},
    "embedding bfloat16": lambda: {"token_ids": IDS.int(), "weight": normal(8, 6, dtype=BF16)},
    "rmsnorm float32": lambda: {"x": normal(4, 6), "weight": normal(6)},
    "rmsnorm bfloat16": lambda: {"x": normal(4, 6, dtype=BF16), "weight": normal(6), "eps": 1e-3},
    "rope float32": rope_arguments,
    "rope bfloat16": lambda: rope_arguments(x=normal(4, 3, 8, dtype=BF16)),
    "rope_cos_sin": lambda: {"positions": IDS, "inv_freq": normal(4).double(), "scaling": 1.5},
    "linear bfloat16": lambda: linear_arguments("bfloat16"),
    "linear int8": lambda: linear_arguments("int8", activations="int8", x=normal(5, 64, dtype=BF16)),
    "linear bfloat16 packed": lambda: linear_arguments("bfloat16 packed", activations="float32", bias=None),
    "linear int8 packed": lambda: linear_arguments("int8 packed", residual=None),
    "linear_group bfloat16": lambda: group_arguments("bfloat16", "bfloat16"),
    "linear_group mixed": lambda: group_arguments("int8", "bfloat16 packed", "int8 packed", activations="int8"),
    "expert_routing": lambda: dict(ROUTING),
    "expert_offsets": lambda: {"topk_ids": torch.tensor([[2, 0], [1, 2], [0, 2]]).int(), "num_experts": 4},
    "mxfp4_moe float32": lambda: moe_arguments(activations="float32"),
    "mxfp4_moe bf16": lambda: moe_arguments(residual=True, x_dtype="bfloat16", bias_dtype="float32"),
    "mxfp4_moe int8 packed": lambda: moe_arguments(packed=True, activations="int8", swiglu_limit=3.0, first_expert=1),
    "mxfp4_moe foldable": lambda: moe_arguments(foldable_scales=True),
    "kv_cache_write float32": lambda: write_arguments(torch.float32),
    "kv_cache_write int8": lambda: write_arguments(torch.int8),
    "sink_attention float32": lambda: paged_arguments(),
    "sink_attention bf16": lambda: paged_arguments(kv_dtype="bfloat16/bf16", window=6, q_dtype="bfloat16"),
    "sink_attention int8": lambda: paged_arguments(kv_dtype="int8/bf16", block_size=3),
    "sink_attention_bhsd float32": dense_arguments,
    "sink_attention_bhsd bfloat16": lambda: dense_arguments(dtype=BF16, sliding_window=4),
    "sink_attention_bhsd padded": lambda: dense_arguments(queries=7, keys=12, **STARTS),
    "mxfp4_dequantize float32": lambda: {"blocks": BLOCKS, "scales": SCALES},
    "mxfp4_dequantize bfloat16": lambda: {"blocks": BLOCKS[None], "scales": SCALES[None], "dtype": "bfloat16"},
    "mxfp4_quantize": lambda: {"x": normal(2, 3, 64, dtype=BF16)},
    "int8_quantize": lambda: {"x": normal(3, 64)},
}
GRADIENTS = {
    "embedding": ("weight",),
    "rmsnorm": ("x", "weight"),
    "rope": ("x",),
    "linear": ("x", "bias", "residual"),
    "expert_routing": ("router_logits",),
    "mxfp4_moe": ("x", "topk_weights", "gate_up_bias", "down_bias", "residual"),
    "sink_attention": ("q", "sinks"),
    "sink_attention_bhsd": ("q", "k", "v", "sinks"),
}
OUT = ("embedding", "rmsnorm", "rope", "linear", "linear_group", "mxfp4_moe", "sink_attention")


@pytest.fixture(autouse=True)
def _compile_anew():
    torch._dynamo.reset()


every_call = pytest.mark.parametrize("name", CALLS)


def op_name(name: str) -> str:
    return name.split()[0]


def function_of(name: str) -> Callable[..., Any]:
    return getattr(mx, op_name(name))


def results(value: Any) -> tuple[torch.Tensor, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def captured(function: Callable[..., Any], arguments: dict[str, Any]) -> list[tuple[Any, tuple[Any, ...]]]:
    """The operators of namespace mxmoe that a call reaches, with their arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.namespace == "mxmoe":
                assert not kwargs
                seen.append((operator, args))
            return operator(*args, **(kwargs or {}))

    with Watch():
        function(**arguments)
    return seen


def check_operator(function: Callable[..., Any], arguments: dict[str, Any], grad: tuple[str, ...] = ()) -> str:
    ((operator, args),) = captured(function, arguments)
    wanted = [arguments[name] for name in grad if isinstance(arguments.get(name), torch.Tensor)]
    copies = tuple(
        x.clone().requires_grad_(any(x is w for w in wanted)) if isinstance(x, torch.Tensor) else x for x in args
    )
    torch.library.opcheck(operator, copies)
    return operator.name()


def test_every_op_is_there():
    assert set(ops.__all__) - set(mx.__all__) == {"rope_inv_freq", "num_threads", "isa"}  # no work on tensors
    assert {op_name(name) for name in CALLS} == set(mx.__all__)


@every_call
def test_opcheck(name):
    # opcheck cannot add a float result to the sum of integer ones; test_compiled_gradients_are_eager_ones does it.
    grad = () if name == "expert_routing" else GRADIENTS.get(op_name(name), ())
    assert check_operator(function_of(name), CALLS[name](), grad) == f"mxmoe::{op_name(name)}"


@pytest.mark.parametrize("name", [name for name in CALLS if op_name(name) in OUT])
def test_opcheck_of_out(name):
    arguments = CALLS[name]()
    out = torch.empty_like(function_of(name)(**arguments))
    assert check_operator(function_of(name), arguments | {"out": out}) == f"mxmoe::{op_name(name)}_out"


@pytest.mark.parametrize("name", [name for name in CALLS if op_name(name) in GRADIENTS])
def test_opcheck_of_backward(name):
    arguments = CALLS[name]()
    for key in GRADIENTS[op_name(name)]:
        if arguments.get(key) is not None:
            arguments[key] = arguments[key].clone().requires_grad_()
    result = results(function_of(name)(**arguments))[-1]
    found = captured(lambda: result.backward(torch.ones_like(result)), {})
    for operator, args in found:
        torch.library.opcheck(operator, tuple(x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args))
    opaque = ("embedding", "linear", "mxfp4_moe", "sink_attention", "sink_attention_bhsd")
    assert len(found) == (op_name(name) in opaque)


def written(name: str, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    caches = ("k_cache", "v_cache", "k_scales", "v_scales") if op_name(name) == "kv_cache_write" else ()
    return tuple(arguments[key] for key in caches if key in arguments)


@every_call
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_is_eager(name, dynamic):
    compiled = torch.compile(function_of(name), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    arguments, same = CALLS[name](), CALLS[name]()
    got, want = compiled(**arguments), function_of(name)(**same)
    for a, b in zip((*results(got), *written(name, arguments)), (*results(want), *written(name, same)), strict=True):
        assert_exact(a, b)
        assert a.stride() == b.stride()


@every_call
def test_inference_mode(name):
    want = results(function_of(name)(**CALLS[name]()))
    with torch.inference_mode():
        for got, expected in zip(results(function_of(name)(**CALLS[name]())), want, strict=True):
            assert got.is_inference()
            assert_exact(got, expected)


def test_calls_that_nobody_watches_reach_the_kernel_at_once(monkeypatch):
    arguments = linear_arguments("bfloat16")
    with torch.autograd.profiler.profile() as profile:
        want = mx.linear(**arguments)
    assert "mxmoe::linear" in {event.name for event in profile.function_events}
    monkeypatch.setattr(_torch_ops.linear, "_operator", None)
    assert_exact(mx.linear(**arguments), want)
    with pytest.raises(TypeError):  # None is no operator
        mx.linear(**{**arguments, "x": arguments["x"].requires_grad_()})
    with torch.no_grad():
        assert_exact(mx.linear(**arguments), want)


@every_call
def test_same_bits_as_on_arrays(name):
    if op_name(name) == "sink_attention_bhsd":
        pytest.skip("mxmoe.ops has no such function")
    arguments, same = CALLS[name](), CALLS[name]()
    got = results(function_of(name)(**arguments)) + written(name, arguments)
    want = results(getattr(ops, op_name(name))(**same)) + written(name, same)
    assert got
    for a, b in zip(got, want, strict=True):
        assert isinstance(a, torch.Tensor)
        assert_exact(a, b)


class Block(torch.nn.Module):
    """A layer made of the ops, with a paged cache."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = moe_arguments(num_experts=4)
        self.projection = normal(128, 64, dtype=BF16, seed=9) / 8
        self.router = normal(4, 64, dtype=BF16, seed=10)
        self.sinks = normal(4, seed=11)
        inv_freq, self.scaling = ops.rope_inv_freq(16, 10000.0)
        self.inv_freq = torch.from_numpy(inv_freq)

    def forward(self, x, weight, k_cache, v_cache):
        n = x.shape[0]
        h = mx.rmsnorm(x, weight)
        q, k, v = (mx.linear(h, self.projection).view(n, 8, 16) * 1.5).split((4, 2, 2), dim=1)
        cos, sin = mx.rope_cos_sin(torch.arange(n), self.inv_freq, self.scaling)
        q, k = mx.rope(q, cos, sin), mx.rope(k, cos, sin)
        mx.kv_cache_write(k, v, k_cache, v_cache, torch.arange(n))
        paged = mx.sink_attention(
            q,
            k_cache,
            v_cache,
            self.sinks,
            block_table=torch.zeros((1, 1), dtype=torch.int32),
            cu_seqlens=torch.tensor([0, n]),
            seq_lens=torch.tensor([n]),
            sm_scale=0.25,
        )
        dense = mx.sink_attention_bhsd(
            *(t[None].transpose(1, 2) for t in (q, k, v)), self.sinks, sm_scale=0.25, sliding_window=3
        )
        h = (paged + dense[0].transpose(0, 1)).reshape(n, 64)
        ids, shares = mx.expert_routing(mx.linear(h, self.router), 2)
        weights = {name: self.moe[name] for name in cases.MOE_WEIGHTS}
        return mx.mxfp4_moe(h, ids, shares, **weights, residual=x)


def block_inputs(rows: int) -> tuple[torch.Tensor, ...]:
    return normal(rows, 64, seed=rows), normal(64, seed=1).abs(), torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 16, 16)


def test_a_whole_block_compiled():
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9, 16):
            inputs, same = block_inputs(rows), block_inputs(rows)
            got, want = compiled(*inputs), block(*same)
            assert want.std() > 0.1
            for a, b in zip((got, *inputs), (want, *same), strict=True):
                assert_exact(a, b)


def test_inductor_keeps_strides_and_writes():
    # Only ops of ours between reshapes, since what Inductor compiles takes longer than all else here.
    weight, projection, sinks = normal(64, seed=1), normal(128, 64, dtype=BF16, seed=9) / 8, normal(4, seed=11)

    def attend(x, slots, k_cache, v_cache):
        q, k, v = mx.linear(mx.rmsnorm(x, weight), projection).view(-1, 8, 16).split((4, 2, 2), dim=1)
        mx.kv_cache_write(k, v, k_cache, v_cache, slots)
        return mx.sink_attention_bhsd(q[None].transpose(1, 2), k_cache, v_cache, sinks, sm_scale=0.25)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="inductor")
    for rows in (5, 9, 16):
        inputs = [(normal(rows, 64), torch.arange(16 - rows, 16), *torch.zeros(2, 1, 2, 16, 16)) for _ in range(2)]
        with torch.no_grad():
            got, want = compiled(*inputs[0]), attend(*inputs[1])
        for a, b in zip((got, *inputs[0]), (want, *inputs[1]), strict=True):
            assert_exact(a, b)
        assert want.std() > 0.1 and inputs[0][2].abs().max() > 0


@pytest.mark.parametrize("name", [name for name in CALLS if op_name(name) in GRADIENTS])
def test_compiled_gradients_are_eager_ones(name):
    grads = []
    for function in (function_of(name), torch.compile(function_of(name), fullgraph=True, backend="aot_eager")):
        arguments = CALLS[name]()
        wanted = [key for key in GRADIENTS[op_name(name)] if arguments.get(key) is not None]
        for key in wanted:
            arguments[key] = arguments[key].clone().requires_grad_()
        torch.sin(results(function(**arguments))[-1].float()).sum().backward()
        grads.append([arguments[key].grad for key in wanted])
    for got, want in zip(*grads, strict=True):
        assert_exact(got, want)
        assert want.float().abs().max() > 0


@pytest.mark.parametrize("name", ["linear bfloat16", "mxfp4_moe bf16", "sink_attention bf16", "embedding float32"])
def test_memory_is_read_and_written_in_place(name, monkeypatch):
    seen: dict[str, int] = {}
    original = getattr(_torch_define._CPU, op_name(name))

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.update({i: x.data_ptr() for i, x in [*enumerate(args), *kwargs.items()] if isinstance(x, torch.Tensor)})
        return original(*args, **kwargs)

    monkeypatch.setattr(_torch_define._CPU, op_name(name), watch)
    arguments = CALLS[name]()
    want = function_of(name)(**arguments)
    given = {x.data_ptr() for x in arguments.values() if isinstance(x, torch.Tensor)}
    assert given <= set(seen.values()) | {0}
    out = torch.full_like(want, torch.nan)
    assert function_of(name)(**arguments, out=out) is out and seen["out"] == out.data_ptr()
    assert_exact(out, want)


def test_a_version_counts_up_where_something_is_written():
    out, x = torch.empty(4, 6), normal(4, 6)
    before = out._version
    mx.rmsnorm(x, normal(6), out=out)
    assert out._version == before + 1 and x._version == 0


def stretched(x: torch.Tensor, axis: int) -> torch.Tensor:
    """The same values with every second place of one axis between them."""
    shape = [n * 2 if i == axis else n for i, n in enumerate(x.shape)]
    view = torch.full(shape, 99, dtype=x.dtype)[
        tuple(slice(None, None, 2 if i == axis else 1) for i in range(x.dim()))
    ]
    return view.copy_(x)


LARGE = {"k_cache", "v_cache", "k_scales", "v_scales", *cases.MOE_WEIGHTS} - {"gate_up_bias", "down_bias"}


@every_call
def test_activations_may_have_any_strides(name):
    arguments = CALLS[name]()
    want = results(function_of(name)(**arguments))
    small = [key for key, x in arguments.items() if isinstance(x, torch.Tensor) and key not in LARGE]
    if op_name(name) == "linear":
        small = [key for key in small if key not in ("weight", "scales")]
    for key in small:
        for axis in range(arguments[key].dim()):
            changed = arguments | {key: stretched(arguments[key], axis)}
            if op_name(name) == "kv_cache_write":
                mx.kv_cache_write(**changed)
                continue
            for got, expected in zip(results(function_of(name)(**changed)), want, strict=True):
                assert_exact(got, expected)


def test_large_ids_belong_to_nobody():
    arguments = moe_arguments()
    arguments["topk_ids"] = arguments["topk_ids"].long()
    arguments["topk_ids"][0] += 2**32
    assert_exact(mx.mxfp4_moe(**arguments)[0], torch.zeros(64))
    arguments["topk_ids"][1, 1] = -1
    with pytest.raises(ValueError, match="topk_ids holds -1; wanted 0 or more"):
        mx.mxfp4_moe(**arguments)


def with_gradient(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        (
            "rmsnorm float32",
            lambda a: {"x": a["x"].half()},
            TypeError,
            "x has dtype float16; wanted float32 or bfloat",
        ),
        ("rmsnorm float32", lambda a: {"x": a["x"].double()}, TypeError, "x has dtype float64; wanted float32 or"),
        ("rmsnorm float32", lambda a: {"weight": normal(7)}, ValueError, r"weight has shape \(7,\)"),
        (
            "rmsnorm float32",
            lambda a: {"x": with_gradient(a["x"]), "out": normal(4, 6)},
            ValueError,
            "out has no grad",
        ),
        ("rmsnorm float32", lambda a: {"out": normal(4, 5)}, ValueError, r"out has shape \(4, 5\)"),
        ("rope float32", lambda a: {"cos": with_gradient(a["cos"])}, ValueError, "cos requires a gradient, which"),
        ("linear int8", lambda a: {"scales": with_gradient(a["scales"])}, ValueError, "scales requires a gradient"),
        ("linear bfloat16 packed", lambda a: {"weight": with_gradient(a["weight"])}, ValueError, "weight requires a"),
        ("linear bfloat16", lambda a: {"weight": a["weight"].half()}, TypeError, "weight has dtype float16"),
        ("linear bfloat16", lambda a: {"activations": "fp8"}, ValueError, "activations is 'fp8'; wanted"),
        (
            "mxfp4_moe bf16",
            lambda a: {"topk_ids": a["topk_ids"].short()},
            TypeError,
            "topk_ids has dtype int16; want",
        ),
        ("mxfp4_moe bf16", lambda a: {"topk_weights": a["topk_ids"]}, TypeError, "topk_weights has dtype"),
        (
            "mxfp4_moe bf16",
            lambda a: {"down_blocks": stretched(a["down_blocks"], 0)},
            ValueError,
            "down_blocks is not",
        ),
        (
            "kv_cache_write float32",
            lambda a: {"k": with_gradient(a["k"])},
            ValueError,
            "into a cache has no gradient",
        ),
        (
            "sink_attention int8",
            lambda a: {"k_scales": with_gradient(a["k_scales"])},
            ValueError,
            "k_scales requires",
        ),
        (
            "sink_attention float32",
            lambda a: {"seq_lens": a["seq_lens"].float()},
            TypeError,
            "seq_lens has dtype float32",
        ),
        ("mxfp4_quantize", lambda a: {"x": with_gradient(a["x"])}, ValueError, "quantising has no gradient"),
        ("mxfp4_dequantize float32", lambda a: {"dtype": "float16"}, ValueError, "dtype is 'float16'"),
        ("expert_routing", lambda a: {"experts_per_token": 7}, ValueError, "experts_per_token is 7; wanted 1 to"),
    ],
)
def test_errors(name, changes, error, message):
    arguments = CALLS[name]()
    with pytest.raises(error, match=message):
        function_of(name)(**(arguments | changes(arguments)))


def test_devices(monkeypatch):
    with pytest.raises(ValueError, match="a tensor is on meta; wanted the CPU or a CUDA device"):
        _torch_define._backend(torch.empty(3, device="meta"))
    monkeypatch.setattr(cuda, "problem", lambda: "no NVIDIA driver is installed")
    says = "a tensor is on cuda:0, where mxmoe cannot compute: no NVIDIA driver is installed"
    with FakeTensorMode(), pytest.raises(ValueError, match=says):
        _torch_define._backend(torch.empty(3, device="cuda:0"))
    monkeypatch.setattr(cuda, "problem", lambda: None)
    with FakeTensorMode():
        assert _torch_define._backend(torch.empty(3, device="cuda:0")) is ops  # which knows where an array lies


BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" or name.startswith("torch."):
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Block())
import mxmoe.ops
try:
    import mxmoe.integrations.torch
except ImportError as error:
    print(error)
"""


def test_without_torch_there_is_one_clear_error():
    run = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "mxmoe.integrations.torch needs PyTorch; install it with: pip install torch"


def test_an_old_torch_is_one_clear_error():
    code = "import torch; del torch.library.custom_op; import mxmoe.integrations.torch"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    wanted = "ImportError: mxmoe.integrations.torch needs PyTorch 2.4 or newer; found "
    assert run.returncode == 1 and last == wanted + torch.__version__


def test_mxmoe_does_not_import_torch():
    code = "import sys, mxmoe, mxmoe.ops, mxmoe.integrations; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
