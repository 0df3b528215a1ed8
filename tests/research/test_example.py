"""The example of research/README.md, as it stands there, is a program."""
import re
from pathlib import Path
from statistics import median

from small import flags

import research
from data.runs import read_run


def test_the_example_of_a_fork_runs_and_leaves_alone_whom_it_says(flags, tmp_path):
    text, fork = (Path(research.__path__[0]) / "README.md").read_text(), {"__name__": "fork"}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], fork)

    def run(floor: float) -> list:
        more = ["--tau", "1", "--epochs", "1", "--floor", str(floor)]
        assert fork["main"]([*flags, *more, "--out", str(tmp_path / str(floor))]) == 0
        return read_run(tmp_path / str(floor)).records
    middle = median([record.margin for record in run(0.0)])
    for floor, tried in ((0.0, 3), (middle, 2)):
        tried_for = [record for record in run(floor) if "G" in record.seconds]
        assert len(tried_for) == tried and all(r.margin >= floor for r in tried_for)
