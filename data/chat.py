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
    """How a template writes a dialogue: texts, and special tokens (<|...|>) by their names."""
    turn: tuple[str, ...]
    opening: tuple[str, ...]        # of the answer
    start: tuple[str, ...] = ()     # of the dialogue
    thinks: bool = False            # a past answer loses what was thought before it
    llama: bool = False             # texts are trimmed; a result is a JSON string in its own turn


CHATML = ChatFormat(("<|im_start|>", "{role}\n{content}", "<|im_end|>", "\n"),
                    ("<|im_start|>", "assistant\n"))
QWEN3 = replace(CHATML, thinks=True,        # as with enable_thinking=False
                opening=("<|im_start|>", "assistant\n<think>\n\n</think>\n\n"))
LLAMA3 = ChatFormat(                        # without the dates before the system text
    ("<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n{content}", "<|eot_id|>"),
    ("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"), ("<|begin_of_text|>",),
    llama=True)
RESULT = re.compile("<tool_response>\n(.*)\n</tool_response>", re.S)      # of a tool, a user's turn


class Tokenizer:
    """The checkpoint's tokenizer, its chat format, and the ids that end a turn."""

    def __init__(self, folder: Path):
        """ValueError if tokenizer.json is missing, damaged, or without a format's tokens."""
        try:
            self.bpe = BPE.from_file(str(folder / "tokenizer.json"))
        except Exception as error:              # the library raises nothing narrower
            raise ValueError(f"{folder}: no readable tokenizer.json ({error}); in a Git repository "
                             "run git lfs pull") from error
        self.bpe.no_truncation()                # which a file may ask for, since it was saved so
        self.bpe.no_padding()
        said, jinja = {}, folder / "chat_template.jinja"
        for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
            try:
                if (folder / name).is_file():
                    said |= json.loads((folder / name).read_text(encoding="utf-8"))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{folder / name}: holds no JSON object ({error})") from error
        # "<|im_end|>" inside a request is text. Special tokens come from `chat` alone, by id.
        self.bpe.encode_special_tokens = True
        template = jinja.read_text("utf-8") if jinja.is_file() else said.get("chat_template")
        # the 2507 models are of Qwen3's type, too: their template never asks whether to think
        thinks = said.get("model_type") == "qwen3" and (
            not template or "enable_thinking" in str(template))
        for self.format in (QWEN3 if thinks else CHATML, LLAMA3):
            self.special: dict[str, int | None] = {}
            for piece in (*self.format.start, *self.format.turn):
                if piece.startswith("<|"):
                    self.special[piece] = self.bpe.token_to_id(piece)
            if None not in self.special.values():
                break
        else:
            raise ValueError(f"{folder}: tokenizer.json has the tokens of no chat format that is "
                             "implemented: ChatML's (<|im_start|>, <|im_end|>), or Llama 3's "
                             "(<|start_header_id|>, <|end_header_id|>, <|eot_id|>)")
        self.im_end = [*self.special.values()][-1]      # ends a turn, in any format
        eos = said.get("eos_token_id")          # of a base model it may lack the turn's end
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        self.eos: frozenset[int] = frozenset([*eos, self.im_end])
        self.penalty = said.get("repetition_penalty") or 1.0       # what the checkpoint asks for
        whole = self.bpe.to_str() + str(sorted(self.eos)) + str(self.format)
        self.digest = hashlib.sha256(whole.encode()).hexdigest()
        self.beginnings: dict[str, list[int]] = {}

    def chat(self, messages: Sequence[dict]) -> tuple[list[int], list[int]]:
        """Token ids of {"role": "system" | "user" | "assistant", "content": str} messages as the
        checkpoint's own Jinja template gives them, up to where the assistant is to answer. If the
        last message is the assistant's, its answer begins with that. In two parts: the system
        turn, which prompts with the same tools share, and what follows it."""
        begun, turns, parts, before, form = "", [], [], None, self.format
        if messages[-1]["role"] == "assistant":
            begun, messages = messages[-1]["content"], messages[:-1]
        for message in messages:
            role, content = message["role"], message["content"]
            result = RESULT.fullmatch(content) if role == "user" else None
            if result and form.llama:
                role, content = "ipython", json.dumps(result[1], ensure_ascii=False)
            elif form.llama:
                content = content.strip()
            elif result and before:                     # results in a row share a turn
                content = turns.pop()[1]["content"] + "\n" + content
            elif role == "assistant" and form.thinks and "</think>" in content:
                content = content.rpartition("</think>")[2].lstrip("\n")
            turns.append((form.turn, {"role": role, "content": content}))
            before = result
        for pieces, turn in [*turns, (form.opening, {})]:
            ids = []
            for piece in pieces:
                special = piece in self.special
                ids += [self.special[piece]] if special else self.encode(piece.format(**turn))
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
