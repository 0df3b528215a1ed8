"""Qwen2.5 in plain PyTorch: the network, its KV cache, loading, the tokenizer with its chat template, and decoding.

Implemented: RMSNorm, rotary embedding (RoPE), grouped-query attention with biases on q/k/v, SwiGLU, a head that is
tied to the embedding on the small sizes. Left out: sliding windows, YaRN scaling, quantised weights, dropout.

Shapes, in all files and tests:
    B  rows of a batch            T  new tokens in this pass      S  cached + new tokens
    D  hidden width               H  query heads                  G  key/value heads (H / G queries share one)
    K  width of one head          V  vocabulary                   R  rank of a LoRA adapter
"""
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer as BPE
from torch import nn


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a checkpoint, under the names of its config.json; every size from 0.5B to 72B is one of these."""
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

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read config.json; ValueError if it describes something that this file does not implement."""
        path = folder / "config.json"
        raw = read_json(path)
        raw = {**(raw.get("rope_parameters") or {}), **raw}             # newer files keep rope_theta in there
        for key, known in (("model_type", "qwen2"), ("hidden_act", "silu"), ("rope_scaling", None),
                           ("rope_type", "default"), ("use_sliding_window", False)):
            if raw.get(key, known) != known:
                raise ValueError(f"{path}: {key} is {raw[key]!r}, and only {known!r} is implemented: pass a Qwen2.5 checkpoint")
        names = [f.name for f in fields(cls)]
        try:
            config = cls(**{name: raw[name] for name in names if name in raw})
        except TypeError as error:
            missing = [name for name in names[:6] if name not in raw]
            raise ValueError(f"{path}: lacks {', '.join(missing)}: is this the config of a Qwen2.5 checkpoint?") from error
        for name in names[:7]:
            if type(getattr(config, name)) is not int or getattr(config, name) < 1:
                raise ValueError(f"{path}: {name} is {getattr(config, name)!r} where a positive whole number is needed")
        if config.hidden_size % config.num_attention_heads or config.num_attention_heads % config.num_key_value_heads:
            raise ValueError(f"{path}: {config.num_attention_heads} heads do not divide a width of {config.hidden_size}, "
                             f"or are not a multiple of {config.num_key_value_heads} key/value heads")
        return config


class ContextError(ValueError):
    """More tokens than the model's context holds."""


GROWTH = 128            # slots that a cache sets aside when it has no room left


class KVCache:
    """Keys and values of the tokens read so far, for B rows. It alone knows the positions, so several can live at once.

    A fork shares its parent's memory until either grows, which then moves to memory of its own and writes new tokens behind the
    old ones; with gradients, a pass makes new tensors instead. A padded slot is a hole: `valid` is False there, nobody attends
    to it, and it takes no position.
    """

    def __init__(self, num_layers: int):
        self.keys: list[torch.Tensor | None] = [None] * num_layers      # each (B, G, S or more, K)
        self.values: list[torch.Tensor | None] = [None] * num_layers    # each (B, G, S or more, K)
        self.own = [False] * num_layers                                 # whether no other cache has these tensors
        self.valid: torch.Tensor | None = None                          # (B, S) bool
        self.holes = False                                              # whether `valid` has a False

    @property
    def length(self) -> int:
        """Slots in use, holes included."""
        return 0 if self.valid is None else self.valid.shape[1]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.keys + self.values if t is not None)

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put one layer's new keys and values, (B, G, T, K) each, into the last T slots; gives all of them, (B, G, S, K) each."""
        end, start = self.length, self.length - keys.shape[2]
        if start == 0 or torch.is_grad_enabled():
            if start > 0:
                keys = torch.cat((self.keys[layer][:, :, :start], keys), dim=2)
                values = torch.cat((self.values[layer][:, :, :start], values), dim=2)
            self.keys[layer], self.values[layer], self.own[layer] = keys, values, False
            return keys, values
        # In place: 16 tokens of the 0.5B, after 573, go in twice as fast as into new tensors, for five rows 4x (tests/benchmark.py).
        if not self.own[layer] or self.keys[layer].shape[2] < end:
            for tensors in (self.keys, self.values):
                B, G, _, K = tensors[layer].shape
                old, tensors[layer] = tensors[layer], keys.new_empty(B, G, end + GROWTH, K)
                tensors[layer][:, :, :start] = old[:, :, :start]
            self.own[layer] = True
        self.keys[layer][:, :, start:end], self.values[layer][:, :, start:end] = keys, values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def fork(self, rows: int | Sequence[int] | None = None) -> "KVCache":
        """A cache that goes on from here on its own: as it is, one row expanded to `rows`, or the rows listed."""
        def pick(tensor):
            if tensor is None or rows is None:
                return tensor
            return tensor.expand(rows, *tensor.shape[1:]) if isinstance(rows, int) else tensor[list(rows)]
        other = KVCache(len(self.keys))
        other.keys, other.values = [pick(t) for t in self.keys], [pick(t) for t in self.values]
        other.valid, other.holes = pick(self.valid), self.holes
        if rows is None or isinstance(rows, int):
            self.own = [False] * len(self.own)
        else:
            other.own = [t is not None for t in other.keys]             # listed rows are copies
        return other

    def cut(self, length: int) -> None:
        """Forget all but the first `length` slots."""
        self.valid = self.valid[:, :length]

    @staticmethod
    def stack(caches: Sequence["KVCache"]) -> "KVCache":
        """One cache with the rows of all; the shorter ones get holes in front, so that all end at the same slot."""
        if len(caches) == 1:
            return caches[0].fork()
        longest = max(cache.length for cache in caches)
        def join(tensors, dim):             # pads `dim` (from behind) in front, with zeros or False
            return torch.cat([F.pad(t, [0, 0] * (dim - 1) + [longest - t.shape[-dim], 0]) for t in tensors])
        other = KVCache(len(caches[0].keys))
        for name in ("keys", "values"):
            layers = zip(*([t[:, :, :c.length] for t in getattr(c, name)] for c in caches))
            setattr(other, name, [join(layer, 2) for layer in layers])
        other.valid = join([cache.valid for cache in caches], 1)
        other.holes = any(cache.holes or cache.length < longest for cache in caches)
        return other


PACKED_FOR = 16         # rows of x that the packed layout is chosen for; it serves any number


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, packed: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b, (..., in) -> (..., out); packed: W as oneDNN reads it, or None."""
    if packed is None:
        return F.linear(x, weight, bias)
    if x.requires_grad and torch.is_grad_enabled():
        return PackedProduct.apply(x, weight, bias, packed)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class PackedProduct(torch.autograd.Function):
    """`product` with a packed, frozen W, and its gradient for x."""

    @staticmethod
    def forward(ctx, x, weight, bias, packed):
        ctx.save_for_backward(weight)
        return product(x, weight, bias, packed)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None, None, None


class Linear(nn.Linear):
    """x W^T + b. On a CPU it may hold a frozen W a second time, in the blocks that products read it in (`Qwen2.pack`)."""
    packed: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.weight, self.bias, self.packed)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_angles(positions: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (B, 1, T, K) float32, of position * theta^(-2i/K) for positions (B, T) (RoFormer, Su et al. 2021)."""
    K = config.head_dim
    inverse = 1 / config.rope_theta ** (torch.arange(0, K, 2, device=positions.device).float() / K)
    angles = (positions[..., None].float() * inverse).repeat(1, 1, 2)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_{i+K/2}) by its angle: the half-split order of the Hugging Face checkpoints."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention over what the cache holds and the T new tokens."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        D, K = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, K
        self.q_proj = Linear(D, config.num_attention_heads * K)
        self.k_proj = Linear(D, config.num_key_value_heads * K)
        self.v_proj = Linear(D, config.num_key_value_heads * K)
        self.o_proj = Linear(config.num_attention_heads * K, D, bias=False)

    def forward(self, x, cos, sin, mask, cache: KVCache) -> torch.Tensor:
        """x (B, T, D), cos and sin (B, 1, T, K), mask (B or 1, 1, T, S) or None (causal) -> (B, T, D)."""
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        k, v = cache.append(self.layer, rotate(k, cos, sin), v)
        y = attend(rotate(q, cos, sin), k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of queries (B, H, T, K) to keys and values (B, G, S, K), where mask (B or 1, 1, T, S) is True or, without
    one, causally; (B, H, T, K)."""
    (B, H, T, K), G = q.shape, k.shape[1]
    if mask is None and T > 1:          # SDPA's is_causal is aligned to the top left: right only where nothing was cached before
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # The heads that share keys as so many rows of one head: the keys are read once. On a CPU 9x faster for
    # one bfloat16 query (1.6x in float32), 1.1x to 1.3x for seven (tests/benchmark.py).
    mask = None if mask is None else mask.repeat(1, 1, H // G, 1)
    return F.scaled_dot_product_attention(q.reshape(B, G, H // G * T, K), k, v, attn_mask=mask).reshape(B, H, T, K)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = Linear(D, F_, bias=False), Linear(D, F_, bias=False)
        self.down_proj = Linear(F_, D, bias=False)

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


class Trunk(nn.Module):
    """Embedding, blocks and the last norm, under the checkpoint's prefix `model.`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen2(nn.Module):
    """The language model. A pass gives hidden states; `logits` turns into logits only those that somebody reads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False                      # with gradients: keep only each block's input, compute the rest again
        self.packed_head: torch.Tensor | None = None    # of a tied head
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def new_cache(self) -> KVCache:
        return KVCache(self.config.num_hidden_layers)

    def forward(self, ids: torch.Tensor, cache: KVCache | None = None, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (B, T, D) after the last norm of the tokens `ids` (B, T), which follow what `cache` holds.

        The cache grows by T slots, but not while checkpointing, when nobody reads it afterwards. valid: (B, T) bool, False at
        padding; None if there is none. Raises ValueError when the tokens do not fit the model's context.
        """
        cache = self.new_cache() if cache is None else cache
        positions, mask = place(cache, ids, valid)
        # Padding is a hole without a position, so slots overcount: look at the positions only where slots are too many.
        if cache.length > self.config.max_position_embeddings and int(positions.max()) >= self.config.max_position_embeddings:
            raise ContextError(f"{int(positions.max()) + 1} tokens are more than the model's context of "
                               f"{self.config.max_position_embeddings} (max_position_embeddings)")
        x = self.model.embed_tokens(ids)
        cos, sin = rotary_angles(positions, self.config)
        if self.checkpointing:
            from torch.utils.checkpoint import checkpoint               # only here: to import it takes time, and warns without NumPy
        for block in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():          # twice through a block, so each on a fork that is dropped
                x = checkpoint(lambda x, block=block: block(x, cos, sin, mask, cache.fork()), x, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache)
        return self.model.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) in float32 of hidden states (..., D)."""
        tied = self.config.tie_word_embeddings
        return (product(hidden, self.model.embed_tokens.weight, None, self.packed_head) if tied else self.lm_head(hidden)).float()

    def pack(self) -> None:
        """Hold each weight matrix a second time, as oneDNN reads it: for the CPU, once the weights are final.

        Otherwise torch packs them anew in every product: measured (tests/benchmark.py, the 0.5B, two cores), in bfloat16 (float32)
        its products are 1.3x (1.6x) faster for one row, 1.9x (2.9x) for five, 1.7x (3.4x) for seven, 1.1x (1.5x) for eighty.
        """
        for layer in self.modules():
            if isinstance(layer, Linear):
                layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, PACKED_FOR)
        if self.config.tie_word_embeddings:
            self.packed_head = torch.ops.mkldnn._reorder_linear_weight(self.model.embed_tokens.weight, PACKED_FOR)


def place(cache: KVCache, ids: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Claim T slots of the cache for `ids` (B, T): their positions (B, T), and the mask (B or 1, 1, T, S) or None."""
    (B, T), past = ids.shape, cache.length
    cache.holes = cache.holes or valid is not None
    new = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    cache.valid = new if past == 0 else torch.cat((cache.valid, new), dim=1)
    if not cache.holes:
        positions = torch.arange(past, past + T, device=ids.device).expand(B, T)
        if past == 0 or T == 1:
            return positions, None
    else:
        positions = (cache.valid.cumsum(1) - 1)[:, past:].clamp(min=0)
    slot = torch.arange(past + T, device=ids.device)
    own = slot[past:, None]
    mask = (slot <= own)[None]
    if cache.holes:                      # a padded query sees itself, so that no softmax runs over an empty set
        mask = mask & cache.valid[:, None] | (slot == own)
    return positions, mask[:, None]


# ---------------------------------------------------------------------------------------------------------- loading

def read_json(path: Path) -> dict:
    """The JSON object in a file; FileNotFoundError or ValueError in one sentence otherwise."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: --model takes a hub id or a folder with config.json, "
                                "tokenizer.json and model.safetensors")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds a {type(raw).__name__} where a JSON object is needed")
    return raw


def find_checkpoint(name: str, offline: bool = False, flag: str = "--model") -> Path:
    """The folder of a checkpoint: `name` itself if it is one, else the hub's files for that id, downloaded if need be."""
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{flag} {name}: no such folder (a hub id looks like Qwen/Qwen2.5-1.5B-Instruct)")
    from huggingface_hub import snapshot_download      # only here: a local folder needs nothing of the hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    wanted = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
              "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=offline))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        how = "is not in the hub's local cache, and --offline forbids a download" if offline else \
              f"could not be had from the hub ({type(error).__name__})"
        raise FileNotFoundError(f"{flag} {name}: {how}; pass a folder, or --model tiny for the bundled one") from error
    for file in folder.glob("*.safetensors"):
        check_blob(file.resolve())
    return folder


def check_blob(path: Path) -> None:
    """ValueError if a file of the hub's cache, which is named by the SHA-256 of its content, has become another one."""
    if len(path.name) != 64:
        return
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    if digest.hexdigest() != path.name:
        raise ValueError(f"{path}: damaged or half-downloaded (its SHA-256 is another); delete it and download it again")


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which safetensors file holds which tensor, from the one file or from the index of a sharded checkpoint."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file() and not single.is_file():
        files = {name: folder / Path(file).name for name, file in read_json(index).get("weight_map", {}).items()}
    elif single.is_file():
        with open_tensors(single) as tensors:
            files = dict.fromkeys(tensors.keys(), single)
    else:
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor model.safetensors.index.json: no weights to load")
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is named in {index.name} but missing: download it again")
    return files


def open_tensors(path: Path):
    """Open a safetensors file for reading; ValueError if it is truncated or no such file."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or half-downloaded ({error}); download it again") from error


def load_model(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Qwen2:
    """The model of a checkpoint folder, frozen. Strict: a missing, extra or misshapen tensor is a ValueError that names it."""
    config = ModelConfig.from_folder(folder)
    with torch.device("meta"):
        model = Qwen2(config)
    files = tensor_files(folder)
    if config.tie_word_embeddings:
        files.pop("lm_head.weight", None)               # some tied checkpoints store the embedding a second time
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for problem, names in (("lacks", wanted.keys() - files.keys()), ("has besides", files.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{folder}: the checkpoint {problem} {', '.join(sorted(names)[:3])}"
                             f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
    state = {}
    # One tensor at a time, each file opened anew: the mapping of what was read goes before the next is read, so the
    # peak is the weights themselves and one tensor.
    for name, file in files.items():
        with open_tensors(file) as tensors:
            if name not in tensors.keys():
                raise ValueError(f"{file}: lacks {name}, which the index says is there: download it again")
            shape = tuple(tensors.get_slice(name).get_shape())
            if shape != wanted[name]:
                raise ValueError(f"{file}: {name} is {shape}, but config.json makes it {wanted[name]}")
            state[name] = tensors.get_tensor(name).to(device=device, dtype=dtype, copy=True)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def fingerprint(model: nn.Module) -> str:
    """A digest of the parameters' bits, to see that none has changed: equal before and after every adaptation.

    Each tensor is read as 16-bit words w_i and reduced, on its device, to sum(w_i) and sum(i w_i): no change of one word
    and no exchange of two keeps both. SHA-256 over these is what is compared.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        for words in parameter.detach().reshape(-1).view(torch.int16).split(1 << 22):
            words = words.long()
            place = torch.arange(1, len(words) + 1, device=words.device)
            digest.update(f" {words.sum().item()} {(words * place).sum().item()}".encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ tokenizer and chat

class Tokenizer:
    """The checkpoint's tokenizer, its chat template written by hand, and the ids that end a turn."""

    def __init__(self, folder: Path):
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: the checkpoint's tokenizer is needed")
        try:
            self.bpe = BPE.from_file(str(path))
        except Exception as error:                       # the library raises nothing narrower than Exception
            raise ValueError(f"{path}: no readable tokenizer ({error})") from error
        # "<|im_end|>" inside a request or a model's text is text. Special tokens come from `chat` alone, by id.
        self.bpe.encode_special_tokens = True
        self.im_start, self.im_end = (self.bpe.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>"))
        if self.im_start is None or self.im_end is None:
            raise ValueError(f"{path}: has no <|im_start|> and <|im_end|> tokens, so it is no ChatML (Qwen2.5) tokenizer")
        generation, config = folder / "generation_config.json", folder / "config.json"
        eos = read_json(generation if generation.is_file() else config).get("eos_token_id") or self.im_end
        self.eos: frozenset[int] = frozenset(eos if isinstance(eos, list) else [eos])

    @cached_property
    def quotes(self) -> list[int]:
        """Every token that begins with a quotation mark."""
        # byte-level BPE writes printable ASCII as itself, so the raw vocabulary entry tells the first byte; the added
        # tokens of a small vocabulary stand as plain text, which begins the same way
        return sorted(i for token, i in self.bpe.get_vocab(with_added_tokens=True).items() if token.startswith('"'))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text. A lone surrogate, which no UTF-8 can hold, becomes a question mark."""
        return self.bpe.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.bpe.decode(list(ids), skip_special_tokens=False)

    def chat(self, messages: Sequence[dict], tools: Sequence[dict] = (), generate: bool = True) -> list[int]:
        """Token ids of a dialogue, as the checkpoint's own Jinja template gives them.

        messages: {"role": "system" | "user" | "assistant" | "tool", "content": str} and, for an assistant's calls,
        "tool_calls": [{"name", "arguments"}]. generate: end with the opening of the assistant's turn.
        """
        ids = []
        for role, text in render(messages, tools):
            ids += [self.im_start, *self.encode(f"{role}\n{text}"), self.im_end, *self.encode("\n")]
        return ids + [self.im_start, *self.encode("assistant\n")] if generate else ids

    def split_chat(self, messages: Sequence[dict]) -> tuple[list[int], list[int]]:
        """`chat` in two parts: the system turn, which all prompts with the same tools share, and the rest."""
        head, ids = self.chat(messages[:1], generate=False), self.chat(messages)
        return head, ids[len(head):]


DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
TOOLS_HEAD = ("\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
              "You are provided with function signatures within <tools></tools> XML tags:\n<tools>")
TOOLS_TAIL = ("\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
              '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
              "</tool_call>")


def render(messages: Sequence[dict], tools: Sequence[dict] = ()) -> list[tuple[str, str]]:
    """The turns (role, text) of Qwen2.5's chat template: what stands between <|im_start|> and <|im_end|>."""
    def tojson(value): return json.dumps(value, ensure_ascii=False)
    turns, messages = [], list(messages)
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else DEFAULT_SYSTEM
    if tools:
        system += TOOLS_HEAD + "".join("\n" + tojson(tool) for tool in tools) + TOOLS_TAIL
    turns.append(("system", system))
    previous = None
    for message in messages:
        role, text = message["role"], message.get("content") or ""
        if role == "tool":                              # several results in a row share one user turn
            text = f"<tool_response>\n{text}\n</tool_response>"
            if previous == "tool":
                text = f"{turns.pop()[1]}\n{text}"
        elif message.get("tool_calls"):
            calls = [f'<tool_call>\n{{"name": "{c["name"]}", "arguments": {tojson(c["arguments"])}}}\n</tool_call>'
                     for c in message["tool_calls"]]
            text = "\n".join([text] * bool(text) + calls)
        turns.append(("user" if role == "tool" else role, text))
        previous = role
    return turns


# --------------------------------------------------------------------------------------------------------- decoding

def pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of ids as one tensor (B, T), padded on the right, and where it is no padding (B, T), None if nowhere is."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    if all(len(row) == longest for row in rows):
        return ids, None
    return ids, torch.arange(longest, device=device) < torch.tensor([[len(row)] for row in rows], device=device)


class PrefixCaches:
    """The KV caches of the last few prefixes read with the base weights, by their token ids, within a memory bound.

    A prompt is a long head (system text and tools), which many samples and all stages share, and a short rest.
    """

    def __init__(self, model: Qwen2, max_bytes: int = 2 << 30):
        self.model, self.max_bytes = model, max_bytes
        self.caches: OrderedDict[tuple[int, ...], KVCache] = OrderedDict()

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> KVCache:
        """A cache that holds `ids`, to be continued freely: it is a fork of the kept one."""
        key = tuple(ids)
        if key not in self.caches:
            cache = self.model.new_cache()
            self.model(torch.tensor([key], device=self.model.device), cache)
            self.caches[key] = cache
            while len(self.caches) > 1 and sum(c.bytes for c in self.caches.values()) > self.max_bytes:
                self.caches.popitem(last=False)
        self.caches.move_to_end(key)
        return self.caches[key].fork()


LIKELY = 256            # tokens among which a nucleus is looked for first


def sample_token(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """One token id from logits (V,): the largest at temperature 0, else by nucleus sampling (Holtzman et al. 2020).

    One uniform number is drawn on the CPU and looked up in the cumulative distribution of the sorted tokens, so a
    generator gives the same text on every device and in every batch.
    """
    if temperature == 0:
        return int(logits.argmax())
    p = (logits.float() / temperature).softmax(-1)
    # The most probable few hold the nucleus nearly always; to sort all takes 10 times as long on a CPU (tests/benchmark.py).
    likely = (p >= p.topk(min(LIKELY, len(p))).values[-1]).nonzero()[:, 0]
    if float(p[likely].sum()) < min(top_p + 1e-3, 1):
        likely = torch.arange(len(p), device=p.device)
    p, order = p[likely].sort(descending=True, stable=True)
    order, cumulative = likely[order], p.cumsum(-1)
    nucleus = max(1, int((cumulative - p < top_p).sum()))       # the fewest tokens that hold top_p; never none
    u = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[nucleus - 1].double().cpu()
    return int(order[min(int((cumulative[:nucleus].double() <= u.to(p.device)).sum()), nucleus - 1)])


def seeded(*key: str | int) -> torch.Generator:
    """A CPU generator for one purpose, seeded by a stable hash of its key (seed, sample id, stage, ...): a draw depends
    on nothing else, so neither order nor batch size nor a resumed run changes it."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


DRAFT, NGRAM = 6, 3      # tokens that a draft has at most, and that must agree for it


def look_up(ids: Sequence[int]) -> list[int]:
    """A draft of what comes next: what followed the last NGRAM (or fewer) tokens where they stood before, most recently
    (prompt look-up decoding: Saxena 2023). [] where they did not."""
    for n in range(NGRAM, 0, -1):
        tail = list(ids[-n:])
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - 1] == tail[-1] and list(ids[end - n:end]) == tail:
                return list(ids[end:end + DRAFT])
    return []


@torch.no_grad()
def speculate(model: Qwen2, prompt: Sequence[int], eos: frozenset[int], max_new_tokens: int, cache: KVCache | None,
              context: Sequence[int], temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None,
              watch: Callable[[list[int], torch.Tensor], None] | None = None) -> list[int]:
    """`generate` for one prompt: the same tokens in fewer passes. Tool calls copy names and values from the prompt, so each
    pass reads a draft behind its token and keeps of it what the model chooses, or draws, as well.

    context: all tokens of the prompt, those in the cache, too; drafts are looked up there and in the new text.
    """
    ids, text, pending = list(context), [], list(prompt)
    cache = model.new_cache() if cache is None else cache.fork()
    checked = 0                                         # how many of the pending tokens are a draft
    while True:
        start = cache.length
        hidden = model(torch.tensor([pending], device=model.device), cache)[0, len(pending) - checked - 1:]
        logits = model.logits(hidden)                   # (checked + 1, V)
        best, draft = logits.argmax(-1).tolist(), pending[len(pending) - checked:]
        for i, token in enumerate(best):                # best[i] follows the first i tokens of the draft
            token = token if temperature == 0 else sample_token(logits[i], temperature, top_p, generator)
            if watch:
                watch([0], logits[i:i + 1])
            if token in eos:
                return text
            text.append(token)
            ids.append(token)
            if len(text) == max_new_tokens:
                return text
            if i == checked or token != draft[i]:
                break
        cache.cut(start + len(pending) - checked + i)   # what was drafted wrongly was read in vain
        room = min(max_new_tokens - len(text), model.config.max_position_embeddings - cache.length) - 1
        draft = look_up(ids)[:max(room, 0)]
        pending, checked = [text[-1], *draft], len(draft)


@torch.no_grad()
def generate(model: Qwen2, prompts: Sequence[Sequence[int]], eos: frozenset[int], max_new_tokens: int = 256,
             cache: KVCache | None = None, temperature: float = 0.0, top_p: float = 1.0,
             generators: Sequence[torch.Generator] | None = None, watch: Callable[[list[int], torch.Tensor], None] | None = None,
             keep: Callable[[list[int]], None] | None = None, contexts: Sequence[Sequence[int]] | None = None) -> list[list[int]]:
    """New token ids for each of B prompts, the end token left out; rows leave the batch when they end.

    prompts: what follows `cache`, at least one token a row; a cache of one row serves all. temperature 0 is greedy;
    else each row draws from its own generator, so that its text does not depend on its neighbours. watch(rows, logits)
    sees the (R, V) logits that each step chooses from, for the rows still there; keep(places) is told, when rows leave,
    which of those that were there stay. contexts: the prompts with what the cache holds, in tokens; with them, a row alone is
    written by `speculate`.
    """
    if contexts and len(prompts) == 1:
        generator = generators[0] if generators else None
        return [speculate(model, prompts[0], eos, max_new_tokens, cache, contexts[0], temperature, top_p, generator, watch)]
    rows = list(range(len(prompts)))
    texts: list[list[int]] = [[] for _ in rows]
    ids, valid = pad(prompts, model.device)
    cache = model.new_cache() if cache is None else cache.fork(len(ids) if cache.valid.shape[0] == 1 else None)
    last = model(ids, cache, valid)[torch.arange(len(ids)), [len(prompt) - 1 for prompt in prompts]]
    for step in range(max_new_tokens):
        logits = model.logits(last)
        if watch:
            watch(rows, logits)
        tokens = logits.argmax(-1).tolist() if temperature == 0 else \
            [sample_token(logits[i], temperature, top_p, generators[row]) for i, row in enumerate(rows)]
        going = [i for i, token in enumerate(tokens) if token not in eos]
        for i in going:
            texts[rows[i]].append(tokens[i])
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(rows):
            cache, rows = cache.fork(going), [rows[i] for i in going]
            if keep:
                keep(going)
        last = model(torch.tensor([[tokens[i]] for i in going], device=model.device), cache)[:, 0]
    return texts
