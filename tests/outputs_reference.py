"""An independent computation of what `--compare_outputs` reports: whole models, dense logits, plain loops.

Nothing of `fp8lib` is used: weights are read with safetensors and dequantized block by block, models are
transformers' own with all weights in memory, values are rounded to E4M3 by looking them up.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

import e4m3_reference


def nearest(x: torch.Tensor) -> torch.Tensor:
    """The nearest E4M3 values, float64."""
    return torch.from_numpy(e4m3_reference.nearest(x.double().numpy()))


def rounded_activations(x: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    """Per token and 128 channels, scale amax / 448 in float32, as engines do; of the dtype of x."""
    groups = x.float().unflatten(-1, (-1, 128))
    amax = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10)
    scale = amax * torch.tensor(1 / 448)
    if power_of_two:
        scale = 2.0 ** scale.double().log2().ceil().float()
    quotient = (groups / scale).double().clamp(-448, 448)
    return (nearest(quotient) * scale.double()).flatten(-2).to(x.dtype)


def dequantized(path: Path, *, requantize: bool = False) -> tuple[dict[str, torch.Tensor], set[str]]:
    """(every tensor of a directory in float64, names of those that are FP8)."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        state |= load_file(file)
    fp8 = {name for name, tensor in state.items() if tensor.dtype == torch.float8_e4m3fn}
    found = {}
    for name, tensor in state.items():
        if name.removesuffix("_scale_inv") in fp8 and name not in fp8:
            continue
        values = tensor.double()
        if name in fp8:
            for i, row in enumerate(state[f"{name}_scale_inv"].double()):
                for j, scale in enumerate(row):
                    block = values[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
                    block *= scale
                    if requantize:
                        power = 2.0 ** (block.abs().max().clamp(min=1e-4) / 448).log2().ceil()
                        block.copy_(nearest(block / power) * power)
        found[name] = values
    return found, fp8


@torch.no_grad()
def model_of(
    path: Path,
    original: Path,
    serving: Callable[[torch.Tensor], torch.Tensor] | None,
    requantize: bool = False,
) -> torch.nn.Module:
    """transformers' whole model in float64 with a directory's weights.

    Args:
        path: the directory.
        original: the BF16 checkpoint it was made from.
        serving: rounds the inputs of FP8 modules; None leaves them.
        requantize: give FP8 weights power-of-two scales first.
    """
    config = transformers.AutoConfig.from_pretrained(original).get_text_config()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    model.set_experts_implementation("eager")
    state, fp8 = dequantized(path, requantize=requantize)
    short = {_short(name): tensor for name, tensor in state.items() if not name.startswith("mtp.")}
    rounded = {_short(name) for name in fp8}
    for name, parameter in model.named_parameters():
        name = _short(name)
        if name in short:
            parameter.copy_(short[name])
        elif name == "lm_head.weight":
            parameter.copy_(short["embed_tokens.weight"])
        else:  # experts, one by one
            _fill_experts(parameter, name, short)
    for name, module in model.named_modules():
        if serving is None:
            break
        if f"{_short(name)}.weight" in rounded:
            module.register_forward_pre_hook(lambda _, args: (serving(args[0]), *args[1:]))
        elif name.endswith("mlp.experts") and f"{_short(name)}.0.down_proj.weight" in rounded:
            module.forward = lambda *args, module=module: _experts(module, serving, *args)
    return model


def _short(name: str) -> str:
    return name.replace("model.", "").replace("language_", "")


def _fill_experts(parameter: torch.Tensor, name: str, state: dict[str, torch.Tensor]) -> None:
    prefix = name.rpartition(".")[0]
    for e, weight in enumerate(parameter):
        if name.endswith("down_proj"):
            weight.copy_(state[f"{prefix}.{e}.down_proj.weight"])
        else:
            parts = [state[f"{prefix}.{e}.{p}_proj.weight"] for p in ("gate", "up")]
            weight.copy_(torch.cat(parts))


def _experts(module, serving, hidden, chosen, weights) -> torch.Tensor:
    """Every expert on every token; who is not chosen counts for nothing."""
    total = torch.zeros_like(hidden)
    rounded = serving(hidden)
    for expert, (gate_up, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
        gate, up = (rounded @ gate_up.T).chunk(2, -1)
        share = (weights * (chosen == expert)).sum(-1, keepdim=True)
        total += share * (serving(torch.nn.functional.silu(gate) * up) @ down.T)
    return total


@torch.no_grad()
def logits(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    """float64 [tokens, vocabulary]."""
    return model(torch.tensor([prompt]), use_cache=False).logits[0]


def kl(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL divergence at every position, nats."""
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
