"""One forward, several requests: they agree with each other, packed or not, in every precision."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast import Policy, ScoreRequest, Visibility, load
from dlm_fast.ops import Rng, Stream

LENGTHS = [5, 3, 5, 8]


def pack(lengths, seed=0, vocabulary=96):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (sum(lengths),), generator=generator)


def some_rows(total):
    """int32, with repetition and out of order."""
    return torch.tensor([2, total - 1, 7, 2, 11], dtype=torch.int32)


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def assert_same_gradients(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=tolerance, msg=name)


def test_score_stats_and_logits_agree(exact_policy):
    input_ids, visibility = pack(LENGTHS), Visibility.full(LENGTHS)
    rows, targets = some_rows(len(input_ids)), torch.tensor([4, 50, 7, 12, 95])
    score = exact_policy(input_ids, visibility, score=ScoreRequest(rows, targets))
    logprob_NV = exact_policy.logits(input_ids, visibility)[rows.long()].log_softmax(-1)
    expected = logprob_NV.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(score.logprob, expected, rtol=0, atol=1e-12)
    entropy = -(logprob_NV.exp() * logprob_NV).sum(-1)
    torch.testing.assert_close(score.entropy, entropy, rtol=0, atol=1e-12)
    stats = exact_policy.stats(input_ids, visibility, rows=rows, targets=targets)
    assert torch.equal(stats.token, logprob_NV.argmax(-1).to(stats.token.dtype))
    torch.testing.assert_close(stats.logprob, score.logprob, rtol=0, atol=1e-12)
    assert not any(getattr(stats, name).requires_grad for name in ("confidence", "logprob", "lse"))


def test_options_of_requests_reach_the_ops(exact_policy):
    input_ids, visibility = pack(LENGTHS), Visibility.full(LENGTHS)
    rows = some_rows(len(input_ids))
    targets = torch.tensor([4, 50, 7, 12, 95])
    request = ScoreRequest(rows, targets, temperature=0.5, forbid_ids=(1, 98))
    logits_NV = exact_policy.logits(input_ids, visibility)[rows.long()] / 0.5
    logits_NV[:, [1, 98]] = float("-inf")
    expected = logits_NV.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    score = exact_policy(input_ids, visibility, score=request)
    torch.testing.assert_close(score.logprob, expected, rtol=0, atol=1e-12)
    forbidden = [i for i in range(99) if i != 33]
    stats = exact_policy.stats(input_ids, visibility, rows=rows, forbid_ids=forbidden)
    assert stats.token.tolist() == [33] * 5
    rng = Rng.of(0, Stream.TOKEN, [0, 1, 2, 3, 4])
    draws = [
        exact_policy.stats(
            input_ids, visibility, rows=rows, temperature=2.0, rng=rng.at(step=step)
        ).token.tolist()
        for step in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_weights_give_the_weighted_sum_and_its_gradient(exact_policy):
    input_ids, visibility = pack(LENGTHS), Visibility.full(LENGTHS)
    rows, targets = some_rows(len(input_ids)), torch.tensor([4, 50, -100, 12, 95])
    weights = torch.tensor([0.5, -2.0, 3.0, 0.0, 1.0], dtype=torch.float64)
    plain = exact_policy(input_ids, visibility, score=ScoreRequest(rows, targets))
    expected = (plain.logprob * weights).sum()
    weighted = exact_policy(input_ids, visibility, score=ScoreRequest(rows, targets, weights))
    torch.testing.assert_close(weighted.objective, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(weighted.logprob, plain.logprob.detach(), rtol=0, atol=1e-12)
    assert weighted.lse is None
    assert weighted.entropy is None
    assert plain.objective is None
    assert not weighted.logprob.requires_grad
    assert_same_gradients(
        gradients(exact_policy, weighted.objective), gradients(exact_policy, expected), 1e-12
    )


@pytest.mark.parametrize("kind", ["full", "block", "causal"])
def test_packed_equals_separate(kind):
    policy = load("tiny", dtype="float64", kind=kind, block_size=3, width=16, layers=2, heads=2)
    lengths = [5, 3, 5, 8, 1]
    input_ids = pack(lengths)
    constructor = {
        "full": Visibility.full,
        "causal": Visibility.causal,
        "block": lambda lengths: Visibility.block_causal(lengths, 3),
    }[kind]
    packed = policy.logits(input_ids, constructor(lengths), aligned=False)
    parts = input_ids.split(lengths)
    separate = torch.cat([policy.logits(p[None], aligned=False)[0] for p in parts])
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-12)
    upstream = torch.randn(
        packed.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    assert_same_gradients(
        gradients(policy, (packed * upstream).sum()),
        gradients(policy, (separate * upstream).sum()),
        1e-11,
    )


def test_batch_equals_pack_of_equal_lengths(exact_policy):
    input_ids_BS = pack([6] * 4).view(4, 6)
    rows, targets = some_rows(24), torch.tensor([1, 2, 3, 4, 5])
    visibility = Visibility.full([6] * 4)
    request = ScoreRequest(rows, targets)
    batch = exact_policy(input_ids_BS, score=request)
    flat = exact_policy(input_ids_BS.flatten(), visibility, score=request)
    given = exact_policy(input_ids_BS, visibility, score=request)
    for other in (flat, given):
        torch.testing.assert_close(other.logprob, batch.logprob, rtol=0, atol=1e-13)
    assert exact_policy.logits(input_ids_BS).shape == (4, 6, 99)
    assert exact_policy.logits(input_ids_BS.flatten(), visibility).shape == (24, 99)


@settings(max_examples=20)
@given(st.permutations(range(4)))
def test_order_in_the_pack_changes_nothing(order):
    policy = load("tiny", dtype="float64", width=16, layers=1, heads=2)
    parts = pack(LENGTHS).split(LENGTHS)
    straight = policy.logits(torch.cat(parts), Visibility.full(LENGTHS)).split(LENGTHS)
    lengths = [LENGTHS[i] for i in order]
    shuffled = policy.logits(torch.cat([parts[i] for i in order]), Visibility.full(lengths))
    for i, found in zip(order, shuffled.split(lengths), strict=True):
        torch.testing.assert_close(found, straight[i], rtol=0, atol=1e-12)


def test_position_ids_come_from_the_visibility(exact_policy):
    """Rotary embedding is relative, so a shift of one sequence changes nothing, a gap does."""
    input_ids, plain = pack([6]), Visibility.full([6])

    def with_positions(positions):
        return Visibility(
            intervals=plain.intervals,
            position_ids=torch.tensor(positions),
            pred=plain.pred,
            lengths=plain.lengths,
        )

    expected = exact_policy.logits(input_ids, plain)
    shifted = exact_policy.logits(input_ids, with_positions([3, 4, 5, 6, 7, 8]))
    torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-5)
    gap = exact_policy.logits(input_ids, with_positions([0, 1, 2, 3, 4, 9]))
    assert (gap - expected).abs().max() > 1e-3


def test_shifted_families_predict_from_the_row_before():
    policy = load("tiny", dtype="float64", kind="causal", width=16, layers=1, heads=2)
    assert policy.family.logit_shift == 1
    lengths = [4, 3]
    input_ids, visibility = pack(lengths), Visibility.causal(lengths)
    emitted = policy.logits(input_ids, visibility, aligned=False)
    aligned = policy.logits(input_ids, visibility)
    assert aligned[[0, 4]].isnan().all()
    assert torch.equal(aligned[[1, 2, 3, 5, 6]], emitted[[0, 1, 2, 4, 5]])
    tokens = torch.tensor([6, 1, 3], dtype=torch.int32)
    rows = policy.predicting_rows(tokens, visibility)
    assert rows.tolist() == [5, 0, 2]
    assert rows.dtype == torch.int32
    with pytest.raises(ValueError, match="row 4 is the first token of its sequence"):
        policy.predicting_rows(torch.tensor([1, 4]), visibility)
    batch = policy.logits(input_ids[None, :4])
    assert batch[0, 0].isnan().all()


def test_unshifted_families_predict_in_place(tiny_policy):
    visibility = Visibility.full([3])
    rows = tiny_policy.predicting_rows(torch.tensor([0, 2]), visibility)
    assert rows.tolist() == [0, 2]
    assert rows.dtype == torch.int32
    with pytest.raises(ValueError, match="rows holds 3, but the pack has 3 rows"):
        tiny_policy.predicting_rows(torch.tensor([0, 3]), visibility)


def test_a_causal_model_does_not_look_ahead():
    policy = load("tiny", kind="causal", width=16, layers=2, heads=2)
    first, second = pack([6]), pack([6])
    second[4] += 1
    a, b = (policy.logits(x[None], aligned=False)[0] for x in (first, second))
    torch.testing.assert_close(a[:4], b[:4])
    assert not torch.allclose(a[4:], b[4:])


def test_gradient_checkpointing_changes_nothing(exact_policy):
    input_ids, visibility = pack(LENGTHS), Visibility.full(LENGTHS)
    weights = torch.ones(5, dtype=torch.float64)
    request = ScoreRequest(some_rows(21), torch.tensor([4, 50, 7, 12, 95]), weights)
    exact_policy.train()
    plain = gradients(exact_policy, exact_policy(input_ids, visibility, score=request).objective)
    exact_policy.gradient_checkpointing_enable()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        objective = exact_policy(input_ids, visibility, score=request).objective
    kept = sum(t.nbytes for t in saved)
    assert_same_gradients(gradients(exact_policy, objective), plain, 1e-14)
    exact_policy.gradient_checkpointing_disable()
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        exact_policy(input_ids, visibility, score=request)
    assert kept < sum(t.nbytes for t in saved) / 2


def test_autocast_computes_in_16_bits_on_32_bit_weights(tiny_policy):
    input_ids, visibility = pack(LENGTHS), Visibility.full(LENGTHS)
    request = ScoreRequest(some_rows(21), torch.tensor([4, 50, 7, 12, 95]), torch.ones(5))
    exact = tiny_policy(input_ids, visibility, score=request)
    exact_gradients = gradients(tiny_policy, exact.objective)
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny_policy.logits(input_ids, visibility).dtype == torch.bfloat16
        rough = tiny_policy(input_ids, visibility, score=request)
    assert rough.logprob.dtype == torch.float32
    difference = (rough.logprob - exact.logprob).abs().max()
    assert 0 < difference < 3e-2
    rough_gradients = gradients(tiny_policy, rough.objective)
    for name, expected in exact_gradients.items():
        assert rough_gradients[name].dtype == torch.float32
        assert (rough_gradients[name] - expected).norm() < 5e-2 * expected.norm() + 1e-3, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_parameters_of_other_types_work(dtype):
    policy = load("tiny", dtype=dtype, width=16, layers=1, heads=2)
    wide = load("tiny", dtype="float64", width=16, layers=1, heads=2)
    assert {str(p.dtype) for p in policy.parameters()} == {f"torch.{dtype}"}
    rows, targets = some_rows(21), torch.tensor([4, 50, 7, 12, 95])
    outs = [
        p(pack(LENGTHS), Visibility.full(LENGTHS), score=ScoreRequest(rows, targets)).logprob
        for p in (policy, wide)
    ]
    assert (outs[0] - outs[1]).abs().max() < (1e-6 if dtype == "float64" else 5e-2)


def test_double_makes_the_whole_forward_exact(exact_policy):
    """A parameter nudged by 1e-6 changes the objective as its gradient says, to 1e-9."""
    input_ids, visibility = pack(LENGTHS), Visibility.full(LENGTHS)
    weights = torch.ones(5, dtype=torch.float64)
    request = ScoreRequest(some_rows(21), torch.tensor([4, 50, 7, 12, 95]), weights)
    policy = load("tiny", width=16, layers=2, heads=2).double()
    policy.load_state_dict(exact_policy.state_dict())
    expected = gradients(policy, policy(input_ids, visibility, score=request).objective)
    for name, parameter in policy.named_parameters():
        where = tuple(0 if size == 1 else 1 for size in parameter.shape)
        if name == "backbone.embed_tokens.weight":
            where = (int(input_ids[0]), 1)
        values = []
        for nudge in (1e-6, -2e-6):
            with torch.no_grad():
                parameter[where] += nudge
                values.append(policy(input_ids, visibility, score=request).objective)
        slope = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close(slope, expected[name][where], rtol=1e-6, atol=1e-8, msg=name)
        with torch.no_grad():
            parameter[where] += 1e-6


def test_idle_touches_every_parameter_with_zero(tiny_policy):
    loss = tiny_policy.idle_loss()
    assert loss.shape == ()
    assert loss.item() == 0
    for name, gradient in gradients(tiny_policy, loss).items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


def test_layers_and_config_are_visible_to_wrappers(tiny_policy):
    names = tiny_policy._no_split_modules
    assert names == ["LlamaDecoderLayer"]
    assert sum(type(m).__name__ in names for m in tiny_policy.modules()) == 2
    assert tiny_policy.config.hidden_size == 32
    assert tiny_policy.device == torch.device("cpu")


def test_a_copy_is_independent(tiny_policy):
    other = copy.deepcopy(tiny_policy)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert isinstance(other, Policy)
    assert other.family == tiny_policy.family
    assert tiny_policy.lm_head.weight.abs().sum() > 0
    assert other.encode("12").tolist() == [1, 2]


INPUT = torch.zeros(2, 3, dtype=torch.int64)
REQUEST = ScoreRequest(torch.tensor([0]), torch.tensor([0]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attention_mask": torch.ones(2, 3), "logits": True}, r"attention_mask \[2, 3\] is not"),
        ({}, "one request of score, stats, logits, hidden, idle; got none"),
        ({"score": REQUEST, "logits": True}, r"got \['score', 'logits'\]"),
        ({"input_ids": None, "logits": True}, "input_ids is missing"),
        ({"input_ids": INPUT.flatten(), "logits": True}, r"input_ids \[6\] is a pack and needs"),
        ({"input_ids": INPUT.float(), "logits": True}, "int64.*float32"),
        ({"input_ids": INPUT[None], "logits": True}, r"\[T\] or \[B, S\].*\[1, 2, 3\]"),
        ({"input_ids": INPUT + 99, "logits": True}, "input_ids holds 99, outside the vocabulary"),
        ({"input_ids": INPUT - 1, "logits": True}, "input_ids holds -1, outside the vocabulary"),
        ({"visibility": Visibility.full([5]), "logits": True}, "6 tokens, but visibility has 5"),
        ({"score": ScoreRequest(torch.tensor([6]), torch.tensor([0]))}, "rows holds 6"),
        ({"score": ScoreRequest(torch.tensor([0]), torch.tensor([99]))}, "is 99, outside"),
    ],
)
def test_wrong_calls_are_named(tiny_policy, arguments, words):
    with pytest.raises(ValueError, match=words):
        tiny_policy(**({"input_ids": INPUT} | arguments))


def test_the_backbone_refuses_what_it_cannot_honour(tiny_policy):
    for mask in (torch.ones(2, 3), torch.ones(2, 1, 3, 3)):
        with pytest.raises(ValueError, match=r"attention_mask .* is not supported"):
            tiny_policy.backbone(INPUT, attention_mask=mask, visibility=Visibility.full([3, 3]))
    with pytest.raises(ValueError, match="attention_mask"):
        tiny_policy.backbone(INPUT, torch.ones(2, 3))
    with pytest.raises(ValueError, match="needs to know who sees whom"):
        tiny_policy.backbone(INPUT)
    tiny_policy.backbone.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention dropout is 0\.1"):
        tiny_policy.train().logits(INPUT)
