"""How much room a run asks for, against what its files then take; and what earlier files give back."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.plan import Plan, make_plan
from fp8lib.job.output_dir import State, check_space
from fp8lib.streaming.writer import partial_path

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space") / "in"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(SHARDS):
        weight = torch.full((128 * (3 + i), 256), 2.0**-8).bfloat16()
        save_file({f"model.layers.{i}.mlp.down_proj.weight": weight}, folder / name)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5"}))
    (folder / "more/notes.txt").write_text("x" * 5000)
    return folder


@pytest.fixture
def needed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`needed(**fields of State)`: the least free space that is not refused, found by trying."""
    plan: Plan = make_plan(open_checkpoint(source))

    def enough(free: int, state: State) -> bool:
        with monkeypatch.context() as patch:
            usage = shutil.disk_usage(tmp_path)._replace(free=free)
            patch.setattr(shutil, "disk_usage", lambda path: usage)
            try:
                check_space(tmp_path / "not there/yet", plan, state, measured=2)
            except Fp8Error:
                return False
            return True

    def search(**fields: object) -> int:
        low, high = 0, 1 << 24  # refused, enough
        state = State(**fields)
        assert enough(high, state)
        if enough(low, state):
            return 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle, state) else (middle, high)
        return high

    return search


def on_disk(size: int) -> int:
    """Bytes of whole blocks."""
    block = os.statvfs("/tmp").f_frsize
    return -(-size // block) * block


def test_it_is_what_the_files_take_and_room_for_two_manifests(
    source: Path, quantized: Callable, needed: Callable
) -> None:
    output = quantized(source)
    manifest = (output / "fp8_quantization.json").stat().st_size
    sizes = [p.stat().st_size for p in output.rglob("*") if p.is_file()]
    least = sum(map(on_disk, sizes)) + on_disk(manifest)
    # The manifest's size is a bound, made before anything is measured: a few blocks of 4 KiB.
    assert least <= needed() <= least + 4 * 4096


def test_finished_shards_need_no_more_room(source: Path, quantized: Callable, needed: Callable) -> None:
    output = quantized(source)
    sizes = [on_disk((output / name).stat().st_size) for name in SHARDS]
    whole = needed()
    for name, size in zip(SHARDS, sizes, strict=True):
        assert needed(finished=frozenset([name])) == whole - size
    assert needed(finished=frozenset(SHARDS)) == whole - sum(sizes)


@pytest.mark.parametrize("field", ["remove", "leftovers"])
def test_files_that_will_be_removed_give_back_their_blocks_and_not_their_length(
    field: str, tmp_path: Path, needed: Callable
) -> None:
    hole, half, full = (partial_path(tmp_path / name) for name in ("hole", "half", "full"))
    for path, written in ((hole, 0), (half, 20_000), (full, 65_536)):
        with path.open("wb") as file:
            file.write(b"x" * written)
            file.truncate(65_536)
            os.fsync(file.fileno())
    whole, blocks = needed(), [512 * p.stat().st_blocks for p in (hole, half, full)]
    assert blocks[0] < blocks[1] < blocks[2]
    for path, size in zip((hole, half, full), blocks, strict=True):
        assert needed(**{field: (path,)}) == whole - size
    assert needed(**{field: (hole, half, full)}) == whole - sum(blocks)
    hole.unlink()
    assert needed(**{field: (hole, half)}) == whole - blocks[1]  # one that is gone by now gives nothing
    half.unlink()
    half.symlink_to(full)  # a link goes, what it leads to stays
    assert needed(**{field: (half,)}) == whole - 512 * half.lstat().st_blocks
