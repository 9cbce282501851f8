"""A config.json that does not describe its tensors, or names what is not there: refused in a line, early."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import collect_activation_stats

KIND = {"tokenizer": True}


def change(folder: Path, name: str, **keys: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.fixture
def liar(checkpoint: Callable, copy_of: Callable) -> Callable[..., Path]:
    """`liar(**keys)`: a checkpoint of 4 layers and 8 experts whose config.json says something else."""

    def make(**keys: object) -> Path:
        folder = copy_of(checkpoint("moe_text", **KIND))
        change(folder, "config.json", **keys)
        return folder

    return make


@pytest.fixture
def collecting(tmp_path: Path, capfd: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """`collecting(folder, *flags)`: exit code and stderr of the collector, with one short prompt."""

    def call(folder: Path, *flags: str) -> tuple[int, str]:
        (tmp_path / "prompts.txt").write_text("hello\n")
        arguments = ["--model_dir", folder, "--output", tmp_path / "s.json", "--quiet", *flags]
        arguments += ["--prompts_file", tmp_path / "prompts.txt"]
        capfd.readouterr()  # what making the checkpoint said
        code = collect_activation_stats.main([str(a) for a in arguments])
        assert (tmp_path / "s.json").exists() == (code == 0)
        return code, capfd.readouterr().err

    return call


ROPE = {
    "rope_type": "spiral",
    "rope_theta": 1e7,
    "partial_rotary_factor": 0.25,
    "mrope_section": [11, 11, 10],
}
LIES = {
    "no expert per token": ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0, not a number from 1 to"),
    "100 experts per token": ({"num_experts_per_tok": 100}, "num_experts_per_tok is 100, not a number"),
    "other experts": ({"num_experts": 9}, "num_experts is 9, but the tensors are of 8"),
    "an unknown activation": ({"hidden_act": "spam"}, "hidden_act 'spam' is unknown to transformers"),
    "an unknown rope": ({"rope_parameters": ROPE}, "rope_type 'spiral' is unknown to transformers"),
    "an end that is text": ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', neither a token's number"),
    "ends that are text": ({"eos_token_id": [1, "</s>"]}, "eos_token_id is [1, '</s>'], neither"),
    "FlashAttention": ({"attn_implementation": "flash_attention_2"}, "'flash_attention_2' cannot be used"),
    "kernels of the hub": ({"attn_implementation": "kernels-community/x"}, "'kernels-community/x' cannot be"),
    "unknown experts": ({"experts_implementation": "spam"}, "experts_implementation 'spam' cannot be used"),
    "fewer layers": ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but the tensors are of 4 layers"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not a number from 1 on"),
    "a million layers": ({"num_hidden_layers": 10**6, "layer_types": None}, "is 1,000,000, but the tensors"),
    "true layers": ({"num_hidden_layers": True}, "num_hidden_layers is True, not a number"),
    "another rhythm": ({"layer_types": ["full_attention"] * 4}, "layer 0 is 'full_attention' by it, but lin"),
    "another interval": ({"layer_types": None, "full_attention_interval": 2}, "layer 1 is 'full_attention'"),
    "a rhythm of nothing": ({"layer_types": None, "full_attention_interval": "x"}, "interval is 'x', not a"),
    "too few kinds": ({"layer_types": ["full_attention"]}, "layer_types is not a list of num_hidden_layers"),
}


@pytest.mark.parametrize(("keys", "said"), LIES.values(), ids=LIES)
def test_a_lie_is_named_with_its_file(keys: dict, said: str, liar: Callable, collecting: Callable) -> None:
    folder = liar(**keys)
    code, err = collecting(folder, "--max_tokens", "2")
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(f"error: {folder / 'config.json'}: ")
    assert said in err
    assert "--debug" not in err


def test_an_end_in_the_generation_config_is_looked_at_too(liar: Callable, collecting: Callable) -> None:
    folder = liar()
    change(folder, "generation_config.json", eos_token_id={"id": 1})
    code, err = collecting(folder)
    assert code == 2
    assert err.startswith(f"error: {folder / 'generation_config.json'}: eos_token_id is {{'id': 1}}, neither")


@pytest.mark.parametrize(("keys", "said"), [LIES["100 experts per token"], LIES["an unknown activation"]])
def test_comparing_outputs_refuses_the_same_lies(
    keys: dict, said: str, liar: Callable, tmp_path: Path, cli: Callable
) -> None:
    result = cli("--input_dir", liar(**keys), "--output_dir", tmp_path / "out", "--compare_outputs")
    assert result.rc == 2
    assert said in result.err
    assert not (tmp_path / "out").exists()  # refused before anything is quantized


def test_layers_without_full_attention_are_collected_but_cannot_generate(
    checkpoint: Callable, collecting: Callable
) -> None:
    """transformers keeps the sequence's length in the cache of full attention."""
    folder = checkpoint("text", num_hidden_layers=1, mtp=False, tokenizer=True)
    code, err = collecting(folder, "--max_tokens", "2")
    assert code == 2
    assert f"{folder / 'config.json'}: none of its 1 layers is full attention" in err
    assert collecting(folder, "--max_tokens", "0")[0] == 0
