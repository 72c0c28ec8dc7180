"""The emulator itself: it computes what the hardware does, and finds what the hardware hides."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dlm_fast import _C_emulated
from dlm_fast.ops._executor import Emulated

CPU = torch.device("cpu")
POISON = 0x7FFFFFFF  # what fresh shared memory holds


def launch(
    name: str,
    output: Tensor,
    input: Tensor | None = None,
    *,
    order: str = "forward",
    grid: tuple[int, int] = (2, 1),
    threads: int = 64,
    cluster: int = 1,
    shared: int | None = None,
    count: int = 0,
    seed: int = 0,
) -> Tensor:
    params = struct.pack(
        "PPq", input.data_ptr() if input is not None else 0, output.data_ptr(), count
    )
    shared = 4 * threads if shared is None else shared
    plan = (f"selftest_{name}", grid, threads, cluster, shared, params)
    Emulated(order, seed).launch(plan, CPU)
    return output


def words(count: int) -> Tensor:
    return torch.full((count,), -1, dtype=torch.int64).to(torch.uint32)


def as_ints(values: Tensor) -> list[int]:
    return values.to(torch.int64).tolist()


# --- barriers


@pytest.mark.parametrize("order", Emulated.ORDERS)
def test_a_barrier_shows_what_other_threads_wrote(order):
    want = 2 * [max(thread - 1, 0) for thread in range(64)]
    assert as_ints(launch("left_neighbour", words(128), order=order)) == want
    want = 2 * [thread - (thread % 32 > 0) for thread in range(64)]
    assert as_ints(launch("left_lane", words(128), order=order)) == want


@pytest.mark.parametrize("kernel", ["left_neighbour", "left_lane"])
def test_a_missing_barrier_shows_in_reverse_and_at_random(kernel):
    good = as_ints(launch(kernel, words(128)))
    name = f"{kernel}_no_barrier"
    assert as_ints(launch(name, words(128))) == good, "in forward order it goes unseen"
    for order in ("reverse", "random"):
        assert POISON in as_ints(launch(name, words(128), order=order))


@pytest.mark.parametrize("order", Emulated.ORDERS)
def test_in_reverse_a_warp_runs_ahead(order):
    assert set(as_ints(launch("late_word", words(128), order=order))) == {1}
    ahead = as_ints(launch("late_word_no_barrier", words(128), order=order))
    assert (POISON in ahead) == (order == "reverse")


@pytest.mark.parametrize("order", Emulated.ORDERS)
@pytest.mark.parametrize(
    ("kernel", "count", "message"),
    [
        ("wait_at_two_places", 0, "64 threads wait for others that never come; 0 have left"),
        ("leave_before_the_barrier", 1, "63 threads wait for others that never come; 1 have left"),
        ("leave_before_the_barrier", 32, "32 threads wait for others .* 32 have left"),
        ("leave_before_the_shuffle", 40, "24 threads wait for others .* 40 have left"),
    ],
)
def test_threads_that_wait_for_ever_are_an_error(kernel, count, message, order):
    with pytest.raises(RuntimeError, match=f"selftest_{kernel}: {message}"):
        launch(kernel, words(128), order=order, count=count)
    # and the emulator is as good as new
    assert as_ints(launch("left_neighbour", words(128), order=order))[:3] == [0, 0, 1]


def test_a_whole_warp_may_leave_before_a_shuffle():
    launch("leave_before_the_shuffle", words(128), count=32)


# --- shared memory


def test_shared_memory_is_fresh_in_every_block():
    launch("left_neighbour", words(128))
    assert set(as_ints(launch("read_fresh", words(192), grid=(3, 1)))) == {POISON}


def test_the_sanitizer_sees_a_step_behind_shared_memory():
    if not _C_emulated.sanitized:
        pytest.skip("needs the build with sanitizers (DLM_SANITIZE=ON)")
    code = (
        "import struct, torch; from dlm_fast.ops._executor import Emulated\n"
        "out = torch.zeros(64, dtype=torch.int32)\n"
        "for count in (31, 32):\n"
        "    params = struct.pack('PPq', 0, out.data_ptr(), count)\n"
        "    plan = ('selftest_read_behind_the_end', (2, 1), 32, 1, 128, params)\n"
        "    Emulated().launch(plan, torch.device('cpu'))\n"
        "    print('read', count, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout == "read 31\n", done.stdout + done.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


# --- asynchronous copies


@pytest.mark.parametrize(
    ("allowed", "arrived"), [(0, (True, True)), (1, (True, False)), (2, (False, False))]
)
def test_copies_arrive_at_the_wait_and_not_before(allowed, arrived):
    source = torch.arange(2 * 32 * 4, dtype=torch.int32)
    out = launch(
        "read_first_copy", words(128), source, threads=32, shared=1024, count=allowed
    ).reshape(64, 2)
    for copy in (0, 1):
        want = [copy * 128 + 4 * thread for thread in range(32)] * 2
        assert as_ints(out[:, copy]) == (want if arrived[copy] else [POISON] * 64)


@pytest.mark.parametrize("kernel", ["leave_a_copy", "leave_an_open_group"])
def test_copies_that_nobody_awaits_are_an_error(kernel):
    source = torch.zeros(256, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="asynchronous copies left unawaited"):
        launch(kernel, words(1), source, threads=32, shared=1024)


# --- exchange inside a warp and a cluster


@pytest.mark.parametrize("order", Emulated.ORDERS)
def test_lanes_exchange_words(order):
    generator = torch.Generator().manual_seed(3)
    mine = torch.randint(0, 1 << 32, (128,), generator=generator)
    out = launch("exchange_words", words(512), mine.to(torch.uint32), order=order).reshape(128, 4)
    lanes = mine.reshape(4, 32)
    lane = torch.arange(32)
    assert torch.equal(out[:, 0].to(torch.int64), lanes[:, lane ^ 5].flatten())
    assert torch.equal(out[:, 1].to(torch.int64), lanes[:, 7:8].expand(4, 32).flatten())
    votes = ((lanes & 1) << lane).sum(1, keepdim=True)
    assert torch.equal(out[:, 2].to(torch.int64), votes.expand(4, 32).flatten())
    assert as_ints(out[:, 3]) == [value.bit_count() for value in mine.tolist()]


@pytest.mark.parametrize("order", Emulated.ORDERS)
def test_lanes_exchange_doubles(order):
    mine = torch.randn(128, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    out = launch("exchange_doubles", torch.empty_like(mine), mine, order=order)
    assert torch.equal(out, mine.reshape(4, 2, 16).flip(1).flatten())


@pytest.mark.parametrize("order", Emulated.ORDERS)
def test_blocks_of_a_cluster_read_each_other(order):
    grid, cluster = (6, 2), 3
    out = torch.full((2, 6, cluster), torch.nan)
    launch("visit_cluster", out, order=order, grid=grid, cluster=cluster, shared=8, count=cluster)
    block = torch.arange(6)
    want = 100.0 * torch.arange(2)[:, None, None] + (block // 3 * 3)[:, None] + torch.arange(3)
    assert torch.equal(out, want)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_a_block_that_leaves_early_keeps_nothing_for_its_cluster(order):
    out = torch.zeros(2, 6, 3)
    options = {"order": order, "grid": (6, 2), "cluster": 3, "shared": 8, "count": 3}
    launch("visit_cluster_and_leave", out, **options)
    assert out.isnan().any()


# --- order of turns


def test_threads_and_blocks_come_in_the_order_asked_for():
    def tickets(order: str, seed: int = 0) -> list[int]:
        counter = torch.zeros(2, dtype=torch.int32)
        out = launch("take_a_ticket", words(128), counter, order=order, seed=seed)
        assert counter.tolist() == [128, -1]
        return as_ints(out)

    forward = list(range(128))
    assert tickets("forward") == forward
    assert tickets("reverse") == forward[::-1]
    shuffled = [tickets("random", seed) for seed in (0, 1)]
    assert sorted(shuffled[0]) == forward and shuffled[0] not in (forward, forward[::-1])
    assert shuffled[0] != shuffled[1] and shuffled[0] == tickets("random", 0)


# --- arithmetic


def every_16_bits(dtype: torch.dtype) -> Tensor:
    return torch.arange(1 << 16).to(torch.uint16).view(dtype)


def elementwise(kernel: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    output = torch.empty(values.shape, dtype=dtype)
    blocks = -(-values.numel() // 1024)
    return launch(
        kernel, output, values, grid=(blocks, 1), threads=1024, shared=0, count=values.numel()
    )


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("widen_halves", torch.float16), ("widen_bfloat16", torch.bfloat16)],
)
def test_every_16_bit_number_widens_as_in_torch(kernel, dtype):
    numbers = every_16_bits(dtype)
    wide = elementwise(kernel, numbers, torch.float32)
    torch.testing.assert_close(wide, numbers.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(wide.signbit(), numbers.signbit())


def numbers_to_round(dtype: torch.dtype) -> Tensor:
    """Around every number of the type and halfway to the next one, and random bits."""
    numbers = every_16_bits(dtype).float()
    finite = numbers[numbers.isfinite()].sort().values
    halfway = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    anchors = torch.cat([finite, halfway])
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    generator = torch.Generator().manual_seed(5)
    random = torch.randint(0, 1 << 32, (1 << 16,), generator=generator).to(torch.uint32)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 65519.996, 65520.0])
    near = [anchors, anchors.nextafter(up), anchors.nextafter(down)]
    return torch.cat([*near, random.view(torch.float32), special])


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("narrow_halves", torch.float16), ("narrow_bfloat16", torch.bfloat16)],
)
def test_floats_round_as_in_torch(kernel, dtype):
    values = numbers_to_round(dtype)
    got, want = elementwise(kernel, values, dtype), values.to(dtype)
    assert torch.equal(got.isnan(), values.isnan())
    known = ~values.isnan()
    assert torch.equal(got.view(torch.int16)[known], want.view(torch.int16)[known])


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
@pytest.mark.parametrize("order", Emulated.ORDERS)
def test_the_matrix_instruction_multiplies(name, dtype, order):
    generator = torch.Generator().manual_seed(6)
    # few bits, so that every order of summation gives the same float
    left = torch.randint(-8, 9, (16, 16), generator=generator).to(dtype)
    right = torch.randint(-8, 9, (16, 8), generator=generator).to(dtype)
    start = torch.randn(16, 8, generator=generator).mul(64).round()
    factors = torch.cat([left.flatten(), right.flatten()])
    out = launch(
        f"multiply_tiles_{name}", start.clone(), factors, order=order, grid=(1, 1), threads=32
    )
    assert torch.equal(out, start + left.float() @ right.float())


# --- launches that hardware would refuse


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 33}, "multiple of 32"),
        ({"threads": 0}, "multiple of 32"),
        ({"threads": 1056}, "up to 1024"),
        ({"grid": (0, 1)}, "empty or large grid"),
        ({"grid": (1, 65536)}, "empty or large grid"),
        ({"grid": (3, 1), "cluster": 2}, "multiple of the cluster"),
        ({"shared": (227 << 10) + 1}, "more shared memory than a block can have"),
    ],
)
def test_impossible_launches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        launch("read_fresh", words(128), **options)


def test_unknown_kernels_and_other_parameters_are_refused():
    with pytest.raises(ValueError, match="no kernel is named selftest_nothing"):
        launch("nothing", words(1))
    with pytest.raises(ValueError, match="parameters of another size"):
        Emulated().launch(("selftest_read_fresh", (1, 1), 32, 1, 128, b"12345678"), CPU)
