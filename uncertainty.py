"""H, the self-awareness of Algorithm 1: how sure is the model which of the tools to call?

Each candidate a_n is a tool's name. Its score is l_n = log P(a_n | x), a sum over its tokens;
Relative Softmax Scoring turns the scores into p_n, and u(x) = p_(1) - p_(2) is the softmax
difference: large when the model is sure. All candidates share one cached prompt.
"""
import re
from collections import OrderedDict
from collections.abc import Sequence
from os.path import commonprefix

import torch

from model import KVCache, Qwen2, Tokenizer, pad

ANSWER_START = '<tool_call>\n{"name": "'        # how an answer begins, up to where candidates part
# The key must be the call's own: in `f(user={"name": ...})` it is an argument's.
NAMED = re.compile(r'((?!"(?:arguments|parameters|args)")[^(])*?"(?:name|tool|function)"\s*:\s*"')


def answer_start(text: str) -> str:
    """An answer up to where it names its tool; ANSWER_START where it names none."""
    # paper: log P(a_n | x).
    # ours: after the model's own first words. A model that never writes <tool_call> is not asked
    # what it would say behind one.
    named = NAMED.match(text)
    return named[0] if named else ANSWER_START


def relative_softmax(log_likelihoods: torch.Tensor) -> torch.Tensor:
    """RSS: p_n = exp(l_n - max_j l_j) / sum_k exp(l_k - max_j l_j) (Algorithm 1). (N,) -> (N,)."""
    return log_likelihoods.softmax(-1)


def softmax_difference(log_likelihoods: torch.Tensor) -> float:
    """u = p_(1) - p_(2) in [0, 1] of the scores l_n (N,), nats; 1.0 where there is one candidate.

    softmax_difference(torch.tensor([0.7, 0.2, 0.1]).log()) -> 0.5
    """
    if len(log_likelihoods) == 1:
        return 1.0
    first, second = relative_softmax(log_likelihoods.double()).topk(2).values.tolist()
    return first - second


@torch.no_grad()
def score_candidates(model: Qwen2, tokenizer: Tokenizer, cache: KVCache, last: Sequence[int],
                     names: Sequence[str], begun: str = ANSWER_START) -> torch.Tensor:
    """l_n = log P(a_n | x) in nats for each of N names, (N,) float32 on the CPU, in one batch.

    cache: the prompt but for its last tokens, which are `last`; it is left as it was. begun: how
    the answer begins, up to the name.
    """
    # paper: a sum over the action's tokens (NLL).
    # ours: the end of the name belongs to the action (else `get` wins over `get_user`, being its
    # beginning), as the sum over all tokens that begin with a quotation mark. Which one of them
    # it is (`"`, `",`, ...) depends on what the model means to write after it.
    # A name that begins in punctuation joins the quotation mark before it into one token, so the
    # two are encoded together; what all have in common of `begun` is read once.
    whole = [tokenizer.encode(begun + name) for name in names]
    shared = len(commonprefix([tokenizer.encode(begun), *whole]))
    tokens = [ids[shared:] for ids in whole]
    cache = cache.fork()
    start = torch.tensor([[*last, *whole[0][:shared]]], device=model.device)
    before = model(start, cache)[:, -1:]                                            # (1, 1, D)
    hidden = model(pad(tokens, model.device), cache.fork(len(names)))               # (N, T, D)
    hidden = torch.cat((before.expand(len(names), 1, -1), hidden), dim=1)
    scores = []
    for row, name in zip(hidden, tokens):
        log_p = model.logits(row[:len(name) + 1]).log_softmax(-1)       # (tokens + 1, V)
        end = log_p[-1, tokenizer.quotes].logsumexp(-1)
        scores.append(log_p[range(len(name)), name].sum() + end)
    return torch.stack(scores).cpu()


class PrefixCaches:
    """The KV caches of the last few prefixes that were read with the base weights, by their
    token ids, within a memory bound: a long head (system text and tools) serves many samples."""

    def __init__(self, model: Qwen2, max_bytes: int = 2 << 30):
        self.model, self.max_bytes = model, max_bytes
        self.caches: OrderedDict[tuple[int, ...], KVCache] = OrderedDict()

    @torch.no_grad()
    def read(self, ids: Sequence[int], rest: Sequence[int] = ()) -> KVCache:
        """A cache that holds `ids`, and then `rest`, to be continued freely: it is a fork of the
        kept one, which ends with `ids`."""
        key = tuple(ids)
        if key not in self.caches:
            cache = KVCache()
            self.model(torch.tensor([key], device=self.model.device), cache)
            self.caches[key] = cache
            while len(self.caches) > 1 and self.bytes() > self.max_bytes:
                self.caches.popitem(last=False)
        self.caches.move_to_end(key)
        cache = self.caches[key].fork()
        if rest:
            self.model(torch.tensor([rest], device=self.model.device), cache)
        return cache

    def bytes(self) -> int:
        return sum(t.nbytes for c in self.caches.values() for t in (*c.keys, *c.values))
