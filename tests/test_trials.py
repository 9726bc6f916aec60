"""What is measured before training: the fastest layout, kept for the next time, and the learning rate."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from headstart import sampling, trials
from headstart.blocks import find_blocks
from headstart.config import EngineConfig
from headstart.engine import Adapted, Training
from headstart.errors import TrainingError
from headstart.images import Preprocess
from headstart.material import Material
from headstart.timing import Layout
from headstart.trials import find_pace, find_rate

FIRST, LAST, HALF = Layout("float32", False), Layout("float32", True), Layout("bfloat16", True)
PREPROCESS = Preprocess(8, 1.0)
SETTINGS = EngineConfig(
    epochs=2,
    batch_size=4,
    optimizer="sgd",
    learning_rate=0.01,
    layer_decay=1.0,
    schedule="constant",
    loss="cross-entropy",
    batch_norm="train",
    augment="none",
)


class Watched:
    """A small model that notes in which layout it is run, however often it is copied."""

    def __init__(self, head=None):
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten())
        self.model = Adapted(backbone.eval(), head or nn.Linear(80, 3))
        self.blocks = find_blocks(backbone, 8)
        self.passes: list[Layout] = []
        self.sizes: list[int] = []
        self.behave = lambda layout: None

        def note(module, inputs):  # a function is not copied with the model
            half = torch.is_autocast_enabled("cpu")
            dtype = str(torch.get_autocast_dtype("cpu")).removeprefix("torch.") if half else "float32"
            last = inputs[0].is_contiguous(memory_format=torch.channels_last)
            self.passes.append(Layout(dtype, last))
            self.sizes.append(len(inputs[0]))
            self.behave(self.passes[-1])

        backbone.register_forward_pre_hook(note)

    def find(
        self,
        cache=None,
        precision="auto",
        name="timm/small",
        preprocess=PREPROCESS,
        task="single",
        fastest="bfloat16",
        **changes,
    ):
        chosen = dataclasses.replace(SETTINGS, **changes)
        given = (self.model, self.blocks, chosen, preprocess, task, precision, name, cache)
        return find_pace(*given, fastest=fastest).layout


def slow_but_in(fast):
    return lambda layout: time.sleep(0.0 if layout == fast else 0.05)


# The layout


def test_bfloat16_is_not_tried_where_features_are_faster_in_float32_unless_it_is_asked_for():
    watched = Watched()
    watched.behave = slow_but_in(HALF)
    assert watched.find(fastest="float32") in (FIRST, LAST) and HALF not in watched.passes
    assert watched.find(fastest="float32", precision="bfloat16") == HALF


@pytest.mark.parametrize("fast", [FIRST, LAST, HALF], ids=str)
def test_the_layout_that_is_fastest_is_found(fast):
    watched = Watched()
    watched.behave = slow_but_in(fast)
    assert watched.find() == fast
    assert set(watched.passes) == {FIRST, LAST, HALF}


def test_the_layout_that_was_found_is_kept_and_how_fast_it_is_now_is_timed_again(tmp_path):
    watched = Watched()
    watched.behave = slow_but_in(LAST)
    assert watched.find(tmp_path / "cache") == LAST
    watched.passes.clear()
    watched.behave = slow_but_in(FIRST)
    assert watched.find(tmp_path / "cache") == LAST
    assert set(watched.passes) == {LAST}
    (file,) = (tmp_path / "cache").iterdir()
    assert json.loads(file.read_text()) == {"precision": "float32", "channels_last": True}


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b'{"precision": "float32"', b'{"layout": 1}', b"\xff\xfe"])
def test_a_damaged_answer_is_said_and_found_again(tmp_path, content, caplog):
    caplog.set_level("INFO")
    watched = Watched()
    watched.find(tmp_path)
    (file,) = tmp_path.glob("layout-*.json")
    file.write_bytes(content)
    watched.passes.clear()
    found = watched.find(tmp_path)
    assert set(watched.passes) == {FIRST, LAST, HALF}
    assert f"{file} cannot be read" in caplog.text and "the steps are timed again" in caplog.text
    assert json.loads(file.read_bytes()) == dataclasses.asdict(found)


def test_without_a_cache_it_is_measured_each_time(own_cache):
    watched = Watched()
    for _ in range(2):
        watched.passes.clear()
        watched.find()
        assert watched.passes
    assert not own_cache.exists()


class Mean(nn.Module):
    """The mean over the last dimension."""

    def forward(self, x):
        return x.mean(-1)


DIFFERENT = {
    "network": {"name": "timm/large"},
    "size": {"preprocess": Preprocess(10, 1.0)},
    "batch": {"batch_size": 5},
    "frozen blocks": {"freeze": "1"},
    "frozen parts": {"rates": "0=0"},
    "batch norms": {"batch_norm": "frozen"},
    "optimiser": {"optimizer": "adamw"},
    "precision": {"precision": "float32"},
}
SAME = {
    "rate": {"learning_rate": 0.02},
    "epochs": {"epochs": 7},
    "accumulation": {"accumulate": 8},
    "average": {"ema": 0.9},
    "sampling": {"sampling": "under"},
    "mean and deviation": {"preprocess": Preprocess(8, 1.0, mean=(0.5,) * 3)},
}


@pytest.mark.parametrize("what", [*DIFFERENT, *SAME])
def test_all_layouts_are_tried_again_where_something_that_matters_is_another(what, tmp_path):
    watched = Watched(nn.Sequential(nn.Unflatten(1, (5, -1)), Mean(), nn.Linear(5, 3)))  # of any size
    watched.find(tmp_path)
    watched.passes.clear()
    watched.find(tmp_path, **{**DIFFERENT, **SAME}[what])
    assert (len(set(watched.passes)) > 1) == (what in DIFFERENT)


def test_all_large_batches_are_measured_by_the_same_pictures(tmp_path):
    watched = Watched()
    watched.find(tmp_path, batch_size=32)
    assert set(watched.sizes) == {trials.MOST_PICTURES}
    watched.passes.clear()
    found = watched.find(tmp_path, batch_size=256)
    assert set(watched.passes) == {found}


@pytest.mark.parametrize("what", ["threads", "processor", "torch"])
def test_all_layouts_are_tried_again_on_another_machine(what, tmp_path, monkeypatch):
    watched = Watched()
    watched.find(tmp_path)
    watched.passes.clear()
    threads = torch.get_num_threads()
    if what == "threads":
        torch.set_num_threads(threads + 1)
    elif what == "processor":
        monkeypatch.setattr(trials, "_processor_name", lambda: "another")
    else:
        monkeypatch.setattr(torch, "__version__", "1.0")
    try:
        watched.find(tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert set(watched.passes) == {FIRST, LAST, HALF}


def test_another_kind_of_device_of_the_same_machine_is_another_machine():
    described = [trials._describe_machine(torch.device(name)) for name in ("cpu", "mps")]
    assert described[0] != described[1]


def test_an_answer_that_cannot_be_kept_is_still_given(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert Watched().find(tmp_path / "file" / "layouts") in (FIRST, LAST, HALF)


@pytest.mark.parametrize("precision, tried", [("float32", {FIRST, LAST}), ("bfloat16", {HALF})])
def test_a_number_format_that_was_asked_for_is_the_only_one_tried(precision, tried):
    watched = Watched()
    assert watched.find(precision=precision) in tried
    assert set(watched.passes) == tried


def test_float16_is_tried_on_a_processor_only_where_it_was_asked_for():
    watched = Watched()
    assert watched.find(precision="float16") == Layout("float16", True)
    assert set(watched.passes) == {Layout("float16", True)}


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), TypeError("no kernel"), NotImplementedError("no kernel")])
def test_a_layout_that_does_not_run_is_passed_over_and_said(error, caplog):
    caplog.set_level("INFO")
    watched = Watched()

    def behave(layout):
        slow_but_in(HALF)(layout)
        if layout == HALF:
            raise error

    watched.behave = behave
    assert watched.find() in (FIRST, LAST)
    assert "training in bfloat16, channels last is not possible: no kernel" in caplog.text


def test_a_layout_in_which_the_numbers_overflow_is_passed_over():
    watched = Watched()
    half = lambda: torch.is_autocast_enabled("cpu")  # noqa: E731
    watched.model.backbone.register_forward_hook(lambda _, __, output: output * float("inf") if half() else None)
    watched.behave = slow_but_in(HALF)
    assert watched.find() in (FIRST, LAST)


def test_the_speeds_are_logged(caplog):
    caplog.set_level("INFO")
    watched = Watched()
    watched.behave = lambda layout: time.sleep(0.1 if layout == HALF else 0.0)
    watched.find()
    (message,) = [r.message for r in caplog.records if "pictures a second" in r.message]
    found = {part.partition(": ")[0]: float(part.partition(": ")[2]) for part in message.partition(": ")[2].split("; ")}
    assert list(found) == [str(layout) for layout in (FIRST, LAST, HALF)]
    assert 1 < found[str(HALF)] < 40 < found[str(FIRST)]  # 4 pictures in a tenth of a second and a little


def test_the_model_that_is_measured_is_left_as_it_was():
    watched = Watched()
    model = watched.model
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    watched.find(optimizer="adamw", freeze="1")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not model.backbone[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "multi", "loss": "bce-with-logits"},
        {"freeze": "all"},
        {"mixup": 0.3, "cutmix": 1.0},
        {"accumulate": 4, "ema": 0.9, "sampling": "under", "class_weights": "counts"},
        {"schedule": "one-cycle", "optimizer": "adam", "clip_norm": 1.0},
    ],
)
def test_it_is_found_for_all_kinds_of_settings(changes, caplog):
    caplog.set_level("INFO")
    head = nn.Sequential(nn.BatchNorm1d(80), nn.Dropout(), nn.Linear(80, 3))
    watched = Watched(head)
    assert watched.find(**changes) in (FIRST, LAST, HALF)
    assert "not possible" not in caplog.text
    assert len(watched.passes) == 3 * (1 + trials.STEPS)


# The learning rate


def make_rows(scale, count=64, dim=8):
    """Features of three classes that overlap, and their classes."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % 3
    rows = scale * (random.normal(size=(3, dim))[labels] + 2.0 * random.normal(size=(count, dim)))
    return rows.astype(np.float32), np.eye(3, dtype=bool)[labels]


def make_training(model, scale, **changes):
    rows, targets = make_rows(scale)
    material = Material(lambda draw, _: rows[draw.sample], lambda x: x, targets, "single")
    chosen = dataclasses.replace(SETTINGS, **{"batch_size": 64, "learning_rate": 1.0, "weight_decay": 0.0, **changes})
    falling = itertools.count(0, -1)
    return Training(model, (), chosen, FIRST, material, lambda *_: {"log_loss": float(next(falling))})


def make_head(seed=0):
    torch.manual_seed(seed)
    return Adapted(nn.Identity(), nn.Linear(8, 3))


def loss_of(model, scale):
    rows, targets = make_rows(scale)
    with torch.no_grad():
        return functional.cross_entropy(model(torch.from_numpy(rows)), torch.from_numpy(targets.argmax(1))).item()


def least_loss():
    """The least loss that a linear head can have on these rows, whatever their scale."""
    rows, targets = (torch.from_numpy(values) for values in make_rows(1.0))
    model = make_head()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def evaluate():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(rows), targets.float())
        loss.backward()
        return loss

    optimizer.step(evaluate)
    return evaluate().item()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("scale", [0.5, 5.0, 100.0])
def test_training_goes_well_at_the_rate_that_is_suggested(scale, optimizer):
    chosen = {"batch_size": 16, "momentum": 0.0, "optimizer": optimizer, "epochs": 25}
    rate = find_rate(make_training(make_head(), scale, **chosen)).suggested
    least, left = least_loss(), {}
    whole = loss_of(make_head(), scale) - least
    for factor in (0.01, 1, 100):
        model = make_head()
        list(make_training(model, scale, **chosen, learning_rate=factor * rate).run())
        left[factor] = (loss_of(model, scale) - least) / whole
    assert left[1] < 0.15
    assert left[0.01] > 0.5  # which a hundredth of it could not say
    assert left[100] > 1


def test_one_lucky_batch_does_not_suggest_a_rate_at_which_nothing_is_learned():
    test = find_rate(make_training(make_head(), 0.1, batch_size=16, momentum=0.0))
    assert trials.RANGE[0] < test.suggested
    assert test.suggested > 1e-3


def test_larger_features_ask_for_smaller_rates():
    found = [find_rate(make_training(make_head(), scale, momentum=0.0)).suggested for scale in (1.0, 10.0, 100.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 30 * found[2]


def plain_range_test(scale):
    """The range test as a plain loop on all pictures at once: (rates, smoothed losses)."""
    rows, targets = (torch.from_numpy(values) for values in make_rows(scale))
    model, rates, smoothed, running = make_head(), [], [], 0.0
    for number in range(100):
        rate = 1e-7 * 10 ** (7 * number / 99)
        optimizer = torch.optim.SGD(model.parameters(), rate)
        loss = functional.cross_entropy(model(rows), targets.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        running = 0.9 * running + 0.1 * loss.item()
        rates.append(rate)
        smoothed.append(running / (1 - 0.9 ** (number + 1)))
        if smoothed[-1] > 4 * min(smoothed):
            break
    return rates, smoothed


@pytest.mark.parametrize("scale, explodes", [(1.0, False), (100.0, True)])
def test_the_range_test_is_that_of_a_plain_loop_and_stops_once_the_loss_explodes(scale, explodes):
    test = find_rate(make_training(make_head(), scale, momentum=0.0))
    rates, smoothed = plain_range_test(scale)
    np.testing.assert_allclose(test.rates, rates)
    np.testing.assert_allclose(test.losses, smoothed, rtol=0.01)  # rounding grows as the loss explodes
    assert (len(test.rates) < 100) == (test.losses[-1] > 4 * min(test.losses)) == explodes
    assert test.suggested == test.rates[int(np.argmin(test.losses))] / 10


def watch_epochs(training):
    """The epochs that pictures are shown for, as they come."""
    epochs, plainly = [], training.material.show
    material = dataclasses.replace(
        training.material, show=lambda draw, epoch: epochs.append(epoch) or plainly(draw, epoch)
    )
    training.material = material
    return epochs


@pytest.mark.parametrize("epochs, last", [(2, 1), (50, 24)])  # 100 steps are 25 epochs of four
def test_the_range_test_goes_over_as_many_epochs_as_it_needs_and_there_are(epochs, last):
    training = make_training(make_head(), 0.1, batch_size=16, momentum=0.0, epochs=epochs)
    orders = [sampling.draw_epoch(training.material.labels, "plain", 0, epoch) for epoch in range(2)]
    assert orders[0] != orders[1]
    shown = watch_epochs(training)
    test = find_rate(training)
    assert len(test.rates) == 100
    assert shown == sorted(shown) and set(shown) == set(range(last + 1))


def test_the_range_test_trains_no_block_that_the_last_epoch_does_not_train():
    watched = Watched()
    model, trained = watched.model, set()
    chosen = dataclasses.replace(SETTINGS, learning_rate=1.0, freeze="all", unfreeze_epochs=1, momentum=0.0)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    targets = np.eye(3, dtype=bool)[np.arange(8) % 3]
    material = Material(lambda draw, _: pixels[draw.sample], PREPROCESS.normalise, targets, "single")
    training = Training(model, watched.blocks, chosen, FIRST, material, lambda *_: {})
    before = copy.deepcopy(model.state_dict())
    plainly = training.take_step

    def take_step(*given):
        record = plainly(*given)
        trained.update(name for name, p in model.named_parameters() if p.requires_grad)
        return record

    training.take_step = take_step
    test = find_rate(training)
    assert len(test.rates) > 4  # far beyond the two epochs of two steps
    given = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    assert trained == {name for name, p in model.named_parameters() if id(p) in given}
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert {name for name in before if name.startswith(("backbone.0.", "backbone.1."))} <= same
    assert not {name for name in before if name.startswith(("backbone.3.", "head."))} & same


def test_the_range_test_stops_where_the_loss_is_no_number():
    training = make_training(make_head(), 1.0, momentum=0.0)
    passes = itertools.count(1)
    training.model.head.register_forward_hook(lambda _, __, output: output * (float("nan") if next(passes) > 7 else 1))
    test = find_rate(training)
    assert len(test.rates) == len(test.losses) == 7
    assert all(np.isfinite(test.losses))


def test_a_loss_that_is_no_number_from_the_start_is_an_error_with_a_remedy():
    training = make_training(make_head(), float("nan"))
    with pytest.raises(TrainingError, match=r"--find-lr: the loss is not finite.*Give --learning-rate yourself"):
        find_rate(training)


def test_a_range_test_is_json():
    test = find_rate(make_training(make_head(), 1.0))
    stored = json.loads(json.dumps(test.to_json()))
    assert stored == {"rates": list(test.rates), "losses": list(test.losses), "suggested": test.suggested}


def test_the_model_that_was_copied_for_the_test_keeps_its_weights():
    model = make_head()
    before = copy.deepcopy(model.state_dict())
    training = make_training(copy.deepcopy(model), 1.0)
    find_rate(training)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(training.model.head.weight, model.head.weight)
