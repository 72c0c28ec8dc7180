"""The backbone's linear layers: values and gradients of torch's own, wherever they run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlm_fast import load
from dlm_fast.models.linear import Linear, _available, _gains


def layers(n, d_in, d_out, bias, dtype=torch.float32):
    torch.manual_seed(0)
    plain = nn.Linear(d_in, d_out, bias=bias, dtype=dtype)
    return plain, Linear.like(plain), torch.randn(n, d_in, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(300, 40, 70), (1000, 96, 96), (7, 40, 70), (0, 40, 70)])
def test_values_and_gradients(shape, bias):
    plain, ours, x = layers(*shape, bias)
    assert ours.weight is plain.weight and isinstance(ours, nn.Linear)
    results = []
    for layer in (plain, ours):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        out = layer(leaf)
        out.sin().sum().backward()
        parts = [out.detach(), leaf.grad, layer.weight.grad]
        results.append([part.clone() for part in [*parts, *([layer.bias.grad] if bias else [])]])
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_error_is_that_of_torch():
    plain, ours, x = layers(2000, 512, 256, False)
    assert _available() and _gains(x, ours.weight)
    truth = x.double() @ plain.weight.detach().double().t()
    errors = [float((layer(x).detach() - truth).norm() / truth.norm()) for layer in (plain, ours)]
    assert errors[1] < 2 * errors[0] < 1e-6


def test_leading_dimensions_strides_and_partial_gradients():
    plain, ours, x = layers(600, 40, 70, True)
    x = x.view(2, 300, 40)
    assert torch.allclose(ours(x), plain(x), atol=1e-5) and ours(x).shape == (2, 300, 70)
    wide = torch.randn(300, 80)[:, ::2]
    assert torch.allclose(ours(wide), plain(wide), atol=1e-5)
    ours.weight.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(ours(leaf).square().sum(), leaf)
    (second,) = torch.autograd.grad(F.linear(leaf, plain.weight, plain.bias).square().sum(), leaf)
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_torchs_own(dtype):
    plain, ours, x = layers(300, 40, 70, True, dtype)
    assert not _gains(x, ours.weight) and torch.equal(ours(x), plain(x))


def test_autocast_is_torchs_own():
    plain, ours, x = layers(300, 40, 70, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), plain(x)) and ours(x).dtype == torch.bfloat16


def test_the_backbone_has_them():
    policy = load("tiny")
    linear = [m for m in policy.backbone.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 21 and all(type(m) is Linear for m in linear)
