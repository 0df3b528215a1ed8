"""Qwen2.5, Qwen3, Llama 3 and SmolLM2 in plain PyTorch: network, KV cache, loading, decoding.

Implemented: RMSNorm, rotary embedding (RoPE) with Llama 3's scaling, grouped-query attention,
SwiGLU, and by family: biases, a norm of each head's q and k, a head that is tied to the embedding.
Left out: sliding windows, YaRN scaling, quantised weights, dropout.

Shapes, in all files and tests:
    rows   prompts of a batch       new     tokens of this pass         read   cached + new tokens
    width  of the hidden state      heads   of queries                  d      width of one head
    vocab  of the logits            groups  of heads that share keys    rank   of a LoRA adapter
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.chat import Tokenizer


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a checkpoint, under the names of its config.json. A model family is no class,
    but what it has in these fields."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    head_dim: int = 0                           # 0: hidden_size / num_attention_heads
    attention_bias: bool = True                 # on q, k and v
    output_bias: bool = False                   # on o
    mlp_bias: bool = False
    qk_norm: bool = False                       # RMSNorm of each head's q and k, before RoPE
    rope_scaling: tuple[float, ...] = ()        # as of `rotary_angles`; (): none

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read config.json; ValueError if there is none, or it describes what this file does not
        implement."""
        try:
            raw = dict(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
            raw = {key: value for key, value in raw.items() if value is not None}
            rope = {**raw.pop("rope_scaling", {}), **raw.pop("rope_parameters", {})}
            family = raw.get("model_type", "qwen2")
            raw = {**FAMILIES.get(family, {}), **raw, **rope}       # newer files: theta is in rope
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(why_unread(folder, "config.json", error)) from error
        ropes = ["default", "llama3"]
        implemented = {"model_type": [*FAMILIES], "hidden_act": ["silu"], "rope_type": ropes,
                       "type": ropes, "partial_rotary_factor": [1], "use_sliding_window": [False],
                       "quantization_config": [None]}
        for key, known in implemented.items():
            if raw.get(key, known[0]) not in known:
                raise ValueError(f"{folder}: config.json says {key} {raw[key]!r:.60}; implemented "
                                 f"is {' or '.join(map(repr, known))}: pass another checkpoint")
        raw.setdefault("output_bias", raw.get("attention_bias", False))
        try:
            if "llama3" in (rope.get("rope_type"), rope.get("type")):
                raw["rope_scaling"] = tuple([float(rope[key]) for key in SCALING])
            return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})
        except (TypeError, ValueError, KeyError) as error:          # names what is missing
            raise ValueError(f"{folder}: config.json is of no {family} model ({error})") from error


FAMILIES = {            # model_type -> what its config.json leaves unsaid
    "qwen2": {"attention_bias": True, "output_bias": False},
    "qwen3": {"attention_bias": False, "qk_norm": True, "head_dim": 128},
    "llama": {"attention_bias": False, "max_position_embeddings": 2048}}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


# ------------------------------------------------------------------------------------ the network

class Qwen2(nn.Module):
    """The language model of every family in FAMILIES; Qwen2 was the first. A pass gives hidden
    states; those whose logits are read go through `lm_head` on their own, and then to float32."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False      # training keeps only each block's input (Chen et al. 2016)
        self.repetition_penalty = 1.0   # in decoding; 1: none
        layers = nn.ModuleList()
        for i in range(config.num_hidden_layers):
            layers.append(Block(config, i))
        self.model = nn.ModuleDict({        # the checkpoint's prefix
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": layers, "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        place = "meta" if config.tie_word_embeddings else None      # it then has no weights
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=place)
        if config.tie_word_embeddings:                              # as on the small sizes
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: torch.Tensor | Sequence[Sequence[int]],
                cache: KVCache | None = None) -> torch.Tensor:
        """Hidden states (rows, new, width) after the last norm of `ids`, which follow what `cache`
        holds and are put into it. ids: (rows, new) with PAD at padding, on any device; or lists,
        which are padded behind the shorter ones. OverflowError if the context is too short."""
        cache = KVCache() if cache is None else cache
        if not isinstance(ids, torch.Tensor):
            longest = max(map(len, ids))
            ids = torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in ids])
        device = self.model.embed_tokens.weight.device
        positions, visible = [at if isinstance(at, str) else at.to(device)
                              for at in cache.claim(ids.cpu())]
        if cache.length > self.config.max_position_embeddings:
            raise OverflowError(f"{cache.length} tokens exceed the model's context of "
                                f"{self.config.max_position_embeddings}")
        d = self.model.layers[0].self_attn.d
        x = self.model.embed_tokens(ids.clamp(min=0).to(device))
        angles = rotary_angles(positions, d, self.config.rope_theta, self.config.rope_scaling)
        rotation = [t.to(x.dtype) for t in angles]
        for block in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.on_a_fork, block, x, rotation, visible, cache,
                               use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rotation, visible, cache)
        return self.model.norm(x)

    def read_only(self, rows: Sequence[int]) -> None:
        """Tell layers that have something for each row of a batch, as adapters, that from now on a
        pass reads these rows alone; (): all."""
        for layer in self.modules():
            if hasattr(layer, "rows"):
                layer.rows = rows

    def on_a_fork(self, block, x, rotation, visible, cache) -> torch.Tensor:
        """A block under checkpointing: it is passed twice, so what it caches is dropped."""
        return block(x, rotation, visible, cache.fork())


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rotation, visible, cache: KVCache) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, visible, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Grouped-query attention over what the cache holds and the new tokens."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        width = config.hidden_size
        d = config.head_dim or width // config.num_attention_heads
        self.layer, self.d = layer, d
        self.q_proj = nn.Linear(width, config.num_attention_heads * d, config.attention_bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * d, config.attention_bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * d, config.attention_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d, width, config.output_bias)
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rotation, visible, cache: KVCache) -> torch.Tensor:
        """x (rows, new, width), rotation as of `rotary_angles`, visible as of `KVCache.claim`
        -> (rows, new, width)."""
        rows, new, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(rows, new, -1, self.d)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(rows, new, -1, self.d)).transpose(1, 2)
        v = self.v_proj(x).view(rows, new, -1, self.d).transpose(1, 2)
        k, v = cache.append(self.layer, rotate(k, *rotation), v)
        q = rotate(q, *rotation)
        if visible is CAUSAL:           # torch's is_causal is top-left aligned: nothing is cached
            if q.dtype == torch.float32:    # torch's float32 kernel for GPUs that keeps no matrix
                shared = q.shape[1] // k.shape[1]       # (new, new) wants a key for each query
                k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = attend(q, k, v, None if visible is ALL else visible)
        return self.o_proj(y.transpose(1, 2).reshape(rows, new, -1))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_{i+d/2}) by its angle: the half-split order of the checkpoints."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
           mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of queries (rows, heads, new, d) to keys and values (rows, groups, read, d) where
    mask (rows, 1, new, read) is True; (rows, heads, new, d).

    The heads that share keys become so many queries of one head, so the keys are read once. With
    AVX512 9x faster for one bfloat16 query (1.6x in float32), 1.1x to 1.3x for seven; with AMX 1.1x
    (tests/benchmark.py)."""
    (rows, heads, new, d), groups = q.shape, k.shape[1]
    q = q.reshape(rows, groups, heads // groups * new, d)
    mask = None if mask is None else mask.repeat(1, 1, heads // groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(rows, heads, new, d)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, wide, config.mlp_bias)
        self.up_proj = nn.Linear(width, wide, config.mlp_bias)
        self.down_proj = nn.Linear(wide, width, config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019), in float32 up to the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary_angles(positions: torch.Tensor, d: int, theta: float,
                  scaling: Sequence[float] = ()) -> list[torch.Tensor]:
    """cos and sin, (rows, 1, new, d) float32, of position * theta^(-2i/d) for positions
    (rows, new) (RoFormer, Su et al. 2021).

    scaling: Llama 3.1's (factor, low, high, context). What turns fewer than `low` times within the
    original context is slowed by the factor, what turns more than `high` times is kept."""
    inverse = 1 / theta ** (torch.arange(0, d, 2, device=positions.device).float() / d)
    if scaling:
        factor, low, high, context = scaling
        turns = context * inverse / (2 * torch.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        inverse = kept * inverse + (1 - kept) * inverse / factor
    angles = (positions[..., None].float() * inverse).repeat(1, 1, 2)[:, None]
    return [angles.cos(), angles.sin()]


PAD = -1                            # the id of a slot that holds no token
ROOM = 64                           # free slots that an in-place cache gets each time it is full
CAUSAL, ALL = "causal", "all"       # what a new token sees: itself and those before it; everything


@dataclass
class KVCache:
    """Ids, keys and values of the tokens read so far. Positions are the cache's, so several caches
    can coexist. A slot with the id PAD is a hole: no token attends to it, and it takes no
    position."""
    ids: torch.Tensor | None = None             # (rows, read), on the CPU: no pass waits for a GPU
    # of each layer (rows, groups, read, d), or with more slots behind `length`
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    length: int = 0                                             # slots in use, holes included
    holes: bool = False
    in_place: bool = False      # new tokens are written into its tensors, which no fork shares

    def claim(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | str]:
        """Take slots for `ids` (rows, new): their positions (rows, new), and what each of them
        sees: CAUSAL, ALL, or a mask (rows, 1, new, read)."""
        new, past, hole = ids.shape[1], self.length, ids == PAD
        self.ids = ids if past == 0 else torch.cat((self.ids, ids), dim=1)
        self.length += new
        self.holes = self.holes or bool(hole.any())
        slot = torch.arange(self.length)
        in_order = slot[past:].expand(len(ids), new)
        if new == 1 and not self.holes:
            return in_order, ALL
        # padding that is only behind the tokens is seen by none of them: no mask is kept for it
        if past == 0 and not bool((hole[:, :-1] & ~hole[:, 1:]).any()):
            return in_order, CAUSAL
        there = self.ids != PAD
        positions = (there.cumsum(1) - 1)[:, past:].clamp(min=0)
        own = slot[past:, None]
        # a hole sees itself, so that no softmax runs over an empty set
        return positions, ((slot <= own) & there[:, None] | (slot == own))[:, None]

    def append(self, layer: int, keys: torch.Tensor,
               values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put one layer's new keys and values, (rows, groups, new, d) each, behind the old ones;
        gives all of them, (rows, groups, read, d) each."""
        if layer >= len(self.keys):     # this layer's first tokens; a fork may be dropped after it
            self.keys.append(keys)
            self.values.append(values)
            return keys, values
        past, there = self.length - keys.shape[2], []
        for all_layers, new in ((self.keys, keys), (self.values, values)):
            held = all_layers[layer]
            if self.in_place and self.length <= held.shape[2]:
                held[:, :, past:self.length] = new
            else:
                room = new[:, :, :1].expand(-1, -1, ROOM if self.in_place else 0, -1)
                held = all_layers[layer] = torch.cat((held[:, :, :past], new, room), dim=2)
            there.append(held[:, :, :self.length])
        return tuple(there)

    def fork(self, rows: int = -1) -> KVCache:
        """A copy, to be extended on its own; `rows` repeats its single row."""
        self.in_place = False           # they share tensors
        keys, values = [[t[:, :, :self.length].expand(rows, -1, -1, -1) for t in tensors]
                        for tensors in (self.keys, self.values)]        # -1: as it is
        return KVCache(self.ids.expand(rows, -1), keys, values, self.length, self.holes)

    def cut(self, length: int, rows: slice | list[int] = slice(None)) -> None:
        """Forget all but the first `length` slots, of all rows or of those that stay."""
        self.ids, self.length = self.ids[rows, :length], length
        self.keys = [t[rows] for t in self.keys]    # the next pass drops what is behind `length`
        self.values = [t[rows] for t in self.values]

    @staticmethod
    def stack(caches: Sequence[KVCache]) -> KVCache:
        """One cache with the rows of all; the shorter get holes in front, so all end together."""
        if len(caches) == 1:
            return caches[0].fork()
        length = max([cache.length for cache in caches])
        ids, keys, values = [], [], []
        for cache in caches:
            holes, cache = length - cache.length, cache.fork()
            ids.append(F.pad(cache.ids, (holes, 0), value=PAD))
            keys.append([F.pad(t, (0, 0, holes, 0)) for t in cache.keys])
            values.append([F.pad(t, (0, 0, holes, 0)) for t in cache.values])
        ids = torch.cat(ids)
        return KVCache(ids, [torch.cat(layer) for layer in zip(*keys)],
                       [torch.cat(layer) for layer in zip(*values)], length,
                       bool((ids == PAD).any()))


class PackedLinear(nn.Linear):
    """A frozen linear layer on a CPU that holds W a second time, in the order in which oneDNN
    reads it; otherwise torch reorders W in every product.

    Measured (tests/benchmark.py, the 0.5B, two cores) in bfloat16 (float32): 1.3x (1.6x) faster
    for one row, 1.9x (2.9x) for five, 1.1x (1.5x) for eighty; training is 1.2x faster in float32
    (research/RESULTS.md).
    """

    def __init__(self, plain: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return PackedProduct.apply(x, self) if x.requires_grad else self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class PackedProduct(torch.autograd.Function):
    """y = W x + b by the packed W; the gradient for x is W^T of that for y, and W has none."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.layer.weight, None


# ---------------------------------------------------------------------------------------- loading

def find_checkpoint(name: str, offline: bool = False) -> Path:
    """The folder of a checkpoint: `name` if it is one, else the hub's files for that id.
    FileNotFoundError says whether the hub has none of that name or could not be reached."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download       # only here: it takes a second to import
    from huggingface_hub.errors import (GatedRepoError, HFValidationError, HTTPError,
                                        LocalEntryNotFoundError, RepositoryNotFoundError)
    try:
        return Path(snapshot_download(name, local_files_only=offline, allow_patterns=[
            "*.json", "*.jinja", "model*.safetensors"]))
    except HFValidationError:                                   # no such id can be
        why = "and no id of the hub's, which is owner/name"
    except GatedRepoError:
        why = "and the hub asks for consent: give it on the model's page, and set HF_TOKEN"
    except RepositoryNotFoundError:
        why = "and the hub has none of that name (or shows it to its owner's HF_TOKEN alone)"
    except (HTTPError, LocalEntryNotFoundError) as error:
        cause = type(error.__cause__ or error).__name__
        why = f"not in the hub's cache, and the hub could not be reached ({cause})"
        if offline:
            why = "and not in the hub's cache (--offline forbids a download)"
    raise FileNotFoundError(f"{name}: no such folder, {why}; pass a folder, an id as "
                            "Qwen/Qwen2.5-1.5B-Instruct, or tiny (bundled)")


def load_model(folder: Path, device: str | torch.device = "cpu",
               dtype: torch.dtype = torch.float32, pack: bool = False) -> Qwen2:
    """The model of a checkpoint folder, frozen: of the files that its index names, else of
    model.safetensors. ValueError for a damaged file, for a missing, extra or misshapen tensor, and
    for one that is quantised or not finite. pack: as `PackedLinear`, where that can be."""
    with torch.device("meta"):
        model = Qwen2(ModelConfig.from_folder(folder))
    index, names, state = "model.safetensors.index.json", ["model.safetensors"], {}
    try:
        if (folder / index).is_file():
            names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(why_unread(folder, index, error)) from error
    for file in names:
        try:
            tensors = load_file(folder / file)
        except (OSError, SafetensorError) as error:
            raise ValueError(why_unread(folder, file, error)) from error
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise ValueError(f"{folder / file}: {name} is quantised ({tensor.dtype}); pass the "
                                 "checkpoint in bfloat16, float16 or float32")
            state[name] = tensor.to(device, dtype, copy=True)
            if not state[name].isfinite().all():
                raise ValueError(f"{folder / file}: {name} holds numbers that are not finite")
    embedding, tied = state.get("model.embed_tokens.weight"), model.config.tie_word_embeddings
    if tied and embedding is not None:      # a head of its own beside "tied" is used, if it differs
        tied = torch.equal(state.setdefault("lm_head.weight", embedding), embedding)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:       # which names the tensors, in several lines
        said = " ".join(str(error).split())[:240]
        raise ValueError(f"{folder}: the weights and config.json do not fit: {said}") from error
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.requires_grad_(False)
    if pack:
        with suppress(AttributeError, RuntimeError):    # where this torch or CPU has no such order
            for name, layer in [*model.named_modules()]:
                if type(layer) is nn.Linear:
                    model.set_submodule(name, PackedLinear(layer))
    return model


def why_unread(folder: Path, file: str, error: Exception) -> str:
    """What is wrong with a checkpoint's file that could not be read, and what to do."""
    if (folder / file).is_file():
        with (folder / file).open("rb") as opened:
            if opened.read(40).startswith(b"version https://git-lfs"):
                return f"{folder / file}: a Git LFS pointer; run git lfs pull in that repository"
        return f"{folder / file}: damaged ({error}); download it again"
    if (folder / "adapter_config.json").is_file():
        return f"{folder}: a LoRA adapter without its base, no {file}; pass the base model"
    if file not in ("config.json", "model.safetensors"):
        return f"{folder / file}: missing, though the index names it; download this shard, too"
    for pattern, advice in (("*.gguf", "pass the checkpoint that it was made of"),
                            ("*.bin", "pass a revision with safetensors: a .bin can run code"),
                            ("*-of-*.safetensors", "download model.safetensors.index.json, too"),
                            ("*.safetensors", "if these are the weights, give them that name")):
        for other in sorted(folder.glob(pattern)):
            return f"{folder}: no {file}, but {other.name}; {advice}"
    return f"{folder}: no {file}: this is no checkpoint, or not all of it, or no safetensors"


def fingerprint(model: nn.Module) -> str:
    """A digest of the parameters' bits, to see that no adaptation has changed one. Each tensor is
    reduced, on its device, to the sums of its 16-bit words w_i and of i w_i: no change of one
    word and no exchange of two keeps both."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        for words in parameter.detach().reshape(-1).view(torch.int16).split(1 << 22):
            place = torch.arange(1, len(words) + 1, device=words.device)
            digest.update(f" {words.sum().item()} {(words * place).sum().item()}".encode())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------- decoding

@torch.no_grad()
def generate(model: Qwen2, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]],
             max_new_tokens: int = 256, caches: Sequence[KVCache] = (), temperature: float = 0.0,
             top_p: float = 1.0, keys: Sequence[tuple] = (),
             forms: Sequence[Form] = (), drafts: Sequence[list[int]] = ()) -> list[Decoded]:
    """What follows each of several prompts of at least one token, which continue a cache each, if
    caches are given. temperature 0 is greedy; else each row draws from a generator seeded by its
    own key, so its text does not depend on its neighbours. Rows that have ended stay, as holes,
    until they are half of those that are read; then they are dropped. log_p and entropy are the
    model's own, comparable with l_n, whatever model.repetition_penalty is. OverflowError if the
    context is too short.

    A row with a form, which its prompt has begun, ends with its last blank; the row's ids include
    the fixed parts between the blanks.

    Where one row is read, looked-up tokens are checked in the same pass; those that the model also
    chooses are kept: in float32 the text stays the same. Tool calls copy from the prompt, and take
    half the passes; fewer yet where they agree with a draft, ids for each prompt.
    """
    model.read_only(())         # an exception may have left other rows
    cache = KVCache.stack(caches) if caches else KVCache()
    cache.in_place = True
    generators = [seeded(*key) for key in keys]
    rows = [Decoded([*form.blanks]) for form in forms or [Form()] * len(prompts)]
    # the rows that a pass reads, with their numbers, and what it reads of each
    live, unread = list(enumerate(rows)), prompts
    while True:
        looked_up = []
        if len(live) == 1:
            (number, row), = live
            there = cache.ids[0][cache.ids[0] != PAD].tolist() + unread[0] if row.ids else []
            room = min(max_new_tokens - len(row.ids) - 1,
                       model.config.max_position_embeddings - cache.length - len(unread[0]))
            looked_up = look_up(there, drafts[number] if drafts else [])[:max(room, 0)]
        hidden = model([[*ids, *looked_up] for ids in unread], cache)
        # (live, looked up + 1): where a choice follows
        places = torch.tensor([[len(ids) - 1] for ids in unread]) + torch.arange(len(looked_up) + 1)
        logits = model.lm_head(hidden[torch.arange(len(live))[:, None], places]).float()
        for agreed in range(len(looked_up) + 1):    # looked-up tokens that were also chosen
            step = own = logits[:, agreed]                                          # (live, vocab)
            if model.repetition_penalty != 1:
                said = cache.ids[:, :cache.length - len(looked_up) + agreed]    # and chosen
                step = penalised(own, said, model.repetition_penalty)
            chosen = choose(step, own, temperature, top_p, generators)
            unread = [row.write(*token, tokenizer=tokenizer, limit=max_new_tokens)
                      for (_, row), token in zip(live, chosen)]
            if unread[0] != looked_up[agreed:agreed + 1]:       # [] behind the last: it differs
                break
        left = [at for at, (_, row) in enumerate(live) if not row.ended]
        if not left:
            break
        cache.cut(cache.length - len(looked_up) + agreed)
        if 2 * len(left) <= len(live):
            cache.cut(cache.length, left)
            live, unread = [live[at] for at in left], [unread[at] for at in left]
            generators = [generators[at] for at in left if generators]
            model.read_only([number for number, _ in live])
    model.read_only(())
    for row in rows:
        row.text = tokenizer.decode(row.ids)
    return rows


@dataclass
class Decoded:
    """What was written for one prompt. log_p and entropy (nats) are of each token chosen and of the
    end token; of sampled tokens nobody reads them, and they stay empty."""
    blanks: list[Blank] = field(default_factory=list)   # of its form, that are not filled yet
    ids: list[int] = field(default_factory=list)        # without the end token
    text: str = ""                                      # of the ids, once all rows have ended
    log_p: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    ended: bool = False
    escaped: bool = False       # a backslash in a blank stands before the next character
    depth: int = 0              # brackets that the text of this blank has opened

    def write(self, token: int, *stats: float, tokenizer: Tokenizer, limit: int) -> list[int]:
        """Add a chosen token, and its log_p and entropy, if these are given. If it closes a blank,
        add what it has before the closing character and the blank's tail in its place; the token's
        rest is dropped. Gives what is read next, which is a hole once the text has ended."""
        if stats and not self.ended:
            self.log_p.append(stats[0])
            self.entropy.append(stats[1])
        new = [] if self.ended or token in tokenizer.eos else [token]
        piece = tokenizer.decode(new) if self.blanks else ""
        for i, character in enumerate(piece):
            blank, escaped = self.blanks[0], self.escaped
            self.escaped = character == "\\" and not escaped
            if escaped:
                continue
            if character == BRACKETS.get(blank.closing):
                self.depth += 1
            elif character in blank.closing and self.depth:
                self.depth -= 1
            elif character in blank.closing:
                new = tokenizer.encode(piece[:i] + blank.tail)
                del self.blanks[0]
                self.ended = not self.blanks
                break
        self.ids += new
        self.ended = self.ended or not new or len(self.ids) >= limit
        return new or [PAD]


def penalised(logits: torch.Tensor, ids: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits (rows, vocab) in which each token that `ids` (rows, read) hold is less likely: divided
    by the penalty where positive, else multiplied (CTRL, Keskar et al. 2019), once for all times
    that it stands there, in the prompt or the answer. A hole is no token."""
    # ours: as transformers' generate() does, whose default is the checkpoint's own penalty.
    ids = ids.where(ids != PAD, logits.shape[1]).to(logits.device)  # holes: a column of their own
    logits = F.pad(logits, (0, 1))
    there = logits.gather(1, ids)
    less = torch.where(there < 0, there * penalty, there / penalty)
    return logits.scatter(1, ids, less)[:, :-1]


BRACKETS = {"]": "[", "}": "{"}
LIKELY = 256            # a nucleus is looked for among so many likely tokens first


def choose(logits: torch.Tensor, own: torch.Tensor, temperature: float, top_p: float,
           generators: Sequence[torch.Generator]) -> list[list[float]]:
    """A token for each row of logits (rows, vocab). At temperature 0 the likeliest, its
    log-probability and the entropy (nats) by `own`, the logits without a penalty; else by nucleus
    sampling (Holtzman et al. 2020) with one uniform number from the row's own CPU generator."""
    if temperature == 0:
        tokens, log_p = logits.argmax(-1, keepdim=True), own.log_softmax(-1)
        entropy = torch.special.entr(log_p.exp()).sum(-1, keepdim=True)
        # in one tensor, so that a GPU is waited for once
        rows = torch.cat((tokens.double(), log_p.gather(1, tokens), entropy), 1).tolist()
        return [[int(token), *stats] for token, *stats in rows]
    p, ids = sorted_by_p((logits.float() / temperature).softmax(-1), top_p)
    cumulative = p.cumsum(-1)
    end = ((cumulative - p < top_p).sum(-1, keepdim=True) - 1).clamp(min=0)     # of the nucleus
    uniform = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    drawn = uniform.to(p.device) * cumulative.gather(1, end)
    place = (cumulative <= drawn).sum(-1, keepdim=True).minimum(end)
    return ids.gather(1, place).tolist()


def sorted_by_p(p: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The probabilities of each row, (rows, vocab), largest first, and their token ids. Where the
    LIKELY largest hold each row's nucleus, as nearly always, these alone: to sort all takes 10x as
    long on a CPU (tests/benchmark.py)."""
    few = p.topk(min(LIKELY, p.shape[-1])).indices.sort().values    # so equal ones stay in order
    if float(p.gather(1, few).sum(-1).min()) < min(top_p + 1e-3, 1):
        return p.sort(descending=True, stable=True)
    p, order = p.gather(1, few).sort(descending=True, stable=True)
    return p, few.gather(1, order)


LONGEST, AGREEING = 6, 3        # tokens that are looked up at most, and that must agree before them


def look_up(ids: list[int], draft: list[int]) -> list[int]:
    """A guess at the next tokens (prompt look-up decoding: Saxena 2023): what follows the last
    AGREEING tokens of `ids`, or fewer, where they stand in the draft, else where they stood before,
    the last time; [] if nowhere. No ids: nothing is written yet, so the draft's beginning."""
    if not ids:
        return draft[:LONGEST]
    for text in (draft, ids):
        for n in range(AGREEING, 0, -1):
            tail = ids[-n:]
            for end in range(len(text) - 1, n - 1, -1):
                if text[end - 1] == tail[-1] and text[end - n:end] == tail:
                    return text[end:end + LONGEST]
    return []


@dataclass(frozen=True)
class Blank:
    """A gap in a form, for the model to fill. It ends at one of the `closing` characters, unless
    a backslash stands before it or it closes a bracket that the blank's own text has opened."""
    closing: str
    tail: str               # the fixed text that follows


@dataclass(frozen=True)
class Form:
    """A text with blanks: the fixed text before the first, and the blanks with their tails."""
    start: str = ""
    blanks: tuple[Blank, ...] = ()


def seeded(*key: str | int) -> torch.Generator:
    """A CPU generator for one purpose, seeded by a stable hash of its key (seed, sample id,
    purpose, ...): neither order nor batch size nor a resumed run changes a draw."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
