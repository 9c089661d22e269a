"""Ceilings: positive, in a sane order, on every instruction set, and clear errors."""

from __future__ import annotations

import dataclasses
import math

import pytest

from mxmoe import _core, ops
from mxmoe.ceilings import CeilingMeter, Ceilings, measure

SMALL = 8 << 20


def test_every_rate_is_positive(isa: str) -> None:
    meter = CeilingMeter(1, SMALL)
    for rate in dataclasses.asdict(meter.sample()).values():
        assert math.isfinite(rate) and rate > 0.01


@pytest.mark.skipif("VNNI" not in _core.cpu_features(), reason="this CPU has no VNNI")
def test_narrow_formats_are_faster_where_there_are_instructions_for_them() -> None:
    meter = CeilingMeter(1, SMALL)
    for _ in range(3):
        meter.sample()
    # By the instructions' widths 4 and 2 times; other work on the machine must not turn that round.
    best = [
        max(getattr(s, name) for s in meter.samples) for name in ("int8_gop_s", "bf16_gflop_s", "float32_gflop_s")
    ]
    assert best[0] > 1.3 * best[2]
    assert best[0] > best[1]


def test_wider_instruction_sets_are_faster() -> None:
    if "avx2" not in _core.available_isas():
        pytest.skip("this CPU has no AVX2")
    best = {}
    for name in ("scalar", "avx2"):
        with ops.isa(name):
            meter = CeilingMeter(1, SMALL)
            best[name] = max(meter.sample().float32_gflop_s for _ in range(3))
    assert best["avx2"] > best["scalar"]


@pytest.mark.parametrize("activations", ["float32", "bf16", "int8"])
def test_operations_are_counted(isa: str, activations: str) -> None:
    with ops.num_threads(1):
        once, _ = _core.run_peak(activations, 3)
        twice, seconds = _core.run_peak(activations, 6)
    assert twice == 2 * once > 0 and seconds > 0


def test_every_thread_has_its_share() -> None:
    counts = []
    for threads in (1, 3):
        with ops.num_threads(threads):
            counts.append(_core.run_peak("float32", 10)[0])
    assert counts[1] == 3 * counts[0]


@pytest.mark.parametrize("num_bytes", [1 << 20, (1 << 20) + 511, (3 << 21) + 512, (2 << 21) - 512])
def test_any_size_of_buffer(isa: str, num_bytes: int) -> None:
    buffer = _core.ReadBuffer(num_bytes)
    assert buffer.nbytes == num_bytes // 512 * 512
    assert 0 < buffer.read_seconds() < 60


def test_median_is_of_each_rate_alone() -> None:
    meter = CeilingMeter(1, SMALL)
    meter.samples = [Ceilings(1.0, 30.0, 5.0, 7.0), Ceilings(3.0, 10.0, 6.0, 9.0), Ceilings(2.0, 20.0, 4.0, 8.0)]
    assert meter.median() == Ceilings(2.0, 20.0, 5.0, 8.0)


def test_a_sample_is_the_best_of_its_passes() -> None:
    meter = CeilingMeter(1, SMALL)
    samples = [meter.sample() for _ in range(2)]
    half = len(meter.passes) // 2
    assert half > 1
    assert [s.read_gb_s for s in samples] == [max(meter.passes[:half]), max(meter.passes[half:])]


def test_floor_is_the_longer_of_the_two() -> None:
    ceilings = Ceilings(10.0, 400.0, 200.0, 100.0)
    assert ceilings.seconds(1e10, 1e9, "int8") == pytest.approx(1.0)
    assert ceilings.seconds(1e9, 1e12, "int8") == pytest.approx(2.5)
    assert ceilings.seconds(1e9, 1e12, "float32") == pytest.approx(10.0)
    assert [ceilings.peak(a) for a in ("int8", "bf16", "float32")] == [400.0, 200.0, 100.0]  # type: ignore[arg-type]


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_bytes is 1000; wanted at least 1048576"):
        _core.ReadBuffer(1000)
    with pytest.raises(ValueError, match="num_bytes is -1; wanted at least"):
        CeilingMeter(1, -1)
    with pytest.raises(ValueError, match="wanted a size that fits in memory"):
        _core.ReadBuffer(2**63 - 1)
    with pytest.raises(ValueError, match="the system does not give that much memory"):
        _core.ReadBuffer(2**60)
    with pytest.raises(ValueError, match="rounds is 0; wanted 1 to"):
        _core.run_peak("int8", 0)
    with pytest.raises(ValueError, match="activations is 'fp8'; wanted"):
        _core.run_peak("fp8", 1)
    with pytest.raises(ValueError, match="samples is 0; wanted 1 or more"):
        measure(1, samples=0)
    with pytest.raises(ValueError, match="num_threads is -1; wanted"):
        CeilingMeter(-1, SMALL)
    with pytest.raises(ValueError, match="the meter holds no samples"):
        CeilingMeter(1, SMALL).median()
