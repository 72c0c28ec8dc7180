"""The ops: one chain each from C++ to a public function, with a pure-torch twin beside it."""

from dlm_fast.ops.axpy_multi import axpy_multi, axpy_multi_ref
from dlm_fast.ops.grad_accumulator import GradAccumulator, GradStatistics
from dlm_fast.ops.head_sample_grad_norm import head_sample_grad_norm, head_sample_grad_norm_ref
from dlm_fast.ops.interval_attention import interval_attention, interval_attention_ref
from dlm_fast.ops.mask_tokens import Masked, mask_tokens, mask_tokens_ref
from dlm_fast.ops.merge_attention_states import (
    AttentionState,
    lse_from_natural,
    lse_to_natural,
    merge_attention_states,
    merge_attention_states_ref,
)
from dlm_fast.ops.philox import Rng, Stream, gumbel, mix64, philox_uniform, philox_uniform_ref
from dlm_fast.ops.sample_grad_norm import sample_grad_norm, sample_grad_norm_ref
from dlm_fast.ops.token_logprob import TokenLogprob, token_logprob, token_logprob_ref
from dlm_fast.ops.token_stats import TokenStats, token_stats, token_stats_ref
from dlm_fast.ops.trace_pack import (
    TraceConditional,
    TraceNode,
    TracePack,
    fill_bins,
    join_packs,
    trace_conditionals_ref,
    trace_pack,
)
from dlm_fast.ops.tree_attention import (
    TreePlan,
    plan_tree_attention,
    tree_attention,
    tree_attention_ref,
)
from dlm_fast.ops.tree_kv_pool import PoolNode, PoolStats, Refill, TreeKVPool, TreePoolExhausted
from dlm_fast.ops.unmask_select import unmask_select, unmask_select_ref
from dlm_fast.ops.visibility import Visibility
from dlm_fast.ops.weighted_logprob import (
    WeightedLogprob,
    weighted_logprob,
    weighted_logprob_,
    weighted_logprob_ref,
    weighted_logprob_ref_,
)

__all__ = [
    "token_logprob",
    "token_logprob_ref",
    "TokenLogprob",
    "weighted_logprob",
    "weighted_logprob_ref",
    "weighted_logprob_",
    "weighted_logprob_ref_",
    "WeightedLogprob",
    "token_stats",
    "token_stats_ref",
    "TokenStats",
    "Visibility",
    "TraceNode",
    "TracePack",
    "trace_pack",
    "TraceConditional",
    "trace_conditionals_ref",
    "join_packs",
    "fill_bins",
    "interval_attention",
    "interval_attention_ref",
    "merge_attention_states",
    "merge_attention_states_ref",
    "AttentionState",
    "lse_to_natural",
    "lse_from_natural",
    "tree_attention",
    "tree_attention_ref",
    "plan_tree_attention",
    "TreePlan",
    "TreeKVPool",
    "TreePoolExhausted",
    "PoolNode",
    "PoolStats",
    "Refill",
    "Rng",
    "Stream",
    "gumbel",
    "mix64",
    "philox_uniform",
    "philox_uniform_ref",
    "mask_tokens",
    "mask_tokens_ref",
    "Masked",
    "unmask_select",
    "unmask_select_ref",
    "GradAccumulator",
    "GradStatistics",
    "axpy_multi",
    "axpy_multi_ref",
    "sample_grad_norm",
    "sample_grad_norm_ref",
    "head_sample_grad_norm",
    "head_sample_grad_norm_ref",
]
