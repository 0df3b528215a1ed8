#!/usr/bin/env bash
# An evaluation harness asks for greedy text of at most 12 tokens. Whose settings hold, the task's or
# those in the checkpoint's folder?
#
# Guess, written before the run: the harness turns sampling off, and the folder's repetition penalty
#   still applies; the task's length holds.
# So it is: the penalty applies, and so does all else that the task does not name: num_beams makes the
#   "greedy" text a beam search, no_repeat_ngram_size cuts what repeats, and the folder's
#   max_new_tokens goes before the task's max_gen_toks. Log-likelihoods do not change.
# Why it matters: the same weights score differently with another generation_config.json, and nothing
#   in a task's settings says so. A penalty weighs on a tool call, which repeats names and values of its
#   prompt. Who compares a harness's numbers with those of a decoding loop of their own compares two
#   decoders.
# Versions: lm_eval 0.4.13, transformers 5.24.0, torch 2.14.1. Date: 2026-12-01.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "lm_eval[hf]==0.4.13" transformers==5.24.0 torch==2.14.1
cat > "$folder/ask.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast,
                          set_seed)

FOLDER = sys.argv[1]
words = {word: i for i, word in enumerate(["<unk>", "<eos>", *[f"w{i}" for i in range(62)]])}
tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>",
                        pad_token="<eos>").save_pretrained(FOLDER)
set_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, eos_token_id=1, pad_token_id=1, bos_token_id=None))
for weight in model.parameters():
    if weight.dim() > 1:
        torch.nn.init.normal_(weight, std=0.3)


def of_the_harness(settings: dict) -> tuple[list[str], float]:
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=1, **settings)
    model.save_pretrained(FOLDER)
    harness = HFLM(pretrained=FOLDER, device="cpu", dtype="float32", batch_size=1)
    task = {"until": [], "max_gen_toks": 12, "do_sample": False}
    asked = [Instance("generate_until", {}, (f"w1 w2 w3 w{i}", task), 0) for i in range(3)]
    weighed = [Instance("loglikelihood", {}, ("w1 w2 w3", " w4 w5"), 0)]
    return harness.generate_until(asked), harness.loglikelihood(weighed)[0][0]


for name in ("lm_eval", "transformers", "torch"):
    print(name, version(name))
plain, likelihood = of_the_harness({})
print(f"{'no settings':30}{len(plain[0].split()):3} tokens  {plain[0]}")
for settings, length in (({"repetition_penalty": 1.5}, 12), ({"no_repeat_ngram_size": 2}, 12),
                         ({"num_beams": 4}, 12), ({"max_new_tokens": 5}, 5)):
    texts, other = of_the_harness(settings)
    print(f"{str(settings):30}{len(texts[0].split()):3} tokens  {texts[0]}")
    assert texts != plain and [len(text.split()) for text in texts] == 3 * [length], settings
    assert other == likelihood
print("as described")
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/ask.py" "$folder/model" 2> "$folder/noise" ||
    { cat "$folder/noise" >&2; exit 1; }
