"""What depends on transformers' insides: the versions it was tried with, and the error for others."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from fp8lib import Fp8Error
from fp8lib.model import internals

ROOT = Path(internals.__file__).parents[2]
CPU = torch.device("cpu")


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3])


def test_the_versions_tried_are_the_oldest_allowed_and_the_one_of_this_set():
    """`tests/test_calibration.py` and `tests/test_layerwise.py` have run against both.

    A new pin in constraints.txt, or a new bound in requirements.txt, needs such a run first.
    """
    oldest = re.search(r"^transformers>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    pinned = re.search(r"^transformers==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert internals.TRIED[0].startswith(f"{oldest}.")
    assert internals.TRIED[1] == pinned
    installed = version(transformers.__version__)
    assert version(internals.TRIED[0]) <= installed <= version(internals.TRIED[1])


def config_of(checkpoint: Callable[..., Path], kind: str) -> transformers.PreTrainedConfig:
    return transformers.AutoConfig.from_pretrained(checkpoint(kind)).get_text_config()


def without_rotary_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(torch.nn.Module):
        layers = norm = ()

    monkeypatch.setattr(transformers.AutoModel, "from_config", lambda *_, **__: Other())


def without_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS")


@pytest.mark.parametrize("change", [without_rotary_embedding, without_the_table])
def test_a_version_that_does_not_fit_is_named_with_those_that_do(checkpoint, monkeypatch, change):
    config = config_of(checkpoint, "moe")
    change(monkeypatch)
    monkeypatch.setattr(transformers, "__version__", "6.1.0")
    complaint = r"transformers 6\.1\.0 keeps .* pip install transformers==5\.23\.0$"
    with pytest.raises(Fp8Error, match=complaint), internals.around_experts(lambda forward: forward):
        internals.hollow_model(config, CPU, torch.float32)


def test_linear_attention_runs_in_torch_whatever_kernels_are_installed(checkpoint, monkeypatch):
    model, layers, _ = internals.hollow_model(config_of(checkpoint, "text"), CPU, torch.float32)
    path = f"{type(model).__module__}.torch_chunk_gated_delta_rule"
    module, name = path.rsplit(".", 1)
    own = getattr(__import__(module, fromlist=[name]), name)

    @functools.wraps(own)  # as transformers wraps it, with another library's kernel where there is one
    def kernel(*_: object, **__: object) -> None:
        raise AssertionError("the kernel of another library ran")

    monkeypatch.setattr(path, kernel)
    layer = layers[0].to_empty(device=CPU)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    hidden, positions = torch.ones(1, 3, layer.hidden_size), (torch.ones(1, 3, 64),) * 2
    with pytest.raises(AssertionError, match="the kernel of another"):
        layer(hidden, position_embeddings=positions)
    with internals.torch_kernels(model):
        assert layer(hidden, position_embeddings=positions).isfinite().all()
