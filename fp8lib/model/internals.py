"""Everything this project needs of transformers that is not part of its public interface, in one place.

The library has no promise for any of it, so every access here ends, where it fails, in an error that
names the installed version and the ones that are known to work.

- A text model is `layers`, `norm` and `rotary_emb`; its `forward` computes positions and masks and calls
  one layer after the other.
- The experts of a layer are one module, `mlp.experts`, with 3-D parameters `gate_up_proj` (gate above up)
  and `down_proj`. Its `forward` is dispatched through a table, `ALL_EXPERTS_FUNCTIONS`, by
  `config._experts_implementation`; "eager", which need not be in the table, stands for the class's own.
- The gated delta rule of linear attention is a module-level function that uses another library's kernels
  where they are installed.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import transformers

from fp8lib import Fp8Error
from fp8lib.checkpoint.untrusted import printable

TRIED = ("5.17.0", "5.23.0")
"""The oldest and the newest version that the tests have run against."""

ExpertsForward = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(module, hidden states, experts of each token, their weights) -> hidden states."""

_TORCH_FUNCTIONS = ("torch_chunk_gated_delta_rule", "causal_conv1d_fn")


@contextmanager
def _needs(what: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, ImportError) as error:
        raise Fp8Error(
            f"transformers {transformers.__version__} keeps {what} elsewhere than versions {TRIED[0]} to "
            f"{TRIED[1]}, which this tool was tried with; pip install transformers=={TRIED[1]}"
        ) from error


class PassOn(torch.nn.Module):
    """Stands for a layer that is not in memory."""

    def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        return hidden_states


class Hollow(NamedTuple):
    """A text model without weights; see `hollow_model`."""

    model: transformers.PreTrainedModel
    layers: tuple[torch.nn.Module, ...]
    norm: torch.nn.Module


def require_buildable(config: transformers.PreTrainedConfig, where: str) -> None:
    """Refuse a config that names something which this installation does not have.

    Args:
        config: of the text model.
        where: its file, for messages.

    Raises:
        Fp8Error: an unknown activation function or rope type; an implementation that is not installed.
    """
    with _needs("its tables of activation functions and rope types"):
        from transformers.activations import ACT2FN
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    version = f"transformers {transformers.__version__}"
    if config.hidden_act not in ACT2FN:
        raise Fp8Error(f"{where}: hidden_act {printable(config.hidden_act)!r} is unknown to {version}")
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else rope
    if kind not in ("default", *ROPE_INIT_FUNCTIONS):
        raise Fp8Error(f"{where}: rope_type {printable(kind)!r} is unknown to {version}")
    for key in ("attn_implementation", "experts_implementation"):
        name = getattr(config, f"_{key}", None)
        if name not in (None, "eager") and (why := _unavailable(config, key, name)):
            raise Fp8Error(
                f"{where}: {key} {printable(name)!r} cannot be used here ({why}); remove it from the file, "
                "or install what it needs"
            )


def _unavailable(config: transformers.PreTrainedConfig, key: str, name: str) -> str | None:
    """What the library says against an implementation, trying it on a model of one layer without memory."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.layer_types = 1, config.layer_types[:1]
    other = {"attn_implementation": "experts", "experts_implementation": "attn"}[key]
    with _needs("the choice of implementations"):
        setattr(small, f"_{other}_implementation", None)
    try:
        with torch.device("meta"):
            transformers.AutoModel.from_config(small)
    except Exception as error:  # whatever any of the libraries below may raise
        return f"{type(error).__name__}: {printable(' '.join(str(error).split()))}"
    return None


def hollow_model(config: transformers.PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> Hollow:
    """transformers' text model without weights, its layers, and its last norm, both taken out.

    Layers and norm are on the meta device, which takes no memory. The model passes its input on.

    Raises:
        Fp8Error: it cannot be built, or this version of transformers builds it in another way.
    """
    try:
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config, dtype=dtype).eval()
    except Exception as error:  # whatever any of the libraries below may raise
        raise Fp8Error(
            f"transformers {transformers.__version__} cannot build the model that config.json describes "
            f"({type(error).__name__}: {printable(' '.join(str(error).split()))})"
        ) from error
    with _needs("the parts of a text model"):
        hollow = Hollow(model, tuple(model.layers), model.norm)
        model.layers = torch.nn.ModuleList(PassOn() for _ in hollow.layers)
        model.norm = torch.nn.Identity()  # what comes out is a layer's output, not the model's
        model.rotary_emb = type(model.rotary_emb)(config=config).to(device)
    return hollow


@contextmanager
def around_experts(wrap: Callable[[ExpertsForward], ExpertsForward]) -> Iterator[None]:
    """While entered, the experts of every layer run through what `wrap` makes of their implementation.

    Every implementation is wrapped: transformers may switch to another at any time.

    Raises:
        Fp8Error: this version of transformers dispatches them in another way.
    """
    with _needs("the table of experts' implementations"):
        from transformers.integrations import moe

        table = moe.ALL_EXPERTS_FUNCTIONS
        before = {key: table.get(key) for key in {*table, "eager"}}
    for key, implementation in before.items():
        table[key] = wrap(implementation or _own_forward)
    try:
        yield
    finally:
        for key, implementation in before.items():
            del table[key]  # the library's own shows again, unless it was a user's
            if table.get(key) is not implementation:
                table[key] = implementation


def _own_forward(module: torch.nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """The forward that the class had before the library made it look into the table."""
    return inspect.unwrap(type(module).forward)(module, *args)


def gated(module: torch.nn.Module, gate_up: torch.Tensor) -> torch.Tensor:
    """act(gate) * up, the input of the experts' down projections: [n, 2 * inner] -> [n, inner].

    Args:
        module: `mlp.experts` of a layer.
        gate_up: outputs of gate_up_proj.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return activation_of(module)(gate) * up


@contextmanager
def torch_kernels(model: transformers.PreTrainedModel) -> Iterator[None]:
    """While entered, a model's linear attention runs in torch, whatever kernels are installed."""
    namespace = vars(sys.modules[type(model).__module__])
    with _needs("the gated delta rule in torch"):
        if missing := [name for name in _TORCH_FUNCTIONS if name not in namespace]:
            raise AttributeError(missing[0])
    before = {name: namespace[name] for name in _TORCH_FUNCTIONS}
    namespace.update({name: inspect.unwrap(function) for name, function in before.items()})
    try:
        yield
    finally:
        namespace.update(before)


def experts_of(layer: torch.nn.Module) -> torch.nn.Module | None:
    """The module that holds a layer's experts; None in a dense layer."""
    with _needs("the feed-forward part of a layer"):
        return getattr(layer.mlp, "experts", None)


def replace_experts(layer: torch.nn.Module, experts: torch.nn.Module) -> None:
    """Put another module in place of a layer's experts; it is called with the same arguments."""
    layer.mlp.experts = experts


def activation_of(experts: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation function of the experts' gate."""
    with _needs("the activation function of experts"):
        return experts.act_fn
