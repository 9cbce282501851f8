"""The output directory before and after a run: whose it is, what may be removed, what is left to do."""

import fcntl
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fp8lib import Fp8Error
from fp8lib.checkpoint import CONFIG, INDEX, printable
from fp8lib.manifest import MANIFEST, Manifest, load
from fp8lib.plan import Plan
from fp8lib.writer import is_partial, refusing_disk_errors

CHECKSUMS = "SHA256SUMS"
LOCK = ".fp8_quantization.lock"


@dataclass(frozen=True, slots=True)
class State:
    """What an output directory holds before a run.

    Attributes:
        finished: names of output shards that need not be quantized again.
        remove: files of an earlier run that `--overwrite` replaces.
        manifest: the earlier run's, if this one continues it.
    """

    finished: frozenset[str]
    remove: tuple[Path, ...]
    manifest: Manifest | None


def check_location(source: Path, destination: Path) -> None:
    """Refuse an output directory that is the input, inside it, or around it.

    Raises:
        Fp8Error: any of these, or not a directory.
    """
    output, original = destination.resolve(), source.resolve()
    if output.is_relative_to(original) or original.is_relative_to(output):
        raise Fp8Error(
            f"{printable(destination)}: overlaps the input directory; give a separate output directory"
        )
    if destination.exists() and not destination.is_dir():
        raise Fp8Error(f"{printable(destination)}: not a directory")


def inspect(folder: Path, plan: Plan, mine: Manifest, overwrite: bool) -> State:
    """Decide whether a run may use a directory, and what it finds done there. Changes nothing.

    Raises:
        Fp8Error: files that no run wrote, or an earlier run that this one does not continue.
    """
    if not folder.exists():
        return State(frozenset(), (), None)
    entries = [p for p in folder.iterdir() if p.name != LOCK and not is_partial(p.name)]
    if not entries:
        return State(frozenset(), (), None)
    earlier = load(folder)
    if earlier is None:
        raise Fp8Error(
            f"{printable(folder)}: not empty, and {printable(entries[0].name)} was not written by this "
            "tool; give another output directory"
        )
    if overwrite:
        remove = tuple(p for p in _written_by(folder, earlier) if p.is_file() or p.is_symlink())
        foreign = {s.name for s in plan.shards} & {p.name for p in entries} - {p.name for p in remove}
        if foreign:
            raise Fp8Error(
                f"{printable(folder / min(foreign))}: in the way, and not written by this tool; move it"
            )
        return State(frozenset(), remove, None)
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
    return State(finished, (), earlier)


def _written_by(folder: Path, manifest: Manifest) -> list[Path]:
    """Every file an earlier run wrote; what makes it a model, config.json, first."""
    names = [CONFIG, INDEX, *manifest.inputs, *manifest.extra_files, CHECKSUMS, MANIFEST]
    for name in names:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise Fp8Error(f"{printable(folder / MANIFEST)}: lists {printable(name)}; remove it by hand")
    return [folder / name for name in names]


def _is_complete(path: Path, shard) -> bool:
    """Size and header as planned: a cheap look that a rename or a disk did not lose the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return size == shard.size and file.read(len(shard.header)) == shard.header
    except OSError:
        return False


def check_space(folder: Path, plan: Plan, state: State) -> None:
    """Refuse a disk without room for what is still to be written.

    Raises:
        Fp8Error: with both numbers.
    """
    needed = plan.output_bytes() - sum(s.size for s in plan.shards if s.name in state.finished)
    existing = folder
    while not existing.exists():
        existing = existing.parent
    freed = sum(p.lstat().st_size for p in state.remove)
    if folder.is_dir():
        freed += sum(p.lstat().st_size for p in folder.iterdir() if is_partial(p.name))
    free = shutil.disk_usage(existing).free + freed
    if needed > free:
        raise Fp8Error(
            f"{printable(folder)}: the output needs {needed:,} bytes and {free:,} are free; "
            "free some space or give another output directory"
        )


class Lock:
    """Keeps a second run out of the directory; the kernel releases it when its owner dies."""

    def __init__(self, folder: Path) -> None:
        with refusing_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / LOCK
        with refusing_disk_errors(self._path):
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise Fp8Error(f"{printable(folder)}: another run is writing to it; wait for it to end") from None

    def close(self) -> None:
        with suppress(OSError):
            self._path.unlink()
        os.close(self._fd)


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
    config = () if complete else (folder / CONFIG,)
    for path in (*config, *state.remove, *(p for p in folder.iterdir() if is_partial(p.name))):
        with refusing_disk_errors(path):
            path.unlink(missing_ok=True)
