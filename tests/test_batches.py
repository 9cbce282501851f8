"""Matrices converted together, bytes read ahead, shards hashed in turn: the same bytes.

And what happens where direct I/O is not to be had for the buffers that there are.
"""

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
import torch

from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.layout import PAGE, Matrix, Passthrough
from fp8lib.checkpoint.plan import make_plan
from fp8lib.numerics.modes import MODES, Calibration
from fp8lib.streaming.checksum import OrderedDigest
from fp8lib.streaming.convert import Nearest
from fp8lib.streaming.lanes import Files, Lane, Way
from fp8lib.streaming.pipeline import process
from fp8lib.streaming.shard_job import CUDA_PIECE, Settings
from fp8lib.streaming.units import Unit, batches, divide, pieces
from fp8lib.streaming.writer import ShardWriter

CPU = torch.device("cpu")


def statistics(name: str, columns: int) -> np.ndarray | None:
    """Another row for every weight, and none for some."""
    seed = sum(map(ord, name))
    return None if seed % 7 == 0 else np.random.default_rng(seed).random(columns, np.float32) ** 4


def written(source: Path, folder: Path, settings: Settings) -> dict[str, bytes]:
    folder.mkdir()
    work = divide(list(make_plan(open_checkpoint(source)).shards), 1, False)
    return {d.name: (folder / d.name).read_bytes() for d in process(work, folder, settings)}


# --- batches -----------------------------------------------------------------------------------

LAYOUTS = {
    "fused experts": ("moe", {"shards": 2, "num_hidden_layers": 1}),
    "one by one": ("moe", {"experts": "per_expert", "num_hidden_layers": 1}),
    "odd sizes": ("text", {"hidden_size": 384, "intermediate_size": 704, "num_hidden_layers": 1}),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_gives_the_bytes_of_its_matrices(
    layout: str, weighted: bool, tmp_path: Path, checkpoint: Callable
) -> None:
    kind, arguments = LAYOUTS[layout]
    source = checkpoint(kind, **arguments)
    for mode in MODES if weighted else ("rms", "mse"):
        convert = Nearest(Calibration(mode), statistics if weighted else None)
        one = written(source, tmp_path / f"{mode} one", Settings(convert, CPU, 2, batch=0))
        # As on CUDA: several matrices, all of a shard's, with readers of their own.
        for batch in (200_000, CUDA_PIECE):
            settings = Settings(convert, CPU, 2, piece=100_000, batch=batch, readers=3)
            assert written(source, tmp_path / f"{mode} {batch}", settings) == one


def test_a_conversion_that_takes_one_matrix_at_a_time_is_given_one(
    tmp_path: Path, checkpoint: Callable
) -> None:
    source = checkpoint("moe", num_hidden_layers=1)
    nearest = Nearest(Calibration("rms"))
    one = written(source, tmp_path / "one", Settings(nearest, CPU, 1, batch=0))
    plain = Settings(lambda matrix, rows, first: nearest(matrix, rows, first), CPU, 1, batch=CUDA_PIECE)
    assert written(source, tmp_path / "batch", plain) == one


@pytest.mark.parametrize("experts", ["fused", "per_expert"])
def test_all_experts_of_a_layer_are_one_batch(experts: str, checkpoint: Callable) -> None:
    [shard] = make_plan(
        open_checkpoint(checkpoint("moe", experts=experts, num_hidden_layers=1, mtp=False))
    ).shards
    found = pieces(Unit(shard), CUDA_PIECE)
    together = list(batches(found, CUDA_PIECE))
    assert [p for batch in together for p in batch] == found
    sizes = [
        sum("experts" in item.weight.name for item, _, _ in b if isinstance(item, Matrix)) for b in together
    ]
    # 8 experts of 3 projections; fused, gate_up and down are tensors that follow each other.
    assert max(sizes) == 24
    assert all(len(b) == 1 for b in batches(found, 0))


def test_a_batch_is_no_larger_than_a_piece_may_be(checkpoint: Callable) -> None:
    [shard] = make_plan(open_checkpoint(checkpoint("moe", num_hidden_layers=1))).shards
    limit = 3 * 128 * 256
    for batch in batches(pieces(Unit(shard), limit), limit):
        if isinstance(batch[0][0], Passthrough):
            assert len(batch) == 1
        else:
            assert sum((last - first) * matrix.columns for matrix, first, last in batch) <= limit


def test_nan_in_a_batch_names_its_own_matrix_only(tmp_path: Path, checkpoint: Callable) -> None:
    source = checkpoint("moe_text", num_hidden_layers=1, mtp=False)

    def spoil(matrix: Matrix, rows: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        bad = rows.clone()
        if "experts.5.up_proj" in matrix.weight.name:
            bad[0, 0] = torch.nan
        return Nearest(Calibration("max"))(matrix, bad, first)

    with pytest.raises(
        Exception, match=r"NaN or infinity in model\.layers\.0\.mlp\.experts\.5\.up_proj\.weight;"
    ):
        written(source, tmp_path / "out", Settings(spoil, CPU, 1, batch=CUDA_PIECE))


# --- checksums ---------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [1, 3])
def test_checksums_of_shards_in_turn(interleaved: int, tmp_path: Path, checkpoint: Callable) -> None:
    source, folder = checkpoint("moe", shards=4, num_hidden_layers=2), tmp_path / "out"
    folder.mkdir()
    settings = Settings(
        Nearest(Calibration("max")), CPU, 3, checksums=True, piece=1, readers=2, interleaved=interleaved
    )
    work = divide(list(make_plan(open_checkpoint(source)).shards), 1, True)
    done = list(process(work, folder, settings))
    assert len(done) == 4
    for each in done:
        assert each.sha256 == hashlib.sha256((folder / each.name).read_bytes()).hexdigest()


def test_a_digest_takes_bytes_in_any_order_and_says_when_a_buffer_is_free() -> None:
    digest = OrderedDigest(b"head")
    late = digest.add(6, memoryview(b"cd"))
    assert not late.done()
    digest.add(4, memoryview(b"ab")).result(10)
    late.result(10)
    assert digest.hexdigest(8) == hashlib.sha256(b"headabcd").hexdigest()


def test_a_digest_that_is_dropped_lets_nobody_wait() -> None:
    digest = OrderedDigest(b"")
    waiting = digest.add(5, b"x")
    digest.drop()
    for future in (waiting, digest.add(7, b"y")):
        with pytest.raises(CancelledError):
            future.result(10)
    digest.drop()


# --- direct I/O --------------------------------------------------------------------------------


def refusing_direct(real: Callable, number: int, refused: list[int]) -> Callable:
    """`os.preadv` or `os.pwrite` as where a disk's driver cannot reach the pages of a buffer."""

    def call(descriptor: int, *arguments: object) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(descriptor)
            raise OSError(number, os.strerror(number))
        return real(descriptor, *arguments)

    return call


@pytest.fixture
def direct_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Direct I/O wherever the kernel has it."""
    monkeypatch.setattr("fp8lib.streaming.lanes.takes_direct", lambda _: True)
    monkeypatch.setattr("fp8lib.streaming.writer.takes_direct", lambda _: True)
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip("no direct I/O on this file system")


@pytest.mark.parametrize("number", [errno.EFAULT, errno.EINVAL])
@pytest.mark.parametrize("way", [Way.DISK, Way.NEAREST])
def test_reading_goes_on_through_the_page_cache_where_direct_reads_fail(
    number: int, way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_everywhere: None
) -> None:
    data = np.random.default_rng(0).bytes(3 * PAGE)
    path, refused = tmp_path / "data", []
    path.write_bytes(data)
    # NEAREST asks the page cache first, which has the file: it must seem not to.
    monkeypatch.setattr(os, "RWF_NOWAIT", 1 << 30)
    monkeypatch.setattr(os, "preadv", refusing_direct(os.preadv, number, refused))
    files, lane = Files(), Lane(CPU)
    for _ in range(2):
        assert bytes(lane.read("in", files, path, 4000, 5000, way).numpy()) == data[4000:9000]
    assert len(refused) == 1  # it is not tried again
    files.close()


@pytest.mark.parametrize("number", [errno.EFAULT, errno.EINVAL])
def test_writing_goes_on_through_the_page_cache_where_direct_writes_fail(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_everywhere: None
) -> None:
    data = np.random.default_rng(0).bytes(3 * PAGE)
    buffer = Lane(CPU).host("out", len(data))
    buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    refused: list[int] = []
    monkeypatch.setattr(os, "pwrite", refusing_direct(os.pwrite, number, refused))
    writer = ShardWriter(tmp_path / "shard", bytes(PAGE), 4 * PAGE)
    for _ in range(2):
        writer.write(PAGE, memoryview(buffer.numpy()))
    writer.commit()
    assert len(refused) == 1
    assert (tmp_path / "shard").read_bytes() == bytes(PAGE) + data


@pytest.mark.parametrize("start", [0, 8, 4088, 4096, 5000, 12_280])
@pytest.mark.parametrize("count", [1, 4096, 9000])
def test_any_bytes_are_read_from_the_disk_itself(
    start: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_everywhere: None
) -> None:
    """Whole pages around them are; the file ends in the middle of one."""
    data = np.random.default_rng(0).bytes(12_280 + 9000)
    path, direct = tmp_path / "data", []
    path.write_bytes(data)
    real = os.preadv

    def noting(descriptor: int, *arguments: object) -> int:
        direct.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
        return real(descriptor, *arguments)

    monkeypatch.setattr(os, "preadv", noting)
    files = Files()
    assert (
        bytes(Lane(CPU).read("in", files, path, start, count, Way.DISK).numpy())
        == data[start : start + count]
    )
    assert direct == [True]
    files.close()


def test_what_the_page_cache_holds_is_taken_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_everywhere: None
) -> None:
    data = np.random.default_rng(0).bytes(10_000)
    path = tmp_path / "data"
    path.write_bytes(data)
    refused: list[int] = []
    monkeypatch.setattr(os, "preadv", refusing_direct(os.preadv, errno.EIO, refused))
    files = Files()
    assert bytes(Lane(CPU).read("in", files, path, 8, 9000, Way.NEAREST).numpy()) == data[8:9008]
    assert refused == []
    files.close()
