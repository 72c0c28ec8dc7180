"""The supervised variants against their definitions: states, values, gradients, what is drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from algorithm_toys import context_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from sft_definitions import EOS, EVERY, Spelt, demonstration, gradient, make, targets_of, tiny

from dlm_fast.algorithms.sft import Config
from dlm_fast.rollout.trajectory import trajectories_of

WINDOW = 14
MODELS = {
    "full": ("full", None),
    "shifted": ("full", 1),
    "block": ("block", None),
    "causal": ("causal", None),
}
FITTING = [
    ("random_masking", "full"),
    ("random_masking", "shifted"),
    ("semi_ar", "full"),
    ("semi_ar", "shifted"),
    ("semi_ar", "block"),
    ("trace", "full"),
    ("trace", "shifted"),
    ("trace", "block"),
    ("ar", "causal"),
    ("ar", "shifted"),
]


def spelt_out(made, policy, groups, samples, block_size):
    """The loss from a forward per state. Which tokens were drawn is read from the samples."""
    config, drawn = made.config, targets_of(samples)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for index, trajectory in enumerate(trajectories_of(groups)):
        length = trajectory.response_length
        if config.num_pads is not None:
            first = trajectory.response_ids.tolist().index(EOS)
            length = min(length, first + 1 + config.num_pads)
        tokens += length
        text = Spelt(policy, trajectory, block_size, WINDOW, length)
        if config.variant == "ar":
            total = total + text.ar()
            continue
        if config.variant == "trace":
            steps = text.greedy_steps(config.tokens_per_step)
            total = total + text.trace(steps, config.shrink)
            continue
        per_order = 1
        if config.variant == "semi_ar" and policy.family.kind == "full":
            per_order = -(-trajectory.response_length // block_size)
        for order in range(config.num_samples):
            masked = {t for copy, t in drawn.get(index, []) if copy // per_order == order}
            assert masked <= set(range(length))
            total = total + getattr(text, config.variant)(masked)
    return -total / (tokens * config.num_samples)


@settings(max_examples=60, deadline=None)
@given(
    fitting=st.sampled_from(FITTING),
    block_size=st.integers(1, 5),
    prompts=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 11), min_size=3, max_size=3),
    pads=st.integers(0, 3),
    num_pads=st.sampled_from([None, 0, 1]),
    number=st.integers(1, 2),
    budget=st.sampled_from([1, 30, 4000]),
)
def test_values_and_gradients(
    fitting, block_size, prompts, lengths, pads, num_pads, number, budget
):
    """Every variant, over prompts, lengths, blocks, padding and packs, in float64."""
    variant, model = fitting
    kind, shift = MODELS[model]
    policy = tiny(kind, block_size if kind == "block" else 4, shift)
    options = {"num_pads": num_pads, "rows_per_forward": budget, "variant": variant}
    if variant == "trace":
        options |= {"shrink": number, "tokens_per_step": 3 - number}
    elif variant != "ar":
        options |= {"num_samples": number, "mask_low": 0.2, "mask_high": 0.9}
    made = make(policy, block_size, WINDOW, **options)
    made.modules(policy)
    # what num_pads adds is not in the demonstration: tested by itself
    pads = max(pads, num_pads or 0)
    pairs = enumerate(zip(prompts, lengths, strict=False))
    groups = [demonstration(p, r, i, pads) for i, (p, r) in pairs]
    samples = made.prepare(groups, context_of(policy))
    losses = [made.cross_entropy(micro, policy)[0] for micro in samples]
    expected = spelt_out(made, policy, groups, samples, block_size)
    if not losses:
        assert float(expected) == 0
        return
    assert float(sum(losses).detach()) == pytest.approx(float(expected.detach()), abs=1e-11)
    ours, theirs = gradient(sum(losses), policy), gradient(expected, policy)
    assert (ours - theirs).norm() <= 1e-10 * (1 + theirs.norm())


# --- what is drawn


def drawn(policy, lengths, iteration=0, prompt=4, **options):
    made = make(policy, window=26, **{"variant": "semi_ar"} | options)
    made.modules(policy)
    groups = [demonstration(prompt, length, i) for i, length in enumerate(lengths)]
    return targets_of(made.prepare(groups, context_of(policy, iteration=iteration)))


@pytest.mark.parametrize(("kind", "first"), [("block", 2), ("full", 0)])
def test_rates_belong_to_blocks(kind, first):
    """A rate per token would mask each with probability 1/2, whatever the range: the counts of
    four tokens would be binomial. Blocks have a grid of their own in a block model: six tokens of
    prompt leave two of its second block to the response."""
    found = drawn(tiny(kind), [26] * 500, prompt=6)
    counts = torch.zeros(500, 6, dtype=torch.int64)
    for response, names in found.items():
        # orders of full attention count blocks, and each holds the targets of its own
        tokens = {token for _, token in names if first <= token < first + 24}
        for token in tokens:
            counts[response, (token - first) // 4] += 1
    share = counts.flatten().bincount(minlength=5) / counts.numel()
    law = torch.tensor([0.1476, 0.2295, 0.2457, 0.2295, 0.1476])
    binomial = torch.tensor([0.0625, 0.25, 0.375, 0.25, 0.0625])
    error = (law * (1 - law) / counts.numel()).sqrt()  # blocks are independent of one another
    assert bool(((share - law).abs() < 4 * error).all())
    assert not bool(((share - binomial).abs() < 4 * error).all())
    correlation = torch.corrcoef(counts.double().T).triu(1).abs()
    assert correlation.max() < 4 / 500**0.5, "a rate was shared by blocks"


def test_a_random_mask_has_one_rate():
    """With a rate of its own the number of masked tokens of a copy spreads far wider than at a
    rate of one half."""
    found = drawn(tiny(), [24] * 300, variant="random_masking", mask_low=0.1, mask_high=0.9)
    counts = torch.tensor([len(found.get(i, [])) for i in range(300)]).double()
    # variance of n U: n E[t (1 - t)] + n^2 Var[t], with t uniform in 0.1..0.9
    expected = 24 * (0.25 - 0.64 / 12) + 24**2 * 0.64 / 12
    assert counts.var().item() == pytest.approx(expected, rel=0.3)
    fixed = drawn(tiny(), [24] * 300, variant="random_masking", mask_low=1.0, mask_high=1.0)
    assert all(len(names) == 24 for names in fixed.values())


@pytest.mark.parametrize("variant", ["random_masking", "semi_ar"])
def test_masks_are_new_in_every_iteration_and_the_same_in_any_batch(variant):
    policy = tiny()
    first, second = (drawn(policy, [20, 9, 13], i, variant=variant) for i in (0, 1))
    assert first != second
    small = drawn(policy, [20, 9, 13], variant=variant, rows_per_forward=1)
    assert small == first


# --- what is a target


def target_tokens(policy, trajectory, variant="semi_ar", **options):
    """Tokens that are targets, in their order, and the forward passes. Drawn masks mask all."""
    if variant in ("random_masking", "semi_ar"):
        options = {"mask_low": 1.0, "mask_high": 1.0} | options
    made = make(policy, variant=variant, **options)
    made.modules(policy)
    group = replace(demonstration(3, 2), trajectories=[trajectory])
    samples = made.prepare([group], context_of(policy))
    tokens = torch.cat([m.rows.token for m in samples])
    targets = torch.cat([m.rows.targets for m in samples])[tokens.argsort()]
    return targets.tolist(), samples


@pytest.mark.parametrize(("variant", "kind"), EVERY)
def test_the_end_of_text_is_a_target_where_padding_has_its_id(variant, kind, monkeypatch):
    """Padding goes by its place: the first end of text stays a target with num_pads=0."""
    policy = tiny(kind)
    monkeypatch.setattr(policy, "family", replace(policy.family, pad_id=EOS))
    (trajectory,) = demonstration(5, 6, pads=7).trajectories
    text = trajectory.response_ids.tolist()

    def targets(num_pads, response=trajectory):
        return target_tokens(policy, response, variant, num_pads=num_pads)[0]

    assert text[5:] == [EOS] * 8
    assert targets(0) == text[:6]
    assert targets(2) == text[:8]
    assert targets(None) == text
    # pads that the data lacks are added, as far as the window goes
    bare = replace(trajectory, response_ids=trajectory.response_ids[:6])
    assert targets(3, bare) == [*text[:6], EOS, EOS, EOS]
    assert targets(90, bare) == [*text[:6], *[EOS] * 18]
    # without an end there is nothing to pad
    cut = replace(trajectory, response_ids=trajectory.response_ids[:5])
    assert targets(3, cut) == text[:5]


@pytest.mark.parametrize(("variant", "kind"), EVERY)
def test_ids_are_never_made_from_text_again(variant, kind):
    """Ids that the tokenizer would not choose for their text are trained on as they are."""
    policy = tiny(kind)
    (trajectory,) = demonstration(5, 6).trajectories
    trajectory.text = "something else"
    targets, _ = target_tokens(policy, trajectory, variant)
    assert targets == trajectory.response_ids.tolist()


@pytest.mark.parametrize("kind", ["full", "block"])
def test_what_lies_behind_the_targets_is_masked(kind):
    """Padding that is no target, and the rest of a block model's last block."""
    policy = tiny(kind)
    (trajectory,) = demonstration(5, 6, pads=5).trajectories
    _, samples = target_tokens(policy, trajectory, num_pads=0, mask_low=0.4, mask_high=0.6)
    for micro in samples:
        ids, place = micro.rows.input_ids, micro.rows.visibility.position_ids
        behind = ids[place >= 5 + 6]
        assert len(behind) and (behind == policy.family.mask_id).all()
    # ... as far as the window goes
    if kind == "block":
        _, samples = target_tokens(
            policy, replace(trajectory, response_ids=trajectory.response_ids[:6]), window=6
        )
        assert max(int(m.rows.visibility.position_ids.max()) for m in samples) == 10


def test_rows_of_each_variant():
    """P=5, R=11, B=4: what the page says of costs."""
    counts = {}
    for variant, kind in EVERY:
        policy = tiny(kind)
        (trajectory,) = demonstration(5, 11).trajectories
        _, samples = target_tokens(policy, trajectory, variant)
        counts[variant, kind] = sum(m.rows.input_ids.numel() for m in samples)
    assert counts == {
        ("random_masking", "full"): 16,
        ("semi_ar", "full"): 3 * 16,
        ("trace", "full"): 6 * 16,
        ("semi_ar", "block"): 12 + 12,  # clean 0..11; blocks 4..7, 8..11, 12..15
        ("trace", "block"): 12 + 6 * 4,
        ("ar", "causal"): 16,
    }


# --- normalisation


@pytest.mark.parametrize(("variant", "kind"), EVERY)
def test_micro_batches_and_ranks_add_up(variant, kind):
    """The divisor is that of the whole step: nothing is divided a second time."""
    policy = tiny(kind)
    number = {"num_samples": 3} if variant in ("random_masking", "semi_ar") else {}
    groups = [demonstration(3 + i, 4 + 3 * i, i) for i in range(4)]
    tokens = float(sum(t.response_length for t in trajectories_of(groups)))

    def result(chosen, budget):
        made = make(policy, variant=variant, rows_per_forward=budget, **number)
        return run(made, policy, chosen, context_of(policy, global_sum=lambda x: tokens))[0]

    whole, parts = result(groups, 10_000), result(groups, 1)
    assert whole.forwards == 1 and parts.forwards >= 4
    assert (whole.flat - parts.flat).norm() <= 1e-11 * whole.flat.norm()
    ranks = [result(groups[:1], 40), result(groups[1:], 40)]
    assert ranks[0].loss + ranks[1].loss == pytest.approx(whole.loss, rel=1e-12)
    total = ranks[0].flat + ranks[1].flat
    assert (total - whole.flat).norm() <= 1e-11 * whole.flat.norm()
    # a mean over tokens: the same demonstrations twice change nothing
    again = [demonstration(3 + i, 4 + 3 * i, i) for i in range(4)]
    made = make(policy, variant=variant, **number)
    twice = run(made, policy, groups + again, context_of(policy))[0]
    assert (twice.flat - whole.flat).norm() <= 1e-11 * whole.flat.norm()


@pytest.mark.parametrize(("variant", "kind"), EVERY[:3])
def test_a_draw_may_mask_nothing(variant, kind):
    """Then there is no forward, and an iteration of nothing else is left out by the loop."""
    policy = tiny(kind)
    found = drawn(policy, [7] * 40, variant=variant, mask_low=0.0, mask_high=0.05)
    assert 0 < len(found) < 40
    made = make(policy, variant=variant, mask_low=0.0, mask_high=1e-7)
    made.modules(policy)
    about = context_of(policy)
    samples = made.prepare([demonstration(4, 7)], about)
    assert samples == [] and [u.micros for u in made.updates(samples, about)] == [[]]


@pytest.mark.parametrize(("variant", "kind"), EVERY)
def test_empty_demonstrations_are_left_out(variant, kind):
    policy = tiny(kind)
    empty = replace(demonstration(4, 7).trajectories[0], response_ids=torch.tensor([]).long())
    groups = [demonstration(4, 7), replace(demonstration(4, 7), trajectories=[empty])]
    results = [
        run(make(policy, variant=variant), policy, chosen, context_of(policy))[0]
        for chosen in (groups, groups[:1])
    ]
    assert torch.equal(results[0].flat, results[1].flat)


# --- curriculum


def test_long_demonstrations_wait():
    """Lengths end with the first end of text, whatever fills the rest."""
    policy = tiny()
    groups = [demonstration(3, length, i, pads=2) for i, length in enumerate((4, 8, 12))]
    for variant in ("elbo", "semi_ar"):
        seen = []
        for iteration in range(5):
            made = make(policy, variant=variant, length_curriculum=((1, 4), (2, 8), (1, 2)))
            made.modules(policy)
            about = context_of(policy, iteration=iteration, metrics={})
            samples = made.prepare(groups, about)
            if variant == "elbo":
                count = sum(len(micro.records) for micro in samples)
            else:
                count = sum(len(micro.rows.response.unique()) for micro in samples)
            seen.append((count, about.metrics["sft/left_out"]))
        assert seen == [
            (1, (2.0, 3.0)), (2, (1.0, 3.0)), (2, (1.0, 3.0)), (0, (3.0, 3.0)), (3, (0.0, 3.0)),
        ]  # fmt: skip


# --- options and families


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "semi-ar"}, "algorithm.variant must be one of elbo, random_masking"),
        ({"variant": "semi_ar", "mask_low": 0.9, "mask_high": 0.5}, "algorithm.mask_low"),
        ({"variant": "semi_ar", "mask_high": 1.5}, "algorithm.mask_high must lie in 0..1"),
        ({"variant": "semi_ar", "mask_low": 0.0, "mask_high": 0.0}, "masks nothing"),
        ({"variant": "semi_ar", "shrink": 2}, "algorithm.shrink=2 has no meaning.*to trace"),
        ({"variant": "semi_ar", "sampler": "l_strat"}, "algorithm.sampler=l_strat has no meaning"),
        ({"variant": "trace", "num_samples": 2}, "algorithm.num_samples=2 has no meaning"),
        ({"variant": "trace", "mask_low": 0.2}, "algorithm.mask_low=0.2 has no meaning"),
        ({"variant": "trace", "tokens_per_step": 0}, "algorithm.tokens_per_step"),
        ({"variant": "trace", "shrink": 0}, "algorithm.shrink"),
        ({"variant": "semi_ar", "rows_per_forward": 0}, "algorithm.rows_per_forward"),
        ({"variant": "semi_ar", "num_pads": -1}, "algorithm.num_pads"),
        ({"num_pads": 0}, "algorithm.num_pads=0 has no meaning for algorithm.variant=elbo"),
        ({"length_curriculum": ((3,),)}, "algorithm.length_curriculum holds pairs"),
        ({"length_curriculum": ((3, 0),)}, "algorithm.length_curriculum holds pairs"),
        ({"length_curriculum": ((True, 5),)}, "algorithm.length_curriculum holds pairs"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        Config(**options)


@pytest.mark.parametrize(
    ("variant", "model", "words"),
    [
        ("elbo", "block", "is 'block'; take a model with full attention.*semi_ar or trace"),
        ("random_masking", "block", "is 'block'; take a model with full attention"),
        ("elbo", "causal", "is 'causal'; take a model with full.*or set algorithm.variant to ar"),
        ("semi_ar", "causal", "masks are filled in.*'causal'.*SDAR"),
        ("trace", "causal", "masks are filled in.*'causal'.*SDAR"),
        ("ar", "block", "'block' with logit shift 0; take a model with causal attention"),
        ("ar", "full", "'full' with logit shift 0.*set algorithm.variant to elbo or random"),
    ],
)
def test_models_that_do_not_fit(variant, model, words):
    policy = tiny(*MODELS[model][:1])
    with pytest.raises(ValueError, match=words):
        make(policy, variant=variant).modules(policy)


def test_blocks_are_the_models_own():
    """rollout.block_size is for models that have none."""
    policy = tiny("block", 2)
    (trajectory,) = demonstration(4, 6).trajectories
    _, samples = target_tokens(policy, trajectory, block_size=4)
    assert sum(m.rows.input_ids.numel() for m in samples) == 8 + 6
