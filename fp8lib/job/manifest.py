"""`fp8_quantization.json` in the output directory: what a run did, so that the next can continue it.

It holds the tool's version, the settings that decide bytes, the identity of every input shard, and per
finished shard its size, checksums and verification results. It holds no times and no paths, so that the same
input and flags give the same manifest. Its last entry is the SHA-256 of the file itself, with zeros in its
place.
"""

import hashlib
import math
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from fp8lib import Fp8Error, __version__
from fp8lib.checkpoint.headers import Shard
from fp8lib.checkpoint.plan import to_json
from fp8lib.checkpoint.untrusted import open_regular, printable, read_json
from fp8lib.streaming.sums import Sums
from fp8lib.streaming.writer import refusing_disk_errors, write_file
from fp8lib.verification.measurement import Measurement
from fp8lib.verification.output_error import OutputError

MANIFEST = "fp8_quantization.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NO_DIGEST = "0" * 64


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What became of one shard.

    Attributes:
        name: file name.
        size: bytes of the output file.
        sha256: of the output file, or None if it was not asked for.
        measurements: of the matrices that were spot-checked.
        problems: structural deviations, one line each.
        final: False for a shard that is complete on disk and still to be verified.
        damaged: whether codes or scales in it are not what the tool gives.
        sums: of its codes and scales as they were written; None if that is not known.
        looked_at: bytes of it that were verified.
    """

    name: str
    size: int
    sha256: str | None
    measurements: tuple[Measurement, ...]
    problems: tuple[str, ...]
    final: bool = True
    damaged: bool = False
    sums: Sums | None = None
    looked_at: int = 0


@dataclass(slots=True)
class Manifest:
    """The manifest's contents.

    Attributes:
        settings: flags that decide bytes, as strings and numbers.
        inputs: shard name -> size, mtime_ns, header_sha256.
        shards: name of a finished output shard -> its `to_record`.
        extra_files: copied files, relative paths with `/`.
        files: SHA-256 of config.json and the index as they are written.
        headers: output shard name -> SHA-256 of its header.
        version: of the tool that wrote it.
    """

    settings: dict
    inputs: dict[str, dict]
    shards: dict[str, dict] = field(default_factory=dict)
    extra_files: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    version: str = __version__

    def save(self, folder: Path) -> None:
        """Replace the file atomically.

        Raises:
            Fp8Error: it cannot be written.
        """
        write_file(folder / MANIFEST, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file's contents."""
        document = asdict(self)
        document["shards"] = dict(sorted(self.shards.items()))
        blank = to_json({**document, "sha256": _NO_DIGEST})
        place = blank.rindex(_NO_DIGEST.encode())
        digest = hashlib.sha256(blank).hexdigest().encode()
        return blank[:place] + digest + blank[place + len(digest) :]

    def made_from(self, shards: Iterable[Shard]) -> bool:
        """Whether these are the input shards, as far as sizes and headers tell; times may differ."""
        keys = ("size", "header_sha256")
        mine = {name: [record.get(key) for key in keys] for name, record in self.inputs.items()}
        return mine == {s.name: [s.size, s.header_sha256] for s in shards}

    def difference(self, other: "Manifest") -> str | None:
        """The first thing that keeps a run from continuing another, in words, or None."""
        if self.version != other.version:
            return f"it was begun by version {printable(other.version)}, this is {self.version}"
        for key in other.settings | self.settings:
            was, now = other.settings.get(key), self.settings.get(key)
            if was != now:
                return f"it was begun with {printable(key)} {printable(was)}, now {now}"
        for name in sorted(self.inputs.keys() | other.inputs.keys()):
            if self.inputs.get(name) != other.inputs.get(name):
                return f"input shard {printable(name)} has changed since it was begun"
        if changed := sorted(set(self.extra_files) ^ set(other.extra_files)):
            was = "come to" if changed[0] in self.extra_files else "gone from"
            return f"{printable(changed[0])} has {was} the input since it was begun"
        return None


def date_of(folder: Path) -> str:
    """When a directory's shards were last written or verified, in local time.

    It is the time of the manifest's file. In the file it would make directories differ that are the same.
    """
    written = (folder / MANIFEST).stat().st_mtime
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(written))


def load(folder: Path) -> Manifest | None:
    """The manifest of a directory, None if it has none; without the shards whose record is damaged.

    Raises:
        Fp8Error: it has one that cannot be read.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    try:
        document = read_json(path)
        if not _is_manifest(document):
            raise Fp8Error(f"{printable(path)}: not a manifest of this tool")
    except Fp8Error as error:
        # Without it nobody knows which files of the directory a run wrote.
        raise Fp8Error(f"{error}; remove the directory by hand or give another") from None
    manifest = Manifest(**{f.name: document[f.name] for f in fields(Manifest) if f.name in document})
    manifest.shards = {name: record for name, record in manifest.shards.items() if _is_record(record)}
    return manifest


def is_damaged(folder: Path) -> bool:
    """Whether the manifest of a directory is not byte for byte as it was written.

    Raises:
        Fp8Error: it cannot be read.
    """
    with open_regular(folder / MANIFEST) as file, refusing_disk_errors(folder / MANIFEST):
        data = file.read()
    digest = re.search(rb'"([0-9a-f]{64})"\n}\n\Z', data)
    if digest is None:
        return True
    blank = data[: digest.start(1)] + _NO_DIGEST.encode() + data[digest.end(1) :]
    return hashlib.sha256(blank).hexdigest().encode() != digest[1]


def _is_manifest(document: object) -> bool:
    """Whether a document holds what `save` writes, the records of shards aside."""
    return (
        isinstance(document, dict)
        and document.keys() >= {f.name for f in fields(Manifest)} - {"files", "headers"}
        and all(isinstance(document.get(key, {}), dict) for key in ("files", "headers"))
        and all(isinstance(document[key], dict) for key in ("settings", "inputs", "shards"))
        and all(isinstance(record, dict) for record in document["inputs"].values())
        and isinstance(document["extra_files"], list)
        and all(isinstance(name, str) for name in document["extra_files"])
    )


def _is_record(record: object) -> bool:
    """Whether this is what `to_record` makes; `from_record` looks at the measurements."""
    return (
        isinstance(record, dict)
        and isinstance(record.get("size"), int)
        and (record.get("sha256") is None or bool(_SHA256.fullmatch(str(record["sha256"]))))
    )


def kept_groups(manifest: Manifest) -> dict[str, str] | None:
    """Fusion group -> why a run found that it would FAIL; None if it did not look, or the record is bad."""
    kept = manifest.settings.get("kept_groups")
    is_sound = isinstance(kept, dict) and all(isinstance(reason, str) for reason in kept.values())
    return kept if is_sound else None


def identity(shard: Shard) -> dict:
    """What tells an input shard from a changed one."""
    return {
        "size": shard.size,
        "mtime_ns": shard.mtime_ns,
        "header_sha256": shard.header_sha256,
    }


def to_record(result: ShardResult, verification: dict | None) -> dict:
    """A shard's result as JSON; `verification` says how it was checked, None if it was not."""
    return {
        "size": result.size,
        "sha256": result.sha256,
        "sums": result.sums and [f"{n:016x}" for n in (result.sums.codes, result.sums.scales)],
        "looked_at": result.looked_at,
        "verification": verification,
        "measurements": [_plain(asdict(m)) for m in result.measurements],
        "problems": list(result.problems),
        "damaged": result.damaged,
    }


def from_record(name: str, record: dict, verification: dict | None) -> ShardResult | None:
    """The result that was recorded, None if it was checked in another way or the record is damaged."""
    try:
        if record["verification"] != verification:
            return None
        measurements = tuple(map(_measurement, record["measurements"]))
        problems = tuple(map(printable, record["problems"]))
        sums, looked_at = recorded_sums(record), int(record["looked_at"])
        return ShardResult(
            name,
            record["size"],
            record["sha256"],
            measurements,
            problems,
            damaged=bool(record["damaged"]),
            sums=sums,
            looked_at=looked_at,
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return None


def recorded_sums(record: dict) -> Sums | None:
    """The sums in a shard's record; None if they are not known."""
    sums = record.get("sums")
    if not isinstance(sums, list) or len(sums) != 2 or not all(isinstance(n, str) for n in sums):
        return None
    with suppress(ValueError):
        return Sums(*(int(n, 16) for n in sums))
    return None


SLOW_TO_SAVE = 0.2
"""Seconds from which on saving the manifest is put off where that loses no shard."""


class Journal:
    """Records results in the manifest on disk.

    A complete shard is recorded at once. The record that it is verified, too, may come later where saving
    takes long (2.6 s with the measurements of all 92,000 matrices of a 397B). If that record is lost, the
    shard is verified again.

    Args:
        mine: the manifest.
        folder: the output directory.
        verification: how shards are verified.
        on_disk: the manifest that lies there.
    """

    def __init__(
        self, mine: Manifest, folder: Path, verification: dict | None, on_disk: Manifest | None
    ) -> None:
        self._manifest, self._folder, self._verification = mine, folder, verification
        # Not written again where nothing has changed: its time tells when the shards were verified.
        self._saved, self._not_before = mine == on_disk, 0.0

    def record(self, result: ShardResult) -> ShardResult:
        """Record a result; returns it with the checksums that an earlier one of that shard had."""
        earlier = self._manifest.shards.get(result.name)
        known = earlier or {}
        sums = result.sums or recorded_sums(known)
        result = replace(result, sha256=result.sha256 or known.get("sha256"), sums=sums)
        verification = self._verification if result.final else None
        self._manifest.shards[result.name] = to_record(result, verification)
        self._saved = False
        if earlier is None or time.monotonic() >= self._not_before:
            self.save()
        return result

    def save(self) -> None:
        """Save what is not saved yet."""
        if self._saved:
            return
        begun = time.monotonic()
        self._manifest.save(self._folder)
        took = time.monotonic() - begun
        self._saved, self._not_before = True, begun + (20 * took if took > SLOW_TO_SAVE else 0)


def _measurement(record: dict) -> Measurement:
    """The measurement that `asdict` made this of."""
    output = dict(record).get("output")
    return Measurement(
        **_of_kinds(record, Measurement, "output"),
        output=None if output is None else OutputError(**_of_kinds(output, OutputError)),
    )


def _of_kinds(record: dict, kind: type, *but: str) -> dict:
    """A dataclass's fields as their types, but for some."""
    return {f.name: f.type(record[f.name]) for f in fields(kind) if f.name not in but}


def _plain(values: dict) -> dict:
    """What JSON can hold: numbers that are not finite as text; without what is not there."""
    return {
        key: _plain(v)
        if isinstance(v, dict)
        else str(v)
        if isinstance(v, float) and not math.isfinite(v)
        else v
        for key, v in values.items()
        if v is not None
    }
