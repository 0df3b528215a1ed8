"""H, T and Algorithm 1 on the bundled model: what is learnt, what is left alone, what is told."""
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lora
import train
from augment import LocalWriter, stands_in
from data import Sample, call_prompt, call_text, request_text
from data.calls import Call, parse_calls
from model import Tokenizer, seeded
from train import Agent, Config, Kept, adapt, answer_loss, assess, fine_tune, schedule, self_improve
from uncertainty import PrefixCaches, softmax_difference

CONFIG = train.choose(Config(bench="toolalpaca", model="tiny", device="cpu", tau=1.0, pair="joint",
                             epochs=2, lr=1e-3, max_new_tokens=32))
LESSON = "Do once more what was done."          # the request of all scripted pairs


@pytest.fixture(scope="module")
def loaded() -> tuple[Agent, list[Sample]]:
    agent, samples = train.set_up(CONFIG)
    samples = [samples[i] for i in (29, 3, 10, 8)]  # short, and of the first the model is unsure
    return replace(agent, writer=teacher(samples), batch=4), samples


@pytest.fixture
def samples(loaded) -> list[Sample]:
    return loaded[1]


@pytest.fixture
def agent(loaded) -> Agent:
    return replace(loaded[0])


@pytest.fixture(scope="module")
def usual(loaded) -> list[dict]:
    """The records of all samples, in one batch, undisturbed."""
    return improved(*loaded)


def teacher(samples: list[Sample]):
    """A writer that knows a call for each sample's tools, so that no test waits for a good one."""
    texts = {request_text(x): f'{LESSON}"\n{call_text(x.answers)}' for x in samples}

    def write(prompts, limit, temperature, top_p, keys):
        return [[texts[p.start.split('"')[1]]] * len(own) for p, own in zip(prompts, keys)]
    return write


def nothing_kept(stage, samples, compute) -> dict:
    return {line.id: line for line in compute(samples)} if samples else {}


def improved(agent: Agent, samples: list[Sample], **changes) -> list[dict]:
    """Algorithm 1 without anything kept: what each record holds, without its seconds."""
    config = replace(CONFIG, **changes)
    outcomes = self_improve(agent, [x.without_answers() for x in samples], config, nothing_kept)
    records = [vars(train.record_of(agent, *pair)) for pair in zip(samples, [config] * 9, outcomes)]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def assert_same(some: list[dict], others: list[dict]) -> None:
    """The same in all but what the size of a batch may change by rounding."""
    for one, other in zip(some, others, strict=True):
        for name in ("outcome", "base", "answer", "ids", "pairs", "rejected", "tokens"):
            assert one[name] == other[name]
        for name in ("losses", "norms", "log_p", "margin", "candidates"):
            assert one[name] == pytest.approx(other[name], abs=1e-3, rel=1e-3)


def bits(model) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in model.named_parameters()}


@contextmanager
def watched(model, act) -> Iterator[None]:
    """Within the block, act(ids, training) before each pass of the model; it may raise."""
    def before(module, args): act(args[0], torch.is_grad_enabled())
    handle = model.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


# ----------------------------------------------------------------------------------------------- H

def test_a_line_of_h_holds_all_that_was_seen(agent, samples):
    sample, tokenizer = samples[0], agent.tokenizer
    line, = assess(agent, [sample], CONFIG)
    assert list(line.candidates) == [tool["name"] for tool in sample.tools]
    assert line.margin == softmax_difference(torch.tensor(list(line.candidates.values()))) < 0.95
    assert line.request == request_text(sample) and line.text == tokenizer.decode(line.ids)
    assert len(line.log_p) == len(line.entropy) == len(line.ids) + 1        # the end token's, too
    prompt, answer = tokenizer.chat(call_prompt(sample)), [*line.ids, tokenizer.im_end]
    mean = answer_loss(agent.model, [(prompt, answer)], None).item()
    assert len(prompt) == line.prompt_tokens
    assert sum(line.log_p) == pytest.approx(-mean * len(answer), abs=1e-4)


def test_with_one_tool_there_is_nothing_to_be_unsure_of(agent, samples):
    record, = improved(agent, [replace(samples[0], tools=samples[0].tools[:1])])
    assert (record["margin"], record["outcome"]) == (1.0, "certain")


# ----------------------------------------------------------------------------------------------- T

class MaskedLoRA(lora.LoRALinear):
    """The plain twin of --adapt suffix: a full pass in which the adapter is off before `start`."""
    start = 0

    def forward(self, x):
        on = (torch.arange(x.shape[1]) >= self.start)[None, :, None]
        return self.base(x) + (super().forward(x) - self.base(x)) * on


def plain_loop(model, prompt, answer, tensors, lr: float, epochs: int) -> list[float]:
    """T as one would write it down: the whole text, every logit, torch's own clipping."""
    optimizer, losses = torch.optim.AdamW(tensors, weight_decay=0.0), []
    ids = torch.tensor([prompt + answer])
    for step in range(epochs):
        logits = model.logits(model(ids))[0, len(prompt) - 1:-1]
        loss = F.cross_entropy(logits, ids[0, len(prompt):])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / epochs))
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_training_equals_a_plain_loop_over_the_whole_prompt(agent, samples, adapt, monkeypatch):
    model, config = agent.model, replace(CONFIG, epochs=5, lr=1e-4, adapt=adapt)
    head, rest = agent.tokenizer.split_chat(call_prompt(samples[0]))
    answer = [*agent.tokenizer.encode(call_text(samples[0].answers)), agent.tokenizer.im_end]
    ours, twin = [lora.new_params(model, 4, [seeded("twin")]) for _ in range(2)]
    prefix = agent.prefixes.read(head) if adapt == "suffix" else None
    with lora.adapters(model, ours, 16.0) as tensors:
        example = (rest if prefix else head + rest, answer)
        (losses,), _ = fine_tune(model, [[example]], tensors, config, prefix)
    monkeypatch.setattr(lora, "LoRALinear", MaskedLoRA)
    monkeypatch.setattr(MaskedLoRA, "start", len(head) if prefix else 0)
    with lora.adapters(model, twin, 16.0) as tensors:
        plain = plain_loop(model, head + rest, answer, tensors, config.lr, config.epochs)
    assert losses == pytest.approx(plain, abs=1e-5) and losses[-1] < losses[0]
    for name in ours:
        for mine, theirs in zip(ours[name], twin[name]):
            assert (mine - theirs).abs().max() < 1e-5


def fitted(agent: Agent, *rows: str, spoiled: int | None = None) -> tuple[dict, list, list]:
    """The adapters of rows that learn two texts each, their losses and norms; one of the rows may
    begin with an infinite weight."""
    params = lora.new_params(agent.model, 4, [seeded(text) for text in rows])
    if spoiled is not None:
        with torch.no_grad():
            params["model.layers.2.mlp.down_proj"][0][spoiled] = math.inf
    encode = agent.tokenizer.encode
    examples = [[(encode(text), encode(text * n + " answer")) for n in (1, 2)] for text in rows]
    with lora.adapters(agent.model, params, 16.0) as tensors:
        return params, *fine_tune(agent.model, examples, tensors, CONFIG)


@pytest.mark.parametrize("spoiled", [None, 1])
def test_a_row_of_a_batch_learns_as_it_does_alone_even_beside_one_that_is_not_finite(
        agent, spoiled):
    rows = ["one", "two and more", "three"]
    params, losses, norms = fitted(agent, *rows, spoiled=spoiled)
    for i, text in enumerate(rows):
        if i == spoiled:
            assert not any(map(math.isfinite, losses[i]))
            continue
        alone, own_losses, own_norms = fitted(agent, text)
        assert losses[i] == pytest.approx(own_losses[0], abs=1e-5) and len(losses[i]) == 4
        assert norms[i] == pytest.approx(own_norms[0], rel=1e-4)
        for name in params:
            for both, one in zip(params[name], alone[name]):
                assert (both[i] - one[0]).abs().max() < 1e-4


def test_the_schedule_by_hand():
    assert [round(schedule(s, 5), 3) for s in range(5)] == [1.0, 0.905, 0.655, 0.345, 0.095]
    assert [schedule(s, 100) for s in range(4)] == [0, 1 / 3, 2 / 3, 1.0]
    assert 0 < schedule(99, 100) < 0.001


@pytest.mark.parametrize("adapt_", ["full", "suffix"])
def test_checkpointing_learns_the_same(agent, samples, adapt_):
    lessons = [[(call_prompt(samples[3]), "lesson")]]
    plain, saving = [adapt(agent, samples[3:], lessons, replace(
        CONFIG, adapt=adapt_, checkpointing=how))[0] for how in (False, True)]
    assert saving.losses == pytest.approx(plain.losses, abs=1e-5) and saving.text == plain.text


# --------------------------------------------------------------------------------- the adapter ends

@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_the_base_weights_keep_every_bit_and_the_adapter_is_gone(agent, samples, adapt):
    before, modules = bits(agent.model), list(agent.model.modules())
    record, = improved(agent, samples[:1], adapt=adapt)
    assert record["outcome"] == "adapted" and len(record["losses"]) == len(record["norms"]) == 2
    assert bits(agent.model) == before and list(agent.model.modules()) == modules


def test_also_when_fitting_raises_and_what_is_no_lack_of_memory_is_not_swallowed(agent, samples):
    before, modules, passes = bits(agent.model), list(agent.model.modules()), []

    def fail(ids, training):
        passes.append(training)
        if sum(passes) == 2:
            raise RuntimeError("a mistake of ours")
    with watched(agent.model, fail), pytest.raises(RuntimeError, match="a mistake of ours"):
        improved(agent, samples[:1])
    assert bits(agent.model) == before and list(agent.model.modules()) == modules


@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_no_outcome_depends_on_order_batch_size_or_the_other_samples(agent, samples, adapt, usual):
    together = usual if adapt == "full" else improved(agent, samples, adapt=adapt)
    alone = [improved(agent, [x], adapt=adapt)[0] for x in samples[::-1]]
    assert_same(alone, together[::-1])
    assert [r["outcome"] for r in alone] == ["adapted"] * 4


def test_what_is_cached_of_the_tools_is_always_read_by_the_base_model(agent, samples):
    """Also if nothing stays in the cache, so that a prefix is read when an adapter was trained."""
    forgetful = replace(agent, prefixes=PrefixCaches(agent.model, max_bytes=1))
    for x in samples[:2]:
        improved(forgetful, [x], adapt="suffix")
    (key, cache), = forgetful.prefixes.caches.items()
    fresh = PrefixCaches(agent.model).read(key)
    assert all(torch.equal(a, b) for a, b in zip(fresh.keys, cache.keys))


def test_an_adaptation_leaves_no_memory_behind(agent, samples):
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    config, seen = replace(CONFIG, epochs=1, max_new_tokens=1), []
    for i in range(60):
        sample = Sample(str(i), ({"role": "user", "content": "Hi"},), ())
        adapt(agent, [sample], [[(sample.messages, "Ho")]], config)
        seen.append(resident())
    assert seen[-1] - seen[19] < 8e6        # an adapter takes 0.6 MB here, AdamW's state 1.2 MB


# ------------------------------------------------------------------------------------- Algorithm 1

def test_a_sure_sample_is_never_trained_on(agent, samples):
    def never(ids, training): assert not training
    unasked = replace(agent, writer=None)       # to call it would raise
    with watched(agent.model, never):
        for record in improved(unasked, samples, tau=0.0):
            assert record["outcome"] == "certain" and record["answer"] == record["base"]
        for record in improved(unasked, samples, method="base"):
            assert record["outcome"] == "direct" and record["answer"] == record["base"]


def test_tau_only_decides_who_is_adapted(agent, samples, usual):
    first, *others = improved(agent, samples, tau=0.5)
    assert_same([first], usual[:1])
    for record, other in zip(others, usual[1:]):
        assert record["outcome"] == "certain" and record["base"] == other["base"]


@pytest.mark.parametrize("adapt_", ["full", "suffix"])
def test_what_was_learnt_is_answered_and_then_forgotten(agent, samples, adapt_):
    lessons = [[(call_prompt(samples[3]), "lesson")]]
    line, = adapt(agent, samples[3:], lessons, replace(CONFIG, epochs=12, lr=1e-2, adapt=adapt_))
    assert line.text == "lesson" and line.finite and line.losses[-1] < 0.1 < line.losses[0]
    assert assess(agent, samples[3:], CONFIG)[0].text != "lesson"


def test_a_row_that_is_not_finite_keeps_its_direct_answer_is_counted_and_harms_no_other(
        agent, samples, usual):
    def spoil(module, args, hidden):            # the second row, in training
        return hidden * torch.tensor([1, math.nan])[:, None, None] if hidden.requires_grad else None
    handle = agent.model.register_forward_hook(spoil)
    good, bad = improved(agent, samples[:2])
    handle.remove()
    assert_same([good], usual[:1])
    assert (bad["outcome"], bad["answer"], bad["losses"]) == ("non-finite", bad["base"], [])


class Spy(Tokenizer):
    """Remembers each text that is put into tokens."""

    def encode(self, text: str) -> list[int]:
        self.read = [*getattr(self, "read", []), text]
        return super().encode(text)


def test_labels_never_reach_h_g_t_or_an_answer(agent, samples):
    """A canary in the gold calls is in no text that is ever put into tokens, and the outcome is
    what it is without gold calls. The model itself writes the pairs here."""
    spy, canary, outcomes = Spy(train.TINY), (Call("canary", {"canary": "canary"}),), []
    spied = replace(agent, tokenizer=spy, writer=LocalWriter(agent.model, spy, agent.prefixes))
    config = replace(CONFIG, pair="call")
    for gold in (canary, ()):
        labelled = [replace(x, answers=gold) for x in samples[2:]]
        outcomes.append(self_improve(spied, labelled, config, nothing_kept))
    assert outcomes[0] == outcomes[1] and any(outcome.t for outcome in outcomes[0])
    assert any(request_text(samples[2]) in text for text in spy.read)
    assert not any("canary" in text for text in spy.read)


def test_the_bundled_model_writes_its_pairs_call_first(agent, samples):
    """For the tool that H finds likeliest; each value is in the new request, or read from it."""
    writer = LocalWriter(agent.model, agent.tokenizer, agent.prefixes)
    records = improved(replace(agent, writer=writer), samples, pair="call")
    written = [(record, pair) for record in records for pair in record["pairs"]]
    assert len(written) >= 2
    for record, pair in written:
        call, = parse_calls(pair["text"]).calls
        assert call.name == max(record["candidates"], key=record["candidates"].get)
        spoken = [stands_in(value, pair["request"]) for value in call.arguments.values()]
        assert pair["read_back"] != all(spoken)


def test_a_run_does_not_even_show_them_to_the_method(agent, samples, tmp_path):
    seen, config = [], replace(CONFIG, method="base", out=str(tmp_path / "run"))

    def improve(agent, batch, config, kept):
        seen.extend(batch)
        return self_improve(agent, batch, config, nothing_kept)
    train.run(agent, samples, config, Kept(config, agent.facts), improve)
    assert [x.answers for x in seen] == [()] * 4 and all(x.answers for x in samples)


# ------------------------------------------------------------------------------------ out of memory

def memory_for(rows: int, error: Exception, sizes: list[int]):
    """For `watched`: a memory that holds so many rows in training."""
    def act(ids, training):
        if training:
            sizes.append(len(ids))
            if len(ids) > rows:
                raise error
    return act


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")


def test_out_of_memory_halves_training_alone_and_the_size_that_fits_is_remembered(
        agent, samples, usual):
    sizes = []
    with watched(agent.model, memory_for(2, CUBLAS, sizes)):
        records = improved(agent, samples)
        assert sizes == [4] + [2] * 4                   # 4 failed; then two steps for each two
        improved(agent, samples[:3])
    assert sizes[5:] == [2] * 2 + [1] * 2               # 3 were not tried again
    assert_same(records, usual)


def test_what_does_not_fit_alone_keeps_its_answer_is_counted_and_is_tried_again(
        agent, samples, tmp_path, capsys):
    config = replace(CONFIG, out=str(tmp_path / "run"))
    def go() -> list[dict]:
        assert train.run(agent, samples[:2], config, Kept(config, agent.facts), self_improve) == 0
        lines = Path(config.out, "records.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]
    with watched(agent.model, memory_for(0, CUDA, [])):
        for record in go():
            assert record["outcome"] == "out of memory" and record["answer"] == record["base"]
    assert "out of memory" in capsys.readouterr().out and not list(tmp_path.glob("stages/T-*"))
    assert [record["outcome"] for record in go()] == ["adapted"] * 2
    assert len(list(tmp_path.glob("stages/G-*"))) == 1      # what was written is used
