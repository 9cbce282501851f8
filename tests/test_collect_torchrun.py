"""collect_activation_stats.py in several ranks on the CPU: one process's statistics.

Where torchrun has a part in it, real torchrun starts them; otherwise forked_ranks.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import forked
import forked_rank
import forked_ranks
from forked import PATIENCE, Ended
from forked_ranks import Rank

pytestmark = pytest.mark.xdist_group("collecting ranks")  # one server of forks for all

# One rank dies in the middle, once.
KILLED = """
import os, signal
from pathlib import Path
from fp8lib.model.progress import Progress
label, mark = Progress.label, Path(os.environ["MARK"])
def killing(self, text):
    if text.startswith("layer 3/") and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    label(self, text)
if os.environ["RANK"] == os.environ["IN"]:
    Progress.label = killing
"""
# A second attempt writes down what the first has left.
LOOKING = """
import sys
if mark.exists():
    left = os.listdir(Path(sys.argv[sys.argv.index("--output") + 1]).parent)
    mark.with_name("left-" + os.environ["RANK"]).write_text("\\n".join(left))
"""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    texts = ["Why is the sky blue? " * n for n in (9, 1, 4, 7, 2, 5)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


OPTIONS = {
    "command": "collect_activation_stats",
    "env": {"OMP_NUM_THREADS": "1"},
    "before": "import torch; torch.set_num_threads(1)",
}


def in_ranks(
    count: int, *arguments: object, ranks: list[Rank] | None = None, **options: object
) -> list[Ended]:
    """How the ranks of a job ended, without torchrun."""
    return forked_ranks.run(
        ranks or [Rank()] * count, *arguments, "--batch_size", 2, **{**OPTIONS, **options}
    )


def assert_refused_once(ended: list[Ended], complaint: str) -> None:
    """By rank 0, for all."""
    assert [each.rc for each in ended] == [2] * len(ended)
    [error] = [line for each in ended for line in each.err.splitlines() if line.startswith("error:")]
    assert complaint in error


@pytest.fixture
def alone(once: Callable, tmp_path: Path) -> Callable[[Path, Path], Path]:
    """`alone(checkpoint, prompts)`: the file of statistics that one process collects."""

    def collect(path: Path, prompts: Path) -> Path:
        def make(folder: Path) -> None:
            arguments = ["--model_dir", path, "--output", folder / "s.safetensors", "--prompts_file", prompts]
            [ended] = in_ranks(1, *arguments, "--layerwise", "--quiet")
            assert ended.rc == 0, ended.err

        return once("statistics", (str(path), prompts.read_text()), make) / "s.safetensors"

    return collect


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        # To float32 rounding: sums of float64 may differ in their last bit, and round the other way.
        torch.testing.assert_close(found[name], values, rtol=2.0**-23, atol=0, msg=name)
        if not name.endswith("mean_square"):
            assert torch.equal(found[name], values), name


@pytest.mark.parametrize(("kind", "ranks"), [("moe", 2), ("text", 4)])
def test_ranks_write_what_one_process_writes(checkpoint, prompts, alone, tmp_path, kind, ranks):
    path = checkpoint(kind, tokenizer=True, shards=2)  # 3 batches: a fourth rank has nothing to do
    expected = alone(path, prompts)
    output = tmp_path / "out" / "s.safetensors"
    output.parent.mkdir()
    ended = in_ranks(ranks, "--model_dir", path, "--output", output, "--prompts_file", prompts, "--layerwise")
    assert [each.rc for each in ended] == [0] * ranks, ended
    assert_same(load_file(output), load_file(expected))
    assert [p.name for p in output.parent.iterdir()] == [output.name]
    with safe_open(output, "pt") as file, safe_open(expected, "pt") as other:
        assert file.metadata() == other.metadata()
    assert [each.out.count("ACTIVATION STATISTICS SUMMARY") for each in ended] == [1] + [0] * (ranks - 1)
    layers = len({name.split(".layers.")[1].split(".")[0] for name in load_file(expected)})
    assert f"{6 * layers}/{6 * layers} prompts" in ended[0].err  # progress of all ranks together


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--model_dir", "nowhere"], "nowhere: no such directory"),
        (["--output", "missing/s.json"], "missing: no such directory"),
        (["--prompt_file", "x"], "unrecognized arguments: --prompt_file (did you mean --prompts_file?)"),
    ],
)
def test_what_is_wrong_is_said_once(checkpoint, prompts, tmp_path, flags, complaint):
    path, output = checkpoint("text", tokenizer=True), tmp_path / "s.json"
    given = ["--model_dir", path, "--output", output, "--prompts_file", prompts, "--layerwise"]
    assert_refused_once(in_ranks(2, *given, *flags), complaint)
    assert not output.exists()


def test_ranks_with_other_prompts_are_refused(checkpoint, prompts, tmp_path):
    path, output = checkpoint("text", tokenizer=True), tmp_path / "s.json"
    other = tmp_path / "other.txt"
    other.write_text("Something else.")
    ended = in_ranks(
        2, "--model_dir", path, "--output", output, "--prompts_file", prompts, "--layerwise",
        ranks=[Rank(), Rank(("--prompts_file", other))],
    )  # fmt: skip
    assert_refused_once(ended, "rank 1 has another prompts than rank 0")
    assert not output.exists()


def test_the_whole_model_is_for_one_process(checkpoint, prompts, tmp_path):
    given = ["--model_dir", checkpoint("text", tokenizer=True), "--prompts_file", prompts]
    assert_refused_once(in_ranks(2, *given, "--output", tmp_path / "s.json"), "add --layerwise")


def test_killed_rank_0_leaves_no_file_and_the_next_attempt_writes_it(checkpoint, prompts, alone, tmp_path):
    path = checkpoint("text", tokenizer=True, shards=2)
    output = tmp_path / "found" / "s.safetensors"
    output.parent.mkdir()
    arguments = ["--model_dir", path, "--prompts_file", prompts, "--layerwise", "--output", output]
    arguments += ["--batch_size", 2]
    store, options = forked_ranks.new_store(), {**OPTIONS, "before": OPTIONS["before"] + KILLED}
    options["env"] = {**OPTIONS["env"], "IN": "0", "MARK": str(tmp_path / "killed")}
    first, other = forked_ranks.start([Rank()] * 2, *arguments, store=store, **options)
    assert first.wait().rc == -signal.SIGKILL
    other.kill(signal.SIGTERM)  # as torchrun does
    assert other.wait().rc == 128 + signal.SIGTERM
    assert not output.exists()
    again = forked_ranks.run([Rank()] * 2, *arguments, store=store, **options)
    assert [each.rc for each in again] == [0, 0], again
    assert_same(load_file(output), load_file(alone(path, prompts)))
    assert [p.name for p in output.parent.iterdir()] == [output.name]


def test_torchrun_restarts_what_a_killed_rank_was_part_of(checkpoint, prompts, alone, tmp_path):
    path = checkpoint("text", tokenizer=True, shards=2)
    found = tmp_path / "found"
    found.mkdir()
    template = tmp_path / "template"
    forked.template(template, OPTIONS["command"], OPTIONS["before"] + KILLED + LOOKING)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
        "--max-restarts", 1, "--no-python", sys.executable, "-S", forked_rank.__file__, template,
        "--batch_size", 2, "--model_dir", path, "--prompts_file", prompts,
        "--layerwise", "--output", found / "s.safetensors",
    ]  # fmt: skip
    own = {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "IN": "1", "MARK": str(tmp_path / "killed")}
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=PATIENCE,
        env={**os.environ, **own},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Looked at before the ranks of this attempt write.
    assert "s.safetensors" not in (tmp_path / "left-0").read_text().splitlines()
    assert done.stdout.count("ACTIVATION STATISTICS SUMMARY") == 1
    assert_same(load_file(found / "s.safetensors"), load_file(alone(path, prompts)))
    assert [p.name for p in found.iterdir()] == ["s.safetensors"]
