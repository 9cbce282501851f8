"""collect_activation_stats.py under real torchrun on the CPU: several ranks, one process's statistics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import collect_activation_stats

SCRIPT = Path(collect_activation_stats.__file__).resolve()

# Runs the script as a rank does, with one thing gone wrong in the first attempt.
RANK = f"""
import os, runpy, signal, sys
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
rank, fault = os.environ["RANK"], os.environ.get("FAULT")
if fault == "other prompts" and rank == "1":
    Path("other.txt").write_text("Something else.")
    sys.argv += ["--prompts_file", "other.txt"]
if fault == "kill" and rank == os.environ["IN"]:
    from fp8lib.model.progress import Progress
    label, mark = Progress.label, Path(f"killed")
    def killing(self, text):
        if text.startswith("layer 3/") and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        label(self, text)
    Progress.label = killing
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    texts = ["Why is the sky blue? " * n for n in (9, 1, 4, 7, 2, 5)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def torchrun(
    folder: Path, ranks: int, *arguments: object, restarts: int = 0, **env: str
) -> subprocess.CompletedProcess:
    (folder / "rank.py").write_text(RANK)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks,
        "--max-restarts", restarts, folder / "rank.py", *arguments, "--batch_size", 2,
    ]  # fmt: skip
    return subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, encoding="utf-8", timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **env},
    )  # fmt: skip


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


def alone(path: Path, prompts: Path, output: Path) -> dict[str, torch.Tensor]:
    """Statistics that one process collects."""
    done = subprocess.run(
        [
            sys.executable, SCRIPT, "--model_dir", path, "--output", output, "--prompts_file", prompts,
            "--layerwise", "--batch_size", "2", "--quiet",
        ],
        capture_output=True, encoding="utf-8", timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return load_file(output)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        # To float32 rounding: sums of float64 may differ in their last bit, and round the other way.
        torch.testing.assert_close(found[name], values, rtol=2.0**-23, atol=0, msg=name)
        if not name.endswith("mean_square"):
            assert torch.equal(found[name], values), name


@pytest.mark.parametrize(("kind", "ranks"), [("moe", 2), ("text", 4)])
def test_ranks_write_what_one_process_writes(checkpoint, prompts, tmp_path, kind, ranks):
    path = checkpoint(kind, tokenizer=True, shards=2)  # 3 batches: a fourth rank has nothing to do
    expected = alone(path, prompts, tmp_path / "alone.safetensors")
    output = tmp_path / "out" / "s.safetensors"
    output.parent.mkdir()
    done = torchrun(
        tmp_path, ranks, "--model_dir", path, "--output", output, "--prompts_file", prompts, "--layerwise"
    )
    assert done.returncode == 0, done.stderr
    assert_same(load_file(output), expected)
    assert [p.name for p in output.parent.iterdir()] == [output.name]
    with safe_open(output, "pt") as file, safe_open(tmp_path / "alone.safetensors", "pt") as other:
        assert file.metadata() == other.metadata()
    assert done.stdout.count("ACTIVATION STATISTICS SUMMARY") == 1
    layers = len({name.split(".layers.")[1].split(".")[0] for name in expected})
    assert f"{6 * layers}/{6 * layers}, " in done.stderr  # progress of all ranks together


@pytest.mark.parametrize(
    ("flags", "env", "complaint"),
    [
        (["--model_dir", "nowhere"], {}, "nowhere: no such directory"),
        (["--output", "missing/s.json"], {}, "missing: no such directory"),
        (["--prompt_file", "x"], {}, "unrecognized arguments: --prompt_file x; see --help"),
        ([], {"FAULT": "other prompts"}, "rank 1 has another prompts than rank 0"),
    ],
)
def test_what_is_wrong_is_said_once(checkpoint, prompts, tmp_path, flags, env, complaint):
    path = checkpoint("text", tokenizer=True)
    given = ["--model_dir", path, "--output", "s.json", "--prompts_file", prompts, "--layerwise", *flags]
    done = torchrun(tmp_path, 2, *given, **env)
    assert done.returncode == 1
    assert len(errors(done)) == 1, done.stderr
    assert complaint in errors(done)[0]
    assert not (tmp_path / "s.json").exists()


def test_the_whole_model_is_for_one_process(checkpoint, prompts, tmp_path):
    path = checkpoint("text", tokenizer=True)
    done = torchrun(tmp_path, 2, "--model_dir", path, "--output", "s.json", "--prompts_file", prompts)
    assert done.returncode == 1
    assert len(errors(done)) == 1, done.stderr
    assert "add --layerwise" in errors(done)[0]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_rank_leaves_no_file_and_the_next_attempt_writes_it(checkpoint, prompts, tmp_path, rank):
    path = checkpoint("text", tokenizer=True, shards=2)
    expected = alone(path, prompts, tmp_path / "alone.safetensors")
    given = ["--model_dir", path, "--prompts_file", prompts, "--layerwise", "--output"]
    lost = tmp_path / "lost"
    lost.mkdir()
    done = torchrun(tmp_path, 2, *given, lost / "s.safetensors", FAULT="kill", IN=rank)
    assert done.returncode == 1
    assert (tmp_path / "killed").exists()
    assert not (lost / "s.safetensors").exists()
    (tmp_path / "killed").unlink()
    found = tmp_path / "found"
    found.mkdir()
    done = torchrun(tmp_path, 2, *given, found / "s.safetensors", restarts=1, FAULT="kill", IN=rank)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    assert_same(load_file(found / "s.safetensors"), expected)
    assert [p.name for p in found.iterdir()] == ["s.safetensors"]
