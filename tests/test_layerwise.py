"""One layer in memory at a time: the same numbers, every weight read once, and little memory."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny_checkpoints
from calibration_runs import KINDS, NO_LIMIT, PAD, NoProgress, collect, plan_of, prompts_of
from forked import PATIENCE
from fp8lib import Fp8Error
from fp8lib.calibration.input_statistics import InputStatistics
from fp8lib.calibration.recording import Recorder
from fp8lib.checkpoint.directory import Checkpoint, open_checkpoint
from fp8lib.checkpoint.headers import ITEM_SIZE
from fp8lib.model import layerwise, stored_weights
from fp8lib.model.prompts import Batch, make_batches
from fp8lib.streaming.lanes import Files
from safetensors_by_hand import put_together

ROOT = Path(layerwise.__file__).parents[2]


pytestmark = pytest.mark.usefixtures("one_thread")


def collect_layerwise(
    path: Path, prompts: list[list[int]], batch_size: int = 1
) -> dict[str, InputStatistics]:
    """Statistics by input."""
    config = transformers.AutoConfig.from_pretrained(path).get_text_config()
    batches = make_batches(prompts, batch_size, NO_LIMIT, PAD)
    with Recorder(plan_of(path)) as recorder:
        return run(open_checkpoint(path), config, batches, recorder)


def run(
    checkpoint: Checkpoint, config: object, batches: list[Batch], recorder: Recorder, device: str = "cpu"
) -> dict[str, InputStatistics]:
    """Statistics of all layers, by input."""
    layers = layerwise.run(checkpoint, config, batches, torch.device(device), recorder, NoProgress())
    return {name: statistics for layer in layers for name, statistics in layer.items()}


def assert_same(one: dict[str, InputStatistics], other: dict[str, InputStatistics]) -> None:
    assert one.keys() == other.keys()
    for name, statistics in one.items():
        np.testing.assert_array_equal(statistics.tokens, other[name].tokens, err_msg=name)
        # To float32 rounding. On the machines tried the two are the same to the last bit.
        np.testing.assert_allclose(statistics.maximum, other[name].maximum, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(statistics.mean_square, other[name].mean_square, rtol=1e-6, err_msg=name)


# --- the same numbers --------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "experts", "_prefix"), KINDS)
def test_statistics_are_those_of_the_whole_model(checkpoint, kind, experts, _prefix):
    path = checkpoint(kind, experts=experts, shards=3)
    prompts = prompts_of([130, 64, 40, 9, 70])
    for batch_size in (1, 3):
        whole, _ = collect(path, prompts, batch_size=batch_size)
        assert_same(collect_layerwise(path, prompts, batch_size), whole)


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": torch.float32},
        {"dtype": torch.float16, "experts": "per_expert"},
        {"f32_extras": True},
        {"tied": True},
        {"index": "misnamed"},
        {"num_hidden_layers": 13},  # "layers.1" must not take in "layers.12"
    ],
    ids=str,
)
def test_statistics_are_those_of_the_whole_model_in_every_layout(checkpoint, arguments):
    path = checkpoint("moe", **arguments)
    prompts = prompts_of([40, 21])
    assert_same(collect_layerwise(path, prompts, 2), collect(path, prompts, batch_size=2)[0])


def test_weights_pass_through_a_small_buffer_on_their_way_to_another_dtype(checkpoint, monkeypatch):
    path = checkpoint("dense", dtype=torch.float32)
    prompts = prompts_of([30])
    expected = collect_layerwise(path, prompts)
    monkeypatch.setattr(stored_weights, "_STAGING", 1000)  # divides no tensor evenly
    assert_same(collect_layerwise(path, prompts), expected)


@pytest.mark.gpu
def test_statistics_on_cuda_are_close_to_those_on_the_cpu(checkpoint):
    path = checkpoint("moe")
    config = transformers.AutoConfig.from_pretrained(path).get_text_config()
    prompts = prompts_of([130, 64])
    with Recorder(plan_of(path)) as recorder:
        batches = make_batches(prompts, 2, NO_LIMIT, PAD)
        found = run(open_checkpoint(path), config, batches, recorder, "cuda")
    for name, statistics in collect_layerwise(path, prompts, 2).items():
        mine, theirs = found[name].mean_square.mean(), statistics.mean_square.mean()
        np.testing.assert_allclose(mine, theirs, rtol=0.02, err_msg=name)


# --- what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", ["fused", "per_expert"])
def test_every_layers_weights_are_read_once(checkpoint, experts, monkeypatch):
    path = checkpoint("moe", experts=experts, shards=3)
    reads: Counter[tuple[str, int]] = Counter()
    read_into = Files.read_into

    def counting(self, buffer, path, offset):
        reads[path.name, offset] += buffer.nbytes
        return read_into(self, buffer, path, offset)

    monkeypatch.setattr(Files, "read_into", counting)
    prompts = prompts_of([40, 30, 20])
    collect_layerwise(path, prompts)  # three batches
    different = len({token for prompt in prompts for token in prompt})
    for shard in open_checkpoint(path).shards:
        for tensor in shard.tensors:
            end = tensor.start + tensor.nbytes
            mine = {k: n for k, n in reads.items() if k[0] == shard.name and tensor.start <= k[1] < end}
            if ".layers." in tensor.name and not tensor.name.startswith("mtp."):
                assert sum(mine.values()) == tensor.nbytes, tensor.name
            elif tensor.name.endswith("embed_tokens.weight"):
                assert sum(mine.values()) == different * tensor.shape[1] * ITEM_SIZE[tensor.dtype]
            else:
                assert not mine, f"{tensor.name} is not needed"


# --- memory ------------------------------------------------------------------------------------


# A child's ru_maxrss begins with what its parent had when it forked; VmHWM begins with the program.
REPORT_PEAK = """
import atexit, pathlib, runpy, sys
atexit.register(lambda: print(pathlib.Path("/proc/self/status").read_text()))
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_peak_memory_is_a_layer_and_the_hidden_states_and_a_gigabyte(tmp_path):
    path = tmp_path / "large"
    sizes = write_sparse(path, num_hidden_layers=32, num_experts=64, hidden_size=1024)
    layer = max(n for name, n in sizes.items() if name.startswith("layers."))
    prompts = tmp_path / "prompts.jsonl"
    # 8 prompts of 128 tokens, one per byte
    lines = [json.dumps({"text": chr(97 + i) * 128}) for i in range(8)]
    prompts.write_text("\n".join(lines))
    hidden = 8 * 128 * 1024 * 2
    limit = layer + hidden + 1_000_000_000
    assert sum(sizes.values()) > 3 * limit, "the model must be several times larger than the limit"
    done = subprocess.run(
        [
            sys.executable, "-c", REPORT_PEAK, ROOT / "collect_activation_stats.py", "--layerwise", "--quiet",
            "--model_dir", path, "--output", tmp_path / "stats.safetensors", "--prompts_file", prompts,
        ],
        capture_output=True, encoding="utf-8", timeout=PATIENCE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.rpartition("VmHWM:")[2].split()[0]) * 1024
    assert peak < limit, (
        f"{peak / 1e9:.2f} GB for {sum(sizes.values()) / 1e9:.2f} GB, limit {limit / 1e9:.2f}"
    )


def write_sparse(path: Path, **sizes: int) -> dict[str, int]:
    """A text-only MoE checkpoint of zeros that takes no room on disk, but for its embedding.

    Returns:
        Bytes by layer and by tensor that is in none.
    """
    tiny_checkpoints.build(path, "moe_text", tokenizer=True, mtp=False, seed=1)
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    raw = json.loads((path / "config.json").read_text()) | sizes | {"moe_intermediate_size": 256}
    raw["layer_types"] = [
        "full_attention" if i % 4 == 3 else "linear_attention" for i in range(raw["num_hidden_layers"])
    ]
    (path / "config.json").write_text(json.dumps(raw))
    (path / "model.safetensors").unlink()
    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    header, end, by_layer = {}, 0, Counter()
    for name, tensor in model.state_dict().items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
        short = name.removeprefix("model.")
        by_layer[".".join(short.split(".")[:2]) if short.startswith("layers.") else short] += tensor.nbytes
    put_together(path / "model.safetensors", header)
    with (path / "model.safetensors").open("r+b") as file:
        length = file.seek(0, os.SEEK_END)
        file.truncate(length + end)
        start, stop = header["model.embed_tokens.weight"]["data_offsets"]
        values = embedding.repeat(1, config.hidden_size // embedding.shape[1])
        assert values.nbytes == stop - start
        file.seek(length + start)
        file.write(values.view(torch.uint8).numpy().tobytes())
    return dict(by_layer)


# --- refusals ----------------------------------------------------------------------------------


def _change(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = path / "model.safetensors"
    state = {k: v.clone() for k, v in load_file(file).items()}
    file.unlink()
    save_file(change(state), file)


@pytest.mark.parametrize(
    "name", ["layers.1.input_layernorm.weight", "layers.3.self_attn.o_proj.weight", "embed_tokens.weight"]
)
def test_a_missing_tensor_is_named(checkpoint, copy_of, name):
    path = copy_of(checkpoint("dense"))
    _change(path, lambda state: {k: v for k, v in state.items() if not k.endswith(f"language_model.{name}")})
    with pytest.raises(Fp8Error, match=rf"{name}.*(missing|complete the checkpoint)"):
        collect_layerwise(path, prompts_of([20]))


def test_a_config_that_asks_for_other_shapes_is_refused(checkpoint, copy_of):
    path = copy_of(checkpoint("dense"))
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 640
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        Fp8Error, match=r"mlp\.\w+_proj\.weight: BF16 \[\d+, \d+\] where config.json makes it"
    ):
        collect_layerwise(path, prompts_of([20]))


def test_a_config_that_asks_for_more_experts_is_refused(checkpoint, copy_of):
    path = copy_of(checkpoint("moe", experts="per_expert"))
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["num_experts"] = 9
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Fp8Error, match=r"layers\.0\.mlp\.gate\.weight: BF16 \[8, 256\] where"):
        collect_layerwise(path, prompts_of([20]))
    _change(path, lambda state: {k: _ninth_row(k, v) for k, v in state.items()})
    with pytest.raises(Fp8Error, match=r"layers\.0\.mlp\.experts\.gate_up_proj: missing; complete"):
        collect_layerwise(path, prompts_of([20]))


def _ninth_row(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor[:1]]) if name.endswith("mlp.gate.weight") else tensor


def test_a_shard_that_shrinks_after_it_was_opened_is_refused(checkpoint, copy_of):
    path = copy_of(checkpoint("dense"))
    config = transformers.AutoConfig.from_pretrained(path).get_text_config()
    opened, plan = open_checkpoint(path), plan_of(path)
    os.truncate(path / "model.safetensors", 100_000)
    with Recorder(plan) as recorder, pytest.raises(Fp8Error, match="became shorter while it was read"):
        run(opened, config, make_batches(prompts_of([20]), 1, NO_LIMIT, PAD), recorder)


def test_a_layer_that_is_not_finite_is_named(checkpoint, copy_of):
    path = copy_of(checkpoint("dense"))
    broken = {
        "model.language_model.layers.2.mlp.down_proj.weight": torch.full((256, 512), torch.nan).bfloat16()
    }
    _change(path, lambda state: state | broken)
    with pytest.raises(Fp8Error, match=r"^model\.language_model\.layers\.2: NaN or infinite activations"):
        collect_layerwise(path, prompts_of([20]))
