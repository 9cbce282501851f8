"""The plan of an output whose weights get adapters merged into them."""

from collections.abc import Container
from dataclasses import replace

from fp8lib.checkpoint.adapters import Adapters
from fp8lib.checkpoint.headers import Shard, Tensor
from fp8lib.checkpoint.layout import Extent, Passthrough, Rewritten, ShardPlan, parts_of
from fp8lib.checkpoint.plan import Plan


def with_adapters(plan: Plan, adapters: Adapters) -> Plan:
    """The same output, every byte of it at the same place, with adapters merged.

    What is quantized is merged on its way. A tensor that is kept is rewritten if an adapter changes it.
    """
    shards = tuple(_rewrite_kept(shard, adapters.changes) for shard in plan.shards)
    return replace(plan, shards=shards, adapters=adapters)


def _rewrite_kept(shard: ShardPlan, changed: Container[str]) -> ShardPlan:
    passthrough: list[Passthrough] = []
    rewritten: list[Rewritten] = []
    for item in shard.passthrough:
        if any(name in changed for name, *_ in parts_of(item.output)):
            rewritten += in_place(shard.source, item.start, item.output)
        else:
            passthrough.append(item)
    return replace(shard, passthrough=tuple(passthrough), rewritten=tuple(rewritten))


def in_place(source: Shard, start: int, output: Tensor) -> list[Rewritten]:
    """The matrices of a tensor that is the same in input and output but for its values."""
    found, offset = [], 0
    for name, rows, columns in parts_of(output):
        extent = Extent(source.path, output.dtype, start + offset)
        found.append(Rewritten(name, extent, None, rows, columns, output, output.start + offset))
        offset += rows * found[-1].row_bytes
    return found
