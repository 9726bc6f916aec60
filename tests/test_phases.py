import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

import headstart
from headstart import fitting, phases, training
from headstart.engine import Adapted
from headstart.errors import UsageError
from headstart.phases import Arm, choose, interpolate
from headstart.plan import Choose, FitHead, Train
from headstart.verdicts import FINAL


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


def spread(low: float, high: float, count: int = 20) -> list[float]:
    return [low, high] * (count // 2)


HELD = arm(0, *spread(0.4, 0.6))


@pytest.mark.parametrize(
    ("arms", "taken", "words"),
    [
        ([HELD, arm(1, *spread(0.4, 0.7))], 0, "lower by -0.050"),
        ([HELD, arm(1, *spread(0.4, 0.6))], 0, "not surely lower"),
        ([HELD, arm(0.5, *spread(0.2, 0.4)), arm(1, *spread(0.3, 0.5))], 0.5, "50% of the way is taken"),
        ([HELD, arm(1, *spread(0.399, 0.599))], 0, "lower by 0.001, standard error 0.000: not surely lower"),
        ([arm(0, *spread(0.4, 1.0, 19), 9.0), arm(1, *spread(0.5, 1.1, 19), 0.1)], 0, "not surely lower"),  # by chance
    ],
)
def test_the_cheapest_arm_is_taken_unless_another_is_surely_better(arms, taken, words):
    found, why = choose(arms, [str(number) for number in range(len(arms[0].losses))])
    assert found.share == taken and words in why


def test_a_dearer_arm_must_be_surely_better_than_the_cheaper_one_that_was_taken():
    plain, mirror = arm(1, *spread(0.2, 0.4)), Arm(1, ("plain", "mirror"), np.array(spread(0.199, 0.399)))
    alone = [str(number) for number in range(20)]
    assert choose([HELD, plain, mirror], alone)[0] is plain
    assert choose([HELD, mirror], alone)[0] is mirror
    better = Arm(1, ("plain", "mirror"), np.array(spread(0.1, 0.3)))
    assert choose([HELD, plain, better], alone)[0] is better


def test_pictures_of_a_group_count_once():
    first, other = arm(0, *[1.0] * 20), arm(1, *[0.4] * 10, *[1.2] * 10)
    alone = [str(number) for number in range(20)]
    assert choose([first, other], alone)[0] is other
    assert choose([first, other], ["one"] * 10 + ["other"] * 10)[0] is first
    assert choose([first, other], ["all"] * 20)[0] is first  # one group tells nothing of chance


# In a run


@pytest.fixture
def many(make_shapes, tmp_path):
    return make_shapes(tmp_path / "many", 90)


def options(tiny_weights, **more):
    return {"weights": str(tiny_weights), "precision": "float32", "device": "cpu", "time_budget": "10m", **more}


@pytest.fixture
def doubtful(monkeypatch):
    """Drawn shapes are told apart too easily for anything to be gained: that is overlooked."""
    monkeypatch.setattr("headstart.verdicts.is_little_left", lambda best, common: False)


def take(monkeypatch, share, views=("plain",)):
    monkeypatch.setattr(
        phases, "choose", lambda arms, groups: (next(a for a in arms if (a.share, a.views) == (share, views)), "taken")
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
    monkeypatch.setattr("headstart.evidence.is_mirror_worth_trying", lambda *_: False)
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


def test_many_classes_of_few_pictures_are_not_split_further(make_shapes, tiny_weights, tmp_path, doubtful):
    for number in range(36):
        make_shapes(tmp_path / "made" / str(number), 4, ("circle",), first_seed=10 * number)
        (tmp_path / "made" / str(number) / "circle").rename(tmp_path / "made" / f"class {number}")
        (tmp_path / "made" / str(number)).rmdir()
    run = headstart.train(tmp_path / "made", tmp_path / "run", **options(tiny_weights))
    assert run is not None and not run.plan.trains
    assert ",select" not in (tmp_path / "run/split.csv").read_text()


def test_a_knn_head_that_is_best_is_held_against_what_training_makes_of_another(
    many, tiny_weights, tmp_path, monkeypatch, doubtful
):
    monkeypatch.setattr("headstart.plan.choose_variant", lambda found: next(v for v in found if v.taps == (FINAL,)))
    monkeypatch.setattr("headstart.evidence.choose_variant", lambda found: next(v for v in found if v.taps == (FINAL,)))
    fit, kinds = fitting.fit_heads, []

    def prefer(matrix, fitted, dataset, groups, phase, seed):
        chosen = dataclasses.replace(phase, heads=("knn",)) if "knn" in phase.heads else phase
        kinds.append(phase.heads)
        return fit(matrix, fitted, dataset, groups, chosen, seed)

    take(monkeypatch, 1.0)
    monkeypatch.setattr(fitting, "fit_heads", prefer)
    run = headstart.train(many, tmp_path / "run", **options(tiny_weights))
    assert run is not None and run.plan.strategy == "lp-ft"
    assert kinds[-2:] == [("logistic", "svm", "means", "knn"), ("logistic", "svm", "means")]


def test_settings_of_training_are_heeded_where_there_is_time_and_refused_where_there_is_none(
    many, tiny_weights, tmp_path, doubtful
):
    asked = {"epochs": 3, "learning_rate": 1e-3, "freeze": "blocks.1", "cached_views": 2, "batch_size": 16}
    made = headstart.train(many, tmp_path / "run", dry_run=True, **options(tiny_weights, **asked))
    (phase,) = (phase for phase in made.phases if isinstance(phase, Train))
    assert {name: getattr(phase.settings, name) for name in asked} == asked
    with pytest.raises(UsageError, match="epochs"):
        headstart.train(many, tmp_path / "other", **options(tiny_weights, time_budget="0", epochs=3))
    with pytest.raises(UsageError, match="mixup"):
        headstart.train(many, tmp_path / "other", **options(tiny_weights, mixup=0.2))


def test_the_plan_says_first_what_is_done(many, tiny_weights, tmp_path, doubtful):
    tried = headstart.train(many, tmp_path / "tried", dry_run=True, **options(tiny_weights))
    plain = headstart.train(many, tmp_path / "plain", dry_run=True, **options(tiny_weights, time_budget="0"))
    assert tried.reasons[0] == "strategy auto: probe, and lp-ft held against it"
    assert plain.reasons[0] == "strategy auto: probe, which trains no weight of the network"
    assert plain.timing is None


def test_weights_that_two_layers_share_lie_as_far_on_the_way_as_others():
    start, end = (model(value) for value in (1.0, 3.0))
    for one in (start, end):
        one.backbone.append(one.backbone[0])
    assert torch.equal(interpolate(start, end, 0.5).backbone[0].weight, torch.full((2, 2), 2.0))


@pytest.mark.parametrize(
    ("place", "call"),
    [("prefix.keep", 2), ("checkpoints.write", 3), ("phases.weigh", 1), ("phases.embed", 3), ("fitting.finish", 1)],
)
def test_wherever_an_arm_is_interrupted_it_goes_on_and_ends_with_the_same_bits(
    many, tiny_weights, tmp_path, monkeypatch, doubtful, place, call
):
    take(monkeypatch, 0.5, ("plain", "mirror"))
    whole = headstart.train(many, tmp_path / "whole", **options(tiny_weights))
    module, name = (getattr(headstart, place.partition(".")[0]), place.partition(".")[2])
    real, calls = getattr(module, name), []

    def stop(*given, **named):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            headstart.train(many, tmp_path / "run", **options(tiny_weights))
    run = headstart.train(many, tmp_path / "run", **options(tiny_weights))
    assert run is not None and whole is not None
    np.testing.assert_array_equal(run.evaluation.probabilities, whole.evaluation.probabilities)
    for key, tensor in whole.classifier.backbone.state_dict().items():
        assert torch.equal(tensor, run.classifier.backbone.state_dict()[key]), key


@pytest.mark.parametrize("symmetry", ["none", "mirror", "any"])
def test_mirror_images_are_an_arm_where_they_mean_the_same(many, tiny_weights, tmp_path, doubtful, symmetry):
    made = headstart.train(many, tmp_path / "run", dry_run=True, **options(tiny_weights, symmetry=symmetry))
    *_, train, choose = made.phases
    assert (("plain", "mirror") in choose.views) == (symmetry != "none")
    assert ("Flip" in train.settings.augment) == (symmetry != "none")


def test_several_labels_a_picture_are_trained_further_too(many, tiny_weights, tmp_path, monkeypatch, doubtful):
    names = sorted(path.relative_to(many).as_posix() for path in many.rglob("*.png"))
    rows = [f"{name},{'|'.join((name.split('/')[0], 'late')[: 1 + (int(name[-5]) > 4)])}" for name in names]
    (tmp_path / "table.csv").write_text("\n".join(("image,labels", *rows)))
    take(monkeypatch, 1.0)
    monkeypatch.setattr("headstart.verdicts.WORTH_DEPTH", 10.0)  # the final features alone, behind all blocks
    run = headstart.train(tmp_path / "table.csv", tmp_path / "run", images=str(many), **options(tiny_weights))
    assert run is not None and run.plan.strategy == "lp-ft", "; ".join(run.plan.reasons)
    assert run.classifier.task == "multi"
    assert run.plan.phases[1].settings.loss == "bce-with-logits" and len(run.classifier.thresholds) == 4
    again = headstart.evaluate(tmp_path / "run", precision="float32", device="cpu")
    np.testing.assert_allclose(again.probabilities, run.evaluation.probabilities, atol=1e-5)
