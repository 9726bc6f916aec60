"""One `Train` phase: the loop, its step, and what lets it go on exactly where it was stopped.

Whatever is random is a function of seed, epoch, step and picture, so no random state has to be kept: a run that was
killed and resumed ends with the same bits as one that was not, on the same processor with as many threads.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import logging
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from headstart import checkpoints, losses, optimisation
from headstart import weights as weights_files
from headstart.blocks import Block
from headstart.checkpoints import Checkpoint
from headstart.config import EngineConfig
from headstart.errors import DivergedError, TrainingError
from headstart.loading import ahead, count_cpus
from headstart.material import Batch, Material, Window, draw_windows, make_window
from headstart.metrics import is_better
from headstart.processes import Signals, World, share_statistics
from headstart.timing import Layout
from headstart.verdicts import can_win

log = logging.getLogger(__name__)

AHEAD_PICTURES = 512  # that are made ready ahead: 75 MB at 224 pixels, four times that where they are mixed
EMA_START = 10.0  # the average follows faster at first: its decay is at most (1 + step) / (10 + step)


class Adapted(nn.Module):
    """A backbone and a head: pictures (n, 3, size, size) -> logits (n, classes)."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (n, classes), float32 whatever the backbone computes in."""
        logits: Tensor = self.head(self.backbone(pictures).float())
        return logits


@dataclass(frozen=True)
class Step:
    """One optimiser step as it went; means are over the epoch's pictures so far."""

    phase: int
    epoch: int  # from 1
    step: int  # of the epoch, from 1
    steps: int  # in an epoch
    rate: float  # learning rate of the fastest part
    loss: float
    accuracy: float
    pictures: int  # so far in this epoch
    speed: float  # pictures a second, of this epoch so far


@dataclass(frozen=True)
class Epoch:
    """One finished epoch; epoch 0 is the state before the first step."""

    phase: int
    epoch: int
    loss: float
    accuracy: float
    select: Mapping[str, float]  # figures on the select pictures
    best: bool  # whether it is the best so far
    trainable: int  # parameters
    seconds: float


@dataclass
class _State:
    """What changes while training, beside tensors; JSON values."""

    epoch: int = -1  # finished epochs; -1: not even the start was measured
    step: int = 0  # optimiser steps done in the running epoch
    totals: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # loss, hits and pictures of the epoch
    best_epoch: int = -1
    best: float = math.nan
    losses: list[float] = field(default_factory=list)  # log-loss on select after each epoch, the start's first
    seconds: float = 0.0  # of the epoch
    spent: float = 0.0  # seconds of finished epochs


class Training:
    """A phase under way: `run` trains, and leaves the best epoch's weights in the model.

    Args:
        model: what is trained, on its device.
        blocks: its backbone's blocks.
        settings: of the engine, every one decided.
        layout: number format and memory layout of forward and backward passes.
        material: what is learned from.
        validate: (model, check) -> figures on the select pictures by name, `settings.best_by` among them; it calls
            `check` now and then, so that a signal is heeded.
        seed: of order, augmentation, mixing and dropout.
        phase: number of the phase in its plan.
        folder: where checkpoints are kept; None: nowhere.
        world: this process among others.
        seconds: that epochs may take together: none is begun that would take longer; None: as they will.
        keeps_start: whether the start is kept where no epoch is better than it; else training ends where it cannot come
            near the target any more.
        target: log-loss on select; None: that of the start.

    Where the folder holds a checkpoint of this phase, the phase is where it was then.
    """

    def __init__(
        self,
        model: Adapted,
        blocks: Sequence[Block],
        settings: EngineConfig,
        layout: Layout,
        material: Material,
        validate: Callable[[Adapted, Callable[[], None]], Mapping[str, float]],
        *,
        seed: int = 0,
        phase: int = 0,
        folder: Path | None = None,
        world: World = World(),
        seconds: float | None = None,
        keeps_start: bool = True,
        target: float | None = None,
    ) -> None:
        if layout.channels_last:
            model.to(memory_format=torch.channels_last)
        self.model, self.settings, self.layout = model, settings, layout
        self.material, self.validate = material, validate
        self.seed, self.phase, self.folder, self.world = seed, phase, folder, world
        self.seconds, self.keeps_start, self.target = seconds, keeps_start, target
        self.device, self.dtype = next(model.parameters()).device, getattr(torch, layout.precision)
        self.parts = optimisation.divide(model, blocks, settings)
        groups = optimisation.group_parameters(model, self.parts, settings)
        self.optimizer = optimisation.make_optimizer(groups, settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=layout.precision == "float16")
        self.average = copy.deepcopy(model) if settings.ema else None
        self.state, self.best = _State(), _copy(model.state_dict())
        weights = losses.weigh_classes(settings.class_weights, material.targets.sum(0).tolist())
        weights = None if weights is None else weights.to(self.device)
        self.loss = losses.make_loss(settings.loss, material.task == "multi", weights, settings.focal_gamma)
        self.steps = len(draw_windows(material, settings, seed, 0))
        self.signals, self.stopping = Signals(patient=world.size > 1), False
        self._saved, self._booked = time.monotonic(), time.perf_counter()
        self._resume()
        last = max(0, self.state.epoch - (self.state.step == 0))
        self.trainable = self._count(self.parts.trained(last, settings.unfreeze_epochs))  # in the last epoch begun

    def run(self) -> Generator[Step | Epoch, None, None]:
        """Train to the end, step by step.

        SIGINT and SIGTERM save at the next step, and then do what they did before.

        Raises:
            DivergedError: where the loss is not finite.
            TrainingError: where the disk is full, or something frozen has changed.
        """
        state, settings = self.state, self.settings
        with kept_memory(), self.signals:
            if state.epoch < 0:
                yield self._finish_epoch()
                self._check(save=True)
            while state.epoch < settings.epochs and not (self._is_stale() or self._is_lost() or self._is_late()):
                self._booked = time.perf_counter()
                parallel = self.thaw()
                still = _copy(self._still_tensors())
                with contextlib.closing(self.show()) as windows:
                    for window in windows:
                        yield self.take_step(parallel, window)
                        self._check(time.monotonic() - self._saved > 60 * settings.checkpoint_minutes)
                _compare(still, self._still_tensors())
                yield self._finish_epoch()
                self._check(save=True)  # after whoever takes the record has written it
            self._heed(alone=False)
        weights_files.put(self.model, self.best)
        self.model.eval().requires_grad_(False)

    # One optimiser step

    def take_step(self, parallel: nn.Module, window: Window, rate: float | None = None) -> Step:
        """The step along the gradients of a window's pictures, summed over forward passes and processes."""
        state, settings = self.state, self.settings
        place = state.epoch * self.steps + state.step
        optimisation.set_rates(self.optimizer, place, self.steps, settings, rate)
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        with torch.random.fork_rng(self._cuda()):
            torch.manual_seed(_draw_seed(self.seed, self.phase, place, self.world.rank))
            for number, batch in enumerate(window.batches, 1):
                last = number == len(window.batches) or self.world.size == 1
                with contextlib.nullcontext() if last else parallel.no_sync():  # type: ignore[operator]
                    parts.append(self._pass(parallel, batch, window.count))
        sums = self._agree(torch.stack(parts).cpu().double().sum(0))
        if not math.isfinite(sums[0]):
            raise self._diverged(sums[0])
        self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._follow(place)
        state.step, state.totals = state.step + 1, [a + b for a, b in zip(state.totals, sums, strict=True)]
        self._book_time()
        loss, hits, pictures = state.totals
        return Step(
            phase=self.phase,
            epoch=state.epoch + 1,
            step=state.step,
            steps=self.steps,
            rate=max(group["lr"] for group in self.optimizer.param_groups),
            loss=loss / pictures,
            accuracy=hits / pictures,
            pictures=int(pictures),
            speed=pictures / state.seconds,
        )

    def _pass(self, parallel: nn.Module, batch: Batch, count: int) -> Tensor:
        """One forward and backward pass; (loss, hits, pictures), summed over its pictures."""
        inputs = self.material.normalise(torch.from_numpy(batch.pixels).to(self.device))
        if inputs.ndim == 4:
            form = torch.channels_last if self.layout.channels_last else torch.contiguous_format
            inputs = inputs.contiguous(memory_format=form)
        targets, weights = batch.targets.to(self.device), batch.weights.to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = parallel(inputs).float()
        each = self.loss(logits, targets) * weights
        # Gradients are averaged over processes; what is wanted is the sum over pictures / their number.
        share: Tensor = self.scaler.scale(each.sum() * (self.world.size / count))
        share.backward()  # type: ignore[no-untyped-call]
        hits = self._are_right(logits.detach(), batch.truth.to(self.device)) * weights
        return torch.stack((each.detach().sum(), hits.sum(), weights.sum()))

    def _agree(self, values: Tensor) -> list[float]:
        """Values, float64 (n,), summed over processes; with them all processes agree whether a signal stops them."""
        came = values.new_tensor([float(self.signals.came is not None)])
        together = torch.cat((values, came))
        if self.world.size > 1:
            together = self.world.sum(together.to(self.device))  # NCCL takes what is on the device only
        *sums, stop = together.tolist()
        self.stopping = self.stopping or stop > 0
        return sums

    def _are_right(self, logits: Tensor, truth: Tensor) -> Tensor:
        """(n,) 1 where the class is right; with several labels a picture, the share of labels that are."""
        if self.material.task == "multi":
            return ((logits > 0) == (truth > 0)).float().mean(1)
        return (logits.argmax(1) == truth.argmax(1)).float()

    def _clip(self) -> None:
        self.scaler.unscale_(self.optimizer)
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.settings.clip_value:
            nn.utils.clip_grad_value_(trained, self.settings.clip_value)
        if self.settings.clip_norm:
            nn.utils.clip_grad_norm_(trained, self.settings.clip_norm)

    def _follow(self, place: int) -> None:
        """Move the average of weights along; statistics of batch norms are copied."""
        if self.average is None:
            return
        decay = min(self.settings.ema, (1 + place) / (EMA_START + place))
        with torch.no_grad():
            for mine, its in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mine.lerp_(its, 1 - decay)
            for held, fresh in zip(self.average.buffers(), self.model.buffers(), strict=True):
                held.copy_(fresh)

    def _diverged(self, loss: float, where: str = "") -> DivergedError:
        where = where or f"epoch {self.state.epoch + 1}, step {self.state.step + 1}"
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        remedy = f"Lower --learning-rate (here {rate:.3g}), or give --clip-norm 1."
        return DivergedError(where, f"the loss is {loss}: training has diverged", remedy)

    def _cuda(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    # What is trained, and what is shown to it

    def thaw(self) -> nn.Module:
        """Set what is trained in this epoch, and what stands still with its statistics and dropout.

        Gives the model, or with several processes its parallel form.
        """
        model, frozen_norms = self.model.eval().requires_grad_(False), self.settings.batch_norm == "frozen"
        trained = self.parts.trained(self.state.epoch, self.settings.unfreeze_epochs)
        self.trainable = self._count(trained)
        pairs = list(zip(self.parts.modules, trained, strict=True))
        frozen = {name for modules, is_trained in pairs if not is_trained for name in modules}
        for name in (name for modules, is_trained in pairs if is_trained for name in modules):
            for parameter in model.get_submodule(name).parameters(recurse=False):
                parameter.requires_grad_(True)
            for above in _and_ancestors(name):  # they may ask `self.training` for their parts' sake
                if above not in frozen:
                    model.get_submodule(above).training = True
        for module in model.backbone.modules() if frozen_norms else ():
            if hasattr(module, "running_var"):
                module.training = False
        if self.world.size == 1:
            return model
        if self.device.type == "cuda" and (not frozen_norms or self.settings.head == "batch-norm"):
            share_statistics(model)
        return nn.parallel.DistributedDataParallel(model, self._cuda() or None)

    def _still_tensors(self) -> dict[str, Tensor]:
        """All frozen parameters, and all buffers of modules in evaluation mode, by name."""
        found = {name: p.detach() for name, p in self.model.named_parameters() if not p.requires_grad}
        for prefix, module in self.model.named_modules():
            if not module.training:
                found |= {f"{prefix}.{name}": buffer for name, buffer in module.named_buffers(recurse=False)}
        return found

    def _count(self, trained: Sequence[bool]) -> int:
        """How many numbers the trained blocks hold."""
        chosen = [modules for modules, is_trained in zip(self.parts.modules, trained, strict=True) if is_trained]
        own = {p for modules in chosen for p in optimisation.own_parameters(self.model, modules).values()}
        return sum(parameter.numel() for parameter in own)

    def count_left(self) -> int:
        """How many records `run` will give at most."""
        epochs, state = self.settings.epochs, self.state
        return (epochs - max(0, state.epoch)) * (self.steps + 1) - state.step + (state.epoch < 0)

    def show(self) -> Generator[Window, None, None]:
        """The windows of the running epoch that are left, made ahead by threads."""
        epoch, settings = self.state.epoch, self.settings
        windows = draw_windows(self.material, settings, self.seed, epoch)

        def make(step: int) -> Window:
            return make_window(self.material, settings, self.seed, epoch, step, windows, self.world)

        most = max(2, AHEAD_PICTURES // (settings.batch_size * settings.accumulate))
        return ahead(make, range(self.state.step, len(windows)), count_cpus(), min(most, 2 * count_cpus()))

    # The end of an epoch, and going on

    def _finish_epoch(self) -> Epoch:
        """Measure, and keep the best."""
        state = self.state
        judged = self.average or self.model
        self.model.eval()
        # Each process has the statistics of its own share of batches; the first one's model is the one that is kept.
        self.world.copy((*self.model.buffers(), *(self.average.buffers() if self.average is not None else ())))
        figures = self.world.tell(dict(self.validate(judged.eval(), self._heed)))
        self._heed(alone=False)
        if not math.isfinite(figures["log_loss"]):
            raise self._diverged(figures["log_loss"], f"epoch {state.epoch + 1}, on select")
        value = figures[self.settings.best_by]
        state.losses.append(figures["log_loss"])
        best = is_better(self.settings.best_by, value, state.best) and (self.keeps_start or state.epoch >= 0)
        if best:
            state.best, state.best_epoch, self.best = value, state.epoch + 1, _copy(judged.state_dict())
        loss, hits, pictures = state.totals
        loss, accuracy = (loss / pictures, hits / pictures) if pictures else (math.nan, math.nan)
        self._book_time()
        seconds = state.seconds
        state.spent += seconds
        state.epoch, state.step, state.totals, state.seconds = state.epoch + 1, 0, [0.0, 0.0, 0.0], 0.0
        return Epoch(self.phase, state.epoch, loss, accuracy, figures, best, self.trainable, seconds)

    def _book_time(self) -> None:
        """Add to the epoch's seconds all that passed since the last time, waiting for pictures included."""
        now = time.perf_counter()
        self.state.seconds, self._booked = self.state.seconds + now - self._booked, now

    def _is_stale(self) -> bool:
        return 0 < self.settings.patience <= self.state.epoch - max(0, self.state.best_epoch)

    def _is_lost(self) -> bool:
        return not self.keeps_start and not can_win(self.state.losses, self.settings.epochs, self.target)

    def _is_late(self) -> bool:
        """Whether another epoch would take longer than there is time; all processes go by the first one's clock."""
        if self.seconds is None or not self.state.epoch:
            return False
        each = self.state.spent / self.state.epoch
        return self.world.tell(self.state.spent + each > self.seconds)

    def _heed(self, alone: bool = True) -> None:
        """Stop where a signal came. Processes stop together: what one does alone, it finishes first."""
        if self.world.size == 1 or not alone:
            self._agree(torch.zeros(0, dtype=torch.float64))
            self._check()

    def _check(self, save: bool = False) -> None:
        """Save where it is time to or a signal came, which then does what it did before."""
        self.stopping = self.stopping or (self.world.size == 1 and self.signals.came is not None)
        if save or self.stopping:
            self._save()
        if self.stopping:
            self.world.wait()  # torchrun ends all as soon as one has left
            self.signals.came = self.signals.came or signal.SIGTERM
            self.signals.raise_again()

    def _save(self) -> None:
        self._saved = time.monotonic()
        if self.folder is None or not self.world.first:
            return
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": value for key, value in values.items() if value is not None}
        facts = {"phase": self.phase, "state": asdict(self.state), "scaler": self.scaler.state_dict()}
        facts["made_with"] = self._describe_making()
        checkpoints.write(self.folder, Checkpoint(tensors, facts))

    def _resume(self) -> None:
        """Go on from the folder's checkpoint where it is of this phase."""
        self.world.wait()  # the first process may still be writing that of the phase before
        checkpoint = checkpoints.read(self.folder) if self.folder is not None else None
        if checkpoint is None or checkpoint.facts["phase"] != self.phase:
            return
        before, now = checkpoint.facts.get("made_with"), self._describe_making()
        if before not in (None, now):
            log.info("going on with %s instead of %s: the last bits of the weights may differ", now, before)
        self.state = _State(**checkpoint.facts["state"])
        weights_files.put(self.model, _under("model.", checkpoint.tensors))
        self.best = _under("best.", checkpoint.tensors)
        if self.average is not None:
            weights_files.put(self.average, _under("average.", checkpoint.tensors))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        values: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", checkpoint.tensors).items():
            number, _, key = name.partition(".")
            like = parameters[int(number)]
            # In the parameter's own memory layout: another one would take other routines, with other last bits.
            same = tensor.shape == like.shape and tensor.ndim
            values.setdefault(int(number), {})[key] = torch.empty_like(like).copy_(tensor) if same else tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": values, "param_groups": groups})
        self.scaler.load_state_dict(checkpoint.facts["scaler"])

    def _describe_making(self) -> str:
        return f"{self.world.size} processes of {torch.get_num_threads()} threads"


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _compare(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    for name, tensor in before.items():
        if not torch.equal(tensor, now[name]):
            raise TrainingError(name, "changed although it is frozen", "Please report this.")


def _and_ancestors(module_name: str) -> list[str]:
    parts = module_name.split(".")
    return ["", *(".".join(parts[:end]) for end in range(1, len(parts) + 1))]


def _draw_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Let glibc keep the memory that a step frees for the next step.

    By default it gives every large block back to the system, and each step then waits for the same pages to be zeroed
    again: with 32 pictures a step, twice to three times the time. malloc's man page, mallopt(3), gives the numbers.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library
        yield
        return
    trim_threshold, mmap_max = -1, -4
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)
    try:
        yield
    finally:
        libc.mallopt(mmap_max, 65536)
        libc.mallopt(trim_threshold, 128 * 1024)
        libc.malloc_trim(0)
