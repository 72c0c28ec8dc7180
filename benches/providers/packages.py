"""Cross-entropy without logits from other packages: cut-cross-entropy, liger-kernel, quack-kernels.

Letters: ``T`` rows of hidden states, ``N`` of them selected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlm_fast.benchmark.problem import Head
from dlm_fast.benchmark.providers import (
    Delivered,
    Provider,
    by_autograd,
)
from providers.availability import missing, needs_cuda

UNIT_WEIGHTS = "unit weights"
"""the mark of a provider whose rows cannot be weighted: its truth has unit weights too"""
_SUM_ONLY = "returns only the sum over rows"
_NO_STATISTICS = "has neither lse nor entropy"
_SUM_MARKS = {"weighted_step": UNIT_WEIGHTS}


# --- cut-cross-entropy: skips rows whose label is -100, so it gets all positions, as shipped


def _cut(name: str, what: str, unavailable: str | None, **options: Any) -> Provider:
    def value(head: Head) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        losses_T = linear_cross_entropy(
            head.hidden, head.weight, head.all_targets(), reduction="none", **options
        )
        return -losses_T[head.rows]

    return Provider(
        name=name,
        what=what,
        **by_autograd(value),
        lacks={"statistics": _NO_STATISTICS},
        unavailable=unavailable,
        compiles=True,
    )


def cut_cross_entropy_compiled(device: str) -> Provider:
    return _cut(
        "cut-cross-entropy, compiled",
        '`linear_cross_entropy(impl="torch_compile")`, the form that runs without a GPU',
        missing("cut_cross_entropy"),
        impl="torch_compile",
    )


def cut_cross_entropy_filtered(device: str) -> Provider:
    return _cut(
        "cut-cross-entropy",
        '`linear_cross_entropy(impl="cce", filter_eps="high")`: leaves out small gradients',
        needs_cuda(device, "cut_cross_entropy"),
        impl="cce",
        filter_eps="high",
    )


def cut_cross_entropy_unfiltered(device: str) -> Provider:
    return _cut(
        "cut-cross-entropy, unfiltered",
        '`linear_cross_entropy(impl="cce", filter_eps=None)`',
        needs_cuda(device, "cut_cross_entropy"),
        impl="cce",
        filter_eps=None,
    )


# --- liger-kernel: scaled cross-entropy (own Hopper kernels on a GPU, chunks of torch on a CPU)


def _scaled(hidden: Tensor, head: Head, labels: Tensor, entropy: bool) -> Any:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    return LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, head.weight, labels, 1.0, -100, 1, entropy
    )


def _liger_scaled(name: str, what: str, gather_first: bool) -> Provider:
    def value(head: Head) -> Tensor:
        if gather_first:
            return -_scaled(head.hidden[head.rows], head, head.targets, False)
        return -_scaled(head.hidden, head, head.all_targets(), False)[head.rows]

    return Provider(
        name=name,
        what=f"`LigerFusedLinearScaledCrossEntropyFunction`, {what}",
        **by_autograd(value),
        lacks={"statistics": "has entropy, but neither lse nor the most likely token"},
        unavailable=missing("liger_kernel.ops.fused_linear_scaled_cross_entropy"),
    )


def liger_scaled_as_shipped(device: str) -> Provider:
    return _liger_scaled(
        "liger-kernel scaled, all positions", "computes rows that do not count too", False
    )


def liger_scaled_gather_first(device: str) -> Provider:
    return _liger_scaled("liger-kernel scaled, gather first", "rows gathered by us", True)


# --- liger-kernel: Triton


def _liger_loss(head: Head, **options: Any) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    names = {"reduction": "sum", "accum_dtype": None, "chunk_mem_const": 1} | options
    # positional, as autograd functions want it: bias, class weight, ignored label, z-loss,
    # smoothing, reduction, soft cap, three things to return, type of the sum, scaling, accuracy,
    # predicted tokens, two choices of implementation, memory for logits
    return LigerFusedLinearCrossEntropyFunction.apply(
        *(head.hidden[head.rows], head.weight, head.targets),
        *(None, None, -100, 0.0, 0.0, names["reduction"], None, False),
        *(names["accum_dtype"], False, False, False, None, None, names["chunk_mem_const"]),
    )[0]


def _liger_triton(device: str, name: str, what: str, **options: Any) -> Provider:
    def weighted_step(head: Head, main_grad_VD: Tensor) -> Delivered:
        return _summed_step(head, main_grad_VD, _liger_loss(head, **options))

    return Provider(
        name=name,
        what=f'`LigerFusedLinearCrossEntropyFunction`, reduction "sum", {what}',
        weighted_step=weighted_step,
        lacks={"score": _SUM_ONLY, "statistics": _NO_STATISTICS, "step": _SUM_ONLY},
        marks=_SUM_MARKS,
        unavailable=needs_cuda(device, "liger_kernel.ops.fused_linear_cross_entropy"),
        compiles=True,
    )


def _summed_step(head: Head, main_grad_VD: Tensor, loss: Tensor) -> Delivered:
    """Gradients of minus a loss summed over the rows; there is no log-probability of a row.

    The sign is put on afterwards: these packages save a pass where the upstream gradient is 1.
    """
    head.clear()
    loss.backward()
    main_grad_VD.sub_(head.weight.grad)
    return {"hidden_grad": head.hidden.grad.neg_()}


def liger_triton(device: str) -> Provider:
    return _liger_triton(device, "liger-kernel", "as shipped")


def liger_triton_accurate(device: str) -> Provider:
    return _liger_triton(
        device,
        "liger-kernel, float32 sum",
        "`accum_dtype=torch.float32`, `chunk_mem_const=8`",
        accum_dtype=torch.float32,
        chunk_mem_const=8,
    )


def liger_triton_rows(device: str) -> Provider:
    def value(head: Head) -> Tensor:
        return -_liger_loss(head, reduction="none", accum_dtype=torch.float32, chunk_mem_const=8)

    return Provider(
        name="liger-kernel, rows",
        what='`LigerFusedLinearCrossEntropyFunction`, reduction "none": computes logits twice',
        **by_autograd(value),
        lacks={"statistics": _NO_STATISTICS},
        unavailable=needs_cuda(device, "liger_kernel.ops.fused_linear_cross_entropy"),
        compiles=True,
    )


# --- quack-kernels


def _quack(device: str, name: str, what: str, scaled_exp: bool | None) -> Provider:
    def loss(head: Head) -> Tensor:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return chunked_linear_cross_entropy(
            head.hidden[head.rows],
            head.weight,
            head.targets,
            chunk_size=4096,
            reduction="sum",
            use_scaled_exp=scaled_exp,
        )

    def score(head: Head) -> Delivered:
        with torch.no_grad():
            return {"sum of logprob": -loss(head)}

    def weighted_step(head: Head, main_grad_VD: Tensor) -> Delivered:
        return _summed_step(head, main_grad_VD, loss(head))

    return Provider(
        name=name,
        what=f"`chunked_linear_cross_entropy(chunk_size=4096)`, {what}",
        score=score,
        weighted_step=weighted_step,
        lacks={"statistics": _NO_STATISTICS, "step": _SUM_ONLY},
        marks=_SUM_MARKS | {"score": _SUM_ONLY},
        unavailable=needs_cuda(device, "quack.linear_cross_entropy"),
        compiles=True,
    )


def quack_scaled(device: str) -> Provider:
    return _quack(device, "quack-kernels", "as shipped", None)


def quack_base(device: str) -> Provider:
    return _quack(device, "quack-kernels, base", "`use_scaled_exp=False`", False)
