import inspect
import subprocess
import sys

import pytest

import headstart
from headstart import cli, config

VERBS = ("train", "evaluate", "predict", "audit", "models", "rank", "recipe", "fetch", "demo")
# What the command line alone has: how results are printed and where to.
PRINTING = {"json", "format", "out", "top", "lang", "draw"}
# What Python alone has: showing progress, and settings as keywords.
CALLING = {"track", "settings", "folder", "detailed"}


def test_every_public_name_is_there_and_says_what_it_is():
    for name in headstart.__all__:
        assert inspect.getdoc(getattr(headstart, name))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = headstart.nonsense


def test_importing_headstart_imports_no_torch():
    code = "import headstart, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_commands_are_the_public_verbs():
    commands = {name for name in cli.app if not name.startswith("-")}
    assert commands == set(VERBS)
    assert set(VERBS) < set(headstart.__all__)


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_takes_what_its_function_takes(verb):
    function = set(inspect.signature(getattr(headstart, verb)).parameters) - CALLING
    command = set(inspect.signature(getattr(cli, verb)).parameters) - CALLING
    if verb in ("train", "recipe", "fetch", "demo"):  # here `out` is the function's too
        assert function == command
    else:
        assert function == command - PRINTING


def test_flags_are_the_settings():
    flags = cli._AllFlags()
    assert set(vars(flags)) == set(config.settings())
    assert set(vars(flags).values()) == {None}


def test_setting_names_stand_in_one_section_only():
    sections = [config.settings(name) for name in ("data", "model", "train", "engine", "evaluate")]
    assert sum(map(len, sections)) == len(config.settings())
