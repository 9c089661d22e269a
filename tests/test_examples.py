"""The examples that need nothing but the package run as they stand, and notice a wrong result.

The C program's are in test_c_programs.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script):
    return subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_numpy_only():
    done = run(EXAMPLES / "numpy_only.py")
    assert done.returncode == 0, done.stdout + done.stderr
    *checks, last = done.stdout.splitlines()
    assert len(checks) == 4
    assert all(line.endswith("  ok") for line in checks)
    assert last == "ok"


@pytest.mark.parametrize(
    ("right", "wrong", "checks"),
    [
        ("+ np.exp(sinks.astype(np.float64))[:, None, None]", "", ["attention"]),
        ("(distance >= SLIDING_WINDOW)", "(distance > SLIDING_WINDOW)", ["attention"]),
        ("[blocks & 15, blocks >> 4]", "[blocks >> 4, blocks & 15]", ["mixture"] * 3),
        ("+ down_bias[expert])", ")", ["mixture"] * 3),
    ],
)
def test_numpy_only_can_fail(tmp_path, right, wrong, checks):
    text = (EXAMPLES / "numpy_only.py").read_text()
    assert text.count(right) == 1
    (tmp_path / "broken.py").write_text(text.replace(right, wrong))
    done = run(tmp_path / "broken.py")
    assert done.returncode == 1, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line.endswith("  WRONG")] == checks
    assert done.stdout.endswith("FAILED\n")
