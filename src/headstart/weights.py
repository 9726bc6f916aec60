"""Weights files: where they lie, how they are fetched, and how they are read without running code in them."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from headstart import downloads
from headstart.errors import WeightsError

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where a library's weights come from: a hub's repository, or an address."""

    kind: Literal["hub", "url"]
    place: str
    files: tuple[str, ...]

    def describe(self) -> str:
        """The origin in words."""
        return f"{self.place} ({self.files[0]})" if self.kind == "hub" else self.place

    def address(self, file: str) -> str:
        """The address of one of its files."""
        if self.kind == "url":
            return self.place
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.place, file)


def find(origin: Origin, folder: Path) -> Path | None:
    """The file with a network's weights on this machine: in our folder, or in a cache of the library's own."""
    for file in origin.files:
        if own_place(origin, file, folder).is_file():
            return own_place(origin, file, folder)
    if origin.kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        cached = (try_to_load_from_cache(origin.place, file) for file in origin.files)
        return next((Path(path) for path in cached if isinstance(path, str)), None)
    import torch

    path = Path(torch.hub.get_dir(), "checkpoints", origin.files[0])
    return path if path.is_file() else None


def own_place(origin: Origin, file: str, folder: Path) -> Path:
    """Where a file of an origin lies in our folder, fetched or laid there by hand."""
    return folder / (file if origin.kind == "url" else origin.place.replace("/", "--") + Path(file).suffix)


def missing(name: str, origin: Origin, folder: Path, why: str) -> WeightsError:
    """The error for weights that are not at hand: it names the file to put where."""
    source = f"{origin.files[0]} of {origin.place}" if origin.kind == "hub" else origin.place
    place = own_place(origin, origin.files[0], folder)
    return WeightsError(name, why, f"Go online, or put {source} at {place}, or give --weights FILE.")


def fetch(name: str, origin: Origin, folder: Path) -> Path:
    """Fetch weights into our folder, with one retry; only called for a network that the user named.

    Raises:
        WeightsError: where they cannot be fetched.
    """
    log.info("weights: fetching %s", origin.describe())
    reason = ""
    for _ in range(2):
        for file in origin.files:
            place = own_place(origin, file, folder)
            in_name = re.search(r"-([0-9a-f]{8,})\.", place.name)  # torch's convention: how the SHA-256 begins
            try:
                return downloads.attempt(origin.address(file), place, sha256=in_name[1] if in_name else "")
            except OSError as error:  # a file that is not there is tried by its other name
                reason = downloads.explain(error)
    raise missing(name, origin, folder, f"could not be fetched ({reason[:120]})")


def read(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file (.safetensors, or a `state_dict` in a .pth) by name.

    Raises:
        WeightsError: for a file that is damaged, holds no tensors, or could run code.
    """
    import torch

    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return _unwrapped(load_file(file), file)
        return _unwrapped(torch.load(file, map_location="cpu", weights_only=True), file)
    except WeightsError:
        raise
    # damaged files raise whatever their bytes lead zipfile, pickle or struct to
    except Exception as error:
        reason = " ".join(str(error).split())
        if "weights_only" in reason:
            reason = "it holds more than tensors, and loading that could run code"
        why = f"cannot be read ({reason[:150] or type(error).__name__})"
        raise WeightsError(file, why, "Give a .safetensors or .pth file that holds a state_dict.") from error


def _unwrapped(content: Any, file: Path) -> dict[str, torch.Tensor]:
    """The state_dict in a checkpoint, under the usual keys, without the prefixes that wrappers leave behind."""
    import torch

    for key in ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "network"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise WeightsError(file, f"holds a {type(content).__name__}, not a state_dict", "Save model.state_dict().")
    state = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if not state:
        raise WeightsError(file, "holds no tensors", "Save model.state_dict().")
    for prefix in ("module.", "_orig_mod.", "module.", "model.", "backbone.", "encoder."):
        if all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def put(module: nn.Module, state: Mapping[str, torch.Tensor], *, assign: bool = False) -> None:
    """Put weights into a module, as `load_state_dict` does, and keep what else it knows of itself.

    Some modules, such as torchvision's MNASNet, refuse weights that do not name the version of their layout: it travels
    beside the tensors, and is lost where they are copied or stored. Here all are of the module's own version.

    Args:
        module: whose weights they become.
        state: all its parameters and buffers by name.
        assign: whether the tensors themselves become the module's, instead of being copied into its own.
    """
    versioned = OrderedDict(state)
    versioned._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(versioned, assign=assign)


def rename_lukemelas(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """EfficientNet-Lite weights in the names of lukemelas' implementation as timm names them, without the last layer.

    Both count the same blocks; timm groups them into stages, and a stage ends where the number of channels changes.
    """
    stem = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    places: dict[str, str] = {}
    stage, position, channels = -1, 0, -1
    for block in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("_blocks."))):
        width = len(state[f"_blocks.{block}._project_conv.weight"])
        stage, position = (stage, position + 1) if width == channels else (stage + 1, 0)
        channels, places[str(block)] = width, f"blocks.{stage}.{position}"
    renamed = {}
    for key, tensor in state.items():
        layer, *rest = key.split(".")
        if layer == "_blocks":
            number, part, *rest = rest
            expands = f"_blocks.{number}._expand_conv.weight" in state
            layer = f"{places[number]}.{_BLOCK_PARTS[expands][part]}"
        elif layer == "_fc":
            continue
        else:
            layer = stem[layer]
        renamed[".".join((layer, *rest))] = tensor
    return renamed


_BLOCK_PARTS = {
    True: {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    },
    False: {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
}
