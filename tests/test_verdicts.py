import pytest

from headstart.errors import UsageError
from headstart.verdicts import (
    FINAL,
    LEAST_EPOCHS,
    LEAST_SELECT,
    TUNED_EPOCHS,
    Evidence,
    Outlook,
    Variant,
    choose_epochs,
    read_time,
    show_time,
    weigh_tuning,
)


def variant(taps=("x", FINAL), log_loss=0.3, accuracy=0.9):
    return Variant(taps, ("plain",), "logistic", log_loss, accuracy, accuracy - 0.05, accuracy + 0.05, 100)


DEEP = Evidence((variant(), variant((FINAL,), 0.4)), None, None)
AMPLE = Outlook(pictures=400, select=60, step_seconds=0.02, seconds_left=600.0)


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


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (3600, "60 min")])
def test_a_time_is_shown_as_people_say_it(seconds, text):
    assert show_time(seconds) == text


@pytest.mark.parametrize(
    ("left", "epochs"),
    [(1000.0, TUNED_EPOCHS), (60.0, 6), (59.9, 5), (52.0, 5), (51.9, 4), (36.0, 3), (35.9, 0), (0.0, 0), (-5.0, 0)],
)
def test_there_are_as_many_epochs_as_the_time_allows(left, epochs):
    # 400 pictures at 50 a second: 8 s an epoch, and one and a half of these around them.
    assert choose_epochs(Outlook(400, 60, 0.02, left)) == epochs


def test_before_steps_are_timed_all_epochs_are_thought_possible():
    assert choose_epochs(Outlook(400, 60, 0.0, 1.0)) == TUNED_EPOCHS


@pytest.mark.parametrize(
    ("evidence", "outlook", "epochs", "words"),
    [
        (DEEP, AMPLE, TUNED_EPOCHS, "6 epochs over the last blocks, of about 60 s"),
        (DEEP, Outlook(400, 60, 0.02, 45.0), 4, "4 epochs"),
        (DEEP, Outlook(4000, 600, 0.02, 300.0), 0, f"{LEAST_EPOCHS} epochs would take about 6 min, and 5 min of the"),
        (DEEP, Outlook(4000, 600, 0.02, -3.0), 0, "and 0 s of the budget are left"),
        (DEEP, Outlook(100, LEAST_SELECT - 1, 0.02, 600.0), 0, "29 pictures to choose by are fewer than 30"),
        (DEEP, Outlook(100, LEAST_SELECT, 0.02, 600.0), TUNED_EPOCHS, "6 epochs"),
        (Evidence((variant((FINAL,)),), None, None), AMPLE, 0, "no blocks"),
        (Evidence((variant(accuracy=0.98), variant((FINAL,), 0.4)), None, None), AMPLE, 0, "right on 98.0%"),
        (Evidence((variant(accuracy=0.98), variant((FINAL,), 0.4)), None, None, 0.5), AMPLE, 6, "6 epochs"),
        (Evidence((variant(accuracy=0.99), variant((FINAL,), 0.4)), None, None, 0.5), AMPLE, 0, "right on 99.0%"),
        # Where 99 of 100 are of one class, 99 % say nothing.
        (Evidence((variant(accuracy=0.99), variant((FINAL,), 0.4)), None, None, 0.99), AMPLE, 6, "6 epochs"),
        (
            Evidence((variant(("x",), 0.2), variant(), variant((FINAL,), 0.4)), None, None),
            AMPLE,
            0,
            "those of x, up to",
        ),
    ],
)
def test_whether_training_further_may_pay_is_decided_from_figures_and_said(evidence, outlook, epochs, words):
    found, why = weigh_tuning(evidence, outlook)
    assert found == epochs and words in why
