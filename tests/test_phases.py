import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

import headstart
from headstart import fitting, phases, training
from headstart.engine import Adapted
from headstart.phases import Arm, choose, interpolate
from headstart.plan import Choose, FitHead, Train


def model(value: float) -> Adapted:
    made = Adapted(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 3))
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.fill_(value)
    return made


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_model_between_two_has_weights_and_statistics_between_theirs(share):
    start, end = model(1.0), model(3.0)
    between = interpolate(start, end, share)
    for name, tensor in between.state_dict().items():
        expected = 3 if name.endswith("num_batches_tracked") else 1.0 + 2.0 * share
        assert torch.equal(tensor, torch.full_like(tensor, expected)), name
    assert all(torch.equal(t, torch.full_like(t, 1.0)) for t in start.state_dict().values())
    assert all(torch.equal(t, torch.full_like(t, 3.0)) for t in end.state_dict().values())


def test_models_of_other_shapes_have_nothing_between_them():
    with pytest.raises(ValueError, match="shape"):
        interpolate(model(1.0), Adapted(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), nn.Linear(2, 3)), 0.5)


def arm(share: float, *losses: float) -> Arm:
    return Arm(share, ("plain",), np.array(losses))


@pytest.mark.parametrize(
    ("arms", "taken", "words"),
    [
        ([arm(0, 0.5, 0.5, 0.5, 0.5), arm(1, 0.6, 0.5, 0.5, 0.5)], 0, "no higher than all others: taken"),
        ([arm(0, 0.5, 0.5, 0.5, 0.5), arm(1, 0.5, 0.5, 0.5, 0.5)], 0, "taken"),
        ([arm(0, 0.5, 0.5, 0.5, 0.5), arm(0.5, 0.4, 0.3, 0.4, 0.3), arm(1, 0.4, 0.4, 0.4, 0.4)], 0.5, "50% of the way"),
        # lower by 0.1 in the mean, and by chance: once by 0.9, else higher
        ([arm(0, 1.0, 0.5, 0.5, 0.5), arm(1, 0.1, 0.7, 0.6, 0.7)], 0, "too little, the cheaper is taken"),
    ],
)
def test_the_cheapest_arm_is_taken_unless_another_is_surely_better(arms, taken, words):
    found, why = choose(arms)
    assert found.share == taken and words in why


# In a run


@pytest.fixture
def many(make_shapes, tmp_path):
    return make_shapes(tmp_path / "many", 90)


def options(tiny_weights, **more):
    return {"weights": str(tiny_weights), "precision": "float32", "device": "cpu", "time_budget": "10m", **more}


@pytest.fixture
def doubtful(monkeypatch):
    """Drawn shapes are told apart too easily for anything to be gained: that is overlooked."""
    monkeypatch.setattr("headstart.verdicts.SURE", 2.0)


def take(monkeypatch, share, views=("plain",)):
    monkeypatch.setattr(
        phases, "choose", lambda arms: (next(a for a in arms if (a.share, a.views) == (share, views)), "taken")
    )


@pytest.mark.parametrize("views", [("plain",), ("plain", "mirror")])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_what_was_trained_further_is_saved_and_predicts_as_it_was_measured(
    many, tiny_weights, tmp_path, monkeypatch, doubtful, share, views
):
    take(monkeypatch, share, views)
    run = headstart.train(many, tmp_path / "run", **options(tiny_weights))
    assert run is not None and run.plan.strategy == "lp-ft"
    first, second, third = run.plan.phases
    assert isinstance(first, FitHead) and isinstance(second, Train) and isinstance(third, Choose)
    assert run.classifier.backbone.spec.views == views and run.classifier.backbone.spec.taps
    again = headstart.evaluate(tmp_path / "run", precision="float32", device="cpu")
    np.testing.assert_allclose(again.probabilities, run.evaluation.probabilities, atol=1e-5)
    assert not list((tmp_path / "run").glob("activations*"))
    before, after = training.find_network(training.configs.resolve(None, options(tiny_weights))).load(), None
    after = headstart.load(tmp_path / "run").backbone.state_dict()
    same = {name for name, tensor in before.state_dict().items() if torch.equal(tensor, after[name])}
    assert "conv_stem.weight" in same and "conv_head.weight" not in same
    assert not any(name.startswith("inner") for name in after)


def test_where_the_fitted_head_is_taken_it_is_the_one_of_a_run_without_training(
    many, tiny_weights, tmp_path, monkeypatch, doubtful
):
    take(monkeypatch, 0.0)
    monkeypatch.setattr("headstart.evidence.is_mirror_worth_trying", lambda best, symmetry: False)
    tried = headstart.train(many, tmp_path / "tried", **options(tiny_weights, heads="logistic,svm,means"))
    plain = headstart.train(
        many, tmp_path / "plain", **options(tiny_weights, heads="logistic,svm,means", time_budget="0")
    )
    assert tried is not None and plain is not None
    assert (tried.plan.strategy, tried.plan.trains, plain.plan.trains) == ("probe", True, False)
    np.testing.assert_array_equal(tried.evaluation.probabilities, plain.evaluation.probabilities)
    assert "taken" in json.loads((tmp_path / "tried/plan.json").read_text())["reasons"]


def test_a_run_that_was_interrupted_goes_on_by_the_pace_it_had(many, tiny_weights, tmp_path, monkeypatch, doubtful):
    settings = options(tiny_weights)
    planned = headstart.train(many, tmp_path / "run", dry_run=True, **settings)
    assert planned.timing is not None and 0 < planned.timing.seconds_left < 600

    def refuse(*_):
        raise AssertionError("timed again")

    monkeypatch.setattr(fitting, "measure_pace", refuse)
    run = headstart.train(many, tmp_path / "run", **settings)
    assert run is not None and run.plan.timing == planned.timing
    assert [phase.phase for phase in run.plan.phases] == [phase.phase for phase in planned.phases]


@pytest.mark.parametrize("more", [{"time_budget": "0"}, {"time_budget": "1s"}, {"heads": "knn"}])
def test_without_time_or_weights_nothing_is_trained_further(many, tiny_weights, tmp_path, doubtful, more):
    run = headstart.train(many, tmp_path / "run", **options(tiny_weights, **more))
    assert run is not None and not run.plan.trains and run.plan.strategy == "probe"


def test_few_pictures_are_not_split_further(shapes, tiny_weights, tmp_path, doubtful):
    run = headstart.train(shapes, tmp_path / "run", **options(tiny_weights))
    assert run is not None and not run.plan.trains
    assert ",select" not in (tmp_path / "run/split.csv").read_text()


def test_no_epoch_is_begun_that_would_take_longer_than_there_is_time(
    many, tiny_weights, tmp_path, monkeypatch, doubtful
):
    decide = training.plan.decide

    def hurry(situation, config):
        made = decide(situation, config)
        phases = tuple(dataclasses.replace(p, seconds=1e-3) if isinstance(p, Train) else p for p in made.phases)
        return dataclasses.replace(made, phases=phases)

    monkeypatch.setattr(training.plan, "decide", hurry)
    headstart.train(many, tmp_path / "run", **options(tiny_weights))
    rows = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "step" not in row] == [0, 1]


def test_what_is_held_against_the_fitted_head_was_trained_also_where_no_epoch_was_better(
    many, tiny_weights, tmp_path, monkeypatch, doubtful
):
    take(monkeypatch, 1.0)
    monkeypatch.setattr("headstart.plan.TUNED_RATE", 1.0)  # it only gets worse
    headstart.train(many, tmp_path / "run", **options(tiny_weights))
    rows = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    start, *others = [row for row in rows if "step" not in row]
    assert not start["best"] and others[0]["best"]
    kept = min(others, key=lambda row: row["select"]["log_loss"])
    assert kept["select"]["log_loss"] > start["select"]["log_loss"]
