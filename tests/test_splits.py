import os
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from headstart import splits
from headstart.data import Dataset, Sample

# The function-scoped fixtures of this file's tests (an own cache for each) hold nothing that examples could share.
bounded = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

counts = st.lists(st.integers(1, 25), min_size=2, max_size=5)
shares = st.sampled_from([0.01, 0.1, 0.2, 0.25, 0.5, 0.75, 0.9])
seeds = st.integers(0, 2**40)
group_sizes = st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=6), min_size=2, max_size=4)
label_sets = st.lists(st.sets(st.sampled_from("abcd"), max_size=3), min_size=2, max_size=40)

SEVERAL = [{"a", "b"}, {"b"}, {"a"}, set(), {"c", "a"}, {"c"}] * 5


def data_set(samples, task="single"):
    classes = tuple(sorted({label for sample in samples for label in sample.labels}))
    return Dataset(Path("data"), tuple(samples), classes, task, "")


def write_split(dataset, path):
    path.write_bytes(splits.to_csv(dataset).encode("utf-8", "surrogateescape"))


def single(counts):
    """Samples of classes with so many pictures each."""
    return [Sample(f"{kind}/{number}.jpg", (f"c{kind}",)) for kind, n in enumerate(counts) for number in range(n)]


def grouped(sizes):
    """(samples of classes that are made of whole groups of such sizes, source -> group)."""
    samples, groups = [], {}
    for kind, members in enumerate(sizes):
        for group, size in enumerate(members):
            for number in range(size):
                samples.append(Sample(f"{kind}/{group}/{number}.jpg", (f"c{kind}",)))
                groups[samples[-1].source] = f"{kind}/{group}"
    return samples, groups


def several(label_sets):
    return [Sample(f"{number}.jpg", tuple(sorted(labels))) for number, labels in enumerate(label_sets)]


def deal(samples, share=0.2, seed=0, groups=None, task="single"):
    """Source -> role."""
    dealt = splits.assign_roles(data_set(samples, task), groups or {}, share, seed).samples
    return {sample.source: sample.role for sample in dealt}


def count(samples, roles):
    """(label, role) -> how many pictures."""
    return Counter((label, roles[sample.source]) for sample in samples for label in sample.labels)


# Roles


@bounded
@given(counts, shares, seeds)
def test_every_picture_has_exactly_one_role_and_nothing_else_changes(counts, share, seed):
    before = data_set(
        [Sample(s.source, s.labels, "group" if s.source.endswith("0.jpg") else "") for s in single(counts)]
    )
    after = splits.assign_roles(before, {}, share, seed)
    assert [(s.source, s.labels, s.group) for s in after.samples] == [
        (s.source, s.labels, s.group) for s in before.samples
    ]
    assert {sample.role for sample in after.samples} <= {"fit", "report"}
    assert after.has_roles
    assert (after.classes, after.root, after.task) == (before.classes, before.root, before.task)


@bounded
@given(counts, shares, seeds)
def test_the_count_of_each_class_is_within_one_of_its_share(counts, share, seed):
    # The mistake: an unstratified split.
    samples = single(counts)
    dealt = count(samples, deal(samples, share, seed))
    for kind, n in enumerate(counts):
        if n > 1:
            assert abs(dealt[f"c{kind}", "report"] - share * n) < 1


@bounded
@given(counts, shares, seeds)
@example(counts=[1, 30], share=0.9, seed=0)
def test_a_class_has_pictures_in_both_roles_and_a_lone_picture_trains(counts, share, seed):
    samples = single(counts)
    dealt = count(samples, deal(samples, share, seed))
    for kind, n in enumerate(counts):
        assert dealt[f"c{kind}", "fit"] >= 1
        assert n == 1 or dealt[f"c{kind}", "report"] >= 1


@bounded
@given(counts, seeds, st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order_of_samples(counts, seed, shuffler):
    samples = single(counts)
    shuffled = shuffler.sample(samples, len(samples))
    assert deal(samples, seed=seed) == deal(shuffled, seed=seed) == deal(samples, seed=seed)


@bounded
@given(label_sets, seeds, st.randoms(use_true_random=False))
def test_the_split_of_several_labels_does_not_depend_on_the_order_of_samples(label_sets, seed, shuffler):
    samples = several(label_sets)
    shuffled = shuffler.sample(samples, len(samples))
    assert deal(samples, seed=seed, task="multi") == deal(shuffled, seed=seed, task="multi")


def test_another_seed_gives_another_split():
    samples = single([40, 40])
    assert len({tuple(deal(samples, seed=seed).items()) for seed in range(5)}) == 5


def test_the_split_does_not_depend_on_the_global_generators():
    samples = several(SEVERAL)
    first = deal(samples, task="multi")
    random.seed(1)
    assert deal(samples, task="multi") == first


@bounded
@given(group_sizes, shares, seeds)
def test_groups_never_part_between_roles(sizes, share, seed):
    samples, groups = grouped(sizes)
    roles = deal(samples, share, seed, groups)
    of_group = {(groups[source], role) for source, role in roles.items()}
    assert len(of_group) == len(set(groups.values()))


@bounded
@given(st.data(), seeds)
def test_groups_across_classes_never_part_either(data, seed):
    samples = single([12, 9, 5])
    groups = {sample.source: data.draw(st.sampled_from(["g1", "g2", "g3", "g4"])) for sample in samples[::2]}
    roles = deal(samples, 0.3, seed, groups)
    assert len({(group, roles[source]) for source, group in groups.items()}) == len(set(groups.values()))
    folds = dict(zip(roles, splits.assign_folds(samples, groups, 3, seed), strict=True))
    assert len({(group, folds[source]) for source, group in groups.items()}) == len(set(groups.values()))


@bounded
@given(group_sizes, st.sampled_from([0.1, 0.2, 0.4]), seeds)
@example(sizes=[[5, 5], [1, 1, 1]], share=0.2, seed=0)
def test_a_class_of_two_groups_or_more_has_pictures_in_both_roles(sizes, share, seed):
    samples, groups = grouped(sizes)
    dealt = count(samples, deal(samples, share, seed, groups))
    for kind, members in enumerate(sizes):
        assert dealt[f"c{kind}", "fit"] >= 1
        assert len(members) == 1 or dealt[f"c{kind}", "report"] >= 1


@bounded
@given(st.integers(20, 60), seeds)
def test_small_groups_do_not_distort_the_shares(pairs, seed):
    samples, groups = grouped([[2] * pairs, [2] * 20])
    dealt = count(samples, deal(samples, 0.2, seed, groups))
    assert abs(dealt["c0", "report"] - 0.2 * 2 * pairs) <= 2
    assert abs(dealt["c1", "report"] - 8) <= 2


@bounded
@given(label_sets, seeds)
def test_of_several_labels_each_one_trains(label_sets, seed):
    samples = several(label_sets)
    roles = deal(samples, 0.2, seed, task="multi")
    total = count(samples, {sample.source: "any" for sample in samples})
    dealt = count(samples, roles)
    for label in "abcd":
        assert not total[label, "any"] or dealt[label, "fit"]  # also one that comes with rarer ones
    assert set(roles) == {sample.source for sample in samples}


def test_many_pictures_of_several_labels_keep_every_label_near_its_share():
    generator = random.Random(0)
    rates = {"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.03}
    sets = [{label for label, rate in rates.items() if generator.random() < rate} for _ in range(600)]
    samples = several(sets)
    dealt = count(samples, deal(samples, 0.2, 0, task="multi"))
    for label in rates:
        n = dealt[label, "fit"] + dealt[label, "report"]
        assert abs(dealt[label, "report"] - 0.2 * n) <= 2, label


def test_given_roles_stay():
    samples = [Sample("a", ("x",), role="fit"), Sample("b", ("y",), role="select"), Sample("c", ("x",), role="report")]
    dataset = data_set(samples)
    assert splits.assign_roles(dataset, {}, 0.9, 1) is dataset


def deal_everything(folder, seed=0):
    """Whatever is dealt of pictures some of which lie in a folder outside the data's, by their names there.

    Groups are named by one of their pictures, as near-duplicates are, or by people.
    """
    names = [f"{kind}/{number}.jpg" for kind, n in enumerate([14, 11, 9]) for number in range(n)]
    place = {name: name if name.endswith("0.jpg") else f"{folder}/{name}" for name in names}
    samples = [Sample(place[name], (f"c{name[0]}",)) for name in names]
    groups = {place[f"0/{number}.jpg"]: place[f"0/{number // 2 * 2}.jpg"] for number in range(14)}
    groups |= {place[f"1/{number}.jpg"]: f"somebody's {number % 2}" for number in range(4)}
    roles = [sample.role for sample in splits.assign_roles(data_set(samples), groups, 0.2, seed).samples]
    fitted = splits.assign_select(data_set(all_fit(samples)), groups, 0.3, seed).samples
    parts = splits.draw_part(samples, groups, 0.5, seed), splits.draw_enough(samples, groups, 15, seed)
    return roles, [sample.role for sample in fitted], *parts, splits.assign_folds(samples, groups, 4, seed)


@pytest.mark.parametrize("folder", ["/home/somebody/two words", "/0/0", "/蚂蚁", "/a/much/deeper/folder"])
def test_what_is_dealt_does_not_hang_on_where_pictures_lie_outside_the_datas_folder(folder):
    assert deal_everything(folder) == deal_everything("/data")
    for one, other in zip(deal_everything("/data", seed=1), deal_everything("/data"), strict=True):
        assert one != other  # else nothing is tested


@pytest.mark.parametrize("names", [["a.jpg", "b.jpg", "c.jpg", "d.jpg"], ["x/a.jpg", "y/a.jpg", "x/b.jpg", "y/b.jpg"]])
def test_pictures_outside_the_datas_folder_are_told_apart(names):
    samples = [Sample(f"/data/{name}", ("c",)) for name in names]
    assert sorted(splits.assign_folds(samples, {}, 4, 0)) == [0, 1, 2, 3]  # none stands for another


# A split that is kept: results can be compared only if everybody's split is the same. Whoever changes how pictures are
# dealt changes these, and must say so to users.
GOLDEN_REPORT = {
    0: ["0/0.jpg", "0/7.jpg", "1/4.jpg", "2/0.jpg"],
    7: ["0/8.jpg", "0/9.jpg", "1/1.jpg", "2/1.jpg"],
}
GOLDEN_SEVERAL = ["2.jpg", "7.jpg", "22.jpg", "24.jpg", "27.jpg", "29.jpg"]
GOLDEN_FOLDS = "122200120111020120210"


@pytest.mark.parametrize("seed", GOLDEN_REPORT)
def test_a_small_split_is_exactly_what_it_always_was(seed):
    roles = deal(single([10, 7, 3, 1]), 0.2, seed)
    assert sorted(source for source, role in roles.items() if role == "report") == GOLDEN_REPORT[seed]


def test_a_small_split_of_several_labels_is_exactly_what_it_always_was():
    roles = deal(several(SEVERAL), task="multi")
    assert [source for source, role in roles.items() if role == "report"] == GOLDEN_SEVERAL


def test_small_folds_are_exactly_what_they_always_were():
    folds = splits.assign_folds(single([10, 7, 3, 1]), {"0/1.jpg": "g", "0/2.jpg": "g"}, 3, 0)
    assert "".join(map(str, folds)) == GOLDEN_FOLDS


# Folds


@bounded
@given(counts, st.integers(2, 6), seeds)
def test_folds_are_stratified(counts, folds, seed):
    samples = single(counts)
    dealt = splits.assign_folds(samples, {}, folds, seed)
    assert len(dealt) == len(samples)
    assert set(dealt) <= set(range(folds))
    for kind, n in enumerate(counts):
        of_class = Counter(fold for sample, fold in zip(samples, dealt, strict=True) if sample.labels == (f"c{kind}",))
        assert {of_class[fold] for fold in range(folds)} <= {n // folds, -(-n // folds)}


@bounded
@given(counts, st.integers(2, 6), seeds)
def test_folds_are_of_like_size(counts, folds, seed):
    sizes = Counter(splits.assign_folds(single(counts), {}, folds, seed))
    assert max(sizes[fold] for fold in range(folds)) - min(sizes[fold] for fold in range(folds)) <= len(counts)


@bounded
@given(group_sizes, st.integers(2, 5), seeds)
def test_groups_never_part_between_folds(sizes, folds, seed):
    samples, groups = grouped(sizes)
    dealt = splits.assign_folds(samples, groups, folds, seed)
    pairs = {(groups[sample.source], fold) for sample, fold in zip(samples, dealt, strict=True)}
    assert len(pairs) == len(set(groups.values()))


@bounded
@given(group_sizes, st.integers(2, 5), seeds)
def test_counted_folds_leave_every_class_of_several_groups_something_to_learn_from(sizes, wanted, seed):
    samples, groups = grouped(sizes)
    folds = splits.count_folds(samples, groups, wanted)
    assert (folds == 0) == all(len(members) == 1 for members in sizes)
    if not folds:
        return
    dealt = splits.assign_folds(samples, groups, folds, seed)
    for kind, members in enumerate(sizes):
        if len(members) > 1:
            used = {fold for sample, fold in zip(samples, dealt, strict=True) if sample.labels == (f"c{kind}",)}
            assert len(used) > 1


@bounded
@given(counts, seeds, st.randoms(use_true_random=False))
def test_folds_do_not_depend_on_the_order_of_samples(counts, seed, shuffler):
    samples = single(counts)
    shuffled = shuffler.sample(samples, len(samples))
    one = dict(zip((s.source for s in samples), splits.assign_folds(samples, {}, 5, seed), strict=True))
    other = dict(zip((s.source for s in shuffled), splits.assign_folds(shuffled, {}, 5, seed), strict=True))
    assert one == other


@pytest.mark.parametrize(
    ("counts", "wanted", "expected"),
    [
        ([20, 30], 5, 5),
        ([20, 4], 5, 4),
        ([20, 2], 5, 2),
        ([20, 1], 5, 5),
        ([1, 1], 5, 0),
        ([3, 1], 10, 3),
        ([9, 9], 2, 2),
    ],
)
def test_there_are_no_more_folds_than_the_smallest_class_of_several_pictures_can_fill(counts, wanted, expected):
    assert splits.count_folds(single(counts), {}, wanted) == expected


def test_folds_are_counted_among_pictures_that_can_be_held_out():
    # Each with a label that no other has: held out, nothing of it would be learned.
    alone = [Sample(str(number), ("shared", f"own {number}")) for number in range(8)]
    assert splits.count_folds(alone, {}, 5) == 0
    some = [Sample(f"some {number}", ("shared",)) for number in range(3)]
    assert splits.count_folds([*alone, *some], {}, 5) == 3


def test_folds_are_counted_in_groups():
    samples, groups = grouped([[4, 4, 4], [1] * 9])
    assert splits.count_folds(samples, groups, 5) == 3


# split.csv

ODD_SOURCES = [
    "with space /a  b.jpg",
    "two\nlines/\r\n.jpg",
    "quo\"te's, and; commas|bars.jpg",
    "狗/🐱.jpg",
    "=1+1.jpg",
    " edge ",
    "\ttab\t",
    os.fsdecode(b"caf\xe9/\xff\xfe.jpg"),
]


def test_split_csv_holds_what_it_says(tmp_path):
    dataset = data_set([Sample("b/1.jpg", ("x", "y"), "g", "fit"), Sample("a/1.jpg", (), "", "report")], "multi")
    write_split(dataset, tmp_path / "split.csv")
    lines = (tmp_path / "split.csv").read_text().splitlines()
    assert lines == ["source,label,group,role", "b/1.jpg,x|y,g,fit", "a/1.jpg,,,report"]


@pytest.mark.parametrize("source", ODD_SOURCES)
def test_split_csv_gives_odd_names_back(tmp_path, source):
    dataset = data_set([Sample(source, (source,), source, "fit"), Sample("plain.jpg", ("x",), "", "report")])
    write_split(dataset, tmp_path / "split.csv")
    found = {sample.source: sample.role for sample in splits.read_split(tmp_path / "split.csv", "single")}
    assert found == {source: "fit", "plain.jpg": "report"}


@bounded
@given(
    sources=st.sets(st.binary(min_size=1, max_size=12).filter(lambda name: b"\0" not in name), min_size=1, max_size=6)
)
def test_split_csv_gives_any_names_back(tmp_path_factory, sources):
    path = tmp_path_factory.mktemp("split") / "split.csv"
    roles = {os.fsdecode(source): "fit" for source in sources}
    write_split(data_set([Sample(source, ("x",), "", role) for source, role in roles.items()]), path)
    assert {sample.source: sample.role for sample in splits.read_split(path, "single")} == roles


def test_a_split_that_was_written_is_read_with_the_data_again(tmp_path):
    from headstart.config import DataConfig
    from headstart.reading import read

    for kind in "xy":
        (tmp_path / "data" / kind).mkdir(parents=True)
        for number in range(5):
            (tmp_path / "data" / kind / f"{number}.jpg").write_bytes(b"")
    before = splits.assign_roles(read(tmp_path / "data"), {}, 0.2, 0)
    write_split(before, tmp_path / "split.csv")
    after = read(tmp_path / "split.csv", DataConfig(images=str(tmp_path / "data")))
    assert after.has_roles
    roles = {
        Path(after.path(sample.source)).relative_to(tmp_path / "data").as_posix(): sample.role
        for sample in after.samples
    }
    assert roles == {sample.source: sample.role for sample in before.samples}


# A part that is enough to try something on


def enough(counts, pictures, of=1):
    """How many pictures and groups of each class are drawn; `of` pictures in a group."""
    samples = [
        Sample(f"{label}{number}", (label,), f"{label} {number // of}")
        for label, count in counts.items()
        for number in range(count)
    ]
    groups = {sample.source: sample.group for sample in samples}
    chosen = splits.draw_enough(samples, groups, pictures, seed=0)
    assert len(chosen) == len(samples)
    some = [sample for sample, is_chosen in zip(samples, chosen, strict=True) if is_chosen]
    drawn = {label: {s.group for s in some if s.labels == (label,)} for label in counts}
    return len(some), {label: len(units) for label, units in drawn.items()}


def test_a_part_has_as_many_pictures_as_are_asked_for():
    assert enough({"a": 60, "b": 40}, 20) == (20, {"a": 12, "b": 8})
    assert enough({"a": 60, "b": 40}, 100)[0] == enough({"a": 60, "b": 40}, 1000)[0] == 100


def test_of_many_classes_a_part_has_a_few_of_each():
    pictures, units = enough({f"{number:03}": 20 for number in range(100)}, 100)
    assert 4 * 100 <= pictures < 800 and min(units.values()) >= 3


def test_of_large_groups_a_part_has_a_few_of_each_class():
    pictures, units = enough({"a": 300, "b": 300}, 60, of=30)
    assert pictures < 600 and min(units.values()) >= 4


def test_where_no_class_has_a_few_groups_two_are_enough_rather_than_everything():
    pictures, units = enough({"a": 900, "b": 900}, 100, of=300)
    assert pictures == 1200 and units == {"a": 2, "b": 2}


def test_rare_classes_do_not_make_a_part_the_whole():
    assert enough({"a": 5000, "b": 2, "c": 1}, 100)[0] < 110


def test_a_part_of_nothing_is_nothing():
    assert splits.draw_enough([], {}, 10, 0) == []


def test_what_was_chosen_by_can_be_given_back():
    samples = in_roles([Sample(str(number), ("x",)) for number in range(3)], lambda n: ("fit", "select", "report")[n])
    roles = [sample.role for sample in splits.give_select_to_fit(data_set(samples)).samples]
    assert roles == ["fit", "fit", "report"]


# Pictures to choose by


def with_select(samples, share=0.15, seed=0, groups=None, task="single"):
    """Source -> role."""
    found = splits.assign_select(data_set(samples, task), groups or {}, share, seed).samples
    assert [(s.source, s.labels, s.group) for s in found] == [(s.source, s.labels, s.group) for s in samples]
    return {sample.source: sample.role for sample in found}


def in_roles(samples, role_of):
    return [Sample(s.source, s.labels, s.group, role_of(number)) for number, s in enumerate(samples)]


def all_fit(samples):
    return in_roles(samples, lambda _: "fit")


@bounded
@given(counts, shares, seeds)
def test_what_is_chosen_by_is_a_share_of_each_class_of_fit_and_report_stays(counts, share, seed):
    samples = in_roles(single(counts), lambda number: "report" if number % 5 == 4 else "fit")
    roles = with_select(samples, share, seed)
    assert all((roles[s.source] == "report") == (s.role == "report") for s in samples)
    fitted = Counter(s.labels[0] for s in samples if s.role == "fit")
    dealt = count(samples, roles)
    for label, n in fitted.items():
        assert dealt[label, "fit"] + dealt[label, "select"] == n
        if n > 1:
            assert abs(dealt[label, "select"] - share * n) < 1
            assert dealt[label, "fit"] >= 1 and dealt[label, "select"] >= 1
        else:
            assert dealt[label, "fit"] == 1  # a class of one stays


@bounded
@given(group_sizes, shares, seeds)
def test_groups_never_part_between_fit_and_what_is_chosen_by(sizes, share, seed):
    samples, groups = grouped(sizes)
    roles = with_select(all_fit(samples), share, seed, groups)
    assert len({(groups[source], role) for source, role in roles.items()}) == len(set(groups.values()))
    dealt = count(samples, roles)
    for kind, members in enumerate(sizes):
        assert dealt[f"c{kind}", "fit"] >= 1
        assert (dealt[f"c{kind}", "select"] >= 1) == (len(members) > 1)  # a class of one group stays


@pytest.mark.parametrize(("few", "chosen"), [(1, {"c0", "c1"}), (5, {"c0"})])
def test_small_classes_may_stay_whole_with_all_that_does_not_part_from_them(few, chosen):
    samples = all_fit(single([40, 5]))
    near = {sample.source: "near" for sample in samples if sample.source in (samples[0].source, samples[-1].source)}
    found = splits.assign_select(data_set(samples), near, 0.5, 0, few).samples
    assert {sample.labels[0] for sample in found if sample.role == "select"} == chosen
    if few == 5:
        assert {sample.role for sample in found if sample.source in near} == {"fit"}
        assert 15 <= sum(sample.role == "select" for sample in found) <= 20


def test_a_given_select_stays_as_it_is():
    samples = in_roles(single([20, 10]), lambda number: "select" if number == 3 else "fit")
    dataset = data_set(samples)
    assert splits.assign_select(dataset, {}, 0.5, 0) is dataset


@bounded
@given(counts, seeds, st.randoms(use_true_random=False))
def test_the_same_seed_chooses_the_same_in_any_order(counts, seed, shuffler):
    samples = all_fit(single(counts))
    shuffled = shuffler.sample(samples, len(samples))
    assert with_select(samples, seed=seed) == with_select(shuffled, seed=seed) == with_select(samples, seed=seed)


def test_another_seed_chooses_others():
    samples = all_fit(single([40, 40]))
    assert len({tuple(with_select(samples, seed=seed).items()) for seed in range(5)}) == 5


@bounded
@given(label_sets, seeds)
def test_of_several_labels_a_lone_one_stays_in_fit(label_sets, seed):
    samples = all_fit(several(label_sets))
    roles = with_select(samples, 0.2, seed, task="multi")
    assert set(roles.values()) <= {"fit", "select"}
    total, dealt = count(samples, dict.fromkeys(roles, "any")), count(samples, roles)
    assert all(dealt[label, "fit"] == 1 for label in "abcd" if total[label, "any"] == 1)


def test_many_pictures_of_several_labels_are_chosen_near_their_shares():
    generator, rates = random.Random(1), {"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.03}
    sets = [{label for label, rate in rates.items() if generator.random() < rate} for _ in range(600)]
    samples = all_fit(several(sets))
    dealt = count(samples, with_select(samples, 0.15, task="multi"))
    for label in rates:
        n = dealt[label, "fit"] + dealt[label, "select"]
        assert abs(dealt[label, "select"] - 0.15 * n) <= 2, label


@bounded
@given(counts, seeds)
def test_after_both_cuts_every_class_of_three_is_in_all_roles(counts, seed):
    samples = single([n + 2 for n in counts])
    dataset = splits.assign_roles(data_set(samples), {}, 0.2, seed)
    dealt = count(samples, with_select(list(dataset.samples), 0.15, seed))
    for kind in range(len(counts)):
        assert all(dealt[f"c{kind}", role] >= 1 for role in ("fit", "select", "report"))


def test_a_picture_outside_and_one_in_the_folder_are_two_whatever_they_are_called():
    pairs = (("a/0.jpg", "a"), ("/x/a/0.jpg", "a"), ("/x/b/0.jpg", "b"), ("/x/b/1.jpg", "b"))
    folds = splits.assign_folds([Sample(source, (label,)) for source, label in pairs], {}, 2, seed=0)
    assert folds[0] != folds[1] and folds[2] != folds[3]
