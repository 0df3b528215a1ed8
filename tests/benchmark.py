"""Seconds a sample of this project, stage by stage, beside the same work done plainly on transformers and peft.

    python tests/benchmark.py                                     # the bundled model
    python tests/benchmark.py --model DIR --bench toolalpaca --data DIR --limit 3
    python tests/benchmark.py --random 1.5b --device cuda --dtype bfloat16      # random weights of a real size

Both sides have the same weights, prompts and number of tokens, and take turns sample by sample; seconds are medians. The
plain side is what one writes first: every prompt whole, every candidate alone, logits everywhere. The last column is the share
of what this machine can do, measured first: of its matrix products for stages that read many tokens, of its memory
bandwidth (each weight read once a step) for those that write one at a time.
"""
import argparse
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import data
import train
from augment import LABELS, PAIR_START, pair_prompt, request_text
from data import call_prompt, call_text
from lora import adapters, new_params
from model import ModelConfig, PrefixCaches, Qwen2, Tokenizer, attend, generate, load_model, product, sample_token, seeded, speculate
from uncertainty import ANSWER_START, score_candidates

SIZES = {   # hidden, feed-forward, layers, heads, key/value heads, tied embedding, vocabulary
    "0.5b": (896, 4864, 24, 14, 2, True, 151936), "1.5b": (1536, 8960, 28, 12, 2, True, 151936),
    "7b": (3584, 18944, 28, 28, 4, False, 152064)}
NEW = 32                # tokens that each answer and each request has here


def random_model(size: str, device: torch.device, dtype: torch.dtype) -> Qwen2:
    hidden, feed_forward, layers, heads, groups, tied, vocabulary = SIZES[size]
    config = ModelConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=32768, rms_norm_eps=1e-6,
                         rope_theta=1e6, tie_word_embeddings=tied)
    torch.manual_seed(0)
    with device:
        model = Qwen2(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.requires_grad_(False).eval()


def in_transformers(model: Qwen2):
    """The same weights as a transformers model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    c = model.config
    config = Qwen2Config(**{name: getattr(c, name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings")})
    with model.device:
        plain = Qwen2ForCausalLM(config)
    plain.to(model.model.norm.weight.dtype).load_state_dict(model.state_dict(), strict=not c.tie_word_embeddings)
    return plain.requires_grad_(False).eval()


class Clock:
    """Seconds by stage, and how many tokens each stage read or wrote."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.tokens = device, {}, {}

    def __call__(self, stage: str, tokens: int, work):
        self.wait()
        start = time.perf_counter()
        result = work()
        self.wait()
        self.seconds.setdefault(stage, []).append(time.perf_counter() - start)
        self.tokens[stage] = tokens
        return result

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def ours(clock: Clock, model: Qwen2, tokenizer: Tokenizer, sample: data.Sample, config: train.Config) -> None:
    prefixes = PrefixCaches(model)
    agent = train.Agent(model, tokenizer, prefixes)
    head, rest = tokenizer.split_chat(call_prompt(sample))
    names = [tool["name"] for tool in sample.tools]
    target = [*tokenizer.encode(call_text(sample.answers)), tokenizer.im_end]
    nothing = frozenset()
    cache = clock("prefill", len(head), lambda: prefixes.read(head))
    with torch.no_grad():
        clock("score", len(rest) + sum(len(tokenizer.encode(name)) for name in names),
              lambda: (model(torch.tensor([rest[:-1]], device=model.device), cache), score_candidates(model, tokenizer, cache, rest[-1:], names)))
    clock("direct answer", NEW, lambda: generate(model, [rest[-1:]], nothing, NEW, cache))
    clock("the same by look-up", NEW, lambda: speculate(model, rest[-1:], nothing, NEW, cache, head + rest))
    ask = tokenizer.split_chat(pair_prompt(sample))[1] + tokenizer.encode(PAIR_START.format(request=request_text(sample)))

    def pair():
        asked = prefixes.read(head)
        model(torch.tensor([ask[:-1]], device=model.device), asked)
        generate(model, [ask[-1:]], nothing, NEW, asked, config.temperature, config.top_p, [seeded("pair")], contexts=[head + ask])
        labelled = prefixes.read(head)
        model(torch.tensor([rest[:-1]], device=model.device), labelled)
        generate(model, [rest[-1:]] * LABELS, nothing, NEW, labelled, config.temperature, config.top_p, [seeded(i) for i in range(LABELS)])
    with torch.no_grad():
        clock("pair", 2 * NEW, pair)
    for adapt, prompt, prefix in (("full", head + rest, None), ("suffix", rest, prefixes.read(head))):
        params = new_params(model, config.rank, [seeded("lora")], config.targets.split(","))
        with adapters(model, params, config.alpha):
            clock(f"train {adapt}", 5 * (len(prompt) + len(target)), lambda: train.fine_tune(agent, [[(prompt, target)]], params, config, prefix))
            clock(f"adapted answer {adapt}", NEW, lambda: speculate(model, prompt, nothing, NEW, prefix, head + rest))


def plainly(clock: Clock, model, tokenizer: Tokenizer, sample: data.Sample, config: train.Config) -> None:
    from peft import LoraConfig, get_peft_model
    prompt, device = tokenizer.chat(call_prompt(sample)), model.device
    target = [*tokenizer.encode(call_text(sample.answers)), tokenizer.im_end]
    ask = tokenizer.chat(pair_prompt(sample)) + tokenizer.encode(PAIR_START.format(request=request_text(sample)))

    def score():
        for tool in sample.tools:
            name = tokenizer.encode(tool["name"])
            ids = torch.tensor([prompt + tokenizer.encode(ANSWER_START) + name], device=device)
            model(ids).logits.float().log_softmax(-1)[0, -len(name) - 1:-1].gather(1, torch.tensor(name, device=device)[:, None]).sum()

    def write(ids, model=model, **how):
        model.generate(torch.tensor([ids], device=device), attention_mask=torch.ones(1, len(ids), device=device), max_new_tokens=NEW,
                       min_new_tokens=NEW, pad_token_id=0, eos_token_id=None, **how)
    with torch.no_grad():
        clock("score", len(sample.tools) * len(prompt), score)
        clock("direct answer", NEW, lambda: write(prompt, do_sample=False))
        clock("pair", 2 * NEW, lambda: (write(ask, do_sample=True), write(prompt, do_sample=True, num_return_sequences=LABELS)))
    wrapped = get_peft_model(model, LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=config.targets.split(",")))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=config.lr, weight_decay=0.0)
    ids = torch.tensor([prompt + target], device=device)
    labels = ids.clone()
    labels[:, :len(prompt)] = -100

    def fit():
        for _ in range(5):
            optimizer.zero_grad()
            wrapped(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
    clock("train full", 5 * ids.numel(), fit)
    with torch.no_grad():
        clock("adapted answer full", NEW, lambda: write(prompt, wrapped, do_sample=False))
    wrapped.unload()


def together(model: Qwen2, tokenizer: Tokenizer, samples: list[data.Sample], size: int, config: train.Config) -> None:
    """Print how much faster `size` samples are adapted in one batch, each with its own adapter, than one after another."""
    agent = train.Agent(model, tokenizer, PrefixCaches(model))
    samples = (samples * size)[:size]
    rows = [[(tokenizer.chat(call_prompt(s)), [*tokenizer.encode(call_text(s.answers)), tokenizer.im_end])] for s in samples]

    def fit(part):
        params = new_params(model, config.rank, [seeded("lora", i) for i in range(len(part))], config.targets.split(","))
        with adapters(model, params, config.alpha):
            train.fine_tune(agent, part, params, config)
    clock = Clock(model.device)
    for _ in range(2):
        clock("together", 0, lambda: fit(rows))
        clock("one by one", 0, lambda: [fit([row]) for row in rows])
    at_once, alone = min(clock.seconds["together"]), min(clock.seconds["one by one"])
    print(f"{size} samples adapted, full: {at_once:.2f} s together, {alone:.2f} s one after another: {alone / at_once:.1f}x")


@torch.no_grad()
def fast_paths(model: Qwen2) -> None:
    """Print how much faster the parts that have a plain twin are, at this model's shapes and 573 tokens read: medians of 30."""
    c, device, dtype = model.config, model.device, model.model.norm.weight.dtype
    G, H, K, S = c.num_key_value_heads, c.num_attention_heads, c.head_dim, 573
    def ratio(name, plain, fast):
        clock = Clock(device)
        for _ in range(31):
            clock("plain", 0, plain)
            clock("fast", 0, fast)
        plain, fast = (statistics.median(clock.seconds[side][1:]) for side in ("plain", "fast"))
        print(f"{name:44}{1e3 * plain:9.3f} ms{1e3 * fast:9.3f} ms{plain / fast:7.1f}x")
    layers = [block.mlp.gate_proj for block in model.model.layers]
    for rows in (1, 5, 7, 80):
        x = torch.randn(rows, c.hidden_size, device=device).to(dtype)
        if layers[0].packed is not None:
            ratio(f"packed gate_proj of all layers, {rows} rows", lambda: [F.linear(x, layer.weight) for layer in layers],
                  lambda: [product(x, layer.weight, None, layer.packed) for layer in layers])
    for B, T in ((1, 1), (5, 1), (1, 7), (1, 80)):
        q, k, v = (torch.randn(B, heads, length, K, device=device).to(dtype) for heads, length in ((H, T), (G, S), (G, S)))
        mask = None if T == 1 else torch.ones(1, 1, T, S, dtype=torch.bool, device=device).tril(S - T)
        ratio(f"attention by groups, {B} x {T} queries", lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
              lambda: attend(q, k, v, mask))
    logits = 8 * torch.randn(c.vocab_size, device=device)         # peaked, as a model's are
    ratio("a sampled token without sorting all", lambda: (logits / 0.7).softmax(-1).sort(descending=True, stable=True), lambda: sample_token(logits, 0.7, 0.95, seeded(0)))
    for rows in (1, 5):
        start = model.new_cache()
        model(torch.zeros(rows, S, dtype=torch.long, device=device), start)
        new = torch.zeros(rows, G, 1, K, device=device, dtype=dtype)
        def grow(grad, cache):
            with torch.set_grad_enabled(grad):          # with gradients a cache makes new tensors
                for _ in range(16):
                    cache.valid = F.pad(cache.valid, (0, 1), value=True)
                    for layer in range(c.num_hidden_layers):
                        cache.append(layer, new, new)
        ratio(f"16 tokens into a cache of {rows} rows, in place", lambda: grow(True, start.fork()), lambda: grow(False, start.fork()))


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measured: floating-point operations a second of a matrix product, bytes a second read and written."""
    def best(work):
        clock = Clock(device)
        for _ in range(5):
            clock("", 0, work)
        return min(clock.seconds[""])
    a = torch.randn(2048, 2048, device=device).to(dtype)
    big = torch.empty(2 ** 26, device=device)
    return 2 * 2048 ** 3 / best(lambda: a @ a), 2 * big.numel() * 4 / best(lambda: big.add_(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, or 'tiny' (default)")
    parser.add_argument("--random", choices=SIZES, help="random weights of this size; prompts are then of the bundled samples, of 24 tools each")
    parser.add_argument("--bench", default="toolalpaca")
    parser.add_argument("--data", help="the benchmark's file or folder (default: the bundled samples)")
    parser.add_argument("--limit", type=int, default=3, help="samples, those whose prompts are nearest to --tokens (default: 3)")
    parser.add_argument("--tokens", type=int, default=0, help="length of a prompt (default: the median)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--pack", action=argparse.BooleanOptionalAction, default=True, help="on a CPU, ours has packed weights (default)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: all cores)")
    parser.add_argument("--only", choices=("ours", "plain"), help="one side alone, for its peak memory")
    parser.add_argument("--batch", type=int, default=0, help="also adapt so many samples at once, and one after another")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    folder = train.TINY if args.random or args.model == "tiny" else Path(args.model)
    tokenizer = Tokenizer(folder)
    model = random_model(args.random, device, dtype) if args.random else load_model(folder, device, dtype)
    if args.pack and device.type == "cpu":
        model.pack()
    samples = data.load(args.bench, args.data, bundled=args.data is None)
    if args.random:
        tools = list({tool["name"]: tool for sample in samples for tool in sample.tools}.values())
        samples = [replace(sample, tools=tuple({t["name"]: t for t in (*sample.tools, *tools[24 * i:])}.values())[:24]) for i, sample in enumerate(samples)]
    def length(sample): return len(tokenizer.chat(call_prompt(sample)))
    wanted = args.tokens or statistics.median_low(map(length, samples))
    shortest, config = min(samples, key=length), train.Config(lr=1e-4, epochs=5)
    samples = sorted(samples, key=lambda sample: abs(length(sample) - wanted))[:args.limit]
    plain = None if args.only == "ours" else in_transformers(model)
    flops, bandwidth = ceilings(device, dtype)
    here, there = Clock(device), Clock(device)
    for sample in [shortest, *samples]:                 # the first is to warm up
        if args.only != "plain":
            ours(here, model, tokenizer, sample, config)
        if plain:
            plainly(there, plain, tokenizer, sample, config)
    for clock in (here, there):
        clock.seconds = {stage: statistics.median(spent[1:]) for stage, spent in clock.seconds.items()}
    if not args.only:
        there.seconds["the same by look-up"] = there.seconds["direct answer"]
        there.seconds |= {stage.replace("full", "suffix"): s for stage, s in there.seconds.items() if "full" in stage}    # it has but one way
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name or model.config.tie_word_embeddings)
    size = weights * model.model.norm.weight.element_size()
    print(f"{args.random or folder.name}, {len(samples)} samples, prompts of {length(samples[0])} tokens, {len(samples[0].tools)} tools, {device}, {args.dtype}, "
          f"{torch.get_num_threads()} threads; this machine: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s")
    print(f"{'stage':24}{'ours, s':>10}{'plain, s':>10}{'ratio':>8}{'tokens/s':>10}{'of the ceiling':>16}")
    for stage, spent in (here.seconds or there.seconds).items():
        tokens = (here if here.seconds else there).tokens[stage]
        writes = stage in ("direct answer", "the same by look-up", "pair") or stage.startswith("adapted")
        share = size * tokens / spent / bandwidth if writes else (6 if "train" in stage else 2) * weights * tokens / spent / flops
        other = there.seconds.get(stage)
        print(f"{stage:24}{spent:10.3f}{f'{other:10.3f}{other / spent:7.1f}x' if other else ' ' * 10 + ' ' * 8}{tokens / spent:10.1f}{share:15.0%}")
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if args.only:
        print(f"peak memory {peak / 1e9:.2f} GB, {args.only} alone")
    if not args.only:
        fast_paths(model)
    if args.batch:
        together(model, tokenizer, samples, args.batch, config)
    if not args.only:
        def total(clock, *stages): return sum(clock.seconds.get(stage, 0.0) for stage in stages)
        sure = ("prefill", "score", "the same by look-up")              # which is how train.py writes it
        for name, stages in (("scoring, nothing cached", sure[:2]), ("a certain sample", sure), *((f"an uncertain one, {a}", (*sure, "pair", f"train {a}", f"adapted answer {a}"))
                                                           for a in ("full", "suffix"))):
            print(f"{name:24}{total(here, *stages):10.3f}{total(there, *stages):10.3f}{total(there, *stages) / total(here, *stages):7.1f}x")


if __name__ == "__main__":
    main()
