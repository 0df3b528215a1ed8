"""lora.py against Hugging Face's peft (where it is installed), one adapter against a batch of them, and the reset."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from lora import TARGETS, adapters, load_adapter, merge, new_params, save_adapter, targeted
from model import load_model

RANK, ALPHA, ROWS = 4, 8, 3


def trained(model, rows: int = 1, targets=TARGETS, rank: int = RANK):
    """Adapters as after some training: B is not zero any more, and every row has its own."""
    params = new_params(model, rank, [torch.Generator().manual_seed(row) for row in range(rows)], targets)
    for _, B in params.values():
        for row in range(rows):
            B.data[row] = 0.1 * torch.randn(B.shape[1:], generator=torch.Generator().manual_seed(row))
    return params


def one_row(params, row: int):
    return {name: tuple(t[row:row + 1].detach().clone().requires_grad_() for t in pair) for name, pair in params.items()}


def tokens(rows: int) -> torch.Tensor:
    return torch.randint(512, (rows, 15), generator=torch.Generator().manual_seed(1))


def row_losses(model, ids: torch.Tensor) -> torch.Tensor:
    """The mean negative log-likelihood of each row's tokens, (B,)."""
    logits = model.logits(model(ids[:, :-1]))
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < 1e-5)


def bits(model) -> dict:
    return {name: p.detach().view(torch.uint8).clone() for name, p in model.named_parameters()}


# -------------------------------------------------------------------------------------------------------- against peft

def peft_model(folder, params=None, targets=TARGETS, rank: int = RANK):
    """transformers' model with a peft adapter, which is filled from `params` where they are given."""
    peft = pytest.importorskip("peft")
    base = pytest.importorskip("transformers").Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=list(targets), lora_dropout=0.0)
    theirs = peft.get_peft_model(base, config)
    for name, pair in (params or {}).items():
        for weight, tensor in zip(peft_weights(theirs, name), pair):
            weight.data.copy_(tensor[0])
    return theirs


def peft_weights(theirs, name: str):
    layer = theirs.base_model.model.get_submodule(name)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@pytest.mark.parametrize("targets, rank", [(TARGETS, 4), (("q_proj", "down_proj"), 8)], ids=["all targets", "two targets"])
def test_outputs_gradients_and_one_adamw_step_equal_pefts(model, checkpoint, targets, rank):
    params, ids = trained(model, 1, targets, rank), tokens(1)
    theirs = peft_model(checkpoint, params, targets, rank)
    peft_loss = F.cross_entropy(theirs(ids[:, :-1]).logits[0], ids[0, 1:])
    peft_loss.backward()
    with adapters(model, params, ALPHA) as ours:
        assert near(model.logits(model(ids)), theirs(ids).logits)
        row_losses(model, ids).sum().backward()
    for name, pair in params.items():
        for tensor, weight in zip(pair, peft_weights(theirs, name)):
            assert near(tensor.grad[0], weight.grad) and tensor.grad.abs().max() > 0
    # AdamW divides by the gradient's own size, so its first step is compared where the gradient is more than rounding.
    before = [tensor.detach().clone() for tensor in ours]
    for tensors in (ours, [p for p in theirs.parameters() if p.requires_grad]):
        torch.optim.AdamW(tensors, lr=1e-3, weight_decay=0.1).step()
    for old, tensor, weight in zip(before, ours, [w for name in params for w in peft_weights(theirs, name)]):
        clear = tensor.grad[0].abs() > 1e-4
        assert ((tensor[0] - weight)[clear]).abs().max() < 1e-5 and (tensor - old).abs().max() > 5e-4


def test_a_saved_adapter_gives_the_same_logits_in_peft(model, checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    params, ids = trained(model, ROWS), tokens(1)
    plain = model(ids)
    save_adapter(tmp_path / "adapter", params, ALPHA, row=1, base_model=str(checkpoint))
    base = pytest.importorskip("transformers").Qwen2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with adapters(model, one_row(params, 1), ALPHA), torch.no_grad():
        assert near(model.logits(model(ids)), theirs(ids).logits) and not near(model(ids), plain)


def test_an_adapter_saved_by_peft_gives_the_same_logits_here(model, checkpoint, tmp_path):
    params, ids = trained(model, 1, ("v_proj", "up_proj")), tokens(1)
    theirs = peft_model(checkpoint, params, ("v_proj", "up_proj"))
    theirs.save_pretrained(tmp_path / "adapter")
    loaded, alpha = load_adapter(tmp_path / "adapter", model)
    assert alpha == ALPHA and loaded.keys() == params.keys()
    with adapters(model, loaded, alpha), torch.no_grad():
        assert near(model.logits(model(ids)), theirs(ids).logits)


# ----------------------------------------------------------------------------------------------- a batch of adapters

@pytest.mark.parametrize("steps", [1, 3])
def test_several_adapters_in_a_batch_learn_as_each_does_alone(model, steps):
    params, ids = trained(model, ROWS), tokens(ROWS)
    alone = [one_row(params, row) for row in range(ROWS)]

    def fit(params, ids):
        with adapters(model, params, ALPHA) as tensors:
            optimizer = torch.optim.SGD(tensors, lr=0.1)
            for _ in range(steps):
                optimizer.zero_grad()
                losses = row_losses(model, ids)
                losses.sum().backward()
                optimizer.step()
            return losses.detach(), model(ids).detach()

    losses, hidden = fit(params, ids)
    for row in range(ROWS):
        loss, out = fit(alone[row], ids[row:row + 1])
        assert near(losses[row], loss[0]) and near(hidden[row], out[0])
        for name in params:
            assert all(near(t.grad[row], a.grad[0]) and near(t[row], a[0]) for t, a in zip(params[name], alone[row][name]))
    assert not near(losses[:1], losses[1:2])


def test_one_adapter_serves_every_row_of_a_batch(model):
    params, ids = trained(model), tokens(ROWS)
    with adapters(model, params, ALPHA), torch.no_grad():
        assert near(model(ids), torch.cat([model(row[None]) for row in ids]))


def test_merging_equals_the_adapter_beside_the_layer_and_leaves_the_layer_as_it_was(model):
    params, ids, before = trained(model, ROWS), tokens(1), bits(model)
    with adapters(model, one_row(params, 2), ALPHA), torch.no_grad():
        expected = model(ids)
    layers = targeted(model, TARGETS)
    merged = {f"{name}.weight": merge(layers[name], A[2], B[2], ALPHA) for name, (A, B) in params.items()}
    assert all(torch.equal(a, b) for a, b in zip(before.values(), bits(model).values()))
    model.load_state_dict(merged, strict=False)
    assert near(model(ids).detach(), expected)


# ---------------------------------------------------------------------------------------------------------- the reset

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("failing", [False, True], ids=["fitting succeeds", "fitting raises"])
def test_reset_restores_every_bit_even_if_fitting_raises(checkpoint, dtype, failing):
    model = load_model(checkpoint, dtype=dtype)
    before, modules, params = bits(model), list(model.named_modules()), trained(model, 2)
    addresses = [p.data_ptr() for p in model.parameters()]
    start = params["model.layers.0.mlp.up_proj"][0].detach().clone()
    try:
        with adapters(model, params, ALPHA) as tensors:
            optimizer = torch.optim.AdamW(tensors, lr=0.5)
            for step in range(3):
                row_losses(model, tokens(2)).sum().backward()
                optimizer.step()
                if failing and step == 1:
                    raise FloatingPointError("the loss is not finite")
    except FloatingPointError:
        assert failing
    assert (params["model.layers.0.mlp.up_proj"][0] - start).abs().max() > 0.1                    # it did train
    after = bits(model)
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert addresses == [p.data_ptr() for p in model.parameters()]
    assert all(name == other and a is b for (name, a), (other, b) in zip(modules, model.named_modules(), strict=True))


def test_an_adapter_inside_an_adapter_is_refused_and_the_outer_one_stays(model):
    outer, inner, ids = trained(model), trained(model, 2), tokens(1)
    plain = model(ids)
    with adapters(model, outer, ALPHA), torch.no_grad():
        adapted = model(ids)
        with pytest.raises(RuntimeError, match="inner block"), adapters(model, inner, ALPHA):
            pass
        assert torch.equal(model(ids), adapted)
    assert torch.equal(model(ids), plain) and not near(plain, adapted)


def test_a_bfloat16_base_has_float32_adapters_that_see_small_steps(checkpoint):
    model = load_model(checkpoint, dtype=torch.bfloat16)
    params, ids = new_params(model, RANK, [torch.Generator().manual_seed(0)]), tokens(1)
    with adapters(model, params, ALPHA) as tensors:
        first = row_losses(model, ids)
        optimizer = torch.optim.AdamW(tensors, lr=1e-4)
        for _ in range(30):
            optimizer.zero_grad()
            row_losses(model, ids).sum().backward()
            optimizer.step()
        assert model(ids).dtype == torch.bfloat16 and row_losses(model, ids) < first
    assert {(t.dtype, t.grad.dtype) for t in tensors} == {(torch.float32, torch.float32)}


# ------------------------------------------------------------------------------------------------------------ a start

def test_a_fresh_adapter_changes_nothing_but_learns_at_once(model):
    params, ids = new_params(model, RANK, [torch.Generator().manual_seed(0)]), tokens(1)
    plain = model(ids)
    with adapters(model, params, ALPHA):
        assert torch.equal(model(ids), plain)
        row_losses(model, ids).sum().backward()
    assert all(A.grad.abs().max() == 0 and B.grad.abs().max() > 0 for A, B in params.values())


def test_A_is_uniform_within_one_over_the_root_of_its_inputs():
    layers = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(400, 9), "down_proj": torch.nn.Linear(25, 900)})
    params = new_params(layers, 64, [torch.Generator().manual_seed(seed) for seed in range(2)], ("up_proj", "down_proj"))
    for name, width in (("up_proj", 400), ("down_proj", 25)):
        (A, B), bound = params[name], 1 / math.sqrt(width)
        assert A.shape == (2, 64, width) and B.shape == (2, layers[name].out_features, 64) and not B.any()
        assert 0.99 * bound < A.max() <= bound and -bound <= A.min() < -0.99 * bound
        shares = torch.histc(A.flatten().detach(), bins=10, min=-bound, max=bound) / A.numel()
        assert (shares - 0.1).abs().max() < 0.02 and abs(A.mean()) < 0.05 * bound
        assert A.dtype == B.dtype == torch.float32 and A.requires_grad and B.requires_grad


def test_A_has_the_spread_of_pefts(model, checkpoint):
    theirs, ours = peft_model(checkpoint), new_params(model, RANK, [torch.Generator().manual_seed(0)])
    for name, (A, B) in ours.items():
        lora_A, lora_B = peft_weights(theirs, name)
        assert A.shape[1:] == lora_A.shape and B.shape[1:] == lora_B.shape and not lora_B.any()
        assert 0.8 < A.std() / lora_A.std() < 1.25 and 0.9 < A.abs().max() / lora_A.abs().max() < 1.1
    assert len(ours) == sum("lora_A" in name for name, _ in theirs.named_parameters())


def test_a_rows_start_depends_on_its_generator_alone(model):
    def start(*seeds):
        return new_params(model, RANK, [torch.Generator().manual_seed(seed) for seed in seeds])
    first, both = start(5), start(9, 5)
    for name, (A, _) in both.items():
        assert torch.equal(A[1:], first[name][0]) and not torch.equal(A[0], A[1])


def test_targets_are_the_layers_of_these_names_and_no_others(model):
    names = targeted(model, ("q_proj", "down_proj"))
    assert sorted(names) == [f"model.layers.{i}.{part}" for i in range(2) for part in ("mlp.down_proj", "self_attn.q_proj")]
    assert len(targeted(model, TARGETS)) == 14
    for wrong in (("q_proj", "Q_proj"), ("c_attn",), ("proj",), ("norm",)):
        with pytest.raises(ValueError, match=f"--targets: .*{wrong[-1]}"):
            new_params(model, RANK, [torch.Generator()], wrong)
    with pytest.raises(ValueError, match="--targets"):
        targeted(model, ())


# -------------------------------------------------------------------------------------------------------------- files

def test_a_saved_adapter_is_read_back_bit_for_bit(model, tmp_path):
    params = trained(model, ROWS)
    folder = tmp_path / "new" / "adapter"
    save_adapter(folder, params, ALPHA, row=2, base_model="org/name")
    loaded, alpha = load_adapter(folder, model)
    assert alpha == ALPHA and loaded.keys() == params.keys()
    assert all(torch.equal(t[2:], other) for name in params for t, other in zip(params[name], loaded[name]))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/name"


LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
MISFITS = {
    "another width": (lambda c, t: t.update({LAYER + "A.weight": torch.ones(RANK, 31)}), "q_proj"),
    "two ranks": (lambda c, t: t.update({LAYER + "A.weight": torch.ones(RANK + 1, 32)}), "q_proj"),
    "a vector": (lambda c, t: t.update({LAYER + "A.weight": torch.ones(32)}), "q_proj"),
    "half a pair": (lambda c, t: t.pop(LAYER + "B.weight"), "q_proj"),
    "an unknown layer": (lambda c, t: t.update({LAYER.replace("q_proj", "c_attn") + "A.weight": torch.ones(1)}), "c_attn"),
    "a norm": (lambda c, t: t.update({LAYER.replace("layers.0.self_attn.q_proj", "norm") + f"{x}.weight": torch.ones(4, 4)
                                      for x in "AB"}), "norm"),
    "a whole layer": (lambda c, t: t.update({"base_model.model.lm_head.weight": torch.ones(4, 4)}), "tensors"),
    "DoRA": (lambda c, t: c.update(use_dora=True), "use_dora"),
    "rank-stabilised": (lambda c, t: c.update(use_rslora=True), "use_rslora"),
    "another method": (lambda c, t: c.update(peft_type="IA3"), "peft_type"),
    "trained biases": (lambda c, t: c.update(bias="all"), "bias"),
    "ranks by layer": (lambda c, t: c.update(rank_pattern={"q_proj": 2}), "rank_pattern"),
    "no alpha": (lambda c, t: c.pop("lora_alpha"), "lora_alpha"),
    "no tensors": (lambda c, t: t.clear(), "tensors"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused_by_name(misfit, model, tmp_path):
    change, word = MISFITS[misfit]
    save_adapter(tmp_path, trained(model), ALPHA)
    config_file, tensor_file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, state = json.loads(config_file.read_text()), load_file(tensor_file)
    change(config, state)
    config_file.write_text(json.dumps(config))
    save_file(state, tensor_file)
    with pytest.raises(ValueError, match=word):
        load_adapter(tmp_path, model)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_or_damaged_adapter_file_is_named(file, model, tmp_path):
    save_adapter(tmp_path, trained(model), ALPHA)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:50])
    with pytest.raises(ValueError, match=file):
        load_adapter(tmp_path, model)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        load_adapter(tmp_path, model)
