"""Qwen2.5 in plain PyTorch: network, KV cache, loading, tokenizer with chat template, decoding.

Implemented: RMSNorm, rotary embedding (RoPE), grouped-query attention with biases on q/k/v,
SwiGLU, a head that is tied to the embedding on the small sizes. Left out: sliding windows, YaRN
scaling, quantised weights, dropout.

Shapes, in all files and tests:
    B  rows of a batch            T  new tokens in this pass      S  cached + new tokens
    D  hidden width               H  query heads                  G  key/value heads (H/G share one)
    K  width of one head          V  vocabulary                   R  rank of a LoRA adapter
"""
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer as BPE
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a checkpoint, under the names of its config.json: 0.5B to 72B are such."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read config.json; ValueError if it describes what this file does not implement."""
        raw = read_json(folder / "config.json")
        raw = {**(raw.get("rope_parameters") or {}), **raw}     # newer files keep rope_theta there
        implemented = {"model_type": "qwen2", "hidden_act": "silu", "rope_scaling": None,
                       "rope_type": "default", "use_sliding_window": False}
        for key, known in implemented.items():
            if raw.get(key, known) != known:
                raise ValueError(f"{folder}: config.json says {key} {raw[key]!r}, and only "
                                 f"{known!r} is implemented: pass a Qwen2.5 checkpoint")
        try:
            return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})
        except TypeError as error:                              # names what is missing
            raise ValueError(f"{folder}: config.json is of no Qwen2.5 ({error})") from error


PAD = -1        # the id of a slot that holds no token


class KVCache:
    """Ids, keys and values of the tokens read so far, for B rows. It alone knows the positions,
    so several can live at once. A slot with the id PAD is a hole: nobody attends to it, and it
    takes no position."""

    def __init__(self):
        self.ids: torch.Tensor | None = None        # (B, S)
        self.keys: list[torch.Tensor] = []          # (B, G, S, K) for each layer
        self.values: list[torch.Tensor] = []        # (B, G, S, K) for each layer
        self.holes = False

    @property
    def length(self) -> int:
        """Slots in use, holes included."""
        return 0 if self.ids is None else self.ids.shape[1]

    def claim(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take T slots for `ids` (B, T): their positions (B, T), and who sees whom as a mask
        (B, 1, T, S), or None where each sees all that came before."""
        T, past = ids.shape[1], self.length
        self.ids = ids if past == 0 else torch.cat((self.ids, ids), dim=1)
        self.holes = self.holes or bool((ids == PAD).any())
        if not self.holes and (past == 0 or T == 1):
            return torch.arange(past, past + T, device=ids.device).expand(len(ids), T), None
        there = self.ids != PAD
        positions = (there.cumsum(1) - 1)[:, past:].clamp(min=0)
        slot = torch.arange(past + T, device=ids.device)
        own = slot[past:, None]
        # a hole sees itself, so that no softmax runs over an empty set
        return positions, ((slot <= own) & there[:, None] | (slot == own))[:, None]

    def append(self, layer: int, keys: torch.Tensor,
               values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put one layer's new keys and values, (B, G, T, K) each, behind the old ones; gives all
        of them, (B, G, S, K) each."""
        if layer < len(self.keys):
            keys = torch.cat((self.keys[layer], keys), dim=2)
            values = torch.cat((self.values[layer], values), dim=2)
        self.keys[layer:layer + 1], self.values[layer:layer + 1] = [keys], [values]
        return keys, values

    def fork(self, rows: int = -1) -> "KVCache":
        """A cache that goes on from here on its own; rows: its one row as so many."""
        def same(t): return t.expand(rows, *t.shape[1:])        # -1: as they are
        other = KVCache()
        other.ids, other.holes = same(self.ids), self.holes
        other.keys, other.values = [same(t) for t in self.keys], [same(t) for t in self.values]
        return other

    def cut(self, length: int) -> None:
        """Forget all but the first `length` slots."""
        self.ids = self.ids[:, :length]
        self.keys = [t[:, :, :length] for t in self.keys]
        self.values = [t[:, :, :length] for t in self.values]

    @staticmethod
    def stack(caches: Sequence["KVCache"]) -> "KVCache":
        """One cache with the rows of all; the shorter get holes in front, so all end together."""
        longest = max(cache.length for cache in caches)
        def rows(layer):
            return torch.cat([F.pad(t, (0, 0, longest - t.shape[2], 0)) for t in layer])
        other = KVCache()
        other.ids = torch.cat([F.pad(c.ids, (longest - c.length, 0), value=PAD) for c in caches])
        other.holes = bool((other.ids == PAD).any())
        other.keys = [rows(layer) for layer in zip(*(c.keys for c in caches))]
        other.values = [rows(layer) for layer in zip(*(c.values for c in caches))]
        return other


class PackedLinear(nn.Linear):
    """A frozen linear layer on a CPU that holds W a second time, in the order in which oneDNN
    reads it; otherwise torch reorders W in every product. With gradients the product is plain.

    Measured (tests/benchmark.py, the 0.5B, two cores) in bfloat16 (float32): 1.3x (1.6x) faster
    for one row, 1.9x (2.9x) for five, but 1.1x (1.5x) for eighty, as training has.
    """

    def __init__(self, plain: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary_angles(positions: torch.Tensor, K: int, theta: float) -> list[torch.Tensor]:
    """cos and sin, (B, 1, T, K) float32, of position * theta^(-2i/K) for positions (B, T)
    (RoFormer, Su et al. 2021)."""
    inverse = 1 / theta ** (torch.arange(0, K, 2, device=positions.device).float() / K)
    angles = (positions[..., None].float() * inverse).repeat(1, 1, 2)[:, None]
    return [angles.cos(), angles.sin()]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_{i+K/2}) by its angle: the half-split order of the checkpoints."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
           mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of queries (B, H, T, K) to keys and values (B, G, S, K) where mask (B, 1, T, S)
    is True, or without one to all that came before; (B, H, T, K)."""
    (B, H, T, K), G = q.shape, k.shape[1]
    if mask is None and T > 1:      # only where nothing was cached: is_causal is top-left aligned
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # The heads that share keys as so many rows of one head: the keys are read once. On a CPU 9x
    # faster for one bfloat16 query (1.6x in float32), 1.1x to 1.3x for seven (tests/benchmark.py).
    mask = None if mask is None else mask.repeat(1, 1, H // G, 1)
    q = q.reshape(B, G, H // G * T, K)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H, T, K)


class Attention(nn.Module):
    """Grouped-query attention over what the cache holds and the T new tokens."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        D, K = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.layer, self.head_dim = layer, K
        self.q_proj = nn.Linear(D, config.num_attention_heads * K)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * K)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * K)
        self.o_proj = nn.Linear(config.num_attention_heads * K, D, bias=False)

    def forward(self, x, cos, sin, mask, cache: KVCache) -> torch.Tensor:
        """x (B, T, D), cos and sin (B, 1, T, K), mask as in `attend` -> (B, T, D)."""
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        k, v = cache.append(self.layer, rotate(k, cos, sin), v)
        y = attend(rotate(q, cos, sin), k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, wide, bias=False)
        self.up_proj = nn.Linear(D, wide, bias=False)
        self.down_proj = nn.Linear(wide, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, cache: KVCache) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """The language model. A pass gives hidden states; `logits` is for those that are read."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False      # training keeps only each block's input (Chen et al. 2016)
        self.model = nn.ModuleDict({        # the checkpoint's prefix
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        place = "meta" if config.tie_word_embeddings else None      # it then has no weights
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=place)
        self.tie()

    def tie(self) -> None:
        """On the small sizes the head is the embedding."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def forward(self, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Hidden states (B, T, D) after the last norm of `ids` (B, T), PAD at padding, which
        follow what `cache` holds and are put into it."""
        cache, config = KVCache() if cache is None else cache, self.config
        positions, mask = cache.claim(ids)
        head_dim = config.hidden_size // config.num_attention_heads
        cos, sin = rotary_angles(positions, head_dim, config.rope_theta)
        x = self.model.embed_tokens(ids.clamp(min=0))

        def on_a_fork(block, x):        # a block is passed twice, so what it caches is dropped
            return block(x, cos, sin, mask, cache.fork())
        for block in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(on_a_fork, block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin, mask, cache)
        return self.model.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) in float32 of hidden states (..., D)."""
        return self.lm_head(hidden).float()


# -------------------------------------------------------------------------------------- loading

def read_json(path: Path) -> dict:
    """The JSON object in a file; FileNotFoundError or ValueError in one sentence otherwise."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: holds no JSON object ({error})") from error


def find_checkpoint(name: str, offline: bool = False) -> Path:
    """The folder of a checkpoint: `name` if it is one, else the hub's files for that id."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download       # only here: it takes a second to import
    from huggingface_hub.errors import HfHubHTTPError
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "model*.safetensors"],
                                      local_files_only=offline))
    except (HfHubHTTPError, OSError, ValueError) as error:      # ValueError: no such id can be
        where = "the hub's cache (--offline forbids a download)" if offline else "the hub"
        raise FileNotFoundError(f"{name}: no such folder, and not in {where}; pass a folder, an "
                                "id as Qwen/Qwen2.5-1.5B-Instruct, or tiny (bundled)") from error


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch and this CPU have what PackedLinear needs."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), 16)
    except (AttributeError, RuntimeError):
        return False
    return True


def load_model(folder: Path, device: str | torch.device = "cpu",
               dtype: torch.dtype = torch.float32, pack: bool = False) -> Qwen2:
    """The model of a checkpoint folder, frozen. ValueError for a damaged file and for a missing,
    extra or misshapen tensor. pack: as `PackedLinear`, where that can be."""
    with torch.device("meta"):
        model = Qwen2(ModelConfig.from_folder(folder))
    state = {}
    for file in sorted(folder.glob("*.safetensors")):           # one, or the shards
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged ({error}); download it again") from error
        state |= {name: t.to(device, dtype, copy=True) for name, t in tensors.items()}
    if model.config.tie_word_embeddings and state:
        state["lm_head.weight"] = state.get("model.embed_tokens.weight")
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: no weights that fit config.json: {what}") from error
    model.tie()
    model.requires_grad_(False)
    if pack and can_pack(dtype):
        for parent in list(model.modules()):
            for name, layer in parent.named_children():
                if type(layer) is nn.Linear:
                    setattr(parent, name, PackedLinear(layer))
    return model


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


# ---------------------------------------------------------------------------- tokenizer and chat

class Tokenizer:
    """The checkpoint's tokenizer, its chat template by hand, and the ids that end a turn."""

    def __init__(self, folder: Path):
        try:
            self.bpe = BPE.from_file(str(folder / "tokenizer.json"))
        except Exception as error:              # the library raises nothing narrower
            raise ValueError(f"{folder}: no readable tokenizer.json ({error})") from error
        # "<|im_end|>" inside a request is text. Special tokens come from `chat` alone, by id.
        self.bpe.encode_special_tokens = True
        self.im_start = self.bpe.token_to_id("<|im_start|>")
        self.im_end = self.bpe.token_to_id("<|im_end|>")
        if self.im_start is None or self.im_end is None:
            raise ValueError(f"{folder}: tokenizer.json lacks <|im_start|> and <|im_end|> (ChatML)")
        generation = folder / "generation_config.json"
        config = read_json(generation if generation.is_file() else folder / "config.json")
        eos = config.get("eos_token_id") or self.im_end
        self.eos: frozenset[int] = frozenset(eos if isinstance(eos, list) else [eos])

    @cached_property
    def quotes(self) -> list[int]:
        """Every token that begins with a quotation mark."""
        # byte-level BPE writes printable ASCII as itself, so a raw entry tells its first byte
        vocabulary = self.bpe.get_vocab(with_added_tokens=True)
        return sorted(i for token, i in vocabulary.items() if token.startswith('"'))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text. A lone surrogate, which UTF-8 cannot hold, becomes "?"."""
        text = text.encode("utf-8", "replace").decode()
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.bpe.decode(list(ids), skip_special_tokens=False)

    def chat(self, messages: Sequence[dict], generate: bool = True) -> list[int]:
        """Token ids of {"role": "system" | "user" | "assistant", "content": str} messages, the
        system's first, as the checkpoint's own Jinja template gives them. generate: open the
        assistant's turn."""
        ids = []
        for message in messages:
            turn = self.encode(f"{message['role']}\n{message['content']}")
            ids += [self.im_start, *turn, self.im_end, *self.encode("\n")]
        return ids + [self.im_start, *self.encode("assistant\n")] if generate else ids

    def split_chat(self, messages: Sequence[dict]) -> tuple[list[int], list[int]]:
        """`chat` in two parts: the system turn, which prompts with the same tools share, and the
        rest."""
        head, ids = self.chat(messages[:1], generate=False), self.chat(messages)
        return head, ids[len(head):]


# -------------------------------------------------------------------------------------- decoding

def pad(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Rows of ids as one tensor (B, T), PAD behind the shorter ones."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows], device=device)


def seeded(*key: str | int) -> torch.Generator:
    """A CPU generator for one purpose, seeded by a stable hash of its key (seed, sample id,
    purpose, ...): neither order nor batch size nor a resumed run changes a draw."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


LIKELY = 256            # tokens among which a nucleus is looked for first


def choose(logits: torch.Tensor, temperature: float, top_p: float,
           generators: Sequence[torch.Generator]) -> list[int]:
    """A token for each row of logits (B, V): the largest at temperature 0, else by nucleus
    sampling (Holtzman et al. 2020) with one uniform number from the row's own CPU generator."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    p = (logits.float() / temperature).softmax(-1)
    # The likeliest few hold the nucleus nearly always: to sort all takes 10x as long on a CPU
    # (tests/benchmark.py).
    ids = p.topk(min(LIKELY, p.shape[-1])).indices.sort().values
    if float(p.gather(1, ids).sum(-1).min()) < min(top_p + 1e-3, 1):
        ids = torch.arange(p.shape[-1], device=p.device).expand_as(p)
    p, order = p.gather(1, ids).sort(descending=True, stable=True)
    ids, cumulative = ids.gather(1, order), p.cumsum(-1)
    last = ((cumulative - p < top_p).sum(-1, keepdim=True) - 1).clamp(min=0)    # of the nucleus
    uniform = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    u = uniform.to(p.device) * cumulative.gather(1, last)
    place = (cumulative <= u).sum(-1, keepdim=True).minimum(last)
    return ids.gather(1, place)[:, 0].tolist()


@dataclass(frozen=True)
class Form:
    """A text with blanks: `parts` stand around them, and a blank's text goes on up to one of its
    closing characters, which is not part of it unless it stands behind a backslash."""
    parts: tuple[str, ...]
    closers: tuple[str, ...]        # of each blank; there is one part more


class Filling:
    """A form while a row of `generate` fills it."""

    def __init__(self, form: Form, tokenizer: Tokenizer):
        self.blanks, self.tokenizer = list(zip(form.closers, form.parts[1:])), tokenizer
        self.last, self.depth = "", 0   # the character before; open brackets of the closing kind

    def read(self, token: int) -> list[int]:
        """The tokens that follow where `token` was chosen: itself, or if it closes a blank what
        stands before the closing character, and the next part; the token's rest is dropped."""
        piece, (closers, part) = self.tokenizer.decode([token]), self.blanks[0]
        opener = {"]": "[", "}": "{"}.get(closers)
        for i, character in enumerate(piece):
            escaped, self.last = self.last == "\\", character
            if escaped:
                self.last = ""
            elif character == opener:
                self.depth += 1
            elif character in closers and self.depth:
                self.depth -= 1
            elif character in closers:
                del self.blanks[0]
                return self.tokenizer.encode(piece[:i] + part)
        return [token]


@dataclass
class Decoded:
    """What was written for one prompt. log_p and entropy (nats) are of each token chosen, the end
    token included; of sampled tokens nobody reads them, and they stay empty."""
    form: Filling | None = None
    ids: list[int] = field(default_factory=list)        # without the end token
    log_p: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    ended: bool = False

    def write(self, token: int, eos: frozenset[int], limit: int) -> list[int]:
        """Add a chosen token, or what the form puts in its place; gives what is read next, which
        is a hole once the text has ended."""
        new = []
        if not self.ended and token not in eos:
            new = self.form.read(token) if self.form else [token]
        self.ids += new
        filled = self.form is not None and not self.form.blanks
        self.ended = not new or len(self.ids) >= limit or filled
        return new or [PAD]


DRAFT, NGRAM = 6, 3     # tokens that a draft has at most, and that must agree for it


def look_up(ids: Sequence[int]) -> list[int]:
    """A draft of what comes next: what followed the last NGRAM (or fewer) tokens where they stood
    before, most recently (prompt look-up decoding: Saxena 2023). [] where they did not."""
    for n in range(NGRAM, 0, -1):
        tail = list(ids[-n:])
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - 1] == tail[-1] and list(ids[end - n:end]) == tail:
                return list(ids[end:end + DRAFT])
    return []


@torch.no_grad()
def generate(model: Qwen2, prompts: Sequence[Sequence[int]], eos: frozenset[int],
             max_new_tokens: int = 256, cache: KVCache | None = None, temperature: float = 0.0,
             top_p: float = 1.0, generators: Sequence[torch.Generator] = (),
             forms: Sequence[Filling | None] = ()) -> list[Decoded]:
    """What follows each of B prompts, which continue the B rows of `cache` by at least one token
    each. temperature 0 is greedy; else each row has its own generator, so its text does not depend
    on its neighbours. Rows that have ended stay, as holes, until all have.

    A row with a form fills its blanks, and ends with the last of them; its ids hold the parts, too.

    One row alone reads a draft behind its token, and keeps of it what the model chooses, or
    draws, as well: tool calls copy from the prompt, so this is the same text in half the passes.
    """
    cache = KVCache() if cache is None else cache.fork()
    rows = [Decoded(form) for form in forms or [None] * len(prompts)]
    pending, draft = prompts, []
    while True:
        start, old = cache.length, pending
        hidden = model(pad([[*new, *draft] for new in old], model.device), cache)
        ends = torch.tensor([[len(new) - 1 + i for i in range(len(draft) + 1)] for new in old])
        logits = model.logits(hidden[torch.arange(len(rows))[:, None], ends])   # (B, draft + 1, V)
        for read, step in enumerate(logits.unbind(1)):      # step follows `read` of the draft
            tokens = choose(step, temperature, top_p, generators)
            if temperature == 0:
                log_p = step.log_softmax(-1)
                entropy = torch.special.entr(log_p.exp()).sum(-1)
                for row, best, spread in zip(rows, log_p.amax(-1).tolist(), entropy.tolist()):
                    if not row.ended:
                        row.log_p.append(best)
                        row.entropy.append(spread)
            pending = [row.write(t, eos, max_new_tokens) for row, t in zip(rows, tokens)]
            if all(row.ended for row in rows):
                return rows
            if read == len(draft) or pending[0] != [draft[read]]:
                break
        if draft:
            cache.cut(start + len(old[0]) + read)       # what was drafted wrongly is forgotten
        left = max_new_tokens - len(rows[0].ids) - 1
        draft = look_up([*cache.ids[0].tolist(), *pending[0]])[:left] if len(rows) == 1 else []
