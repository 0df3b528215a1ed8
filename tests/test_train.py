"""H, T and Algorithm 1 on the bundled model: what is learnt, what is left alone, what is told."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import data
import lora
import train
from augment import stands_in
from data import Sample, call_prompt, request_text, with_request
from data.calls import Call, call_start, parse_calls
from data.chat import Tokenizer
from data.runs import Kept, out_of_memory
from model import KVCache, generate, seeded
from train import Agent, Config, schedule, self_improve
from uncertainty import PrefixCaches, score_candidates, softmax_difference

CONFIG = train.fill_in(Config(bench="toolalpaca", model="tiny", device="cpu", tau=1.0, k=2,
                              epochs=2, lr=1e-3, max_new_tokens=24))
# Of the first alone the model is very unsure; for the second it finds one pair, for the others two.
SAMPLES = [data.load("toolalpaca", "bundled")[i] for i in (26, 28, 6)]


@pytest.fixture(scope="module")
def agent() -> Agent:
    return replace(train.set_up(CONFIG)[0], batch=4)


@pytest.fixture(scope="module")
def usual(agent) -> list[dict]:
    """The records of all samples, in one batch, undisturbed."""
    return improved(agent, SAMPLES)


class OnlyHere(Kept):
    """Lines that are nowhere but in this object."""

    def read(self, stage, name): return {}

    def append(self, name, lines): pass


def improved(agent: Agent, samples: list[Sample], kept: Kept | None = None,
             **changes) -> list[dict]:
    """Algorithm 1 without anything on disk: what each record holds, without its seconds."""
    config = replace(CONFIG, **changes)
    kept = kept or OnlyHere(agent, config)
    records = train.improved(samples, config, kept, self_improve, None)
    return [vars(replace(records[x.id], seconds={})) for x in samples]


def assert_same(some: list[dict], others: list[dict]) -> None:
    """The same in all but what the size of a batch may change by rounding."""
    for one, other in zip(some, others, strict=True):
        for name in ("outcome", "base", "answer", "ids", "pairs", "rejected"):
            assert one[name] == other[name]
        for name in ("losses", "norms", "log_p", "margin", "candidates"):
            assert one[name] == pytest.approx(other[name], abs=1e-3, rel=1e-3)


def state(model) -> tuple[list, dict[str, bytes]]:
    """A model's modules, and the bits of its weights."""
    return list(model.modules()), {n: p.numpy().tobytes() for n, p in model.named_parameters()}


# --------------------------------------------------------------------- Algorithm 1, written plainly

class MaskedLoRA(lora.LoRALinear):
    """The plain twin of --adapt suffix and answer: a full pass in which the adapter is off before
    `start`."""
    start = 0

    def forward(self, x):
        on = (torch.arange(x.shape[1]) >= self.start)[None, :, None]
        return self.base(x) + (super().forward(x) - self.base(x)) * on


def starts(adapt: str, head: list[int], prompt: list[int]) -> int:
    """The first token that an adapter acts on."""
    return {"full": 0, "suffix": len(head), "answer": len(prompt) - 1}[adapt]


def plain_training(model, examples, tensors, config, head) -> tuple[list[float], list[float]]:
    """T as one would write it down: whole texts, every logit, torch's own clipping."""
    optimizer, losses, norms = torch.optim.AdamW(tensors, weight_decay=0.0), [], []
    steps = config.epochs * len(examples)
    for step, (prompt, answer) in enumerate(examples * config.epochs):
        ids, MaskedLoRA.start = torch.tensor([prompt + answer]), starts(config.adapt, head, prompt)
        logits = model.lm_head(model(ids))[0, len(prompt) - 1:-1]
        loss = F.cross_entropy(logits, ids[0, len(prompt):])
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(tensors, 1.0).item())
        optimizer.param_groups[0]["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


@torch.no_grad()
def plain_answer(model, tokenizer: Tokenizer, prompt: list[int]) -> str:
    """Greedy decoding by a full pass for each token."""
    ids = []
    while len(ids) < CONFIG.max_new_tokens:
        token = model.lm_head(model([prompt + ids]))[0, -1].argmax().item()
        if token in tokenizer.eos:
            break
        ids.append(token)
    return tokenizer.decode(ids)


@pytest.mark.parametrize("adapt, checkpointing", [("full", False), ("suffix", True),
                                                  ("answer", False)])
def test_a_sample_fares_as_in_a_plain_transcription_of_algorithm_1(
        agent, adapt, checkpointing, monkeypatch):
    model, tokenizer, sample = agent.model, agent.tokenizer, SAMPLES[0]
    forgetful = PrefixCaches(model, max_bytes=1)        # so each phase reads the tools once more
    before, config = state(model), replace(CONFIG, epochs=4, lr=1e-2, adapt=adapt)
    record, _ = improved(replace(agent, prefixes=forgetful), SAMPLES[::2], epochs=4, lr=1e-2,
                         adapt=adapt, checkpointing=checkpointing)
    model.checkpointing = False
    assert state(model) == before                       # l.9  every bit is theta_0's again
    (key, cache), = forgetful.caches.items()
    fresh = PrefixCaches(model).read(key)               # what is kept was read by theta_0 alone
    for own, kept in zip(fresh.keys, cache.keys, strict=True):
        assert torch.allclose(own, kept, atol=1e-5)

    head, rest = tokenizer.chat(call_prompt(sample))
    direct, cache = plain_answer(model, tokenizer, head + rest), KVCache()
    model([[*head, *rest[:-1]]], cache)
    l = score_candidates(model, tokenizer, cache, rest[-1:], [t["name"] for t in sample.tools],
                         call_start(direct), '"')                                       # l.2
    assert record["margin"] == pytest.approx(softmax_difference(l), abs=1e-4)           # l.3
    assert record["base"].text == direct and record["margin"] < config.tau              # l.4
    examples = []
    for pair in record["pairs"]:                                                        # l.5
        prompt = sum(tokenizer.chat(call_prompt(with_request(sample, pair["request"]))), [])
        examples.append((prompt, [*tokenizer.encode(pair["text"]), tokenizer.im_end]))
    monkeypatch.setattr(lora, "LoRALinear", MaskedLoRA)
    params = lora.new_params(model, config.rank, [seeded(config.seed, sample.id, "lora")])
    with lora.adapters(model, params, config.alpha) as tensors:                         # l.6
        losses, norms = plain_training(model, examples, tensors, config, head)          # l.7
        MaskedLoRA.start = starts(adapt, head, head + rest)
        answer = plain_answer(model, tokenizer, head + rest)                            # l.8
    assert record["losses"] == pytest.approx(losses, abs=1e-4) and losses[-1] < losses[0]
    assert record["norms"] == pytest.approx(norms, rel=1e-2)
    assert record["answer"].text == answer != direct


def test_the_schedule_by_hand():
    assert [round(schedule(s, 5), 3) for s in range(5)] == [1.0, 0.905, 0.655, 0.345, 0.095]
    assert [schedule(s, 100) for s in range(4)] == [0, 1 / 3, 2 / 3, 1.0]
    assert 0 < schedule(99, 100) < 0.001


# ------------------------------------------------------------------------- each sample on its own

@pytest.mark.parametrize("adapt", ["full", "suffix", "answer"])
def test_no_outcome_depends_on_order_batch_size_or_the_other_samples(agent, adapt, usual):
    together = usual if adapt == "full" else improved(agent, SAMPLES, adapt=adapt)
    alone = [improved(agent, [x], adapt=adapt)[0] for x in SAMPLES[::-1]]
    assert_same(alone, together[::-1])
    assert [len(record["losses"]) for record in together] == [4, 2, 4]


def test_the_direct_answer_is_the_draft_of_the_adapted_one(agent, usual, monkeypatch):
    given = []

    def spy(*args, drafts=()):
        given.append(drafts)
        return generate(*args, drafts=drafts)
    monkeypatch.setattr(train, "generate", spy)
    assert_same(improved(agent, SAMPLES), usual)
    _, *adapted = given                         # the first are direct answers: theirs are none
    whole = [[*record["ids"], agent.tokenizer.im_end] for record in usual]
    assert given[0] == () and sorted(sum(adapted, [])) == sorted(whole)


def test_tau_decides_who_is_adapted_and_who_is_sure_is_never_trained_on(agent, usual):
    first, *others = improved(agent, SAMPLES, tau=0.5)
    assert_same([first], usual[:1])

    def never(module, args): assert not torch.is_grad_enabled()
    unasked = replace(agent, writer=None)       # to call it would raise
    with agent.model.register_forward_pre_hook(never):
        one_tool, = improved(unasked, [replace(SAMPLES[0], tools=SAMPLES[0].tools[:1])])
        sure = [*others, one_tool, *improved(unasked, SAMPLES, tau=0.0)]
        direct = improved(unasked, SAMPLES, method="base")
    assert one_tool["margin"] == 1.0 and {r["outcome"] for r in sure} == {"certain"}
    assert {r["outcome"] for r in direct} == {"direct"}
    assert all(r["answer"] == r["base"] for r in sure + direct)


def test_a_row_that_is_not_finite_keeps_its_direct_answer_is_counted_and_harms_no_other(
        agent, usual):
    def spoil(module, args, hidden):            # the second row, in training
        return hidden * torch.tensor([1, math.nan])[:, None, None] if hidden.requires_grad else None
    with agent.model.register_forward_hook(spoil):
        good, bad = improved(agent, SAMPLES[::2])
    assert_same([good], usual[:1])
    assert (bad["outcome"], bad["answer"], bad["losses"]) == ("non-finite", bad["base"], [])


# ------------------------------------------------------------------ the model writes its own pairs

def test_labels_never_reach_h_g_t_or_an_answer(agent, usual, monkeypatch):
    """A canary in the gold calls is in no text that is ever put into tokens, and the answers are
    what they are without gold calls."""
    read, encode = [], Tokenizer.encode

    def listen(tokenizer, text):
        read.append(text)
        return encode(tokenizer, text)
    monkeypatch.setattr(Tokenizer, "encode", listen)
    labelled = [replace(x, answers=(Call("canary", {"canary": "canary"}),)) for x in SAMPLES]
    outcomes = self_improve(labelled, CONFIG, OnlyHere(agent, CONFIG))
    assert [outcome.t.text for outcome in outcomes] == [r["answer"].text for r in usual]
    assert improved(agent, labelled)[0]["gold"].count("canary") == 3    # the verdict alone sees it
    assert any(request_text(SAMPLES[0]) in text for text in read)
    assert not any("canary" in text for text in read)


def test_the_bundled_model_writes_its_pairs_call_first(usual):
    """For the tool that H finds likeliest; each value is in the new request, or read from it."""
    written = [(record, pair) for record in usual for pair in record["pairs"]]
    assert len(written) == 5
    for record, pair in written:
        call, = parse_calls(pair["text"]).calls
        assert call.name == max(record["candidates"], key=record["candidates"].get)
        spoken = [stands_in(value, pair["request"]) for value in call.arguments.values()]
        assert pair["read_back"] != all(spoken)


# ------------------------------------------------------------------ numbers that are not numbers

def test_a_sample_whose_numbers_are_not_finite_is_named_and_its_direct_answer_stands(agent, usual):
    """NaN is no confidence: such a sample is neither certain nor uncertain, and harms no other."""
    def spoil(module, args, hidden):            # three rows: what scores the first one's candidates
        return hidden * math.nan if len(hidden) == 3 else None
    assert [len(x.tools) for x in SAMPLES[::2]] == [3, 2]
    with agent.model.register_forward_hook(spoil):
        bad, good = improved(agent, SAMPLES[::2])
    assert_same([good], usual[2:])
    assert (bad["outcome"], bad["margin"], bad["uncertain"]) == ("non-finite", None, False)
    assert bad["answer"] == bad["base"] and bad["base"].text == usual[0]["base"].text


# ----------------------------------------------------------------- out of memory, out of context

CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
                   "allocate memory: you tried to allocate 9 bytes. Error code 12")


def memory_for(rows: int, agent: Agent, error: Exception, sizes: list[int], training: bool = True):
    """Within the block, a memory that holds so many rows in training (or else)."""
    def act(module, args):
        if torch.is_grad_enabled() == training:
            sizes.append(len(args[0]))
            if len(args[0]) > rows:
                raise error
    return agent.model.register_forward_pre_hook(act)


@pytest.mark.parametrize("error, is_memory", [
    (CUBLAS, True), (CPU, True), (torch.OutOfMemoryError("CUDA out of memory."), True),
    (RuntimeError("a mistake of ours"), False)])
def test_torch_says_in_three_ways_that_there_is_no_memory(error, is_memory):
    assert out_of_memory(error) == is_memory


def test_out_of_memory_halves_training_alone_and_the_size_that_fits_is_remembered(agent, usual):
    sizes, kept = [], OnlyHere(agent, CONFIG)
    with memory_for(1, agent, CUBLAS, sizes):
        records = improved(agent, SAMPLES, kept)
        # of three samples the two with two pairs go together first, then each alone; four steps
        assert sizes == [2] + [1] * 4 + [1] * 2 + [1] * 4
        assert kept.sizes == {"T": 1}
    assert_same(records, usual)


def test_out_of_memory_halves_reading_and_writing_too(agent, usual):
    """Direct answers and pairs of a batch, with the same helper; candidates are three rows."""
    sizes, kept = [], OnlyHere(agent, CONFIG)
    batch = [replace(x, id=f"{x.id}-{i}") for i in range(2) for x in SAMPLES]
    with memory_for(3, agent, CUBLAS, sizes, training=False):
        h = kept(train.assess, batch)
        kept(train.synthesize, batch, h)
    assert max(sizes) == 6 and kept.sizes == {"H": 3, "G": 3}
    assert [line.text for line in h.values()] == [r["base"].text for r in usual] * 2


def test_a_sample_that_the_memory_does_not_hold_alone_is_told_in_its_stage(agent):
    for training, kind in ((True, "adapted"), (False, None)):
        with memory_for(0, agent, CUBLAS, [], training):
            record, = improved(agent, SAMPLES[:1])
        assert record["outcome"] == "out of memory" and record["answer"] == record["base"]
        assert (record["margin"] is None) == (kind is None)


def test_a_sample_that_is_too_long_for_the_context_is_told_and_harms_no_other(agent, usual):
    long = replace(SAMPLES[0], id="long", messages=(
        {"role": "user", "content": "word " * agent.model.config.max_position_embeddings},))
    good, bad = improved(agent, [SAMPLES[0], long])
    assert_same([good], usual[:1])
    assert (bad["outcome"], bad["answer"].exact, bad["margin"]) == ("too long", False, None)


def test_another_error_is_not_swallowed_and_every_bit_is_restored(agent):
    before, mistake = state(agent.model), RuntimeError("a mistake of ours")
    with memory_for(0, agent, mistake, []), pytest.raises(RuntimeError, match="a mistake of ours"):
        improved(agent, SAMPLES[:1])
    assert state(agent.model) == before


# --------------------------------------------------------------------------------- padded training

def test_padding_behind_the_tokens_keeps_no_mask_for_the_backward_pass(agent):
    """Two lengths that differ by one token save what two equal ones do."""
    def saved(lengths) -> int:
        tensors = {}

        def note(t):
            tensors[t.data_ptr()] = t.nbytes
            return t
        params = lora.new_params(agent.model, 2, [seeded(i) for i in range(2)])
        examples = [([5] * (n - 8), [7] * 8) for n in lengths]
        with lora.adapters(agent.model, params, 4.0), \
                torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            train.answer_loss(agent.model, examples, [])
        return sum(tensors.values())
    assert saved((200, 199)) < 1.02 * saved((200, 200))


# ---------------------------------------------------------------------------- an answer that is cut

def test_an_answer_that_was_cut_is_told_as_such(agent):
    record, = improved(agent, SAMPLES[:1], max_new_tokens=5)
    assert record["base"].reason == record["answer"].reason == "cut at 5 tokens: unparsable"
    whole, = improved(agent, SAMPLES[:1], max_new_tokens=200, method="base")
    assert "cut" not in whole["base"].reason
