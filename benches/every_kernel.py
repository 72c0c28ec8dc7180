"""Calls every op once or twice on small, ragged sizes of a device and compares it with its twin.

Run: python benches/every_kernel.py [--device cuda]; compute-sanitizer looks at this run.
Exit status 1 if a value is wrong or an op fails; an op without a kernel for the device says so.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dlm_fast import ops
from dlm_fast.benchmark.problem import Head, HeadSize, make_head
from dlm_fast.ops import Rng, Stream

Check = Callable[[], None]
# rows below and above what the kernels for few rows take; nothing is a multiple of anything
SIZES = (HeadSize(9, 3, 70, 517), HeadSize(150, 131, 70, 517), HeadSize(80, 65, 40, 4099))
NO_KERNEL = "no CUDA kernel"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def checks(device: str) -> Iterator[tuple[str, Check]]:
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            head = make_head(size, dtype, device=device)
            where = f"{size.n} rows, {str(dtype).removeprefix('torch.')}"
            yield f"token_logprob, {where}", lambda h=head: _token_logprob(h)
            yield f"weighted_logprob, {where}", lambda h=head: _weighted_logprob(h)
            yield f"weighted_logprob_, {where}", lambda h=head: _accumulating(h)
            yield f"token_stats, {where}", lambda h=head: _token_stats(h)
            yield f"token_stats with a draw, {where}", lambda h=head: _draw(h)
    for dtype in (torch.float32, torch.bfloat16):
        for width in (40, 128):
            where = f"width {width}, {str(dtype).removeprefix('torch.')}"
            yield f"tree_attention, {where}", lambda d=dtype, w=width: _tree_attention(device, d, w)
    yield "merge_attention_states", lambda: _merge_attention_states(device)
    yield "mask_tokens", lambda: _mask_tokens(device)
    yield "unmask_select", lambda: _unmask_select(device)
    yield "GradAccumulator", lambda: _grad_accumulator(device)
    yield "sample_grad_norm", lambda: _sample_grad_norm(device)


def _close(name: str, value: Tensor, right: Tensor, tolerance: float) -> None:
    """Relative to the size of the whole tensor."""
    value, right = value.detach().double().cpu(), right.detach().double().cpu()
    wrong = (value - right).norm() / right.norm().clamp(min=1e-30)
    assert wrong < tolerance, f"{name}: relative error {wrong:.1e}"


def _on_cpu(head: Head) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Float64 leaves, and the rest of the arguments, for the definitions."""
    hidden, weight = (
        t.detach().cpu().double().requires_grad_() for t in (head.hidden, head.weight)
    )
    return hidden, weight, {"targets": head.targets.cpu(), "rows": head.rows.cpu()}


def _token_logprob(head: Head) -> None:
    head.clear()
    found = ops.token_logprob(head.hidden, head.weight, head.targets, rows=head.rows)
    sum((value * head.row_weight).sum() for value in found).backward()  # type: ignore[union-attr]
    hidden, weight, rest = _on_cpu(head)
    right = ops.token_logprob_ref(hidden, weight, **rest)
    row_weight = head.row_weight.cpu().double()
    sum((value * row_weight).sum() for value in right).backward()  # type: ignore[union-attr]
    for name in right._fields:
        _close(name, getattr(found, name), getattr(right, name), 1e-4)
    _gradients(head, hidden, weight)


def _gradients(head: Head, hidden: Tensor, weight: Tensor) -> None:
    limit = TOLERANCE[head.hidden.dtype]
    assert head.hidden.grad is not None and head.weight.grad is not None
    assert hidden.grad is not None and weight.grad is not None
    _close("hidden gradient", head.hidden.grad, hidden.grad, limit)
    _close("head gradient", head.weight.grad, weight.grad, limit)


def _weighted_logprob(head: Head) -> None:
    head.clear()
    ops.weighted_logprob(
        head.hidden, head.weight, head.targets, head.row_weight, rows=head.rows
    ).objective.backward()
    hidden, weight, rest = _on_cpu(head)
    ops.weighted_logprob_ref(
        hidden, weight, row_weight=head.row_weight.cpu().double(), **rest
    ).objective.backward()
    _gradients(head, hidden, weight)


def _accumulating(head: Head) -> None:
    hidden, weight, rest = _on_cpu(head)
    start = torch.ones(weight.shape, dtype=torch.float64)
    main = start.to(head.weight.device, torch.float32)
    _, logprob, hidden_grad = ops.weighted_logprob_(
        head.hidden, head.weight, head.targets, head.row_weight, rows=head.rows, weight_grad=main
    )
    _, right, right_grad = ops.weighted_logprob_ref_(
        hidden, weight, row_weight=head.row_weight.cpu().double(), weight_grad=start, **rest
    )
    limit = TOLERANCE[head.hidden.dtype]
    _close("logprob", logprob, right, 1e-4)
    _close("hidden gradient", hidden_grad, right_grad, limit)
    _close("head gradient", main, start, limit)


def _token_stats(head: Head) -> None:
    found = ops.token_stats(head.hidden, head.weight, head.targets, rows=head.rows)
    hidden, weight, rest = _on_cpu(head)
    right = ops.token_stats_ref(hidden, weight, **rest)
    assert torch.equal(found.token.cpu(), right.token), "tokens differ"
    for name in ("confidence", "lse", "entropy", "margin", "logprob"):
        _close(name, getattr(found, name), getattr(right, name), 1e-4)


def _draw(head: Head) -> None:
    ids = torch.arange(head.size.n)
    rng, rng_cpu = (
        Rng.of(7, Stream.TOKEN, one).at(position=3, step=1)
        for one in (ids.to(head.weight.device), ids)
    )
    found = ops.token_stats(head.hidden, head.weight, rows=head.rows, temperature=0.8, rng=rng)
    hidden, weight, rest = _on_cpu(head)
    right = ops.token_stats_ref(
        hidden.float(), weight.float(), rows=rest["rows"], temperature=0.8, rng=rng_cpu
    )
    same = (found.token.cpu() == right.token).double().mean()
    assert same > 0.95, f"only {same:.0%} of the draws are those of the definition"


def _tree_attention(device: str, dtype: torch.dtype, width: int) -> None:
    pool = ops.TreeKVPool(num_layers=1, key_heads=2, width=width, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    root = pool.alloc([0] * 75)
    leaves = [leaf for inner in pool.fork(root, 3) for leaf in pool.fork(inner, 5)]
    pool.append(leaves, [0] * (7 * len(leaves)))
    numbers = torch.randn(pool.layer(0).shape, generator=generator)
    pool.layer(0).copy_(numbers)
    q = torch.randn(2 * len(leaves), 6, width, generator=generator).to(device, dtype)
    for absorb in ("never", "always"):
        plan = ops.plan_tree_attention(
            pool, leaves, 2, query_heads=6, causal=True, chunk=40, absorb=absorb
        )
        found = ops.tree_attention(q, pool, plan)
        right = ops.tree_attention_ref(q.double(), pool, plan)
        _close("out", found.out, right.out, TOLERANCE[dtype])
        _close("lse", found.lse, right.lse, 1e-5)


def _merge_attention_states(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    o, lse = torch.randn(9, 3, 40, generator=generator), torch.randn(9, 3, generator=generator)
    indptr = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    right = ops.merge_attention_states_ref(o, lse, indptr)
    found = ops.merge_attention_states(*(x.to(device) for x in (o, lse, indptr)))
    _close("out", found.out, right.out, 1e-5)
    assert torch.equal(found.lse.cpu()[1], right.lse[1]), "an empty row is not -inf"


def _mask_tokens(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, 90, (5, 41), generator=generator)
    maskable = torch.rand(5, 41, generator=generator) < 0.8
    for sampler in ("coupled_strat", "l_iid"):
        found, right = (
            op(
                token_ids.to(where),
                maskable.to(where),
                99,
                sampler=sampler,
                num_samples=4,
                rng=Rng.of(1, Stream.MASK, torch.arange(5).to(where)),
            )
            for op, where in ((ops.mask_tokens, device), (ops.mask_tokens_ref, "cpu"))
        )
        for name in ("noisy_ids", "rows", "targets", "counts"):
            assert torch.equal(getattr(found, name).cpu(), getattr(right, name)), name


def _unmask_select(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(7, 133, generator=generator)
    selectable = score < 0.6
    for rule, settings in (("top_k", {"quota": 5}), ("threshold", {"bound": 0.5})):
        found = ops.unmask_select(score.to(device), selectable.to(device), rule, **settings)
        right = ops.unmask_select_ref(score, selectable, rule, **settings)
        assert torch.equal(found.cpu(), right), rule


def _grad_accumulator(device: str) -> None:
    params = [torch.zeros(shape, device=device, requires_grad=True) for shape in ((70, 33), (517,))]
    accumulator = ops.GradAccumulator(params, per_sample_clip=30.0)
    generator = torch.Generator().manual_seed(0)
    total = [torch.zeros(param.shape, dtype=torch.float64) for param in params]
    for scale in (1.0, 0.5):
        grads = [torch.randn(param.shape, generator=generator) for param in params]
        norm = torch.cat([grad.flatten() for grad in grads]).double().norm()
        for param, grad, one in zip(params, grads, total, strict=True):
            param.grad = grad.to(device)
            one += scale * min(1.0, 30.0 / float(norm)) * grad.double()
        accumulator.add(scale)
    for main, right in zip(accumulator.main_grads, total, strict=True):
        _close("main gradient", main, right, 1e-5)


def _sample_grad_norm(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    grad_output = torch.randn(90, 37, generator=generator)
    inputs = torch.randn(90, 53, generator=generator)
    starts = [0, 31, 31, 90]
    found = ops.sample_grad_norm(grad_output.to(device), inputs.to(device), starts)
    _close("norms", found, ops.sample_grad_norm_ref(grad_output, inputs, starts), 1e-5)


def run(device: str) -> int:
    """The number of checks that failed."""
    failed = without = 0
    for name, check in checks(device):
        try:
            check()
        except Exception as error:
            if isinstance(error, ValueError) and NO_KERNEL in str(error):
                without += 1
                print(f"{name}: no kernel for {device} in this version")
                continue
            failed += 1
            print(f"{name}: FAILED")
            traceback.print_exc(file=sys.stdout)
        else:
            print(f"{name}: right")
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{failed} wrong, {without} without a kernel")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    return int(run(parser.parse_args().device) > 0)


if __name__ == "__main__":
    sys.exit(main())
