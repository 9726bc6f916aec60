"""What six mistakes of transfer-learning tutorials cost: each done wrong and done right, all else equal.

python benchmarks/mistakes.py                          (all six with three seeds: about half an hour, up to 10 GB)
python benchmarks/mistakes.py --only statistics crop   (those of a frozen network take a minute)

Each difference has a 95 % bootstrap interval: the report pictures are drawn again within their classes, and the seeds
too, 1,000 times; both ways always on the same pictures and seeds. A seed sets the new layer's weights, the order of the
pictures and their augmentation.

Expected (2-core machine): the table in docs/mistakes.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import headstart
from headstart import augmentation, backbones, embedders, labels, loading, metrics, sampling
from headstart.engine import kept_memory
from headstart.images import Preprocess
from headstart.model import to_probabilities
from sets import DATA

NETWORK = "efficientnet_lite0"
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
HEAD_EPOCHS, DRIFT_EPOCHS, CHOICE_EPOCHS, RATES_EPOCHS = 20, 10, 25, 3
HALVES, RESAMPLES = 1000, 1000
VARIED = augmentation.parse("RandomResizedCrop, RandomHorizontalFlip", "mirror", 224)

Measures = Mapping[str, NDArray[np.float64]]  # name of a measure -> (n,), one number a report picture
Pairs = dict[str, tuple[Measures, Measures]]  # what is compared, in words -> done wrong, done right


# The six mistakes: what one seed gives


def sigmoid(seed: int) -> Pairs:
    """A sigmoid between the last layer and cross-entropy."""
    wrong, right = (fit_head("imagewoof", own_preprocess(), seed, squeezed) for squeezed in (True, False))
    return {"sigmoid before cross-entropy": (wrong, right)}


def statistics(seed: int) -> Pairs:
    """CIFAR-10's mean and standard deviation for a network that was trained with others."""
    own = own_preprocess()
    foreign = dataclasses.replace(own, mean=CIFAR_MEAN, std=CIFAR_STD)
    return {
        "CIFAR-10's statistics, new head": (fit_head("imagewoof", foreign, seed), fit_head("imagewoof", own, seed)),
        "CIFAR-10's statistics, stock network": (
            ask_stock_network("imagewoof", foreign),
            ask_stock_network("imagewoof", own),
        ),
    }


def drift(seed: int) -> Pairs:
    """A frozen body that stays in train mode: its batch norms go on counting."""
    wrong, right = (fit_head_on_batches("hymenoptera", seed, drifting) for drifting in (True, False))
    return {"frozen body in train mode": (wrong, right)}


def crop(seed: int) -> Pairs:
    """The middle 224 pixels of a picture, whatever its size; beside it, the whole picture pressed into a square."""
    views = {fit: dataclasses.replace(own_preprocess(), fit=fit) for fit in ("center", "squash", "crop")}
    found = {fit: fit_head("dogscats", view, seed) for fit, view in views.items()}
    return {
        "centre crop without resize": (found["center"], found["crop"]),
        "squashed to a square": (found["squash"], found["crop"]),
    }


def choice(seed: int) -> Pairs:
    """The best of 25 epochs, chosen on the pictures that are reported."""
    right = fine_tune("hymenoptera", seed)
    best = right[right.mean(1).argmax()]
    return {
        "best epoch chosen on the half reported": choose_by_halves(right, seed),
        "best epoch instead of the last": ({"accuracy": best}, {"accuracy": right[-1]}),
    }


def rates(seed: int) -> Pairs:
    """The large learning rate for the pretrained body, the small one for the new head."""
    wrong, right = (fine_tune_with_rates("scenes", seed, reversed_rates) for reversed_rates in (True, False))
    return {"learning rates reversed": (wrong, right)}


@dataclasses.dataclass(frozen=True)
class Mistake:
    """What gives both ways for a seed, the set it is measured on, and the measures that are shown."""

    measure: Callable[[int], Pairs]
    data: str
    shown: tuple[str, ...] = ("accuracy", "log-loss")


MISTAKES = {
    "sigmoid": Mistake(sigmoid, "imagewoof", ("accuracy", "log-loss", "mean confidence")),
    "statistics": Mistake(statistics, "imagewoof"),
    "drift": Mistake(drift, "hymenoptera"),
    "crop": Mistake(crop, "dogscats"),
    "choice": Mistake(choice, "hymenoptera", ("accuracy",)),
    "rates": Mistake(rates, "scenes"),
}


# The loops: both ways are the same but for the line that a flag decides


def fit_head(name: str, preprocess: Preprocess, seed: int, squeezed: bool = False) -> Measures:
    """A new last layer on the frozen network's features, by Adam."""
    features, targets = embed(name, "fit", preprocess), pictures(name, "fit")[1]
    torch.manual_seed(seed)
    head: nn.Module = nn.Linear(features.shape[1], int(targets.max()) + 1)
    if squeezed:
        head = nn.Sequential(head, nn.Sigmoid())  # the mistake
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    for _ in range(HEAD_EPOCHS):
        for rows in torch.split(torch.randperm(len(targets)), 32):
            step(optimizer, head(features[rows]), targets[rows])
    with torch.inference_mode():
        return score(head(embed(name, "report", preprocess)), pictures(name, "report")[1])


def ask_stock_network(name: str, preprocess: Preprocess) -> Measures:
    """The network with its own last layer, where the set's classes are some of ImageNet's thousand."""
    weight, bias = backbones.imagenet_head(NETWORK)
    classes = headstart.read(DATA / name).classes
    names, known = labels.imagenet_names(), labels.find_names(classes, "en")
    of_class = torch.tensor([names.index(known[label]) for label in classes])
    return score(embed(name, "report", preprocess) @ weight.T + bias, of_class[pictures(name, "report")[1]])


def fit_head_on_batches(name: str, seed: int, drifting: bool) -> Measures:
    """The tutorial's fixed feature extractor: batches of 4, SGD for the new layer alone, for ten epochs of its 25."""
    body, head = make_network(name, seed)
    body.requires_grad_(False)
    network = nn.Sequential(body, head)
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-3, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    for epoch in range(DRIFT_EPOCHS):
        network.train()
        if not drifting:
            body.eval()  # the line that the mistake leaves out
        train_epoch(network, optimizer, name, 4, seed, epoch)
        scheduler.step()
    return look(network, name)


def fine_tune(name: str, seed: int) -> NDArray[np.float64]:
    """The tutorial's fine-tuning: for each of its 25 epochs whether each report picture is right, (25, n)."""
    body, head = make_network(name, seed)
    network = nn.Sequential(body, head)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    right = []
    for epoch in range(CHOICE_EPOCHS):
        network.train()
        train_epoch(network, optimizer, name, 4, seed, epoch)
        scheduler.step()
        right.append(look(network, name)["accuracy"])
    return np.stack(right)


def choose_by_halves(right: NDArray[np.float64], seed: int) -> tuple[Measures, Measures]:
    """How often each picture is right at the epoch chosen on a half that holds it, and on one that does not.

    The epoch is chosen on random halves of the report pictures; each picture is as often in the half chosen on as in
    the other.
    """
    random, n = np.random.default_rng(seed), right.shape[1]
    seen, unseen = np.zeros(n), np.zeros(n)
    for _ in range(HALVES):
        half = random.permutation(n) < n // 2
        for chosen_on in (half, ~half):
            best = right[right[:, chosen_on].mean(1).argmax()]
            seen[chosen_on] += best[chosen_on]
            unseen[~chosen_on] += best[~chosen_on]
    return {"accuracy": seen / HALVES}, {"accuracy": unseen / HALVES}


def fine_tune_with_rates(name: str, seed: int, reversed_rates: bool) -> Measures:
    """Everything is trained, body and new head with learning rates of their own, in batches of 64."""
    body, head = make_network(name, seed)
    network = nn.Sequential(body, head)
    body_rate, head_rate = (1e-2, 1e-3) if reversed_rates else (1e-3, 1e-2)
    groups = [{"params": body.parameters(), "lr": body_rate}, {"params": head.parameters(), "lr": head_rate}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for epoch in range(RATES_EPOCHS):
        network.train()
        train_epoch(network, optimizer, name, 64, seed, epoch)
    return look(network, name)


# What the loops share


def step(optimizer: torch.optim.Optimizer, logits: Tensor, targets: Tensor) -> None:
    loss = cross_entropy(logits, targets)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def train_epoch(
    network: nn.Module, optimizer: torch.optim.Optimizer, name: str, size: int, seed: int, epoch: int
) -> None:
    """One pass over the training pictures, cropped at random and mirrored, in batches of `size`."""
    album, targets = open_album(name, "fit"), pictures(name, "fit")[1]
    for draws in sampling.windows(sampling.draw_epoch(targets.numpy(), "plain", seed, epoch), size):
        pixels = np.stack([album.vary(draw, VARIED, seed, epoch) for draw in draws])
        logits = network(album.preprocess.normalise(torch.from_numpy(pixels)))
        step(optimizer, logits, targets[[draw.sample for draw in draws]])


def look(network: nn.Module, name: str) -> Measures:
    """What a network gives on the report pictures, in evaluation mode."""
    album, targets = open_album(name, "report"), pictures(name, "report")[1]
    network.eval()
    logits = []
    with torch.inference_mode():
        for rows in torch.split(torch.arange(len(album)), 32):
            pixels = np.stack([album.view(row) for row in rows.tolist()])
            logits.append(network(album.preprocess.normalise(torch.from_numpy(pixels))))
    return score(torch.cat(logits), targets)


def score(logits: Tensor, targets: Tensor) -> Measures:
    """For each picture whether it is right, its log-loss, and how sure the network is."""
    probabilities = to_probabilities(logits, 1.0, "single")
    own = probabilities[np.arange(len(targets)), targets.numpy()]
    return {
        "accuracy": metrics.top_k_hits(probabilities, targets.numpy(), 1).astype(np.float64),
        "log-loss": -np.log(np.maximum(own, metrics.TINY)),
        "mean confidence": probabilities.max(1),
    }


def make_network(name: str, seed: int) -> tuple[nn.Module, nn.Module]:
    """(the pretrained body, a new last layer), to be trained."""
    torch.manual_seed(seed)
    body = backbones.load(backbones.locate(NETWORK)).network.requires_grad_().to(memory_format=torch.channels_last)
    weight, _ = backbones.imagenet_head(NETWORK)
    return body, nn.Linear(weight.shape[1], int(pictures(name, "fit")[1].max()) + 1)


def own_preprocess() -> Preprocess:
    """What came with the weights."""
    return backbones.locate(NETWORK).spec.preprocess


@functools.cache
def pictures(name: str, role: str) -> tuple[tuple[Path, ...], Tensor]:
    """(files, class numbers) of a set's pictures: `fit` is its train, `report` its val."""
    dataset = headstart.read(DATA / name)
    samples = [sample for sample in dataset.samples if sample.role == role]
    numbers = [dataset.classes.index(sample.labels[0]) for sample in samples]
    return tuple(dataset.path(sample.source) for sample in samples), torch.tensor(numbers)


@functools.cache
def open_album(name: str, role: str) -> loading.Album:
    return loading.Album(pictures(name, role)[0], own_preprocess())


@functools.cache
def embed(name: str, role: str, preprocess: Preprocess) -> Tensor:
    """Features (n, dim) of the frozen network, whose input is made as `preprocess` says."""
    backbone = backbones.load(backbones.locate(NETWORK))
    backbone = dataclasses.replace(backbone, spec=dataclasses.replace(backbone.spec, preprocess=preprocess))
    embedder = embedders.prepare(backbone, torch.device("cpu"), "float32")
    album = loading.Album(pictures(name, role)[0], preprocess, room_bytes=0)
    return torch.from_numpy(np.concatenate(list(album.embed(range(len(album)), embedder))))


# The table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(MISTAKES), choices=list(MISTAKES), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="how often each is measured [default: 3]")
    parser.add_argument("--json", type=Path, help="file for the raw numbers")
    given = parser.parse_args()
    if not DATA.is_dir():
        print("needs real pictures: set HEADSTART_TEST_DATA")
        return
    print("| done wrong | data | n | measure | wrong | right | right - wrong |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows, seconds = [], {}
    for name in given.only:
        start = time.perf_counter()
        with kept_memory():
            measured = measure(MISTAKES[name], range(given.seeds))
        rows += [{"mistake": name, **row} for row in measured]
        seconds[name] = round(time.perf_counter() - start)
        print("\n".join(map(show, measured)), flush=True)
    for row in rows:
        if row["measure"] == "mean confidence":
            print("\nHighest confidence in any picture: {highest[0]:.3f} wrong, {highest[1]:.3f} right.".format(**row))
    print(f"\nSeconds: {', '.join(f'{name} {spent}' for name, spent in seconds.items())}.")
    if given.json:
        given.json.write_text(json.dumps({"rows": rows, "seconds": seconds}, indent=2) + "\n")


def measure(mistake: Mistake, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each comparison and measure: both ways by seed, and the estimate of the difference."""
    by_seed = [mistake.measure(seed) for seed in seeds]
    strata = pictures(mistake.data, "report")[1].numpy()
    rows = []
    for label in by_seed[0]:
        for name in mistake.shown:
            wrong, right = (np.stack([pairs[label][way][name] for pairs in by_seed]) for way in (0, 1))
            rows.append(
                {
                    "comparison": label,
                    "data": mistake.data,
                    "measure": name,
                    "wrong": wrong.mean(1).tolist(),
                    "right": right.mean(1).tolist(),
                    "highest": [wrong.max(), right.max()],
                    "difference": estimate(right - wrong, strata).to_json(),
                }
            )
    return rows


def estimate(values: NDArray[np.float64], strata: NDArray[np.int64]) -> metrics.Estimate:
    """The mean of values (seeds, n), its interval by drawing both seeds and pictures again."""
    seeds, n = values.shape
    of_pictures = metrics.draw_weights(strata, (), RESAMPLES, seed=0)
    of_seeds = metrics.draw_weights(np.zeros(seeds, np.int64), (), RESAMPLES, seed=1)
    weights = (of_seeds[:, :, None] * of_pictures[:, None, :]).reshape(RESAMPLES, -1)
    return metrics.bootstrap(lambda weights: (weights @ values.ravel()) / weights.sum(1), weights, n)


def show(row: Mapping[str, Any]) -> str:
    difference = row["difference"]
    interval = "too few pictures to tell"
    if difference["low"] is not None:
        interval = f"{difference['low']:+.3f}, {difference['high']:+.3f}"
    figures = [f"{np.mean(row[way]):.3f}" for way in ("wrong", "right")]
    columns = (row["comparison"], row["data"], str(difference["n"]), row["measure"], *figures)
    return f"| {' | '.join(columns)} | {difference['value']:+.3f} [{interval}] |"


if __name__ == "__main__":
    main()
