"""Text to token ids and back: the checkpoint's tokenizer, and its chat format by hand."""
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer as BPE


@dataclass(frozen=True)
class ChatFormat:
    """How a checkpoint's template writes a dialogue: pieces of text, and special tokens (<|...|>)
    by their names."""
    turn: tuple[str, ...]
    opening: tuple[str, ...]        # of the answer
    end: str                        # the token that ends a turn
    start: tuple[str, ...] = ()     # of the dialogue
    thinks: bool = False            # what was thought before a past answer is left out
    llama: bool = False             # texts are trimmed; a tool's result is a JSON string in a turn
    #                                 of its own, where otherwise results in a row share a turn


CHATML = ChatFormat(("<|im_start|>", "{role}\n{content}", "<|im_end|>", "\n"),
                    ("<|im_start|>", "assistant\n"), "<|im_end|>")
QWEN3 = replace(CHATML, thinks=True, opening=(                  # as enable_thinking=False has it
    "<|im_start|>", "assistant\n<think>\n\n</think>\n\n"))
LLAMA3 = ChatFormat(        # without the dates that its template puts before the system text
    ("<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n{content}", "<|eot_id|>"),
    ("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"), "<|eot_id|>",
    ("<|begin_of_text|>",), llama=True)
# what a tool gave, as data/formats.py has it
RESULT = re.compile("<tool_response>\n(.*)\n</tool_response>", re.S)


class Tokenizer:
    """The checkpoint's tokenizer, its chat format, and the ids that end a turn."""

    def __init__(self, folder: Path):
        """ValueError if tokenizer.json is missing, damaged, or without a format's tokens."""
        try:
            self.bpe = BPE.from_file(str(folder / "tokenizer.json"))
        except Exception as error:              # the library raises nothing narrower
            raise ValueError(f"{folder}: no readable tokenizer.json ({error})") from error
        said, jinja = {}, folder / "chat_template.jinja"
        for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
            try:
                if (folder / name).is_file():
                    said |= json.loads((folder / name).read_text(encoding="utf-8"))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{folder / name}: holds no JSON object ({error})") from error
        template = said.get("chat_template")
        template = jinja.read_text(encoding="utf-8") if jinja.is_file() else template
        # "<|im_end|>" inside a request is text. Special tokens come from `chat` alone, by id.
        self.bpe.encode_special_tokens = True
        # of Qwen3's type are the 2507 models, too, whose template never asks whether to think
        thinks = not template or "enable_thinking" in str(template)
        chatml = QWEN3 if said.get("model_type") == "qwen3" and thinks else CHATML
        for self.format in (chatml, LLAMA3):
            self.special = {}
            for piece in (*self.format.start, *self.format.turn):
                if piece.startswith("<|"):
                    self.special[piece] = self.bpe.token_to_id(piece)
            if None not in self.special.values():
                break
        else:
            raise ValueError(f"{folder}: tokenizer.json has the tokens of no chat format that is "
                             "implemented: ChatML's (<|im_start|>, <|im_end|>), or Llama 3's "
                             "(<|start_header_id|>, <|end_header_id|>, <|eot_id|>)")
        self.im_start = self.special[self.format.turn[0]]
        self.im_end = self.special[self.format.end]
        eos = said.get("eos_token_id") or self.im_end
        self.eos: frozenset[int] = frozenset(eos if isinstance(eos, list) else [eos])
        whole = self.bpe.to_str() + str(sorted(self.eos)) + str(self.format)
        self.digest = hashlib.sha256(whole.encode()).hexdigest()
        self.beginnings: dict[str, list[int]] = {}

    def chat(self, messages: Sequence[dict]) -> tuple[list[int], list[int]]:
        """Token ids of {"role": "system" | "user" | "assistant", "content": str} messages as the
        checkpoint's own Jinja template gives them, up to where the assistant is to answer. If the
        last message is the assistant's, its answer begins with that. In two parts: the system
        turn, which prompts with the same tools share, and what follows it."""
        begun, turns, before, form = "", [], None, self.format
        if messages[-1]["role"] == "assistant":
            begun, messages = messages[-1]["content"], messages[:-1]
        for message in messages:
            role, content = message["role"], message["content"]
            result = RESULT.fullmatch(content) if role == "user" else None
            if result and form.llama:
                role, content = "ipython", json.dumps(result[1], ensure_ascii=False)
            elif form.llama:
                content = content.strip()
            elif result and before:
                content = turns.pop()["content"] + "\n" + content
            elif role == "assistant" and form.thinks and "</think>" in content:
                content = content.rpartition("</think>")[2].lstrip("\n")
            turns.append({"role": role, "content": content})
            before = result
        parts = []
        for pieces, turn in [*[(form.turn, turn) for turn in turns], (form.opening, {})]:
            ids = []
            for piece in pieces:
                is_special = piece in self.special
                ids += [self.special[piece]] if is_special else self.encode(piece.format(**turn))
            parts.append(ids)
        system, *others = parts
        start = [self.special[piece] for piece in form.start]
        return start + system, [*chain(*others), *self.encode(begun)]

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
