"""`--verify_only`: measures a finished directory, of this tool or another, against its original."""

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
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
from fp8lib.job import checksums, claims, manifest, recorded
from fp8lib.job.manifest import Manifest, ShardResult
from fp8lib.job.ranks import Ranks
from fp8lib.job.rounding import open_moments
from fp8lib.job.run import agree, settings_for, shard_check, summarize, work_and_gather, work_for_main
from fp8lib.numerics.modes import Calibration
from fp8lib.streaming.sums import Origin
from fp8lib.terminal import Talk
from fp8lib.verification import directory_check
from fp8lib.verification.claim import Claim
from fp8lib.verification.findings import Findings, Totals
from fp8lib.verification.health import Zone


def verify_only(flags: Namespace, talk: Talk, ranks: Ranks) -> Zone:
    """Measure `flags.output_dir` against `flags.input_dir` and print the summary.

    Writes nothing but SHA256SUMS, and that only with `--checksums`.

    Returns:
        The verdict, the same on every rank.

    Raises:
        Fp8Error: one of the two is no complete checkpoint.
    """
    from fp8lib.verification.pairing import pair_directories

    original, quantized = open_checkpoint(flags.input_dir), _open_finished(flags.output_dir)
    weights = ((name, t.shape[1]) for name, t in _matrices(quantized))
    moments = open_moments(flags, weights)
    settings = settings_for(flags, None, ranks, moments)
    pairings = pair_directories(original, quantized)
    earlier, damaged = recorded.sound_manifest(flags.output_dir)
    if earlier and not earlier.made_from(original.shards):
        talk.warn(f"by its {manifest.MANIFEST}, {printable(flags.output_dir)} was not made from this input")
    if earlier and not earlier.headers:
        talk.warn(f"its {manifest.MANIFEST} is of an earlier version, which took no checksums")
    listed, unreadable = recorded.listed_digests(flags.output_dir)
    known = earlier if earlier and earlier.made_from(original.shards) else None
    claim = claims.of_manifest(flags, settings, moments, known, (p for each in pairings for p in each.pairs))
    work = _work(flags, settings, claim, pairings, earlier, listed)
    if not ranks.is_main:
        work_for_main(flags, ranks, settings, work)
        return agree(ranks, None)
    others = damaged + unreadable + _other_problems(talk, original, quantized, earlier)
    results: dict[str, ShardResult] = {}
    work_and_gather(
        flags, ranks, settings, work, len(work), 0, lambda result: results.update({result.name: result})
    )
    ordered = [results[item.name] for item in work]
    digests = {r.name: r.sha256 for r in ordered}
    others += recorded.digest_problems(flags.output_dir, listed, digests, earlier)
    ordered[0] = replace(ordered[0], problems=(*others, *ordered[0].problems))
    if flags.checksums and not any(r.problems for r in ordered):
        checksums.write(flags.output_dir, {name: digest for name, digest in digests.items() if digest})
    verdict = summarize(flags, talk, _findings(flags, claim, quantized, pairings, ordered, earlier))
    return agree(ranks, verdict)


def _work(
    flags: Namespace,
    settings,
    claim: Claim,
    pairings: Sequence,
    earlier: Manifest | None,
    listed: Mapping[str, str],
) -> list:
    """The shards to check, the same list on every rank."""
    from fp8lib.streaming.scheduler import ToCheck

    work = []
    for each in pairings:
        shard = each.shard
        as_written = earlier is not None and earlier.headers.get(shard.name) == shard.header_sha256
        check = shard_check(
            flags,
            settings,
            claim,
            shard.name,
            each.pairs,
            each.problems,
            kept=each.kept,
            origin=Origin.of(shard.tensors) if as_written else None,
            header_bytes=shard.size - sum(tensor.nbytes for tensor in shard.tensors),
        )
        sums = manifest.recorded_sums(earlier.shards.get(shard.name, {})) if as_written else None
        wanted = flags.checksums or (flags.verify_samples is None and shard.name in listed)
        hashed = shard.path if wanted else None
        work.append(ToCheck(shard.name, shard.size, check, hashed=hashed, sums=sums))
    return work


def _other_problems(
    talk: Talk, original: Checkpoint, quantized: Checkpoint, earlier: Manifest | None
) -> list[str]:
    """What is wrong outside the tensors, one line each."""
    outputs = (tensor for shard in quantized.shards for tensor in shard.tensors)
    found = directory_check.quantization_problems(quantized.config)
    found += mismatches(outputs, quantized.config)
    found += directory_check.index_problems(quantized)
    expected = {
        **original.config,
        "quantization_config": quantized.config.get("quantization_config"),
    }
    found += recorded.recorded_problems(earlier, quantized, expected)
    names = {path.as_posix() for path in original.extra_files}
    copied = names & set(earlier.extra_files) if earlier else set()
    found += directory_check.copied_file_problems(original.root, quantized.root, sorted(copied))
    for line in directory_check.copied_file_problems(original.root, quantized.root, sorted(names - copied)):
        talk.warn(line)
    if not earlier and directory_check.lacks_tokenizer(original, quantized):
        found.append("tokenizer.json: missing from the FP8 directory, and there is no other tokenizer in it")
    return found


def _findings(
    flags: Namespace,
    claim: Claim,
    quantized: Checkpoint,
    pairings: Sequence,
    ordered: list[ShardResult],
    earlier: Manifest | None,
) -> Findings:
    used = earlier and earlier.settings.get("calibration")
    # Advice is for the mode that was used, if that is known.
    calibration = replace(flags.calibration, scale_format="ue8m0" if claim.powers_of_two else "bf16")
    with suppress(Fp8Error):
        calibration = Calibration.parse(str(used))
    outputs = [tensor for shard in quantized.shards for tensor in shard.tensors]
    fp8 = sum(len(each.pairs) for each in pairings)
    return Findings(
        totals=Totals(len(ordered), sum(bool(r.problems) for r in ordered), fp8, len(outputs) - 2 * fp8),
        measurements=[m for r in ordered for m in r.measurements],
        problems=[p for r in ordered for p in r.problems],
        calibration=calibration,
        label=f"{printable(used or 'unknown')} (verify only)",
        covered=None,
        loading=tensor_parallel(outputs, quantized.config),
        damaged=[r.name for r in ordered if r.damaged],
        finished=True,
        looked_at=sum(r.looked_at for r in ordered) / sum(s.size for s in quantized.shards),
    )


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
