"""One phase of training: its step against plain PyTorch, what stands still, and going on with the same bits."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from headstart import checkpoints, engine, loading, processes, sampling
from headstart.blocks import find_blocks
from headstart.config import EngineConfig
from headstart.engine import Adapted, Epoch, Step, Training, kept_memory
from headstart.errors import TrainingError
from headstart.images import Preprocess
from headstart.material import Material
from headstart.timing import Layout

PLAIN = Layout("float32", False)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nobody cuts the power here: what was written need not be waited for."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


SIZE, CLASSES = 8, 3


def decide(**changes):
    """Settings with nothing left to be decided, as plain as they can be."""
    plain = {
        "epochs": 3,
        "batch_size": 4,
        "optimizer": "sgd",
        "momentum": 0.0,
        "learning_rate": 0.05,
        "layer_decay": 1.0,
        "schedule": "constant",
        "weight_decay": 0.0,
        "loss": "cross-entropy",
        "batch_norm": "train",
        "augment": "none",
    }
    return EngineConfig(**{**plain, **changes})


def build(seed=0, norm=False, dropout=0.0, classes=CLASSES):
    """A network of three blocks, `first`, `second` and `third`, and a linear head."""
    torch.manual_seed(seed)
    layers = []
    for name, before, after in (("first", 3, 4), ("second", 4, 5), ("third", 5, 6)):
        layers.append((name, nn.Conv2d(before, after, 3, padding=1, bias=not norm)))
        if norm:
            layers.append((f"{name}_norm", nn.BatchNorm2d(after)))
        if dropout:
            layers.append((f"{name}_dropout", nn.Dropout(dropout)))
        layers.append((f"{name}_act", nn.Tanh()))
    layers += [("pool", nn.AdaptiveAvgPool2d(2)), ("flat", nn.Flatten())]
    return Adapted(nn.Sequential(OrderedDict(layers)).eval(), nn.Linear(24, classes))


def make_material(count=10, classes=CLASSES, size=SIZE, task="single", unequal=False):
    """Pictures of noise in a class's colour."""
    numbers = np.random.default_rng(1)
    labels = np.arange(count) % classes
    if unequal:
        labels = np.arange(count) % (classes + 1) % classes
    targets = np.eye(classes, dtype=bool)[labels]
    if task == "multi":
        targets = targets | (numbers.random((count, classes)) < 0.3)
    pixels = numbers.integers(0, 160, (count, size, size, 3)) + 90 * np.eye(max(3, classes))[labels][:, None, None, :3]
    pixels = pixels.astype(np.uint8)
    return Material(lambda draw, _: pixels[draw.sample], Preprocess(size, 1.0).normalise, targets, task)


def inputs_of(material):
    """All pictures as the network's input."""
    shown = np.stack([material.show(sampling.Draw(number), 0) for number in range(len(material.targets))])
    return material.normalise(torch.from_numpy(shown)).contiguous()


def measure(material):
    """A function that measures a model by its log-loss and accuracy on the material."""
    inputs, labels = inputs_of(material), torch.from_numpy(material.targets.argmax(1))

    def validate(model, check):
        check()
        with torch.no_grad():
            logits = model(inputs)
        loss = functional.cross_entropy(logits, labels).item()
        return {"log_loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean().item()}

    return validate


def always_better():
    """A validation of which the last epoch is the best."""
    falling = itertools.count(0, -1)
    return lambda *_: {"log_loss": float(next(falling))}


def start(model, chosen, material=None, validate=None, layout=PLAIN, **more):
    material = material or make_material()
    blocks = find_blocks(model.backbone.eval(), material.show(sampling.Draw(0), 0).shape[0])
    return Training(model, blocks, chosen, layout, material, validate or always_better(), **more)


def steps_and_epochs(records):
    records = list(records)
    return [r for r in records if isinstance(r, Step)], [r for r in records if isinstance(r, Epoch)]


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_near(one, other, tolerance=1e-6):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance, msg=lambda text, n=name: n + text)


def orders(material, epochs, size):
    """For each epoch its batches of picture numbers."""
    for epoch in range(epochs):
        rows = [draw.sample for draw in sampling.draw_epoch(material.labels, "plain", 0, epoch)]
        yield [rows[at : at + size] for at in range(0, len(rows), size)]


def train_plainly(
    model, material, optimizer, epochs, size, loss=functional.cross_entropy, adjust=lambda p: None, mode=True
):
    """The loop that everybody writes; gives each epoch's losses, one number a batch."""
    inputs, targets = inputs_of(material), torch.from_numpy(material.targets).float()
    losses = []
    model.train(mode)
    for batches in orders(material, epochs, size):
        losses.append([])
        for rows in batches:
            optimizer.zero_grad()
            value = loss(model(inputs[rows]), targets[rows])
            value.backward()
            adjust([p for p in model.parameters() if p.grad is not None])
            optimizer.step()
            losses[-1].append(value.item())
    return losses


# A step, against plain PyTorch


def plain_sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.02)


def plain_adamw(model):
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, 0.005)


OPTIMISERS = {
    "sgd": (plain_sgd, {"momentum": 0.9, "weight_decay": 0.02, "decay_all": True}),
    "adamw": (plain_adamw, {"learning_rate": 0.005, "weight_decay": 0.1}),
    "adam": (lambda model: torch.optim.Adam(model.parameters(), 0.005), {"learning_rate": 0.005}),
}


@pytest.mark.parametrize("epochs, pictures", [(1, 4), (4, 10)], ids=["one step", "twelve steps"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_steps_are_those_of_a_plain_loop(name, norm, epochs, pictures):
    make_optimizer, chosen = OPTIMISERS[name]
    material = make_material(pictures)
    model, reference = build(norm=norm), build(norm=norm)
    before = state_of(model)
    list(start(model, decide(optimizer=name, epochs=epochs, **chosen), material).run())
    train_plainly(reference, material, make_optimizer(reference), epochs, 4)
    assert_near(model.state_dict(), reference.state_dict())
    moved = [(model.state_dict()[key] - before[key]).abs().max() for key in before]
    assert min(moved) > 1e-4


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4}], ids=["plain", "mixup"])
def test_eight_passes_of_two_pictures_are_one_of_sixteen(mixing):
    material = make_material(37)  # the last step has five pictures, in passes of 2, 2 and 1
    small, large, reference = build(), build(), build()
    chosen = decide(momentum=0.9, **mixing)
    few, _ = steps_and_epochs(start(small, dataclasses.replace(chosen, batch_size=2, accumulate=8), material).run())
    many, _ = steps_and_epochs(start(large, dataclasses.replace(chosen, batch_size=16), material).run())
    assert_near(small.state_dict(), large.state_dict())
    assert [step.pictures for step in few] == [step.pictures for step in many] == [16, 32, 37] * 3
    if not mixing:
        train_plainly(reference, material, torch.optim.SGD(reference.parameters(), 0.05, momentum=0.9), 3, 16)
        assert_near(small.state_dict(), reference.state_dict())


def clamp_values(parameters):
    for parameter in parameters:
        parameter.grad.clamp_(-0.003, 0.003)


def scale_norm(parameters):
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in parameters))
    assert norm > 0.05  # else nothing is tested
    for parameter in parameters:
        parameter.grad *= 0.05 / norm


@pytest.mark.parametrize(
    "chosen, adjust", [({"clip_value": 0.003}, clamp_values), ({"clip_norm": 0.05}, scale_norm)], ids=["value", "norm"]
)
def test_gradients_are_clipped_after_the_last_pass_of_a_step(chosen, adjust):
    material = make_material(14)
    model, reference = build(), build()
    list(start(model, decide(batch_size=3, accumulate=2, **chosen), material).run())
    train_plainly(reference, material, torch.optim.SGD(reference.parameters(), 0.05), 3, 6, adjust=adjust)
    assert_near(model.state_dict(), reference.state_dict())


def test_label_smoothing_is_pytorchs():
    material = make_material()
    model, reference = build(), build()
    _, epochs = steps_and_epochs(start(model, decide(label_smoothing=0.2), material).run())
    losses = train_plainly(
        reference,
        material,
        torch.optim.SGD(reference.parameters(), 0.05),
        3,
        4,
        lambda logits, targets: functional.cross_entropy(logits, targets.argmax(1), label_smoothing=0.2),
    )
    assert_near(model.state_dict(), reference.state_dict())
    assert epochs[3].loss == pytest.approx(np.average(losses[2], weights=[4, 4, 2]), rel=1e-6)


def test_several_labels_are_trained_by_binary_cross_entropy():
    material = make_material(task="multi")
    assert material.targets.sum(1).max() > 1
    model, reference = build(), build()
    _, epochs = steps_and_epochs(start(model, decide(loss="bce-with-logits"), material).run())
    loss = functional.binary_cross_entropy_with_logits
    losses = train_plainly(reference, material, torch.optim.SGD(reference.parameters(), 0.05), 3, 4, loss)
    assert_near(model.state_dict(), reference.state_dict())
    assert epochs[3].loss == pytest.approx(np.average(losses[2], weights=[4, 4, 2]), rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"label_smoothing": 0.2}])
def test_with_several_labels_a_picture_accuracy_is_the_share_of_labels_that_are_right(changes):
    material, model = make_material(task="multi"), build()
    chosen = decide(loss="bce-with-logits", batch_size=10, **changes)
    (step, *_), _ = steps_and_epochs(start(build(), chosen, material).run())
    right = (model(inputs_of(material)).sigmoid() > 0.5).numpy() == material.targets
    assert step.accuracy == pytest.approx(right.mean(), abs=1e-6)
    assert 0 < step.accuracy < 1


# Sums over pictures


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_of_an_epoch_is_the_mean_over_its_pictures(accumulate):
    # The mistakes: a mean of batch means; batch means summed and then divided by the number of pictures.
    material = make_material(9)
    reference = build()
    _, epochs = steps_and_epochs(start(build(), decide(accumulate=accumulate), material).run())
    size = 4 * accumulate
    losses = train_plainly(reference, material, torch.optim.SGD(reference.parameters(), 0.05), 3, size)
    for epoch, means in zip(epochs[1:], losses, strict=True):
        counts = [size] * (len(means) - 1) + [9 - size * (len(means) - 1)]
        assert epoch.loss == pytest.approx(np.average(means, weights=counts), rel=1e-5)
        assert abs(epoch.loss - np.mean(means)) > 1e-3
        assert abs(epoch.loss - np.sum(means) / 9) > 1e-3


def test_weights_of_classes_count_in_the_loss_and_its_mean():
    material = make_material(unequal=True)
    counts = material.targets.sum(0)
    assert counts.tolist() == [5, 3, 2]
    weights = torch.tensor(10 / (CLASSES * counts), dtype=torch.float32)
    loss = lambda logits, targets: (  # noqa: E731
        functional.cross_entropy(logits, targets.argmax(1), weights, reduction="sum") / len(logits)
    )
    model, reference = build(), build()
    _, epochs = steps_and_epochs(start(model, decide(class_weights="counts"), material).run())
    losses = train_plainly(reference, material, torch.optim.SGD(reference.parameters(), 0.05), 3, 4, loss)
    assert_near(model.state_dict(), reference.state_dict())
    assert epochs[3].loss == pytest.approx(np.average(losses[2], weights=[4, 4, 2]), rel=1e-5)


def test_accuracy_is_the_share_of_an_epochs_pictures_that_were_right_when_they_were_shown():
    # The mistake: topk(1) compared with the targets, which broadcasts to all pairs of pictures.
    material = make_material(9)
    reference = build()
    steps, epochs = steps_and_epochs(start(build(), decide(epochs=1), material).run())
    inputs, labels = inputs_of(material), torch.from_numpy(material.targets.argmax(1))
    optimizer, hits = torch.optim.SGD(reference.parameters(), 0.05), 0
    for rows in next(orders(material, 1, 4)):
        optimizer.zero_grad()
        logits = reference(inputs[rows])
        hits += (logits.argmax(1) == labels[rows]).sum().item()
        functional.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
    assert epochs[1].accuracy == steps[-1].accuracy == pytest.approx(hits / 9)
    assert epochs[1].loss == steps[-1].loss


def test_a_perfect_fit_has_a_loss_of_nothing():
    # The mistake: sigmoid before cross-entropy, which cannot go under 1.461 with ten classes.
    rows = 20 * np.eye(10, dtype=np.float32)
    material = Material(lambda draw, _: rows[draw.sample], lambda x: x, np.eye(10, dtype=bool), "single")
    model = Adapted(nn.Identity(), nn.Linear(10, 10))
    training = Training(model, (), decide(epochs=60, learning_rate=0.3), PLAIN, material, always_better())
    _, epochs = steps_and_epochs(training.run())
    assert epochs[1].loss > 1.461 > 0.001 > epochs[-1].loss
    with torch.no_grad():
        assert model(torch.from_numpy(rows)).softmax(1).diagonal().min() > 0.99
        assert model(torch.from_numpy(rows)).max() > 1  # logits, no probabilities


# What stands still

NETWORKS = {
    # architecture, what is frozen, the names that then must stand still
    "test_resnet": ("layer2", ("conv1.", "bn1.", "layer1.", "layer2.")),
    "test_efficientnet": ("blocks.1", ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.")),
    "test_vit": ("blocks.2", ("cls_token", "pos_embed", "patch_embed.", "blocks.0.", "blocks.1.", "blocks.2.")),
    "test_convnext": ("stages.0", ("stem.", "stages.0.")),
}


def build_timm(name):
    torch.manual_seed(0)
    size = {"img_size": 64} if "vit" in name else {}
    network = timm.create_model(name, num_classes=0, drop_rate=0.2, **size)
    for module in network.modules():  # statistics that a batch would move, and by much
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.2, -0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return Adapted(network.eval(), nn.Linear(network.num_features, CLASSES))


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_frozen_keeps_every_bit_and_the_rest_learns(name):
    # The mistakes: require_grad without s, which freezes nothing; a frozen network left in train mode, whose
    # statistics drift; an optimiser that is given all parameters.
    frozen, still = NETWORKS[name]
    model, chosen = build_timm(name), decide(epochs=2, freeze=frozen, optimizer="adamw", weight_decay=0.1)
    before, named = state_of(model), dict(model.named_parameters())
    training = start(model, chosen, make_material(6, size=64))
    _, epochs = steps_and_epochs(training.run())
    stands = {key for key in before if key.removeprefix("backbone.").startswith(still)}
    assert {key for key in before if torch.equal(before[key], model.state_dict()[key])} == stands
    assert 0 < len(stands) < len(before)
    learns = {key: p for key, p in named.items() if key not in stands}
    given = [id(p) for group in training.optimizer.param_groups for p in group["params"]]
    assert sorted(given) == sorted(map(id, learns.values()))
    assert {epoch.trainable for epoch in epochs} == {sum(p.numel() for p in learns.values())}


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_frozen_batch_norms_keep_their_statistics_everywhere_and_learn_their_scales(name):
    model = build_timm(name)
    norms = [module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    holds_layers = any(list(norm.children()) for norm in norms)
    assert holds_layers == (name == "test_efficientnet")  # timm's, which hold their activation
    before = state_of(model)
    list(start(model, decide(epochs=1, batch_norm="frozen"), make_material(6, size=64)).run())
    changed = {key for key in before if not torch.equal(before[key], model.state_dict()[key])}
    assert changed == set(dict(model.named_parameters()))


def test_frozen_batch_norms_use_the_statistics_that_came_with_the_weights():
    model, reference = build(norm=True), build(norm=True)
    for one in (model, reference):
        nn.init.constant_(one.backbone.first_norm.running_var, 3.0)
    material = make_material()
    list(start(model, decide(batch_norm="frozen"), material).run())
    train_plainly(reference, material, torch.optim.SGD(reference.parameters(), 0.05), 3, 4, mode=False)
    assert_near(model.state_dict(), reference.state_dict())


def test_the_head_is_trained_by_batch_statistics_also_where_the_networks_are_frozen():
    model = build(norm=True)
    model.head = nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, CLASSES))
    before = state_of(model)
    list(start(model, decide(batch_norm="frozen"), make_material()).run())
    assert not torch.equal(model.head[0].running_mean, before["head.0.running_mean"])


def test_dropout_is_off_in_frozen_blocks_and_on_in_trained_ones():
    model, modes = build(dropout=0.5, norm=True), {}
    training = start(model, decide(epochs=1, freeze="first"))
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, *_, name=name: modes.setdefault(name, set()).add(m.training))
    list(training.run())
    assert len(modes) == 15
    for name, found in modes.items():
        assert found == {not name.startswith("backbone.first")}, name


def test_a_block_in_the_middle_with_the_rate_0_stands_still_while_what_is_before_it_learns():
    model = build(norm=True)
    before = state_of(model)
    list(start(model, decide(rates="second=0")).run())
    same = {key for key in before if torch.equal(before[key], model.state_dict()[key])}
    assert same == {key for key in before if key.startswith("backbone.second")}


def test_a_frozen_prefix_keeps_no_graph():
    model, graphs = build(norm=True), {}
    training = start(model, decide(epochs=1, freeze="second"))
    for name in ("first_act", "second_act", "third"):
        hook = lambda _, __, output, name=name: graphs.setdefault(name, []).append(output.requires_grad)  # noqa: E731
        getattr(model.backbone, name).register_forward_hook(hook)
    list(training.run())
    assert graphs == {"first_act": [False] * 3, "second_act": [False] * 3, "third": [True] * 3}


class Counter(nn.Module):
    """A layer that keeps a number of its own and changes it behind everybody's back, in any mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        self.seen += 1
        return x * self.scale


def build_counting():
    model = build()
    return Adapted(nn.Sequential(Counter(), *model.backbone).eval(), model.head)


def test_what_is_frozen_and_changes_all_the_same_is_an_error_that_names_it():
    training = start(build_counting(), decide(freeze="1"))
    with pytest.raises(TrainingError, match=r"backbone\.0\.seen: changed although it is frozen"):
        list(training.run())


def test_what_is_trained_may_change_its_own_buffers():
    model = build_counting()
    list(start(model, decide(epochs=1)).run())
    assert model.backbone[0].seen == 4  # once to find the blocks, and in three steps


def test_a_frozen_weight_that_is_written_to_is_an_error():
    model = build()
    training = start(model, decide(freeze="first"))

    def write(*_):
        model.backbone.first.weight.data.add_(1e-3)

    model.head.register_forward_hook(write)
    with pytest.raises(TrainingError, match=r"backbone\.first\.weight: changed although it is frozen"):
        list(training.run())


class RunningMean(nn.Module):
    """A network that keeps a running mean itself, beside its layers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, pictures):
        if self.training:
            self.mean.lerp_(pictures.mean().detach(), 0.1)
        return self.second(self.first(pictures - self.mean)).mean((2, 3))


def test_a_frozen_networks_own_buffers_stand_still_also_where_a_part_of_it_is_trained():
    model = Adapted(RunningMean(), nn.Linear(4, CLASSES))
    training = start(model, decide(freeze="first"))
    assert training.parts.modules[0][0] == "backbone"  # it belongs to the first block, which is frozen
    list(training.run())
    assert model.backbone.mean == 0


def trained_blocks(before, after):
    return {
        key.removeprefix("backbone.").partition("_")[0].partition(".")[0]
        for key in before
        if not torch.equal(before[key], after[key])
    }


@pytest.mark.parametrize("every", [1, 2])
def test_gradual_unfreezing_thaws_one_more_block_each_so_many_epochs_from_the_head_down(every):
    model = build(norm=True)
    last, learned, sizes = state_of(model), [], []
    for record in start(model, decide(epochs=4 * every + 1, freeze="all", unfreeze_epochs=every)).run():
        if isinstance(record, Epoch) and record.epoch:
            learned.append(trained_blocks(last, state_of(model)))
            sizes.append(record.trainable)
            last = state_of(model)
    expected = [{"head"}, {"head", "third"}, {"head", "third", "second"}, {"head", "third", "second", "first"}]
    expected = [blocks for blocks in expected for _ in range(every)]
    assert learned == [*expected, expected[-1]]
    per_block = {"head": 24 * 3 + 3, "third": 5 * 6 * 9 + 12, "second": 4 * 5 * 9 + 10, "first": 3 * 4 * 9 + 8}
    assert sizes == [sum(per_block[block] for block in blocks) for blocks in learned]


def test_before_the_first_step_as_much_is_trainable_as_in_the_first_epoch():
    _, epochs = steps_and_epochs(start(build(), decide(freeze="all", unfreeze_epochs=1)).run())
    assert epochs[0].trainable == epochs[1].trainable


def test_after_an_early_stop_what_was_trained_last_is_counted():
    training = start(build(), decide(epochs=9, freeze="all", unfreeze_epochs=2, patience=2), validate=scripted(1, 2, 3))
    _, epochs = steps_and_epochs(training.run())
    assert epochs[-1].epoch == 2
    assert training.trainable == epochs[-1].trainable


def test_the_optimiser_is_given_no_block_that_is_thawed_only_after_the_last_epoch():
    model = build()
    training = start(model, decide(epochs=2, freeze="all", unfreeze_epochs=1))
    given = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for p in (*model.backbone.third.parameters(), *model.head.parameters())}


# The average, the best epoch, and when it ends


def test_the_average_of_weights_is_a_naive_references():
    model, chosen = build(norm=True), decide(ema=0.4, epochs=4)
    training = start(model, chosen)
    average = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for place, record in enumerate(record for record in training.run() if isinstance(record, Step)):
        decay = min(0.4, (1 + place) / (10 + place))
        for name, parameter in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach().double()
        for name, followed in training.average.named_parameters():
            torch.testing.assert_close(followed.double(), average[name], rtol=0, atol=1e-6)
        assert_same_bits(dict(training.average.named_buffers()), dict(model.named_buffers()))
        assert record.step <= 3
    assert place == 11  # the decay is 0.4 from the sixth step on


def test_with_an_average_the_average_is_measured_and_kept():
    seen = []
    training = start(build(), decide(ema=0.5), validate=lambda model, _: seen.append(model) or {"log_loss": -len(seen)})
    for record in training.run():
        if isinstance(record, Epoch):
            expected, last = state_of(training.average), state_of(training.model)
    assert [model is training.average for model in seen] == [True] * 4
    assert_same_bits(state_of(training.model), expected)
    assert not torch.equal(expected["head.weight"], last["head.weight"])


def scripted(*values, name="log_loss"):
    """A validation that gives these figures, one after the other."""
    coming = iter(values)
    return lambda *_: {"log_loss": 1.0, name: next(coming)}


NAN, INFINITE = math.nan, math.inf


@pytest.mark.parametrize(
    "name, values, best",
    [
        ("log_loss", (3.0, 1.0, 2.0, 1.5), 1),
        ("ece", (0.3, 0.2, 0.1, 0.4), 2),
        ("accuracy", (0.3, 0.5, 0.9, 0.8), 2),
        ("macro_f1", (0.9, 0.5, 0.1, 0.8), 0),
        ("ece", (3.0, NAN, 2.0, NAN), 2),
        ("ece", (NAN, 5.0, INFINITE, -INFINITE), 1),
        ("accuracy", (NAN, 0.1, NAN, 0.2), 3),
        ("accuracy", (0.1, INFINITE, NAN, 0.0), 0),
        ("accuracy", (0.5, 0.7, 0.7, 0.7), 1),  # of equals the first
    ],
)
def test_the_best_epochs_weights_are_what_is_left(name, values, best):
    model = build(norm=True)
    training = start(model, decide(best_by=name), validate=scripted(*values, name=name))
    after = []
    best_so_far = []
    for record in training.run():
        if isinstance(record, Epoch):
            after.append(state_of(model))
            best_so_far.append(record.best)
    assert training.state.best_epoch == best and training.state.best == values[best]
    assert max(place for place, is_best in enumerate(best_so_far) if is_best) == best
    assert_same_bits(state_of(model), after[best])
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_a_figure_that_is_not_defined_is_never_the_best():
    model = build()
    before = state_of(model)
    _, epochs = steps_and_epochs(start(model, decide(best_by="map"), validate=scripted(*[NAN] * 4, name="map")).run())
    assert not any(epoch.best for epoch in epochs)
    assert_same_bits(state_of(model), before)


def test_epoch_0_is_the_state_before_the_first_step():
    model, material = build(), make_material()
    with torch.no_grad():
        expected = functional.cross_entropy(model(inputs_of(material)), torch.from_numpy(material.targets.argmax(1)))
    _, epochs = steps_and_epochs(start(model, decide(), material, measure(material)).run())
    assert [epoch.epoch for epoch in epochs] == [0, 1, 2, 3]
    assert epochs[0].select["log_loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert math.isnan(epochs[0].loss) and math.isnan(epochs[0].accuracy)


@pytest.mark.parametrize(
    "patience, values, last",
    [(1, (5, 4, 4, 3, 2, 1), 2), (2, (5, 4, 6, 3, 4, 5), 5), (2, (1, 2, 3, 0, 0, 0), 2), (0, (1, 2, 3, 4, 5, 6), 5)],
)
def test_training_ends_after_so_many_epochs_without_a_better_one(patience, values, last):
    training = start(build(), decide(epochs=5, patience=patience), validate=scripted(*map(float, values)))
    _, epochs = steps_and_epochs(training.run())
    assert epochs[-1].epoch == last
    assert training.state.best == min(values[: last + 1])


# What is told of it


def test_as_many_records_come_as_were_announced():
    training = start(build(), decide())
    announced = training.count_left()
    assert len(list(training.run())) == announced == 4 + 3 * 3


def test_a_step_says_where_it_stands_and_its_rate():
    chosen = decide(learning_rate=0.1, schedule="step", step_epochs=2, step_factor=0.5, rates="first=0.01")
    steps, _ = steps_and_epochs(start(build(), chosen, phase=3).run())
    assert [(s.phase, s.epoch, s.step, s.steps) for s in steps] == [(3, e, s, 3) for e in (1, 2, 3) for s in (1, 2, 3)]
    assert [s.rate for s in steps] == [0.1] * 6 + [0.05] * 3
    assert all(s.speed > 0 for s in steps)


def test_the_speed_counts_the_time_spent_waiting_for_pictures():
    quick = make_material(8)
    slow = dataclasses.replace(quick, show=lambda draw, epoch: time.sleep(0.05) or quick.show(draw, epoch))
    steps, epochs = steps_and_epochs(start(build(), decide(epochs=1), slow).run())
    at_once = min(loading.count_cpus(), 2)  # two windows, each made by a thread
    assert steps[-1].speed < at_once / 0.05
    assert epochs[1].seconds > 8 * 0.05 / at_once


def test_what_training_sees_of_a_picture_may_differ_from_epoch_to_epoch():
    plain = make_material(4)
    shown = []
    material = dataclasses.replace(
        plain, show=lambda draw, epoch: shown.append((draw.sample, epoch)) or plain.show(draw, epoch)
    )
    list(start(build(), decide(), material).run())
    asked = [ask for ask in shown if shown.count(ask) == 1]  # the test's own question for its size comes on top
    assert set(asked) | {(0, 0)} == {(sample, epoch) for sample in range(4) for epoch in range(3)}


# Number formats and memory


def test_in_bfloat16_the_loss_stays_near_that_of_float32_and_the_weights_stay_float32():
    material = make_material(32)
    chosen, losses, kinds = decide(epochs=6), {}, set()
    for layout in (PLAIN, Layout("float32", True), Layout("bfloat16", True)):
        model = build(norm=True)
        training = start(model, chosen, material, layout=layout)
        if layout.precision == "bfloat16":
            model.backbone.register_forward_hook(lambda _, __, output: kinds.add(output.dtype))
        _, epochs = steps_and_epochs(training.run())
        losses[layout] = [epoch.loss for epoch in epochs[1:]]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert kinds == {torch.bfloat16}
    plain, last, half = losses.values()
    np.testing.assert_allclose(last, plain, rtol=1e-5)
    np.testing.assert_allclose(half, plain, rtol=0.02)
    assert half != last and plain[-1] < 0.8 * plain[0]


def test_pictures_and_weights_lie_in_memory_as_the_layout_says():
    for layout in (PLAIN, Layout("float32", True)):
        model, found = build(), set()
        model.backbone.first.register_forward_pre_hook(
            lambda _, inputs, found=found: found.add(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
        training = start(model, decide(epochs=1), layout=layout)
        found.clear()  # of what the blocks were found by
        list(training.run())
        assert found == {layout.channels_last}
        assert model.backbone.second.weight.is_contiguous(memory_format=torch.channels_last) == layout.channels_last


class WithoutDoubles(TorchFunctionMode):
    """As a device that has no float64 (MPS): only what was brought to the processor may become it."""

    def __init__(self):
        super().__init__()
        self.brought = []

    def __torch_function__(self, function, types, given=(), named=None):
        found = function(*given, **(named or {}))
        if function is torch.Tensor.cpu:
            self.brought.append(found)
        elif isinstance(found, torch.Tensor) and found.dtype == torch.float64:
            sources = [one for one in tree_leaves(given) if isinstance(one, torch.Tensor)]
            at_home = [one.dtype == torch.float64 or any(one is other for other in self.brought) for one in sources]
            assert at_home and all(at_home), function
        return found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_needs_no_float64_of_its_device(optimizer):
    training = start(build(norm=True), decide(optimizer=optimizer, momentum=0.9, clip_norm=0.1, ema=0.9))
    training.state.epoch, steps = 0, []
    parallel = training.thaw()
    for window in training.show():
        with WithoutDoubles():
            steps.append(training.take_step(parallel, window))
    assert [step.pictures for step in steps] == [4, 8, 10]


@pytest.mark.parametrize(("size", "accumulate", "most"), [(128, 1, 512), (64, 2, 512), (4, 1, 64), (600, 1, 1200)])
def test_no_more_pictures_are_made_ahead_than_memory_has_room_for(size, accumulate, most, monkeypatch):
    # 8 processors would make 16 steps ahead.
    monkeypatch.setattr(engine, "count_cpus", lambda: 8)
    shown = []
    count = 20 * size * accumulate
    targets = np.eye(CLASSES, dtype=bool)[np.arange(count) % CLASSES]
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    material = Material(lambda *_: shown.append(1) or pixels, Preprocess(SIZE, 1.0).normalise, targets, "single")
    training = start(build(), decide(batch_size=size, accumulate=accumulate), material)
    training.state.epoch = 0
    windows = training.show()
    assert next(windows).count == size * accumulate
    before = -1
    while before != len(shown):  # until the threads have nothing left to do
        before = len(shown)
        time.sleep(0.05)
    windows.close()
    assert len(shown) - 1 == most  # the test's own question for its size comes on top


# Several processes on GPUs


def norms_of(network):
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_sharing_statistics_leaves_a_network_as_it_was_but_for_its_batch_norms(name):
    # Shared statistics themselves need several GPUs; in evaluation mode the processor runs them.
    model = build_timm(name)
    model.head = nn.Sequential(nn.BatchNorm1d(model.head.in_features), model.head)
    model.backbone.bn1.train()  # as where a part is trained
    pictures = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    modes = {name: module.training for name, module in model.named_modules()}
    parameters, keys = dict(model.named_parameters()), [*model.state_dict()]
    processes.share_statistics(model)
    assert norms_of(model) and all(isinstance(module, nn.SyncBatchNorm) for module in norms_of(model))
    assert [*model.state_dict()] == keys
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    assert {name: module.training for name, module in model.named_modules()} == modes
    plain = build_timm(name)
    plain.head = nn.Sequential(nn.BatchNorm1d(plain.head.in_features), plain.head)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(pictures), plain.eval()(pictures))


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_efficientnet",
    ],
)
def test_sharing_statistics_in_every_epoch_leaves_the_network_as_it_was_too(name):
    model, plain = build_timm(name), build_timm(name)
    pictures = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        processes.share_statistics(model)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(pictures), plain.eval()(pictures))


class Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def is_mapped_by_itself(libc, count=64 * 2**20):
    """Whether a large block comes fresh from the system, and goes back to it."""
    libc.mallinfo2.restype, libc.malloc.restype = Mallinfo, ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    before = libc.mallinfo2().hblks
    block = libc.malloc(count)
    mapped = libc.mallinfo2().hblks > before
    libc.free(block)
    return mapped


def keeps_the_heap(libc, count=200, size=100 * 1024):
    """Whether memory of many small blocks is kept once they are freed."""
    blocks = [libc.malloc(size) for _ in range(count)]
    grown = libc.mallinfo2().arena
    for block in reversed(blocks):
        libc.free(block)
    return libc.mallinfo2().arena > grown - count * size / 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
@pytest.mark.parametrize("failing", [False, True])
def test_memory_is_kept_for_the_next_step_and_given_back_at_the_end(failing):
    # In a process of its own: what other tests left on the heap decides whether its end can be given back.
    code = f"import test_engine; test_engine.check_memory({failing})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.dirname(__file__))


def check_memory(failing):
    libc = ctypes.CDLL("libc.so.6")
    assert is_mapped_by_itself(libc)
    try:
        with kept_memory():
            assert not is_mapped_by_itself(libc)
            held = libc.mallinfo2().fordblks
            assert keeps_the_heap(libc)
            if failing:
                raise RuntimeError
    except RuntimeError:
        assert failing
    assert held >= 64 * 2**20 > libc.mallinfo2().fordblks
    assert is_mapped_by_itself(libc)
    assert not keeps_the_heap(libc)


def test_training_works_where_there_is_no_glibc(monkeypatch):
    def missing(name):
        raise OSError(name)

    expected = build()
    list(start(expected, decide()).run())
    monkeypatch.setattr(ctypes, "CDLL", missing)
    model = build()
    list(start(model, decide()).run())
    assert_same_bits(model.state_dict(), expected.state_dict())


# Everybody's random numbers


def random_states():
    return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()


def test_training_neither_moves_the_global_random_states_nor_depends_on_them():
    chosen, found = decide(mixup=0.3, sampling="weighted"), []
    for seed in (1, 2):
        model = build(dropout=0.5)
        torch.manual_seed(seed)
        random.seed(seed)
        before = random_states()
        list(start(model, chosen).run())
        assert random_states() == before
        found.append(state_of(model))
    assert_same_bits(*found)


def test_another_seed_is_another_training():
    found = []
    for seed in (1, 2):
        model = build(dropout=0.5)
        list(start(model, decide(batch_size=10), seed=seed).run())
        found.append(state_of(model))
    assert not torch.equal(found[0]["head.weight"], found[1]["head.weight"])


# Losses that are no numbers


def spoil(material, epoch, sample):
    """The material with a picture that is no numbers in one epoch (from 0)."""

    def show(draw, at):
        pixels = material.show(draw, at).astype(np.float32)
        return pixels * np.float32(math.nan if (at, draw.sample) == (epoch, sample) else 1.0)

    return dataclasses.replace(material, show=show)


def test_a_loss_that_is_not_finite_stops_at_once_and_says_where(tmp_path):
    material = make_material()
    sample = list(orders(material, 2, 4))[1][1][0]  # a picture of the second epoch's second step
    model = build(norm=True)
    training, last = start(model, decide(), spoil(material, 1, sample), folder=tmp_path), {}
    with pytest.raises(TrainingError) as caught:
        for record in training.run():
            last, place = state_of(model), key_of(record)
    assert place == (1, 1)
    message = str(caught.value)
    assert "epoch 2, step 2: the loss is nan" in message
    assert "Lower --learning-rate (here 0.05), or give --clip-norm 1." in message
    parameters = dict(model.named_parameters())
    assert_same_bits({name: last[name] for name in parameters}, {n: p.detach() for n, p in parameters.items()})
    kept = checkpoints.read(tmp_path)
    assert (kept.facts["state"]["epoch"], kept.facts["state"]["step"]) == (1, 0)
    assert all(tensor.isfinite().all() for tensor in kept.tensors.values())


@pytest.mark.parametrize("value", [NAN, INFINITE])
def test_a_loss_on_the_select_pictures_that_is_not_finite_stops_too(value, tmp_path):
    training = start(build(), decide(), validate=scripted(2.0, 1.0, value), folder=tmp_path)
    with pytest.raises(TrainingError, match=rf"epoch 2, .*the loss is {value}.*Lower --learning-rate"):
        list(training.run())
    kept = checkpoints.read(tmp_path)
    assert (kept.facts["state"]["epoch"], kept.facts["state"]["best"]) == (1, 1.0)


def test_a_rate_that_is_far_too_high_is_told(tmp_path):
    model = build()
    training = start(model, decide(epochs=50, learning_rate=90.0, momentum=0.99), make_material(10), folder=tmp_path)
    model.backbone.third_act = nn.Identity()
    with pytest.raises(TrainingError, match="training has diverged"):
        for number, _ in enumerate(training.run()):
            model.head.weight.data *= 1e6 if number else 1
    assert checkpoints.read(tmp_path) is not None


# Going on where it was stopped

CASES = {
    "sgd": {"momentum": 0.9, "weight_decay": 0.01},
    "sgd without momentum": {},
    "adam, one cycle": {"optimizer": "adam", "schedule": "one-cycle", "learning_rate": 0.01},
    "adamw, cosine": {"optimizer": "adamw", "schedule": "cosine", "weight_decay": 0.1, "learning_rate": 0.01},
    "average": {"momentum": 0.9, "ema": 0.8},
    "mixup and cutmix": {"mixup": 0.5, "cutmix": 1.0},
    "gradual unfreezing": {"freeze": "all", "unfreeze_epochs": 1, "optimizer": "adamw", "learning_rate": 0.01},
    "accumulation": {"batch_size": 2, "accumulate": 2, "clip_norm": 0.1},
    "drawn pictures": {"sampling": "weighted", "label_smoothing": 0.1, "class_weights": "counts"},
    "frozen batch norms": {"batch_norm": "frozen", "freeze": "first"},
}
RECORDS = 13  # of three epochs of three steps, and the start


def begin(chosen, folder, seed=0, layout=PLAIN):
    """A phase with batch norm and dropout; another seed begins with other weights, as if they were lost."""
    material = make_material(unequal=True)
    model = build(seed, norm=True, dropout=0.3)
    return start(model, chosen, material, measure(material), folder=folder, layout=layout)


def plain(record):
    """A record without its times."""
    return dataclasses.replace(record, **({"speed": 0} if isinstance(record, Step) else {"seconds": 0}))


def key_of(record):
    return record.epoch - isinstance(record, Step), getattr(record, "step", 0)


def live(chosen, folder, lives, layout=PLAIN):
    """Train in several lives, each killed after so many records; (the last training, all records by their place)."""
    records = {}
    for seed, length in enumerate((*lives, None)):
        kept = any(folder.iterdir())
        training = begin(chosen, folder, seed if kept else 0, layout)
        running = training.run()
        for record in itertools.islice(running, length):
            records[key_of(record)] = plain(record)
        running.close()
    return training, records


def live_once(chosen, layout=PLAIN):
    """As `live`, in one life that leaves nothing behind."""
    training = begin(chosen, None, 0, layout)
    return training, {key_of(record): plain(record) for record in training.run()}


def assert_same_end(one, other):
    (training, records), (expected, expected_records) = one, other
    assert repr(records) == repr(expected_records)  # NaN is NaN
    assert_same_bits(training.model.state_dict(), expected.model.state_dict())
    if training.average is not None:
        assert_same_bits(training.average.state_dict(), expected.average.state_dict())
    assert training.state.best == expected.state.best
    assert training.state.best_epoch == expected.state.best_epoch


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_was_killed_goes_on_with_the_same_bits(name, tmp_path):
    chosen = decide(checkpoint_minutes=0.0, **CASES[name])
    # before anything is saved, within an epoch, at an epoch's end
    assert_same_end(live(chosen, tmp_path, (1, 3, 3, 4)), live_once(chosen))


@pytest.mark.parametrize("layout", [Layout("float32", True), Layout("bfloat16", True)], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_goes_on_with_the_same_bits_in_any_layout(optimizer, layout, tmp_path):
    chosen = decide(checkpoint_minutes=0.0, optimizer=optimizer, momentum=0.9, ema=0.8)
    assert_same_end(live(chosen, tmp_path, (3, 4), layout), live_once(chosen, layout))


@pytest.mark.parametrize("optimizer, key", [("sgd", "momentum_buffer"), ("adamw", "exp_avg_sq")])
def test_the_optimisers_state_lies_in_memory_as_its_weights_also_after_it_was_read_again(optimizer, key, tmp_path):
    # Another layout would take other routines, with other last bits.
    chosen = decide(optimizer=optimizer, momentum=0.9)
    list(begin(chosen, tmp_path, layout=Layout("float32", True)).run())
    again = begin(chosen, tmp_path, layout=Layout("float32", True))
    weight = again.model.backbone.second.weight
    assert weight.stride() != torch.empty(weight.shape).stride()
    assert again.optimizer.state[weight][key].stride() == weight.stride()


MUCH = {"optimizer": "adamw", "learning_rate": 0.01, "ema": 0.8, "mixup": 0.5, "schedule": "cosine"}


@functools.cache
def live_much():
    return live_once(decide(**MUCH))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, RECORDS), max_size=3), st.sampled_from([0.0, 5.0]))
def test_wherever_it_was_killed_and_however_often_it_is_the_same_run(tmp_path_factory, lives, minutes):
    chosen = decide(checkpoint_minutes=minutes, **MUCH)
    assert_same_end(live(chosen, tmp_path_factory.mktemp("killed"), lives), live_much())


def test_checkpoints_in_0_minutes_are_after_every_step_and_else_after_every_epoch(tmp_path):
    for minutes in (0.0, 5.0):
        folder = tmp_path / str(minutes)
        folder.mkdir()
        saved = []
        for _ in begin(decide(checkpoint_minutes=minutes), folder).run():
            kept = checkpoints.read(folder)
            saved.append((kept.facts["state"]["epoch"], kept.facts["state"]["step"]) if kept else None)
        # A record's state is saved when the next one is asked for: then it is written down.
        steps = range(4) if not minutes else (0, 0, 0, 0)
        assert saved == [None, *((epoch, step) for epoch in range(3) for step in steps)]
        kept = checkpoints.read(folder).facts["state"]
        assert (kept["epoch"], kept["step"]) == (3, 0)


def test_minutes_between_checkpoints_are_kept(tmp_path, monkeypatch):
    saved, now = [], itertools.count(0, 30.0)
    monkeypatch.setattr(engine.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(
        checkpoints, "write", lambda folder, checkpoint: saved.append(checkpoint.facts["state"]["step"])
    )
    list(start(build(), decide(epochs=1, batch_size=1, checkpoint_minutes=1.1), folder=tmp_path).run())
    # A clock that is looked at once a step, and once when it is saved, goes on by half a minute each time.
    assert saved == [0, 3, 6, 9, 0]


def test_a_finished_phase_stays_finished_and_gives_its_best_weights_again(tmp_path):
    chosen = decide(momentum=0.9)
    expected = state_of(live(chosen, tmp_path, ())[0].model)
    again = begin(chosen, tmp_path, seed=5)
    assert again.count_left() == 0
    assert list(again.run()) == []
    assert_same_bits(again.model.state_dict(), expected)


def test_what_is_left_is_counted_where_it_goes_on(tmp_path):
    chosen = decide(checkpoint_minutes=0.0)
    for done in (0, 1, 3, 6):
        folder = tmp_path / str(done)
        folder.mkdir()
        running = begin(chosen, folder).run()
        list(itertools.islice(running, done))
        running.close()
        again = begin(chosen, folder)
        announced = again.count_left()
        assert len(list(again.run())) == announced


def test_another_phases_checkpoint_is_left_alone(tmp_path):
    list(start(build(), decide(), folder=tmp_path, phase=0).run())
    model = build(seed=3)
    before = state_of(model)
    training = start(model, decide(), folder=tmp_path, phase=1)
    assert training.state.epoch == -1
    assert_same_bits(state_of(model), before)


@pytest.fixture
def threads():
    """A function that sets with how many threads torch computes, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("then", "now"), [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_going_on_with_another_number_of_threads_is_said(then, now, tmp_path, threads, caplog):
    caplog.set_level("INFO")
    threads(then)
    running = begin(decide(), tmp_path).run()
    list(itertools.islice(running, 6))
    running.close()
    threads(now)
    again = begin(decide(), tmp_path)
    assert again.state.epoch == 1
    told = f"going on with 1 processes of {now} threads instead of 1 processes of {then} threads: the last bits"
    assert (told in caplog.text) == (then != now)
    assert ("the last bits" in caplog.text) == (then != now)


def test_a_checkpoint_that_does_not_say_how_it_was_made_is_gone_on_from(tmp_path):
    running = begin(decide(), tmp_path).run()
    list(itertools.islice(running, 6))
    running.close()
    kept = checkpoints.read(tmp_path)
    facts = {name: value for name, value in kept.facts.items() if name != "made_with"}
    checkpoints.write(tmp_path, checkpoints.Checkpoint(kept.tensors, facts))
    assert begin(decide(), tmp_path).state.epoch == 1


def test_a_damaged_checkpoint_takes_it_back_to_the_one_before(tmp_path, caplog):
    chosen = decide(optimizer="adamw", ema=0.8)
    running = begin(chosen, tmp_path).run()
    list(itertools.islice(running, 10))
    running.close()
    file = tmp_path / checkpoints.NAME
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    training = begin(chosen, tmp_path, seed=4)
    assert training.state.epoch == 1
    assert "damaged" in caplog.text
    list(training.run())
    assert_same_bits(training.model.state_dict(), live_once(chosen)[0].model.state_dict())


def test_a_checkpoint_holds_tensors_and_json_alone(tmp_path):
    live(decide(optimizer="adamw", ema=0.8), tmp_path, (5,))
    kept = checkpoints.read(tmp_path)
    assert json.loads(json.dumps(kept.facts)) == kept.facts
    assert {name.partition(".")[0] for name in kept.tensors} == {"model", "best", "average", "optimizer"}


# Signals


@pytest.fixture
def interruptible():
    """SIGINT and SIGTERM raise KeyboardInterrupt, also in a job in the background, which ignores the first."""
    before = {which: signal.signal(which, signal.default_int_handler) for which in (signal.SIGINT, signal.SIGTERM)}
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


def raise_at_pass(model, number, which, times=1):
    """Let a signal come in the so-many-th forward pass of training."""
    passes = itertools.count(1)

    def hook(*_):
        if model.head.training and next(passes) == number:
            for _ in range(times):
                signal.raise_signal(which)

    model.head.register_forward_hook(hook)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_step_lets_it_end_saves_and_acts(which, tmp_path, interruptible):
    chosen, records = decide(momentum=0.9), {}
    training = begin(chosen, tmp_path)
    raise_at_pass(training.model, 5, which)
    with pytest.raises(KeyboardInterrupt):
        for record in training.run():
            records[key_of(record)] = plain(record)
    kept = checkpoints.read(tmp_path).facts["state"]
    assert (kept["epoch"], kept["step"]) == (1, 2)
    again = begin(chosen, tmp_path, seed=7)
    records |= {key_of(record): plain(record) for record in again.run()}
    assert_same_end((again, records), live_once(chosen))


@pytest.mark.parametrize("at", [1, 2, 4], ids=["the start", "an epoch", "the last epoch"])
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_is_measured_saves_and_acts(which, at, tmp_path, interruptible):
    chosen, records = decide(momentum=0.9, ema=0.5), {}
    training = begin(chosen, tmp_path)
    plainly, calls = training.validate, itertools.count(1)

    def validate(model, check):
        if next(calls) == at:
            signal.raise_signal(which)
        figures = plainly(model, check)
        assert training.signals.came is None  # it acted before that
        return figures

    training.validate = validate
    with pytest.raises(KeyboardInterrupt):
        for record in training.run():
            records[key_of(record)] = plain(record)
    kept = checkpoints.read(tmp_path).facts["state"]
    assert (kept["epoch"], kept["step"]) == ((-1, 0) if at == 1 else (at - 2, 3))
    again = begin(chosen, tmp_path, seed=7)
    records |= {key_of(record): plain(record) for record in again.run()}
    assert_same_end((again, records), live_once(chosen))


@pytest.mark.parametrize("at", [1, 2, 4])
def test_no_epoch_is_lost_to_a_signal_at_the_end_of_its_measurement(at, tmp_path, interruptible):
    chosen, records = decide(), {}
    training = begin(chosen, tmp_path)
    plainly, calls = training.validate, itertools.count(1)

    def validate(model, check):
        figures = plainly(model, check)
        if next(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return figures

    training.validate = validate
    with pytest.raises(KeyboardInterrupt):
        for record in training.run():
            records[key_of(record)] = record
    records |= {key_of(record): record for record in begin(chosen, tmp_path).run()}
    assert len(records) == RECORDS


def test_a_second_signal_acts_at_once(tmp_path, interruptible):
    training = start(build(), decide(), folder=tmp_path)
    raise_at_pass(training.model, 5, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        list(training.run())
    kept = checkpoints.read(tmp_path).facts["state"]
    assert (kept["epoch"], kept["step"]) == (1, 0)


def test_signals_do_afterwards_what_they_did_before(interruptible):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    running = start(build(), decide()).run()
    next(running)
    list(running)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    stopped = start(build(), decide()).run()
    for _ in range(7):
        next(stopped)
        assert signal.getsignal(signal.SIGINT) is not before[0]  # it is heeded all the time
    stopped.close()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_training_works_in_a_thread_where_signals_cannot_be_handled():
    model, expected, failed = build(), build(), []

    def run():
        try:
            list(start(model, decide()).run())
        except BaseException as error:
            failed.append(error)

    training = start(expected, decide())
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    list(training.run())
    assert not failed
    assert_same_bits(model.state_dict(), expected.state_dict())


# Odd numbers of pictures


def test_an_epoch_may_end_with_one_picture():
    model, reference, material = build(), build(), make_material(9)
    list(start(model, decide(), material).run())
    train_plainly(reference, material, torch.optim.SGD(reference.parameters(), 0.05), 3, 4)
    assert_near(model.state_dict(), reference.state_dict())


@pytest.mark.parametrize("changes", [{}, {"batch_norm": "frozen", "head": "batch-norm"}])
def test_an_epoch_may_end_with_one_picture_also_with_a_batch_norm_over_features(changes):
    model = build()
    model.head = nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, CLASSES))
    steps, epochs = steps_and_epochs(start(model, decide(**changes), make_material(9)).run())
    assert len(epochs) == 4
    assert [step.pictures for step in steps] == [4, 8, 9] * 3  # whatever keeps the last one company does not count


def test_the_model_given_is_the_model_trained():
    model = build()
    training = start(model, decide(epochs=1))
    before = copy.deepcopy(model)
    list(training.run())
    assert training.model is model
    assert not torch.equal(before.head.weight, model.head.weight)
