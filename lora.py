"""LoRA (Hu et al. 2021) as a batch of independent adapters: y_b = W x_b + (alpha / r) B_b A_b x_b for each row b.

The base layer is never written to: an adapter is two small float32 tensors beside it, and to reset is to drop them.
Shapes as in model.py; R is the rank.
"""
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")   # every linear layer of a block

Params = dict[str, tuple[torch.Tensor, torch.Tensor]]        # layer name -> A (B, R, in) and B (B, out, R)


class LoRALinear(nn.Module):
    """A linear layer with B adapters beside it, row b of the input using adapter b (or all rows the only one)."""

    def __init__(self, base: nn.Linear, A: torch.Tensor, B: torch.Tensor, scale: float):
        super().__init__()
        self.base, self.A, self.B, self.scale = base, A, B, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, in) -> (B, T, out). The adapters are float32, and multiplied in the type that the base computes in."""
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        return torch.baddbmm(self.base(x), x @ A.mT, B.mT.expand(len(x), -1, -1), alpha=self.scale)


def targeted(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers whose last name is among `targets`, by their full name; ValueError for a target that names none."""
    found = {name: layer for name, layer in model.named_modules()
             if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in targets}
    unknown = set(targets) - {name.rpartition(".")[2] for name in found}
    if unknown or not targets:
        raise ValueError(f"--targets: no linear layer is called {', '.join(sorted(unknown)) or 'nothing'}; "
                         f"choose from {', '.join(TARGETS)}")
    return found


def new_params(model: nn.Module, rank: int, generators: Sequence[torch.Generator],
               targets: Sequence[str] = TARGETS) -> Params:
    """Fresh adapters, one for each generator: B = 0, so y = W x at the start, and A uniform within 1 / sqrt(in).

    The LoRA paper draws A from a Gaussian; its code and peft draw kaiming-uniform with a = sqrt(5), which is this bound.
    """
    params = {}
    for name, layer in targeted(model, targets).items():
        bound = 1 / math.sqrt(layer.in_features)
        A = torch.stack([torch.rand(rank, layer.in_features, generator=g) for g in generators]) * 2 * bound - bound
        B = torch.zeros(len(generators), layer.out_features, rank)
        params[name] = tuple(t.to(layer.weight.device).requires_grad_() for t in (A, B))
    return params


@contextmanager
def adapters(model: nn.Module, params: Params, alpha: float) -> Iterator[list[torch.Tensor]]:
    """Within the block the model's layers have the adapters of `params` beside them; afterwards, also after an
    exception, the very layers of before are back. Gives the tensors to train."""
    layers = dict(model.named_modules())
    swapped = []
    try:
        for name, (A, B) in params.items():
            parent, _, last = name.rpartition(".")
            if isinstance(layers[name], LoRALinear):
                raise RuntimeError(f"{name} has an adapter already: leave the inner block first")
            setattr(layers[parent], last, LoRALinear(layers[name], A, B, alpha / A.shape[1]))
            swapped.append((layers[parent], last, layers[name]))
        yield [tensor for pair in params.values() for tensor in pair]
    finally:
        for parent, last, layer in swapped:
            setattr(parent, last, layer)


def keep_rows(model: nn.Module, rows: Sequence[int]) -> None:
    """Within `adapters`: go on with these rows of the batch only, as `generate` does when others have ended. A single
    adapter, which serves all rows, is left as it is."""
    for module in model.modules():
        if isinstance(module, LoRALinear) and len(module.A) > 1:
            module.A, module.B = module.A[list(rows)], module.B[list(rows)]


def merge(layer: nn.Linear, A: torch.Tensor, B: torch.Tensor, alpha: float) -> torch.Tensor:
    """W + (alpha / r) B A as a new (out, in) tensor, for export; the layer itself stays as it is. A: (R, in), B: (out, R)."""
    return (layer.weight.float() + alpha / A.shape[0] * B @ A).to(layer.weight.dtype)


@torch.no_grad()
def merge_adapter(model: nn.Module, params: Params, alpha: float) -> None:
    """Make an adapter (a batch of one) part of the model's weights for good: a run then has these as its theta_0."""
    for name, (A, B) in params.items():
        layer = model.get_submodule(name)
        layer.weight.copy_(merge(layer, A[0], B[0], alpha))


def save_adapter(folder: Path, params: Params, alpha: float, row: int = 0, base_model: str = "") -> None:
    """Write one row's adapter as adapter_config.json and adapter_model.safetensors, the format of Hugging Face's peft."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = next(iter(params.values()))[0].shape[1]
    targets = sorted({name.rpartition(".")[2] for name in params})
    save_file({f"base_model.model.{name}.lora_{letter}.weight": tensor[row].detach().cpu().contiguous()
               for name, pair in params.items() for letter, tensor in zip("AB", pair)},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.tmp").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "r": rank, "lora_alpha": alpha,
        "lora_dropout": 0.0, "bias": "none", "target_modules": targets, "inference_mode": True}, indent=2) + "\n")
    os.replace(folder / "adapter_config.tmp", folder / "adapter_config.json")       # once it is there, all is


def load_adapter(folder: Path, model: nn.Module) -> tuple[Params, float]:
    """An adapter in peft's format as a batch of one, and its alpha. ValueError if it does not fit the model."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist: an adapter is a folder in peft's format")
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged adapter_config.json or adapter_model.safetensors ({error})") from error
    if not isinstance(config, dict) or "lora_alpha" not in config or not tensors:
        raise ValueError(f"{folder}: the adapter has no {'lora_alpha' if tensors else 'tensors'}")
    for key, known in (("peft_type", "LORA"), ("bias", "none"), ("use_dora", False), ("use_rslora", False),
                       ("rank_pattern", {}), ("alpha_pattern", {})):
        if config.get(key, known) not in (known, None):
            raise ValueError(f"{folder}: {key} is {config[key]!r}, and only {known!r} is implemented")
    layers, params = dict(model.named_modules()), {}
    found = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    for name in [*(found - layers.keys()), *(name for name in layers if name in found)]:      # in the order of `new_params`
        pair = [tensors.get(f"base_model.model.{name}.lora_{letter}.weight") for letter in "AB"]
        layer = layers.get(name)
        if None in pair or not isinstance(layer, nn.Linear) or \
                [tuple(t.shape) for t in pair] != [(config.get("r"), layer.in_features), (layer.out_features, config.get("r"))]:
            raise ValueError(f"{folder}: the adapter's {name or 'tensors'} does not fit this model")
        params[name] = tuple(t[None].float().to(layer.weight.device) for t in pair)
    return params, config["lora_alpha"]
