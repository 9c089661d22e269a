"""From what the user typed to a folder: a path, the built-in model, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mxmoe.shards import CheckpointError

__all__ = ["resolve"]

_SHORT_NAMES = {"gpt-oss-20b": "openai/gpt-oss-20b", "gpt-oss-120b": "openai/gpt-oss-120b"}
# A hub repository also holds the same weights in OpenAI's own layout and for Apple's Metal.
_IGNORED = ["original/*", "metal/*"]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(name_or_path: str | Path, *, progress: bool = True) -> Path:
    """Find the folder of a checkpoint, fetching it from the hub where needed.

    Parameters
    ----------
    name_or_path : str or Path
        A folder; ``"tiny"`` for the model inside the package; ``"gpt-oss-20b"``, ``"gpt-oss-120b"`` or any
        ``"organisation/name"`` of the Hugging Face hub. A folder that holds a checkpoint wins over a name.
    progress : bool, default True
        Whether a download shows its progress on stderr.

    Returns
    -------
    Path

    Raises
    ------
    CheckpointError
        When there is no such folder or name, or the hub cannot be reached and has not been before.

    Notes
    -----
    Downloads go to the hub's usual cache (``HF_HOME``, ``HF_HUB_CACHE``); with ``HF_HUB_OFFLINE=1``, or
    without a network, the cached copy is used.
    """
    text = str(name_or_path)
    # os.path answers False where pathlib raises: unknown users, names too long for the file system.
    path = Path(os.path.expanduser(text))
    if any(os.path.isfile(path / place / "config.json") for place in ("", "original")):
        return path
    if text == "tiny":
        return Path(__file__).parent / "tiny"
    if os.path.isdir(path):
        raise CheckpointError(f"{path}: no config.json in this folder, expected a checkpoint")
    repository = _SHORT_NAMES.get(text, text)
    if os.path.exists(path) or not _HUB_NAME.fullmatch(repository) or isinstance(name_or_path, Path):
        known = ", ".join(["tiny", *_SHORT_NAMES])
        raise CheckpointError(
            f"{text!r:.200} is neither a folder, nor one of {known}, nor organisation/name on the hub"
        )
    return _download(repository, progress)


def _download(repository: str, progress: bool) -> Path:
    # Imported here: it takes a noticeable part of a second, which a local folder need not pay.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    quiet = not progress and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        return Path(snapshot_download(repository, ignore_patterns=_IGNORED))
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repository}: not in the local cache, and the hub cannot be reached (no network or "
            f"HF_HUB_OFFLINE set); download it elsewhere (`hf download {repository}`) and pass that folder"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{repository}: the hub has no such repository, or it is private (log in with `hf auth login`)"
        ) from None
    except Exception as problem:
        # The library's transport, and with it the family of its errors, has changed from release to release.
        reason = str(problem).strip().splitlines() or [type(problem).__name__]
        raise CheckpointError(f"{repository}: download failed ({reason[0]})") from None
    finally:
        if quiet:
            enable_progress_bars()
