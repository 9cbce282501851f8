"""Prints the plan of a run: `--dry_run`."""

from collections import Counter, defaultdict
from dataclasses import replace

from fp8lib.checkpoint.layout import matrices_of
from fp8lib.checkpoint.plan import Plan
from fp8lib.checkpoint.selection import decide, group_of
from fp8lib.checkpoint.tensor_parallel import tensor_parallel
from fp8lib.checkpoint.untrusted import printable
from fp8lib.numerics.blocks import blocks
from fp8lib.terminal import WIDTH, Printer, size
from fp8lib.verification.loading import print_loading


def print_plan(plan: Plan, printer: Printer) -> None:
    """What a run would do: what is quantized, what is kept and why, per shard, in total."""
    matrices = list(plan.matrices)
    printer.line("=" * WIDTH)
    printer.line("  QUANTIZATION PLAN (dry run, nothing written)")
    printer.line("-" * WIDTH)
    printer.line("  Quantized to FP8 E4M3, one BF16 scale per 128x128 block")
    _print_kinds([(m.weight.name, m.rows, m.columns) for m in matrices], printer)
    rounded = plan.selection.kept_dtype
    printer.line(f"  Kept, F32 and F16 as {rounded}" if rounded else "  Kept as they are")
    reasons: dict[str, list] = defaultdict(list)
    outputs = {tensor.name: tensor for tensor in plan.outputs()}
    for kept in plan.kept:
        reasons[kept.reason].append(outputs[kept.tensor.name])
    for reason, tensors in sorted(reasons.items(), key=lambda item: -sum(t.nbytes for t in item[1])):
        total = sum(t.nbytes for t in tensors)
        printer.wrapped(reason, f"  {len(tensors):>6}  {size(total):>8}  ", " " * 20)
        names = sorted({_kind(t.name) for t in tensors})
        shown = ", ".join(map(printable, names[:4])) + (", …" if names[4:] else "")
        printer.wrapped(shown, " " * 10, " " * 10)
    printer.line("-" * WIDTH)
    for shard in plan.shards:
        printer.line(
            f"  {shard.name}  {size(shard.source.size)} -> {size(shard.size)}  "
            f"({len(shard.matrices)} FP8, {len(shard.passthrough)} kept)"
        )
    printer.line("-" * WIDTH)
    before = sum(s.source.size for s in plan.shards)
    if plan.adapters:
        kept = {item.name for shard in plan.shards for item in shard.rewritten} & plan.adapters.changes.keys()
        printer.line(
            f"  Adapters merged     : into {len(plan.adapters.changes)} weights, {len(kept)} of them kept"
        )
    printer.line(f"  FP8 weight tensors  : {len(matrices)}")
    printer.line(f"  Passthrough tensors : {len(plan.kept)}")
    printer.line(f"  Files copied along  : {len(plan.checkpoint.extra_files)}")
    printer.line(f"  Size                : {size(before)} -> {size(plan.output_bytes())}")
    print_loading(printer, tensor_parallel(plan.outputs(), plan.config()))
    _print_trial(printer, plan)
    _print_official(printer, plan)
    printer.line("=" * WIDTH)


def print_restoring(plan: Plan, printer: Printer) -> None:
    """What turning a checkpoint back would do: which weights, and what becomes of each shard."""
    restored = [item for shard in plan.shards for item in shard.rewritten if item.scale]
    others = {o.name for s in plan.shards for o in s.outputs()} - {item.output.name for item in restored}
    printer.line("=" * WIDTH)
    printer.line("  DEQUANTIZATION PLAN (dry run, nothing written)")
    printer.line("-" * WIDTH)
    printer.line("  Turned back into BF16, code * scale")
    _print_kinds([(item.name, item.rows, item.columns) for item in restored], printer)
    printer.line("-" * WIDTH)
    for shard in plan.shards:
        printer.line(f"  {shard.name}  {size(shard.source.size)} -> {size(shard.size)}")
    printer.line("-" * WIDTH)
    before = sum(shard.size for shard in plan.checkpoint.shards)
    printer.line(f"  FP8 weight tensors  : {len(restored)}")
    printer.line(f"  Tensors they become : {len({item.output.name for item in restored})}")
    printer.line(f"  Other tensors       : {len(others)}")
    printer.line(f"  Files copied along  : {len(plan.checkpoint.extra_files)}")
    printer.line(f"  Size                : {size(before)} -> {size(plan.output_bytes())}")
    printer.line("=" * WIDTH)


def _print_kinds(matrices: list[tuple[str, int, int]], printer: Printer) -> None:
    """(name, rows, columns) of matrices, those of all layers and experts together."""
    kinds: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, *shape in matrices:
        kinds[_kind(name)].append(tuple(shape))
    for kind, members in sorted(kinds.items()):
        shapes = Counter(map(str, map(list, members)))
        shape = next(iter(shapes)) + (" and others" if len(shapes) > 1 else "")
        printer.line(f"  {len(members):>6}  {printable(kind.removesuffix('.weight'))}  {shape}")


def _print_trial(printer: Printer, plan: Plan) -> None:
    """What a run would read first, to know which groups stay as they are; a dry run reads headers alone."""
    if plan.selection.by_trial:
        nbytes = sum(m.rows * m.input_row_bytes for m in plan.matrices)
        text = f"quantizes {size(nbytes)} in memory first; groups of which a weight would FAIL are kept, too"
        printer.wrapped(text, "  The run             : ", " " * 24)


def _print_official(printer: Printer, plan: Plan) -> None:
    """What the official set would save, and what it asks for."""
    tensors = [tensor for shard in plan.checkpoint.shards for tensor in shard.tensors]
    official = decide(tensors, replace(plan.selection, eligibility="official")).kept
    outputs = {tensor.name: tensor for tensor in plan.outputs()}
    kept = [outputs[k.tensor.name] for k in plan.kept]
    more = [t for t in kept if (group := group_of(t)) and group not in official]
    if not more:
        return
    saved = sum(t.nbytes - r * c - 2 * blocks(r) * blocks(c) for t in more for _, r, c in matrices_of(t))
    text = f"--eligibility official would save {size(saved)}"
    widths = {t.shape[0] for t in more if t.name.endswith(".shared_expert.gate_proj.weight")}
    if widths:
        text += (
            f"; FP8 shared experts need shared_expert_intermediate_size ({max(widths)}) to be a multiple of "
            "128 times the tensor-parallel size"
        )
    printer.wrapped(text, "  Official set        : ", " " * 24)


def _kind(name: str) -> str:
    """A tensor's name with its layer and expert numbers left out."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
