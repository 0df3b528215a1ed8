"""research/orders.py: the candidates are scored under other orders of the tools."""
import pytest

from data.runs import read_run
from research import orders
from research.scores import scores_of


def test_each_sample_has_its_own_order_first_and_mutual_information_can_be_told(tmp_path):
    args = ["--bench", "toolalpaca", "--model", "tiny", "--limit", "3", "--orders", "2"]
    assert orders.main([*args, "--max-new-tokens", "4", "--out", str(tmp_path / "run")]) == 0
    for record in read_run(tmp_path / "run").records:
        own, other = record.extra["orders"]
        assert own == pytest.approx(list(record.candidates.values()), abs=1e-3)
        assert other != pytest.approx(own, abs=1e-6)
        assert scores_of([record])["mutual_information"][0] > 0
