"""The uncertainty scores, the measures of their quality, the gates made of them, and the report: by hand, and against references."""
import dataclasses
import json
import math

import pytest
import torch

import data
import evaluate
import train
import uncertainty as unc
from data.tiny import make
from model import PrefixCaches, Tokenizer, load_model
from train import TINY, Agent, Config, main
from uncertainty import Evidence, SCORES


def tensor(*values) -> torch.Tensor: return torch.tensor(values, dtype=torch.float64)


def evidence(*p: float, **more) -> Evidence:
    return Evidence(**{"id": "x", "prompt_tokens": 7, "candidates": tensor(*p).log(), "lengths": torch.ones(len(p)), "nll": tensor(0.5, 1.5, 0.0),
                       "entropy": tensor(0.25, 0.75, 0.5), "parts": {"answer": [0, 1, 2], "name": [1], "values": []}, **more})


# ----------------------------------------------------------------------------------------------------------- the scores

@pytest.mark.parametrize("name, value", [
    ("margin", 0.5), ("least_confidence", 0.3), ("log_odds", math.log(2 / 7)), ("candidates", 3), ("prompt_tokens", 7), ("answer_tokens", 3),
    ("entropy", -0.7 * math.log(0.7) - 0.2 * math.log(0.2) - 0.1 * math.log(0.1)), ("answer_nll", 2), ("name_nll", 1.5),
    ("answer_perplexity", math.exp(2 / 3)), ("answer_mean_entropy", 0.5), ("answer_max_entropy", 0.75), ("name_max_entropy", 0.75)])
def test_a_score_by_hand(name, value):
    assert SCORES[name].value(evidence(0.7, 0.2, 0.1)) == pytest.approx(value)


def test_scores_of_one_candidate_say_sure_and_of_a_missing_part_nothing():
    e = evidence(1.0)
    assert [SCORES[name].value(e) for name in ("margin", "least_confidence", "entropy", "normalised_entropy")] == [0, 0, 0, 0]
    assert SCORES["log_odds"].value(e) == -math.inf and math.isnan(SCORES["values_nll"].value(e))


def test_normalised_entropy_is_one_where_nothing_is_known_whatever_n():
    assert [SCORES["normalised_entropy"].value(evidence(*[1 / n] * n)) for n in (2, 5)] == pytest.approx([1, 1])


def test_the_mean_margin_divides_by_the_lengths():
    e = evidence(1, 1, candidates=tensor(-1.0, -4.0), lengths=tensor(1, 4))
    assert SCORES["mean_margin"].value(e) == 1 and SCORES["margin"].value(e) < 0.2


def test_mutual_information_is_what_the_orders_disagree_on():
    def mi(*rows): return SCORES["mutual_information"].value(evidence(0.5, 0.5, orders=tensor(*rows).log()))
    assert mi([1 - 1e-12, 1e-12], [1e-12, 1 - 1e-12]) == pytest.approx(math.log(2)) and mi([0.5, 0.5], [0.5, 0.5]) == pytest.approx(0)


def test_votes_and_meanings_by_hand():
    e = evidence(0.5, 0.5, meanings=["a", "a", "b", "c"])
    assert SCORES["vote_share"].value(e) == 0.5
    assert SCORES["semantic_entropy"].value(e) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))


def test_every_score_rises_with_doubt():
    sure = evidence(0.9, 0.1, nll=tensor(0.0, 0.1, 0.0), entropy=tensor(0.1, 0.1, 0.1), parts=dict.fromkeys(("answer", "name", "values"), [1]),
                    orders=tensor([0.9, 0.1], [0.9, 0.1]).log(), meanings=["a"] * 5)
    unsure = dataclasses.replace(sure, candidates=tensor(0.5, 0.5).log(), nll=tensor(0.0, 2.0, 0.0), entropy=tensor(1.0, 1.0, 1.0),
                                 orders=tensor([0.9, 0.1], [0.1, 0.9]).log(), meanings=["a", "a", "b", "c", "d"])
    for name, score in SCORES.items():
        if name not in ("random", "candidates", "prompt_tokens", "answer_tokens"):
            assert score.value(unsure) > score.value(sure), name


def test_scores_are_chosen_by_cost_or_name():
    assert not {"mutual_information", "vote_share"} & set(unc.choose_scores("cheap")) and set(unc.choose_scores("all")) == set(SCORES)
    assert unc.choose_scores("entropy,vote_share") == ("entropy", "vote_share")
    with pytest.raises(ValueError, match="nonsense.*margin"):
        unc.choose_scores("nonsense")


# ------------------------------------------------------------------------------------------------------------ measures

def test_ranking_by_hand():
    found = unc.ranking(tensor(4, 3, 2, 1), tensor(1, 0, 1, 0))
    assert found == pytest.approx({"AUROC": 3 / 4, "AUPR": 5 / 6, "FPR@95": 0.5, "AURC": (0 + 1 / 2 + 1 / 3 + 1 / 2) / 4,
                                   "E-AURC": 0.125, "PRR": (1 / 2 - 1 / 3) / (1 / 2 - 5 / 24)})


def test_ties_count_half_and_one_class_is_no_number():
    found = unc.ranking(tensor(1, 1, 1, 1), tensor(1, 0, 1, 0))
    assert (found["AUROC"], found["AUPR"], found["AURC"], found["PRR"]) == pytest.approx((0.5, 0.5, 0.5, 0))
    for error in (tensor(1, 1), tensor(0, 0)):
        assert all(map(math.isnan, unc.ranking(tensor(1, 2), error).values()))


def test_a_score_that_is_no_number_is_the_least_sure():
    assert unc.ranking(tensor(math.nan, 2, 1), tensor(1, 0, 0))["AUROC"] == 1


@pytest.mark.parametrize("n, levels", [(12, 3), (80, 6), (200, 1000)])
def test_ranking_equals_scikit_learn(n, levels):
    metrics = pytest.importorskip("sklearn.metrics")
    draw = torch.Generator().manual_seed(n)
    score, error = torch.randint(levels, (n,), generator=draw).double(), torch.rand(n, generator=draw) < 0.4
    found = unc.ranking(score, error)
    fpr, tpr, _ = metrics.roc_curve(error, score, drop_intermediate=False)
    assert found["AUROC"] == pytest.approx(metrics.roc_auc_score(error, score))
    assert found["AUPR"] == pytest.approx(metrics.average_precision_score(error, score))
    assert found["FPR@95"] == pytest.approx(fpr[tpr >= 0.95][0])
    p = torch.rand(n, generator=draw, dtype=torch.float64)
    ours = unc.calibration(p, error)
    assert ours["Brier"] == pytest.approx(metrics.brier_score_loss(error, p)) and ours["NLL"] == pytest.approx(metrics.log_loss(error, p))


def test_tied_risks_are_the_mean_over_their_orders():
    import itertools
    score, error = tensor(1, 2, 2, 2, 3), [0, 1, 0, 1, 1]
    orders = [risk for middle in itertools.permutations(error[1:4])
              for risk in [unc.risk_coverage(tensor(1, 2, 3, 4, 5), tensor(error[0], *middle, error[4]))]]
    assert torch.allclose(unc.risk_coverage(score, tensor(*error)), torch.stack(orders).mean(0))


def test_calibration_by_hand():
    found = unc.calibration(tensor(0.95, 0.95, 0.55, 0.55), tensor(1, 0, 1, 1))
    assert found == pytest.approx({"ECE": 0.45, "ECE (equal mass)": 0.475, "MCE": 0.45, "Brier": (0.0025 + 0.9025 + 2 * 0.2025) / 4,
                                   "NLL": -(math.log(0.95) + math.log(0.05) + 2 * math.log(0.55)) / 4})
    assert [count for count, _, _ in unc.reliability(tensor(0.0, 0.1, 0.11, 1.0), tensor(1, 1, 1, 1))] == [2, 1, 1]


def test_temperature_by_hand():
    scores, gold = [tensor(4, 0)] * 4, [0, 0, 0, 1]             # sigmoid(4 / T) = 3 / 4
    assert unc.temperature(scores, gold) == pytest.approx(4 / math.log(3), rel=1e-3)


def test_cross_fitting_never_looks_at_a_samples_own_label():
    scores = [tensor(2 + i % 3, 0) for i in range(20)]
    gold = [int(i % 4 == 0) for i in range(20)]
    one = unc.cross_fitted(scores, gold)
    other = unc.cross_fitted(scores, [1 - g if i == 7 else g for i, g in enumerate(gold)])
    same_fold = [i for i in range(20) if i % 5 == 7 % 5]
    assert (one[same_fold] == other[same_fold]).all() and (one != other).any()


def test_gates_and_gains_by_hand():
    assert unc.gate_rates(tensor(1, 1, 0, 0), tensor(1, 0, 1, 0)) == {"TPR": 0.5, "FPR": 0.5, "precision": 0.5}
    assert math.isnan(unc.gate_rates(tensor(0, 0), tensor(1, 0))["precision"])
    worth = unc.gain_budget(tensor(4, 3, 2, 1), tensor(1, 0, -1, 0))
    assert worth["curve"].tolist() == [0, 0.25, 0.25, 0, 0] and worth["Qini"] == pytest.approx(0.1) and worth["ideal"] == 0.25


def test_thresholds_by_hand():
    assert unc.threshold_between([1, 2, 3, 4], 1) == 3.5 and unc.threshold_between([1, 1], 2) < 1
    assert unc.threshold_between([1, 2, 2, 3], 2) == 2.5 and unc.threshold_between([2, 2, 1], 1) == 2      # ties: fewer
    assert unc.threshold_between([1, 5, math.nan, 2, 4, 3], 2) == 4.5 and unc.threshold_between([1, math.nan], 1) == 1      # NaN: the least sure
    assert unc.otsu([math.nan, -math.inf]) == 0 and unc.otsu([-math.inf, 0, 0.1, 0.9, 1]) == 0.5
    assert unc.otsu([0, 0.1, 0.9, 1]) == 0.5 and unc.otsu([0, 0.1, 0.2, 1]) == 0.6


def test_the_interval_of_a_mean_is_the_textbooks():
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(400, generator=draw, dtype=torch.float64)
    low, high = unc.interval(unc.bootstrap(lambda x: {"mean": x.mean().item()}, x)["mean"])
    assert (low, high) == pytest.approx((x.mean().item() - 1.96 / 20, x.mean().item() + 1.96 / 20), abs=0.02)
    assert unc.interval(tensor(1, math.nan, 1)) == (1, 1)


# ----------------------------------------------------------------------------------------------- collected from a model

@pytest.fixture(scope="module")
def agent() -> Agent:
    model = load_model(TINY)
    return Agent(model, Tokenizer(TINY), PrefixCaches(model))


SAMPLES = [data.parse_sample(item, f"sealtool-{i}", "test") for i, item in enumerate(make.generate("sealtool", "train", 11, 4))]
CONFIG = Config(bench="sealtool", scores="all", max_new_tokens=48)


def test_the_answers_scores_equal_a_plain_pass_over_prompt_and_answer(agent):
    for sample in SAMPLES:
        record, = train.assess(agent, [sample], CONFIG)
        prompt = agent.tokenizer.chat(data.call_prompt(sample))
        answer = agent.tokenizer.encode(record.base["text"])
        answer += [agent.tokenizer.im_end] * (record.tokens["base"] < CONFIG.max_new_tokens)
        with torch.no_grad():
            log_p = agent.model.logits(agent.model(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1]).log_softmax(-1)
        nll, entropy = -log_p[range(len(answer)), answer], -(log_p.exp() * log_p).sum(-1)
        assert record.scores["answer_nll"] == pytest.approx(nll.sum().item(), abs=1e-4)
        assert record.scores["answer_max_entropy"] == pytest.approx(entropy.max().item(), abs=1e-4)


def test_the_parts_of_an_answer(agent):
    text = '<tool_call>\n{"name": "get_user", "arguments": {"name": "Ana", "n": 12, "of": {"x": "y z"}}}\n</tool_call>'
    ids = agent.tokenizer.encode(text)
    parts = unc.answer_parts(agent.tokenizer, ids)
    def read(part): return "".join(agent.tokenizer.decode([ids[i]]) for i in parts[part])
    assert "get_user" in read("name") and "arguments" not in read("name").replace('", "arguments": {', "")
    assert all(value in read("values") for value in ("Ana", "12", "y z")) and "user" not in read("values")


def test_orders_of_the_tools_are_told_back_in_the_samples_order(agent):
    sample = SAMPLES[0]
    rest = agent.tokenizer.split_chat(data.call_prompt(sample))[1]
    names = [tool["name"] for tool in sample.tools]
    own = unc.score_candidates(agent.model, agent.tokenizer, agent.prefixes.read(agent.tokenizer.split_chat(data.call_prompt(sample))[0]), rest, names)
    rows = train.shuffled_orders(agent, sample, CONFIG, rest, own)
    draw = train.seeded(CONFIG.seed, "order", len(names))
    order = next(order for order in iter(lambda: torch.randperm(len(names), generator=draw).tolist(), None) if order != list(range(len(names))))
    shuffled = dataclasses.replace(sample, tools=tuple(sample.tools[i] for i in order))
    prompt = agent.tokenizer.chat(data.call_prompt(shuffled))
    for i, name in enumerate(names):                    # a plain pass over the whole shuffled prompt, one candidate at a time
        cache = agent.model.new_cache()
        plain = unc.score_candidates(agent.model, agent.tokenizer, cache, prompt, [name])
        assert rows[1][i].item() == pytest.approx(plain.item(), abs=1e-4)
    assert rows.shape == (unc.ORDERS, len(names)) and (rows[0] == own).all()


def test_the_orders_of_two_tools_are_two_different_ones(agent):
    sample = dataclasses.replace(SAMPLES[0], tools=SAMPLES[0].tools[:2])
    head, rest = agent.tokenizer.split_chat(data.call_prompt(sample))
    own = unc.score_candidates(agent.model, agent.tokenizer, agent.prefixes.read(head), rest, [tool["name"] for tool in sample.tools])
    rows = train.shuffled_orders(agent, sample, CONFIG, rest, own)
    assert rows.shape == (2, 2) and (rows[0] != rows[1]).all()


def test_the_mean_log_likelihood_is_over_all_tokens_of_the_name_and_its_end(agent):
    names = ["get_user", "get_user_by_name"]
    assert unc.name_lengths(agent.tokenizer, names).tolist() == [len(agent.tokenizer.encode(name)) + 1 for name in names]


def run(folder, *flags) -> list[dict]:
    assert main(["--bench", "sealtool", "--model", "tiny", "--device", "cpu", "--limit", "10", "--method", "base", "--out", str(folder), *flags]) == 0
    return evaluate.read_records(folder)


def test_a_budget_adapts_that_share_by_any_score_and_assesses_nothing_twice(tmp_path, monkeypatch):
    records = run(tmp_path / "a", "--budget", "0.3", "--gate-score", "answer_nll")
    assert sum(r["uncertain"] for r in records) == 3
    surest = max(r["scores"]["answer_nll"] for r in records if not r["uncertain"])
    assert all(r["scores"]["answer_nll"] > surest for r in records if r["uncertain"])
    records = run(tmp_path / "b", "--budget", "0.4")
    assert sum(r["uncertain"] for r in records) == 4 and all(r["uncertain"] == (r["margin"] < r["tau"]) for r in records)
    (tmp_path / "b" / "records.jsonl").write_text("")
    monkeypatch.setattr(train, "assess", None)
    assert run(tmp_path / "b", "--budget", "0.4") == records


def test_another_score_needs_a_threshold_of_its_own(capsys):
    assert main(["--bench", "sealtool", "--gate-score", "entropy"]) == 2 and "--budget" in capsys.readouterr().err


def test_tau_auto_needs_no_label_and_the_table_has_its_regret(tmp_path, capsys):
    records = run(tmp_path, "--tau", "auto")
    tau = records[0]["tau"]
    assert 1 - tau == pytest.approx(unc.otsu([1 - r["margin"] for r in records]))
    assert "chosen without labels; regret" in capsys.readouterr().out


def test_the_report_compares_and_the_pictures_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run(tmp_path / "run", "--scores", "entropy,mutual_information")
    path = tmp_path / "run" / "records.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for i, record in enumerate(records):
        record["base"]["exact"] = record["answer"]["exact"] = i % 2 == 0
        record["scores"]["entropy"] = float(i % 2)                      # one that knows
        record["scores"]["margin"] = float(i % 3)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert evaluate.main([str(tmp_path / "run"), "--uncertainty", "--plot", str(tmp_path / "plots")]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert next(line for line in lines if line[:2] == ["entropy", "1.00"])[-2:] == ["the", "best"] and "worse" in printed
    assert "mutual_information" in printed and "temperature, cross-fitted" in printed and "budget 30 %" in printed
    assert {p.stem for p in (tmp_path / "plots").iterdir()} == {"reliability", "risk_coverage", "margin", "tau", "gain_budget", "seconds"}
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in (tmp_path / "plots").iterdir())

    assert evaluate.main([str(tmp_path / "run")] * 2 + ["--uncertainty"]) == 0
    assert "AUROC in each run" in capsys.readouterr().out

    for record in records:
        record["base"]["exact"] = False
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "all 10 direct answers are wrong" in evaluate.uncertainty_report(tmp_path / "run")[0]


def test_without_matplotlib_there_is_one_clear_line(tmp_path, monkeypatch, capsys):
    run(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert evaluate.main([str(tmp_path), "--plot", str(tmp_path / "plots")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
