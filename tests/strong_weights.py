"""Weights larger than a new model's, so that its predictions depend on what it sees."""

import torch


def strengthen(policy, scale):
    """The policy with noise of this standard deviation added to every float64 weight."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += scale * noise
    return policy
