"""What the README says of commands, flags, files, sizes, code and choices is so."""
import importlib
import inspect
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

import evaluate
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESEARCH = (ROOT / "research" / "README.md").read_text(encoding="utf-8")
CORE = sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py")])


def rows(section: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def commands(text: str) -> list[str]:
    lines = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M)).splitlines()
    return [re.split(r"  +#", line)[0].strip() for line in lines]


def test_the_table_of_files_is_whole_and_its_sizes_hold():
    listed = {row[0].strip("`"): int(row[1]) for row in rows("The files, in reading order")}
    assert set(listed) == {str(path.relative_to(ROOT)) for path in CORE}
    for name, lines in listed.items():
        real = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert real == pytest.approx(lines, rel=0.03), name


def test_algorithm_1_stands_there_as_it_stands_in_train_py():
    assert inspect.getsource(train.self_improve).strip() in README


def test_every_choice_of_ours_is_in_the_table_and_no_other():
    listed = Counter(row[0].strip("`") for row in rows("Where we differ from the paper"))
    found = {str(path.relative_to(ROOT)): path.read_text().count("# ours:") for path in CORE}
    assert listed == {name: count for name, count in found.items() if count}


@pytest.mark.parametrize("text", [README, RESEARCH], ids=["README", "research/README"])
def test_every_command_is_understood(text, capsys):
    found = [c for c in commands(text) if re.search(r"train\.py|evaluate\.py|-m research\.", c)]
    assert len(found) >= 5
    for command in found:
        alone = re.search(r"(?:python|torchrun) [^;]*", command)[0]     # of a loop in the shell
        words = shlex.split(alone.replace("$", ""))
        name = next(w for w in words if w.endswith(".py") or w.startswith("research."))
        program = importlib.import_module(name.removesuffix(".py"))
        options = [w.partition("=")[0] for w in words if w.startswith("--")]
        with pytest.raises(SystemExit):
            program.main(["--help"])
        known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) | {"--nproc-per-node"}
        assert set(options) <= known, command


def test_files_that_are_named_exist():
    for text, root in ((README, ROOT), (RESEARCH, ROOT / "research")):
        for name in re.findall(r"\]\(([\w/.-]+)\)", text):
            assert (root / name).exists(), name
    for name in re.findall(r"`(test_\w+\.py)`", (ROOT / "tests" / "README.md").read_text()):
        assert (ROOT / "tests" / name).is_file(), name


def test_help_has_examples_and_is_grouped_by_the_phases_of_the_algorithm(capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and "python train.py --bench" in text
    assert [text.index(f"\n{phase}:") for phase in "HGT"] == sorted(
        text.index(f"\n{phase}:") for phase in "HGT")


def test_the_programs_end_with_an_exit_code():
    assert train.main(["--bench", "nexusraven", "--tau", "2"]) == 2
    assert evaluate.main(["no-such-run"]) == 2
