"""Features at several depths: the pooled outputs of a network's blocks, beside or instead of its own features."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headstart.blocks import Block, blank, find_blocks, find_end, list_names
from headstart.config import did_you_mean
from headstart.errors import UsageError
from headstart.verdicts import FINAL

CHANNELS_LAST = "torchvision.models.swin_transformer"  # where networks do not say that their maps are so


class Tapped(nn.Module):
    """A network whose features are the pooled outputs of some of its blocks, side by side: (n, sum of widths).

    Maps are averaged over places, tokens (n, tokens, channels) over tokens, see `pool`. Several threads may run it at
    once, so what its hooks catch is kept by thread.

    Args:
        inner: pictures (n, 3, size, size) -> features (n, dim); in evaluation mode.
        taps: names of blocks as `find_blocks` gives them, and `final` for the network's own features.
        size: side of its input in pixels.

    Raises:
        UsageError: for a name that no block has; in `look`, for a block that gives no tensor of features.
    """

    def __init__(self, inner: nn.Module, taps: Sequence[str], size: int) -> None:
        super().__init__()
        blocks = {block.name: block for block in find_blocks(inner, size)}
        for tap in taps:
            if tap != FINAL and tap not in blocks:
                names = [*blocks, FINAL]
                why = f"{tap!r} is no block of the network{did_you_mean(tap, names)}"
                raise UsageError("taps", why, f"Blocks: {list_names(names)}.")
        self.inner, self.taps = inner, tuple(taps)
        self._last = getattr(inner, "output_fmt", "NCHW") == "NHWC" or type(inner).__module__ == CHANNELS_LAST
        self._caught = _Shelf()
        for tap in taps:
            if tap != FINAL:
                module = inner.get_submodule(find_end(inner, blocks[tap]))
                module.register_forward_hook(_Catch(self._caught, tap))

    def forward(self, pictures: Tensor) -> Tensor:
        """Features (n, sum of widths) of pictures (n, 3, size, size)."""
        return torch.cat(self.look(pictures), 1)

    def look(self, pictures: Tensor) -> list[Tensor]:
        """The features of each tap, (n, width)."""
        caught = self._catch(pictures)
        for tap in self.taps:
            if tap not in caught:
                why = f"{tap!r} gives no tensor of features when the network runs"
                raise UsageError("taps", why, "Name another block.")
        return [pool(caught[tap], self._last) for tap in self.taps]

    def list_usable(self, pictures: Tensor) -> tuple[str, ...]:
        """The taps that give features; several scales at once, or a block that is passed by, give none."""
        caught = self._catch(pictures)
        return tuple(tap for tap in self.taps if tap in caught)

    def _catch(self, pictures: Tensor) -> dict[str, Tensor]:
        """What the taps give, of those that give what can be pooled."""
        caught = self._caught[threading.get_ident()] = {}
        try:
            caught[FINAL] = self.inner(pictures)
        finally:
            del self._caught[threading.get_ident()]
        return {tap: output for tap, output in caught.items() if can_pool(output)}


def find_depths(network: nn.Module, size: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(taps worth a look, their widths): blocks at half, two thirds and five sixths of the depth, and `final`.

    Only blocks that give a tensor of features count: the scales of some networks run beside each other.

    Args:
        network: pictures (n, 3, size, size) -> features (n, dim), without taps; in evaluation mode.
        size: side of its input in pixels.
    """
    names = [block.name for block in find_blocks(network, size)][:-1]  # the last one's mean often is `final` itself
    example = blank(network, size)
    with torch.no_grad():
        names = list(Tapped(copy.deepcopy(network), names, size).list_usable(example))
        chosen = dict.fromkeys(names[len(names) * part // 6] for part in (3, 4, 5)) if names else {}
        tapped = Tapped(copy.deepcopy(network), (*chosen, FINAL), size)
        return tapped.taps, tuple(pooled.shape[1] for pooled in tapped.look(example))


def see_blocks(network: nn.Module, size: int) -> tuple[Block, ...]:
    """The blocks that a network's features come from, with taps or without; see `find_blocks`.

    What comes after the deepest tap has no part in the features, and nothing to learn.
    """
    if not isinstance(network, Tapped):
        return find_blocks(network, size)
    found = find_blocks(network.inner, size)
    if FINAL not in network.taps:
        found = found[: 1 + max(place for place, block in enumerate(found) if block.name in network.taps)]
    return tuple(
        Block(block.name, tuple(f"inner.{name}".removesuffix(".") for name in block.modules), "inner.")
        for block in found
    )


def untap(network: nn.Module) -> nn.Module:
    """A network without its taps."""
    return network.inner if isinstance(network, Tapped) else network


class _Shelf(dict[int, dict[str, Tensor]]):
    """Thread -> tap -> what was caught; copies of a network have it in common, as a thread runs one at a time."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shelf:
        return self


class _Catch:
    """A hook that keeps a block's output for the thread that is running it; it goes along when a network is copied."""

    def __init__(self, caught: _Shelf, tap: str) -> None:
        self._caught, self._tap = caught, tap

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if threading.get_ident() in self._caught:
            self._caught[threading.get_ident()][self._tap] = output


def can_pool(output: object) -> bool:
    """Whether a block's output is a tensor that `pool` knows: (n, channels), tokens or maps."""
    return isinstance(output, Tensor) and output.is_floating_point() and 2 <= output.ndim <= 4


def pool(output: Tensor, channels_last: bool = False) -> Tensor:
    """The mean (n, channels) over places or tokens of a block's output; what is flat already stays as it is.

    Pictures are square, so of a map's sides the two that are equal are its places.

    Args:
        output: (n, channels), tokens (n, tokens, channels), maps (n, channels, h, h) or (n, h, h, channels).
        channels_last: which of the two a map is, where it has as many channels as places in a row.
    """
    if output.ndim == 4:
        _, first, second, third = map(int, output.shape)
        places_first = channels_last if first == third else first == second
        return output.mean((1, 2) if places_first else (2, 3))
    return output.mean(1) if output.ndim == 3 else output
