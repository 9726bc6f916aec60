import dataclasses
import itertools
import json
import subprocess
import sys

import pytest

from headstart import config as configs
from headstart import heads, plan
from headstart.config import EngineConfig, RunConfig, resolve
from headstart.errors import UsageError
from headstart.plan import (
    COMPARABLE,
    EPOCHS,
    KNN_VECTORS,
    LAYER_DECAY,
    RATES,
    FitHead,
    Layout,
    Pace,
    Situation,
    Timing,
    Train,
    choose_batch_size,
    decide,
    settle,
)
from headstart.strategies import needs_features, trains
from headstart.verdicts import FINAL, VIEW_SETS, Evidence, Variant

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
ALL = ("logistic", "svm", "means", "blend", "knn")
DEPTHS = {("early", FINAL): 0.2, (FINAL,): 0.3}  # log-losses


def situation(**facts):
    return dataclasses.replace(USUAL, **facts)


def test_the_kinds_of_heads_that_are_planned_are_those_that_can_be_fitted():
    assert plan.HEADS == heads.KINDS
    assert set(heads.BLENDED) < set(plan.DEEP_HEADS) < set(plan.LINEAR_HEADS) < set(plan.HEADS)


def reasons(plan):
    return "; ".join(plan.reasons)


@pytest.mark.parametrize(
    ("facts", "settings", "heads", "folds", "words"),
    [
        ({}, {}, ALL, 5, ["strategy auto: probe", "bfloat16 on cpu"]),
        ({}, {"strategy": "probe"}, ALL, 5, ["strategy probe: as set"]),
        ({"folds": 3, "smallest_class": 3}, {}, ALL, 3, ["3 folds instead of 5", "smallest class has 3"]),
        ({"folds": 10}, {"folds": 10}, ALL, 10, []),
        ({"pictures": COMPARABLE}, {}, ALL, 5, []),
        ({"pictures": COMPARABLE - 1}, {}, ("blend",), 5, [f"fewer than {COMPARABLE}, are too few"]),
        ({"pictures": 20}, {"heads": "knn,means"}, ("knn", "means"), 5, ["heads knn, means: as set"]),
        ({"pictures": KNN_VECTORS}, {}, ALL, 5, []),
        ({"pictures": KNN_VECTORS + 1}, {}, ALL[:4], 5, [f"{KNN_VECTORS + 1} pictures", "no kNN"]),
        ({"pictures": 10_000, "classes": 300}, {}, ALL, 5, []),
        ({"pictures": 10_000, "classes": 400}, {}, ("means",), 5, ["of 10000 pictures and 400 classes the others"]),
        ({"pictures": 2_000, "classes": 1_000}, {}, ALL, 5, []),
        ({"pictures": 100_000, "classes": 200}, {}, ("means",), 5, ["would take long"]),
        ({"pictures": 10_000, "classes": 400}, {"heads": "svm"}, ("svm",), 5, ["heads svm: as set"]),
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
    ("settings", "heads", "words"),
    [
        ({}, ("logistic", "means", "blend"), "heads logistic, means, blend: on features of other depths"),
        ({"heads": "svm,logistic"}, ("svm", "logistic"), "heads svm, logistic: as set"),
        ({"heads": "knn"}, ("knn",), "heads knn: as set"),
    ],
)
def test_on_other_depths_fewer_heads_compete_unless_they_are_set(settings, heads, words):
    early, final = (Variant(taps, ("plain",), "logistic", loss, 0.9, 0.8, 0.95, 300) for taps, loss in DEPTHS.items())
    plan = decide(situation(evidence=Evidence((early, final), (), None)), resolve(None, settings))
    assert (plan.phases[0].taps, plan.phases[0].heads) == (("early", FINAL), heads)
    assert words in reasons(plan)


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ({}, ("pad", 160)),  # as it is
        ({("pad", 160): 0.30, ("squash", 160): 0.20, ("squash", 224): 0.19}, ("squash", 224)),
        ({("pad", 160): 0.30, ("squash", 160): 0.20, ("squash", 224): 0.199}, ("squash", 160)),
        ({("pad", 160): 0.30, ("squash", 160): 0.298, ("pad", 224): 0.25}, ("pad", 224)),
        ({("pad", 160): 0.30, ("squash", 160): 0.40, ("pad", 224): 0.50}, ("pad", 160)),
    ],
)
def test_the_geometry_is_the_cheapest_but_for_what_others_gain(losses, chosen):
    found = tuple(
        Variant((FINAL,), ("plain",), "means", loss, 0.9, 0.8, 0.95, 300, fit, size)
        for (fit, size), loss in losses.items()
    )
    final = Variant((FINAL,), ("plain",), "means", 0.3, 0.9, 0.8, 0.95, 300)
    facts = {"evidence": Evidence((final,), (), None, geometries=found), "fit": "pad", "size": 160}
    plan = decide(situation(**facts), RunConfig())
    assert (plan.phases[0].fit, plan.phases[0].size) == chosen
    assert (f"{chosen[0]} {chosen[1]} is taken" in reasons(plan)) == bool(losses)


def test_the_time_that_training_takes_is_foreseen():
    plan = training({"strategy": "finetune", "epochs": 5})
    assert "5 epochs of 300 pictures: about 30 s" in reasons(plan)  # at 0.02 s for each


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize(("name", "pictures"), [("mirror", KNN_VECTORS // 2), ("all", KNN_VECTORS // 4)])
def test_each_view_of_a_picture_is_a_vector_that_neighbours_would_hold(name, pictures, found):
    plain, best = (
        Variant((FINAL,), views, "logistic", loss, 0.9, 0.8, 0.95, pictures)
        for views, loss in ((VIEW_SETS["plain"], 0.3), (VIEW_SETS[name], 0.2))
    )
    facts = {"evidence": Evidence((plain,), (plain, best), None)} if found else {}
    config = resolve(None, {} if found else {"strategy": "probe", "views": name})
    kept, dropped = (decide(situation(pictures=count, **facts), config) for count in (pictures, pictures + 1))
    assert [plan.phases[0].views for plan in (kept, dropped)] == [VIEW_SETS[name]] * 2
    assert (kept.phases[0].heads, dropped.phases[0].heads) == (ALL, ALL[:4])
    assert f"{pictures + 1} pictures for training in {len(VIEW_SETS[name])} views" in reasons(dropped)
    assert "no kNN" not in reasons(kept)


@pytest.mark.parametrize(
    ("facts", "silent"),
    [
        ({}, "instead of"),
        ({}, "kNN"),
        ({}, "several labels"),
        ({}, "select pictures"),
        ({"pictures": KNN_VECTORS}, "kNN"),
        ({"task": "multi", "pictures": 10**6}, "no kNN"),
    ],
)
def test_no_reason_is_given_for_what_was_not_decided(facts, silent):
    assert silent not in reasons(decide(situation(**facts), RunConfig()))


def test_fewer_folds_are_not_laid_on_a_class_that_is_large_enough():
    # Groups that must not part can allow fewer folds than the smallest class has pictures.
    assert "the smallest class has 40" not in reasons(decide(situation(folds=3, smallest_class=40), RunConfig()))
    # Nor has one of fewer a say, which is one group and never held out.
    assert "the smallest class has 2" not in reasons(decide(situation(folds=4, smallest_class=2), RunConfig()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_number_format_that_was_set_is_not_called_the_fastest(precision):
    plan = decide(situation(precision=precision), resolve(None, {"precision": precision}))
    assert "fastest" not in reasons(plan)
    assert f"{precision} on cpu" in reasons(plan)


def test_a_plan_depends_on_nothing_but_its_arguments():
    assert decide(USUAL, RunConfig()) == decide(USUAL, RunConfig())


def test_nothing_in_a_plan_is_left_to_be_decided_and_it_is_json():
    values = json.loads(json.dumps(decide(USUAL, RunConfig()).to_json()))
    assert values["phases"] == [
        {
            "heads": list(ALL),
            "folds": 5,
            "taps": ["final"],
            "views": ["plain"],
            "fit": "crop",
            "size": 224,
            "phase": "fit_head",
        }
    ]
    assert "auto" not in {values["strategy"], values["device"], values["precision"]}
    assert all(values["reasons"])


def test_a_plan_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        decide(USUAL, RunConfig()).device = "cuda"


# Training by gradient

LAYOUT = Layout("float32", channels_last=False)
TRAINING = dataclasses.replace(USUAL, select=45, timing=Timing((Pace(LAYOUT, 0.02),)))
PROBE_WITH_MLP = {"strategy": "probe", "head": "mlp"}
TRAINED = [{"strategy": name} for name in ("finetune", "lp-ft", "two-stage", "scratch")] + [PROBE_WITH_MLP]


def training(settings, **facts):
    return decide(dataclasses.replace(TRAINING, **facts), resolve(None, settings))


def values_in(content):
    """Every value in nested JSON with the name that it stands under."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield name, value
            yield from values_in(value)
    elif isinstance(content, list):
        for value in content:
            yield from values_in(value)


@pytest.mark.parametrize(
    ("settings", "strategy", "phases"),
    [
        ({"strategy": "finetune"}, "finetune", ["train pretrained pictures"]),
        ({"strategy": "lp-ft"}, "lp-ft", ["fit_head", "train pretrained pictures"]),
        ({"strategy": "two-stage"}, "two-stage", ["train pretrained pictures"] * 2),
        ({"strategy": "scratch"}, "scratch", ["train random pictures"]),
        (PROBE_WITH_MLP, "probe", ["train pretrained features"]),
        ({"head": "batch-norm"}, "probe", ["train pretrained features"]),
        ({"strategy": "finetune", "freeze": "all"}, "finetune", ["train pretrained pictures"]),
        ({"strategy": "finetune", "freeze": "all", "augment": "none"}, "finetune", ["train pretrained features"]),
        (
            {"strategy": "lp-ft", "freeze": "all", "augment": "none"},
            "lp-ft",
            ["fit_head", "train pretrained features"],
        ),
        (
            {"strategy": "finetune", "freeze": "all", "augment": "none", "unfreeze_epochs": 2},
            "finetune",
            ["train pretrained pictures"],
        ),
        (
            {"strategy": "finetune", "freeze": "all", "augment": "none", "mixup": 0.2},
            "finetune",
            ["train pretrained pictures"],
        ),
        (
            {"strategy": "two-stage", "freeze": "all", "augment": "none"},
            "two-stage",
            ["train pretrained pictures"] * 2,
        ),
    ],
)
def test_a_strategy_is_its_phases(settings, strategy, phases):
    plan = training(settings)
    words = [
        f"{phase.phase} {phase.start} {phase.on}" if isinstance(phase, Train) else phase.phase for phase in plan.phases
    ]
    assert (plan.strategy, words) == (strategy, phases)
    assert plan.trains and all(phase.layout == LAYOUT for phase in plan.phases if isinstance(phase, Train))


@pytest.mark.parametrize("task", ["single", "multi"])
def test_the_head_that_is_fitted_before_fine_tuning_is_a_linear_one(task):
    head, _ = training({"strategy": "lp-ft"}, task=task, pictures=KNN_VECTORS + 1).phases
    assert head.heads == (("logistic",) if task == "multi" else ("logistic", "svm", "means", "blend"))
    assert "kNN" not in reasons(training({"strategy": "lp-ft"}, pictures=KNN_VECTORS + 1))


def test_two_stages_are_the_head_alone_by_adam_and_then_what_the_settings_say():
    given = {"strategy": "two-stage", "optimizer": "sgd", "schedule": "step", "freeze": "layer1", "unfreeze_epochs": 1}
    given |= {"head_epochs": 3, "head_rate": 0.02, "rates": "layer4=0", "find_lr": True, "weight_decay": 0.1}
    first, last = (phase.settings for phase in training(given).phases)
    assert (first.epochs, first.optimizer, first.learning_rate, first.schedule) == (3, "adam", 0.02, "constant")
    assert (first.freeze, first.unfreeze_epochs, first.rates, first.find_lr) == ("all", 0, "", False)
    assert last == settle(TRAINING, "two-stage", resolve(None, given).engine)
    assert (last.freeze, last.unfreeze_epochs, last.rates, last.find_lr) == ("layer1", 1, "layer4=0", True)
    same = {"batch_size", "accumulate", "head", "hidden", "dropout", "loss", "augment", "symmetry", "best_by"}
    assert all(getattr(first, name) == getattr(last, name) for name in same)


@pytest.mark.parametrize("strategy", EPOCHS)
@pytest.mark.parametrize("task", ["single", "multi"])
def test_what_was_left_open_is_settled_by_strategy_and_task(strategy, task):
    found = settle(dataclasses.replace(TRAINING, task=task), strategy, EngineConfig())
    assert (found.epochs, found.learning_rate) == (EPOCHS[strategy], RATES[strategy])
    assert found.batch_size == choose_batch_size(TRAINING.pictures)
    assert found.layer_decay == (1.0 if strategy == "scratch" else LAYER_DECAY)
    assert found.batch_norm == ("train" if strategy == "scratch" else "frozen")
    assert found.loss == ("bce-with-logits" if task == "multi" else "cross-entropy")


GIVEN = {
    "epochs": 3,
    "batch_size": 17,
    "learning_rate": 0.123,
    "layer_decay": 0.9,
    "loss": "focal",
    "batch_norm": "train",
    "augment": "RandomHorizontalFlip",
}


@pytest.mark.parametrize("strategy", EPOCHS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_was_set_stays_as_it_was_set(strategy, optimizer):
    given = EngineConfig(**GIVEN, optimizer=optimizer)
    assert settle(TRAINING, strategy, given) == given


@pytest.mark.parametrize("strategy", EPOCHS)
def test_sgd_takes_ten_times_the_rate_of_adam(strategy):
    adam, sgd = (settle(TRAINING, strategy, EngineConfig(optimizer=name)) for name in ("adam", "sgd"))
    assert sgd.learning_rate == pytest.approx(10 * adam.learning_rate)


@pytest.mark.parametrize("settings", TRAINED)
@pytest.mark.parametrize("task", ["single", "multi"])
def test_nothing_in_a_plan_to_train_is_auto_or_zero_for_by_strategy(settings, task):
    by_strategy = {name for name, known in configs.settings("engine").items() if known.help.find("(0: by strategy") > 0}
    assert by_strategy == {"epochs", "learning_rate", "layer_decay"}
    found = list(values_in(json.loads(json.dumps(training(settings, task=task).to_json()))))
    assert {name for name, _ in found} >= by_strategy | {"batch_size"}
    assert all(value for name, value in found if name in by_strategy | {"batch_size"})
    assert not [name for name, value in found if value == "auto"]


@pytest.mark.parametrize("symmetry", configs.AUTOMATIC_AUGMENT)
@pytest.mark.parametrize("strategy", EPOCHS)
def test_the_augmentation_of_a_plan_is_written_out_and_can_be_carried_out(strategy, symmetry):
    from headstart.augmentation import parse

    found = settle(TRAINING, strategy, EngineConfig(symmetry=symmetry)).augment
    flips = {"none": 0, "mirror": 1, "any": 2}[symmetry]
    assert (found == "none") == (strategy == "probe")
    assert found.count("Flip") == (0 if strategy == "probe" else flips)
    assert len(parse(found, symmetry, 64).steps) == (0 if strategy == "probe" else 1 + flips + (symmetry == "any"))


@pytest.mark.parametrize("settings", TRAINED)
def test_a_plan_to_train_comes_back_from_its_json(settings):
    plan = training(settings)
    values = json.loads(json.dumps(plan.to_json()))
    phases = []
    for phase in values["phases"]:
        if phase["phase"] == "fit_head":
            phases.append(FitHead(tuple(phase["heads"]), phase["folds"]))
        else:
            made = {"settings": EngineConfig(**phase["settings"]), "layout": Layout(**phase["layout"])}
            made["views"] = tuple(phase["views"])
            phases.append(Train(**{**phase, **made}))
    assert tuple(phases) == plan.phases
    assert (values["strategy"], tuple(values["reasons"])) == (plan.strategy, plan.reasons)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"strategy": "finetune"},
            ["strategy finetune: as set", "10 epochs by log_loss on 45 select", "adamw, learning rate 0.0003, 32 a"],
        ),
        ({"strategy": "finetune"}, ["training in float32, channels first"]),
        ({"strategy": "two-stage", "head_epochs": 2}, ["first the head alone: 2 epochs by adam at 0.001"]),
        (PROBE_WITH_MLP, ["only the head is trained", "on features, computed once"]),
        ({"head": "mlp"}, ["strategy auto: probe"]),
        ({"strategy": "scratch", "epochs": 7, "best_by": "accuracy"}, ["7 epochs by accuracy on 45 select"]),
    ],
)
def test_a_plan_to_train_says_why(settings, words):
    assert all(word in reasons(training(settings)) for word in words)


@pytest.mark.parametrize(
    ("facts", "settings", "subject", "remedy"),
    [
        ({"task": "multi"}, {"strategy": "finetune", "loss": "cross-entropy"}, "loss", "bce-with-logits"),
        ({"task": "multi"}, {"strategy": "lp-ft", "loss": "nll"}, "loss", "bce-with-logits"),
        ({}, {"strategy": "lp-ft", "head": "mlp"}, "strategy", "two-stage"),
        ({}, {"strategy": "lp-ft", "head": "batch-norm"}, "strategy", "two-stage"),
        ({}, {**PROBE_WITH_MLP, "mixup": 0.2}, "mixup", "Give --strategy"),
        ({}, {**PROBE_WITH_MLP, "cutmix": 1.0}, "cutmix", "Give --strategy"),
        ({}, {"strategy": "scratch", "freeze": "layer1"}, "freeze", "another --strategy"),
        ({}, {"strategy": "scratch", "freeze": "all"}, "freeze", "another --strategy"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_what_to_do(facts, settings, subject, remedy):
    with pytest.raises(UsageError) as caught:
        training(settings, **facts)
    assert caught.value.subject == subject and remedy in caught.value.remedy and caught.value.exit_status == 2


# Settings that have an effect beside others only: (settings without it, settings with it).
IDLE = {
    "momentum": ({"optimizer": "adamw", "momentum": 0.5}, {"optimizer": "sgd", "momentum": 0.5}),
    "warmup_epochs": ({"schedule": "one-cycle", "warmup_epochs": 2.0}, {"schedule": "cosine", "warmup_epochs": 2.0}),
    "step_epochs": ({"schedule": "cosine", "step_epochs": 2}, {"schedule": "step", "step_epochs": 2}),
    "step_factor": ({"schedule": "constant", "step_factor": 0.5}, {"schedule": "step", "step_factor": 0.5}),
    "focal_gamma": ({"loss": "cross-entropy", "focal_gamma": 1.0}, {"loss": "focal", "focal_gamma": 1.0}),
    "hidden": ({"hidden": 64}, {"head": "mlp", "hidden": 64}),
    "dropout": ({"dropout": 0.1}, {"head": "batch-norm", "dropout": 0.1}),
    "head_epochs": ({"head_epochs": 2}, {"strategy": "two-stage", "head_epochs": 2}),
    "head_rate": ({"strategy": "scratch", "head_rate": 0.01}, {"strategy": "two-stage", "head_rate": 0.01}),
    "unfreeze_epochs": ({"unfreeze_epochs": 1}, {"freeze": "layer1", "unfreeze_epochs": 1}),
    "find_lr": ({"find_lr": True, "learning_rate": 0.01}, {"find_lr": True}),
}


@pytest.mark.parametrize("name", IDLE)
def test_a_setting_without_an_effect_is_refused_and_taken_where_it_has_one(name):
    without, beside = ({"strategy": "finetune", **settings} for settings in IDLE[name])
    with pytest.raises(UsageError) as caught:
        training(without)
    assert caught.value.subject == name and caught.value.remedy and caught.value.exit_status == 2
    assert getattr(training(beside).phases[-1].settings, name) == beside[name]


def test_a_setting_that_is_left_at_its_default_is_never_refused():
    chosen = {"optimizer": "adam", "schedule": "one-cycle", "loss": "nll", "momentum": EngineConfig().momentum}
    assert training({"strategy": "finetune", **chosen, "warmup_epochs": EngineConfig().warmup_epochs}).trains


@pytest.mark.parametrize("rates", ["layer4=1e-4", "body=0,head=1e-3", "layer1=0.001"])
def test_a_rate_that_is_to_be_found_is_not_given_beside(rates):
    with pytest.raises(UsageError, match="find_lr: finds the rate that all others follow, and rates are given"):
        training({"strategy": "finetune", "find_lr": True, "rates": rates})


@pytest.mark.parametrize("rates", ["layer1=0", "layer1=0.0, layer2=0", "layer1=0,"])
def test_rates_of_nothing_go_with_a_rate_that_is_to_be_found(rates):
    (phase,) = training({"strategy": "finetune", "find_lr": True, "rates": rates}).phases
    assert (phase.settings.find_lr, phase.settings.rates) == (True, rates)


# Heads to choose from


@pytest.mark.parametrize(
    ("text", "facts", "strategy", "heads"),
    [
        ("svm", {}, "probe", ("svm",)),
        ("knn, logistic", {}, "probe", ("knn", "logistic")),
        ("svm,means,svm", {}, "auto", ("svm", "means")),
        ("knn", {"pictures": KNN_VECTORS + 1}, "probe", ("knn",)),  # whoever asks for it gets it
        ("logistic", {"task": "multi"}, "probe", ("logistic",)),
        ("means", {}, "lp-ft", ("means",)),
    ],
)
def test_heads_that_were_set_are_the_ones_chosen_from(text, facts, strategy, heads):
    plan = training({"strategy": strategy, "heads": text}, **facts)
    assert plan.phases[0].heads == heads
    assert f"heads {', '.join(heads)}: as set" in reasons(plan)


@pytest.mark.parametrize(
    ("text", "facts", "strategy", "why", "remedy"),
    [
        ("forest", {}, "probe", "'forest' is no kind of head", "logistic, svm, means, blend, knn"),
        ("logistic,SVM", {}, "probe", "'SVM' is no kind of head", "logistic, svm, means, blend, knn"),
        (",", {}, "probe", "'' is no kind of head", "logistic, svm, means, blend, knn"),
        ("svm", {"task": "multi"}, "probe", "'svm' does not go with this plan", "Choose from logistic."),
        ("means,knn", {}, "lp-ft", "'knn' does not go with this plan", "Choose from logistic, svm, means, blend."),
    ],
)
def test_heads_that_do_not_go_are_refused_with_those_that_do(text, facts, strategy, why, remedy):
    with pytest.raises(UsageError) as caught:
        training({"strategy": strategy, "heads": text}, **facts)
    assert (caught.value.subject, caught.value.why) == ("heads", why) and remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("heads", {"strategy": "finetune", "heads": "svm"}),
        ("heads", {**PROBE_WITH_MLP, "heads": "svm"}),
    ],
)
def test_heads_are_refused_where_no_head_is_fitted_on_features(name, settings):
    with pytest.raises(UsageError, match=f"{name}: has no effect with strategy"):
        training(settings)


def test_beside_a_head_that_is_trained_the_remedy_for_heads_is_another_head():
    with pytest.raises(UsageError) as caught:
        training({**PROBE_WITH_MLP, "heads": "svm"})
    assert "--head" in caught.value.remedy and "Give --strategy probe" not in caught.value.remedy


@pytest.mark.parametrize("augment", ["auto", "none"])
def test_probe_trains_no_weight_of_the_network_whatever_is_done_to_pictures(augment):
    (phase,) = training({**PROBE_WITH_MLP, "augment": augment}).phases
    assert phase.on == "features" or (phase.settings.freeze == "all" and not phase.settings.unfreeze_epochs)


def test_an_augmentation_that_was_set_is_carried_out_or_refused():
    try:
        (phase,) = training({**PROBE_WITH_MLP, "augment": "RandomHorizontalFlip"}).phases
    except UsageError as error:
        assert error.subject == "augment"
    else:
        assert phase.on == "pictures" or phase.settings.augment == "none"


def test_what_a_run_prepares_is_what_its_plan_needs():
    # Two functions of the settings alone are asked before there is a plan; they must say what it will say.
    choices = {
        "strategy": ("auto", *EPOCHS),
        "head": ("linear", "mlp"),
        "freeze": ("", "2", "all"),
        "augment": ("auto", "none", "RandomHorizontalFlip"),
        "unfreeze_epochs": (0, 1),
        "mixup": (0.0, 0.2),
    }
    planned = 0
    for values in itertools.product(*choices.values()):
        config = resolve(None, dict(zip(choices, values, strict=True)))
        try:
            plan = decide(TRAINING, config)
        except UsageError:
            continue
        planned += 1
        assert plan.trains == trains(config)
        on_features = [phase for phase in plan.phases if isinstance(phase, FitHead) or phase.on == "features"]
        assert needs_features(config) or not on_features
    assert planned > 100


@pytest.mark.parametrize("pictures", [1, 10, 31, 32, 33, 63, 64, 127, 128, 129, 200, 255, 256, 257, 10**6])
def test_a_batch_is_the_largest_of_which_an_epoch_has_eight(pictures):
    fitting = [size for size in (32, 16, 8, 4) if pictures >= 8 * size]
    assert choose_batch_size(pictures) == (fitting or [4])[0]
    found = training({"strategy": "finetune"}, pictures=pictures).phases[0].settings
    assert found.batch_size == choose_batch_size(pictures)


@pytest.mark.parametrize(
    ("layout", "words"), [(Layout("bfloat16"), "bfloat16, channels last"), (LAYOUT, "float32, channels first")]
)
def test_a_layout_is_said_in_words(layout, words):
    assert str(layout) == words


DECIDES = """
import sys
from headstart.config import resolve
from headstart.plan import EPOCHS, Situation, decide

situation = Situation("single", 3, 300, 45, 40, 5, "cpu", "float32")
for strategy in EPOCHS:
    for head in ("linear", "mlp")[: 1 if strategy == "lp-ft" else 2]:
        assert decide(situation, resolve(None, {"strategy": strategy, "head": head})).phases
print(sorted({"torch", "numpy", "timm"} & set(sys.modules)))
"""


def test_plans_of_all_strategies_are_made_without_torch():
    done = subprocess.run([sys.executable, "-c", DECIDES], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
