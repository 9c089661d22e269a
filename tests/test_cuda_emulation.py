"""The emulation itself: what is right passes in every order, and each deliberate mistake is caught."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mxmoe import cuda

VALUES = [float(i % 7 - 3) for i in range(64)]
SEEDS = range(8)
REVERSED = VALUES[::-1]


def product():
    x = np.array(VALUES)
    a = np.array([[x[(16 * i + j) % 64] for j in range(16)] for i in range(16)])
    b = np.array([[x[(8 * i + j + 3) % 64] for j in range(8)] for i in range(16)])
    return (a @ b).reshape(-1)


def run(emulation, name, seed):
    emulation.set_seed(seed)
    return np.array(emulation.run_kernel(name, VALUES))


@pytest.mark.parametrize("name", ["reverse", "async"])
@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels_are_right_in_any_order(emulation, name, seed):
    assert run(emulation, name, seed)[:64].tolist() == REVERSED


@pytest.mark.parametrize("name", ["reverse without a barrier", "async without a wait"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_barrier_or_wait_gives_wrong_results(emulation, name, seed):
    got = run(emulation, name, seed)[:64]
    assert np.isnan(got).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_phases_are_waited_for(emulation, seed):
    assert run(emulation, "ring", seed)[:64].tolist() == VALUES[31::-1] + VALUES[:31:-1]


@pytest.mark.parametrize("name", ["ring without a wait for what is full", "ring without a wait for what is empty"])
def test_a_phase_that_is_not_waited_for_shows_in_some_orders(emulation, name):
    wrong = 0
    for seed in range(16):
        try:
            wrong += run(emulation, name, seed)[:64].tolist() != VALUES[31::-1] + VALUES[:31:-1]
        except emulation.CudaError as error:  # who comes too late for a phase waits for ever
            assert "waits in mbarrier.try_wait" in str(error)
            emulation.clear_fault()
            wrong += 1
    assert wrong > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_memory_begins_poisoned(emulation, seed):
    assert np.isnan(run(emulation, "unwritten shared memory", seed)[:64]).all()
    assert run(emulation, "shared", seed)[:64].tolist() == VALUES
    assert np.isnan(run(emulation, "unwritten shared memory", seed)[:64]).all()


@pytest.mark.parametrize("name", ["mma", "ldmatrix"])
@pytest.mark.parametrize("seed", SEEDS)
def test_fragments_are_those_of_the_instruction(emulation, name, seed):
    assert np.array_equal(run(emulation, name, seed), product())


@pytest.mark.parametrize("name", ["mma with wrong columns", "mma with wrong registers"])
def test_wrong_fragments_give_wrong_products(emulation, name):
    assert not np.array_equal(run(emulation, name, 0), product())


FAULTS = {
    "divergent barrier": "waits in __syncthreads for threads that never come",
    "early exit": r"waits in __syncthreads for threads that never come; thread \(5, 0, 0\) .* has ended",
    "divergent collectives": "different collectives: __shfl",
    "missing lanes": "waits in __shfl_xor_sync for threads that never come",
    "misaligned async": "cp.async with an address that is not aligned to 16 bytes",
    "ring without an arrival": "waits in mbarrier.try_wait for threads that never come",
    "ring without a beginning": "mbarrier.* on what nobody has initialised",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "message"), FAULTS.items(), ids=FAULTS.keys())
def test_faults_are_named(emulation, name, message, seed):
    with pytest.raises(emulation.CudaError, match=message):
        run(emulation, name, seed)
    # As on a device, whatever comes next fails too, until the process (here: the test) begins anew.
    with pytest.raises(emulation.CudaError):
        run(emulation, "reverse", seed)
    emulation.clear_fault()
    assert run(emulation, "reverse", seed)[:64].tolist() == REVERSED


def warpgroup_product():
    x = np.array(VALUES)
    a = np.array([[x[(5 * i + k) % 64] for k in range(128)] for i in range(64)])
    b = np.array([[x[(3 * k + 7 * n + 1) % 64] for n in range(16)] for k in range(128)])
    return (a @ b).reshape(-1)


def run_product(emulation, name, seed):
    emulation.set_seed(seed)
    return np.array(emulation.run_product(name, VALUES))


@pytest.mark.parametrize("name", ["right", "from shared memory", "both transposed"])
@pytest.mark.parametrize("seed", SEEDS)
def test_products_of_a_warpgroup_are_those_of_the_instruction(emulation, name, seed):
    assert np.array_equal(run_product(emulation, name, seed), warpgroup_product())


@pytest.mark.parametrize("seed", SEEDS)
def test_what_cp_async_brought_must_be_fenced_by_who_asked_for_it(emulation, seed):
    assert np.array_equal(run_product(emulation, "copied", seed), np.full(1024, sum(VALUES)))
    assert np.isnan(run_product(emulation, "one proxy fence", seed)).any()


@pytest.mark.parametrize("name", ["no proxy fence", "no wait", "no swizzle", "wrong registers", "other stride",
                                  "not accumulated"])  # fmt: skip
@pytest.mark.parametrize("seed", SEEDS)
def test_mistakes_around_a_product_give_wrong_results(emulation, name, seed):
    assert not np.array_equal(run_product(emulation, name, seed), warpgroup_product())


@pytest.mark.parametrize("name", ["tile overwritten", "registers overwritten"])
def test_operands_overwritten_in_flight_show_in_some_orders(emulation, name):
    right = [np.array_equal(run_product(emulation, name, seed), warpgroup_product()) for seed in range(16)]
    assert not all(right)
    assert any(right)  # as on a device, where it works now and then


PRODUCT_FAULTS = {
    "no fence": "a group of wgmma does not begin with wgmma.fence",
    "no end": "warpgroup 0 ends with wgmma that it has not waited for",
    "misplaced": "a tile that does not begin where a swizzle pattern does",
    "past the end": "wgmma reads past the end of shared memory",
    "missing warp": "waits in wgmma.wait_group for threads that never come",
    "different tiles": "different wgmma, or give it different descriptors",
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "message"), PRODUCT_FAULTS.items(), ids=PRODUCT_FAULTS.keys())
def test_faults_of_products_are_named(emulation, name, message, seed):
    with pytest.raises(emulation.CudaError, match=message):
        run_product(emulation, name, seed)
    emulation.clear_fault()
    assert np.array_equal(run_product(emulation, "right", seed), warpgroup_product())


@pytest.mark.parametrize("name", ["read past the end", "read far past the end", "shared past the end"])
def test_the_sanitizer_stops_what_passes_an_end(emulation, name):
    if not emulation.sanitized:
        pytest.skip("the emulation was built without AddressSanitizer")
    program = (
        "import importlib.util as u, sys\n"
        "s = u.spec_from_file_location('_cuda_emulated', sys.argv[1])\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        "m.run_kernel(sys.argv[2], [0.0] * 64)\n"
    )
    command = [sys.executable, "-c", program, emulation.__file__, name]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=120)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
    command[-1] = "read"
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0


def test_work_waits_until_it_is_waited_for(emulation):
    x = cuda.array(np.arange(4.0, dtype=np.float32).reshape(1, 4))
    weight, out = cuda.array(np.ones(4, np.float32)), cuda.array(np.full((1, 4), np.nan, np.float32))
    other = emulation.Stream()
    cuda.rmsnorm(x, weight, out=out)
    first = emulation.current_stream()
    emulation.set_current_stream(other)
    try:
        assert np.isnan(out.numpy()).all()  # nobody told this stream to wait
        other.wait_for(first)
        assert np.isfinite(out.numpy()).all()
    finally:
        emulation.set_current_stream(None)


def test_the_emulation_is_not_in_the_package():
    folder = Path(cuda.__file__).parent
    assert not list(folder.glob("_cuda_emulated*"))
