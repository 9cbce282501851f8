"""Whether config.json describes the tensors that lie beside it, before a model is built by it.

Quantizing does not ask: it follows the tensors. A forward pass follows config.json, and what it makes of a
wrong one is a library's error deep inside a layer, or an hour of building layers that are not there.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator

from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import CONFIG, Checkpoint
from fp8lib.checkpoint.headers import Tensor
from fp8lib.checkpoint.rules import fused_experts_part, one_expert_part, without_prefix
from fp8lib.checkpoint.untrusted import printable, read_json

GENERATION_CONFIG = "generation_config.json"
_LAYER = re.compile(r"layers\.(\d{1,9})\.([^.]+)")
_KINDS = {"self_attn": "full_attention", "linear_attn": "linear_attention"}
_RHYTHM = 4
"""Every so many layers one is full attention, where config.json has no `layer_types` and no interval."""


def check_config(checkpoint: Checkpoint) -> None:
    """Refuse a config.json, or a generation_config.json, that cannot be that of the tensors.

    Raises:
        Fp8Error: names the file, the key, its value and what the tensors say.
    """
    text = checkpoint.config.get("text_config")
    text = text if isinstance(text, dict) else checkpoint.config
    tensors = {without_prefix(t.name): t for shard in checkpoint.shards for t in shard.tensors}
    for problem in _problems(text, tensors):
        raise Fp8Error(f"{printable(checkpoint.root / CONFIG)}: {problem}")
    sections = [(CONFIG, checkpoint.config), (CONFIG, text)]
    if os.path.lexists(checkpoint.root / GENERATION_CONFIG):
        sections.append((GENERATION_CONFIG, read_json(checkpoint.root / GENERATION_CONFIG)))
    for name, section in sections:
        where = printable(checkpoint.root / name)
        if not isinstance(section, dict):
            raise Fp8Error(f"{where}: not a JSON object")
        if problem := _problem_of_end(section.get("eos_token_id")):
            raise Fp8Error(f"{where}: {problem}")


def _problems(text: dict, tensors: dict[str, Tensor]) -> Iterator[str]:
    kinds: dict[int, str | None] = defaultdict(lambda: None)
    for name in tensors:
        if match := _LAYER.match(name):
            kinds[int(match[1])] = _KINDS.get(match[2]) or kinds[int(match[1])]
    count = text.get("num_hidden_layers")
    if type(count) is not int or count < 1:
        yield f"num_hidden_layers is {_shown(count)}, not a number from 1 on"
    if kinds.keys() != set(range(min(count, len(kinds) + 1))) or count != len(kinds):
        yield (
            f"num_hidden_layers is {count:,}, but the tensors are of {len(kinds):,} layers; repair it, or "
            "complete the checkpoint"
        )
    yield from _problems_of_rhythm(text, kinds, count)
    yield from _problems_of_experts(text, tensors)


def _problems_of_rhythm(text: dict, kinds: dict[int, str | None], count: int) -> Iterator[str]:
    listed = text.get("layer_types")
    if listed is not None and not (isinstance(listed, list) and len(listed) == count):
        yield f"layer_types is not a list of num_hidden_layers, {count}, kinds"
    interval = text.get("full_attention_interval") or _RHYTHM
    if listed is None and (type(interval) is not int or interval < 1):
        yield f"full_attention_interval is {_shown(interval)}, not a number from 1 on"
    for layer in range(count):
        says = listed[layer] if listed else _KINDS["linear_attn" if (layer + 1) % interval else "self_attn"]
        if kinds[layer] is not None and says != kinds[layer]:
            yield f"layer {layer} is {_shown(says)} by it, but {kinds[layer]} by its tensors; repair it"


def _problems_of_experts(text: dict, tensors: dict[str, Tensor]) -> Iterator[str]:
    found = 0
    for name, tensor in tensors.items():
        if not name.startswith("layers."):
            continue
        if fused_experts_part(name) and tensor.shape:
            found = max(found, tensor.shape[0])
        elif part := one_expert_part(name):
            found = max(found, part[1] + 1)
    if not found:
        return
    count, used = text.get("num_experts"), text.get("num_experts_per_tok")
    if count != found or type(count) is not int:
        yield f"num_experts is {_shown(count)}, but the tensors are of {found:,}; repair it"
    if type(used) is not int or not 1 <= used <= found:
        yield f"num_experts_per_tok is {_shown(used)}, not a number from 1 to num_experts, {found:,}"


def _problem_of_end(value: object) -> str | None:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if all(type(v) is int and v >= 0 for v in values):
        return None
    return f"eos_token_id is {_shown(value)}, neither a token's number nor a list of them"


def _shown(value: object) -> str:
    return printable(repr(value)[:80])
