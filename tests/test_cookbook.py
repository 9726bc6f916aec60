import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from torchvision import models

import headstart
from headstart import cookbook, pictures, zoo
from headstart.errors import UsageError
from headstart.metrics import Estimate
from headstart.pictures import MOST_TILES

TRAINED = ("ants-bees", "imagewoof", "dogs-cats", "scenes", "birds")


@pytest.fixture
def few(make_shapes, tmp_path) -> Path:
    """A few drawn pictures, in folders below folders."""
    make_shapes(tmp_path / "few" / "round", 10, ("circle",))
    make_shapes(tmp_path / "few" / "angular", 10, ("square", "triangle"))
    return tmp_path / "few"


def quick(tiny_weights: Path, **settings: object) -> dict[str, object]:
    return {"weights": str(tiny_weights), "epochs": 1, "size": 64, "precision": "float32", "device": "cpu", **settings}


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_runs_draws_and_keeps_what_is_finished(name, few, tiny_weights, tmp_path):
    settings = quick(tiny_weights)
    if name == "imagewoof":
        settings["augment"] = "RandomCrop(64, padding=4, padding_mode='reflect'), RandomHorizontalFlip"
    text = cookbook.recipe(name, few, tmp_path / "out", **settings)
    assert "| run | accuracy |" in text and " over " in text and "p = " in text
    # The mistake: ants and bees and Imagewoof are subsets of ImageNet, and nobody says so.
    assert ("subset of ImageNet" in text) == (name in ("ants-bees", "imagewoof"))
    assert (tmp_path / "out" / "predictions.png").stat().st_size > 10_000
    runs = sorted(file.parent for file in (tmp_path / "out").glob("*/metrics.json"))
    assert len(runs) >= 2
    stamps = {file: file.stat().st_mtime_ns for run in runs for file in run.iterdir()}
    assert cookbook.recipe(name, few, tmp_path / "out", **settings) == text
    assert {file: file.stat().st_mtime_ns for run in runs for file in run.iterdir()} == stamps
    for run in runs:
        plan = json.loads((run / "plan.json").read_text())
        if plan["strategy"] not in ("auto", "probe"):
            assert (run / "curves.png").exists()


def test_birds_has_nested_classes_and_two_stages(few, tiny_weights, tmp_path):
    cookbook.recipe("birds", few, tmp_path / "out", **quick(tiny_weights))
    plan = json.loads((tmp_path / "out/two-stage/plan.json").read_text())
    first, second = (phase["settings"] for phase in plan["phases"])
    assert (first["optimizer"], first["freeze"], first["epochs"]) == ("adam", "all", 1)
    assert (second["optimizer"], second["freeze"], second["step_factor"]) == ("sgd", "", 0.9)
    loaded = headstart.load(tmp_path / "out/two-stage")
    assert loaded.classes == ("angular/square", "angular/triangle", "round/circle")


def test_the_body_of_scenes_learns_at_a_tenth_of_the_heads_rate(few, tiny_weights, tmp_path):
    # The mistake: body at 1e-2, new head at 1e-3. The mistake: vertical flips of street scenes.
    cookbook.recipe("scenes", few, tmp_path / "out", **quick(tiny_weights))
    (phase,) = json.loads((tmp_path / "out/tutorial/plan.json").read_text())["phases"]
    settings = phase["settings"]
    assert settings["rates"] == "body=1e-3" and settings["learning_rate"] == 1e-2
    assert "Vertical" not in settings["augment"] and settings["symmetry"] == "mirror"


def test_the_users_settings_win_over_the_recipes(few, tiny_weights, tmp_path):
    cookbook.recipe("ants-bees", few, tmp_path / "out", **quick(tiny_weights, batch_size=8, seed=3))
    (phase,) = json.loads((tmp_path / "out/finetuned/plan.json").read_text())["phases"]
    assert phase["settings"]["batch_size"] == 8 and phase["settings"]["epochs"] == 1
    assert "seed = 3" in (tmp_path / "out/default/config.toml").read_text()


def test_identify_names_pictures_in_two_languages_and_draws_them(few, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(pictures, "_find_families", lambda: iter(()))  # no font for Chinese
    picture = next(few.rglob("*.png"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    text = cookbook.recipe("identify", [picture, broken], tmp_path / "out")
    first, second = text.splitlines()
    assert any("\u4e00" <= character <= "\u9fff" for character in first) and first.count("%") == 3
    assert "broken.png" in second
    assert (tmp_path / "out/0001.png").exists() and not (tmp_path / "out/0002.png").exists()
    assert any("\u4e00" <= character <= "\u9fff" for character in (tmp_path / "out/0001.svg").read_text("utf-8"))
    assert caplog.text.count("no installed font") == 1  # not once for each picture


@pytest.mark.parametrize("name", cookbook.NAMES)
def test_a_recipe_opens_with_its_command(name):
    text = cookbook.show(name)
    assert f"headstart recipe run {name} --data" in text
    assert ".backward(" not in text and "for epoch" not in text
    assert name in cookbook.list_recipes()


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'birds'"):
        cookbook.show("brids")


def test_the_tutorials_network_is_taken_where_its_weights_are_here(own_cache, caplog):
    caplog.set_level("INFO", "headstart")
    assert cookbook.choose_network("torchvision/resnet18") == zoo.DEFAULT
    assert "not on this machine" in caplog.text
    _, origin = zoo.describe("torchvision/resnet18")
    (own_cache / "weights").mkdir(parents=True)
    (own_cache / "weights" / origin.files[0]).write_bytes(b"")
    assert cookbook.choose_network("torchvision/resnet18") == "torchvision/resnet18"


def test_two_runs_are_compared_on_the_pictures_of_both(tmp_path):
    def outcome(label: str, hits: dict[str, bool]) -> cookbook.Outcome:
        return cookbook.Outcome(label, tmp_path, {"accuracy": Estimate(0.5, 0.4, 0.6, 4)}, hits, 1.0)

    one = outcome("one", {"a": True, "b": True, "c": True, "x": False})
    other = outcome("other", {"a": False, "b": False, "c": True, "y": True})
    assert cookbook.compare(one, other).startswith("one over other: accuracy +0.667 [")
    assert MOST_TILES >= cookbook.SHOWN


def test_of_pictures_in_groups_the_groups_are_drawn(tmp_path):
    def outcome(label: str, hits: dict[str, bool]) -> cookbook.Outcome:
        groups = {source: source[0] for source in hits}
        return cookbook.Outcome(label, tmp_path, {}, hits, 1.0, groups)

    sources = [f"{group}{number}" for group in "abcd" for number in range(5)]
    one = outcome("one", dict.fromkeys(sources, True))
    other = outcome("other", {source: source[0] != "a" for source in sources})
    assert "p = " not in cookbook.compare(one, other)  # five pictures of one group are one difference
    alone = [dataclasses.replace(run, groups={}) for run in (one, other)]
    assert "p = 0.062" in cookbook.compare(*alone)


# Real pictures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data", "label", "run", "least"),
    [
        ("ants-bees", "hymenoptera", "fixed features", "fixed", 0.85),
        ("imagewoof", "imagewoof", "pretrained", "pretrained", 0.6),
        ("dogs-cats", "dogscats", "short side resized, then cropped", "crop", 0.8),
        ("scenes", "scenes", "the tutorial's", "tutorial", 0.7),
    ],
)
def test_a_recipe_reaches_its_range_on_real_pictures_in_a_few_epochs(
    name, data, label, run, least, real_data, tmp_path
):
    text = cookbook.recipe(name, real_data / data, tmp_path / "out", epochs=2)
    assert label in text
    figures = json.loads((tmp_path / "out" / run / "metrics.json").read_text())["metrics"]
    assert figures["accuracy"]["value"] > least


@pytest.mark.slow
def test_birds_reaches_its_range_with_breeds_in_nested_folders(real_data, tmp_path):
    for number, breed in enumerate(sorted((real_data / "imagewoof/train").iterdir())):
        target = tmp_path / "breeds" / f"group{number % 3}" / breed.name
        shutil.copytree(breed, target)
    cookbook.recipe("birds", tmp_path / "breeds", tmp_path / "out", epochs=2)
    figures = json.loads((tmp_path / "out/two-stage/metrics.json").read_text())["metrics"]
    assert figures["accuracy"]["value"] > 0.75


ORIGINALS = {name: importlib.import_module(f"headstart.recipes.{name.replace('-', '_')}").NETWORK for name in TRAINED}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_runs_with_its_tutorials_own_network(name, few, tmp_path):
    network = ORIGINALS[name]
    torch.manual_seed(0)
    whole = models.get_model(network.removeprefix("torchvision/"), weights=None)
    torch.save(whole.state_dict(), tmp_path / "random.pth")
    settings = {"backbone": network, "weights": str(tmp_path / "random.pth"), "epochs": 1, "device": "cpu"}
    settings["batch_norm"] = "train"  # random weights and statistics that do not fit them overflow
    assert "| run | accuracy |" in cookbook.recipe(name, few, tmp_path / "out", **settings)
    for file in (tmp_path / "out").glob("*/environment.json"):
        assert json.loads(file.read_text())["backbone"]["name"] == network
