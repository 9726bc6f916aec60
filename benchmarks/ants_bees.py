"""Ants and bees: the official tutorial's fixed-feature loop against a probe of headstart, in wall time and accuracy.

python benchmarks/ants_bees.py           (two of the tutorial's 25 epochs, multiplied)
python benchmarks/ants_bees.py --full    (all 25)

Expected (2-core machine): the tutorial takes 45 to 60 times as long as headstart with an empty cache, 90 to 150 times
with a full one; accuracy on val 0.948 [0.900, 0.973] against 0.90 after two epochs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn, optim

from common import headstart, run, tutorial_loaders
from headstart import backbones
from sets import DATA

EPOCHS = 25
COMMAND = "headstart train --strategy probe"
PICTURES = DATA / "hymenoptera"
NOTES = {
    "pictures": "import of torch, decoding, forward: overlapped",
    "network": "within pictures: building the network",
    "decode": "within pictures, summed over threads, waiting for the interpreter included",
    "forward": "within pictures, summed over threads",
    "audit": "duplicates, roles",
    "evidence": "nothing to choose, with --strategy probe",
    "plan": "folds, heads' settings",
    "heads": "all kinds tuned and fitted",
    "intervals": "the report's figures",
}
WITHIN = ("network", "decode", "forward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help=f"all {EPOCHS} epochs of the tutorial instead of two")
    parser.add_argument("--runs", type=int, default=3, help="how often headstart is measured [default: 3]")
    parser.add_argument("--json", type=Path, help="file for the raw numbers")
    given = parser.parse_args()
    if not PICTURES.is_dir():
        print(f"{PICTURES} is not there: give HEADSTART_TEST_DATA a folder that holds hymenoptera/train and val")
        return

    epochs = EPOCHS if given.full else 2
    raw: dict[str, list] = {"tutorial": [], "cold": [], "warm": [], "imports": []}
    with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
        for number, epoch in enumerate(tutorial(PICTURES, epochs), 1):
            raw["tutorial"].append(epoch)
            # headstart's runs are spread between the epochs: what slows the machine for a while slows both.
            while len(raw["cold"]) < given.runs * number / epochs:
                raw["cold"].append(train(Path(folder, str(len(raw["cold"])), "cold")))
                raw["warm"].append(train(Path(folder, str(len(raw["warm"])), "warm")))
                raw["imports"].append(run((sys.executable, "-c", "import torch"), Path(folder))[0])
    if given.json:
        given.json.write_text(json.dumps(raw, indent=2) + "\n")
    report(raw, given.runs)


def tutorial(data: Path, epochs: int) -> Iterator[dict[str, float]]:
    """PyTorch's transfer learning tutorial (Chilamkurthy), network as fixed feature extractor: figures by epoch.

    Only the network is headstart's, with its mean and standard deviation. As there, the frozen body stays in train mode
    while training: its batch norms drift.
    """
    torch.manual_seed(0)
    loaders = tutorial_loaders(data, 4)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    body: Any = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    body.load_state_dict(backbones.load(backbones.locate("efficientnet_lite0")).state_dict())
    for parameter in body.parameters():
        parameter.requires_grad = False
    model = nn.Sequential(body, nn.Linear(body.num_features, 2)).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD(model[1].parameters(), lr=0.001, momentum=0.9)
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)

    best = -1.0
    with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
        for _ in range(epochs):
            start = time.perf_counter()
            for phase in ("train", "val"):
                model.train(phase == "train")
                loss_sum, correct = 0.0, 0.0
                for inputs, labels in loaders[phase]:
                    inputs, labels = inputs.to(device), labels.to(device)
                    optimizer.zero_grad()
                    with torch.set_grad_enabled(phase == "train"):
                        outputs = model(inputs)
                        predicted = outputs.max(1).indices
                        loss = criterion(outputs, labels)
                        if phase == "train":
                            loss.backward()
                            optimizer.step()
                    loss_sum += loss.item() * len(inputs)
                    correct += torch.sum(predicted == labels).item()
                if phase == "train":
                    scheduler.step()
            accuracy = correct / len(loaders["val"].dataset)
            if accuracy > best:
                best = accuracy
                torch.save(model.state_dict(), Path(folder, "best.pt"))
            yield {"seconds": time.perf_counter() - start, "accuracy": accuracy, "n": len(loaders["val"].dataset)}


def train(out: Path) -> dict[str, float | dict]:
    """A whole process of `COMMAND`. Runs whose folders have the same parent share a cache."""
    seconds, _ = headstart("train", PICTURES, "--strategy", "probe", "--out", out, cache=out.parent / "cache")
    parts = json.loads((out / "environment.json").read_text())["seconds"]
    accuracy = json.loads((out / "metrics.json").read_text())["metrics"]["accuracy"]
    return {"seconds": seconds, "parts": parts, "accuracy": accuracy}


def report(raw: dict[str, list], runs: int) -> None:
    epochs = raw["tutorial"]
    whole = statistics.mean(epoch["seconds"] for epoch in epochs) * EPOCHS
    looks = [epoch["accuracy"] for epoch in epochs]
    counted = (
        f"all {EPOCHS} epochs" if len(epochs) == EPOCHS else f"{len(epochs)} epochs timed, x {EPOCHS}/{len(epochs)}"
    )
    reached = f"{looks[-1]:.3f} after {len(epochs)} epochs, n={epochs[-1]['n']}"
    if len(epochs) == EPOCHS:
        reached += f" (best of {EPOCHS} looks: {max(looks):.3f})"
    print(f"Fixed features of efficientnet_lite0 for {PICTURES.name}; the tutorial in float32 without its imports,")
    print(f"headstart as whole processes, median of {runs}, alternating with the tutorial's epochs.\n")
    print("| | seconds | times as fast | accuracy on val |")
    print("| --- | --- | --- | --- |")
    print(f"| the tutorial's loop ({counted}) | {whole:.1f} | 1 | {reached} |")
    for name, meaning in (("cold", "empty cache"), ("warm", "features cached")):
        seconds = statistics.median(one["seconds"] for one in raw[name])
        accuracy = raw[name][0]["accuracy"]
        interval = f"{accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}] n={accuracy['n']}"
        print(f"| `{COMMAND}`, {meaning} | {seconds:.1f} | {whole / seconds:.1f} | {interval} |")

    print(f"\n| part of `{COMMAND}`, seconds | cold | warm | |")
    print("| --- | --- | --- | --- |")
    names = list(raw["cold"][0]["parts"])
    medians = {
        name: [statistics.median(one["parts"].get(name, 0.0) for one in raw[kind]) for kind in ("cold", "warm")]
        for name in names
    }
    known = [sum(medians[name][column] for name in names if name not in WITHIN) for column in (0, 1)]
    rest = [
        statistics.median(one["seconds"] for one in raw[kind]) - known[i] for i, kind in enumerate(("cold", "warm"))
    ]
    for name in (name for name in ("pictures", *WITHIN, *names) if name in medians):
        cold, warm = medians.pop(name)
        print(f"| {name} | {cold:.2f} | {warm:.2f} | {NOTES.get(name, '')} |")
    print(f"| rest | {rest[0]:.2f} | {rest[1]:.2f} | start, other imports, exit |")
    imports = statistics.median(raw["imports"])
    print(f"\n`import torch` in a process of its own: {imports:.2f} s.")


if __name__ == "__main__":
    main()
