"""The block cache decodes what recomputing decodes: ids, order, rows forwarded, pages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dlm_fast
from dlm_fast.ops import TokenStats
from dlm_fast.rollout import SamplerConfig, sample, sampler
from dlm_fast.rollout.cached_network import CachedNetwork

BLOCK = 4
RULES = [
    ("top_k", None),
    ("dynamic", 0.5),
    ("threshold", 0.5),
    ("factor", 1.0),
    ("entropy_sum", 1.0),
    ("eb", 0.5),
    ("sequential", None),
    ("random", None),
]


def make_policy(**options):
    options = {"width": 32, "layers": 2, "heads": 2, "seed": 1, "block_size": BLOCK, **options}
    policy = dlm_fast.load("tiny", kind="block", **options)
    with torch.no_grad():
        policy.lm_head.weight *= 12.0  # an untrained head is nearly flat: every choice a near tie
    return policy


@pytest.fixture(scope="module")
def policy():
    return make_policy()


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 90, (n,), generator=generator) for n in lengths]


def check_same(cached, plain):
    assert len(cached) == len(plain)
    for one, other in zip(cached, plain, strict=True):
        assert one.response_ids.equal(other.response_ids)
        assert one.tail_ids.equal(other.tail_ids)
        assert one.step_map.equal(other.step_map)
        assert one.num_forwards == other.num_forwards
        assert one.finish_reason == other.finish_reason
        torch.testing.assert_close(one.logp_rollout, other.logp_rollout, atol=5e-5, rtol=1e-5)


def both_ways(policy, prompts, options, cache_options=None, **arguments):
    cached = SamplerConfig(block_size=BLOCK, **options, cache="block", **(cache_options or {}))
    plain = SamplerConfig(block_size=BLOCK, **options)
    made = sample(policy, prompts, cached, 3, **arguments)
    check_same(made, sample(policy, prompts, plain, 3, **arguments))
    return made


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(("rule", "bound"), RULES)
def test_every_rule_decodes_the_same_with_and_without_the_cache(policy, rule, bound, temperature):
    options = {"max_new_tokens": 13, "steps": 9, "temperature": temperature}
    both_ways(policy, prompts_of(9, 4, 3, 8), {**options, "rule": rule, "bound": bound})


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("page", [0, 3, 16])
@pytest.mark.parametrize("max_batch", [None, 2])
def test_commits_pages_and_batches_change_nothing(policy, fused, page, max_batch):
    group = [p for p in prompts_of(9, 4, 14) for _ in range(3)]
    options = {"max_new_tokens": 11, "steps": 8, "temperature": 1.0}
    cache = {"fused_commit": fused, "cache_page": page, "cache_pages": 40}
    both_ways(policy, group, options, cache, max_batch=max_batch)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 10), st.dictionaries(st.integers(0, 12), st.integers(0, 90))),
        min_size=1,
        max_size=4,
    ),
    width=st.integers(4, 13),
    page=st.integers(0, 6),
    fused=st.booleans(),
    spare_pages=st.integers(0, 5),
)
def test_hints_and_small_caches(policy, rows, width, page, fused, spare_pages):
    prompts = [torch.arange(length) % 7 for length, _ in rows]  # shorter ones begin the longer ones
    fixed = [torch.full((width,), policy.family.mask_id) for _ in rows]
    for ids, (_, hints) in zip(fixed, rows, strict=True):
        for column, token in hints.items():
            if column < width:
                ids[column] = token
    size = page or BLOCK
    most = max(-(-(p.numel() + width) // size) for p in prompts) + 1
    cache = {"cache_page": page, "fused_commit": fused, "cache_pages": most + spare_pages}
    options = {"max_new_tokens": width, "steps": width, "temperature": 1.0}
    both_ways(policy, prompts, options, cache, fixed_ids=fixed)


def test_a_row_decodes_the_same_alone_and_in_any_batch(policy):
    config = SamplerConfig(
        max_new_tokens=12, block_size=BLOCK, steps=12, temperature=1.0, cache="block"
    )
    prompts = prompts_of(6, 11, 6, 3)
    together = sample(policy, prompts, config, 3)
    alone = [sample(policy, [p], config, 3, sequence_ids=[i])[0] for i, p in enumerate(prompts)]
    check_same(together, alone)
    order = [2, 0, 3, 1]
    shuffled = sample(policy, [prompts[i] for i in order], config, 3, sequence_ids=order)
    check_same(shuffled, [alone[i] for i in order])


@pytest.mark.parametrize(
    "model", [{"kv_heads": 1}, {"logit_shift": 1}, {"width": 128}, {"width": 128, "logit_shift": 1}]
)
def test_shared_key_heads_shifted_logits_and_wide_heads(model):
    options = {"max_new_tokens": 11, "steps": 11}
    first, *others = prompts_of(6, 8, 3)
    both_ways(make_policy(**model), [first, first, *others, first], options)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_checkpoint_decodes_the_same_tokens(shared_data, temperature):
    policy = dlm_fast.load(shared_data / "checkpoints" / "sdar_tiny")
    generator = torch.Generator().manual_seed(5)
    prompts = [
        torch.randint(0, policy.family.mask_id, (n,), generator=generator) for n in (7, 12, 2)
    ]
    size = policy.family.block_size
    for rule, bound in RULES:
        options = {"max_new_tokens": 14, "block_size": size, "steps": 14, "rule": rule}
        plain = SamplerConfig(**options, bound=bound, temperature=temperature)
        cached = SamplerConfig(**options, bound=bound, temperature=temperature, cache="block")
        made = sample(policy, prompts, cached, 6)
        check_same(made, sample(policy, prompts, plain, 6))
        check_same([sample(policy, prompts[1:2], cached, 6, sequence_ids=[1])[0]], made[1:2])


class Watched:
    """Runs ``policy.stats`` and notes what each forward held, and the state of the pages."""

    def __init__(self, policy, monkeypatch):
        self.policy, self.forwards, self.prefills, self.prompt_rows = policy, [], 0, 0
        self.page_counts = []
        watched = self

        class Network(CachedNetwork):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                watched.network = self

        monkeypatch.setattr(sampler, "CachedNetwork", Network)

    def __call__(self, input_ids: torch.Tensor, visibility, *, rows, **options) -> TokenStats:
        if rows.numel():
            self.forwards.append(visibility.num_queries)
            lists = self.network.admission.page_lists
            size = self.network.pages.page_size
            wanted = [-(-length // size) for length in visibility.key_lengths]
            self.page_counts.append((sorted(map(len, lists.values())), sorted(wanted)))
        else:
            self.prefills += 1
            self.prompt_rows += visibility.num_queries
        return self.policy.stats(input_ids, visibility, rows=rows, **options)


def expected_rows(trajectories, prompt_lengths, width, fused):
    """Rows of each forward from the records alone, when all rows run from the first one on."""
    counts = [0] * max(t.num_forwards for t in trajectories)
    for t, prompt in zip(trajectories, prompt_lengths, strict=True):
        block_of = {int(s): (prompt + c) // BLOCK for c, s in enumerate(t.step_map.tolist())}
        for step in range(1, t.num_forwards + 1):
            block = block_of[step]
            counts[step - 1] += min(BLOCK, prompt + width - block * BLOCK)
            if fused and step > 1 and block_of[step - 1] != block:
                counts[step - 1] += BLOCK
    return counts


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_forwards_the_rows_of_the_live_blocks(policy, monkeypatch, fused):
    watched, width = Watched(policy, monkeypatch), 13
    prompts = [p for p in prompts_of(9, 4, 3) for _ in range(4)]
    config = SamplerConfig(
        max_new_tokens=width,
        block_size=BLOCK,
        steps=width,
        temperature=1.0,
        rule="threshold",
        bound=0.3,
        early_stop=False,
        cache="block",
        fused_commit=fused,
    )
    made = sample(policy, prompts, config, 1, forward=watched)
    lengths = [p.numel() for p in prompts]
    assert len({t.num_forwards for t in made}) > 1  # rows finish at different steps
    assert watched.forwards == expected_rows(made, lengths, width, fused)
    # each prompt's whole blocks once: 8 and 4 tokens of the first two, none of the third
    if fused:
        assert (watched.prefills, watched.prompt_rows) == (1, 12)
    else:
        blocks = sum((n + width - 1) // BLOCK - n // BLOCK for n in lengths)
        assert watched.prompt_rows == 12 + blocks * BLOCK


@pytest.mark.parametrize("page", [1, 3, 4, 8, 256])
def test_pages_are_those_of_the_tokens_and_all_come_back(policy, monkeypatch, page):
    watched = Watched(policy, monkeypatch)
    prompts = [p for p in prompts_of(9, 14) for _ in range(3)]
    config = SamplerConfig(
        max_new_tokens=12, block_size=BLOCK, steps=12, cache="block", cache_page=page
    )
    sample(policy, prompts, config, forward=watched, max_batch=2)
    assert all(held == wanted for held, wanted in watched.page_counts)
    assert watched.network.pages.used == 0


def test_a_group_shares_its_prompt(policy, monkeypatch):
    watched = Watched(policy, monkeypatch)
    config = SamplerConfig(max_new_tokens=8, block_size=BLOCK, steps=8, cache="block")
    sample(policy, prompts_of(42) * 6, config, forward=watched)
    # 10 shared blocks, then 42 .. 50 in blocks 10 to 12 of each of six rows
    assert watched.network.pages.peak == 10 + 6 * 3
    assert (watched.prefills, watched.prompt_rows) == (1, 40)


def test_rows_wait_until_their_pages_are_free(policy, monkeypatch):
    watched = Watched(policy, monkeypatch)
    options = {"max_new_tokens": 8, "steps": 8, "temperature": 1.0}
    # two groups in turns: the prompt of a waiting row must not lock the other group out
    first, second = prompts_of(12, 12)
    prompts = [first, second] * 3
    limit = 5  # one row alone needs 3 + 2
    config = SamplerConfig(block_size=BLOCK, **options, cache="block", cache_pages=limit)
    made = sample(policy, prompts, config, 3, forward=watched)
    check_same(made, sample(policy, prompts, SamplerConfig(block_size=BLOCK, **options), 3))
    assert watched.network.pages.peak == limit and watched.network.pages.used == 0
    assert max(watched.forwards) <= 2 * BLOCK  # one row at a time


def test_a_cache_too_small_for_one_row_is_refused_before_any_forward(policy, monkeypatch):
    watched = Watched(policy, monkeypatch)
    config = SamplerConfig(
        max_new_tokens=8, block_size=BLOCK, steps=8, cache="block", cache_pages=4
    )
    words = r"prompt 1 needs 5 pages of 4 tokens for its 20 tokens, but rollout\.cache_pages=4"
    with pytest.raises(ValueError, match=words):
        sample(policy, prompts_of(3, 12), config, forward=watched)
    assert watched.forwards == [] and watched.prefills == 0


def test_the_last_block_is_not_committed(policy, monkeypatch):
    watched = Watched(policy, monkeypatch)
    config = SamplerConfig(
        max_new_tokens=8, block_size=BLOCK, steps=2, cache="block", fused_commit=False
    )
    trajectory = sample(policy, prompts_of(4), config, forward=watched)[0]
    # prompt, block 1, commit of block 1, block 2; nothing after it
    assert trajectory.num_forwards == 2
    assert (watched.forwards, watched.prefills, watched.prompt_rows) == ([4, 4], 2, 8)


@pytest.mark.parametrize("stop", [{"stop_at_eos": True}, {"early_stop": True}])
def test_rows_that_stop_early_are_the_same_and_need_no_commit(policy, monkeypatch, stop):
    eos = policy.family.eos_ids[0]
    others = tuple(i for i in range(6, policy.family.vocab_size) if i != eos)
    options = {"max_new_tokens": 40, "steps": 40, "temperature": 60.0, "forbid_ids": others, **stop}
    watched = Watched(policy, monkeypatch)
    prompts = [torch.full((n,), eos) for n in (3, 6, 9, 14) for _ in range(3)]
    made = sample(
        policy,
        prompts,
        SamplerConfig(block_size=BLOCK, **options, cache="block"),
        3,
        forward=watched,
        max_batch=5,
    )
    check_same(made, sample(policy, prompts, SamplerConfig(block_size=BLOCK, **options), 3))
    if stop == {"stop_at_eos": True}:
        assert len({t.response_length for t in made}) > 2
        assert any(t.tail_ids.numel() for t in made)
    assert watched.network.pages.used == 0
