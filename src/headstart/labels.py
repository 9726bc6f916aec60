"""The names of ImageNet's thousand classes, in English and Chinese, by their WordNet ids."""

from __future__ import annotations

import csv
import functools
from importlib import resources
from typing import Literal

Language = Literal["en", "zh"]
_COLUMNS: dict[Language, str] = {"en": "english", "zh": "chinese"}


@functools.cache
def _rows() -> tuple[dict[str, str], ...]:
    table = resources.files("headstart").joinpath("assets/imagenet_classes.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(table.splitlines()))


def imagenet_names(language: Language = "en") -> tuple[str, ...]:
    """The thousand names in a language, in the order of a network's outputs; each stands once."""
    return tuple(row[_COLUMNS[language]] for row in _rows())


def find_names(classes: tuple[str, ...], language: Language) -> dict[str, str]:
    """Class -> its name in a language, for classes that are English names or ids of ImageNet's; others are left out.

    Of a class in nested folders, such as `dogs/n02086240`, the last part counts.
    """
    known = {row[key]: row[_COLUMNS[language]] for key in ("english", "id") for row in _rows()}
    last = {label: label.rpartition("/")[2] for label in classes}
    return {label: known[name] for label, name in last.items() if name in known}
