"""Known mistakes of open trainers for block diffusion, each with the case that shows it.

Those of decoding stand in rollout/test_trace_regressions.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from trace_toys import EOS, build, context, rollout, sampled_groups, sampler, tiny

from dlm_fast.algorithms.clipped_loss import averaging
from dlm_fast.algorithms.trace_rows import NEVER, traced
from dlm_fast.algorithms.trace_tokens import Layout
from dlm_fast.cli.main import main
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.rollout import sample
from dlm_fast.training.distributed import Runtime
from dlm_fast.training.metrics import MetricSums, read_metrics
from dlm_fast.training.optimizer import Stepper, make_trainees
from dlm_fast.training.run_config import TrainConfig

BLOCKS = {"kind": "block", "eos_ids": [EOS], "block_size": 4}


def logprobs(policy, responses, block_size=4):
    """By (response, token), of one pack."""
    kind, mask_id = policy.family.kind, policy.family.mask_id
    layout = Layout(kind=kind, block_size=block_size, mask_id=mask_id, shrink=1, row_budget=9999)
    (rows,) = layout.rows(responses)
    request = ScoreRequest(
        policy.predicting_rows(rows.rows, rows.visibility),
        rows.targets,
        forbid_ids=sampler().never_drawn(policy.family),
    )
    with torch.no_grad():
        logprob = policy(rows.input_ids, rows.visibility, score=request).logprob
    keys = zip(rows.response.tolist(), rows.token.tolist(), strict=True)
    return dict(zip(keys, logprob.tolist(), strict=True))


# --- the record


def test_ids_are_trained_on_and_never_text():
    """Text that another tokenisation gives would shift the steps."""
    policy = tiny("block")
    made = rollout([1, 2, 2, 3, 4], ids=[40, policy.family.eos_ids[0], 41, 97, 42])
    made.text = policy.decode(made.response_ids)
    assert not torch.equal(policy.encode(made.text), made.response_ids)
    response = traced(made, kind="block", eos_ids=[], block_size=4)
    assert response.ids.tolist() == [40, policy.family.eos_ids[0], 41, 97, 42]
    assert sorted(token for _, token in logprobs(policy, [response])) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step_map": torch.tensor([1, 2])}, r"step_map has shape \[2\] for 3 response and 0 tail"),
        ({"step_map": torch.tensor([1, 2, 3, 4])}, r"step_map has shape \[4\]"),
        ({"step_map": torch.tensor([[1, 2, 3]])}, r"step_map has shape \[1, 3\]"),
        ({"logp_rollout": torch.zeros(2)}, r"logp_rollout has shape \[2\]"),
        ({"tail_ids": torch.tensor([4])}, r"step_map has shape \[3\] for 3 response and 1 tail"),
    ],
)
def test_records_of_another_length_are_neither_cut_nor_padded(change, words):
    made = dataclasses.replace(rollout([1, 2, 3]), **change)
    with pytest.raises(ValueError, match=words):
        traced(made, **BLOCKS)


@pytest.mark.parametrize("step", [[1, 0, 2], [0, 1, 2], [-1, 1, 2], [1, 2, -5]])
def test_steps_count_from_one(step):
    """0 means the prompt in one place and the first step in another of trainers that allow it."""
    wrong = next(i for i, s in enumerate(step) if s < 1)
    with pytest.raises(ValueError, match=f"says {step[wrong]} at token {wrong}; steps count from"):
        traced(rollout(step), **BLOCKS)
    first = min(int(t.step_map.min()) for g in sampled_groups(tiny("full")) for t in g.trajectories)
    assert first == 1


def test_ids_outside_the_vocabulary_and_masks_are_not_replaced():
    policy = tiny("block")
    vocabulary, mask_id = policy.family.vocab_size, policy.family.mask_id
    response = traced(rollout([1, 2], ids=[5, vocabulary]), **BLOCKS)
    with pytest.raises(ValueError, match=f"{vocabulary}.*vocabulary"):
        logprobs(policy, [response])
    groups = sampled_groups(policy)
    groups[0].trajectories[0].response_ids[1] = mask_id
    algorithm = build(policy)
    made, _ = context(algorithm, policy)
    (step,) = algorithm.prepare(groups, made).policy
    with pytest.raises(ValueError, match="forbid"):
        sum(algorithm.loss(tokens, policy)[0] for tokens in step)


# --- blocks


@pytest.fixture(scope="module")
def often_ending():
    """A model with many ids that end a text, so that responses end inside blocks."""
    policy = tiny("block")
    policy.family = dataclasses.replace(policy.family, eos_ids=tuple(range(0, 95, 6)))
    return policy


def sampled(policy, prompt, count=8, fixed=None, **options):
    options = {"max_new_tokens": 11, "steps": 11, "temperature": 1.0} | options
    rows = [torch.arange(3, 3 + prompt)] * count
    config = sampler(cache="block", stop_at_eos=True, **options)
    return sample(policy, rows, config, seed=prompt, fixed_ids=[fixed] * count)


def assert_replayed(policy, made):
    options = {"kind": "block", "eos_ids": policy.family.eos_ids, "block_size": 4}
    for (r, token), logprob in logprobs(policy, [traced(t, **options) for t in made]).items():
        assert logprob == pytest.approx(float(made[r].logp_rollout[token]), abs=1e-5)


@pytest.mark.parametrize("prompt", range(1, 9))
def test_states_of_training_are_those_of_decoding_for_any_prompt(often_ending, prompt):
    """Blocks counted from the prompt's end would give states that never occurred."""
    made = sampled(often_ending, prompt)
    assert any(t.tail_ids.numel() for t in made)
    assert_replayed(often_ending, made)
    assert_replayed(tiny("block"), sampled(tiny("block"), prompt))


def test_what_stands_behind_the_end_of_text_in_its_block_is_kept(often_ending):
    """It was visible while the block was finished: without it scores are others."""
    made = sampled(often_ending, 4, count=30)
    late = [  # something behind the end of text was revealed before the last token of the response
        t
        for t in made
        if t.tail_ids.numel() and t.step_map[t.response_length :].min() < t.step_map[-4:].max()
    ]
    without = [
        dataclasses.replace(
            t,
            tail_ids=t.tail_ids[:0],
            step_map=t.step_map[: t.response_length],
            logp_rollout=t.logp_rollout[: t.response_length],
        )
        for t in late
    ]
    assert_replayed(often_ending, late)
    with pytest.raises(AssertionError):
        assert_replayed(often_ending, without)


def test_given_tokens_of_a_tail_were_visible(often_ending):
    fixed = torch.full((8,), often_ending.family.mask_id)
    fixed[[3, 7]] = torch.tensor([5, 9])
    options = {"max_new_tokens": 8, "steps": 8}
    made = sampled(often_ending, 4, count=20, fixed=fixed, **options)
    made = [t for t in made if t.tail_ids.numel() and t.step_map[-1] == 0]
    assert made
    assert_replayed(often_ending, made)


def test_steps_of_other_blocks_are_refused():
    made = rollout([1, 2, 3, 4, 5, 6, 7], prompt=(5,))  # blocks 0: three tokens, 1: four
    assert traced(made, **BLOCKS).num_targets == 7
    words = r"tokens of block 1 at step 2 and still some of block 0 at step 4; blocks of 4 tokens"
    with pytest.raises(ValueError, match=words):
        traced(rollout([1, 3, 4, 2, 5, 6, 7], prompt=(5,)), **BLOCKS)
    with pytest.raises(ValueError, match="still some of block 0 at step 1"):
        traced(rollout([1] * 7, prompt=(5,)), **BLOCKS)
    # larger blocks of training hold whole ones of decoding; smaller ones do not
    eight = rollout([1, 3, 5, 2, 4, 8, 6, 7, 9], prompt=())
    assert traced(eight, kind="block", eos_ids=[], block_size=8).num_targets == 9
    with pytest.raises(ValueError, match="sampled with other blocks"):
        traced(eight, kind="block", eos_ids=[], block_size=4)
    assert traced(eight, kind="full", eos_ids=[], block_size=4).num_targets == 9
    eight.block_size = 8  # as the sampler records it
    assert traced(eight, kind="block", eos_ids=[], block_size=16).num_targets == 9
    for size in (4, 12):
        with pytest.raises(ValueError, match=f"blocks of 8 tokens, which blocks of {size} would"):
            traced(eight, kind="block", eos_ids=[], block_size=size)


# --- the optimizer step


def stepped(rows_per_forward, lr=0.1, **options):
    """The policy after one step of the training loop's own stepper, and its metrics."""
    policy = tiny("block")
    groups = sampled_groups(policy, prompts=3, size=3)  # 9 responses: no even number of packs
    algorithm = build(
        policy, num_prompts=3, group_size=3, rows_per_forward=rows_per_forward, **options
    )
    made, _ = context(algorithm, policy)
    config = TrainConfig(lr=lr, device="cpu", precision="fp32", max_grad_norm=0.5)
    runtime = Runtime(device="cpu", precision="fp32")
    trainees = make_trainees(algorithm.modules(policy), config, runtime)
    stepper, sums = Stepper(trainees, config, runtime), MetricSums()
    samples = algorithm.prepare(groups, made)
    for update in algorithm.updates(samples, made):
        stepper.step(update, algorithm, sums)
    return policy, sums.reduce(None), [len(micros) for micros in samples.policy]


def test_micro_batches_are_summed_once_and_none_is_left_over():
    """Norm, clipping and weights are those of the whole step, for any number of micro-batches."""
    whole, expected, count = stepped(10_000)
    assert count == [1] and expected["train/updates"] == 1
    for budget in (1, 90, 150):
        policy, metrics, count = stepped(budget)
        assert count[0] > 1 and metrics["train/updates"] == 1
        assert metrics["policy/grad_norm"] == pytest.approx(expected["policy/grad_norm"])
        assert metrics["loss"] == pytest.approx(expected["loss"])
        for ours, truth in zip(policy.parameters(), whole.parameters(), strict=True):
            assert torch.allclose(ours, truth, atol=1e-9)
    # the norm that is clipped is that of the objective itself, divided by nothing more
    policy = tiny("block")
    algorithm = build(policy, num_prompts=3, group_size=3)
    made, _ = context(algorithm, policy)
    (tokens,) = algorithm.prepare(sampled_groups(policy, prompts=3, size=3), made).policy[0]
    request = ScoreRequest(
        policy.predicting_rows(tokens.rows.rows, tokens.rows.visibility),
        tokens.rows.targets,
        forbid_ids=(policy.family.mask_id, *policy.family.unused_ids),
    )
    output = policy(tokens.rows.input_ids, tokens.rows.visibility, score=request)
    (-(tokens.advantage * output.logprob).mean()).backward()
    squares = [float(p.grad.square().sum()) for p in policy.parameters() if p.grad is not None]
    assert expected["policy/grad_norm"] == pytest.approx(sum(squares) ** 0.5)


@pytest.mark.parametrize("kind", ["full", "block"])
def test_divergence_and_gain_have_one_divisor(kind):
    """Twice the same tokens weigh as much as once, in both terms."""
    policy = tiny(kind)
    losses = []
    for copies in (1, 2):
        groups = sampled_groups(policy, prompts=1) * copies
        for place, group in enumerate(groups):
            group.trajectories = [
                dataclasses.replace(t, group_id=place) for t in group.trajectories
            ]
        algorithm = build(policy, num_prompts=copies, kl="k3", kl_weight=0.5, epochs=2)
        made, _ = context(algorithm, policy)
        (step,) = algorithm.prepare(groups, made).policy
        for tokens in step:
            tokens.old = tokens.old + torch.linspace(-0.4, 0.4, 7)[tokens.rows.token % 7]
        losses.append(sum(float(algorithm.loss(tokens, policy)[0].detach()) for tokens in step))
    assert losses[0] == pytest.approx(losses[1]) and losses[0] != 0


def test_the_mean_of_a_slice_does_not_depend_on_longer_responses():
    step = torch.tensor([1, 1, 2])
    alone = averaging("slice_mean", torch.zeros(3).long(), step, step)
    sequence = torch.cat([torch.zeros(3), torch.ones(40)]).long()
    company = averaging(
        "slice_mean", sequence, *[torch.cat([step, torch.arange(40)])] * 2, padded_length=40
    )
    assert torch.equal(company.share[:3], alone.share)


# --- end of text, drawn masks, evaluation


def test_end_of_text_that_is_also_the_pad_is_trained():
    """By place and not by id: the first one is a target, pads behind it are not."""
    made = rollout([1, 2, 3, 4, 0, 0, 0], prompt=(5,) * 4, ids=[10, 11, 12, EOS, EOS, EOS, EOS])
    for kind in ("block", "full"):
        response = traced(made, **(BLOCKS | {"kind": kind}))
        assert response.trainable[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]
        assert response.ids[3] == EOS
        one_pad = traced(made, **(BLOCKS | {"kind": kind}), num_pads=1)
        assert one_pad.num_targets == 4  # a filled pad was never drawn
    drawn = rollout([1, 2, 4, 3], prompt=(5,) * 4, ids=[10, EOS, EOS, 12])
    assert traced(drawn, **BLOCKS).num_targets == 2
    assert traced(drawn, **BLOCKS, num_pads=1).num_targets == 3
    assert traced(made, **(BLOCKS | {"kind": "full"})).step[0, 4:].tolist() == [NEVER] * 3


def test_block_models_train_and_evaluate_from_the_command_line(tmp_path, monkeypatch):
    """The first evaluation runs, before any step, with the blocks that training has."""
    monkeypatch.setattr("dlm_fast.training.run_folder.RunFolder.write_curves", lambda self: None)
    words = ["train", "tracerl", "--model-options.kind", "block", "--task", "sudoku"]
    words += ["--rollout.max-new-tokens", "16", "--rollout.block-size", "4", "--rollout.steps", "8"]
    words += ["--rollout.cache", "block", "--rollout.temperature", "1.0", "--seed", "3"]
    words += ["--train.max-steps", "1", "--train.prompts-per-step", "2", "--train.eval-every", "1"]
    words += ["--train.device", "cpu", "--algorithm.group-size", "2", "--train.save-every", "0"]
    words += ["--train.eval-examples", "2", "--algorithm.value", "own"]
    assert main([*words, "--run-dir", str(tmp_path / "run")]) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows if "eval/correct" in r] == [0, 1]
    assert rows[-1]["trace/mismatch_largest"] < 1e-4
