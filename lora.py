"""LoRA (Hu et al. 2021) as a batch of independent adapters: for each row i of the batch,

    y_i = W x_i + (alpha / r) B_i A_i x_i

The base layer is never written to: an adapter is two small float32 tensors beside it, and dropping
them resets the model. Shapes as in model.py.
"""
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

# every linear layer of a block
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

PEFT = "base_model.model."      # what peft puts before a layer's name
# a layer's name -> A (rows, rank, in), B (rows, out, rank)
Params = dict[str, tuple[torch.Tensor, torch.Tensor]]


def new_params(model: nn.Module, rank: int, generators: Sequence[torch.Generator]) -> Params:
    """Fresh adapters for all TARGETS, one for each generator, in float32 on the layer's device:
    B = 0, so y = W x at the start, and A uniform within 1 / sqrt(in).

    The LoRA paper draws A from a Gaussian; its code and peft draw kaiming-uniform with
    a = sqrt(5), which is this bound.
    """
    params = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in TARGETS:
            bound = 1 / math.sqrt(layer.in_features)
            rows = [torch.rand(rank, layer.in_features, generator=g) for g in generators]
            A = torch.stack(rows) * 2 * bound - bound
            B = torch.zeros(len(rows), layer.out_features, rank)
            params[name] = tuple(t.to(layer.weight.device).requires_grad_() for t in (A, B))
    return params


@contextmanager
def adapters(model: nn.Module, params: Params, alpha: float) -> Iterator[list[torch.Tensor]]:
    """Inside the block the model's layers have the adapters of `params` beside them. After it, even
    after an exception, the original layers are back: this is the reset. Yields the tensors to
    train. RuntimeError if the model has adapters already."""
    layers = dict(model.named_modules())
    if any(isinstance(layer, LoRALinear) for layer in layers.values()):
        raise RuntimeError("the model has adapters already: leave the inner block first")
    try:
        for name, (A, B) in params.items():
            model.set_submodule(name, LoRALinear(layers[name], A, B, alpha / A.shape[1]))
        yield [tensor for pair in params.values() for tensor in pair]
    finally:
        reset(model)


def reset(model: nn.Module) -> None:
    """Put back each original layer that has an adapter beside it. What an interrupt amid it has
    left, another call puts back."""
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, LoRALinear):
            model.set_submodule(name, layer.base)


class LoRALinear(nn.Module):
    """A linear layer with a batch of adapters beside it. Row i of the input uses adapter i, or
    adapter rows[i] where a pass reads some rows of the batch; a single adapter serves all rows."""

    def __init__(self, base: nn.Linear, A: torch.Tensor, B: torch.Tensor, scale: float):
        super().__init__()
        self.base, self.A, self.B, self.scale = base, A, B, scale
        self.rows: Sequence[int] = ()               # as of `Qwen2.read_only`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, new, in) -> (rows, new, out). The adapters are cast to the type of x. A step of
        decoding reads few tokens: then x is cast to the adapters' type, since x is smaller."""
        decoding = x.shape[1] <= self.A.shape[1] and not torch.is_grad_enabled()
        dtype = torch.promote_types(x.dtype, self.A.dtype) if decoding else x.dtype
        A, B = self.A.to(dtype), self.B.to(dtype)
        if self.rows and len(A) > 1:
            A, B = A[self.rows], B[self.rows]
        y, h = self.base(x), x.to(dtype) @ A.mT
        return torch.baddbmm(y.to(dtype), h, B.mT.expand(len(x), -1, -1), alpha=self.scale).to(x)


def save_adapter(folder: Path, params: Params, alpha: float, base: str | Path,
                 row: int = 0) -> None:
    """Write one row's adapter in the format of Hugging Face's peft. base: the id or the folder of
    the model that it belongs to, which peft and llama.cpp look for."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{PEFT}{name}.lora_{letter}.weight": tensor[row].detach().cpu().contiguous()
               for name, pair in params.items() for letter, tensor in zip("AB", pair)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = next(iter(params.values()))[0].shape[1]
    targets = sorted({name.rpartition(".")[2] for name in params})
    base = str(Path(base).resolve()) if Path(base).is_dir() else str(base)
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": targets},
        indent=2) + "\n")


# What peft may say of a LoRA that is not B A x alone, or not beside the base's own weights (PiSSA,
# OLoRA and LoftQ start from others): of each name the values that are plain.
PLAIN = {"peft_type": ("LORA",), "bias": ("none",),
         "init_lora_weights": (True, "gaussian", "orthogonal", "eva"), **dict.fromkeys([
             "use_dora", "use_rslora", "use_qalora", "use_bdlora", "lora_bias", "alpha_pattern",
             "rank_pattern", "modules_to_save", "trainable_token_indices", "layer_replication",
             "alora_invocation_tokens", "target_parameters", "arrow_config", "kasa_config",
             "monteclora_config", "velora_config", "fan_in_fan_out"], ())}


def load_adapter(folder: Path, model: nn.Module) -> tuple[Params, float]:
    """An adapter in peft's format as a batch of one, and its alpha. ValueError if it is damaged,
    lacks a layer, is no plain LoRA on the model's own weights, or does not fit the model."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        alpha, rank = float(config["lora_alpha"]), int(config["r"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder}: no adapter in peft's format ({error})") from error
    other = [f"{name} = {config[name]}" for name, plain in PLAIN.items()
             if config.get(name) and config[name] not in plain]
    if other:
        raise ValueError(f"{folder}: only plain LoRA is implemented, without {', '.join(other)}")
    params, whole = {}, ()              # endings of all layers that it adapts, where it says so
    if isinstance(config.get("target_modules"), list) and not config.get("exclude_modules") \
            and config.get("layers_to_transform") is None:
        whole = tuple([f".{target}" for target in config["target_modules"]])
    for name, layer in model.named_modules():
        keys = [f"{PEFT}{name}.lora_{letter}.weight" for letter in "AB"]
        if not all(key in tensors for key in keys):
            if f".{name}".endswith(whole):
                raise ValueError(f"{folder}: the adapter lacks {name}, which it says to adapt")
            continue
        A, B = [tensors.pop(key) for key in keys]
        if (*A.shape, *B.shape) != (rank, layer.in_features, layer.out_features, rank):
            raise ValueError(f"{folder}: the adapter's {name} does not fit this model")
        params[name] = tuple(t[None].float().to(layer.weight.device) for t in (A, B))
    if tensors or not params:
        raise ValueError(f"{folder}: this model has no layer for {next(iter(tensors), 'nothing')}")
    return params, alpha
