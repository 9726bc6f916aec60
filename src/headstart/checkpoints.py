"""Checkpoints: tensors and facts in one file, checked when it is read, with the one before kept beside it."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.errors import TrainingError
from headstart.files import UNSEALED, holds_seal, seal, sync, write_whole

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

NAME, PREVIOUS = "checkpoint.safetensors", "checkpoint-previous.safetensors"
DAMAGED = "checkpoint-damaged.safetensors"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a run needs to go on."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]  # JSON values


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the last one becomes the previous one. At every moment one of the two is whole.

    Raises:
        TrainingError: where the disk is full or cannot be written; the last checkpoint is still there.
    """
    content = _pack(checkpoint)
    file, fresh = folder / NAME, folder / f"{NAME}.new"
    try:
        write_whole(fresh, content)
        if file.exists():
            file.replace(folder / PREVIOUS)
        fresh.replace(file)
        sync(folder)
    except OSError as error:
        kept = ": the last good checkpoint is kept" if file.exists() or (folder / PREVIOUS).exists() else ""
        raise _unwritable(file, content, error, kept) from error


def keep(file: Path, checkpoint: Checkpoint) -> None:
    """Write what a finished phase gave, whole or not at all.

    Raises:
        TrainingError: where the disk is full or cannot be written.
    """
    content = _pack(checkpoint)
    try:
        write_whole(file, content)
    except OSError as error:
        raise _unwritable(file, content, error) from error


def recall(file: Path) -> Checkpoint | None:
    """What a finished phase gave; None where that was not kept, or is damaged."""
    if not file.exists():
        return None
    kept = _read(file)
    if kept is None:
        log.warning("%s: is damaged (its checksum does not match): what it holds is made again", file)
    return kept


def _unwritable(file: Path, content: bytes, error: OSError, kept: str = "") -> TrainingError:
    folder = file.parent
    free = f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB are free" if folder.exists() else "the folder is gone"
    why = f"cannot be written ({error.strerror}): {len(content) / 2**20:.1f} MiB are needed, {free}"
    return TrainingError(file, why, f"Free some space and give the same command{kept}.")


def _pack(checkpoint: Checkpoint) -> bytes:
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    return seal(save(tensors, {"checkpoint": json.dumps({"sha256": UNSEALED, **checkpoint.facts})}))


def read(folder: Path) -> Checkpoint | None:
    """The last checkpoint of a folder that is whole; None where there is none.

    A damaged one is named in the log, and set aside as `checkpoint-damaged.safetensors`.
    """
    for name in (NAME, PREVIOUS):
        file = folder / name
        if not file.exists():
            continue
        checkpoint = _read(file)
        if checkpoint is not None:
            return checkpoint
        others = name == NAME and (folder / PREVIOUS).exists()
        instead = "the one before is used" if others else "there is no other, training begins again"
        log.warning("checkpoint: %s: is damaged (its checksum does not match): %s", file, instead)
        with contextlib.suppress(FileNotFoundError):  # another process may have set it aside
            file.replace(folder / DAMAGED)
    return None


def remove(folder: Path) -> None:
    """Take a folder's checkpoints away."""
    for name in (NAME, PREVIOUS, DAMAGED, f"{NAME}.new"):
        (folder / name).unlink(missing_ok=True)


def _read(file: Path) -> Checkpoint | None:
    """The checkpoint in a file; None where a bit of it has changed or some of it is missing."""
    from safetensors.torch import load

    content = file.read_bytes()
    # safetensors: 8 bytes of length, then that much JSON, then the tensors
    length = int.from_bytes(content[:8], "little")
    try:
        facts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["checkpoint"])
        sha256 = str(facts.pop("sha256"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return Checkpoint(load(content), facts) if holds_seal(content, sha256) else None
