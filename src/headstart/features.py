"""Features of pictures, computed once: a cache on disk keyed by content, and the one pass that fills it.

A feature belongs to a picture's content and to the network, weights, preprocessing and number format it was made with,
not to a file name or a split. torch is imported where it is used, so that decoding can begin before it is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from headstart import loading
from headstart.errors import RunError
from headstart.files import mark_used, write_whole
from headstart.images import Facts, Limits, Preprocess
from headstart.loading import Picture, Wanted

if TYPE_CHECKING:
    from headstart.zoo import Spec

log = logging.getLogger(__name__)

Columns = dict[str, NDArray[Any]]
Place = tuple[Path, int]
T = TypeVar("T")
Track = Callable[[Iterable[Picture], int], Iterable[Picture]]

CACHE_BYTES = 10 * 10**9
SHARD_ROWS = 2048
_OURS = re.compile(r"(facts-\d+|[0-9a-f]{32}-\w+-\w+)/\.?[0-9a-f]{64}\.safetensors(\..*\.partial)?")
FACTS_KEY = "facts-1"  # counts up when `images.describe` or `images.open_image` change their results


@dataclass(frozen=True)
class Features:
    """A feature matrix, float32 (n, dim), with a row for each source, in the sources' order."""

    matrix: NDArray[np.float32]
    sources: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class Survey:
    """What one pass over pictures gave without a network. Those that could not be read have a reason and no row."""

    sources: tuple[str, ...]
    digests: tuple[str, ...]  # SHA-256 of each row's file
    facts: Columns  # width, height (n,), hash (n, 32), thumbnail (n, 16, 16): the fields of `images.Facts`
    unreadable: dict[str, str]
    seconds: dict[str, float]  # network: building it; decode, forward: summed over threads
    computed: int = 0  # pictures whose features were not in the cache
    pace: float = 0.0  # seconds in which one of them was opened and its features computed, all cores at work

    @property
    def ratio(self) -> float:
        """Of the longer side to the shorter one, of the picture that is farthest from a square; 1 without pictures."""
        if not self.sources:
            return 1.0
        wide, high = (self.facts[name].astype(float) for name in ("width", "height"))
        return float(np.max(np.maximum(wide / high, high / wide)))


def key_of(spec: Spec) -> str:
    """What features of a network are kept under, together with the number format and the kind of device."""
    described = spec.to_json()
    for name in ("name", "weights"):  # two names for the same weights give the same features
        del described[name]
    return hashlib.sha256(json.dumps({"format": 1, "spec": described}, sort_keys=True).encode()).hexdigest()[:32]


class DamagedShard(Exception):
    """A row that should be in the cache is not, or its file's bytes have changed: it is computed again."""


@dataclass(frozen=True)
class Store:
    """Rows of arrays by content digest, in files that are written once: safe with several processes and `kill -9`.

    A shard is a safetensors file whose name is the SHA-256 of its bytes.
    """

    folder: Path

    def index(self) -> dict[str, Place]:
        """Where each digest's row stands: shard and row. Reads the digests only."""
        from safetensors import SafetensorError, safe_open

        places: dict[str, Place] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="np") as shard:
                    rows = shard.get_tensor("digest")
            except OSError as error:  # tidied away by another process, or not ours to read: no damage
                log.info("cache: %s: cannot be read (%s)", file, error.strerror or error)
                continue
            except SafetensorError as error:
                log.warning("cache: %s: is damaged and was thrown away (%s)", file, error)
                file.unlink(missing_ok=True)
                continue
            places.update((digest.tobytes().hex(), (file, row)) for row, digest in enumerate(rows))
        return places

    def gather(self, digests: Sequence[str], places: dict[str, Place]) -> Columns:
        """The rows of these digests as arrays by name, in order; one shard is in memory at a time.

        Raises:
            DamagedShard: where a shard's bytes have changed or the shard has gone; it is deleted.
            RunError: where a shard that could be looked into cannot be read.
        """
        from safetensors.numpy import load

        by_file: defaultdict[Path, list[tuple[int, int]]] = defaultdict(list)
        for position, digest in enumerate(digests):
            if digest not in places:
                raise DamagedShard(digest)
            file, row = places[digest]
            by_file[file].append((position, row))
        columns: Columns = {}
        for file, pairs in by_file.items():
            shard = load(_read_checked(file))
            positions, rows = map(list, zip(*pairs, strict=True))
            for name, array in shard.items():
                if name not in columns:
                    columns[name] = np.empty((len(digests), *array.shape[1:]), array.dtype)
                columns[name][positions] = array[rows]
        return columns

    def append(self, digests: Sequence[str], columns: Columns) -> None:
        """Write rows as a new shard."""
        from safetensors.numpy import save

        rows = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(len(digests), 32)
        content = save({"digest": rows, **{name: np.ascontiguousarray(array) for name, array in columns.items()}})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors", content)
        except OSError as error:
            why = f"cannot be written ({error.strerror})"
            raise RunError(self.folder, why, "Free some space, or give --cache DIR.") from error


def _read_checked(file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:  # another process has tidied up
        raise DamagedShard(file) from error
    except OSError as error:
        raise RunError(file, f"cannot be read ({error.strerror})", "Delete it, or give --cache DIR.") from error
    mark_used(file)
    if hashlib.sha256(content).hexdigest() != file.stem:
        log.warning("cache: %s: is damaged and was thrown away", file)
        file.unlink(missing_ok=True)
        raise DamagedShard(file)
    return content


def tidy(folder: Path, limit_bytes: int = CACHE_BYTES) -> None:
    """Delete the least recently used shards of a cache that is over its limit, and what killed runs left behind."""
    entries = []
    for file in folder.glob("*/*"):
        if not _OURS.fullmatch(f"{file.parent.name}/{file.name}"):
            continue  # somebody may have named a folder that holds other things
        try:
            status = file.stat()
        except FileNotFoundError:
            continue  # another process tidies too
        if file.suffix == ".partial" and time.time() - status.st_mtime > 3600:
            file.unlink(missing_ok=True)
        elif file.suffix == ".safetensors":
            entries.append((status.st_mtime, status.st_size, file))
    excess = sum(size for _, size, _ in entries) - limit_bytes
    for _, size, file in sorted(entries):
        if excess <= 0:
            break
        file.unlink(missing_ok=True)
        excess -= size


@contextlib.contextmanager
def open_cache(choice: str, default: Path, spare: Path | None = None) -> Iterator[Path]:
    """The folder that features are kept in: the default for `auto`, a temporary one for `none`, else the one named.

    Where the default cannot be written, `spare` is used, and that is logged.
    """
    if choice == "none":
        with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
            yield Path(folder)
        return
    folder_path = default if choice == "auto" else Path(choice)
    try:
        folder_path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder_path):
            pass
    except OSError as error:
        if choice != "auto" or spare is None:
            why = f"cannot be written ({error.strerror})"
            raise RunError(folder_path, why, "Give --cache another folder, or none.") from error
        log.warning("cache: %s cannot be written (%s): %s is used", folder_path, error.strerror, spare)
        folder_path = spare
    yield folder_path


def extract(
    paths: Sequence[Path],
    sources: Sequence[str],
    spec: Spec,
    find_format: Callable[[], str],
    make_embedder: Callable[[], loading.Compute],
    cache: Path,
    limits: Limits = Limits(),
    track: Track = lambda pictures, total: pictures,
) -> tuple[Features, Survey]:
    """Features and facts of pictures, each decoded at most once; what the cache holds is not computed again.

    Args:
        paths: the picture files.
        sources: their names in the result.
        spec: the network.
        find_format: gives number format and kind of device, such as `bfloat16-cpu`; it may take its time (and import
            torch): pictures are being decoded meanwhile.
        make_embedder: gives the network, ready to run; called when the first picture needs it.
        cache: folder of the cache. An interrupt leaves there what was computed so far.
        limits: what is too large to be opened.
        track: wraps the pictures to show progress; called with them and their number.
    """
    key, facts = key_of(spec), Store(cache / FACTS_KEY)
    # Which format it will be is not known yet. What is there in any format is not decoded in the first pass; should
    # it turn out to be missing in this one, there is a second.
    known = {digest for folder in cache.glob(f"{key}-*") for digest in Store(folder).index()}
    while True:
        filler = _Filler(facts)
        wanted = Wanted(spec.preprocess, limits, True, known, facts.index().keys())
        with contextlib.closing(loading.process(paths, wanted, filler.timed(make_embedder))) as stream:
            vectors = filler.vectors = Store(cache / f"{key}-{find_format()}")
            filler.drain(track(stream, len(paths)))
        rows = filler.readable()
        try:
            digests = [filler.digests[row] for row in rows]
            matrix = vectors.gather(digests, vectors.index()).get("vector", np.empty((0, 0), np.float32))
            survey = filler.survey(sources)
        except DamagedShard:
            known = set(vectors.index())
            continue
        tidy(cache)
        return Features(matrix, survey.sources, vectors.folder.name), survey


def survey(
    paths: Sequence[Path],
    sources: Sequence[str],
    cache: Path,
    limits: Limits = Limits(),
    track: Track = lambda pictures, total: pictures,
) -> Survey:
    """The facts of pictures, without a network; the arguments are those of `extract`."""
    facts = Store(cache / FACTS_KEY)
    while True:
        filler = _Filler(facts)
        wanted = Wanted(Preprocess(), limits, True, _Everything(), facts.index().keys())
        with contextlib.closing(loading.process(paths, wanted, _no_network)) as stream:
            filler.drain(track(stream, len(paths)))
        try:
            return filler.survey(sources)
        except DamagedShard:
            continue


class _Everything:
    """Holds every digest: no picture's pixels are wanted."""

    def __contains__(self, digest: object) -> bool:
        return True


def _no_network() -> loading.Compute:
    raise AssertionError("a survey wants no pixels")


class _Filler:
    """Takes in pictures and writes their vectors and facts into the stores, a shard at a time."""

    def __init__(self, facts: Store) -> None:
        self.digests: dict[int, str] = {}
        self.errors: dict[int, str] = {}
        self.seconds = {"network": 0.0, "decode": 0.0, "forward": 0.0}
        self._computed, self._busy = 0, 0.0  # pictures, and what they took of all threads
        self.facts = facts
        self.vectors: Store | None = None
        self._new_vectors: dict[str, NDArray[np.float32]] = {}
        self._new_facts: dict[str, Facts] = {}

    @property
    def pace(self) -> float:
        """Seconds in which a picture is opened and its features computed, all cores at work; 0 where none was."""
        return self._busy / self._computed / loading.count_cpus() if self._computed else 0.0

    def timed(self, make: Callable[[], T]) -> Callable[[], T]:
        """The function, its time kept."""

        def call() -> T:
            start = time.perf_counter()
            result = make()
            self.seconds["network"] += time.perf_counter() - start
            return result

        return call

    def drain(self, pictures: Iterable[Picture]) -> None:
        """Take in all pictures; whatever ends it, what came is written."""
        try:
            for picture in pictures:
                self._add(picture)
        finally:
            self._flush()

    def readable(self) -> list[int]:
        """The positions of the pictures that could be read."""
        return [index for index in sorted(self.digests) if index not in self.errors]

    def survey(self, sources: Sequence[str]) -> Survey:
        """What is known of the pictures now."""
        rows = self.readable()
        digests = tuple(self.digests[row] for row in rows)
        unreadable = {sources[row]: why for row, why in sorted(self.errors.items())}
        facts = self.facts.gather(digests, self.facts.index())
        there = tuple(sources[row] for row in rows)
        return Survey(there, digests, facts, unreadable, self.seconds, self._computed, self.pace)

    def _add(self, picture: Picture) -> None:
        self.digests[picture.index] = picture.digest
        self.seconds["decode"] += picture.decode_seconds
        self.seconds["forward"] += picture.compute_seconds
        if picture.error:
            self.errors[picture.index] = picture.error
        if picture.facts is not None:
            self._new_facts[picture.digest] = picture.facts
        if picture.vector is not None:
            self._new_vectors[picture.digest] = picture.vector
            self._computed += 1
            self._busy += picture.decode_seconds + picture.compute_seconds
        if max(len(self._new_vectors), len(self._new_facts)) >= SHARD_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._new_vectors and self.vectors is not None:
            self.vectors.append(list(self._new_vectors), {"vector": np.stack(list(self._new_vectors.values()))})
        if self._new_facts:
            names = ("width", "height", "hash", "thumbnail")
            columns = {name: np.array([getattr(facts, name) for facts in self._new_facts.values()]) for name in names}
            self.facts.append(list(self._new_facts), columns)
        self._new_vectors, self._new_facts = {}, {}
