#!/usr/bin/env bash
# A tokenizer is saved beside a fine-tuned checkpoint. Does it matter which texts it has seen before?
#
# Guess, written before the run: no. Truncation and padding are arguments of a call, not the file's.
# So it is: the last call's are written into tokenizer.json. After one call with truncation=True and
#   max_length=2, save_pretrained gives a file that the tokenizers library loads with that limit: each
#   text is cut to two tokens without a word. transformers loads the same file and cuts nothing, since
#   it sets both anew at each call, so the one who saved it never sees it.
# Why it matters: a training script cuts its examples, then saves the tokenizer. Whoever reads
#   tokenizer.json with the tokenizers library itself gets prompts that are cut to the training length,
#   which for a list of tools is soon reached. Call no_truncation() and no_padding() after from_file.
# Versions: tokenizers 0.23.3, transformers 5.24.0 (without torch). Date: 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'PYTHON'
from importlib.metadata import version

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = "one two three four"
words = {word: i for i, word in enumerate(["?", *TEXT.split()])}
bare = Tokenizer(models.WordLevel(words, unk_token="?"))
bare.pre_tokenizer = pre_tokenizers.Whitespace()
bare.save("bare.json")

trained = PreTrainedTokenizerFast(tokenizer_file="bare.json")
trained.save_pretrained("before")
trained(TEXT, truncation=True, max_length=2)        # as a training script prepares an example
trained.save_pretrained("after")
for name in ("tokenizers", "transformers"):
    print(name, version(name))
seen = {}
for folder in ("before", "after"):
    by_file = Tokenizer.from_file(f"{folder}/tokenizer.json").encode(TEXT).ids
    by_transformers = PreTrainedTokenizerFast.from_pretrained(folder)(TEXT)["input_ids"]
    seen[folder] = by_file, by_transformers
    print(f"saved {folder:7} tokenizers {by_file}  transformers {by_transformers}")
assert seen == {"before": ([1, 2, 3, 4], [1, 2, 3, 4]), "after": ([1, 2], [1, 2, 3, 4])}, seen
mended = Tokenizer.from_file("after/tokenizer.json")
mended.no_truncation()
assert mended.encode(TEXT).ids == [1, 2, 3, 4]
print("as described")
PYTHON
