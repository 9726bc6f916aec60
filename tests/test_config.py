import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headstart import config
from headstart.config import RunConfig, resolve
from headstart.errors import ConfigError

SETTINGS = config.settings()


@pytest.fixture
def toml(tmp_path):
    """A function that writes a TOML file of lines."""

    def write(*lines, content=None):
        path = tmp_path / "run.toml"
        path.write_bytes("\n".join(lines).encode() if content is None else content)
        return path

    return write


def refusal(base=None, **given):
    """The text of the error that resolving ends with; always one line."""
    with pytest.raises(ConfigError) as caught:
        resolve(base, given)
    message = str(caught.value)
    assert message.startswith("settings: ")
    assert "\n" not in message
    return message


# The settings themselves


def test_a_name_stands_in_one_section_only():
    fields = [entry.name for section in dataclasses.fields(RunConfig) for entry in dataclasses.fields(section.default)]
    assert len(fields) == len(set(fields)) == len(SETTINGS)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_has_help_and_a_default_that_is_allowed(setting):
    assert setting.help
    assert setting.check(setting.default) == (setting.default, "")


def test_settings_of_some_sections_are_those_alone():
    assert {entry.section for entry in config.settings("model", "train").values()} == {"model", "train"}


def test_a_configuration_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().train.seed = 1


# Precedence


def test_without_anything_given_the_defaults_stand():
    assert resolve() == resolve(None, {}) == resolve(None, {"seed": None}) == RunConfig()


def test_a_file_wins_over_defaults_and_what_is_given_wins_over_the_file(toml):
    base = toml("[train]", "seed = 3", "folds = 4", "[model]", 'backbone = "resnet50"')
    resolved = resolve(base, {"seed": 7, "folds": None})
    assert (resolved.train.seed, resolved.train.folds, resolved.model.backbone) == (7, 4, "resnet50")
    assert resolved.evaluate == RunConfig().evaluate


@pytest.mark.parametrize("name", ["seed", "folds", "report_share", "strategy"])
def test_a_given_value_that_is_the_default_still_wins_over_the_file(toml, name):
    base = toml("[train]", "seed = 3", "folds = 4", "report_share = 0.5", 'strategy = "probe"')
    default = SETTINGS[name].default
    resolved = config.flatten(resolve(base, {name: default}))
    assert resolved[name] == default
    assert sum(resolved[other] != SETTINGS[other].default for other in SETTINGS) == 3


def test_what_is_given_wins_over_a_configuration_that_is_given():
    base = resolve(None, {"seed": 3, "folds": 4})
    assert resolve(base, {"seed": 0}) == resolve(None, {"folds": 4})
    assert base.train.seed == 3


def test_flatten_names_every_setting_and_resolves_to_the_same():
    changed = resolve(None, {"seed": 3, "task": "multi", "report_share": 0.3, "backbone": "x", "resamples": 200})
    assert set(config.flatten(changed)) == set(SETTINGS)
    assert resolve(None, config.flatten(changed)) == changed


def test_a_whole_number_and_a_path_are_taken_where_a_number_and_text_are_wanted(tmp_path):
    resolved = resolve(None, {"limit_megapixels": 20, "images": tmp_path, "weights": Path("w.pth")})
    assert resolved.data.limit_megapixels == 20.0
    assert isinstance(resolved.data.limit_megapixels, float)
    assert (resolved.data.images, resolved.model.weights) == (str(tmp_path), "w.pth")


@pytest.mark.parametrize(
    ("name", "value"), [("report_share", 0.01), ("report_share", 0.9), ("folds", 2), ("folds", 50), ("seed", 0)]
)
def test_limits_are_allowed_themselves(name, value):
    assert config.flatten(resolve(None, {name: value}))[name] == value


# Mistakes


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("sede", 1, "unknown setting 'sede', did you mean 'seed'?"),
        ("zzzzzz", 1, "unknown setting 'zzzzzz'"),
        ("seed", "1", "seed must be a whole number, not '1'"),
        ("seed", 1.0, "seed must be a whole number, not 1.0"),
        ("seed", True, "seed must be a whole number, not True"),
        ("seed", -1, "seed must be at least 0"),
        ("folds", 1, "folds must lie between 2 and 50, not 1"),
        ("folds", 51, "folds must lie between 2 and 50, not 51"),
        ("report_share", 0.009, "report_share must lie between 0.01 and 0.9, not 0.009"),
        ("report_share", 1, "report_share must lie between 0.01 and 0.9, not 1"),
        ("report_share", float("nan"), "report_share must lie between"),
        ("report_share", "0.2", "report_share must be a number, not '0.2'"),
        ("limit_megapixels", 0, "limit_megapixels must be at least"),
        ("limit_megapixels", float("inf"), "limit_megapixels must"),
        ("backbone", 5, "backbone must be text, not 5"),
        ("backbone", ["a\nb"], "backbone must be text, not ['a\\nb']"),
        ("strategy", "prob", "strategy must be one of auto, probe, finetune, lp-ft, two-stage, scratch, not 'prob'"),
        (
            "strategy",
            ["probe"],
            "strategy must be one of auto, probe, finetune, lp-ft, two-stage, scratch, not ['probe']",
        ),
        ("task", "Single", "task must be one of auto, single, multi, not 'Single'"),
    ],
)
def test_a_mistake_is_named_with_what_is_right(name, value, words):
    assert words in refusal(**{name: value})


def test_all_mistakes_are_reported_at_once_in_one_line(toml):
    base = toml(
        'stray = "text"',
        "[train]",
        "sede = 1",
        'folds = "five"',
        "report_share = 2.0",
        "[model]",
        "seed = 3",
        "[nonsense]",
        "colour = 1",
    )
    message = refusal(base, resamples=5, device=1, bakbone="x")
    for words in (
        "'stray' must stand in a section",
        "'sede', did you mean 'seed'?",
        "folds must be a whole number, not 'five'",
        "report_share must lie between 0.01 and 0.9, not 2",
        "'seed' belongs to [train], not [model]",
        "'colour'",
        "resamples must lie between 100 and 100000, not 5",
        "device must be text, not 1",
        "'bakbone', did you mean 'backbone'?",
    ):
        assert message.count(words) == 1, words
    assert message.startswith(f"settings: {base}: ")
    assert "headstart train --help" in message


@pytest.mark.parametrize("section", ["model", "trian", "run_"])
def test_a_setting_in_a_wrong_section_is_refused(toml, section):
    assert f"'folds' belongs to [train], not [{section}]" in refusal(toml(f"[{section}]", "folds = 3"))


def test_a_table_where_a_value_should_stand_is_refused(toml):
    assert "folds must be a whole number" in refusal(toml("[train.folds]", "x = 1"))


@pytest.mark.parametrize(
    "content",
    [b"[train", b"[train]\nseed = ", b"[train]\nseed = 1\nseed = 2", b"\xff\xfe[\x00", b'[model]\nbackbone = "a\nb"'],
)
def test_a_file_that_is_no_toml_is_refused_in_one_line(toml, content):
    assert "is not TOML" in refusal(toml(content=content))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.toml")
    assert "cannot be read" in refusal(tmp_path)


def test_a_file_with_a_byte_order_mark_is_read(toml):
    assert resolve(toml(content=b"\xef\xbb\xbf[train]\r\nseed = 4\r\n")).train.seed == 4


def test_an_empty_file_gives_the_defaults(toml):
    assert resolve(toml(content=b"")) == RunConfig()


# Files that are written


def test_a_written_configuration_is_read_as_the_same(tmp_path):
    before = resolve(
        None, {"seed": 9, "report_share": 0.35, "task": "multi", "images": 'a "b"\\c\n狗', "backbone": "x"}
    )
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(before, {"data": "/pictures", "fingerprint": "f" * 64}), encoding="utf-8")
    assert resolve(path) == before
    assert config.read_facts(path) == {"data": "/pictures", "fingerprint": "f" * 64}
    assert set(config.tomllib.loads(path.read_text(encoding="utf-8"))) == {
        "run",
        "data",
        "model",
        "train",
        "engine",
        "evaluate",
    }


def test_facts_of_a_file_that_users_wrote_are_none(toml):
    assert config.read_facts(toml("[train]", "seed = 1")) == {}


def test_a_setting_can_be_changed_in_a_written_configuration(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(resolve(None, {"seed": 9, "folds": 3}), {"data": "x"}), encoding="utf-8")
    assert resolve(path, {"seed": 1}) == resolve(None, {"seed": 1, "folds": 3})


@given(st.binary(max_size=20).filter(lambda name: b"\0" not in name))
@example(b"caf\xe9/\xff")
@example("狗/two\nlines\r\n\t\x7f\"'\\".encode())
@example("\U0010fffd".encode())
@example("a\U0010fffdb".encode())
@example("\U0010fffd\xe9".encode())
@settings(max_examples=50, deadline=None)
def test_any_path_is_written_and_read_as_the_same(tmp_path_factory, name):
    path, text = tmp_path_factory.mktemp("run") / "config.toml", os.fsdecode(name)
    path.write_text(config.to_toml(resolve(None, {"images": text}), {"data": text}), encoding="utf-8")
    assert config.read_facts(path) == {"data": text}
    assert resolve(path).data.images == text


# The cache


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADSTART_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert config.cache_folder() == Path("/own")
    monkeypatch.delenv("HEADSTART_CACHE")
    assert config.cache_folder() == Path("/shared/headstart")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.cache_folder() == tmp_path / ".cache" / "headstart"
