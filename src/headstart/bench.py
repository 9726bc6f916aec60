"""What training phases work on: pictures, features or kept activations of one run, and how a model is judged."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headstart import (
    augmentation,
    checkpoints,
    embedders,
    evaluation,
    heads,
    prefix,
)
from headstart.augmentation import Augmentation
from headstart.backbones import Backbone, randomise
from headstart.blocks import Block, blank, count_frozen, run
from headstart.data import Dataset, Role, Sample
from headstart.engine import Adapted, Training
from headstart.errors import TrainingError
from headstart.heads import FittedHead
from headstart.images import Limits
from headstart.loading import BATCH_SIZE, Album, ahead, count_cpus
from headstart.material import Material
from headstart.optimisation import leave_out_frozen
from headstart.plan import Train
from headstart.processes import World
from headstart.sampling import Draw
from headstart.taps import see_blocks

Judge = Callable[[Adapted, Callable[[], None]], dict[str, float]]
KEPT_BATCH = 32  # kept activations that are looked at together
LOOKED, SUPPLIED = 4, 16  # batches a core, and pictures, by which looks and openings are timed


@dataclass(frozen=True, eq=False)
class Bench:
    """All that training phases work on.

    Args:
        dataset: the data, with roles.
        backbone: where training starts from.
        device: that it runs on.
        precision: of the features by which a model is measured: that of prediction.
        limits: what pictures are too large to be opened.
        room_bytes: memory for decoded pictures.
        seed: of everything random.
        world: this process among others.
        rows: pictures -> their features (n, dim), or of several views (n, views, dim), where a phase needs them.
    """

    dataset: Dataset
    backbone: Backbone
    device: torch.device
    precision: str
    limits: Limits
    room_bytes: int
    seed: int
    world: World
    rows: Callable[[Sequence[Sample]], NDArray[np.float32]]

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The backbone's blocks."""
        return see_blocks(self.backbone.network, self.backbone.spec.preprocess.size)

    @functools.cached_property
    def dim(self) -> int:
        """How many features the backbone gives."""
        network, size = self.backbone.network, self.backbone.spec.preprocess.size
        return run(network, blank(network, size)).shape[1]

    @functools.cached_property
    def look_seconds(self) -> float:
        """Seconds of a picture's way through the network when a model is measured, by all cores."""
        backbone = Backbone.of(self.backbone.spec.adapted(views=("plain",)), self.backbone.network)
        embedder = embedders.prepare(backbone, self.device, self.precision)
        side, workers = self.backbone.spec.preprocess.size, count_cpus()
        pixels = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, side, side, 3), np.uint8)
        batches = [pixels] * (LOOKED * workers)
        embedder(pixels)
        start = time.perf_counter()
        for _ in ahead(embedder, batches, workers, 2 * workers):
            pass
        return (time.perf_counter() - start) / (len(batches) * BATCH_SIZE)

    def time_supply(self, phase: Train) -> float:
        """Seconds in which a picture is opened, where memory does not keep it, and varied for a phase; by all cores."""
        fit, settings = self.dataset.of_role("fit"), phase.settings
        some = [self.dataset.path(sample.source) for sample in fit[:: max(1, len(fit) // SUPPLIED)][:SUPPLIED]]
        preprocess, workers = self.backbone.spec.preprocess, count_cpus()
        album = Album(some, preprocess, self.limits, self._room() * len(some) // max(1, len(fit)))
        varied = augmentation.parse(settings.augment, settings.symmetry, preprocess.size)

        def supply(row: int) -> NDArray[np.uint8]:
            return album.vary(Draw(row), varied, self.seed, 0)

        for _ in range(2):  # what memory keeps is there the second time
            start = time.perf_counter()
            for _ in ahead(supply, range(len(some)), workers, 2 * workers):
                pass
        return (time.perf_counter() - start) / max(1, len(some))

    def begin(self, phase: Train, head: FittedHead | None) -> Adapted:
        """A model to be trained, on the device: the backbone, or nothing in its place on features, and a head.

        The head's temperature is divided out of a fitted one, so that training starts from calibrated logits.
        """
        settings = phase.settings
        body = nn.Identity() if phase.on == "features" else self._copy_body(phase)
        if head is not None:
            last = copy.deepcopy(head.module)
            with torch.no_grad():
                for parameter in last.parameters():
                    parameter.div_(head.temperature)
        else:
            with torch.random.fork_rng([]):
                torch.manual_seed(self.seed)
                last = heads.make_head(
                    settings.head, self.dim, len(self.dataset.classes), settings.hidden, settings.dropout
                )
        return Adapted(body, last).to(self.device)

    def _copy_body(self, phase: Train) -> nn.Module:
        spec = self.backbone.spec
        if phase.start == "random" and spec.digest:
            return randomise(spec, self.seed)
        return copy.deepcopy(self.backbone.network)

    def start(
        self, phase: Train, number: int, adapted: Adapted, folder: Path | None, resumed: bool = False
    ) -> Training:
        """A phase, ready to run.

        Args:
            phase: the phase.
            number: its number in the plan.
            adapted: what is trained.
            folder: of the run; None: for a trial.
            resumed: whether it goes on from a checkpoint, and where no activations were kept, goes on without.

        Raises:
            UsageError: where its settings do not fit the network or the task.
            TrainingError: where it cannot go on as it began, as activations are gone and there is no room for them.
        """
        samples = self.dataset.of_role("fit")
        select = self.dataset.of_role("select")
        blocks, settings = self.blocks if phase.on == "pictures" else (), phase.settings
        if phase.on == "features":
            material, validate = self._features(samples), self._judge_features(select)
        else:
            material, validate = self.show_pictures(samples, phase), self._judge_pictures(select)
            short = self._shorten(phase, number, adapted, folder, resumed)
            if short is not None:
                adapted, stored, judged = short
                material = dataclasses.replace(material, show=prefix.show_kept(stored), normalise=Tensor.float)
                validate = self._judge_kept(select, judged)
                blocks, settings = leave_out_frozen(blocks, settings)
        return Training(
            adapted,
            blocks,
            settings,
            phase.layout,
            material,
            validate,
            seed=self.seed,
            phase=number,
            folder=folder,
            world=self.world,
            seconds=phase.seconds,
            keeps_start=phase.keeps_start,
            target=phase.target,
        )

    def cut(self, phase: Train, adapted: Adapted) -> prefix.Cut | None:
        """The model's backbone cut after its frozen blocks; None where no activations are kept, or it cannot be cut."""
        frozen = count_frozen(self.blocks, phase.settings.freeze)
        if not phase.settings.cached_views or not frozen:
            return None
        return prefix.cut(adapted.backbone, self.blocks, frozen, self.backbone.spec.preprocess.size)

    def can_keep(self, phase: Train, activations: NDArray[np.float32], folder: Path) -> bool:
        """Whether there is room for what a phase keeps of all pictures, and half precision holds one's activations."""
        if not prefix.can_halve(activations):
            return False
        settings, select = phase.settings, len(self.dataset.of_role("select"))
        shape = (len(self.dataset.of_role("fit")) * settings.cached_views + select, *activations.shape)
        return prefix.has_room(folder, prefix.count_bytes(shape), settings.disk_mebibytes * 2**20)

    def _shorten(
        self, phase: Train, number: int, adapted: Adapted, folder: Path | None, resumed: bool
    ) -> tuple[Adapted, NDArray[np.float16], NDArray[np.float16]] | None:
        """(the model without its frozen prefix, what that gives for `fit` and `select`); None where it is to run.

        The short model's modules are the whole one's: what it learns, the whole one knows.
        """
        settings, spec = phase.settings, self.backbone.spec
        if folder is None or (resumed and _holds_whole(folder, adapted)):
            return None
        parts = self.cut(phase, adapted)
        if parts is None:
            return None
        bare = dataclasses.replace(spec, taps=(), views=("plain",))
        embedder = embedders.prepare(Backbone.of(bare, parts.prefix), self.device, self.precision)
        varied = augmentation.parse(settings.augment, settings.symmetry, spec.preprocess.size)
        plain = augmentation.parse("none", settings.symmetry, spec.preprocess.size)
        # The large one last: where it is there, both are.
        roles: dict[Role, tuple[int, Augmentation]] = {"select": (1, plain), "fit": (settings.cached_views, varied)}
        stored, limit = {}, settings.disk_mebibytes * 2**20
        for role, (views, variation) in roles.items():
            file, album, kept = _place(folder, number, role), self.album(self.dataset.of_role(role)), None
            if self.world.first:
                kept = prefix.keep(file, album, variation, embedder, self.seed, views, limit)
            if not self.world.tell(kept is not None):
                if self.world.first:
                    _place(folder, number, "select").unlink(missing_ok=True)
                if resumed:
                    raise TrainingError(file, "is gone, and there is no room to make it again", "Free some space.")
                return None
            stored[role] = np.load(file, mmap_mode="r")
            limit -= stored[role].nbytes
        return Adapted(parts.suffix, adapted.head), stored["fit"], stored["select"]

    def show_pictures(self, samples: Sequence[Sample], phase: Train) -> Material:
        """What a phase is shown of pictures, varied as its settings say."""
        preprocess, settings = self.backbone.spec.preprocess, phase.settings
        varied, views = augmentation.parse(settings.augment, settings.symmetry, preprocess.size), settings.cached_views
        album = self.album(samples)

        def show(draw: Draw, epoch: int) -> NDArray[np.uint8]:
            if views:  # as where activations are kept: each picture has so many views and no more
                draw, epoch = Draw(draw.sample), epoch % views
            return album.vary(draw, varied, self.seed, epoch)

        return Material(
            show,
            preprocess.normalise,
            evaluation.encode(samples, self.dataset.classes),
            self.dataset.task,
        )

    def _features(self, samples: Sequence[Sample]) -> Material:
        matrix = self.rows(samples)
        targets = evaluation.encode(samples, self.dataset.classes)
        return Material(lambda draw, _: matrix[draw.sample], lambda rows: rows, targets, self.dataset.task)

    @functools.cached_property
    def _albums(self) -> dict[tuple[Sample, ...], Album]:
        return {}

    def album(self, samples: Sequence[Sample]) -> Album:
        """Pictures to be opened again and again, the same for all phases; those of the report are not kept."""
        key = tuple(samples)
        if key not in self._albums:
            kept = any(sample.role != "report" for sample in key)
            room = self._room() if kept else 0
            paths = [self.dataset.path(sample.source) for sample in key]
            self._albums[key] = Album(paths, self.backbone.spec.preprocess, self.limits, room)
        return self._albums[key]

    def _room(self) -> int:
        """Bytes for the decoded pictures of a role, of two, in this process."""
        return self.room_bytes // 2 // self.world.size

    def _judge_pictures(self, samples: Sequence[Sample]) -> Judge:
        album = self.album(samples)

        def judge(adapted: Adapted, check: Callable[[], None]) -> dict[str, float]:
            check()
            backbone = Backbone.of(self.backbone.spec.adapted(views=("plain",)), adapted.backbone)
            matrix = embed(backbone, album, self.device, self.precision, self.world, check)
            return self._score(adapted, matrix, samples)

        return judge

    def _judge_kept(self, samples: Sequence[Sample], stored: NDArray[np.float16]) -> Judge:
        dtype = getattr(torch, self.precision)

        def judge(adapted: Adapted, check: Callable[[], None]) -> dict[str, float]:
            parts = []
            with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                for start in range(0, len(stored), KEPT_BATCH):
                    check()
                    batch = torch.from_numpy(stored[start : start + KEPT_BATCH, 0].astype(np.float32)).to(self.device)
                    if batch.ndim == 4:
                        batch = batch.contiguous(memory_format=torch.channels_last)
                    parts.append(adapted.backbone(batch).float().cpu().numpy())
            return self._score(adapted, np.concatenate(parts), samples)

        return judge

    def _judge_features(self, samples: Sequence[Sample]) -> Judge:
        matrix = self.rows(samples)
        return lambda adapted, check: self._score(adapted, matrix, samples)

    def _score(self, adapted: Adapted, matrix: NDArray[np.float32], samples: Sequence[Sample]) -> dict[str, float]:
        with torch.inference_mode():
            logits = adapted.head(torch.from_numpy(matrix).to(self.device)).float().cpu().numpy()
        return evaluation.score(logits, samples, self.dataset.classes, self.dataset.task)


def _holds_whole(folder: Path, adapted: Adapted) -> bool:
    """Whether a folder's checkpoint is of a whole model, rather than of one without its frozen prefix."""
    checkpoint = checkpoints.read(folder)
    return checkpoint is not None and all(f"model.{name}" in checkpoint.tensors for name in adapted.state_dict())


def _place(folder: Path, number: int, role: Role) -> Path:
    """The file with the activations of a phase."""
    return folder / f"activations-{number}-{role}.npy"


def embed(
    backbone: Backbone,
    album: Album,
    device: torch.device,
    precision: str,
    world: World = World(),
    check: Callable[[], None] = lambda: None,
) -> NDArray[np.float32]:
    """Features (n, dim) of an album's evaluation views, in order; every process computes a share and gets all.

    Args:
        backbone: the network, in evaluation mode.
        album: the pictures.
        device: that it runs on.
        precision: number format.
        world: this process among others.
        check: called between batches.
    """
    embedder = embedders.prepare(backbone, device, precision)
    rows, parts = world.share(range(len(album))), []
    for part in album.embed(rows, embedder):
        parts.append(part)
        check()
    if world.size == 1:
        return np.concatenate(parts)
    dim = torch.tensor(parts[0].shape[1] if parts else 0, device=device)
    matrix = torch.zeros(len(album), int(world.most(dim)), device=device)
    if parts:
        matrix[list(rows)] = torch.from_numpy(np.concatenate(parts)).to(device)
    whole: NDArray[np.float32] = world.sum(matrix).cpu().numpy()
    return whole
