"""What the torch operators hand on to a GPU's kernels.

The CPU's torch has no tensors on the emulation, so these lie in host memory and are copied there and back where an
operator reaches its kernel; `test_torch_ops` tests all before that.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from compare import as_numpy, assert_close, assert_exact
from cuda_helpers import down, up
from moe_case import make, torch_moe
from mxmoe import cuda
from mxmoe.integrations import _torch_ops
from mxmoe.integrations import torch as mx
from mxmoe.reference import ops as reference
from torch_cases import moe_arguments


def copied(function):
    """Let a function of `mxmoe.cuda` take and return torch tensors of the CPU."""

    def there(x):
        return up(as_numpy(x)) if isinstance(x, torch.Tensor) else x

    def call(*args, out=None, **kwargs):
        result = torch.from_numpy(down(function(*map(there, args), **{k: there(v) for k, v in kwargs.items()})))
        return result if out is None else out.copy_(result)

    return call


@pytest.fixture
def hopper(gpu, monkeypatch):
    """Give the module, where it has Hopper's kernels, with the operators' way to them."""
    if "sm_90a" not in gpu.available_architectures():
        pytest.skip("no Hopper GPU")
    monkeypatch.setattr(_torch_ops, "_backend", lambda _: SimpleNamespace(mxfp4_moe=copied(cuda.mxfp4_moe)))
    return gpu


@pytest.mark.parametrize("how", ["called", "out", "compiled", "trained"])
@pytest.mark.parametrize("foldable", [False, True])
def test_scales_that_may_be_folded_reach_hoppers_kernels(hopper, foldable, how):
    case, arguments = make(), moe_arguments(foldable_scales=foldable)
    assert cuda.scales_are_foldable(arguments["gate_up_scales"], arguments["down_scales"])
    moe = mx.mxfp4_moe
    if how == "compiled":
        torch._dynamo.reset()
        moe = torch.compile(moe, fullgraph=True, backend="aot_eager")
    if how == "out":
        arguments["out"] = torch.full(case.x.shape, torch.nan)
    if how == "trained":
        arguments["x"].requires_grad_()
    got = moe(**arguments)
    kernel = hopper.last_kernels()["mxfp4_moe"]
    assert kernel == f"mxfp4_moe_bf16_mxfp4_few_{'sm90' if foldable else 'sm80'}_kernel"
    want = case.run("bf16", reference.mxfp4_moe)
    assert_close(got.detach(), want, baseline=torch_moe(case, "bf16"), dtype="bfloat16", out_dtype="float32")
    if how == "out":
        assert got is arguments["out"]
    if how == "trained":
        got.sum().backward()
        same = moe_arguments()
        mx.mxfp4_moe(**(same | {"x": same["x"].requires_grad_()})).sum().backward()
        assert_exact(arguments["x"].grad, same["x"].grad)
