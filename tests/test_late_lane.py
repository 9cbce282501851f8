"""Copies that are late, writers that are slow or hasty: the same bytes, and every mistake is seen.

Each mutation breaks one thing that the pipeline does right. That the tests below see it is what makes the
first one mean something.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.layout import ShardPlan
from fp8lib.checkpoint.plan import make_plan
from fp8lib.numerics.modes import Calibration
from fp8lib.streaming import lanes
from fp8lib.streaming.convert import Nearest
from fp8lib.streaming.lanes import Lane, ReadAhead
from fp8lib.streaming.scheduler import _IN_FLIGHT
from fp8lib.streaming.shard_job import Settings, ShardJob
from fp8lib.streaming.units import divide
from fp8lib.verification.claim import Claim
from fp8lib.verification.pairing import planned_pairs
from fp8lib.verification.shard_check import ShardCheck
from late_lane import HastyPool, LateCuda, LateReadError, SlowPool, drive, wait_for

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device here")

PIECE = 128 * 256
"""One expert's gate, up or down projection of the checkpoint: many pieces of one size."""


@pytest.fixture(scope="module")
def plan(checkpoint: Callable) -> ShardPlan:
    [shard] = make_plan(
        open_checkpoint(checkpoint("moe_text", num_hidden_layers=1, num_experts=4, mtp=False))
    ).shards
    return shard


@pytest.fixture(scope="module")
def expected(plan: ShardPlan, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return quantize_late(plan, tmp_path_factory.mktemp("cpu"), torch.device("cpu"))


def quantize_late(
    plan: ShardPlan,
    folder: Path,
    device: torch.device,
    *,
    readers: int = 0,
    writer: type = HastyPool,
    compute_late: bool = False,
    turns: int = _IN_FLIGHT + 1,
    lane_of: type = Lane,
) -> bytes:
    """The shard that one worker writes whose every thread is as early or as late as it may be."""
    (unit,) = divide([plan], 1, False)
    settings = Settings(Nearest(Calibration("rms")), device, 1, piece=PIECE, batch=0, readers=readers)
    job = ShardJob(plan.name, plan.size, settings, sources=plan.sources, unit=unit)
    lane, ahead = lane_of(device), ReadAhead(device, 1, turns)
    ahead._pool = HastyPool()  # reads as early as it may
    lane._writer = writer()
    job.open_output(folder)
    try:
        drive(job.tasks(lambda name, count: None, ahead), lane, _IN_FLIGHT, compute_late)
        job.make_durable(lambda unit: True)
    finally:
        job.close()
    return (folder / plan.name).read_bytes()


@pytest.fixture
def late(plan: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """`late(**how)`: the shard that a late device writes."""
    monkeypatch.setattr(lanes, "wait", wait_for)

    def run(**how: object) -> bytes:
        with LateCuda():
            return quantize_late(plan, tmp_path, torch.device("cuda:0"), **how)

    return run


@pytest.mark.parametrize("compute_late", [False, True], ids=["computes early", "computes late"])
@pytest.mark.parametrize("writer", [HastyPool, SlowPool], ids=["hasty writer", "slow writer"])
@pytest.mark.parametrize("readers", [0, 1], ids=["reads itself", "read ahead"])
def test_late_copies_give_the_same_bytes(
    readers: int, writer: type, compute_late: bool, late: Callable, expected: bytes
) -> None:
    assert late(readers=readers, writer=writer, compute_late=compute_late) == expected


class NoSynchronization(Lane):
    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("readers", [0, 1])
def test_a_missing_synchronization_is_seen(readers: int, late: Callable, expected: bytes) -> None:
    assert late(lane_of=NoSynchronization, readers=readers) != expected


class SynchronizationEverySecondTime(Lane):
    calls = 0

    def synchronize(self) -> None:
        self.calls += 1
        if self.calls % 2 == 0:
            super().synchronize()


def test_a_source_that_is_overwritten_too_early_is_seen(late: Callable) -> None:
    with pytest.raises(LateReadError):
        late(lane_of=SynchronizationEverySecondTime)


class LateSynchronization(Lane):
    """Waits when the writer has been called."""

    def synchronize(self) -> None:
        pass

    def write_behind(self, function: Callable, *arguments: object) -> object:
        written = super().write_behind(function, *arguments)
        super().synchronize()
        return written


def test_a_late_synchronization_is_seen(late: Callable, expected: bytes) -> None:
    assert late(lane_of=LateSynchronization) != expected


class TooFewOutputs(Lane):
    def next_output(self) -> int:
        return super().next_output() % 2


def test_too_few_output_buffers_are_seen(late: Callable, expected: bytes) -> None:
    assert late(lane_of=TooFewOutputs, writer=SlowPool) != expected


def test_too_few_turns_of_reading_are_seen(late: Callable, expected: bytes) -> None:
    assert late(readers=1, compute_late=True, turns=_IN_FLIGHT) != expected


# --- reading a shard back ----------------------------------------------------------------------


@pytest.mark.parametrize("turns", [_IN_FLIGHT + 1, _IN_FLIGHT])
def test_a_check_measures_the_same_as_long_as_buffers_suffice(
    turns: int, plan: ShardPlan, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / plan.name
    path.write_bytes(expected)
    found = []
    monkeypatch.setattr("fp8lib.verification.shard_check.AT_A_TIME", {"cpu": PIECE, "cuda": PIECE})
    for cuda in (False, True):
        check = ShardCheck(plan.name, planned_pairs(plan, path), [], samples=None, seed=0, claim=Claim(True))
        with LateCuda():
            device = torch.device("cuda:0" if cuda else "cpu")
            lane, ahead = Lane(device), ReadAhead(device, 1, turns if cuda else 1000)
            ahead._pool = HastyPool()
            job = ShardJob(plan.name, plan.size, None, sources=plan.sources)
            drive(check.tasks(job.files, ahead), lane, _IN_FLIGHT, compute_late=True)
            job.close()
        assert not check.problems
        found.append([m.cosine for m in check.measurements()])
    same = found[1] == pytest.approx(found[0], abs=1e-6)
    assert same == (turns > _IN_FLIGHT)
