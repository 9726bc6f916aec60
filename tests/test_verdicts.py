import dataclasses
import json

import pytest

from headstart.errors import UsageError
from headstart.verdicts import (
    FINAL,
    LEAST_SELECT,
    TUNED_EPOCHS,
    VIEW_SETS,
    Curve,
    Evidence,
    Outlook,
    Variant,
    can_gain,
    can_win,
    choose_epochs,
    choose_geometry,
    choose_length,
    choose_views,
    describe_evidence,
    enlarge,
    find_boundary,
    is_scratch_worth_trying,
    list_fits,
    promises_more,
    read_time,
    show_time,
    weigh_look,
    weigh_time,
)


def variant(taps=("x", FINAL), log_loss=0.3, accuracy=0.9):
    return Variant(taps, ("plain",), "logistic", log_loss, accuracy, accuracy - 0.05, accuracy + 0.05, 100)


DEEP = Evidence((variant(), variant((FINAL,), 0.4)), (), None)
AMPLE = Outlook(epoch_seconds=8.0, start_seconds=0.0, around_seconds=4.0, seconds_left=600.0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("5m", 300), ("1.5h", 5400), (" 2 m ", 120), ("0", 0), ("0.5s", 0.5)],
)
def test_a_time_is_read_as_people_write_it(text, seconds):
    assert read_time(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-5m", "5 min", "5d", "1e3", "5m30s", "inf", "٣m"])
def test_what_is_no_time_is_refused_with_an_example(text):
    with pytest.raises(UsageError) as caught:
        read_time(text)
    assert caught.value.subject == "time_budget" and "5m" in caught.value.remedy


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (155, "2.6 min"), (599, "10 min"), (3600, "60 min")],
)
def test_a_time_is_shown_as_people_say_it(seconds, text):
    assert show_time(seconds) == text


@pytest.mark.parametrize(
    ("left", "epochs"),
    [(1000.0, TUNED_EPOCHS), (52.0, 6), (51.9, 5), (44.0, 5), (43.9, 4), (28.0, 3), (27.9, 0), (0.0, 0), (-5.0, 0)],
)
def test_there_are_as_many_epochs_as_the_time_allows(left, epochs):
    assert choose_epochs(Outlook(8.0, 1.0, 3.0, left), TUNED_EPOCHS) == epochs


@pytest.mark.parametrize(
    ("seconds", "left", "words"),
    [
        (1e9, None, ""),  # no budget
        (0.0, 10.0, ""),
        (5.0, 10.0, ""),
        (5.1, 10.0, "views all: not tried, that would take about 5 s of the 10 s left"),
        (300.0, 240.0, "views all: not tried, that would take about 5 min of the 4 min left"),
        (0.0, 0.0, ""),  # is there already
        (0.1, 0.0, "views all: not tried, nothing is left of the budget"),
        (0.0, -3.0, ""),
        (0.1, -3.0, "views all: not tried, nothing is left of the budget"),
    ],
)
def test_a_look_may_take_half_of_what_is_left(seconds, left, words):
    assert weigh_look("views all", seconds, left) == words


@pytest.mark.parametrize("curve", [None, Curve(((10, 0.3), (20, 0.2)), 80, 0.1, 0.12, 0.08)])
def test_evidence_comes_back_from_a_plan_as_it_was(curve):
    found = Evidence(
        (variant(accuracy=0.9), variant((FINAL,), 0.4)),
        (variant(), dataclasses.replace(variant(), views=("plain", "mirror"))),
        curve,
        0.3,
        (dataclasses.replace(variant(), fit="squash", size=288),),
        ("views all: not tried",),
    )
    assert Evidence.from_json(json.loads(json.dumps(dataclasses.asdict(found)))) == found


def test_fewer_epochs_than_the_least_are_none():
    assert choose_epochs(Outlook(8.0, 0.0, 4.0, 44.0), 60, least=5) == 5
    assert choose_epochs(Outlook(8.0, 0.0, 4.0, 43.9), 60, least=5) == 0
    assert choose_epochs(Outlook(8.0, 0.0, 4.0, 1000.0), 2, least=2) == 2


def test_before_steps_are_timed_all_epochs_are_thought_possible():
    assert choose_epochs(Outlook(0.0, 0.0, 0.0, 1.0), 12) == 12


@pytest.mark.parametrize(
    ("outlook", "epochs", "words"),
    [
        (AMPLE, TUNED_EPOCHS, "then 6 epochs over the last blocks, of about 52 s"),
        (Outlook(8.0, 0.0, 4.0, 41.0), 4, "4 epochs"),
        (Outlook(80.0, 0.0, 40.0, 270.0), 0, "not trained, 3 epochs would take about 4.7 min, and 4.5 min of"),
        (Outlook(80.0, 0.0, 40.0, 0.0), 0, "the last blocks: not trained, nothing is left of the budget"),
        (Outlook(80.0, 0.0, 40.0, -3.0), 0, "nothing is left of the budget"),
    ],
)
def test_whether_there_is_time_is_said_with_figures(outlook, epochs, words):
    found, why = weigh_time("the last blocks", outlook, TUNED_EPOCHS)
    assert found == epochs and words in why


@pytest.mark.parametrize(
    ("evidence", "select", "words"),
    [
        (DEEP, 60, ""),
        (DEEP, 0, "too few pictures, or of a class, to keep 30 to choose by"),
        (DEEP, LEAST_SELECT, ""),
        (Evidence((variant(accuracy=0.98), variant((FINAL,), 0.4)), (), None), 60, "right on 98.0%"),
        (Evidence((variant(accuracy=0.98), variant((FINAL,), 0.4)), (), None, 0.5), 60, ""),
        (Evidence((variant(accuracy=0.99), variant((FINAL,), 0.4)), (), None, 0.5), 60, "right on 99.0%"),
        # Where 99 of 100 are of one class, 99 % say nothing.
        (Evidence((variant(accuracy=0.99), variant((FINAL,), 0.4)), (), None, 0.99), 60, ""),
    ],
)
def test_whether_training_further_may_pay_is_decided_from_figures_and_said(evidence, select, words):
    possible, why = can_gain(evidence, select)
    assert possible == (not words) and words in why


ONE_DEPTH = Evidence((variant((FINAL,)),), (), None)
FIRST_ALONE = Evidence((variant(("x",), 0.2),), (), None)  # as settings can have it


@pytest.mark.parametrize(
    ("evidence", "freeze", "boundary", "words"),
    [
        (DEEP, "", "x", ""),
        (DEEP, "y", "y", ""),
        (DEEP, "3", "3", ""),
        (ONE_DEPTH, "", "", "no block is known"),
        (ONE_DEPTH, "y", "y", ""),
        (FIRST_ALONE, "", "", "those of x, up to"),
        (FIRST_ALONE, "w", "w", ""),
    ],
)
def test_the_network_is_frozen_up_to_the_first_block_looked_at_or_the_one_asked_for(evidence, freeze, boundary, words):
    found, why = find_boundary(evidence, freeze)
    assert found == boundary and words in why and bool(why) == (not found)


@pytest.mark.parametrize(
    ("pictures", "epochs"), [(1, 12), (1_600, 12), (2_000, 10), (5_000, 4), (20_000, 3), (10**6, 3)]
)
def test_the_more_pictures_the_fewer_epochs_over_everything(pictures, epochs):
    assert choose_length(pictures) == epochs


@pytest.mark.parametrize(
    ("every", "pictures", "worth"), [(0.2, 20_000, True), (0.2, 19_999, False), (0.29, 20_000, False)]
)
def test_random_weights_are_tried_on_many_pictures_of_another_kind_only(every, pictures, worth):
    evidence = Evidence((variant(log_loss=every), variant((FINAL,), 0.4)), (), None)
    assert is_scratch_worth_trying(evidence, pictures) == worth


def test_where_one_depth_was_looked_at_nothing_is_said_of_a_distance():
    assert ONE_DEPTH.distance is None and not is_scratch_worth_trying(ONE_DEPTH, 10**6)
    assert not any("distance" in line for line in describe_evidence(ONE_DEPTH))


@pytest.mark.parametrize(
    ("losses", "epochs", "can"),
    [
        ([], 6, True),
        ([0.5], 6, True),
        ([0.5, 0.9, 1.2], 6, True),  # before half-way nothing is told
        ([0.5, 0.9, 1.0, 1.1], 6, False),
        ([0.5, 0.9, 0.95, 0.85], 6, True),
        ([0.5, 1.0, 1.1, 1.05], 6, False),
        ([0.5, 1.0, 0.9, 0.95], 6, False),  # one fall of 0.1 in three epochs: 0.65 at the best
        ([0.5, 1.0, 0.88, 0.95], 6, True),
        ([9.0, 5.0, 2.0, 2.0, 2.0, 2.0], 10, False),  # falls of long ago do not count
        ([0.5, 0.7], 1, False),
        ([0.5, 0.6], 1, True),
    ],
)
def test_an_arm_goes_on_while_its_loss_can_still_come_near_what_is_held(losses, epochs, can):
    assert can_win(losses, epochs, 0.5) == can


@pytest.mark.parametrize(
    ("mirror", "zoom", "every", "wanted", "views"),
    [
        (0.3, 0.3, 0.3, "auto", "plain"),
        (0.28, 0.3, 0.3, "auto", "mirror"),
        (0.28, 0.27, 0.27, "auto", "zoom"),
        (0.28, 0.27, 0.26, "auto", "all"),
        (0.299, 0.299, 0.29, "auto", "all"),
        (0.299, 0.299, 0.297, "auto", "plain"),
        (0.2, 0.2, 0.2, "plain", "plain"),
        (0.3, 0.3, 0.3, "mirror", "mirror"),
        (0.3, 0.3, 0.3, "all", "all"),
    ],
)
def test_views_are_those_that_are_set_or_the_cheapest_but_for_what_others_gain(mirror, zoom, every, wanted, views):
    losses = {"plain": 0.3, "mirror": mirror, "zoom": zoom, "all": every}
    found = [dataclasses.replace(variant(log_loss=loss), views=VIEW_SETS[name]) for name, loss in losses.items()]
    assert choose_views(found, wanted) == VIEW_SETS[views]
    assert choose_views((), wanted) == VIEW_SETS["plain" if wanted == "auto" else wanted]


@pytest.mark.parametrize(
    ("mirror", "zoom", "more"),
    [
        (0.981, 0.999, False),
        (0.985, 0.991, False),  # 0.9805 foretold
        (0.985, 0.989, True),
        (0.990, 0.980, True),  # none by itself is worth its pass: all together are held against the plain one
        (0.990, 0.979, False),  # the enlarged middle is worth it, and all together are not that much better
        (0.930, 0.965, False),
        (0.955, 0.930, True),
        (0.900, 1.100, False),
        (1.000, 1.000, False),
    ],
)
def test_all_views_are_tried_where_one_and_half_of_the_other_promise_enough(mirror, zoom, more):
    found = [
        dataclasses.replace(variant(log_loss=loss), views=VIEW_SETS[name])
        for name, loss in (("plain", 1.0), ("mirror", mirror), ("zoom", zoom))
    ]
    assert promises_more(found) == promises_more([found[0], found[2], found[1]]) == more


def test_a_single_other_view_promises_nothing_of_all_but_its_own_gain():
    found = [variant(log_loss=1.0), dataclasses.replace(variant(log_loss=0.9), views=VIEW_SETS["zoom"])]
    assert not promises_more(found)


def geometries(losses):
    """Variants by fit and size, such as `crop 224`."""
    pairs = ((name.split(), loss) for name, loss in losses.items())
    return tuple(dataclasses.replace(variant(log_loss=loss), fit=fit, size=int(size)) for (fit, size), loss in pairs)


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ({"crop 224": 0.3}, "crop 224"),
        ({"crop 224": 0.3, "squash 224": 0.295, "pad 224": 0.31}, "crop 224"),
        ({"crop 224": 0.3, "squash 224": 0.293, "pad 224": 0.31}, "squash 224"),
        ({"crop 224": 0.3, "squash 224": 0.28, "pad 224": 0.279}, "pad 224"),  # equally dear
        ({"pad 224": 0.3, "squash 224": 0.25, "pad 288": 0.2}, "pad 288"),
        ({"crop 224": 0.3, "squash 224": 0.28, "squash 288": 0.275}, "squash 224"),  # better by less than a fiftieth
        ({"crop 224": 0.3, "squash 224": 0.28, "squash 288": 0.27}, "squash 288"),
        ({"crop 224": 0.3, "squash 224": 0.295, "crop 288": 0.293}, "crop 288"),  # than its own way, which was held
        ({"crop 224": 0.3, "squash 224": 0.295, "crop 288": 0.295}, "crop 224"),
        ({"crop 224": 0.0, "squash 224": 0.0, "crop 288": 0.0}, "crop 224"),
    ],
)
def test_the_geometry_is_the_networks_own_but_for_what_others_gain_and_that_is_said(losses, chosen):
    found = geometries(losses)
    taken = choose_geometry(found)
    assert f"{taken.fit} {taken.size}" == chosen
    told = describe_evidence(Evidence(DEEP.variants, (), None, geometries=found))
    tried = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    assert told[0] == f"log-loss by fit and size in pixels: {tried}: {chosen} is taken"


def test_where_no_geometries_were_compared_nothing_is_said_of_them():
    assert not any("fit and size" in line for line in describe_evidence(DEEP))


@pytest.mark.parametrize(
    ("own", "ratio", "fits"),
    [
        ("crop", 1.5, ("squash", "pad")),
        ("crop", 1.02, ("squash", "pad")),
        ("crop", 1.01, ("squash",)),  # of squares, nothing would be padded
        ("crop", 1.0, ("squash",)),
        ("center", 1.0, ("squash",)),
        ("squash", 1.5, ("pad",)),
        ("squash", 1.0, ()),
        ("pad", 1.5, ("squash",)),
        ("pad", 1.0, ("squash",)),
    ],
)
def test_pictures_that_are_not_square_may_be_pressed_into_a_square_or_padded(own, ratio, fits):
    assert list_fits(own, ratio) == fits


@pytest.mark.parametrize(
    ("size", "larger"), [(32, 32), (64, 96), (160, 192), (224, 288), (256, 320), (299, 384), (384, 512)]
)
def test_a_larger_side_is_a_third_more_in_steps_that_networks_take(size, larger):
    assert enlarge(size) == larger
