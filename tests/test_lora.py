"""lora.py against Hugging Face's peft (where it is installed), a batch of adapters against each
alone, and the reset."""
import json
from contextlib import suppress
from copy import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn

from conftest import FAMILIES, logits, transformers_model, write_checkpoint
from lora import (TARGETS, LoRALinear, adapters, load_adapter, new_params, reset,
                  save_adapter)
from model import generate, load_model, seeded

RANK, ALPHA, ROWS = 4, 8, 3


def trained(model, rows: int = 1):
    """Adapters as after some training: B is not zero any more, and every row has its own."""
    params = new_params(model, RANK, [seeded(row) for row in range(rows)])
    for _, B in params.values():
        B.data = 0.1 * torch.randn(B.shape, generator=seeded("B"))
    return params


def tokens(rows: int = 1) -> torch.Tensor:
    return torch.randint(512, (rows, 15), generator=seeded("tokens"))


def row_losses(model, ids: torch.Tensor) -> torch.Tensor:
    """The mean of -log P of each row's tokens, (rows,)."""
    of_each = logits(model, ids[:, :-1]).transpose(1, 2)
    return F.cross_entropy(of_each, ids[:, 1:], reduction="none").mean(1)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < 1e-5)


@pytest.mark.parametrize("family", ["Qwen2.5", *FAMILIES])
def test_outputs_gradients_and_an_adamw_step_equal_pefts_which_reads_and_writes_our_files(
        family, tmp_path):
    peft = pytest.importorskip("peft")
    checkpoint = write_checkpoint(tmp_path / "base", **FAMILIES.get(family, {}))
    model = load_model(checkpoint)
    params, ids = trained(model, ROWS), tokens()
    ours, pefts = tmp_path / "new" / "ours", tmp_path / "pefts"
    save_adapter(ours, params, ALPHA, checkpoint, row=1)
    base = transformers_model(checkpoint)
    theirs = peft.PeftModel.from_pretrained(base, ours, is_trainable=True)
    theirs.save_pretrained(pefts)
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(ours, dtype=torch.float32)
    assert near(alone(ids).logits, theirs(ids).logits)          # which finds the base by itself
    for folder in (ours, pefts):
        loaded, alpha = load_adapter(folder, model)
        assert alpha == ALPHA and loaded.keys() == params.keys()
        for name, pair in params.items():
            assert all(torch.equal(t[1:2], other) for t, other in zip(pair, loaded[name]))
    weights = [p for p in theirs.parameters() if p.requires_grad]
    F.cross_entropy(theirs(ids[:, :-1]).logits[0], ids[0, 1:]).backward()
    with adapters(model, loaded, alpha) as tensors:
        before = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.requires_grad_()
        assert near(logits(model, ids), theirs(ids).logits)
        row_losses(model, ids).sum().backward()
    for both in (tensors, weights):
        torch.optim.AdamW(both, lr=1e-3, weight_decay=0.1).step()
    for tensor, weight, old in zip(tensors, weights, before, strict=True):
        assert near(tensor.grad[0], weight.grad)
        clear = weight.grad.abs() > 1e-4        # AdamW divides by it: what is rounding grows
        assert near(tensor[0][clear], weight[clear]) and (tensor - old).abs().max() > 5e-4


def test_adapters_in_a_batch_learn_as_each_does_alone(model):
    def fit(params, ids):
        with adapters(model, params, ALPHA) as tensors:
            optimizer = torch.optim.SGD(tensors, lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                row_losses(model, ids).sum().backward()
                optimizer.step()
            return [model(ids).detach(), *tensors]
    params, ids = trained(model, ROWS), tokens(ROWS)
    alone = [{name: tuple(t[row:row + 1].detach().clone().requires_grad_() for t in pair)
              for name, pair in params.items()} for row in range(ROWS)]
    together = fit(params, ids)
    for row, own in enumerate(alone):
        one = fit(own, ids[row:row + 1])
        assert all(near(t[row:row + 1], t_alone) for t, t_alone in zip(together, one, strict=True))


def test_one_adapter_serves_every_row_of_a_batch(model):
    with adapters(model, trained(model), ALPHA):
        assert near(model(tokens(ROWS)), torch.cat([model(row[None]) for row in tokens(ROWS)]))


def test_a_row_that_is_left_in_a_batch_keeps_its_own_adapter(model, tokenizer):
    """Greedy decoding drops rows that have ended; alone, with its adapter alone, a row writes the
    same. Afterwards the whole batch is read again."""
    params, ids, tokenizer = trained(model, ROWS), tokens(ROWS), copy(tokenizer)
    tokenizer.eos, free, alone = frozenset(), [], []
    for text in (free, alone):
        for row, prompt in enumerate(ids.tolist()):
            own = {name: tuple(t[row:row + 1] for t in pair) for name, pair in params.items()}
            with adapters(model, own, ALPHA):
                text.append(generate(model, tokenizer, [prompt], 16)[0].ids)
        tokenizer.eos = frozenset([free[0][3], free[2][4]])         # for the second round
    assert len({*map(len, alone)}) == ROWS              # else no row would be left alone
    with adapters(model, params, ALPHA):
        before = logits(model, ids)
        model.read_only([1])                    # as an exception amid another text leaves it
        written = generate(model, tokenizer, ids.tolist(), 16)
        assert [row.ids for row in written] == alone
        assert torch.equal(logits(model, ids), before)


def test_what_an_interrupt_amid_the_reset_has_left_is_put_back(model, monkeypatch):
    before, plain, last = dict(model.named_modules()), nn.Module.__setattr__, []

    def interrupted(self, name, value):
        plain(self, name, value)
        if isinstance(value, nn.Linear):
            last.append(name)
            if len(last) == 5:
                raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        with adapters(model, new_params(model, 2, [seeded(0)]), 4):
            monkeypatch.setattr(nn.Module, "__setattr__", interrupted)
    monkeypatch.undo()
    assert any(isinstance(layer, LoRALinear) for layer in model.modules())
    reset(model)
    assert dict(model.named_modules()) == before


@torch.no_grad()
def test_a_few_tokens_are_adapted_in_float32_and_many_in_the_type_of_the_model():
    """Both within the rounding of bfloat16, the few the nearer."""
    def draw(*shape): return torch.randn(shape, generator=seeded("few", *shape))
    base, A, B = nn.Linear(64, 96, dtype=torch.bfloat16), draw(2, RANK, 64), draw(2, 96, RANK)
    layer, x, errors = LoRALinear(base, A, B, 0.5), draw(2, 40, 64).bfloat16(), []
    for new in (RANK, 40):
        y = layer(x[:, :new])
        exact = base(x[:, :new]).double() + 0.5 * (x[:, :new].double() @ A.mT.double()
                                                   @ B.mT.double())
        errors.append(((y - exact).abs() / (1 + exact.abs())).max())
        assert y.dtype == torch.bfloat16
    assert errors[0] < 2 ** -8 < errors[1] < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("failing", [False, True], ids=["fitting succeeds", "fitting raises"])
def test_reset_restores_the_very_layers_and_every_bit_of_them(dtype, failing, checkpoint):
    """While the adapters, which stay in float32, did learn."""
    model = load_model(checkpoint, dtype=dtype)
    layers, params = list(model.named_modules()), new_params(model, RANK, [seeded(0)])
    before = [p.clone() for p in model.parameters()]
    with suppress(FloatingPointError), adapters(model, params, ALPHA) as tensors:
        first, optimizer = row_losses(model, tokens()), torch.optim.AdamW(tensors, lr=1e-3)
        for _ in range(5):
            row_losses(model, tokens()).sum().backward()
            optimizer.step()
        learnt = row_losses(model, tokens()) < first and model(tokens()).dtype == dtype
        if failing:
            raise FloatingPointError
    assert learnt and {(t.dtype, t.grad.dtype) for t in tensors} == {(torch.float32,) * 2}
    assert all(name == other and layer is now for (name, layer), (other, now)
               in zip(layers, model.named_modules(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_adapter_inside_an_adapter_is_refused_and_the_outer_one_stays(model):
    params, plain = trained(model), model(tokens())
    with adapters(model, params, ALPHA):
        adapted = model(tokens())
        with pytest.raises(RuntimeError, match="adapters already"), adapters(model, params, ALPHA):
            pass
        assert torch.equal(model(tokens()), adapted) and not near(adapted, plain)


def test_a_fresh_adapter_changes_nothing_but_learns_at_once(model):
    params, plain = new_params(model, RANK, [seeded(0)]), model(tokens())
    with adapters(model, params, ALPHA):
        assert torch.equal(model(tokens()), plain)                      # B = 0, so y = W x
        row_losses(model, tokens()).sum().backward()
    assert all(not A.grad.any() and B.grad.any() for A, B in params.values())
    assert len(params) == 2 * len(TARGETS)                              # of two blocks


def test_A_is_uniform_within_one_over_the_root_of_its_inputs_by_its_rows_generator_alone():
    layers = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(400, 9),
                                  "down_proj": torch.nn.Linear(25, 900)})
    both, alone = (new_params(layers, 64, [*map(seeded, keys)]) for keys in ((0, 1), (1,)))
    for name, bound in (("up_proj", 1 / 20), ("down_proj", 1 / 5)):
        A = both[name][0].detach()
        shares = torch.histc(A, bins=10, min=-bound, max=bound) / A.numel()
        assert (shares - 0.1).abs().max() < 0.02 and A.abs().max() <= bound
        assert torch.equal(A[1:], alone[name][0]) and not torch.equal(A[0], A[1])


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN = {      # a file, its bytes -> the broken ones, a word of the message
    "another width": (WEIGHTS, lambda b: save(load(b) | {Q: torch.ones(RANK, 31)}), "q_proj"),
    "half a pair": (WEIGHTS, lambda b: save({Q: load(b)[Q]}), "q_proj"),
    "a layer less": (WEIGHTS, lambda b: save(
        {name: t for name, t in load(b).items() if "layers.1.mlp.up_proj" not in name}),
        "lacks model.layers.1.mlp.up_proj"),
    "an unknown layer": (WEIGHTS, lambda b: save(load(b) | {"c_attn": torch.ones(1)}), "c_attn"),
    "half a file": (WEIGHTS, lambda b: b[:len(b) // 2], "peft"),
    "no alpha": (CONFIG, lambda b: b.replace(b"lora_alpha", b"alpha"), "lora_alpha"),
    "DoRA": (CONFIG, lambda b: b.replace(b"{", b'{"use_dora": true,'), "plain LoRA"),
    "trained biases": (CONFIG, lambda b: b.replace(b'"none"', b'"all"'), "plain LoRA"),
    "PiSSA": (CONFIG, lambda b: b.replace(b"{", b'{"init_lora_weights": "pissa_niter_4",'),
              "plain LoRA.*init_lora_weights = pissa_niter_4"),
    "OLoRA": (CONFIG, lambda b: b.replace(b"{", b'{"init_lora_weights": "olora",'), "olora"),
    "aLoRA": (CONFIG, lambda b: b.replace(b"{", b'{"alora_invocation_tokens": [1, 2],'), "alora"),
    "IA3": (CONFIG, lambda b: b.replace(b'"LORA"', b'"IA3"'), "plain LoRA.*IA3"),
    "a whole layer beside": (CONFIG, lambda b: b.replace(b"{", b'{"modules_to_save": ["lm_head"],'),
                             "modules_to_save"),
}


@pytest.mark.parametrize("file, damage, word", BROKEN.values(), ids=BROKEN)
def test_an_adapter_that_is_damaged_or_does_not_fit_is_refused(file, damage, word, model, tmp_path):
    save_adapter(tmp_path, trained(model), ALPHA, "org/base")
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    with pytest.raises(ValueError, match=word):
        load_adapter(tmp_path, model)


def test_an_adapter_on_some_layers_alone_or_drawn_otherwise_is_plain_lora(model, tmp_path):
    params = {name: pair for name, pair in trained(model).items() if "layers.1" in name}
    save_adapter(tmp_path, params, ALPHA, "org/base")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "org/base"
    config |= {"layers_to_transform": [1], "init_lora_weights": "gaussian", "use_dora": False}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert load_adapter(tmp_path, model)[0].keys() == params.keys()
