"""Generation: greedy and filtered as transformers does it, the cache exact, draws a function of (seed, number).

python -m pytest tests/test_generate.py      (with MINIFT_ASSETS=../shared also on really trained weights)
"""

import itertools

import pytest
import torch
from helpers import peer, random_ids, sequence
from transformers import GPT2LMHeadModel, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import minift
from minift.data.batch import pack
from minift.errors import InputError
from minift.generation import Sampling, choose, continuation, dice, probabilities
from minift.models.gpt2 import Past

GREEDY = Sampling()
UNTIED = dict(tie_word_embeddings=False)  # a random model with a tied head says its last token again and again
GPTS = {
    "base": {},
    "one layer": dict(n_layer=1),
    "head size 7": dict(n_embd=21, n_head=3),
    "one head": dict(n_head=1),
    "tied": dict(tie_word_embeddings=True),
    "inverse layer index": dict(scale_attn_by_inverse_layer_idx=True, n_layer=3),
    "no scale": dict(scale_attn_weights=False),
}


@pytest.fixture
def small(tmp_path):
    """A random GPT-2 of ours that reads 40 tokens."""
    peer(GPT2LMHeadModel, tmp_path)
    return minift.load(tmp_path, task="complete")[0]


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 17, 39])
@pytest.mark.parametrize("changes", GPTS.values(), ids=GPTS.keys())
def test_greedy_is_transformers(changes, length, tmp_path):
    """Token by token until the context is full, then up to a token of those as the stop."""
    theirs = peer(GPT2LMHeadModel, tmp_path, scale=0.5, eos_token_id=None, **UNTIED | changes)
    model, _ = minift.load(tmp_path, task="complete")
    (ids,) = random_ids([length], seed=length)
    prompt = torch.tensor([ids])
    how = dict(do_sample=False, max_new_tokens=41 - length, pad_token_id=0, attention_mask=torch.ones_like(prompt))

    want = theirs.generate(prompt, **how)[0, length:].tolist()
    assert len(want) == 41 - length
    assert theirs.config.tie_word_embeddings or len(set(want)) > len(want) // 8  # repetitions would test little
    assert continuation(model, ids, 100, GREEDY) == want

    stop = want[len(want) // 2]
    stopped = theirs.generate(prompt, eos_token_id=stop, **how)[0, length:].tolist()
    assert stopped[-1] == stop and continuation(model, ids, 100, GREEDY, [stop]) == stopped[:-1]


@pytest.mark.parametrize("changes", GPTS.values(), ids=GPTS.keys())
@torch.no_grad()
def test_the_cache_changes_nothing(changes, tmp_path):
    """One forward for all tokens, beside a prompt, single tokens and several at once over a cache."""
    peer(GPT2LMHeadModel, tmp_path, **UNTIED | changes)
    model, _ = minift.load(tmp_path, task="complete")
    (ids,) = random_ids([40])
    want, found = model.logits(pack([sequence(0, ids)])), []
    cache = [Past(40) for _ in model.body.h]
    for start, end in itertools.pairwise([0, 9, 10, 11, 12, 19, *range(20, 41)]):
        batch = pack([sequence(0, ids[start:end], rows=sorted({0, end - start - 1}))])
        found.append((model.head.out(model.body(batch, cache=cache)), start + batch.rows))
    for z, at in found:
        assert (z - want[at]).abs().max() <= 1e-5


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 50, 500])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_filters_are_transformers(temperature, top_k, top_p):
    logits = 3 * torch.randn(4, 211, generator=torch.Generator().manual_seed(1))
    want = TemperatureLogitsWarper(temperature)(None, logits)
    want = TopKLogitsWarper(top_k)(None, want) if top_k else want
    want = TopPLogitsWarper(top_p)(None, want) if top_p < 1 else want
    for z, w in zip(logits, want.softmax(-1), strict=True):
        before, p = z.clone(), probabilities(z, Sampling(temperature, top_k, top_p))
        assert torch.equal(p > 0, w > 0) and (p - w).abs().max() <= 1e-6
        assert torch.equal(z, before)


def test_filters_on_known_numbers():
    """0.5, 0.25, 0.15, 0.1: a k or p that ends at, or just past, a token."""
    z = torch.tensor([0.25, 0.1, 0.5, 0.15]).log()
    for sampling, kept in (
        (Sampling(1, top_k=1), [2]),
        (Sampling(1, top_k=3), [0, 2, 3]),
        (Sampling(1, top_p=0.4), [2]),
        (Sampling(1, top_p=0.6), [0, 2]),
        (Sampling(1, top_p=0.8), [0, 2, 3]),
        (Sampling(1, top_k=2, top_p=0.6), [2]),  # of what top-k left, 2 has two thirds
        (Sampling(0.5, top_p=0.7), [2]),  # squared, 2 has 0.72
        (Sampling(1, top_p=0), [2]),
    ):
        assert probabilities(z, sampling).nonzero().flatten().tolist() == kept, sampling
    tied = torch.tensor([1.0, 2.0, 2.0, 0.0])
    assert probabilities(tied, Sampling(1, top_k=1)).tolist() == [0, 0.5, 0.5, 0]


@pytest.mark.slow
def test_draws_follow_the_probabilities():
    """Pearson's chi-square of 4,000 draws, 7 degrees of freedom: above 30 once in 10,000 seeds.

    From one generator (a long text), and the first of 4,000 (many prompts).
    """
    z, sampling = torch.randn(10, generator=torch.Generator().manual_seed(0)), Sampling(1.3, top_k=8)
    p, n = probabilities(z, sampling), 4000
    one = dice(0, 0)
    for draws in (
        [choose(z, sampling, one) for _ in range(n)],
        [choose(z, sampling, dice(0, number)) for number in range(n)],
        [choose(z, sampling, dice(seed, 0)) for seed in range(n)],
    ):
        counts = torch.tensor(draws).bincount(minlength=10)
        assert counts[p == 0].sum() == 0
        assert ((counts - n * p) ** 2 / (n * p))[p > 0].sum() < 30


def test_draws_depend_on_seed_and_number_alone(small):
    def draw(seed=0, number=0):
        return continuation(small, [5, 6, 7], 20, Sampling(1.0, seed=seed), number=number)

    before = torch.get_rng_state()
    first = draw()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert draw() == first
    texts = [first, draw(1), draw(2**32), draw(0, 1), draw(1, 1)]
    assert len(set(map(tuple, texts))) == len(texts)
    greedy = continuation(small, [5, 6, 7], 20, GREEDY)
    assert continuation(small, [5, 6, 7], 20, Sampling(5.0, top_k=1, seed=3)) == greedy != first


def test_limits(small):
    """A model that reads 40 tokens says 2 after a prompt of 39: one after it, one after the 40th."""
    assert len(continuation(small, [1] * 39, 100, GREEDY)) == 2
    assert len(continuation(small, [1] * 39, 1, GREEDY)) == 1
    assert continuation(small, [1], 0, GREEDY) == []
    assert continuation(small, [1, 2], 7, GREEDY) == continuation(small, [1, 2], 40, GREEDY)[:7]
    first = continuation(small, [1, 2], 1, GREEDY)[0]
    assert continuation(small, [1, 2], 9, GREEDY, [first]) == []
    small.train()  # no dropout, no gradients, and the mode as it was
    assert continuation(small, [1, 2], 1, GREEDY) == [first] and small.training
    assert all(p.grad is None and not p.is_inference() for p in small.parameters())


@pytest.mark.parametrize("ids", [[], [1] * 40, [1] * 41])
def test_a_prompt_that_leaves_no_room(ids, small):
    with pytest.raises(InputError, match=f"prompt 3 has {len(ids)} tokens; expected 1 to 39"):
        continuation(small, ids, 5, GREEDY, number=3)


@pytest.mark.parametrize("wrong", [dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=-1), dict(top_p=2)])
def test_wrong_sampling(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} (is )?{next(iter(wrong.values()))}"):
        Sampling(**wrong)


@pytest.mark.slow
def test_gpt_nano_sorts(assets):
    """Every ninth of the 729 inputs of six letters."""
    model, _ = minift.load(assets / "weights/gpt-nano-sort/hf", task="complete")
    for letters in list(itertools.product(range(3), repeat=6))[::9]:
        assert continuation(model, list(letters), 6, GREEDY) == sorted(letters)
