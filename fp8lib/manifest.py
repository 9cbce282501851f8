"""`fp8_quantization.json` in the output directory: what a run did, so that the next can continue it.

It holds the tool's version, the settings that decide bytes, the identity of every input shard, and per
finished shard its size and verification results. It holds no times and no paths, so that the same input
and flags give the same manifest.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fp8lib import Fp8Error, __version__
from fp8lib.checkpoint import Shard, printable, read_json
from fp8lib.health import Measurement
from fp8lib.plan import to_json
from fp8lib.writer import write_file

MANIFEST = "fp8_quantization.json"


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What became of one shard.

    Attributes:
        name: file name.
        size: bytes of the output file.
        sha256: of the output file, or None if it was not asked for.
        measurements: of the matrices that were spot-checked.
        problems: structural deviations, one line each.
    """

    name: str
    size: int
    sha256: str | None
    measurements: tuple[Measurement, ...]
    problems: tuple[str, ...]


@dataclass(slots=True)
class Manifest:
    """The manifest's contents.

    Attributes:
        settings: flags that decide bytes, as strings and numbers.
        inputs: shard name -> size, mtime_ns, header_sha256.
        shards: name of a finished output shard -> its `to_record`.
        extra_files: copied files, relative paths with `/`.
        version: of the tool that wrote it.
    """

    settings: dict
    inputs: dict[str, dict]
    shards: dict[str, dict] = field(default_factory=dict)
    extra_files: list[str] = field(default_factory=list)
    version: str = __version__

    def save(self, folder: Path) -> None:
        """Replace the file atomically.

        Raises:
            Fp8Error: it cannot be written.
        """
        document = asdict(self)
        document["shards"] = dict(sorted(self.shards.items()))
        write_file(folder / MANIFEST, to_json(document))

    def difference(self, other: "Manifest") -> str | None:
        """The first thing that keeps a run from continuing another, in words, or None."""
        if self.version != other.version:
            return f"it was begun by version {other.version}, this is {self.version}"
        for key, value in self.settings.items():
            if other.settings.get(key) != value:
                return f"it was begun with {key} {other.settings.get(key)}, now {value}"
        for name in sorted(self.inputs.keys() | other.inputs.keys()):
            if self.inputs.get(name) != other.inputs.get(name):
                return f"input shard {printable(name)} has changed since it was begun"
        return None


def load(folder: Path) -> Manifest | None:
    """The manifest of a directory, None if it has none.

    Raises:
        Fp8Error: it has one that cannot be read.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    document = read_json(path)
    try:
        manifest = Manifest(**document)
        sections = (manifest.settings, manifest.inputs, manifest.shards)
        if not all(isinstance(s, dict) for s in sections) or not all(
            isinstance(name, str) for name in manifest.extra_files
        ):
            raise TypeError
    except TypeError:
        raise Fp8Error(f"{printable(path)}: not a manifest of this tool; remove it by hand") from None
    return manifest


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
        "verification": verification,
        "measurements": [
            {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in asdict(m).items()}
            for m in result.measurements
        ],
        "problems": list(result.problems),
    }


def from_record(name: str, record: dict, verification: dict | None) -> ShardResult | None:
    """The result that was recorded, None if it was checked in another way or the record is damaged."""
    try:
        if record["verification"] != verification:
            return None
        measurements = tuple(
            Measurement(m["name"], *(float(m[k]) for k in ("cosine", "mean_abs", "max_abs", "amax")))
            for m in record["measurements"]
        )
        return ShardResult(name, record["size"], record["sha256"], measurements, tuple(record["problems"]))
    except (KeyError, TypeError, ValueError):
        return None
