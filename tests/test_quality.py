"""What an audit finds: duplicates and leaks, unreadable pictures, small classes, odd pictures."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import COLOURS, draw_shape
from headstart import features, quality
from headstart.data import Dataset, Sample
from headstart.errors import DataError
from headstart.images import Facts, describe, open_image
from headstart.quality import SEVERITIES, find_duplicates, inspect


def columns(facts: Iterable[Facts]) -> dict[str, np.ndarray]:
    facts = list(facts)
    names = [field.name for field in dataclasses.fields(Facts)]
    return {name: np.array([getattr(fact, name) for fact in facts]) for name in names}


def plain_facts(count: int, width: int = 100, height: int = 80, seed: int = 0) -> list[Facts]:
    """Facts of pictures that are all different: random hashes and thumbnails."""
    random = np.random.default_rng(seed)
    return [
        Facts(
            width,
            height,
            random.integers(0, 256, 32, dtype=np.uint8),
            random.integers(0, 256, (16, 16), dtype=np.uint8),
        )
        for _ in range(count)
    ]


def dataset_of(samples: Iterable[Sample], task: str = "single", **values: object) -> Dataset:
    samples = tuple(samples)
    classes = tuple(sorted({label for sample in samples for label in sample.labels}))
    return Dataset(Path("data"), samples, values.pop("classes", classes), task, "0" * 64, **values)


def numbered(count: int, label: str = "a", role: str = "", suffix: str = "png") -> list[Sample]:
    return [Sample(f"{role}/{label}/{number}.{suffix}", (label,), role=role) for number in range(count)]


def audit_of(samples, facts=None, digests=None, unreadable=None, strict=True, **values):
    """The audit of samples whose pictures all differ where nothing else is given."""
    unreadable = unreadable or {}
    readable = sum(sample.source not in unreadable for sample in samples)
    facts = plain_facts(readable) if facts is None else facts
    digests = [f"{number:064x}" for number in range(readable)] if digests is None else digests
    return inspect(dataset_of(samples, **values), digests, columns(facts), unreadable, strict)


def kinds(audit: quality.Audit) -> set[str]:
    return {finding.kind for finding in audit.findings}


def of_kind(audit: quality.Audit, kind: str) -> list[quality.Finding]:
    return [finding for finding in audit.findings if finding.kind == kind]


# Duplicates


def made_smaller_and_compressed(image: Image.Image) -> Image.Image:
    small = image.resize((image.width * 6 // 10, image.height * 6 // 10), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=50)
    return open_image(buffer.getvalue())


def duplicates_of(images: Iterable[Image.Image]) -> list[tuple[int, int]]:
    facts = columns(map(describe, images))
    return find_duplicates([str(number) for number in range(len(facts["width"]))], facts["hash"], facts["thumbnail"])


def test_pictures_made_smaller_and_compressed_are_found_and_no_others():
    originals = [draw_shape(kind, seed, (400, 320)) for kind in COLOURS for seed in range(12)]
    copies = [made_smaller_and_compressed(image) for image in originals]
    assert duplicates_of([*originals, *copies]) == [(number, number + 36) for number in range(36)]


def test_photographs_made_smaller_and_compressed_are_found_and_no_others(real_data):
    files = sorted((real_data / "hymenoptera" / "val").rglob("*.jpg"))[::6]
    originals = [open_image(file) for file in files]
    copies = [made_smaller_and_compressed(image) for image in originals]
    expected = {(number, number + len(files)) for number in range(len(files))}
    found = set(duplicates_of([*originals, *copies]))
    assert not found - expected
    assert len(found) >= 0.95 * len(expected)


def compared_all_with_all(digests, hashes, thumbnails) -> list[tuple[int, int]]:
    """What `find_duplicates` should give, in the slow and obvious way."""
    firsts = [index for index, digest in enumerate(digests) if digest not in digests[:index]]
    pairs = {(digests.index(digest), index) for index, digest in enumerate(digests) if index not in firsts}
    for a, b in itertools.combinations(firsts, 2):
        bits = int(np.unpackbits(hashes[a] ^ hashes[b]).sum())
        grey = np.abs(thumbnails[a].astype(int) - thumbnails[b].astype(int)).mean()
        if bits <= 16 and grey <= 4:
            pairs.add((a, b))
    return sorted(pairs)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_duplicates_are_those_that_comparing_all_with_all_finds(seed, count):
    random = np.random.default_rng(seed)
    hashes = random.integers(0, 256, (count, 32), dtype=np.uint8)
    thumbnails = random.integers(20, 230, (count, 16, 16), dtype=np.uint8)
    digests = [str(number) for number in range(count)]
    for number in range(1, count):  # two thirds are altered copies, at, around and beyond the limits
        kind, origin = random.integers(0, 6), random.integers(0, number)
        if kind < 4:
            flips = np.zeros(256, np.uint8)
            flips[random.choice(256, random.integers(0, 21), replace=False)] = 1
            hashes[number] = hashes[origin] ^ np.packbits(flips)
            thumbnails[number] = thumbnails[origin] + random.choice([0, 1, 4, 5]).astype(np.uint8)
        if kind == 0:
            digests[number] = digests[origin]
    assert find_duplicates(digests, hashes, thumbnails) == compared_all_with_all(digests, hashes, thumbnails)


@pytest.mark.parametrize("untouched", range(17))
def test_16_differing_bits_are_found_however_they_are_spread_over_the_bands(untouched):
    flips = np.zeros(256, np.uint8)
    for number, band in enumerate(np.array_split(np.arange(256), 17)):
        flips[band[0]] = number != untouched
    hashes = np.stack([np.full(32, 77, np.uint8), np.full(32, 77, np.uint8) ^ np.packbits(flips)])
    assert find_duplicates(["a", "b"], hashes, np.zeros((2, 16, 16), np.uint8)) == [(0, 1)]


def test_16_bits_and_4_grey_levels_are_near_and_one_more_is_not():
    def found(bits: int, grey: float) -> bool:
        flips = np.zeros(256, np.uint8)
        flips[:bits] = 1
        thumbnails = np.zeros((2, 256), np.uint8)
        thumbnails[1, : round(grey * 256 / 8)] = 8
        hashes = np.stack([np.zeros(32, np.uint8), np.packbits(flips)])
        return bool(find_duplicates(["a", "b"], hashes, thumbnails.reshape(2, 16, 16)))

    assert found(16, 4.0)
    assert not found(17, 0.0)
    assert not found(0, 4.125)


def test_each_of_a_run_of_equal_files_is_paired_with_the_first():
    facts = columns(plain_facts(5))
    pairs = find_duplicates(["x", "y", "x", "z", "x"], facts["hash"], facts["thumbnail"])
    assert pairs == [(0, 2), (0, 4)]


def test_no_pictures_and_one_picture_have_no_duplicates():
    for count in (0, 1):
        hashes, thumbnails = np.zeros((count, 32), np.uint8), np.zeros((count, 16, 16), np.uint8)
        assert find_duplicates(["x"] * count, hashes, thumbnails) == []


def pair_of(one: Sample, two: Sample, same_file: bool = True) -> quality.Audit:
    """The audit of 60 pictures, of which the first and the last are duplicates."""
    samples = [one, *numbered(29, "a", one.role), *numbered(29, "b", one.role), two]
    facts = plain_facts(60)
    facts[-1] = facts[0]
    digests = [str(number) for number in range(60)]
    digests[-1] = digests[0] if same_file else "another"
    return audit_of(samples, facts, digests)


@pytest.mark.parametrize("same_file, words", [(True, "the same file"), (False, "nearly the same picture")])
def test_a_duplicate_within_a_class_is_a_note_and_its_pictures_are_one_group(same_file, words):
    audit = pair_of(Sample("first.png", ("a",)), Sample("last.png", ("a",)), same_file)
    (finding,) = of_kind(audit, "duplicate")
    assert finding.severity == "note" and words in finding.message
    assert finding.sources == ("first.png", "last.png")
    assert audit.duplicates == (("first.png", "last.png"),)
    assert set(audit.groups) == {"first.png", "last.png"} and len(set(audit.groups.values())) == 1


def test_a_duplicate_across_roles_is_a_leak():
    audit = pair_of(Sample("first.png", ("a",), role="fit"), Sample("last.png", ("a",), role="report"))
    (finding,) = of_kind(audit, "leak")
    assert finding.severity == "warning"
    assert "first.png (fit)" in finding.message and "last.png (report)" in finding.message
    assert not of_kind(audit, "duplicate") and not of_kind(audit, "duplicate with another label")


def test_a_duplicate_with_another_label_is_told_with_both_labels():
    audit = pair_of(Sample("first.png", ("a",)), Sample("last.png", ("b",)))
    (finding,) = of_kind(audit, "duplicate with another label")
    assert finding.severity == "warning" and set(finding.sources) == {"first.png", "last.png"}
    assert "first.png (a)" in finding.message and "last.png (b)" in finding.message
    assert not of_kind(audit, "duplicate") and not of_kind(audit, "leak")


def test_a_duplicate_with_another_role_and_label_is_both():
    audit = pair_of(Sample("first.png", ("a",), role="fit"), Sample("last.png", ("b",), role="report"))
    assert of_kind(audit, "leak") and of_kind(audit, "duplicate with another label")


def test_many_copies_of_one_picture_are_one_finding():
    samples = numbered(100)
    facts = plain_facts(97)
    audit = audit_of(samples, [facts[0]] * 4 + facts[1:])
    (finding,) = of_kind(audit, "duplicate")
    assert finding.sources == tuple(sample.source for sample in samples[:4])


def test_pictures_with_unreadable_ones_between_them_are_paired_by_their_own_names():
    samples = numbered(40)
    facts = plain_facts(38)
    facts[-1] = facts[1]
    unreadable = {samples[0].source: "is empty", samples[20].source: "is empty"}
    audit = audit_of(samples, facts, unreadable=unreadable)
    assert audit.duplicates == ((samples[2].source, samples[39].source),)


# Groups


def grouped(sizes: Iterable[int], plain: int) -> list[Sample]:
    people = [("person" + str(number), size) for number, size in enumerate(sizes)]
    inside = [Sample(f"{name}-{index}.png", ("a",), name) for name, size in people for index in range(size)]
    return inside + numbered(plain)


def test_given_groups_stay_together_and_lonely_pictures_have_none():
    samples = grouped([3, 2, 1], 94)
    audit = audit_of(samples)
    assert set(audit.groups) == {sample.source for sample in samples[:5]}
    assert len({audit.groups[sample.source] for sample in samples[:3]}) == 1
    assert audit.groups[samples[3].source] == audit.groups[samples[4].source] != audit.groups[samples[0].source]


def test_a_duplicate_joins_two_groups():
    samples = grouped([2, 2], 96)
    facts = plain_facts(100)
    facts[2] = facts[1]
    audit = audit_of(samples, facts)
    assert len({audit.groups[sample.source] for sample in samples[:4]}) == 1


def test_a_given_group_over_a_twentieth_of_the_data_is_reported_and_still_enforced():
    kept, large = audit_of(grouped([5], 95)), audit_of(grouped([6], 94))
    assert len(kept.groups) == 5 and not of_kind(kept, "large group")
    assert len(large.groups) == 6
    (finding,) = of_kind(large, "large group")
    assert finding.severity == "warning" and len(finding.sources) == 6 and "6 pictures" in finding.message


def test_a_chain_of_near_duplicates_over_a_twentieth_of_the_data_is_reported_and_not_enforced():
    facts = plain_facts(100)
    facts[:6] = [facts[0]] * 6
    audit = audit_of(numbered(100), facts)
    assert not audit.groups
    assert len(of_kind(audit, "large group")) == 1


def test_two_copies_stay_together_in_the_smallest_data():
    facts = plain_facts(4)
    facts[3] = facts[0]
    assert len(audit_of(numbered(4), facts).groups) == 2


# Classes


def test_a_class_under_10_training_pictures_is_small():
    audit = audit_of([*numbered(10, "a"), *numbered(9, "b"), *numbered(1, "c")])
    messages = [finding.message for finding in of_kind(audit, "small class")]
    assert messages == ["class 'b' has 9 pictures for training", "class 'c' has 1 picture for training"]


def test_pictures_of_the_report_do_not_make_a_class_large_enough():
    samples = [*numbered(10, "a", "fit"), *numbered(9, "b", "fit"), *numbered(20, "b", "report")]
    assert "'b' has 9 pictures" in of_kind(audit_of(samples), "small class")[0].message


def test_imbalance_is_told_from_more_than_ten_to_one():
    assert not of_kind(audit_of([*numbered(100, "a"), *numbered(10, "b")]), "imbalance")
    (finding,) = of_kind(audit_of([*numbered(101, "a"), *numbered(10, "b")]), "imbalance")
    assert "'a' has 101" in finding.message and "'b' has 10" in finding.message


@pytest.mark.parametrize("role", ["select", "report"])
def test_a_class_that_a_split_lacks_is_named(role):
    samples = [*numbered(12, "a", "fit"), *numbered(12, "b", "fit"), *numbered(12, "a", role)]
    (finding,) = of_kind(audit_of(samples), "class missing in a split")
    assert role in finding.message and "'b'" in finding.message and "'a'" not in finding.message


def test_a_label_on_nearly_every_picture_is_told_for_several_labels():
    samples = [Sample(f"{number}.png", ("a",) if number < 3 else ("a", "b")) for number in range(30)]
    findings = of_kind(audit_of(samples, task="multi"), "label nearly everywhere")
    assert ["'a'" in finding.message for finding in findings] == [True, False]
    assert "3 pictures without the label 'b'" in findings[1].message


def test_a_clean_data_set_has_no_findings():
    assert audit_of([*numbered(30, "a"), *numbered(30, "b")]).findings == ()


# Single pictures


@pytest.mark.parametrize(
    "width, height, kind",
    [
        (31, 100, "tiny picture"),
        (100, 31, "tiny picture"),
        (401, 100, "odd shape"),
        (40, 161, "odd shape"),
        (2000, 1500, "odd size"),
        (700, 700, None),
        (32, 32, None),
        (400, 100, None),
    ],
)
def test_a_picture_of_an_odd_size_or_shape_is_named(width, height, kind):
    facts = plain_facts(120)
    facts[7] = dataclasses.replace(facts[7], width=width, height=height)
    audit = audit_of(samples := numbered(120), facts)
    assert kinds(audit) == ({kind} if kind else set())
    for finding in audit.findings:
        assert finding.severity == "note" and finding.sources == (samples[7].source,)
        assert f"({width}x{height})" in finding.message


def test_a_flat_picture_is_named():
    facts = plain_facts(30)
    facts[3] = dataclasses.replace(facts[3], thumbnail=np.full((16, 16), 128, np.uint8))
    (finding,) = audit_of(numbered(30), facts).findings
    assert finding.kind == "flat picture" and finding.sources == ("/a/3.png",)


def test_a_format_that_few_files_have_is_odd_and_jpeg_is_jpg():
    samples = [*numbered(100, suffix="jpg"), *numbered(2, suffix="JPEG"), *numbered(1, suffix="gif")]
    (finding,) = of_kind(audit_of(samples), "odd format")
    assert finding.sources == ("/a/0.gif",)


def test_what_was_left_out_or_noticed_while_reading_is_told():
    audit = audit_of(numbered(20), ignored=(("notes.txt", "is no picture"),), notices=("a link was not followed",))
    assert {(finding.kind, finding.severity) for finding in audit.findings} == {
        ("reading", "warning"),
        ("left out", "note"),
    }
    assert "notes.txt: is no picture" in of_kind(audit, "left out")[0].message


# Unreadable pictures


def test_unreadable_pictures_are_errors_and_left_out_of_the_clean_data():
    samples = numbered(40)
    audit = audit_of(samples, unreadable={samples[5].source: "is empty"})
    (finding,) = of_kind(audit, "unreadable")
    assert finding.severity == "error" and finding.message == f"{samples[5].source}: is empty"
    assert samples[5] not in audit.clean.samples and len(audit.clean.samples) == 39


@pytest.mark.parametrize("lost, refused", [(2, False), (3, True)])
def test_more_than_a_fifth_of_a_class_unreadable_is_refused_when_strict(lost, refused):
    samples = [*numbered(10, "a"), *numbered(50, "b")]
    unreadable = {sample.source: "is empty" for sample in samples[:lost]}
    if refused:
        with pytest.raises(DataError, match=r"3 of 10 pictures of class 'a' cannot be read, '/a/0\.png': is empty"):
            audit_of(samples, unreadable=unreadable)
    else:
        assert len(of_kind(audit_of(samples, unreadable=unreadable), "unreadable")) == lost


def test_more_than_a_fifth_of_a_class_unreadable_is_only_told_when_not_strict():
    samples = [*numbered(10, "a"), *numbered(50, "b")]
    unreadable = {sample.source: "is empty" for sample in samples[:10]}
    audit = audit_of(samples, unreadable=unreadable, strict=False)
    assert len(of_kind(audit, "unreadable")) == 10 and len(audit.clean.samples) == 50


def test_a_folder_without_one_readable_picture_is_audited(tmp_path):
    samples = [Sample(f"{number}.png", ("ab"[number % 2],)) for number in range(4)]
    for sample in samples:
        (tmp_path / sample.source).write_bytes(b"no picture")
    survey = features.survey([tmp_path / s.source for s in samples], [s.source for s in samples], tmp_path / "cache")
    audit = inspect(dataset_of(samples), survey.digests, survey.facts, survey.unreadable, strict=False)
    assert len(of_kind(audit, "unreadable")) == 4 and audit.clean.samples == ()


# The audit as a whole


def messy() -> quality.Audit:
    samples = [*numbered(101, "a"), *numbered(6, "b"), Sample("caf\udce9.png", ("a",)), Sample("broken.png", ("a",))]
    facts = plain_facts(108)
    facts[0] = dataclasses.replace(facts[0], width=10)
    facts[-1] = facts[50]
    return audit_of(samples, facts, unreadable={"broken.png": "is empty"})


def test_findings_come_gravest_first_and_each_has_a_remedy():
    audit = messy()
    order = [SEVERITIES.index(finding.severity) for finding in audit.findings]
    assert order == sorted(order) and set(order) == {0, 1, 2}
    assert all(finding.message and finding.remedy for finding in audit.findings)


def test_the_audit_is_json_even_with_names_that_are_no_text():
    values = messy().to_json()
    again = json.loads(json.dumps(values).encode("ascii"))
    assert again["pictures"] == 108 and again["classes"] == {"a": 102, "b": 6}
    assert again["counts"] == {"error": 1, "warning": 2, "note": 3}
    assert any("caf\udce9.png" in finding["sources"] for finding in again["findings"])
    assert set(again["findings"][0]) == {"kind", "severity", "message", "remedy", "sources"}


def test_a_drawn_folder_is_audited_by_its_survey(shapes, own_cache):
    files = sorted(shapes.rglob("*.png"))
    sources = [str(file.relative_to(shapes)) for file in files]
    survey = features.survey(files, sources, own_cache)
    samples = [Sample(source, (source.split("/")[0],)) for source in sources]
    audit = inspect(dataset_of(samples), survey.digests, survey.facts, survey.unreadable)
    assert audit.findings == () and not audit.groups
