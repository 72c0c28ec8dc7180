"""Runs one case of T7: the gradient of a linear layer over samples.

Letters: ``K`` samples of ``S`` rows, ``I`` width in, ``O`` width out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from protocol_cases import LinearCase
from protocol_run import Bench, mark_inaccurate
from providers.linear_layer import Samples, all_linear_providers
from torch import Tensor, nn

from dlm_fast.benchmark.providers import OURS, Delivered
from dlm_fast.benchmark.timing import interleaved, summary


def run_linear_case(case: LinearCase, bench: Bench) -> dict[str, Any]:
    samples, right = _problem(case, bench)
    main = torch.zeros(case.width_out, case.width_in, device=bench.device)
    results: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Delivered]] = {}
    for provider in all_linear_providers():
        if (reason := provider.why_not(case.work)) is not None:
            results[provider.name] = {"missing": reason}
            continue
        work = getattr(provider, case.work)

        def call(work: Any = work) -> Delivered:
            with torch.no_grad():
                return work(samples, main)

        try:
            results[provider.name] = {"errors": _errors(call, main, right)}
        except Exception as error:  # a rival's failure is a result, not ours to repair
            if provider.name == OURS and bench.device == "cpu":
                raise
            results[provider.name] = {"missing": f"failed: {type(error).__name__}: {error}"[:300]}
            continue
        calls[provider.name] = call
    for name, times in interleaved(calls, bench.clock, bench.plan).items():
        results[name] |= summary(times)
    mark_inaccurate(results)
    size = case.width_in * case.width_out * case.samples
    main_bytes = 4 * case.width_in * case.width_out * case.samples
    given_bytes = samples.given.element_size() * size
    return {
        **asdict(case),
        "threads": bench.threads,
        "flop": 2 * case.rows * size if case.work != "given" else 4 * size,
        "bytes": 2 * main_bytes + given_bytes,
        "results": [{"provider": name, **result} for name, result in results.items()],
    }


def _problem(case: LinearCase, bench: Bench) -> tuple[Samples, dict[str, Tensor]]:
    """Samples of sizes that differ, so that clipping has something to do; their float64 truth."""
    generator = torch.Generator(bench.device).manual_seed(bench.seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=bench.device)

    grad_output = normal(case.samples, case.rows, case.width_out)
    grad_output *= torch.linspace(0.5, 2.0, case.samples, device=bench.device)[:, None, None]
    inputs = normal(case.samples, case.rows, case.width_in).to(dtype)
    grad_output = grad_output.to(dtype)
    layer = nn.Linear(
        case.width_in, case.width_out, bias=False, device=bench.device, dtype=dtype
    ).requires_grad_()
    given = grad_output[0].T @ inputs[0]
    total = torch.zeros(case.width_out, case.width_in, device=bench.device, dtype=torch.float64)
    norms = []
    for k in range(case.samples):
        exact = grad_output[k].double().T @ inputs[k].double()
        norms.append(exact.norm())
    norm_K = torch.stack(norms)
    bound = float(norm_K.median())
    if case.work == "given":
        norm_K = given.double().norm().expand(case.samples)
        total += case.samples * given.double()
    else:
        for k in range(case.samples):
            exact = grad_output[k].double().T @ inputs[k].double()
            clips = case.work == "clipped"
            total += exact * (min(1.0, bound / float(norm_K[k])) if clips else 1.0)
    samples = Samples(grad_output=grad_output, input=inputs, layer=layer, bound=bound, given=given)
    return samples, {"weight_grad": total, "norms": norm_K}


def _errors(
    call: Callable[[], Delivered], main: Tensor, right: dict[str, Tensor]
) -> dict[str, float]:
    """Relative Frobenius error of the sum; largest relative error of a norm."""
    main.zero_()
    delivered = call()
    wrong = (main.double() - right["weight_grad"]).norm() / right["weight_grad"].norm()
    found = {"weight_grad": wrong.item()}
    if "norms" in delivered:
        norms = delivered["norms"].to(right["norms"])
        found["norms"] = (norms / right["norms"] - 1).abs().max().item()
    main.zero_()
    return found
