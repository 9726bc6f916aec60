"""The errors that headstart raises on purpose: one tree, each with a remedy."""

from __future__ import annotations

import os


class HeadstartError(Exception):
    """Base of all errors raised on purpose.

    Its text is one line, `WHAT: SUBJECT: WHY. REMEDY`; `exit_status` is what the command line ends with.

    Args:
        subject: the file, folder, name or setting that is at fault.
        why: what is wrong with it; never empty.
        remedy: what the user can do about it; never empty.
    """

    what = "error"
    exit_status = 1

    def __init__(self, subject: str | os.PathLike[str], why: str, remedy: str) -> None:
        self.subject, self.why, self.remedy = os.fspath(subject), why.rstrip("."), remedy
        mark = "" if self.why.endswith("?") else "."
        text = f"{self.what}: {self.subject}: {self.why}{mark} {self.remedy}"
        super().__init__("".join(repr(c)[1:-1] if c in "\r\n" else c for c in text))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.subject, self.why, self.remedy)


class UsageError(HeadstartError):
    """A command or call that cannot be carried out as it was given."""

    what = "usage"
    exit_status = 2


class ConfigError(HeadstartError):
    """Settings with unknown names, wrong types or values out of range; all of them at once."""

    what = "settings"
    exit_status = 2


class DataError(HeadstartError):
    """A data set that cannot be used: missing, empty, one class only, contradictory."""

    what = "data"
    exit_status = 2


class UnreadableImage(HeadstartError):
    """One picture that cannot be decoded, or is over a limit."""

    what = "picture"


class BackboneError(HeadstartError):
    """A network that is unknown."""

    what = "backbone"
    exit_status = 2


class WeightsError(HeadstartError):
    """Weights that are not at hand, cannot be read, or do not fit the network."""

    what = "weights"
    exit_status = 2


class RunError(HeadstartError):
    """A run folder that cannot be used: another run's, locked, not writable, unfinished."""

    what = "run"
    exit_status = 2


class TrainingError(HeadstartError):
    """Training that cannot go on: a loss that is not finite, a full disk, a process that failed."""

    what = "training"


class DivergedError(TrainingError):
    """Training whose loss is not finite any more."""


class ModelFileError(HeadstartError):
    """A model file that cannot be loaded."""

    what = "model"
    exit_status = 2


class CorruptModel(ModelFileError):
    """A model file whose bytes are not those that were written (flipped, truncated)."""


class ForeignModel(ModelFileError):
    """A file that headstart did not write."""


class NewerModel(ModelFileError):
    """A model file of a newer schema than this version knows."""
