"""T, and Algorithm 1 as a whole, end to end on the bundled model and samples."""
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import lora
import train
from data.tiny import make
from data import Sample, call_prompt
from data.calls import Call
from model import PrefixCaches, Tokenizer, load_model, seeded
from train import TINY, Agent, Config, fine_tune, main, schedule

# tau = 1 and tasks of the split that the bundled model was trained on: then most samples are adapted
CONFIG = Config(bench="toolalpaca", lr=train.TINY_LR, max_new_tokens=64, tau=1.0)


@pytest.fixture(scope="module")
def agent() -> Agent:
    model = load_model(TINY)
    return Agent(model, Tokenizer(TINY), PrefixCaches(model))


@pytest.fixture(scope="module")
def adapted_one(agent, samples):
    return adapted(agent, samples, n=1)[0]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [data.parse_sample(item, f"toolalpaca-{i}", "test") for i, item in enumerate(make.generate("toolalpaca", "train", 7, 25))]


def self_improve(agent, sample, config) -> train.Record:
    return train.self_improve(agent, [sample], config)[0]


def bits(model) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in model.named_parameters()}


def plain(record: train.Record) -> dict:
    """A record without what differs from run to run."""
    return {name: value for name, value in dataclasses.asdict(record).items() if name != "seconds"}


def adapted(agent, samples, config=CONFIG, n=1) -> list[tuple[Sample, train.Record]]:
    """The first n samples that end up adapted, and their records."""
    found = []
    for sample in samples:
        record = self_improve(agent, sample.without_answers(), config)
        found += [(sample, record)] * (record.outcome == "adapted")
        if len(found) == n:
            return found
    raise AssertionError(f"only {len(found)} of the bundled samples were adapted")


# ------------------------------------------------------------------------------------------------------- Algorithm 1

@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_the_base_weights_keep_every_bit_and_the_adapter_is_gone(agent, samples, adapt):
    before, modules = bits(agent.model), list(agent.model.modules())
    adapted(agent, samples, dataclasses.replace(CONFIG, adapt=adapt), n=1)
    assert bits(agent.model) == before and list(agent.model.modules()) == modules


def test_a_fitting_that_fails_keeps_the_direct_answer_is_counted_and_leaves_no_trace(agent, adapted_one, monkeypatch):
    sample, good = adapted_one
    before = bits(agent.model)
    real = F.cross_entropy
    losses = []

    def poisoned(*args, **kwargs):
        losses.append(real(*args, **kwargs))
        return losses[-1] * (math.nan if len(losses) == 3 else 1)
    monkeypatch.setattr(F, "cross_entropy", poisoned)
    record = self_improve(agent, sample.without_answers(), CONFIG)
    assert (record.outcome, record.answer["text"]) == ("non-finite", record.base["text"]) and len(losses) == 3
    assert bits(agent.model) == before
    monkeypatch.undo()
    assert plain(self_improve(agent, sample.without_answers(), CONFIG)) == plain(good)


def test_a_sure_sample_is_never_trained_on(agent, samples, monkeypatch):
    monkeypatch.setattr(train, "fine_tune", None)               # calling it would fail
    monkeypatch.setattr(train, "synthesize", None)
    for sample in samples[:5]:
        record = self_improve(agent, sample.without_answers(), dataclasses.replace(CONFIG, tau=0.0))
        assert record.outcome == "certain" and record.answer["text"] == record.base["text"]


def test_a_sample_with_one_tool_is_sure(agent, samples):
    record = self_improve(agent, dataclasses.replace(samples[0], tools=samples[0].tools[:1]).without_answers(), CONFIG)
    assert (record.margin, record.outcome) == (1.0, "certain")


@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_one_samples_adapter_never_touches_the_next(agent, samples, adapt):
    config = dataclasses.replace(CONFIG, adapt=adapt)
    def run(order): return {s.id: plain(self_improve(agent, s.without_answers(), config)) for s in order}
    there, back = run(samples[:4]), run(samples[3::-1])
    assert there == back and sum(record["outcome"] == "adapted" for record in there.values()) >= 2


def test_labels_never_reach_the_method(agent, adapted_one):
    sample, record = adapted_one
    canary = dataclasses.replace(sample, answers=(Call("canary", {"x": "canary"}),))
    assert plain(self_improve(agent, canary, CONFIG)) == plain(record)


def test_base_asks_once_and_adapts_nothing(agent, adapted_one):
    sample, record = adapted_one
    direct = self_improve(agent, sample.without_answers(), dataclasses.replace(CONFIG, method="base"))
    assert direct.outcome == "direct" and direct.answer["text"] == record.base["text"] and not direct.pairs


@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_a_batch_gives_each_sample_what_it_gets_alone(agent, samples, adapt):
    config, batch = dataclasses.replace(CONFIG, lr=1e-3, adapt=adapt), [sample.without_answers() for sample in samples[:6]]
    alone, together = [self_improve(agent, sample, config) for sample in batch], train.self_improve(agent, batch, config)
    assert sum(record.outcome == "adapted" for record in alone) >= 2
    for one, row in zip(alone, together):
        assert row.losses == pytest.approx(one.losses, abs=1e-5) and row.norms == pytest.approx(one.norms, abs=1e-4) and row.scores == pytest.approx(one.scores, abs=1e-5, nan_ok=True)
        one.losses, one.norms, one.scores, one.candidates, one.margin = row.losses, row.norms, row.scores, row.candidates, row.margin
        assert plain(row) == plain(one)


def fitted(agent, *rows: list[str], spoiled: int | None = None):
    """The adapters and losses of rows that learn to answer one or more texts; one of them begins with an infinite weight."""
    params = lora.new_params(agent.model, 4, [seeded(*texts) for texts in rows])
    if spoiled is not None:
        with torch.no_grad():
            params["model.layers.2.mlp.down_proj"][0][spoiled] = math.inf
    encode = agent.tokenizer.encode
    with lora.adapters(agent.model, params, 16.0):
        return params, fine_tune(agent, [[(encode(text), encode(text + " answer")) for text in texts] for texts in rows], params,
                                 dataclasses.replace(CONFIG, lr=1e-3))[0]


def test_rows_with_fewer_steps_are_frozen_when_they_are_done(agent):
    rows = [["one"], ["two", "three and more"], ["four"]]
    params, losses = fitted(agent, *rows)
    assert [len(own) for own in losses] == [5, 10, 5]
    for i, texts in enumerate(rows):
        alone, own = fitted(agent, texts)
        assert losses[i] == pytest.approx(own[0], abs=1e-5)
        for name in params:
            for both, one in zip(params[name], alone[name]):
                assert (both[i] - one[0]).abs().max() < 1e-4


def test_a_row_that_fails_stops_alone(agent):
    """Its adapter keeps every bit from then on, the others learn as they do without it."""
    (good, alone), (both, losses) = fitted(agent, ["good"]), fitted(agent, ["good"], ["bad"], spoiled=1)
    assert losses[0] == pytest.approx(alone[0], abs=1e-5) and len(losses[1]) == 1 and math.isnan(losses[1][0])
    for name, (A, B) in both.items():
        assert (B[1] == 0).all() and (B[0] != 0).any() and (A[0] - good[name][0][0]).abs().max() < 1e-4


# -------------------------------------------------------------------------------------------------------- fine_tune

class MaskedLoRA(lora.LoRALinear):
    """The plain twin of --adapt suffix: one full pass in which the adapter is switched off before `start`."""
    start = 0

    def forward(self, x):
        on = (torch.arange(x.shape[1]) >= self.start)[None, :, None]
        return self.base(x) + (super().forward(x) - self.base(x)) * on


@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_training_equals_a_plain_loop_over_the_whole_prompt(agent, samples, adapt, monkeypatch):
    model, tokenizer = agent.model, agent.tokenizer
    head, rest = tokenizer.split_chat(call_prompt(samples[0]))
    answer = tokenizer.encode(data.call_text(samples[0].answers)) + [tokenizer.im_end]
    config = dataclasses.replace(CONFIG, adapt=adapt, lr=1e-4)

    def fresh(): return lora.new_params(model, 4, [seeded("twin")])
    ours = fresh()
    with lora.adapters(model, ours, 16.0):
        prefix = agent.prefixes.read(head) if adapt == "suffix" else None
        (losses,), (norms,) = fine_tune(agent, [[(rest if prefix else head + rest, answer)]], ours, config, prefix)

    twin, twin_losses, twin_norms = fresh(), [], []
    monkeypatch.setattr(lora, "LoRALinear", MaskedLoRA)
    monkeypatch.setattr(MaskedLoRA, "start", len(head) if adapt == "suffix" else 0)
    with lora.adapters(model, twin, 16.0) as tensors:
        optimizer = torch.optim.AdamW(tensors, weight_decay=0.0)
        for step in range(config.epochs):
            ids = torch.tensor([head + rest + answer])
            logits = model.logits(model(ids))[0, :-1]                       # every position, as a plain version would
            mask = torch.arange(ids.shape[1] - 1) >= len(head + rest) - 1
            loss = F.cross_entropy(logits[mask], ids[0, 1:][mask])
            optimizer.zero_grad()
            loss.backward()
            twin_norms.append(torch.nn.utils.clip_grad_norm_(tensors, 1.0).item())
            optimizer.param_groups[0]["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / config.epochs))
            optimizer.step()
            twin_losses.append(loss.item())
    assert losses == pytest.approx(twin_losses, abs=1e-5) and losses[-1] < losses[0] and norms == pytest.approx(twin_norms, rel=1e-3)
    for name in ours:
        for mine, theirs in zip(ours[name], twin[name]):
            assert (mine - theirs).abs().max() < 1e-5


def kept(model, params, ids) -> tuple[int, list[torch.Tensor]]:
    """The bytes that a pass keeps for its gradients, and the gradients."""
    storages = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *(t for pair in params.values() for t in pair))}

    def pack(t):
        if (where := t.untyped_storage().data_ptr()) not in own:
            storages[where] = t
        return t
    with lora.adapters(model, params, 16.0) as tensors:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            hidden = model(ids)
        return sum(t.untyped_storage().nbytes() for t in storages.values()), list(torch.autograd.grad(hidden.square().sum(), tensors))


def test_checkpointing_keeps_less_and_changes_no_gradient(agent, samples):
    ids = torch.tensor([agent.tokenizer.chat(call_prompt(samples[0]))])
    def fresh(): return lora.new_params(agent.model, 4, [seeded("kept")])
    plain, gradients = kept(agent.model, fresh(), ids)
    agent.model.checkpointing = True
    less, same = kept(agent.model, fresh(), ids)
    agent.model.checkpointing = False
    assert less < plain / 8 and all((a - b).abs().max() < 1e-5 for a, b in zip(gradients, same))
    assert plain < train.kept_bytes(agent.model, ids.shape[1]) < 2 * plain


@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_checkpointing_learns_the_same(agent, samples, adapt):
    config = dataclasses.replace(CONFIG, adapt=adapt, filter="none")
    plain_, saving = (self_improve(agent, samples[0].without_answers(), dataclasses.replace(config, checkpointing=how)) for how in ("off", "on"))
    agent.model.checkpointing = False
    assert plain_.losses and saving.losses == pytest.approx(plain_.losses, abs=1e-5) and saving.answer == plain_.answer


def test_the_schedule_by_hand():
    assert [round(schedule(s, 5, 0.03), 3) for s in range(5)] == [1.0, 0.905, 0.655, 0.345, 0.095]
    assert [schedule(s, 100, 0.03) for s in range(4)] == [0, 1 / 3, 2 / 3, 1.0]
    assert schedule(99, 100, 0.0) < 0.001


# ------------------------------------------------------------------------------------------------------ the program

def run(tmp_path, *flags, out="run", code=0) -> list[dict]:
    folder = tmp_path / out
    assert main(["--bench", "nexusraven", "--model", "tiny", "--device", "cpu", "--out", str(folder), *flags]) == code
    return evaluate.read_records(folder) if code == 0 else []


def test_the_demonstration_gives_the_numbers_of_the_readme(tmp_path):
    """TT-SI over the bundled samples, end to end: float32, seed 0. A sample or two may fall otherwise on another CPU."""
    found = evaluate.summarise(run(tmp_path))
    assert found["base_accuracy"] == pytest.approx(0.56, abs=0.02) and found["accuracy"] == pytest.approx(0.56, abs=0.04)
    assert found["uncertain"] == pytest.approx(11, abs=1) and found["adapted"] == pytest.approx(6, abs=1)


def without_seconds(records): return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def test_a_run_folder_holds_what_others_rely_on(tmp_path, capsys):
    records = run(tmp_path, "--limit", "4")
    for key in ("id", "margin", "uncertain", "candidates", "base", "answer", "pairs", "rejected", "losses", "seconds"):
        assert all(key in record for record in records)
    assert {"text", "exact", "reason"} <= records[0]["base"].keys() & records[0]["answer"].keys()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"n", "uncertain", "base_accuracy", "accuracy", "fixed", "harmed", "seconds"} <= summary.keys()
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].count("bundled") == 2 and "--model" in printed and "fixed" in printed


def test_a_run_that_was_cut_at_any_byte_goes_on_and_ends_the_same(tmp_path, capsys):
    whole = run(tmp_path, "--limit", "4")
    path = tmp_path / "run" / "records.jsonl"
    content = path.read_bytes()
    for cut in (0, 10, content.index(b"\n") + 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        assert without_seconds(run(tmp_path, "--limit", "4")) == without_seconds(whole)
    assert "torn" in capsys.readouterr().out


def test_finished_samples_are_not_computed_again(tmp_path, monkeypatch):
    run(tmp_path, "--limit", "2")
    monkeypatch.setattr(train, "self_improve", None)
    assert len(run(tmp_path, "--limit", "2")) == 2


def test_another_configuration_does_not_go_into_the_same_folder(tmp_path, capsys):
    before = run(tmp_path, "--limit", "1", "--seed", "1")
    run(tmp_path, "--limit", "1", "--seed", "2", code=2)
    error = capsys.readouterr().err
    assert "seed is 1 there, 2 now" in error and "--overwrite" in error
    assert without_seconds(evaluate.read_records(tmp_path / "run")) == without_seconds(before)
    run(tmp_path, "--limit", "1", "--seed", "2", "--overwrite")


def small(**changes) -> str:
    item = {"query": "hi", "tools": [{"name": "f", "description": "", "parameters": {}}], "answers": [{"name": "f", "arguments": {}}]}
    return json.dumps([item | changes])


@pytest.mark.parametrize("flags, said", [
    (["--tau", "1.5"], "--tau 1.5"), (["--tau", "nan"], "--tau"), (["--k", "0"], "--k 0"), (["--lr", "-1"], "--lr"),
    (["--model", "./nowhere", "--data", "FILE"], "no such folder"), (["--model", "nobody/nothing", "--data", "FILE", "--offline"], "--model nobody/nothing"),
    (["--model", "EMPTY", "--data", "FILE"], "tokenizer.json"), (["--targets", "x_proj"], "x_proj"),
    (["--data", "nowhere.json"], "nowhere.json"), (["--data", "BROKEN"], "broken.json"), (["--data", "VOID"], "void.json"),
    (["--data", "LONG"], "2048"), (["--device", "nonsense"], "--device nonsense"), (["--max-new-tokens", "2040"], "context")])
def test_a_users_mistake_is_one_line_code_2_and_nothing_written(tmp_path, capsys, flags, said):
    (tmp_path / "empty").mkdir()
    files = {"EMPTY": tmp_path / "empty"}
    for name, content in (("FILE", small()), ("BROKEN", "[{"), ("VOID", "[]"), ("LONG", small(query="word " * 3000))):
        files[name] = tmp_path / f"{name.lower()}.json"
        files[name].write_text(content)
    run(tmp_path, *[str(files.get(flag, flag)) for flag in flags], code=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("train.py: error: ") and said in error
    assert not (tmp_path / "run").exists()


def test_an_unknown_bench_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--bench", "nonsense"])
    assert exit_.value.code == 2 and "sealtool" in capsys.readouterr().err


def test_an_interrupted_run_prints_its_table_and_how_to_go_on(tmp_path, monkeypatch, capsys):
    real, calls = train.self_improve, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(train, "self_improve", interrupted)
    run(tmp_path, "--limit", "5", code=130)
    assert "2 of 5" in capsys.readouterr().out and len(evaluate.read_records(tmp_path / "run")) == 2
