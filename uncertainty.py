"""H, the self-awareness of Algorithm 1: how sure is the model which of the tools to call?

Each candidate a_n is a tool's name. Its score is l_n = log P(a_n | x), summed over the name's tokens; Relative Softmax
Scoring turns the scores into p_n, and u(x) = p_(1) - p_(2) is the softmax difference: large when the model is sure.
"""
from collections.abc import Sequence

import torch

from model import KVCache, Qwen2, Tokenizer, pad

ANSWER_START = '<tool_call>\n{"name": "'        # what the answer begins with, up to where the candidates part


def relative_softmax(log_likelihoods: torch.Tensor) -> torch.Tensor:
    """RSS: p_n = exp(l_n - max_j l_j) / sum_k exp(l_k - max_j l_j) (the paper's Algorithm 1). (N,) nats -> (N,)."""
    shifted = (log_likelihoods - log_likelihoods.max()).exp()
    return shifted / shifted.sum()


def softmax_difference(log_likelihoods: torch.Tensor) -> float:
    """u = p_(1) - p_(2) in [0, 1] of the scores l_n (N,); 1.0 where there is but one candidate.

    softmax_difference(torch.tensor([0.7, 0.2, 0.1]).log()) -> 0.5
    """
    if len(log_likelihoods) == 0:
        raise ValueError("no candidate to score: the sample offers no tool")
    if len(log_likelihoods) == 1:
        return 1.0
    first, second = relative_softmax(log_likelihoods.double()).topk(2).values.tolist()
    return first - second


def closing_tokens(tokenizer: Tokenizer) -> list[int]:
    """Every token that begins with a quotation mark. A name is over where one of them comes next, and which one it is
    (`"`, `",`, ...) depends on what the model means to write after it, so the end's probability is their sum."""
    # byte-level BPE writes printable ASCII as itself, so the raw vocabulary entry tells the first byte; the added
    # tokens of a small vocabulary stand as plain text, which begins the same way
    return sorted(i for token, i in tokenizer.bpe.get_vocab(with_added_tokens=True).items() if token.startswith('"'))


@torch.no_grad()
def score_candidates(model: Qwen2, tokenizer: Tokenizer, cache: KVCache, last: Sequence[int],
                     names: Sequence[str]) -> torch.Tensor:
    """l_n = log P(a_n | x) in nats for each of N names, (N,) float32, in one batch that shares the prompt's cache.

    cache: the prompt but for its last tokens, which are `last`; it is left as it was. The name's tokens and its end
    count, so that `get` does not win over `get_user` for being its beginning.
    """
    if not names:
        raise ValueError("no candidate to score: the sample offers no tool")
    # paper: a sum over the action's tokens (NLL).
    # ours: the end of the name belongs to the action, as the sum over all tokens that begin with a quotation mark.
    start = [*last, *tokenizer.encode(ANSWER_START)]
    tokens = [tokenizer.encode(name) for name in names]
    shared = 0                                          # tokens that all names begin with are read once, too
    while len({tuple(t[:shared + 1]) for t in tokens}) == 1 and all(len(t) > shared + 1 for t in tokens):
        shared += 1
    cache = cache.fork()
    head = model(torch.tensor([start + tokens[0][:shared]], device=model.device), cache)[:, len(start) - 1:]   # (1, shared + 1, D)
    ids, valid = pad([t[shared:] for t in tokens], model.device)                                          # (N, T)
    hidden = model(ids, cache.fork(len(names)), valid)
    hidden = torch.cat((head[:, -1:].expand(len(names), 1, -1), hidden), dim=1)                           # (N, T + 1, D)
    common = model.logits(head[0, :-1]).log_softmax(-1) if shared else None
    closing = torch.tensor(closing_tokens(tokenizer), device=model.device)
    scores = []
    for row, name in enumerate(tokens):
        rest = name[shared:]
        log_p = model.logits(hidden[row, :len(rest) + 1]).log_softmax(-1)               # (len(rest) + 1, V)
        total = log_p[range(len(rest)), rest].sum() + log_p[-1, closing].logsumexp(-1)
        if shared:
            total = total + common[range(shared), name[:shared]].sum()
        scores.append(total)
    return torch.stack(scores).cpu()
