"""Holds a finished directory of this tool against its own manifest.

The manifest has a SHA-256 of config.json, of the index, of every shard's header and of itself, and what the
codes and scales of every shard add up to. Kept tensors and copied files are compared with the input. So no
bit of the directory can change unseen.
"""

import hashlib
import os
from pathlib import Path

from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import CONFIG, INDEX, Checkpoint
from fp8lib.checkpoint.untrusted import printable
from fp8lib.job import checksums, manifest
from fp8lib.job.manifest import MANIFEST, Manifest
from fp8lib.job.output_dir import CHECKSUMS

_AGAIN = "copy the file again"


def sound_manifest(folder: Path) -> tuple[Manifest | None, list[str]]:
    """A directory's manifest, None if it has none or a damaged one, which is told in a line."""
    try:
        earlier = manifest.load(folder)
        # No single flipped bit takes both tables away: without them, an earlier version wrote it.
        without_digests = earlier and not earlier.files and not earlier.headers
        if earlier is None or without_digests or not manifest.is_damaged(folder):
            return earlier, []
    except Fp8Error:  # it cannot be read at all
        pass
    return None, [f"{MANIFEST}: damaged, its own SHA-256 is another; {_AGAIN}, or remove it to do without"]


def recorded_problems(earlier: Manifest | None, quantized: Checkpoint, config: dict) -> list[str]:
    """What in a directory is not as the manifest says, one line each.

    Args:
        earlier: its manifest, None for none; that of an earlier version has no digests.
        quantized: the directory.
        config: the config.json that is expected, as far as the input tells.

    Raises:
        Fp8Error: a file cannot be read.
    """
    found, folder = [], quantized.root
    if earlier is None or not earlier.headers:
        return found
    for name, digest in earlier.files.items():
        if name not in (CONFIG, INDEX):
            continue
        if not (folder / name).is_file():
            found.append(f"{name}: missing from the directory; {_AGAIN}")
        elif checksums.file_digest(folder / name) != digest:
            change = f" ({_difference(config, quantized.config)})" if name == CONFIG else ""
            found.append(f"{name}: not as it was written{change}; {_AGAIN}")
    shards = {shard.name: shard for shard in quantized.shards}
    found += [
        f"{printable(name)}: in {MANIFEST}, but no shard of the directory; {_AGAIN}"
        for name in sorted(earlier.headers.keys() - shards.keys())
    ]
    for name, shard in shards.items():
        if name not in earlier.headers:
            found.append(f"{printable(name)}: a shard that is not in {MANIFEST}; remove it")
        elif earlier.headers[name] != shard.header_sha256:
            found.append(f"{printable(name)}: its header is not as it was written; {_AGAIN}")
    return found


def listed_digests(folder: Path) -> tuple[dict[str, str], list[str]]:
    """The digests in the directory's SHA256SUMS, empty if it has none; and what is wrong with it."""
    if not os.path.lexists(folder / CHECKSUMS):
        return {}, []
    try:
        return checksums.read(folder), []
    except Fp8Error as error:
        return {}, [str(error)]


def digest_problems(
    folder: Path, listed: dict[str, str], shards: dict[str, str | None], earlier: Manifest | None
) -> list[str]:
    """Files that SHA256SUMS contradicts, one line each.

    Args:
        folder: the directory.
        listed: what SHA256SUMS says.
        shards: name -> the digest that was taken now, None if none was; its record's is compared then.
        earlier: the manifest, or None.

    Raises:
        Fp8Error: a file cannot be read.
    """
    found = []
    for name, digest in listed.items():
        path = folder / name
        if os.path.isabs(name) or ".." in Path(name).parts or not path.is_file():
            found.append(f"{printable(name)}: in {CHECKSUMS}, but not in the directory; {_AGAIN}")
            continue
        if name in shards:
            record = (earlier.shards.get(name) if earlier else None) or {}
            actual = shards[name] or record.get("sha256")
        else:
            actual = checksums.file_digest(path)
        if actual is not None and actual != digest:
            found.append(f"{printable(name)}: its SHA-256 is not the one in {CHECKSUMS}; {_AGAIN}")
    return found


def header_digests(plan) -> dict[str, str]:
    """Shard -> SHA-256 of its header, of `checkpoint.plan.Plan`."""
    return {shard.name: hashlib.sha256(shard.header[8:]).hexdigest() for shard in plan.shards}


def _difference(expected: object, found: object, path: str = "") -> str:
    """The first place in which a document is not the expected one."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                return _difference(expected.get(key), found.get(key), f"{path}.{key}".lstrip("."))
        return "spelled in another way"
    return f"{printable(path)} is {printable(found)}, was {printable(expected)}"
