"""Fixtures: small drawn pictures, a tiny network, and the real pictures where they are at hand."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

# Read when torch is imported: two test workers on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

COLOURS = {"circle": (200, 40, 40), "square": (40, 160, 60), "triangle": (50, 70, 210)}


def draw_shape(kind: str, seed: int, size: tuple[int, int] = (80, 64)) -> Image.Image:
    """A noisy picture with one shape; a seed gives the same picture always, two seeds never nearly the same one."""
    random = np.random.default_rng([seed, *kind.encode()])
    blocks = random.integers(90, 255, (6, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)
    left, top = (int(random.integers(2, side // 3)) for side in size)
    box = (left, top, left + size[0] // 2, top + size[1] // 2)
    pen, colour = ImageDraw.Draw(picture), COLOURS[kind]
    if kind == "circle":
        pen.ellipse(box, fill=colour)
    elif kind == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], fill=colour)
    return picture


@pytest.fixture
def heed_interrupts() -> Iterator[None]:
    """Processes that a test starts heed SIGINT, also where the tests run in the background and it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def make_shapes() -> Callable[..., Path]:
    """A function that fills a folder with class folders of drawn pictures."""

    def make(folder: Path, per_class: int = 8, kinds: tuple[str, ...] = tuple(COLOURS), first_seed: int = 0) -> Path:
        for kind in kinds:
            (folder / kind).mkdir(parents=True, exist_ok=True)
            for number in range(per_class):
                draw_shape(kind, first_seed + number).save(folder / kind / f"{number}.png")
        return folder

    return make


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of three classes with 12 pictures each; tests must not change it."""
    folder = tmp_path_factory.mktemp("shapes")
    for kind in COLOURS:
        (folder / kind).mkdir()
        for number in range(12):
            draw_shape(kind, number).save(folder / kind / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of a tiny network with random weights, and the card beside it; for --weights."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet")
    save_file(network.state_dict(), folder / "tiny.safetensors")
    card = {"architecture": "timm/test_efficientnet", "size": 64, "crop": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "tiny.json").write_text(json.dumps(card))
    return folder / "tiny.safetensors"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test has its own, empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HEADSTART_CACHE", str(folder))
    yield folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real pictures, HEADSTART_TEST_DATA; tests that need it are skipped where it is not there."""
    folder = Path(os.environ.get("HEADSTART_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("needs real pictures: set HEADSTART_TEST_DATA")
    return folder
