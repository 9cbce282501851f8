"""`--report`: the JSON holds what was found, after its schema; the page shows it and does nothing else."""

import html.parser
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from conftest import Result
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.numerics.modes import Calibration
from fp8lib.reports.charts import _histogram
from fp8lib.reports.document import Run, layer_of, make_document, to_text
from fp8lib.reports.page import WORST, render
from fp8lib.verification.bands import Zone
from fp8lib.verification.findings import Findings, Totals
from fp8lib.verification.health import judge
from fp8lib.verification.measurement import Measurement
from report_documents import HOSTILE, hostile, large

SCHEMA = json.loads((Path(__file__).parent.parent / "fp8lib" / "reports" / "report_schema.json").read_text())
KIND = {"tokenizer": True, "shards": 2}
ADDED = ("layer", "kind", "zone", "reason")
"""Keys of a measurement that the manifest does not have."""


def validated(path: Path) -> dict:
    document = json.loads(path.read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    return document


def measurement_of(record: dict) -> Measurement:
    return Measurement(**{key: value for key, value in record.items() if key not in ADDED})


@pytest.fixture(scope="session")
def reported(checkpoint: Callable, once: Callable, cli: Callable) -> Path:
    """A directory with the output of a run, `out`, and its reports, `r.json` and `r.html`."""

    def make(folder: Path) -> None:
        (folder / "prompts.txt").write_text("one two three\nfour five\nsix\n")
        command = ["--input_dir", checkpoint("moe_text", **KIND), "--output_dir", folder / "out"]
        command += ["--verify_samples", "all", "--compare_outputs", "--prompts_file", folder / "prompts.txt"]
        result = cli(*command, "--report", folder / "r.json", "--report", folder / "r.html")
        assert result.rc == 0, result.err

    return once("reported", "moe_text", make)


@pytest.fixture(scope="session")
def document(reported: Path) -> dict:
    return validated(reported / "r.json")


@pytest.fixture
def command(checkpoint: Callable, tmp_path: Path) -> list[object]:
    """A small run."""
    small = checkpoint("text", num_hidden_layers=1, hidden_size=128, intermediate_size=128, mtp=False)
    return ["--input_dir", small, "--output_dir", tmp_path / "out"]


# --- for machines ------------------------------------------------------------------------------


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_measurement_is_in_the_report_as_the_manifest_has_it(document: dict, reported: Path) -> None:
    manifest = json.loads((reported / "out" / "fp8_quantization.json").read_text())
    recorded = [m for shard in manifest["shards"].values() for m in shard["measurements"]]
    assert [{k: v for k, v in m.items() if k not in ADDED} for m in document["measurements"]] == recorded
    assert document["checked"]["tensors"] == document["totals"]["fp8"] == len(recorded)
    assert document["checked"]["all"]


def test_counts_and_kinds_add_up(document: dict) -> None:
    measurements = document["measurements"]
    zones = Counter(m["zone"] for m in measurements)
    assert document["counts"] == {zone: zones[zone] for zone in ("GOOD", "WARN", "FAIL")}
    assert document["verdict"]["zone"] == next(z for z in ("FAIL", "WARN", "GOOD") if zones[z])
    assert sum(row["tensors"] for row in document["kinds"]) == len(measurements)
    row = next(r for r in document["kinds"] if r["kind"] == "experts.down_proj")
    cosines = [m["cosine"] for m in measurements if m["kind"] == row["kind"]]
    # 8 experts in each of 4 layers and in the draft layer.
    assert row["tensors"] == len(cosines) == 40
    # Low cosines are the worse: the 99th percentile of 40 values is the smallest of them.
    expected = np.percentile(cosines, [50, 1, 0], method="inverted_cdf").tolist()
    assert row["metrics"]["cosine"]["p50"] == pytest.approx(expected[0], abs=1e-6)
    assert [row["metrics"]["cosine"][key] for key in ("p99", "worst")] == expected[1:]


def test_the_input_is_told_by_its_shards(document: dict, checkpoint: Callable) -> None:
    source = checkpoint("moe_text", **KIND)
    shards = document["input"]["shards"]
    assert [s["name"] for s in shards] == sorted(p.name for p in source.glob("*.safetensors"))
    assert document["input"]["bytes"] == sum(p.stat().st_size for p in source.glob("*.safetensors"))


def test_the_comparison_is_in_it(document: dict) -> None:
    compared = document["comparison"]
    assert compared["prompts"] == 3
    [candidate] = compared["candidates"]
    assert sum(candidate["histogram"]) == candidate["overall"]["positions"]
    assert len(candidate["histogram"]) == len(compared["histogram_edges_nats"]) + 1
    assert len(candidate["layers"]) == len(compared["layer_names"]) == 4


def test_flags_and_versions_are_in_it(document: dict) -> None:
    assert document["flags"]["verify_samples"] is None  # "all"
    assert document["flags"]["calib_mode"] == "rms"
    assert {"python", "torch", "transformers"} <= document["versions"].keys()


@pytest.mark.parametrize("flags", [[], ["--verify_only"]], ids=["a finished directory", "verify_only"])
def test_the_same_measurements_come_from_a_directory_that_is_there(
    flags: list[str], document: dict, reported: Path, checkpoint: Callable, tmp_path: Path, cli: Callable
) -> None:
    command = ["--input_dir", checkpoint("moe_text", **KIND), "--output_dir", reported / "out", *flags]
    assert cli(*command, "--verify_samples", "all", "--report", tmp_path / "again.json").rc == 0
    again = validated(tmp_path / "again.json")
    same = ["measurements", "kinds", "counts", "input", "totals", "bands", "tensor_parallel"]
    assert {key: again[key] for key in same} == {key: document[key] for key in same}
    assert again["output"]["bytes"] == document["output"]["bytes"]
    assert again["command"] == ("verify_only" if flags else "quantize")


def test_a_damaged_directory_says_so_in_a_code(
    reported: Path, checkpoint: Callable, tmp_path: Path, cli: Callable
) -> None:
    broken = shutil.copytree(reported / "out", tmp_path / "out")
    shard = next(broken.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(n for n in tensors if n.endswith("_scale_inv"))
    save_file(tensors | {name: tensors[name] * math.nan}, shard, {"format": "pt"})
    command = ["--input_dir", checkpoint("moe_text", **KIND), "--output_dir", broken, "--verify_only"]
    reports = ["--report", tmp_path / "r.json", "--report", tmp_path / "r.html"]
    assert cli(*command, *reports, "--verify_samples", "all").rc == 1
    found = validated(tmp_path / "r.json")
    assert found["verdict"]["zone"] == "FAIL"
    reason = found["verdict"]["reasons"][0]
    assert (reason["code"], reason["zone"], reason["files"]) == ("damaged", "FAIL", [shard.name])
    assert reason["count"] == len(found["problems"])
    assert "✘ FAIL" in (tmp_path / "r.html").read_text()


def test_what_is_not_verified_is_reported_as_that(command: list, tmp_path: Path, cli: Callable) -> None:
    reports = ["--report", tmp_path / "r.json", "--report", tmp_path / "r.html"]
    assert cli(*command, "--skip_verify", *reports).rc == 0
    found = validated(tmp_path / "r.json")
    assert found["verdict"]["zone"] == "NOT_VERIFIED"
    assert found["verdict"]["reasons"] == [{"code": "not_verified", "zone": "NOT_VERIFIED"}]
    assert "NOT_VERIFIED" in (tmp_path / "r.html").read_text()


def test_a_report_replaces_an_earlier_one(command: list, tmp_path: Path, cli: Callable) -> None:
    for suffix in ("json", "html"):
        assert cli(*command, "--report", tmp_path / f"r.{suffix}").rc == 0
        before = (tmp_path / f"r.{suffix}").read_text()
        assert cli(*command, "--verify_samples", "all", "--report", tmp_path / f"r.{suffix}").rc == 0
        assert (tmp_path / f"r.{suffix}").read_text() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "r.html", "r.json"]


def test_what_is_not_finite_is_text_and_the_worst(document: dict, checkpoint: Callable) -> None:
    healthy = [
        Measurement(**{k: v for k, v in m.items() if k not in ADDED}) for m in document["measurements"]
    ]
    broken = replace(healthy[0], cosine=math.nan, mean_abs=math.nan, max_abs=math.inf, vs_best=math.inf)
    measurements, calibration = [*healthy[1:], broken], Calibration()
    found = Findings(
        totals=Totals(1, 0, len(healthy), 0), measurements=measurements, problems=(), label="",
        calibration=calibration, covered=None, loading="hidden_size",
        health=judge(measurements, (), calibration),
    )  # fmt: skip
    original = open_checkpoint(checkpoint("moe_text", **KIND))
    run = Run("verify_only", {}, {}, "2026-01-01T00:00:00+00:00", "out", 0, original)
    made = json.loads(to_text(make_document(run, found, Zone.FAIL, None, None)))
    jsonschema.Draft202012Validator(SCHEMA).validate(made)
    last = made["measurements"][-1]
    assert (last["cosine"], last["max_abs"], last["zone"]) == ("nan", "inf", "FAIL")
    reasons = {reason["code"]: reason for reason in made["verdict"]["reasons"]}
    assert {"cosine", "mean_abs", "max_abs"} <= reasons.keys()
    assert (reasons["cosine"]["worst"], reasons["cosine"]["worst_tensor"]) == ("nan", broken.name)
    row = next(r for r in made["kinds"] if r["kind"] == last["kind"])
    assert row["metrics"]["cosine"]["worst"] == "nan"
    assert made["tensor_parallel"] == {"missing_key": "hidden_size", "sizes": []}
    page = render(made)  # whatever is in it
    assert "config.json has no hidden_size" in page
    assert page.index(broken.name) < page.index(healthy[1].name)  # in the reasons; first in the table, too


def test_large_weights_are_a_reason_of_their_own(document: dict, checkpoint: Callable) -> None:
    m = measurement_of(document["measurements"][0])
    large = replace(m, cosine=0.9998, vs_best=1.0, mean_abs=0.1, max_abs=1.0, amax=100.0)
    found = Findings(
        totals=Totals(1, 0, 1, 0), measurements=[large], problems=(), label="", calibration=Calibration(),
        covered=None, loading="hidden_size", health=judge([large], (), Calibration()),
    )  # fmt: skip
    run = Run("quantize", {}, {}, "", "out", 0, open_checkpoint(checkpoint("moe_text", **KIND)))
    made = make_document(run, found, Zone.WARN, None, ("perplexity", "It is worse."))
    assert [(r["code"], r["zone"]) for r in made["verdict"]["reasons"]] == [
        ("large_weights", "WARN"),
        ("perplexity", "WARN"),
    ]
    assert made["verdict"]["statement"].endswith(" It is worse.")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.language_model.layers.12.mlp.experts.7.up_proj.weight", "12"),
        ("model.layers.3.self_attn.q_proj.weight", "3"),
        ("mtp.layers.0.mlp.down_proj.weight", "mtp.0"),
        ("lm_head.weight", ""),
    ],
)
def test_a_weight_has_a_layer(name: str, layer: str) -> None:
    assert layer_of(name) == layer


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--report", "{tmp}/r.txt"], "unknown suffix; name the report *.json or *.html"),
        (["--report", "{tmp}/none/r.json"], "none: no such directory; make it first, or check --report"),
        (["--report", "{tmp}/a.json", "--report", "{tmp}/b.json"], "twice with one suffix"),
        (["--report", "{tmp}/out/config.json"], "in a model's directory"),
        (["--report", "{tmp}/out/r.html"], "in a model's directory"),
        (["--report", "{tmp}/other.json"], "exists and is no report"),
        (["--report", "{tmp}/other.html"], "exists and is no report"),
        (["--report", "/proc/r.json"], "/proc/r.json"),
        (["--report", "{tmp}/r.json", "--dry_run"], "not allowed with argument --dry_run"),
    ],
)
def test_what_could_not_be_written_is_refused_before_anything_is(
    flags: list[str], said: str, command: list, tmp_path: Path, cli: Callable
) -> None:
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "other.html").write_text("<p>mine</p>")
    (tmp_path / "out").mkdir()
    result = cli(*command, *(flag.format(tmp=tmp_path) for flag in flags))
    assert (result.rc, result.err.count("\n")) == (2, 1), result.err
    assert said in result.err
    assert list((tmp_path / "out").iterdir()) == []
    assert (tmp_path / "other.html").read_text() == "<p>mine</p>"


def test_a_page_without_its_libraries_is_refused_and_a_json_needs_none(
    command: list, tmp_path: Path, run: Callable
) -> None:
    """Neither is imported, nor asked for, by anything else."""
    (tmp_path / "poison").mkdir()
    for module in ("matplotlib", "jinja2"):
        (tmp_path / "poison" / f"{module}.py").write_text(f"raise SystemExit('{module} was imported')")
    result = run(*command, "--report", tmp_path / "r.json", env={"PYTHONPATH": str(tmp_path / "poison")})
    assert result.rc == 0, result.err
    validated(tmp_path / "r.json")


def test_missing_libraries_are_named(
    command: list, tmp_path: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8lib.job.reporting.find_spec", lambda name: None)
    result = cli(*command, "--report", tmp_path / "r.html")
    assert result.rc == 2
    assert "a page needs matplotlib and jinja2, which are not installed; pip install matplotlib" in result.err
    assert not (tmp_path / "out").exists()


# --- for eyes ----------------------------------------------------------------------------------


_INSIDE = ("#", "data:,", "data:image/png;base64,")
"""What a link may begin with: a colour bar is a picture in a picture."""


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, and what is between them as a browser would show it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="session")
def pages(document: dict) -> dict[str, str]:
    """Pages of the run's report, of that of a large model, and of one with hostile names."""
    return {"run": render(document), "large": render(large(document)), "hostile": render(hostile(document))}


def test_the_page_of_397b_is_under_2_mb(pages: dict[str, str]) -> None:
    assert len(pages["large"].encode()) < 2_000_000


@pytest.mark.parametrize("which", ["run", "hostile"])
def test_a_page_refers_to_nothing_outside(which: str, pages: dict[str, str]) -> None:
    elements = Elements(pages[which]).found
    for tag, attributes in elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(_INSIDE), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    tags = Counter(tag for tag, _ in elements)
    # Zones, `vs best`, distributions, KL divergences, layers. One script: the sorting.
    assert (tags["svg"], tags["script"], tags["img"]) == (5, 1, 0)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-300, 1e300])
def test_values_that_hardly_differ_are_drawn(value: float) -> None:
    from matplotlib.figure import Figure

    _histogram(Figure().add_subplot(), np.array([value, np.nextafter(value, 1)]), ())


def test_no_name_becomes_a_part_of_the_page(pages: dict[str, str]) -> None:
    elements = Elements(pages["hostile"])
    shown = "".join(elements.text)
    assert not {"b"} & {tag for tag, _ in elements.found}
    for name in HOSTILE:
        assert name in shown  # as it is, in the table
    assert "49" not in [text.strip() for text in elements.text]  # {{ 7*7 }} was not computed


def test_ids_are_unique(pages: dict[str, str]) -> None:
    ids = Counter(attributes["id"] for _, attributes in Elements(pages["run"]).found if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []


def test_the_same_report_gives_the_same_page(document: dict, pages: dict[str, str]) -> None:
    assert render(document) == pages["run"]


def browser_path() -> str | None:
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A headless Chromium: the system's, or playwright's own."""
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        path = browser_path() or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium here: playwright install chromium")
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("which", ["run", "hostile"])
def test_in_a_browser_the_table_sorts_and_nothing_else_happens(
    which: str, pages: dict[str, str], browser, tmp_path: Path
) -> None:
    (tmp_path / "r.html").write_text(pages[which])
    page = browser.new_page()
    requests, said = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.goto((tmp_path / "r.html").as_uri())

    def column(number: int) -> list[str]:
        cells = f"[...document.querySelectorAll('#worst tbody tr')].map(r => r.cells[{number}])"
        return page.evaluate(f"{cells}.map(c => c.dataset.value ?? c.textContent)")

    rows = column(0)
    assert len(rows) == WORST
    for name, number in (("cosine", 3), ("vs_best", 4)):
        page.click(f"#worst th button:text-is('{name}')")
        up = [float(value) for value in column(number)]
        assert up == sorted(up)
        page.click(f"#worst th button:text-is('{name}')")
        assert [float(value) for value in column(number)] == sorted(up, reverse=True)
        assert page.get_attribute("#worst th[aria-sort]", "aria-sort") == "descending"
    page.click("#worst th button:text-is('zone')")
    assert column(1) == sorted(column(1))
    assert sorted(column(0)) == sorted(rows)  # the same rows, in another order
    assert page.evaluate("window.hacked") is None
    assert requests == [(tmp_path / "r.html").as_uri()]
    assert said == []
    page.close()


@pytest.mark.xdist_group("browser")
def test_in_a_browser_the_page_is_readable_in_light_and_dark_and_prints(
    pages: dict[str, str], browser, tmp_path: Path
) -> None:
    (tmp_path / "r.html").write_text(pages["large"])
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((tmp_path / "r.html").as_uri())
    read = """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
        getComputedStyle(document.querySelector('svg text')).fill]"""
    seen = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        paper, ink, label = page.evaluate(read)
        assert label == ink  # text in pictures takes the page's colour
        assert contrast(paper, ink) > 7  # WCAG's AAA
        seen[scheme] = paper
    assert seen["light"] != seen["dark"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280  # nothing is wider than the page
    page.emulate_media(media="print")
    assert page.evaluate(read)[0] == "rgb(255, 255, 255)"
    assert page.pdf().startswith(b"%PDF")
    page.close()


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's ratio of two colours as CSS computes them, `rgb(1, 2, 3)`."""

    def luminance(colour: str) -> float:
        parts = [int(n) / 255 for n in colour[4:-1].split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted(map(luminance, (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_summary_is_the_same_with_a_report(command: list, tmp_path: Path, cli: Callable) -> None:
    plain: Result = cli(*command)
    assert cli(*command, "--report", tmp_path / "r.json").out == plain.out
