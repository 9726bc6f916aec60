"""Who learns from which picture: roles and folds, stratified and grouped, the same for a seed on any machine."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from headstart.data import Dataset, Role, Sample, Task
from headstart.errors import DataError

COLUMNS = ("source", "label", "group", "role")
FEW = 4  # pictures or groups of a class


def assign_roles(dataset: Dataset, groups: Mapping[str, str], report_share: float, seed: int) -> Dataset:
    """The data set with every picture in `fit` or `report`; given roles stay.

    A class of two or more pictures has at least one in each role; a class with one trains. With several labels a
    picture, every label trains.

    Args:
        dataset: single-label or multi-label.
        groups: source -> name of the group that must not part; pictures that are not named stand alone.
        report_share: the share of each class that goes to `report`.
        seed: the same seed gives the same split on any machine.
    """
    if dataset.has_roles:
        return dataset
    shares = (1.0 - report_share, report_share)
    parts = _deal(dataset.samples, groups, shares, seed, at_least_one=True)
    roles: tuple[Role, Role] = ("fit", "report")
    return dataset.with_samples(
        dataclasses.replace(sample, role=roles[part]) for sample, part in zip(dataset.samples, parts, strict=True)
    )


def assign_select(dataset: Dataset, groups: Mapping[str, str], share: float, seed: int, few: int = 1) -> Dataset:
    """The data set with a share of `fit` in `select`, stratified and grouped; a given `select` stays.

    A class of up to `few` pictures or groups stays in `fit`, with all that does not part from it.
    """
    if dataset.of_role("select"):
        return dataset
    units = _count_units(dataset.of_role("fit"), groups)
    small = {
        groups.get(sample.source, sample.source)
        for sample in dataset.of_role("fit")
        if any(units[label] <= few for label in sample.labels)
    }
    fitted = [sample for sample in dataset.of_role("fit") if groups.get(sample.source, sample.source) not in small]
    parts = _deal(fitted, groups, (1.0 - share, share), seed, at_least_one=True)
    chosen = {sample.source for sample, part in zip(fitted, parts, strict=True) if part}
    return dataset.with_samples(
        dataclasses.replace(sample, role="select") if sample.source in chosen else sample for sample in dataset.samples
    )


def give_select_to_fit(dataset: Dataset) -> Dataset:
    """The data set with nothing in `select`: its pictures are in `fit`."""
    return dataset.with_samples(
        dataclasses.replace(sample, role="fit") if sample.role == "select" else sample for sample in dataset.samples
    )


def draw_part(samples: Sequence[Sample], groups: Mapping[str, str], share: float, seed: int) -> list[bool]:
    """Whether each sample is in a share of them, stratified and grouped; every class is, where it has two or more."""
    return [part == 0 for part in _deal(samples, groups, (share, 1.0 - share), seed, at_least_one=True)]


def draw_enough(samples: Sequence[Sample], groups: Mapping[str, str], pictures: int, seed: int) -> list[bool]:
    """Whether each sample is in a part of about so many, stratified and grouped, by which something can be tried.

    It is larger where the classes of most pictures would have fewer than four pictures or groups there, as one of two
    that is held out says little; but over four times as large only where they would have fewer than two.
    """
    share = pictures / max(1, len(samples))
    while share < 1:
        chosen = draw_part(samples, groups, share, seed)
        units = _count_units([sample for sample, is_chosen in zip(samples, chosen, strict=True) if is_chosen], groups)
        counts = [units.get(label, 0) for sample in samples for label in sample.labels]
        if statistics.median_low(counts or [FEW]) >= (FEW if share * len(samples) < 4 * pictures else 2):
            return chosen
        share *= 1.5
    return [True] * len(samples)


def assign_folds(samples: Sequence[Sample], groups: Mapping[str, str], folds: int, seed: int) -> list[int]:
    """The cross-validation fold of each sample, 0 to folds - 1, stratified and grouped."""
    return _deal(samples, groups, (1.0 / folds,) * folds, seed, at_least_one=False)


def count_folds(samples: Sequence[Sample], groups: Mapping[str, str], wanted: int) -> int:
    """As many folds as wanted, fewer where a class has fewer pictures or groups; 0 where nothing can be held out.

    Only pictures that can be held out count: the others are learned from in every fold.
    """
    held_out = zip(samples, can_be_held_out(samples, groups), strict=True)
    counts = _count_units([sample for sample, can_be in held_out if can_be], groups)
    several = [count for count in counts.values() if count > 1]
    return min([wanted, *several]) if several else 0


def demand_folds(dataset: Dataset, folds: int) -> None:
    """There is something to cross-validate with.

    Raises:
        DataError: where nothing can be held out.
    """
    if not folds:
        why = "has no class with two pictures or groups for training: none can be held out to choose by"
        raise DataError(dataset.root, why, "Add pictures, or give smaller groups.")


def can_be_held_out(samples: Sequence[Sample], groups: Mapping[str, str]) -> list[bool]:
    """For each sample, whether its classes have another picture or group: else nothing of them would be learned."""
    units = _count_units(samples, groups)
    return [all(units[label] > 1 for label in sample.labels) for sample in samples]


def _count_units(samples: Sequence[Sample], groups: Mapping[str, str]) -> dict[str, int]:
    """Pictures and groups that do not part, a class."""
    units: defaultdict[str, set[str]] = defaultdict(set)
    for sample in samples:
        for label in sample.labels:
            units[label].add(groups.get(sample.source, sample.source))
    return {label: len(members) for label, members in units.items()}


def _deal(
    samples: Sequence[Sample],
    groups: Mapping[str, str],
    shares: Sequence[float],
    seed: int,
    at_least_one: bool,
) -> list[int]:
    """The part of each sample, by iterative stratification (Sechidis, Tsoumakas and Vlahavas, 2011) of whole groups.

    The rarest label is dealt first, each group to the part that still lacks most of that label. Order comes from a
    hash of seed and name, so neither the file system's order nor a random generator's version matters.
    """
    units: defaultdict[str, list[int]] = defaultdict(list)
    name_of = _find_names(samples)
    for index, sample in enumerate(samples):
        group = groups.get(sample.source)
        units["\0" + name_of(sample.source) if group is None else name_of(group)].append(index)
    order = sorted(units, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest())
    contents = {name: Counter(label for i in units[name] for label in samples[i].labels or ("",)) for name in order}
    totals: Counter[str] = Counter()
    for content in contents.values():
        totals.update(content)
    lacks = {label: [share * total for share in shares] for label, total in totals.items()}
    if at_least_one:
        _reserve(lacks, contents)
    holds = {label: [0] * len(shares) for label in totals}
    left = Counter(label for content in contents.values() for label in content)
    room = [share * len(samples) for share in shares]
    parts = [0] * len(samples)
    by_label: defaultdict[str, list[str]] = defaultdict(list)
    for name in order:
        by_label[min(contents[name], key=lambda label: (totals[label], label))].append(name)
    for label in sorted(by_label, key=lambda label: (totals[label], label)):
        # Large groups first: small ones then fill the gaps.
        for name in sorted(by_label[label], key=lambda name: -len(units[name])):
            allowed: Sequence[int] = range(len(shares))
            if at_least_one:
                empty = [p for p in allowed if not holds[label][p]]
                if left[label] <= len(empty):
                    allowed = empty[: left[label]]  # where not all can have one, the first part, `fit`, has it
                if any(left[other] == 1 and not holds[other][0] for other in contents[name]):
                    allowed = (0,)
            part = max(allowed, key=lambda p: (round(lacks[label][p], 9), round(room[p], 9), -p))
            for index in units[name]:
                parts[index] = part
            room[part] -= len(units[name])
            for other, count in contents[name].items():
                lacks[other][part] -= count
                holds[other][part] += count
                left[other] -= 1
    return parts


def _find_names(samples: Sequence[Sample]) -> Callable[[str], str]:
    """A function from sources to names that tell them apart wherever they lie.

    Sources outside the data set's folder are absolute; what is common to their paths says nothing. Their names begin
    with /, as no others do.
    """
    outside = [os.path.dirname(sample.source) for sample in samples if os.path.isabs(sample.source)]
    shared = os.path.commonpath(outside) if outside else ""

    def name(source: str) -> str:
        if not shared or not os.path.isabs(source):
            return source
        return "/" + os.path.relpath(source, shared).replace(os.sep, "/")

    return name


def _reserve(lacks: dict[str, list[float]], contents: Mapping[str, Counter[str]]) -> None:
    """Give every label that has two groups or more at least one picture in the smallest part."""
    groups_with = Counter(label for content in contents.values() for label in content)
    for label, wanted in lacks.items():
        smallest = min(range(len(wanted)), key=wanted.__getitem__)
        if groups_with[label] > 1 and wanted[smallest] < 1.0:
            total = sum(wanted)
            wanted[:] = [(total - 1.0) * w / (total - wanted[smallest]) for w in wanted]
            wanted[smallest] = 1.0


def to_csv(dataset: Dataset) -> str:
    """What stands in `split.csv`: source, label, group, role; several labels are joined by |."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for sample in dataset.samples:
        writer.writerow((sample.source, "|".join(sample.labels), sample.group, sample.role))
    return text.getvalue()


def read_split(path: Path, task: Task) -> tuple[Sample, ...]:
    """The samples of a `split.csv`."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    samples = []
    for row in rows:
        labels = tuple(filter(None, row["label"].split("|"))) if task == "multi" else (row["label"],)
        samples.append(Sample(row["source"], labels, row["group"], row["role"]))  # type: ignore[arg-type]
    return tuple(samples)
