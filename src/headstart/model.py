"""The classifier: a backbone, a head, and what turns logits into answers; saved as one safe file."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headstart import backbones, embedders, labels, loading, zoo
from headstart import config as configs
from headstart.backbones import Backbone
from headstart.data import Task
from headstart.errors import (
    ConfigError,
    CorruptModel,
    DataError,
    ForeignModel,
    HeadstartError,
    ModelFileError,
    NewerModel,
    UsageError,
)
from headstart.files import UNSEALED, holds_seal, seal, write_whole
from headstart.heads import NearestNeighbours, answer
from headstart.images import Limits, Preprocess
from headstart.labels import Language
from headstart.loading import Picture, Wanted
from headstart.reading import find_pictures
from headstart.zoo import Spec

if TYPE_CHECKING:
    from headstart.embedders import Embedder

log = logging.getLogger(__name__)

SCHEMA = 1
_MARK = b'"headstart"'


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture, or why there is none."""

    source: str
    labels: tuple[str, ...] = ()
    probabilities: Mapping[str, float] = field(default_factory=dict)  # most probable first
    multi: bool = False
    error: str = ""

    @property
    def label(self) -> str:
        """The label, or several joined by |."""
        return "|".join(self.labels)

    @property
    def confidence(self) -> float | dict[str, float]:
        """The label's probability (NaN without one); with several labels a picture, label -> probability."""
        if self.multi:
            return {label: self.probabilities[label] for label in self.labels}
        return self.probabilities[self.labels[0]] if self.labels else math.nan

    def to_json(self, top: int | None = None) -> dict[str, Any]:
        """The prediction as JSON values, with the `top` most probable classes."""
        if self.error:
            return {"source": self.source, "error": self.error}
        label = {"labels": list(self.labels)} if self.multi else {"label": self.label}
        shown = dict(list(self.probabilities.items())[:top])
        return {"source": self.source, **label, "confidence": self.confidence, "probabilities": shown}


def to_probabilities(logits: Tensor | NDArray[np.float32], temperature: float, task: Task) -> NDArray[np.float64]:
    """Probabilities (n, classes) of logits (n, classes): the only way from one to the other."""
    scaled = torch.as_tensor(logits).double() / temperature
    values: NDArray[np.float64] = (scaled.softmax(1) if task == "single" else scaled.sigmoid()).numpy()
    return values


@dataclass(frozen=True, eq=False)
class Classifier:
    """A trained image classifier.

    Args:
        backbone: pictures -> features (n, dim).
        head: features -> logits (n, classes).
        classes: names, in the order of the logits.
        task: one label a picture, or several.
        temperature: what logits are divided by.
        thresholds: for several labels a picture, the probability from which each is given.
        limits: what pictures are too large to be opened.
        provenance: where it comes from: versions, data, settings, results; JSON values.
    """

    backbone: Backbone
    head: nn.Module
    classes: tuple[str, ...]
    task: Task = "single"
    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()
    limits: Limits = Limits()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def preprocess(self) -> Preprocess:
        """How pictures become the network's input."""
        return self.backbone.spec.preprocess

    def probabilities(self, logits: Tensor | NDArray[np.float32]) -> NDArray[np.float64]:
        """Probabilities (n, classes) of logits (n, classes)."""
        return to_probabilities(logits, self.temperature, self.task)

    def classify(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Probabilities (n, classes) of features (n, views x dim), by the mean of the views' logits."""
        return self.probabilities(answer(self.head, features, len(self.backbone.spec.views)))

    def decide(self, probabilities: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which labels are given, (n, classes): the most probable, or all over their thresholds."""
        if self.task == "multi":
            return probabilities >= np.asarray(self.thresholds)
        given = np.zeros(probabilities.shape, bool)
        given[np.arange(len(given)), probabilities.argmax(1)] = True
        return given

    def embedder(self, device: str = "auto", precision: str = "auto", pictures: int = 0) -> Embedder:
        """The backbone ready to run on a device; with many pictures to come, compiled where that is faster."""
        where = embedders.resolve_device(device)
        precision = embedders.resolve_precision(precision, where)
        folder = configs.cache_folder() / "features" / embedders.GRAPHS
        workshop = embedders.Workshop()
        engine = embedders.find_engine(
            self.backbone.spec, lambda: self.backbone, where, precision, folder, lambda _: pictures, workshop=workshop
        )
        return workshop.prepare(self.backbone, where, precision, engine, folder=folder)

    def predict(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        device: str = "auto",
        precision: str = "auto",
        track: Callable[[Iterable[Picture], int], Iterable[Picture]] = lambda pictures, total: pictures,
    ) -> Generator[Prediction, None, None]:
        """Predictions of picture files, in order, one at a time: memory does not grow with their number.

        Args:
            paths: one file or several.
            device: auto, cpu, cuda, cuda:N, mps or xpu.
            precision: auto, bfloat16, float16 or float32.
            track: wraps the pictures to show progress; called with them and their number.
        """
        files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        stream = loading.process(
            files, Wanted(self.preprocess, self.limits), lambda: self.embedder(device, precision, len(files))
        )
        return self._predict(files, stream, track)

    def _predict(
        self, files: Sequence[str | os.PathLike[str]], stream: loading.Stream, track: Any
    ) -> Generator[Prediction, None, None]:
        try:
            for picture in track(stream, len(files)):
                source = os.fspath(files[picture.index])
                if picture.error:
                    yield Prediction(source, multi=self.task == "multi", error=picture.error)
                else:
                    yield self.answer(source, self.classify(picture.vector[None])[0])
        finally:
            stream.close()

    def answer(self, source: str, probabilities: NDArray[np.float64]) -> Prediction:
        """The prediction for one picture's probabilities (classes,)."""
        order = np.argsort(-probabilities, kind="stable")
        given = self.decide(probabilities[None])[0]
        labels = tuple(self.classes[i] for i in order if given[i])
        named = {self.classes[i]: float(probabilities[i]) for i in order}
        return Prediction(source, labels, named, self.task == "multi")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the classifier as one safetensors file, checksummed; it appears whole or not at all."""
        from safetensors.torch import save

        tensors = {f"backbone.{name}": tensor for name, tensor in self.backbone.state_dict().items()}
        tensors |= {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        described = {
            "schema": SCHEMA,
            "sha256": UNSEALED,
            "backbone": self.backbone.spec.to_json(),
            "head": _describe_head(self.head),
            "classes": list(self.classes),
            "task": self.task,
            "temperature": self.temperature,
            "thresholds": list(self.thresholds),
            "limits": {"pixels": self.limits.pixels, "bytes": self.limits.bytes},
            "provenance": dict(self.provenance),
        }
        content = save({name: t.contiguous() for name, t in tensors.items()}, {"headstart": json.dumps(described)})
        write_whole(Path(path), seal(content))


def load(path: str | os.PathLike[str], language: Language | None = None) -> Classifier:
    """The classifier in a run folder or `model.safetensors`; `imagenet` is the stock one with a thousand classes.

    Loading runs no code from the file.

    Args:
        path: the run folder or file, or `imagenet`.
        language: of the stock classifier's class names, English (en) or Chinese (zh).

    Raises:
        UsageError: for a language with a classifier that has its own class names.
        ModelFileError: no such file, or the file cannot be read.
        CorruptModel: a byte was changed, or the file is cut short.
        ForeignModel: headstart did not write it.
        NewerModel: a later version wrote it.
    """
    if os.fspath(path) == "imagenet" and not Path(path).exists():
        return imagenet(language=language or "en")
    if language is not None:
        why = f"{os.fspath(path)!r} has class names of its own"
        raise UsageError("lang", why, "Leave it out, or give `imagenet`.")
    file = Path(path, "model.safetensors") if Path(path).is_dir() else Path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        why = error.strerror or type(error).__name__
        remedy = "Give a run folder or a model.safetensors that `headstart train` wrote."
        raise ModelFileError(file, f"cannot be opened ({why})", remedy) from error
    described = _read_header(file, content)
    return _assemble(file, content, described)


def imagenet(backbone: str = zoo.DEFAULT, language: Language = "en") -> Classifier:
    """The stock classifier: a packaged backbone with its own last layer, and ImageNet's thousand classes by name."""
    body = backbones.load(backbones.locate(backbone))
    weight, bias = backbones.imagenet_head(backbone)
    names = labels.imagenet_names(language)
    return Classifier(body, _linear(weight, bias), names, provenance={"weights": body.spec.weights})


def _read_header(file: Path, content: bytes) -> dict[str, Any]:
    """The description in a model file, after its length and checksum were verified."""
    remedy = "Copy it again from where it was trained."
    foreign = ForeignModel(file, "was not written by headstart", "Give a run folder or its model.safetensors.")
    # safetensors: 8 bytes of length, then that much JSON with the place of every tensor, then the tensors
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        described: dict[str, Any] = json.loads(header.pop("__metadata__")["headstart"])
        size = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        sha256, schema = str(described["sha256"]), int(described["schema"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        if _MARK not in content[:65536]:
            raise foreign from error
        raise CorruptModel(file, "is damaged or cut short (its header cannot be read)", remedy) from error
    if len(content) < size:
        raise CorruptModel(file, f"is cut short ({len(content)} of {size} bytes)", remedy)
    if not holds_seal(content, sha256):
        raise CorruptModel(file, "is damaged (its checksum does not match)", remedy)
    if schema > SCHEMA:
        why = f"has schema {schema}, this version knows up to {SCHEMA}"
        raise NewerModel(file, why, "Upgrade: pip install -U headstart")
    return described


def _assemble(file: Path, content: bytes, described: Mapping[str, Any]) -> Classifier:
    from safetensors.torch import load as load_tensors

    try:
        tensors = load_tensors(content)
        state = {name[9:]: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
        head = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("head.")}
        return Classifier(
            Backbone(Spec.from_json(described["backbone"]), state),
            _build_head(described["head"], head),
            tuple(described["classes"]),
            described["task"],
            described["temperature"],
            tuple(described["thresholds"]),
            Limits(**described["limits"]),
            described["provenance"],
        )
    except HeadstartError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        why = f"lacks what a model needs ({type(error).__name__}: {str(error).splitlines()[0]})"
        raise CorruptModel(file, why, "Copy it again from where it was trained.") from error


def _describe_head(head: nn.Module) -> dict[str, Any]:
    if isinstance(head, NearestNeighbours):
        return {"kind": "knn", "classes": head.classes, "k": head.k}
    if isinstance(head, nn.Linear) and head.bias is not None:
        return {"kind": "linear"}
    if isinstance(head, nn.Sequential) and all(map(_is_known, head)):
        names = {kind: name for name, kind in _LAYERS.items()}
        return {"kind": "layers", "layers": [names[type(layer)] for layer in head]}
    raise TypeError(f"a head of {type(head).__name__} cannot be saved: Linear, NearestNeighbours, or a known sequence")


def _is_known(layer: nn.Module) -> bool:
    """Whether a layer's kind and tensors are all there is to it."""
    if type(layer) not in _LAYERS.values():
        return False
    if isinstance(layer, nn.Linear):
        return layer.bias is not None
    if isinstance(layer, nn.BatchNorm1d):
        return layer.eps == 1e-5 and layer.affine and layer.track_running_stats
    return getattr(layer, "alpha", 1.0) == 1.0


# What a head with several layers may consist of. Dropout does nothing in a trained head, and keeps the layers' numbers.
_LAYERS: dict[str, type[nn.Module]] = {
    "linear": nn.Linear,
    "batch_norm": nn.BatchNorm1d,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "dropout": nn.Dropout,
}


def _build_head(described: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    if described["kind"] == "knn":
        return NearestNeighbours(
            state["vectors"], state["labels"], state["mean"], state["scale"], described["classes"], described["k"]
        ).eval()
    if described["kind"] == "linear":
        return _linear(state["weight"], state["bias"])
    layers: list[nn.Module] = []
    for number, name in enumerate(described["layers"]):
        if name == "linear":
            layers.append(_linear(state[f"{number}.weight"], state[f"{number}.bias"]))
        elif name == "batch_norm":
            layers.append(nn.BatchNorm1d(len(state[f"{number}.weight"])))
        else:
            layers.append(_LAYERS[name]())
    head = nn.Sequential(*layers)
    head.load_state_dict(dict(state))
    return head.eval().requires_grad_(False)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return layer.eval().requires_grad_(False)


def predict(
    run: str | os.PathLike[str] | Classifier,
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    track: Callable[[Iterable[Picture], int], Iterable[Picture]] = lambda pictures, total: pictures,
    **settings: Any,
) -> Generator[Prediction, None, None]:
    """Predictions for picture files, folders, globs and archives, in order, one at a time.

    Args:
        run: a run folder, a `model.safetensors`, `imagenet`, or a classifier.
        paths: what to look at; files in folders that are no pictures are passed over.
        track: wraps the pictures to show progress; called with them and their number.
        **settings: `device` and `precision`.

    Raises:
        DataError: where the paths hold no picture.
    """
    if other := settings.keys() - {"device", "precision"}:
        raise ConfigError(
            "predict", f"{', '.join(sorted(other))} cannot be set here", "Give device and precision only."
        )
    config = configs.resolve(None, settings)
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files, others = find_pictures(given)
    if not files:
        names = ", ".join(os.fspath(path) for path in given)
        raise DataError(names, f"holds no pictures ({others} other files)", "Give picture files or folders of them.")
    if others:
        log.info("%d files that are no pictures were passed over", others)
    classifier = run if isinstance(run, Classifier) else load(run)
    return classifier.predict(files, device=config.model.device, precision=config.model.precision, track=track)
