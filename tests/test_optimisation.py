"""Which parameters learn, at which rates, and how rates move: against torch's own schedulers and optimisers."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from headstart.blocks import find_blocks
from headstart.config import EngineConfig
from headstart.engine import Adapted
from headstart.errors import UsageError
from headstart.optimisation import (
    Parts,
    divide,
    group_parameters,
    make_optimizer,
    momentum_at,
    own_parameters,
    rate_at,
    set_rates,
)
from headstart.plan import EPOCHS, Situation, settle

bounded = settings(max_examples=40, deadline=None)

DECIDED = EngineConfig(epochs=4, batch_size=4, learning_rate=1e-2, layer_decay=0.5, loss="cross-entropy")
# The modules of each block of `make_model`, which are called by the names of their convolutions, and of the head.
MODULES = {"0": ("0", "1", "2"), "3": ("3", "4"), "5": ("5", "6", "7"), "head": ("head",)}


def decided(**changed):
    return EngineConfig(**{**vars(DECIDED), **changed})


def make_model(head=None):
    """Three convolutions with what follows them, and a head."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    body += [nn.Conv2d(4, 5, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Adapted(nn.Sequential(*body).eval(), head or nn.Linear(5, 3))


def parts_of(model, chosen):
    return divide(model, find_blocks(model.backbone, 4), chosen)


def grouped(model, chosen):
    return group_parameters(model, parts_of(model, chosen), chosen)


def names_in(model, groups):
    """The names of the parameters in groups, of which none may come twice."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert len(found) == len(set(found))
    return set(found)


def names_below(model, blocks):
    """The names of the parameters of some blocks, as the test's own table says."""
    prefixes = [f"{'' if block == 'head' else 'backbone.'}{module}." for block in blocks for module in MODULES[block]]
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes))}


# Schedules, over whole runs


def run_of(chosen, steps_per_epoch):
    """(rate, momentum or first beta) at every step of a run, as the optimiser has them."""
    optimizer = make_optimizer([{"params": [nn.Parameter(torch.zeros(1))], "highest": chosen.learning_rate}], chosen)
    found = []
    for step in range(steps_per_epoch * chosen.epochs):
        set_rates(optimizer, step, steps_per_epoch, chosen)
        found.append(state_of(optimizer))
    return found


def state_of(optimizer):
    group = optimizer.param_groups[0]
    return group["lr"], group["betas"][0] if "betas" in group else group["momentum"]


def run_of_torch(chosen, steps, make_scheduler, every=1):
    """The same by a scheduler of torch's, which takes a step at each of `every` steps."""
    parameter = nn.Parameter(torch.zeros(1))
    if chosen.optimizer == "sgd":
        optimizer = torch.optim.SGD([parameter], chosen.learning_rate, momentum=chosen.momentum)
    else:
        optimizer = torch.optim.AdamW([parameter], chosen.learning_rate)
    scheduler, found = make_scheduler(optimizer), []
    for step in range(1, steps + 1):
        found.append(state_of(optimizer))
        optimizer.step()
        if step % every == 0 and step < steps:
            scheduler.step()
    return found


def nearly(values):
    return [pytest.approx(value, rel=1e-6, abs=1e-12) for value in values]


@bounded
@given(st.integers(1, 8), st.integers(1, 15), st.sampled_from(["sgd", "adam", "adamw"]))
@example(1, 1, "sgd")
@example(1, 2, "sgd")
@example(1, 3, "adam")
@example(10, 142, "adam")
def test_one_cycle_is_torchs_with_its_momentum(epochs, steps, optimizer):
    chosen, total = decided(schedule="one-cycle", epochs=epochs, optimizer=optimizer), epochs * steps
    expected = run_of_torch(chosen, total, lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=total))
    assert run_of(chosen, steps) == nearly(expected)


@bounded
@given(st.integers(1, 12), st.integers(1, 7), st.integers(1, 5), st.sampled_from([0.1, 0.5, 0.9, 1.0]))
@example(25, 61, 7, 0.1)
def test_steps_are_torchs(epochs, steps, step_epochs, factor):
    chosen = decided(
        schedule="step", epochs=epochs, step_epochs=step_epochs, step_factor=factor, optimizer="sgd", momentum=0.8
    )
    make = lambda optimizer: lr_scheduler.StepLR(optimizer, step_epochs, factor)  # noqa: E731
    assert run_of(chosen, steps) == nearly(run_of_torch(chosen, epochs * steps, make, every=steps))


@bounded
@given(st.integers(1, 6), st.integers(1, 9))
def test_one_cycle_leaves_sgd_without_momentum_without_it(epochs, steps):
    chosen, total = decided(schedule="one-cycle", epochs=epochs, optimizer="sgd", momentum=0.0), epochs * steps
    make = lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=total, cycle_momentum=False)  # noqa: E731
    assert run_of(chosen, steps) == nearly(run_of_torch(chosen, total, make))
    assert {momentum for _, momentum in run_of(chosen, steps)} == {0.0}


@bounded
@given(st.integers(1, 8), st.integers(1, 9), st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 5.0]))
def test_cosine_is_a_linear_rise_and_torchs_cosine(epochs, steps, warmup):
    chosen, total = decided(schedule="cosine", epochs=epochs, warmup_epochs=warmup), epochs * steps
    rising = int(min(warmup, epochs / 2) * steps)  # it rises in at most half of the run
    expected = []
    if rising:
        first = 1 / (rising + 1)
        make = lambda o: lr_scheduler.LinearLR(o, first, 1.0, rising)  # noqa: E731
        expected += run_of_torch(chosen, rising, make)
    if total > rising:
        expected += run_of_torch(chosen, total - rising, lambda o: lr_scheduler.CosineAnnealingLR(o, total - rising))
    assert run_of(chosen, steps) == nearly(expected)


def test_a_constant_rate_is_one():
    assert run_of(decided(schedule="constant", optimizer="sgd", momentum=0.3), 5) == [(1e-2, 0.3)] * 20


@bounded
@given(st.sampled_from(["one-cycle", "cosine", "step", "constant"]), st.integers(1, 8), st.integers(1, 12))
def test_no_rate_is_ever_over_the_highest_or_under_nothing(schedule, epochs, steps):
    chosen = decided(schedule=schedule, epochs=epochs)
    shares = [rate_at(step, steps, chosen) for step in range(epochs * steps)]
    assert all(0 < share <= 1 for share in shares)
    momenta = [momentum_at(step, steps, chosen) for step in range(epochs * steps)]
    if schedule == "one-cycle":
        assert all(0.85 - 1e-9 <= momentum <= 0.95 + 1e-9 for momentum in momenta)
    else:
        assert momenta == [None] * len(momenta)


def test_a_rate_falls_to_the_floor_and_no_further():
    chosen = decided(
        schedule="step", epochs=99, step_epochs=2, step_factor=0.9, learning_rate=1e-3, least_rate=1e-5, optimizer="sgd"
    )
    rates = [rate for rate, _ in run_of(chosen, 1)]
    assert rates == pytest.approx([max(1e-3 * 0.9 ** (epoch // 2), 1e-5) for epoch in range(99)])
    assert rates[-1] == 1e-5 < rates[80]


def test_the_floor_raises_no_rate_over_its_highest():
    chosen = decided(schedule="constant", least_rate=1e-3)
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "highest": highest} for highest in (1e-2, 1e-4)]
    optimizer = make_optimizer(groups, chosen)
    set_rates(optimizer, 0, 1, chosen, share=1e-6)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-4]


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "step", "constant"])
def test_a_given_share_stands_for_what_the_schedule_says(schedule):
    chosen = decided(schedule=schedule, optimizer="sgd")
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "highest": highest} for highest in (1.0, 0.1)]
    optimizer = make_optimizer(groups, chosen)
    set_rates(optimizer, 3, 10, chosen, share=0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.025]


# Rates by depth


@pytest.mark.parametrize("decay", [1.0, 0.75, 0.1])
def test_a_block_has_the_next_ones_rate_times_the_decay(decay):
    parts = parts_of(make_model(), decided(layer_decay=decay))
    assert parts.names == ("0", "3", "5", "head")
    assert parts.rates[-1] == 1e-2
    for lower, upper in itertools.pairwise(parts.rates):
        assert lower == pytest.approx(upper * decay)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ("3=7e-4", (1.25e-3, 7e-4, 5e-3, 1e-2)),
        ("head=5e-2,0=0", (0.0, 2.5e-3, 5e-3, 5e-2)),
        ("0=1e-2,3=1e-2,5=1e-2,head=1e-3", (1e-2, 1e-2, 1e-2, 1e-3)),
    ],
)
def test_rates_that_are_named_stand_in_place_of_those_by_depth(rates, expected):
    assert parts_of(make_model(), decided(rates=rates)).rates == pytest.approx(expected)


@pytest.mark.parametrize("strategy", EPOCHS)
def test_what_is_new_learns_faster_than_what_is_pretrained_unless_it_is_told_otherwise(strategy):
    # The mistake: body at 1e-2, new head at 1e-3.
    situation = Situation("single", 3, 300, 50, 40, 5, "cpu", "float32")
    rates = parts_of(make_model(), settle(situation, strategy, EngineConfig())).rates
    if strategy == "scratch":
        assert len(set(rates)) == 1  # all is new
    else:
        assert all(lower < upper for lower, upper in itertools.pairwise(rates))


def test_a_head_of_several_layers_is_one_part():
    model = make_model(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 3))))
    parts = parts_of(model, decided())
    assert parts.names[-1] == "head"
    expected = {name for name, _ in model.named_parameters() if name.startswith("head.")}
    assert len(expected) == 6 and set(own_parameters(model, parts.modules[-1])) == expected


def test_a_head_on_features_is_the_only_part():
    model = Adapted(nn.Identity(), nn.Linear(5, 3))
    parts = divide(model, (), decided(freeze="all"))
    assert parts == Parts(("head",), (("head",),), (1e-2,), 0)
    assert names_in(model, group_parameters(model, parts, decided())) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("settings", [{"freeze": "layer9"}, {"freeze": "4"}, {"rates": "layer9=1e-3"}])
def test_names_of_no_block_are_refused(settings):
    with pytest.raises(UsageError, match=r"Blocks: 0, 3, 5"):
        parts_of(make_model(), decided(**settings))


class HeadInside(nn.Module):
    """A backbone with a pretrained layer that is called head, as some of timm's have."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)

    def forward(self, pixels):
        return self.head(self.stem(pixels)).mean((2, 3))


def test_a_rate_for_the_head_is_not_given_to_a_pretrained_block_of_that_name():
    model = Adapted(HeadInside().eval(), nn.Linear(5, 3))
    parts = parts_of(model, decided(rates="head=1e-1"))
    assert len(set(parts.names)) == len(parts.names) == 3
    assert parts.rates == pytest.approx((2.5e-3, 5e-3, 1e-1))


# Which parameters learn


@pytest.mark.parametrize(
    ("frozen", "unfreeze_epochs", "expected"),
    [
        (0, 0, ["1111"] * 5),
        (2, 0, ["0011"] * 5),
        (3, 0, ["0001"] * 5),
        (3, 1, ["0001", "0011", "0111", "1111", "1111"]),
        (3, 2, ["0001", "0001", "0011", "0011", "0111"]),
        (1, 3, ["0111", "0111", "0111", "1111", "1111"]),
    ],
)
def test_frozen_blocks_stand_still_and_thaw_from_the_head_down(frozen, unfreeze_epochs, expected):
    parts = Parts(("a", "b", "c", "head"), ((),) * 4, (1e-4, 1e-3, 1e-2, 1e-1), frozen)
    found = [parts.trained(epoch, unfreeze_epochs) for epoch in range(5)]
    assert ["".join(str(int(trained)) for trained in row) for row in found] == expected


def test_a_part_with_the_rate_nothing_is_never_trained():
    parts = Parts(("a", "b", "head"), ((),) * 3, (0.0, 1e-3, 0.0), 2)
    assert [parts.trained(epoch, 1) for epoch in range(3)] == [
        (False, False, False),
        (False, True, False),
        (False, True, False),
    ]


@pytest.mark.parametrize("settings", [{"freeze": "all"}, {"freeze": "3"}, {"rates": "0=0,3=0,5=0"}])
def test_in_the_frozen_stage_the_optimiser_is_given_the_head_alone(settings):
    # The mistake: the optimiser is given all parameters in the frozen stage.
    model = make_model()
    optimizer = make_optimizer(grouped(model, decided(**settings)), decided(**settings))
    assert names_in(model, optimizer.param_groups) == {"head.weight", "head.bias"}


@bounded
@given(st.integers(0, 3), st.integers(0, 4), st.integers(1, 6), st.sets(st.sampled_from(["0", "3", "5"])))
def test_the_optimiser_is_given_what_is_trained_in_any_epoch(frozen, unfreeze_epochs, epochs, without):
    assume(not unfreeze_epochs or epochs % unfreeze_epochs)  # the test below is of these
    model = make_model()
    rates = ",".join(f"{name}=0" for name in without)
    chosen = decided(freeze=str(frozen), unfreeze_epochs=unfreeze_epochs, epochs=epochs, rates=rates)
    trained = {"head"}
    for epoch in range(epochs):
        thawed = epoch // unfreeze_epochs if unfreeze_epochs else 0
        trained |= set(["0", "3", "5"][max(0, frozen - thawed) :]) - without
    assert names_in(model, grouped(model, chosen)) == names_below(model, trained)


def test_a_block_that_would_thaw_after_the_last_epoch_is_not_given_to_the_optimiser():
    model, chosen = make_model(), decided(freeze="all", unfreeze_epochs=2, epochs=4)
    ever = {name for epoch in range(4) for name in trained_names(model, chosen, epoch)}
    assert ever == names_below(model, {"5", "head"})
    assert names_in(model, grouped(model, chosen)) == ever


def trained_names(model, chosen, epoch):
    parts = parts_of(model, chosen)
    trained = parts.trained(epoch, chosen.unfreeze_epochs)
    return [
        name
        for modules, is_it in zip(parts.modules, trained, strict=True)
        if is_it
        for name in own_parameters(model, modules)
    ]


def test_settings_that_leave_nothing_to_train_are_refused():
    model, chosen = make_model(), decided(freeze="all", rates="head=0")
    with pytest.raises(UsageError):
        make_optimizer(grouped(model, chosen), chosen)


# Weight decay


def decay_by_name(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


def test_norms_and_biases_do_not_decay():
    model = make_model(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)))
    model.backbone.register_parameter("scale", nn.Parameter(torch.ones(())))
    found = decay_by_name(model, grouped(model, decided(weight_decay=0.3)))
    assert found.keys() == {name for name, _ in model.named_parameters()}
    matrices = {"backbone.0.weight", "backbone.3.weight", "backbone.5.weight", "head.1.weight"}
    assert found == {name: 0.3 if name in matrices else 0.0 for name in found}


def test_all_decays_where_that_is_asked_for():
    model = make_model()
    found = decay_by_name(model, grouped(model, decided(weight_decay=0.3, decay_all=True)))
    assert found == dict.fromkeys((name for name, _ in model.named_parameters()), 0.3)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_without_gradients_weights_shrink_by_rate_times_decay_and_norms_and_biases_stay(name):
    model, chosen = make_model(), decided(optimizer=name, weight_decay=0.3, schedule="constant", momentum=0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(grouped(model, chosen), chosen)
    set_rates(optimizer, 0, 10, chosen)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    rates = {"backbone.0.weight": 1.25e-3, "backbone.3.weight": 2.5e-3, "backbone.5.weight": 5e-3, "head.weight": 1e-2}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (1 - 0.3 * rates.get(name, 0.0)))


# The optimiser


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_the_named_optimiser_is_torchs_and_begins_at_the_highest_rates(name, kind):
    chosen = decided(optimizer=name, momentum=0.7)
    optimizer = make_optimizer(grouped(make_model(), chosen), chosen)
    assert type(optimizer) is kind
    assert all(group["lr"] == group["highest"] for group in optimizer.param_groups)
    assert all(group.get("momentum", 0.7) == 0.7 for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("schedule", ["one-cycle", "constant"])
def test_whole_runs_end_with_the_weights_of_plain_torch(name, schedule):
    chosen = decided(optimizer=name, schedule=schedule, weight_decay=0.1, epochs=2, decay_all=True, momentum=0.9)
    ours = make_model()
    theirs = copy.deepcopy(ours)
    optimizer = make_optimizer(grouped(ours, chosen), chosen)
    rates = {"0": 1.25e-3, "1": 1.25e-3, "3": 2.5e-3, "4": 2.5e-3, "5": 5e-3}
    groups = [{"params": [*theirs.backbone[int(place)].parameters()], "lr": rate} for place, rate in rates.items()]
    groups.append({"params": [*theirs.head.parameters()], "lr": 1e-2})
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    reference = kinds[name](groups, weight_decay=0.1, **({"momentum": 0.9} if name == "sgd" else {}))
    scheduler = None
    if schedule == "one-cycle":
        scheduler = lr_scheduler.OneCycleLR(reference, [group["lr"] for group in groups], total_steps=10)
    pictures = torch.randn(10, 6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for step in range(10):
        set_rates(optimizer, step, 5, chosen)
        for model, its in ((ours, optimizer), (theirs, reference)):
            its.zero_grad()
            nn.functional.cross_entropy(model(pictures[step]), torch.arange(6) % 3).backward()
            its.step()
        if scheduler is not None and step < 9:
            scheduler.step()
    for (name, mine), its in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6, msg=name)
