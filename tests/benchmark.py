"""Seconds a sample, stage by stage, beside the same work done plainly on transformers and peft.

    python tests/benchmark.py                                       # the bundled model
    python tests/benchmark.py --model DIR --bench toolalpaca --data DIR --limit 1 --dtype bfloat16
    python tests/benchmark.py --random 1.5b --device cuda --dtype bfloat16 --batch 8
    python tests/benchmark.py --growth --model DIR                  # longer prompts, more tools
    python tests/benchmark.py --count 7b --tokens 4000              # operations and bytes, no run

Both sides have the same weights, prompts and number of tokens, and take turns; seconds are medians.
The plain side is what one writes first: every prompt whole, every candidate alone, logits
everywhere. The last column is the share of what this machine can do, measured first: of its matrix
products for stages that read many tokens, of its memory bandwidth for those that write one by one.
"""
import argparse
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import data
import train
from augment import LocalWriter, Prompt, call_form
from data import call_names, call_prompt, request_text
from data.calls import CALL_START, call_text
from data.chat import Tokenizer
from lora import TARGETS, adapters, new_params
from model import (KVCache, ModelConfig, PackedLinear, Qwen2, attend, choose, generate,
                   load_model, seeded)
from uncertainty import PrefixCaches, score_candidates

SIZES = {   # hidden, feed-forward, layers, heads, key/value heads, tied embedding, vocabulary
    "0.5b": (896, 4864, 24, 14, 2, True, 151936), "1.5b": (1536, 8960, 28, 12, 2, True, 151936),
    "7b": (3584, 18944, 28, 28, 4, False, 152064)}
NEW = 32                # tokens that each answer and each request has here
SURE = ("prefill", "score", "direct answer")
SCOPES = ("answer", "suffix", "full")       # the one with the smallest peak of memory first
PARTS = {scope: (f"train {scope}", f"adapted answer {scope}") for scope in SCOPES}
ROWS = {stage: (stage,) for stage in (*SURE, "pair", *sum(PARTS.values(), ()))} | {
    "scoring, nothing cached": SURE[:2], "a certain sample": SURE} | {
    f"an uncertain one, {scope}": (*SURE, "pair", *PARTS[scope]) for scope in SCOPES}


class Clock:
    """Seconds by stage, and how many tokens each stage read or wrote."""

    def __init__(self):
        self.seconds, self.tokens = {}, {}

    def __call__(self, stage: str, work, tokens: int = NEW):
        start = time.perf_counter()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.setdefault(stage, []).append(time.perf_counter() - start)
        self.tokens[stage] = tokens
        return result

    def median(self, *stages: str) -> float:
        """Of their sum, without the first time; the plain side has no prefill and one adapt."""
        known = [stage if stage in self.seconds else f"{stage.rpartition(' ')[0]} full"
                 for stage in stages]
        return sum(statistics.median(self.seconds[s][1:]) for s in known if s in self.seconds)


def device_of(model: Qwen2) -> torch.device:
    return model.model.norm.weight.device


def prompt_ids(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    system, rest = tokenizer.chat(messages)
    return system + rest


def target_ids(tokenizer: Tokenizer, sample: data.Sample) -> list[int]:
    return [*tokenizer.encode(call_text(sample.answers)), tokenizer.im_end]


def pair_prompt(sample: data.Sample) -> Prompt:
    """What a pair's values and request are written after; without an end of its own."""
    line = SimpleNamespace(request=request_text(sample),
                           candidates=dict.fromkeys(call_names(sample), 0.0))
    prompt = call_form(sample, line, sample.answers)
    return Prompt(prompt.messages, prompt.start + prompt.form.start)


def ours(clock: Clock, model: Qwen2, tokenizer: Tokenizer, sample: data.Sample, config,
         scopes=SCOPES) -> None:
    prefixes = PrefixCaches(model)
    head, rest = tokenizer.chat(call_prompt(sample))
    names, target = call_names(sample), target_ids(tokenizer, sample)
    cache = clock("prefill", lambda: prefixes.read(head), len(head))

    def score():
        with torch.no_grad():
            model([rest[:-1]], cache)
        score_candidates(model, tokenizer, cache, rest[-1:], names, CALL_START, '"')
    clock("score", score, len(rest) + sum(len(tokenizer.encode(name)) for name in names))
    direct, = clock("direct answer",
                    lambda: generate(model, tokenizer, [rest[-1:]], NEW, [cache]))
    writer, ask = LocalWriter(model, tokenizer, prefixes), pair_prompt(sample)
    clock("pair", lambda: writer([ask], 2 * NEW, config.temperature, config.top_p, [("pair",)]),
          2 * NEW)
    for adapt in scopes:
        caches, (prompt,) = prefixes.split(tokenizer, [call_prompt(sample)], adapt)
        params = new_params(model, config.rank, [seeded("lora")])
        with adapters(model, params, config.alpha) as tensors:
            rounds = [([(prompt, target)], caches)]
            clock(f"train {adapt}", lambda: train.fine_tune(model, rounds, tensors, config),
                  5 * len(prompt + target))
            clock(f"adapted answer {adapt}",
                  lambda: generate(model, tokenizer, [prompt], NEW, caches, drafts=[direct.ids]))


def random_model(size: str, device: str, dtype: torch.dtype) -> Qwen2:
    hidden, wide, layers, heads, groups, tied, vocabulary = SIZES[size]
    config = ModelConfig(vocabulary, hidden, wide, layers, heads, groups, rms_norm_eps=1e-6,
                         rope_theta=1e6, tie_word_embeddings=tied)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen2(config).to(dtype)
    model.to_empty(device=device)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    return model.requires_grad_(False)


def in_transformers(model: Qwen2):
    """The same weights as a transformers model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    with device_of(model):
        said = {name: value for name, value in vars(model.config).items() if value}
        plain = Qwen2ForCausalLM(Qwen2Config(**said))
    plain.to(model.model.norm.weight.dtype).load_state_dict(model.state_dict(), strict=False)
    return plain.requires_grad_(False).eval()


def plainly(clock: Clock, model, tokenizer: Tokenizer, sample: data.Sample, config) -> None:
    from peft import LoraConfig, get_peft_model
    prompt, device = prompt_ids(tokenizer, call_prompt(sample)), model.device
    target, pair = target_ids(tokenizer, sample), pair_prompt(sample)
    ask = prompt_ids(tokenizer, [*pair.messages, {"role": "assistant", "content": pair.start}])

    def score():
        for tool in sample.tools:
            name = tokenizer.encode(tool["name"])
            ids = torch.tensor([prompt + tokenizer.encode(CALL_START) + name], device=device)
            log_p = model(ids).logits.float().log_softmax(-1)[0, -len(name) - 1:-1]
            log_p.gather(1, torch.tensor(name, device=device)[:, None]).sum()

    def write(ids, model=model, new=NEW, sample=False):
        model.generate(torch.tensor([ids], device=device), max_new_tokens=new, min_new_tokens=new,
                       attention_mask=torch.ones(1, len(ids), device=device), pad_token_id=0,
                       eos_token_id=None, do_sample=sample)

    with torch.no_grad():
        clock("score", score, len(sample.tools) * len(prompt))
        clock("direct answer", lambda: write(prompt))
        clock("pair", lambda: write(ask, new=2 * NEW, sample=True), 2 * NEW)
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(TARGETS))
    wrapped = get_peft_model(model, lora)
    tensors = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tensors, lr=config.lr, weight_decay=0.0)
    ids = torch.tensor([prompt + target], device=device)
    labels = ids.clone()
    labels[:, :len(prompt)] = -100

    def fit():
        for _ in range(5):
            optimizer.zero_grad()
            wrapped(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
    clock("train full", fit, 5 * ids.numel())
    with torch.no_grad():
        clock("adapted answer full", lambda: write(prompt, wrapped))
    wrapped.unload()


def report(model: Qwen2, here: Clock, there: Clock) -> None:
    """Print the table of stages, and what they come to for a sample."""
    device, dtype = device_of(model), model.model.norm.weight.dtype
    machine, big = Clock(), torch.empty(2 ** 26, device=device)
    a = torch.randn(2048, 2048, device=device).to(dtype)
    for _ in range(5):
        machine("product", lambda: a @ a)
        machine("memory", lambda: big.add_(1))
    flops = 2 * 2048 ** 3 / min(machine.seconds["product"])
    bandwidth = 8 * big.numel() / min(machine.seconds["memory"])        # read and written
    print(f"this machine: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s")
    weights = sum(p.numel() for name, p in model.named_parameters()
                  if "embed" not in name or model.config.tie_word_embeddings)
    print(f"{'stage':24}{'ours, s':>10}{'plain, s':>10}{'ratio':>8}{'of the ceiling':>16}")
    for row, stages in ROWS.items():
        if here.seconds and not all([stage in here.seconds for stage in stages]):
            continue
        mine, other = here.median(*stages), there.median(*stages)
        ratio = f"{other / mine:7.1f}x" if mine and other else " " * 8
        share = ""
        if row in here.tokens:
            # a frozen weight passes a gradient on and has none: 2 + 2 operations a token
            operations = (4 if "train" in row else 2) * weights * here.tokens[row]
            share = f"{operations / mine / flops:15.0%}"
            if "answer" in row or row == "pair":
                moved = weights * dtype.itemsize * here.tokens[row]
                share = f"{moved / mine / bandwidth:15.0%}"
        print(f"{row:24}{mine:10.3f}{other:10.3f}{ratio}{share}")


def compare(name: str, plain, fast) -> None:
    """Print medians of 30, and how much faster the second is."""
    clock = Clock()
    for _ in range(31):
        clock("plain", plain)
        clock("fast", fast)
    plain, fast = clock.median("plain"), clock.median("fast")
    print(f"{name:44}{1e3 * plain:9.3f} ms{1e3 * fast:9.3f} ms{plain / fast:7.1f}x")


@torch.no_grad()
def fast_paths(model: Qwen2) -> None:
    """Print how much faster parts with a plain twin are, 573 tokens read."""
    c, device, dtype = model.config, device_of(model), model.model.norm.weight.dtype
    read, d = 573, c.hidden_size // c.num_attention_heads
    layers = [block.mlp.gate_proj for block in model.model.layers]
    for rows in (1, 5, 7, 80) if isinstance(layers[0], PackedLinear) else ():
        x = torch.randn(rows, c.hidden_size, dtype=dtype)
        compare(f"packed gate_proj of all layers, {rows} rows",
                lambda: [F.linear(x, layer.weight) for layer in layers],
                lambda: [layer(x) for layer in layers])
    for rows, new in ((1, 1), (5, 1), (1, 7), (1, 80)):
        q = torch.randn(rows, c.num_attention_heads, new, d, device=device).to(dtype)
        k, v = torch.randn(2, rows, c.num_key_value_heads, read, d, device=device).to(dtype)
        mask = torch.ones(1, 1, new, read, dtype=torch.bool, device=device).tril(read - new)
        mask = None if new == 1 else mask
        compare(f"attention by groups, {rows} x {new} queries",
                lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
                lambda: attend(q, k, v, mask))
    for rows in (1, 8):
        new = torch.randn(rows, c.num_key_value_heads, 1, d, device=device).to(dtype)
        kept = [new.repeat(1, 1, read, 1) for _ in layers]
        both = [KVCache(keys=[*kept], values=[*kept], in_place=in_place)
                for in_place in (False, True)]

        def put(cache):
            cache.length = read + 1
            for layer in range(len(layers)):
                cache.append(layer, new, new)
        compare(f"a token's keys and values put in place, {rows} rows",
                lambda: put(both[0]), lambda: put(both[1]))
        adapter = {name: tuple([t.detach() for t in pair]) for name, pair in
                   new_params(model, 8, [seeded(row) for row in range(rows)]).items()}
        x = torch.randn(rows, 1, c.hidden_size, device=device).to(dtype)
        with adapters(model, adapter, 16.0):
            adapted = [block.mlp.gate_proj for block in model.model.layers]
            compare(f"adapters' float32 for one token, {rows} rows",
                    torch.enable_grad()(lambda: [layer(x) for layer in adapted]),
                    lambda: [layer(x) for layer in adapted])
    steps = []
    for fused in (False, True):
        tensors = [t for pair in new_params(model, 8, [seeded(0)]).values() for t in pair]
        for t in tensors:
            t.grad = torch.randn_like(t)
        steps.append(torch.optim.AdamW(tensors, weight_decay=0.0, fused=fused).step)
    compare("a step of AdamW on an adapter", *steps)
    logits = 8 * torch.randn(1, c.vocab_size, device=device)         # peaked, as a model's are
    compare("a sampled token without sorting all",
            lambda: (logits / 0.7).softmax(-1).sort(descending=True, stable=True),
            lambda: choose(logits, logits, 0.7, 0.95, [seeded(0)]))


def together(model: Qwen2, tokenizer: Tokenizer, samples: list, size: int, config,
             there: Clock) -> None:
    """Print seconds a sample where samples go through Algorithm 1 one by one and `size` at a time,
    beside the plain side's. Those that share their tools share what is read of them."""
    config = replace(config, max_new_tokens=NEW, adapt="answer")
    plain = there.median(*SURE, "pair", *PARTS["full"])
    for batch in (1, size):
        prefixes = PrefixCaches(model)
        writer = LocalWriter(model, tokenizer, prefixes)
        agent = train.Agent(train.CALLING, model, tokenizer, prefixes, writer, {}, batch)
        clock = Clock()
        for i in range(0, len(samples), batch):
            part = samples[i:i + batch]
            asks, lessons = [pair_prompt(x) for x in part], [[(x, call_text(x.answers))]
                                                             for x in part]
            h = clock("H", lambda: train.assess(agent, part, config))
            clock("G", lambda: writer(asks, 2 * NEW, config.temperature, config.top_p,
                                      [("pair", x.id) for x in part]))
            clock("T", lambda: train.learn(agent, part, lessons, config,
                                           drafts=[line.ids for line in h]))
        spent = {stage: sum(seconds) / len(samples) for stage, seconds in clock.seconds.items()}
        whole = sum(spent.values())
        stages = ", ".join([f"{stage} {seconds:.2f}" for stage, seconds in spent.items()])
        ratio = f", {plain / whole:.1f}x" if plain else ""
        print(f"{len(samples)} samples, answer, {batch} at a time: {whole:.2f} s a sample "
              f"({stages}){ratio}")


def sized(tokenizer: Tokenizer, samples: list, tools: int, tokens: int) -> data.Sample:
    """A sample with so many tools, the shortest there are, whose prompt has so many tokens: the
    first tool's description is that much longer."""
    pool = {tool["name"]: tool for x in samples for tool in x.tools}
    pool = sorted(pool.values(), key=lambda tool: len(tokenizer.encode(str(tool))))
    x = replace(samples[0], tools=tuple(pool[:tools]))
    missing = tokens - len(prompt_ids(tokenizer, call_prompt(x)))
    first = {**pool[0], "description": pool[0]["description"] + " and so on" * (missing // 3)}
    return replace(x, tools=(first, *x.tools[1:]))


def growth(model: Qwen2, plain, tokenizer: Tokenizer, samples: list, config, longest: int) -> None:
    """Print seconds by the length of the prompt, and by the number of tools. What acts on all
    tokens is run up to `longest` of them."""
    shapes = [(tokens, 2) for tokens in (250, 500, 1000, 2000, 4000)] + [(1000, 8), (1000, 24)]
    ours(Clock(), model, tokenizer, sized(tokenizer, samples, 2, 250), config)  # to warm up
    print("tokens tools " + " ".join([f"{name.replace(' ', '-')}" for name in ROWS]) + " plain")
    for tokens, tools in shapes:
        sample, here, there = sized(tokenizer, samples, tools, tokens), Clock(), Clock()
        ours(here, model, tokenizer, sample, config, SCOPES if tokens <= longest else SCOPES[:2])
        if plain and tokens <= longest:
            plainly(there, plain, tokenizer, sample, config)
        row = [sum([sum(here.seconds[s]) for s in stages])
               if all([s in here.seconds for s in stages]) else float("nan")
               for stages in ROWS.values()]
        row.append(sum([sum(each) for each in there.seconds.values()]) or float("nan"))
        length = len(prompt_ids(tokenizer, call_prompt(sample)))
        print(length, tools, " ".join([f"{value:.2f}" for value in row]), flush=True)


def count(size: str, tokens: int, names: int = 8, answer: int = NEW) -> None:
    """Print what a sample takes on paper, in bfloat16: operations of the products with weights,
    and bytes of the weights that are read, by stage. Attention, caches and adapters are left
    out. A prompt's last 60 tokens follow the tools; a name has 4."""
    hidden, wide, layers, heads, groups, tied, vocabulary = SIZES[size]
    d = hidden // heads
    body = layers * (hidden * d * (2 * heads + 2 * groups) + 3 * hidden * wide)
    head, rest, train_on = hidden * vocabulary, 60, {"answer": 1, "suffix": 60, "full": tokens}
    rows = {"prefill": (2 * body * (tokens - rest), 1), "score": (2 * body * (rest + 4 * names), 2),
            "direct answer": (2 * (body + head) * answer, answer),
            "pair": (2 * (body + head) * 2 * answer, 2 * answer)}
    for scope, read in train_on.items():
        rows[f"train {scope}"] = (5 * (4 * body * (read + answer) + 4 * head * answer), 10)
        rows[f"adapted answer {scope}"] = (2 * body * read + 2 * (body + head) * answer, answer)
    print(f"{size}, a prompt of {tokens} tokens, {names} tools, answers of {answer}, bfloat16")
    print(f"{'stage':24}{'TFLOP':>10}{'GB':>10}")
    for stage, (operations, passes) in rows.items():
        print(f"{stage:24}{operations / 1e12:10.2f}{2 * (body + head) * passes / 1e9:10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=train.TINY, type=Path, help="(default: the bundled one)")
    parser.add_argument("--random", choices=SIZES, help="random weights of this size; prompts are "
                        "then of the bundled samples, of 24 tools each")
    parser.add_argument("--bench", default="toolalpaca")
    parser.add_argument("--data", default="", help="file or folder (default: the bundled samples)")
    parser.add_argument("--limit", type=int, default=3, help="samples, those whose prompts are "
                        "nearest to --tokens (default: 3)")
    parser.add_argument("--tokens", type=int, help="of a prompt (default: the median)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--only", choices=("ours", "plain"), help="one side, for its peak memory")
    parser.add_argument("--scopes", nargs="*", default=SCOPES, help="what the "
                        "adapter acts on; without one nothing is adapted (default: all three)")
    parser.add_argument("--batch", type=int, default=0, help="also take so many samples at a time")
    parser.add_argument("--in-a-row", type=int, default=8, help="with --batch: of so many, which "
                        "share the first one's tools where the file has so many (default: 8)")
    parser.add_argument("--growth", action="store_true", help="seconds by length and by tools")
    parser.add_argument("--longest", type=int, default=1000, help="with --growth: the longest "
                        "prompt that is adapted as a whole (default: 1000 tokens)")
    parser.add_argument("--count", choices=SIZES, help="operations and bytes on paper, and end")
    args = parser.parse_args()
    if args.count:
        return count(args.count, args.tokens or 1000)
    dtype = getattr(torch, args.dtype)
    tokenizer, config = Tokenizer(args.model), train.Config(lr=1e-4)
    tokenizer.eos = frozenset()             # both sides write on to the limit
    model = random_model(args.random, args.device, dtype) if args.random else \
        load_model(args.model, args.device, dtype, args.device == "cpu")
    samples = data.load(args.bench, args.data or "bundled")
    if args.random:
        tools = {tool["name"]: tool for sample in samples for tool in sample.tools}
        samples = [replace(x, tools=tuple(({t["name"]: t for t in x.tools} | tools).values())[:24])
                   for x in samples]
    if args.growth:
        plain = None if args.only == "ours" else in_transformers(model)
        return growth(model, plain, tokenizer, samples, config, args.longest)
    everyone = samples
    lengths = {x.id: len(prompt_ids(tokenizer, call_prompt(x))) for x in samples}
    wanted = args.tokens or statistics.median_low(lengths.values())
    shortest = min(samples, key=lambda x: lengths[x.id])
    samples = sorted(samples, key=lambda x: abs(lengths[x.id] - wanted))[:args.limit]
    plain = None if args.only == "ours" else in_transformers(model)
    here, there = Clock(), Clock()
    for sample in [shortest, *samples]:                 # the first is to warm up
        if args.only != "plain":
            ours(here, model, tokenizer, sample, config, args.scopes)
        if plain:
            plainly(there, plain, tokenizer, sample, config)
    first = samples[0]
    print(f"{args.random or args.model.name}, {len(samples)} samples, prompts of "
          f"{lengths[first.id]} tokens, {len(first.tools)} tools, {args.device}, {args.dtype}, "
          f"{torch.get_num_threads()} threads")
    report(model, here, there)
    if args.only:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if args.device != "cpu":
            peak = torch.cuda.max_memory_allocated()
        print(f"peak memory {peak / 1e9:.2f} GB, {args.only} alone")
    else:
        fast_paths(model)
    if args.batch:
        alike = [x for x in everyone if x.tools == first.tools]
        alike = alike if len(alike) >= args.in_a_row else everyone
        together(model, tokenizer, alike[:args.in_a_row], args.batch, config, there)


if __name__ == "__main__":
    main()
