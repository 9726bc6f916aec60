"""Functions compiled for CPUs by OpenVINO, their graphs kept on disk; needs the extra `headstart[fast]`.

OpenVINO and torch are imported where they are used. Importing OpenVINO as it comes, and its `convert_model`, report to
its makers over the network; here neither happens.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headstart.files import UNSEALED, holds_seal, mark_used, seal, write_whole

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

HINTS = {"bfloat16": "bf16", "float32": "f32"}  # OpenVINO's names of the number formats
KEPT = 8  # graphs in a folder, the last used ones: each is as large as its network's weights
SUFFIX = ".graph"
_TELEMETRY = "openvino_telemetry"


@dataclass(frozen=True, eq=False)
class Graph:
    """A compiled function; several threads may call it, and each call keeps one core busy."""

    model: Any  # an openvino.CompiledModel
    batch_size: int
    _own: threading.local = field(default_factory=threading.local)  # every thread has a request of its own

    def __call__(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """The function's rows (n, ...) for inputs (n, ...) such as the example's; n may be any number from 1."""
        starts = range(0, len(inputs), self.batch_size)
        return np.concatenate([self._infer(inputs[start : start + self.batch_size]) for start in starts])

    def _infer(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """The rows of up to a batch, filled up: compiled for one shape, a graph is fastest, and gives the same bits."""
        if not hasattr(self._own, "request"):
            self._own.request = self.model.create_infer_request()
        batch = np.zeros((self.batch_size, *inputs.shape[1:]), inputs.dtype)
        batch[: len(inputs)] = inputs
        rows: NDArray[np.float32] = self._own.request.infer([batch])[0]
        return rows[: len(inputs)]


def find_version() -> str:
    """OpenVINO's version, found without importing it; empty where it is not installed."""
    try:
        return metadata.version("openvino")
    except metadata.PackageNotFoundError:
        return ""


def compile_function(
    function: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor, precision: str, threads: int, file: Path
) -> Graph | None:
    """A function as a graph, from disk where it is there; None where OpenVINO cannot, and that is logged.

    Args:
        function: inputs (n, ...) -> rows (n, ...), by PyTorch on the CPU, without gradients.
        example: one batch; the graph takes batches of its shape.
        precision: `bfloat16` or `float32`, which it computes in.
        threads: how many threads will call it at once; each call gets one core.
        file: where the graph is kept. Its name must tell the function, precision and OpenVINO's version from others.
    """
    try:
        openvino = _import_quietly()
    except ImportError as error:
        log.info("OpenVINO is installed, but cannot be imported: %s", error)
        return None
    # Threads that OpenVINO binds to cores would be in the way of those that decode, and of other processes.
    cores = {"NUM_STREAMS": threads, "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    settings = {"INFERENCE_PRECISION_HINT": HINTS[precision], **cores}
    try:
        core = _start(openvino)
        model = _recall(file, core, settings)
        if model is None:
            model = core.compile_model(_convert(function, example), "CPU", settings)
            _keep(file, model.export_model().getvalue())
    except _failures(openvino) as error:
        log.info("OpenVINO cannot compile it: %s: %s", type(error).__name__, textwrap.shorten(str(error), 300))
        return None
    return Graph(model, len(example))


def _import_quietly() -> Any:
    """OpenVINO without what it reports with: it does without where that is not installed, and so it seems."""
    before = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # Python then says that there is no such module
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules[_TELEMETRY]
        if before is not None:
            sys.modules[_TELEMETRY] = before


@functools.cache
def _start(openvino: Any) -> Any:
    """OpenVINO's core, one until the process ends.

    Each gives the thread a stack for signals and takes it away with itself. Where the first of two goes first, the
    second leaves a stack that is no longer there, and the next signal that Python handles ends the process.
    """
    return openvino.Core()


def _failures(openvino: Any) -> tuple[type[Exception], ...]:
    """What OpenVINO raises where a network holds what it does not know; its own have no base of their own."""
    kinds = ("General", "Initialization", "NotImplemented", "OpConversion", "OpValidation")
    return RuntimeError, *(getattr(openvino.frontend, f"{kind}Failure") for kind in kinds)


def _convert(function: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor) -> Any:
    """The function as OpenVINO's model, found by running a part of the example; for batches of its shape alone."""
    import torch

    decoders = importlib.import_module("openvino.frontend.pytorch.ts_decoder")
    frontend = sys.modules["openvino"].frontend.FrontEndManager().load_by_framework("pytorch")

    class Module(torch.nn.Module):  # the only kind of function that it takes
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return function(inputs)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing is deprecated, and takes sides of pictures for constants: they are
        # With two pictures it takes half as long. With one, the batch would be seen as a side that can be left out.
        decoder = decoders.TorchScriptPythonDecoder(Module(), example_input=(example[:2],))
    model = frontend.convert(frontend.load(decoder))
    model.reshape(list(example.shape))
    return model


def _recall(file: Path, core: Any, settings: Mapping[str, object]) -> Any:
    """The compiled graph in a file; None where there is none, or its bytes are not those that were written."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.info("%s cannot be read (%s): it is made again", file, error.strerror)
        return None
    mark_used(file)
    if not holds_seal(content, content[: len(UNSEALED)].decode("ascii", "replace")):
        log.warning("cache: %s: is damaged and is made again", file)
        return None
    try:
        return core.import_model(content[len(UNSEALED) :], "CPU", settings)
    except RuntimeError as error:  # another processor's, perhaps
        log.info("%s cannot be used (%s): it is made again", file, textwrap.shorten(str(error), 300))
        return None


def _keep(file: Path, graph: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, seal(UNSEALED.encode() + graph))
        _tidy(file.parent)
    except OSError as error:
        log.info("%s cannot be written (%s): the network will be compiled again", file, error.strerror)


def _tidy(folder: Path) -> None:
    """Delete all but the graphs that were used last, and what killed runs left half-written."""
    used = {}
    for file in (*folder.glob(f"*{SUFFIX}"), *folder.glob(f".*{SUFFIX}.*.partial")):
        try:
            used[file] = file.stat().st_mtime
        except FileNotFoundError:
            continue  # another process tidies too
    graphs = sorted((file for file in used if file.suffix == SUFFIX), key=used.__getitem__, reverse=True)
    left = [file for file in used if file.suffix != SUFFIX and used[file] < time.time() - 3600]
    for file in (*graphs[KEPT:], *left):
        file.unlink(missing_ok=True)
