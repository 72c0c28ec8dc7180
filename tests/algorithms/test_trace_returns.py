"""Returns and advantages of steps that reveal several tokens: oracle T6 and its identities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast.algorithms.trace_returns import outcome_rewards, step_returns

STEP = torch.tensor([1, 2, 1, 3, 3])
VALUE = torch.tensor([0.2, 0.5, 0.4, 0.6, 0.8])
ONE = torch.zeros(5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("gamma", "lam", "reward", "returns", "advantages"),
    [
        (1, 1, [0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0.8, 0.5, 0.6, 0.4, 0.2]),
        (1, 0, [0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0.3, 0.2, 0.1, 0.4, 0.2]),
        (
            0.9, 0.5, [0, 0, 0, 1, 1],
            [0.81, 0.9, 0.81, 1, 1], [0.36925, 0.265, 0.16925, 0.4, 0.2],
        ),
        (
            0.9, 0.5, [0, -1, 0, 1, 0.5],
            [-0.2925, -0.325, -0.2925, 1, 0.5], [-0.131375, -0.8475, -0.331375, 0.4, -0.3],
        ),
    ],
)  # fmt: skip
def test_oracle(gamma, lam, reward, returns, advantages):
    found = step_returns(ONE, STEP, torch.tensor(reward), VALUE, gamma, lam)
    expected = torch.tensor(returns, dtype=torch.float64)
    assert torch.allclose(found.returns, expected, atol=1e-7)
    expected = torch.tensor(advantages, dtype=torch.float64)
    assert torch.allclose(found.advantages, expected, atol=1e-7)


def test_outcomes_lie_on_the_last_step():
    sequence = torch.tensor([0, 0, 1, 1, 1])
    step = torch.tensor([2, 1, 4, 4, 3])
    found = outcome_rewards(sequence, step, torch.tensor([0.5, -2.0, 7.0]))
    assert found.tolist() == [0.5, 0, -2, -2, 0]


def definition(sequence, step, reward, value, gamma, lam):
    """The recursion, one sequence and one step at a time."""
    returns, advantages = torch.zeros(len(step)).double(), torch.zeros(len(step)).double()
    for own in sequence.unique().tolist():
        next_return = next_value = next_advantage = 0.0
        for t in sorted(step[sequence == own].unique().tolist(), reverse=True):
            members = (sequence == own) & (step == t)
            r, v = reward[members], value[members]
            returns[members] = r + gamma * next_return
            advantages[members] = (r - v) + gamma * next_value + gamma * lam * next_advantage
            delta = r.mean() - v.mean() + gamma * next_value
            next_advantage = delta + gamma * lam * next_advantage
            next_return, next_value = r.mean() + gamma * next_return, v.mean()
    return returns, advantages


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.sampled_from([0.0, 0.7, 1.0]),
    st.sampled_from([0.0, 0.95, 1.0]),
    st.integers(0, 1000),
)
def test_equals_the_recursion(sequence, gamma, lam, seed):
    sequence = torch.tensor(sequence, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(1, 30, sequence.shape, generator=generator)
    reward, value = torch.randn(2, len(sequence), generator=generator, dtype=torch.float64)
    found = step_returns(sequence, step, reward, value, gamma, lam)
    returns, advantages = definition(sequence, step, reward, value, gamma, lam)
    assert torch.allclose(found.returns, returns) and torch.allclose(found.advantages, advantages)
    if gamma == lam == 1:
        assert torch.allclose(found.advantages, found.returns - value)


def test_many_steps():
    count = 5000
    sequence, step = torch.zeros(count), torch.arange(count)
    reward, value = torch.randn(2, count, dtype=torch.float64)
    found = step_returns(sequence, step, reward, value, 1.0, 1.0)
    assert torch.allclose(found.returns, reward.flip(0).cumsum(0).flip(0))


def test_no_tokens_and_wrong_discounts():
    empty = torch.zeros(0)
    assert step_returns(empty, empty, empty, empty, 1.0, 1.0).returns.shape == (0,)
    with pytest.raises(ValueError, match="must lie in"):
        step_returns(empty, empty, empty, empty, 1.5, 1.0)
