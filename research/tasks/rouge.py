"""ROUGE (Lin 2004), as the package rouge-score gives it without stemming."""
import re
from collections import Counter


def rouge(text: str, gold: str) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 (shared words and pairs of words) and ROUGE-L (the longest common
    subsequence) of two texts, each F in [0, 1]. A word is a run of a-z and 0-9 in lower case."""
    said, wanted = [re.findall("[a-z0-9]+", each.lower()) for each in (text, gold)]
    scores = {}
    for n in (1, 2):
        own, other = [Counter(zip(*[words[i:] for i in range(n)])) for words in (said, wanted)]
        scores[f"rouge{n}"] = f((own & other).total(), own.total() + other.total())
    row = [0] * (len(wanted) + 1)       # of the longest common subsequence with wanted[:j]
    for word in said:
        before, row = row, [0]
        for j, other in enumerate(wanted):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return scores | {"rougeL": f(row[-1], len(said) + len(wanted))}


def f(shared: int, total: int) -> float:
    """F1 = 2 |shared| / (|said| + |wanted|); 0 of nothing."""
    return 2 * shared / total if shared else 0.0
