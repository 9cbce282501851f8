"""Quantizes a checkpoint, or continues what an earlier run began.

The order is the safety: everything that headers, flags and the disk's state can refuse is refused before
the output directory is touched; shards become durable one by one, each recorded in the manifest; and
config.json, without which no engine takes a directory for a model, is written last.
"""

import hashlib
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from fp8lib import Fp8Error
from fp8lib.calibration.statistics_file import Statistics
from fp8lib.checkpoint.directory import CONFIG, INDEX
from fp8lib.checkpoint.plan import Plan, to_json
from fp8lib.checkpoint.rules import Selection
from fp8lib.checkpoint.tensor_parallel import tensor_parallel
from fp8lib.checkpoint.untrusted import printable
from fp8lib.job import checksums, manifest, output_dir, recorded, rounding
from fp8lib.job.ending import print_ending
from fp8lib.job.manifest import Journal, Manifest, ShardResult
from fp8lib.job.progress import Progress
from fp8lib.job.ranks import Ranks
from fp8lib.job.run import (
    agree,
    agree_on,
    plan_for,
    planned_check,
    settings_for,
    summarize,
    work_and_gather,
    work_for_main,
)
from fp8lib.streaming.sums import Sums
from fp8lib.streaming.writer import copy_file, write_file
from fp8lib.terminal import Talk
from fp8lib.verification.findings import Findings, Totals
from fp8lib.verification.health import Zone


def quantize(flags: Namespace, talk: Talk, ranks: Ranks) -> tuple[Zone, Findings | None]:
    """Quantize `flags.input_dir` into `flags.output_dir` and print the summary.

    Returns:
        (the verdict, the same on every rank, GOOD where verification was skipped; what was found, on rank 0).

    Raises:
        Fp8Error: refused or failed, on every rank. No config.json is left in the output directory.
    """
    begun = time.monotonic()
    # Rank 0 refuses for all: the others say and do nothing before it has agreed.
    offer = None if ranks.is_main else ranks.wait_for_first("candidates", "todo")
    if flags.selection.by_trial or (offer and offer[0] == "candidates"):
        flags.selection = _selection_by_trial(flags, talk, ranks, offer and offer[1])
    todo = None if ranks.is_main else Todo(**ranks.wait_for("todo"))
    plan, statistics, covered = plan_for(flags, talk)
    moments = rounding.moments_for(flags, plan, talk)
    settings = settings_for(flags, statistics, ranks, moments, plan.adapters)
    decisive = _settings(flags, plan, statistics, moments)
    terms = _terms(flags, plan, decisive)
    if todo is not None:
        _check_agreement(flags, terms, todo.terms, ranks)
        work_for_main(flags, ranks, settings, _work(flags, plan, ranks, settings, todo))
        return agree_on(ranks, None)

    mine = _manifest(plan, decisive)
    state = output_dir.inspect(flags.output_dir, plan, mine, flags.overwrite)
    samples = 0 if flags.skip_verify else flags.verify_samples
    measured = sum(len(s.matrices[:samples]) for s in plan.shards)
    output_dir.check_space(flags.output_dir, plan, state, measured)
    with closing(output_dir.Lock(flags.output_dir, ranks.attempt)), _no_leftovers(flags.output_dir, mine):
        # Once more: another run may have ended here since.
        state = output_dir.inspect(flags.output_dir, plan, mine, flags.overwrite)
        results, todo = _resume(flags, plan, state, mine, terms)
        output_dir.prepare(flags.output_dir, state, complete=not todo.quantize)
        if state.manifest:
            _say_what_is_kept(flags, talk, plan, todo)
        journal = Journal(mine, flags.output_dir, _verification(flags), state.manifest)
        journal.save()

        def record(result: ShardResult) -> None:
            recorded = journal.record(result)
            if result.final:
                results[result.name] = recorded

        ranks.publish("todo", asdict(todo))
        work = _work(flags, plan, ranks, settings, todo)
        work_and_gather(flags, ranks, settings, work, _progress(flags, plan, todo), record)
        journal.save()
        _finish(flags, plan, results)
    ordered = [results[s.name] for s in plan.shards]
    if flags.dequantize:
        from fp8lib.job import dequantizing

        return agree(ranks, dequantizing.summarize(flags, talk, plan, ordered)), None
    found = _findings(flags, plan, ordered, covered, moments)
    found = summarize(flags, talk, found, partial(_advice, flags, talk, settings, plan))
    if todo.quantize and not flags.quiet:
        print_ending(flags.output_dir, plan, found, time.monotonic() - begun)
    return agree_on(ranks, found)


def _advice(flags: Namespace, talk: Talk, settings, plan: Plan, found: Findings) -> list[str]:
    """What helps weights that are not GOOD."""
    from fp8lib.job import trying

    def sources() -> Iterator[trying.Source]:
        return ((shard.source, matrix) for shard in plan.shards for matrix in shard.matrices)

    return trying.measured_advice(flags, talk, settings, sources, flags.calibration, found)


def _manifest(plan: Plan, decisive: dict) -> Manifest:
    """Of a run that has finished no shard yet."""
    return Manifest(
        settings=decisive,
        inputs={s.name: manifest.identity(s) for s in plan.checkpoint.shards},
        extra_files=[p.as_posix() for p in plan.checkpoint.extra_files],
        files={name: hashlib.sha256(data).hexdigest() for name, data in _written_last(plan).items()},
        headers=recorded.header_digests(plan),
    )


def _selection_by_trial(flags: Namespace, talk: Talk, ranks: Ranks, said: dict | None) -> Selection:
    """What was asked for, less the groups that would FAIL: data in the plan from here on.

    Where this run continues an earlier one, they are the earlier one's. Otherwise all ranks try the
    candidates.

    Args:
        flags: of the run.
        talk: how to speak to the user.
        ranks: all of them.
        said: by rank 0, which may have no such pass; None on rank 0.

    Raises:
        Fp8Error: what flags, headers and the output directory can refuse; what `failing_groups` refuses.
    """
    quiet = Talk(talk.printer, lambda text: None)  # it is all said again when the plan is known
    plan, statistics, _ = plan_for(flags, quiet)
    moments = rounding.moments_for(flags, plan, quiet)
    settings = settings_for(flags, statistics, ranks, moments, plan.adapters)
    decisive = _settings(flags, plan, statistics, moments)
    terms = _terms(flags, plan, decisive)
    if said is not None:
        _require_same(flags, terms, said["terms"], ranks)
        known = said["kept"]
    else:
        known = None if flags.overwrite else _kept_before(flags.output_dir)
        mine = _manifest(plan, decisive if known is None else {**decisive, "kept_groups": known})
        state = output_dir.inspect(flags.output_dir, plan, mine, flags.overwrite)
        if known is None:
            output_dir.check_space(flags.output_dir, plan, state, 0)
        ranks.publish("candidates", {"terms": terms, "kept": known})
    if known is None:
        from fp8lib.job import trying

        known = trying.failing_groups(flags, talk, ranks, settings, plan)
    return replace(flags.selection, kept_groups=tuple(known.items()))


def _kept_before(folder: Path) -> dict[str, str] | None:
    """The groups that an earlier run found to FAIL, None if there was none, or it is unknown.

    Raises:
        Fp8Error: its manifest cannot be read.
    """
    earlier = manifest.load(folder)
    return manifest.kept_groups(earlier) if earlier else None


def _findings(
    flags: Namespace,
    plan: Plan,
    ordered: list[ShardResult],
    covered: int | None,
    moments: rounding.SecondMomentsUse | None,
) -> Findings:
    label, totals = str(flags.calibration), Totals.of(plan, sum(bool(r.problems) for r in ordered))
    if moments:
        label += f"; second order, {moments.covered} of {totals.fp8} tensors"
    return Findings(
        totals=totals,
        measurements=[m for r in ordered for m in r.measurements],
        problems=[p for r in ordered for p in r.problems],
        calibration=flags.calibration,
        label=label,
        covered=covered,
        loading=tensor_parallel(plan.outputs(), plan.config()),
        damaged=[r.name for r in ordered if r.damaged],
        looked_at=sum(r.looked_at for r in ordered) / sum(s.size for s in plan.shards),
        adapters=plan.adapters.fingerprints if plan.adapters else (),
        kept_failing=plan.selection.kept_groups,
    )


@dataclass(frozen=True, slots=True)
class Todo:
    """What there is to do.

    Attributes:
        quantize: names of shards.
        verify: of shards that are complete and only need verification, or a checksum.
        hash: those of them that need a checksum.
        sums: of those of them whose sums are known, as two numbers.
        terms: see `_terms`.
    """

    quantize: list[str]
    verify: list[str]
    hash: list[str]
    sums: dict[str, list[int]]
    terms: dict

    @property
    def count(self) -> int:
        return len(self.quantize) + len(self.verify)


def _settings(
    flags: Namespace, plan: Plan, statistics: Statistics | None, moments: rounding.SecondMomentsUse | None
) -> dict:
    """The flags that decide bytes, as the manifest keeps them."""
    if flags.dequantize:
        return {"dequantize": flags.expert_layout}
    settings = {
        "calibration": str(flags.calibration),
        "activation_stats": statistics.sha256 if statistics else None,
        **plan.selection.settings(),
        **({"bands": flags.bands.changed()} if plan.selection.by_trial else {}),
        **rounding.settings(moments),
    }
    return settings | ({"adapters": list(plan.adapters.fingerprints)} if plan.adapters else {})


def _verification(flags: Namespace) -> dict | None:
    """How shards are verified, as the manifest keeps it."""
    if flags.skip_verify:
        return None
    if flags.dequantize:
        return {"codes": "all"}
    samples = "all" if flags.verify_samples is None else flags.verify_samples
    return {"samples": samples, "seed": flags.seed}


def _terms(flags: Namespace, plan: Plan, decisive: dict) -> dict:
    """What all ranks must agree on: every machine has its own command line and its own view of the disk."""
    return {
        **decisive,
        "verification": _verification(flags),
        "checksums": flags.checksums,
        "input": {s.name: [s.size, s.header_sha256] for s in plan.checkpoint.shards},
    }


def _check_agreement(flags: Namespace, mine: dict, theirs: dict, ranks: Ranks) -> None:
    """Refuse, on a rank other than 0, another input, other flags or another output directory."""
    _require_same(flags, mine, theirs, ranks)
    output_dir.await_lock(flags.output_dir, ranks.attempt)


def _require_same(flags: Namespace, mine: dict, theirs: dict, ranks: Ranks) -> None:
    """Refuse, on a rank other than 0, another input or other flags."""
    for key in mine | theirs:
        if mine.get(key) != theirs.get(key):
            raise Fp8Error(
                f"{printable(flags.input_dir)}: rank {ranks.rank} has other {key.replace('_', ' ')} "
                "than rank 0; give all machines the same files and flags"
            )


@contextmanager
def _no_leftovers(folder: Path, mine: Manifest) -> Iterator[None]:
    """On failure, also remove the partial files of ranks that died."""
    try:
        yield
    except BaseException:
        output_dir.remove_partial_files(folder, mine)
        raise


def _resume(
    flags: Namespace, plan: Plan, state: output_dir.State, mine: Manifest, terms: dict
) -> tuple[dict[str, ShardResult], Todo]:
    """Take over an earlier run's finished shards: the results that still stand, and what is left to do."""
    results, todo = {}, Todo([], [], [], {}, terms)
    for shard in plan.shards:
        record = state.manifest.shards.get(shard.name) if shard.name in state.finished else None
        if record is None:
            todo.quantize.append(shard.name)
            continue
        mine.shards[shard.name] = record
        result = manifest.from_record(shard.name, record, _verification(flags))
        if result and (result.sha256 or not flags.checksums):
            results[shard.name] = result
            continue
        todo.verify.append(shard.name)
        if flags.checksums and not record.get("sha256"):
            todo.hash.append(shard.name)
        if sums := manifest.recorded_sums(record):
            todo.sums[shard.name] = [sums.codes, sums.scales]
    return results, todo


def _say_what_is_kept(flags: Namespace, talk: Talk, plan: Plan, todo: Todo) -> None:
    """What an earlier run has done already."""
    if not todo.count:
        done = "finished" if flags.skip_verify else "checked"
        verdict = "" if flags.skip_verify else ", this is the earlier verdict"
        talk.warn(f"nothing to do{verdict}, {done} on {manifest.date_of(flags.output_dir)}")
    elif kept := len(plan.shards) - len(todo.quantize):
        again = f", {len(todo.verify)} of them to be verified" if todo.verify else ""
        talk.warn(f"{kept} of {len(plan.shards)} shards are there from an earlier run and kept{again}")


def _progress(flags: Namespace, plan: Plan, todo: Todo) -> Progress:
    total = sum(s.input_bytes for s in plan.shards if s.name in todo.quantize)
    total += sum(s.size for s in plan.shards if s.name in todo.verify)
    return Progress(total, [s.name for s in plan.shards], todo.count, todo.verify, flags.quiet)


def _work(flags: Namespace, plan: Plan, ranks: Ranks, settings, todo: Todo) -> list:
    """Everything there is to do, the same list on every rank."""
    from fp8lib.streaming.scheduler import ToCheck
    from fp8lib.streaming.units import divide

    shards, check = {s.name: s for s in plan.shards}, planned_check(flags, settings)
    units = divide([shards[name] for name in todo.quantize], ranks.world, flags.checksums)
    for shard in (shards[name] for name in todo.verify):
        name, path = shard.name, flags.output_dir / shard.name
        hashed = path if name in todo.hash else None
        sums = Sums(*todo.sums[name]) if name in todo.sums else None
        units.append(ToCheck(name, shard.size, check and check(shard, path), shard.sources, hashed, sums))
    return units


def _written_last(plan: Plan) -> dict[str, bytes]:
    """The index and config.json, in the order in which they are written."""
    return {INDEX: to_json(plan.index()), CONFIG: to_json(plan.config())}


def _finish(flags: Namespace, plan: Plan, results: dict[str, ShardResult]) -> None:
    """Everything beside the shards; config.json last."""
    folder, checkpoint = flags.output_dir, plan.checkpoint
    for relative in checkpoint.extra_files:
        copy_file(checkpoint.root / relative, folder / relative)
    failed = any(r.problems for r in results.values())
    last = _written_last(plan)
    if failed:
        del last[CONFIG]
    if flags.checksums or os.path.lexists(folder / output_dir.CHECKSUMS):
        known = {s.name: results[s.name].sha256 for s in plan.shards}
        known |= {name: hashlib.sha256(data).hexdigest() for name, data in last.items()}
        checksums.write(folder, {name: digest for name, digest in known.items() if digest})
    if failed:
        output_dir.unpublish(folder)
    for name, data in last.items():
        write_file(folder / name, data)
