"""The run folder: whose it is, whether it is finished, and that one process at a time writes to it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart import archives, splits
from headstart import config as configs
from headstart.config import RunConfig
from headstart.data import Dataset, Sample, Task
from headstart.errors import ConfigError, HeadstartError, RunError
from headstart.files import write_whole

LOCK = ".lock"
# Settings that change how fast a result comes, not what it is.
_FREE = {"cache", "checkpoint_minutes", "memory_mebibytes", "disk_mebibytes", "tensorboard"}


@dataclass(frozen=True)
class RunFolder:
    """A run's folder; `finished` where its last file, `metrics.json`, is there."""

    path: Path
    writes: bool = True  # of several processes, one does

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return (self.path / "metrics.json").is_file()

    def write_json(self, name: str, values: Any) -> None:
        """Write a JSON file, whole or not at all."""
        self.write_text(name, json.dumps(values, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        """What a JSON file holds; None where it is not there."""
        file = self.path / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all; names that are not UTF-8 keep their bytes."""
        if self.writes:
            write_whole(self.path / name, text.encode("utf-8", "surrogateescape"))

    def read_split(self) -> tuple[Path, Task, tuple[Sample, ...]]:
        """(the root of the run's data, its task, its samples with their roles).

        Raises:
            RunError: where the folder holds no run.
        """
        facts = self.facts()
        try:
            task: Task = "multi" if facts["task"] == "multi" else "single"
            return Path(facts["root"]), task, splits.read_split(self.path / "split.csv", task)
        except (OSError, KeyError) as error:
            why = "holds no finished run of this version (split.csv or config.toml)"
            raise RunError(self.path, why, "Run `headstart train` again, or give --data.") from error

    def facts(self) -> dict[str, str]:
        """The data's path and fingerprint.

        Raises:
            RunError: where the folder holds no run.
        """
        try:
            return configs.read_facts(self.path / "config.toml")
        except (OSError, ValueError) as error:
            why = "holds no run (no config.toml that can be read)"
            raise RunError(self.path, why, "Give a folder that `headstart train` wrote.") from error


@contextlib.contextmanager
def open_run(
    out: str | os.PathLike[str] | None, data: Path, dataset: Dataset, config: RunConfig, resume: bool
) -> Iterator[RunFolder]:
    """The folder of a run, locked; made, or found again where the same run was interrupted.

    Args:
        out: the folder; None takes the next free `runs/<data name>-<n>`, or the last where it is this run, unfinished.
        data: the data's path.
        dataset: the data.
        config: the settings.
        resume: whether a finished run is fine.

    Raises:
        RunError: for a folder that is another run's, finished, in use, not writable or not a run's.
    """
    facts = {"data": os.path.abspath(data), "root": os.path.abspath(dataset.root), "task": dataset.task}
    facts["fingerprint"] = dataset.fingerprint
    path = Path(out) if out is not None else _next_folder(data, facts, config)
    with _locked(path):
        folder = RunFolder(path)
        if (path / "config.toml").exists():
            different = differences(folder, facts, config)
            if different:
                why = f"holds another run ({'; '.join(different)})"
                raise RunError(path, why, "Give another --out, or the same data and settings.")
            if folder.finished and not resume:
                raise RunError(path, "holds this run, finished", "Give another --out, or --resume to keep it.")
        elif any(entry.name != LOCK and not entry.name.endswith(".partial") for entry in path.iterdir()):
            raise RunError(path, "holds files that are no run's", "Give --out a new or empty folder.")
        else:
            folder.write_text("config.toml", configs.to_toml(config, facts))
        for file in path.glob(".*.partial"):  # left behind where a process was killed while writing
            file.unlink(missing_ok=True)
        try:
            yield folder
        except HeadstartError as error:
            # What was refused before any work leaves no run behind that the corrected command would differ from.
            if error.exit_status == 2 and not (path / "plan.json").exists():
                (path / "config.toml").unlink(missing_ok=True)
            raise


def differences(folder: RunFolder, facts: dict[str, str], config: RunConfig) -> list[str]:
    """What sets a folder's run apart from one with these facts and settings, in words."""
    try:
        there, known = configs.flatten(configs.resolve(folder.path / "config.toml")), folder.facts()
    except ConfigError as error:
        return [f"its settings cannot be read: {error.why}"]
    here = configs.flatten(config)
    found = [f"{name}: {there[name]!r} there, {here[name]!r} here" for name in here if there[name] != here[name]]
    found = [text for text in found if text.partition(":")[0] not in _FREE]
    if known.get("data") != facts["data"]:
        found.append(f"data: {known.get('data')!r} there, {facts['data']!r} here")
    elif known.get("fingerprint") != facts["fingerprint"]:
        found.append("the data have changed since")
    return found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The folder made and locked; the lock goes with the process, however it ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(path / LOCK)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(path, "another process is running in it", "Wait for it, or give another --out.") from error
    except OSError as error:
        why = f"cannot be written ({error.strerror or error})"
        raise RunError(path, why, "Give --out a folder that you may write to.") from error
    try:
        yield
    finally:
        if not (path / "config.toml").exists():  # refused: nothing is left behind
            (path / LOCK).unlink(missing_ok=True)
            if not any(path.iterdir()):
                path.rmdir()
        lock.release()


def _next_folder(data: Path, facts: dict[str, str], config: RunConfig) -> Path:
    name = Path(archives.strip_ending(os.path.abspath(data))).stem or "data"
    number = 1
    while (Path("runs") / f"{name}-{number}").exists():
        number += 1
    last = RunFolder(Path("runs") / f"{name}-{number - 1}")
    unfinished = number > 1 and (last.path / "config.toml").exists() and not last.finished
    if unfinished and not differences(last, facts, config):
        return last.path
    return Path("runs") / f"{name}-{number}"


class Clock:
    """Seconds by part of a run, and what is left of its time budget."""

    def __init__(self, budget: float | None) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()
        self._budget = budget

    def left(self) -> float | None:
        """Seconds left of the budget; None where there is none."""
        return None if self._budget is None else self._budget - (time.perf_counter() - self._start)

    def mark(self, part: str) -> None:
        """Book the time since the last mark on a part."""
        now = time.perf_counter()
        self.seconds[part], self._last = now - self._last, now
