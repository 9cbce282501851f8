"""Pairs the weights of two directories one of which was turned back from FP8, or has adapters merged.

Names alone decide, so that the directory may come from another tool and hold its experts fused or not.
"""

from collections.abc import Container, Iterator

from fp8lib.checkpoint.directory import CONFIG, Checkpoint
from fp8lib.checkpoint.headers import ITEM_SIZE, Shard
from fp8lib.checkpoint.layout import Extent, parts_of
from fp8lib.checkpoint.plan import Plan
from fp8lib.checkpoint.untrusted import printable
from fp8lib.streaming.lanes import DTYPES
from fp8lib.verification.restored import Restored


def pair_restored(plan: Plan, finished: Checkpoint) -> list[tuple[Shard, list[Restored], list[str]]]:
    """For each shard of a directory that was turned back: its weights, and one line per structural problem.

    Args:
        plan: of turning the FP8 checkpoint back, in any layout of experts.
        finished: the directory.
    """
    result = [(shard, [], []) for shard in finished.shards]
    homes = {shard.name: (weights, problems) for shard, weights, problems in result}
    general = result[0][2]
    places = {name: (shard, *rest) for shard in finished.shards for name, *rest in _parts(shard)}
    if any("quantization_config" in (section or ()) for section in _sections(finished.config)):
        general.append(f"{CONFIG}: still has a quantization_config")
    expected: set[str] = set()
    for shard in plan.shards:
        wanted = [(r.name, r.rows, r.columns, r.output.dtype, r) for r in shard.rewritten]
        for kept in shard.passthrough:
            wanted += [(*part, kept.output.dtype, None) for part in parts_of(kept.output)]
        for name, rows, columns, dtype, item in wanted:
            expected.add(name)
            if name not in places:
                general.append(f"{printable(name)}: missing from the directory")
                continue
            home, extent, *shape = places[name]
            weights, problems = homes[home.name]
            if (extent.dtype, shape) != (dtype, [rows, columns]):
                problems.append(
                    f"{printable(name)}: {extent.dtype} {shape}, expected {dtype} {[rows, columns]}"
                )
            elif item:
                weights.append(Restored(name, rows, columns, item.source, item.scale, extent))
    general += [f"{printable(name)}: not in the FP8 checkpoint" for name in places if name not in expected]
    return result


def pair_merged(original: Checkpoint, shard: Shard, changed: Container[str]) -> list[Restored]:
    """Kept tensors of a shard that adapters change, with their originals, where dtype and shape agree."""
    kept = {name: rest for name, *rest in _parts(shard) if name in changed and rest[0].dtype in DTYPES}
    if not kept:
        return []
    return [
        Restored(name, rows, columns, extent, None, kept[name][0])
        for source in original.shards
        for name, extent, rows, columns in _parts(source)
        if name in kept and (kept[name][0].dtype, *kept[name][1:]) == (extent.dtype, rows, columns)
    ]


def _parts(shard: Shard) -> Iterator[tuple[str, Extent, int, int]]:
    """(name, where, rows, columns) of every matrix of a shard, and of other tensors as if they were one."""
    for tensor in shard.tensors:
        start = tensor.start
        for name, rows, columns in parts_of(tensor):
            yield name, Extent(shard.path, tensor.dtype, start), rows, columns
            start += rows * columns * ITEM_SIZE[tensor.dtype]


def _sections(config: dict) -> list[dict | None]:
    text = config.get("text_config")
    return [config, text if isinstance(text, dict) else None]
