"""What every test file shares: tiny checkpoints made once, and two ways to run the command line.

once         a directory, made once per session, whichever of pytest-xdist's workers needs it first
checkpoint   such a directory of `tiny_checkpoints.build`: read it, never change it
quantized    such a directory with the output of a run: read it, never change it
trained      a tiny model that learned something, made once per session: read it, never change it
one_thread   torch computes with one thread during the test
copy_of      a copy of a checkpoint that a test may spoil
cli          `quantize_fp8.main` in this process: quick, for what the tool does
run          `quantize_fp8.py` as a process of its own: for what a user's terminal, umask or imports see
"""

import contextlib
import gc
import hashlib
import io
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

import quantize_fp8
from forked import PATIENCE

settings.register_profile("no clock", deadline=None)
settings.load_profile("no clock")
SCRIPT = Path(quantize_fp8.__file__).resolve()
SLOW = {
    "test_auto",
    "test_batches",
    "test_calibration",
    "test_cli",
    "test_collect_cli",
    "test_collect_torchrun",
    "test_compare_outputs",
    "test_config_lies",
    "test_damage",
    "test_dequantize",
    "test_eligibility",
    "test_every_bit",
    "test_faults",
    "test_fuzz",
    "test_hostile_files",
    "test_layerwise",
    "test_layouts",
    "test_lora",
    "test_output_contract",
    "test_outputs",
    "test_pretended_device",
    "test_report",
    "test_resume",
    "test_rounding",
    "test_scale",
    "test_second_moments",
    "test_tensor_parallel",
    "test_torchrun",
}
"""Files that `make check` leaves out: whole models by transformers, many runs, real torchrun."""


@dataclass(frozen=True)
class Result:
    """What a run left behind: exit code, stdout, stderr."""

    rc: int
    out: str
    err: str


def pytest_configure() -> None:
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # one of several processes that share the cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        # A run's threads hand each other the interpreter's lock, which takes twice the time between cores.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_finish() -> None:
    gc.freeze()  # two million objects of the libraries: none of them is garbage


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`once(name, key, make)`: a directory that `make(directory)` fills, once per session.

    `key` and `name` stand for what is in it: who asks with the same gets the same directory, in every
    worker of pytest-xdist.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"
    shared.mkdir(exist_ok=True)
    made: set[Path] = set()

    def get(name: str, key: object, make: Callable[[Path], object]) -> Path:
        folder = shared / f"{name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"
        if folder not in made:
            with FileLock(f"{folder}.lock"):
                if not folder.exists():
                    begun = folder.with_name(f"{folder.name}.begun")
                    shutil.rmtree(begun, ignore_errors=True)  # of a test that failed on the way
                    begun.mkdir()
                    make(begun)
                    begun.rename(folder)
            made.add(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def checkpoint(once: Callable[..., Path]) -> Callable[..., Path]:
    """`checkpoint(kind, **arguments of tiny_checkpoints.build)`: the directory, made once."""
    import tiny_checkpoints  # transformers with it, which the process that hands out tests can do without

    def make(kind: str, **arguments: object) -> Path:
        return once(
            f"{kind}-bf16",
            sorted(arguments.items()),
            lambda folder: tiny_checkpoints.build(folder, kind, **arguments),
        )

    return make


@pytest.fixture(scope="session")
def quantized(once: Callable[..., Path], cli: Callable[..., Result]) -> Callable[..., Path]:
    """`quantized(input, *flags)`: the output directory of a run that did not fail, made once."""

    def make(source: Path, *flags: object) -> Path:
        def quantize(folder: Path) -> None:
            result = cli("--input_dir", source, "--output_dir", folder / "out", *flags)
            assert result.rc == 0, result.err + result.out

        return once("fp8", (str(source), *map(str, flags)), quantize) / "out"

    return make


@pytest.fixture(scope="session")
def trained(once: Callable[..., Path]) -> Path:
    """A tiny dense model that learned something, made once per session (`tests/trained.py`)."""
    from trained import train

    return once("trained", "text", train)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Where matrices are tiny, threads would only wait for each other."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


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
            **{"capture_output": True, "encoding": "utf-8", "timeout": PATIENCE, **options},
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return call
