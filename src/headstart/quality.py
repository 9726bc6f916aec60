"""What is wrong with a data set: unreadable pictures, duplicates and leaks, small and unbalanced classes, odd sizes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headstart.data import Dataset, Sample, count_classes
from headstart.errors import DataError

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

# Calibrated on photographs, X-rays, scenes, flowers and blood smears: pictures made smaller (to 60 %) and compressed
# again (JPEG quality 50) differ by at most 18 of 256 bits and 3 grey levels; different X-rays by at least 20 bits.
HASH_BITS = 16
GREY_LEVELS = 4.0
UNREADABLE_SHARE = 0.2
LARGEST_GROUP_SHARE = 0.05
SMALL_CLASS = 10
IMBALANCE = 10.0
RARE_SHARE = 0.01
CROWD = 100


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth knowing, and what can be done about it."""

    kind: str
    severity: Severity
    message: str
    remedy: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Audit:
    """The findings, gravest first, and the data set without the pictures that cannot be read."""

    findings: tuple[Finding, ...]
    clean: Dataset
    groups: dict[str, str]  # source -> group of near-duplicates and user-given groups that must not part
    duplicates: tuple[tuple[str, ...], ...]  # the sets of pictures that hang together as exact or near duplicates

    def to_json(self) -> dict[str, Any]:
        """The findings as JSON values."""
        count = Counter(finding.severity for finding in self.findings)
        return {
            "pictures": len(self.clean.samples),
            "classes": dict(count_classes(self.clean.samples)),
            "counts": {severity: count[severity] for severity in SEVERITIES},
            "findings": [asdict(finding) for finding in self.findings],
        }


def inspect(
    dataset: Dataset,
    digests: Sequence[str],
    facts: dict[str, NDArray[Any]],
    unreadable: dict[str, str],
    strict: bool = True,
) -> Audit:
    """The audit of a data set from what one pass over its pictures gave.

    Args:
        dataset: as it was read.
        digests: content digests of the readable pictures, in order.
        facts: their facts, arrays by the names of `images.Facts`.
        unreadable: source -> reason of the others.
        strict: whether more unreadable pictures than a fifth of a class are an error, as they are for training.

    Raises:
        DataError: where they are.
    """
    if strict:
        _check_share(dataset, unreadable)
    clean = dataset.with_samples(sample for sample in dataset.samples if sample.source not in unreadable)
    pairs = find_duplicates(digests, facts["hash"], facts["thumbnail"]) if len(digests) else []
    groups, too_large = _group(clean.samples, pairs, digests)
    findings = [
        *_unreadable_findings(unreadable),
        *_duplicate_findings(clean.samples, pairs, digests),
        *_group_findings(too_large),
        *_class_findings(clean),
        *_size_findings(clean, facts),
        *_leftover_findings(dataset),
    ]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    sets = tuple(tuple(clean.samples[i].source for i in group) for group in _components(len(clean.samples), pairs))
    return Audit(tuple(findings), clean, groups, sets)


def _check_share(dataset: Dataset, unreadable: dict[str, str]) -> None:
    total, lost = count_classes(dataset.samples), count_classes(s for s in dataset.samples if s.source in unreadable)
    for label, count in lost.items():
        if count > UNREADABLE_SHARE * total[label]:
            first = next(s.source for s in dataset.samples if s.source in unreadable and label in s.labels)
            why = (
                f"{count} of {total[label]} pictures of class {label!r} cannot be read, {first!r}: {unreadable[first]}"
            )
            raise DataError(dataset.root, why, "Replace them; `headstart audit` lists all of them.")


def find_duplicates(
    digests: Sequence[str], hashes: NDArray[np.uint8], thumbnails: NDArray[np.uint8]
) -> list[tuple[int, int]]:
    """Pairs (a, b), a < b, of pictures with equal content, or with near hashes and near thumbnails.

    Two hashes of at most 16 different bits agree in at least one of 17 bands of bits, so only pictures that share a
    band are compared, not all with all. Of a run of equal contents, each is paired with the first.

    Args:
        digests: content digests.
        hashes: (n, 32), 256 bits.
        thumbnails: (n, 16, 16).
    """
    pairs: set[tuple[int, int]] = set()
    first_with: dict[str, int] = {}
    for index, digest in enumerate(digests):
        first = first_with.setdefault(digest, index)
        if first != index:
            pairs.add((first, index))
    unique = np.array(sorted(first_with.values()), dtype=np.int64)
    bits = np.unpackbits(hashes[unique], axis=1)
    words, grey = hashes[unique].view(np.uint64), thumbnails[unique].reshape(len(unique), 256).astype(np.int16)
    for band in np.array_split(np.arange(bits.shape[1]), HASH_BITS + 1):
        keys = np.packbits(bits[:, band], axis=1)
        for members in _runs(keys):
            waiting = members
            while len(waiting) > 1:
                member, others = waiting[0], waiting[1:]
                near = others[_count_bits(words[others] ^ words[member]) <= HASH_BITS]
                near = near[np.abs(grey[near] - grey[member]).mean(1) <= GREY_LEVELS]
                pairs.update((int(unique[member]), int(unique[other])) for other in near)
                # Of a crowd, such as a camera's empty frames, those that hang on the first need no more comparing.
                waiting = np.setdiff1d(others, near) if len(members) > CROWD else others
    return sorted(pairs)


def _runs(keys: NDArray[np.uint8]) -> Iterable[NDArray[np.int64]]:
    """The rows with equal keys, as ascending index arrays of two or more."""
    _, inverse, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(inverse.ravel(), kind="stable")
    return (run for run in np.split(order, np.cumsum(counts)[:-1]) if len(run) > 1)


def _count_bits(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    bits: NDArray[np.int64] = np.unpackbits(words.view(np.uint8), axis=1).sum(1, dtype=np.int64)
    return bits


def _components(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The sets of two or more that pairs hang together, each ascending."""
    parent = list(range(count))

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for a, b in pairs:
        one, two = find(a), find(b)
        parent[max(one, two)] = min(one, two)
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index in range(count):
        members[find(index)].append(index)
    return [group for group in members.values() if len(group) > 1]


def _group(
    samples: Sequence[Sample], pairs: Iterable[tuple[int, int]], digests: Sequence[str]
) -> tuple[dict[str, str], list[tuple[Sample, ...]]]:
    """(source -> group of more than one picture, the sets over 5 % of the data).

    In such a set near-duplicates are not kept together: they may be a chain of what only looks alike. Equal files and
    groups that the user gave always are.
    """
    first_of: dict[str, int] = {}
    given = [(first_of.setdefault(s.group, i), i) for i, s in enumerate(samples) if s.group]
    limit = max(5, LARGEST_GROUP_SHARE * len(samples))
    too_large = [group for group in _components(len(samples), [*pairs, *given]) if len(group) > limit]
    crowded = {index for group in too_large for index in group}
    kept = [*given, *(pair for pair in pairs if pair[0] not in crowded or digests[pair[0]] == digests[pair[1]])]
    groups = {
        samples[index].source: samples[group[0]].source for group in _components(len(samples), kept) for index in group
    }
    return groups, [tuple(samples[index] for index in group) for group in too_large]


def _unreadable_findings(unreadable: dict[str, str]) -> Iterable[Finding]:
    for source, why in unreadable.items():
        yield Finding("unreadable", "error", f"{source}: {why}", "Replace it or leave it out.", (source,))


def _duplicate_findings(
    samples: Sequence[Sample], pairs: Sequence[tuple[int, int]], digests: Sequence[str]
) -> Iterable[Finding]:
    """One finding for each set of duplicates: across roles (a leak) or classes (a wrong label) is worse than within."""
    for group in _components(len(samples), pairs):
        members = [samples[index] for index in group]
        sources = tuple(member.source for member in members)
        exact = "the same file" if len({digests[index] for index in group}) == 1 else "nearly the same picture"
        many_labels = len({member.labels for member in members}) > 1
        many_roles = len({member.role for member in members}) > 1
        if many_labels:
            shown = ", ".join(f"{member.source} ({'|'.join(member.labels) or 'none'})" for member in members)
            yield Finding(
                "duplicate with another label", "warning", f"{exact}: {shown}", "Correct the labels.", sources
            )
        if many_roles:
            shown = ", ".join(f"{member.source} ({member.role})" for member in members)
            yield Finding(
                "leak", "warning", f"{exact}: {shown}", "Keep them in one role: the result flatters.", sources
            )
        if not many_labels and not many_roles:
            yield Finding("duplicate", "note", f"{exact}: {', '.join(sources)}", "One of them is enough.", sources)


def _group_findings(too_large: Iterable[tuple[Sample, ...]]) -> Iterable[Finding]:
    for group in too_large:
        message = f"{len(group)} pictures hang together, over 5 % of the data: look-alikes among them may part"
        remedy = "Check whether they really are duplicates."
        yield Finding("large group", "warning", message, remedy, tuple(sample.source for sample in group))


def _class_findings(dataset: Dataset) -> Iterable[Finding]:
    counts = count_classes(s for s in dataset.samples if s.role in ("", "fit"))
    for label in dataset.classes:
        if counts[label] < SMALL_CLASS:
            message = f"class {label!r} has {_pictures(counts[label])} for training"
            extra = " One alone is used for training, never for the report." if counts[label] == 1 else ""
            yield Finding("small class", "warning", message, "Add more." + extra)
    if dataset.task == "multi":
        for label in dataset.classes:
            without = len(dataset.samples) - count_classes(dataset.samples)[label]
            if without < SMALL_CLASS:
                message = f"only {_pictures(without)} without the label {label!r}"
                yield Finding("label nearly everywhere", "warning", message, "Its figures will say little; add some.")
    elif counts and max(counts.values()) > IMBALANCE * max(1, min(counts[label] for label in dataset.classes)):
        most = max(dataset.classes, key=lambda label: counts[label])
        least = min(dataset.classes, key=lambda label: counts[label])
        message = f"class {most!r} has {counts[most]} pictures for training, {least!r} has {counts[least]}"
        yield Finding("imbalance", "warning", message, "Look at balanced accuracy, not at accuracy.")
    for role in ("select", "report"):
        here = count_classes(dataset.of_role(role))
        absent = [label for label in dataset.classes if not here[label]] if here else []
        if absent:
            names = ", ".join(map(repr, absent[:10])) + (" and more" if len(absent) > 10 else "")
            message = f"the {role} pictures have none of {names}"
            yield Finding("class missing in a split", "warning", message, "Its figures cannot be measured; add some.")


def _pictures(count: int) -> str:
    return f"{count} picture" if count == 1 else f"{count} pictures"


def _size_findings(dataset: Dataset, facts: dict[str, NDArray[Any]]) -> Iterable[Finding]:
    if not dataset.samples:
        return
    width, height = facts["width"].astype(np.int64), facts["height"].astype(np.int64)
    short, area = np.minimum(width, height), width * height
    shape = np.maximum(width, height) / np.maximum(1, short)
    median = float(np.median(area))
    flat = facts["thumbnail"].reshape(len(width), -1).std(1, dtype=np.float32)
    checks: tuple[tuple[str, NDArray[np.bool_], str, str], ...] = (
        ("tiny picture", short < 32, "has a side under 32 pixels", "Check that it is a real picture."),
        ("odd shape", shape > 4, "is more than four times as long as wide", "A centre crop shows a small part of it."),
        (
            "odd size",
            (area < median / 16) | (area > median * 64),
            "is far from the usual size",
            "Check where it is from.",
        ),
        ("flat picture", flat < 2.0, "is nearly all of one grey", "Check that it shows something."),
    )
    suffixes = [Path(sample.source).suffix.lower().replace("jpeg", "jpg") for sample in dataset.samples]
    counts = Counter(suffixes)
    rare = np.array([counts[suffix] <= RARE_SHARE * len(suffixes) for suffix in suffixes])
    checks += (("odd format", rare, "is of a format that few others have", "Check where it is from."),)
    for kind, found, what, remedy in checks:
        for index in np.flatnonzero(found):
            message = f"{dataset.samples[index].source} ({width[index]}x{height[index]}) {what}"
            yield Finding(kind, "note", message, remedy, (dataset.samples[index].source,))


def _leftover_findings(dataset: Dataset) -> Iterable[Finding]:
    for notice in dataset.notices:
        yield Finding("reading", "warning", notice, "Check that this is meant.")
    for source, why in dataset.ignored:
        yield Finding("left out", "note", f"{source}: {why}", "Nothing, if it is not meant to be used.", (source,))
