import re
import shlex
from pathlib import Path

import pytest

from headstart import cli, config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def find_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_python_example_runs_as_it_stands(tmp_path, monkeypatch, capsys, shapes):
    monkeypatch.chdir(tmp_path)
    Path("pictures").symlink_to(shapes)
    (example,) = find_blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    exec(compile(example, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert re.match(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\] n=6\n", out)
    assert out.count("circle") >= 12


def test_the_commands_shown_run(tmp_path, monkeypatch, capsys, make_shapes):
    monkeypatch.chdir(tmp_path)
    make_shapes(Path("pictures"), 12)
    Path("new").mkdir()
    (Path("pictures/circle/0.png")).rename("new/1.jpg")
    (shown,) = find_blocks("console")
    commands = [line[2:] for line in shown.splitlines() if line.startswith("$ headstart")]
    assert len(commands) == 3
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0
    assert "new/1.jpg: " in capsys.readouterr().out


def test_three_pictures_a_class_are_enough(tmp_path, monkeypatch, make_shapes):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", str(make_shapes(Path("flat"), 3)), "--out", "run"]) == 0
    roles = [line.rpartition(",")[2] for line in Path("run/split.csv").read_text().splitlines()[1:]]
    assert (roles.count("fit"), roles.count("report")) == (2 * 3, 3)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_commands_and_flags_that_documents_name_exist(document):
    text = document.read_text()
    code = "\n".join(re.findall(r"```.*?```|`[^`]+`", text, re.S))
    verbs = set(re.findall(r"\bheadstart ([a-z]+)\b", code))
    assert verbs <= {command for command in cli.app if not command.startswith("-")}
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", text)}
    own = {
        "out",
        "config",
        "debug",
        "resume",
        "data",
        "json",
        "top",
        "format",
        "lang",
        "draw",
        "help",
        "dry_run",
    }  # of single commands
    known = {*config.settings(), *own, "nproc_per_node", "only"}  # the last two are torchrun's and a benchmark's
    assert flags <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_between_documents_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target
