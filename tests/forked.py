"""Runs of the command line that can be killed, starved and measured, by the hundred.

A process of its own takes two seconds to import torch. So one server imports it, starts no thread, and
forks a child for every run: a real process with its own memory, limits and signals, in 20 ms. A child can
be told to do something `at` one of its operations on files, counted over all its threads:

    start("--input_dir", …, at=At("fsync", 3, do="kill"))      # SIGKILL before the third fsync
    start("--input_dir", …, at=At("open", where="config.json", do="os.truncate(path, 0)"))

What was looked at, and why it does not do:

multiprocessing   has such a server ("forkserver"), the same for all children of a process; we need two, since
                  only one of our commands may import transformers. It reaps its children itself and hands on
                  the exit code alone, and the tests of hostile files bound a run's CPU time and memory.
pytest-forked     (archived) and the `--boxed` that pytest-xdist once had fork the test, from a process in
                  which torch has started threads. Here the program is forked and the test looks on.
pyfakefs          replaces the file system in Python: no rename, lock or kill would be the kernel's.
libfiu, CharybdeFS, strace --inject   fail system calls, with a library, a FUSE mount or ptrace that have to
                  be installed; they cannot run a statement at a moment, which half the tests do.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

OPERATIONS = ("mkdir", "open", "ftruncate", "pwrite", "fsync", "close", "rename", "unlink")
"""Functions of `os` through which everything goes that a run does to files."""
BROKEN = 99
"""Exit code of what ends with an exception; Python's own, 1, is one that our commands have a meaning for."""
PATIENCE = 300
"""Seconds until a test takes for hanging what it waits for; on a quiet machine everything takes a few."""
REPOSITORY = Path(__file__).resolve().parent.parent
_TRANSFORMERS = """
import torch, torch.distributed, transformers
for name in ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "AutoModelForCausalLM", "AutoTokenizer"):
    getattr(transformers, name)
"""
_THE_TOOL = """
import quantize_fp8
from fp8lib.job import checksums, quantizing, run, trying, verifying
from fp8lib.streaming import convert, merging, pipeline
from fp8lib.verification import restored, shard_check
"""
_COLLECTING = """
import collect_activation_stats
from fp8lib.job import collecting
from fp8lib.model import layerwise, whole_model
"""
COMMANDS = {
    "quantize_fp8": "import torch, torch.distributed" + _THE_TOOL,
    "quantize_fp8 with transformers": _TRANSFORMERS + _THE_TOOL,
    "torch.distributed.run": "import torch, torch.distributed.run",
    "collect_activation_stats": _TRANSFORMERS + _THE_TOOL + _COLLECTING,
}
"""What a server imports before it forks runs of a command. torchrun is one, too.

The first word is the command's module."""


@dataclass(frozen=True)
class At:
    """A moment: before the `number`-th call of an operation ("" for any) on a path that holds `where`.

    `do` is "kill", "stop" (SIGSTOP) or statements, run once; they see the operation's `path`.
    """

    operation: str = ""
    number: int = 1
    where: str = ""
    do: str = "kill"


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        rc: exit code, or minus the signal's number.
        out, err: what it printed.
        seconds, cpu: wall clock and processor time.
        grown: bytes its largest size was above the server's.
        operations: (operation, path) in the order of the calls, if it was given an `at` and not killed.
    """

    rc: int
    out: str
    err: str
    seconds: float
    cpu: float
    grown: int
    operations: list[tuple[str, str]] = field(default_factory=list)


class Started:
    """A run under way."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.pid = int(_eventually(folder / "pid", PATIENCE))

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def has_ended(self) -> bool:
        return (self._folder / "result").exists()

    def printed(self) -> str:
        """What it has printed so far, stdout first."""
        return "".join((self._folder / name).read_text(errors="replace") for name in ("out", "err"))

    def wait_until_stopped(self, timeout: float = PATIENCE) -> None:
        """Wait for the moment of `At(…, do="stop")`.

        Raises:
            TimeoutError: it does not come.
        """
        deadline = time.monotonic() + timeout
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            if time.monotonic() > deadline:
                raise TimeoutError(self.pid)
            time.sleep(0.005)

    def wait(self, timeout: float = PATIENCE) -> Ended:
        """How it ended; a run that does not end in time is killed.

        Raises:
            TimeoutError: it did not.
        """
        try:
            result = json.loads(_eventually(self._folder / "result", timeout))
        except TimeoutError:
            self.kill()
            raise TimeoutError((self._folder / "err").read_text()) from None
        out, err = ((self._folder / name).read_text(errors="replace") for name in ("out", "err"))
        return Ended(out=out, err=err, **result)


def _eventually(path: Path, timeout: float) -> str:
    deadline = time.monotonic() + timeout
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.001)
    return path.read_text()


class _Server:
    """The process that children are forked from."""

    def __init__(self, command: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__, command], stdin=subprocess.PIPE, text=True, cwd=REPOSITORY
        )

    @property
    def pipe(self) -> str:
        """Where folders with tasks are written to, by other processes, too."""
        return f"/proc/{os.getpid()}/fd/{self._process.stdin.fileno()}"

    def send(self, task: dict) -> Path:
        """Have a task done; returns its folder."""
        folder = Path(tempfile.mkdtemp(dir=self.folder.name))
        (folder / "task").write_text(json.dumps(task))
        with self._lock:
            self._process.stdin.write(f"{folder}\n")
            self._process.stdin.flush()
        return folder

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self.folder.cleanup()


@functools.cache
def _server(command: str) -> _Server:
    server = _Server(command)
    atexit.register(server.close)
    return server


def start(
    *arguments: object,
    command: str = "quantize_fp8",
    env: dict[str, str] | None = None,
    streams: dict[str, str] | None = None,
    at: At | None = None,
    before: str = "",
    umask: int | None = None,
    limits: dict[int, int] | None = None,
) -> Started:
    """Start a script's `main(arguments)`.

    Args:
        arguments: of the command line.
        command: a key of `COMMANDS`.
        env: environment variables beside those of the tests.
        streams: what to open for "out" and "err" instead of the files that `Ended` is read from.
        at: something to do in the middle of it.
        before: statements to run first.
        umask: of the run.
        limits: soft and hard resource limits.
    """
    task = _task(command, before) | {
        "arguments": [str(a) for a in arguments],
        "env": env or {},
        "streams": streams or {},
        "at": at and asdict(at),
        "umask": umask,
        "limits": list((limits or {}).items()),
    }
    return Started(_server(command).send(task))


def template(path: Path, command: str = "quantize_fp8", before: str = "") -> None:
    """Write what forked_rank.py needs to start runs of a command."""
    server = _server(command)
    task = _task(command, before)
    path.write_text(json.dumps({"pipe": server.pipe, "folder": server.folder.name, "task": task}))


def _task(command: str, before: str) -> dict:
    return {"command": command, "before": before, "streams": {}, "at": None, "umask": None, "limits": []}


def run(*arguments: object, timeout: float = PATIENCE, **options: object) -> Ended:
    """`start`, then wait for the end."""
    return start(*arguments, **options).wait(timeout)


# --- in the server -----------------------------------------------------------------------------


def _serve(command: str) -> None:
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
    exec(COMMANDS[command], {})
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _keep(Path(line.rstrip("\n")))


def _keep(folder: Path) -> None:
    """Fork the run itself, wait for it and write down how it ended."""
    task = json.loads((folder / "task").read_text())
    begun = time.monotonic()
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pid = os.fork()
    if pid == 0:
        _be(task, folder)
    _write(folder / "pid", str(pid))
    _, status, usage = os.wait4(pid, 0)
    log = folder / "operations"
    result = {
        "rc": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - begun,
        "cpu": usage.ru_utime + usage.ru_stime,
        "grown": 1024 * (usage.ru_maxrss - size),
        "operations": json.loads(log.read_text()) if log.exists() else [],
    }
    _write(folder / "result", json.dumps(result))
    os._exit(0)


def _write(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def _be(task: dict, folder: Path) -> None:
    """Become the run."""
    sys.argv = [task["command"], *task["arguments"]]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(task["env"])
    encoding = task["env"].get("PYTHONIOENCODING", "utf-8")
    for number, name, errors in ((1, "out", "strict"), (2, "err", "backslashreplace")):  # as Python's own
        (folder / name).touch()
        place = task["streams"].get(name, folder / name)
        os.dup2(os.open(place, os.O_WRONLY | os.O_NOCTTY), number)
        stream = open(number, "w", encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, f"std{name}", stream)
    rc = BROKEN
    try:
        if task["umask"] is not None:
            os.umask(task["umask"])
        for which, value in task["limits"]:
            resource.setrlimit(which, (value, value))
        if task["at"]:
            _watch(At(**task["at"]), folder / "operations")
        exec(task["before"], {})
        rc = importlib.import_module(task["command"].split()[0]).main(task["arguments"]) or 0
    except SystemExit as stop:
        rc = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(rc)


def _watch(at: At, log: Path) -> None:
    """Note operations, and do at one of them what is to be done."""
    lock = threading.Lock()
    called: list[tuple[str, str]] = []
    paths: dict[int, str] = {}
    left = at.number

    def watched(name: str, function: object) -> object:
        def call(target: object, *arguments: object, **options: object) -> object:
            nonlocal left
            path = paths.get(target, "") if isinstance(target, int) else os.fsdecode(target)
            with lock:
                called.append((name, path))
                left -= at.operation in ("", name) and at.where in path
                now = left == 0
                left -= now
            if now:
                _do(at.do, path)
            result = function(target, *arguments, **options)
            if name == "open":
                paths[result] = path
            return result

        return call

    for name in OPERATIONS:
        setattr(os, name, watched(name, getattr(os, name)))
    end = os._exit

    def ended(code: int) -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        log.write_text(json.dumps(called))
        end(code)

    os._exit = ended


def _do(what: str, path: str) -> None:
    if what in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    else:
        exec(what, {"os": os, "time": time, "signal": signal, "path": path})


if __name__ == "__main__":
    _serve(sys.argv[1])
