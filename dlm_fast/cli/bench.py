"""``dlm-fast bench``: times the ops beside their definitions and plain PyTorch, in this process."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import tyro

from dlm_fast.cli.arguments import parse
from dlm_fast.cli.output import table, write, write_json
from dlm_fast.config import to_dict

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Times the ops of this build beside their definitions and plain PyTorch.

    A first impression on this machine, not a published number: those come from benches/.
    `dlm-fast bench token_logprob` is thorough: both types, forward and all forms of the step, rate,
    error and memory, on a head of 32000 columns (a minute or two); `--vocab 126464` takes longer.
    `dlm-fast bench gradient-noise` measures how noisy gradients are over the choice of their masks.
    """

    ops: tyro.conf.Positional[tuple[str, ...]] = ()
    """which ops; none: all of them"""
    rows: int | None = None
    """rows of hidden states (or sequences, for the ops on masks); None: 256, and 254 selected of
    512 for token_logprob named alone"""
    width: int | None = None
    """width of the hidden states; None: 256, and 1024 for token_logprob named alone"""
    vocab: int | None = None
    """columns of the head; None: 8192, and 32000 for token_logprob named alone"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """type of hidden states and weights; None: float32, and both for token_logprob named alone"""
    seconds: float | None = None
    """time given to each op and phase, over all providers; None: 1, and nine calls of each for
    token_logprob named alone"""
    memory: bool = True
    """for token_logprob named alone: measure memory too, in fresh processes"""
    threads: int | None = None
    """threads of every provider; None: those of torch"""
    seed: int = 0
    """seed of the inputs"""
    save: str | None = None
    """write the result to this JSON file as well"""

    def __post_init__(self) -> None:
        for name in ("rows", "width", "vocab"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if self.seconds is not None and self.seconds <= 0:
            raise ValueError(f"--seconds must be above 0, got {self.seconds}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {self.threads}")


Providers = dict[str, Callable[[], Any]]
OURS = "dlm_fast"
THOROUGH = "token_logprob"
"""named alone, this op gets the table of bench_head"""


def run(argv: list[str]) -> int:
    if argv[:1] == ["gradient-noise"]:
        from dlm_fast.cli import bench_gradient_noise

        return bench_gradient_noise.run(argv[1:])
    options = parse(BenchOptions, argv, prog="dlm-fast bench")
    chosen = _choose(options.ops)
    import torch

    from dlm_fast.cli.info import facts

    threads = torch.get_num_threads()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        facts_now = facts()
        if chosen == [THOROUGH]:
            text, results = _thorough(options)
        else:
            text, results = _quick(_with_defaults(options), chosen, facts_now["in force"])
    finally:
        torch.set_num_threads(threads)
    write(text)
    if options.save is not None:
        data = {"options": to_dict(options), "results": results, "facts": facts_now}
        write(f"saved to {write_json(options.save, data)}")
    return 0


def _thorough(options: BenchOptions) -> tuple[str, Any]:
    from dlm_fast.benchmark.problem import HeadSize
    from dlm_fast.cli.bench_head import DTYPES, HeadTableOptions, measure, report

    n = 254 if options.rows is None else options.rows
    measured = measure(
        HeadTableOptions(
            size=HeadSize(max(512, 2 * n), n, options.width or 1024, options.vocab or 32000),
            dtypes=DTYPES if options.dtype is None else (options.dtype,),
            seconds=options.seconds,
            seed=options.seed,
            memory=options.memory,
        )
    )
    return report(measured), measured


@dataclass(frozen=True, kw_only=True)
class Quick:
    """The sizes of the quick form, nothing left open."""

    rows: int
    width: int
    vocab: int
    dtype: str
    seconds: float
    seed: int


def _with_defaults(options: BenchOptions) -> Quick:
    return Quick(
        rows=options.rows or 256,
        width=options.width or 256,
        vocab=options.vocab or 8192,
        dtype=options.dtype or "float32",
        seconds=options.seconds or 1.0,
        seed=options.seed,
    )


def _quick(
    options: Quick, chosen: list[str], in_force: dict[str, str]
) -> tuple[str, list[dict[str, Any]]]:
    results = [
        {"op": op, "phase": phase, **_measure(providers, options.seconds)}
        for op in chosen
        for phase, providers in CASES[op](options).items()
    ]
    return (
        f"{_report(results)}\n\n"
        f"{options.rows} rows, width {options.width}, {options.vocab} columns, {options.dtype}, "
        f"{in_force['threads']} threads, {in_force['kernels on the CPU']}; median of interleaved "
        "calls, ratio = time of the other / time of dlm_fast"
    ), results


def _choose(names: tuple[str, ...]) -> list[str]:
    for name in names:
        if name not in CASES:
            near = difflib.get_close_matches(name, CASES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(CASES)}"
            raise ValueError(f"unknown op {name!r}; {hint}")
    return list(names or CASES)


def _measure(providers: Providers, seconds: float) -> dict[str, Any]:
    """Median seconds of each provider."""
    from dlm_fast.benchmark.timing import Plan, cpu_clock, interleaved, summary

    times = interleaved(providers, cpu_clock, Plan(rounds=3, seconds=seconds))
    found = {name: summary(times[name]) for name in providers}
    return {
        "calls": found[OURS]["calls"],
        "median_s": {name: one["wall_s"]["median"] for name, one in found.items()},
        "least_s": {name: one["wall_s"]["least"] for name, one in found.items()},
    }


def _report(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        ours = result["median_s"][OURS]
        cells = [f"{result['op']} {result['phase']}".strip(), _time(ours)]
        for other in ("definition", "eager"):
            seconds = result["median_s"].get(other)
            cells += ["-", "-"] if seconds is None else [_time(seconds), f"{seconds / ours:.2f}"]
        rows.append([*cells, str(result["calls"])])
    header = ("op", OURS, "definition", "ratio", "eager", "ratio", "calls")
    return table(header, rows)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def _head_inputs(options: Quick) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    generator = torch.Generator().manual_seed(options.seed)
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.rows, options.width, generator=generator)
    weight = torch.randn(options.vocab, options.width, generator=generator) / options.width**0.5
    targets = torch.randint(options.vocab, (options.rows,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets


def _differentiated(
    value: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor
) -> Callable[[], Any]:
    """Forward and backward of the sum over rows; gradients are handed back, not accumulated."""
    import torch

    leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    return lambda: torch.autograd.grad(value(*leaves).sum(), leaves)


def _token_logprob(options: Quick) -> dict[str, Providers]:
    from torch.nn import functional as F

    from dlm_fast import ops

    hidden, weight, targets = _head_inputs(options)
    providers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        OURS: lambda h, w: ops.token_logprob(h, w, targets).logprob,
        "definition": lambda h, w: ops.token_logprob_ref(h, w, targets).logprob,
        "eager": lambda h, w: -F.cross_entropy((h @ w.T).float(), targets, reduction="none"),
    }
    return {
        "forward": {n: functools.partial(f, hidden, weight) for n, f in providers.items()},
        "forward+backward": {n: _differentiated(f, hidden, weight) for n, f in providers.items()},
    }


def _weighted_logprob(options: Quick) -> dict[str, Providers]:
    import torch
    from torch.nn import functional as F

    from dlm_fast import ops

    hidden, weight, targets = _head_inputs(options)
    row_weight = torch.linspace(-1, 1, options.rows)
    providers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        OURS: lambda h, w: ops.weighted_logprob(h, w, targets, row_weight).objective,
        "definition": lambda h, w: ops.weighted_logprob_ref(h, w, targets, row_weight).objective,
        "eager": lambda h, w: (
            -(row_weight * F.cross_entropy((h @ w.T).float(), targets, reduction="none")).sum()
        ),
    }
    return {
        "forward+backward": {n: _differentiated(f, hidden, weight) for n, f in providers.items()}
    }


def _token_stats(options: Quick) -> dict[str, Providers]:
    import torch

    from dlm_fast import ops

    hidden, weight, _ = _head_inputs(options)
    rng = ops.Rng.of(options.seed, ops.Stream.TOKEN, list(range(options.rows)))

    def eager(temperature: float) -> Any:
        logits = (hidden @ weight.T).float()
        logprob = logits.log_softmax(-1)
        entropy = -(logprob.exp() * logprob).sum(-1)
        top = logits.topk(2, -1).values
        if temperature > 0:
            token = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        else:
            token = logits.argmax(-1)
        return token, entropy, top[:, 0] - top[:, 1], logprob.gather(1, token[:, None])

    def providers(temperature: float) -> Providers:
        settings: dict[str, Any] = {"temperature": temperature, "rng": rng}
        return {
            OURS: lambda: ops.token_stats(hidden, weight, **settings),
            "definition": lambda: ops.token_stats_ref(hidden, weight, **settings),
            "eager": lambda: eager(temperature),
        }

    return {"argmax": providers(0.0), "draw": providers(1.0)}


def _unmask_select(options: Quick) -> dict[str, Providers]:
    import torch

    from dlm_fast import ops

    score = torch.rand(options.rows, 256, generator=torch.Generator().manual_seed(options.seed))
    selectable = score < 0.5

    def eager() -> Tensor:
        ranked = score.masked_fill(~selectable, -1).topk(8, -1).indices
        return torch.zeros_like(selectable).scatter_(1, ranked, True) & selectable

    return {
        "top_k": {
            OURS: lambda: ops.unmask_select(score, selectable, "top_k", quota=8),
            "definition": lambda: ops.unmask_select_ref(score, selectable, "top_k", quota=8),
            "eager": eager,
        },
        "threshold": {
            OURS: lambda: ops.unmask_select(score, selectable, "threshold", bound=0.4),
            "definition": lambda: ops.unmask_select_ref(score, selectable, "threshold", bound=0.4),
            "eager": lambda: selectable & (score >= 0.4),
        },
    }


CASES: dict[str, Callable[[Quick], dict[str, Providers]]] = {
    "token_logprob": _token_logprob,
    "weighted_logprob": _weighted_logprob,
    "token_stats": _token_stats,
    "unmask_select": _unmask_select,
}
