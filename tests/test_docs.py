"""README.md and docs/: every flag, link and path in them exists, and the README stays short."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OUR_SCRIPTS = ("quantize_fp8.py", "collect_activation_stats.py")

FLAGS_OF_OTHERS = {
    "torchrun": {"--max-restarts"},
    "vllm": {"--enable-expert-parallel"},
    "sglang": {"--ep"},
}
"""Flags of other programs that stand in the text without their command."""

_PROGRAM = re.compile(r"(?:torchrun|srun|vllm|pytest|pip|make|sglang\.launch_server|[\w./-]*\.py)$")
_FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")
_FENCE = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_PATH = re.compile(r"(?:(?:fp8lib|tests|benchmarks|docs)/[\w./-]*|[\w/-]+\.py)(?![\w/])")

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def outside_fences(text: str) -> str:
    return _FENCE.sub("", text)


def flags_in(text: str) -> Iterator[tuple[str | None, str]]:
    """(program, flag) for each flag of a page; None where no command is there to name the program."""
    prose = outside_fences(text)
    commands, rest = _CODE.findall(prose), [_CODE.sub("", prose)]
    for block in _FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            command, *comment = re.split(r"(?:^|\s)#", line, maxsplit=1)
            commands.append(command)
            rest += comment
    for command in commands:
        yield from flags_of_command(command)
    yield from ((None, flag) for words in rest for flag in _FLAG.findall(words))


def flags_of_command(command: str) -> Iterator[tuple[str | None, str]]:
    """A flag is of the last program before it: `torchrun --nnodes 4 quantize_fp8.py --quiet`."""
    program = None
    for word in command.split():
        if _PROGRAM.match(word):
            program = word
        yield from ((program, flag) for flag in _FLAG.findall(word))


@cache
def flags_of(script: str) -> frozenset[str]:
    """What a script's --help lists; argparse would colour it where the environment asks for that."""
    environment = os.environ | {"COLUMNS": "200", "PYTHON_COLORS": "0"}
    command = [sys.executable, ROOT / script, "--help"]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    flags = frozenset(re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE))
    assert {"--help", "--version", "--debug"} <= flags
    return flags


def known_flags(program: str | None) -> frozenset[str] | set[str] | None:
    """The flags a program may be shown with; None for another's, which are its own affair."""
    if program is None:
        return frozenset().union(*map(flags_of, OUR_SCRIPTS), *FLAGS_OF_OTHERS.values())
    if Path(program).name in OUR_SCRIPTS:
        return flags_of(Path(program).name)
    if program.endswith(".py") and (script := ROOT / "benchmarks" / Path(program).name).exists():
        sources = script.read_text() + (ROOT / "benchmarks" / "machine.py").read_text()
        return set(re.findall(r'"(--[\w-]+)"', sources)) | {"--help"}
    return None


@page
def test_every_flag_exists(page: Path) -> None:
    unknown = [
        f"{program or 'no program'}: {flag}"
        for program, flag in flags_in(page.read_text())
        if (known := known_flags(program)) is not None and flag not in known
    ]
    assert not unknown


def test_the_flags_of_others_are_neither_ours_nor_unused() -> None:
    listed = set().union(*FLAGS_OF_OTHERS.values())
    loose = {flag for page in PAGES for program, flag in flags_in(page.read_text()) if program is None}
    assert listed <= loose
    assert not listed & frozenset().union(*map(flags_of, OUR_SCRIPTS))


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", outside_fences(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in _LINK.findall(outside_fences(page.read_text())):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def paths_in(text: str) -> Iterator[Path]:
    """Paths in code; a bare `name.py` in a row of a table is in the folder that its first cell names."""
    for block in _FENCE.findall(text):
        yield from (ROOT / path for path in _PATH.findall(block))
    for line in outside_fences(text).splitlines():
        codes = _CODE.findall(line)
        folder = codes[0] if line.startswith("| `") and codes[0].endswith("/") else ""
        for code in codes:
            for path in _PATH.findall(code):
                yield ROOT / path if "/" in path else ROOT / folder / path


@page
def test_every_path_exists(page: Path) -> None:
    assert not sorted(
        {str(path.relative_to(ROOT)) for path in paths_in(page.read_text()) if not path.exists()}
    )


def test_the_readme_has_at_most_900_words() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900
