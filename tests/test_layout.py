"""How the project is laid out: who imports whom, how wide a line is, how long a function."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each file of the core imports only those before it: model and lora do not know the data, the data
# do not know the model, and nobody knows train. evaluate scores texts, so it needs the data alone.
ORDER = {"model": (), "lora": (), "data.calls": (), "data": ("data.calls",),
         "uncertainty": ("model",), "augment": ("model", "uncertainty", "data", "data.calls"),
         "evaluate": ("data", "data.calls"),
         "train": ("model", "lora", "uncertainty", "data", "data.calls", "augment", "evaluate")}
PACKAGES = {"torch", "tokenizers", "safetensors", "huggingface_hub", "tqdm"}


def path_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it, in full: data.calls, torch.nn."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add(node.module)
    return names


@pytest.mark.parametrize("module", ORDER)
def test_a_file_of_the_core_imports_the_standard_library_five_packages_and_those_before_it(module):
    for name in imports(path_of(module)):
        top = name.partition(".")[0]
        assert name in ORDER[module] or top in PACKAGES or top in sys.stdlib_module_names, name


def test_these_are_all_files_of_the_core():
    there = {*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.py")}
    assert there == {path_of(module) for module in ORDER}


def test_no_line_is_wider_than_100_columns():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if not tracked.stdout:
        pytest.skip("this copy is no git repository")
    for path in filter(Path.is_file, map(ROOT.joinpath, tracked.stdout.split())):
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            assert len(line) <= 100, f"{path}, line {number}"


@pytest.mark.parametrize("module", ORDER)
def test_no_function_of_the_core_is_longer_than_60_lines(module):
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, node.name
