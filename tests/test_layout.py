"""How the project is laid out: who imports whom, how wide a line is, how long a function."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each file of the core imports only these: lora and data/runs know nobody, the model knows the
# tokenizer alone, evaluate scores texts, so it needs the data alone, and nobody knows train.
ORDER = {"lora": (), "data.runs": (), "data.calls": (), "data.chat": (),
         "data.formats": ("data.calls",), "data": ("data.calls", "data.formats", "data.runs"),
         "model": ("data.chat",), "uncertainty": ("data.chat", "model"),
         "evaluate": ("data", "data.calls", "data.runs"),
         "augment": ("data", "data.calls", "data.chat", "data.runs", "model", "uncertainty"),
         "train": ("augment", "data", "data.calls", "data.chat", "data.runs", "evaluate", "lora",
                   "model", "uncertainty")}
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


@pytest.mark.parametrize("module", ["train", "uncertainty", "data.runs"])
def test_algorithm_1_its_numbers_and_its_lines_know_no_task(module):
    """Calling tools is one task; these three files do not say so, but for one option, the order in
    which a sample's are shown."""
    text = path_of(module).read_text(encoding="utf-8")
    text = re.sub(r"\n    tools: str = option\([^)]*\)[^)]*\)|\bconfig\.tools\b", "", text)
    assert not re.search(r"\btool", text, re.I)


def test_the_core_has_no_lambda_and_no_stage_named_by_a_letter():
    for module in ORDER:
        for node in ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Lambda), module
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                assert node.id not in ("H", "G", "T", "K"), module


def test_no_line_is_wider_than_100_columns():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if not tracked.stdout:
        pytest.skip("this copy is no git repository")
    for path in filter(Path.is_file, map(ROOT.joinpath, tracked.stdout.split())):
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            assert len(line) <= 100, f"{path}, line {number}"
