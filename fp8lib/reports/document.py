"""The report of a run as JSON's types. `report_schema.json` describes it, docs/reports.md explains it.

Numbers that are not finite are the strings "nan", "inf" and "-inf", as JSON has none for them.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from fp8lib import __version__
from fp8lib.checkpoint.directory import Checkpoint
from fp8lib.checkpoint.rules import without_prefix
from fp8lib.outputs.figures import Comparison
from fp8lib.verification.bands import AS_GOOD_AS_BEST, Band, Bands, Reason, Zone, judge_tensor
from fp8lib.verification.findings import Findings, by_kind, kind_of, quantiles
from fp8lib.verification.health import Health
from fp8lib.verification.measurement import Measurement

SCHEMA_VERSION = 1
"""Of `report_schema.json`. A new field does not change it; one that goes, or means something else, does."""
NOT_VERIFIED = "NOT_VERIFIED"
NOT_FINITE, PERPLEXITY = "not_finite", "perplexity"
"""Codes of what outputs are not GOOD for."""
_LAYER = re.compile(r"(?P<draft>mtp\.)?layers\.(?P<number>\d+)\.")
_VS_BEST = Band("vs_best", AS_GOOD_AS_BEST, math.inf, higher_is_better=False)


@dataclass(frozen=True, slots=True)
class Run:
    """What a report says about the run itself.

    Attributes:
        command: `quantize` or `verify_only`.
        flags: name -> value, as JSON's types.
        versions: name of a library -> its version.
        created: date and time, ISO 8601.
        output: path of the FP8 directory.
        nbytes: of its safetensors files.
        original: the input.
    """

    command: str
    flags: Mapping[str, object]
    versions: Mapping[str, str]
    created: str
    output: str
    nbytes: int
    original: Checkpoint


def make_document(
    run: Run,
    found: Findings,
    verdict: Zone,
    compared: Comparison | None,
    outputs: tuple[str, str] | None,
) -> dict:
    """The report.

    Args:
        run: what was run.
        found: about the weights.
        verdict: of everything.
        compared: what was found about outputs, if they were compared.
        outputs: code and sentence of what the outputs are not GOOD for, None if they are.
    """
    health = found.health
    measurements = [_measurement(m, found.bands) for m in found.measurements]
    return _plain(
        {
            "schema_version": SCHEMA_VERSION,
            "producer": {"name": "quantize_fp8", "version": __version__},
            "created": run.created,
            "versions": run.versions,
            "command": run.command,
            "flags": run.flags,
            "input": _input(run.original),
            "adapters": found.adapters,
            "output": {"directory": run.output, "bytes": run.nbytes},
            "calibration": {"label": found.label, **asdict(found.calibration)},
            "totals": asdict(found.totals),
            "checked": {
                "tensors": len(measurements),
                "all": found.all_checked,
                "share_of_bytes": found.looked_at,
            },
            "verdict": {
                "zone": verdict.name if health or verdict is not Zone.GOOD else NOT_VERIFIED,
                "statement": _statement(health, outputs),
                "reasons": _reasons(found) + _reasons_of_outputs(outputs),
            },
            "counts": {zone.name: health.counts[zone] if health else 0 for zone in Zone},
            "bands": [asdict(band) for band in found.bands],
            "recommendations": health.recommendations if health else (),
            "kept_failing": [{"group": group, "reason": reason} for group, reason in found.kept_failing],
            "problems": found.problems,
            "tensor_parallel": _tensor_parallel(found),
            "kinds": _kinds(found),
            "comparison": compared.to_json() if compared else None,
            "measurements": measurements,
        }
    )


def to_text(document: dict) -> str:
    """A report as a file's text: every measurement is a line, so that 92,000 of them stay readable."""
    parts = []
    for key, value in document.items():
        if key == "measurements" and value:
            lines = ",\n".join(f"    {json.dumps(m, ensure_ascii=False)}" for m in value)
            shown = f"[\n{lines}\n  ]"
        else:
            shown = json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(key)}: {shown}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def layer_of(name: str) -> str:
    """The layer of a weight: `3`, or `mtp.0` of the draft head; "" where it is in none."""
    match = _LAYER.match(without_prefix(name))
    return f"{'mtp.' if match['draft'] else ''}{match['number']}" if match else ""


def _measurement(measurement: Measurement, bands: Bands) -> dict:
    judged = judge_tensor(measurement, bands)
    values = {key: value for key, value in asdict(measurement).items() if value is not None}
    name = values.pop("name")
    place = {"layer": layer_of(name), "kind": kind_of(name)}
    return {"name": name, **place, "zone": judged.zone.name, "reason": str(judged.reason), **values}


def _input(original: Checkpoint) -> dict:
    shards = [{"name": s.name, "bytes": s.size, "header_sha256": s.header_sha256} for s in original.shards]
    digest = hashlib.sha256(json.dumps(shards, sort_keys=True).encode())
    return {
        "directory": str(original.root),
        "model_type": str(original.config.get("model_type")),
        "bytes": sum(shard.size for shard in original.shards),
        "fingerprint": digest.hexdigest(),
        "shards": shards,
    }


def _reasons(found: Findings) -> list[dict]:
    """Why the verdict is not GOOD: a code, the zone it leads to, how many tensors, the worst of them."""
    if found.health is None:
        return [{"code": "not_verified", "zone": NOT_VERIFIED}]
    reasons = []
    if found.problems:
        code = {"code": "damaged", "files": found.damaged} if found.damaged else {"code": "structure"}
        reasons.append({**code, "zone": Zone.FAIL.name, "count": len(found.problems)})
    by_reason = {reason: [] for reason in Reason}
    for judgement, measurement in found.health.flagged:
        by_reason[judgement.reason].append((judgement, measurement))
    if outputs := by_reason[Reason.OUTPUTS]:
        worst = max(judgement.zone for judgement, _ in outputs)
        reasons.append({"code": "output_error", "zone": worst.name, "count": len(outputs)})
    for band in found.bands:
        outside = [m for j, m in by_reason[Reason.OUT_OF_BAND] if j.zones[band.metric] is not Zone.GOOD]
        if outside:
            reasons.append(_reason(band.metric, band, outside))
    if large := [m for _, m in by_reason[Reason.LARGE_WEIGHTS]]:
        reasons.append({**_reason(Reason.LARGE_WEIGHTS, found.bands.max_abs, large), "zone": Zone.WARN.name})
    return reasons


def _reason(code: str, band: Band, outside: Sequence[Measurement]) -> dict:
    """A reason that some tensors' values of a metric give."""
    worst = min(outside, key=lambda m: band.badness(getattr(m, band.metric)))
    value = getattr(worst, band.metric)
    return {
        "code": str(code),
        "zone": band.zone(value).name,
        "count": len(outside),
        "worst": value,
        "worst_tensor": worst.name,
    }


def _reasons_of_outputs(outputs: tuple[str, str] | None) -> list[dict]:
    if outputs is None:
        return []
    code, _ = outputs
    return [{"code": code, "zone": (Zone.FAIL if code == NOT_FINITE else Zone.WARN).name}]


def _statement(health: Health | None, outputs: tuple[str, str] | None) -> str:
    """What the summary says of the weights, or of the outputs where they are worse."""
    said = health.statement if health else "Verification was skipped."
    if outputs is None:
        return said
    return outputs[1] if health and health.verdict is Zone.GOOD else f"{said} {outputs[1]}"


def _tensor_parallel(found: Findings) -> dict:
    if isinstance(found.loading, str):
        return {"missing_key": found.loading, "sizes": []}
    sizes = [{"ranks": s.ranks, "bytes_per_gpu": s.nbytes, "refusals": s.refusals} for s in found.loading]
    return {"missing_key": None, "sizes": sizes}


def _kinds(found: Findings) -> list[dict]:
    """Median, 99th percentile towards the worse and worst value of each metric, by kind of module."""
    bands = [*found.bands, _VS_BEST]
    return [
        {
            "kind": kind,
            "tensors": len(those),
            "metrics": {band.metric: _ranks(band, those) for band in bands},
        }
        for kind, those in by_kind(found.measurements).items()
    ]


def _ranks(band: Band, measurements: Sequence[Measurement]) -> dict[str, float]:
    values = quantiles((getattr(m, band.metric) for m in measurements), band.higher_is_better)
    return dict(zip(("p50", "p99", "worst"), values, strict=True))


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
