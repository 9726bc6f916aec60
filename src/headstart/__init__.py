"""Turn a folder of labelled pictures into an image classifier that can be trusted.

The verbs of the command line, as functions: `train`, `evaluate`, `predict`, `audit`, `models`, `rank`, `recipe`,
`fetch`, `demo`; beside them `read` for data and `load` for a classifier. Importing headstart imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headstart.backbones import list_models as models
    from headstart.comparison import rank
    from headstart.config import RunConfig
    from headstart.cookbook import recipe
    from headstart.data import Dataset
    from headstart.demonstration import demo
    from headstart.errors import HeadstartError
    from headstart.model import Classifier, Prediction, load, predict
    from headstart.reading import read
    from headstart.training import Run, audit, evaluate, train
    from headstart.tutorial_sets import fetch

__version__ = "0.1.0"
__all__ = [
    "Classifier",
    "Dataset",
    "HeadstartError",
    "Prediction",
    "Run",
    "RunConfig",
    "audit",
    "demo",
    "evaluate",
    "fetch",
    "load",
    "models",
    "predict",
    "rank",
    "read",
    "recipe",
    "train",
]

# Where each public name lives; it is imported when it is first used.
_HOMES = {
    **dict.fromkeys(("Classifier", "Prediction", "load", "predict"), "model"),
    **dict.fromkeys(("Run", "audit", "evaluate", "train"), "training"),
    "Dataset": "data",
    "read": "reading",
    "RunConfig": "config",
    "HeadstartError": "errors",
    "demo": "demonstration",
    "fetch": "tutorial_sets",
    "rank": "comparison",
    "recipe": "cookbook",
    "models": "backbones",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'headstart' has no attribute {name!r}")
    module = importlib.import_module(f"headstart.{_HOMES[name]}")
    return getattr(module, "list_models" if name == "models" else name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
