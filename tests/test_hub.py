"""From names to folders: built-in, on disk, on the hub, and offline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import checkpoints
import mxmoe.hub
from checkpoints import assert_clear
from mxmoe.checkpoint import CheckpointError, resolve


def test_resolve_takes_folders(tmp_path, monkeypatch):
    folder = checkpoints.write(tmp_path / "huggingface")
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve("huggingface") == Path("huggingface")
    checkpoints.write(tmp_path / "only" / "original", "original")
    assert resolve(tmp_path / "only") == tmp_path / "only"


def test_resolve_finds_the_tiny_model_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny") == Path(mxmoe.hub.__file__).parent / "tiny"
    (tmp_path / "tiny").mkdir()
    assert resolve("tiny") == Path(mxmoe.hub.__file__).parent / "tiny", "a folder that is no checkpoint"
    checkpoints.write(tmp_path / "tiny")
    assert resolve("tiny") == Path("tiny")


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("gpt-oss-20b", "openai/gpt-oss-20b"),
        ("gpt-oss-120b", "openai/gpt-oss-120b"),
        ("openai/gpt-oss-20b", "openai/gpt-oss-20b"),
        ("someone/gpt-oss.fine_tuned-2", "someone/gpt-oss.fine_tuned-2"),
    ],
)
@pytest.mark.parametrize("progress", [False, True])
def test_resolve_fetches_without_the_copies(monkeypatch, tmp_path, name, repository, progress):
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    calls = []

    def fetch(repo_id, *, ignore_patterns):
        calls.append((repo_id, ignore_patterns, are_progress_bars_disabled()))
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve(name, progress=progress) == tmp_path
    assert calls == [(repository, ["original/*", "metal/*"], not progress)]
    assert not are_progress_bars_disabled()


def test_a_folder_wins_over_a_hub_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    checkpoints.write(tmp_path / "gpt-oss-20b")
    checkpoints.write(tmp_path / "openai" / "gpt-oss-20b")
    assert resolve("gpt-oss-20b") == Path("gpt-oss-20b")
    assert resolve("openai/gpt-oss-20b") == Path("openai/gpt-oss-20b")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nonsense",
        "gpt-oss-21b",
        "./openai/gpt",
        "/no/such/folder",
        "a/b/c",
        "../x",
        "a b/c",
        "a/b\n",
        "~/nowhere/x",
        "~nobody/x",
        "a\0b",
        "x" * 5000,
    ],
)
def test_what_is_no_name_never_reaches_the_hub(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError) as problem:
        resolve(name)
    assert_clear(problem)


def test_a_file_and_an_empty_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "empty").mkdir()
    for path in ("model.safetensors", "empty", tmp_path / "model.safetensors", tmp_path / "nowhere"):
        with pytest.raises(CheckpointError) as problem:
            resolve(path)
        assert_clear(problem, str(path))


def hub_error(kind):
    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None)
    return {
        "not cached": errors.LocalEntryNotFoundError("An error happened\nand a second line"),
        "no repository": errors.RepositoryNotFoundError("404\nnot found", response=response),
        "gated": errors.GatedRepoError("403\ngated", response=response),
        "server": errors.HfHubHTTPError("500\nsorry", response=response),
        "bad name": errors.HFValidationError("bad\nname"),
        "offline": errors.OfflineModeIsEnabled("offline"),
        "disk full": OSError(28, "No space left on device"),
        "anything else": RuntimeError("proxy\nrefused"),
        "without words": RuntimeError(),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("not cached", "HF_HUB_OFFLINE"),
        ("no repository", "no such repository"),
        ("gated", "hf auth login"),
        ("server", "500"),
        ("bad name", "bad"),
        ("offline", "offline"),
        ("disk full", "No space left"),
        ("anything else", "(proxy)"),
        ("without words", "(RuntimeError)"),
    ],
)
def test_the_hubs_errors_are_one_line(monkeypatch, tmp_path, kind, part):
    def fail(*_, **__):
        raise hub_error(kind)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError) as problem:
        resolve("openai/gpt-oss-20b", progress=False)
    assert_clear(problem, "openai/gpt-oss-20b", part)


@pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "no network"])
def test_offline_for_real(tmp_path, offline):
    """The hub's own library, without a network, with an empty cache and then with a filled one."""
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": ""}
    env |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if offline == "HF_HUB_OFFLINE":
        env["HF_HUB_OFFLINE"] = "1"
    else:
        # A port on which nobody listens: connections are refused at once.
        env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_ETAG_TIMEOUT": "1"}
    program = (
        "from mxmoe.checkpoint import CheckpointError, resolve\n"
        "try:\n    print('found', resolve('openai/gpt-oss-20b', progress=False))\n"
        "except CheckpointError as problem:\n    print('error', problem)\n"
    )

    def run():
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    message = run()
    assert message.startswith("error openai/gpt-oss-20b: not in the local cache")
    assert "pass that folder" in message
    repository = tmp_path / "hub" / "models--openai--gpt-oss-20b"
    snapshot = repository / "snapshots" / ("0" * 40)
    checkpoints.write(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert run() == f"found {snapshot}"
