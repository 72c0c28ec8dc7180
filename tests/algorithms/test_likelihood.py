"""Log-likelihoods of texts: exact ones against a softmax, bounds against enumerated masks."""

import itertools

import pytest
import torch
from strong_weights import strengthen

from dlm_fast import load
from dlm_fast.algorithms.likelihood import LikelihoodConfig, loglikelihood
from dlm_fast.ops import Visibility

SIZES = {"dtype": "float64", "width": 16, "layers": 2, "heads": 2}
CONTEXT, TEXT = torch.tensor([5, 17, 3, 9, 40]), torch.tensor([8, 21, 30])


def model(**options):
    return strengthen(load("tiny", **SIZES, **options), 0.3)


def bound_by_enumeration(policy, context, text, visibility):
    """E over l in 1..L, then over sets of l masked positions, of L/l times the masked tokens'
    log-probabilities: the definition of the bound, without an estimator."""
    length, total = text.numel(), 0.0
    for count in range(1, length + 1):
        sets = list(itertools.combinations(range(length), count))
        for masked in sets:
            ids = torch.cat([context, text])
            at = torch.tensor(masked) + context.numel()
            ids[at] = policy.family.mask_id
            logprob = policy.logits(ids, visibility(ids.numel())).log_softmax(-1)
            scored = logprob[at, text[list(masked)]].sum().item()
            total += length / count * scored / len(sets) / length
    return total


def test_causal_models_are_exact():
    policy = model(kind="causal")
    pairs = [(CONTEXT, TEXT), (CONTEXT[:1], TEXT[:1]), (CONTEXT, TEXT[:0]), (TEXT, CONTEXT)]
    found = loglikelihood(policy, pairs, LikelihoodConfig(batch=2))
    for (context, text), value in zip(pairs, found, strict=True):
        ids = torch.cat([context, text])[None]
        logprob = policy.logits(ids).log_softmax(-1)[0]
        at = torch.arange(context.numel(), ids.shape[1])
        assert value == pytest.approx(logprob[at, ids[0, at]].sum().item(), abs=1e-9)
    assert found[2] == 0.0


@pytest.mark.parametrize("shift", [0, 1])
def test_full_attention_gives_the_bound(shift):
    """4096 samples of three tokens: 1/3 of them have each number of masks; what is left is the
    choice of positions, whose spread the tolerance covers five times."""
    policy = model(logit_shift=shift)
    expected = bound_by_enumeration(policy, CONTEXT, TEXT, lambda n: Visibility.full([n]))
    config = LikelihoodConfig(num_samples=4096, batch=512)
    [found] = loglikelihood(policy, [(CONTEXT, TEXT)], config)
    spread = 3 * abs(expected) / 4096**0.5
    assert found == pytest.approx(expected, abs=spread)
    [other] = loglikelihood(policy, [(CONTEXT, TEXT)], LikelihoodConfig(num_samples=4096, seed=1))
    assert other != found and other == pytest.approx(expected, abs=spread)


def test_one_token_needs_no_luck():
    """A text of one token has one set of masks, so any number of samples gives its probability."""
    policy = model()
    text = TEXT[:1]
    expected = bound_by_enumeration(policy, CONTEXT, text, lambda n: Visibility.full([n]))
    [found] = loglikelihood(policy, [(CONTEXT, text)], LikelihoodConfig(num_samples=3))
    assert found == pytest.approx(expected, abs=1e-9)


def test_block_models_add_up_their_blocks():
    """Blocks of 4 from position 0: the text of 5 tokens behind 5 begins inside the second."""
    policy = model(kind="block", block_size=4)
    text = torch.tensor([8, 21, 30, 7, 11])
    ids = torch.cat([CONTEXT, text])
    parts = [(ids[:5], ids[5:8]), (ids[:8], ids[8:10])]
    expected = sum(
        bound_by_enumeration(policy, *part, lambda n: Visibility.block_causal([n], 4))
        for part in parts
    )
    config = LikelihoodConfig(num_samples=4096, batch=512)
    [found] = loglikelihood(policy, [(CONTEXT, text)], config)
    assert found == pytest.approx(expected, abs=3 * abs(expected) / 4096**0.5)


def test_a_block_ends_where_the_grid_does():
    """Seven tokens of context fill their second block but for one: the text's two tokens lie in
    two blocks, each with one set of masks, so their sum is exact."""
    policy = model(kind="block", block_size=4)
    ids = torch.tensor([5, 17, 3, 9, 40, 2, 6, 8, 21])
    expected = sum(
        bound_by_enumeration(policy, ids[:a], ids[a:b], lambda n: Visibility.block_causal([n], 4))
        for a, b in ((7, 8), (8, 9))
    )
    [found] = loglikelihood(policy, [(ids[:7], ids[7:])], LikelihoodConfig(num_samples=2))
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("options", [{}, {"kind": "block"}, {"kind": "causal"}])
def test_company_and_batch_change_nothing(options):
    policy = model(**options)
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randint(0, 90, (4 + i % 3,), generator=generator), torch.arange(3 + i, 6 + 2 * i))
        for i in range(5)
    ]
    alone = [loglikelihood(policy, [p], LikelihoodConfig(num_samples=6, batch=4)) for p in pairs]
    for batch in (1, 5, 64):
        config = LikelihoodConfig(num_samples=6, batch=batch)
        found = loglikelihood(policy, list(reversed(pairs)), config)
        assert list(reversed(found)) == pytest.approx([value for [value] in alone], abs=1e-9)


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"likelihood\.num_samples must be at least 1"):
        LikelihoodConfig(num_samples=0)
