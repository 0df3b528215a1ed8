"""H, the self-awareness of Algorithm 1: how sure is the model which of the tools to call?

Each candidate a_n is a tool's name. Its score is l_n = log P(a_n | x), summed over the name's tokens; Relative Softmax
Scoring turns the scores into p_n, and u(x) = p_(1) - p_(2) is the softmax difference: large when the model is sure.
"""
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from model import KVCache, Qwen2, Tokenizer, pad, seeded

ANSWER_START = '<tool_call>\n{"name": "'        # what the answer begins with, up to where the candidates part


def relative_softmax(log_likelihoods: torch.Tensor) -> torch.Tensor:
    """RSS: p_n = exp(l_n - max_j l_j) / sum_k exp(l_k - max_j l_j) (the paper's Algorithm 1). (N,) nats -> (N,)."""
    return log_likelihoods.softmax(-1)


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
    # Which one of them it is (`"`, `",`, ...) depends on what the model means to write after it.
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
    closing = torch.tensor(tokenizer.quotes, device=model.device)
    scores = []
    for row, name in enumerate(tokens):
        rest = name[shared:]
        log_p = model.logits(hidden[row, :len(rest) + 1]).log_softmax(-1)               # (len(rest) + 1, V)
        total = log_p[range(len(rest)), rest].sum() + log_p[-1, closing].logsumexp(-1)
        if shared:
            total = total + common[range(shared), name[:shared]].sum()
        scores.append(total)
    return torch.stack(scores).cpu()


# ------------------------------------------------------------------------------------- the scores: higher = less sure

@dataclass(frozen=True)
class Evidence:
    """What is known of one sample, with the base weights: all that a score may look at. N candidates, T answer tokens."""
    id: str
    prompt_tokens: int
    candidates: torch.Tensor                            # (N,) l_n, nats
    lengths: torch.Tensor                               # (N,) of how many tokens l_n is the sum
    orders: torch.Tensor | None = None                  # (M, N) l_n under M orders of the tools
    meanings: Sequence[Hashable] = ()                   # of k sampled answers: equal means the same calls under `exact`
    nll: torch.Tensor | None = None                     # (T,) -log P of each token of the greedy answer, its end included
    entropy: torch.Tensor | None = None                 # (T,) entropy of the distribution that each was chosen from, nats
    parts: Mapping[str, Sequence[int]] = field(default_factory=dict)    # "answer", "name", "values" -> which of the T tokens


@dataclass(frozen=True)
class Score:
    """A measure of uncertainty, and what it needs: "" nothing more than gating and answering read anyway, "orders" or
    "samples" further passes."""
    value: Callable[[Evidence], float]                  # higher = less sure; NaN where it is not defined
    needs: str = ""


ORDERS = 4                                              # orders of the tools that mutual information looks at
SCORES: dict[str, Score] = {}                           # all scores by name; a new one is one decorated function


def score(needs: str = "", name: str = ""):
    """Enter the function into SCORES, under its own name or another."""
    def enter(function):
        SCORES[name or function.__name__] = Score(function, needs)
        return function
    return enter


def entropy_of(p: torch.Tensor) -> torch.Tensor:
    """H(p) = -sum p log p over the last dimension, nats; 0 log 0 = 0."""
    return torch.special.entr(p).sum(-1)


@score()
def margin(e: Evidence) -> float:
    """1 - u, the paper's (margin sampling: Scheffer et al. 2001)."""
    return 1 - softmax_difference(e.candidates)


@score()
def mean_margin(e: Evidence) -> float:
    """1 - u of the mean log-likelihoods per token instead of their sums."""
    return 1 - softmax_difference(e.candidates / e.lengths)


@score()
def log_odds(e: Evidence) -> float:
    """l_(2) - l_(1), nats: the margin without its saturation; -inf without a rival."""
    first, second = [*e.candidates.double().sort(descending=True).values.tolist(), -math.inf][:2]
    return second - first


@score()
def least_confidence(e: Evidence) -> float:
    """1 - p_(1)."""
    return 1 - relative_softmax(e.candidates.double()).max().item()


@score()
def entropy(e: Evidence) -> float:
    """H(p) of the candidates, nats."""
    return entropy_of(relative_softmax(e.candidates.double())).item()


@score()
def normalised_entropy(e: Evidence) -> float:
    """H(p) / log N in [0, 1], since N differs from sample to sample; 0 for one candidate."""
    return entropy(e) / math.log(len(e.candidates)) if len(e.candidates) > 1 else 0.0


@score("orders")
def mutual_information(e: Evidence) -> float:
    """BALD (Houlsby et al. 2011), H(mean_m p^m) - mean_m H(p^m), over M orders of the tools as the ensemble, nats."""
    p = e.orders.double().softmax(-1)
    return (entropy_of(p.mean(0)) - entropy_of(p).mean()).item()


@score("samples")
def vote_share(e: Evidence) -> float:
    """1 - the share of the k sampled answers that mean what most of them mean."""
    return 1 - max(Counter(e.meanings).values()) / len(e.meanings)


@score("samples")
def semantic_entropy(e: Evidence) -> float:
    """Entropy of the meanings of the k sampled answers, nats (Kuhn et al. 2023; by counts, as in Farquhar et al. 2024)."""
    return entropy_of(torch.tensor(list(Counter(e.meanings).values())).double() / len(e.meanings)).item()


def over_part(reduce: Callable[[torch.Tensor], torch.Tensor], values: str, part: str) -> Callable[[Evidence], float]:
    """A score that reduces some of the greedy answer's token values; NaN if it has no token of that part."""
    return lambda e: reduce(getattr(e, values)[list(e.parts[part])]).item() if e.parts[part] else math.nan


for part in ("answer", "name", "values"):               # of the greedy answer (Fomicheva et al. 2020)
    score(name=f"{part}_nll")(over_part(torch.sum, "nll", part))                             # -log P(part), nats
    score(name=f"{part}_perplexity")(over_part(lambda nll: nll.mean().exp(), "nll", part))
    score(name=f"{part}_mean_entropy")(over_part(torch.mean, "entropy", part))
    score(name=f"{part}_max_entropy")(over_part(torch.max, "entropy", part))


@score()
def random(e: Evidence) -> float:
    """A number that knows nothing: what any score must beat, as must the next three."""
    return torch.rand((), generator=seeded("random score", e.id)).item()


@score()
def candidates(e: Evidence) -> float:
    """N."""
    return float(len(e.candidates))


@score()
def answer_tokens(e: Evidence) -> float:
    """The length of the greedy answer: a longer one has more that can be wrong."""
    return float(len(e.nll))


@score()
def prompt_tokens(e: Evidence) -> float:
    """The length of the prompt."""
    return float(e.prompt_tokens)


def choose_scores(wanted: str) -> tuple[str, ...]:
    """The names that --scores means: "cheap" (no pass more), "all", or names with commas; ValueError for an unknown one."""
    if wanted in ("cheap", "all"):
        return tuple(name for name, entry in SCORES.items() if wanted == "all" or not entry.needs)
    names = tuple(name for name in wanted.split(",") if name)
    if unknown := [name for name in names if name not in SCORES]:
        raise ValueError(f"no score is called {', '.join(unknown)}; there are cheap, all, {', '.join(SCORES)}")
    return names


def name_lengths(tokenizer: Tokenizer, names: Sequence[str]) -> torch.Tensor:
    """(N,) the tokens of each name and its end: of how many l_n is the sum."""
    return torch.tensor([len(tokenizer.encode(name)) + 1 for name in names])


NAMES = re.compile(r'"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"arguments"')
VALUES = re.compile(r'"(?:[^"\\]|\\.)*"\s*:\s*("(?:[^"\\]|\\.)*"|[^\s,{}\[\]"]+)')


def answer_parts(tokenizer: Tokenizer, ids: Sequence[int]) -> dict[str, list[int]]:
    """Which tokens of a text hold the names of tools, and which the scalar values of arguments (but for those in lists)."""
    ends = [len(tokenizer.decode(ids[:i + 1])) for i in range(len(ids))]
    text = tokenizer.decode(ids)
    names = [found.span(1) for found in NAMES.finditer(text)]
    values = [found.span(1) for found in VALUES.finditer(text) if not any(a >= found.start() and b <= found.end() for a, b in names)]
    def inside(spans): return [i for i, (start, end) in enumerate(zip([0, *ends], ends)) if any(start < b and end > a for a, b in spans)]
    return {"answer": list(range(len(ids))), "name": inside(names), "values": inside(values)}


# --------------------------------------------------------------------------------------- a threshold without labels

def threshold_between(values: Sequence[float], count: int) -> float:
    """A threshold that the `count` largest values exceed; fewer, where the next is as large as the last of them. NaN is the
    largest of all: a score that is not defined is sure of nothing."""
    values = sorted((math.inf if math.isnan(value) else value for value in values), reverse=True)
    while 0 < count < len(values) and values[count - 1] == values[count]:
        count -= 1
    if count == 0:
        return values[0]
    if count == len(values):
        return -math.inf
    between = (values[count - 1] + values[count]) / 2
    return between if math.isfinite(between) else values[count]


def otsu(values: Sequence[float]) -> float:
    """The threshold that parts the finite values into the two groups with the largest variance between them (Otsu 1979)."""
    values = sorted((v for v in values if math.isfinite(v)), reverse=True)
    total, upper, best = sum(values), 0.0, (0.0, 0)
    for count, value in enumerate(values[:-1], 1):
        upper += value
        rest = len(values) - count
        between = count * rest * (upper / count - (total - upper) / rest) ** 2
        best = max(best, (between, count))
    return threshold_between(values, best[1]) if values else 0.0


# ----------------------------------------------------------------------------- is a score any good? (n,) float64 each

RANKING = ("AUROC", "AUPR", "FPR@95", "AURC", "E-AURC", "PRR")


def groups(score: torch.Tensor, *values: torch.Tensor) -> list[torch.Tensor]:
    """The sums of each of `values` over equal scores, the least sure first; a score that is NaN is the least sure of all."""
    _, group = torch.nan_to_num(-score, nan=-math.inf).unique(return_inverse=True)
    return [torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add_(0, group, value.double()) for value in values]


def ranking(score: torch.Tensor, error: torch.Tensor) -> dict[str, float]:
    """How well the score, higher = less sure, ranks the errors (1 = the direct answer is wrong) before the rest.

    AUROC: an error is less sure than a right answer (Mann-Whitney; ties count half). AUPR: average precision. FPR@95: the
    fewest right answers flagged where 95 % of the errors are. AURC: area under risk over coverage, E-AURC: less that of the
    ideal order (Geifman and El-Yaniv 2019; ties: the mean over their orders). PRR: the share of the way from random to ideal
    (Malinin 2020). NaN where all answers are right or all wrong.
    """
    n, wrong = len(error), float(error.sum())
    if wrong in (0, n):
        return dict.fromkeys(RANKING, math.nan)
    errors, sizes = groups(score, error, torch.ones(n))
    tp, fp = errors.cumsum(0), (sizes - errors).cumsum(0)
    recall, precision = tp / wrong, tp / (tp + fp)
    fpr = fp / (n - wrong)
    before = torch.cat((torch.zeros(1), recall[:-1])), torch.cat((torch.zeros(1), fpr[:-1]))
    aurc, ideal = risk_coverage(score, error).mean().item(), risk_coverage(error.double(), error).mean().item()
    return {"AUROC": ((fpr - before[1]) * (recall + before[0]) / 2).sum().item(),
            "AUPR": ((recall - before[0]) * precision).sum().item(), "FPR@95": fpr[recall >= 0.95 - 1e-12][0].item(),
            "AURC": aurc, "E-AURC": aurc - ideal, "PRR": (wrong / n - aurc) / (wrong / n - ideal)}


def cumulative(score: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(n + 1,) the sum of `value` over the i least sure, for i = 0..n; of equal scores, each has their mean."""
    sums, sizes = groups(score, value, torch.ones(len(value)))
    return torch.cat((torch.zeros(1), (sums / sizes).repeat_interleave(sizes.long()).cumsum(0)))


def risk_coverage(score: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """(n,) the share of errors among the i surest, for i = 1..n (coverage i / n)."""
    left = cumulative(score, error)
    return (left[-1] - left[:-1]).flip(0) / torch.arange(1, len(error) + 1)


def gate_rates(flagged: torch.Tensor, error: torch.Tensor) -> dict[str, float]:
    """TPR, FPR and precision of a gate: bool (n,) whether it adapts, against whether that was called for."""
    def share(part, whole): return (part.sum() / whole.sum()).item() if whole.any() else math.nan
    flagged, error = flagged.bool(), error.bool()
    return {"TPR": share(flagged & error, error), "FPR": share(flagged & ~error, ~error), "precision": share(flagged & error, flagged)}


def gain_budget(score: torch.Tensor, gain: torch.Tensor) -> dict[str, float | torch.Tensor]:
    """What adapting the i least sure samples gains, gain being -1, 0 or 1 for each sample: `curve` (n + 1,), in accuracy.

    Qini: the mean of the curve less the straight line of a random gate (Radcliffe 2007). ideal: the best that any gate gains.
    """
    n = len(gain)
    curve = cumulative(score, gain) / n
    return {"curve": curve, "Qini": (curve - torch.linspace(0, 1, n + 1) * curve[-1]).mean().item(),
            "ideal": (gain > 0).sum().item() / n}


def reliability(p: torch.Tensor, right: torch.Tensor, bins: int = 10, mass: bool = False) -> list[tuple[int, float, float]]:
    """(count, mean p, share right) of each bin that is not empty: bins of equal width, or of equal mass."""
    order = p.argsort(stable=True)
    parts = order.tensor_split(bins) if mass else \
        [order[((p[order] * bins).ceil().clamp(1, bins) == b)] for b in range(1, bins + 1)]
    return [(len(part), p[part].mean().item(), right[part].double().mean().item()) for part in parts if len(part)]


def calibration(p: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """Is p, in [0, 1], the probability of being right? ECE, the mean gap between the two over 10 bins (Naeini et al. 2015;
    Guo et al. 2017), of equal width and of equal mass; MCE, the largest gap; Brier score; NLL, nats."""
    def gaps(mass): return [(count / len(p), abs(mean - share)) for count, mean, share in reliability(p, right, mass=mass)]
    p, right = p.double(), right.double()
    likelihood = torch.where(right > 0, p, 1 - p).clamp(min=1e-12)
    return {"ECE": sum(w * gap for w, gap in gaps(False)), "ECE (equal mass)": sum(w * gap for w, gap in gaps(True)),
            "MCE": max(gap for _, gap in gaps(False)), "Brier": (p - right).square().mean().item(),
            "NLL": -likelihood.log().mean().item()}


def temperature(scores: Sequence[torch.Tensor], gold: Sequence[int]) -> float:
    """The T that gives the gold candidates of softmax(l / T) the least NLL, by golden-section search over log T in [-3, 5]."""
    def nll(log_t): return -sum((l.double() / math.exp(log_t)).log_softmax(-1)[g].item() for l, g in zip(scores, gold))
    low, high, shrink = -3.0, 5.0, (5 ** 0.5 - 1) / 2
    while high - low > 1e-3:
        a, b = high - shrink * (high - low), low + shrink * (high - low)
        low, high = (low, b) if nll(a) < nll(b) else (a, high)
    return math.exp((low + high) / 2)


def cross_fitted(scores: Sequence[torch.Tensor], gold: Sequence[int | None], folds: int = 5) -> torch.Tensor:
    """(n,) p_(1) after temperature scaling, each sample's T fitted on the other folds (gold None: offered no gold tool)."""
    fitted = []
    for fold in range(folds):
        rest = [(l, g) for i, (l, g) in enumerate(zip(scores, gold)) if i % folds != fold and g is not None and len(l) > 1]
        fitted.append(temperature(*zip(*rest)) if rest else 1.0)
    return torch.stack([(l.double() / fitted[i % folds]).softmax(-1).max() for i, l in enumerate(scores)])


def bootstrap(measure: Callable[..., dict[str, float]], *columns: torch.Tensor, times: int = 1000) -> dict[str, torch.Tensor]:
    """(times,) each: the measures of resampled samples (Efron 1979), the same resamples for every score of equal n."""
    draw = torch.Generator().manual_seed(0)
    rows = [measure(*(column[index] for column in columns))
            for index in torch.randint(len(columns[0]), (times, len(columns[0])), generator=draw)]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}


def interval(values: torch.Tensor) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrapped values; those of one class only, which are NaN, are left out."""
    return tuple(values.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())
