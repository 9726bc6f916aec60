import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "headstart"
MODULES = sorted(path.stem for path in SOURCE.glob("*.py") if not path.stem.startswith("__"))
TORCH_FREE = (
    "errors",
    "config",
    "data",
    "plan",
    "cli",
    "images",
    "weights",
    "loading",
    "splits",
    "quality",
    "training",
)


def read_layers() -> dict[str, int]:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "ARCHITECTURE.md").read_text(), re.M)
    return {module: int(layer) for layer, module in rows}


def find_imports(module: str) -> set[str]:
    """The modules of headstart that a module imports, inside functions too, but not for type checking alone."""
    found = set()
    tree = ast.parse((SOURCE / f"{module}.py").read_text())
    typing_only = [
        statement
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in ast.walk(node)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node not in typing_only:
            if node.module == "headstart":
                found.update(alias.name for alias in node.names if alias.name in MODULES)
            elif node.module.startswith("headstart."):
                found.add(node.module.split(".")[1])
    return found


def test_the_table_names_every_module_and_no_other():
    assert sorted(read_layers()) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_smaller_layers(module):
    layers = read_layers()
    upwards = {other for other in find_imports(module) if layers[other] >= layers[module]}
    assert not upwards


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_needs_no_torch(module):
    code = f"import sys, headstart.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_keep_their_size(module):
    text = (SOURCE / f"{module}.py").read_text()
    assert text.count("\n") <= 500
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert {f.name: f.end_lineno - f.lineno for f in functions if f.end_lineno - f.lineno >= 60} == {}


def test_nothing_loads_pickles_or_trains_outside_the_engine():
    for module in MODULES:
        text = (SOURCE / f"{module}.py").read_text()
        assert not re.search(r"^\s*(import|from) (pickle|joblib|dill)\b", text, re.M)
        assert text.count(".backward(") == (module == "engine")
        assert "torch.load(" not in text or "weights_only=True" in text
