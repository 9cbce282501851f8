"""What every test file shares: tiny checkpoints made once, and two ways to run the command line.

checkpoint   a directory of `tiny_checkpoints.build`, made once per session: read it, never change it
quantized    the output of one, made once per session: read it, never change it
trained      a tiny model that learned something, made once per session: read it, never change it
copy_of      a copy of a checkpoint that a test may spoil
cli          `quantize_fp8.main` in this process: quick, for what the tool does
run          `quantize_fp8.py` as a process of its own: for what a user's terminal, umask or imports see
"""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import quantize_fp8
import tiny_checkpoints

SCRIPT = Path(quantize_fp8.__file__).resolve()


@dataclass(frozen=True)
class Result:
    """What a run left behind: exit code, stdout, stderr."""

    rc: int
    out: str
    err: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(kind, **arguments of tiny_checkpoints.build)`: the directory, made once."""
    made: dict[str, Path] = {}

    def make(kind: str, **arguments: object) -> Path:
        key = repr((kind, sorted(arguments.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-bf16")
            made[key] = tiny_checkpoints.build(folder, kind, **arguments)
        return made[key]

    return make


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory, cli: Callable[..., Result]) -> Callable[..., Path]:
    """`quantized(input, *flags)`: the output directory of a run that did not fail, made once."""
    made: dict[tuple[Path, ...], Path] = {}

    def make(source: Path, *flags: object) -> Path:
        key = (source, *map(str, flags))
        if key not in made:
            folder = tmp_path_factory.mktemp("fp8") / "out"
            result = cli("--input_dir", source, "--output_dir", folder, *flags)
            assert result.rc == 0, result.err + result.out
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model that learned something, made once per session (`tests/trained.py`)."""
    from trained import train

    return train(tmp_path_factory.mktemp("trained") / "text")


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """`copy_of(checkpoint)`: a copy that the test may change."""
    return lambda source: shutil.copytree(source, tmp_path / "input", symlinks=True)


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    """`cli(*arguments)`: the command line, in this process."""

    def call(*arguments: object) -> Result:
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(record=True) as shown,
        ):
            try:
                rc = quantize_fp8.main([str(a) for a in arguments])
            except SystemExit as stop:  # argparse: --help, --version, a flag error
                rc = stop.code
        # pytest keeps warnings to itself; a user would read them among the errors.
        return Result(rc, out.getvalue(), err.getvalue() + "".join(f"{w.message}\n" for w in shown))

    return call


@pytest.fixture(scope="session")
def run() -> Callable[..., Result]:
    """`run(*arguments, env={...}, **subprocess.run's)`: the command line, as a process of its own."""

    def call(*arguments: object, env: dict[str, str] | None = None, **options: object) -> Result:
        # A tester's own terminal settings must not decide what the output looks like.
        inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "PYTHONIOENCODING")}
        done = subprocess.run(
            [sys.executable, SCRIPT, *map(str, arguments)],
            env={**inherited, "PYTHONIOENCODING": "utf-8", "COLUMNS": "80", **(env or {})},
            **{"capture_output": True, "encoding": "utf-8", "timeout": 120, **options},
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return call
