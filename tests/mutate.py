"""Puts one error at a time into a copy of the project, and expects the tests that should notice it to fail.

    python tests/mutate.py                     every error of mutations.toml
    python tests/mutate.py --only fused_f32    those whose name holds this
    python tests/mutate.py --list              say what they are, run nothing

It shows what the tests can see, and takes minutes, so it is no part of `make test`. The named test files
must pass on a copy without any error first: otherwise a failure would show nothing.

Exit codes: 0 every error was noticed, 1 one was not, 2 the list is wrong or the tests fail by themselves.
"""

import argparse
import ast
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_name("mutations.toml")
_LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "demo")
_PATIENCE = 600
"""Seconds after which the tests of one error are given up: an endless loop is nothing a test told."""
_PASSED, _FAILED = 0, 1  # pytest's exit codes; any other means that tests could not run


@dataclass(frozen=True, slots=True)
class Mutation:
    """An error of one line.

    Attributes:
        name: tells what is wrong.
        file: in which, relative to the repository.
        old: a fragment of one line that is nowhere else in the file.
        new: what stands in its place.
        tests: test files that notice, relative to the repository.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self) -> str:
        """The file's text with the error in it.

        Raises:
            ValueError: the fragment is not there once, the result is no Python, or means the same.
        """
        path = ROOT / self.file
        if not path.is_file():
            raise ValueError(f"{self.name}: {self.file} is not there")
        text = path.read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: found {count} times in {self.file}, once expected: {self.old}")
        if "\n" in self.old + self.new:
            raise ValueError(f"{self.name}: more than one line")
        wrong = text.replace(self.old, self.new)
        try:
            if ast.dump(ast.parse(wrong)) == ast.dump(ast.parse(text)):
                raise ValueError(f"{self.name}: changes no code")
        except SyntaxError as error:
            raise ValueError(f"{self.name}: {error}") from None
        return wrong


def load() -> list[Mutation]:
    """Every error of the list, each checked to fit the code as it is.

    Raises:
        ValueError: one does not, or two have one name, or a test file is not there.
    """
    entries = tomllib.loads(LIST.read_text())["mutation"]
    mutations = [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    if len({m.name for m in mutations}) < len(mutations):
        raise ValueError("two errors have one name")
    for mutation in mutations:
        mutation.applied()
        for test in mutation.tests:
            if not (ROOT / test).is_file():
                raise ValueError(f"{mutation.name}: {test} is not there")
    return mutations


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[int | None, str]:
    """(pytest's exit code, None if it did not end; the first test that failed) of test files in a copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, "-o", "addopts=--strict-markers", *tests],  # without the project's own -n
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    first = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return done.returncode, first[1] if first else done.stdout.strip().rpartition("\n")[2]


def run_all(mutations: Sequence[Mutation], copies: Sequence[Path]) -> int:
    """Try every error, one in each copy at a time; prints what became of it and returns the exit code."""
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    code, failed = run_tests(copies[0], tests)
    if code != _PASSED:
        print(f"without any error: {failed or 'no end'}")
        return 2
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def attempt(mutation: Mutation) -> tuple[int | None, str, float]:
        copy, begun = free.get(), time.monotonic()
        file = copy / mutation.file
        sound = file.read_text()
        try:
            file.write_text(mutation.applied())
            return *run_tests(copy, mutation.tests), time.monotonic() - begun
        finally:
            file.write_text(sound)
            free.put(copy)

    words = {_FAILED: "noticed", _PASSED: "SURVIVED", None: "NO END"}
    survivors = 0
    with ThreadPoolExecutor(len(copies)) as pool:
        for mutation, (code, test, took) in zip(mutations, pool.map(attempt, mutations), strict=True):
            survivors += code != _FAILED
            verdict = words.get(code, "NO TEST RAN")
            print(f"{verdict:<9} {mutation.name:<40} {took:6.1f} s  {test}", flush=True)
    print(f"{len(mutations) - survivors} of {len(mutations)} noticed")
    return 1 if survivors else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="NAME", help="errors whose name holds this")
    parser.add_argument("--list", action="store_true", help="list them, run nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="how many at a time")
    flags = parser.parse_args()
    try:
        mutations = [m for m in load() if flags.only in m.name]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if flags.list or not mutations:
        for m in mutations:
            print(f"{m.name}\n    {m.file}\n    - {m.old}\n    + {m.new}\n    {' '.join(m.tests)}")
        return 0 if mutations else 2
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder, str(i)) for i in range(min(flags.jobs, len(mutations)))]
        for copy in copies:
            shutil.copytree(ROOT, copy, ignore=_LEFT_OUT)
        return run_all(mutations, copies)


if __name__ == "__main__":
    sys.exit(main())
