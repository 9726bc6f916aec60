"""Several processes on one job, as torchrun starts them: who they are, and how they agree.

Without torchrun there is one process, and everything here does nothing. Process 0 alone writes to the run folder.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")

GRACE_SECONDS = 5.0  # that torchrun needs to end the others once one process has failed
TIMEOUT = timedelta(hours=2)  # what one process may take longer than the others: the first one audits and writes


@dataclass(frozen=True)
class World:
    """This process among those of the job."""

    rank: int = 0
    size: int = 1
    local: int = 0  # number on this machine

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every process's own part of some items; the parts differ by one at most."""
        return items[self.rank :: self.size]

    def sum(self, values: Tensor) -> Tensor:
        """Values summed over all processes, in place."""
        if self.size > 1:
            from torch import distributed

            distributed.all_reduce(values)
        return values

    def most(self, value: Tensor) -> Tensor:
        """The largest value of all processes, in place."""
        if self.size > 1:
            from torch import distributed

            distributed.all_reduce(value, distributed.ReduceOp.MAX)
        return value

    def tell(self, value: T) -> T:
        """What the first process says: every process gets its value, of whatever can be pickled."""
        if self.size == 1:
            return value
        from torch import distributed

        holder: list[Any] = [value]
        distributed.broadcast_object_list(holder)
        result: T = holder[0]
        return result

    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values, in place."""
        if self.size > 1:
            from torch import distributed

            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            from torch import distributed

            distributed.barrier()


def find_world() -> World:
    """This process's place, from what torchrun sets; a world of one without it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, size, local = (int(os.environ.get(name, default)) for name, default in zip(names, (0, 1, 0), strict=True))
    return World(rank, size, local) if size > 1 else World()


def join(world: World, device: torch.device) -> None:
    """Connect with the other processes, once: NCCL between CUDA devices, each its own, Gloo else."""
    import torch
    from torch import distributed

    if world.size > 1 and not distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what NCCL takes objects and barriers to
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)


def leave() -> None:
    """Disconnect, where there is a connection."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def speaks_first(rank: int) -> bool:
    """Whether this process is the first to fail: the others then fail for the same reason, or for its absence.

    Before they are connected the first process speaks at once; another waits until that and torchrun have ended it, and
    speaks where they have not.
    """
    distributed: Any = sys.modules.get("torch.distributed")  # torchrun does not wait until torch is imported
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        if rank:
            time.sleep(GRACE_SECONDS)
        return True
    store = distributed.distributed_c10d._get_default_store()
    return bool(store.add("headstart/failed", 1) == 1)


def share_statistics(model: nn.Module) -> None:
    """Let batch norms in training see all processes' pictures, in place; activations that timm keeps in them stay."""
    import timm.layers
    from torch import nn

    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        return  # since an earlier epoch; converted once more, they would lose their activations
    convert: Any = timm.layers.convert_sync_batchnorm  # type: ignore[attr-defined]
    for name, child in list(model.named_children()):
        setattr(model, name, convert(child))


class Signals:
    """While it is entered, SIGINT and SIGTERM are noted in `came`, once, instead of acting.

    In threads other than the main one, where signals cannot be handled, it does nothing.

    Args:
        patient: whether later signals are passed over; else a second one acts at once. torchrun sends SIGTERM right
            after a SIGINT that its processes got too.
    """

    def __init__(self, patient: bool = False) -> None:
        self.came: int | None = None
        self._patient = patient
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup, and jobs in the background
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def raise_again(self) -> None:
        """Let the signal that came do what it would have done; without one, go on watching."""
        if self.came is not None:
            self._restore()
            signal.raise_signal(self.came)

    def _note(self, number: int, _: object) -> None:
        self.came = self.came or number
        if not self._patient:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
