"""What a run is made of: the configuration of the training loop and of a whole run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal, cast

from dlm_fast.algorithms import ALGORITHMS
from dlm_fast.models.lora_options import LoraOptions
from dlm_fast.rollout.sampler_config import SamplerConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop: how many steps, how large, how fast, what is kept."""

    max_steps: int = 100
    """iterations of the loop: rollouts, then the optimizer steps of the algorithm"""
    prompts_per_step: int = 16
    """prompts of one iteration, over all processes"""
    micro_batch: int = 16
    """rollouts per forward and backward pass; changes memory and time, not the result"""
    rollout_batch: int = 128
    """rollouts decoded together; changes memory and time, not the result"""
    max_prompt_tokens: int = 0
    """longest prompt; 0: what the model's limit leaves beside rollout.max_new_tokens"""
    long_prompts: Literal["error", "drop", "truncate"] = "error"
    """longer prompts: refuse the data before the run starts, leave such examples out, or cut the
    beginning of the prompt; what is left out or cut is counted and said"""
    max_demonstration_tokens: int = 0
    """fine-tuning on a data file: longer demonstrations are left out; 0: one that does not fit into
    rollout.max_new_tokens is an error"""
    only_right_demonstrations: bool = False
    """fine-tuning on a data file: leave out demonstrations that the task's own checker calls wrong
    """
    score_threads: int = 4
    """threads that score completions while others are still being decoded, for tasks that allow it;
    0: score when all are decoded. The same rewards"""
    max_checker_failures: float = 0.5
    """stop, with the state saved, when the task's checker itself fails on more than this fraction
    of a step's rollouts or of an evaluation's; one that fails on all of eight or more stops the run
    in any case"""
    lr: float = 5e-7
    """learning rate of AdamW after the warm-up"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay rates of AdamW's two moments"""
    weight_decay: float = 0.01
    """decoupled weight decay of AdamW, on every trained weight"""
    max_grad_norm: float = 1.0
    """gradients of a module are scaled down to this global norm; 0 switches clipping off"""
    head_gradient: Literal["in_place", "autograd"] = "in_place"
    """how the head's gradients of the micro-batches are summed: in_place, by the fused op into one
    float32 sum; autograd, each made whole and added. The same gradient; in_place saves time and
    memory. Sharded modules (FSDP2) always use autograd"""
    gradient_statistics: bool = False
    """log norm, variance and noise scale of the samples' gradients. A sample is one forward and
    backward pass: train.micro_batch rollouts times algorithm.samples_per_forward masks. Not with
    FSDP2; takes autograd's gradient of the head"""
    per_sample_clip: float = 0.0
    """scale the gradient of each sample down to this norm; 0: off. A sample is one forward and
    backward pass of one rollout (train.micro_batch=1), its gradient is scaled so that the step's
    is the mean of the samples'. Not with FSDP2"""
    warmup_steps: int = 0
    """iterations over which the learning rate rises linearly from lr / warmup_steps to lr"""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """learning rate after the warm-up: constant, or falling to 0 at max_steps"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """arithmetic of forward and backward passes; master weights and optimizer stay float32"""
    max_bad_steps: int = 5
    """optimizer steps in a row with a non-finite loss or gradient (each is skipped) before the run
    stops with its state saved"""
    gradient_checkpointing: bool = False
    """recompute activations of each layer in the backward pass: less memory, a third more time"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the model runs; auto takes what the launcher gives, else a GPU if there is one"""
    eval_every: int = 10
    """evaluate on held-out examples every so many iterations, and at start and end; 0: never"""
    eval_examples: int = 64
    """held-out examples per evaluation, over all processes; 0 takes them all"""
    eval_temperature: float | None = None
    """temperature of the evaluation's rollouts; None: that of the training rollouts"""
    log_samples: int = 4
    """completions written to samples.txt at each evaluation"""
    save_every: int = 50
    """write a checkpoint every so many iterations, and at the end; 0: only at the end"""
    keep_checkpoints: int = 2
    """newest checkpoints that are kept; 0 keeps all"""

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "prompts_per_step",
            "micro_batch",
            "rollout_batch",
            "max_bad_steps",
        ):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in (
            "max_prompt_tokens",
            "max_demonstration_tokens",
            "score_threads",
            "eval_every",
            "eval_examples",
            "log_samples",
            "save_every",
            "keep_checkpoints",
        ):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "per_sample_clip"):
            value = getattr(self, name)
            _require(name, value, 0 <= value < math.inf, "0 or more, and finite")
        share = self.max_checker_failures
        _require("max_checker_failures", share, 0 <= share <= 1, "from 0 to 1")
        _require("lr", self.lr, 0 < self.lr < 1, "between 0 and 1")
        ok = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require("betas", self.betas, ok, "two numbers from 0 to below 1")
        if self.per_sample_clip > 0 and self.micro_batch != 1:
            raise ValueError(
                "train.per_sample_clip clips the gradient of one rollout, so it needs "
                f"train.micro_batch=1, got {self.micro_batch}"
            )
        if self.eval_temperature is not None:
            ok = 0 <= self.eval_temperature < math.inf
            _require("eval_temperature", self.eval_temperature, ok, "0 or more, and finite")
        for name, values in (
            ("schedule", ("constant", "cosine", "linear")),
            ("precision", ("fp32", "bf16")),
            ("head_gradient", ("in_place", "autograd")),
            ("device", ("auto", "cpu", "cuda")),
            ("long_prompts", ("error", "drop", "truncate")),
        ):
            _require(name, getattr(self, name), getattr(self, name) in values, f"one of {values}")

    def lr_at(self, step: int) -> float:
        """Learning rate of iteration ``step``, from 0; a pure function, so nothing is saved."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        span = max(1, self.max_steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / span)
        if self.schedule == "linear":
            return self.lr * (1 - done)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))


def _require(name: str, value: Any, ok: bool, rule: str) -> None:
    if not ok:
        raise ValueError(f"train.{name} must be {rule}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, whole: what ``config.yaml`` in its folder says."""

    name: str = "bgpo"
    """algorithm"""
    algorithm: Any = field(default_factory=ALGORITHMS["bgpo"][0])
    """options of the algorithm"""
    model: str = "tiny"
    """directory of a checkpoint, or "tiny" for a small model made on the spot"""
    model_options: dict[str, Any] = field(default_factory=dict)
    """further options of ``dlm_fast.load``"""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """train low-rank adapters instead of all weights; needs the extra lora"""
    task: str = "sudoku"
    """task by name, or path.py:function"""
    task_options: dict[str, Any] = field(default_factory=dict)
    """options of the task"""
    data: str | None = None
    """file of training examples; None takes the task's own"""
    eval_data: str | None = None
    """file of held-out examples; None takes the task's own"""
    rollout: SamplerConfig = field(default_factory=SamplerConfig)
    """how completions are sampled"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """the training loop"""
    seed: int = 0
    """seed of everything random"""
    run_dir: str | None = None
    """folder of the run; None: runs/<algorithm>-<task>-<date and time>"""
    resume: bool = False
    """continue the run that lies in run_dir from its newest complete checkpoint"""
    dry_run: bool = False
    """check data, model and memory, run the largest shape once, write nothing"""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if self.resume and self.run_dir is None:
            raise ValueError("resume needs run_dir: name the folder of the run to continue")


def run_config_type(name: str) -> type[RunConfig]:
    """``RunConfig`` whose ``algorithm`` has the type and default of algorithm ``name``.

    Readers of command lines and files need the exact type; ``RunConfig`` itself holds any.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}; known: {', '.join(ALGORITHMS)}")
    config_type = ALGORITHMS[name][0]
    narrowed = [
        ("name", str, field(default=name)),
        ("algorithm", config_type, field(default_factory=config_type)),
    ]
    made = make_dataclass("RunConfig", narrowed, bases=(RunConfig,), frozen=True, kw_only=True)
    made.__doc__ = RunConfig.__doc__
    return cast(type[RunConfig], made)
