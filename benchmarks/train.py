"""Fine-tuning: an epoch (training and evaluation) of the official tutorial's loop against headstart's engine.

python benchmarks/train.py                     (both sets, both networks, batches of 4 and 32: about 40 minutes)
python benchmarks/train.py --sets hymenoptera  (about 12 minutes)

Both loops run on the same pictures with the same network, batch size, transforms (RandomResizedCrop, mirror image), SGD
and batch norms in training mode, each in a fresh process; the second epoch counts, and the first is shown beside it.

Expected (2-core machine): an epoch of the packaged network is 1.7 to 2.4 times as fast as the tutorial's with batches
of 4, 4.9 to 6.1 times with 32; of a ResNet-18 1.7 to 1.8 and 2.7 to 2.8 times. Losses of three epochs in bfloat16 and
float32 differ less than those of two seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import tutorial_loaders
from sets import DATA

NETWORKS = ("efficientnet_lite0", "resnet18")
EPOCHS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["hymenoptera", "imagewoof"])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 32])
    parser.add_argument("--parts", action="store_true", help="only the parts of lite0's epoch (five minutes)")
    parser.add_argument("--json", type=Path, help="file for the raw numbers")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        side, data, network, batch = given.run
        seconds = (tutorial if side == "tutorial" else ours)(Path(data), network, int(batch))
        print(json.dumps(seconds))
        return
    if not DATA.is_dir():
        print(f"{DATA} is not there: give HEADSTART_TEST_DATA a folder of sets with train and val")
        return
    rows: list[dict] = []
    if not given.parts:
        compare(given, rows)
    theirs = rows[0]["tutorial"] if rows else measure("tutorial", DATA / "hymenoptera", NETWORKS[0], 4)
    print("\nParts of lite0 alone, batch 32, hymenoptera (pictures/s of the second epoch, training and evaluation):")
    print(f"{'(the tutorial, batch 4)':<44} {398 / theirs[-1]:6.1f}", flush=True)
    for label, settings in PARTS.items():
        seconds = train(DATA / "hymenoptera", "efficientnet_lite0", 32, settings)
        print(f"{label:<44} {398 / seconds[-1]:6.1f}  {theirs[-1] / seconds[-1]:5.2f} times the tutorial", flush=True)
    if not given.parts:
        show_curves(given.networks)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


def compare(given: argparse.Namespace, rows: list[dict]) -> None:
    """An epoch of both, for each set, network and batch size."""
    print(f"{'set':<12} {'network':<19} batch  tutorial  headstart  ratio (first epoch)  pictures/s")
    for name in given.sets:
        count = sum(1 for _ in (DATA / name).rglob("*.*"))
        for network in given.networks:
            for batch in given.batches:
                theirs, own = (measure(side, DATA / name, network, batch) for side in ("tutorial", "headstart"))
                rows.append({"set": name, "network": network, "batch": batch, "tutorial": theirs, "headstart": own})
                print(
                    f"{name:<12} {network:<19} {batch:>5}  {theirs[-1]:6.1f} s  {own[-1]:7.1f} s  "
                    f"{theirs[-1] / own[-1]:5.2f} ({theirs[0] / own[0]:.2f})  "
                    f"{count / theirs[-1]:.1f} -> {count / own[-1]:.1f}",
                    flush=True,
                )


def show_curves(networks: list[str]) -> None:
    """Whether the number format changes the course of training more than the seed does."""
    print("\nLoss of three epochs, float32 against bfloat16, seeds 0 and 1:")
    for network in networks:
        for precision in ("float32", "bfloat16"):
            for seed in (0, 1):
                losses = curve(DATA / "hymenoptera", network, precision, seed)
                print(
                    f"{network:<19} {precision:<9} seed {seed}: {'  '.join(f'{loss:.4f}' for loss in losses)}",
                    flush=True,
                )


def measure(side: str, data: Path, network: str, batch: int) -> list[float]:
    """Seconds of each epoch, in a fresh process."""
    command = (sys.executable, __file__, "--run", side, str(data), network, str(batch))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{command} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def tutorial(data: Path, network: str, batch: int) -> list[float]:
    """PyTorch's transfer learning tutorial (Chilamkurthy), fine-tuning: its loop, transforms, optimiser and workers."""
    import torch
    from torch import nn, optim

    torch.manual_seed(0)
    loaders = tutorial_loaders(data, batch)
    model = build(network, len(loaders["train"].dataset.classes))
    criterion, optimizer = nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    seconds = []
    for _ in range(EPOCHS):
        start = time.perf_counter()
        for part in ("train", "val"):
            model.train(part == "train")
            running_loss = 0.0
            running_corrects: Any = 0
            for inputs, labels in loaders[part]:
                optimizer.zero_grad()
                with torch.set_grad_enabled(part == "train"):
                    outputs = model(inputs)
                    _, predictions = torch.max(outputs, 1)
                    loss = criterion(outputs, labels)
                    if part == "train":
                        loss.backward()
                        optimizer.step()
                running_loss += loss.item() * inputs.size(0)
                running_corrects += torch.sum(predictions == labels.data)
            if part == "train":
                scheduler.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def build(network: str, classes: int):
    """The packaged network with a new last layer, or a ResNet-18 with random weights."""
    from torch import nn
    from torchvision import models

    from headstart import backbones

    if network == "resnet18":
        model = models.resnet18(weights=None)
        model.fc = nn.Linear(model.fc.in_features, classes)
        return model
    import timm

    model = timm.create_model("tf_efficientnet_lite0", num_classes=classes)
    model.load_state_dict(backbones.load(backbones.locate(network)).state_dict(), strict=False)
    return model


TUTORIAL = {
    "optimizer": "sgd",
    "learning_rate": 0.001,
    "layer_decay": 1.0,
    "schedule": "step",
    "weight_decay": 0.0,
    "augment": "RandomResizedCrop, RandomHorizontalFlip",
    "batch_norm": "train",
}
PARTS: dict[str, dict[str, Any]] = {
    "batch norms in training mode": {},
    "batch norms frozen": {"batch_norm": "frozen"},
    "the last three stages": {"batch_norm": "frozen", "freeze": "blocks.3"},
    "the last three stages on kept activations": {"batch_norm": "frozen", "freeze": "blocks.3", "cached_views": 4},
    "float32, channels first (the tutorial's)": {"precision": "float32"},
}


def ours(data: Path, network: str, batch: int) -> list[float]:
    """The same epochs by `headstart train`."""
    return train(data, network, batch, {})


def train(data: Path, network: str, batch: int, settings: dict) -> list[float]:
    """Seconds of each epoch of a run with the tutorial's settings, but for those given."""
    return [row["seconds"] for row in history(data, network, {"batch_size": batch, **settings}) if row["epoch"]]


def curve(data: Path, network: str, precision: str, seed: int) -> list[float]:
    """Training losses of three epochs."""
    settings = {"batch_size": 32, "precision": precision, "seed": seed, "epochs": 3, "learning_rate": 0.01}
    return [row["loss"] for row in history(data, network, settings) if row["epoch"]]


def history(data: Path, network: str, settings: dict) -> list[dict]:
    """The epochs' rows of a run. What is chosen on is `val`, as in the tutorial."""
    import headstart

    random = network == "resnet18"
    chosen = {
        **TUTORIAL,
        "epochs": EPOCHS,
        "strategy": "scratch" if random else "finetune",
        "backbone": "torchvision/resnet18" if random else network,
        **settings,
    }
    with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
        table = Path(folder, "table.csv")
        write_table(data, table)
        headstart.train(table, Path(folder, "run"), images=str(data), cache=str(Path(folder, "cache")), **chosen)
        rows = [json.loads(line) for line in Path(folder, "run", "history.jsonl").read_text().splitlines()]
    return [row for row in rows if "step" not in row]


def write_table(data: Path, table: Path) -> None:
    """A table of the same splits, but for one picture of a class in val, as a run needs a report."""
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "label", "split"))
        for part in ("train", "val"):
            for label in sorted(path for path in (data / part).iterdir() if path.is_dir()):
                pictures = sorted(path.relative_to(data) for path in label.iterdir())
                if part == "val":
                    writer.writerow((pictures.pop(), label.name, "test"))
                writer.writerows((picture, label.name, part) for picture in pictures)


if __name__ == "__main__":
    main()
