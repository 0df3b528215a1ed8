"""research/orders.py: the candidates are scored under other orders of the tools."""
import json

import pytest

import evaluate
from research import orders, scores


def test_each_sample_has_its_own_order_first_and_mutual_information_can_be_told(tmp_path):
    args = ["--bench", "toolalpaca", "--model", "tiny", "--limit", "3", "--method", "base"]
    args += ["--max-new-tokens", "4", "--out", str(tmp_path / "run")]
    assert orders.main([*args, "--orders", "2"]) == 0
    for record in evaluate.read_run(tmp_path / "run").records:
        own, other = record.extra["orders"]
        assert own == pytest.approx(list(record.candidates.values()), abs=1e-3)
        assert other != pytest.approx(own, abs=1e-6)
        assert scores.scores_of([record], None)["mutual_information"][0] > 0
    assert "orders" in json.loads((tmp_path / "run" / "config.json").read_text())
