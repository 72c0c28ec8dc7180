"""GradAccumulator: sums, clipping and statistics against an explicit stack of gradients."""

from __future__ import annotations

import math

import pytest
import torch
from head_problems import problem, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dlm_fast.ops import GradAccumulator, weighted_logprob, weighted_logprob_

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def parameters(dtype=torch.float32, shapes=((5, 7), (3,), (2, 70))):
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def stack_of(count, params, seed=0, mean=0.3):
    """[K, P] gradients of all parameters, flattened."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(p.numel() for p in params)
    return mean + torch.randn(count, size, generator=generator).double()


def give(params, flat):
    for param, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        param.grad = part.view_as(param).to(param.dtype)


def add_all(accumulator, params, stack, scales=None):
    for k, flat in enumerate(stack):
        give(params, flat)
        accumulator.add(*([] if scales is None else [float(scales[k])]))
    return torch.cat([main.flatten().double() for main in accumulator.main_grads])


def rounded(stack, dtype):
    return stack.to(dtype).double()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_moments_of_an_explicit_stack(dtype):
    params = parameters(dtype)
    stack = rounded(stack_of(12, params), dtype)
    accumulator = GradAccumulator(params)
    main = add_all(accumulator, params, stack)
    assert relative_error(main, stack.sum(0)) < 1e-6
    assert all(p.grad is None for p in params) and accumulator.count == 12
    found = accumulator.statistics()
    mean, variance = stack.mean(0), float(stack.var(0).sum())
    exact = pytest.approx
    assert found.count == 12 and found.clip_fraction == 0
    assert torch.allclose(found.norms, stack.norm(dim=1), rtol=1e-9)
    assert found.variance == exact(variance, rel=1e-6)
    assert found.mean_norm == exact(float(mean.norm()), rel=1e-6)
    assert found.noise_scale == exact(variance / float(mean.square().sum()), rel=1e-5)
    pairs = stack @ stack.t()
    off = (float(pairs.sum()) - float(pairs.trace())) / (12 * 11)
    assert found.mean_square == exact(off, rel=1e-5)
    before = stack.cumsum(0)[:-1]
    cosines = torch.nn.functional.cosine_similarity(stack[1:], before)
    assert math.isnan(found.cosines[0])
    assert torch.allclose(found.cosines[1:], cosines, atol=1e-6)


def test_unequal_scales():
    """Weighted mean and the unbiased weighted variance, from the explicit stack."""
    params = parameters()
    stack = rounded(stack_of(9, params), torch.float32)
    c = torch.tensor([0.0, 0.5, 1, 2, 3, 0.1, 0.2, 0.7, 1.5]).double()
    accumulator = GradAccumulator(params)
    main = add_all(accumulator, params, stack, c)
    assert relative_error(main, c @ stack) < 1e-6
    found = accumulator.statistics()
    mean = c @ stack / c.sum()
    spread = float((c * (stack - mean).square().sum(1)).sum())
    assert found.variance == pytest.approx(spread / float(c.sum() - (c**2).sum() / c.sum()), 1e-6)
    assert found.mean_norm == pytest.approx(float(mean.norm()), 1e-6)
    gram = (c[:, None] * stack) @ (c[:, None] * stack).t()
    off = float(gram.sum() - gram.trace()) / float(c.sum() ** 2 - (c**2).sum())
    # two unbiased estimates of the same number: equal weights make them one
    assert found.mean_square == pytest.approx(off, rel=0.2)


def test_the_weighted_moments_are_unbiased():
    """Averages over 1000 draws of three samples with unequal scales: a unit covariance in 4
    dimensions and a mean of known size."""
    param = nn.Parameter(torch.zeros(4))
    mean = torch.tensor([1.0, 0, -1, 0.5])
    accumulator = GradAccumulator([param])
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(1000):
        accumulator.zero()
        for scale in (0.5, 1.0, 2.5):
            param.grad = mean + torch.randn(4, generator=generator)
            accumulator.add(scale)
        statistics = accumulator.statistics()
        found.append((statistics.variance, statistics.mean_square))
    values = torch.tensor(found, dtype=torch.float64)
    error = values.std(0) / math.sqrt(1000)
    truth = torch.tensor([4.0, float(mean.square().sum())])
    assert bool(((values.mean(0) - truth).abs() < 4 * error).all())


def test_bias_of_an_estimator_from_paired_half_samples():
    """The mean of exp(a mean) over n draws has a bias of 1/n; the halves' estimates have twice of
    it. A sample is half of both halves' gradients less the whole's: mean_square is bias squared."""
    generator = torch.Generator().manual_seed(2)
    theta = nn.Parameter(torch.tensor([0.3]))
    accumulator = GradAccumulator([theta])
    count, n = 20000, 8
    theta_K = torch.full((count,), 0.3, requires_grad=True)
    x_Kn = torch.randn(count, n, generator=generator)
    whole_K = (theta_K * x_Kn.mean(1)).exp()
    halves_K = [(theta_K * half_Kn.mean(1)).exp() for half_Kn in x_Kn.chunk(2, dim=1)]
    ((halves_K[0] + halves_K[1]) / 2 - whole_K).sum().backward()
    for gradient in theta_K.grad.split(1):
        theta.grad = gradient
        accumulator.add()

    def expected(n):  # derivative of E exp(theta * mean of n standard normal numbers)
        return 0.3 / n * math.exp(0.09 / (2 * n))

    bias = expected(n / 2) - expected(n)
    assert accumulator.statistics().mean_square == pytest.approx(bias**2, rel=0.2)


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 6),
    dtype=st.sampled_from(FLOATS),
    clip=st.sampled_from([None, 1.0, 14.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_clipped_sums(count, dtype, clip, seed):
    params = parameters(dtype)
    stack = rounded(stack_of(count, params, seed), dtype)
    scales = torch.rand(count, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    accumulator = GradAccumulator(params, per_sample_clip=clip)
    main = add_all(accumulator, params, stack, scales)
    norms = stack.norm(dim=1)
    factors = torch.ones_like(norms) if clip is None else (clip / norms).clamp(max=1)
    clipped = factors[:, None] * stack
    assert relative_error(main, scales @ clipped) < 1e-6
    found = accumulator.statistics()
    assert torch.allclose(found.norms, norms, rtol=1e-9)
    assert torch.allclose(found.clip_factors, factors, rtol=1e-9)
    assert found.clip_fraction == float((factors < 1).double().mean())
    if count > 1:
        mean = scales @ clipped / scales.sum()
        spread = float((scales * (clipped - mean).square().sum(1)).sum())
        rest = float(scales.sum() - scales.square().sum() / scales.sum())
        assert found.variance == pytest.approx(spread / rest, rel=1e-5, abs=1e-9)
    else:
        assert math.isnan(found.variance) and math.isnan(found.noise_scale)


def test_micro_steps_equal_one_call():
    """A loss over 64 rows at once, and as 8 micro-batches of 8."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 20), torch.randn(64, 3)

    def model():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))

    whole, parts = model(), model()
    (whole(x) - y).square().sum().backward()
    accumulator = GradAccumulator(parts.parameters())
    for start in range(0, 64, 8):
        (parts(x[start : start + 8]) - y[start : start + 8]).square().sum().backward()
        accumulator.add()
    accumulator.assign_grads()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert relative_error(b.grad, a.grad) < 1e-6


def test_16_bit_gradients_keep_small_contributions():
    """2048 equal contributions to bfloat16 parameters: their own .grad would stop growing."""
    (param,) = parameters(torch.bfloat16, [(100,)])
    accumulator = GradAccumulator([param], statistics=False)
    once = torch.full((100,), 2.0**-10).bfloat16()
    own = torch.ones(100).bfloat16()
    param.grad = torch.ones_like(param)
    accumulator.add()
    for _ in range(2048):
        own += once
        param.grad = once.clone()
        accumulator.add()
    accumulator.assign_grads()
    assert param.grad.dtype == torch.bfloat16 and (param.grad == 3).all() and (own == 1).all()


def test_bfloat16_main_gradients():
    params = parameters(shapes=[(40, 50)])
    stack = stack_of(256, params, mean=0.05)
    accumulators = [
        GradAccumulator(params, main_dtype=torch.bfloat16, seed=seed) for seed in (1, 1, 2)
    ]
    mains = [add_all(accumulator, params, stack) for accumulator in accumulators]
    assert torch.equal(mains[0], mains[1]) and not torch.equal(mains[0], mains[2])
    truth = stack.sum(0)
    assert relative_error(mains[0], truth) < 5e-2
    # no systematic shrink: the projection on the truth
    assert float(mains[0] @ truth / (truth @ truth)) == pytest.approx(1, abs=3e-3)


def head_and_backbone(count=3):
    p = problem(30, 12, 40)
    backbone = nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    head = nn.Parameter(p.weight.clone())
    weights = torch.randn(count, 30, generator=torch.Generator().manual_seed(4))
    return p, backbone, head, weights


@pytest.mark.parametrize("clip", [None, 2.0])
def test_a_head_in_place(clip):
    """The head's gradient added by the raw op with its norm told, against autograd's own."""
    p, backbone, head, weights = head_and_backbone()
    by_autograd = GradAccumulator([backbone, head], per_sample_clip=clip)
    for row_weight in weights:
        score = weighted_logprob(p.hidden, head, p.targets, row_weight, rows=p.rows)
        (score.objective + (backbone * row_weight[:5]).sum()).backward()
        by_autograd.add(0.5)
    in_place = GradAccumulator([backbone, head], per_sample_clip=clip)
    for row_weight in weights:
        (backbone * row_weight[:5]).sum().backward()
        own = torch.zeros_like(head.data)
        call = (p.hidden, head.detach(), p.targets, row_weight)
        weighted_logprob_(*call, rows=p.rows, weight_grad=own)
        square = own.double().square().sum()
        alpha = 0.5 * in_place.clip_factor(square)
        weighted_logprob_(*call, rows=p.rows, weight_grad=in_place.buffer(head), alpha=alpha)
        in_place.accumulated(head, square)
        in_place.add(0.5)
    for ours, truth in zip(in_place.main_grads, by_autograd.main_grads, strict=True):
        assert relative_error(ours, truth) < 1e-6
    ours, truth = in_place.statistics(), by_autograd.statistics()
    assert torch.allclose(ours.norms, truth.norms, rtol=1e-6)
    assert torch.allclose(ours.clip_factors, truth.clip_factors, rtol=1e-6)
    assert (clip is not None) == (ours.clip_fraction > 0)
    assert ours.variance == pytest.approx(truth.variance, rel=1e-5)
    assert ours.mean_square == pytest.approx(truth.mean_square, rel=1e-4, abs=1e-5)


def test_tied_weights():
    """One parameter as embedding and head: sums are right, norms are refused."""
    p, _, head, weights = head_and_backbone()
    plain = GradAccumulator([head], statistics=False)
    expected = torch.zeros_like(head.data)
    for row_weight in weights:
        head.square().sum().backward()
        expected += head.grad
        for buffer in (plain.buffer(head), expected):
            weighted_logprob_(
                p.hidden, head.detach(), p.targets, row_weight, rows=p.rows, weight_grad=buffer
            )
        plain.accumulated(head)
        plain.add()
    assert torch.allclose(plain.main_grads[0], expected, atol=1e-5)
    for options in ({}, {"statistics": False, "per_sample_clip": 1.0}):
        strict = GradAccumulator([head], **options)
        head.square().sum().backward()
        strict.accumulated(head, 1.0)
        with pytest.raises(ValueError, match="tied to the head"):
            strict.add()
        with pytest.raises(ValueError, match="needs square_norm"):
            strict.accumulated(head)


def test_assign_zero_and_again():
    params = parameters()
    accumulator = GradAccumulator(params)
    stack = stack_of(2, params)
    add_all(accumulator, params, stack)
    accumulator.assign_grads()
    assert params[0].grad.data_ptr() == accumulator.main_grads[0].data_ptr()
    with pytest.raises(ValueError, match="main gradient itself"):
        accumulator.add()
    accumulator.zero()
    assert all(p.grad is None for p in params) and accumulator.count == 0
    assert accumulator.statistics().count == 0 and math.isnan(accumulator.statistics().variance)
    assert relative_error(add_all(accumulator, params, stack[:1]), stack[0]) < 1e-6


def test_some_parameters_without_gradient():
    params = parameters()
    accumulator = GradAccumulator(params)
    params[1].grad = torch.ones(3)
    accumulator.add()
    assert [float(m.sum()) for m in accumulator.main_grads] == [0, 3, 0]
    assert accumulator.statistics().norms.item() == pytest.approx(math.sqrt(3))


def test_wrong_use():
    params = parameters()
    with pytest.raises(ValueError, match=r"call backward\(\) before"):
        GradAccumulator(params).add()
    for clip in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="per_sample_clip"):
            GradAccumulator(params, per_sample_clip=clip)
    with pytest.raises(TypeError, match="main_dtype"):
        GradAccumulator(params, main_dtype=torch.float16)
    with pytest.raises(TypeError, match="parameter 0 must be a real tensor"):
        GradAccumulator([torch.zeros(3, dtype=torch.int64)])
    with pytest.raises(ValueError, match="not a leaf"):
        GradAccumulator([params[0] * 2])
    with pytest.raises(ValueError, match="not among those"):
        GradAccumulator(params).buffer(nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match="statistics=False"):
        GradAccumulator(params, statistics=False).statistics()
    accumulator = GradAccumulator(params)
    add_all(accumulator, params, stack_of(2, params), [1.0, -1.0])
    with pytest.raises(ValueError, match="both signs"):
        accumulator.statistics()
    with pytest.raises(ValueError, match="one way per zero"):
        accumulator.accumulated(params[0], 1.0)


def test_a_shared_parameter_is_taken_once():
    (param,) = parameters(shapes=[(4,)])
    accumulator = GradAccumulator([param, param])
    param.grad = torch.ones(4)
    accumulator.add()
    assert len(accumulator.main_grads) == 1 and (accumulator.main_grads[0] == 1).all()
