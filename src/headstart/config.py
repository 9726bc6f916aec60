"""The settings of a run: frozen dataclasses, read from TOML and keywords, with all mistakes reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from headstart.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


def _setting(default: T, help: str, *, counts: bool = False, **limits: float) -> T:
    """A dataclass field with its help text and, for numbers, the limits `least` and `most`.

    `counts`: whether a text may be given as a whole number.
    """
    result: T = field(default=default, metadata={"help": help, "counts": counts, **limits})
    return result


@dataclass(frozen=True)
class DataConfig:
    """How a folder or table is read."""

    images: str = _setting("", "folder in which a table's pictures lie")
    classes: Literal["folder", "leaf"] = _setting(
        "folder", "a class is a first-level folder, or each folder that holds pictures (leaf)"
    )
    task: Literal["auto", "single", "multi"] = _setting("auto", "one label a picture, or several")
    separator: str = _setting("", "what separates several labels in a table's cell (default: | ; , else spaces)")
    image_column: str = _setting("", "the table's column of picture paths (default: found by name)")
    label_column: str = _setting("", "the table's column of labels (default: found by name)")
    split_column: str = _setting("", "the table's column of train, val, test (default: found by name)")
    group_column: str = _setting("", "the table's column of groups that must stay together (default: found by name)")
    limit_megapixels: float = _setting(50.0, "pictures with more pixels are set aside", least=0.0001)
    limit_mebibytes: float = _setting(64.0, "picture files with more bytes are set aside", least=0.0001)


@dataclass(frozen=True)
class ModelConfig:
    """Which network is adapted, and how it is run."""

    backbone: str = _setting("auto", "pretrained network, see `headstart models` (auto: efficientnet_lite0)")
    weights: str = _setting("", "file with the network's weights (.safetensors, .pth)")
    precision: Literal["auto", "bfloat16", "float16", "float32"] = _setting(
        "auto", "number format of the network (auto: the fastest one; for training it is timed)"
    )
    device: str = _setting("auto", "auto, cpu, cuda, cuda:N, mps or xpu")
    size: int = _setting(
        0,
        "side of the network's input in pixels (0: its own, or with strategy auto a larger one by evidence)",
        least=0,
        most=4096,
    )
    fit: Literal["auto", "crop", "pad", "squash", "center"] = _setting(
        "auto",
        "how a picture is brought into that square: its short side resized and the middle cut out, the whole laid on "
        "grey, pressed into it, or the middle cut out at the picture's own scale (auto: as the weights were trained, "
        "or with strategy auto by evidence)",
    )
    taps: str = _setting(
        "",
        "blocks whose pooled outputs a head is fitted on, such as blocks.2,blocks.4,final (default: by evidence with "
        "strategy auto, else final alone)",
    )
    views: Literal["auto", "plain", "mirror", "zoom", "all"] = _setting(
        "auto",
        "what answers are averaged over: a picture alone, with its mirror image, with its middle enlarged, or with all "
        "of these (auto: by evidence with strategy auto, else plain)",
    )


@dataclass(frozen=True)
class TrainConfig:
    """How a classifier is trained."""

    strategy: Literal["auto", "probe", "finetune", "lp-ft", "two-stage", "scratch"] = _setting(
        "auto",
        "probe fits a head on the frozen network; finetune trains everything; lp-ft fits the head first, then trains "
        "everything; two-stage trains the head first; scratch starts from random weights (auto: by evidence)",
    )
    time_budget: str = _setting(
        "0",
        "time such as 90s, 5m or 2h in which strategy auto may also train weights, and rank measures networks; what "
        "would take longer is not tried (0: no weight is trained, and all networks are ranked)",
        counts=True,
    )
    interpolation: str = _setting(
        "25,50,75,100",
        "with a time budget: percent of the way from the fitted head's network to the trained one that are tried",
        counts=True,
    )
    seed: int = _setting(0, "seed of splits, folds and resampling", least=0)
    cache: str = _setting("auto", "folder of cached features, or none (auto: $HEADSTART_CACHE, else the user's cache)")
    heads: str = _setting(
        "", "kinds of heads to choose from: logistic, svm, means, blend, knn (default: what suits the data)"
    )
    report_share: float = _setting(
        0.2, "share of the pictures kept for the report where no split is given", least=0.01, most=0.9
    )
    folds: int = _setting(5, "folds of the cross-validation", least=2, most=50)
    select_share: float = _setting(
        0.15, "share of the training pictures kept to choose by where weights are trained", least=0.01, most=0.5
    )


# What `auto` stands for, by the declared symmetry. Crops down to a quarter of the area rather than torchvision's 8 %:
# with few pictures, a crop of a twelfth often shows nothing of the class.
AUTOMATIC_AUGMENT = {
    "none": "RandomResizedCrop(scale=(0.25, 1.0))",
    "mirror": "RandomResizedCrop(scale=(0.25, 1.0)), RandomHorizontalFlip",
    "any": "RandomResizedCrop(scale=(0.25, 1.0)), RandomHorizontalFlip, RandomVerticalFlip, RandomQuarterTurn",
}


@dataclass(frozen=True)
class EngineConfig:
    """How weights are trained by gradient: all strategies but probe."""

    epochs: int = _setting(0, "passes over the training pictures (0: by strategy)", least=0, most=100_000)
    batch_size: int = _setting(0, "pictures a forward pass (0: 32, fewer with few pictures)", least=0, most=65_536)
    accumulate: int = _setting(1, "forward passes an optimiser step", least=1, most=65_536)
    optimizer: Literal["sgd", "adam", "adamw"] = _setting("adamw", "optimiser")
    momentum: float = _setting(0.9, "momentum of sgd", least=0.0, most=0.9999)
    learning_rate: float = _setting(0.0, "highest learning rate, the head's (0: by strategy)", least=0.0, most=100.0)
    layer_decay: float = _setting(
        0.0, "learning rate of a block over that of the next one towards the head (0: by strategy)", least=0.0, most=1.0
    )
    rates: str = _setting("", "learning rates of parts by name, such as body=1e-5,blocks.6=1e-4; 0 freezes")
    find_lr: bool = _setting(False, "find the learning rate by a range test first, and use it")
    schedule: Literal["one-cycle", "cosine", "step", "constant"] = _setting("cosine", "how learning rates fall")
    warmup_epochs: float = _setting(1.0, "epochs in which learning rates rise, of cosine", least=0.0, most=1000.0)
    step_epochs: int = _setting(7, "epochs between the steps of step", least=1, most=100_000)
    step_factor: float = _setting(0.1, "what learning rates are multiplied by at a step", least=1e-6, most=1.0)
    least_rate: float = _setting(0.0, "no learning rate falls below this", least=0.0, most=1.0)
    weight_decay: float = _setting(0.01, "weight decay", least=0.0, most=10.0)
    decay_all: bool = _setting(False, "weight decay of norms and biases too")
    clip_value: float = _setting(0.0, "largest absolute value of a gradient (0: no limit)", least=0.0, most=1e6)
    clip_norm: float = _setting(0.0, "largest norm of all gradients together (0: no limit)", least=0.0, most=1e6)
    ema: float = _setting(0.0, "decay of the moving average of weights that is kept (0: none)", least=0.0, most=0.99999)
    loss: Literal["auto", "cross-entropy", "nll", "bce", "bce-with-logits", "focal"] = _setting(
        "auto", "what is made small (auto: cross-entropy, or bce-with-logits for several labels a picture)"
    )
    focal_gamma: float = _setting(2.0, "focusing of the focal loss", least=0.0, most=10.0)
    label_smoothing: float = _setting(0.0, "share of each label that is spread over all", least=0.0, most=0.9)
    class_weights: Literal["none", "counts", "effective"] = _setting(
        "none", "weights of classes in the loss: by inverse counts, or by effective numbers"
    )
    sampling: Literal["plain", "weighted", "over", "under"] = _setting(
        "plain", "each picture once an epoch; drawn so that classes come equally often; small ones repeated; large cut"
    )
    augment: str = _setting(
        "auto", "augmentations by torchvision's names, such as 'RandomResizedCrop, ColorJitter(0.05)'; none"
    )
    symmetry: Literal["none", "mirror", "any"] = _setting(
        "mirror", "what leaves a picture's meaning alone: nothing, a mirror image, or any flip and turn"
    )
    mixup: float = _setting(0.0, "alpha of mixup (0: none)", least=0.0, most=10.0)
    cutmix: float = _setting(0.0, "alpha of cutmix (0: none)", least=0.0, most=10.0)
    head: Literal["linear", "mlp", "batch-norm"] = _setting(
        "linear", "new last layers: one linear; with a hidden layer; or batch norms and dropout around it"
    )
    hidden: int = _setting(512, "width of a head's hidden layer", least=1, most=65_536)
    dropout: float = _setting(0.5, "dropout of heads with a hidden layer", least=0.0, most=0.95)
    freeze: str = _setting(
        "", "blocks that stay as they are: a number of first ones, up to the named one, or all", counts=True
    )
    cached_views: int = _setting(
        0,
        "views of each picture whose activations, at the end of the frozen blocks, are kept on disk (0: none, and "
        "every epoch shows another view)",
        least=0,
        most=1000,
    )
    unfreeze_epochs: int = _setting(
        0, "epochs after which one more frozen block, from the head down, is trained (0: none)", least=0, most=100_000
    )
    batch_norm: Literal["auto", "train", "frozen"] = _setting(
        "auto", "statistics of batch norms in trained blocks: of each batch, or those that came with the weights"
    )
    head_epochs: int = _setting(1, "epochs of two-stage's first stage, of the head alone", least=1, most=100_000)
    head_rate: float = _setting(1e-3, "learning rate of that stage, by adam", least=1e-8, most=100.0)
    patience: int = _setting(0, "epochs without a better one after which training ends (0: never)", least=0)
    best_by: str = _setting("log_loss", "figure on the select pictures by which the best epoch is kept")
    checkpoint_minutes: float = _setting(5.0, "minutes between checkpoints within an epoch", least=0.0, most=10_000.0)
    memory_mebibytes: int = _setting(1024, "memory for decoded pictures", least=0, most=10_000_000)
    disk_mebibytes: int = _setting(4096, "disk space for kept activations", least=0, most=100_000_000)
    tensorboard: bool = _setting(False, "also write TensorBoard's event files (needs headstart[tensorboard])")


@dataclass(frozen=True)
class EvaluateConfig:
    """How the result is measured."""

    resamples: int = _setting(1000, "bootstrap resamples for the intervals", least=100, most=100_000)


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run; the sections of `config.toml`."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


@dataclass(frozen=True)
class Setting:
    """One setting: where it lives and what it may be."""

    section: str
    name: str
    type: Any
    default: Any
    help: str
    least: float
    most: float
    counts: bool

    def check(self, value: object) -> tuple[Any, str]:
        """(the value in its own type, what is wrong with it or "")."""
        if typing.get_origin(self.type) is Literal:
            choices = typing.get_args(self.type)
            return value, "" if value in choices else f"must be one of {', '.join(choices)}, not {value!r}"
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if self.type is str and (isinstance(value, Path) or (self.counts and type(value) is int)):
            value = str(value)
        if type(value) is not self.type:
            return value, f"must be {_TYPE_NAMES[self.type]}, not {value!r}"
        if isinstance(value, float) and math.isinf(value):
            return value, f"must be a finite number, not {value:g}"
        if isinstance(value, (int, float)) and value < self.least and math.isinf(self.most):
            return value, f"must be at least {self.least:g}, not {value:g}"
        if isinstance(value, (int, float)) and not self.least <= value <= self.most:
            return value, f"must lie between {self.least:g} and {self.most:g}, not {value:g}"
        return value, ""


_MARK = "\U0010fffd"  # the last private-use character
_RUN = "run"  # the section of facts that a finished run adds
_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def settings(*sections: str) -> dict[str, Setting]:
    """All settings by name, of the named sections or of all; a name stands in one section only."""
    found = {}
    for section in dataclasses.fields(RunConfig):
        if sections and section.name not in sections:
            continue
        section_type = type(getattr(RunConfig(), section.name))
        hints = typing.get_type_hints(section_type)
        for entry in dataclasses.fields(section_type):
            facts = entry.metadata
            found[entry.name] = Setting(
                section.name,
                entry.name,
                hints[entry.name],
                entry.default,
                facts["help"],
                facts.get("least", float("-inf")),
                facts.get("most", float("inf")),
                facts["counts"],
            )
    return found


def resolve(base: RunConfig | str | Path | None = None, given: Mapping[str, object] | None = None) -> RunConfig:
    """The configuration from a base (a `RunConfig`, a TOML file, or the defaults) and settings by name, which win.

    Raises:
        ConfigError: naming every unknown setting and every wrong value at once.
    """
    start = RunConfig() if base is None or isinstance(base, (str, Path)) else base
    mistakes: list[str] = []
    values: dict[str, Any] = {}
    if isinstance(base, (str, Path)):
        values.update(_checked(_read_toml(Path(base), mistakes), mistakes))
    values.update(_checked({name: value for name, value in (given or {}).items() if value is not None}, mistakes))
    if mistakes:
        subject = str(base) if isinstance(base, (str, Path)) else "given"
        raise ConfigError(subject, "; ".join(mistakes), "Correct them; `headstart train --help` lists all settings.")
    return _replaced(start, values)


def flatten(config: RunConfig) -> dict[str, Any]:
    """All settings of a configuration by name."""
    return {name: getattr(getattr(config, entry.section), name) for name, entry in settings().items()}


def to_toml(config: RunConfig, facts: Mapping[str, str]) -> str:
    """A configuration as TOML, with facts of the run (path and fingerprint of the data) in their own section."""
    import tomli_w

    tables: dict[str, Any] = {_RUN: {key: _toml_text(value) for key, value in facts.items()}}
    for section in dataclasses.fields(config):
        values = dataclasses.asdict(getattr(config, section.name))
        tables[section.name] = {key: _toml_text(value) for key, value in values.items()}
    return tomli_w.dumps(tables)


def read_facts(path: Path) -> dict[str, str]:
    """The facts of the run that a `config.toml` was written with."""
    section = tomllib.loads(path.read_text(encoding="utf-8")).get(_RUN, {})
    return {key: _native_text(value) for key, value in section.items()}


def _toml_text(value: Any) -> Any:
    """TOML holds Unicode only: a byte of a name that is no text travels as a mark and the character of its number."""
    if not isinstance(value, str):
        return value
    marked = value.replace(_MARK, 2 * _MARK)
    return re.sub("[\udc80-\udcff]", lambda found: _MARK + chr(ord(found[0]) - 0xDC00), marked)


def _native_text(text: str) -> str:
    def unmark(found: re.Match[str]) -> str:
        return _MARK if found[1] == _MARK else chr(ord(found[1]) + 0xDC00)

    return re.sub(f"{_MARK}([\x80-\xff{_MARK}])", unmark, text)


def _read_toml(path: Path, mistakes: list[str]) -> dict[str, object]:
    """The settings in a TOML file by name; wrong sections are added to `mistakes`."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(path, f"cannot be read ({error.strerror})", "Give the path of a TOML file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(path, f"is not TOML ({error})", "Correct it there.") from error
    known, values = settings(), {}
    for section, entries in content.items():
        if section == _RUN:
            continue
        if not isinstance(entries, dict):
            mistakes.append(f"{section!r} must stand in a section, such as [train]")
            continue
        for name, value in entries.items():
            home = known[name].section if name in known else None
            if home is not None and home != section:
                mistakes.append(f"{name!r} belongs to [{home}], not [{section}]")
            else:
                values[name] = _native_text(value) if isinstance(value, str) else value
    return values


def _checked(given: Mapping[str, object], mistakes: list[str]) -> dict[str, Any]:
    """The right ones of the given settings; what is wrong with the others is added to `mistakes`."""
    known, values = settings(), {}
    for name, value in given.items():
        if name not in known:
            mistakes.append(f"unknown setting {name!r}{did_you_mean(name, known)}")
            continue
        values[name], why = known[name].check(value)
        if why:
            mistakes.append(f"{name} {why}")
    return values


def cache_folder() -> Path:
    """Where weights and features are kept: `$HEADSTART_CACHE`, else `headstart` in the user's cache folder."""
    own, shared = os.environ.get("HEADSTART_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or Path.home() / ".cache") / "headstart"


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """', did you mean X?' with the nearest known name, or ''."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _replaced(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    known = settings()
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        sections.setdefault(known[name].section, {})[name] = value
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **entries) for name, entries in sections.items()}
    )
