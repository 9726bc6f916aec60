"""One run of a rival in the contest, set up as its documentation does, on the pictures that a table names.

python benchmarks/rivals.py ENTRANT TABLE IMAGES WEIGHTS OUT [--epochs 25] [--seed 0]

contest.py starts it with the Python of the rivals' environment (`make contest`), which has no headstart. All rivals
start from the same weights. OUT gets what a run folder of headstart has too: `predictions.csv` (the class given to each
test picture), `plan.json` and `environment.json`. Test pictures are looked at once, at the end.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ARCHITECTURE = "tf_efficientnet_lite0"
SIZE = 224
MEAN = STD = (0.5, 0.5, 0.5)  # what the weights were trained with
PACKAGES = ("torch", "torchvision", "timm", "fastai", "scikit-learn", "pillow", "numpy")

Pictures = list[tuple[str, int]]  # name below the images' folder, class number
Outcome = tuple[list[int], dict[str, Any]]  # the class number given to each test picture; what was decided


class Job(NamedTuple):
    """What a rival is given."""

    train: Pictures
    test: Pictures
    classes: list[str]
    images: Path
    weights: Path
    scratch: Path  # a folder for what a rival writes as it goes
    epochs: int  # of the tutorial's loop
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entrant", choices=ENTRANTS)
    for name in ("table", "images", "weights", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--epochs", type=int, default=25, help="of the tutorial's loop [default: 25]")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    job = read_job(given)
    labels, decided = ENTRANTS[given.entrant](job)
    write(given.out, given.entrant, job, labels, decided)


def read_job(given: argparse.Namespace) -> Job:
    with given.table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["label"] for row in rows})
    parts: dict[str, Pictures] = {"train": [], "test": []}
    for row in rows:
        parts[row["split"]].append((row["image"], classes.index(row["label"])))
    return Job(parts["train"], parts["test"], classes, given.images, given.weights, given.out, given.epochs, given.seed)


def write(out: Path, entrant: str, job: Job, labels: list[int], decided: dict[str, Any]) -> None:
    with (out / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("source", "label"))
        writer.writerows((source, job.classes[label]) for (source, _), label in zip(job.test, labels, strict=True))
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    for name, content in (
        ("plan", {"strategy": entrant, "phases": [decided]}),
        ("environment", {"versions": versions}),
    ):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def tutorial(job: Job, whole: bool) -> Outcome:
    """PyTorch's transfer learning tutorial (Chilamkurthy): a new last layer, trained alone or with the whole network.

    The tutorial also looks at the test pictures after each epoch and keeps the epoch that they like best. Here the last
    epoch counts. As there, the frozen body stays in training mode: its batch norms drift.
    """
    import torch
    from torch import nn, optim
    from torchvision import transforms

    torch.manual_seed(job.seed)
    body = load_body(job.weights).requires_grad_(whole)
    model = nn.Sequential(body, nn.Linear(body.num_features, len(job.classes))).to(find_device())
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD((model if whole else model[1]).parameters(), lr=0.001, momentum=0.9)
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    varied = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    loader = load(job.images, job.train, varied, batch=4, workers=4, shuffle=True)
    for _ in range(job.epochs):
        model.train()
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(inputs.to(find_device())), labels.to(find_device()))
            loss.backward()
            optimizer.step()
        scheduler.step()
    outputs = infer(model, load(job.images, job.test, centred(), batch=4, workers=4))
    return outputs.argmax(1).tolist(), {"epochs": job.epochs, "batch_size": 4, "learning_rate": 0.001}


def fastai(job: Job, finds_rate: bool) -> Outcome:
    """As in fastai's vision tutorial: `vision_learner`, `fine_tune(5)` at its own rate or that of `lr_find`."""
    import pandas
    from fastai.callback.core import Callback, CancelValidException
    from fastai.vision.all import ImageDataLoaders, Normalize, Resize, aug_transforms, set_seed, vision_learner

    def skip_validation(callback: Callback) -> None:
        raise CancelValidException

    set_seed(job.seed)
    rows = [(*picture, False) for picture in job.train] + [(*picture, True) for picture in job.test]
    batch = choose_batch(len(job.train))
    loaders = ImageDataLoaders.from_df(
        pandas.DataFrame(rows, columns=["image", "label", "test"]),
        path=job.images,
        valid_col="test",
        item_tfms=Resize(460),
        batch_tfms=[*aug_transforms(size=SIZE, min_scale=0.75), Normalize.from_stats(MEAN, STD)],
        bs=batch,
    )
    # Weights from a file; as they have no last layer, none is looked for, and every other one must be there.
    own = {"file": str(job.weights), "num_classes": 0}
    learner = vision_learner(loaders, ARCHITECTURE, pretrained_cfg_overlay=own, path=job.scratch)
    rates = {"base_lr": learner.lr_find(show_plot=False).valley} if finds_rate else {}
    learner.fine_tune(5, **rates, cbs=Callback(before_validate=skip_validation))
    probabilities, _ = learner.get_preds()
    labels = [learner.dls.vocab[place] for place in probabilities.argmax(1).tolist()]
    return labels, {"epochs": "1 + 5", "batch_size": batch, "learning_rate": rates.get("base_lr", "default")}


def choose_batch(pictures: int) -> int:
    """The default of fastai, 64, or the largest of 32, 16, 8 and 4 that leaves three whole batches in an epoch, else 4.

    fastai leaves out an epoch's last, incomplete batch: of 20 pictures, 64 a batch would leave none to learn from.
    Tried with 20, 100 and 245 pictures, others of these sizes were no more accurate.
    """
    return next((size for size in (64, 32, 16, 8) if pictures // size >= 3), 4)


def sklearn(job: Job, tunes: bool, scales: bool = True) -> Outcome:
    """scikit-learn's logistic regression on final features, its strength the default or cross-validated.

    Its documentation recommends to standardise features. On few pictures that can hurt: a feature that by chance hardly
    varies among them is divided by next to nothing. So it may be left out. Pictures are resized as the weights want it.
    """
    import torch
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from torchvision.transforms import InterpolationMode

    torch.manual_seed(job.seed)
    body, workers = load_body(job.weights).to(find_device()), os.cpu_count() or 1
    steps = centred(InterpolationMode.BICUBIC)
    train, test = (infer(body, load(job.images, part, steps, 32, workers)) for part in (job.train, job.test))
    tuned = {"Cs": 10, "cv": 5, "n_jobs": workers}
    head = LogisticRegressionCV(max_iter=1000, **tuned) if tunes else LogisticRegression(max_iter=1000)
    classifier = make_pipeline(*([StandardScaler()] if scales else []), head)
    classifier.fit(train.numpy(), [label for _, label in job.train])
    return classifier.predict(test.numpy()).tolist(), {"max_iter": 1000, "C": head.C_.tolist() if tunes else [1.0]}


# What rivals share


def load_body(weights: Path) -> Any:
    """The pretrained network without its last layer; every weight must be there, and no other."""
    import timm
    import torch

    body = timm.create_model(ARCHITECTURE, num_classes=0)
    body.load_state_dict(torch.load(weights, weights_only=True))
    return body


def find_device() -> Any:
    import torch

    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def centred(*interpolation: Any) -> list:
    from torchvision import transforms

    return [transforms.Resize(256, *interpolation), transforms.CenterCrop(SIZE)]


def load(images: Path, pictures: Pictures, steps: list, batch: int, workers: int, shuffle: bool = False) -> Any:
    """PyTorch's loader of (inputs, labels); its workers open the pictures."""
    from torch.utils.data import DataLoader
    from torchvision import transforms

    transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    collate = functools.partial(open_batch, images, transform)
    listed: Any = pictures  # is all that a loader asks for
    return DataLoader(listed, batch_size=batch, shuffle=shuffle, num_workers=workers, collate_fn=collate)


def open_batch(folder: Path, transform: Any, pictures: Pictures) -> tuple:
    import torch
    from PIL import Image

    images = []
    for name, _ in pictures:
        with Image.open(folder / name) as image:
            images.append(transform(image.convert("RGB")))
    return torch.stack(images), torch.tensor([label for _, label in pictures])


def infer(model: Any, loader: Any) -> Any:
    """What a network in evaluation mode gives on all pictures of a loader."""
    import torch

    model.eval()
    with torch.inference_mode():
        return torch.cat([model(inputs.to(find_device())).cpu() for inputs, _ in loader])


DESCRIPTIONS = {
    "tutorial-frozen": "PyTorch's transfer learning tutorial, the network as a fixed feature extractor: one new layer, "
    "SGD with 0.001 and momentum 0.9, a tenth each 7 epochs, batches of 4, 25 epochs on hymenoptera, 10 elsewhere; the "
    "last epoch counts; the tutorial takes the one that does best on its test pictures.",
    "tutorial-finetuned": "the same, with all weights trained.",
    "fastai": "its vision tutorial: `vision_learner`, Adam, crops of 460 and then 224 with `aug_transforms`, "
    "`fine_tune(5)` at the default rate; batches of 64, or fewer where an epoch would have less than three.",
    "fastai-lr-find": "the same at the rate that `lr_find` suggests (its default, the valley).",
    "sklearn": "the final features in float32, `StandardScaler` and `LogisticRegression(max_iter=1000)`.",
    "sklearn-tuned": "the same with `LogisticRegressionCV(Cs=10, cv=5, max_iter=1000)`.",
    "sklearn-unscaled": "`sklearn-tuned` without `StandardScaler`: scikit-learn's documentation recommends scaling, "
    "but on few pictures it can hurt.",
}
ENTRANTS = {
    "tutorial-frozen": functools.partial(tutorial, whole=False),
    "tutorial-finetuned": functools.partial(tutorial, whole=True),
    "fastai": functools.partial(fastai, finds_rate=False),
    "fastai-lr-find": functools.partial(fastai, finds_rate=True),
    "sklearn": functools.partial(sklearn, tunes=False),
    "sklearn-tuned": functools.partial(sklearn, tunes=True),
    "sklearn-unscaled": functools.partial(sklearn, tunes=True, scales=False),
}


if __name__ == "__main__":
    main()
