"""What the benchmarks share: generated pictures, and commands in fresh processes with their time and memory."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

SIZE = (500, 375)
CLASSES = ("ellipse", "rectangle")


def draw_picture(seed: int) -> bytes:
    """A JPEG (quality 90, 60 to 100 KB, as photographs of this size have): clouds, shapes and grain, all by the seed.

    No two are near each other, and most of the shapes are those of the seed's class.
    """
    random = np.random.default_rng(seed)
    picture = Image.new("RGB", SIZE, "grey")
    for cells, weight in ((4, 0.9), (8, 0.4), (24, 0.25), (80, 0.15)):
        grid = random.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
        picture = Image.blend(picture, Image.fromarray(grid).resize(SIZE, Image.Resampling.BICUBIC), weight)
    pen = ImageDraw.Draw(picture)
    for number in range(8):
        x, y = (int(random.integers(-40, side)) for side in SIZE)
        width, height = (int(side) for side in random.integers(20, 160, 2))
        draw = pen.ellipse if (seed + (number == 0)) % len(CLASSES) == 0 else pen.rectangle
        draw((x, y, x + width, y + height), fill=tuple(int(value) for value in random.integers(0, 256, 3)))
    grain = random.integers(0, 32, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    picture = ImageChops.add(picture, Image.fromarray(grain), offset=-16)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def write_pictures(folder: Path, count: int, first: int = 0) -> list[Path]:
    """Generated pictures in class folders; their paths."""
    for label in CLASSES:
        (folder / label).mkdir(parents=True, exist_ok=True)

    def write(seed: int) -> Path:
        path = folder / CLASSES[seed % len(CLASSES)] / f"{seed:06}.jpg"
        path.write_bytes(draw_picture(seed))
        return path

    with ThreadPoolExecutor(os.cpu_count()) as executor:
        return list(executor.map(write, range(first, first + count)))


def tutorial_loaders(data: Path, batch: int) -> dict:
    """`train` and `val` as PyTorch's transfer learning tutorial (Chilamkurthy) loads them, with 4 workers.

    Only mean and standard deviation are those of headstart's default network.
    """
    import torch
    from torchvision import datasets, transforms

    warnings.filterwarnings("ignore", "This DataLoader will create")
    normalise = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    recipes = {
        "train": [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *normalise],
        "val": [transforms.Resize(256), transforms.CenterCrop(224), *normalise],
    }
    folders = {
        part: datasets.ImageFolder(str(data / part), transforms.Compose(steps)) for part, steps in recipes.items()
    }
    return {
        part: torch.utils.data.DataLoader(folder, batch_size=batch, shuffle=True, num_workers=4)
        for part, folder in folders.items()
    }


class Failed(SystemExit):
    """A command that failed, with what it said; where nobody catches it, that ends the process."""


def run(command: Sequence[str | os.PathLike[str]], cache: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command in a fresh process (Unix); its output is shown only if it fails.

    Raises:
        Failed: where its exit status is not 0.

    Linux counts what the parent held at the start as the child's: measure memory from a parent without torch.
    """
    environment = {**os.environ, "HEADSTART_CACHE": str(cache)}
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            raise Failed(f"{command} failed:\n{output.read().decode(errors='replace')}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def headstart(*arguments: str | os.PathLike[str], cache: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of `headstart ARGUMENTS`, from start to exit."""
    return run((sys.executable, "-m", "headstart", *arguments), cache)
