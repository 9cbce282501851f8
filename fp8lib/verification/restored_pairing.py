"""Pairs the weights of two directories one of which was turned back from FP8, or has adapters merged.

Names alone decide, so that the directory may come from another tool and hold its experts fused or not.
"""

from collections.abc import Container, Iterable, Iterator
from dataclasses import replace

from fp8lib.checkpoint.directory import CONFIG, Checkpoint
from fp8lib.checkpoint.headers import ITEM_SIZE, Shard
from fp8lib.checkpoint.layout import Extent, Rewritten, ShardPlan, parts_of
from fp8lib.checkpoint.plan import Plan
from fp8lib.checkpoint.untrusted import printable
from fp8lib.verification.pairing import Kept
from fp8lib.verification.restored import Restored


def pair_restored(
    plan: Plan, finished: Checkpoint
) -> list[tuple[Shard, list[Restored], list[Kept], list[str]]]:
    """For each shard of a directory that was turned back: its weights, other tensors, and what is wrong.

    Args:
        plan: of turning the FP8 checkpoint back, in any layout of experts.
        finished: the directory.
    """
    result = [(shard, [], [], []) for shard in finished.shards]
    homes = {shard.name: rest for shard, *rest in result}
    general = result[0][-1]
    places = {name: (shard, *rest) for shard in finished.shards for name, *rest in _parts(shard)}
    if any("quantization_config" in (section or ()) for section in _sections(finished.config)):
        general.append(f"{CONFIG}: still has a quantization_config")
    expected: set[str] = set()
    for shard in plan.shards:
        for name, rows, columns, dtype, source, item in _wanted(shard):
            expected.add(name)
            if name not in places:
                general.append(f"{printable(name)}: missing from the directory")
                continue
            home, extent, *shape = places[name]
            weights, others, problems = homes[home.name]
            if (extent.dtype, shape) != (dtype, [rows, columns]):
                problems.append(
                    f"{printable(name)}: {extent.dtype} {shape}, expected {dtype} {[rows, columns]}"
                )
            elif item:
                weights.append(Restored(name, rows, columns, source, item.scale, extent))
            else:
                others.append(Kept(name, rows * columns, source, extent))
    general += [f"{printable(name)}: not in the FP8 checkpoint" for name in places if name not in expected]
    return result


def take_merged(
    shard: Shard, kept: Iterable[Kept], changed: Container[str]
) -> tuple[list[Restored], list[Kept]]:
    """Divide the kept tensors of a shard: those that adapters change, matrix by matrix, and the others."""
    tensors = {tensor.name: tensor for tensor in shard.tensors}
    merged, others = [], []
    for each in kept:
        parts = parts_of(tensors[each.name])
        if not any(name in changed for name, *_ in parts):
            others.append(each)
            continue
        done = 0
        for name, rows, columns in parts:
            source, output = (
                replace(extent, start=extent.start + done * ITEM_SIZE[extent.dtype])
                for extent in (each.source, each.output)
            )
            merged.append(Restored(name, rows, columns, source, None, output))
            done += rows * columns
    return merged, others


def _wanted(shard: ShardPlan) -> Iterator[tuple[str, int, int, str, Extent, Rewritten | None]]:
    """(name, rows, columns, dtype, where it was, how it was rewritten) of every matrix that is planned."""
    for item in shard.rewritten:
        yield item.name, item.rows, item.columns, item.output.dtype, item.source, item
    for kept in shard.passthrough:
        start, dtype = kept.start, kept.output.dtype
        for name, rows, columns in parts_of(kept.output):
            yield name, rows, columns, dtype, Extent(shard.source.path, dtype, start), None
            start += rows * columns * ITEM_SIZE[dtype]


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
