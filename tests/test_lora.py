"""lora.py against Hugging Face's peft (where it is installed), a batch of adapters against each
alone, and the reset."""
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

from conftest import transformers_model
from lora import TARGETS, adapters, load_adapter, merge, new_params, save_adapter
from model import load_model, seeded

RANK, ALPHA, ROWS = 4, 8, 3


def trained(model, rows: int = 1):
    """Adapters as after some training: B is not zero any more, and every row has its own."""
    params = new_params(model, RANK, [seeded(row) for row in range(rows)])
    for _, B in params.values():
        B.data = 0.1 * torch.randn(B.shape, generator=seeded("B")).requires_grad_()
    return params


def one_row(params, row: int):
    return {name: tuple(t[row:row + 1].detach().clone().requires_grad_() for t in pair)
            for name, pair in params.items()}


def tokens(rows: int) -> torch.Tensor:
    return torch.randint(512, (rows, 15), generator=seeded("tokens"))


def row_losses(model, ids: torch.Tensor) -> torch.Tensor:
    """The mean of -log P of each row's tokens, (B,)."""
    logits = model.logits(model(ids[:, :-1]))
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < 1e-5)


def peft_model(folder, params):
    """transformers' model with a peft adapter that is filled from `params`."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    theirs = peft.get_peft_model(transformers_model(folder), config)
    for weight, tensor in zip(peft_weights(theirs, params), sum(params.values(), ()), strict=True):
        weight.data.copy_(tensor[0])
    return theirs


def peft_weights(theirs, names) -> list[torch.nn.Parameter]:
    layers = [theirs.base_model.model.get_submodule(name) for name in names]
    return [lora["default"].weight for layer in layers for lora in (layer.lora_A, layer.lora_B)]


def test_outputs_gradients_and_an_adamw_step_equal_pefts(model, checkpoint):
    params, ids = trained(model), tokens(1)
    theirs = peft_model(checkpoint, params)
    weights = peft_weights(theirs, params)
    F.cross_entropy(theirs(ids[:, :-1]).logits[0], ids[0, 1:]).backward()
    with adapters(model, params, ALPHA) as ours:
        assert near(model.logits(model(ids)), theirs(ids).logits)
        row_losses(model, ids).sum().backward()
    before = [tensor.detach().clone() for tensor in ours]
    for tensors in (ours, weights):
        torch.optim.AdamW(tensors, lr=1e-3, weight_decay=0.1).step()
    for tensor, weight, old in zip(ours, weights, before, strict=True):
        assert near(tensor.grad[0], weight.grad)
        clear = weight.grad.abs() > 1e-4        # AdamW divides by it: what is rounding grows
        assert near(tensor[0][clear], weight[clear]) and (tensor - old).abs().max() > 5e-4


def test_a_saved_adapter_gives_the_same_logits_in_peft(model, checkpoint, tmp_path):
    peft, params, ids = pytest.importorskip("peft"), trained(model, ROWS), tokens(1)
    save_adapter(tmp_path, params, ALPHA, row=1)
    theirs = peft.PeftModel.from_pretrained(transformers_model(checkpoint), tmp_path)
    with adapters(model, one_row(params, 1), ALPHA):
        assert near(model.logits(model(ids)), theirs(ids).logits)


def test_an_adapter_saved_by_peft_gives_the_same_logits_here(model, checkpoint, tmp_path):
    params, ids = trained(model), tokens(1)
    theirs = peft_model(checkpoint, params)
    theirs.save_pretrained(tmp_path)
    loaded, alpha = load_adapter(tmp_path, model)
    with adapters(model, loaded, alpha):
        assert near(model.logits(model(ids)), theirs(ids).logits)


def fit(model, params, ids: torch.Tensor, steps: int = 3):
    """Losses and hidden states after some steps of plain gradient descent."""
    with adapters(model, params, ALPHA) as tensors:
        optimizer = torch.optim.SGD(tensors, lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            row_losses(model, ids).sum().backward()
            optimizer.step()
        return row_losses(model, ids).detach(), model(ids).detach()


def test_adapters_in_a_batch_learn_as_each_does_alone(model):
    params, ids = trained(model, ROWS), tokens(ROWS)
    alone = [one_row(params, row) for row in range(ROWS)]
    losses, hidden = fit(model, params, ids)
    for row in range(ROWS):
        loss, out = fit(model, alone[row], ids[row:row + 1])
        assert near(losses[row], loss[0]) and near(hidden[row], out[0])
        for name, pair in params.items():
            assert all(near(t[row], own[0]) for t, own in zip(pair, alone[row][name]))
    assert not near(losses[:1], losses[1:2])


def test_one_adapter_serves_every_row_of_a_batch(model):
    with adapters(model, trained(model), ALPHA):
        ids = tokens(ROWS)
        assert near(model(ids), torch.cat([model(row[None]) for row in ids]))


def test_a_merged_layer_equals_the_adapted_one_and_the_layer_stays_as_it_was(model):
    params, ids, plain = trained(model, ROWS), tokens(1), model(tokens(1))
    with adapters(model, one_row(params, 2), ALPHA):
        expected = model(ids).detach()
    merged = {f"{name}.weight": merge(model.get_submodule(name), A[2], B[2], ALPHA).detach()
              for name, (A, B) in params.items()}
    assert torch.equal(model(ids), plain) and not near(plain, expected)
    model.load_state_dict(merged, strict=False)
    assert near(model(ids), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("failing", [False, True], ids=["fitting succeeds", "fitting raises"])
def test_reset_restores_the_very_layers_and_every_bit_of_them(dtype, failing, checkpoint):
    """While the adapters, which stay in float32, did learn."""
    model = load_model(checkpoint, dtype=dtype)
    layers, params = list(model.named_modules()), new_params(model, RANK, [seeded(0)])
    before = [p.clone() for p in model.parameters()]
    try:
        with adapters(model, params, ALPHA) as tensors:
            first, optimizer = row_losses(model, tokens(1)), torch.optim.AdamW(tensors, lr=1e-3)
            for _ in range(5):
                row_losses(model, tokens(1)).sum().backward()
                optimizer.step()
            assert row_losses(model, tokens(1)) < first and model(tokens(1)).dtype == dtype
            if failing:
                raise FloatingPointError
    except FloatingPointError:
        assert failing
    assert all(name == other and layer is now for (name, layer), (other, now)
               in zip(layers, model.named_modules(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert {(t.dtype, t.grad.dtype) for t in tensors} == {(torch.float32, torch.float32)}


def test_an_adapter_inside_an_adapter_is_refused_and_the_outer_one_stays(model):
    outer, ids, plain = trained(model), tokens(1), model(tokens(1))
    with adapters(model, outer, ALPHA):
        adapted = model(ids)
        with pytest.raises(RuntimeError, match="adapters already"), adapters(model, outer, ALPHA):
            pass
        assert torch.equal(model(ids), adapted)
    assert torch.equal(model(ids), plain) and not near(plain, adapted)


def test_a_fresh_adapter_changes_nothing_but_learns_at_once(model):
    params, ids, plain = new_params(model, RANK, [seeded(0)]), tokens(1), model(tokens(1))
    with adapters(model, params, ALPHA):
        assert torch.equal(model(ids), plain)                           # B = 0, so y = W x
        row_losses(model, ids).sum().backward()
    assert all(not A.grad.any() and B.grad.any() for A, B in params.values())
    assert len(params) == 2 * len(TARGETS)                              # of two blocks


def test_A_is_uniform_within_one_over_the_root_of_its_inputs():
    layers = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(400, 9),
                                  "down_proj": torch.nn.Linear(25, 900)})
    for name, (A, B) in new_params(layers, 64, [seeded(0), seeded(1)]).items():
        width, bound = layers[name].in_features, 1 / math.sqrt(layers[name].in_features)
        assert A.shape == (2, 64, width) and B.shape == (2, layers[name].out_features, 64)
        assert 0.99 * bound < A.max() <= bound and -bound <= A.min() < -0.99 * bound
        shares = torch.histc(A.flatten().detach(), bins=10, min=-bound, max=bound) / A.numel()
        assert (shares - 0.1).abs().max() < 0.02 and not B.any()


def test_a_rows_start_depends_on_its_generator_alone(model):
    alone = new_params(model, RANK, [seeded(5)])
    for name, (A, _) in new_params(model, RANK, [seeded(9), seeded(5)]).items():
        assert torch.equal(A[1:], alone[name][0]) and not torch.equal(A[0], A[1])


def test_a_saved_adapter_is_read_back_bit_for_bit(model, tmp_path):
    params = trained(model, ROWS)
    save_adapter(tmp_path / "new" / "adapter", params, ALPHA, row=2)
    loaded, alpha = load_adapter(tmp_path / "new" / "adapter", model)
    assert alpha == ALPHA and loaded.keys() == params.keys()
    for name, pair in params.items():
        assert all(torch.equal(t[2:], other) for t, other in zip(pair, loaded[name], strict=True))


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB")
BROKEN = {      # a file, its bytes -> the broken ones, a word of the message
    "another width": (WEIGHTS, lambda b: save(load(b) | {A: torch.ones(RANK, 31)}), "q_proj"),
    "another rank": (WEIGHTS, lambda b: save(load(b) | {A: torch.ones(RANK + 1, 32)}), "q_proj"),
    "half a pair": (WEIGHTS, lambda b: save({A: load(b)[A]}), "q_proj"),
    "an unknown layer": (WEIGHTS, lambda b: save(load(b) | {"c_attn": torch.ones(1)}), "c_attn"),
    "no tensors": (WEIGHTS, lambda b: save({}), "nothing"),
    "half a file": (WEIGHTS, lambda b: b[:len(b) // 2], "peft"),
    "half a config": (CONFIG, lambda b: b[:50], "peft"),
    "no alpha": (CONFIG, lambda b: b.replace(b"lora_alpha", b"alpha"), "lora_alpha"),
    "DoRA": (CONFIG, lambda b: b.replace(b"{", b'{"use_dora": true,'), "plain LoRA"),
    "trained biases": (CONFIG, lambda b: b.replace(b'"none"', b'"all"'), "plain LoRA"),
}


@pytest.mark.parametrize("file, damage, word", BROKEN.values(), ids=BROKEN)
def test_an_adapter_that_is_damaged_or_does_not_fit_is_refused(file, damage, word, model, tmp_path):
    save_adapter(tmp_path, trained(model), ALPHA)
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    with pytest.raises(ValueError, match=word):
        load_adapter(tmp_path, model)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=file):
        load_adapter(tmp_path, model)
