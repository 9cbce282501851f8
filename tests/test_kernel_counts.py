"""What a piece asks of a CUDA device, held below bounds: launches, waits of the host, bytes.

`benchmarks/bench_kernels.py --count` prints the same counts; docs/on-a-gpu.md shows them.
"""

import pytest
import torch

from kernel_counts import count_all, count_others

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device here")

LAUNCHES = {"max": 25, "percentile": 56, "rms": 107, "mse": 87}
"""As counted, the most of a mode with both scale formats, weighted or not. One takes the host 5 us or so, so
that a piece of 16 M weights is started in half a millisecond, while its 32 MB take that long to arrive."""
WAITS = {"max": 1, "rms": 1, "percentile": 2, "mse": 4}
"""One for the results. `percentile` asks how many of the largest it needs, `mse` whether a block is in doubt;
CUDA's `bincount` looks for the least and the largest value."""
TOUCHED, PEAK = 80, 20
"""Bytes a weight. At 80, memory of 3.3 TB/s allows 41 G weights/s: what 82 GB/s of BF16 bring."""


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return count_all(1, 128, 256)


def test_every_mode_stays_below_its_bounds(rows: list[dict]) -> None:
    for row in rows:
        mode = row["kernel"].partition(",")[0]
        assert row["launches"] <= LAUNCHES[mode], row
        assert row["waits"] <= WAITS[mode], row
        assert row["touched, bytes/weight"] <= TOUCHED, row
        assert row["peak, bytes/weight"] <= PEAK, row


def test_weights_go_up_once_and_codes_come_down_once(rows: list[dict]) -> None:
    for row in rows:
        # BF16 up, with four bytes for each of 256 channels over 128 rows; a code down, a scale for
        # 128 x 128, and the eight bytes of one answer.
        assert row["up, bytes/weight"] <= 2 + 4 / 128, row
        assert row["down, bytes/weight"] <= 1 + 2 / 128**2 + 8 / (128 * 256), row


def test_nothing_is_copied_from_pageable_memory(rows: list[dict]) -> None:
    for row in rows:
        assert "pageable" not in row["waits for"], row


def test_many_matrices_take_the_launches_and_waits_of_one(rows: list[dict]) -> None:
    many = count_all(5, 128, 256)
    for one, five in zip(rows, many, strict=True):
        assert (five["launches"], five["waits"]) == (one["launches"], one["waits"]), five["kernel"]


def test_second_order_rounding_takes_a_dozen_launches_a_column_however_many_matrices() -> None:
    # 10 a column, and what comes before and after. Scales are chosen, and errors added up, for each matrix.
    each = {"second order": LAUNCHES["rms"], "output errors measured": 8}
    for matrices in (1, 5):
        found = {row["kernel"]: row for row in count_others(matrices, 128, 128)}
        for kernel, more in each.items():
            assert found[kernel]["launches"] <= 12 * 128 + more * matrices, found[kernel]
            assert found[kernel]["waits"] <= 2, found[kernel]  # the order of channels, and the results


def test_measuring_waits_twice_unless_scales_are_searched() -> None:
    for matrices in (1, 5):
        for row in count_others(matrices, 128, 128):
            if row["kernel"].startswith("measured"):
                # Sums of each piece by itself, as on a CPU. Where scales are no powers of two the best of all
                # is searched, as `mse` does, with its three waits, and which blocks may profit goes up.
                searched = row["kernel"].endswith("bf16")
                assert row["waits"] <= 2 + 5 * matrices * searched, row
                assert row["launches"] <= (240 if searched else 70) * matrices, row
                assert row["up, bytes/weight"] <= 3 + (2 + 16 * searched) / 128**2, row
