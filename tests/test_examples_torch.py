"""The examples that need PyTorch, each run as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    """Run an example; return what it printed."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def losses(printed: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss ([\d.]+)", printed)]


def test_transformers_two_lines() -> None:
    printed = run("transformers_two_lines.py")
    assert "<|channel|>final<|message|>42<|return|>" in printed
    assert "4.25 bits a weight" in printed


def test_torch_module() -> None:
    printed = run("torch_module.py")
    assert "4.25 bits a weight" in printed and "weights are unchanged" in printed
    assert losses(printed)[-1] < 0.5 * losses(printed)[0]


def test_lora_tiny(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    printed = run("lora_tiny.py", str(tmp_path))
    assert losses(printed)[-1] < 0.5 * losses(printed)[0]
    assert "unchanged, byte for byte" in printed
    assert "What is 17 + 25?  without: '42'  with: 'Ahoy! 42'" in printed
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
