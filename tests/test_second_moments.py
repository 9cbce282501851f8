"""Second moments of inputs: every number, the file, its sizes and limits, files that are refused."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import collect_activation_stats
import forked_ranks
from calibration_runs import NO_LIMIT, PAD, NoProgress, plan_of, prompts_of
from forked_ranks import Rank
from fp8lib import Fp8Error
from fp8lib.calibration import second_moments
from fp8lib.calibration.input_statistics import input_of
from fp8lib.calibration.recording import Recorder
from fp8lib.calibration.second_moments import MomentSums
from fp8lib.calibration.second_moments_file import SecondMoments, inputs_of, pack, unpack
from fp8lib.job.moments import Sizes
from fp8lib.model import whole_model
from fp8lib.model.prompts import make_batches
from fp8lib.terminal import size
from test_calibration import seen_by

SCRIPT = Path(collect_activation_stats.__file__).resolve()
GB = 10**9
TINY = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "hidden_size": 128}
MOE = ("moe_text", TINY | {"tokenizer": True})


pytestmark = pytest.mark.usefixtures("one_thread")


def collect(*arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the collector, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = collect_activation_stats.main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def of(tokens: np.ndarray) -> np.ndarray:
    """H by NumPy."""
    return tokens.T @ tokens / len(tokens)


def assert_close(found: np.ndarray, expected: np.ndarray, inner: bool, name: str) -> None:
    # The inner activations of experts are BF16 results of products of other shapes here and there.
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal())).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=(1e-2 if inner else 2e-6) * scale, err_msg=name)


@pytest.mark.parametrize("kind", ["moe_text", "text"])
def test_every_second_moment_is_numpys(checkpoint, kind: str) -> None:
    path, texts = checkpoint(kind, **TINY), prompts_of([70, 33, 50])
    model = whole_model.load(path, "cpu")
    plan = plan_of(path)
    own = frozenset(i.name for i in inputs_of((m.weight.name, m.columns) for m in plan.matrices) if i.experts)
    with Recorder(plan, MomentSums(own)) as recorder:
        batches = make_batches(texts, 1, NO_LIMIT, PAD)  # other batches, other roundings
        whole_model.run(model, batches, recorder, NoProgress(), 0, ())
        taken = {moments.name: moments for moments in recorder._moments.take()}
    weights = seen_by(model, texts, "model.")
    seen: dict[str, list[np.ndarray]] = {}
    for name, tokens in weights.items():
        shared, expert = input_of(name)
        if expert is None or name.endswith("down_proj.weight"):
            seen.setdefault(shared, []).extend(tokens if name.endswith(".weight") else [])
        if expert is not None and name.endswith("down_proj.weight"):
            seen[name.removesuffix(".weight")] = tokens
    for name, tokens in seen.items():
        x = np.concatenate(tokens)
        if shares := sum(input_of(n)[0] == name and ".experts." not in n for n in weights):
            x = x[: len(x) // shares]  # the first of the weights that share it
        if len(x):
            assert_close(unpack(taken[name].mean), of(x), ".experts" in name, name)
            assert taken[name].tokens == len(x)
    assert taken.keys() == {*seen, *(n for n in taken if n.endswith(".mlp.experts"))}


def test_experts_share_the_second_moments_of_all_tokens(checkpoint) -> None:
    path = checkpoint("moe_text", **TINY)
    model = whole_model.load(path, "cpu")
    caught = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: caught.append(args[0][0].double()))
    with Recorder(plan_of(path), MomentSums()) as recorder:
        batches = make_batches(prompts_of([90]), 1, NO_LIMIT, PAD)
        whole_model.run(model, batches, recorder, NoProgress(), 0, ())
        taken = {moments.name: moments for moments in recorder._moments.take()}
    found = taken["model.layers.0.mlp.experts"]
    assert found.tokens == 90
    assert_close(unpack(found.mean), of(torch.cat(caught).numpy()), False, "experts")
    assert not any(".experts.0." in name for name in taken)  # nobody asked for experts' own
    assert taken["model.layers.0.mlp.experts.down_proj"].tokens == 180  # two experts per token


def test_many_tokens_add_up_as_in_float64() -> None:
    tokens = (torch.randn(3000, 64) * torch.logspace(-3, 3, 64)).bfloat16()
    sums = MomentSums()
    for piece in tokens.split(700):
        sums.add("x", piece)
    [moments] = sums.take()
    assert_close(unpack(moments.sums / moments.tokens), of(tokens.double().numpy()), False, "x")


def test_triangles_are_packed_row_by_row() -> None:
    square = np.arange(16.0).reshape(4, 4)
    square = square + square.T
    assert pack(square).tolist() == square[np.triu_indices(4)].tolist()
    np.testing.assert_array_equal(unpack(pack(square)), square)


# --- the file ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collected(checkpoint, tmp_path_factory) -> Path:
    """The file beside the statistics of a layerwise run over a mixture of experts."""
    folder = tmp_path_factory.mktemp("moments")
    (folder / "prompts.txt").write_text("The tide turns twice a day.\nWas ist eine Mühle?\n1, 2, 3\n")
    flags = ("--model_dir", checkpoint(MOE[0], **MOE[1]), "--output", folder / "stats.json")
    prompts = ("--prompts_file", folder / "prompts.txt", "--batch_size", 2)
    code, out, err = collect(*flags, *prompts, "--layerwise", "--second_moments")
    assert code == 0, err
    assert "Second moments" in out
    return folder / "stats.second_moments.safetensors"


def test_the_file_has_an_entry_for_every_quantized_weight_but_mtps(checkpoint, collected: Path) -> None:
    moments = SecondMoments(collected)
    matrices = list(plan_of(checkpoint(MOE[0], **MOE[1])).matrices)
    found = {m.weight.name: moments.entry(m.weight.name, m.columns) for m in matrices}
    assert {name for name, entry in found.items() if entry is None} == {
        n for n in found if n.startswith("mtp.")
    }
    assert found["model.layers.1.mlp.experts.5.up_proj.weight"] == "layers.1.mlp.experts"
    assert found["model.layers.1.mlp.experts.5.down_proj.weight"] == "layers.1.mlp.experts.down_proj"
    assert found["model.layers.1.self_attn.k_proj.weight"] == "layers.1.self_attn.qkv_proj"
    assert moments.entry("model.language_model.layers.1.self_attn.k_proj.weight", 128) is not None  # a prefix
    h = moments.read("layers.1.self_attn.o_proj")
    assert h.shape == (512, 512)
    assert (h == h.T).all()
    assert np.linalg.eigvalsh(h.astype(float)).min() > -1e-6 * h.diagonal().max()


@pytest.mark.xdist_group("collecting ranks")  # one server of forks for all
def test_ranks_together_find_what_one_process_finds(checkpoint, collected: Path, tmp_path: Path) -> None:
    ended = forked_ranks.run(
        [Rank()] * 2, "--model_dir", checkpoint(MOE[0], **MOE[1]), "--output", tmp_path / "s.safetensors",
        "--prompts_file", collected.parent / "prompts.txt", "--layerwise", "--second_moments",
        "--batch_size", 2, "--quiet", command="collect_activation_stats",
        before="import torch; torch.set_num_threads(1)",
    )  # fmt: skip
    assert [each.rc for each in ended] == [0, 0], ended
    found, expected = load_file(tmp_path / "s.second_moments.safetensors"), load_file(collected)
    assert found.keys() == expected.keys()
    for name in expected:  # sums of float32 products of other pieces, in float64
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2e-6 * expected[name].max())


def test_dry_run_shows_sizes_and_writes_nothing(checkpoint, tmp_path: Path) -> None:
    path = checkpoint(MOE[0], **MOE[1])
    flags = ("--model_dir", path, "--output", tmp_path / "s.json")
    code, out, err = collect(*flags, "--second_moments", "--layerwise", "--dry_run")
    assert code == 0, err
    assert not list(tmp_path.glob("s.*"))
    sizes = Sizes(plan_of(path), 64 * GB, layerwise=True)
    assert f"Pooled              : {size(sizes.pooled)}" in out
    assert f"up to {size(sizes.every - sizes.pooled)} more" in out
    code, _, err = collect(*flags, "--second_moments", "--second_moments_limit", "0.0005")
    assert code == 2
    assert "--second_moments_limit" in err
    code, _, err = collect(*flags, "--dry_run")
    assert code == 2
    assert "add --second_moments" in err


def test_sizes_are_those_of_the_file(checkpoint, collected: Path) -> None:
    sizes = Sizes(plan_of(checkpoint(MOE[0], **MOE[1])), 64 * GB, layerwise=True)
    assert sum(array.nbytes for array in load_file(collected).values()) == sizes.pooled
    # Eight experts of [128, 128] in each of two layers.
    assert sizes.every - sizes.pooled == 2 * 8 * (4 * 128 * 129 // 2 + 8)
    # One layer's sums: hidden states twice, attention's output, the shared expert's two, the pooled and
    # the experts' own.
    assert sizes.memory(None) == 8 * (128**2 + 512**2 + 128**2 + 2 * 128**2 + 9 * 128**2)
    assert sizes.memory(100) == 8 * (128**2 + 512**2 + 128**2 + 2 * 128**2 + 128**2)


def test_experts_get_their_own_by_tokens_within_the_limit(checkpoint, tmp_path: Path, monkeypatch) -> None:
    path = checkpoint(MOE[0], **MOE[1])
    (tmp_path / "p.txt").write_text("The tide turns twice a day, and nobody knows why it does. " * 3)
    monkeypatch.setattr(second_moments, "TOKENS_PER_CHANNEL", 0.25)  # 32 tokens instead of 1024
    pooled = Sizes(plan_of(path), 64 * GB, layerwise=True).pooled
    for limit, most in ((1.0, 8), ((pooled + 2 * 2 * 33100) / GB, 2)):
        output = tmp_path / f"s{most}.safetensors"
        flags = ("--model_dir", path, "--output", output, "--prompts_file", tmp_path / "p.txt", "--layerwise")
        code, out, err = collect(*flags, "--second_moments", "--second_moments_limit", limit)
        assert code == 0, err
        found = load_file(output.with_suffix(".second_moments.safetensors"))
        tokens = load_file(output)
        for layer in range(2):
            name = f"model.layers.{layer}.mlp.experts"
            came = {e: int(tokens[f"{name}.{e}.down_proj.weight.tokens"][0]) for e in range(8)}
            own = {e for e in came if f"{name}.{e}.down_proj.second_moments" in found}
            enough = sorted((e for e in came if came[e] >= 32), key=lambda e: -came[e])
            assert own == set(enough[:most])
        assert "single experts'" in out


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: a.update({"layers.0.mlp.experts.second_moments": np.zeros(7, "f4")}), "no F32 triangle"),
        (lambda a: a.update({"layers.0.mlp.experts.second_moments": np.zeros(6, "f8")}), "no F32 triangle"),
        (lambda a: a.update({"surprise": np.zeros(6, "f4")}), "no F32 triangle"),
        (lambda a: a.update({"layers.0.mlp.experts.second_moments": np.zeros(6, "f4")}), "there twice"),
        (lambda a: a["model.layers.0.mlp.experts.second_moments"].__setitem__(5, np.nan), "not finite"),
        (lambda a: a.clear(), "holds no second moments"),
    ],
    ids=["no triangle", "float64", "another tensor", "twice", "nan", "empty"],
)
def test_what_is_no_file_of_second_moments_is_refused(
    collected, tmp_path: Path, spoil: Callable, words
) -> None:
    arrays = load_file(collected)
    spoil(arrays)
    save_file(arrays, tmp_path / "spoilt.safetensors")
    with pytest.raises(Fp8Error, match=words):
        assert SecondMoments(tmp_path / "spoilt.safetensors").sha256


def test_a_file_that_is_no_safetensors_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Fp8Error, match="no such file"):
        SecondMoments(tmp_path / "absent.safetensors")
    (tmp_path / "stats.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(Fp8Error, match="not valid safetensors"):
        SecondMoments(tmp_path / "stats.json")


def test_a_file_of_another_model_is_refused(collected: Path) -> None:
    moments = SecondMoments(collected)
    with pytest.raises(Fp8Error, match=r"128 channels, but .*in_proj_z.weight has 1024"):
        moments.entry("model.layers.0.linear_attn.in_proj_z.weight", 1024)
    with pytest.raises(Fp8Error, match="no entry matches"):
        moments.check([("model.layers.77.mlp.up_proj.weight", 128)])
