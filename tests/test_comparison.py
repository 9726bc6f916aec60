import dataclasses
import json
import shlex
from pathlib import Path

import numpy as np
import pytest

import headstart
from headstart import backbones, blocks, cli, comparison, metrics
from headstart.comparison import Ranked, recommend
from headstart.errors import BackboneError, DataError, HeadstartError, WeightsError
from headstart.metrics import Estimate
from headstart.plan import Plan


@pytest.fixture
def two(tiny_weights, monkeypatch) -> list[str]:
    """Two networks at hand: the packaged one and the tiny one of the settings."""
    listed = [entry for entry in backbones.list_models("efficientnet_lite0", detailed=0) if "/" not in entry.name]
    monkeypatch.setattr(comparison.backbones, "list_models", lambda detailed: listed)
    return ["efficientnet_lite0", "timm/test_efficientnet"]


def test_networks_at_hand_are_ranked_by_what_cross_validation_finds(shapes, tiny_weights, two, tmp_path):
    ranked = headstart.rank(shapes, weights=str(tiny_weights), device="cpu")
    assert sorted(entry.name for entry in ranked) == sorted(two)
    assert [entry.log_loss for entry in ranked] == sorted(entry.log_loss for entry in ranked)
    assert ranked[0].behind is None and ranked[1].behind is not None
    assert {entry.accuracy.n for entry in ranked} == {30}  # of 36; two of each class are kept for the report
    sizes = {entry.name: entry.megabytes for entry in ranked}
    assert 12 < sizes["efficientnet_lite0"] < 20 > sizes["timm/test_efficientnet"] > 0
    assert all(entry.milliseconds > 0 for entry in ranked)
    assert {entry.file for entry in ranked} == {"", str(tiny_weights)}


def test_the_pictures_of_the_report_stay_closed(shapes, tiny_weights, two, tmp_path, monkeypatch):
    opened = []
    real = comparison.views.look

    def look(data, *rest, **more):
        opened.append(data.sources)
        return real(data, *rest, **more)

    monkeypatch.setattr(comparison.views, "look", look)
    headstart.rank(shapes, weights=str(tiny_weights), device="cpu")
    run = headstart.train(shapes, tmp_path / "run", weights=str(tiny_weights), device="cpu")
    assert opened and not {source for sources in opened[:2] for source in sources} & set(run.evaluation.sources)


def test_of_many_pictures_a_part_is_looked_at(shapes, tiny_weights, two, monkeypatch):
    monkeypatch.setattr(comparison, "PICTURES", 18)
    assert {entry.accuracy.n for entry in headstart.rank(shapes, weights=str(tiny_weights), device="cpu")} == {18}


def test_with_little_time_the_first_network_alone_is_measured(shapes, tiny_weights, two, caplog):
    caplog.set_level("INFO", "headstart")
    (ranked,) = headstart.rank(shapes, weights=str(tiny_weights), device="cpu", time_budget="0.001s")
    assert ranked.file == str(tiny_weights)
    assert "efficientnet_lite0: not measured, nothing is left of the budget" in caplog.text


@pytest.mark.parametrize(("cpus", "ranked"), [(1, 1), (1000, 2)])
def test_what_a_network_would_take_is_foreseen_for_all_cores(shapes, tiny_weights, two, monkeypatch, cpus, ranked):
    monkeypatch.setattr(comparison, "_time", lambda *_: 1e5)  # of 30 pictures: 3,000 s, or 3 s by a thousand cores
    monkeypatch.setattr(comparison, "count_cpus", lambda: cpus)
    found = headstart.rank(shapes, weights=str(tiny_weights), device="cpu", time_budget="1000s")
    assert len(found) == ranked


def test_a_package_that_is_damaged_is_passed_over_and_that_is_said(shapes, tiny_weights, two, monkeypatch, caplog):
    locate = backbones.locate

    def fail(name, *given, **named):
        if name == "efficientnet_lite0":
            raise WeightsError(name, "is damaged", "Install it again.")
        return locate(name, *given, **named)

    monkeypatch.setattr(comparison.backbones, "locate", fail)
    (ranked,) = headstart.rank(shapes, weights=str(tiny_weights), backbone="timm/test_efficientnet", device="cpu")
    assert ranked.name == "timm/test_efficientnet"
    assert "efficientnet_lite0: not measured: weights: efficientnet_lite0: is damaged" in caplog.text


def make(name: str, milliseconds: float, p_value: float | None, gain: float = 0.1) -> Ranked:
    estimate = Estimate(0.9, 0.8, 0.95, 50)
    behind = None if p_value is None else metrics.Comparison(Estimate(gain, gain - 0.1, gain + 0.1, 50), p_value)
    return Ranked(name, estimate, 0.3, milliseconds, 10.0, behind)


@pytest.mark.parametrize(("p_value", "chosen"), [(0.3, "small"), (0.01, "large")])
def test_the_faster_of_two_that_cannot_be_told_apart_is_recommended(p_value, chosen):
    assert recommend((make("large", 9.0, None), make("small", 2.0, p_value))).name == chosen


def test_one_that_is_more_accurate_than_the_first_is_not_passed_over():
    # The first one has the least log-loss, which need not be the fewest errors.
    assert recommend((make("large", 9.0, None), make("small", 2.0, 0.01, gain=-0.1))).name == "small"


def with_groups(shapes: Path, table: Path, of: int) -> Path:
    """A table of the pictures, so many of a class in a group."""
    paths = sorted(shapes.rglob("*.png"))
    rows = [f"{path},{path.parent.name},{path.parent.name} {int(path.stem) // of}" for path in paths]
    table.write_text("\n".join(("image,label,group", *rows)))
    return table


def test_groups_of_which_a_part_would_hold_one_a_class_are_looked_at_in_a_larger_part(
    make_shapes, tiny_weights, two, tmp_path, monkeypatch
):
    monkeypatch.setattr(comparison, "PICTURES", 6)
    table = with_groups(make_shapes(tmp_path / "shapes", 30), tmp_path / "table.csv", 5)
    (count,) = {entry.accuracy.n for entry in headstart.rank(table, weights=str(tiny_weights), device="cpu")}
    assert 6 < 2 * 5 * 3 <= count


def test_pictures_of_a_group_count_once(make_shapes, tiny_weights, two, tmp_path):
    table = with_groups(make_shapes(tmp_path / "shapes", 20), tmp_path / "table.csv", 4)
    settings = {"weights": str(tiny_weights), "device": "cpu"}
    grouped, alone = headstart.rank(table, **settings), headstart.rank(tmp_path / "shapes", **settings)
    assert grouped[1].behind.p_value is None and alone[1].behind.p_value is not None
    entry = next(entry for entry in grouped if 0 < entry.accuracy.value < 1)
    of_pictures = metrics.wilson(round(entry.accuracy.value * entry.accuracy.n), entry.accuracy.n)
    assert entry.accuracy.low != of_pictures.low and entry.accuracy.low < entry.accuracy.value < entry.accuracy.high


@pytest.mark.parametrize(("low", "chosen"), [(-0.01, "small"), (0.01, "large")])
def test_where_there_is_no_p_value_the_interval_tells(low, chosen):
    behind = metrics.Comparison(Estimate(0.1, low, 0.2, 50), None)
    small = Ranked("small", Estimate(0.9, 0.8, 0.95, 50), 0.3, 2.0, 10.0, behind)
    assert recommend((make("large", 9.0, None), small)).name == chosen


def test_where_nothing_can_be_held_out_it_is_said(make_shapes, tiny_weights, two, tmp_path):
    data = make_shapes(tmp_path / "data" / "train", 1).parent
    make_shapes(data / "val", 4, first_seed=50)
    with pytest.raises(DataError, match="none can be held out"):
        headstart.rank(data, weights=str(tiny_weights), device="cpu")


def test_the_command_says_what_to_run_next(shapes, tiny_weights, two, tmp_path, capsys):
    words = ["rank", str(shapes), "--weights", str(tiny_weights), "--device", "cpu", "--json", str(tmp_path / "r.json")]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "recommended: " in shown and f"headstart train {shapes} --backbone" in shown
    rows = json.loads(Path(tmp_path / "r.json").read_text())
    assert [row["name"] for row in rows] and rows[0]["behind"] is None


def test_the_command_brings_along_what_says_how_the_data_are_read(make_shapes, tiny_weights, two, tmp_path, capsys):
    folder = make_shapes(tmp_path / "the shapes", 12)
    rows = [f"{path.relative_to(folder)},{path.parent.name}" for path in sorted(folder.rglob("*.png"))]
    (tmp_path / "table.csv").write_text("\n".join(("image,kind", *rows)))
    words = ["rank", str(tmp_path / "table.csv"), "--images", str(folder), "--label-column", "kind"]
    assert cli.main([*words, "--weights", str(tiny_weights), "--device", "cpu"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:3] == ["headstart", *("train", str(tmp_path / "table.csv"))]
    assert cli.main([*command[1:], "--out", str(tmp_path / "run")]) == 0


def test_a_network_that_cannot_be_used_is_passed_over_unless_the_user_named_it(
    shapes, tiny_weights, two, tmp_path, monkeypatch, caplog
):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nonsense")
    with pytest.raises(HeadstartError, match="broken"):
        headstart.rank(shapes, weights=str(broken), device="cpu")
    real = comparison.backbones.locate

    def locate(name, *rest, **more):
        located = real(name, *rest, **more)
        return located if rest else dataclasses.replace(located, file=broken)

    monkeypatch.setattr(comparison.backbones, "locate", locate)
    monkeypatch.setattr(comparison.backbones, "load", refuse(comparison.backbones.load, broken))
    (ranked,) = headstart.rank(shapes, weights=str(tiny_weights), device="cpu")
    assert ranked.file == str(tiny_weights)
    assert "efficientnet_lite0: not measured: " in caplog.text


def refuse(load, broken):
    def look(located):
        if located.file == broken:
            raise WeightsError(broken, "is no weights file", "Take it away.")
        return load(located)

    return look


def test_a_network_that_the_user_names_is_measured_and_no_other_twice(shapes, two):
    (ranked,) = headstart.rank(shapes, backbone="efficientnet_lite0", device="cpu")
    assert ranked.name == "efficientnet_lite0" and ranked.file == ""


def test_several_weights_files_are_measured(shapes, tiny_weights, two, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(tiny_weights.read_bytes())
    card = tiny_weights.with_suffix(".json")
    if card.exists():
        other.with_suffix(".json").write_bytes(card.read_bytes())
    ranked = headstart.rank(shapes, weights=f"{tiny_weights},{other}", device="cpu")
    assert {entry.file for entry in ranked} == {str(tiny_weights), str(other), ""}


def test_size_and_fit_are_those_that_were_given(shapes, tiny_weights, two, monkeypatch):
    seen, real = [], comparison.views.look
    monkeypatch.setattr(
        comparison.views, "look", lambda data, spec, *rest: (seen.append(spec.preprocess), real(data, spec, *rest))[1]
    )
    headstart.rank(shapes, weights=str(tiny_weights), device="cpu", size=96, fit="squash")
    assert {(preprocess.size, preprocess.fit) for preprocess in seen} == {(96, "squash")}


def test_figures_that_are_not_defined_are_null_in_json():
    nothing = metrics.Comparison(Estimate(0.0, float("nan"), float("nan"), 4), None)
    entry = dataclasses.replace(make("small", 2.0, 0.3), behind=nothing)
    told = json.loads(json.dumps(entry.to_json(), allow_nan=False))
    assert told["behind"]["difference"]["low"] is None and told["accuracy"]["high"] == 0.95
    assert make("small", 2.0, None).to_json()["behind"] is None


def test_a_network_that_does_not_take_the_size_is_passed_over_unless_it_was_named(
    shapes, tiny_weights, two, monkeypatch, caplog
):
    def refuse(network, pictures):
        if pictures.shape[-1] == 96 and type(network).__name__ != "EfficientNet":  # timm's, of the tiny weights
            raise BackboneError("Lite", "does not run on pictures of 96 pixels", "Leave out --size.")
        return real(network, pictures)

    real = blocks.run
    monkeypatch.setattr(blocks, "run", refuse)
    (ranked,) = headstart.rank(shapes, weights=str(tiny_weights), device="cpu", size=96)
    assert ranked.file == str(tiny_weights) and "does not run on pictures of 96 pixels" in caplog.text


# A plan alone


def test_a_dry_run_stops_at_the_plan_and_the_same_command_goes_on_from_it(shapes, tiny_weights, tmp_path, capsys):
    settings = {"weights": str(tiny_weights), "precision": "float32", "device": "cpu"}
    plan = headstart.train(shapes, tmp_path / "run", dry_run=True, **settings)
    assert isinstance(plan, Plan) and not (tmp_path / "run/model.safetensors").exists()
    assert json.loads((tmp_path / "run/plan.json").read_text())["reasons"] == list(plan.reasons)
    words = ["train", str(shapes), "--out", str(tmp_path / "run"), "--dry-run", "--weights", str(tiny_weights)]
    assert cli.main([*words, "--precision", "float32", "--device", "cpu"]) == 0
    assert "plan: probe: fit a head" in capsys.readouterr().out
    run = headstart.train(shapes, tmp_path / "run", **settings)
    other = headstart.train(shapes, tmp_path / "other", **settings)
    np.testing.assert_array_equal(run.evaluation.probabilities, other.evaluation.probabilities)


def test_a_dry_run_of_training_times_a_step_and_trains_nothing(shapes, tiny_weights, tmp_path):
    settings = {"weights": str(tiny_weights), "precision": "float32", "device": "cpu", "epochs": 2}
    plan = headstart.train(shapes, tmp_path / "run", dry_run=True, strategy="finetune", **settings)
    assert isinstance(plan, Plan) and plan.trains
    assert not (tmp_path / "run/history.jsonl").exists()
