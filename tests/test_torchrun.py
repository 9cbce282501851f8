"""Several ranks on the CPU: the bytes, exit codes and words of one process, and ranks that die.

Real `torchrun`, forked as forked.py does it, starts them wherever it has a part in what is tested (fixtures
`start` and `torchrun`), as processes of their own or, to save the time of importing torch, as stand-ins for
forked ones (forked_rank.py); otherwise forked_ranks does (fixture `ranks`). In every rank `WATCH` writes down
what the rank does and, where a test says so, makes it fail or wait. torchrun's own exit code is 1 whenever a
rank's is not 0.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import forked
import forked_rank
import forked_ranks
import quantize_fp8
from forked import PATIENCE
from forked_ranks import Rank
from fp8lib.job.output_dir import Lock, await_lock
from fp8lib.streaming.writer import ShardWriter

SCRIPT = Path(quantize_fp8.__file__).resolve()
TORCHRUN = "torch.distributed.run"
MANIFEST = "fp8_quantization.json"

WATCH = """
import json, os, signal, sys, time
from pathlib import Path
from fp8lib.job import output_dir, progress as bar, ranks

records, rank = Path(os.environ["RECORDS"]), os.environ["RANK"]
attempt = len(list(records.glob(f"started-{rank}-*")))
def note(kind, text=""):
    with (records / f"{kind}-{rank}-{attempt}").open("a") as file:
        file.write(f"{text}\\n")
note("started", os.getpid())

ranks._SILENCE = float(os.environ.get("SILENCE", 60))
output_dir._LATE = 1.0

def wait(condition):
    while not condition():
        time.sleep(0.02)

def claims(self, work, take=ranks.Ranks.claims):
    note("ready")  # to claim: nobody before all are, so that none finds everything done already
    if "EAGER" not in os.environ:
        wait(lambda: self._failure or len(list(records.glob("ready-*"))) >= (attempt + 1) * self.world)
    if rank == os.environ.get("LAST"):
        wait(lambda: self._failure or list(records.glob("claimed-*")))
    for item in take(self, work):
        part = getattr(item, "part", 0)
        note("claimed", getattr(item, "name", None) or f"{item.plan.name} {part}")
        yield item
    note("exhausted")
ranks.Ranks.claims = claims

def progress(self, count, progress=ranks.Ranks.progress):
    if FAULT and attempt == 0:
        time.sleep(0.05)  # so that it comes in the middle
        if rank == os.environ.get("IN", rank) and finished() >= int(os.environ.get("FINISHED", 0)):
            note("fault")
            os.kill(os.getpid(), signal.SIGKILL) if FAULT == "kill" else time.sleep(60)
    return progress(self, count)
ranks.Ranks.progress = progress
FAULT = os.environ.get("FAULT")

def finished():
    manifest = Path(sys.argv[sys.argv.index("--output_dir") + 1], "fp8_quantization.json")
    return len(json.loads(manifest.read_text())["shards"])

def show(self, name, total, show=bar.Progress.show):
    note("progress", total)
    show(self, name, total)
bar.Progress.show = show

if "LATE" in os.environ:  # until the others have done all they could
    wait(lambda: len(list(records.glob("exhausted-*"))) == int(os.environ["LATE"]))
"""
# The script as torchrun runs it.
RANK = f"""
import atexit, runpy, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
{WATCH}
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit as end:
    atexit.register(note, "exit", end.code or 0)
    if rank == os.environ.get("SLOW"):
        atexit.register(time.sleep, 1)  # before that note: what is registered last runs first
    raise
"""


# The same for a forked one, which ends without a word to atexit.
FORKED_RANK = f"""
{WATCH}
end = os._exit
def ended(code):
    note("exit", code)
    end(code)
os._exit = ended
"""


def notes(records: Path, kind: str) -> dict[tuple[int, int], list[str]]:
    """(rank, attempt) -> lines that it wrote."""
    found = {}
    for path in records.glob(f"{kind}-*"):
        rank, attempt = map(int, path.name.split("-")[1:])
        found[rank, attempt] = path.read_text().split("\n")[:-1]
    return found


@dataclass(frozen=True)
class Done:
    """What ended: exit codes (torchrun's; without it, the ranks'), all output, what the ranks wrote down."""

    codes: list[int]
    text: str
    records: Path

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error:")]

    def notes(self, kind: str) -> dict[tuple[int, int], list[str]]:
        return notes(self.records, kind)

    @property
    def exits(self) -> dict[tuple[int, int], str]:
        """(rank, attempt) -> exit code of every rank that came to its end by itself."""
        return {key: lines[0] for key, lines in self.notes("exit").items()}


@dataclass(frozen=True)
class Node:
    """What one machine's torchrun and its ranks get beside what all get."""

    arguments: tuple = ()
    env: dict[str, str] = field(default_factory=dict)


class Started:
    """torchrun, one on each node; ranks are numbered in the order of the nodes."""

    def __init__(
        self,
        folder: Path,
        ranks: int,
        arguments: tuple,
        flags: tuple,
        nodes: tuple[Node, ...],
        whole: bool,
        env: dict,
    ) -> None:
        self.records = folder / "records"
        self.records.mkdir()
        if whole:
            rank = [folder / "rank.py"]
            rank[0].write_text(RANK)
        else:
            forked.template(folder / "template", before=FORKED_RANK)
            flags = (*flags, "--no-python")
            rank = [sys.executable, "-S", forked_rank.__file__, folder / "template"]
        common = ("--nnodes", len(nodes), "--nproc-per-node", ranks, *flags)
        common += ("--log-dir", folder / "logs")
        common += ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{_free_port()}")
        env = {"RECORDS": str(self.records), **env}
        env["OMP_NUM_THREADS"] = "1"  # otherwise torchrun takes six lines to say that it chose one
        env["PYTHONIOENCODING"] = "ascii"  # as `cli` prints
        self.agents = []
        for number, node in enumerate(nodes):
            here = ("--local-addr", f"127.0.0.{number + 1}", "--rdzv-conf", f"is_host={not number}")
            command = [*common, *here, *rank, *arguments, *node.arguments]
            self.agents.append(forked.start(*command, command=TORCHRUN, env={**env, **node.env}))

    def wait(self) -> Done:
        deadline = time.monotonic() + PATIENCE
        try:
            codes = [agent.wait(deadline - time.monotonic()).rc for agent in self.agents]
            codes = [1 if code == forked.BROKEN else code for code in codes]  # Python's own
        finally:
            self.kill()
        return Done(codes, self.printed(), self.records)

    def printed(self) -> str:
        return "".join(agent.printed() for agent in self.agents)

    def wait_for(self, kind: str, rank: int, attempt: int = 0) -> list[str]:
        """What a rank wrote down, once it did."""
        deadline = time.monotonic() + PATIENCE
        while not (lines := notes(self.records, kind).get((rank, attempt))):
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.01)
        return lines

    def cut_power(self, node: int) -> None:
        """Of one machine, that has one rank."""
        self.agents[node].kill()
        os.kill(int(self.wait_for("started", rank=node)[0]), signal.SIGKILL)

    def kill(self) -> None:
        """Leave nothing behind; ranks are in sessions of their own, so torchrun's end is not theirs."""
        for agent in self.agents:
            if not agent.has_ended:
                agent.kill()
                agent.wait()
        for lines in notes(self.records, "started").values():
            pid = int(lines[0])
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_text()
                if "rank.py" in command or "forked.py" in command:  # not another's by now
                    os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """`start(ranks, *arguments, flags=of torchrun, nodes=[Node(), ...], whole=…, **environment)`: under way.

    `whole`: every rank is a Python of its own, from its first line to its last.
    """
    started = []

    def call(
        ranks: int,
        *arguments: object,
        flags: tuple = (),
        nodes: tuple[Node, ...] = (Node(),),
        whole: bool = False,
        **env: str,
    ) -> Started:
        folder = tmp_path / f"run{len(started)}"
        folder.mkdir()
        started.append(Started(folder, ranks, ("--device", "cpu", *arguments), flags, nodes, whole, env))
        return started[-1]

    yield call
    for each in started:
        each.kill()


@pytest.fixture
def torchrun(start: Callable) -> Callable[..., Done]:
    """The same, waited for."""
    return lambda *arguments, **options: start(*arguments, **options).wait()


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., Done]:
    """`ranks(number or [Rank(), ...], *arguments, machines=1, **environment)`: without torchrun."""

    def call(job: int | list[Rank], *arguments: object, machines: int = 1, **env: str) -> Done:
        records = tmp_path / "records"
        records.mkdir()
        ended = forked_ranks.run(
            [Rank()] * job if isinstance(job, int) else job, "--device", "cpu", *arguments,
            machines=machines, before=WATCH,
            env={"RECORDS": str(records), "PYTHONIOENCODING": "ascii", **env},  # as `cli` prints
        )  # fmt: skip
        return Done([each.rc for each in ended], "".join(each.out + each.err for each in ended), records)

    return call


@pytest.fixture(scope="session")
def wide(checkpoint: Callable) -> Callable[[int], Path]:
    """`wide(shards)`: 105 MB, enough for files to be divided and ranks to be killed in the middle."""
    return lambda shards: checkpoint("text", shards=shards, hidden_size=1024, intermediate_size=3072)


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> digest of every file, hidden ones included."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_nothing_partial(output: Path) -> None:
    assert [p.name for p in output.iterdir() if p.name.startswith(".")] == []


# --- the same bytes ----------------------------------------------------------------------------


def test_two_ranks_write_what_one_process_writes(
    tmp_path: Path, wide: Callable, quantized: Callable, torchrun: Callable
) -> None:
    """Every file, the manifest with its measurements included."""
    source, output = wide(8), tmp_path / "out"
    done = torchrun(2, "--input_dir", source, "--output_dir", output, whole=True)
    assert done.codes == [0], done.text
    assert done.exits == {(0, 0): "0", (1, 0): "0"}
    assert contents(output) == contents(quantized(source))
    assert done.notes("claimed").keys() == {(0, 0), (1, 0)}
    shown = [int(total) for total in done.notes("progress")[0, 0]]
    assert shown == sorted(shown)
    assert shown[-1] == sum(t.nbytes for f in source.glob("*.safetensors") for t in load_file(f).values())
    assert done.text.count("VERDICT") == 1


def test_a_single_file_is_divided_among_the_ranks(
    tmp_path: Path, wide: Callable, quantized: Callable, ranks: Callable
) -> None:
    source, output = wide(1), tmp_path / "out"
    done = ranks(2, "--input_dir", source, "--output_dir", output)
    assert done.codes == [0, 0], done.text
    claimed = done.notes("claimed")
    parts = sorted(int(line.split()[1]) for lines in claimed.values() for line in lines)
    assert len(parts) > 2
    assert parts == list(range(len(parts)))
    assert all(claimed[rank, 0] for rank in (0, 1))
    assert contents(output) == contents(quantized(source))


def test_more_ranks_than_shards(
    tmp_path: Path, checkpoint: Callable, quantized: Callable, ranks: Callable
) -> None:
    """Files too small to divide, for three ranks: one has nothing to do."""
    source, output = checkpoint("moe", shards=2), tmp_path / "out"
    done = ranks(3, "--input_dir", source, "--output_dir", output, "--checksums")
    assert done.codes == [0, 0, 0], done.text
    assert sum(len(lines) for lines in done.notes("claimed").values()) == 2
    assert contents(output) == contents(quantized(source, "--checksums"))


def test_checksums_keep_a_file_whole(
    tmp_path: Path, wide: Callable, quantized: Callable, ranks: Callable
) -> None:
    source, output = wide(1), tmp_path / "out"
    done = ranks(2, "--input_dir", source, "--output_dir", output, "--checksums")
    assert done.codes == [0, 0], done.text
    assert sum(len(lines) for lines in done.notes("claimed").values()) == 1
    assert contents(output) == contents(quantized(source, "--checksums"))


def test_activation_statistics_reach_every_rank(
    tmp_path: Path, wide: Callable, quantized: Callable, ranks: Callable
) -> None:
    source, statistics, output = wide(8), tmp_path / "stats.json", tmp_path / "out"
    _write_statistics(source, statistics)
    flags = ("--calib_mode", "mse", "--scale_format", "bf16", "--activation_stats", statistics)
    done = ranks(2, "--input_dir", source, "--output_dir", output, *flags)
    assert done.codes == [0, 0], done.text
    assert done.notes("claimed").keys() == {(0, 0), (1, 0)}
    assert contents(output) == contents(quantized(source, *flags))


def _write_statistics(source: Path, path: Path) -> None:
    """Mean squares of 1, 2, 3, ... for the input channels of every matrix of the decoder layers."""
    entries = {}
    for shard in source.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        for name, shape in shapes.items():
            if len(shape) == 2 and ".layers." in name:
                entries[name] = {"input_channel_mean_square": list(range(1, shape[1] + 1))}
    path.write_text(json.dumps(entries))


def test_dry_run_prints_one_plan_and_writes_nothing(
    tmp_path: Path, checkpoint: Callable, cli: Callable, ranks: Callable
) -> None:
    source, output = checkpoint("moe"), tmp_path / "out"
    arguments = ("--input_dir", source, "--output_dir", output, "--dry_run")
    done = ranks(2, *arguments)
    assert done.codes == [0, 0], done.text
    assert done.text == cli(*arguments).out
    assert not output.exists()


def test_verify_only_divides_the_shards_and_says_the_same(
    wide: Callable, quantized: Callable, cli: Callable, ranks: Callable
) -> None:
    source = wide(8)
    output = quantized(source)
    arguments = ("--input_dir", source, "--output_dir", output, "--verify_only", "--verify_samples", "all")
    done = ranks(2, *arguments, "--quiet")
    assert done.codes == [0, 0], done.text
    assert done.notes("claimed").keys() == {(0, 0), (1, 0)}
    assert done.text == cli(*arguments, "--quiet").out


# --- refusals and verdicts ---------------------------------------------------------------------


def test_a_bad_input_is_refused_once(tmp_path: Path, torchrun: Callable) -> None:
    """One error line of two ranks, and not one more from the other attempt that torchrun makes."""
    flags = ("--max-restarts", 1)
    done = torchrun(2, "--input_dir", tmp_path / "nosuch", "--output_dir", tmp_path / "out", flags=flags)
    assert done.codes == [1]
    assert done.errors == [f"error: {tmp_path / 'nosuch'}: no such directory; check the path"]
    assert done.notes("started").keys() == {(0, 0), (1, 0), (0, 1), (1, 1)}
    assert [done.exits[rank, 0] for rank in (0, 1)] == ["2", "2"]
    assert not (tmp_path / "out").exists()


def test_a_wrong_flag_is_refused_once(tmp_path: Path, torchrun: Callable) -> None:
    done = torchrun(3, "--input_dir", tmp_path, "--output_dir", tmp_path / "out", "--calib_mode", "none")
    assert done.codes == [1]
    assert len(done.errors) == 1, done.text


def test_nan_that_another_rank_finds_is_refused_once(
    tmp_path: Path, wide: Callable, copy_of: Callable, torchrun: Callable
) -> None:
    """By rank 1, because the largest file holds it and rank 0 waits for rank 1 to take that."""
    source, output = copy_of(wide(8)), tmp_path / "out"
    path = max(source.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    state = load_file(path)
    name = max(state, key=lambda n: state[n].numel() if n.endswith("_proj.weight") else 0)
    state[name][5, 7] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    done = torchrun(2, "--input_dir", source, "--output_dir", output, LAST="0")
    assert done.codes == [1]
    assert done.notes("claimed")[1, 0][0].startswith(path.name)
    assert len(done.errors) == 1, done.text
    assert f"NaN or infinity in {name}" in done.errors[0]
    assert done.exits == {(0, 0): "2", (1, 0): "2"}
    assert not (output / "config.json").exists()
    assert_nothing_partial(output)


def test_a_failed_verdict_is_the_exit_code_of_every_rank_and_said_once(
    tmp_path: Path, checkpoint: Callable, torchrun: Callable
) -> None:
    """Of a rank, too, that takes a second longer to end than the one that torchrun sees fail."""
    source = checkpoint("moe", shards=2)
    done = torchrun(
        2, "--input_dir", source, "--output_dir", tmp_path / "out",
        "--calib_mode", "percentile", "--calib_percentile", 50,  # half of all weights are clipped
        flags=("--max-restarts", 1), whole=True, SLOW="1",
    )  # fmt: skip
    assert done.codes == [1]
    assert done.notes("started").keys() == {(0, 0), (1, 0), (0, 1), (1, 1)}
    assert [done.exits[rank, 0] for rank in (0, 1)] == ["1", "1"]
    assert done.text.count("VERDICT") == 1
    assert (tmp_path / "out/config.json").exists()


def test_a_config_without_quantization_fails_verification_whoever_looks(
    quantized: Callable, checkpoint: Callable, copy_of: Callable, ranks: Callable
) -> None:
    source = checkpoint("moe", shards=2)
    output = copy_of(quantized(source))
    config = json.loads((output / "config.json").read_text())
    del config["quantization_config"]
    (output / "config.json").write_text(json.dumps(config))
    done = ranks(3, "--input_dir", source, "--output_dir", output, "--verify_only", "--quiet")
    assert done.codes == [1, 1, 1]
    assert "has no quantization_config" in done.text


# --- ranks that die ----------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_killed_rank_is_restarted_and_finished_shards_are_not_redone(
    victim: str, tmp_path: Path, wide: Callable, quantized: Callable, start: Callable
) -> None:
    source, output = wide(8), tmp_path / "out"
    run = start(
        2, "--input_dir", source, "--output_dir", output,
        flags=("--max-restarts", 1), FAULT="kill", IN=victim, FINISHED="2",
    )  # fmt: skip
    run.wait_for("fault", rank=int(victim))
    finished = json.loads((output / MANIFEST).read_text())["shards"]
    before = {name: (output / name).stat() for name in finished}
    done = run.wait()
    assert done.codes == [0], done.text
    assert done.notes("started").keys() == {(0, 0), (1, 0), (0, 1), (1, 1)}
    assert 2 <= len(before) < 8
    for name, was in before.items():
        found = (output / name).stat()
        assert (found.st_ino, found.st_mtime_ns) == (was.st_ino, was.st_mtime_ns)
    assert contents(output) == contents(quantized(source))


def test_a_rank_killed_inside_a_divided_file_is_restarted(
    tmp_path: Path, wide: Callable, quantized: Callable, torchrun: Callable
) -> None:
    source, output = wide(1), tmp_path / "out"
    done = torchrun(
        2, "--input_dir", source, "--output_dir", output,
        flags=("--max-restarts", 1), FAULT="kill", IN="1",
    )  # fmt: skip
    assert done.codes == [0], done.text
    assert done.notes("started").keys() == {(0, 0), (1, 0), (0, 1), (1, 1)}
    assert contents(output) == contents(quantized(source))


def test_a_killed_rank_without_restarts_ends_the_job_and_the_next_run_continues(
    tmp_path: Path, wide: Callable, quantized: Callable, torchrun: Callable, ranks: Callable
) -> None:
    source, output = wide(8), tmp_path / "out"
    done = torchrun(2, "--input_dir", source, "--output_dir", output, FAULT="kill", IN="1")
    assert done.codes == [1]
    assert not (output / "config.json").exists()
    assert_nothing_partial(output)
    done = ranks(2, "--input_dir", source, "--output_dir", output)
    assert done.codes == [0, 0], done.text
    assert contents(output) == contents(quantized(source))


@pytest.mark.parametrize(("number", "shards"), [(signal.SIGTERM, 1), (signal.SIGINT, 8)])
def test_a_signal_to_torchrun_leaves_nothing_partial(
    number: int, shards: int, tmp_path: Path, wide: Callable, quantized: Callable, start: Callable
) -> None:
    source, output = wide(shards), tmp_path / "out"
    run = start(2, "--input_dir", source, "--output_dir", output, whole=shards == 1, FAULT="hold", IN="1")
    run.wait_for("fault", rank=1)
    run.agents[0].kill(number)
    done = run.wait()
    assert "SIGKILL" not in done.text  # as torchrun says when it has waited 30 s for a rank to end
    assert done.codes != [0]
    assert done.text.count("interrupted; run the same command again") == 1, done.text
    assert done.errors == []
    assert not (output / "config.json").exists()
    assert_nothing_partial(output)
    assert contents(output).keys() <= contents(quantized(source)).keys()


def test_what_a_rank_has_handed_over_stays_when_it_fails(tmp_path: Path) -> None:
    """Else another, making the file anew for the last part, would complete it with a hole in it."""
    mine = ShardWriter(tmp_path / "shard", b"head", 12, shared=True)
    mine.write(4, b"mine")
    mine.hand_over()
    mine.abandon()
    other = ShardWriter(tmp_path / "shard", b"head", 12, shared=True)
    other.write(8, b"last")
    other.hand_over()
    other.commit()
    assert (tmp_path / "shard").read_bytes() == b"headminelast"


# --- two machines ------------------------------------------------------------------------------


def test_two_nodes_write_what_one_process_writes(
    tmp_path: Path, wide: Callable, quantized: Callable, torchrun: Callable
) -> None:
    source, output = wide(1), tmp_path / "out"
    done = torchrun(1, "--input_dir", source, "--output_dir", output, nodes=(Node(), Node()))
    assert done.codes == [0, 0], done.text
    assert done.notes("claimed").keys() == {(0, 0), (1, 0)}
    assert contents(output) == contents(quantized(source))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_on_one_of_two_nodes_is_restarted(
    victim: int, tmp_path: Path, wide: Callable, quantized: Callable, torchrun: Callable
) -> None:
    """Only the node of the rank that died counts a restart; the other's rank starts anew all the same."""
    source, output = wide(8), tmp_path / "out"
    nodes = [Node(), Node()]
    nodes[victim] = Node(env={"FAULT": "kill"})
    done = torchrun(
        1, "--input_dir", source, "--output_dir", output, flags=("--max-restarts", 1), nodes=nodes
    )
    assert done.codes == [0, 0], done.text
    assert done.notes("started").keys() == {(0, 0), (1, 0), (0, 1), (1, 1)}
    assert contents(output) == contents(quantized(source))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_node_that_vanishes_ends_the_job(
    victim: int, tmp_path: Path, wide: Callable, start: Callable
) -> None:
    """torchrun does not tell the other: without a pulse to miss, rank 0 would wait for rank 1 for ever."""
    output = tmp_path / "out"
    nodes = [Node(), Node()]
    nodes[victim] = Node(env={"FAULT": "hold"})
    run = start(1, "--input_dir", wide(8), "--output_dir", output, nodes=nodes, SILENCE="3")
    run.wait_for("fault", rank=victim)
    run.cut_power(victim)
    done = run.wait()
    assert done.codes[1 - victim] == 1, done.text
    assert not (output / "config.json").exists()
    if victim == 1:
        assert done.errors == ["error: rank 1 has not been heard of for 3 s"]
        assert_nothing_partial(output)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (("--input_dir", "nosuch"), "nosuch: no such directory"),
        (("--calib_mode", "max"), "rank 1 has other calibration"),
        (("--checksums",), "rank 1 has other checksums"),
        (("--output_dir", "elsewhere"), "elsewhere: not the directory that rank 0 writes to"),
    ],
    ids=["input", "calibration", "work", "output"],
)
def test_a_node_that_was_started_differently_is_refused(
    other: tuple, words: str, tmp_path: Path, checkpoint: Callable, ranks: Callable
) -> None:
    source, output = checkpoint("moe", shards=2), tmp_path / "out"
    job = [Rank(), Rank(other)]
    done = ranks(job, "--input_dir", source, "--output_dir", output, machines=2)
    assert done.codes == [2, 2]
    assert len(done.errors) == 1, done.text
    assert words in done.errors[0]
    assert not (output / "config.json").exists()
    assert not Path("elsewhere").exists()


def test_a_node_that_comes_late_still_has_its_say(
    tmp_path: Path, checkpoint: Callable, ranks: Callable
) -> None:
    """The other, which could do it all alone meanwhile, waits with its last word."""
    source, output = checkpoint("moe", shards=2), tmp_path / "out"
    job = [Rank(env={"EAGER": ""}), Rank(("--calib_mode", "max"), {"LATE": "1"})]
    done = ranks(job, "--input_dir", source, "--output_dir", output, machines=2)
    assert done.codes == [2, 2]
    assert len(done.errors) == 1, done.text
    assert not (output / "config.json").exists()


def test_a_node_that_sees_the_output_directory_late_waits_for_it(tmp_path: Path) -> None:
    late = threading.Timer(0.3, Lock, (tmp_path / "out", "this attempt"))
    late.start()
    await_lock(tmp_path / "out", "this attempt")
    late.join()
