"""The main job on pictures that everybody has: the handwritten digits inside scikit-learn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from headstart import training
from headstart.errors import RunError
from headstart.features import Track
from headstart.images import open_image
from headstart.model import Prediction, predict

PER_CLASS = 50
SHOWN = 4


def demo(
    out: str | os.PathLike[str] = "runs/demo", *, track: Track = lambda pictures, total: pictures
) -> tuple[training.Run, list[Prediction]]:
    """A classifier of handwritten digits, trained and measured offline, and a few of its predictions.

    The pictures are written below `out` as PNG files in class folders, the run beside them.

    Args:
        out: the folder; one from before is used again.
        track: wraps the pictures to show progress; called with them and their number.
    """
    others = [entry.name for entry in Path(out).iterdir()] if Path(out).is_dir() else []
    if any(name != "digits" and not name.startswith("run") for name in others):
        raise RunError(out, "holds other files than a demonstration's", "Give --out a new or empty folder.")
    pictures = write_digits(Path(out) / "digits")
    run_folder = Path(out) / "run"
    number = 1
    while (run_folder / "metrics.json").exists():
        number += 1
        run_folder = Path(out) / f"run-{number}"
    run = training.train(pictures, run_folder, track=track)
    assert isinstance(run, training.Run)  # the folder is a new one
    sources = run.evaluation.sources
    shown = [pictures / sources[i] for i in np.linspace(0, len(sources) - 1, SHOWN).astype(int)]
    return run, list(predict(run.classifier, shown))


def write_digits(folder: Path) -> Path:
    """Write scikit-learn's handwritten digits (Alpaydin and Kaynak, 1998; UCI) as class folders of PNG files.

    50 of each, 8 x 8 pixels enlarged to 32 x 32, dark on light.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True, exist_ok=True)
        for number, values in enumerate(digits.images[digits.target == digit][:PER_CLASS]):
            grey = Image.fromarray((255 - values * (255 / 16)).round().astype(np.uint8))
            grey.resize((32, 32), Image.Resampling.BICUBIC).save(folder / str(digit) / f"{number:03}.png")
    return folder


def draw(predictions: Sequence[Prediction]) -> str:
    """Pictures side by side in characters, two pixels to one, over what they were taken for."""
    shades, width, blocks = "@%#*+=-:. ", 16, []
    for prediction in predictions:
        grey = np.asarray(open_image(prediction.source).convert("L").resize((width, width // 2)))
        rows = ["".join(shades[int(value) * len(shades) // 256] for value in row) for row in grey]
        blocks.append([*rows, f"{prediction.label}  {prediction.confidence:.1%}".ljust(width)])
    return "\n".join("   ".join(parts) for parts in zip(*blocks, strict=True))
