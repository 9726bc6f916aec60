import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import headstart
from headstart import backbones, evidence, fitting, phases, training, verdicts
from headstart.bench import Bench
from headstart.config import resolve
from headstart.engine import Adapted, Training
from headstart.errors import TrainingError, UsageError
from headstart.phases import Arm, choose, interpolate
from headstart.plan import Choose, FitHead, Situation, Train, decide
from headstart.taps import see_blocks
from headstart.timing import Layout, Pace, Timing
from headstart.verdicts import FINAL, Evidence, Variant


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
    return Arm(1, "the last blocks", share, ("plain",), np.array(losses))


def spread(low: float, high: float, count: int = 20) -> list[float]:
    return [low, high] * (count // 2)


HELD = arm(0, *spread(0.4, 0.6))


@pytest.mark.parametrize(
    ("arms", "taken", "words"),
    [
        ([HELD, arm(1, *spread(0.4, 0.7))], 0, "lower by -0.050"),
        ([HELD, arm(1, *spread(0.4, 0.6))], 0, "not clearly lower"),
        ([HELD, arm(0.5, *spread(0.2, 0.4)), arm(1, *spread(0.3, 0.5))], 0.5, "50% of the way is taken"),
        ([HELD, arm(1, *spread(0.399, 0.599))], 0, "lower by 0.001, standard error 0.000: not clearly lower"),
        ([arm(0, *spread(0.4, 1.0, 19), 9.0), arm(1, *spread(0.5, 1.1, 19), 0.1)], 0, "not clearly lower"),  # by chance
    ],
)
def test_the_cheapest_arm_is_taken_unless_another_is_clearly_better(arms, taken, words):
    found, why = choose(arms, [str(number) for number in range(len(arms[0].losses))])
    assert found.share == taken and words in why


def test_a_dearer_arm_must_be_clearly_better_than_the_cheaper_one_that_was_taken():
    plain = arm(1, *spread(0.2, 0.4))
    mirror = dataclasses.replace(plain, views=("plain", "mirror"), losses=np.array(spread(0.199, 0.399)))
    alone = [str(number) for number in range(20)]
    assert choose([HELD, plain, mirror], alone)[0] is plain
    assert choose([HELD, mirror], alone)[0] is mirror
    better = dataclasses.replace(mirror, losses=np.array(spread(0.1, 0.3)))
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
    quick = {"precision": "float32", "device": "cpu", "fit": "crop", "size": 32}
    return {"weights": str(tiny_weights), "time_budget": "10m", **quick, **more}


@pytest.fixture
def doubtful(monkeypatch):
    """Drawn shapes are told apart too easily for anything to be gained: that is overlooked."""
    monkeypatch.setattr("headstart.verdicts.is_little_left", lambda best, common: False)
    monkeypatch.setattr("headstart.verdicts.WHOLE_EPOCHS", 3)
    monkeypatch.setattr("headstart.plan.TUNED_EPOCHS", 3)
    monkeypatch.setattr("headstart.evidence.list_views", lambda best, symmetry, *_: ())
    monkeypatch.setattr("headstart.engine.can_win", lambda losses, epochs, target: True)


@pytest.fixture
def brief(monkeypatch, doubtful):
    """Nine pictures are enough to choose by."""
    for module in (training, verdicts):
        monkeypatch.setattr(module, "LEAST_SELECT", 9)


def small(tiny_weights, **more):
    """Options with which a few small pictures are trained on in a second or two."""
    few = {"select_share": 0.3, "folds": 2, "epochs": 2, "cached_views": 1, "interpolation": "100", "views": "plain"}
    return options(tiny_weights, **{**few, **more})


def worsen(monkeypatch):
    """Let each look at the select pictures find more loss than the one before."""
    plainly, looks = Bench._score, itertools.count(1)
    monkeypatch.setattr(Bench, "_score", lambda *given: {**plainly(*given), "log_loss": float(next(looks))})


BLOCKS, ALL, RANDOM = "the last blocks", "all blocks", "all blocks from random weights"


def take(monkeypatch, share, views=("plain",), name=BLOCKS):
    wanted = (name if share else "the fitted head", share, views)

    def choose(arms, groups):
        return next(arm for arm in arms if (arm.name, arm.share, arm.views) == wanted), "taken"

    monkeypatch.setattr(phases, "choose", choose)


@pytest.mark.parametrize("views", [("plain",), ("plain", "mirror")])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_what_was_trained_further_is_saved_and_predicts_as_it_was_measured(
    many, tiny_weights, tmp_path, monkeypatch, doubtful, share, views
):
    take(monkeypatch, share, views)
    run = headstart.train(many, tmp_path / "run", **options(tiny_weights))
    assert run is not None and run.plan.strategy == "lp-ft"
    first, second, third, last = run.plan.phases
    assert isinstance(first, FitHead) and isinstance(last, Choose)
    assert isinstance(second, Train) and isinstance(third, Train) and (second.name, third.name) == (BLOCKS, ALL)
    assert run.classifier.backbone.spec.views == views and run.classifier.backbone.spec.taps
    again = headstart.evaluate(tmp_path / "run", precision="float32", device="cpu")
    np.testing.assert_allclose(again.probabilities, run.evaluation.probabilities, atol=1e-5)
    assert not [*(tmp_path / "run").glob("activations*"), *(tmp_path / "run").glob("trained*")]
    before, after = training.find_network(training.configs.resolve(None, options(tiny_weights))).load(), None
    after = headstart.load(tmp_path / "run").backbone.state_dict()
    same = {name for name, tensor in before.state_dict().items() if torch.equal(tensor, after[name])}
    assert "conv_stem.weight" in same and "conv_head.weight" not in same
    assert not any(name.startswith("inner") for name in after)


def test_where_the_fitted_head_is_taken_it_is_the_one_of_a_run_without_training(
    many, tiny_weights, tmp_path, monkeypatch, doubtful
):
    take(monkeypatch, 0.0)
    monkeypatch.setattr("headstart.evidence.list_views", lambda *_: ())
    tried = headstart.train(many, tmp_path / "tried", **options(tiny_weights, heads="logistic,svm,means"))
    plain = headstart.train(
        many, tmp_path / "plain", **options(tiny_weights, heads="logistic,svm,means", time_budget="0")
    )
    assert tried is not None and plain is not None
    assert (tried.plan.strategy, tried.plan.trains, plain.plan.trains) == ("probe", True, False)
    np.testing.assert_array_equal(tried.evaluation.probabilities, plain.evaluation.probabilities)
    assert "taken" in json.loads((tmp_path / "tried/plan.json").read_text())["reasons"]


def test_a_run_goes_on_with_the_evidence_that_it_had(many, tiny_weights, tmp_path, monkeypatch, doubtful):
    made = headstart.train(many, tmp_path / "run", dry_run=True, **options(tiny_weights))
    gather, known = evidence.gather, []
    monkeypatch.setattr(evidence, "gather", lambda *given: known.append(given[-1]) or gather(*given))
    monkeypatch.setattr(evidence, "weigh_depths", lambda *_: pytest.fail("it was measured again"))
    again = headstart.train(many, tmp_path / "run", dry_run=True, **options(tiny_weights))
    assert known == [made.evidence] == [again.evidence] and again.phases == made.phases


def test_what_could_not_fit_by_how_long_a_look_took_is_not_trained_when_the_run_goes_on(
    many, tiny_weights, tmp_path, monkeypatch, doubtful
):
    settle, seconds = phases.settle, iter([1e4, 0.0])  # of a look; none when all features are in the cache
    monkeypatch.setattr(phases, "settle", lambda *given: settle(*given[:-1], next(seconds)))
    monkeypatch.setattr(fitting, "measure_pace", lambda *_: pytest.fail("it was timed"))
    planned = headstart.train(many, tmp_path / "run", dry_run=True, **options(tiny_weights))
    assert planned.timing.look_seconds == 1e4 and not planned.trains
    run = headstart.train(many, tmp_path / "run", **options(tiny_weights))
    assert run.plan.timing == planned.timing and run.plan.phases == planned.phases


def test_a_run_that_was_interrupted_goes_on_by_the_pace_it_had(many, tiny_weights, tmp_path, monkeypatch, doubtful):
    settings = options(tiny_weights)
    planned = headstart.train(many, tmp_path / "run", dry_run=True, **settings)
    assert planned.timing.paces and 0 < planned.timing.seconds_left < 600 and planned.timing.head_seconds > 0
    assert all(pace.supply_seconds > 0 and pace.look_seconds > 0 for pace in planned.timing.paces)

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
    assert [row["epoch"] for row in rows if "step" not in row] == [0, 1] * 2
    made = json.loads((tmp_path / "run/plan.json").read_text())
    why = f"{BLOCKS}: stopped after 1 of 3 epochs, another would have taken too long"
    assert why in made["reasons"] and why in made["further"] and made["further"][-1] == made["reasons"][-1]


def test_what_a_training_does_not_take_the_next_one_may(many, tiny_weights, tmp_path, monkeypatch, doubtful):
    monkeypatch.setattr("headstart.engine.can_win", lambda losses, epochs, target: len(losses) < 3)
    planned = headstart.train(many, tmp_path / "run", dry_run=True, **options(tiny_weights))
    run = headstart.train(many, tmp_path / "run", **options(tiny_weights))
    (_, *before, _), (_, *after, _) = planned.phases, run.plan.phases
    rows = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    taken = sum(row["seconds"] for row in rows if row["phase"] == 1 and "step" not in row)
    assert after[0].seconds == before[0].seconds
    assert after[1].seconds == pytest.approx(before[1].seconds + before[0].seconds - taken, abs=0.2)


def test_what_is_held_against_the_fitted_head_was_trained_also_where_no_epoch_was_better(
    shapes, tiny_weights, tmp_path, monkeypatch, brief
):
    take(monkeypatch, 1.0)
    worsen(monkeypatch)
    run = headstart.train(shapes, tmp_path / "run", **small(tiny_weights, freeze="blocks.1"))
    rows = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    start, *others = [row for row in rows if "step" not in row]
    assert not start["best"] and [row["best"] for row in others] == [True, False]
    assert all(row["select"]["log_loss"] > start["select"]["log_loss"] for row in others)
    assert run is not None and run.classifier.provenance["training"][0]["best_epoch"] == 1
    before = training.find_network(resolve(None, small(tiny_weights))).load().state_dict()
    assert not torch.equal(before["conv_head.weight"], run.classifier.backbone.state_dict()["conv_head.weight"])


@pytest.mark.parametrize("dry_run_first", [False, True])
def test_where_training_turns_out_to_take_too_long_the_head_is_that_of_a_run_without_a_budget(
    shapes, tiny_weights, tmp_path, monkeypatch, brief, dry_run_first
):
    settings = small(tiny_weights)
    slow = Pace(Layout("float32"), 1e4)
    monkeypatch.setattr(fitting.trials, "find_pace", lambda *_: slow)
    if dry_run_first:
        assert not headstart.train(shapes, tmp_path / "run", dry_run=True, **settings).trains
    run = headstart.train(shapes, tmp_path / "run", **settings)
    assert [pace.seconds for pace in run.plan.timing.paces] == [1e4] and not run.plan.trains
    of_training = {"epochs", "cached_views", "interpolation"}
    settings = {name: value for name, value in settings.items() if name not in of_training}
    plain = headstart.train(shapes, tmp_path / "plain", **{**settings, "time_budget": "0"})
    assert run.classifier.provenance == plain.classifier.provenance
    assert run.classifier.temperature == plain.classifier.temperature
    for name, tensor in plain.classifier.head.state_dict().items():
        assert torch.equal(tensor, run.classifier.head.state_dict()[name]), name
    np.testing.assert_array_equal(run.evaluation.probabilities, plain.evaluation.probabilities)


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
    assert kinds[-2:] == [("logistic", "svm", "means", "blend", "knn"), ("logistic", "svm", "means", "blend")]


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


def test_rates_of_blocks_that_stand_still_are_heeded_where_all_are_trained(many, tiny_weights, tmp_path, doubtful):
    made = headstart.train(many, tmp_path / "run", dry_run=True, **options(tiny_weights, rates="conv_stem=1e-6"))
    assert [phase.name for phase in made.phases if isinstance(phase, Train)] == [BLOCKS, ALL]


def test_the_plan_says_first_what_is_done(many, tiny_weights, tmp_path, doubtful):
    tried = headstart.train(many, tmp_path / "tried", dry_run=True, **options(tiny_weights))
    plain = headstart.train(many, tmp_path / "plain", dry_run=True, **options(tiny_weights, time_budget="0"))
    assert tried.reasons[0] == "strategy auto: probe, and training further held against it"
    assert plain.reasons[0] == "strategy auto: probe, which trains no weight of the network"
    assert plain.timing.paces == ()


def test_weights_that_two_layers_share_lie_as_far_on_the_way_as_others():
    start, end = (model(value) for value in (1.0, 3.0))
    for one in (start, end):
        one.backbone.append(one.backbone[0])
    assert torch.equal(interpolate(start, end, 0.5).backbone[0].weight, torch.full((2, 2), 2.0))


@pytest.mark.parametrize("name", [pytest.param(BLOCKS, marks=pytest.mark.slow), ALL])
@pytest.mark.parametrize(
    ("place", "call"),
    [
        pytest.param("prefix.keep", 2, marks=pytest.mark.slow),
        pytest.param("checkpoints.write", 3, marks=pytest.mark.slow),
        ("checkpoints.write", 6),  # of all blocks: the last ones have three epochs and a start
        pytest.param("checkpoints.keep", 1, marks=pytest.mark.slow),
        pytest.param("fitting.train_phases", 2, marks=pytest.mark.slow),
        pytest.param("phases.weigh", 1, marks=pytest.mark.slow),
        ("phases.weigh", 2),
        pytest.param("phases.embed", 3, marks=pytest.mark.slow),
        pytest.param("fitting.finish", 1, marks=pytest.mark.slow),
    ],
)
def test_wherever_an_arm_is_interrupted_it_goes_on_and_ends_with_the_same_bits(
    many, tiny_weights, tmp_path, monkeypatch, doubtful, place, call, name
):
    take(monkeypatch, 0.5, ("plain", "mirror"), name)
    whole = headstart.train(many, tmp_path / "whole", **options(tiny_weights))
    module, function = (getattr(headstart, place.partition(".")[0]), place.partition(".")[2])
    real, calls = getattr(module, function), []

    def stop(*given, **named):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, stop)
        with pytest.raises(KeyboardInterrupt):
            headstart.train(many, tmp_path / "run", **options(tiny_weights))
    run = headstart.train(many, tmp_path / "run", **options(tiny_weights))
    assert run is not None and whole is not None
    np.testing.assert_array_equal(run.evaluation.probabilities, whole.evaluation.probabilities)
    for key, tensor in whole.classifier.backbone.state_dict().items():
        assert torch.equal(tensor, run.classifier.backbone.state_dict()[key]), key
    (facts,), (expected,) = (one.classifier.provenance["training"] for one in (run, whole))
    assert {**facts, "seconds": 0} == {**expected, "seconds": 0}
    weighed = [[reason for reason in one.plan.reasons if "% of the way" in reason] for one in (run, whole)]
    assert weighed[0] == weighed[1] and len(weighed[0]) == 16


def test_what_an_arm_gave_is_trained_again_where_its_file_is_damaged(
    many, tiny_weights, tmp_path, monkeypatch, doubtful, caplog
):
    take(monkeypatch, 0.5)
    whole = headstart.train(many, tmp_path / "whole", **options(tiny_weights))
    with monkeypatch.context() as patch:
        patch.setattr(phases, "decide", interrupt)
        with pytest.raises(KeyboardInterrupt):
            headstart.train(many, tmp_path / "run", **options(tiny_weights))
    first, second = sorted((tmp_path / "run").glob("trained-*"))
    content = bytearray(first.read_bytes())
    content[-10] ^= 1
    first.write_bytes(content)
    second.unlink()
    run = headstart.train(many, tmp_path / "run", **options(tiny_weights))
    assert run is not None and whole is not None and "trained-1.safetensors: is damaged" in caplog.text
    np.testing.assert_array_equal(run.evaluation.probabilities, whole.evaluation.probabilities)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("room", [True, False])
def test_kept_activations_that_are_gone_are_made_again_where_there_is_room(
    many, tiny_weights, tmp_path, monkeypatch, doubtful, room
):
    take(monkeypatch, 0.5)
    real, calls = Training._finish_epoch, []

    def stop(self):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_finish_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            headstart.train(many, tmp_path / "run", **options(tiny_weights, epochs=3))
    files = [*(tmp_path / "run").glob("activations-1-*.npy")]
    assert len(files) == 2
    for file in files:
        file.unlink()
    if not room:
        monkeypatch.setattr("headstart.prefix.has_room", lambda *_: False)
        with pytest.raises(TrainingError, match="is gone, and there is no room"):
            headstart.train(many, tmp_path / "run", **options(tiny_weights, epochs=3))
        return
    run = headstart.train(many, tmp_path / "run", **options(tiny_weights, epochs=3))
    whole = headstart.train(many, tmp_path / "whole", **options(tiny_weights, epochs=3))
    np.testing.assert_array_equal(run.evaluation.probabilities, whole.evaluation.probabilities)


def test_a_training_that_diverges_is_given_up_and_the_others_go_on(
    many, tiny_weights, tmp_path, monkeypatch, doubtful, caplog
):
    real = Training.take_step

    def take_step(self, *given, **named):
        if self.phase == 1 and self.state.epoch == 1:
            raise self._diverged(math.nan)
        return real(self, *given, **named)

    monkeypatch.setattr(Training, "take_step", take_step)
    run = headstart.train(many, tmp_path / "run", **options(tiny_weights, epochs=3))
    why = f"{BLOCKS}: given up, epoch 2, step 1: the loss is nan: training has diverged"
    assert why in run.plan.reasons and why in run.plan.further and why in caplog.text
    assert not any(reason.startswith(f"{BLOCKS} trained") for reason in run.plan.reasons)
    assert any(reason.startswith(f"{ALL} trained") for reason in run.plan.reasons)
    assert json.loads((tmp_path / "run/plan.json").read_text())["reasons"] == list(run.plan.reasons)


def diverge(monkeypatch, phase, epoch):
    """Let a training diverge in the first step of an epoch; gives (phase, epoch, step) of all steps that are taken."""
    real, taken = Training.take_step, []

    def take_step(self, *given, **named):
        taken.append((self.phase, self.state.epoch, self.state.step))
        if taken[-1] == (phase, epoch, 0):
            raise self._diverged(math.nan)
        return real(self, *given, **named)

    monkeypatch.setattr(Training, "take_step", take_step)
    return taken


def test_a_training_that_diverged_is_not_begun_again_where_a_run_is_killed_in_the_next_one(
    shapes, tiny_weights, tmp_path, monkeypatch, brief
):
    take(monkeypatch, 1.0, name=ALL)
    taken, real = diverge(monkeypatch, 1, 1), Training._finish_epoch
    whole = headstart.train(shapes, tmp_path / "whole", **small(tiny_weights))
    assert (1, 1, 0) in taken
    first, second = ([place for place in taken if place[:2] == (2, epoch)] for epoch in (0, 1))
    for epoch in (-1, 1):  # before there is a checkpoint of the next one, and where there is one

        def stop(self, epoch=epoch):
            if (self.phase, self.state.epoch) == (2, epoch):
                raise KeyboardInterrupt
            return real(self)

        with monkeypatch.context() as patch:
            patch.setattr(Training, "_finish_epoch", stop)
            with pytest.raises(KeyboardInterrupt):
                headstart.train(shapes, tmp_path / "run", **small(tiny_weights))
        assert epoch == -1 or taken == [*first, *second]
        taken.clear()
    run = headstart.train(shapes, tmp_path / "run", **small(tiny_weights))
    assert taken == second
    said = [[why for why in one.plan.reasons if "given up" in why or "log-loss" in why] for one in (run, whole)]
    assert said[0] == said[1] and any("given up, epoch 2, step 1" in why for why in said[0])
    np.testing.assert_array_equal(run.evaluation.probabilities, whole.evaluation.probabilities)
    for key, tensor in whole.classifier.backbone.state_dict().items():
        assert torch.equal(tensor, run.classifier.backbone.state_dict()[key]), key
    courses = [
        [{**json.loads(line), "speed": 0, "seconds": 0} for line in (tmp_path / name).read_text().splitlines()]
        for name in ("whole/history.jsonl", "run/history.jsonl")
    ]
    assert courses[0] == courses[1]


def test_a_training_that_diverged_lends_no_time_to_the_next_one(shapes, tiny_weights, tmp_path, monkeypatch, brief):
    monkeypatch.setattr("headstart.plan.is_scratch_worth_trying", lambda *_: True)
    diverge(monkeypatch, 2, 0)
    settings = small(tiny_weights, epochs=1)
    planned = headstart.train(shapes, tmp_path / "run", dry_run=True, **settings)
    run = headstart.train(shapes, tmp_path / "run", **settings)
    (one, other, last), (_, lent, kept) = trainings_of(planned), trainings_of(run.plan)
    assert (one.name, other.name, last.name) == (BLOCKS, ALL, RANDOM)
    assert lent.seconds > other.seconds + 100 and kept.seconds == last.seconds


def test_where_every_training_diverges_the_fitted_head_is_taken(many, tiny_weights, tmp_path, doubtful):
    run = headstart.train(
        many, tmp_path / "run", **options(tiny_weights, epochs=3, learning_rate=100.0, optimizer="sgd")
    )
    assert run.plan.strategy == "probe" and sum("given up" in reason for reason in run.plan.reasons) == 2
    assert "the fitted head is taken" in run.plan.reasons[-1]


def test_a_class_of_few_pictures_does_not_keep_the_others_from_being_chosen_by(
    make_shapes, tiny_weights, tmp_path, doubtful
):
    data = make_shapes(make_shapes(tmp_path / "data", 140, ("circle", "triangle")), 6, ("square",), first_seed=900)
    run = headstart.train(data, tmp_path / "run", dry_run=True, **options(tiny_weights))
    assert isinstance(run.phases[-1], Choose)
    rows = (tmp_path / "run/split.csv").read_text().splitlines()
    assert any(",select" in row for row in rows) and not any("square" in row and ",select" in row for row in rows)


@pytest.mark.parametrize("symmetry", ["none", "mirror", "any"])
def test_mirror_images_are_an_arm_where_they_mean_the_same(many, tiny_weights, tmp_path, doubtful, symmetry):
    made = headstart.train(many, tmp_path / "run", dry_run=True, **options(tiny_weights, symmetry=symmetry))
    *_, train, choose = made.phases
    assert any("mirror" in views for views in choose.views) == (symmetry != "none")
    assert ("Flip" in train.settings.augment) == (symmetry != "none")


def test_the_views_of_the_fitted_head_are_tried_with_trained_models_too(
    many, tiny_weights, tmp_path, monkeypatch, doubtful
):
    zoomed = ("plain", "zoom")
    monkeypatch.setattr("headstart.evidence.list_views", lambda *_: (zoomed,))
    monkeypatch.setattr("headstart.verdicts.WORTH_VIEWS", -9.0)
    take(monkeypatch, 0.5, zoomed)
    run = headstart.train(many, tmp_path / "run", **options(tiny_weights, freeze="blocks.1"))
    assert run is not None and run.plan.phases[-1].views == (("plain",), ("plain", "mirror"), zoomed)
    assert run.classifier.backbone.spec.views == zoomed
    again = headstart.evaluate(tmp_path / "run", precision="float32", device="cpu")
    np.testing.assert_allclose(again.probabilities, run.evaluation.probabilities, atol=1e-5)


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


def test_all_blocks_are_trained_where_that_is_taken(many, tiny_weights, tmp_path, monkeypatch, doubtful):
    take(monkeypatch, 1.0, name=ALL)
    run = headstart.train(many, tmp_path / "run", **options(tiny_weights))
    assert run is not None and run.plan.strategy == "lp-ft"
    assert [facts["phase"] for facts in run.classifier.provenance["training"]] == [2]
    before = training.find_network(training.configs.resolve(None, options(tiny_weights))).load().state_dict()
    after = run.classifier.backbone.state_dict()
    assert not torch.equal(before["conv_stem.weight"], after["conv_stem.weight"])
    again = headstart.evaluate(tmp_path / "run", precision="float32", device="cpu")
    np.testing.assert_allclose(again.probabilities, run.evaluation.probabilities, atol=1e-5)


def test_random_weights_are_an_arm_where_the_pictures_are_many_and_of_another_kind(
    many, tiny_weights, tmp_path, monkeypatch, doubtful
):
    monkeypatch.setattr("headstart.plan.is_scratch_worth_trying", lambda *_: True)
    take(monkeypatch, 1.0, name=RANDOM)
    run = headstart.train(many, tmp_path / "run", **options(tiny_weights, epochs=1))
    assert run is not None and run.plan.strategy == "scratch"
    assert run.classifier.backbone.spec.weights == "trained from random weights"
    of_random = [reason for reason in run.plan.reasons if reason.startswith(f"{RANDOM} trained, ")]
    assert len(of_random) == 2 and all("100% of the way" in reason for reason in of_random)
    again = headstart.evaluate(tmp_path / "run", precision="float32", device="cpu")
    np.testing.assert_allclose(again.probabilities, run.evaluation.probabilities, atol=1e-5)


def test_an_arm_that_gets_no_better_is_stopped_by_patience_once_it_was_trained(
    shapes, tiny_weights, tmp_path, monkeypatch, brief
):
    worsen(monkeypatch)
    settings = small(tiny_weights, freeze="blocks.1", patience=2, epochs=6)
    run = headstart.train(shapes, tmp_path / "run", **settings)
    rows = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if "step" not in row]
    assert [row["epoch"] for row in epochs if row["best"]] == [1] and len(epochs) - 1 == 1 + 2
    assert run is not None and any("none was better for 2" in reason for reason in run.plan.reasons)


@pytest.mark.parametrize(("given", "shares"), [("100", [1.0]), ("50, 100, 50", [0.5, 1.0]), (30, [0.3])])
def test_what_is_tried_between_the_heads_network_and_the_trained_one_can_be_set(
    many, tiny_weights, tmp_path, doubtful, given, shares
):
    run = headstart.train(many, tmp_path / "run", **options(tiny_weights, interpolation=given, freeze="blocks.1"))
    assert run is not None and list(run.plan.phases[-1].shares) == shares
    weighed = [reason for reason in run.plan.reasons if "% of the way" in reason and " against " not in reason]
    assert len(weighed) == 2 * len(shares)  # plain, and with mirror images


@pytest.mark.parametrize("given", ["abc", "0", "101", "50;100", ""])
def test_what_is_no_way_from_one_to_the_other_is_refused_before_anything_is_done(many, tmp_path, given):
    with pytest.raises(UsageError, match="interpolation"):
        headstart.train(many, tmp_path / "run", interpolation=given, time_budget="1m")
    with pytest.raises(UsageError, match="interpolation"):
        headstart.train(many, tmp_path / "run", interpolation="50")
    assert not (tmp_path / "run").exists()


def test_random_weights_have_the_blocks_of_the_network_that_comes_along():
    spec = backbones.locate("auto").spec.adapted(taps=("blocks.4", FINAL))
    built, random = backbones.load(backbones.locate("auto")).network, backbones.randomise(spec, 0)
    assert {f"inner.{name}" for name in built.state_dict()} == set(random.state_dict())
    names = {name for name, _ in random.named_modules()}
    assert {module for block in see_blocks(random, 224) for module in block.modules} <= names


def test_an_arm_that_cannot_win_any_more_is_stopped_and_that_is_said(
    many, tiny_weights, tmp_path, monkeypatch, doubtful
):
    for module in ("engine", "phases"):
        monkeypatch.setattr(f"headstart.{module}.can_win", lambda losses, epochs, target: len(losses) < 3)
    run = headstart.train(many, tmp_path / "run", **options(tiny_weights))
    rows = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert run is not None and [row["epoch"] for row in rows if "step" not in row] == [0, 1, 2] * 2
    assert f"{BLOCKS}: stopped after 2 of 3 epochs, they could not win any more" in run.plan.reasons


DEEP = Evidence(
    (
        Variant(("x", FINAL), ("plain",), "logistic", 0.3, 0.9, 0.85, 0.95, 100),
        Variant((FINAL,), ("plain",), "logistic", 0.4, 0.9, 0.85, 0.95, 100),
    ),
    (),
    None,
)


SITUATION = Situation("single", 2, 460, 60, 100, 5, "cpu", "float32", evidence=DEEP)
PACES = (Pace(Layout("float32"), 0.02, BLOCKS), Pace(Layout("bfloat16"), 0.05, ALL))


def plan_with(seconds_left, paces=PACES, head_seconds=0.0, report=0, **settings):
    timing = Timing(paces, seconds_left, head_seconds)
    situation = dataclasses.replace(SITUATION, timing=timing, report=report)
    return decide(situation, resolve(None, {"time_budget": "10m", **settings}))


def trainings_of(made):
    return [phase for phase in made.phases if isinstance(phase, Train)]


def test_each_training_has_the_time_that_is_foreseen_for_it_and_more_where_it_is_left():
    made = plan_with(320.0)
    blocks, every = trainings_of(made)
    assert (blocks.settings.epochs, every.settings.epochs) == (6, 12) and isinstance(made.phases[-1], Choose)
    # 52 s and 250 s with half an epoch around them: 18 s are left, which are fewer than a tenth of the second one's.
    assert blocks.seconds == pytest.approx(48 + 9) and every.seconds == pytest.approx(1.1 * 240)
    assert (blocks.layout.precision, every.layout.precision) == ("float32", "bfloat16")


def test_all_that_is_opened_and_looked_at_takes_its_time():
    paces = tuple(dataclasses.replace(pace, look_seconds=0.01, supply_seconds=0.03) for pace in PACES)
    blocks, every = trainings_of(plan_with(500.0, paces, head_seconds=7.0, report=100))
    # Of the last blocks four views of 400 pictures are opened and kept, and 60 activations looked at after each epoch;
    # with all blocks 400 pictures are opened in each, and 60 opened and looked at after it.
    each = 400 * 0.02 + 0.6, 400 * (0.05 + 0.03) + 60 * 0.04
    weighed = 60 * 4 * (0.03 + 2 * 0.01)
    around = 4 + 400 * 4 * 0.04 + weighed, 10 + weighed
    start = 0.6, 60 * 0.04
    left = 500 - 7 - 100 * (0.03 + 2 * 0.01) - (6 * each[0] + start[0] + around[0])
    epochs = int((left - around[1] - start[1]) // each[1])
    assert (blocks.settings.epochs, every.settings.epochs) == (6, epochs) and 3 <= epochs < 12
    left -= epochs * each[1] + start[1] + around[1]
    expected = [count * one + first for count, one, first in zip((6, epochs), each, start)]
    assert [blocks.seconds, every.seconds] == pytest.approx([max(1.1 * x, x + left / 2) for x in expected])


@pytest.mark.parametrize(
    ("left", "keeps", "epochs"), [(500, True, 6), (500, False, 6), (140, True, 6), (140, False, 5), (100, False, 3)]
)
def test_where_activations_have_no_room_pictures_are_opened_in_every_epoch(left, keeps, epochs):
    pace = dataclasses.replace(PACES[0], look_seconds=0.01, supply_seconds=0.03, keeps=keeps)
    (phase,) = trainings_of(plan_with(left, (pace,), freeze="x", epochs=6))
    assert phase.settings.epochs == epochs
    weighed = 60 * 4 * (0.03 + 2 * 0.01)
    # 400 pictures in four views are opened and looked at before, or all are opened in each epoch.
    around = 4 + weighed + (400 * 4 * 0.04 if keeps else 0)
    each, start = (400 * 0.02 + 0.6, 0.6) if keeps else (400 * (0.02 + 0.03) + 60 * 0.04, 60 * 0.04)
    assert phase.seconds == pytest.approx(max(1.1 * (epochs * each + start), left - around))
    assert not trainings_of(plan_with(100, (dataclasses.replace(pace, keeps=True),), freeze="x", epochs=6))


@pytest.mark.parametrize(
    ("look", "left", "named"),
    [
        (0.0, 1.0, [BLOCKS, ALL]),  # nothing is known: everything is measured
        (0.01, 1000.0, [BLOCKS, ALL]),
        (0.02, 60.0, [BLOCKS]),
        (0.02, 30.0, []),
    ],
)
def test_what_cannot_fit_by_how_long_a_look_takes_is_not_measured(look, left, named):
    situation = dataclasses.replace(SITUATION, timing=Timing((), left, look_seconds=look))
    made = decide(situation, resolve(None, {"time_budget": "10m"}))
    assert [phase.name for phase in trainings_of(made)] == named
    assert (made.unmeasured is None) == (not named)


@pytest.mark.parametrize(("left", "epochs"), [(121.9, 12), (90.0, 10), (61.0, 7), (59.9, 6)])
def test_where_nothing_dearer_fits_the_last_training_may_be_longer(left, epochs):
    made = plan_with(left)
    (phase,) = trainings_of(made)
    assert (phase.name, phase.settings.epochs) == (BLOCKS, epochs)
    assert phase.seconds == pytest.approx(max(1.1 * 8 * epochs, 8 * epochs + left - 8 * (epochs + 0.5)))
    words = f"the last blocks: {epochs} epochs, of about {8 * (epochs + 0.5):.0f} s, instead"
    assert (words in made.reasons) == (epochs > 6)
    assert [phase.settings.epochs for phase in trainings_of(plan_with(left, epochs=6))] == [6]
    (frozen,) = trainings_of(plan_with(left, freeze="x"))
    assert frozen.settings.epochs == epochs


def test_the_last_of_all_trainings_may_be_longer_too():
    assert [phase.settings.epochs for phase in trainings_of(plan_with(52 + 10 + 15 * 20.0))] == [6, 15]
    assert [phase.settings.epochs for phase in trainings_of(plan_with(3000.0))] == [6, 24]


def test_random_weights_are_taken_to_train_as_fast_as_all_blocks(monkeypatch):
    monkeypatch.setattr("headstart.plan.is_scratch_worth_trying", lambda *_: True)
    # 52 s, 250 s and 20 epochs of 20 s with 10 s around them.
    assert [phase.name for phase in trainings_of(plan_with(52 + 250 + 410.0))] == [BLOCKS, ALL, RANDOM]
    assert [phase.name for phase in trainings_of(plan_with(52 + 250 + 409.0))] == [BLOCKS, ALL]


def test_the_optimiser_that_is_set_gets_rates_that_suit_it():
    rates = [
        [phase.settings.learning_rate for phase in trainings_of(plan_with(900.0, **more))]
        for more in (
            {},
            {"optimizer": "sgd"},
            {"optimizer": "sgd", "learning_rate": 0.5},
        )
    ]
    assert rates == [pytest.approx([3e-4, 1e-4]), pytest.approx([3e-3, 1e-3]), [0.5, 0.5]]


def test_a_training_is_not_given_time_that_it_does_not_fit_into():
    made = plan_with(121.9)
    assert [phase.name for phase in trainings_of(made)] == [BLOCKS]
    why = "all blocks: not trained, 3 epochs would take about 70 s, and 70 s of the budget are left"
    assert why in made.reasons and why in made.further
