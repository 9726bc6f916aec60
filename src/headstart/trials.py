"""What is measured before training: the fastest way to compute a step, and the learning rate to train with."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headstart import files
from headstart.blocks import Block
from headstart.config import EngineConfig
from headstart.data import Task
from headstart.engine import Adapted, Training, kept_memory
from headstart.errors import DivergedError, TrainingError
from headstart.images import Preprocess
from headstart.material import Material
from headstart.timing import Layout, Pace

log = logging.getLogger(__name__)

STEPS = 3  # that are timed, after one that is not
MOST_PICTURES = 16  # a timed step: the ratios hardly change beyond
RANGE = (1e-7, 1.0)  # learning rates of the range test
RANGE_STEPS = 100
SMOOTHING, UNSMOOTHED = 0.9, 10


def find_pace(
    model: Adapted,
    blocks: Sequence[Block],
    settings: EngineConfig,
    preprocess: Preprocess,
    task: Task,
    precision: str,
    name: str,
    cache: Path | None,
    activations: NDArray[np.float16] | None = None,
    fastest: str = "bfloat16",
) -> Pace:
    """The layout in which a training step is fastest, found once per network, settings and machine, and its pace now.

    Neither bfloat16 nor channels-last is fastest everywhere: depthwise convolutions, for one, have slow backward passes
    in bfloat16.

    Args:
        model: what will be trained, on its device; it is not changed.
        blocks: its backbone's.
        settings: of the engine, every one decided.
        preprocess: the network's input.
        task: one label a picture, or several.
        precision: `auto`, or the only one to be considered.
        name: of the network, for the cache.
        cache: folder where layouts are kept; None: nowhere. How fast one is, is timed each time: the machine may have
            had other things to do.
        activations: what stands for each picture where the first blocks do not run, (...); None: pixels.
        fastest: the number format that the device is fastest in: a CPU without bfloat16 takes ten times as long in it.
    """
    device = next(model.parameters()).device
    batch = min(settings.batch_size, MOST_PICTURES)
    settings = dataclasses.replace(settings, batch_size=batch, accumulate=1, sampling="plain", ema=0.0)
    file, known, layouts = None, None, _candidates(device, precision, fastest)
    if cache is not None:
        side = preprocess.size if activations is None else activations.shape
        trained = settings.freeze, settings.rates, settings.batch_norm, settings.optimizer
        described = (name, side, batch, *trained, precision)
        key = hashlib.sha256(json.dumps([*described, _describe_machine(device)]).encode()).hexdigest()[:32]
        file = cache / f"layout-{key}.json"
        known = files.recall(file, lambda values: Layout(**values), "the steps are timed again")
        if known is not None:
            log.info("training in %s, the fastest when all were timed", known)
            layouts = [known]
    shown, normalise = _imagine(preprocess) if activations is None else (activations, Tensor.float)
    seconds: dict[Layout, float] = {}
    with kept_memory():
        for layout in layouts:
            seconds[layout] = _time_steps(copy.deepcopy(model), blocks, settings, layout, shown, normalise, task)
    best = min(seconds, key=seconds.__getitem__)
    if math.isinf(seconds[best]):
        why = f"a training step runs in none of: {'; '.join(map(str, seconds))}"
        raise TrainingError(name, why, "Give a smaller --batch-size, or another --precision or --device.")
    speeds = "; ".join(f"{layout}: {batch / taken:.1f}" for layout, taken in seconds.items())
    log.info("training steps timed, pictures a second: %s", speeds)
    if file is not None and known is None:
        files.remember(file, best, "the steps will be timed again")
    return Pace(best, seconds[best] / batch)


def _candidates(device: torch.device, precision: str, fastest: str) -> list[Layout]:
    if device.type == "cpu":
        halves = [Layout("bfloat16")] if fastest == "bfloat16" else []
        layouts = [Layout("float32", False), Layout("float32"), *halves]
    elif device.type == "cuda":
        layouts = [Layout("float32"), Layout("bfloat16"), Layout("float16")]
    else:
        layouts = [Layout("float32", False), Layout("float32")]
    chosen = [layout for layout in layouts if precision in ("auto", layout.precision)]
    return chosen or [Layout(precision)]


def _describe_machine(device: torch.device) -> list[str]:
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    return [device.type, processor, str(torch.get_num_threads()), torch.__version__]


def _processor_name() -> str:
    """The processor's name and abilities: machines may share the first and differ in the others."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    return " ".join(next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags"))


def _imagine(preprocess: Preprocess) -> tuple[NDArray[Any], Callable[[Tensor], Tensor]]:
    """(pixels of a picture that was never taken, what makes them a network's input)."""
    pixels = np.random.default_rng(0).integers(0, 256, (preprocess.size, preprocess.size, 3), np.uint8)
    return pixels, preprocess.normalise


def _time_steps(
    model: Adapted,
    blocks: Sequence[Block],
    settings: EngineConfig,
    layout: Layout,
    shown: NDArray[Any],
    normalise: Callable[[Tensor], Tensor],
    task: Task,
) -> float:
    """Seconds of a step in a layout, the least of several; infinite where it does not run."""
    batch = settings.batch_size
    classes = next(reversed(list(model.head.parameters()))).shape[0]
    targets = np.eye(classes, dtype=bool)[np.arange(batch * (STEPS + 1)) % classes]
    material = Material(lambda *_: shown, normalise, targets, task)
    training = Training(model, blocks, settings, layout, material, lambda *_: {})
    training.state.epoch = 0
    parallel, times = training.thaw(), []
    try:
        for window in training.show():
            start = time.perf_counter()
            training.take_step(parallel, window)
            times.append(time.perf_counter() - start)
    except (RuntimeError, TypeError, DivergedError) as error:  # no kernel for a layer in this format, or it overflows
        log.info("training in %s is not possible: %s", layout, str(error).splitlines()[0])
        return math.inf
    return min(times[1:])  # what else the machine does only adds


@dataclass(frozen=True)
class RangeTest:
    """Losses while the learning rate rises from step to step, and the rate that they suggest."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]  # smoothed
    suggested: float

    def to_json(self) -> dict[str, object]:
        """The test as JSON values."""
        return dataclasses.asdict(self)


def find_rate(training: Training) -> RangeTest:
    """The learning-rate range test (Smith, 2017): the rate rises by a factor each step until the loss explodes.

    Suggested is a tenth of the rate at which the smoothed loss was least.

    Args:
        training: on a copy of the model; it is used up. Its highest rate must be 1, and its schedule constant.
    """
    low, high = RANGE
    rates: list[float] = []
    smoothed: list[float] = []
    running, state = 0.0, training.state
    state.epoch = 0
    with kept_memory():
        while len(rates) < RANGE_STEPS:
            parallel = training.thaw()
            for window in training.show():
                rate = low * (high / low) ** (len(rates) / (RANGE_STEPS - 1))
                before = state.totals[0], state.totals[2]
                try:
                    training.take_step(parallel, window, rate)
                except DivergedError:  # the test has seen what it wanted to
                    return _suggest(rates, smoothed)
                loss = (state.totals[0] - before[0]) / (state.totals[2] - before[1])
                running = SMOOTHING * running + (1 - SMOOTHING) * loss
                rates.append(rate)
                smoothed.append(running / (1 - SMOOTHING ** len(rates)))
                if len(rates) == RANGE_STEPS or smoothed[-1] > 4 * min(smoothed):
                    return _suggest(rates, smoothed)
            # What the last epoch trains is all that the optimiser holds.
            state.epoch, state.step = min(state.epoch + 1, training.settings.epochs - 1), 0
    return _suggest(rates, smoothed)


def _suggest(rates: Sequence[float], smoothed: Sequence[float]) -> RangeTest:
    if len(rates) < 3:
        raise TrainingError("--find-lr", "the loss is not finite at the least rate", "Give --learning-rate yourself.")
    # The first few losses are hardly smoothed: one lucky batch is no reason for a rate.
    lowest = min(range(min(UNSMOOTHED, len(smoothed) - 1), len(smoothed)), key=smoothed.__getitem__)
    return RangeTest(tuple(rates), tuple(smoothed), rates[lowest] / 10)
