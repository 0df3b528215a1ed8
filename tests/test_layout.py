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


@pytest.mark.parametrize("module", ORDER)
def test_a_file_of_the_core_imports_the_standard_library_five_packages_and_those_before_it(module):
    """Wherever in it; and no function of it is longer than 60 lines."""
    from_elsewhere = PACKAGES | sys.stdlib_module_names
    for node in ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        for name in names:
            assert name in ORDER[module] or name.partition(".")[0] in from_elsewhere, name
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


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
