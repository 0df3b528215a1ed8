"""research/orders.py: the candidates are scored under other orders of the tools."""
import math
from dataclasses import replace

import pytest
from hand_made import record

from data.calls import parse_calls
from data.runs import Lines, read_run
from research import orders
from research.orders import Ordered, averaged, mean_p, tables
from research.scores import scores_of
from train import Assessed

SURE, UNSURE, OTHER = [math.log(p) for p in (0.9, 0.1)], [0.0, 0.0], [-9.0, 0.0]


def test_each_sample_has_its_own_order_first_and_mutual_information_can_be_told(tmp_path):
    args = ["--bench", "toolalpaca", "--model", "tiny", "--limit", "3", "--orders", "2"]
    assert orders.main([*args, "--max-new-tokens", "4", "--out", str(tmp_path / "run")]) == 0
    for record in read_run(tmp_path / "run").records:
        own, other = record.extra["orders"]
        assert own == pytest.approx(list(record.candidates.values()), abs=1e-3)
        assert other != pytest.approx(own, abs=1e-6)
        assert scores_of([record])["mutual_information"][0] > 0


def test_p_is_averaged_and_not_l():
    assert mean_p([SURE, UNSURE]).tolist() == pytest.approx([0.7, 0.3])
    h, o = Lines({"a": Assessed("a", candidates={"f": -3.0, "g": -1.0}, text="t"),
                  "b": Assessed("b", failed="too long")}), Lines()
    o["a"], o.key = Ordered("a", orders=[SURE, UNSURE]), {"stage": "orders"}
    lines = averaged(h, o)
    assert lines["a"].margin == pytest.approx(0.4) and lines["b"] is h["b"]
    assert {n: math.exp(l) for n, l in lines["a"].candidates.items()} == pytest.approx(
        {"f": 0.7, "g": 0.3})
    assert lines["a"].text == "t" and lines.key == o.key and h["a"].candidates["g"] == -1.0


def test_the_tables_of_two_draws_by_hand():
    """Three samples; the last is wrong, and unsure in the first order alone."""
    rows = [[SURE, SURE], [SURE, UNSURE], [UNSURE, OTHER]]
    records = [record(i, i < 2, False, extra={"orders": own}) for i, own in enumerate(rows)]
    unknown = record("y", True, True, extra={"orders": rows[0]})
    unknown = replace(unknown, base=replace(unknown.base, exact=None))      # no gold answer
    one, two = tables([*records, unknown, record("x", True, True)])["u from p averaged over orders"]
    assert (one["orders"], one["n"], one["uncertain"]) == (1, 3, 3)
    assert one["AUROC, wrong answer"] == 1 and two["AUROC, wrong answer"] == 0.5
    u, other = [0.8, 0.8, 0.0], [0.8, 0.0, 1 - 2 / (1 + math.exp(9))]
    mean, other_mean = sum(u) / 3, sum(other) / 3
    over = sum((a - mean) * (b - other_mean) for a, b in zip(u, other))
    under = math.sqrt(sum((a - mean) ** 2 for a in u) * sum((b - other_mean) ** 2 for b in other))
    assert one["correlation of u"] == pytest.approx(over / under, abs=1e-3)
    assert one["same likeliest tool"] == pytest.approx(2 / 3) and "correlation of u" not in two


def test_with_average_the_mean_gates_and_names_the_pairs_tool(tmp_path):
    args = ["--bench", "sealtool", "--model", "tiny", "--limit", "6", "--orders", "3", "--average",
            "--epochs", "1", "--max-new-tokens", "12", "--out", str(tmp_path / "run")]
    assert orders.main(args) == 0
    records, seen = read_run(tmp_path / "run").records, 0
    for r in records:
        p = mean_p(r.extra["orders"])
        first, second = p.topk(2).values.tolist()
        assert r.margin == pytest.approx(first - second, abs=1e-4)
        assert r.uncertain == (r.margin < 0.95) == (r.outcome != "certain")
        for pair in r.pairs:
            call, = parse_calls(pair["text"]).calls
            assert call.name == max(r.candidates, key=r.candidates.get) == list(
                r.candidates)[int(p.argmax())]
            seen += 1
    assert seen
