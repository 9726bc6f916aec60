"""Identify: what pictures show among ImageNet's thousand classes, in English and Chinese, the picture beside its bars.

headstart recipe run identify --data PICTURES --out runs/identify

Two cores (AMD EPYC) without a GPU, 20 seconds for 70 pictures. Seen so, on the ants of hymenoptera's val, `ant` first
for 59 of 70.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import headstart
from headstart.labels import find_names
from headstart.pictures import draw_answer, find_lacking

TOP = 3


def run(data: Any, out: Path, track: Any, settings: Mapping[str, Any]) -> str:
    """A line and a drawing for each picture."""
    classifier = headstart.load("imagenet")
    names = find_names(classifier.classes, "zh")
    lacking = find_lacking("".join(names.values()))
    drawn = {"svg": names, "png": {label: name for label, name in names.items() if not lacking & set(name)}}
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, prediction in enumerate(headstart.predict(classifier, data, track=track, **settings), 1):
        if prediction.error:
            lines.append(f"{prediction.source}: {prediction.error}")
            continue
        ranked = list(prediction.probabilities.items())[:TOP]
        lines.append(f"{prediction.source}: " + ", ".join(f"{name} {names[name]} {p:.1%}" for name, p in ranked))
        for ending, extra in drawn.items():  # an SVG shows Chinese on machines without a font for it too
            draw_answer(prediction.source, prediction, out / f"{number:04}.{ending}", TOP, extra)
    return "\n".join(lines)
