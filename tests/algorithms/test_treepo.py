"""TreePO and GRPO around the loss: rejection, steps, old log-probabilities, metrics, bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fake_training import DigitsTask
from trace_toys import context, tiny
from tree_toys import figure_3, group, leaf, random_group

from dlm_fast.algorithms import treepo
from dlm_fast.algorithms.contract import Largest
from dlm_fast.algorithms.tree_metrics import tree_metrics
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.tree import PackedTree
from dlm_fast.rollout.tree_config import TreeConfig
from dlm_fast.training import TrainConfig, Trainer

ROLLOUT = SamplerConfig(max_new_tokens=16, block_size=4, steps=16, temperature=1.0)


@pytest.fixture(scope="module")
def policy():
    return tiny("causal")


def build(policy, num_prompts=1, rollout=ROLLOUT, **options):
    config = treepo.Config(**({"tree": TreeConfig(leaves=8)} | options))
    algorithm = config.build(
        rollout=rollout, num_prompts=num_prompts, mask_id=policy.family.mask_id, seed=0
    )
    return algorithm, *context(algorithm, policy)


def alike(group_id=0, count=4):
    return group([leaf((), (), [10, 11 + k], reward=1) for k in range(count)], group_id)


# --- rejection


def test_alike_trees_are_left_out(policy):
    algorithm, made, _ = build(policy, num_prompts=3)
    groups = [alike(0), figure_3(group_id=1), group([leaf((), (), [10], reward=1)], 2)]
    (step,) = algorithm.prepare(groups, made)
    learnt = sum(len(micro.rows.targets) for micro in step)
    assert learnt == sum(
        PackedTree.of(g).num_tokens - 3 for g in groups[1:]
    )  # a tree of one leaf stays
    assert made.metrics["tree/rejected"] == (1.0, 3.0)
    for reject, kept in (("none", 3), ("reward", 2)):
        algorithm, made, _ = build(policy, num_prompts=3, reject=reject)
        algorithm.prepare(groups, made)
        assert made.metrics["tree/rejected"] == (3.0 - kept, 3.0)


def test_rewards_decide_where_asked(policy):
    members = [leaf((), (), [10, 11 + k], reward=0.25 * k) for k in range(1, 4)]
    algorithm, made, _ = build(policy, reject="reward")
    assert len(algorithm.prepare([group(members)], made)) == 1
    algorithm, made, _ = build(policy)  # all count as correct
    assert algorithm.prepare([group(members)], made) == []


def test_rejected_prompts_get_fresh_trees(policy):
    algorithm, made, _ = build(policy, num_prompts=2, max_gen_batches=3)
    groups, asked = [alike(0), figure_3(group_id=1)], []

    def resample(requests):
        asked.append([(request.group.task_id, request.count) for request in requests])
        fresh = figure_3() if len(asked) == 2 else alike()
        return [fresh.trajectories for _ in requests]

    refined = algorithm.refine(groups, resample)
    assert asked == [[(0, 8)], [(0, 8)]]  # the first batch counts
    assert [len(g.trajectories) for g in refined] == [8, 8]
    algorithm.prepare(refined, made)
    assert made.metrics["tree/gen_batches"] == 3
    assert made.metrics["tree/rejected"] == (0.0, 2.0)
    unique = PackedTree.of(figure_3()).num_tokens - 3
    # two batches of four leaves of two tokens were replaced
    assert made.metrics["tree/decoded_tokens"] == (2 * 8 + 2 * unique, 2)


def test_nothing_is_asked_for_without_need(policy):
    for options, groups in (({}, [alike()]), ({"max_gen_batches": 5}, [figure_3()])):
        algorithm, _, _ = build(policy, **options)
        assert algorithm.refine(groups, lambda _: pytest.fail("asked")) is groups


def test_an_iteration_without_trees_is_skipped_and_counted(policy):
    algorithm, made, _ = build(policy, max_skipped=3)
    for skipped in (1, 2):
        assert algorithm.prepare([alike()], made) == []
        assert made.metrics["tree/skipped"] == skipped
        assert list(algorithm.updates([], made)) == []
    kept = algorithm.state()
    algorithm.prepare([figure_3()], made)
    assert algorithm.state() == {"skipped": 0}
    algorithm.load_state(kept)
    with pytest.raises(ValueError, match=r"3 iterations in a row.*max_gen_batches"):
        algorithm.prepare([alike()], made)


def test_another_process_may_have_trees(policy):
    algorithm, made, _ = build(policy)
    made.global_sum = lambda value: value + 1.0
    assert algorithm.prepare([alike()], made) == [[]]
    assert algorithm.state() == {"skipped": 0}


# --- steps and old log-probabilities


def test_steps_hold_whole_trees(policy):
    algorithm, made, _ = build(policy, num_prompts=3, mini_batch=8, epochs=2)
    groups = [random_group(s, leaves=8, group_id=3 + g) for g, s in enumerate((1, 4, 9))]
    for members in groups:
        members.trajectories[0].correct = not members.trajectories[-1].correct
    steps = algorithm.prepare(groups, made)
    assert len(steps) == 3
    for step, members in zip(steps, groups, strict=True):
        responses = sum(t.response_length for t in members.trajectories)
        assert sum(float(m.share.sum()) for m in step) == responses == step[0].divisor
        assert all(m.old is not None for m in step)  # two epochs: the policy moves
    assert len(list(algorithm.updates(steps, made))) == 6


def test_advantages_are_standardised_over_all_steps(policy):
    groups = [random_group(s, leaves=8, group_id=g) for g, s in enumerate((1, 4))]
    sums = []
    for mini_batch in (None, 8):
        algorithm, made, _ = build(policy, num_prompts=2, mini_batch=mini_batch, reject="none")
        steps = algorithm.prepare(groups, made)
        sums.append(sorted(float(a) for step in steps for m in step for a in m.plus - m.minus))
    assert sums[0] == pytest.approx(sums[1])


def test_old_log_probabilities(policy):
    algorithm, made, _ = build(policy, old_logprob="rollout")
    groups = [figure_3()]
    ((micro,),) = algorithm.prepare(groups, made)
    assert micro.old is micro.rollout
    recorded = -1.0 - 0.125 * (micro.rows.targets % 7)
    assert torch.equal(micro.rollout, recorded.double())
    _, metrics = algorithm.loss(micro, policy)
    assert metrics["tree/mismatch"][0] == 0
    algorithm, made, _ = build(policy)
    ((micro,),) = algorithm.prepare(groups, made)
    _, metrics = algorithm.loss(micro, policy)
    request = ScoreRequest(
        policy.predicting_rows(micro.rows.rows, micro.rows.visibility),
        micro.rows.targets,
        forbid_ids=algorithm.rollout.never_drawn(policy.family),
    )
    found = policy(micro.rows.input_ids, micro.rows.visibility, score=request).logprob
    gap = (found.detach() - recorded.double()).abs()
    assert metrics["tree/mismatch"] == (pytest.approx(float(gap.sum())), float(gap.numel()))
    assert float(metrics["tree/mismatch_largest"]) == pytest.approx(float(gap.max()))
    groups[0].trajectories[0].logp_rollout = None
    algorithm, made, _ = build(policy, old_logprob="rollout")
    with pytest.raises(ValueError, match="take old_logprob=recompute"):
        algorithm.prepare(groups, made)


def test_the_overlong_penalty(policy):
    """Window 4 of at most 16 tokens: nothing up to 12, then a quarter per token."""
    algorithm, _, _ = build(policy, overlong_window=4)
    found = [algorithm._reward(leaf((), (), [10] * n, reward=1)) for n in (5, 12, 13, 14, 16)]
    assert found == [1, 1, 0.75, 0.5, 0]
    assert build(policy)[0]._reward(leaf((), (), [10] * 16, reward=1)) == 1


def test_divergence_from_the_start_of_the_run():
    pytest.importorskip("peft", reason="the extra lora is not installed")
    adapted = tiny("causal", lora={"rank": 2})
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    algorithm, made, _ = build(adapted, kl_weight=0.5, kl_to="reference", kl="k2")
    ((micro,),) = algorithm.prepare([figure_3()], made)
    loss, _ = algorithm.loss(micro, adapted)
    bare, made, _ = build(adapted)
    ((same,),) = bare.prepare([figure_3()], made)
    without, _ = bare.loss(same, adapted)
    request = ScoreRequest(
        adapted.predicting_rows(micro.rows.rows, micro.rows.visibility),
        micro.rows.targets,
        forbid_ids=algorithm.rollout.never_drawn(adapted.family),
    )
    new = adapted(micro.rows.input_ids, micro.rows.visibility, score=request).logprob.detach()
    assert float((new - micro.reference).abs().max()) > 0.01
    k2 = (micro.share * (new - micro.reference).square()).sum() / 2 / micro.divisor
    assert float((loss - without).detach()) == pytest.approx(0.5 * float(k2))


# --- metrics


def test_metrics_of_trees():
    made = figure_3()
    for k, member in enumerate(made.trajectories):
        facts = {
            "reason": "eos" if k < 6 else "max_depth",
            "fallback": k == 7,
            "step": k,
            "pages_peak": 9,
        }
        member.detail = {"tree": facts}
    tree = PackedTree.of(made)
    found = tree_metrics([tree], [made], 4)
    assert found["tree/sharing"] == (tree.num_flat_tokens, tree.num_tokens)
    assert found["tree/leaves"] == (8, 1)
    assert found["tree/fallback_leaves"] == (1, 8)
    assert found["tree/leaves_before_fallback"] == (7, 1)
    assert found["tree/finish_step"] == (28, 8)
    assert found["tree/reason_eos"] == (6, 8) and found["tree/reason_max_depth"] == (2, 8)
    assert found["tree/reason_answer"] == (0, 8)
    assert found["tree/pages_peak"] == 9 and isinstance(found["tree/pages_peak"], Largest)
    assert [found[f"tree/depth_{d}"][0] for d in (1, 2, 3, 4)] == [2, 1, 5, 0]
    weights = [1 / 3, 1 / 3, 1 / 18, 1 / 18, 1 / 27, 1 / 27, 1 / 27, 1 / 9]
    lengths = [3, 5, 8, 8, 7, 9, 10, 6]
    mean = sum(w * n for w, n in zip(weights, lengths, strict=True))
    assert found["tree/length_weighted"][0] == pytest.approx(mean)
    assert found["tree/length_bias"][0] == pytest.approx(7 - mean)
    right = 1 / 3 + 2 / 27
    assert found["tree/correct_weighted"][0] == pytest.approx(right)
    assert found["tree/reward_weighted"][0] == pytest.approx(2 * right - 1)


def test_metrics_of_the_loss_count_shared_tokens_for_each_leaf(policy):
    algorithm, made, _ = build(policy)
    ((micro,),) = algorithm.prepare([figure_3()], made)
    _, metrics = algorithm.loss(micro, policy)
    assert metrics["policy/logprob"][1] == 56
    assert metrics["policy/advantage"][0] == pytest.approx(0, abs=1e-9)  # standardised over these
    assert metrics["policy/ratio_mean"] == (56, 56)
    assert metrics["policy/clip_fraction"][0] == 0 and metrics["policy/kl"][0] == 0
    micro.old = torch.full_like(micro.plus, -100.0)  # far below: ratios above every bound
    _, metrics = algorithm.loss(micro, policy)
    assert metrics["policy/clip_fraction"][0] == pytest.approx(float(micro.plus.sum()))


# --- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip_low": 1.5}, "algorithm.clip_low"),
        ({"clip_high": -0.1}, "algorithm.clip_high"),
        ({"dual_clip": 1.1}, "algorithm.dual_clip=1.1"),
        ({"loss_agg": "step_mean"}, "algorithm.loss_agg"),
        ({"estimator": "median"}, "algorithm.estimator"),
        ({"kl_weight": -1.0}, "algorithm.kl_weight"),
        ({"entropy_weight": float("nan")}, "algorithm.entropy_weight"),
        ({"old_logprob": "rollout", "score_temperature": 0.5}, "needs old_logprob=recompute"),
        ({"mini_batch": 12}, "multiple of algorithm.group_size=8"),
        ({"max_gen_batches": 0}, "algorithm.max_gen_batches"),
        ({"max_skipped": 0}, "algorithm.max_skipped"),
        ({"rows_per_forward": 0}, "algorithm.rows_per_forward"),
        ({"overlong_window": -1}, "algorithm.overlong_window"),
        ({"rollouts": "star"}, "algorithm.rollouts"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        treepo.Config(tree=TreeConfig(leaves=8), **options)


def test_models_are_checked():
    with pytest.raises(ValueError, match="attends to the whole sequence"):
        build(tiny("full"))
    with pytest.raises(ValueError, match=r"set rollout.block_size=8"):
        build(tiny("block", block_size=8))
    with pytest.raises(ValueError, match="kl_to=reference needs adapters"):
        build(tiny("causal"), kl_weight=0.1, kl_to="reference")


def test_a_step_without_a_token_is_refused(policy):
    members = group([leaf((), (), [], reward=r) for r in (0, 1)])
    algorithm, made, _ = build(policy)
    with pytest.raises(ValueError, match="no response token"):
        algorithm.prepare([members], made)


def test_a_prompt_without_tokens_is_refused(policy):
    members = group([leaf((), (), [10 + r], reward=r, prompt=()) for r in (0, 1)])
    algorithm, made, _ = build(policy, old_logprob="recompute", epochs=2)
    with pytest.raises(ValueError, match="start the prompt with at least one token"):
        algorithm.prepare([members], made)


def test_unscored_leaves_are_refused(policy):
    members = figure_3()
    members.trajectories[3].reward = float("nan")
    algorithm, made, _ = build(policy)
    with pytest.raises(ValueError, match="leaf 3 of the tree of group 0 has reward nan"):
        algorithm.prepare([members], made)


# --- trees from the sampler


def trained(kind="causal", max_steps=2, cache="none", **options):
    tree = TreeConfig(leaves=6, segment=4, max_depth=2, answer="none")
    trainer = Trainer(
        tiny(kind).float(),
        DigitsTask(),
        treepo.Config(**({"tree": tree, "reject": "reward"} | options)),
        TrainConfig(
            max_steps=max_steps,
            prompts_per_step=3,
            lr=3e-3,
            eval_every=0,
            device="cpu",
            save_every=0,
        ),
        rollout=replace(ROLLOUT, max_new_tokens=8, steps=8, cache=cache),
        seed=3,
    )
    return trainer.run()


def test_sampled_trees_train_in_the_loop():
    variants = ((8192, "none"), (40, "tree"))
    rows = [trained(rows_per_forward=n, cache=cache).metrics for n, cache in variants]
    for name in ("loss", "policy/logprob", "tree/unique_tokens", "policy/grad_norm"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-4)
    assert rows[0]["tree/mismatch_largest"] < 1e-4
    assert rows[0]["tree/depth_2"] == 1 and rows[0]["tree/leaves"] == 6
    # three trees of 13 nodes at most, each node less than two pages of 16 tokens
    assert rows[0]["tree/pages_peak"] == 0 and 3 < rows[1]["tree/pages_peak"] <= 3 * 13 * 2
    assert 0 <= rows[0]["tree/fallback_leaves"] <= 1
    assert sum(v for name, v in rows[0].items() if name.startswith("tree/reason_")) == 1
    # six leaves on two nodes behind the prompt: more is shared than the prompt
    flat = trained(rollouts="flat").metrics
    assert flat["tree/depth_1"] == 1 and flat["tree/sharing"] < rows[0]["tree/sharing"]


def test_recorded_log_probabilities_of_trees_are_those_of_training():
    """Ratios of the first step are 1 whether old log-probabilities are recomputed or recorded."""
    for recorded in ("recompute", "rollout"):
        row = trained(old_logprob=recorded, max_steps=1).metrics
        assert row["policy/ratio_mean"] == pytest.approx(1, abs=1e-4)
