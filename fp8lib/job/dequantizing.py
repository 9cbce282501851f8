"""`--dequantize`: its summary, and its `--verify_only`. What writes is `quantizing`."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from fp8lib.checkpoint.dequantize_plan import make_dequantize_plan
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.plan import Plan
from fp8lib.job import checksums, recorded
from fp8lib.job.manifest import ShardResult
from fp8lib.job.progress import Progress
from fp8lib.job.ranks import Ranks
from fp8lib.job.run import agree, settings_for, work_and_gather, work_for_main
from fp8lib.job.verifying import files_beside, open_finished
from fp8lib.terminal import Talk
from fp8lib.verification.health import Zone
from fp8lib.verification.restored_report import RestoredTotals, print_restored


def summarize(flags: Namespace, talk: Talk, plan: Plan, results: Sequence[ShardResult]) -> Zone:
    """Print the summary of a checkpoint that was turned back; returns the verdict."""
    problems = [problem for result in results for problem in result.problems]
    failed = sum(bool(result.problems) for result in results)
    totals = RestoredTotals.of(plan, len(results), failed)
    print_restored(talk.printer, totals, problems, verified=not flags.skip_verify)
    return Zone.FAIL if problems else Zone.GOOD


def verify_only(flags: Namespace, talk: Talk, ranks: Ranks) -> Zone:
    """Compare `flags.output_dir`, in BF16, with the FP8 `flags.input_dir`, and print the summary.

    Returns:
        The verdict, the same on every rank.

    Raises:
        Fp8Error: one of the two is no complete checkpoint of its kind.
    """
    from fp8lib.streaming.scheduler import ToCheck
    from fp8lib.verification.restored import RestoredCheck
    from fp8lib.verification.restored_pairing import pair_restored

    original = open_checkpoint(flags.input_dir)
    plan = make_dequantize_plan(original, flags.expert_layout)
    finished = open_finished(flags.output_dir)
    settings = settings_for(flags, None, ranks)
    earlier, damaged = recorded.sound_manifest(flags.output_dir)
    if earlier and "dequantize" not in earlier.settings:  # copied along from elsewhere
        earlier = None
    listed, unreadable = recorded.listed_digests(flags.output_dir)
    work = []
    for shard, weights, kept, problems in pair_restored(plan, finished):
        check = RestoredCheck(shard.name, weights, problems, kept)
        hashed = shard.path if flags.checksums or shard.name in listed else None
        work.append(ToCheck(shard.name, shard.size, check, hashed=hashed))
    if not ranks.is_main:
        work_for_main(flags, ranks, settings, work)
        return agree(ranks, None)
    others = damaged + unreadable + files_beside(talk, original, finished, earlier, plan.config())
    results: dict[str, ShardResult] = {}
    names, total = [item.name for item in work], sum(item.size for item in work)
    progress = Progress(total, names, len(work), quiet=flags.quiet)
    work_and_gather(
        flags, ranks, settings, work, progress, lambda result: results.update({result.name: result})
    )
    ordered = [results[name] for name in names]
    digests = {result.name: result.sha256 for result in ordered}
    others += recorded.digest_problems(flags.output_dir, listed, digests, earlier)
    ordered[0] = replace(ordered[0], problems=(*others, *ordered[0].problems))
    if flags.checksums and not any(result.problems for result in ordered):
        checksums.write(flags.output_dir, {name: digest for name, digest in digests.items() if digest})
    return agree(ranks, summarize(flags, talk, plan, ordered))
