"""Whether engines take exactly those modules for BF16 that are: models of their matching of names.

`modules_to_not_convert` is one list, and each engine reads it in its own way. A BF16 module that an engine
does not find in it is loaded as FP8 with a scale that nobody set, mostly without an error; an FP8 module that
an entry matches by accident is loaded as BF16. So every plan is held against a model of each engine's rule,
written from its source:

vLLM 0.32.0   `is_layer_skipped` in vllm/model_executor/layers/quantization/utils/quant_utils.py, called by
              Fp8Config in quantization/fp8.py; names are first mapped by the model's `hf_to_vllm_mapper`
              (models/qwen3_vl.py, qwen3_5.py; qwen3_5_mtp.py has none)
SGLang 0.5.23 `is_layer_skipped` in sglang/srt/layers/quantization/utils.py, called by Fp8Config in
              quantization/fp8.py, which keeps every name with and without `model.`
transformers 5.23.0  `should_convert_module` in quantizers/quantizers_utils.py, after
              `_normalize_modules_to_not_convert` in quantizers/quantizer_finegrained_fp8.py

A vision-language checkpoint is looked at twice for transformers: AutoModelForCausalLM loads it as text only,
under other names.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fp8lib.checkpoint.headers import Tensor
from fp8lib.checkpoint.rules import fused_experts_part, module_of, one_expert_part
from fp8lib.checkpoint.untrusted import printable

Skips = Callable[[str], bool | None]
"""A module's name -> whether the engine takes it for BF16; None if it refuses to decide."""

_SHARDS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""`packed_modules_mapping` of both engines: a fused module -> the checkpoint's."""
_FUSED = {shard: fused for fused, shards in _SHARDS.items() for shard in shards}

_TEXT = (
    r"(?:.+\.)?layers\.\d+\.(?:self_attn\.[qkvo]_proj|linear_attn\.(?:in_proj_(?:qkv|z|a|b)|out_proj)|"
    r"mlp\.(?:shared_expert\.)?(?:gate|up|down)_proj|mlp\.experts)"
)
_VISION = (
    r"(?:.+\.)?visual\.(?:blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.linear_fc[12])|"
    r"(?:merger|deepstack_merger_list\.\d+)\.linear_fc[12])"
)
_PLAIN = re.compile(r"[\w.-]+")


@dataclass(frozen=True, slots=True)
class Loader:
    """How one engine builds the modules of a checkpoint.

    Attributes:
        engine: its name and version.
        can_be_fp8: checkpoint's names of modules that it can load as FP8; it has all others in BF16 only.
        absent: checkpoint's names of modules that it does not load.
        rename: a name of the checkpoint or of the list -> the engine's.
        matcher: the list, renamed -> what it skips.
        fuses: whether it loads several modules as one.
    """

    engine: str
    can_be_fp8: re.Pattern
    absent: re.Pattern
    rename: Callable[[str], str]
    matcher: Callable[[list[str]], Skips]
    fuses: bool = True

    def place(self, module: str) -> str:
        """The engine's module that holds a module of the checkpoint."""
        head, _, last = self.rename(module).rpartition(".")
        return f"{head}.{_FUSED[last]}" if self.fuses and last in _FUSED else self.rename(module)


def mismatches(tensors: Iterable[Tensor], config: dict) -> list[str]:
    """Modules that an engine would take for FP8 though they are not, or the reverse.

    Args:
        tensors: of the FP8 directory, from headers.
        config: its config.json.

    Returns:
        One line per engine and kind of mistake, the first module named; empty if all engines agree.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return []
    found, states = [], _states(tensors, config)
    for loader in loaders(config, states):
        listed = quantization.get("modules_to_not_convert")
        if not loader.engine.startswith("transformers"):
            listed = quantization.get("ignored_layers") or listed
        elif listed is None:
            listed = ["lm_head"]  # its default: the head and what is tied to it
        if not isinstance(listed, list | None) or not all(isinstance(name, str) for name in listed or []):
            return ["modules_to_not_convert in config.json is no list of names"]
        odd = [name for name in listed or [] if not _PLAIN.fullmatch(name)]
        if odd:
            return [
                f"modules_to_not_convert in config.json holds {printable(odd[0])!r}: vLLM and SGLang take it "
                "for a name, transformers for a regular expression; list full names"
            ]
        found += _compare(loader, states, listed or [])
    return list(dict.fromkeys(found))


def has_tied_head(config: dict) -> bool:
    """Whether the output head is the embedding, so that no tensor is called after it."""
    text = config.get("text_config")
    inner = isinstance(text, dict) and text.get("tie_word_embeddings")
    return bool(config.get("tie_word_embeddings", inner))


def is_text_only(config: dict) -> bool:
    """Whether engines load the class without a vision tower; `architectures` decides, then `model_type`."""
    named = config.get("architectures")
    if isinstance(named, list) and named:
        return str(named[0]).endswith("ForCausalLM")
    return str(config.get("model_type")).endswith("_text")


def _states(tensors: Iterable[Tensor], config: dict) -> dict[str, set[bool]]:
    """Module of the checkpoint -> {whether its weight is FP8}; of `….mlp.experts`, of all its experts."""
    states: dict[str, set[bool]] = defaultdict(set)
    for tensor in tensors:
        fp8 = tensor.dtype == "F8_E4M3"
        if part := fused_experts_part(tensor.name) or one_expert_part(tensor.name):
            states[part[0]].add(fp8)
        elif len(tensor.shape) >= 2 and (module := module_of(tensor.name)):
            states[module].add(fp8)
    if has_tied_head(config) and any(module.endswith("embed_tokens") for module in states):
        states["lm_head"].add(False)
    return states


def _compare(loader: Loader, states: Mapping[str, set[bool]], listed: list[str]) -> list[str]:
    """What one engine would get wrong, one line per kind of mistake."""
    entries = [loader.rename(name) for name in listed]
    skips = loader.matcher(entries)
    wrong: dict[str, list[str]] = defaultdict(list)
    placed: dict[str, set[bool]] = defaultdict(set)
    for module, fp8 in states.items():
        if loader.absent.fullmatch(module):
            continue
        if loader.can_be_fp8.fullmatch(module):
            placed[loader.place(module)] |= fp8
        elif True in fp8:
            wrong["FP8 in the files, but it loads them in BF16 only"].append(module)
    for name, fp8 in placed.items():
        skipped = skips(name)
        if len(fp8) == 2:
            wrong["FP8 in part: it loads each as one, or refuses it"].append(name)
        elif skipped is None:
            wrong["only in part in modules_to_not_convert: it refuses them"].append(name)
        elif skipped and True in fp8:
            by = next(n for n, e in zip(listed, entries, strict=True) if _touches(loader, e, name))
            wrong[f"FP8, but taken for BF16 because of {printable(by)}"].append(name)
        elif not skipped and False in fp8:
            wrong["BF16, but taken for FP8: they are not in modules_to_not_convert"].append(name)
    return [
        f"{loader.engine}: {printable(names[0])}{f' and {len(names) - 1} more' * (len(names) > 1)} "
        f"{'is' if len(names) == 1 else 'are'} {what}"
        for what, names in wrong.items()
    ]


def _touches(loader: Loader, entry: str, name: str) -> bool:
    """Whether one entry alone matches a module or a part of it."""
    return loader.matcher([entry])(name) is not False


# --- engines -----------------------------------------------------------------------------------


def loaders(config: dict, modules: Iterable[str]) -> list[Loader]:
    """Every way in which the engines load a checkpoint.

    SGLang is left out for text-only checkpoints whose names begin with `model.language_model.`: 0.5.23 finds
    none of their tensors, quantized or not (models/qwen3_5_text.py strips `model.` alone).
    """
    long_names = any(module.startswith("model.language_model.") for module in modules)
    text_only = is_text_only(config)
    nothing, visual = re.compile(r"(?!)"), re.compile(r"(?:.+\.)?visual\..+")
    draft = re.compile(r"mtp\..+")
    linear = re.compile(rf"(?:{_TEXT}|shared_expert_gate|{_VISION}|(?:.+\.)?shared_expert_gate|lm_head)")
    found = []
    if text_only:
        found.append(Loader("vLLM 0.32.0", re.compile(f"{_TEXT}|mtp.fc"), visual, _short, vllm_skips))
    else:
        found.append(
            Loader("vLLM 0.32.0", re.compile(f"{_TEXT}|{_VISION}|mtp.fc"), nothing, _vllm_name, vllm_skips)
        )
    if not (text_only and long_names):
        found.append(Loader("SGLang 0.5.23", re.compile(_TEXT), nothing, _same, sglang_skips))
    if not text_only:
        found.append(Loader("transformers 5.23.0", linear, draft, _same, transformers_skips, fuses=False))
    if text_only or long_names:
        unseen = re.compile(f"{draft.pattern}|{visual.pattern}")
        engine = "transformers 5.23.0, text only"
        found.append(Loader(engine, linear, unseen, _short, transformers_skips, fuses=False))
    return found


def _same(name: str) -> str:
    return name


def _short(name: str) -> str:
    """`hf_to_vllm_mapper` of Qwen3_5ForCausalLMBase, and transformers' conversion for the text models."""
    return re.sub(r"^model\.language_model\.", "model.", name)


def _vllm_name(name: str) -> str:
    """`hf_to_vllm_mapper` of Qwen3VLForConditionalGeneration.

    It maps prefixes that end in a dot, so the entry `lm_head` stays as it is; vLLM never quantizes the head.
    """
    for before, after in (
        ("model.visual.", "visual."),
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
    ):
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name


def vllm_skips(listed: list[str]) -> Skips:
    """vLLM 0.32.0: exact names; a fused name or all of its parts; experts by substring, the module's in the
    entry's. Parents, prefixes and patterns mean nothing.
    """
    exact, experts = set(listed), [name for name in listed if "experts" in name]

    def skips(module: str) -> bool | None:
        last = module.rpartition(".")[2]
        if last in _SHARDS:
            return module in exact or _agreed(module.replace(last, s) in exact for s in _SHARDS[last])
        if "experts" in module:
            return any(module in name for name in experts)
        return module in exact

    return skips


def sglang_skips(listed: list[str]) -> Skips:
    """SGLang 0.5.23: whole components anywhere in the name, with or without a leading `model.`, so parents
    match and `layers.0` matches below `mtp` too; all parts of a fused module; experts by substring as well.
    """
    both = [
        form
        for name in listed
        for form in (name.removeprefix("model."), f"model.{name.removeprefix('model.')}")
    ]
    known, experts = {name.rstrip(".") for name in both}, [name for name in both if "experts" in name]

    def matches(module: str) -> bool:
        parts = module.rstrip(".").split(".")
        count = len(parts)
        return any(".".join(parts[i:j]) in known for i in range(count) for j in range(i + 1, count + 1))

    def skips(module: str) -> bool | None:
        last = module.rpartition(".")[2]
        if last in _SHARDS:
            return _agreed(matches(module.replace(last, s)) for s in _SHARDS[last])
        return matches(module) or ("experts" in module and any(module in name for name in experts))

    return skips


def transformers_skips(listed: list[str]) -> Skips:
    """transformers 5.23.0: an entry as a regular expression from the beginning to the end of a component, or
    as a plain suffix. Entries are names here, so a dot is all that a regular expression sees in them.
    """
    suffixes = set(listed)
    pattern = re.compile(rf"(?:{'|'.join(listed)})(?:(?<=\.)|(?=\.|$))") if listed else re.compile(r"(?!)")

    def skips(module: str) -> bool:
        return bool(pattern.match(module)) or any(module[i:] in suffixes for i in range(len(module)))

    return skips


def _agreed(answers: Iterable[bool]) -> bool | None:
    """What all answers are; None if they differ, which both engines refuse."""
    distinct = set(answers)
    return distinct.pop() if len(distinct) == 1 else None
