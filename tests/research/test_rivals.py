"""Each rival does what sets it apart. Where it can be, the lines of H, S and G are made by hand."""
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import data
import train
from augment import Found, LocalWriter, Pair
from data import Sample, call_prompt, call_text
from data.calls import Call
from evaluate import exact_match, read_run
from lora import load_adapter
from model import Tokenizer, load_model
from research import rivals
from research.lessons import majority
from research.rivals import SAMPLED, RivalConfig, Sampled
from research.stream import answer_with
from train import Agent, Kept, PrefixCaches

TOOLS = tuple({"name": name, "description": "", "parameters": {"x": {"type": "integer"}}}
              for name in ("f", "g"))
SAMPLES = [Sample(f"toolalpaca-{i}", ({"role": "user", "content": f"Do {i}."},), TOOLS)
           for i in range(3)]
CONFIG = RivalConfig(model="small", then_vote=True, max_new_tokens=6, epochs=1, draws=2)
FACTS = {"samples": "", "weights": "", "tokenizer": "t", "writer": "", "split": ""}
ONE, OTHER, MISFIT, NONSENSE = "f(x=1)", "g(x=1)", "f(y=1)", "no idea"


@pytest.fixture
def agent(checkpoint):
    model, tokenizer = load_model(checkpoint), Tokenizer(checkpoint)
    return Agent(model, tokenizer, PrefixCaches(model), None, FACTS, 1)


def improve(agent, folder, rival, h=(), s=(), g=(), **options):
    """Outcomes where these are the lines of H (text, margin), S (texts) and G (pairs)."""
    config = replace(CONFIG, out=str(folder / "run"), **options)
    kept = Kept(config, FACTS)
    kept(train.H, SAMPLES, lambda xs: [train.Assessed(
        id=x.id, request="", candidates={}, margin=margin, text=text, ids=[], log_p=[], entropy=[],
        prompt_tokens=9) for x, (text, margin) in zip(xs, h)])
    kept(SAMPLED, SAMPLES[:len(s)], lambda xs: [Sampled(x.id, t) for x, t in zip(xs, s)])
    kept(train.G, SAMPLES[:len(g)], lambda xs: [Found(x.id, p) for x, p in zip(xs, g)])
    return rival(agent, SAMPLES, config, kept)


def texts(outcomes):
    return [outcome.t and outcome.t.text for outcome in outcomes]


def heard(agent) -> list[str]:
    """The texts that the tokenizer encodes from now on."""
    read, encode = [], agent.tokenizer.encode

    def listen(text):
        read.append(text)
        return encode(text)
    agent.tokenizer.encode = listen
    return read


# --------------------------------------------------------------------------------- sampled answers

SURE = [(ONE, 0.94), (ONE, 0.95), (ONE, 1.0)]                       # or not so sure, below tau
DRAWN = [OTHER, MISFIT, NONSENSE, ONE, MISFIT]


@pytest.mark.parametrize("rival, options, h, s, expected", [
    (rivals.vote, {}, SURE, [DRAWN] * 3, [MISFIT, None, None]),     # 2 of 5
    (rivals.vote, {"all": True}, SURE, [DRAWN] * 3, [MISFIT] * 3),
    (rivals.retry, {}, [(NONSENSE, 1.0), (ONE, 0.0), (MISFIT, 0.0)],        # however sure
     [DRAWN, [], [NONSENSE, "h()"]], [OTHER, None, MISFIT])])       # none fits: the direct answer
def test_vote_takes_what_most_call_and_retry_the_first_that_fits(rival, options, h, s, expected,
                                                                 agent, tmp_path):
    outcomes = improve(agent, tmp_path, rival, h, s, **options)
    assert texts(outcomes) == expected
    for outcome, own in zip(outcomes, s):
        drawn = outcome.extra.get("sampled", {"texts": None})
        assert drawn["texts"] == (own if outcome.t else None)


def test_vote_counts_calls_and_not_spellings():
    same = call_text((Call("f", {"x": "1"}),))
    assert majority([OTHER, same, NONSENSE, ONE], SAMPLES[0]) == (same, 2)
    assert majority([OTHER, ONE], SAMPLES[0]) == (OTHER, 1)     # the first among equals


def test_an_answer_is_drawn_by_its_seed_id_and_number():
    keys = []

    def writer(prompts, limit, temperature, top_p, own):
        keys.extend(own)
        return [["", ""]] * len(prompts)
    rivals.draw(writer, SAMPLES[:2], replace(CONFIG, seed=7))
    assert keys == [[(7, x.id, "sample", 0), (7, x.id, "sample", 1)] for x in SAMPLES[:2]]


# ----------------------------------------------------------------------------------- other prompts

def greedy(agent, chat) -> str:
    """The answer by plain passes over everything."""
    ids, answer = agent.tokenizer.chat(chat), []
    for _ in range(CONFIG.max_new_tokens):                          # this model does not end
        hidden = agent.model(torch.tensor([ids + answer]))
        answer.append(int(agent.model.logits(hidden[0, -1]).argmax()))
    return agent.tokenizer.decode(answer)


def test_again_shows_the_direct_answer_and_asks_once_more(agent, tmp_path):
    chat = [*call_prompt(SAMPLES[0]), {"role": "assistant", "content": "the answer"},
            {"role": "user", "content": rivals.ASK_AGAIN}]
    h = [("the answer", 0.0), (ONE, 1.0), (NONSENSE, 1.0)]
    assert texts(improve(agent, tmp_path, rivals.again, h)) == [greedy(agent, chat), None, None]


def test_tticl_shows_the_pairs_before_the_request_and_trains_nothing(agent, tmp_path):
    h, g = [(ONE, 0.0), (ONE, 0.0), (ONE, 1.0)], [[Pair("Do it.", "so")], []]
    first, empty, sure = improve(agent, tmp_path, rivals.tticl, h, g=g)
    system, asked = call_prompt(SAMPLES[0])
    shown = call_prompt(data.with_request(SAMPLES[0], "Do it."))[1]
    chat = [system, shown, {"role": "assistant", "content": "so"}, asked]
    assert first.t.text == greedy(agent, chat) and first.t.losses == [] and first.g.pairs == g[0]
    assert empty.t is None and sure.g is None


def test_icl_shows_k_labelled_examples_drawn_for_each_sample_and_asks_of_all(agent, tmp_path):
    split = [replace(SAMPLES[0], answers=(Call("f", {"x": i}),)) for i in range(5)]
    read, icl = heard(agent), partial(rivals.icl, split=split)
    assert None not in texts(improve(agent, tmp_path, icl, [(ONE, 1.0)] * 3, k=2))
    labels = [call_text(x.answers) for x in split]
    shown = [label for text in read for label in labels if label in text]
    assert len(shown) == 3 * 2 and not shown[:2] == shown[2:4] == shown[4:]
    assert all(shown[i] != shown[i + 1] for i in (0, 2, 4))


# ---------------------------------------------------------------- Algorithm 1, and sampled answers

@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_then_vote_samples_each_samples_own_model(agent, tmp_path, adapt):
    """At temperature 0 a sampled answer is the greedy one: of the adapter, or of the base model."""
    g, h = [[Pair("Do 0.", "a text")], []], [(ONE, 0.0), (ONE, 0.0), (ONE, 1.0)]
    learnt, *others = improve(agent, tmp_path, rivals.then_vote, h, g=g, adapt=adapt, epochs=3,
                              lr=2e-2, temperature=0.0)
    base = [greedy(agent, call_prompt(x)) for x in SAMPLES]
    assert learnt.extra["sampled"]["texts"] == [learnt.t.text] * 2 != [base[0]] * 2
    assert 0 < learnt.extra["sampled"]["seconds"] and 0 < learnt.t.seconds
    assert [o.extra["sampled"]["texts"] for o in others] == [[text] * 2 for text in base[1:]]
    for ids, cache in agent.prefixes.caches.items():                # theta_0's, also after this
        fresh = PrefixCaches(agent.model).read(ids)
        assert all((a == b).all() for a, b in zip(fresh.values, cache.values))


def test_after_the_base_method_every_sampled_answer_is_the_base_models(agent, tmp_path):
    h, s = [(ONE, 0.0)] * 3, [[ONE], [OTHER], []]
    outcomes = improve(agent, tmp_path, rivals.then_vote, h, s, method="base")
    assert texts(outcomes) == [None] * 3 and [o.extra["sampled"]["texts"] for o in outcomes] == s


@pytest.mark.parametrize("name", ["vote", "retry", "again", "tticl", "icl", "then_vote"])
def test_a_label_is_in_nothing_that_a_rival_reads(agent, tmp_path, name):
    read, writer = heard(agent), LocalWriter(agent.model, agent.tokenizer, agent.prefixes)
    labelled = [replace(SAMPLES[0], answers=(Call("canary", {}),))]
    config = replace(CONFIG, all=True, out=str(tmp_path / "run"))
    kept = Kept(config, FACTS)
    kept(train.G, labelled, lambda xs: [Found(x.id, [Pair("a", "b")]) for x in xs])
    split = [SAMPLES[1:]] if name == "icl" else []
    getattr(rivals, name)(replace(agent, writer=writer), labelled, config, kept, *split)
    assert read and not any("canary" in text for text in read)


# -------------------------------------------------------------------------------------- the program

def write_data(path, *requests, **arguments):
    path.write_text(json.dumps([{"query": request, "tools": TOOLS, "answers": [
        {"name": "f", "arguments": arguments}]} for request in requests]))
    return str(path)


@pytest.fixture
def flags(checkpoint, tmp_path):
    """Of a run over three samples."""
    path = write_data(tmp_path / "data.json", "Do one.", "Do two.", "Do three.", x=1)
    return ["--bench", "toolalpaca", "--model", str(checkpoint), "--data", path, "--device", "cpu",
            "--max-new-tokens", "8", "--out", str(tmp_path / "run"), "--lr", "0.01"]


def test_a_run_holds_verdicts_on_what_was_sampled(flags, tmp_path):
    config = train.choose(train.parse_args([*flags, "--rival", "vote", "--all"], RivalConfig))
    agent, samples = train.set_up(config)
    drawn = [[ONE, OTHER], [ONE, ONE], [NONSENSE, MISFIT]]
    Kept(config, agent.facts)(SAMPLED, samples, lambda xs: [
        Sampled(x.id, own) for x, own in zip(xs, drawn)])           # the program reads these lines
    assert rivals.main([*flags, "--rival", "vote", "--all"]) == 0
    run = read_run(tmp_path / "run")
    assert run.config["method"] == "vote"
    for record, sample, own in zip(run.records, samples, drawn):
        assert record.extra["sampled"] == [vars(exact_match(text, sample)) for text in own]
        assert record.answer.text == own[0] and record.tokens["sampled"] > 0
    assert [r.answer.exact for r in run.records] == [True, True, False]


def answer_loss(agent, sample, params, alpha) -> float:
    """Of a sample's own calls, by the model with an adapter."""
    answer = [*agent.tokenizer.encode(call_text(sample.answers)), agent.tokenizer.im_end]
    example = agent.tokenizer.chat(call_prompt(sample)), answer
    with train.adapters(agent.model, params, alpha), torch.no_grad():
        return train.answer_loss(agent.model, [example], None).item()


def test_sft_learns_its_split_once_and_its_checkpoint_answers_alike(flags, tmp_path, capsys):
    split, folder = write_data(tmp_path / "split.json", *"abcde", x=2), tmp_path / "run"
    sft = [*flags, "--rival", "sft", "--train-data", split, "--epochs", "4", "--train-batch", "2",
           "--merged", str(tmp_path / "merged"), "--adapt", "suffix"]  # which sft is not
    assert rivals.main(sft) == 0
    assert "12/12" in capsys.readouterr().err                       # 4 epochs of 2, 2 and 1
    config = train.choose(train.parse_args(sft, RivalConfig))
    (agent, samples), (learnt, *_) = train.set_up(config), rivals.read_split(config)
    params, alpha = load_adapter(folder / "adapter", agent.model)
    assert alpha == config.alpha
    assert answer_loss(agent, learnt, params, alpha) < 0.8 * answer_loss(agent, learnt, {}, alpha)
    records = read_run(folder).records
    said = [record.answer.text for record in records]
    answers = answer_with(agent, samples, params, replace(config, adapt="full"))
    assert said == [line.text for line in answers] != [record.base.text for record in records]
    took = json.loads((folder / "adapter" / "training.json").read_text())["seconds"]
    assert all(record.seconds["T"] > took / 3 for record in records)            # its share
    base = ["--method", "base", "--model", str(tmp_path / "merged"), "--out", str(tmp_path / "new")]
    assert train.main([*flags, *base]) == 0                         # the later flag counts
    assert [record.base.text for record in read_run(tmp_path / "new").records] == said
    capsys.readouterr()
    assert rivals.main([*sft, "--tau", "0.5"]) == 0                 # which is not its business
    assert "sft:" not in capsys.readouterr().err                    # it is not trained again
    assert rivals.main([*sft, "--lr", "1e18"]) == 2
    assert "is not finite; lower --lr" in capsys.readouterr().err


def test_training_data_that_repeats_a_test_request_is_refused(flags, tmp_path, capsys):
    split = write_data(tmp_path / "split.json", "New.", "  DO two ", x=2)       # spaced otherwise
    assert rivals.main([*flags, "--limit", "1", "--rival", "icl", "--train-data", split]) == 2
    assert "1 of its requests are test samples" in capsys.readouterr().err


@pytest.mark.parametrize("more, said", [
    ("", "choose a --rival"), ("--rival vote --then-vote", "choose a --rival"),
    ("--rival icl", "--train-data"), ("--rival vote --train-data x", "--train-data"),
    ("--rival vote --merged x", "--merged x"), ("--then-vote --draws 0", "--draws")])
def test_what_cannot_be_meant_is_refused(more, said, capsys):
    assert rivals.main(more.split()) == 2 and said in capsys.readouterr().err
