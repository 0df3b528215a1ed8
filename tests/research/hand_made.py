"""Records made by hand, for the tests of what reads run folders."""
import math
from dataclasses import replace

from data.runs import Record, Verdict

GOLD = '{"name": "f", "arguments": {}}'
ONE, OTHER = '{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "arguments": {"x": 1}}'


def verdict(exact: bool, text: str = ONE) -> Verdict:
    return Verdict(text, exact, "" if exact else "wrong name: f for g", {})


def record(id, base: bool, answer: bool, margin: float = 0.5, **changes) -> Record:
    """A sample with two tools, f the likelier one: its direct answer is `base`, and `answer`
    afterwards. Below 0.6 it was adapted to."""
    p, unsure = (1 + margin) / 2, margin < 0.6
    pair = {"request": "Why?", "text": GOLD, "read_back": False}
    seen = Record(
        str(id), f"What is {id} ?", margin, unsure, "adapted" if unsure else "certain",
        {"f": math.log(p), "g": math.log(1 - p)}, verdict(base), verdict(answer),
        [pair] * unsure, [{"text": "bad", "reason": "unknown argument: y"}] * unsure,
        [0.5, 0.25] * unsure, [1.0, 2.0] * unsure, {"H": 1.5}, GOLD, [-1.0, -float(not base)],
        [0.25, 0.75], [1], 9)
    return replace(seen, **changes)


def failed(id) -> Record:
    """A sample that H did not get through: it has no margin and no direct answer."""
    return replace(record(id, False, False), margin=None, uncertain=False, outcome="out of memory",
                   candidates={}, log_p=[], entropy=[], ids=[], pairs=[], rejected=[], losses=[])
