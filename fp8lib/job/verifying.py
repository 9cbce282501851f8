"""`--verify_only`: measures a finished directory, of this tool or another, against its original."""

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from fp8lib import Fp8Error
from fp8lib.checkpoint.adapters import Adapters, open_adapters
from fp8lib.checkpoint.directory import CONFIG, Checkpoint, open_checkpoint
from fp8lib.checkpoint.headers import Tensor
from fp8lib.checkpoint.matching import mismatches
from fp8lib.checkpoint.rules import fusion_group
from fp8lib.checkpoint.tensor_parallel import tensor_parallel
from fp8lib.checkpoint.untrusted import printable
from fp8lib.job import checksums, claims, manifest, recorded, trying
from fp8lib.job.manifest import Manifest, ShardResult
from fp8lib.job.progress import Progress
from fp8lib.job.ranks import Ranks
from fp8lib.job.rounding import open_moments
from fp8lib.job.run import agree_on, settings_for, shard_check, summarize, work_and_gather, work_for_main
from fp8lib.numerics.modes import Calibration
from fp8lib.streaming.sums import Origin
from fp8lib.terminal import Talk
from fp8lib.verification import directory_check
from fp8lib.verification.claim import Claim
from fp8lib.verification.findings import Findings, Totals
from fp8lib.verification.health import Zone


def verify_only(flags: Namespace, talk: Talk, ranks: Ranks) -> tuple[Zone, Findings | None]:
    """Measure `flags.output_dir` against `flags.input_dir` and print the summary.

    Writes nothing but SHA256SUMS, and that only with `--checksums`.

    Returns:
        (the verdict, the same on every rank; what was found, on rank 0).

    Raises:
        Fp8Error: one of the two is no complete checkpoint.
    """
    from fp8lib.verification.pairing import pair_directories

    original, quantized = open_checkpoint(flags.input_dir), open_finished(flags.output_dir)
    adapters = open_adapters(flags.lora_dir, original) if flags.lora_dir else None
    weights = ((name, t.shape[1]) for name, t in _matrices(quantized))
    moments = open_moments(flags, weights)
    settings = settings_for(flags, None, ranks, moments, adapters)
    pairings = pair_directories(original, quantized)
    earlier, damaged = _earlier_run(flags, talk, original, adapters)
    listed, unreadable = recorded.listed_digests(flags.output_dir)
    known = earlier if earlier and claims.applies(earlier, original, adapters) else None
    claim = claims.of_manifest(flags, settings, moments, known, (p for each in pairings for p in each.pairs))
    work = _work(flags, settings, claim, pairings, earlier, listed, adapters)
    if not ranks.is_main:
        work_for_main(flags, ranks, settings, work)
        return agree_on(ranks, None)
    others = damaged + unreadable + _other_problems(talk, original, quantized, earlier)
    results: dict[str, ShardResult] = {}
    names, total = [item.name for item in work], sum(item.size for item in work)
    progress = Progress(total, names, len(work), quiet=flags.quiet)
    work_and_gather(
        flags, ranks, settings, work, progress, lambda result: results.update({result.name: result})
    )
    ordered = [results[item.name] for item in work]
    digests = {r.name: r.sha256 for r in ordered}
    others += recorded.digest_problems(flags.output_dir, listed, digests, earlier)
    ordered[0] = replace(ordered[0], problems=(*others, *ordered[0].problems))
    if flags.checksums and not any(r.problems for r in ordered):
        checksums.write(flags.output_dir, {name: digest for name, digest in digests.items() if digest})
    found = _findings(flags, talk, claim, quantized, pairings, ordered, earlier, adapters)
    sources = partial(_sources, original, pairings)
    advise = partial(trying.measured_advice, flags, talk, settings, sources, _used(earlier))
    return agree_on(ranks, summarize(flags, talk, found, advise))


def _sources(original: Checkpoint, pairings: Sequence) -> Iterator[trying.Source]:
    """Every FP8 weight, with the shard it comes from."""
    shards = {shard.path: shard for shard in original.shards}
    return ((shards[pair.source.path], pair.matrix) for each in pairings for pair in each.pairs)


def _used(earlier: Manifest | None) -> Calibration | None:
    """How scales were chosen, None if the manifest does not say it."""
    with suppress(Fp8Error):
        return Calibration.parse(str(earlier and earlier.settings.get("calibration")))
    return None


def _work(
    flags: Namespace,
    settings,
    claim: Claim,
    pairings: Sequence,
    earlier: Manifest | None,
    listed: Mapping[str, str],
    adapters: Adapters | None,
) -> list:
    """The shards to check, the same list on every rank."""
    from fp8lib.streaming.scheduler import ToCheck
    from fp8lib.verification.restored_pairing import take_merged

    work = []
    changes = adapters.changes if adapters else ()
    for each in pairings:
        shard = each.shard
        as_written = earlier is not None and earlier.headers.get(shard.name) == shard.header_sha256
        merged, kept = take_merged(shard, each.kept, changes)
        check = shard_check(
            flags,
            settings,
            claim,
            shard.name,
            each.pairs,
            each.problems,
            merged,
            kept=kept,
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
    expected = {
        **original.config,
        "quantization_config": quantized.config.get("quantization_config"),
    }
    found += files_beside(talk, original, quantized, earlier, expected)
    if not earlier and directory_check.lacks_tokenizer(original, quantized):
        found.append("tokenizer.json: missing from the directory, and there is no other tokenizer in it")
    return found


def files_beside(
    talk: Talk, original: Checkpoint, finished: Checkpoint, earlier: Manifest | None, config: dict
) -> list[str]:
    """What is wrong in index, config.json, which should be this, and copied files; one line each."""
    found = directory_check.index_problems(finished)
    found += recorded.recorded_problems(earlier, finished, config)
    names = {path.as_posix() for path in original.extra_files}
    copied = names & set(earlier.extra_files) if earlier else set()
    found += directory_check.copied_file_problems(original.root, finished.root, sorted(copied))
    for line in directory_check.copied_file_problems(original.root, finished.root, sorted(names - copied)):
        talk.warn(line)
    return found


def _findings(
    flags: Namespace,
    talk: Talk,
    claim: Claim,
    quantized: Checkpoint,
    pairings: Sequence,
    ordered: list[ShardResult],
    earlier: Manifest | None,
    adapters: Adapters | None,
) -> Findings:
    used = earlier and earlier.settings.get("calibration")
    outputs = [tensor for shard in quantized.shards for tensor in shard.tensors]
    fp8 = sum(len(each.pairs) for each in pairings)
    merged = len(adapters.changes) if adapters else 0
    failed = sum(bool(r.problems) for r in ordered)
    return Findings(
        totals=Totals(len(ordered), failed, fp8, len(outputs) - 2 * fp8, merged),
        measurements=[m for r in ordered for m in r.measurements],
        problems=[p for r in ordered for p in r.problems],
        calibration=_calibration(flags, talk, str(used), claim),
        label=f"{printable(used or 'unknown')} (verify only)",
        covered=None,
        loading=tensor_parallel(outputs, quantized.config),
        damaged=[r.name for r in ordered if r.damaged],
        finished=True,
        looked_at=sum(r.looked_at for r in ordered) / sum(s.size for s in quantized.shards),
        adapters=adapters.fingerprints if adapters else (),
        kept_failing=_kept_failing(earlier),
    )


def _kept_failing(earlier: Manifest | None) -> tuple[tuple[str, str], ...]:
    """What the manifest says of groups that stay as they are because they would FAIL."""
    return tuple((manifest.kept_groups(earlier) or {}).items()) if earlier else ()


def _calibration(flags: Namespace, talk: Talk, used: str, claim: Claim) -> Calibration:
    """How scales were chosen, as the manifest says it; else as the flags say, and as scales show.

    Advice is for that mode.
    """
    try:
        calibration = Calibration.parse(used)
    except Fp8Error:
        return replace(flags.calibration, scale_format="ue8m0" if claim.powers_of_two else "bf16")
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
) -> tuple[Manifest | None, list[str]]:
    """The manifest of the run that wrote the directory, None without a sound one, and a line on damage.

    Says so if the run had another input or other adapters.
    """
    earlier, damaged = recorded.sound_manifest(flags.output_dir)
    if earlier is None:
        return None, damaged
    says = f"by its {manifest.MANIFEST}, {printable(flags.output_dir)} was"
    if not earlier.made_from(original.shards):
        talk.warn(f"{says} not made from this input")
    merged = earlier.settings.get("adapters")
    if merged != (adapters and list(adapters.fingerprints)):
        how = f"with the adapters {printable(merged)}" if merged else "without adapters"
        talk.warn(f"{says} made {how}; give the same with --lora_dir, and no others")
    if not earlier.headers:
        talk.warn(f"its {manifest.MANIFEST} is of an earlier version, which took no checksums")
    return earlier, damaged


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
