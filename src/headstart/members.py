"""What zips and tars hold: their members, with what can be wrong with each of them, and the members' content.

zipfile and tarfile read the formats; nothing here follows a link or believes a name, a size or a header.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import os
import re
import stat
import tarfile
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from headstart.errors import DataError, HeadstartError

BLOCK_BYTES = 2**20
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "lzma"}  # by a file's first bytes
_UNIX = 3  # the system that a zip was made on
_LINK = "is a link, which is not followed"
_SPECIAL = "is no regular file"

Decompress = Callable[[BinaryIO], BinaryIO]


@dataclass(frozen=True)
class Bounds:
    """What an archive may hold at most; more is a mistake, or made to fill a memory or a disk.

    Photographs are compressed already and unpack to their own size; drawings and masks stored as BMP or TIFF may come
    to a hundred times theirs. Deflate reaches a thousand times, bzip2 and xz far more, and only pictures of a single
    colour or ill will come near that. Up to 100 MB no ratio does harm.
    """

    members: int = 1_000_000
    bytes: int = 10**12
    ratio: float = 200.0
    harmless_bytes: int = 100 * 10**6


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive; `why` says what keeps it from being read."""

    name: str  # clean: with /, relative, below the archive's top
    size: int
    place: Any  # a zip's own entry, or where in a tar the content begins
    why: str = ""


@dataclass(frozen=True, eq=False)
class Contents:
    """What an archive holds: its files by name, and (name, why) of what is no file below its top."""

    members: Mapping[str, Member]
    ignored: tuple[tuple[str, str], ...]
    pieces: Callable[[Member], Iterator[bytes]]

    def read(self, member: Member) -> Iterator[bytes]:
        """A member's content in pieces, as many bytes as were announced; several threads may read at once.

        Raises:
            OSError: with the reason in words, where the member is damaged, cut short or encrypted.
        """
        if member.why:
            raise OSError(member.why)
        count = 0
        try:
            for piece in self.pieces(member):
                count += len(piece)
                yield piece
        # Damage leads the libraries to any exception: BadZipFile, zlib.error, EOFError, NotImplementedError...
        except Exception as error:
            raise OSError(f"is damaged in its archive ({explain(error)})") from error
        if count != member.size:
            raise OSError(f"is cut short in its archive ({count} of {member.size} bytes)")


def open_archive(archive: Path, bounds: Bounds, expand: Callable[[Decompress], Path]) -> Contents:
    """What an archive holds.

    Args:
        archive: a .zip, or else a tar.
        bounds: what is too much.
        expand: makes a plain tar of one that is compressed as a whole, and gives its path.

    Raises:
        DataError: for a file that is missing, no such archive, damaged, or over the bounds.
    """
    if archive.suffix.lower() == ".zip":
        return _open_zip(archive, bounds)
    decompress = _find_decompressor(archive)
    return _open_tar(archive if decompress is None else expand(decompress), archive, bounds)


def explain(error: Exception) -> str:
    """What an error says, on one line and never nothing."""
    text = getattr(error, "strerror", None) or str(error) or "it ends too early" * isinstance(error, EOFError)
    return " ".join(text.split())[:150] or type(error).__name__


def _unreadable(archive: Path, error: Exception) -> DataError:
    return DataError(
        archive, f"cannot be read as an archive ({explain(error)})", "Get it again from where it came from."
    )


def _collect(
    archive: Path, found: Iterable[tuple[Member, str]], bounds: Bounds
) -> tuple[dict[str, Member], tuple[tuple[str, str], ...]]:
    """(members by name, what is left out and why). Each comes with what is wrong with it, or an empty text."""
    members: dict[str, Member] = {}
    ignored = []
    packed, total = archive.stat().st_size, 0
    for count, (member, wrong) in enumerate(found, 1):
        wrong = wrong or _find_fault(member.name)
        total += 0 if wrong else member.size
        check_bounds(archive, count, total, packed, bounds)
        if wrong:
            ignored.append((member.name, wrong))
            continue
        name = "/".join(part for part in member.name.split("/") if part not in ("", "."))
        if name in members:
            ignored.append((name, "stands there more than once, and the last one counts"))
        members[name] = dataclasses.replace(member, name=name)
    return members, tuple(ignored)


def check_bounds(archive: Path, count: int, total: int, packed: int, bounds: Bounds) -> None:
    """Raise `DataError` for an archive of `packed` bytes that holds too many files, or too many bytes in `total`."""
    if count > bounds.members:
        why = f"holds more than {bounds.members:,} files"
    elif total > bounds.bytes:
        why = f"unpacks to more than {bounds.bytes / 1e9:g} GB"
    elif total > bounds.harmless_bytes and total > bounds.ratio * packed:
        why = f"unpacks to more than {bounds.ratio:g} times its size, as files do that are made to fill disks"
    else:
        return
    raise DataError(archive, why, "If you trust it, unpack it yourself and give the folder.")


def _find_fault(name: str) -> str:
    """Why a member's name cannot be that of a file below a folder, on any system; or an empty text."""
    if "\0" in name:
        return "has a name with a zero byte"
    if "\\" in name:
        return "has a name with a backslash"
    if name.startswith("/"):
        return "has an absolute name"
    if re.match("[A-Za-z]:", name):
        return "has a name that begins with a drive's"
    if ".." in name.split("/"):
        return "has a name that leads out of the archive"
    return "" if name.strip("./") else "has no name"


# Zips


def _open_zip(archive: Path, bounds: Bounds) -> Contents:
    try:
        opened = zipfile.ZipFile(archive)
    except Exception as error:  # a damaged directory leads zipfile to struct.error, UnicodeDecodeError...
        raise _unreadable(archive, error) from error
    entries = (entry for entry in opened.infolist() if not entry.orig_filename.endswith("/"))
    members, ignored = _collect(archive, map(_describe_zipped, entries), bounds)
    return Contents(members, ignored, functools.partial(_unzip, opened, threading.Lock()))


def _describe_zipped(entry: zipfile.ZipInfo) -> tuple[Member, str]:
    """(the member that an entry stands for, why it is no file)."""
    kind = stat.S_IFMT(entry.external_attr >> 16) if entry.create_system == _UNIX else 0
    wrong = "" if kind in (0, stat.S_IFREG) else _LINK if kind == stat.S_IFLNK else _SPECIAL
    why = "is encrypted" if entry.flag_bits & 0x1 else ""
    return Member(_name_zipped(entry), entry.file_size, entry, why), wrong


def _name_zipped(entry: zipfile.ZipInfo) -> str:
    """An entry's name. One not marked as UTF-8 often is it all the same; else Unix keeps bytes, DOS code page 437."""
    name = entry.orig_filename
    if entry.flag_bits & 0x800 or name.isascii():
        return name
    raw = name.encode("cp437")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("utf-8", "surrogateescape") if entry.create_system == _UNIX else name


def _unzip(opened: zipfile.ZipFile, lock: threading.Lock, member: Member) -> Iterator[bytes]:
    entry: zipfile.ZipInfo = member.place
    # bzip2 and xz unpack all that they are given at once: giving little keeps a bomb small
    safe = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    with lock:  # zipfile's count of its open members is not safe for threads; reading is
        stream = opened.open(entry)
    try:
        while piece := stream.read(BLOCK_BYTES if safe else 4096):
            yield piece
    finally:
        with lock:
            stream.close()


# Tars


class _Headers(io.FileIO):
    """A tar whose headers are read: one of a size that no real one has is not read into memory."""

    def read(self, count: int | None = -1, /) -> Any:
        if count is None or not 0 <= count <= BLOCK_BYTES:
            raise tarfile.ReadError(f"a header of {count} bytes")
        return super().read(count)


def _open_tar(tar: Path, archive: Path, bounds: Bounds) -> Contents:
    """What a plain tar holds; `archive` is the file that it came from."""
    try:
        members, ignored = _collect(archive, _walk_tar(tar), bounds)
        descriptor = os.open(tar, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except HeadstartError:
        raise
    except Exception as error:  # damaged headers lead tarfile to RecursionError, OverflowError...
        raise _unreadable(archive, error) from error
    contents = Contents(members, ignored, functools.partial(_cut_out, descriptor))
    # Kept open, so that a file that somebody tidies away meanwhile can still be read.
    weakref.finalize(contents, os.close, descriptor)
    return contents


def _walk_tar(tar: Path) -> Iterator[tuple[Member, str]]:
    """(member, why it is no file) of everything in a plain tar but folders."""
    end = -1
    with (
        _Headers(tar) as file,
        tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as opened,
    ):
        while (entry := opened.next()) is not None:
            opened.members.clear()  # type: ignore[attr-defined]  # else a million of them would be kept
            if entry.size < 0 or entry.offset_data <= end:
                raise tarfile.ReadError(f"headers overlap at byte {entry.offset_data}")
            end = entry.offset_data
            if not entry.isdir():
                wrong = _LINK if entry.issym() or entry.islnk() else "" if entry.isreg() else _SPECIAL
                wrong = wrong or ("is a sparse file" if entry.issparse() else "")
                yield Member(entry.name, entry.size, entry.offset_data), wrong
        # tarfile takes a damaged header for the end; the real end is a block of zeros
        file.seek(opened.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"damaged or cut short at byte {opened.offset}")


def _cut_out(descriptor: int, member: Member) -> Iterator[bytes]:
    place, left = member.place, member.size
    while left and (piece := _read_at(descriptor, min(left, BLOCK_BYTES), place)):
        yield piece
        place, left = place + len(piece), left - len(piece)


_seeking = threading.Lock()


def _read_at(descriptor: int, count: int, place: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, count, place)
    with _seeking:  # Windows
        os.lseek(descriptor, place, os.SEEK_SET)
        return os.read(descriptor, count)


# Compressed tars can only be read from the beginning: whoever wants their members makes a plain tar of them first


def _find_decompressor(archive: Path) -> Decompress | None:
    """What opens a compressed file, told by its first bytes; None for one that is not compressed."""
    try:
        with archive.open("rb") as file:
            start = file.read(6)
    except OSError as error:
        raise _unreadable(archive, error) from error
    for mark, module in _COMPRESSIONS.items():
        if start.startswith(mark):
            found: Decompress = importlib.import_module(module).open
            return found
    return None


def expand(archive: Path, decompress: Decompress, target: Path, bounds: Bounds, remedy: str) -> Path:
    """Decompress a file, whole or not at all; the target.

    Raises:
        DataError: where it is damaged or over the bounds; where there is no room, with what it needs and the remedy.
    """
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    packed, done, written = archive.stat().st_size, 0, 0
    try:
        with partial.open("wb") as file:
            for block, done in _decompressed(archive, decompress):  # noqa: B007
                written += len(block)
                check_bounds(archive, 0, written, packed, bounds)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        needed = written * packed / max(done, 1) / 2**20
        why = f"needs about {needed:,.0f} MiB in {target.parent}, which cannot be written ({explain(error)})"
        raise DataError(archive, why, remedy) from error
    finally:
        with contextlib.suppress(OSError):  # the error that matters is the one of writing
            partial.unlink(missing_ok=True)
    return target


def _decompressed(archive: Path, decompress: Decompress) -> Iterator[tuple[bytes, int]]:
    """(a block of the content, how many bytes of the archive were read so far)."""
    try:
        with archive.open("rb") as raw, decompress(raw) as stream:
            while block := stream.read(BLOCK_BYTES):
                yield block, raw.tell()
    except Exception as error:  # damage: EOFError, BadGzipFile, zlib.error, LZMAError...
        raise _unreadable(archive, error) from error
