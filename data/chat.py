"""Text to token ids and back: the checkpoint's tokenizer, and its chat format by hand."""
import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer as BPE


class Tokenizer:
    """The checkpoint's tokenizer, its chat format (ChatML), and the ids that end a turn."""

    def __init__(self, folder: Path):
        """ValueError if tokenizer.json is missing, damaged, or without ChatML's tokens."""
        try:
            self.bpe = BPE.from_file(str(folder / "tokenizer.json"))
        except Exception as error:              # the library raises nothing narrower
            raise ValueError(f"{folder}: no readable tokenizer.json ({error})") from error
        generation = folder / "generation_config.json"
        config = generation if generation.is_file() else folder / "config.json"
        try:
            eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{config}: holds no JSON object ({error})") from error
        # "<|im_end|>" inside a request is text. Special tokens come from `chat` alone, by id.
        self.bpe.encode_special_tokens = True
        self.im_start = self.bpe.token_to_id("<|im_start|>")
        self.im_end = self.bpe.token_to_id("<|im_end|>")
        if self.im_start is None or self.im_end is None:
            raise ValueError(f"{folder}: tokenizer.json lacks <|im_start|> and <|im_end|> (ChatML)")
        eos = eos or self.im_end
        self.eos: frozenset[int] = frozenset(eos if isinstance(eos, list) else [eos])
        whole = self.bpe.to_str() + str(sorted(self.eos))
        self.digest = hashlib.sha256(whole.encode()).hexdigest()
        self.beginnings: dict[str, list[int]] = {}

    def chat(self, messages: Sequence[dict]) -> tuple[list[int], list[int]]:
        """Token ids of {"role": "system" | "user" | "assistant", "content": str} messages as the
        checkpoint's own Jinja template gives them, up to where the assistant is to answer. If the
        last message is the assistant's, its answer begins with that. In two parts: the system
        turn, which prompts with the same tools share, and what follows it."""
        begun, turns = "", []
        if messages[-1]["role"] == "assistant":
            begun, messages = messages[-1]["content"], messages[:-1]
        for message in messages:
            turn = self.encode(f"{message['role']}\n{message['content']}")
            turns.append([self.im_start, *turn, self.im_end, *self.encode("\n")])
        system, *others = turns
        answer = [self.im_start, *self.encode("assistant\n"), *self.encode(begun)]
        return system, [*chain(*others), *answer]

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text. A lone surrogate, which UTF-8 cannot hold, becomes "?"."""
        text = text.encode("utf-8", "replace").decode()
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.bpe.decode(list(ids), skip_special_tokens=False)

    def ending(self, character: str) -> list[int]:
        """Every token that begins with a character of ASCII; of "" the tokens that end a turn."""
        if not character:
            return sorted(self.eos)
        if character not in self.beginnings:
            # byte-level BPE writes printable ASCII as itself, so a raw entry tells its first byte
            vocabulary = self.bpe.get_vocab(with_added_tokens=True)
            found = [i for token, i in vocabulary.items() if token.startswith(character)]
            self.beginnings[character] = sorted(found)
        return self.beginnings[character]
