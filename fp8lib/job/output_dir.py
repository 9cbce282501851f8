"""The output directory before and after a run: whose it is, what may be removed, what is left to do.

The lock is the tool's own. The filelock library was looked at: it leaves its file behind or removes it while
another process may be about to lock it, and it cannot say who holds the lock, which ranks on other machines
ask to learn whether they see the same directory.
"""

import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import CONFIG, INDEX
from fp8lib.checkpoint.layout import ShardPlan
from fp8lib.checkpoint.plan import Plan
from fp8lib.checkpoint.untrusted import open_regular, printable
from fp8lib.job.manifest import MANIFEST, Manifest, load
from fp8lib.streaming.writer import partial_path, refusing_disk_errors, sync_directory

CHECKSUMS = "SHA256SUMS"
LOCK = ".fp8_quantization.lock"
_LATE = 60.0
"""Seconds that a network file system may take to show one machine what another wrote."""


@dataclass(frozen=True, slots=True)
class State:
    """What an output directory holds before a run.

    Attributes:
        finished: names of output shards that need not be quantized again.
        remove: files of an earlier run that `--overwrite` replaces.
        leftovers: files of an earlier run that was ended before they were complete, or recorded.
        manifest: the earlier run's, if this one continues it.
    """

    finished: frozenset[str] = frozenset()
    remove: tuple[Path, ...] = ()
    leftovers: tuple[Path, ...] = ()
    manifest: Manifest | None = None


def check_location(source: Path, destination: Path) -> None:
    """Refuse an output directory that is the input, inside it, or around it.

    Raises:
        Fp8Error: any of these, or not a directory.
    """
    try:
        output, original = destination.resolve(), source.resolve()
    except (OSError, RuntimeError) as error:
        raise Fp8Error(
            f"{printable(destination)}: {printable(error)}; give another output directory"
        ) from None
    if output.is_relative_to(original) or original.is_relative_to(output):
        raise Fp8Error(
            f"{printable(destination)}: overlaps the input directory; give a separate output directory"
        )
    if os.path.lexists(destination) and not destination.is_dir():
        raise Fp8Error(f"{printable(destination)}: not a directory; give another output directory")


def inspect(folder: Path, plan: Plan, mine: Manifest, overwrite: bool) -> State:
    """Decide whether a run may use a directory, and what it finds done there. Changes nothing.

    Raises:
        Fp8Error: files that no run wrote, or an earlier run that this one does not continue.
    """
    with refusing_disk_errors(folder):
        names = set(os.listdir(folder)) - {LOCK} if folder.exists() else set()
    to_write = _files_of(mine)
    leftovers = _partials_of(folder, to_write)
    if not names - {p.name for p in leftovers}:
        return State(leftovers=leftovers)
    earlier = load(folder)
    if earlier is None:
        foreign = min(names - {p.name for p in leftovers})
        raise Fp8Error(
            f"{printable(folder)}: not empty, and {printable(foreign)} was not written by this "
            "tool; give another output directory"
        )
    written = _written_by(folder, earlier)
    leftovers = _partials_of(folder, {*to_write, *written})
    if overwrite:
        if foreign := [name for name in sorted(to_write - written) if os.path.lexists(folder / name)]:
            raise Fp8Error(
                f"{printable(folder / foreign[0])}: in the way, and not written by this tool; move it"
            )
        # config.json and the index go first: without them it is no model. The manifest goes last.
        order = sorted(written, key=lambda name: (name == MANIFEST) - (name in (CONFIG, INDEX)))
        remove = tuple(folder / name for name in order if _is_file(folder / name))
        return State(remove=remove, leftovers=leftovers)
    if difference := mine.difference(earlier):
        raise Fp8Error(
            f"{printable(folder)}: holds an earlier run, and {difference}; "
            "repeat that command, or start anew with --overwrite"
        )
    finished = frozenset(
        shard.name
        for shard in plan.shards
        if shard.name in earlier.shards and _is_complete(folder / shard.name, shard)
    )
    # Written by a run that ended before it could record them. They are removed to make room.
    unrecorded = tuple(
        folder / s.name for s in plan.shards if s.name not in finished and _is_file(folder / s.name)
    )
    return State(finished, (), leftovers + unrecorded, earlier)


def _files_of(manifest: Manifest) -> set[str]:
    """Every file that a run writes, relative to its output directory."""
    return {CONFIG, INDEX, CHECKSUMS, MANIFEST, *manifest.inputs, *manifest.extra_files}


def _written_by(folder: Path, manifest: Manifest) -> set[str]:
    """Every file that an earlier run may have written.

    Raises:
        Fp8Error: one would be outside the directory, so the manifest cannot be trusted.
    """
    names = _files_of(manifest)
    home = folder.resolve()
    for name in names:
        with suppress(OSError, RuntimeError, ValueError):
            if (folder / name).parent.resolve().is_relative_to(home):
                continue
        raise Fp8Error(
            f"{printable(folder / MANIFEST)}: lists {printable(name)}, which is not in the directory; "
            "give another output directory"
        )
    return names


def _partials_of(folder: Path, names: Iterable[str]) -> tuple[Path, ...]:
    """What a run that wrote these files may have left half written."""
    return tuple(p for name in sorted(names) if _is_file(p := partial_path(folder / name)))


def _is_file(path: Path) -> bool:
    """Whether there is something that `unlink` can remove."""
    try:
        return not stat.S_ISDIR(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def _is_complete(path: Path, shard: ShardPlan) -> bool:
    """Size and header as planned: a cheap look that a rename or a disk did not lose the file."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            return size == shard.size and file.read(len(shard.header)) == shard.header
    except (Fp8Error, OSError):
        return False


def check_space(folder: Path, plan: Plan, state: State, measured: int) -> None:
    """Refuse a disk without room for what is still to be written.

    Args:
        folder: the output directory, or where it will be.
        plan: of the output.
        state: what `inspect` found.
        measured: weights whose measurements the manifest will hold.

    Raises:
        Fp8Error: with both numbers.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    with refusing_disk_errors(folder):
        free = shutil.disk_usage(existing).free
        block = os.statvfs(existing).f_frsize
    sizes = [size for name, size in plan.file_sizes().items() if name not in state.finished]
    # The manifest is replaced by a new one beside it; a shard or a measurement takes under 700 bytes of it.
    sizes += 2 * [4096 + 700 * (2 * len(plan.shards) + measured)]
    needed = sum(-(-size // block) * block for size in sizes)
    for path in (*state.remove, *state.leftovers):
        with suppress(FileNotFoundError):
            # Blocks, not length: a shard that was just begun is a hole of its full length.
            free += 512 * path.lstat().st_blocks
    if needed > free:
        raise Fp8Error(
            f"{printable(folder)}: the output needs {needed:,} bytes and {free:,} are free; "
            "free some space or give another output directory"
        )


class Lock:
    """Keeps a second run out of the directory; the kernel releases it when its owner dies.

    Args:
        folder: the output directory, made if missing.
        owner: what `await_lock` is to find in it.

    Raises:
        Fp8Error: another run holds it, or the directory cannot be made or written to.
    """

    def __init__(self, folder: Path, owner: str) -> None:
        self._path = folder / LOCK
        with refusing_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        while not self._acquire(folder):
            pass
        with refusing_disk_errors(self._path):
            os.ftruncate(self._fd, 0)
            os.write(self._fd, owner.encode())
            os.fsync(self._fd)

    def _acquire(self, folder: Path) -> bool:
        """False if the lock's last owner removed the file in the moment between opening and locking it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with refusing_disk_errors(self._path):
            self._fd = os.open(self._path, flags, 0o666)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._fd)
                raise Fp8Error(
                    f"{printable(folder)}: another run is writing to it; wait for it to end"
                ) from None
            except BaseException:
                os.close(self._fd)
                raise
        with suppress(OSError):
            if os.path.samestat(os.fstat(self._fd), os.lstat(self._path)):
                return True
        os.close(self._fd)
        return False

    def close(self) -> None:
        with suppress(OSError):
            self._path.unlink()
        os.close(self._fd)


def await_lock(folder: Path, owner: str) -> None:
    """Wait until the lock that another process holds is seen from here.

    Raises:
        Fp8Error: it never is, so this is another directory of the same name.
    """
    for _ in range(round(_LATE * 10)):
        with suppress(OSError, UnicodeDecodeError):
            if (folder / LOCK).read_text() == owner:
                return
        time.sleep(0.1)
    raise Fp8Error(
        f"{printable(folder)}: not the directory that rank 0 writes to; give one that all machines share"
    )


def remove_partial_files(folder: Path, manifest: Manifest) -> None:
    """Remove what a run leaves half written when a rank of it dies."""
    for path in _partials_of(folder, _files_of(manifest)):
        with suppress(OSError):
            path.unlink()


def prepare(folder: Path, state: State, complete: bool) -> None:
    """Remove what an interrupted run left half written, and what `--overwrite` replaces.

    Args:
        folder: the output directory.
        state: what `inspect` found.
        complete: no shard is going to be written; otherwise config.json goes first, so that no engine
            takes the directory for a model meanwhile.

    Raises:
        Fp8Error: a file cannot be removed.
    """
    if not complete:
        unpublish(folder)
    for path in (*state.remove, *state.leftovers):
        with refusing_disk_errors(path):
            path.unlink(missing_ok=True)


def unpublish(folder: Path) -> None:
    """Take config.json away, durably: from here on no engine takes the directory for a model.

    Raises:
        Fp8Error: it cannot be removed.
    """
    with refusing_disk_errors(folder / CONFIG):
        (folder / CONFIG).unlink(missing_ok=True)
        sync_directory(folder)
