"""A backbone's fastest form: on which device, by which engine, in which number format, with which layers folded."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from headstart import compiled, features, files
from headstart.backbones import Backbone
from headstart.errors import BackboneError, UsageError
from headstart.images import Preprocess, View
from headstart.loading import BATCH_SIZE, Compute, count_cpus

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

    from headstart.zoo import Spec

log = logging.getLogger(__name__)

Engine = Literal["torch", "openvino"]
GRAPHS = "compiled"  # the folder of compiled networks in a cache of features
# Share of a side that an enlarged view shows: 0.65 helped some sets more and hurt X-rays. Models and caches know the
# view by its name alone: another share would have to be another view.
ZOOM = 0.8
LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.99, "float16": 0.99}  # to the plain network's features
# Of what tells pictures apart: bfloat16 leaves 0.993 of EfficientNet-Lite0's, by PyTorch as by OpenVINO.
LEAST_LIKENESS = {"float32": 0.999, "bfloat16": 0.98}
LEAST_GAIN = 1.1  # for less, a second engine is not worth its features of other bits
# A trial pays from so many runs of a network on each core, for which PyTorch takes so many seconds: it takes 64 itself,
# and two seconds or three to convert the network, and saves about half of the time of those that follow.
TRIAL_RUNS, TRIAL_SECONDS = 150, 10.0
START_SECONDS = 0.5  # that importing OpenVINO and reading a graph take
ROUNDS = 3  # in which engines are timed by turns


@dataclass(frozen=True, eq=False)
class Embedder:
    """A backbone made ready to run, in the number format the machine is fast in.

    Args:
        network: normalised pictures (n, 3, size, size) -> features (n, dim).
        preprocess: how pictures become its input.
        device: where it runs.
        dtype: the number format.
        views: of each picture.
    """

    network: nn.Module
    preprocess: Preprocess
    device: torch.device
    dtype: torch.dtype
    views: tuple[View, ...] = ("plain",)

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features of pixels of `Preprocess.apply`, (n, size, size, 3); on one core of the calling thread.

        They are (n, dim), or of several views side by side, (n, views x dim).
        """
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                found: NDArray[np.float32] = self.embed(torch.from_numpy(pixels).to(self.device)).cpu().numpy()
        finally:
            torch.set_num_threads(threads)  # the thread that calls may train next, on all cores
        return found

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """The same of tensors: float32 features of uint8 pixels, both on the device."""
        import torch

        plain = self.preprocess.normalise(pixels)
        seen = [look(plain, view).to(self.dtype) for view in self.views]
        return torch.cat([self.network(batch).float() for batch in seen], 1)


def look(pictures: torch.Tensor, view: View) -> torch.Tensor:
    """A view of normalised pictures (n, 3, size, size)."""
    import torch

    if view not in get_args(View):
        raise ValueError(f"{view!r} is no view: {', '.join(get_args(View))}")
    if view in ("zoom", "zoom-mirror"):
        size = pictures.shape[2]
        edge = round(size * (1 - ZOOM) / 2)
        middle = pictures[:, :, edge : size - edge, edge : size - edge]
        pictures = torch.nn.functional.interpolate(middle, (size, size), mode="bilinear")
    return pictures.flip(3) if view in ("mirror", "zoom-mirror") else pictures


def prepare(
    backbone: Backbone, device: torch.device, precision: str, engine: Engine = "torch", folder: Path | None = None
) -> Embedder:
    """The fastest exact form of a backbone: what rounding of the number format leaves of it, and no more.

    Folding and the number format are tried on a random picture; where the features leave the plain network's (cosine
    under 0.9999, or 0.99 in half precision), the plain float32 network is used, and that is logged. The trial has the
    size of the batches to come, on one thread as they will be, so that the routines generated for it are theirs.

    Args:
        backbone: the network.
        device: where it runs.
        precision: `bfloat16`, `float16` or `float32`.
        engine: `torch`, or what `find_engine` gave for the same network, device, precision and folder.
        folder: where `find_engine` keeps graphs.

    Raises:
        BackboneError: where the engine is OpenVINO, and does not run the network or leaves its features.
    """
    import torch

    from headstart.blocks import run
    from headstart.folding import fold_batch_norms

    if engine == "openvino":
        assert folder is not None  # as `find_engine` had one
        return _prepare_compiled(backbone, precision, folder)
    dtype = getattr(torch, precision)
    size = backbone.spec.preprocess.size
    example = torch.randn(BATCH_SIZE, 3, size, size, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    with torch.inference_mode():
        home = next((p.device for p in backbone.network.parameters()), torch.device("cpu"))
        expected = run(backbone.network, example[:1].to(home)).float().cpu()
        network = copy.deepcopy(backbone.network).cpu()
        fold_batch_norms(network, example[:1])
        network = network.to(device, dtype).to(memory_format=torch.channels_last)
        try:
            torch.set_num_threads(1)
            found = network(example.to(device, dtype).contiguous(memory_format=torch.channels_last)).float().cpu()
            nearness = torch.nn.functional.cosine_similarity(found[:1].flatten(1), expected.flatten(1)).item()
        except (RuntimeError, TypeError) as error:  # a layer without a kernel for this number format
            log.info("%s does not run in %s: %s", backbone.spec.name, precision, error)
            nearness = 0.0
        finally:
            torch.set_num_threads(threads)
    if not nearness >= LEAST_COSINE[precision]:  # nor a NaN
        log.info("%s: %s would change the features (cosine %.4f); float32 is used", backbone.spec.name, dtype, nearness)
        network, dtype = backbone.network.to(device), torch.float32
    return Embedder(network, backbone.spec.preprocess, device, dtype, backbone.spec.views)


@dataclass(eq=False)
class Workshop:
    """Makes forms of one network ready that differ in geometry and views alone: what runs is made and timed once."""

    made: dict[tuple[object, ...], Embedder] = field(default_factory=dict)
    # By network and side of its input, and for the first side that was timed: a cache may be there for one look alone.
    timed: dict[tuple[object, ...], EngineSeconds] = field(default_factory=dict)
    first: dict[tuple[object, ...], tuple[int, EngineSeconds]] = field(default_factory=dict)

    def prepare(
        self, backbone: Backbone, device: torch.device, precision: str, engine: Engine = "torch", **options: Any
    ) -> Embedder:
        """As `prepare`, by which it is tried that a number format leaves the features; that is not tried again."""
        spec = backbone.spec
        if not spec.digest:  # without a digest a network is not recognised again
            return prepare(backbone, device, precision, engine, **options)
        key = _name(spec, device, precision, engine)
        if key not in self.made:
            self.made[key] = prepare(backbone, device, precision, engine, **options)
        return dataclasses.replace(self.made[key], preprocess=spec.preprocess, views=spec.views)

    def holds(self, spec: Spec, device: torch.device, precision: str, engine: Engine) -> bool:
        """Whether a network is ready to run in an engine."""
        return _name(spec, device, precision, engine) in self.made

    def note(self, spec: Spec, device: torch.device, precision: str, seconds: EngineSeconds) -> None:
        """Remember how fast the engines are."""
        self.timed[_name(spec, device, precision, "openvino")] = seconds
        self.first.setdefault(_name(spec, device, precision, "torch"), (spec.preprocess.size, seconds))

    def recall(self, spec: Spec, device: torch.device, precision: str) -> EngineSeconds | None:
        """How fast the engines are; None where that was not timed with this size of the network's input."""
        return self.timed.get(_name(spec, device, precision, "openvino"))

    def foresee(self, spec: Spec, device: torch.device, precision: str) -> EngineSeconds | None:
        """How fast they will be by what another size took, as its pixels are to these; None where none was timed."""
        found = self.first.get(_name(spec, device, precision, "torch"))
        return found and found[1].scaled((spec.preprocess.size / found[0]) ** 2)


def _name(spec: Spec, device: torch.device, precision: str, engine: Engine) -> tuple[object, ...]:
    """What tells what runs from others: graphs are of one size each."""
    size = spec.preprocess.size if engine == "openvino" else 0
    return spec.digest, spec.taps, device, precision, engine, size


@dataclass(frozen=True)
class EngineSeconds:
    """Seconds of a network's run for a picture with each engine, on all cores; infinite where one cannot be used."""

    torch: float
    openvino: float

    def scaled(self, ratio: float) -> EngineSeconds:
        """The seconds with so many times as much to compute."""
        return EngineSeconds(self.torch * ratio, self.openvino * ratio)

    def find_best(self, by_torch: int, by_openvino: int, is_ready: bool = False) -> Engine:
        """The engine that is done first, with as many runs as each has before it; OpenVINO may be ready already."""
        if self.openvino * LEAST_GAIN > self.torch:
            return "torch"
        # Nothing is imported where all features are there.
        start = START_SECONDS if by_openvino and not is_ready else 0.0
        return "openvino" if start + by_openvino * self.openvino < by_torch * self.torch else "torch"


def find_engine(
    spec: Spec,
    load: Callable[[], Backbone],
    device: torch.device,
    precision: str,
    folder: Path,
    count_missing: Callable[[Engine], int],
    looks: int = 1,
    workshop: Workshop | None = None,
) -> Engine:
    """`openvino` where it is installed, gives a network's features and gives them sooner; `torch` else.

    Both are timed once per network and machine; the answer and the graph, of each size of the input, are kept.

    Args:
        spec: the network.
        load: gives it.
        device: where it will run: OpenVINO only competes on the CPU.
        precision: `bfloat16`, `float16` or `float32`.
        folder: where answers and graphs are kept.
        count_missing: gives how many pictures' features an engine would have to compute. Where they are few, nothing is
            converted and timed.
        looks: about how many there will be, this one and others in other ways.
        workshop: makes the network ready to run, and remembers how fast it is.
    """
    installed = device.type == "cpu" and precision in compiled.HINTS and compiled.find_version()
    missing = count_missing("torch") if installed and spec.digest else 0  # without a digest it is not recognised again
    if not missing:
        return "torch"
    by_torch = missing * len(spec.views)
    workshop = workshop or Workshop()
    file = _place(spec, precision, folder).with_suffix(".json")
    known = files.recall(file, lambda values: EngineSeconds(**values), "the engines are timed again")
    seconds = workshop.recall(spec, device, precision) or known
    if seconds is None:
        seconds = _try_engines(spec, load, device, precision, folder, by_torch * looks, workshop)
        if seconds is None:
            return "torch"
        files.remember(file, seconds, "the engines will be timed again")
    workshop.note(spec, device, precision, seconds)
    is_ready = workshop.holds(spec, device, precision, "openvino")
    return seconds.find_best(by_torch, count_missing("openvino") * len(spec.views), is_ready)


def _try_engines(
    spec: Spec,
    load: Callable[[], Backbone],
    device: torch.device,
    precision: str,
    folder: Path,
    runs: int,
    workshop: Workshop,
) -> EngineSeconds | None:
    """Seconds of a run in each engine; None where PyTorch is done with so many runs before that would be known.

    With another size of the input than the one that was timed, the graph is made and checked, and not timed again.
    """
    foreseen = workshop.foresee(spec, device, precision)
    if runs < TRIAL_RUNS * count_cpus() or (foreseen and foreseen.find_best(runs, runs) == "torch"):
        return None
    backbone = load()
    plain = dataclasses.replace(workshop.prepare(backbone, device, precision), views=("plain",))
    if runs * (foreseen.torch if foreseen else _time_run(plain)) < TRIAL_SECONDS:
        return None
    try:
        graph = workshop.prepare(backbone, device, precision, "openvino", folder=folder)
    except BackboneError as error:
        log.info("%s %s: its features are computed by PyTorch", spec.name, error.why)
        return EngineSeconds(0.0, math.inf)
    return foreseen or _time_engines(spec.name, plain, dataclasses.replace(graph, views=plain.views))


def _time_run(embedder: Embedder) -> float:
    """About how many seconds a run for one picture takes, all cores at work."""
    pixels = draw_pictures(embedder.preprocess.size)[:1]
    embedder(pixels)  # generates routines
    start = time.perf_counter()
    embedder(pixels)
    return (time.perf_counter() - start) / count_cpus()


def _time_engines(name: str, plain: Embedder, graph: Embedder) -> EngineSeconds:
    """Seconds of a run in PyTorch and in OpenVINO, with a single view."""
    seconds = EngineSeconds(*time_embedders((plain, graph), draw_pictures(plain.preprocess.size)))
    shown = f"PyTorch {1 / seconds.torch:.0f}, OpenVINO {1 / seconds.openvino:.0f}"
    log.info("%s: features by PyTorch or OpenVINO timed, pictures a second: %s", name, shown)
    return seconds


def time_embedders(embedders: tuple[Compute, Compute], pixels: NDArray[np.uint8]) -> tuple[float, float]:
    """Seconds a picture of each of two, as many threads calling it as there are cores.

    They take turns, so that whatever else the machine does slows all of them.
    """
    threads = count_cpus()
    batches = [pixels] * threads
    seconds: tuple[list[float], list[float]] = [], []
    with ThreadPoolExecutor(threads) as executor:
        for _ in range(1 + ROUNDS):  # the first one generates routines
            for taken, embedder in zip(seconds, embedders, strict=True):
                start = time.perf_counter()
                list(executor.map(embedder, batches))
                taken.append((time.perf_counter() - start) / (len(batches) * len(pixels)))
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def _prepare_compiled(backbone: Backbone, precision: str, folder: Path) -> Embedder:
    """The backbone compiled, or read from disk.

    Raises:
        BackboneError: where it cannot be, or leaves the plain network's features.
    """
    import torch

    from headstart.taps import Tapped

    spec, device = backbone.spec, torch.device("cpu")
    network = copy.deepcopy(backbone.network).to(device).requires_grad_(False)
    pixels = draw_pictures(spec.preprocess.size)
    example = spec.preprocess.normalise(torch.from_numpy(pixels)).contiguous()
    file = _place(spec, precision, folder).with_suffix(compiled.SUFFIX)
    graph = compiled.compile_function(network, example, precision, count_cpus(), file)
    answer = _place(spec, precision, folder).with_suffix(".json")
    remedy = f"Delete {answer}, by which it did: PyTorch is used then."
    if graph is None:
        raise BackboneError(spec.name, "does not run in OpenVINO", remedy)
    made = Embedder(_as_module(graph), spec.preprocess, device, getattr(torch, precision), spec.views)
    with torch.inference_mode():
        depths = network.look(example) if isinstance(network, Tapped) else [network(example)]
    try:
        found = dataclasses.replace(made, views=("plain",))(pixels)
        likeness = compare_features(torch.from_numpy(found), depths)
    except RuntimeError as error:  # it does not take such a batch, or gives another
        raise BackboneError(spec.name, f"does not run in OpenVINO ({str(error).splitlines()[0]})", remedy) from error
    if not likeness >= LEAST_LIKENESS[precision]:
        raise BackboneError(spec.name, f"has other features in OpenVINO (cosine {likeness:.4f})", remedy)
    return made


def _as_module(graph: Callable[[NDArray[Any]], NDArray[np.float32]]) -> nn.Module:
    """A compiled network as PyTorch's own; whatever numbers it computes in, it takes float32."""
    import torch

    class Compiled(torch.nn.Module):
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(graph(pictures.float().contiguous().numpy()))

    return Compiled()


def compare_features(found: torch.Tensor, depths: Sequence[torch.Tensor]) -> float:
    """How alike is what tells pictures apart: the least cosine, without the pictures' mean, of any depth.

    With the mean, features of all pictures are alike, and anything would do.

    Args:
        found: features (n, sum of widths) of some pictures that are not alike.
        depths: what they should be, (n, width) each.
    """
    import torch

    parts = torch.split(found, [rows.shape[1] for rows in depths], 1)
    likeness = [
        torch.nn.functional.cosine_similarity(ours - theirs.mean(0), theirs - theirs.mean(0)).min()
        for ours, theirs in zip(parts, depths, strict=True)
    ]
    return float(torch.stack(likeness).min())


def draw_pictures(size: int) -> NDArray[np.uint8]:
    """A batch of pictures that are not alike, (n, size, size, 3): coloured clouds from coarse to fine, always the same.

    The features of noise hardly differ, whatever the noise.
    """
    import numpy as np
    import torch

    random = np.random.default_rng(0)
    pictures = torch.zeros(BATCH_SIZE, 3, size, size)
    fineness = torch.linspace(0.3, 1.0, BATCH_SIZE)[:, None, None, None]
    for cells in (2, 4, 8, 16, 32):
        grid = torch.from_numpy(random.normal(size=(BATCH_SIZE, 3, cells, cells)).astype(np.float32))
        pictures += torch.nn.functional.interpolate(grid, (size, size), mode="bicubic") * 2 / cells**fineness
    drawn: NDArray[np.uint8] = (128 + 48 * pictures).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return drawn


def _place(spec: Spec, precision: str, folder: Path) -> Path:
    """Where what belongs to a network, number format and machine is kept; suffixes say what it is.

    How pictures become the network's input is none of it, but for their size.
    """
    import torch

    bare = dataclasses.replace(spec, preprocess=Preprocess(spec.preprocess.size), views=("plain",))
    machine = [_find_capabilities(), count_cpus(), torch.__version__, compiled.find_version()]
    described = json.dumps(["network alone", features.key_of(bare), precision, *machine], sort_keys=True)
    return folder / hashlib.sha256(described.encode()).hexdigest()[:32]


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
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            name, f"is no device of this machine ({reason})", "Give auto, cpu, cuda:N, mps or xpu."
        ) from error
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """The number format by its name; `auto` is bfloat16 where the processor computes in it, float32 else."""
    import torch

    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = _find_capabilities()
        fast = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    else:
        fast = False
    return "bfloat16" if fast else "float32"


def _find_capabilities() -> dict[str, Any]:
    """The processor's name and abilities; nothing where torch does not tell yet."""
    import torch

    return dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}
