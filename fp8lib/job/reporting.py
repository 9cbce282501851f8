"""`--report`: what a run found, in files for machines and for eyes.

Whatever could keep a report from being written at the end of a long run is refused before it begins. A report
appears complete or not at all.
"""

import os
import platform
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.untrusted import open_regular, printable
from fp8lib.streaming.writer import refuse_unwritable, write_file
from fp8lib.verification.findings import Findings
from fp8lib.verification.health import Zone

if TYPE_CHECKING:
    from fp8lib.outputs.figures import Comparison

SUFFIXES = (".json", ".html")
PAGE_NEEDS = ("matplotlib", "jinja2")
"""Modules that a page needs and nothing else does."""
_LIBRARIES = ("torch", "safetensors", "numpy")
_NOT_FLAGS = ("notes", "calibration", "selection", "bands")
"""What parsing adds to the flags."""
_BEGINNING = 4096


def check(flags: Namespace) -> None:
    """Refuse a report that could not be written at the end, or not where it is wanted.

    Raises:
        Fp8Error: says which file and why.
    """
    paths: Sequence[Path] = flags.report
    for path in paths:
        shown = printable(path)
        if path.suffix not in SUFFIXES:
            raise Fp8Error(f"{shown}: unknown suffix; name the report *.json or *.html")
        if path.is_dir():
            raise Fp8Error(f"{shown}: is a directory; name a file in it")
        if not path.parent.is_dir():
            raise Fp8Error(f"{printable(path.parent)}: no such directory; make it first, or check --report")
        for folder in filter(None, (flags.input_dir, flags.output_dir, flags.against, *flags.lora_dir)):
            if path.resolve().is_relative_to(folder.resolve()):
                raise Fp8Error(
                    f"{shown}: in a model's directory, where engines read what lies there and checksums "
                    "count it; put the report outside of it"
                )
        if os.path.lexists(path) and not _is_report(path):
            raise Fp8Error(f"{shown}: exists and is no report; choose another name, or remove it")
        if path.suffix == ".html" and (missing := [name for name in PAGE_NEEDS if not find_spec(name)]):
            raise Fp8Error(
                f"{shown}: a page needs {' and '.join(missing)}, which {_is(missing)} not installed; "
                f"pip install {' '.join(missing)}, or name the report *.json"
            )
        refuse_unwritable(path)
    if len({path.suffix for path in paths}) < len(paths):
        raise Fp8Error("--report: twice with one suffix; give one *.json and one *.html at most")


def write(flags: Namespace, found: Findings, verdict: Zone, compared: "Comparison | None") -> None:
    """Write the reports that the flags name.

    Args:
        flags: of quantize_fp8.py.
        found: about the weights.
        verdict: of everything.
        compared: about the outputs, if they were compared.

    Raises:
        Fp8Error: one cannot be written.
    """
    from fp8lib.reports.document import Run, make_document, to_text

    run = Run(
        command="verify_only" if flags.verify_only else "quantize",
        flags={name: _value(v) for name, v in sorted(vars(flags).items()) if name not in _NOT_FLAGS},
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        output=str(flags.output_dir),
        nbytes=sum(path.stat().st_size for path in flags.output_dir.glob("*.safetensors")),
        original=open_checkpoint(flags.input_dir),
    )
    document = make_document(run, found, verdict, compared, _reason_of(compared))
    for path in flags.report:
        if path.suffix == ".json":
            text = to_text(document)
        else:
            from fp8lib.reports.page import render

            text = render(document)
        write_file(path, text.encode("utf-8", "backslashreplace"))


def _reason_of(compared: "Comparison | None") -> tuple[str, str] | None:
    """Code and sentence of what the outputs are not GOOD for, if they are not."""
    if compared is None:
        return None
    from fp8lib.job.comparing import judge
    from fp8lib.reports.document import NOT_FINITE, PERPLEXITY

    zone, why = judge(compared)
    return None if zone is Zone.GOOD else (NOT_FINITE if zone is Zone.FAIL else PERPLEXITY, why)


def _value(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_value(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    names = (*_LIBRARIES, *(["transformers"] if "transformers" in sys.modules else []))
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _is_report(path: Path) -> bool:
    """Whether an earlier run of this tool wrote a file."""
    with suppress(Fp8Error, OSError), open_regular(path) as file:
        beginning = file.read(_BEGINNING)
        if path.suffix == ".json":
            return bool(
                re.match(rb'\{\s*"schema_version": \d+,\s*"producer": \{\s*"name": "quantize_fp8"', beginning)
            )
        from fp8lib.reports import GENERATOR

        return f'content="{GENERATOR}"'.encode() in beginning
    return False


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
