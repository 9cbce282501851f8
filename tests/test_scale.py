"""benchmarks/scale.py: the largest models are planned in little time and memory, and divided evenly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import quantize_fp8

pytestmark = pytest.mark.xdist_group("scale")  # one run of the benchmark for all

BENCHMARKS = Path(quantize_fp8.__file__).resolve().parent / "benchmarks"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What one run of the benchmark found; 1 GB/s per rank and 10 for all are given to it."""
    folder = tmp_path_factory.mktemp("scale")
    command = [sys.executable, BENCHMARKS / "scale.py", "--folder", folder / "scratch"]
    command += ["--models", "397B-A17B;35B-A3B", "--ranks", "1,8,64", "--repeat", "1"]
    command += ["--rate-gbps", "1", "--storage-gbps", "10", "--json", folder / "found.json"]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    assert list((folder / "scratch").iterdir()) == []
    return json.loads((folder / "found.json").read_text())["rows"]


def of_table(rows: list[dict], table: str, model: str) -> list[dict]:
    return [row for row in rows if row["table"] == table and row["model"] == model]


@pytest.mark.parametrize(
    ("model", "billions", "matrices"),
    [
        # With the draft layer. Matrices: 3 per expert of every layer, 2 per linear attention, 4 per full.
        ("397B-A17B", 402.9, 61 * 3 * 512 + 45 * 2 + 16 * 4),
        ("35B-A3B", 35.5, 41 * 3 * 256 + 30 * 2 + 11 * 4),
    ],
)
def test_sparse_checkpoints_are_of_the_real_size(
    model: str, billions: float, matrices: int, rows: list[dict]
) -> None:
    (found,) = of_table(rows, "planning", model)
    assert found["B weights"] == pytest.approx(billions, abs=0.05)
    assert found["GB apparent"] == pytest.approx(2 * billions, rel=0.01)
    assert found["MB on disk"] < 5
    assert found["matrices"] == matrices


def test_the_largest_model_is_planned_in_ten_seconds_and_one_gibibyte(rows: list[dict]) -> None:
    """Of processor time: how long that takes is up to what else the machine does."""
    (found,) = of_table(rows, "planning", "397B-A17B")
    assert found["CPU s"] < 10
    assert found["peak RSS MiB"] < 1024


@pytest.mark.parametrize("model", ["397B-A17B", "35B-A3B"])
def test_work_is_divided_evenly(model: str, rows: list[dict]) -> None:
    for row in of_table(rows, "division", model):
        assert row["busiest / mean"] <= 1.1, row
        assert row["rank 0 at half speed: time / best"] <= 1.1, row


def test_prediction_is_bound_by_the_ranks_or_by_the_storage(rows: list[dict]) -> None:
    """806 GB in, 408 out: 806 s for one rank at 1 GB/s, 121 s for the storage however many there are."""
    wall = {row["ranks"]: row["wall s"] for row in of_table(rows, "prediction", "397B-A17B")}
    assert wall[1] == pytest.approx(806, abs=1)
    assert wall[8] == pytest.approx(806 / 8, rel=0.1) or wall[8] == pytest.approx(121.4, abs=1)
    assert wall[64] == pytest.approx(121.4, abs=1)


def test_groups_stay_together(request: pytest.FixtureRequest) -> None:
    """pytest-xdist marks their tests' names, or says nothing and runs them wherever there is room."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("one process, or one that takes no notice of groups")
    assert request.node.nodeid.endswith("@scale")


def test_a_unit_goes_to_the_rank_that_is_free_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from scale import claim

    # Rank 1 is twice as fast: it takes 4 (till 2), the 3 after it (till 3.5) and the 1 (till 4).
    assert claim([6, 4, 3, 1], [1.0, 2.0]) == ([6, 8], 6.0)
    assert claim([2, 2, 2], [1.0, 1.0]) == ([4, 2], 4.0)
