"""uncertainty.py by hand-made cases, and against one full pass for each candidate."""
import math
from os.path import commonprefix

import pytest
import torch

from model import KVCache
from uncertainty import (ANSWER_START, PrefixCaches, answer_start, relative_softmax,
                         score_candidates, softmax_difference)

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
    log_likelihoods = torch.tensor(p).log()
    assert softmax_difference(log_likelihoods) == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(relative_softmax(log_likelihoods), torch.tensor(p) / sum(p))


def test_relative_softmax_does_not_underflow_where_the_probabilities_do():
    far = torch.tensor([-2000.0, -2000.0 - math.log(4), -9000.0])           # exp(-2000) is 0
    assert torch.allclose(relative_softmax(far), torch.tensor([0.8, 0.2, 0.0]), atol=1e-4)
    assert softmax_difference(far) == pytest.approx(0.6, abs=1e-4)


@pytest.fixture
def prompt(tokenizer) -> list[int]:
    return tokenizer.chat([{"role": "system", "content": "These tools: get_user, get_weather."},
                           {"role": "user", "content": "What is the weather in Zürich?"}])


def score(model, tokenizer, prompt, names, last: int = 1, begun=ANSWER_START) -> torch.Tensor:
    cache = KVCache()
    model(torch.tensor([prompt[:-last]]), cache)
    return score_candidates(model, tokenizer, cache, prompt[-last:], names, begun)


def plain_scores(model, tokenizer, prompt, names, begun=ANSWER_START) -> torch.Tensor:
    """The definition, by a full pass over prompt, answer start and name for each name: all tokens
    from where the names may part, then the name's end, any token that begins with `"`."""
    texts = [tokenizer.encode(begun + name) for name in names]
    common = len(commonprefix([tokenizer.encode(begun), *texts]))
    quotes = [i for i in range(512) if tokenizer.decode([i]).startswith('"')]
    scores = []
    for ids in texts:
        hidden = model(torch.tensor([[*prompt, *ids]]))[0, len(prompt) + common - 1:]
        log_p = model.logits(hidden).log_softmax(-1)
        of_name = log_p[range(len(ids) - common), ids[common:]].sum()
        scores.append(of_name + log_p[-1, quotes].exp().sum().log())
    return torch.stack(scores)


@pytest.mark.parametrize("text, start", [
    ('<tool_call>\n{"name": "get"}', ANSWER_START), ('{"name": "get"}', '{"name": "'),
    ('Sure:\n[{"tool" :"get", "name": "x"}]', 'Sure:\n[{"tool" :"'),
    ('[{"arguments": {"name": "Bob"}, "name": "get"}]', ANSWER_START),
    ('get(user={"name": "Bob"})', ANSWER_START), ("get(name='x')", ANSWER_START),
    ("I cannot.", ANSWER_START), ("", ANSWER_START)])
def test_scores_begin_where_the_direct_answer_names_its_tool(text, start):
    """With tags, without, and behind the tag where an answer names none."""
    assert answer_start(text) == start


@pytest.mark.parametrize("begun", ['{"name": "', 'Sure, 東京: [{"name": "'])
def test_scores_follow_the_models_own_first_words(begun, model, tokenizer, prompt):
    names = NAMES["a common beginning"]
    found = score(model, tokenizer, prompt, names, begun=begun)
    assert (found - plain_scores(model, tokenizer, prompt, names, begun)).abs().max() < 1e-4
    assert (found - score(model, tokenizer, prompt, names)).abs().max() > 1e-2


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_scores_equal_a_full_pass_for_each_candidate(names, model, tokenizer, prompt):
    expected = plain_scores(model, tokenizer, prompt, names)
    for last in (1, 20):
        scores = score(model, tokenizer, prompt, names, last)
        assert scores.shape == (len(names),) and scores.dtype == torch.float32
        assert (scores - expected).abs().max() < 1e-4 and scores.max() < 0
    assert len(names) == 1 or expected.std() > 0.01         # else any mix-up of the names passes


def test_a_name_that_begins_with_punctuation_is_read_as_it_is_written(model, tokenizer, prompt):
    """Up to what all scores have in common: a quotation mark belongs to the first token of "-x"."""
    names = ["-x", "get_weather", "user"]
    start = tokenizer.encode(ANSWER_START)
    assert tokenizer.encode(ANSWER_START + "-x")[:len(start)] != start
    expected = plain_scores(model, tokenizer, prompt, names).log_softmax(-1)
    found = score(model, tokenizer, prompt, names).log_softmax(-1)
    assert (found - expected).abs().max() < 1e-4


def test_scoring_leaves_the_prompts_cache_as_it_was(model, tokenizer, prompt):
    cache = KVCache()
    model(torch.tensor([prompt[:-1]]), cache)
    before = [t.clone() for t in (cache.ids, *cache.keys, *cache.values)]
    score_candidates(model, tokenizer, cache, prompt[-1:], ["get", "get_weather"])
    after = (cache.ids, *cache.keys, *cache.values)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_name_may_end_in_every_token_whose_text_begins_with_a_quotation_mark(tokenizer):
    quotes = [i for i in range(512) if tokenizer.decode([i]).startswith('"')]
    assert tokenizer.quotes == quotes
    assert {tokenizer.decode([i]) for i in quotes} >= {'"', '",', '":'}


def test_no_candidate_is_an_error_and_not_a_number(model, tokenizer, prompt):
    with pytest.raises(ValueError, match="no candidate"):
        softmax_difference(torch.empty(0))
    with pytest.raises(ValueError, match="no candidate"):
        score(model, tokenizer, prompt, [])


def test_a_prefix_is_read_once_and_its_forks_do_not_change_the_kept_one(model):
    caches, passes, rest = PrefixCaches(model), [], torch.tensor([[7, 8, 9]])
    expected = model(torch.tensor([[*range(10), 7, 8, 9]]))[:, 10:]
    model.register_forward_hook(lambda module, args, out: passes.append(args[0].shape[1]))
    for _ in range(3):
        assert torch.allclose(model(rest, caches.read(range(10))), expected, atol=1e-5)
    assert passes == [10, 3, 3, 3] and caches.read(range(10)).length == 10


def test_the_least_recently_read_prefix_is_dropped_first_and_the_last_one_never(model):
    one, passes = PrefixCaches(model, max_bytes=1), []
    one.read(range(10))
    two = PrefixCaches(model, max_bytes=2 * one.bytes())
    model.register_forward_hook(lambda module, args, out: passes.append(int(args[0][0, 0])))
    for start in (0, 1, 0, 2, 0, 1):
        two.read(range(start, start + 10))
    assert passes == [0, 1, 2, 1] and two.bytes() == two.max_bytes
    assert one.read(range(10)).length == 10 and len(passes) == 4    # however small the bound


def test_a_prefix_whose_reading_failed_is_not_kept(model):
    caches = PrefixCaches(model)
    with pytest.raises(IndexError):
        caches.read([1, 2, 9999])               # no such token
    assert not caches.caches
