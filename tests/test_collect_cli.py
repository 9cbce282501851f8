"""collect_activation_stats.py as a user meets it: flags, files, summary, refusals, interruption, use."""

import contextlib
import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import collect_activation_stats
import fp8lib
import quantize_fp8
import tiny_checkpoints
from calibration_runs import collect, entries_of, plan_of, prompts_of
from forked import PATIENCE
from fp8lib.calibration.statistics_file import Statistics
from fp8lib.model import memory, whole_model
from fp8lib.numerics.e4m3 import dequantize

SCRIPT = Path(collect_activation_stats.__file__).resolve()
TEXTS = ["The tide turns twice a day.", "def f(x):\n    return x + 1", "Was ist eine Mühle?", "1, 2, 3"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in TEXTS), encoding="utf-8")
    return path


@pytest.fixture
def call() -> Callable[..., tuple[int, str, str]]:
    """`call(*arguments)`: (exit code, stdout, stderr) of the command line, in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = collect_activation_stats.main([str(a) for a in arguments])
            except SystemExit as stop:  # argparse
                code = stop.code
        return code, out.getvalue(), err.getvalue()

    return run


def process(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    """The command line as a process of its own."""
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
        **{"capture_output": True, "encoding": "utf-8", "timeout": PATIENCE, **options},
    )


# --- flags -------------------------------------------------------------------------------------


def test_help_fits_a_terminal_and_loads_no_library():
    code = (
        "import sys, collect_activation_stats as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: print({'torch', 'transformers', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPT.parent, env={**os.environ, "COLUMNS": "80"},
        capture_output=True, encoding="utf-8", timeout=PATIENCE,
    )  # fmt: skip
    assert done.stderr == "set()\n"
    assert max(map(len, done.stdout.splitlines())) <= 80
    for flag in (
        "--model_dir", "--output", "--prompts_file", "--no_chat_template", "--max_tokens",
        "--max_prompt_tokens", "--batch_size", "--device_map", "--layerwise", "--debug", "--quiet",
        "--version",
    ):  # fmt: skip
        assert flag in done.stdout
    assert "prompts only, no generation" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--max_token", "3"], "unrecognized arguments: --max_token"),
        (["--batch_size", "0"], "argument --batch_size: must be 1 or more"),
        (["--max_tokens", "-1"], "argument --max_tokens: "),
        (["--max_prompt_tokens", "many"], "'many' is not a whole number"),
        ([], "the following arguments are required: --model_dir, --output"),
    ],
)
def test_a_wrong_flag_is_refused(call, arguments, complaint):
    given = ["--model_dir", "m", "--output", "o.json"] if arguments else []
    code, _, err = call(*given, *arguments)
    assert code == 2
    assert complaint in err


def test_version(call):
    assert call("--version")[:2] == (0, f"collect_activation_stats.py {fp8lib.__version__}\n")


# --- what comes out ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize(("kind", "layerwise"), [("moe", False), ("text", True)])
def test_the_file_covers_what_the_quantizer_quantizes(
    checkpoint, prompts, tmp_path, call, kind, layerwise, suffix
):
    path, output = checkpoint(kind, tokenizer=True), tmp_path / f"stats{suffix}"
    flags = ["--layerwise"] if layerwise else ["--max_tokens", 3]
    code, out, err = call("--model_dir", path, "--output", output, "--prompts_file", prompts, *flags)
    assert code == 0, err
    read = Statistics(output)
    for matrix in plan_of(path).matrices:
        found = read.importance(matrix.weight.name, matrix.columns)
        assert (found is None) == matrix.weight.name.startswith("mtp."), matrix.weight.name
    assert "weights of mtp.* get no statistics: transformers does not load them" in err
    assert "Weights recorded" in out
    assert str(output) in out
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([prompts.name, output.name])


def test_the_file_says_where_it_comes_from(checkpoint, prompts, tmp_path, call):
    output = tmp_path / "stats.json"
    path = checkpoint("dense", tokenizer=True)
    call(
        "--model_dir", path, "--output", output, "--prompts_file", prompts, "--max_tokens", 3,
        "--no_chat_template",
    )  # fmt: skip
    found = json.loads(output.read_text())["__metadata__"]
    tokens = sum(len(text.encode()) for text in TEXTS)  # one per byte
    assert found["model_type"] == "qwen3_5"
    assert (found["prompts"], found["prompts_file"]) == (4, "prompts.jsonl")
    assert found["prompt_tokens"] == tokens
    assert 0 < found["generated_tokens"] <= 4 * 2
    assert found["transformers"] == transformers.__version__
    counts = {e["tokens"] for n, e in json.loads(output.read_text()).items() if n != "__metadata__"}
    assert counts == {tokens + found["generated_tokens"]}


def test_both_modes_write_the_same_numbers(checkpoint, prompts, tmp_path, call):
    path = checkpoint("moe", tokenizer=True, shards=3, experts="per_expert")
    common = ["--model_dir", path, "--prompts_file", prompts, "--batch_size", 3]
    whole, layers = tmp_path / "whole.safetensors", tmp_path / "layers.safetensors"
    assert call(*common, "--output", whole, "--max_tokens", 0)[0] == 0
    assert call(*common, "--output", layers, "--layerwise")[0] == 0
    one, other = load_file(whole), load_file(layers)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_earlier_statistics_are_replaced(checkpoint, prompts, tmp_path, call, suffix):
    output = tmp_path / f"s{suffix}"
    output.touch()  # as mktemp leaves it
    given = ["--model_dir", checkpoint("text", tokenizer=True), "--output", output, "--layerwise"]
    given += ["--prompts_file", prompts]
    assert call(*given, "--batch_size", 1)[0] == 0
    first = output.read_bytes()
    output.write_bytes(first + b" ")
    assert call(*given, "--batch_size", 1)[0] == 0
    assert output.read_bytes() == first


def test_the_summary_tells_how_well_experts_were_covered(checkpoint, prompts, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(checkpoint("moe", tokenizer=True))
    code, out, _ = call(
        "--model_dir", "model", "--output", "s.json", "--prompts_file", prompts, "--layerwise"
    )
    assert code == 0
    assert "32 in 4 layers" in out
    assert "saw no token" in out
    assert "Least-fed layer" in out
    assert "COVERAGE:" in out
    assert "POOR" in out
    assert "--prompts_file" in out
    assert max(map(len, out.splitlines())) <= 80


def test_generating_with_layerwise_is_said_to_be_impossible(checkpoint, prompts, tmp_path, call):
    _, _, err = call(
        "--model_dir", checkpoint("dense", tokenizer=True), "--output", tmp_path / "s.json",
        "--prompts_file", prompts, "--layerwise", "--max_tokens", 9,
    )  # fmt: skip
    assert "note: --layerwise runs prompts only: --max_tokens 9 has no effect" in err


def test_quiet_prints_the_summary_and_nothing_else(checkpoint, prompts, tmp_path):
    done = process(
        "--model_dir", checkpoint("moe", tokenizer=True), "--output", tmp_path / "s.json",
        "--prompts_file", prompts, "--max_tokens", 2, "--quiet",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "ACTIVATION STATISTICS SUMMARY" in done.stdout


def test_progress_in_a_log_is_plain_lines(checkpoint, prompts, tmp_path):
    done = process(
        "--model_dir", checkpoint("dense", tokenizer=True), "--output", tmp_path / "s.json",
        "--prompts_file", prompts, "--layerwise",
    )  # fmt: skip
    assert done.returncode == 0
    assert "\r" not in done.stderr
    assert "\033" not in done.stdout + done.stderr
    assert "16/16 prompts x layers, " in done.stderr
    assert "tokens/s" in done.stderr


def test_progress_on_a_terminal_is_a_bar(checkpoint, prompts, tmp_path):
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    done = process(
        "--model_dir", checkpoint("dense", tokenizer=True), "--output", tmp_path / "s.json",
        "--prompts_file", prompts, "--max_tokens", 2, capture_output=False, stdout=secondary,
        stderr=secondary,
    )  # fmt: skip
    os.close(secondary)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: everything was read
        while chunk := os.read(primary, 65536):
            shown += chunk
    os.close(primary)
    assert done.returncode == 0
    assert b"Loading weights: 100%" in shown
    assert b"prompts: 100%" in shown
    assert b"tokens/s" in shown


# --- refusals ----------------------------------------------------------------------------------


def _spoil_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def _no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def _broken_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{}")


def _not_finite(path: Path) -> None:
    file = path / "model.safetensors"
    state = {k: v.clone() for k, v in load_file(file).items()}
    state["model.language_model.layers.1.linear_attn.out_proj.weight"][0, 0] = float("inf")
    file.unlink()
    save_file(state, file)


def _missing_tensor(path: Path) -> None:
    file = path / "model.safetensors"
    state = {
        k: v.clone() for k, v in load_file(file).items() if not k.endswith("layers.2.mlp.up_proj.weight")
    }
    file.unlink()
    save_file(state, file)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda path: _spoil_config(path, model_type="llama"), "config.json: model_type 'llama' is not"),
        (lambda path: _spoil_config(path, quantization_config={"quant_method": "fp8"}), "already quantized"),
        (lambda path: (path / "model.safetensors").unlink(), "no *.safetensors file in it"),
        (lambda path: os.truncate(path / "model.safetensors", 5000), "truncated or not a safetensors file"),
        (_no_tokenizer, "no tokenizer in it (tokenizer.json); copy"),
        (_broken_tokenizer, "transformers cannot read the tokenizer"),
        (_missing_tensor, "mlp.up_proj.weight is missing (1 tensors are); complete the checkpoint"),
        (_not_finite, "layers.1: NaN or infinite activations, so the BF16 model itself is broken"),
    ],
)
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_model_that_cannot_be_calibrated_is_refused_in_one_line(
    checkpoint, copy_of, prompts, tmp_path, call, spoil, complaint, layerwise
):
    path, output = copy_of(checkpoint("dense", tokenizer=True)), tmp_path / "s.json"
    spoil(path)
    flags = ["--layerwise"] if layerwise else []
    code, out, err = call(
        "--model_dir", path, "--output", output, "--prompts_file", prompts, "--quiet", *flags
    )
    if layerwise:
        complaint = complaint.replace(" (1 tensors are)", "").replace(" is missing", ": missing")
    _one_line(code, out, err, complaint)
    assert not output.exists()


def _one_line(code: int, out: str, err: str, complaint: str) -> None:
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert complaint in err, err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--model_dir", "nowhere"], "nowhere: no such directory"),
        (["--output", "s.bin"], "s.bin: unknown suffix; name the file *.json or *.safetensors"),
        (["--output", "missing/s.json"], "missing: no such directory; make it first"),
        (["--output", "folder.json"], "folder.json: is a directory; name a file in it"),
        (["--output", "index.json"], "index.json: exists and is no statistics file; choose another name"),
        (["--output", "pipe.json"], "pipe.json: exists and is no statistics file; choose another name"),
        (["--prompts_file", "empty.txt"], "empty.txt: holds no prompt"),
        (["--prompts_file", "broken.jsonl"], "broken.jsonl, line 2: not valid JSON"),
        (["--prompts_file", "none.txt"], "none.txt: cannot be read (No such file or directory)"),
        (["--device_map", "cuda:7"], "--device_map cuda:7: there are"),
        (["--device_map", "gpu"], "--device_map gpu: use auto, cpu, cuda or cuda:N"),
        (["--device_map", "balanced", "--layerwise"], "--device_map balanced: use auto, cpu, cuda or cuda:N"),
    ],
)
def test_what_flags_name_is_checked_before_the_model_is_loaded(
    checkpoint, prompts, tmp_path, call, monkeypatch, arguments, complaint
):
    monkeypatch.chdir(tmp_path)
    Path("folder.json").mkdir()
    Path("index.json").write_text('{"metadata": {}, "weight_map": {}}')
    os.mkfifo("pipe.json")
    Path("empty.txt").write_text("\n")
    Path("broken.jsonl").write_text('{"prompt": "a"}\n{')
    monkeypatch.setattr(whole_model, "load", lambda *_: pytest.fail("loaded"))
    model = checkpoint("dense", tokenizer=True)
    given = {"--model_dir": model, "--output": "s.json", "--prompts_file": prompts}
    given |= dict(zip(arguments[::2], [*arguments[1::2], None], strict=False))
    flat = [x for pair in given.items() for x in pair if x is not None]
    _one_line(*call(*flat), complaint)
    assert not Path("s.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_directory_that_cannot_be_written_is_refused(checkpoint, tmp_path, call):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    model = checkpoint("dense", tokenizer=True)
    code, out, err = call("--model_dir", model, "--output", folder / "s.json")
    _one_line(code, out, err, "s.json: permission denied")


def test_a_read_only_place_is_refused(checkpoint, call):
    # /proc takes no files, whoever asks
    code, out, err = call("--model_dir", checkpoint("dense", tokenizer=True), "--output", "/proc/s.json")
    _one_line(code, out, err, "/proc/s.json: ")


def test_a_model_larger_than_memory_is_refused_with_both_numbers(checkpoint, tmp_path, call, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda _device: 5_000_000)
    monkeypatch.setattr(whole_model, "load", lambda *_: pytest.fail("loaded"))
    model = checkpoint("dense", tokenizer=True)
    given = ["--model_dir", model, "--output", tmp_path / "s.json", "--quiet"]
    code, out, err = call(*given)
    _one_line(code, out, err, "add --layerwise to hold one layer at a time")
    assert "MB in BF16, and 5.00MB of memory is free" in err
    assert call(*given, "--layerwise", "--max_prompt_tokens", 20)[0] == 0  # a layer is 3 MB
    monkeypatch.setattr(memory, "available", lambda _device: 1_000_000)
    _one_line(*call(*given, "--layerwise"), "its largest layer is")


def test_a_tokenizer_of_another_model_is_refused(checkpoint, copy_of, prompts, tmp_path, call):
    path = copy_of(checkpoint("dense", tokenizer=True, vocab_size=128))
    code, out, err = call("--model_dir", path, "--output", tmp_path / "s.json", "--prompts_file", prompts)
    _one_line(code, out, err, "but the model has 128; copy the tokenizer files")


def test_debug_shows_the_traceback(tmp_path, call):
    code, _, err = call("--model_dir", tmp_path / "nowhere", "--output", tmp_path / "s.json", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.endswith("nowhere: no such directory; check the path\n"), err


def test_code_in_the_model_directory_is_never_run(checkpoint, copy_of, prompts, tmp_path, call):
    path = copy_of(checkpoint("dense", tokenizer=True))
    mark = tmp_path / "ran"
    (path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    _spoil_config(
        path, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        architectures=["Evil"],
    )  # fmt: skip
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    output = tmp_path / "s.json"
    call("--model_dir", path, "--output", output, "--prompts_file", prompts, "--max_tokens", 0)
    assert not mark.exists()


# --- interruption ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "flags"),
    [(signal.SIGINT, 130, ["--max_tokens", "500"]), (signal.SIGTERM, 143, ["--layerwise"])],
)
def test_an_interrupted_run_leaves_no_file(checkpoint, tmp_path, number, code, flags):
    output = tmp_path / "out" / "s.json"
    output.parent.mkdir()
    prompts = tmp_path / "long.txt"
    prompts.write_text("\n".join("word " * 100 + str(i) for i in range(400)))
    child = subprocess.Popen(
        [
            sys.executable, SCRIPT, "--model_dir", checkpoint("dense", tokenizer=True), "--output", output,
            "--prompts_file", prompts, *flags,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while "tokens/s" not in (line := child.stderr.readline()):  # then prompts are running
        assert line, "it ended before"
    child.send_signal(number)
    _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == code
    assert list(output.parent.iterdir()) == []
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert err.endswith("interrupted: no statistics were written\n")


# --- what it is for ----------------------------------------------------------------------------


def uneven(path: Path, *, ternary: bool = False) -> Path:
    """Give a tiny model channels as different as trained ones have: mean squares over a factor of 100.

    With `ternary`, the half of the channels that matter most are read through weights of one magnitude,
    as models that were trained for few-bit weights have them.
    """
    draw = torch.Generator().manual_seed(7)
    file = path / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.unlink()
    for name, tensor in state.items():
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            # The norm's factor is 1 + weight. ln of its square has a spread of 1.15: +-2 spreads are 100.
            gain = torch.exp(1.15 / 2 * torch.randn(tensor.shape, generator=draw))
            if ternary:
                gain = torch.where(torch.arange(len(gain)) % 2 == 0, 8 * gain, gain)
            state[name] = (gain - 1).to(tensor.dtype)
        elif ternary and name.endswith(("gate_proj.weight", "up_proj.weight", "q_proj.weight")):
            state[name][:, ::2] = torch.where(tensor[:, ::2] < 0, -0.02, 0.02).to(tensor.dtype)
    save_file(state, file, metadata={"format": "pt"})
    return path


def weighted_errors(source: Path, quantized: Path, importance: dict[str, np.ndarray]) -> dict[str, float]:
    """Sum over input channels of mean square x squared error of the weights, of every FP8 weight."""
    originals, written = tiny_checkpoints.tensors(source), tiny_checkpoints.tensors(quantized)
    errors = {}
    for name, mean_square in importance.items():
        if f"{name}_scale_inv" not in written:
            continue  # of the official set, of which statistics are recorded, too
        if name in originals:
            original = originals[name]
        else:
            experts, rest = name.split(".experts.")
            expert, projection, _ = rest.split(".")
            fused = "down_proj" if projection == "down_proj" else "gate_up_proj"
            original = originals[f"{experts}.experts.{fused}"][int(expert)]
            if fused == "gate_up_proj":
                half = len(original) // 2
                original = original[:half] if projection == "gate_proj" else original[half:]
        difference = dequantize(written[name], written[f"{name}_scale_inv"]) - original.float()
        errors[name] = ((difference**2).sum(0).double().numpy() * mean_square).sum()
    return errors


def quantize(source: Path, output: Path, *flags: object) -> Path:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        arguments = ["--input_dir", source, "--output_dir", output, "--skip_verify", *flags]
        assert quantize_fp8.main([str(a) for a in arguments]) == 0
    return output


def held_out(path: Path) -> dict[str, np.ndarray]:
    """Mean squares over tokens that calibration did not see."""
    entries = entries_of(path, collect(path, prompts_of([300] * 4, seed=99))[0])
    return {name: entry.mean_square.astype(np.float64) for name, entry in entries.items()}


@pytest.mark.parametrize(
    ("kind", "suffix", "flags"),
    [
        ("moe", ".safetensors", ["--layerwise"]),
        ("dense", ".json", ["--max_tokens", 4]),
    ],
)
def test_mse_scales_lower_the_error_on_held_out_prompts(
    checkpoint, copy_of, tmp_path, call, kind, suffix, flags
):
    source, output = uneven(copy_of(checkpoint(kind, tokenizer=True, mtp=False))), tmp_path / f"s{suffix}"
    arguments = ["--model_dir", source, "--output", output, "--max_prompt_tokens", 150, "--quiet", *flags]
    assert call(*arguments)[0] == 0
    importance = held_out(source)
    mode = ["--calib_mode", "mse", "--scale_format", "bf16"]  # powers of two have no phase to choose
    plain = quantize(source, tmp_path / "plain", *mode)
    aware = quantize(source, tmp_path / "aware", *mode, "--activation_stats", output)
    before, after = (weighted_errors(source, q, importance) for q in (plain, aware))
    # Measured: 2.0 and 2.3 %. Only what norms put out is uneven here, not the inputs of o_proj, down_proj.
    assert sum(after.values()) < 0.985 * sum(before.values())
    uneven_inputs = [n for n in before if not n.endswith(("o_proj.weight", "down_proj.weight"))]
    better = sum(after[n] < before[n] for n in uneven_inputs)
    assert better >= 0.9 * len(uneven_inputs), f"{better} of {len(uneven_inputs)}"


def test_rms_scales_lower_the_error_on_held_out_prompts(checkpoint, copy_of, tmp_path, call):
    # On Gaussian weights no scale is better than another for `rms` to find (every phase is within 0.7 %
    # of every other). Where the channels that matter have weights of one magnitude, their rms is that
    # magnitude, and k = 448/160 puts it on 160, which E4M3 holds exactly.
    source = uneven(copy_of(checkpoint("dense", tokenizer=True, mtp=False)), ternary=True)
    output = tmp_path / "s.json"
    arguments = ["--model_dir", source, "--output", output, "--max_prompt_tokens", 150, "--quiet"]
    assert call(*arguments, "--layerwise")[0] == 0
    importance = held_out(source)
    mode = ["--calib_mode", "rms", "--rms_factor", 2.8, "--scale_format", "bf16"]
    plain = quantize(source, tmp_path / "plain", *mode)
    aware = quantize(source, tmp_path / "aware", *mode, "--activation_stats", output)
    before, after = (weighted_errors(source, q, importance) for q in (plain, aware))
    changed = [n for n in before if n.endswith(("gate_proj.weight", "up_proj.weight", "q_proj.weight"))]
    assert sum(after[n] for n in changed) < 0.8 * sum(before[n] for n in changed)
    assert sum(after.values()) < sum(before.values())
