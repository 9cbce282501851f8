"""A report as one HTML page that needs no network: everything is in it, and nothing is asked for.

Names in it come from files that may lie. jinja2 escapes them, in text and attributes alike, matplotlib
escapes those in pictures, and a Content-Security-Policy lets no script run but the one that sorts the table,
which is known by its hash.
"""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

import jinja2
from markupsafe import Markup

from fp8lib.reports import GENERATOR, charts
from fp8lib.terminal import size

WORST = 50
"""Tensors in the table."""
_HERE = Path(__file__).parent
_ORDER = {"FAIL": 0, "WARN": 1, "GOOD": 2}
_COLUMNS = ("cosine", "vs_best", "mean_abs", "max_abs", "bulk_error", "zero_share", "amax")
"""Of the table, as far as they were measured."""
_MOST_PROBLEMS = 200


def render(document: Mapping) -> str:
    """The page of a report.

    Args:
        document: from `document.make_document`.
    """
    script = (_HERE / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = size
    measurements = document["measurements"]
    comparison = document["comparison"]
    pictures = {
        "heat_maps": [(title, Markup(svg)) for title, svg in charts.heat_maps(measurements)],
        "distributions": Markup(charts.distributions(measurements, document["bands"]) or ""),
    }
    if comparison and any(each["not_finite"] is None for each in comparison["candidates"]):
        pictures["divergences"] = Markup(charts.divergences(comparison))
        pictures["layer_curve"] = Markup(charts.layer_curve(comparison))
    return environment.get_template("page.html.jinja").render(
        report=document,
        generator=GENERATOR,
        script=Markup(script),
        script_hash=digest,
        worst=worst(measurements),
        columns=[name for name in _COLUMNS if all(name in m for m in measurements)],
        problems=document["problems"][:_MOST_PROBLEMS],
        pictures=pictures,
    )


def worst(measurements: list[Mapping]) -> list[Mapping]:
    """The tensors of the table: by zone, then by cosine, NaN first."""

    def badness(m: Mapping) -> tuple:
        cosine = m["cosine"]
        return (_ORDER[m["zone"]], -1.0 if isinstance(cosine, str) else cosine, m["name"])

    return sorted(measurements, key=badness)[:WORST]
