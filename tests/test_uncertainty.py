"""uncertainty.py by hand-made cases, and against one full pass for each candidate."""
import math
from os.path import commonprefix

import pytest
import torch

from conftest import logits
from data.calls import CALL_START
from model import seeded
from uncertainty import PrefixCaches, score_candidates, softmax_difference

NAMES = {"one name": ["get_weather"],
         "a common beginning": ["get_user_by_id", "get_user_by_name", "get_user_weather"],
         "one the beginning of the others": ["get", "get_user", "get_user_by_id"],
         "twins but for the case": ["getUser", "getuser"],
         "not from the training text": ["Zürich::météo", "x", "東京_天気.v2", "a b", "q" * 40]}


@pytest.mark.parametrize("p, expected", [
    ([0.7, 0.2, 0.1], 0.5),                             # the docstring's example
    ([0.1, 0.2, 0.7], 0.5),                             # the order does not matter,
    ([0.07, 0.02, 0.01], 0.5),                          # nor does a common factor
    ([0.3, 0.3, 0.0], 0.0), ([1e-30], 1.0), ([1.0, 0.0], 1.0)])
def test_softmax_difference_by_hand(p, expected):
    log_likelihoods = torch.tensor(p).log() - 2000      # exp(-2000) is 0: RSS does not underflow
    assert softmax_difference(log_likelihoods) == pytest.approx(expected, abs=1e-3)


def test_softmax_difference_is_that_of_relative_softmax_scoring():
    """p_n = exp(l_n - max_j l_j) / sum_k exp(l_k - max_j l_j), of any scores."""
    for scores in (3 * torch.randn(200, 7, generator=seeded("scores"))).tolist():
        weights = [math.exp(l - max(scores)) for l in scores]
        *_, second, first = sorted(weights)
        expected = (first - second) / sum(weights)
        assert softmax_difference(torch.tensor(scores)) == pytest.approx(expected, abs=1e-6)


MESSAGES = [{"role": "system", "content": "These tools: get_user, get_weather."},
            {"role": "user", "content": "What is the weather in Zürich?"}]


@pytest.fixture
def prompt(tokenizer) -> list[int]:
    system, rest = tokenizer.chat(MESSAGES)
    return system + rest


def score(model, tokenizer, prompt, names, begun=CALL_START, end='"', last: int = 1):
    """Twice over one cache, which scoring leaves as it was."""
    cache = PrefixCaches(model).read(prompt[:-last])
    first, second = (score_candidates(model, tokenizer, cache, prompt[-last:], names, begun, end)
                     for _ in range(2))
    assert torch.equal(first, second)
    return first


def plain_scores(model, tokenizer, prompt, names, begun=CALL_START, end='"') -> torch.Tensor:
    """The definition, by a full pass over prompt, answer start and name for each name: all tokens
    from where the names may part, then the name's end: any token that begins with it, or any that
    ends the turn."""
    texts = [tokenizer.encode(begun + name) for name in names]
    common = len(commonprefix([tokenizer.encode(begun), *texts]))
    ends = [i for i in range(512) if tokenizer.decode([i]).startswith(end)] if end else \
        [*map(tokenizer.bpe.token_to_id, ("<|im_end|>", "<|endoftext|>"))]
    assert end != '"' or {tokenizer.decode([i]) for i in ends} >= {'"', '",', '":'}
    scores = []
    for ids in texts:
        log_p = logits(model, [[*prompt, *ids]])[0, len(prompt) + common - 1:].log_softmax(-1)
        of_name = log_p[range(len(ids) - common), ids[common:]].sum()
        scores.append(of_name + log_p[-1, ends].exp().sum().log())
    return torch.stack(scores)


@pytest.mark.parametrize("begun, end", [
    (CALL_START, '"'), ('{"name": "', '"'), ('Sure, 東京: [{"name": "', '"'), ("f: ", "}"), ("", "")],
    ids=["tags", "no tags", "prose", "another end", "the turn ends"])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_scores_equal_a_full_pass_for_each_candidate(names, begun, end, model, tokenizer, prompt):
    """After the model's own first words, however much of the prompt is cached."""
    expected = plain_scores(model, tokenizer, prompt, names, begun, end)
    for last in (1, 20):
        scores = score(model, tokenizer, prompt, names, begun, end, last)
        assert scores.shape == (len(names),) and scores.dtype == torch.float32
        assert (scores - expected).abs().max() < 1e-4 and scores.max() < 0
    assert len(names) == 1 or expected.std() > 0.01         # else any mix-up of the names passes


def test_a_name_that_begins_with_punctuation_is_read_as_it_is_written(model, tokenizer, prompt):
    """Up to what all scores have in common: a quotation mark belongs to the first token of "-x"."""
    names = ["-x", "get_weather", "user"]
    start = tokenizer.encode(CALL_START)
    assert tokenizer.encode(CALL_START + "-x")[:len(start)] != start
    expected = plain_scores(model, tokenizer, prompt, names).log_softmax(-1)
    found = score(model, tokenizer, prompt, names).log_softmax(-1)
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("scope", ["full", "suffix", "answer"])
def test_what_is_cached_of_a_prompt_and_what_is_yet_to_be_read_are_the_prompt(
        scope, model, tokenizer):
    """Nothing is cached, the system turn, or all but the last token."""
    chats = [MESSAGES, [*MESSAGES, {"role": "assistant", "content": "It is"}]]
    caches, rests = PrefixCaches(model).split(tokenizer, chats, scope)
    assert len(caches) == (0 if scope == "full" else 2)
    for chat, cache, unread in zip(chats, caches or [None, None], rests, strict=True):
        system, rest = tokenizer.chat(chat)
        whole = system + rest
        known = {"full": 0, "suffix": len(system), "answer": len(whole) - 1}[scope]
        assert cache is None or cache.ids.tolist() == [whole[:known]]
        assert unread == whole[known:]
        assert torch.allclose(model([unread], cache), model([whole])[:, known:], atol=1e-5)


def test_a_prefix_is_read_once_and_its_forks_do_not_change_the_kept_one(model):
    caches, passes, rest = PrefixCaches(model), [], [[7, 8, 9]]
    expected = model([[*range(10), 7, 8, 9]])[:, 10:]
    model.register_forward_hook(lambda module, args, out: passes.append(len(args[0][0])))
    for _ in range(3):
        assert torch.allclose(model(rest, caches.read(range(10))), expected, atol=1e-5)
    assert passes == [10, 3, 3, 3] and caches.read(range(10)).length == 10


def test_what_h_has_read_of_x_is_not_read_again(model, tokenizer):
    """Nor are the tools, for another x."""
    caches, passes = PrefixCaches(model), []
    model.register_forward_hook(lambda module, args, out: passes.append(len(args[0][0])))
    other = [*MESSAGES[:-1], {"role": "user", "content": "Another request"}]
    (system, rest), (_, others) = tokenizer.chat(MESSAGES), tokenizer.chat(other)
    for chat in (MESSAGES, other, MESSAGES):
        (cache,), _ = caches.split(tokenizer, [chat], "answer")
        model([[7]], cache)                                         # extends a fork alone
    assert passes == [len(system), len(rest) - 1, 1, len(others) - 1, 1, 1]
    assert cache.ids.tolist() == [[*system, *rest[:-1], 7]]


def test_the_least_recently_read_prefix_is_dropped_first_and_the_last_one_never(model):
    one, passes = PrefixCaches(model, max_bytes=1), []
    cache = one.read(range(10))
    size = sum([t.nbytes for t in (*cache.keys, *cache.values)])
    two = PrefixCaches(model, max_bytes=2 * size)
    model.register_forward_hook(lambda module, args, out: passes.append(args[0][0][0]))
    for start in (0, 1, 0, 2, 0, 1):
        two.read(range(start, start + 10))
    assert passes == [0, 1, 2, 1] and len(two.caches) == 2
    assert one.read(range(10)).length == 10 and len(passes) == 4    # however small the bound
