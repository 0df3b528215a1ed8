"""uncertainty.py by hand-made cases, and its shared, cached, batched scoring against one full pass for each candidate."""
import math

import pytest
import torch

from uncertainty import ANSWER_START, relative_softmax, score_candidates, softmax_difference

NAMES = {
    "one name": ["get_weather"],
    "no common beginning": ["get_weather", "user", "Look"],
    "a common beginning": ["get_user_by_id", "get_user_by_name", "get_user_weather"],
    "one the beginning of the others": ["get", "get_user", "get_user_by_id"],
    "twins but for the case": ["getUser", "getuser"],
    "not from the training text": ["Zürich::météo", "x", "東京_天気.v2", "a b", "q" * 40],
    "many names": [f"get_{a}{b}" for a in ("user", "weather", "", "x") for b in ("", "_by_id", "_2", "_days_of_the_week")],
}


# -------------------------------------------------------------------------------------------- from scores to a margin

def test_relative_softmax_by_hand():
    assert torch.allclose(relative_softmax(torch.tensor([0.7, 0.2, 0.1]).log()), torch.tensor([0.7, 0.2, 0.1]))
    assert torch.allclose(relative_softmax(torch.tensor([0.0, -math.log(3)])), torch.tensor([0.75, 0.25]))
    assert torch.equal(relative_softmax(torch.tensor([-5.0])), torch.ones(1))


def test_relative_softmax_does_not_underflow_where_the_probabilities_do():
    far = torch.tensor([-2000.0, -2000.0 - math.log(4), -9000.0])           # exp(-2000) is 0 in any float
    assert far.exp().sum() == 0 and torch.allclose(relative_softmax(far), torch.tensor([0.8, 0.2, 0.0]), atol=1e-4)
    assert softmax_difference(far) == pytest.approx(0.6, abs=1e-4)
    impossible = torch.tensor([-1.0, -math.inf])
    assert relative_softmax(impossible).tolist() == [1, 0] and softmax_difference(impossible) == 1


@pytest.mark.parametrize("scores, expected", [
    (torch.tensor([0.7, 0.2, 0.1]).log(), 0.5),                             # the docstring's own example
    (torch.tensor([0.1, 0.2, 0.7]).log(), 0.5),                             # the order does not matter
    (torch.tensor([0.07, 0.02, 0.01]).log(), 0.5),                          # nor does a common factor
    (torch.tensor([-3.0, -3.0]), 0.0), (torch.tensor([-3.0, -3.0, -50.0]), 0.0),
    (torch.tensor([-700.0]), 1.0), (torch.tensor([0.0, -1000.0]), 1.0),
])
def test_softmax_difference_by_hand(scores, expected):
    assert softmax_difference(scores) == pytest.approx(expected, abs=1e-6)
    assert isinstance(softmax_difference(scores), float) and 0 <= softmax_difference(scores) <= 1


def test_no_candidate_is_an_error_and_not_a_number():
    with pytest.raises(ValueError, match="no candidate"):
        softmax_difference(torch.empty(0))


# ------------------------------------------------------------------------------------------------- scoring candidates

@pytest.fixture
def prompt(tokenizer) -> list[int]:
    return tokenizer.chat([{"role": "system", "content": "You can use these tools: get_user_by_id, get_weather."},
                           {"role": "user", "content": "What is the weather in Zürich?"}])


def read(model, ids):
    cache = model.new_cache()
    with torch.no_grad():
        model(torch.tensor([ids]), cache)
    return cache


def begins_with_a_quote(tokenizer) -> torch.Tensor:
    """Which ids decode to text that begins with a quotation mark, found the slow way."""
    return torch.tensor([tokenizer.decode([i]).startswith('"') for i in range(512)])


@torch.no_grad()
def plain_scores(model, tokenizer, prompt, names) -> torch.Tensor:
    """The definition: for each name one full pass over prompt, answer start and name; then the name's tokens and its end."""
    quotes, scores = begins_with_a_quote(tokenizer), []
    for name in names:
        start, name_ids = [*prompt, *tokenizer.encode(ANSWER_START)], tokenizer.encode(name)
        log_p = model.logits(model(torch.tensor([start + name_ids]))).log_softmax(-1)[0, len(start) - 1:]
        score = sum(log_p[i, token] for i, token in enumerate(name_ids))
        scores.append(score + log_p[-1, quotes].exp().sum().log())
    return torch.stack(scores)


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("split", [1, 20], ids=["one last token", "a long rest"])
def test_scores_equal_a_full_pass_for_each_candidate(names, split, model, tokenizer, prompt):
    scores = score_candidates(model, tokenizer, read(model, prompt[:-split]), prompt[-split:], names)
    expected = plain_scores(model, tokenizer, prompt, names)
    assert scores.shape == (len(names),) and scores.dtype == torch.float32 and scores.device.type == "cpu"
    assert (scores - expected).abs().max() < 1e-4 and scores.max() < 0
    assert len(names) == 1 or scores.std() > 0.01                           # else any mix-up of the names would pass


def test_the_cases_do_share_beginnings_in_tokens(tokenizer):
    """The cases above are the ones that their names say, as long as the tokenizer cuts them so."""
    first, second, third = (tokenizer.encode(name) for name in NAMES["one the beginning of the others"])
    assert second[:len(first)] == first and third[:len(second)] == second
    common = [tokenizer.encode(name) for name in NAMES["a common beginning"]]
    assert len({tuple(ids[:2]) for ids in common}) == 1 and len({tuple(ids) for ids in common}) == 3


def test_the_prompts_cache_is_left_as_it_was(model, tokenizer, prompt):
    cache = read(model, prompt[:-3])
    tensors = [t.clone() for t in cache.keys + cache.values]
    first = score_candidates(model, tokenizer, cache, prompt[-3:], NAMES["a common beginning"])
    assert cache.length == len(prompt) - 3 and not cache.holes and cache.valid.all()
    assert all(torch.equal(a, b) for a, b in zip(tensors, cache.keys + cache.values))
    assert torch.equal(first, score_candidates(model, tokenizer, cache, prompt[-3:], NAMES["a common beginning"]))


def test_a_score_depends_on_neither_the_order_nor_the_other_names(model, tokenizer, prompt):
    names, cache, last = NAMES["many names"], read(model, prompt[:-1]), prompt[-1:]
    scores = dict(zip(names, score_candidates(model, tokenizer, cache, last, names).tolist()))
    for some in (names[::-1], names[3:5], names[7:8], names[2:9] + ["something_else_altogether"]):
        for name, score in zip(some, score_candidates(model, tokenizer, cache, last, some).tolist()):
            assert name not in scores or abs(score - scores[name]) < 1e-4, name


def test_a_name_does_not_win_for_being_the_beginning_of_another(model, tokenizer, prompt):
    """P(get") + P(get_user") cannot exceed P(get): the ends of the names divide what their beginning has."""
    short, long = score_candidates(model, tokenizer, read(model, prompt[:-1]), prompt[-1:], ["get", "get_user"]).exp()
    ids = tokenizer.encode("get")
    start = torch.tensor([[*prompt, *tokenizer.encode(ANSWER_START), *ids]])
    with torch.no_grad():
        log_p = model.logits(model(start)).log_softmax(-1)[0, -1 - len(ids):-1]
    beginning = log_p[range(len(ids)), ids].sum().exp()
    assert 0 < short < beginning and 0 < short + long < beginning


@pytest.mark.parametrize("name", ["get_weather", "user", "Zürich"])
def test_the_ids_scored_are_those_of_the_joined_text(name, tokenizer):
    """Ids are joined, not strings; at our template's boundaries both give the same."""
    parts = tokenizer.encode(ANSWER_START) + tokenizer.encode(name)
    assert parts == tokenizer.encode(ANSWER_START + name)
    whole = tokenizer.encode(f'{ANSWER_START}{name}", "arguments"')
    assert whole[:len(parts)] == parts and whole[len(parts)] in tokenizer.quotes


def test_the_closing_tokens_are_those_whose_text_begins_with_a_quotation_mark(tokenizer):
    ids = tokenizer.quotes
    assert ids == begins_with_a_quote(tokenizer).nonzero().flatten().tolist()
    assert len(ids) > 3 and {tokenizer.decode([i]) for i in ids} >= {'"', '",', '":'}


def test_no_name_to_score_is_an_error(model, tokenizer, prompt):
    with pytest.raises(ValueError, match="no candidate"):
        score_candidates(model, tokenizer, read(model, prompt[:-1]), prompt[-1:], [])
