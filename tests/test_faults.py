"""Faults of disks, directories, clocks and pipes, each of which really happens here.

What the kernel has to do for it (a small or read-only mount, an immutable directory, a throttled disk)
needs root; elsewhere those tests are skipped and their neighbours, which need none, remain.
"""

import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SCRIPT
from forked import PATIENCE, At
from safetensors_by_hand import read_header
from test_resume import (
    CONFIG,
    INDEX,
    MANIFEST,
    SHARDS,
    SMALL,
    assert_nothing_half_done,
    assert_refused,
    assert_same,
    checkpoint_of_64_mb,
    done,
    quantize,
    tree,
)

ROOMY = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 60, 0, 1 << 60)"
"""Makes a run believe that there is room: what a disk promises at the start, others may take."""


@pytest.fixture(scope="module")
def source(checkpoint: Callable) -> Path:
    return checkpoint(SMALL[0], **SMALL[1])


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert quantize(source, folder).rc == 0
    return folder


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`mount("size=1m")`: a directory that is a tmpfs of its own; skips the test where one may not."""
    mounted: list[Path] = []

    def make(options: str = "size=64m") -> Path:
        folder = tmp_path / f"mount{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting needs root")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", folder], check=True)


def assert_nothing_left_over(output: Path, *complete: Path) -> None:
    assert_nothing_half_done(output, *complete)
    assert [name for name in os.listdir(output) if name.startswith(".")] == []


# --- disk full ---------------------------------------------------------------------------------


def test_the_disk_is_full_in_the_middle_of_a_shard(
    source: Path, whole: Path, mount: Callable, tmp_path: Path
) -> None:
    first_shard = (whole / SHARDS[0]).stat().st_size
    disk = mount(f"size={first_shard + 100_000}")
    output = disk / "out"
    ended = quantize(source, output, "--workers", 1, before=ROOMY)
    assert_refused(ended, "the disk is full", "continue")
    # Whichever needs the last bytes first: a shard, or the record of the one before.
    assert any(f"{output / name}: the disk is full" in ended.err for name in (*SHARDS, MANIFEST))
    assert not (output / CONFIG).exists()
    assert_nothing_left_over(output, whole)
    remount(disk, "size=64m")
    kept = {name: (output / name).stat().st_ino for name in done(output)}
    assert quantize(source, output).rc == 0
    assert {name: (output / name).stat().st_ino for name in kept} == kept
    assert_same(output, whole)


@pytest.mark.parametrize("name", [MANIFEST, "tokenizer.json", INDEX, CONFIG])
def test_the_disk_is_full_while_a_small_file_is_written(
    name: str, source: Path, whole: Path, mount: Callable
) -> None:
    """Somebody else takes the last bytes just before."""
    disk = mount()
    output = disk / "out"
    fill = f"""
with open("{disk / "filler"}", "wb", buffering=0) as file:
    try:
        while True: file.write(bytes(4096))
    except OSError: pass
"""
    ended = quantize(source, output, at=At("pwrite", 1, f".{name}.partial", fill))
    assert_refused(ended, str(output / name), "the disk is full", "continue")
    assert not (output / CONFIG).exists()
    assert_nothing_left_over(output, whole)
    (disk / "filler").unlink()
    assert quantize(source, output).rc == 0
    assert_same(output, whole)


def test_a_file_size_limit_in_the_middle_of_the_shards(source: Path, whole: Path, tmp_path: Path) -> None:
    """`ulimit -f`; needs no root."""
    sizes = sorted((whole / name).stat().st_size for name in SHARDS)
    limit = {resource.RLIMIT_FSIZE: sizes[-1] - 1}
    ended = quantize(source, tmp_path / "out", limits=limit)
    assert_refused(ended, ".safetensors", "ulimit -f")
    assert_nothing_left_over(tmp_path / "out", whole)
    assert quantize(source, tmp_path / "out").rc == 0
    assert_same(tmp_path / "out", whole)


def test_a_file_size_limit_for_config_json(source: Path, whole: Path, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))"
    ended = quantize(source, tmp_path / "out", at=At("open", 1, f".{CONFIG}.partial", limit))
    assert_refused(ended, CONFIG, "ulimit -f")
    assert_nothing_left_over(tmp_path / "out", whole)
    assert not (tmp_path / "out" / CONFIG).exists()
    assert quantize(source, tmp_path / "out").rc == 0
    assert_same(tmp_path / "out", whole)


def test_no_room_at_all_for_the_first_file(source: Path, mount: Callable) -> None:
    disk = mount("size=64k")
    (disk / "filler").write_bytes(bytes(60_000))
    ended = quantize(source, disk / "out", before=ROOMY)
    assert_refused(ended, "the disk is full")
    assert not (disk / "out" / CONFIG).exists()


# --- the input changes -------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 100, -1], ids=["emptied", "cut in the header", "one byte short"])
def test_an_input_shard_is_shortened_after_it_was_opened(
    left: int, source: Path, whole: Path, copy_of: Callable, tmp_path: Path
) -> None:
    folder, output = copy_of(source), tmp_path / "out"
    shard = folder / SHARDS[1]
    times, content = shard.stat(), shard.read_bytes()
    cut = At(
        "pwrite", 2, SHARDS[1], f"os.truncate({str(shard)!r}, {left if left >= 0 else len(content) + left})"
    )
    ended = quantize(folder, output, at=cut)
    assert_refused(ended, str(shard), "became shorter")
    assert_nothing_left_over(output, whole)
    shard.write_bytes(content)  # restored, times included, as rsync does
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert quantize(folder, output).rc == 0
    assert_same(output, whole)


@pytest.mark.parametrize(
    "moment",
    [At("pwrite", 2, SHARDS[1]), At("open", 1, f".{SHARDS[2]}.partial"), At("open", 2, f"out/{SHARDS[0]}")],
    ids=["while it is read", "before it is begun", "before it is verified"],
)
def test_an_input_shard_is_written_anew_while_this_runs(
    moment: At, checkpoint: Callable, source: Path, copy_of: Callable, tmp_path: Path
) -> None:
    """A download or a training that is not over: same names, same sizes, other weights."""
    folder, output = copy_of(source), tmp_path / "out"
    later = checkpoint(SMALL[0], **{**SMALL[1], "seed": 1})
    replace = f"""
for name in {SHARDS}:
    with open(os.path.join({str(later)!r}, name), "rb") as file: new = file.read()
    with open(os.path.join({str(folder)!r}, name), "r+b") as file: file.write(new)
"""
    ended = quantize(folder, output, at=At(moment.operation, moment.number, moment.where, replace))
    assert_refused(ended, str(folder), "changed while this ran", "--overwrite")
    assert not (output / CONFIG).exists()
    assert_refused(quantize(folder, output), "--overwrite")  # it is not the model that was begun
    assert quantize(folder, output, "--checksums", "--overwrite").rc == 0
    assert quantize(later, tmp_path / "expected", "--checksums").rc == 0
    shards = {name: data for name, data in tree(output).items() if name.endswith(".safetensors")}
    assert shards.items() <= tree(tmp_path / "expected").items()


def test_a_small_file_that_is_shortened_while_it_is_copied(
    source: Path, copy_of: Callable, tmp_path: Path
) -> None:
    folder, output = copy_of(source), tmp_path / "out"
    small = folder / "tokenizer.json"
    small.write_bytes(bytes(3 << 20))
    cut = At("pwrite", 2, "tokenizer.json", f"os.truncate({str(small)!r}, 1 << 20)")
    assert_refused(quantize(folder, output, at=cut), str(small), "changed while it was copied")
    assert not (output / CONFIG).exists()


def test_a_flipped_byte_makes_a_weight_nan(
    source: Path, whole: Path, copy_of: Callable, tmp_path: Path
) -> None:
    folder, output = copy_of(source), tmp_path / "out"
    name = "model.layers.0.mlp.experts.down_proj"
    shard = next(p for p in folder.glob("*.safetensors") if name in load_file(p))
    state = {k: v.clone() for k, v in load_file(shard).items()}
    state[name][2, 100, 7] = torch.tensor(1.2).bfloat16()
    save_file(state, shard, metadata={"format": "pt"})
    raw = bytearray(shard.read_bytes())
    header, at = read_header(shard)
    at += header[name]["data_offsets"][0]
    rows, columns = header[name]["shape"][1:]
    at += 2 * ((2 * rows + 100) * columns + 7) + 1  # the high byte: sign and most of the exponent
    assert raw[at] == 0x3F
    raw[at] ^= 0x40  # 1.2 becomes NaN
    shard.write_bytes(raw)
    ended = quantize(folder, output)
    assert_refused(ended, "model.layers.0.mlp.experts.2.down_proj.weight", "NaN", "repair the input")
    assert "experts.1." not in ended.err
    assert not (output / CONFIG).exists()
    assert_nothing_left_over(output, whole)


# --- the output directory ----------------------------------------------------------------------


def test_an_output_directory_on_a_read_only_file_system(source: Path, mount: Callable) -> None:
    disk = mount()
    (disk / "out").mkdir()
    remount(disk, "ro")
    for output in (disk / "out", disk / "new" / "out"):
        assert_refused(quantize(source, output), str(output), "read-only")
    assert list((disk / "out").iterdir()) == []


@contextmanager
def file_as_disk(tmp_path: Path, kind: str, make: list[str], options: str) -> Iterator[Path]:
    """A directory that is a file system of its own, of this kind; skips the test where one may not."""
    folder, image = tmp_path / "disk", tmp_path / "image"
    folder.mkdir()
    image.write_bytes(b"")
    os.truncate(image, 32 << 20)
    commands = (
        [f"mkfs.{kind}", "-q", *make, image],
        ["mount", "-t", kind, "-o", options, image, folder],
    )
    for command in commands:
        if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"mounting a file as a disk needs root and {kind}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system that becomes read-only at an error, as most are mounted."""
    with file_as_disk(tmp_path, "ext4", ["-O", "^has_journal"], "loop,errors=remount-ro") as folder:
        yield folder


@pytest.mark.parametrize(
    "moment",
    [At("pwrite", 9, ".safetensors"), At("fsync", 2, ".safetensors"), At("open", 1, f".{INDEX}.partial")],
    ids=["in a shard", "at a shard's end", "at the index"],
)
def test_a_disk_fails_and_becomes_read_only_in_the_middle(
    moment: At, source: Path, whole: Path, failing_disk: Path
) -> None:
    output = failing_disk / "out"
    device = os.stat(failing_disk).st_dev
    name = os.path.basename(os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))
    fail = f"open('/sys/fs/ext4/{name}/trigger_fs_error', 'w').write('fails')"
    ended = quantize(source, output, at=At(moment.operation, moment.number, moment.where, fail))
    assert_refused(ended, str(output), "read-only")
    assert not (output / CONFIG).exists()
    assert_nothing_half_done(output, whole)


def test_an_output_directory_that_becomes_immutable_in_the_middle(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    if (
        shutil.which("chattr") is None
        or subprocess.run(["chattr", "+i", output], capture_output=True).returncode
    ):
        pytest.skip("chattr +i needs root and ext4 or the like")
    assert_refused(quantize(source, output), str(output), "not permitted")
    subprocess.run(["chattr", "-i", output], check=True)
    freeze = f"import subprocess; subprocess.run(['chattr', '+i', {str(output)!r}], check=True)"
    try:
        ended = quantize(source, output, at=At("rename", 3, ".safetensors", freeze))
        assert_refused(ended, str(output), "not permitted")
        assert not (output / CONFIG).exists()
    finally:
        subprocess.run(["chattr", "-i", output], check=True)
    assert quantize(source, output).rc == 0
    assert_same(output, whole)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_directory_without_write_permission(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir(mode=0o555)
    assert_refused(quantize(source, output), str(output), "permission denied")


@pytest.fixture(params=["ext2", "ext3"])
def old_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system that says it is ext4 and cannot give a file its blocks in advance."""
    with file_as_disk(tmp_path, request.param, [], "loop") as folder:
        yield folder


def test_an_output_directory_on_an_old_file_system(source: Path, whole: Path, old_disk: Path) -> None:
    assert quantize(source, old_disk / "out").rc == 0
    assert_same(old_disk / "out", whole)


@pytest.mark.parametrize(
    ("number", "way_out"),
    [("EIO", "the disk failed"), ("EMFILE", "ulimit -n"), ("EBADF", "choose another place")],
)
def test_an_error_of_the_disk_is_named_with_a_way_out(
    number: str, way_out: str, source: Path, whole: Path, tmp_path: Path
) -> None:
    fail = f"import errno; raise OSError(errno.{number}, os.strerror(errno.{number}))"
    ended = quantize(source, tmp_path / "out", at=At("pwrite", 3, SHARDS[1], fail))
    assert_refused(ended, SHARDS[1], way_out)
    assert_nothing_left_over(tmp_path / "out", whole)


@pytest.mark.parametrize(
    "error",
    ["OSError(errno.ENOMEM, 'Cannot allocate memory')", "RuntimeError(\"can't start new thread\")",
     "RuntimeError(\"DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\")",
     "__import__('torch').OutOfMemoryError('CUDA out of memory. Tried to allocate 9.00 GiB.')"],
    ids=["of the kernel", "for a thread", "of torch", "of the device"],
)  # fmt: skip
def test_memory_that_is_not_there_is_called_that(error: str, source: Path, tmp_path: Path) -> None:
    before = f"""
import errno, fp8lib.job.run
def fail(*arguments): raise {error}
fp8lib.job.run.make_plan = fail
"""
    ended = quantize(source, tmp_path / "out", before=before)
    assert_refused(ended, "out of memory", "--workers", "--device cpu")


def test_an_output_directory_that_is_removed_in_the_middle(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    remove = f"import shutil; shutil.rmtree({str(output)!r})"
    ended = quantize(source, output, at=At("open", 1, f".{SHARDS[2]}.", remove))
    assert_refused(ended, str(output))
    assert not (output / CONFIG).exists()


def test_links_in_the_output_directory_lead_nothing_out_of_it(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    output, outside = tmp_path / "out", tmp_path / "outside"
    outside.write_text("mine")
    shutil.copytree(whole, output)
    (output / SHARDS[0]).unlink()
    (output / f".{SHARDS[0]}.partial").symlink_to(outside)
    (output / INDEX).unlink()
    (output / INDEX).symlink_to(outside)
    (output / ".fp8_quantization.lock").symlink_to(tmp_path / "made")
    ended = quantize(source, output)
    assert_refused(ended, "a symlink is in the way")
    (output / ".fp8_quantization.lock").unlink()
    assert quantize(source, output).rc == 0
    assert outside.read_text() == "mine"
    assert not (tmp_path / "made").exists()
    assert not (output / INDEX).is_symlink()
    assert_same(output, whole)


# --- clocks, mounts, names ---------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, 1, 2**32, -(10**9)], ids=["1970", "1970+1s", "2106", "1938"])
def test_the_clock_of_the_files_is_far_off(
    seconds: int, source: Path, copy_of: Callable, tmp_path: Path
) -> None:
    folder, output = copy_of(source), tmp_path / "out"
    for path in folder.iterdir():
        os.utime(path, (seconds, seconds))
    assert quantize(folder, output, at=At("rename", 4, MANIFEST)).rc == -signal.SIGKILL
    kept = {name: (output / name).stat().st_ino for name in done(output)}
    for path in output.iterdir():
        os.utime(path, (-seconds, -seconds))
    assert quantize(folder, output).rc == 0
    assert {name: (output / name).stat().st_ino for name in kept} == kept
    assert quantize(folder, tmp_path / "other").rc == 0
    assert_same(output, tmp_path / "other")


def test_the_clock_jumps_back_at_every_look(source: Path, whole: Path, tmp_path: Path) -> None:
    jumps = (
        "import time, itertools; back = itertools.count(10**9, -86400); time.time = lambda: float(next(back))"
    )
    ended = quantize(source, tmp_path / "out", before=jumps)
    assert (ended.rc, "Traceback" in ended.err) == (0, False)
    assert_same(tmp_path / "out", whole)


def test_an_input_on_a_read_only_mount(source: Path, mount: Callable, tmp_path: Path) -> None:
    disk = mount()
    shutil.copytree(source, disk / "model")
    remount(disk, "ro")
    assert quantize(disk / "model", tmp_path / "out", "--verify_samples", "all").rc == 0
    assert_refused(quantize(disk / "model", disk / "out"), str(disk), "read-only")


@pytest.mark.parametrize(
    "name",
    [
        "with spaces and 'quotes' \"both\"",
        "données-模型-модель-🙂",
        "x" * 200,
        "é" * 100,
        "-rf",
        "$(touch pwned)`touch pwned`;&|*?[a]",
        "trailing dot. and space ",
        "%s%n{0}\\n",
    ],
    ids=["spaces", "non-ASCII", "200 letters", "200 bytes", "like a flag", "shell", "trailing", "format"],
)
def test_a_directory_may_have_any_name(name: str, source: Path, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / name / "input")
    output = tmp_path / name / name
    (tmp_path / "stats").mkdir()
    assert quantize(folder, output, "--checksums").rc == 0
    assert {k: v for k, v in tree(output).items() if k not in ("SHA256SUMS", MANIFEST)} == {
        k: v for k, v in tree(whole).items() if k != MANIFEST
    }
    checked = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=output)
    assert checked.returncode == 0
    error = quantize(folder, output, "--calib_mode", "max")
    assert_refused(error, "--overwrite")
    assert os.listdir(tmp_path) == [name, "stats"] or sorted(os.listdir(tmp_path)) == sorted([name, "stats"])


@pytest.mark.parametrize("length", [240, 246, 247, 255])
def test_a_file_may_have_the_longest_name_there_is(
    length: int, source: Path, copy_of: Callable, tmp_path: Path
) -> None:
    """Its temporary file needs another one; found after hours of work, this would be bitter."""
    folder = copy_of(source)
    (folder / ("t" * (length - 5) + ".json")).write_text("{}")
    shard = "s" * (length - 12) + ".safetensors"
    (folder / SHARDS[0]).rename(folder / shard)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {k: shard if v == SHARDS[0] else v for k, v in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    assert quantize(folder, tmp_path / "out").rc == 0
    assert (tmp_path / "out" / shard).stat().st_size > 1000
    killed = quantize(folder, tmp_path / "killed", at=At("fsync", 3))
    assert killed.rc == -signal.SIGKILL
    assert quantize(folder, tmp_path / "killed").rc == 0
    assert_same(tmp_path / "killed", tmp_path / "out")


def test_a_hub_cache_snapshot_and_a_link_to_it(source: Path, whole: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--Qwen--Qwen3.5"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy2(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    (tmp_path / "model").symlink_to(snapshot)
    for number, folder in enumerate((snapshot, tmp_path / "model")):
        output = tmp_path / str(number)
        assert quantize(folder, output, at=At("rename", 4, MANIFEST)).rc == -signal.SIGKILL
        assert quantize(folder, output).rc == 0
        assert_same(output, whole)
        assert not any(path.is_symlink() for path in output.iterdir())
    # The cache may have been moved to another disk, with a link in its old place.
    blobs.rename(tmp_path / "blobs")
    blobs.symlink_to(tmp_path / "blobs")
    assert quantize(snapshot, tmp_path / "moved").rc == 0


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)], ids=oct)
def test_files_have_the_mode_the_umask_gives(umask: int, mode: int, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    assert quantize(source, output, "--checksums", umask=umask).rc == 0
    assert {stat.S_IMODE(p.stat().st_mode) for p in output.iterdir()} == {mode}
    assert stat.S_IMODE(output.stat().st_mode) == 0o777 & ~umask


def test_few_file_descriptors_are_enough(
    source: Path, whole: Path, checkpoint: Callable, tmp_path: Path
) -> None:
    many = checkpoint(SMALL[0], **{**SMALL[1], "shards": 20})
    few = {resource.RLIMIT_NOFILE: 48}
    assert quantize(many, tmp_path / "out", "--verify_samples", "all", limits=few).rc == 0


# --- streams -----------------------------------------------------------------------------------


def in_shell(command: str, source: Path, output: Path) -> subprocess.CompletedProcess:
    """Run a bash command line in which $TOOL is the tool with its two directories."""
    tool = f'"{sys.executable}" "{SCRIPT}" --input_dir "{source}" --output_dir "{output}"'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.replace("$TOOL", tool)],
        capture_output=True, encoding="utf-8", timeout=PATIENCE,
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        "$TOOL | head -1",
        "$TOOL <&- >&- 2>&-",
        "$TOOL > /dev/full 2>&1",
    ],
)
def test_nobody_reads_what_it_prints(command: str, source: Path, whole: Path, tmp_path: Path) -> None:
    done = in_shell(command, source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
    assert_same(tmp_path / "out", whole)  # no descriptor of a file was taken for stdout


@pytest.mark.parametrize("flags", ["--help", "--version", "--dry_run", "--nonsense"])
def test_nobody_reads_what_it_prints_without_working(flags: str, source: Path, tmp_path: Path) -> None:
    for ending in ("2>&1 | true", ">&- 2>&-", "> /dev/full 2>&1"):
        done = in_shell(f"$TOOL {flags} {ending}", source, tmp_path / "out")
        assert done.returncode == (2 if flags == "--nonsense" else 0), ending
        assert done.stderr == ""


def test_an_exit_code_says_fail_even_if_nobody_reads_why(source: Path, tmp_path: Path) -> None:
    # Half of all weights are clipped.
    done = in_shell(
        "$TOOL --calib_mode percentile --calib_percentile 50 2>&1 | true", source, tmp_path / "out"
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


# --- slow disks --------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(tmp_path: Path) -> Iterator[Path]:
    """A cgroup whose processes' writes reach the disk at no more than 10 MB/s."""
    device = tmp_path.stat().st_dev
    group = Path("/sys/fs/cgroup/blkio") / f"fp8_test_{os.getpid()}"
    try:
        group.mkdir()
        limit = f"{os.major(device)}:{os.minor(device)} 10000000"
        (group / "blkio.throttle.write_bps_device").write_text(limit)
    except OSError:
        if group.is_dir():
            group.rmdir()
        pytest.skip("throttling a disk needs root, the blkio controller and a disk")
    yield group
    for _ in range(100):
        try:
            return group.rmdir()
        except OSError:  # its last process is not quite gone
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("writes", "operation", "number"),
    [
        # The page cache's backlog is made small, as the checkpoint is.
        ("direct._FILE_SYSTEMS = {}; writer._BACKLOG = 2_000_000", "fsync", 1),
        ("pass", "pwrite", 300),
    ],
    ids=["through the page cache", "directly"],
)
def test_a_signal_stops_soon_while_a_slow_disk_still_writes(
    slow_disk: Path, tmp_path: Path, writes: str, operation: str, number: int
) -> None:
    """A process cannot end while one of its threads is in a system call: none may take long."""
    source, output = tmp_path / "source", tmp_path / "out"
    checkpoint_of_64_mb(source, shards=1)
    written = slow_disk / "blkio.throttle.io_service_bytes"
    term = f"""
import shutil, threading
def term():
    shutil.copyfile({str(written)!r}, {str(tmp_path / "then")!r})
    os.kill(os.getpid(), signal.SIGTERM)
threading.Timer(0.2, term).start()  # when it waits already
"""
    join = f"import os; open({str(slow_disk / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"
    before = f"{join}; from fp8lib.streaming import direct, writer; {writes}"
    ended = quantize(source, output, before=before, at=At(operation, number, ".safetensors", term))
    if not (tmp_path / "then").exists():
        pytest.skip("the disk was not slow: the kernel wrote for the group, on its own account")
    assert ended.rc == 128 + signal.SIGTERM
    then, at_last = (
        sum(int(line.split()[2]) for line in path.read_text().splitlines() if " Write " in line)
        for path in (tmp_path / "then", written)
    )
    assert at_last - then < 20_000_000  # of 35 MB: it did not wait for what was still to be written
