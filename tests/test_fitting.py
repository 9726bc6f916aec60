"""What the phases of a plan start from, what they are measured by, and the classifier that they give."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import headstart
from headstart import backbones, embedders, evaluation, fitting, sampling, splits, trials
from headstart import bench as bench_module
from headstart.backbones import Backbone
from headstart.bench import Bench
from headstart.config import EngineConfig, RunConfig, TrainConfig
from headstart.engine import Adapted, Epoch
from headstart.errors import DataError, UsageError
from headstart.heads import FittedHead
from headstart.images import Limits, open_image
from headstart.model import Classifier
from headstart.plan import FitHead, Plan, Train
from headstart.processes import World
from headstart.runs import RunFolder
from headstart.timing import Layout, Pace, Timing

PLAIN, DEVICE = Layout("float32", False), torch.device("cpu")


def decide(**changes):
    plain = {
        "epochs": 2,
        "batch_size": 8,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "layer_decay": 1.0,
        "schedule": "constant",
        "loss": "cross-entropy",
        "batch_norm": "frozen",
        "augment": "none",
    }
    return EngineConfig(**{**plain, **changes})


@pytest.fixture(scope="module")
def backbone(tiny_weights):
    """The tiny network, with statistics of pictures."""
    network = backbones.load(backbones.locate("auto", str(tiny_weights))).network
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = None
    with torch.no_grad():
        network(torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5)
    for norm in norms:
        norm.eval().momentum = 0.1
    spec = backbones.locate("auto", str(tiny_weights)).spec
    return Backbone.of(spec, network)


@pytest.fixture(scope="module")
def dataset(shapes):
    given = headstart.read(shapes)
    dealt = splits.assign_roles(given, {}, 0.2, 0)
    return splits.assign_select(dealt, {}, 0.25, 0)


@pytest.fixture(scope="module")
def tagged(dataset):
    """The same pictures with several labels."""
    samples = [
        dataclasses.replace(s, labels=(*s.labels, *(("even",) if place % 2 else ())))
        for place, s in enumerate(dataset.samples)
    ]
    return dataclasses.replace(dataset, samples=tuple(samples), classes=(*dataset.classes, "even"), task="multi")


def embed_plainly(network, preprocess, paths):
    """Features of pictures, one after the other, by the network as it is."""
    rows = []
    with torch.no_grad():
        for path in paths:
            pixels = torch.from_numpy(preprocess.apply(open_image(path)))[None]
            rows.append(network(preprocess.normalise(pixels).contiguous())[0].numpy())
    return np.stack(rows)


@pytest.fixture(scope="module")
def features(backbone, dataset):
    """Source -> features."""
    paths = [dataset.path(sample.source) for sample in dataset.samples]
    rows = embed_plainly(backbone.network, backbone.spec.preprocess, paths)
    return dict(zip((sample.source for sample in dataset.samples), rows, strict=True))


@pytest.fixture
def make_bench(backbone, dataset, features):
    def make(**changes):
        bench = Bench(
            dataset,
            backbone,
            DEVICE,
            "float32",
            Limits(),
            2**28,
            0,
            World(),
            lambda samples: np.stack([features[sample.source] for sample in samples]),
        )
        return dataclasses.replace(bench, **changes)

    return make


@pytest.fixture
def bench(make_bench):
    return make_bench()


def make_plan(*phases):
    return Plan("finetune", "cpu", "float32", phases, ())


def state_of(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def fit(bench, kind="logistic", dataset=None):
    fitted = (dataset or bench.dataset).of_role("fit")
    return fitting.fit_heads(bench.rows(fitted), fitted, dataset or bench.dataset, {}, FitHead((kind,), 3), 0)


def epochs_of(training):
    return [record for record in training.run() if isinstance(record, Epoch)]


def train_and_keep_the_last(training):
    """Train, whatever the select pictures say."""
    training.validate = lambda *_: {"log_loss": -float(training.state.epoch)}
    return epochs_of(training)


# Where training starts


@pytest.mark.parametrize("on", ["pictures", "features"])
@pytest.mark.parametrize("kind", ["logistic", "svm", "means", "blend"])
def test_training_starts_from_the_probabilities_of_the_fitted_head(bench, kind, on):
    head = fit(bench, kind)
    assert abs(head.temperature - 1) > 0.01  # else nothing is tested
    samples = bench.dataset.of_role("select")
    rows = bench.rows(samples)
    probe = Classifier(bench.backbone, head.module, bench.dataset.classes, "single", head.temperature)
    expected = probe.classify(rows)
    adapted = bench.begin(Train(decide(), PLAIN, on=on), head)
    inputs = torch.from_numpy(rows)
    if on == "pictures":
        preprocess = bench.backbone.spec.preprocess
        shown = [preprocess.apply(open_image(bench.dataset.path(sample.source))) for sample in samples]
        inputs = preprocess.normalise(torch.from_numpy(np.stack(shown))).contiguous()
    with torch.no_grad():
        found = adapted(inputs).softmax(1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_beginning_and_training_leave_the_fitted_head_and_the_backbone_as_they_were(bench):
    head = fit(bench)
    before, body = state_of(head.module), state_of(bench.backbone.network)
    phase = Train(decide(epochs=1), PLAIN)
    adapted = bench.begin(phase, head)
    train_and_keep_the_last(bench.start(phase, 0, adapted, None))
    assert_same_bits(state_of(head.module), before)
    assert_same_bits(state_of(bench.backbone.network), body)
    assert not torch.equal(adapted.head.weight * head.temperature, before["weight"])
    assert not torch.equal(adapted.backbone.conv_stem.weight, body["conv_stem.weight"])


@pytest.mark.parametrize("kind", ["linear", "mlp", "batch-norm"])
def test_random_heads_depend_on_the_seed_alone(make_bench, kind):
    phase, found = Train(decide(head=kind, hidden=8), PLAIN), []
    for seed, somebodys in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(somebodys)
        before = torch.get_rng_state()
        found.append(state_of(make_bench(seed=seed).begin(phase, None).head))
        assert torch.equal(torch.get_rng_state(), before)
    assert_same_bits(found[0], found[1])
    weight = list(found[0])[-2]  # of the last linear layer
    assert not torch.equal(found[0][weight], found[2][weight])
    assert found[0][weight].shape[0] == len(make_bench().dataset.classes)


def test_a_head_on_features_takes_as_many_as_the_network_gives(bench):
    assert bench.dim == bench.rows(bench.dataset.samples[:1]).shape[1]
    adapted = bench.begin(Train(decide(), PLAIN, on="features"), None)
    assert isinstance(adapted.backbone, nn.Identity)
    assert adapted.head.in_features == bench.dim


# Phases


def test_a_phase_on_features_trains_the_head_alone(bench):
    head = fit(bench)
    phase = Train(decide(epochs=3), PLAIN, on="features")
    adapted, body = bench.begin(phase, head), state_of(bench.backbone.network)
    training = bench.start(phase, 0, adapted, None)
    epochs = train_and_keep_the_last(training)
    assert not torch.equal(adapted.head.weight * head.temperature, head.module.weight)
    assert [key for key in state_of(adapted) if not key.startswith("head.")] == []
    assert_same_bits(state_of(bench.backbone.network), body)
    assert {epoch.trainable for epoch in epochs} == {sum(p.numel() for p in head.module.parameters())}
    given = [p for group in training.optimizer.param_groups for p in group["params"]]
    assert set(map(id, given)) == set(map(id, adapted.head.parameters()))


def test_a_phase_on_features_is_the_one_on_pictures_with_the_network_frozen(make_bench):
    weights = {}
    for on in ("features", "pictures"):
        bench = make_bench()
        phase = Train(decide(freeze="all", batch_norm="train"), PLAIN, on=on)
        adapted = bench.begin(phase, None)
        start = state_of(adapted.head)
        train_and_keep_the_last(bench.start(phase, 0, adapted, None))
        weights[on] = state_of(adapted.head)
        assert not torch.equal(start["weight"], weights[on]["weight"])
    for name, tensor in weights["features"].items():
        torch.testing.assert_close(weights["pictures"][name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("on", ["pictures", "features"])
def test_an_epoch_is_measured_on_the_select_pictures(bench, on):
    phase = Train(decide(epochs=1), PLAIN, on=on)
    adapted = bench.begin(phase, None)
    running = bench.start(phase, 0, adapted, None).run()
    record = next(running)
    samples = bench.dataset.of_role("select")
    with torch.no_grad():
        logits = adapted.head(torch.from_numpy(bench.rows(samples))).numpy()
    expected = evaluation.score(logits, samples, bench.dataset.classes, "single")
    assert record.select == pytest.approx(expected, abs=1e-4)
    running.close()


def test_only_fit_pictures_are_trained_on_and_only_select_pictures_are_measured_by(make_bench, dataset):
    opened, rowed = [], []

    def rows(samples):
        rowed.append({sample.role for sample in samples})
        return np.zeros((len(samples), 8), np.float32)

    class Watching(Bench):
        def album(self, samples):
            opened.append({sample.role for sample in samples})
            return super().album(samples)

    bench = Watching(**{f.name: getattr(make_bench(rows=rows), f.name) for f in dataclasses.fields(Bench)})
    training = bench.start(Train(decide(), PLAIN), 0, bench.begin(Train(decide(), PLAIN), None), None)
    assert sorted(opened, key=str) == [{"fit"}, {"select"}]
    assert len(training.material.targets) == len(dataset.of_role("fit"))
    bench.start(Train(decide(), PLAIN, on="features"), 0, Adapted(nn.Identity(), nn.Linear(8, 3)), None)
    assert sorted(rowed, key=str) == [{"fit"}, {"select"}]


def test_pictures_are_varied_by_seed_epoch_and_picture_as_the_settings_say(bench):
    def show(augment, seed, *asked):
        phase = Train(decide(augment=augment), PLAIN)
        chosen = dataclasses.replace(bench, seed=seed)
        material = chosen.show_pictures(chosen.dataset.of_role("fit"), phase)
        return [material.show(sampling.Draw(sample), epoch).tobytes() for sample, epoch in asked]

    asked = ((0, 0), (0, 1), (1, 0))
    varied = show("RandomResizedCrop", 0, *asked)
    assert len(set(varied)) == 3
    assert show("RandomResizedCrop", 0, *asked) == varied
    assert not set(show("RandomResizedCrop", 1, *asked)) & set(varied)
    plain = show("none", 0, *asked)
    assert plain[0] == plain[1] != plain[2]
    sample = bench.dataset.of_role("fit")[0]
    expected = bench.backbone.spec.preprocess.apply(open_image(bench.dataset.path(sample.source)))
    assert plain[0] == expected.tobytes()


def test_several_labels_are_trained_and_measured(make_bench, tagged):
    bench = make_bench(dataset=tagged)
    phase = Train(decide(loss="bce-with-logits", best_by="map", epochs=3), PLAIN, on="features")
    adapted = bench.begin(phase, None)
    epochs = epochs_of(bench.start(phase, 0, adapted, None))
    assert list(epochs[0].select) == ["log_loss", "map", "micro_f1", "macro_f1", "subset_accuracy"]
    assert epochs[-1].loss < epochs[1].loss
    classifier = fitting.finish(bench, adapted, {}, phase)
    assert classifier.task == "multi" and len(classifier.thresholds) == 4


# Features of many pictures


def test_features_are_those_of_the_plain_network_in_order(bench):
    # The mistake: validation shuffled, so that predictions cannot be matched to files.
    samples = bench.dataset.samples[::-1]
    found = bench_module.embed(bench.backbone, bench.album(samples), DEVICE, "float32")
    expected = bench.rows(samples)
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
    assert np.abs(expected[0] - expected[1]).max() > 0.01 * np.abs(expected).max()


def test_features_of_a_network_that_was_trained_are_its_own(bench):
    phase = Train(decide(epochs=1, batch_norm="train"), Layout("float32", True))
    adapted = bench.begin(phase, None)
    train_and_keep_the_last(bench.start(phase, 0, adapted, None))
    samples = bench.dataset.of_role("select")
    album = bench.album(samples)
    found = bench_module.embed(Backbone.of(bench.backbone.spec, adapted.backbone), album, DEVICE, "float32")
    paths = [bench.dataset.path(sample.source) for sample in samples]
    expected = embed_plainly(adapted.backbone, bench.backbone.spec.preprocess, paths)
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
    assert np.abs(found - bench.rows(samples)).max() > 0.05 * np.abs(expected).max()


def test_while_features_are_computed_signals_are_looked_for_after_each_batch(bench):
    checks = []
    album = bench.album(bench.dataset.samples)
    bench_module.embed(bench.backbone, album, DEVICE, "float32", World(), lambda: checks.append(1))
    assert len(checks) == -(-len(album) // embedders.BATCH_SIZE)


def test_a_signal_that_came_before_a_measurement_acts_before_a_picture_is_opened(make_bench):
    bench = make_bench(dataset=dataclasses.replace(make_bench().dataset, root=Path("gone")))
    training = bench.start(Train(decide(), PLAIN), 0, bench.begin(Train(decide(), PLAIN), None), None)

    def act():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.validate(training.model, act)


def test_embedding_stops_where_a_signal_acts(bench):
    def act():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench_module.embed(bench.backbone, bench.album(bench.dataset.samples), DEVICE, "float32", World(), act)


def test_each_process_embeds_its_share_and_gets_all(bench, monkeypatch):
    samples, matrices = bench.dataset.samples[:11], []
    monkeypatch.setattr(World, "most", lambda self, value: value.fill_(bench.dim))
    monkeypatch.setattr(World, "sum", lambda self, values: matrices.append(values.clone()) or values)
    for rank in range(3):
        bench_module.embed(bench.backbone, bench.album(samples), DEVICE, "float32", World(rank, 3))
    filled = [set(matrix.abs().sum(1).nonzero()[:, 0].tolist()) for matrix in matrices]
    assert sorted(row for rows in filled for row in rows) == list(range(11))
    expected = bench.rows(samples)
    np.testing.assert_allclose(sum(matrices).numpy(), expected, atol=2e-4 * np.abs(expected).max())


# Mistakes that are found before long work


@pytest.mark.parametrize(
    "settings, on, why",
    [
        ({"best_by": "map"}, "pictures", "best_by: 'map' is no figure of this task"),
        ({"best_by": "acuracy"}, "features", "best_by: 'acuracy' is no figure of this task"),
        ({"best_by": "top_5_accuracy"}, "pictures", "no figure of this task"),  # with three classes
        ({"augment": "RandomFlip"}, "pictures", "augment: RandomFlip is unknown"),
        ({"augment": "RandomResizedCrop(size=99)"}, "pictures", r"augment: RandomResizedCrop\(99\) does not fit"),
        ({"augment": "RandomHorizontalFlip", "symmetry": "none"}, "pictures", "changes what a picture means"),
        ({"freeze": "layer9"}, "pictures", "freeze: 'layer9' is no block of the network"),
        ({"freeze": "blocks.9"}, "pictures", "'blocks.9' is no block of the network, did you mean 'blocks.[0-4]'"),
        ({"freeze": "99"}, "pictures", "freeze: 99 is over the network's 7 blocks"),
        ({"freeze": "blocks"}, "features", "freeze: 'blocks' is no block of the network"),  # there is none
        ({"rates": "layer9=1e-3"}, "pictures", "rates: 'layer9' is no block of the network"),
        ({"rates": "conv_stem"}, "pictures", "rates: 'conv_stem' is no NAME=RATE"),
    ],
)
def test_settings_that_do_not_fit_are_refused(bench, settings, on, why):
    fine = Train(decide(), PLAIN, on=on)
    fitting.check_settings(bench, make_plan(fine))
    with pytest.raises(UsageError, match=why):
        fitting.check_settings(
            bench, make_plan(FitHead(("logistic",), 3), fine, Train(decide(**settings), PLAIN, on=on))
        )


def test_figures_of_several_labels_are_none_of_one(make_bench, tagged):
    bench = make_bench(dataset=tagged)
    fine = {"loss": "bce-with-logits", "best_by": "map"}
    fitting.check_settings(bench, make_plan(Train(decide(**fine), PLAIN)))
    with pytest.raises(UsageError, match=r"'accuracy' is no figure of this task. Give one of log_loss, map, micro_f1"):
        fitting.check_settings(bench, make_plan(Train(decide(**{**fine, "best_by": "accuracy"}), PLAIN)))


@pytest.mark.parametrize(
    "settings", [{"freeze": "blocks"}, {"freeze": "7"}, {"freeze": "all"}, {"rates": "head=0.1,blocks=1e-5"}]
)
def test_settings_that_fit_are_accepted(bench, settings):
    fitting.check_settings(bench, make_plan(Train(decide(**settings), PLAIN)))


@pytest.mark.parametrize(
    "settings",
    [
        {"freeze": "all", "rates": "head=0"},
        {"rates": "body=0,head=0"},
        {"freeze": "all", "rates": "head=0", "unfreeze_epochs": 1},  # a block is, from the second on
    ],
)
def test_settings_that_train_nothing_in_the_first_epoch_are_refused(bench, settings):
    with pytest.raises(UsageError, match="rates: nothing is trained in the first epoch") as caught:
        fitting.check_settings(bench, make_plan(Train(decide(**settings), PLAIN)))
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("rates", ["conv_stem=0", "body=0", "head=0"])
def test_a_rate_of_nothing_is_refused_for_random_weights(bench, rates):
    fitting.check_settings(bench, make_plan(Train(decide(rates=rates), PLAIN)))
    with pytest.raises(UsageError, match="rates: 0 freezes random weights"):
        fitting.check_settings(bench, make_plan(Train(decide(rates=rates), PLAIN, "random")))


def test_a_body_that_learns_faster_than_the_head_is_said(bench, caplog):
    # The mistake: the body at 1e-2, the new head at 1e-3.
    caplog.set_level("INFO")
    fitting.check_settings(bench, make_plan(Train(decide(learning_rate=1e-3, layer_decay=0.75), PLAIN)))
    assert "learns faster" not in caplog.text
    settings = decide(learning_rate=1e-3, rates="blocks.2=1e-2")
    fitting.check_settings(bench, make_plan(Train(settings, PLAIN)))
    assert "blocks.2 learns faster (0.01) than the new head (0.001)" in caplog.text


# Whole plans


def run_phases(folder, bench, *phases, head=None):
    folder.mkdir(exist_ok=True)
    announced = []

    def track(records, total):
        announced.append(total)
        return records

    return fitting.train_phases(RunFolder(folder), make_plan(*phases), bench, head, track), announced


def test_each_phase_says_how_much_it_trains(bench, tmp_path, caplog):
    # The mistake: require_grad without s, which freezes nothing. What is trained is counted and said.
    caplog.set_level("INFO")
    phases = (Train(decide(epochs=1, freeze="all"), PLAIN), Train(decide(epochs=1), PLAIN))
    run_phases(tmp_path / "run", bench, *phases)
    said = [record.message for record in caplog.records if record.message.startswith("training ")]
    adapted = bench.begin(phases[0], None)
    head, every = (sum(p.numel() for p in part.parameters()) for part in (adapted.head, adapted))
    assert said == [f"training {head:,} of {every:,} parameters", f"training {every:,} of {every:,} parameters"]


def test_a_second_phase_goes_on_where_the_first_has_ended(bench, tmp_path):
    first = Train(decide(epochs=2, freeze="all"), PLAIN)
    second = Train(decide(epochs=1, freeze="blocks", learning_rate=1e-4), PLAIN)
    trained, announced = run_phases(tmp_path / "both", bench, first, second)
    steps = -(-len(bench.dataset.of_role("fit")) // 8)
    assert announced == [1 + 2 * (steps + 1), 1 + steps + 1]
    alone = bench.begin(first, None)
    epochs_of(bench.start(first, 0, alone, None))
    epochs_of(bench.start(second, 1, alone, None))
    assert_same_bits(state_of(trained.adapted), state_of(alone))
    assert min(facts["best_epoch"] for facts in trained.facts) > 0
    parameters = sum(p.numel() for p in alone.parameters())
    head = sum(p.numel() for p in alone.head.parameters())
    last = sum(p.numel() for p in (*alone.head.parameters(), *alone.backbone.conv_head.parameters()))
    last += sum(p.numel() for p in alone.backbone.bn2.parameters())
    assert [facts["trainable"] for facts in trained.facts] == [head, last]
    assert [facts["parameters"] for facts in trained.facts] == [parameters] * 2
    assert [facts["epochs"] for facts in trained.facts] == [2, 1]
    rows = [json.loads(line) for line in (tmp_path / "both" / "history.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["epoch"]) for row in rows if "step" not in row] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
    ]


class Stop(Exception):
    """What kills a run here."""


def kill(folder, bench, phases, after, written=True):
    """Train, and stop after so many records; the last of them may not be written any more."""

    def track(records, total):
        for record in records:
            done.append(record)
            if written:
                yield record
            if len(done) == after:
                raise Stop
            if not written:
                yield record

    done = []
    folder.mkdir()
    with pytest.raises(Stop):
        fitting.train_phases(RunFolder(folder), make_plan(*phases), bench, None, track)


def history_of(folder):
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name not in ("seconds", "speed")} for row in rows]


@pytest.fixture(scope="module")
def two_phases(tmp_path_factory, backbone, dataset):
    """(two phases, the folder of a run that was not killed, and what it trained)."""
    always = {"checkpoint_minutes": 0.0}
    phases = (
        Train(decide(epochs=2, freeze="all", **always), PLAIN),
        Train(decide(epochs=1, freeze="7", **always), PLAIN),
    )
    bench = Bench(dataset, backbone, DEVICE, "float32", Limits(), 2**28, 0, World(), lambda samples: None)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return phases, folder, run_phases(folder, bench, *phases)[0]


# Of 9 records of the first phase, and 5 of the second: the start, within an epoch, an epoch's end, between the phases.
@pytest.mark.parametrize("after", [1, 3, 5, 9, 10, 12])
def test_a_plan_of_two_phases_that_was_killed_ends_the_same(two_phases, bench, tmp_path, after):
    phases, whole, expected = two_phases
    kill(tmp_path / "killed", bench, phases, after)
    trained, _ = run_phases(tmp_path / "killed", bench, *phases)
    assert_same_bits(state_of(trained.adapted), state_of(expected.adapted))
    assert history_of(tmp_path / "killed") == history_of(whole)


def test_no_row_is_lost_where_a_run_is_killed_before_it_is_written(two_phases, bench, tmp_path):
    phases, whole, _ = two_phases
    kill(tmp_path / "killed", bench, phases, 5, written=False)  # the first epoch's end
    run_phases(tmp_path / "killed", bench, *phases)
    assert history_of(tmp_path / "killed") == history_of(whole)


@pytest.fixture
def quick_test(monkeypatch):
    """A range test of fewer steps; (how often it ran)."""
    monkeypatch.setattr(trials, "RANGE_STEPS", 12)
    ran, plainly = [], trials.find_rate
    monkeypatch.setattr(trials, "find_rate", lambda training: ran.append(training) or plainly(training))
    return ran


def test_a_rate_that_is_found_is_used_written_down_and_leaves_no_other_trace(bench, tmp_path, quick_test):
    phase = Train(decide(epochs=1, find_lr=True, learning_rate=0.5, freeze="blocks", schedule="one-cycle"), PLAIN)
    trained, _ = run_phases(tmp_path / "found", bench, phase)
    stored = json.loads((tmp_path / "found" / "learning_rate.json").read_text())
    rate = stored["suggested"]
    assert trained.plan.phases[0].settings == dataclasses.replace(phase.settings, learning_rate=rate)
    written = json.loads((tmp_path / "found" / "plan.json").read_text())
    assert written["phases"][0]["settings"]["learning_rate"] == rate != 0.5
    assert f"learning rate {rate:.3g}: by a range test" in written["reasons"]
    given = dataclasses.replace(phase.settings, learning_rate=rate, find_lr=False)
    expected, _ = run_phases(tmp_path / "given", bench, Train(given, PLAIN))
    assert_same_bits(state_of(trained.adapted), state_of(expected.adapted))
    (test,) = quick_test
    assert (test.settings.schedule, max(test.parts.rates)) == ("constant", 1.0)


def test_a_rate_is_found_for_what_is_trained_and_what_is_frozen_by_rates_of_nothing_stays(bench, tmp_path, quick_test):
    phase = Train(decide(epochs=1, find_lr=True, rates="conv_stem=0,blocks.1=0"), PLAIN)
    trained, _ = run_phases(tmp_path / "found", bench, phase)
    (test,) = quick_test
    rates = dict(zip(test.parts.names, test.parts.rates, strict=True))
    still = {"conv_stem", "blocks.1"}
    assert {name for name, rate in rates.items() if rate == 0} == still
    assert set(rates.values()) == {0.0, 1.0}
    assert trained.plan.phases[0].settings.rates == phase.settings.rates
    body, before = trained.adapted.backbone, bench.backbone.network
    for model in (body, test.model.backbone):
        assert torch.equal(model.conv_stem.weight, before.conv_stem.weight)
        assert_same_bits(state_of(model.blocks[1]), state_of(before.blocks[1]))
    assert not torch.equal(test.model.backbone.blocks[2][0].conv_exp.weight, before.blocks[2][0].conv_exp.weight)


def test_a_run_that_goes_on_takes_the_rate_that_it_had(bench, tmp_path, quick_test):
    phase = Train(decide(epochs=1, find_lr=True, freeze="blocks"), PLAIN)
    tmp_path.joinpath("learning_rate.json").write_text('{"rates": [], "losses": [], "suggested": 0.0125}')
    trained, _ = run_phases(tmp_path, bench, phase)
    assert trained.plan.phases[0].settings.learning_rate == 0.0125
    assert not quick_test


# The classifier


def test_the_classifier_gives_what_was_trained(bench):
    phase = Train(decide(epochs=2), PLAIN)
    adapted = bench.begin(phase, fit(bench))
    train_and_keep_the_last(bench.start(phase, 0, adapted, None))
    samples = bench.dataset.of_role("report")
    paths = [bench.dataset.path(sample.source) for sample in samples]
    rows = embed_plainly(adapted.backbone, bench.backbone.spec.preprocess, paths)
    with torch.no_grad():
        logits = adapted.head(torch.from_numpy(rows))
    classifier = fitting.finish(bench, adapted, {"training": [1]}, phase)
    expected = (logits / classifier.temperature).softmax(1).numpy()
    predictions = list(classifier.predict(paths, device="cpu", precision="float32"))
    found = [[prediction.probabilities[label] for label in bench.dataset.classes] for prediction in predictions]
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert classifier.provenance["training"] == [1]
    assert classifier.backbone.spec.digest != bench.backbone.spec.digest
    assert classifier.backbone.spec.weights == f"{bench.backbone.spec.weights}, trained further"


def test_the_temperature_is_found_on_the_select_pictures(bench):
    phase = Train(decide(epochs=1), PLAIN, on="features")
    adapted = bench.begin(phase, fit(bench))
    epochs_of(bench.start(phase, 0, adapted, None))
    samples = bench.dataset.of_role("select")
    with torch.no_grad():
        logits = adapted.head(torch.from_numpy(bench.rows(samples)))
    classifier = fitting.finish(bench, adapted, {}, phase)
    targets = torch.from_numpy(evaluation.encode(samples, bench.dataset.classes).argmax(1))

    def doubted(temperature):  # one picture more, as likely of one class as of another, is counted
        log = (logits / temperature).log_softmax(1)
        known = -log[torch.arange(len(targets)), targets].mean()
        return ((len(targets) + 1) * known - log.mean()) / (len(targets) + 2)

    best = min(np.geomspace(0.01, 100, 2000), key=lambda temperature: doubted(temperature).item())
    assert classifier.temperature == pytest.approx(best, rel=0.02)


def test_after_a_phase_on_features_the_backbone_is_the_one_that_came(bench):
    phase = Train(decide(epochs=1), PLAIN, on="features")
    adapted = bench.begin(phase, None)
    epochs_of(bench.start(phase, 0, adapted, None))
    assert fitting.finish(bench, adapted, {}, phase).backbone is bench.backbone


def test_weights_are_told_apart_by_their_digest(bench):
    digests = set()
    for seed in (0, 0, 1):
        phase = Train(decide(), PLAIN)
        adapted = bench.begin(phase, None)
        torch.manual_seed(seed)
        nn.init.normal_(adapted.backbone.blocks[0][0].conv.weight)
        digests.add(fitting.finish(bench, adapted, {}, phase).backbone.spec.digest)
    assert len(digests) == 2


# Layouts, heads


def test_what_is_measured_is_what_runs_the_network_and_of_two_stages_the_last():
    assert make_plan(Train(decide(), PLAIN, on="features")).unmeasured is None
    first, last = Train(decide(epochs=1), PLAIN), Train(decide(epochs=2), PLAIN)
    assert make_plan(first, last).unmeasured is last
    arms = [dataclasses.replace(first, name=name) for name in ("one", "other")]
    found = dataclasses.replace(make_plan(*arms), timing=Timing((Pace(PLAIN, 0.1, "one"),)))
    assert found.unmeasured is arms[1]


@pytest.mark.parametrize("cache, kept", [("auto", 1), ("none", 0)])
def test_the_layout_is_measured_and_kept_unless_nothing_is_to_be(bench, own_cache, tmp_path, cache, kept):
    phase = Train(decide(batch_size=2), PLAIN, name="all blocks")
    pace = fitting.measure_pace(bench, phase, RunConfig(train=TrainConfig(cache=cache)), tmp_path)
    assert pace.layout in (PLAIN, Layout("float32"), Layout("bfloat16")) and 0 < pace.seconds < 10
    assert pace.name == "all blocks"
    assert len(list(own_cache.rglob("layout-*.json"))) == kept


def test_of_several_processes_only_the_first_measures(make_bench, own_cache, tmp_path):
    phase = Train(decide(), Layout("float16"))
    assert fitting.measure_pace(make_bench(world=World(1, 2)), phase, RunConfig(), tmp_path).seconds == 0.0
    assert not own_cache.exists()


@pytest.mark.parametrize(("value", "kept"), [(65_000.0, True), (-66_000.0, False), (np.nan, False)])
def test_activations_that_float16_does_not_hold_are_foreseen_not_to_be_kept(bench, tmp_path, value, kept):
    phase = Train(decide(freeze="2", cached_views=2, disk_mebibytes=100), PLAIN)
    assert bench.can_keep(phase, np.full((4, 2, 2), value, np.float32), tmp_path) == kept


@pytest.mark.parametrize(("views", "room", "kept"), [(2, 100, True), (0, 100, False), (2, 0, False)])
def test_a_step_is_timed_without_the_frozen_blocks_where_their_activations_will_be_kept(
    bench, own_cache, tmp_path, monkeypatch, views, room, kept
):
    seen = []
    monkeypatch.setattr(fitting.trials, "find_pace", lambda *given: seen.append(given) or fitting.Pace(PLAIN, 0.1))
    settings = decide(batch_size=2, freeze="2", cached_views=views, disk_mebibytes=room)
    pace = fitting.measure_pace(bench, Train(settings, PLAIN, name="the last blocks"), RunConfig(), tmp_path)
    assert pace.keeps == (kept or not views)  # where none are to be kept, nothing has no room
    ((model, blocks, timed, *_, name, _, activations, fastest),) = seen
    assert fastest == embedders.resolve_precision("auto", bench.device)
    assert len(blocks) == len(bench.blocks) - 2 * kept and timed.freeze == ("" if kept else "2")
    assert (" after " in name) == kept == (activations is not None)
    if kept:
        with torch.no_grad():
            assert model.backbone(torch.from_numpy(activations[None].astype(np.float32))).shape[1] == bench.dim


def test_a_head_is_fitted_on_all_pictures_and_chosen_by_those_that_can_be_held_out(bench):
    fitted = bench.dataset.of_role("fit")
    kept = [sample for sample in fitted if sample.labels != ("circle",)]
    single = next(sample for sample in fitted if sample.labels == ("circle",))
    samples = [*kept, single]
    head = fitting.fit_heads(bench.rows(samples), samples, bench.dataset, {}, FitHead(("means",), 3), 0)
    assert isinstance(head, FittedHead)
    assert head.rows.tolist() == list(range(len(kept)))
    with torch.no_grad():
        logits = head.module(torch.from_numpy(bench.rows([single])))
    assert bench.dataset.classes[logits.argmax()] == "circle"


@pytest.mark.parametrize("views", [0, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_no_finite_numbers_are_refused_with_the_first_pictures_name(bench, value, views):
    fitted = bench.dataset.of_role("fit")
    rows = bench.rows(fitted)
    rows = np.stack([rows] * views, 1) if views else rows
    rows[[7, 4, 9], ..., 3] = value
    with pytest.raises(DataError, match="features of 3 pictures are no finite numbers") as caught:
        fitting.fit_heads(rows, fitted, bench.dataset, {}, FitHead(("means",), 3), 0)
    assert repr(fitted[4].source) in caught.value.why and "--precision float32" in caught.value.remedy


def test_groups_are_held_out_together(bench):
    fitted = bench.dataset.of_role("fit")
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(len(fitted), 40)).astype(np.float32)  # nothing is to be learned
    groups = {}
    for first, second in zip(range(0, len(fitted), 2), range(1, len(fitted), 2), strict=False):
        rows[second] = rows[first]  # but the twin of each picture
        groups |= {fitted[first].source: str(first), fitted[second].source: str(first)}
    labels = [sample.labels for sample in fitted]
    twins = [s if i % 2 == 0 else dataclasses.replace(s, labels=labels[i - 1]) for i, s in enumerate(fitted)]
    phase = FitHead(("knn",), 3)
    apart = fitting.fit_heads(rows, twins, bench.dataset, {}, phase, 0)
    together = fitting.fit_heads(rows, twins, bench.dataset, groups, phase, 0)
    assert apart.candidates[0].log_loss < together.candidates[0].log_loss - 0.1
