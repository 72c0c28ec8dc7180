"""Known mistakes of open samplers for block diffusion, each with the case that shows it.

Batches and padding: test_rows.py, test_network.py. Schedules and the last masked token:
test_rows.py. End of text in the prompt: test_end_of_text.py. Waiting for pages: test_admission.py.
"""

import pytest
import torch

import dlm_fast
from dlm_fast.rollout import SamplerConfig, sample
from dlm_fast.rollout.admission import Admission, RowSize
from dlm_fast.rollout.pages import Pages

CACHES = {"full": ["none", "prefix", "dual"], "block": ["none", "block"]}
EVERY_WAY = [(kind, cache) for kind, caches in CACHES.items() for cache in caches]
RULES = [("top_k", None), ("dynamic", 0.9), ("threshold", 0.9), ("factor", 1.0), ("eb", 1.0)]


def tiny(kind):
    options = {"width": 16, "heads": 2, "layers": 2, "block_size": 4, "seed": 2}
    return dlm_fast.load("tiny", kind=kind, **options)


def prompts_of(policy, *lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 90, (n,), generator=generator) for n in lengths]


class Counted:
    """Runs ``policy.stats``; counts forwards that were asked for tokens."""

    def __init__(self, policy):
        self.policy, self.forwards = policy, 0

    def __call__(self, input_ids, visibility, *, rows, **options):
        self.forwards += bool(rows.numel())
        return self.policy.stats(input_ids, visibility, rows=rows, **options)


@pytest.mark.parametrize(("kind", "cache"), EVERY_WAY)
def test_one_step_per_block_takes_one_forward_per_block(kind, cache):
    """No second pass over a finished block, no schedule read behind its end."""
    policy = tiny(kind)
    counted = Counted(policy)
    config = SamplerConfig(max_new_tokens=12, block_size=4, steps=3, cache=cache)
    (made,) = sample(policy, prompts_of(policy, 8), config, forward=counted)
    assert made.step_map.tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert counted.forwards == made.num_forwards == 3


@pytest.mark.parametrize(("rule", "bound"), RULES)
@pytest.mark.parametrize(("kind", "cache"), EVERY_WAY)
def test_a_step_takes_no_more_than_is_masked_and_nothing_twice(kind, cache, rule, bound):
    """Two tokens a step in blocks cut to odd lengths, some of their tokens given."""
    policy, width = tiny(kind), 11
    prompts = prompts_of(policy, 3, 4, 6, 9)
    fixed = torch.full((width,), policy.family.mask_id)
    fixed[[0, 5, 6]] = torch.tensor([7, 8, 9])
    steps = 6 if rule == "top_k" else 4
    config = SamplerConfig(
        max_new_tokens=width, block_size=4, steps=steps, cache=cache, rule=rule, bound=bound,
        temperature=1.0, early_stop=False,
    )  # fmt: skip
    for made, prompt in zip(
        sample(policy, prompts, config, seed=1, fixed_ids=[fixed] * 4), prompts, strict=True
    ):
        assert made.prompt_ids.equal(prompt)
        assert made.response_ids[[0, 5, 6]].tolist() == [7, 8, 9]
        assert (made.step_map == 0).nonzero()[:, 0].tolist() == [0, 5, 6]
        revealed = made.step_map[made.step_map > 0].unique().tolist()
        assert revealed == list(range(1, made.num_forwards + 1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("kind", "cache"), EVERY_WAY)
def test_a_model_that_prefers_the_mask_never_draws_it(kind, cache, temperature):
    policy = tiny(kind)
    mask_id = policy.family.mask_id
    ids, seen = torch.full((1, 4), mask_id), []
    hook = policy.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        policy.logits(ids)
        hook.remove()
        direction = seen[0].flatten(0, -2).mean(0)
        policy.lm_head.weight[mask_id] = 50 * direction / direction.norm()
        assert (policy.logits(ids).argmax(-1) == mask_id).all()
    config = SamplerConfig(
        max_new_tokens=10, block_size=4, steps=10, cache=cache, temperature=temperature
    )
    for made in sample(policy, prompts_of(policy, 4, 5, 7, 8), config, seed=2):
        assert mask_id not in made.response_ids


@pytest.mark.parametrize("block_size", [4, 32, 64])
@pytest.mark.parametrize(("prompt", "pages_of_row"), [(0, 8), (150, 9)])
def test_a_long_answer_holds_the_pages_of_its_tokens(block_size, prompt, pages_of_row):
    """2000 tokens, one a step, pages of 256: a length that fills its last page takes no new one at
    every pass (open engines then hold 41 pages with blocks of 4, and 521 with blocks of 64)."""
    shared = prompt // block_size * block_size
    pages = Pages(256)
    size = RowSize(shared_key=0, shared_length=shared, longest=prompt + 2000)
    admission = Admission(pages, [size], [0], None)
    admission.enter()
    for start in range(shared, prompt + 2000, block_size):
        end = min(start + block_size, prompt + 2000)
        for _ in range(block_size + 1):  # every pass of the block, and its commit
            admission.grow(0, end)
            assert len(admission.page_lists[0]) == -(-end // 256)
    assert len(admission.page_lists[0]) == pages_of_row
    admission.leave(0)
    assert pages.used == 0
