"""Watches a transformers model run and records what its quantized weights are multiplied with.

Which weights: those of the plan, so the same rules decide here and in the quantizer.

Linear modules have forward pre-hooks. The experts of a layer are two 3-D parameters of one module, and
transformers has several implementations of that module's forward. While a `Recorder` is entered, every one
is wrapped (`model.internals`): the wrapper records, then calls the implementation it wraps with the very
arguments it got. The model's outputs are bit-identical by construction, whichever implementation is
configured and whenever transformers switches to another; and, unlike in a hook, weights that accelerate
keeps elsewhere have arrived. What an implementation computes inside, the input of down_proj, is computed a
second time, for the statistics alone. That costs two thirds of the experts' arithmetic once more and owes
nothing to how the implementation orders its rows.

Everything accumulates where the activations are, and padding is left out by an index that is made on the
host, once per forward pass. So no call waits for the device, with one exception: `grouped_mm`, which computes
the input of down_proj, reads on the host how many tokens each expert got, once per layer and pass, unless the
device is of compute capability 9 or 10 (Hopper and the Blackwell of data centres) and all is BF16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fp8lib import Fp8Error
from fp8lib.calibration.input_statistics import InputStatistics, Sums, down_input, input_of
from fp8lib.checkpoint.plan import Plan
from fp8lib.checkpoint.rules import canonical
from fp8lib.checkpoint.untrusted import printable
from fp8lib.model import internals
from fp8lib.streaming.devices import copy_without_waiting

if TYPE_CHECKING:
    from fp8lib.calibration.second_moments import MomentSums


class Recorder:
    """Records the input of every weight a plan quantizes, in the modules it is attached to.

    Use as a context manager: experts are recorded while it is entered.

    Args:
        plan: what is to be quantized.
        moments: where second moments are summed, too; None for none.
    """

    def __init__(self, plan: Plan, moments: MomentSums | None = None) -> None:
        self._moments = moments
        # Canonical name of a module -> its input; of the module that holds a layer's experts -> theirs.
        self._linear: dict[str, str] = {}
        self._experts: dict[str, str] = {}
        for matrix in plan.matrices:
            name, expert = input_of(matrix.weight.name)
            if expert is None:
                self._linear[canonical(matrix.weight.name)] = name
            elif name.endswith(".experts"):
                self._experts[canonical(name)] = name
        self._hooks: list = []
        self._watched: dict[torch.nn.Module, str] = {}
        self._sums: dict[str, Sums] = {}
        self._finite: dict[str, torch.Tensor] = {}  # where -> whether all was finite, on its device
        self._kept: torch.Tensor | None = None
        self._kept_on: dict[torch.device, torch.Tensor] = {}
        self._wrapped = internals.around_experts(self._recording)

    def __enter__(self) -> Recorder:
        self._wrapped.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()
        self._wrapped.__exit__(*exception)

    def attach(self, root: torch.nn.Module, name: str = "") -> None:
        """Watch every module at and below `root`, which is called `name` in the model."""
        recorded = set()
        for path, module in root.named_modules(prefix=name):
            known = canonical(path)
            if known in self._experts:
                self._watched[module] = self._experts[known]
            elif (group := self._linear.get(known)) and group not in recorded:
                recorded.add(group)  # by the first of the modules that share the input
                self._hooks.append(module.register_forward_pre_hook(self._linear_hook(group)))
            elif known.startswith("layers.") and known.count(".") == 1:
                self._watch_layer(module, path)

    def detach(self) -> None:
        """Watch nothing any more; what was recorded stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._watched.clear()

    def look_at(self, mask: torch.Tensor) -> None:
        """Say which tokens of the next forward pass count.

        Args:
            mask: bool [prompts, tokens] on the host, False for padding.
        """
        self._kept = None if bool(mask.all()) else mask.flatten().nonzero().flatten()
        self._kept_on.clear()

    def check_finite(self) -> None:
        """Wait for the device, and refuse a model that computes NaN or infinity.

        Raises:
            Fp8Error: names the first layer that put them out.
        """
        for where, finite in self._finite.items():
            if not bool(finite):
                raise _not_finite(where)

    def take(self) -> dict[str, InputStatistics]:
        """Statistics recorded since the last call, by input; the device's memory is given back.

        Raises:
            Fp8Error: activations are not finite.
        """
        self.check_finite()
        taken = {}
        for name in list(self._sums):
            taken[name] = self._sums.pop(name).result()
            if not taken[name].is_finite():
                raise _not_finite(name)
        return taken

    # --- what is seen --------------------------------------------------------------------------

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        """[..., channels] of all tokens of the pass -> [tokens that count, channels]."""
        tokens = x.detach().reshape(-1, x.shape[-1])
        if self._kept is None:
            return tokens
        if x.device not in self._kept_on:
            self._kept_on[x.device] = copy_without_waiting(self._kept, x.device)
        return tokens.index_select(0, self._kept_on[x.device])

    def _input(self, name: str, groups: int, tokens: torch.Tensor) -> Sums:
        if name not in self._sums:
            self._sums[name] = Sums(groups, tokens.shape[1], tokens.device)
        return self._sums[name]

    def _linear_hook(self, name: str) -> Callable:
        def hook(_module: torch.nn.Module, args: tuple) -> None:
            tokens = self._tokens(args[0])
            self._input(name, 1, tokens).add(tokens)
            if self._moments is not None:
                self._moments.add(name, tokens)

        return hook

    def _recording(self, implementation: internals.ExpertsForward) -> internals.ExpertsForward:
        def forward(module, hidden_states, top_k_index, top_k_weights):
            if module in self._watched:
                with torch.no_grad():
                    self._record_experts(module, self._tokens(hidden_states), self._tokens(top_k_index))
            return implementation(module, hidden_states, top_k_index, top_k_weights)

        return forward

    def _record_experts(self, module: torch.nn.Module, hidden: torch.Tensor, experts: torch.Tensor) -> None:
        """Record the hidden states that each expert gets, and what it makes of them.

        Args:
            module: holds the experts' weights.
            hidden: [tokens, channels].
            experts: [tokens, experts per token].
        """
        name, count = self._watched[module], module.num_experts
        expert, order = experts.flatten().sort()
        routed = hidden[order // experts.shape[1]]
        came = self._input(name, count, routed).add_grouped(routed, expert)
        inner = internals.gated(module, _grouped_linear(routed, module.gate_up_proj, came.cumsum(0)))
        self._input(down_input(name), count, inner).add_grouped(inner, expert)
        if self._moments is not None:
            self._moments.add(name, hidden)
            self._moments.add_grouped(down_input(name), inner, came)

    # --- what is broken ------------------------------------------------------------------------

    def _watch_layer(self, layer: torch.nn.Module, name: str) -> None:
        def before(_module: torch.nn.Module, args: tuple) -> None:
            self._note_finite("embed_tokens", args[0])

        def after(_module: torch.nn.Module, _args: tuple, output: torch.Tensor | tuple) -> None:
            self._note_finite(name, output if isinstance(output, torch.Tensor) else output[0])

        if canonical(name) == "layers.0":
            self._hooks.append(layer.register_forward_pre_hook(before))
        self._hooks.append(layer.register_forward_hook(after))

    def _note_finite(self, where: str, x: torch.Tensor) -> None:
        finite = self._tokens(x).isfinite().all()
        self._finite[where] = self._finite[where] & finite if where in self._finite else finite


def _not_finite(where: str) -> Fp8Error:
    return Fp8Error(
        f"{printable(where)}: NaN or infinite activations, so the BF16 model itself is broken; "
        "check the download or the fine-tune"
    )


def _grouped_linear(tokens: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Each group of tokens times its own matrix.

    Args:
        tokens: [n, channels], those of a group together.
        weights: [groups, outputs, channels].
        ends: [groups], the row behind each group's last.
    """
    if hasattr(torch.nn.functional, "grouped_mm"):  # torch 2.10
        return torch.nn.functional.grouped_mm(tokens, weights.transpose(1, 2), offs=ends.int())
    outputs, start = [], 0
    for group, end in enumerate(ends.tolist()):  # waits for the device: older torch has nothing better
        outputs.append(torch.nn.functional.linear(tokens[start:end], weights[group]))
        start = end
    return torch.cat(outputs)
