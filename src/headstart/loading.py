"""The only maker of batches: threads read, decode and run pictures ahead of whoever asks, and hand them on in order."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from headstart.errors import UnreadableImage
from headstart.images import Facts, Limits, Preprocess, check_limits, describe, open_image, read_bytes
from headstart.sampling import AUGMENT, Draw, Mix

if TYPE_CHECKING:
    from PIL import Image

    from headstart.augmentation import Augmentation

# Enough for about 600 pictures of 224 pixels: what two cores decode while torch and timm are imported.
LOOK_AHEAD_BYTES = 96 * 2**20
BATCH_SIZE = 8  # a batch's activations then stay in the processor's cache; larger ones are slower on CPUs

T = TypeVar("T")
R = TypeVar("R")
Compute = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class Picture:
    """One picture as its threads left it: facts and vector where they were asked for, or why it could not be read."""

    index: int
    digest: str = ""  # SHA-256 of the file's content
    pixels: NDArray[np.uint8] | None = None
    vector: NDArray[np.float32] | None = None
    facts: Facts | None = None
    error: str = ""
    decode_seconds: float = 0.0
    compute_seconds: float = 0.0


@dataclass(frozen=True)
class Wanted:
    """What is to be made of each picture; what is known by its content's digest already is not made again."""

    preprocess: Preprocess
    limits: Limits = Limits()
    facts: bool = False
    known_pixels: Container[str] = frozenset()
    known_facts: Container[str] = frozenset()


def process(paths: Sequence[str | os.PathLike[str]], wanted: Wanted, make_compute: Callable[[], Compute]) -> Stream:
    """Pictures with what `compute` makes of their pixels, in the order of their paths.

    Reading and decoding begins at the call. `make_compute` is called here, in the caller's thread, when the first
    picture needs it: building a network takes as long as decoding hundreds of pictures. Each thread then decodes or
    computes, on one core: that is faster than computing on all cores while others decode. How far the threads run
    ahead is bounded in bytes. A picture that cannot be read comes with its reason, in its place.

    Args:
        paths: the picture files.
        wanted: what to make of them.
        make_compute: gives the function from pixels (n, size, size, 3) to rows (n, ...); it must allow threads.
    """
    size, workers = wanted.preprocess.size, count_cpus()
    window = max(4 * BATCH_SIZE, LOOK_AHEAD_BYTES // (3 * size * size))
    executor = ThreadPoolExecutor(workers, thread_name_prefix="headstart")
    decoding: deque[Future[Picture]] = deque()
    coming = iter(enumerate(paths))

    def submit(count: int) -> None:
        for _, (index, path) in zip(range(count), coming, strict=False):
            decoding.append(executor.submit(_read, index, path, wanted))

    def decoded() -> Iterator[Picture]:
        while decoding:
            picture = decoding.popleft().result()
            submit(1)
            yield picture

    def give() -> Generator[Picture, None, None]:
        computing: deque[Future[list[Picture]]] = deque()
        compute: Compute | None = None
        try:
            for batch in batches(decoded()):
                if compute is None and any(picture.pixels is not None for picture in batch):
                    compute = make_compute()
                computing.append(executor.submit(_run, compute, batch))
                if len(computing) > 2 * workers:
                    yield from computing.popleft().result()
            while computing:
                yield from computing.popleft().result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    submit(window)
    return Stream(give(), executor)


class Stream(Iterator[Picture]):
    """Pictures as they come; `close` ends the threads, also where not one was asked for."""

    def __init__(self, pictures: Generator[Picture, None, None], executor: ThreadPoolExecutor) -> None:
        self._pictures, self._executor = pictures, executor

    def __next__(self) -> Picture:
        return next(self._pictures)

    def close(self) -> None:
        """Cancel what has not begun and wait for what has."""
        self._pictures.close()
        self._executor.shutdown(wait=True, cancel_futures=True)


def batches(stream: Iterable[Picture], size: int = BATCH_SIZE) -> Iterator[list[Picture]]:
    """The pictures in lists of `size`, the last one shorter."""
    batch: list[Picture] = []
    for picture in stream:
        batch.append(picture)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def count_cpus() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(index: int, path: str | os.PathLike[str], wanted: Wanted) -> Picture:
    digest, start = "", time.perf_counter()
    try:
        content = read_bytes(path, wanted.limits)
        digest = hashlib.sha256(content).hexdigest()
        needs_pixels = digest not in wanted.known_pixels
        needs_facts = wanted.facts and digest not in wanted.known_facts
        pixels: NDArray[Any] | None = None
        facts = None
        if not (needs_pixels or needs_facts):
            check_limits(content, wanted.limits)  # they may have been others when it was kept
        else:
            image = open_image(content, wanted.limits, Path(path))
            pixels = wanted.preprocess.apply(image) if needs_pixels else None
            facts = describe(image) if needs_facts else None
        return Picture(index, digest, pixels, None, facts, decode_seconds=time.perf_counter() - start)
    except UnreadableImage as error:
        return Picture(index, digest, error=error.why)


def _run(compute: Compute | None, batch: list[Picture]) -> list[Picture]:
    new = [position for position, picture in enumerate(batch) if picture.pixels is not None]
    if compute is None or not new:
        return batch
    start = time.perf_counter()
    rows = compute(np.stack([picture.pixels for picture in batch if picture.pixels is not None]))
    seconds = (time.perf_counter() - start) / len(new)
    for position, row in zip(new, rows, strict=True):
        batch[position] = dataclasses.replace(batch[position], pixels=None, vector=row, compute_seconds=seconds)
    return batch


# Training: the same pictures again and again, varied


class Album:
    """Pictures of training: decoded once while there is room for them, as they were before any augmentation.

    Args:
        paths: the picture files.
        preprocess: what the network expects.
        limits: what is too large to be opened.
        room_bytes: how much memory decoded pictures may take; those beyond are decoded each time.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        preprocess: Preprocess,
        limits: Limits = Limits(),
        room_bytes: int = 2**30,
    ) -> None:
        self.paths, self.preprocess, self.limits = paths, preprocess, limits
        self.room_bytes = room_bytes
        self._kept: dict[int, Image.Image] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        """A picture, upright and RGB; it must not be changed.

        Raises:
            UnreadableImage: where it cannot be decoded.
        """
        image = self._kept.get(index)
        if image is None:
            image = open_image(self.paths[index], self.limits)
            size = 4 * image.width * image.height  # Pillow keeps four bytes a pixel
            with self._lock:
                if size <= self.room_bytes and index not in self._kept:
                    self.room_bytes -= size
                    self._kept[index] = image
        return image

    def view(self, index: int) -> NDArray[np.uint8]:
        """What evaluation sees of a picture, uint8 (size, size, 3)."""
        return self.preprocess.apply(self.open(index))

    def vary(self, draw: Draw, augmentation: Augmentation, seed: int, epoch: int) -> NDArray[np.uint8]:
        """What an epoch of training sees of a picture, uint8 (size, size, 3): a function of (seed, epoch, draw)."""
        random = np.random.default_rng([AUGMENT, seed, epoch, draw.sample, draw.turn])
        return augmentation.apply(self.open(draw.sample), self.preprocess, random)

    def embed(self, rows: Sequence[int], compute: Compute) -> Generator[NDArray[np.float32], None, None]:
        """What `compute` makes of pictures' evaluation views, in order, a batch at a time; on all cores."""

        def run(batch: Sequence[int]) -> NDArray[np.float32]:
            return compute(np.stack([self.view(row) for row in batch]))

        batched = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
        return ahead(run, batched, count_cpus(), 2 * count_cpus())


def ahead(function: Callable[[T], R], items: Iterable[T], workers: int, window: int) -> Generator[R, None, None]:
    """What a function gives for each item, in order, by threads that run up to `window` items ahead."""
    with ThreadPoolExecutor(workers, thread_name_prefix="headstart") as executor:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(executor.submit(function, item))
                if len(waiting) >= window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


def mix(
    pixels: NDArray[Any], partners: NDArray[Any], mixes: Sequence[Mix]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(pictures mixed with their partners, (n, size, size, 3); the share of each first picture, (n,))."""
    mixed, shares = pixels.astype(np.float32), np.empty(len(mixes), np.float32)
    side = pixels.shape[1]
    for row, one in enumerate(mixes):
        if one.box is None:
            mixed[row] = one.share * pixels[row] + (1 - one.share) * partners[row]
            shares[row] = one.share
        else:
            left, top, right, bottom = (round(edge * side) for edge in one.box)
            mixed[row, top:bottom, left:right] = partners[row, top:bottom, left:right]
            shares[row] = 1 - (right - left) * (bottom - top) / side**2  # of the box that is left at the edges
    return mixed, shares
