"""What the README says of commands, flags, files, sizes and choices is so."""
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

import evaluate
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = sorted(p for p in [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")] if not p.name.startswith("."))


def rows(section: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")][2:]


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.S | re.M)
    inline = re.findall(r"`((?:python|for) [^`]+)`", README)
    return [line.split("   #")[0].strip() for block in blocks for line in block.splitlines()] + inline


def test_the_files_in_the_table_are_the_files_there_are_and_their_sizes_hold():
    listed = {row[0].strip("`"): int(row[1]) for row in rows("The files, in reading order")}
    assert set(listed) == {str(p.relative_to(ROOT)) for p in SOURCES}
    for name, lines in listed.items():
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) == pytest.approx(lines, rel=0.05), name


def test_every_choice_of_ours_is_in_the_table_and_no_other():
    listed = Counter(row[0].strip("`") for row in rows("Where we differ from the paper"))
    assert listed == {str(p.relative_to(ROOT)): n for p in SOURCES if (n := p.read_text(encoding="utf-8").count("# ours:"))}


def test_every_train_command_is_understood():
    found = [c for c in commands() if c.startswith("python train.py")]
    assert len(found) >= 4
    for command in found:
        train.parse_args(shlex.split(command.replace("$s", "0"))[2:])


def test_every_flag_is_known(capsys):
    known = (ROOT / "tests" / "benchmark.py").read_text(encoding="utf-8")
    for program in (train, evaluate):
        with pytest.raises(SystemExit):
            program.main(["--help"])
        known += capsys.readouterr().out
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= set(re.findall(r"--[a-z][a-z-]+", known))


def test_the_commands_files_exist():
    for command in commands():
        for file in re.findall(r"(?:python|-r) ([\w/.-]+\.(?:py|txt))", command):
            assert (ROOT / file).is_file(), command
    for name in re.findall(r"`(test_\w+\.py)`", README):
        assert (ROOT / "tests" / name).is_file()


def test_the_help_prints_in_full_and_has_examples(capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--help"])
    assert exit_.value.code == 0 and "python train.py --bench" in capsys.readouterr().out
