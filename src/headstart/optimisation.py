"""What an optimiser is given: which parameters, at which rates, and how rates move with the step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headstart.blocks import Block, count_frozen, leave_rates, read_rates
from headstart.config import EngineConfig
from headstart.errors import UsageError

# Smith (2018), with torch's own numbers: the rate starts at a 25th, ends at a 10,000th of that.
CYCLE_RISE, CYCLE_START, CYCLE_END = 0.3, 25.0, 1e4
CYCLE_MOMENTUM = (0.85, 0.95)


@dataclass(frozen=True)
class Parts:
    """What is trained of a model, and how fast; the model's children are `backbone` and `head`."""

    names: tuple[str, ...]  # of the blocks, from the input; the last is `head`
    modules: tuple[tuple[str, ...], ...]  # of each block, as the model names them
    rates: tuple[float, ...]  # highest learning rate of each; 0: never trained
    frozen: int  # how many of the first blocks stand still at the start

    def trained(self, epoch: int, unfreeze_epochs: int) -> tuple[bool, ...]:
        """Which blocks are trained in an epoch (from 0); with gradual unfreezing, later epochs train more."""
        thawed = epoch // unfreeze_epochs if unfreeze_epochs else 0
        return tuple(number >= self.frozen - thawed and rate > 0 for number, rate in enumerate(self.rates))


def divide(model: nn.Module, blocks: Sequence[Block], settings: EngineConfig) -> Parts:
    """The parts of a model by its blocks.

    The head has the learning rate; each block towards the input `layer_decay` times the next one's, unless `rates`
    names it. Small rates for what is pretrained, a larger one for what is new.

    Raises:
        UsageError: where `freeze` or `rates` name no block.
    """
    given, depth = read_rates(settings.rates, blocks), len(blocks)
    heads = tuple(f"head.{name}" if name else "head" for name, _ in model.get_submodule("head").named_modules())
    modules = [tuple(f"backbone.{name}" if name else "backbone" for name in block.modules) for block in blocks]
    rates = [
        given.get(block.name, settings.learning_rate * settings.layer_decay ** (depth - number))
        for number, block in enumerate(blocks)
    ]
    return Parts(
        (*(block.name for block in blocks), "head"),
        (*modules, heads),
        (*rates, given.get("head", settings.learning_rate)),
        count_frozen(blocks, settings.freeze),
    )


def leave_out_frozen(blocks: tuple[Block, ...], settings: EngineConfig) -> tuple[tuple[Block, ...], EngineConfig]:
    """(the blocks after the frozen ones, the settings by which these are trained by themselves)."""
    left = blocks[count_frozen(blocks, settings.freeze) :]
    return left, dataclasses.replace(settings, freeze="", rates=leave_rates(settings.rates, left))


def own_parameters(model: nn.Module, modules: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that these modules hold themselves, by their names in the model."""
    found = {}
    for module in modules:
        for name, parameter in model.get_submodule(module).named_parameters(recurse=False):
            found[f"{module}.{name}"] = parameter
    return found


def group_parameters(model: nn.Module, parts: Parts, settings: EngineConfig) -> list[dict[str, Any]]:
    """The optimiser's parameter groups: for each block that is trained at any time, what decays and what does not.

    Norms and biases (all parameters of one dimension or none) do not decay unless `decay_all` is set.

    Raises:
        UsageError: where nothing is trained at any time.
    """
    groups = []
    ever, seen = parts.trained(settings.epochs - 1, settings.unfreeze_epochs), set[int]()
    for modules, rate, trained in zip(parts.modules, parts.rates, ever, strict=True):
        if not trained:
            continue
        own = [parameter for parameter in own_parameters(model, modules).values() if id(parameter) not in seen]
        seen.update(map(id, own))  # weights that two layers share learn once
        plain = [] if settings.decay_all else [parameter for parameter in own if parameter.ndim <= 1]
        ids = {id(parameter) for parameter in plain}
        decaying = [parameter for parameter in own if id(parameter) not in ids]
        for parameters, decay in ((decaying, settings.weight_decay), (plain, 0.0)):
            if parameters:
                groups.append({"params": parameters, "highest": rate, "weight_decay": decay})
    if not groups:
        raise UsageError("rates", "nothing is left to be trained", "Freeze less, or give the head a rate over 0.")
    return groups


def make_optimizer(groups: list[dict[str, Any]], settings: EngineConfig) -> torch.optim.Optimizer:
    """The optimiser of the settings; its rates are set before each step."""
    for group in groups:
        group["lr"] = group["highest"]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum)
    return (torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW)(groups)


def rate_at(step: int, steps_per_epoch: int, settings: EngineConfig) -> float:
    """The share of the highest learning rate at an optimiser step (from 0, over all epochs)."""
    total = steps_per_epoch * settings.epochs
    if settings.schedule == "step":
        return settings.step_factor ** (step // steps_per_epoch // settings.step_epochs)
    if settings.schedule == "cosine":
        rising = math.floor(min(settings.warmup_epochs, settings.epochs / 2) * steps_per_epoch)  # and then it falls
        if step < rising:
            return (step + 1) / (rising + 1)
        return _between(1.0, 0.0, (step - rising) / max(1, total - rising))
    if settings.schedule == "one-cycle":
        peak = CYCLE_RISE * total - 1
        if step <= peak:
            return _between(1 / CYCLE_START, 1.0, step / peak)
        return _between(1.0, 1 / CYCLE_START / CYCLE_END, min(1.0, (step - peak) / max(1e-9, total - 1 - peak)))
    return 1.0


def momentum_at(step: int, steps_per_epoch: int, settings: EngineConfig) -> float | None:
    """The momentum (of Adam, its first beta) at a step of one-cycle: low where the rate is high; else None."""
    if settings.schedule != "one-cycle" or (settings.optimizer == "sgd" and not settings.momentum):
        return None
    total, (low, high) = steps_per_epoch * settings.epochs, CYCLE_MOMENTUM
    peak = CYCLE_RISE * total - 1
    if step <= peak:
        return _between(high, low, step / peak)
    return _between(low, high, min(1.0, (step - peak) / max(1e-9, total - 1 - peak)))


def _between(start: float, end: float, part: float) -> float:
    """From start to end along half a cosine wave."""
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def set_rates(
    optimizer: torch.optim.Optimizer,
    step: int,
    steps_per_epoch: int,
    settings: EngineConfig,
    share: float | None = None,
) -> None:
    """Give the optimiser its learning rates for a step, never under `least_rate`, and its momentum.

    `share` of the highest rates, where it is given, stands for what the schedule says.
    """
    if share is None:
        share = rate_at(step, steps_per_epoch, settings)
    momentum = momentum_at(step, steps_per_epoch, settings)
    for group in optimizer.param_groups:
        group["lr"] = max(group["highest"] * share, min(settings.least_rate, group["highest"]))
        if momentum is not None and "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        elif momentum is not None:
            group["momentum"] = momentum
