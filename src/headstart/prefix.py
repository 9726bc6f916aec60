"""A frozen prefix runs once: its activations are kept on disk, and the later blocks train on them."""

from __future__ import annotations

import copy
import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headstart.augmentation import Augmentation
from headstart.blocks import Block, find_end
from headstart.errors import TrainingError
from headstart.files import sync
from headstart.loading import BATCH_SIZE, Album, Compute, ahead, count_cpus
from headstart.sampling import Draw

log = logging.getLogger(__name__)

LARGEST = 65504.0  # of float16


@dataclass(frozen=True, eq=False)
class Cut:
    """A network in two parts.

    Args:
        prefix: pictures (n, 3, size, size) -> activations (n, ...) at the boundary.
        suffix: activations -> features (n, dim); its modules are the network's own.
    """

    prefix: nn.Module
    suffix: nn.Module


class _Reached(Exception):
    """The boundary was reached: what comes after it need not run."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def _stop(module: nn.Module, inputs: Any, output: Tensor) -> None:
    raise _Reached(output)


class _Prefix(nn.Module):
    def __init__(self, inner: nn.Module, boundary: str) -> None:
        super().__init__()
        self.inner = inner
        inner.get_submodule(boundary).register_forward_hook(_stop)

    def forward(self, pictures: Tensor) -> Tensor:
        try:
            self.inner(pictures)
        except _Reached as reached:
            return reached.output
        raise RuntimeError("the boundary was not reached")


class _Boundary(nn.Module):
    """Stands where the boundary was, and gives the activations instead of whatever comes in."""

    activations: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Tensor:
        assert self.activations is not None
        return self.activations


def cut(network: nn.Module, blocks: tuple[Block, ...], frozen: int, size: int) -> Cut | None:
    """A network cut after its first blocks; None where it cannot be cut there, which is logged.

    The suffix is the network itself, shown one blank picture: what that becomes is dropped at the boundary, where the
    activations come in. So whatever the network does between its blocks is done, and the prefix costs a picture a
    step. Whether that is right is tried: a network that uses what an earlier block gave once more is not cut.

    Args:
        network: pictures (n, 3, size, size) -> features (n, dim); in evaluation mode.
        blocks: its blocks.
        frozen: how many of the first blocks are the prefix.
        size: side of its input in pixels.
    """
    boundary = find_end(network, blocks[frozen - 1])
    prefix = _Prefix(copy.deepcopy(network), boundary).eval().requires_grad_(False)
    suffix = _shorten(network, boundary, size)
    first = next(network.parameters())
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(first)
    try:
        with torch.inference_mode():
            expected, found = network(example), suffix(prefix(example))
            is_right = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
        log.info("the network cannot be cut after %s: %s", blocks[frozen - 1].name, str(error).split("\n")[0])
        return None
    if not is_right:
        log.info("the network is no chain after %s: its first blocks run each time", blocks[frozen - 1].name)
        return None
    return Cut(prefix, suffix)


def _shorten(network: nn.Module, boundary: str, size: int) -> nn.Module:
    """The network from a boundary on: another shell around the same modules and tensors."""
    parts = boundary.split(".")
    shells = {".".join(parts[:end]) for end in range(len(parts))}  # what holds the boundary, the network itself first
    memo: dict[int, Any] = {id(module): module for name, module in network.named_modules() if name not in shells}
    memo |= {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    suffix = copy.deepcopy(network, memo)
    end = _Boundary()
    end._forward_hooks.update(
        network.get_submodule(boundary)._forward_hooks
    )  # taps of the boundary catch what it gives
    suffix.get_submodule(".".join(parts[:-1])).register_module(parts[-1], end)
    whole = type(network)

    def forward(self: Any, activations: Tensor) -> Any:
        here = self.get_submodule(boundary)
        here.activations = activations
        try:
            return whole.forward(self, activations.new_zeros(1, 3, size, size))
        finally:
            here.activations = None

    suffix.__class__ = type(f"Short{whole.__name__}", (whole,), {"forward": forward})
    return suffix


def keep(
    file: Path, album: Album, augmentation: Augmentation, compute: Compute, seed: int, views: int, limit_bytes: int
) -> NDArray[np.float16] | None:
    """The activations (n, views, ...) of an album's varied pictures, float16, on disk.

    None where there is no room, or where float16 does not hold them.

    View k of a picture is what epoch k shows of it, a function of (seed, k, picture). A file that is there already is
    taken as it is.

    Args:
        file: where to, .npy; it appears whole or not at all.
        album: the pictures.
        augmentation: how they are varied.
        compute: the prefix, from pixels (n, size, size, 3).
        seed: of the augmentation.
        views: how many of each picture.
        limit_bytes: what the file may take.

    Raises:
        TrainingError: where the disk is full.
    """
    if file.exists():
        known: NDArray[np.float16] = np.load(file, mmap_mode="r")
        return known
    first = compute(album.vary(Draw(0), augmentation, seed, 0)[None])[0]
    shape = (len(album), views, *first.shape)
    needed = count_bytes(shape)
    if not has_room(file.parent, needed, limit_bytes):
        log.info("activations of %.0f MB are not kept: the first blocks run each time", needed / 1e6)
        return None
    partial = file.with_name(f".{file.name}.partial")
    try:
        stored = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
        if hasattr(os, "posix_fallocate"):  # else a disk that fills up meanwhile would end the process
            with partial.open("r+b") as whole:
                os.posix_fallocate(whole.fileno(), 0, partial.stat().st_size)
        for rows, values in _compute_all(album, augmentation, compute, seed, views):
            if not can_halve(values):
                log.info("activations are too large for float16, and not kept: the first blocks run each time")
                del stored
                partial.unlink()
                return None
            stored[rows] = values
        stored.flush()
        del stored
        partial.replace(file)
        sync(file.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        why = f"cannot be written ({error.strerror}): {needed / 1e6:.0f} MB are needed"
        raise TrainingError(file, why, "Free some space, or leave --cached-views out.") from error
    return np.load(file, mmap_mode="r")  # type: ignore[no-any-return]


def count_bytes(shape: tuple[int, ...]) -> int:
    """What activations take on disk."""
    return np.dtype(np.float16).itemsize * math.prod(shape)


def can_halve(values: NDArray[np.float32]) -> bool:
    """Whether float16 holds such values."""
    return bool(np.abs(values).max() < LARGEST)  # nor a NaN


def has_room(folder: Path, needed: int, limit_bytes: int) -> bool:
    """Whether so many bytes are within the limit and leave half of what is free on the disk."""
    return needed <= min(limit_bytes, shutil.disk_usage(folder).free // 2)


def _compute_all(album: Album, augmentation: Augmentation, compute: Compute, seed: int, views: int) -> Any:
    """((pictures, views), their activations), a batch at a time, by threads."""
    places = [(picture, view) for picture in range(len(album)) for view in range(views)]
    batches = [places[start : start + BATCH_SIZE] for start in range(0, len(places), BATCH_SIZE)]

    def run(batch: list[tuple[int, int]]) -> tuple[tuple[list[int], list[int]], NDArray[np.float32]]:
        pixels = np.stack([album.vary(Draw(picture), augmentation, seed, view) for picture, view in batch])
        return ([picture for picture, _ in batch], [view for _, view in batch]), compute(pixels)

    return ahead(run, batches, count_cpus(), 2 * count_cpus())


Show = Callable[[Draw, int], NDArray[Any]]


def show_kept(stored: NDArray[np.float16]) -> Show:
    """What an epoch shows of a picture: the kept activations of its view."""
    return lambda draw, epoch: stored[draw.sample, epoch % stored.shape[1]]
