"""`--verify_only`: measures a finished directory, of this tool or another, against its original."""

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fp8lib import Fp8Error
from fp8lib.checkpoint.adapters import Adapters, open_adapters
from fp8lib.checkpoint.directory import CONFIG, Checkpoint, open_checkpoint
from fp8lib.checkpoint.headers import Tensor
from fp8lib.checkpoint.matching import mismatches
from fp8lib.checkpoint.rules import fusion_group
from fp8lib.checkpoint.tensor_parallel import tensor_parallel
from fp8lib.checkpoint.untrusted import printable
from fp8lib.job import manifest
from fp8lib.job.manifest import ShardResult
from fp8lib.job.progress import Progress
from fp8lib.job.ranks import Ranks
from fp8lib.job.rounding import open_moments
from fp8lib.job.run import agree, settings_for, shard_check, summarize, work_and_gather, work_for_main
from fp8lib.numerics.modes import Calibration
from fp8lib.terminal import Talk
from fp8lib.verification.findings import Findings, Totals
from fp8lib.verification.health import Zone


def verify_only(flags: Namespace, talk: Talk, ranks: Ranks) -> Zone:
    """Measure `flags.output_dir` against `flags.input_dir` and print the summary. Writes nothing.

    Returns:
        The verdict, the same on every rank.

    Raises:
        Fp8Error: one of the two is no complete checkpoint.
    """
    from fp8lib.streaming.scheduler import ToCheck
    from fp8lib.verification.pairing import pair_directories
    from fp8lib.verification.restored_pairing import pair_merged

    original, quantized = open_checkpoint(flags.input_dir), open_finished(flags.output_dir)
    adapters = open_adapters(flags.lora_dir, original) if flags.lora_dir else None
    weights = ((name, t.shape[1]) for name, t in _matrices(quantized))
    settings = settings_for(flags, None, ranks, open_moments(flags, weights), adapters)
    pairings = pair_directories(original, quantized)
    earlier = _earlier_run(flags, talk, original, adapters)
    outputs = [tensor for shard in quantized.shards for tensor in shard.tensors]
    unread = mismatches(outputs, quantized.config)
    if "quantization_config" not in quantized.config:
        unread.append(f"{CONFIG}: has no quantization_config, so no engine will read the weights as FP8")

    def check(shard, pairs, problems):
        merged = pair_merged(original, shard, adapters.changes) if adapters else ()
        return shard_check(flags, settings, shard.name, pairs, problems, merged)

    work = [
        ToCheck(shard.name, shard.size, check(shard, pairs, problems)) for shard, pairs, problems in pairings
    ]
    if not ranks.is_main:
        work_for_main(flags, ranks, settings, work)
        return agree(ranks, None)
    results: dict[str, ShardResult] = {}
    names, total = [item.name for item in work], sum(item.size for item in work)
    progress = Progress(total, names, len(work), quiet=flags.quiet)
    work_and_gather(
        flags, ranks, settings, work, progress, lambda result: results.update({result.name: result})
    )
    used = earlier and earlier.settings.get("calibration")
    ordered = [results[item.name] for item in work]
    fp8 = sum(len(pairs) for _, pairs, _ in pairings)
    kept = sum(len(shard.tensors) for shard in quantized.shards) - 2 * fp8
    ordered[0] = replace(ordered[0], problems=(*unread, *ordered[0].problems))
    merged = len(adapters.changes) if adapters else 0
    found = Findings(
        totals=Totals(len(work), sum(bool(r.problems) for r in ordered), fp8, kept, merged),
        measurements=[m for r in ordered for m in r.measurements],
        problems=[p for r in ordered for p in r.problems],
        calibration=_calibration(flags, talk, str(used), ordered),
        label=f"{printable(used or 'unknown')} (verify only)",
        covered=None,
        loading=tensor_parallel(outputs, quantized.config),
        finished=True,
        adapters=adapters.fingerprints if adapters else (),
    )
    verdict = summarize(flags, talk, found)
    return agree(ranks, verdict)


def _calibration(flags: Namespace, talk: Talk, used: str, results: list[ShardResult]) -> Calibration:
    """How scales were chosen, as the manifest says it; else as the flags say, and as scales show.

    Advice is for that mode. What engines change are no powers of two.
    """
    try:
        calibration = Calibration.parse(used)
    except Fp8Error:
        changed = any(m.requantized for r in results for m in r.measurements)
        return replace(flags.calibration, scale_format="bf16" if changed else "ue8m0")
    if flags.calibration not in (calibration, Calibration()):
        talk.warn(f"scales were chosen by {calibration}; flags that say another mode have no effect")
    return calibration


def _matrices(quantized: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """FP8 weights of a directory that the rules know, by name."""
    for shard in quantized.shards:
        for tensor in shard.tensors:
            if tensor.dtype == "F8_E4M3" and len(tensor.shape) == 2 and fusion_group(tensor.name):
                yield tensor.name, tensor


def _earlier_run(
    flags: Namespace, talk: Talk, original: Checkpoint, adapters: Adapters | None
) -> manifest.Manifest | None:
    """The manifest of the run that wrote the directory; says so if it had another input or other adapters."""
    earlier = None
    with suppress(Fp8Error):  # another tool's, or damaged: nothing depends on it
        earlier = manifest.load(flags.output_dir)
    if earlier is None:
        return None
    says = f"by its {manifest.MANIFEST}, {printable(flags.output_dir)} was"
    if not earlier.made_from(original.shards):
        talk.warn(f"{says} not made from this input")
    merged = earlier.settings.get("adapters")
    if merged != (adapters and list(adapters.fingerprints)):
        how = f"with the adapters {printable(merged)}" if merged else "without adapters"
        talk.warn(f"{says} made {how}; give the same with --lora_dir, and no others")
    return earlier


def open_finished(folder: Path) -> Checkpoint:
    """Open an output directory.

    Raises:
        Fp8Error: the run that wrote it is not finished or failed, or it is no complete checkpoint.
    """
    if os.path.lexists(folder / manifest.MANIFEST) and not os.path.lexists(folder / CONFIG):
        raise Fp8Error(
            f"{printable(folder / CONFIG)}: not there, as the run that wrote the rest is not finished "
            "or FAILed; repeat its command to continue it, with --overwrite if it FAILed"
        )
    return open_checkpoint(folder)
