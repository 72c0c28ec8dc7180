"""Pages and the queue before them: exact counts in any order of events, sharing, no standstill."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast.rollout.admission import Admission, RowSize
from dlm_fast.rollout.pages import Pages


@pytest.mark.parametrize(
    ("tokens", "pages"), [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)]
)
def test_pages_of_a_length(tokens, pages):
    assert Pages(4).needed(tokens) == pages


def test_a_page_is_free_when_its_last_holder_drops_it():
    pages = Pages(4, limit=3)
    first = pages.take(2)
    pages.hold(first)
    pages.drop(first)
    assert (pages.used, pages.holders(first[0])) == (2, 1)
    with pytest.raises(RuntimeError, match="2 pages were asked for with 2 of 3 in use"):
        pages.take(2)
    pages.drop(first)
    assert pages.used == 0
    assert sorted(pages.take(3)) == [0, 1, 2] and pages.peak == 3 and pages.made == 3


def sizes_of(prompts, window):
    return [
        RowSize(shared_key=prompt, shared_length=prompt * 3, longest=prompt * 3 + window)
        for prompt in prompts
    ]


@settings(deadline=None, max_examples=200)
@given(
    prompts=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    window=st.integers(1, 9),
    page=st.integers(1, 7),
    spare=st.integers(0, 6),
    max_batch=st.sampled_from([None, 1, 2, 3]),
    data=st.data(),
)
def test_all_rows_pass_through_any_cache_that_holds_one(
    prompts, window, page, spare, max_batch, data
):
    sizes = sizes_of(prompts, window)
    unlimited = Pages(page)
    need = max(
        unlimited.needed(s.shared_length) + unlimited.needed(s.longest) - s.shared_length // page
        for s in sizes
    )
    pages = Pages(page, limit=need + spare)
    admission = Admission(pages, sizes, range(len(sizes)), max_batch)
    length, passed = {}, []
    while len(passed) < len(sizes):
        for entered in admission.enter():
            length[entered.row] = sizes[entered.row].shared_length
            assert (entered.copy_to is not None) == (length[entered.row] % page > 0)
        inside = admission.inside
        assert inside, "a standstill"
        assert max_batch is None or len(inside) <= max_batch
        row = data.draw(st.sampled_from(inside))
        if length[row] < sizes[row].longest and data.draw(st.booleans()):
            length[row] += 1
            admission.grow(row, length[row])
        else:
            admission.leave(row)
            passed.append(row)
        lists = admission.page_lists
        assert all(len(held) == pages.needed(length[r]) for r, held in lists.items())
        # what a row writes to is its own
        assert all(
            pages.holders(p) == 1
            for r, held in lists.items()
            for p in held[sizes[r].shared_length // page :]
        )
        assert pages.used <= pages.limit
    assert pages.used == 0


def test_rows_of_a_prompt_share_its_whole_pages_and_copy_the_rest():
    pages = Pages(4)
    admission = Admission(pages, sizes_of([2, 2, 2], window=6), range(3), None)
    first, second, third = admission.enter()
    assert [e.fills_shared for e in (first, second, third)] == [True, False, False]
    lists = admission.page_lists
    assert lists[0][:1] == lists[1][:1] == lists[2][:1]  # tokens 0 to 3 of 6
    assert len({lists[row][1] for row in range(3)}) == 3
    assert {e.copy_from for e in (first, second, third)} == {admission.shared_pages(0)[1]}
    assert pages.used == 2 + 3
    for row in range(3):
        assert pages.used > 0
        admission.leave(row)
    assert pages.used == 0


def test_a_row_that_never_fits_is_named():
    with pytest.raises(ValueError, match=r"prompt 1 needs 5 pages.*rollout\.cache_pages=3"):
        Admission(Pages(4, limit=3), sizes_of([0, 2], window=8), range(2), None)
