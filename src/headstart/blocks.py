"""A network's blocks in the order they run: what can be frozen up to a point, and given learning rates by depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headstart.config import did_you_mean
from headstart.errors import BackboneError, UsageError

BODY = "body"  # all blocks, as a part with its own learning rate


@dataclass(frozen=True)
class Block:
    """A block and the names of the modules in it that are layers, or hold parameters or buffers of their own."""

    name: str
    modules: tuple[str, ...]
    within: str = ""  # what stands before the name in the modules' own names, where the network is wrapped


def blank(network: nn.Module, size: int) -> Tensor:
    """A blank picture for a network, (1, 3, size, size), where its weights are and in their number format."""
    return next(network.parameters(), torch.zeros(0)).new_zeros(1, 3, size, size)


def run(network: nn.Module, pictures: Tensor) -> Tensor:
    """What a network gives for pictures (n, 3, size, size), without gradients.

    Raises:
        BackboneError: where it does not run on them, as many transformers take pictures of their own size only.
    """
    try:
        with torch.no_grad():
            given: Tensor = network(pictures)
    # What networks raise for pictures of another size than theirs.
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        reason = str(error).split("\n")[0].rstrip(".") or type(error).__name__
        why = f"does not run on pictures of {pictures.shape[-1]} pixels ({reason})"
        remedy = "If you gave --size, leave it out; else choose another network."
        raise BackboneError(type(network).__name__, why, remedy) from error
    return given


def find_blocks(network: nn.Module, size: int) -> tuple[Block, ...]:
    """A network's blocks, from its input to its output.

    The network is run once: layers are taken in the order they are called. A block is a child of the network, or a
    child's child where the child is a sequence (`layer1.0`, `features.3`) or holds little but one (`encoder.layers.0`);
    a norm or dropout by itself belongs to what it follows. What belongs to no layer, such as position embeddings, is in
    the first block; layers that are never called come last. A block that the network calls `head` is called
    `backbone.head`, as `head` is the new one.

    Args:
        network: pictures (n, 3, size, size) -> features (n, dim); in evaluation mode.
        size: side of its input in pixels.
    """
    found: dict[str, list[str]] = {}
    loose: list[str] = []
    for name in _run_order(network, size):
        key = _key_of(network, name)
        if not name:
            loose.append(name)
        elif key not in found and _is_norm(network.get_submodule(key)):
            (found[next(reversed(found))] if found else loose).append(name)
        else:
            found.setdefault(key, []).append(name)
    names = [*found] or [""]
    found[names[0]] = [*loose, *found.get(names[0], [])]
    # What a network calls its head is not the new head, whose name is `head`.
    shown = {name: f"backbone.{name}" if _is_in(name, "head") else name for name in names}
    return tuple(Block(shown[name], tuple(found[name])) for name in names)


def _run_order(network: nn.Module, size: int) -> list[str]:
    """The names of layers and of other modules with tensors of their own, as they are first called."""
    own = [name for name, module in network.named_modules() if _has_tensors(module) or not any(module.children())]
    called: dict[str, None] = {}
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
        for name in own
    ]
    try:
        run(network, blank(network, size))
    finally:
        for hook in hooks:
            hook.remove()
    return [*called, *(name for name in own if name not in called)]


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _key_of(network: nn.Module, module_name: str) -> str:
    if not module_name:
        return ""
    parts = module_name.split(".")
    child = network.get_submodule(parts[0])
    if isinstance(child, _SEQUENCES):
        return ".".join(parts[:2])
    body = next((name for name, inside in child.named_children() if _is_body(child, inside)), None)
    if body is None:
        return parts[0]
    # What stands before or after the long sequence is by itself.
    return ".".join(parts[:3]) if parts[1:2] == [body] else module_name


_SEQUENCES = (nn.Sequential, nn.ModuleList)


def _is_body(child: nn.Module, inside: nn.Module) -> bool:
    """Whether a part of a child is a long sequence that holds most of it, as the layers of an encoder do."""
    if not isinstance(inside, _SEQUENCES) or len(inside) < 4:
        return False
    return 2 * sum(p.numel() for p in inside.parameters()) > sum(p.numel() for p in child.parameters())


def _is_norm(module: nn.Module) -> bool:
    """Whether a module scales and shifts, drops out or is an activation: it has no matrix."""
    return all(parameter.ndim <= 1 for parameter in module.parameters())


def find_end(network: nn.Module, block: Block) -> str:
    """The module whose output is a block's: the block itself, or the last of the layers that make it up."""
    name = block.within + block.name.removeprefix("backbone.")
    return name if any(network.get_submodule(name).children()) else block.modules[-1]


def count_frozen(blocks: Sequence[Block], freeze: str) -> int:
    """How many blocks, from the input, a setting freezes: "" none, a number, `all`, or up to and with a named block.

    Raises:
        UsageError: for a name that no block has or begins with, or a number over the number of blocks.
    """
    names = [block.name for block in blocks]
    if freeze in ("", "all"):
        return len(blocks) if freeze else 0
    if freeze.isascii() and freeze.isdigit():
        if int(freeze) <= len(blocks):
            return int(freeze)
        raise UsageError(
            "freeze", f"{freeze} is over the network's {len(blocks)} blocks", f"Blocks: {list_names(names)}."
        )
    matches = [number for number, name in enumerate(names, 1) if _is_in(name, freeze)]
    if not matches:
        why = f"{freeze!r} is no block of the network{did_you_mean(freeze, names)}"
        raise UsageError("freeze", why, f"Blocks: {list_names(names)}.")
    return matches[-1]


def read_rates(text: str, blocks: Sequence[Block]) -> dict[str, float]:
    """Block name -> learning rate, of a setting such as `body=1e-5,blocks.6=1e-4`.

    `head` names the head, `body` all blocks; a later entry wins.

    Raises:
        UsageError: for what cannot be read, or names no block.
    """
    rates: dict[str, float] = {}
    names = [*(block.name for block in blocks), "head"]
    for entry in filter(None, (part.strip() for part in text.split(","))):
        part, _, value = entry.partition("=")
        try:
            rate = float(value)
        except ValueError:
            rate = -1.0
        if not 0.0 <= rate < 1e3:
            raise UsageError("rates", f"{entry!r} is no NAME=RATE", "Write them as body=1e-5,blocks.6=1e-4.")
        matches = _match(part.strip(), names)
        if not matches:
            why = f"{part!r} is no block of the network{did_you_mean(part, names)}"
            raise UsageError("rates", why, f"Blocks: {list_names(names)}.")
        rates.update(dict.fromkeys(matches, rate))
    return rates


def leave_rates(text: str, blocks: Sequence[Block]) -> str:
    """What a setting of rates says of the head and of some blocks, the last ones of those that it was written for."""
    names = [*(block.name for block in blocks), "head"]
    return ",".join(entry for entry in text.split(",") if _match(entry.partition("=")[0].strip(), names))


def _match(part: str, names: Sequence[str]) -> list[str]:
    """The names, of blocks and of the head, the last, that a part of rates means."""
    return [*names[:-1]] if part == BODY else [name for name in names if _is_in(name, part)]


def _is_in(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def list_names(names: Sequence[str]) -> str:
    """Names for an error message; of many, the first and the last."""
    return ", ".join(names) if len(names) <= 24 else f"{', '.join(names[:12])} ... {', '.join(names[-6:])}"
