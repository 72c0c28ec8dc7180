"""A policy pass of TraceRL on packed traces against the layout of open trainers, in eager torch.

Run: OMP_WAIT_POLICY=PASSIVE python benches/trace_update.py [--out FOLDER] [--rounds N]
         [--threads 1 2]
Then `python benches/make_tables.py` renews docs/benchmarks.md.

One response with the step pattern that was published for SDAR-4B on MATH500: P=150, R=548, blocks
of 4, 240 steps, at most 4 in a block. A pass is forward, clipped objective with KL, backward; the
model is Qwen3's backbone with random weights. All passes give the same loss and gradients.

    dlm_fast           packed rows, interval_attention, the fused head on the targets
    packed, eager      the same rows through Transformers' Qwen3, one dense mask, torch's head on
                       the targets
    published          a row [prompt | clean | noisy] per round, dense mask, logits of all rows
    published, targets the same, logits of the targets alone
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from protocol_machine import facts
from torch import Tensor, nn
from trace_layouts import DenseRows, eager_logprob, packed_rows, published_rows, recorded_steps
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

import dlm_fast
from dlm_fast.algorithms.clipped_loss import clipped_objective, kl_estimate
from dlm_fast.algorithms.contract import Context
from dlm_fast.algorithms.trace_tokens import Tokens
from dlm_fast.algorithms.tracerl import Config, TraceRL
from dlm_fast.benchmark.memory import extra_bytes
from dlm_fast.benchmark.timing import Plan, cpu_clock, interleaved, summary
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory

PROMPT, RESPONSE, BLOCK, STEPS, SEED = 150, 548, 4, 240, 0
MODEL = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
OPTIONS = {"kl": "k3", "kl_weight": 0.01, "loss_agg": "token_mean"}
PROVIDERS = ("dlm_fast", "packed, eager", "published", "published, targets")
UPDATES = ("later", "first")
"""later: old log-probabilities are given; first: the policy has not moved"""


def trajectory() -> Trajectory:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, MODEL["vocab_size"] - 2, (PROMPT + RESPONSE,), generator=generator)
    return Trajectory(
        prompt_ids=ids[:PROMPT],
        response_ids=ids[PROMPT:],
        step_map=recorded_steps(PROMPT, RESPONSE, BLOCK, STEPS, generator),
        logp_rollout=torch.zeros(RESPONSE),
        block_size=BLOCK,
        reward=1.0,
        correct=True,
    )


def model() -> tuple[Any, Qwen3ForCausalLM]:
    """The policy; and Transformers' own model with the same weights."""
    torch.manual_seed(SEED)
    disable_progress_bar()
    config = Qwen3Config(**MODEL, tie_word_embeddings=False, max_position_embeddings=2048)
    whole = Qwen3ForCausalLM(config)
    with torch.no_grad():
        whole.lm_head.weight.normal_().mul_(MODEL["hidden_size"] ** -0.5)
    with tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder)
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "sdar"}))
        vocabulary = MODEL["vocab_size"]
        policy = dlm_fast.load(
            folder, mask_id=vocabulary - 1, eos_ids=[vocabulary - 2], block_size=BLOCK
        )
    whole.model.set_attn_implementation("sdpa")
    return policy, whole


def backbone_of(whole: Qwen3ForCausalLM) -> Callable[..., Tensor]:
    """Last hidden states of rows under a dense mask."""

    def backbone(input_ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        output = whole.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask={"full_attention": mask},
            use_cache=False,
        )
        return output.last_hidden_state

    return backbone


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A policy pass of one provider."""

    run: Callable[[], Tensor]
    """the loss, its gradients in the parameters"""
    parameters: list[nn.Parameter]
    num_rows: int
    head_rows: int


def passes(update: str, names: Sequence[str] = PROVIDERS) -> dict[str, Pass]:
    """Every provider on the same response."""
    policy, whole = model()
    backbone, head = backbone_of(whole), whole.lm_head
    made = trajectory()
    algorithm, tokens = prepared(policy, made, update)
    mask_id = policy.family.mask_id

    def ours() -> Tensor:
        policy.zero_grad(set_to_none=True)
        loss, _ = algorithm.loss(tokens, policy)
        loss.backward()
        return loss.detach()

    own = [*policy.backbone.parameters(), policy.lm_head.weight]
    theirs = [*whole.model.parameters(), head.weight]

    def eager(dense: DenseRows, all_rows: bool) -> Pass:
        advantage, old = (
            None if x is None else _in_order(x, tokens.rows.token, dense.token)
            for x in (tokens.advantage, tokens.old)
        )

        def run() -> Tensor:
            for parameter in theirs:
                parameter.grad = None
            logprob = eager_logprob(backbone, head, dense, mask_id, all_rows)
            known = logprob.detach() if old is None else old
            log_ratio = logprob.double() - known
            gain = clipped_objective(log_ratio, advantage, 0.2, 0.2)
            divergence = kl_estimate(log_ratio, OPTIONS["kl"])
            loss = (OPTIONS["kl_weight"] * divergence - gain).mean().float()
            loss.backward()
            return loss.detach()

        head_rows = dense.num_rows if all_rows else dense.rows.numel()
        return Pass(run=run, parameters=theirs, num_rows=dense.num_rows, head_rows=head_rows)

    targets, rows = tokens.rows.rows.numel(), tokens.rows.input_ids.numel()
    found = {"dlm_fast": Pass(run=ours, parameters=own, num_rows=rows, head_rows=targets)}
    if "packed, eager" in names:
        found["packed, eager"] = eager(packed_rows(tokens.rows), False)
    if "published" in names:
        found["published"] = eager(published_rows(made, BLOCK, mask_id), True)
    if "published, targets" in names:
        found["published, targets"] = eager(published_rows(made, BLOCK, mask_id), False)
    return {name: found[name] for name in names}


def _in_order(values: Tensor, token: Tensor, wanted: Tensor) -> Tensor:
    """Numbers of the tokens ``token`` in the order ``wanted``."""
    by_token = torch.empty_like(values)
    by_token[token] = values
    return by_token[wanted]


def prepared(policy: Any, made: Trajectory, update: str) -> tuple[TraceRL, Tokens]:
    """The algorithm and its rows, with advantages and old log-probabilities that make some ratios
    leave the clipping range."""
    config = Config(group_size=1, advantage="none", epochs=2 if update == "later" else 1, **OPTIONS)
    rollout = SamplerConfig(max_new_tokens=RESPONSE, block_size=BLOCK, steps=RESPONSE)
    algorithm = config.build(
        rollout=rollout, num_prompts=1, mask_id=policy.family.mask_id, seed=SEED
    )
    algorithm.modules(policy)

    def score(*inputs: Any, module: str = "policy", **requests: Any) -> Any:
        with torch.no_grad():
            return policy(*inputs, **requests)

    context = Context(score=score, global_sum=float, iteration=0, seed=SEED, micro_batch=1)
    group = Group(task_id=0, prompt_ids=made.prompt_ids, trajectories=[made])
    (step,) = algorithm.prepare([group], context).policy
    (tokens,) = step
    generator = torch.Generator().manual_seed(SEED + 1)
    count = tokens.rows.rows.numel()
    advantage = torch.randn(count, generator=generator, dtype=torch.float64)
    noise = 0.6 * torch.rand(count, generator=generator, dtype=torch.float64) - 0.3
    old = None if tokens.old is None else tokens.old + noise
    return algorithm, replace(tokens, advantage=advantage, old=old)


def differences(found: dict[str, Pass]) -> dict[str, dict[str, float]]:
    """Of losses, and largest relative (Frobenius) one of a parameter's gradient, from ours."""
    results = {}
    for name, one in found.items():
        loss = float(one.run())
        results[name] = loss, [p.grad.clone() for p in one.parameters if p.grad is not None]
    loss, gradients = results["dlm_fast"]
    return {
        name: {
            "loss": abs(other - loss),
            "gradient": max(
                float((a - b).norm() / a.norm()) for a, b in zip(gradients, others, strict=True)
            ),
        }
        for name, (other, others) in results.items()
    }


def memory_calls(name: str) -> tuple[Callable[[], object], Callable[[], Any]]:
    """For a fresh process; gradients are results."""
    torch.set_num_threads(1)
    one = passes("later", [name])[name]

    def gradients() -> list[Tensor]:
        one.run()
        return [p.grad for p in one.parameters if p.grad is not None]

    return gradients, gradients


def measure(rounds: int, threads: Sequence[int]) -> list[dict[str, Any]]:
    cases = []
    extra = {name: extra_bytes("trace_update:memory_calls", name=name) for name in PROVIDERS}
    for update in UPDATES:
        found = passes(update)
        wrong = differences(found)
        for count in threads:
            torch.set_num_threads(count)
            plan = Plan(rounds=rounds, warm_ups=0)  # the comparison has warmed them up
            times = interleaved({name: one.run for name, one in found.items()}, cpu_clock, plan)
            for name, one in found.items():
                cases.append(
                    {
                        "update": update, "threads": count, "provider": name,
                        "rows": one.num_rows, "head_rows": one.head_rows,
                        "difference": wrong[name], "extra_bytes": extra[name],
                        **summary(times[name]),
                    }
                )  # fmt: skip
                print(cases[-1], flush=True)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parent / "results"
    parser.add_argument("--out", type=Path, default=default, help="folder of the JSON file")
    parser.add_argument("--rounds", type=int, default=3, help="timed passes of each")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    result = {
        "what": "seconds of one TraceRL policy pass",
        "command": "python benches/trace_update.py --threads "
        + " ".join(map(str, arguments.threads)),
        "model": {**MODEL, "dtype": "float32"},
        "pattern": {"prompt": PROMPT, "response": RESPONSE, "block_size": BLOCK, "steps": STEPS},
        "seed": SEED,
        "rounds": arguments.rounds,
        **facts("cpu"),
        "cases": measure(arguments.rounds, arguments.threads),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "trace_update.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
