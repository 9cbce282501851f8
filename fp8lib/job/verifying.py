"""`--verify_only`: measures a finished directory, of this tool or another, against its original."""

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import CONFIG, Checkpoint, open_checkpoint
from fp8lib.checkpoint.headers import Tensor
from fp8lib.checkpoint.matching import mismatches
from fp8lib.checkpoint.rules import fusion_group
from fp8lib.checkpoint.tensor_parallel import tensor_parallel
from fp8lib.checkpoint.untrusted import printable
from fp8lib.job import claims, manifest
from fp8lib.job.manifest import ShardResult
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

    original, quantized = open_checkpoint(flags.input_dir), _open_finished(flags.output_dir)
    weights = ((name, t.shape[1]) for name, t in _matrices(quantized))
    moments = open_moments(flags, weights)
    settings = settings_for(flags, None, ranks, moments)
    pairings = pair_directories(original, quantized)
    earlier = None
    with suppress(Fp8Error):  # another tool's, or damaged: nothing depends on it
        earlier = manifest.load(flags.output_dir)
    if earlier and not earlier.made_from(original.shards):
        talk.warn(f"by its {manifest.MANIFEST}, {printable(flags.output_dir)} was not made from this input")
    known = earlier if earlier and earlier.made_from(original.shards) else None
    pairs = (pair for _, own, _ in pairings for pair in own)
    claim = claims.of_manifest(flags, settings, moments, known, pairs)
    outputs = [tensor for shard in quantized.shards for tensor in shard.tensors]
    unread = mismatches(outputs, quantized.config)
    if "quantization_config" not in quantized.config:
        unread.append(f"{CONFIG}: has no quantization_config, so no engine will read the weights as FP8")
    work = [
        ToCheck(shard.name, shard.size, shard_check(flags, settings, claim, shard.name, own, problems))
        for shard, own, problems in pairings
    ]
    if not ranks.is_main:
        work_for_main(flags, ranks, settings, work)
        return agree(ranks, None)
    results: dict[str, ShardResult] = {}
    work_and_gather(
        flags, ranks, settings, work, len(work), 0, lambda result: results.update({result.name: result})
    )
    used = earlier and earlier.settings.get("calibration")
    ordered = [results[item.name] for item in work]
    # Advice is for the mode that was used, if that is known.
    calibration = replace(flags.calibration, scale_format="ue8m0" if claim.powers_of_two else "bf16")
    with suppress(Fp8Error):
        calibration = Calibration.parse(str(used))
    fp8 = sum(len(pairs) for _, pairs, _ in pairings)
    kept = sum(len(shard.tensors) for shard in quantized.shards) - 2 * fp8
    ordered[0] = replace(ordered[0], problems=(*unread, *ordered[0].problems))
    found = Findings(
        totals=Totals(len(work), sum(bool(r.problems) for r in ordered), fp8, kept),
        measurements=[m for r in ordered for m in r.measurements],
        problems=[p for r in ordered for p in r.problems],
        calibration=calibration,
        label=f"{printable(used or 'unknown')} (verify only)",
        covered=None,
        loading=tensor_parallel(outputs, quantized.config),
        damaged=[r.name for r in ordered if r.damaged],
        finished=True,
    )
    verdict = summarize(flags, talk, found)
    return agree(ranks, verdict)


def _matrices(quantized: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """FP8 weights of a directory that the rules know, by name."""
    for shard in quantized.shards:
        for tensor in shard.tensors:
            if tensor.dtype == "F8_E4M3" and len(tensor.shape) == 2 and fusion_group(tensor.name):
                yield tensor.name, tensor


def _open_finished(folder: Path) -> Checkpoint:
    if os.path.lexists(folder / manifest.MANIFEST) and not os.path.lexists(folder / CONFIG):
        raise Fp8Error(
            f"{printable(folder / CONFIG)}: not there, as the run that wrote the rest is not finished "
            "or FAILed; repeat its command to continue it, with --overwrite if it FAILed"
        )
    return open_checkpoint(folder)
