"""H, the self-awareness of Algorithm 1: how sure is the model about which action to take?

The candidates a_n are what the task lets the model choose from. A candidate's score is
l_n = log P(a_n | x), a sum over its tokens; Relative Softmax Scoring turns the scores into p_n, and
u(x) = p_(1) - p_(2) is the softmax difference: large when the model is sure. All candidates share
one cached prompt.
"""
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from data.chat import Tokenizer
from model import KVCache, Qwen2


@torch.no_grad()
def score_candidates(model: Qwen2, tokenizer: Tokenizer, cache: KVCache, last: Sequence[int],
                     actions: Sequence[str], begun: str, end: str) -> torch.Tensor:
    """l_n = log P(a_n | x) in nats for each of N actions, (N,) float32 on the CPU, in one batch.

    cache: the prompt without its last tokens, which are `last`; it is not changed. begun: the
    answer's text before the action. end: the character that ends an action; "": the turn ends.
    """
    # paper: a sum over the action's tokens (NLL).
    # ours: the end belongs to the action; otherwise `get` always beats `get_user`. A name ends with
    # a quotation mark, and the next token may be `"` or `",` or another, so their probabilities
    # are added. `begun` and an action are encoded together, since the quotation mark and a name
    # that begins with punctuation share a token; what all begin with is read once.
    start, *whole = [tokenizer.encode(begun + action) for action in ("", *actions)]
    shared = 0                                  # tokens that all have in common
    for column in zip(start, *whole):
        if len(set(column)) > 1:
            break
        shared += 1
    own = [ids[shared:] for ids in whole]       # a candidate's own tokens
    cache = cache.fork()
    before = model([[*last, *start[:shared]]], cache)[:, -1:]                   # (1, 1, width)
    hidden = model(own, cache.fork(len(own)))                                   # (N, new, width)
    # position 0 predicts a candidate's first own token, the position of its last one the end
    hidden = torch.cat((before.expand(len(own), 1, -1), hidden), dim=1)
    ending, scores = tokenizer.ending(end), []
    for row, ids in zip(hidden, own):
        logits = model.lm_head(row[:len(ids) + 1]).float()                  # (tokens + 1, vocab)
        log_p = logits.log_softmax(-1)
        scores.append(log_p[range(len(ids)), ids].sum() + log_p[-1, ending].logsumexp(-1))
    return torch.stack(scores).cpu()


def softmax_difference(log_likelihoods: torch.Tensor) -> float:
    """u = p_(1) - p_(2) in [0, 1] of the scores l_n (N,), nats. One candidate gives 1.0. p
    comes from Relative Softmax Scoring, p_n = exp(l_n - max_j l_j) / sum_k exp(l_k - max_j l_j).

    softmax_difference(torch.tensor([0.7, 0.2, 0.1]).log()) -> 0.5
    """
    if len(log_likelihoods) == 1:
        return 1.0
    p = log_likelihoods.double().softmax(-1)            # softmax subtracts the largest, like RSS
    first, second = p.topk(2).values.tolist()
    return first - second


@dataclass
class PrefixCaches:
    """Recent KV caches of the base weights, found by their token ids, up to `max_bytes`: a long
    system turn serves many samples, and what H has read of x serves the adapted answer."""
    model: Qwen2
    max_bytes: int = 2 << 30
    caches: OrderedDict[tuple[int, ...], KVCache] = field(default_factory=OrderedDict)

    def split(self, tokenizer: Tokenizer, chats: Sequence[list[dict]],
              scope: str) -> tuple[list[KVCache], list[list[int]]]:
        """Prompts in two: caches of one row of what theta_0 has read of each (so call this outside
        of `adapters`), and the ids that are yet to be read. These are, by scope, full: all, and
        there are no caches; suffix: what follows the system turn; answer: the last token alone,
        which must be read to have logits. OverflowError if the context is too short."""
        caches, rests = [], []
        for chat in chats:
            system, rest = tokenizer.chat(chat)
            if scope == "full":
                rests.append(system + rest)
            elif scope == "suffix":
                caches.append(self.read(system))
                rests.append(rest)
            else:
                caches.append(self.read(system, rest[:-1]))
                rests.append(rest[-1:])
        return caches, rests

    @torch.no_grad()
    def read(self, ids: Sequence[int], rest: Sequence[int] = ()) -> KVCache:
        """A cache that holds `ids`, and then `rest`. The caller may extend it: it is a fork of the
        kept one."""
        key = (*ids, *rest)
        if key not in self.caches:
            cache = self.read(ids) if rest else KVCache()
            self.model([rest or key], cache)
            self.caches[key] = cache
            while len(self.caches) > 1 and self.max_bytes < sum(
                    [t.nbytes for c in self.caches.values() for t in (*c.keys, *c.values)]):
                self.caches.popitem(last=False)
        self.caches.move_to_end(key)
        return self.caches[key].fork()
