"""The model `dlm_fast` of the Language Model Evaluation Harness (package lm-eval, extra `eval`).

Harness releases that look for the entry-point group `lm_eval.models` find it by themselves;
`dlm-fast lm-eval ...` runs the others with the model registered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry, register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from dlm_fast.algorithms.likelihood import LikelihoodConfig, causal_logprobs, loglikelihood
from dlm_fast.models.load import load
from dlm_fast.ops.philox import mix64
from dlm_fast.rollout import sample
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Trajectory

NAME = "dlm_fast"

# keeps the draws of generations apart from those of rollouts and evaluations of one seed
_GENERATION = 0x6C6D65
_KNOWN = ("until", "max_gen_toks", "max_new_tokens", "max_tokens", "do_sample", "temperature",
          "top_k", "top_p")  # fmt: skip


class DlmFastLM(TemplateLM):
    """Generation by the denoising loop; likelihoods exact or as lower bounds (`likelihood`)."""

    def __init__(
        self,
        pretrained: str = "tiny",
        *,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = 32,
        max_batch_size: int | None = None,
        max_new_tokens: int = 256,
        block_size: int = 32,
        steps: int | None = None,
        rule: str = "top_k",
        bound: float | None = None,
        mc_num: int = 128,
        mc_sampler: str = "l_strat",
        check_greedy: bool = True,
        seed: int = 0,
        **load_options: Any,
    ) -> None:
        """``pretrained``: directory of a checkpoint, or "tiny", whose options may follow.

        ``max_new_tokens``: window of generations for which a task names no length; ``steps``:
        denoising steps of that window (None: one token a step), scaled with the length of others.
        ``mc_num``, ``mc_sampler``: masked samples of a likelihood. ``check_greedy``: find out
        whether greedy decoding would give a continuation, at one denoising of it each; tasks of
        multiple choice never look, so False saves them half of the time and more.
        """
        super().__init__()
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.policy = load(pretrained, dtype=dtype, device=chosen, **load_options)
        self.policy.eval()
        if self.policy.tokenizer is None:
            raise ValueError(f"{pretrained} has no tokenizer, and the harness works on texts")
        self.tokenizer = self.policy.tokenizer
        self.batch_size = 32 if str(batch_size).startswith("auto") else int(batch_size)
        family = self.policy.family
        block_size = family.block_size or block_size
        window = max(max_new_tokens, block_size)
        self.sampler = SamplerConfig(
            max_new_tokens=window,
            block_size=block_size,
            steps=window if steps is None else steps,
            rule=rule,  # type: ignore[arg-type]
            bound=bound,
            cache="tree" if family.kind == "causal" else "none",
        )
        self.check_greedy = check_greedy
        self.seed = seed
        self.likelihood = LikelihoodConfig(
            num_samples=mc_num,
            sampler=mc_sampler,  # type: ignore[arg-type]
            seed=seed,
            batch=self.batch_size,
        )
        self._device = self.policy.device
        self._pretrained = pretrained

    # -- texts and ids

    @property
    def eot_token_id(self) -> int:
        """End of text; stands before texts without a context."""
        eos_ids = self.policy.family.eos_ids
        if not eos_ids:
            raise ValueError(f"{self._pretrained} names no end-of-text token")
        return eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together."""
        return self.policy.family.max_length or 2048

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return self._pretrained.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text. A text that begins with the start token, as chat templates write it, gets
        no second one."""
        if add_special_tokens is None:
            start = self.tokenizer.bos_token
            add_special_tokens = not (start and string.startswith(start))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the checkpoint's template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # -- likelihoods

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting(context, text) for _, context, text in requests]
        values = loglikelihood(self.policy, pairs, self.likelihood)
        results = list(zip(values, self._greedy(pairs), strict=True))
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Whole texts, window after window; each window is conditioned on the token before it."""
        results = []
        for (text,) in [request.args for request in requests]:
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length - 1,
                    context_len=1,
                ),
            )
            pairs = [self._fitting(context, window) for context, window in windows]
            results.append(math.fsum(loglikelihood(self.policy, pairs, self.likelihood)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def _fitting(self, context: list[int], text: list[int]) -> tuple[Tensor, Tensor]:
        """Ids; the beginning of a context that is too long is left out."""
        room = self.max_length - len(text)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(text)} tokens leaves no room for context in the model's "
                f"{self.max_length}"
            )
        return torch.tensor(context[-room:]), torch.tensor(text, dtype=torch.int64)

    def _greedy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
        """Whether greedy decoding of as many tokens gives the text."""
        if not self.check_greedy:
            return [False] * len(pairs)
        if self.policy.family.kind == "causal":
            found: list[bool] = []
            for part in _parts(pairs, self.batch_size):
                rows = [Trajectory(prompt_ids=c, response_ids=t) for c, t in part]
                with torch.no_grad():
                    found += causal_logprobs(self.policy, rows)[1]
            return found
        results = [True] * len(pairs)
        by_length: dict[int, list[int]] = {}
        for index, (_, text) in enumerate(pairs):
            if text.numel():
                by_length.setdefault(text.numel(), []).append(index)
        for length, members in by_length.items():
            # a block model decodes whole blocks; what it adds behind the text is not compared
            window = max(length, self.policy.family.block_size or 0)
            sampler = self._sampler(window, {"temperature": 0.0})
            sampler = replace(sampler, steps=window, early_stop=False)
            prompts = [pairs[index][0] for index in members]
            made = sample(self.policy, prompts, sampler, self.seed, max_batch=self.batch_size)
            for index, trajectory in zip(members, made, strict=True):
                results[index] = torch.equal(trajectory.response_ids[:length], pairs[index][1])
        return results

    # -- generation

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Completions up to the first of a task's stop texts."""
        answers: list[str] = [""] * len(requests)
        by_settings: dict[SamplerConfig, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(self._settings(request.args[1]), []).append(index)
        for sampler, members in by_settings.items():
            room = self.max_length - sampler.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"a window of {sampler.max_new_tokens} tokens leaves no room for a prompt in "
                    f"the model's {self.max_length}; lower max_gen_toks or max_new_tokens"
                )
            prompts = [torch.tensor(self.tok_encode(requests[i].args[0])[-room:]) for i in members]
            made = sample(
                self.policy,
                prompts,
                sampler,
                self.seed,
                sequence_ids=[mix64(_GENERATION, i) for i in members],
                max_batch=self.batch_size,
            )
            for index, trajectory in zip(members, made, strict=True):
                context, options = requests[index].args
                text = self.policy.decode(trajectory.response_ids)
                answers[index] = _until(text, options.get("until"))
                self.cache_hook.add_partial("generate_until", (context, options), answers[index])
        return answers

    def _settings(self, options: dict[str, Any]) -> SamplerConfig:
        """A task's generation options in our terms."""
        unknown = sorted(set(options) - set(_KNOWN))
        if unknown:
            raise ValueError(
                f"the model {NAME} knows no generation option {', '.join(unknown)}; it has "
                f"{', '.join(_KNOWN)}, and steps, block_size, rule and bound as model_args"
            )
        lengths = (options.get(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens"))
        window = next((int(n) for n in lengths if n), self.sampler.max_new_tokens)
        return self._sampler(max(window, self.policy.family.block_size or 1), options)

    def _sampler(self, window: int, options: dict[str, Any]) -> SamplerConfig:
        base = self.sampler
        block = self.policy.family.block_size or min(base.block_size, window)
        steps = max(-(-window * base.steps // base.max_new_tokens), -(-window // block))
        # temperatures in tasks often stand beside do_sample=false, which means greedy
        sampled = options.get("do_sample", options.get("temperature", 0) != 0)
        return replace(
            base,
            max_new_tokens=window,
            block_size=block,
            steps=min(steps, window),
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            top_k=int(options.get("top_k") or 0),
            top_p=float(options.get("top_p") or 1.0),
        )


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _until(text: str, until: str | Sequence[str] | None) -> str:
    stops = [until] if isinstance(until, str) else list(until or ())
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends, default=None)]


def register() -> None:
    """Makes the model known to a harness that does not look for entry points."""
    import lm_eval.models  # noqa: F401  (the harness's own models, before the registry has any)

    if NAME not in model_registry:
        register_model(NAME)(DlmFastLM)
