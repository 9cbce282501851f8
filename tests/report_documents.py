"""Reports of models that nobody quantizes in a test: as large as 397B-A17B, or with hostile names."""

import copy
import random

HOSTILE = (
    '<img src=x onerror="window.hacked=1">.weight',
    "'\"><svg onload=window.hacked=1>.$x_{$ {{ 7*7 }} {% raw %}.weight",
    "javascript:window.hacked=1//\u202e]]>--><b>&amp;.weight",
)
LAYERS, EXPERTS = 60, 512


def large(document: dict) -> dict:
    """The report of a model with the matrices of 397B-A17B, every field of a real report kept."""
    draw = random.Random(0)
    template = next(m for m in document["measurements"])
    found = []
    for layer in [*map(str, range(LAYERS)), "mtp.0"]:
        full = layer == "mtp.0" or int(layer) % 4 == 3
        prefix = "mtp.layers.0" if layer == "mtp.0" else f"model.language_model.layers.{layer}"
        kinds = (
            [f"self_attn.{x}_proj" for x in "qkvo"]
            if full
            else [f"linear_attn.in_proj_{x}" for x in ("qkv", "z")]
        )
        modules = [(kind, kind) for kind in kinds]
        for projection in ("gate_proj", "up_proj", "down_proj"):
            kind = f"mlp.experts.*.{projection}"
            modules += [(kind, f"mlp.experts.{e}.{projection}") for e in range(EXPERTS)]
        for kind, module in modules:
            cosine = 0.99966 - abs(draw.gauss(0, 2e-5))
            zone = "FAIL" if draw.random() < 1e-4 else "WARN" if draw.random() < 1e-3 else "GOOD"
            own = {"name": f"{prefix}.{module}.weight", "layer": layer, "kind": kind, "zone": zone}
            found.append({**template, **own, "cosine": cosine, "vs_best": 1 + abs(draw.gauss(0, 0.02))})
    counts = {zone: sum(m["zone"] == zone for m in found) for zone in ("GOOD", "WARN", "FAIL")}
    return {**document, "measurements": found, "counts": counts}


def hostile(document: dict) -> dict:
    """The same report, with names in it that try to be code wherever a name may stand."""
    report = copy.deepcopy(document)
    for name, measurement, row in zip(HOSTILE, report["measurements"], report["kinds"], strict=False):
        measurement |= {"name": name, "kind": name, "layer": name, "zone": "FAIL"}
        row["kind"] = name
    report["problems"] = list(HOSTILE)
    report["recommendations"] = list(HOSTILE)
    report["kept_failing"] = [{"group": name, "reason": name} for name in HOSTILE]
    report["output"]["directory"] = HOSTILE[0]
    report["calibration"]["label"] = HOSTILE[1]
    report["flags"][HOSTILE[0]] = HOSTILE[2]
    report["verdict"]["statement"] = HOSTILE[0]
    report["verdict"]["reasons"] = [
        {"code": "cosine", "zone": "FAIL", "count": 1, "worst": 0.1, "worst_tensor": HOSTILE[2]}
    ]
    report["tensor_parallel"]["sizes"][0]["refusals"] = {"vLLM": HOSTILE[0]}
    if report["comparison"]:
        report["comparison"]["reference"] = HOSTILE[0]
        report["comparison"]["candidates"] = [
            {**report["comparison"]["candidates"][0], "directory": name} for name in HOSTILE[:2]
        ]
    return report
