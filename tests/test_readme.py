"""What the README says of commands, flags, files, sizes, code and choices is so."""
import importlib
import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from threading import Thread

import pytest

import evaluate
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESEARCH = (ROOT / "research" / "README.md").read_text(encoding="utf-8")
CORE = sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py")])


def rows(section: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [re.split(r"`? *\| *`?", row)[1:-1] for row in re.findall(r"^\| `.*", text, re.M)]


def test_the_table_of_files_is_whole_and_its_sizes_hold():
    listed = {name: int(lines) for name, lines, _ in rows("The files, in reading order")}
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in CORE}
    assert listed == pytest.approx(sizes, rel=0.03)


def test_algorithm_1_stands_there_as_it_stands_in_train_py():
    assert inspect.getsource(train.self_improve).strip() in README


def test_every_choice_of_ours_is_in_the_table_and_no_other():
    listed = Counter(row[0] for row in rows("Where we differ from the paper"))
    found = {str(path.relative_to(ROOT)): path.read_text().count("# ours:") for path in CORE}
    assert listed == {name: count for name, count in found.items() if count}


@pytest.mark.parametrize("text", [README, RESEARCH], ids=["README", "research/README"])
def test_every_command_is_understood(text, capsys):
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M))
    program = r"(?:python|torchrun) [^;#\n]*?(?:(train|evaluate)\.py|-m (research[.\w]+))([^;#\n]*)"
    found = re.findall(program, blocks)
    assert len(found) >= 5
    for script, module, arguments in found:
        with pytest.raises(SystemExit):
            importlib.import_module(script or module).main(["--help"])
        options = re.findall(r"(?<= )--[a-z-]+", arguments)
        known = re.findall(r"--[a-z-]+", capsys.readouterr().out)
        assert set(options) <= set(known), (script or module, arguments)


def test_the_lines_for_a_notebook_run_also_outside_the_main_thread(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines, errors = re.search(r"^```python\n(import .*?)^```", README, re.S | re.M)[1], []

    def typed():
        try:
            exec(lines.replace('bench=', 'model="tiny", device="cpu", bench='), {})
        except BaseException as error:
            errors.append(error)
    thread = Thread(target=typed)
    thread.start()
    thread.join()
    assert not errors and len(lines.splitlines()) <= 8
    assert "sample  nexusraven-1: " in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "research").glob("[a-z]*.py")), ids=str)
def test_a_file_of_research_that_is_run_as_a_script_says_how_it_is_called(path):
    said = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert said.returncode == 2 and said.stdout == ""
    assert said.stderr == f"Call it in the project's folder as: python -m research.{path.stem}\n"


def test_files_that_are_named_exist():
    for folder in (ROOT, ROOT / "research", ROOT / "tests"):
        text = (folder / "README.md").read_text()
        for name in re.findall(r"\]\(([\w/.-]+)\)|`(test_\w+\.py)`", text):
            assert (folder / "".join(name)).exists(), name


def test_help_has_examples_and_is_grouped_by_the_phases_of_the_algorithm(capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and "python train.py --bench" in text
    assert text.index("\nH:") < text.index("\nG:") < text.index("\nT:")


def test_the_programs_end_with_an_exit_code():
    assert train.main(["--bench", "nexusraven", "--tau", "2"]) == 2
    assert evaluate.main(["no-such-run"]) == 2
