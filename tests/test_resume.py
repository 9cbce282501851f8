"""A run that is killed, interrupted or repeated.

Nothing that was done is lost, and nothing is ever left that looks finished and is not.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import forked
from conftest import SCRIPT
from forked import PATIENCE, At
from safetensors_by_hand import edit_header, read_header

MANIFEST, CONFIG, INDEX = "fp8_quantization.json", "config.json", "model.safetensors.index.json"
LOCK = ".fp8_quantization.lock"
CHECKSUMS = "SHA256SUMS"
THOROUGH = bool(os.environ.get("FP8_THOROUGH"))
"""Every moment instead of a sample; takes minutes."""

# Three shards, two of which hold experts, and small files: every kind of thing that a run writes.
SMALL = ("moe_text", {"num_hidden_layers": 1, "hidden_size": 128, "mtp": False, "num_experts": 4,
                      "num_experts_per_tok": 1, "shards": 3, "tokenizer": True})  # fmt: skip
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture(scope="module")
def source(checkpoint: Callable) -> Path:
    return checkpoint(SMALL[0], **SMALL[1])


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert quantize(source, folder, "--checksums").rc == 0
    return folder


EVERY_RECORD = """
from fp8lib.job import manifest
manifest.SLOW_TO_SAVE = float("inf")
"""
"""However slow the disk is, the manifest is saved with every record: operations are counted here."""


def quantize(source: Path, output: Path, *flags: object, before: str = "", **options: object) -> forked.Ended:
    before = EVERY_RECORD + before
    return forked.run("--input_dir", source, "--output_dir", output, *flags, before=before, **options)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same(output: Path, expected: Path) -> None:
    """Byte for byte, the manifest included, and not a file more."""
    found, wanted = tree(output), tree(expected)
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []


def assert_refused(result: forked.Ended, *fragments: str) -> None:
    assert result.rc == 2, result.err
    [error] = [line for line in result.err.splitlines() if "error" in line.lower()]
    assert error.startswith("error: ")
    for fragment in fragments:
        assert fragment in error


def assert_nothing_half_done(output: Path, *complete: Path) -> None:
    """What is there under its own name is right, and it is a model only if all of it is there."""
    found = tree(output) if output.exists() else {}
    wanted = [tree(folder) for folder in complete]
    for name, data in found.items():
        if name.endswith(".safetensors"):
            assert data in [files.get(name) for files in wanted], f"{name} is not complete"
    if CONFIG in found:
        model = {name: data for name, data in found.items() if not name.startswith(".")}
        assert model in wanted, "config.json stands over something else than a finished model"


# --- killed ------------------------------------------------------------------------------------


def stage(output: Path) -> str:
    """How far a run came that was killed."""
    names = set(os.listdir(output)) if output.exists() else set()
    if CONFIG in names:
        return "finished"
    if MANIFEST not in names:
        return "before the manifest"
    recorded = json.loads((output / MANIFEST).read_text())["shards"].keys()
    shards = {name for name in names if name.endswith(".safetensors")}
    if shards - recorded:
        return "between a shard's rename and its record"
    if any(name.endswith(".safetensors.partial") for name in names):
        return "within a shard"
    return "between shards" if len(recorded) < 3 else "after the shards"


def test_killed_before_any_file_operation_it_continues_to_the_same_bytes(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    """Signal 9 after each of about 60 operations that change what is on the disk; thorough: all 280."""
    watched = quantize(source, tmp_path / "watched", "--checksums", at=At(number=0))
    assert watched.rc == 0
    assert_same(tmp_path / "watched", whole)
    moments = list(range(1, len(watched.operations) + 1))
    assert len(moments) > 150
    if not THOROUGH:
        moments = telling(watched.operations)
        assert len(moments) > 40

    def check(number: int) -> str:
        output = tmp_path / str(number)
        ended = quantize(source, output, "--checksums", at=At(number=number))
        assert ended.rc == -signal.SIGKILL, number
        reached = stage(output)
        assert_nothing_half_done(output, whole)
        partials = (
            [name for name in os.listdir(output) if name.endswith(".partial")] if output.exists() else []
        )
        assert len(partials) <= os.cpu_count() + 1, partials  # one for each worker, one for the manifest
        again = quantize(source, output, "--checksums")
        assert again.rc == 0, (number, again.err)
        assert_same(output, whole)
        shutil.rmtree(output)
        return reached

    reached = Counter(map(check, moments))
    assert len(reached) == 6, reached  # the kills hit every stage there is


def telling(operations: list[tuple[str, str]]) -> list[int]:
    """Numbers of the operations before which the disk is not as it was before the one ahead of them.

    A file that is read, closed or synced changes nothing that a killed process leaves (a power cut is
    another matter, see below), nor does one more byte in a file that still has a temporary name.
    """
    seen, numbers = set(), []
    for number, (operation, path) in enumerate(operations[:-1], 1):
        first = (operation, path) not in seen and path.endswith(".partial")
        if operation in ("mkdir", "rename", "unlink") or (operation in ("open", "pwrite") and first):
            numbers.append(number + 1)
        seen.add((operation, path))
        if operation == "rename":  # its temporary file will be a new one
            seen -= {("open", path), ("pwrite", path)}
    return numbers


def test_killed_at_random_moments_between_many_workers_it_continues_to_the_same_bytes(
    checkpoint: Callable, tmp_path: Path
) -> None:
    """12 shards in 4 threads: the order of operations, and so what a kill leaves, is never the same."""
    source = checkpoint(SMALL[0], **{**SMALL[1], "num_experts": 32, "shards": 12})
    whole, flags = tmp_path / "whole", ("--workers", 4)
    undisturbed = quantize(source, whole, *flags, at=At(number=0))
    assert undisturbed.rc == 0
    moments, count = random.Random(5), len(undisturbed.operations)
    for part in range(10):  # one moment in each tenth of the run
        output = tmp_path / str(part)
        # Manifests are written as shards end, two at once sometimes: not every run has as many operations.
        number = 1 + int((part + moments.random()) / 10 * 0.9 * count)
        assert quantize(source, output, *flags, at=At(number=number)).rc == -signal.SIGKILL
        assert_nothing_half_done(output, whole)
        again = quantize(source, output, *flags)
        assert (again.rc, again.out) == (0, undisturbed.out)
        assert_same(output, whole)
        shutil.rmtree(output)


def checkpoint_of_64_mb(folder: Path, shards: int) -> None:
    """64 MB of Gaussian weights in the shape of a mixture of experts."""
    sys.path.insert(0, str(forked.REPOSITORY / "benchmarks"))
    try:
        import checkpoints
    finally:
        sys.path.pop(0)
    shape = checkpoints.Shape(
        hidden=512, layers=4, intermediate=256, experts=16, heads=4, kv_heads=1, linear_key_heads=2,
        linear_value_heads=4, vocabulary=2048, mtp=False,
    )  # fmt: skip
    checkpoints.write(folder, shape, shards)


def test_killed_while_it_replaces_an_earlier_run_it_never_leaves_a_mixture(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert quantize(source, other, "--calib_mode", "max").rc == 0
    flags = ("--checksums", "--overwrite")
    shutil.copytree(other, tmp_path / "watched")
    watched = quantize(source, tmp_path / "watched", *flags, at=At(number=0))
    moments = range(1, len(watched.operations) + 1) if THOROUGH else telling(watched.operations)[::2]

    def check(number: int) -> None:
        output = shutil.copytree(other, tmp_path / str(number))
        assert quantize(source, output, *flags, at=At(number=number)).rc == -signal.SIGKILL
        assert_nothing_half_done(output, whole, other)
        assert quantize(source, output, *flags).rc == 0
        assert_same(output, whole)
        shutil.rmtree(output)

    for number in moments:
        check(number)


def test_a_shard_is_durable_before_it_is_recorded_and_all_is_before_config_json(
    source: Path, tmp_path: Path
) -> None:
    """What a power cut needs and signal 9 cannot show: written, fsync, rename, fsync of the directory."""
    output = tmp_path / "out"
    # Without verification, which is recorded apart.
    calls = quantize(source, output, "--checksums", "--skip_verify", at=At(number=0)).operations
    renames = [i for i, (name, _) in enumerate(calls) if name == "rename"]
    manifests = [i for i in renames if MANIFEST in calls[i][1]]
    shards = [i for i in renames if calls[i][1].endswith(".safetensors.partial")]
    for i in renames:
        path = calls[i][1]
        written = max(k for k in range(i) if calls[k] == ["pwrite", path])
        assert ["fsync", path] in calls[written:i], path
        # A shard's name is made durable by another thread, while the manifest may still be recording the
        # shard before: the first manifest records none, the one after it the first shard, and so on.
        recorded = manifests[shards.index(i) + 1] if i in shards else len(calls)
        assert ["fsync", str(Path(path).parent)] in calls[i:recorded], path
    last = [Path(calls[i][1]).name for i in renames[-3:]]
    assert last == [f".{CHECKSUMS}.partial", f".{INDEX}.partial", f".{CONFIG}.partial"]
    assert {f".{name}.partial" for name in SHARDS} < {Path(calls[i][1]).name for i in renames}


def test_many_small_shards_leave_at_most_one_temporary_file_per_worker(
    checkpoint: Callable, tmp_path: Path
) -> None:
    """Also where making a shard durable takes longer than quantizing the next."""
    kind, arguments = SMALL
    source = checkpoint(kind, **{**arguments, "shards": 20})
    slow = At("fsync", 4, where=".safetensors", do="time.sleep(1)")
    ended = quantize(source, tmp_path / "out", "--workers", 2, at=slow)
    assert ended.rc == 0
    there, most = set(), 0
    for operation, path in ended.operations:
        if path.endswith(".safetensors.partial"):
            there = there | {path} if operation == "open" else there
            there = there - {path} if operation == "rename" else there
        most = max(most, len(there))
    assert 0 < most <= 2


# --- continued ---------------------------------------------------------------------------------


@pytest.fixture
def begun(source: Path, tmp_path: Path) -> Path:
    """An output directory of which two of three shards are done, by a run that was killed."""
    output = tmp_path / "begun"
    ended = quantize(source, output, "--checksums", at=At("rename", 3, ".safetensors", killed_at(2, 2)))
    assert ended.rc == -signal.SIGKILL
    assert len(done(output)) == 2
    return output


def killed_at(recorded: int, verified: int) -> str:
    """Statements that wait until the manifest says that much, and then kill."""
    return f"""
import json
while True:
    with open(os.path.join(os.path.dirname(path), {MANIFEST!r})) as file:
        shards = json.load(file)["shards"].values()
    if len(shards) >= {recorded} and sum(s["verification"] is not None for s in shards) >= {verified}:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
"""


def done(output: Path) -> list[str]:
    """Names of the shards that need not be made again."""
    return sorted(json.loads((output / MANIFEST).read_text())["shards"])


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_finished_shards_are_not_written_again(source: Path, whole: Path, begun: Path) -> None:
    names = done(begun)
    before = [identity(begun / name) for name in names]
    assert quantize(source, begun, "--checksums").rc == 0
    assert [identity(begun / name) for name in names] == before
    assert_same(begun, whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_shard_that_was_written_and_not_yet_verified_is_only_verified(
    workers: int, source: Path, whole: Path, tmp_path: Path
) -> None:
    output, flags = tmp_path / "out", ("--checksums", "--workers", workers)
    ended = quantize(source, output, *flags, at=At("open", 2, f"out/{SHARDS[0]}", killed_at(1, 0)))
    assert ended.rc == -signal.SIGKILL
    assert SHARDS[0] in done(output)
    written = identity(output / SHARDS[0])
    again = quantize(source, output, *flags)
    assert again.rc == 0
    assert identity(output / SHARDS[0]) == written
    assert again.out == quantize(source, whole, *flags).out
    assert_same(output, whole)


def test_a_shard_that_is_being_completed_when_another_fails_is_recorded(
    source: Path, whole: Path, copy_of: Callable, tmp_path: Path
) -> None:
    folder, output = copy_of(source), tmp_path / "out"
    broken = folder / SHARDS[1]
    good, times = broken.read_bytes(), broken.stat()
    nan = bytearray(good)
    header, start = read_header(broken)
    start += next(t["data_offsets"][0] for name, t in header.items() if name.endswith("experts.down_proj"))
    nan[start : start + 2] = b"\xc0\x7f"
    broken.write_bytes(nan)
    os.utime(broken, ns=(times.st_atime_ns, times.st_mtime_ns))
    ended = quantize(folder, output, "--checksums", at=At("fsync", 1, SHARDS[0], "time.sleep(1)"))
    assert_refused(ended, SHARDS[1], "NaN")
    assert SHARDS[0] in done(output)
    written = identity(output / SHARDS[0])
    broken.write_bytes(good)
    os.utime(broken, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert quantize(folder, output, "--checksums").rc == 0
    assert identity(output / SHARDS[0]) == written
    assert_same(output, whole)


def test_a_shard_that_was_written_and_not_yet_recorded_is_not_in_the_way(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    """There is room for the model once; what the killed run had written is no part of it."""
    output = tmp_path / "out"
    assert quantize(source, output, at=At("rename", 2, MANIFEST)).rc == -signal.SIGKILL
    assert done(output) == []
    assert (output / SHARDS[0]).exists()
    room = (whole / SHARDS[0]).stat().st_size // 2
    free = sum(path.stat().st_size for path in whole.iterdir()) - room + (1 << 20)
    before = f"import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 60, 0, {free})"
    assert quantize(source, output, "--checksums", before=before).rc == 0
    assert_same(output, whole)


def test_the_summary_covers_the_shards_of_the_earlier_run(source: Path, begun: Path, tmp_path: Path) -> None:
    undisturbed = quantize(source, tmp_path / "other", "--checksums")
    assert "Shards processed    : 3" in undisturbed.out
    assert quantize(source, begun, "--checksums").out == undisturbed.out


def test_a_finished_directory_stays_as_it_is(source: Path, whole: Path, tmp_path: Path) -> None:
    output = shutil.copytree(whole, tmp_path / "out")
    before = [identity(output / name) for name in SHARDS]
    first, again = (
        quantize(source, tmp_path / "other", "--checksums"),
        quantize(source, output, "--checksums"),
    )
    assert (again.rc, again.out) == (0, first.out)
    assert [identity(output / name) for name in SHARDS] == before
    assert_same(output, whole)


def test_a_finished_directory_is_a_model_at_every_moment_of_a_run_that_finds_nothing_to_do(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(whole, tmp_path / "out")
    count = len(quantize(source, output, "--checksums", at=At(number=0)).operations)
    for number in range(1, count + 1, 1 if THOROUGH else 8):
        assert quantize(source, output, "--checksums", at=At(number=number)).rc == -signal.SIGKILL
        present = {name: data for name, data in tree(output).items() if not name.startswith(".")}
        assert present == tree(whole)


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.symlink_to(path)),
    ],
    ids=["deleted", "truncated", "emptied", "all zeros", "a FIFO", "a link to itself"],
)
@pytest.mark.parametrize("finished", [False, True], ids=["begun", "finished"])
def test_a_shard_that_was_lost_between_runs_is_made_again(
    spoil: Callable, finished: bool, source: Path, whole: Path, begun: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(whole, tmp_path / "finished") if finished else begun
    lost, other, *_ = done(output)
    spoil(output / lost)
    kept = identity(output / other)
    if finished:  # and meanwhile it is no model
        copy = shutil.copytree(output, tmp_path / "killed", ignore=lambda folder, names: {lost})
        quantize(source, copy, "--checksums", at=At("pwrite", where=lost))
        assert not (copy / CONFIG).exists()
    assert quantize(source, output, "--checksums").rc == 0
    assert_same(output, whole)
    assert identity(output / other) == kept


def test_a_directory_where_a_shard_should_be_is_named(source: Path, whole: Path, tmp_path: Path) -> None:
    output = shutil.copytree(whole, tmp_path / "out")
    (output / SHARDS[0]).unlink()
    (output / SHARDS[0]).mkdir()
    assert_refused(quantize(source, output, "--checksums"), SHARDS[0])
    assert not (output / CONFIG).exists()


@pytest.mark.parametrize("flags", [("--workers", 3), ("--quiet",), ("--device", "cpu")], ids=str)
def test_a_flag_that_changes_no_byte_continues(flags: tuple, source: Path, whole: Path, begun: Path) -> None:
    name = done(begun)[0]
    before = identity(begun / name)
    assert quantize(source, begun, "--checksums", *flags).rc == 0
    assert identity(begun / name) == before
    assert_same(begun, whole)


@pytest.mark.parametrize(
    "flags", [("--verify_samples", "all"), ("--seed", 7), ("--skip_verify",)], ids=lambda flags: flags[0]
)
def test_another_verification_is_done_without_quantizing_again(
    flags: tuple, source: Path, begun: Path, tmp_path: Path
) -> None:
    undisturbed = quantize(source, tmp_path / "other", "--checksums", *flags)
    name = done(begun)[0]
    before = identity(begun / name)
    again = quantize(source, begun, "--checksums", *flags)
    assert (again.rc, again.out) == (0, undisturbed.out)
    assert identity(begun / name) == before
    assert_same(begun, tmp_path / "other")


def test_verification_of_a_finished_shard_that_has_rotted_fails_and_takes_config_json_away(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    """The cheap look at size and header cannot see it; a run that verifies again does."""
    output = shutil.copytree(whole, tmp_path / "out")
    shard = output / SHARDS[0]
    with shard.open("r+b") as file:
        file.seek(-2, os.SEEK_END)  # the last scale becomes NaN
        file.write(b"\xc0\x7f")
    result = quantize(source, output, "--checksums", "--verify_samples", "all")
    assert result.rc == 1
    assert "not finite and positive" in result.out
    assert not (output / CONFIG).exists()


# --- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (("--calib_mode", "max"), "max"),
        (("--rms_factor", 2.5), "2.5"),
        (("--rms_factor", 3.0000001), "3.0000001"),
        (("--rms_saturate",), "saturate"),
        (("--calib_mode", "percentile"), "percentile"),
        (("--scale_format", "bf16"), "rms(k=3), ue8m0, now rms(k=3), bf16"),
        (("--calib_mode", "mse", "--scale_format", "bf16", "--mse_grid_size", 64), "64"),
    ],
    ids=str,
)
def test_another_flag_refuses(flags: tuple, difference: str, source: Path, begun: Path) -> None:
    before = tree(begun)
    assert_refused(quantize(source, begun, *flags), str(begun), "begun with", difference, "--overwrite")
    assert tree(begun) == before


def test_other_activation_statistics_refuse(source: Path, tmp_path: Path) -> None:
    statistics, output = tmp_path / "stats.json", tmp_path / "out"
    name = "model.layers.0.linear_attn.in_proj_z.weight"
    flags = ("--activation_stats", statistics)
    statistics.write_text(json.dumps({name: {"input_channel_max": [1.0] * 128}}))
    assert quantize(source, output, *flags).rc == 0
    before = tree(output)
    statistics.write_text(json.dumps({name: {"input_channel_max": [2.0] * 128}}))
    assert_refused(quantize(source, output, *flags), "activation_stats", "--overwrite")
    assert_refused(quantize(source, output), "activation_stats", "--overwrite")
    assert tree(output) == before


def retype(path: Path) -> None:
    """Another header that describes the same bytes, written at the same time."""
    times = path.stat()
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"BF16"', b'"I16" ', 1))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: os.utime(folder / SHARDS[2], (0, 0)), SHARDS[2]),
        (lambda folder: os.utime(folder / SHARDS[2], (2**32, 2**32)), SHARDS[2]),
        (lambda folder: retype(folder / SHARDS[0]), SHARDS[0]),
        (lambda folder: (folder / "README.md").write_text("new"), "README.md"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    ],
    ids=["older", "newer", "another dtype in a header", "a file more", "a file less"],
)
def test_a_changed_input_refuses(
    change: Callable, named: str, source: Path, begun: Path, copy_of: Callable
) -> None:
    folder = copy_of(source)  # with the times of the original
    change(folder)
    before = tree(begun)
    assert_refused(quantize(folder, begun, "--checksums"), named, "since it was begun", "--overwrite")
    assert tree(begun) == before


def test_a_copy_of_the_input_continues(source: Path, whole: Path, begun: Path, copy_of: Callable) -> None:
    """What counts is what the files are, not where."""
    assert quantize(copy_of(source), begun, "--checksums").rc == 0
    assert_same(begun, whole)


def test_overwrite_begins_anew(source: Path, begun: Path, tmp_path: Path) -> None:
    name = done(begun)[0]
    before = identity(begun / name)
    flags = ("--calib_mode", "max")
    assert quantize(source, begun, "--overwrite", *flags).rc == 0
    assert identity(begun / name) != before
    assert quantize(source, tmp_path / "other", *flags).rc == 0
    assert_same(begun, tmp_path / "other")


def in_manifest(**changes: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def sparse(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, 10**9)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a list": lambda path: path.write_text("[]"),
    "deeply nested": lambda path: path.write_text("[" * 100_000),
    "a gigabyte": sparse,
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "without shards": in_manifest(shards=None),
    "shards that are numbers": in_manifest(shards={SHARDS[0]: 1}),
    "a file outside": in_manifest(extra_files=["../escaped.txt"]),
    "an absolute file": in_manifest(extra_files=["/escaped.txt"]),
    "a number for a file": in_manifest(extra_files=[1]),
    "another version": in_manifest(version="\x1b[31m9.9"),
    "other settings": in_manifest(settings={"calibration": "\x1b[31m"}),
}


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["again", "overwrite"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_manifest_is_refused_or_replaced(
    damage: Callable, flags: tuple, source: Path, whole: Path, begun: Path
) -> None:
    escaped = begun.parent / "escaped.txt"
    escaped.write_text("mine")
    damage(begun / MANIFEST)
    before = {name for name in os.listdir(begun) if not name.startswith(".")}
    result = quantize(source, begun, "--checksums", *flags)
    if result.rc == 0:  # of what can still be told to be this tool's
        assert_same(begun, whole)
    else:
        assert_refused(result, str(begun))
        assert {name for name in os.listdir(begun) if not name.startswith(".")} == before
    assert "\x1b" not in result.err
    assert escaped.read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [
        {"measurements": "none"},
        {"measurements": [{"name": "x", "cosine": "high"}]},
        {"measurements": [{"name": "x", "cosine": 1.0, "mean_abs": 0.0, "max_abs": 0.0, "amax": 0.1}]},
        {"verification": None},
        {"problems": 3},
        {"sha256": "\n" * 64},
        {"sha256": 0},
    ],
    ids=str,
)
def test_a_damaged_record_of_a_shard_is_not_believed(
    change: dict, source: Path, whole: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(whole, tmp_path / "out")
    document = json.loads((output / MANIFEST).read_text())
    document["shards"][SHARDS[0]] |= change
    (output / MANIFEST).write_text(json.dumps(document))
    assert quantize(source, output, "--checksums").rc == 0
    assert_same(output, whole)


# --- two at once -------------------------------------------------------------------------------


@pytest.fixture
def stopped(source: Path, tmp_path: Path) -> Iterator[tuple[forked.Started, Path]]:
    """A run that stands still in the middle of a shard."""
    output = tmp_path / "out"
    started = forked.start(
        "--input_dir",
        source,
        "--output_dir",
        output,
        "--checksums",
        at=At("fsync", 2, ".safetensors", "stop"),
    )
    started.wait_until_stopped()
    yield started, output
    started.kill()


def test_a_second_run_into_the_directory_refuses(
    source: Path, whole: Path, stopped: tuple[forked.Started, Path]
) -> None:
    started, output = stopped
    for flags in ((), ("--overwrite",), ("--calib_mode", "max", "--overwrite")):
        before = tree(output)
        result = quantize(source, output, *flags)
        assert_refused(result, str(output), "another run is writing to it")
        assert tree(output) == before
    started.kill(signal.SIGCONT)
    assert started.wait().rc == 0
    assert_same(output, whole)  # the lock is gone, too


def test_the_lock_dies_with_its_owner(
    source: Path, whole: Path, stopped: tuple[forked.Started, Path]
) -> None:
    started, output = stopped
    started.kill()
    started.wait()
    assert (output / LOCK).exists()
    assert quantize(source, output, "--checksums").rc == 0
    assert_same(output, whole)


def test_of_many_runs_started_at_once_one_does_the_work(source: Path, whole: Path, tmp_path: Path) -> None:
    for number in range(5):
        output = tmp_path / str(number)
        runs = [forked.start("--input_dir", source, "--output_dir", output, "--checksums") for _ in range(6)]
        ended = [run.wait() for run in runs]
        assert {e.rc for e in ended} <= {0, 2}
        assert any(e.rc == 0 for e in ended)
        for refused in (e for e in ended if e.rc):
            assert_refused(refused, "another run")
        assert_same(output, whole)


def test_a_run_that_came_and_went_before_the_lock_was_taken_is_not_overwritten(
    source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = ["--input_dir", str(source), "--output_dir", str(output), "--calib_mode", "max", "--quiet"]
    other = f"""
if (child := os.fork()) == 0:
    import quantize_fp8
    os._exit(quantize_fp8.main({arguments}))
assert os.waitpid(child, 0)[1] == 0
"""
    ended = quantize(source, output, at=At("open", where=LOCK, do=other))
    assert_refused(ended, str(output), "begun with", "max")
    assert (output / CONFIG).exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("../target")])
def test_a_lock_that_is_no_file_does_no_harm(make: Callable, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    make(output / LOCK)
    result = quantize(source, output)
    assert result.rc == 0 or (result.rc == 2 and result.err.count("\n") == 1)
    assert not (tmp_path / "target").exists()


# --- interrupted -------------------------------------------------------------------------------

HANGING = "os.kill(os.getpid(), {}); time.sleep(3600)"
SHORT_ALARMS = """
import signal
set_alarm = signal.setitimer
signal.setitimer = lambda which, seconds, *more: set_alarm(which, seconds, *more) if seconds <= 2 else None
"""
"""An alarm of more than two seconds never rings: what waits for it hangs, and fails its test."""
STAGES = {
    "planning": At("open", 1, SHARDS[0], "os.kill(os.getpid(), {})"),
    "making the directory": At("mkdir", 1, "", "os.kill(os.getpid(), {})"),
    "the first manifest": At("fsync", 1, MANIFEST, "os.kill(os.getpid(), {})"),
    "a shard's beginning": At("ftruncate", 1, SHARDS[1], "os.kill(os.getpid(), {})"),
    "a shard's middle": At("pwrite", 3, SHARDS[1], "os.kill(os.getpid(), {})"),
    "an fsync that takes long": At("fsync", 1, SHARDS[1], HANGING),
    "a rename": At("rename", 1, SHARDS[1], "os.kill(os.getpid(), {})"),
    "verification": At("open", 2, f"out/{SHARDS[0]}", "os.kill(os.getpid(), {})"),
    "a manifest": At("rename", 3, MANIFEST, "os.kill(os.getpid(), {})"),
    "a copied file": At("pwrite", 1, "tokenizer.json", "os.kill(os.getpid(), {})"),
    "the index": At("fsync", 1, INDEX, "os.kill(os.getpid(), {})"),
    "config.json": At("fsync", 1, f".{CONFIG}.", "os.kill(os.getpid(), {})"),
    "twice": At("pwrite", 3, SHARDS[1], "os.kill(os.getpid(), {0}); os.kill(os.getpid(), {0})"),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("moment", STAGES.values(), ids=STAGES)
def test_a_signal_stops_soon_leaves_no_temporary_file_and_says_how_to_continue(
    moment: At, number: signal.Signals, source: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    at = At(moment.operation, moment.number, moment.where, moment.do.format(int(number)))
    ended = quantize(source, output, "--checksums", at=at, before=SHORT_ALARMS)
    assert ended.rc == 128 + number
    assert ended.err.splitlines()[-1].startswith("interrupted; run the same command again")
    assert "Traceback" not in ended.err
    assert_nothing_half_done(output, whole)
    if output.exists():
        assert [name for name in os.listdir(output) if name.startswith(".")] == []  # the lock included
    assert quantize(source, output, "--checksums").rc == 0
    assert_same(output, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_stops_a_run_whose_disk_hangs(number: signal.Signals, source: Path, tmp_path: Path) -> None:
    """A write that does not return keeps its file from being removed; the next run does that."""
    output = tmp_path / "out"
    hangs = At("pwrite", 4, SHARDS[1], HANGING.format(int(number)))
    ended = quantize(source, output, at=hangs, before=SHORT_ALARMS)
    assert ended.rc == 128 + number
    assert "run the same command again" in ended.err
    assert quantize(source, output).rc == 0
    assert [name for name in os.listdir(output) if name.startswith(".")] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_while_python_still_imports(number: signal.Signals, source: Path, tmp_path: Path) -> None:
    """Of the modules of torch, one of the first, one in the middle, and the whole."""
    for module in ("torch.version", "torch.nn.functional", "torch"):
        process = subprocess.Popen(
            [
                sys.executable, "-X", "importtime", SCRIPT, "--input_dir", source,
                "--output_dir", tmp_path / "out",
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip
        while (line := process.stderr.readline()).rpartition("|")[2].strip() != module:
            assert line, f"it never imported {module}"
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 128 + number, module
        assert "Traceback" not in err
        assert "run the same command again" in err


def test_a_signal_that_python_drops_is_not_lost(source: Path, tmp_path: Path) -> None:
    """An exception in a finalizer only prints; the alarm that was set ends the run all the same."""
    before = """
import os, signal
class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000): pass
import fp8lib.job.run
real = fp8lib.job.run.make_plan
def slow(checkpoint, selection):
    import time
    Swallows()
    time.sleep(3600)
    return real(checkpoint, selection)
fp8lib.job.run.make_plan = slow
"""
    ended = quantize(source, tmp_path / "out", before=SHORT_ALARMS + before)
    assert ended.rc == 130
    assert "run the same command again" in ended.err


# --- checksums ---------------------------------------------------------------------------------


def assert_sums_hold(output: Path) -> None:
    """Of every file of the directory but SHA256SUMS itself."""
    names = sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.is_file())
    names.remove(CHECKSUMS)
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", CHECKSUMS], cwd=output, capture_output=True, text=True,
        env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout == "".join(f"{name}: OK\n" for name in names)


@pytest.mark.parametrize("workers", [1, 4])
def test_checksums_are_what_sha256sum_reads(workers: int, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert quantize(source, output, "--checksums", "--workers", workers).rc == 0
    assert_sums_hold(output)
    os.truncate(output / SHARDS[0], 100)
    checked = subprocess.run(["sha256sum", "--check", "--status", CHECKSUMS], cwd=output)
    assert checked.returncode == 1


def test_checksums_after_a_run_that_was_begun_without(source: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert quantize(source, output, at=At("rename", 3, ".safetensors")).rc < 0
    assert quantize(source, output, "--checksums").rc == 0
    assert_sums_hold(output)
    assert_same(output, whole)


def test_checksums_of_a_directory_that_was_finished_without(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert quantize(source, output).rc == 0
    assert not (output / CHECKSUMS).exists()
    assert quantize(source, output, "--checksums").rc == 0
    assert_sums_hold(output)
    assert_same(output, whole)


def test_checksums_of_a_finished_directory_are_taken_without_quantizing_again(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert quantize(source, output, "--skip_verify").rc == 0
    before = {name: (output / name).stat().st_ino for name in SHARDS}
    (output / "notes \\ of mine.txt").write_text("a backslash, which sha256sum escapes")
    assert quantize(source, output, "--skip_verify", "--checksums").rc == 0
    assert {name: (output / name).stat().st_ino for name in SHARDS} == before
    assert "notes \\\\ of mine.txt" in (output / CHECKSUMS).read_text()
    (output / "notes \\ of mine.txt").unlink()
    assert quantize(source, output, "--checksums").rc == 0
    assert_sums_hold(output)
    assert_same(output, whole)


def test_checksums_with_verify_only_are_all_that_it_writes(source: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert quantize(source, output).rc == 0
    before = {p: p.stat().st_mtime_ns for p in output.iterdir()}
    assert quantize(source, output, "--verify_only", "--checksums").rc == 0
    assert_sums_hold(output)
    assert {p: p.stat().st_mtime_ns for p in output.iterdir() if p.name != CHECKSUMS} == before


def test_checksums_that_a_finished_directory_has_are_checked_and_not_made_to_fit(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(whole, tmp_path / "out")
    lines = (output / CHECKSUMS).read_text()
    other = lines.replace(lines[:64], "0" * 64)
    (output / CHECKSUMS).write_text(other)
    name = lines.splitlines()[0][66:]
    result = quantize(source, output, "--verify_only", "--checksums")
    assert result.rc == 1
    assert f"{name}: its SHA-256 is not the one in {CHECKSUMS}" in result.out
    assert (output / CHECKSUMS).read_text() == other


def test_checksums_keep_no_tensor_in_memory(checkpoint: Callable, copy_of: Callable, tmp_path: Path) -> None:
    """In the input BF16 lies before F32, in the output behind it."""
    source = copy_of(checkpoint("text", num_hidden_layers=1, mtp=False))
    [shard] = source.glob("*.safetensors")
    kept = 128 << 20

    def append(header: dict) -> None:
        end = max(t["data_offsets"][1] for name, t in header.items() if name != "__metadata__")
        spans = ("BF16", [kept // 8192, 4096], [end, end + kept]), ("F32", [1], [end + kept, end + kept + 4])
        for name, (dtype, shape, span) in zip(("model.visual.a", "model.visual.b"), spans, strict=True):
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}

    edit_header(shard, append)
    os.truncate(shard, shard.stat().st_size + kept + 4)
    plain = quantize(source, tmp_path / "plain")
    hashed = quantize(source, tmp_path / "hashed", "--checksums")
    assert (plain.rc, hashed.rc) == (0, 0), hashed.err
    assert_sums_hold(tmp_path / "hashed")
    assert hashed.grown - plain.grown < kept * 3 // 4


def test_checksums_survive_a_run_that_does_not_ask_for_them(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(whole, tmp_path / "out")
    assert quantize(source, output).rc == 0
    assert_sums_hold(output)
    assert quantize(source, output, "--overwrite").rc == 0
    assert not (output / CHECKSUMS).exists()  # of files that are no more
