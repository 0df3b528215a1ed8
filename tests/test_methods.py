"""The rivals of TT-SI and the controls: each does what sets it apart, on the bundled model."""
import dataclasses
import json
import math
import weakref

import pytest

import data
import evaluate
import train
from augment import Found, Pair, local_writer
from data import call_prompt, call_text
from data.calls import Call
from data.tiny import make
from model import ContextError, PrefixCaches, Tokenizer, load_model
from train import TINY, Agent, Config

CONFIG = Config(bench="toolalpaca", lr=train.TINY_LR, max_new_tokens=48, tau=1.0, gate="all")
SAMPLES = [data.parse_sample(item, f"toolalpaca-{i}", "test") for i, item in enumerate(make.generate("toolalpaca", "train", 7, 3))]
RIGHT = [call_text(sample.answers) for sample in SAMPLES]


@pytest.fixture(scope="module")
def agent() -> Agent:
    model = load_model(TINY)
    return Agent(model, Tokenizer(TINY), PrefixCaches(model))


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(train, "fine_tune", None)               # calling it would fail


def run(agent, method, **options) -> list[train.Record]:
    return train.self_improve(agent, [s.without_answers() for s in SAMPLES], dataclasses.replace(CONFIG, method=method, **options))


def asked(monkeypatch, agent) -> list[str]:
    """The prompts that greedy answers are asked for, as text, the direct ones first."""
    prompts, real = [], train.answer

    def answer(agent, rows, contexts, config, cache=None, watch=None):
        prompts.extend(agent.tokenizer.decode(row) for row in rows)
        return real(agent, rows, contexts, config, cache, watch)
    monkeypatch.setattr(train, "answer", answer)
    return prompts


@pytest.mark.usefixtures("untrained")
def test_tticl_puts_the_pairs_before_the_request(agent, monkeypatch):
    pair = Pair("Count my apples.", (Call("f", {}),), "the text of the pair", 3)
    monkeypatch.setattr(train, "synthesize", lambda writer, samples, *rest: [Found([pair])] * len(samples))
    prompts = asked(monkeypatch, agent)
    records = run(agent, "tticl")
    for prompt, sample in zip(prompts[len(SAMPLES):], SAMPLES):
        request = sample.messages[-1]["content"]
        assert prompt.index("Count my apples.") < prompt.index("the text of the pair") < prompt.index(request)
    assert [r.outcome for r in records] == ["adapted"] * 3 and not any(r.losses for r in records)


def test_ttd_trains_on_what_the_teacher_writes(agent, monkeypatch):
    wrote = []

    def synthesize(writer, samples, *rest):
        wrote.append(writer)
        return [Found([Pair("a request", (), "the teacher's text", 3)])] * len(samples)
    monkeypatch.setattr(train, "synthesize", synthesize)
    monkeypatch.setattr(train, "fine_tune", lambda agent, examples, *rest: wrote.append(examples) or ([[0.0]] * len(examples),) * 2)
    run(dataclasses.replace(agent, teacher="the teacher"), "ttd", teacher="somewhere")
    assert wrote[0] == "the teacher" and agent.tokenizer.decode(wrote[1][0][0][1]).startswith("the teacher's text")


@pytest.mark.parametrize("flags", [["--method", "ttd"], ["--teacher", "tiny"]])
def test_a_teacher_and_ttd_belong_together(flags, capsys):
    assert train.main(["--bench", "toolalpaca", *flags]) == 2 and "--teacher" in capsys.readouterr().err


def test_a_run_with_a_teacher(tmp_path):
    assert train.main(["--bench", "toolalpaca", "--model", "tiny", "--device", "cpu", "--limit", "2", "--method", "ttd", "--teacher", "tiny",
                       "--out", str(tmp_path)]) == 0
    assert "teacher" in evaluate.read_json(tmp_path / "facts.json")


def test_a_teacher_apart_writes_the_same_pairs_once(tmp_path, monkeypatch):
    flags = ("--method", "ttd", "--teacher", "tiny", "--limit", "6", "--tau", "0.999", "--filter", "none")
    beside, apart = program(tmp_path / "beside", *flags), program(tmp_path / "apart", *flags, "--teacher-apart")
    assert plain(beside) == plain(apart) and any(r["pairs"] for r in apart)
    (tmp_path / "apart" / "records.jsonl").write_text("")
    monkeypatch.setattr(train, "synthesize", None)              # what the teacher wrote is there
    assert plain(program(tmp_path / "apart", *flags, "--teacher-apart")) == plain(beside)


@pytest.mark.usefixtures("untrained")
def test_again_shows_the_direct_answer_and_asks_once_more(agent, monkeypatch):
    prompts = asked(monkeypatch, agent)
    records = run(agent, "again")
    for prompt, record in zip(prompts[len(SAMPLES):], records):
        assert prompt.index(record.request) < prompt.index(record.base["text"]) < prompt.index("Think again")


def scripted(monkeypatch, *texts):
    monkeypatch.setattr(train, "sample_texts", lambda m, t, p, prompts, limit, temperature, top_p, keys: [list(texts)] * len(prompts))


@pytest.mark.usefixtures("untrained")
def test_vote_counts_calls_and_not_spellings(agent, monkeypatch):
    right, spaced = RIGHT[0], RIGHT[0].replace('": ', '":   ')
    scripted(monkeypatch, "nonsense", right, call_text((Call("other", {}),)), spaced, call_text((Call("third", {}),)))
    record = run(agent, "vote")[0]
    assert record.answer["text"] == right and [s["text"] for s in record.sampled][3] == spaced


@pytest.mark.usefixtures("untrained")
def test_retry_keeps_what_fits_and_else_takes_the_first_that_does(agent, monkeypatch):
    bases = ["nonsense", RIGHT[1], "nonsense"]
    monkeypatch.setattr(train, "answer", lambda agent, rows, contexts, config, cache, watch: [
        (watch(range(len(rows)), agent.model.logits(agent.model(train.torch.tensor([row for row in rows]))[:, -1])), ({"text": text}, 1))[1]
        for text in bases])
    scripted(monkeypatch, "still nonsense", RIGHT[0])
    first, second, third = run(agent, "retry")
    assert (first.answer["text"], first.outcome) == (RIGHT[0], "adapted")
    assert (second.answer["text"], second.sampled) == (RIGHT[1], [])
    assert third.answer["text"] == "nonsense"                   # the other's answer does not fit its tools


@pytest.mark.usefixtures("untrained")
def test_the_gates_are_what_they_say(agent):
    margins = [r.margin for r in run(agent, "base")]
    tau = sorted(margins)[1]                                    # one is below it
    for gate, acted in (("score", [m < tau for m in margins]), ("certain", [m >= tau for m in margins]), ("all", [True] * 3)):
        records = run(agent, "vote", gate=gate, tau=tau, samples=2)
        assert [bool(r.sampled) for r in records] == acted and [r.uncertain for r in records] == [m < tau for m in margins]


@pytest.mark.parametrize("method", ["base", "ttsi", "ttd", "tticl", "vote", "retry", "again", "icl", "sft"])
def test_labels_never_reach_a_method(agent, split, method, monkeypatch):
    """A canary in the gold is in nothing that is ever put into tokens: not in what H, G and T read, nor in what they learn."""
    canaries = [dataclasses.replace(s, answers=(Call("canary", {"x": "canary"}),)) for s in SAMPLES]
    uses = {"ttd": {"teacher": "somewhere"}, "icl": {"train_data": str(split)}, "sft": {"train_data": str(split)}}.get(method, {})
    config = dataclasses.replace(CONFIG, method=method, samples=2, max_new_tokens=16, filter="none", epochs=1, **uses)
    agent = dataclasses.replace(agent, training=tuple(data.load("toolalpaca", str(split)))[:4], others=tuple(canaries),
                                teacher=local_writer(agent.model, agent.tokenizer, agent.prefixes) if method == "ttd" else None)
    if method == "sft":
        agent = dataclasses.replace(agent, adapter=train.supervised(agent, config)[0])
    read, encode = [], type(agent.tokenizer).encode
    monkeypatch.setattr(type(agent.tokenizer), "encode", lambda self, text: read.append(text) or encode(self, text))
    def texts(samples): return [(r.base, r.answer, r.pairs, r.sampled) for r in train.self_improve(agent, samples, config)]
    assert texts(canaries) == texts([s.without_answers() for s in SAMPLES])
    assert any(SAMPLES[0].messages[-1]["content"] in text for text in read) and not any("canary" in text for text in read)


def test_gold_pairs_are_the_one_place_where_a_label_is_read(agent, monkeypatch):
    """So the test above would see it."""
    read, encode = [], type(agent.tokenizer).encode
    monkeypatch.setattr(type(agent.tokenizer), "encode", lambda self, text: read.append(text) or encode(self, text))
    sample = dataclasses.replace(SAMPLES[0], answers=(Call("canary", {}),))
    train.self_improve(agent, [sample], dataclasses.replace(CONFIG, pairs="gold", epochs=1))
    assert any("canary" in text for text in read)


def test_what_was_written_is_counted_in_tokens(agent):
    drawn, = run(agent, "vote", samples=2)[:1]
    assert drawn.tokens["sampled"] == sum(len(agent.tokenizer.encode(s["text"])) for s in drawn.sampled) > 0
    learnt, = run(agent, "ttsi", filter="none", epochs=1)[:1]
    assert learnt.tokens["pairs"] >= sum(len(agent.tokenizer.encode(p["request"] + p["text"])) for p in learnt.pairs) > 0


@pytest.mark.usefixtures("untrained")
def test_retry_acts_on_what_does_not_fit_however_sure_the_model_is(agent, monkeypatch):
    scripted(monkeypatch, RIGHT[1])
    records = run(agent, "retry", tau=0.0)
    assert not any(r.uncertain for r in records) and any(r.sampled for r in records)


def test_what_the_test_asks_is_not_trained_on_even_if_it_is_spaced_otherwise(tmp_path, capsys):
    item = json.loads((train.TINY.parent / "samples" / "toolalpaca.json").read_text())[0]
    item["query"] = f"  {item['query'].upper()} "
    (tmp_path / "train.json").write_text(json.dumps([item]))
    program(tmp_path / "run", "--method", "icl", "--train-data", str(tmp_path / "train.json"), code=2)
    assert "1 of its requests are test samples" in capsys.readouterr().err


NOT_READ = {        # which decide what is run, and on whom, not what is found out about a sample (data and weights have their digests)
    *evaluate.FREE, "bench", "data", "model", "dtype", "adapter", "train_data", "train_limit", "train_batch", "teacher_apart", "tau", "budget", "gate"}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(train.Config) if f.name not in NOT_READ])
def test_every_option_is_looked_at_before_a_sweep_shares_anything(name):
    """A new option must be read by `reads`, or be in NOT_READ on purpose: else a sweep over it would share what differs."""
    field, = (f for f in dataclasses.fields(train.Config) if f.name == name)
    one = train.Config(**{"teacher": {"method": "ttd", "teacher": "a"}, "teacher_model": {"method": "ttd", "teacher": "http://a", "teacher_model": "a"},
                          "samples": {"method": "base", "vote": True}, "gate_score": {"tau": 0.5}}.get(name, {}))
    values = field.metadata.get("choices") or (("cheap", "all") if name == "scores" else
              ("q_proj", "v_proj") if name == "targets" else ("a", "b") if isinstance(field.default, str) else (0.5, 0.25) if isinstance(field.default, float) else (1, 2))
    values = (False, True) if isinstance(field.default, bool) else values
    if name == "method":
        values = ("ttsi", "tticl")
    found = {train.reads(dataclasses.replace(one, **{name: value})) for value in values}
    assert len(found) > 1


def test_a_sample_that_the_teacher_apart_cannot_read_has_no_pair_and_the_others_go_on(tmp_path, monkeypatch):
    real, sizes = train.write_pairs, []

    def too_long(agent, todo, config):
        sizes.append(len(todo))
        if any(sample.id == "toolalpaca-0" and "pairs" not in record.seconds for sample, record in todo):
            raise ContextError("9999 tokens")
        real(agent, todo, config)
    monkeypatch.setattr(train, "write_pairs", too_long)
    first, *others = program(tmp_path, "--method", "ttd", "--teacher", "tiny", "--teacher-apart", "--gate", "all", "--limit", "3", "--batch", "3", "--filter", "none")
    assert sizes[:2] == [3, 1] and (first["outcome"], first["rejected"]) == ("no pair", [{"text": "", "reason": "too long"}])
    assert first["answer"] == first["base"] and [r["outcome"] for r in others] == ["adapted"] * 2


def test_the_teacher_apart_is_gone_before_the_student_comes_back(tmp_path, monkeypatch):
    taught, back, load, to = [], [], train.load_model, train.Qwen2.to

    def loaded(*args):
        model = load(*args)
        taught.append(weakref.ref(model))
        return model

    def moved(self, *args):
        back.append((str(args[0]), sum(ref() is not None for ref in taught)))
        return to(self, *args)
    monkeypatch.setattr(train, "load_model", loaded)
    monkeypatch.setattr(train.Qwen2, "to", moved)
    program(tmp_path, "--method", "ttd", "--teacher", "tiny", "--teacher-apart", "--gate", "all", "--limit", "1")
    assert len(taught) == 2 and back[-1] == ("cpu", 1)                          # of the two, the student alone


@pytest.mark.usefixtures("untrained")
def test_pass_at_k_is_any_of_the_sampled(tmp_path, capsys):
    assert train.main(["--bench", "toolalpaca", "--model", "tiny", "--device", "cpu", "--limit", "3", "--method", "vote", "--gate", "all",
                       "--samples", "3", "--out", str(tmp_path)]) == 0
    records = evaluate.read_records(tmp_path)
    share = sum(any(s["exact"] for s in r["sampled"]) for r in records) / 3
    assert all(len(r["sampled"]) == 3 for r in records) and f"pass@3 {100 * share:.1f}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ gates and controls

PROGRAM = ["--bench", "toolalpaca", "--model", "tiny", "--device", "cpu", "--max-new-tokens", "48"]


def plain(records) -> list[dict]:
    """Records without what differs from run to run."""
    return [{name: value for name, value in r.items() if name != "seconds"} for r in records]


def program(folder, *flags, code=0) -> list[dict]:
    assert train.main([*PROGRAM, "--out", str(folder), *flags]) == code
    return evaluate.read_records(folder) if (folder / "records.jsonl").is_file() else []


@pytest.mark.usefixtures("untrained")
def test_random_lets_as_many_through_as_the_score_and_oracle_those_that_are_wrong(tmp_path):
    flags = ("--method", "vote", "--samples", "2", "--limit", "12")
    by_score = program(tmp_path / "score", *flags)
    count = sum(r["acted"] for r in by_score)
    drawn = [[r["acted"] for r in program(tmp_path / f"random{seed}", *flags, "--gate", "random", "--seed", str(seed))] for seed in (0, 1, 2)]
    assert 0 < count < 12 and all(sum(acted) == count for acted in drawn) and len(set(map(tuple, drawn))) > 1
    for r in program(tmp_path / "oracle", *flags, "--gate", "oracle"):
        assert r["acted"] == (not r["base"]["exact"]) == bool(r["sampled"])
    def shown(name): return evaluate.table(evaluate.read_runs([tmp_path / name]))
    assert "uses labels" in shown("oracle") and "uses labels" not in shown("score")


def test_gold_trains_on_the_samples_own_request_and_calls(agent, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "fine_tune", lambda agent, examples, *rest: seen.extend(examples) or ([[0.0]] * len(examples),) * 2)
    config = dataclasses.replace(CONFIG, pairs="gold")
    records = train.self_improve(agent, SAMPLES, config)
    for sample, (example,), record in zip(SAMPLES, seen, records):
        assert example[0] == agent.tokenizer.chat(call_prompt(sample))
        assert agent.tokenizer.decode(example[1][:-1]) == train.in_form_of(record.base["text"], sample.answers) == record.pairs[0]["text"]


def test_gold_is_written_as_the_model_writes():
    calls = (Call("f", {"x": "<tool_call>"}), Call("g", {}))
    assert train.in_form_of("<tool_call>\n{}", calls) == call_text(calls)
    assert train.in_form_of('{"name": "f"}', calls) == '{"name": "f", "arguments": {"x": "<tool_call>"}}\n{"name": "g", "arguments": {}}'


def test_unrelated_pairs_are_those_of_another_sample(agent, monkeypatch):
    asked, seen = [], []

    def synthesize(writer, samples, *rest):
        asked.extend(samples)
        return [Found([Pair(f"like {s.id}", (), "f()", 3)]) for s in samples]
    monkeypatch.setattr(train, "synthesize", synthesize)
    monkeypatch.setattr(train, "fine_tune", lambda agent, examples, *rest: seen.extend(examples) or ([[0.0]] * len(examples),) * 2)
    run(dataclasses.replace(agent, others=tuple(SAMPLES)), "ttsi", pairs="unrelated")
    for sample, other, (example,) in zip(SAMPLES, asked, seen):
        text = agent.tokenizer.decode(example[0])
        assert other.id != sample.id and f"like {other.id}" in text and other.tools[0]["name"] in text


def test_vote_samples_the_adapted_model_and_the_others_from_the_base(agent, monkeypatch):
    """An adapter that has learnt another answer by heart is heard in the sampled answers, one that was not trained is not."""
    monkeypatch.setattr(train, "synthesize", lambda writer, samples, *rest: [
        Found([Pair(SAMPLES[0].messages[-1]["content"], (), "something else", 3)] if s.id == SAMPLES[0].id else []) for s in samples])
    for adapt in ("full", "suffix"):
        learnt, other, _ = run(agent, "ttsi", vote=True, samples=3, epochs=40, lr=5e-3, adapt=adapt, temperature=0.3)
        assert learnt.answer["text"] == learnt.vote["text"] == "something else" and len(learnt.sampled) == 3
        assert other.outcome == "no pair" and len(other.sampled) == 3 and "something else" not in str(other.sampled)


def test_without_reset_the_adapter_learns_on_and_answers_everyone_and_goes_on_after_a_stop(tmp_path, monkeypatch):
    flags = ("--reset", "never", "--filter", "none", "--tau", "0.9999", "--limit", "8")
    whole = program(tmp_path / "whole", *flags)
    trained = [i for i, r in enumerate(whole) if r["losses"]]
    assert len(trained) >= 2 and all("answer" in r["seconds"] for r in whole[trained[0]:])
    assert len(list((tmp_path / "whole").glob("stream-*"))) == 1
    real, calls = train.improve_or_keep, []

    def stopped(*args):
        calls.append(1)
        if len(calls) > trained[1]:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(train, "improve_or_keep", stopped)
    program(tmp_path / "cut", *flags, code=130)
    monkeypatch.undo()
    assert plain(program(tmp_path / "cut", *flags)) == plain(whole)
    lines = (tmp_path / "cut" / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut" / "records.jsonl").write_bytes(b"".join(lines[:-2]))      # what these two have taught is nowhere any more
    program(tmp_path / "cut", *flags, code=2)
    alone = program(tmp_path / "reset", *flags[2:])
    second = trained[1]                                         # what it starts from is another adapter than a fresh one
    assert alone[trained[0]]["losses"] != [] and alone[second]["losses"] != whole[second]["losses"]


@pytest.mark.parametrize("options", [{}, {"pairs": "unrelated"}, {"reset": "never"}])
def test_what_is_cached_of_the_tools_is_always_the_base_models(agent, monkeypatch, options):
    """Also if nothing stays in the cache, so that a prefix is read when an adapter has been trained."""
    monkeypatch.setattr(train, "synthesize", lambda writer, samples, *rest: [Found([Pair("a request", (), "an answer", 3)]) for s in samples])
    results = []
    for size in (2 << 30, 1):
        forgetful = dataclasses.replace(agent, prefixes=PrefixCaches(agent.model, size), others=tuple(SAMPLES), adapter={})
        batches = [SAMPLES] if "reset" not in options else [[s] for s in SAMPLES]
        config = dataclasses.replace(CONFIG, adapt="suffix", vote=True, kl=True, samples=2, **options)
        results.append([(r.answer, r.sampled, r.kl, r.losses) for batch in batches for r in train.self_improve(forgetful, batch, config)])
        for key, cache in forgetful.prefixes.caches.items():
            fresh = PrefixCaches(agent.model).read(key)
            assert all(train.torch.equal(a, b) for a, b in zip(fresh.keys, cache.keys))
    assert results[0] == results[1]


def test_kl_is_zero_before_training_and_grows_with_it(agent, monkeypatch):
    monkeypatch.setattr(train, "synthesize", lambda writer, samples, *rest: [Found([Pair("a request", (), "an answer", 3)]) for s in samples])
    still, moved = run(agent, "ttsi", kl=True, lr=1e-12)[0].kl, run(agent, "ttsi", kl=True, lr=5e-3)[0].kl
    assert abs(still) < 1e-6 and moved > 1e-3


# ------------------------------------------------------------------------------------------- from a training split

@pytest.fixture
def split(tmp_path):
    path = tmp_path / "split.json"
    path.write_text("[" + ",".join(map(train.json.dumps, make.generate("toolalpaca", "train", 11, 12))) + "]")
    return path


@pytest.mark.usefixtures("untrained")
def test_icl_shows_k_training_examples_before_the_request_and_asks_of_every_sample(agent, monkeypatch, split):
    prompts, training = asked(monkeypatch, agent), tuple(data.load("toolalpaca", str(split)))
    records = run(dataclasses.replace(agent, training=training), "icl", k=2, tau=0.0, gate="score", train_data=str(split))
    for prompt in prompts[len(SAMPLES):]:
        shown = [t for t in training if t.messages[-1]["content"] in prompt]
        assert len(shown) == 2 and all(call_text(t.answers) in prompt for t in shown)
    assert [r.outcome for r in records] == ["adapted"] * 3


def test_sft_trains_once_saves_for_peft_and_the_adapter_can_be_used(tmp_path, monkeypatch, split, capsys):
    flags = ("--limit", "4")
    sft = program(tmp_path / "sft", *flags, "--method", "sft", "--train-data", str(split), "--epochs", "3")
    assert (tmp_path / "sft" / "adapter" / "adapter_model.safetensors").is_file()
    told = evaluate.read_json(tmp_path / "sft" / "sft.json")
    assert sum(r["seconds"]["train"] for r in sft) == pytest.approx(told["seconds"], abs=1e-3) and told["losses"][-1] < told["losses"][0]
    real = train.supervised
    monkeypatch.setattr(train, "supervised", None)              # it is not trained again
    (tmp_path / "sft" / "records.jsonl").write_text("")
    again = program(tmp_path / "sft", *flags, "--method", "sft", "--train-data", str(split), "--epochs", "3")
    assert [r["answer"] for r in again] == [r["answer"] for r in sft]
    monkeypatch.setattr(train, "supervised", real)
    together = program(tmp_path / "batch", *flags, "--method", "sft", "--train-data", str(split), "--epochs", "3", "--batch", "4",
                       "--vote", "--samples", "2", "--kl")       # one adapter for four rows
    assert [r["answer"]["text"] for r in together] == [r["answer"]["text"] for r in sft] and all(r["kl"] > 0 for r in together)
    merged = program(tmp_path / "merged", *flags, "--method", "base", "--adapter", str(tmp_path / "sft" / "adapter"))
    assert [r["base"]["text"] for r in merged] == [r["answer"]["text"] for r in sft]


def test_sft_minimises_the_loss_on_its_split(agent, split):
    agent = dataclasses.replace(agent, training=tuple(data.load("toolalpaca", str(split))))
    sample = agent.training[0]

    def loss(params):
        ids = agent.tokenizer.chat(call_prompt(sample))
        own = agent.tokenizer.encode(call_text(sample.answers))
        with train.adapters(agent.model, params, CONFIG.alpha), train.torch.no_grad():
            hidden = agent.model(train.torch.tensor([ids + own]))[0, len(ids) - 1:-1]
            return train.F.cross_entropy(agent.model.logits(hidden), train.torch.tensor(own)).item()
    config = dataclasses.replace(CONFIG, method="sft", train_data=str(split), epochs=4, train_batch=4)
    params, told = train.supervised(agent, config)
    assert loss(params) < 0.7 * loss({}) and len(told["losses"]) == len(told["norms"]) == 4 * math.ceil(len(agent.training) / 4)


def test_sft_that_was_stopped_while_saving_trains_again_and_one_that_explodes_is_named(tmp_path, split, capsys):
    flags = ("--limit", "2", "--method", "sft", "--train-data", str(split), "--epochs", "1")
    whole = program(tmp_path / "run", *flags)
    (tmp_path / "run" / "adapter" / "adapter_config.json").unlink()             # it is written last
    (tmp_path / "run" / "records.jsonl").write_text("")
    assert [r["answer"] for r in program(tmp_path / "run", *flags)] == [r["answer"] for r in whole]
    program(tmp_path / "exploded", *flags, "--lr", "1e30", code=2)
    assert "sft: the loss is not finite" in capsys.readouterr().err


def test_a_training_split_that_holds_test_samples_is_refused(tmp_path, capsys):
    path = data.Path(data.__file__).parent / "samples" / "toolalpaca.json"
    program(tmp_path / "run", "--method", "icl", "--train-data", str(path), code=2)
    assert "50 of its requests are test samples" in capsys.readouterr().err and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------- sweeps

def test_a_sweep_finds_what_single_runs_find_and_computes_what_is_shared_once(tmp_path, monkeypatch):
    flags = ("--limit", "6", "--batch", "3", "--filter", "none")
    counts = {"assess": 0, "synthesize": 0, "fine_tune": 0}
    for name in counts:
        real = getattr(train, name)

        def counted(*args, name=name, real=real):
            counts[name] += len(args[1])
            return real(*args)
        monkeypatch.setattr(train, name, counted)
    program(tmp_path, *flags, "--sweep", "tau=1,0.5", "--sweep", "epochs=2,4", "--sweep", "gate=all,score")
    adapted = sum(r["outcome"] == "adapted" for r in evaluate.read_records(tmp_path / "tau=1+epochs=2+gate=all"))
    assert counts == {"assess": 6, "synthesize": 6, "fine_tune": 2 * adapted} and adapted >= 2
    monkeypatch.undo()
    for tau, gate in (("0.5", "score"), ("1", "all")):
        alone = program(tmp_path / "alone" / tau, *flags, "--tau", tau, "--epochs", "4", "--gate", gate)
        swept = evaluate.read_records(tmp_path / f"tau={float(tau):g}+epochs=4+gate={gate}")
        assert [r["outcome"] for r in alone] == [r["outcome"] for r in swept]
        for one, other in zip(plain(alone), plain(swept)):
            assert other["losses"] == pytest.approx(one["losses"], abs=1e-5) and other["answer"] == one["answer"]


def test_a_sweep_trusts_only_what_this_code_has_computed_and_overwrite_is_anew(tmp_path, monkeypatch):
    assessed, real = [], train.assess
    monkeypatch.setattr(train, "assess", lambda agent, samples, config: assessed.extend(samples) or real(agent, samples, config))
    flags = ("--limit", "2", "--method", "base")
    program(tmp_path, *flags, "--sweep", "tau=0.5,0.9")
    assert len(assessed) == 2
    program(tmp_path, *flags, "--sweep", "tau=0.5,0.9,0.95")
    assert len(assessed) == 2
    program(tmp_path, *flags, "--sweep", "tau=0.5,0.9", "--overwrite")
    assert len(assessed) == 4
    facts = train.facts
    monkeypatch.setattr(train, "facts", lambda *args: {**facts(*args), "code": "another"})
    program(tmp_path, *flags, "--sweep", "tau=0.5,0.9,0.1")                     # the first two are finished; they go on under another code
    assert len(assessed) == 6
    program(tmp_path, *flags, "--sweep", "tau=0.1,0.2")
    assert len(assessed) == 6


def test_a_folder_that_lost_its_configuration_is_not_gone_on_in(tmp_path, capsys):
    program(tmp_path / "run", "--limit", "1")
    (tmp_path / "run" / "config.json").unlink()
    program(tmp_path / "run", "--limit", "1", code=2)
    assert "records but no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("sweep, said", [("nonsense=1,2", "--sweep nonsense"), ("tau", "--sweep tau"), ("k=1,two", "k is to be a int"),
                                         ("gate=all,none", "gate is one of"), ("tau=0.5,7", "--tau 7")])
def test_a_sweep_that_cannot_be_is_one_line(tmp_path, capsys, sweep, said):
    program(tmp_path / "run", "--sweep", sweep, code=2)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, said", [(("--method", "base", "--gate", "oracle"), "--gate"), (("--method", "vote", "--pairs", "gold"), "--pairs"),
                                         (("--method", "retry", "--k", "4"), "--k"), (("--method", "tticl", "--rank", "4"), "--rank"),
                                         (("--train-limit", "5"), "--train-limit")])
def test_an_option_that_the_method_does_not_look_at_is_refused(flags, said, capsys):
    assert train.main([*PROGRAM, *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{said}:" in error


def test_in_a_sweep_each_method_is_given_what_it_looks_at_and_nothing_runs_twice():
    parts = train.parse_args([*PROGRAM, "--sweep", "method=base,ttsi", "--sweep", "k=1,4", "--adapt", "suffix"])
    assert [(c.method, c.k, c.adapt) for c, _ in parts] == [("base", 1, "full"), ("ttsi", 1, "suffix"), ("ttsi", 4, "suffix")]
