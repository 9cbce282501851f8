"""The report of a run as JSON's types. `report_schema.json` describes it, docs/reports.md explains it.

Numbers that are not finite are the strings "nan", "inf" and "-inf", as JSON has none for them.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from fp8lib import __version__
from fp8lib.checkpoint.directory import Checkpoint
from fp8lib.checkpoint.rules import module_of, without_prefix
from fp8lib.outputs.figures import Comparison
from fp8lib.verification.bands import BANDS, Band, Zone
from fp8lib.verification.findings import Findings
from fp8lib.verification.measurement import Measurement

SCHEMA_VERSION = 1
"""Of `report_schema.json`. A new field does not change it; one that goes, or means something else, does."""
NOT_VERIFIED = "NOT_VERIFIED"
_LAYER = re.compile(r"(?P<draft>mtp\.)?layers\.(?P<number>\d+)\.(?P<module>.+)$")
_NUMBER = re.compile(r"\.\d+(?=\.)")


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
    run: Run, found: Findings, verdict: Zone, compared: Comparison | None, reason: str | None
) -> dict:
    """The report.

    Args:
        run: what was run.
        found: about the weights.
        verdict: of everything.
        compared: what was found about outputs, if they were compared.
        reason: code of what the outputs changed the verdict for, None if they did not.
    """
    health = found.health
    zones = {m.name: judged.zone for judged, m in health.flagged} if health else {}
    measurements = [_measurement(m, zones.get(m.name, Zone.GOOD)) for m in found.measurements]
    return _plain(
        {
            "schema_version": SCHEMA_VERSION,
            "producer": {"name": "quantize_fp8", "version": __version__},
            "created": run.created,
            "versions": run.versions,
            "command": run.command,
            "flags": run.flags,
            "input": _input(run.original),
            "output": {"directory": run.output, "bytes": run.nbytes},
            "calibration": {"label": found.label, **asdict(found.calibration)},
            "totals": asdict(found.totals),
            "checked": {
                "tensors": len(measurements),
                "all": found.all_checked,
                "share_of_bytes": found.looked_at,
            },
            "verdict": {
                "zone": verdict.name if health else NOT_VERIFIED,
                "statement": health.statement if health else "Verification was skipped.",
                "reasons": [*_reasons(found), *([_reason_of_outputs(reason, verdict)] if reason else [])],
            },
            "counts": {zone.name: health.counts[zone] if health else 0 for zone in Zone},
            "bands": [asdict(band) for band in BANDS],
            "recommendations": health.recommendations if health else (),
            "kept_failing": [{"group": group, "reason": reason} for group, reason in found.kept_failing],
            "problems": found.problems,
            "tensor_parallel": _tensor_parallel(found),
            "kinds": _kinds(measurements, found.measurements),
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


def place_of(name: str) -> tuple[str, str]:
    """(layer, kind of module) of a weight: `3` or `mtp.0` or ``, `mlp.experts.*.down_proj`."""
    short = without_prefix(module_of(name) or name)
    match = _LAYER.match(short)
    module = _NUMBER.sub(".*", match["module"] if match else short)
    return (f"{'mtp.' if match['draft'] else ''}{match['number']}" if match else ""), module


def _measurement(measurement: Measurement, zone: Zone) -> dict:
    layer, kind = place_of(measurement.name)
    values = {key: value for key, value in asdict(measurement).items() if value is not None}
    return {"name": values.pop("name"), "layer": layer, "kind": kind, "zone": zone.name, **values}


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
    """Why the verdict is what it is: a code, the zone it leads to, how many tensors, the worst of them."""
    if found.health is None:
        return [{"code": "not_verified", "zone": NOT_VERIFIED}]
    reasons = []
    if found.problems:
        reasons.append({"code": "structure", "zone": Zone.FAIL.name, "count": len(found.problems)})
    flagged = found.health.flagged
    if outputs := [judged.zone for judged, m in flagged if m.output is not None]:
        worst = max(outputs)
        reasons.append({"code": "output_error", "zone": worst.name, "count": len(outputs)})
    by_bands = [m for _, m in flagged if m.output is None]
    return reasons + [reason for band in BANDS if (reason := _reason_of_band(band, by_bands))]


def _reason_of_band(band: Band, flagged: Sequence[Measurement]) -> dict | None:
    values = [(getattr(m, band.metric), m.name) for m in flagged]
    outside = [(value, name) for value, name in values if band.zone(value) is not Zone.GOOD]
    if not outside:
        return None
    worst, name = min(outside, key=lambda item: band.badness(item[0]))
    zone = band.zone(worst).name
    return {"code": band.metric, "zone": zone, "count": len(outside), "worst": worst, "worst_tensor": name}


def _reason_of_outputs(code: str, verdict: Zone) -> dict:
    return {"code": code, "zone": verdict.name}


def _tensor_parallel(found: Findings) -> dict:
    if isinstance(found.loading, str):
        return {"missing_key": found.loading, "sizes": []}
    sizes = [{"ranks": s.ranks, "bytes_per_gpu": s.nbytes, "refusals": s.refusals} for s in found.loading]
    return {"missing_key": None, "sizes": sizes}


def _kinds(places: Sequence[dict], measurements: Iterable[Measurement]) -> list[dict]:
    """Median, 99th percentile towards the worse and worst value of each metric, by kind of module."""
    members: dict[str, list[Measurement]] = defaultdict(list)
    for place, measurement in zip(places, measurements, strict=True):
        members[place["kind"]].append(measurement)
    found = []
    for kind, those in sorted(members.items()):
        metrics = {band.metric: _ranks(band, [getattr(m, band.metric) for m in those]) for band in BANDS}
        if hasattr(those[0], "vs_best"):
            towards = Band("vs_best", math.inf, math.inf, higher_is_better=False)
            metrics["vs_best"] = _ranks(towards, [m.vs_best for m in those])
        found.append({"kind": kind, "tensors": len(those), "metrics": metrics})
    return found


def _ranks(band: Band, values: list[float]) -> dict[str, float]:
    """Order statistics, the worse at the end, so that NaN is the worst."""
    values = sorted(values, key=band.badness, reverse=True)
    at = {"p50": 0.5, "p99": 0.99, "worst": 1.0}
    return {name: values[math.ceil(share * len(values)) - 1] for name, share in at.items()}


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
