"""Dogs and cats: VGG-16's last layer alone, three ways to bring a picture into the square, and the four cases.

headstart fetch dogs-cats
headstart recipe run dogs-cats --data data/dogs-cats --out runs/dogs-cats

Two cores (AMD EPYC) without a GPU, eleven minutes with EfficientNet-Lite0 on a cut of 400 pictures, ten of them from
scratch. Seen so, accuracy on 200 pictures after the tutorial's one epoch: resized 0.750 [0.686, 0.805], squashed 0.730
[0.665, 0.787], cropped without a resize 0.725 [0.659, 0.782]; the four cases 0.995, 0.985, 0.980 and 0.710 [0.644,
0.768]. With VGG-16 it was run on random weights only: it runs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headstart.cookbook import compare, draw_predictions, middle_block, tabulate, train

NETWORK = "torchvision/vgg16"
TUTORIAL = {
    "strategy": "finetune",
    "freeze": "all",
    "optimizer": "sgd",
    "momentum": 0.0,
    "learning_rate": 1e-3,
    "schedule": "constant",
    "weight_decay": 0.0,
    "loss": "nll",
    "epochs": 1,
    "augment": "none",
}
GEOMETRIES = {"crop": "short side resized, then cropped", "squash": "squashed", "center": "cropped without a resize"}
# New data are few or many, like the pretraining data or not.
CASES = {
    "few and similar: a linear classifier on features": {"strategy": "probe", "heads": "logistic"},
    "many and similar: everything fine-tuned": {"strategy": "finetune"},
    "few and different: an SVM on earlier features": {"strategy": "probe", "heads": "svm"},
    "many and different: from scratch": {"strategy": "scratch"},
}


def run(data: Any, out: Path, track: Any, settings: Mapping[str, Any]) -> str:
    """The tutorial's run by each geometry, then each of its four cases on the same pictures."""
    shapes = [
        train(words, data, out / fit, track, {**TUTORIAL, "fit": fit}, settings) for fit, words in GEOMETRIES.items()
    ]
    cases = []
    for number, (words, case) in enumerate(CASES.items(), 1):
        taps = {"taps": middle_block(settings)} if case.get("heads") == "svm" else {}
        cases.append(train(words, data, out / f"case-{number}", track, {**case, **taps}, settings))
    draw_predictions(shapes[0], out / "predictions.png")
    resized, squashed, cut = shapes
    pairs = (
        compare(resized, cut),
        compare(resized, squashed),
        compare(cases[0], cases[2]),
        compare(cases[1], cases[3]),
    )
    return "\n\n".join((tabulate(shapes), tabulate(cases), "\n".join(pairs)))
