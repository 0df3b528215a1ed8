"""What the tests share: small checkpoints in the hub's layout; their weights are a sine."""
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))       # the project is flat files, no package
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

import model as model_py
from data.chat import Tokenizer

torch.set_num_threads(1)                    # on matrices this small, more only get in the way

CONFIG = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu",
          "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
          "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True}
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")       # how Qwen2.5's tokenizer cuts a text
TEXT = """system\nYou are a helpful assistant. user\nWhat is the weather in Zürich? assistant\n
<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}\n</tool_call>
{"name": "get_user_by_id", "description": "Look up a user.", "parameters": {}} {"name": "-x"}"""


# what a family's config.json says beside, or in place of, CONFIG; the sizes are as odd as real ones
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}          # of dimensions one is in between
FAMILIES = {
    "Qwen3": {"model_type": "qwen3", "head_dim": 16, "attention_bias": False},
    "Qwen3, untied": {"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": False,
                      "num_key_value_heads": 1},
    "Llama 3.2": {"model_type": "llama", "head_dim": 16, "rope_theta": 1e4,
                  "rope_scaling": {"rope_type": "llama3", **SCALING}},
    "Llama 3.1, as newer files have it": {
        "model_type": "llama", "hidden_size": 64, "rope_theta": None, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **SCALING}},
    "a Llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True,
                            "hidden_size": 48, "num_hidden_layers": 3},
    "SmolLM2": {"model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 1,
                "hidden_size": 48, "num_hidden_layers": 3, "rope_theta": 1e5}}
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
          "<|eot_id|>")


def train_tokenizer(special: Sequence[str] = CHATML) -> tokenizers.Tokenizer:
    """A byte-level BPE like Qwen2.5's, of a few sentences, then a chat format's tokens."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer, bpe.decoder = normalizers.NFC(), decoders.ByteLevel()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=450, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens(list(special))
    bpe.add_tokens([AddedToken(text, normalized=False) for text in (
        "<tool_call>", "</tool_call>", "<think>", "</think>")])
    return bpe


def write_checkpoint(folder: Path, special: Sequence[str] = CHATML, **changes) -> Path:
    """A checkpoint as the hub lays it out; `changes` go into config.json (None: without a key).
    A weight is sin(f i^2), i its index: as good as random, and the same on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    bpe = train_tokenizer(special)
    bpe.save(str(folder / "tokenizer.json"))
    eos = [bpe.token_to_id(special[-1]), bpe.token_to_id("<|endoftext|>" if special == CHATML
                                                         else "<|end_of_text|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    network, tensors = model_py.Qwen2(model_py.ModelConfig.from_folder(folder)), {}
    for n, (name, p) in enumerate(sorted(network.named_parameters())):
        i = torch.arange(p.numel(), dtype=torch.float64)
        wave = (i * i * (0.37 + 0.013 * n) + n).sin().view(p.shape)
        if p.dim() == 1:
            wave = 0.3 * wave + (1 if "norm" in name else 0)
        else:       # variance 1 / in; the embedding is small, lest a token repeat itself
            wave = wave * (0.2 if "embed" in name else (2 / p.shape[1]) ** 0.5)
        tensors[name] = wave.float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(model, ids, cache=None) -> torch.Tensor:
    """Logits (rows, new, vocab) in float32 of one pass."""
    return model.lm_head(model(ids, cache)).float()


def transformers_model(folder: Path):
    """The reference; what a checkpoint lacks it would make up, so nothing may be missing."""
    model, info = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def model(checkpoint) -> model_py.Qwen2:
    return model_py.load_model(checkpoint)


@pytest.fixture(scope="session")
def tokenizer(checkpoint) -> Tokenizer:
    return Tokenizer(checkpoint)
