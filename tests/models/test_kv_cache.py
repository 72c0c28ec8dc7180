"""Kept keys and values: attention over them against the definition, growth, wrong use."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dlm_fast
from dlm_fast.models.kv_cache import CachedRows, KeyValueStore
from dlm_fast.ops.interval_attention import interval_attention_ref
from dlm_fast.ops.visibility import Visibility

BLOCK = 3


def rows_of(store, sequences, generator):
    """``sequences``: (tokens kept, new tokens); slots lie anywhere."""
    num_keys = [kept + new for kept, new in sequences]
    order = torch.randperm(sum(num_keys) + 5, generator=generator)
    slots = torch.zeros(len(sequences), max(num_keys), dtype=torch.int64)
    used = 0
    for a, count in enumerate(num_keys):
        slots[a, :count] = order[used : used + count]
        # what lies past a sequence's keys may be empty; the first slot of another serves
        slots[a, count:] = order[-1]
        used += count
    store.reserve(order.numel())
    position = torch.cat([torch.arange(kept, kept + new) for kept, new in sequences])
    member = torch.arange(len(sequences)).repeat_interleave(torch.tensor([n for _, n in sequences]))
    ends = torch.tensor(num_keys)[member]
    return CachedRows(
        store=store,
        slots=slots,
        key_lengths=tuple(num_keys),
        row_lengths=tuple(new for _, new in sequences),
        position_ids=position,
        seen=((position // BLOCK + 1) * BLOCK).minimum(ends),
        write_rows=torch.arange(position.numel()),
        write_slots=slots[member, position],
    )


def _owned(rows):
    return [
        s for held, n in zip(rows.slots, rows.key_lengths, strict=True) for s in held[:n].tolist()
    ]


@settings(deadline=None, max_examples=60)
@given(
    sequences=st.lists(
        st.tuples(st.integers(0, 4).map(lambda b: b * BLOCK), st.integers(1, 7)),
        min_size=1,
        max_size=5,
    ),
    kv_heads=st.sampled_from([1, 2, 4]),
    width=st.sampled_from(
        [8, 64]
    ),  # the kernel reads keys in place, or copies are attended densely
    seed=st.integers(0, 99),
)
def test_attention_is_the_definition_on_the_kept_keys(sequences, kv_heads, width, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    store = KeyValueStore()
    rows = rows_of(store, sequences, generator)
    kept_slots = torch.cat([rows.slots[a, :kept] for a, (kept, _) in enumerate(sequences)])
    kept = [torch.randn(kept_slots.numel(), kv_heads, width, **draw) for _ in range(2)]
    store.write(1, kept_slots, *kept)
    nobody = torch.tensor(sorted(set(range(store.num_slots)) - set(_owned(rows))))
    store.write(1, nobody, *(torch.full((5, kv_heads, width), torch.nan, dtype=torch.float64),) * 2)
    query = torch.randn(4, rows.num_queries, width, **draw)
    new = [torch.randn(kv_heads, rows.num_queries, width, **draw) for _ in range(2)]
    out = rows.attend(1, query, *new, scale=0.3)

    parts = [[], []]
    taken = begin = 0
    for count, fresh in sequences:
        for part, old, now in zip(parts, kept, new, strict=True):
            part += [old[taken : taken + count], now.transpose(0, 1)[begin : begin + fresh]]
        taken, begin = taken + count, begin + fresh
    keys, values = (torch.cat(part) for part in parts)
    wanted = interval_attention_ref(query.transpose(0, 1), keys, values, rows.visibility, 0.3)
    torch.testing.assert_close(out.transpose(0, 1), wanted, atol=1e-12, rtol=0)
    # a row sees its own block and all before it
    whole = Visibility.block_causal([sum(s) for s in sequences], BLOCK).dense()
    first = torch.tensor([0, *[sum(s) for s in sequences]]).cumsum(0)
    asked = torch.cat(
        [torch.arange(first[a] + k, first[a] + k + n) for a, (k, n) in enumerate(sequences)]
    )
    assert rows.visibility.dense().equal(whole[asked])


@pytest.mark.parametrize(("order", "in_place"), [((0, 0, 1), True), ((0, 1, 0), False)])
def test_shared_keys_are_read_in_place_where_their_rows_lie_side_by_side(order, in_place):
    # two sequences hold the same first block, a third one has its own
    generator = torch.Generator().manual_seed(0)
    store = KeyValueStore()
    store.reserve(20)
    slots = torch.stack(
        [
            torch.cat([torch.arange(3) + 3 * own, 6 + 4 * a + torch.arange(4)])
            for a, own in enumerate(order)
        ]
    )
    position = torch.arange(3, 6).repeat(3)
    rows = CachedRows(
        store=store,
        slots=slots,
        key_lengths=(6, 6, 6),
        row_lengths=(3, 3, 3),
        position_ids=position,
        seen=torch.full((9,), 6),
        write_rows=torch.arange(9),
        write_slots=slots[:, 3:6].flatten(),
    )
    kept = [torch.randn(6, 1, 64, generator=generator) for _ in range(2)]
    store.write(0, torch.arange(6), *kept)
    query, *new = (torch.randn(1, 9, 64, generator=generator) for _ in range(3))
    assert (rows._slot_intervals is not None) == in_place
    out = rows.attend(0, query, *new)
    key, value = (x[slots[:, :6].flatten()] for x in store.layer(0))
    wanted = interval_attention_ref(query.transpose(0, 1), key, value, rows.visibility)
    torch.testing.assert_close(out.transpose(0, 1), wanted, atol=1e-5, rtol=0)


def test_a_store_grows_and_copies_in_every_layer():
    store = KeyValueStore()
    store.reserve(2)
    for layer in (0, 1):
        store.write(
            layer, torch.tensor([1, 0]), torch.full((2, 1, 2), layer + 1.0), torch.ones(2, 1, 2)
        )
    store.reserve(9)
    store.copy(torch.tensor([1]), torch.tensor([8]))
    for layer in (0, 1):
        keys, values = store.layer(layer)
        assert keys.shape[0] >= 9
        assert keys[[0, 1, 8]].unique().tolist() == [layer + 1.0]
        assert values[[0, 1, 8]].unique().tolist() == [1.0]


def test_predecessors_of_new_rows():
    rows = rows_of(KeyValueStore(), [(3, 2), (0, 3)], torch.Generator().manual_seed(0))
    assert rows.pred.tolist() == [-1, 0, -1, 2, 3]
    assert (rows.num_queries, rows.num_keys) == (5, 8)


def test_a_cached_forward_is_the_tail_of_the_whole_one():
    policy = dlm_fast.load("tiny", width=16, layers=2, heads=2, kind="block", block_size=BLOCK)
    policy.double()
    ids = torch.randint(0, 90, (8,), generator=torch.Generator().manual_seed(1))
    store, slots = KeyValueStore(), torch.arange(8)
    store.reserve(8)

    def part(first, stop):
        position = torch.arange(first, stop)
        return CachedRows(
            store=store,
            slots=slots[None],
            key_lengths=(stop,),
            row_lengths=(stop - first,),
            position_ids=position,
            seen=((position // BLOCK + 1) * BLOCK).clamp(max=stop),
            write_rows=torch.arange(stop - first),
            write_slots=slots[first:stop],
        )

    with torch.no_grad():
        whole = policy.logits(ids[None])[0]
        first = policy.logits(ids[:3], part(0, 3))
        rest = policy.logits(ids[3:], part(3, 8))
    torch.testing.assert_close(torch.cat([first, rest]), whole, atol=1e-12, rtol=0)

    with pytest.raises(ValueError, match=r"carry no gradient.*no_grad"):
        policy.logits(ids[:3], part(0, 3))
    with torch.no_grad(), pytest.raises(ValueError, match=r"input_ids is \[4\].*\[3\] new rows"):
        policy.logits(ids[:4], part(0, 3))
    with pytest.raises(ValueError, match="make them on the model's device"):
        part(0, 3).to("meta")
