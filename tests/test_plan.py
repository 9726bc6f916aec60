import dataclasses
import json

import pytest

from headstart.config import RunConfig, resolve
from headstart.plan import KNN_PICTURES, FitHead, Situation, decide

USUAL = Situation(
    task="single",
    classes=3,
    pictures=300,
    select=0,
    smallest_class=40,
    folds=5,
    device="cpu",
    precision="bfloat16",
)
ALL = ("logistic", "svm", "means", "knn")


def situation(**facts):
    return dataclasses.replace(USUAL, **facts)


def reasons(plan):
    return "; ".join(plan.reasons)


@pytest.mark.parametrize(
    ("facts", "settings", "heads", "folds", "words"),
    [
        ({}, {}, ALL, 5, ["strategy auto: probe", "bfloat16 on cpu"]),
        ({}, {"strategy": "probe"}, ALL, 5, ["strategy probe: as set"]),
        ({"folds": 3, "smallest_class": 3}, {}, ALL, 3, ["3 folds instead of 5", "smallest class has 3"]),
        ({"folds": 10}, {"folds": 10}, ALL, 10, []),
        ({"pictures": KNN_PICTURES}, {}, ALL, 5, []),
        ({"pictures": KNN_PICTURES + 1}, {}, ALL[:3], 5, [f"{KNN_PICTURES + 1} pictures", "no kNN"]),
        ({"task": "multi"}, {}, ("logistic",), 5, ["several labels a picture"]),
        ({"task": "multi", "pictures": 10**6}, {}, ("logistic",), 5, ["several labels a picture"]),
        ({"select": 60}, {}, ALL, 5, ["60 select pictures"]),
        ({"device": "cuda:1", "precision": "float32"}, {}, ALL, 5, ["float32 on cuda:1"]),
    ],
)
def test_what_is_decided_and_why(facts, settings, heads, folds, words):
    plan = decide(situation(**facts), resolve(None, settings))
    assert plan.strategy == "probe"
    assert plan.phases == (FitHead(heads, folds),)
    assert (plan.device, plan.precision) == (situation(**facts).device, situation(**facts).precision)
    assert all(word in reasons(plan) for word in words)


@pytest.mark.parametrize(
    ("facts", "silent"),
    [
        ({}, "instead of"),
        ({}, "kNN"),
        ({}, "several labels"),
        ({}, "select pictures"),
        ({"pictures": KNN_PICTURES}, "kNN"),
        ({"task": "multi", "pictures": 10**6}, "no kNN"),
    ],
)
def test_no_reason_is_given_for_what_was_not_decided(facts, silent):
    assert silent not in reasons(decide(situation(**facts), RunConfig()))


def test_fewer_folds_are_not_laid_on_a_class_that_is_large_enough():
    # Groups that must not part can allow fewer folds than the smallest class has pictures.
    assert "the smallest class has 40" not in reasons(decide(situation(folds=3, smallest_class=40), RunConfig()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_number_format_that_was_set_is_not_called_the_fastest(precision):
    plan = decide(situation(precision=precision), resolve(None, {"precision": precision}))
    assert "fastest" not in reasons(plan)
    assert f"{precision} on cpu" in reasons(plan)


def test_a_plan_depends_on_nothing_but_its_arguments():
    assert decide(USUAL, RunConfig()) == decide(USUAL, RunConfig())


def test_nothing_in_a_plan_is_left_to_be_decided_and_it_is_json():
    values = json.loads(json.dumps(decide(USUAL, RunConfig()).to_json()))
    assert values["phases"] == [{"heads": list(ALL), "folds": 5, "phase": "fit_head"}]
    assert "auto" not in {values["strategy"], values["device"], values["precision"]}
    assert all(values["reasons"])


def test_a_plan_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        decide(USUAL, RunConfig()).device = "cuda"
