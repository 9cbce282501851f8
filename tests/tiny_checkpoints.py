"""Tiny but real Qwen3.5 checkpoints: the inputs every test and `make demo` quantize.

Each one is instantiated by transformers from a small config of the real class and saved by the
real `save_pretrained`, so names, shapes and config keys are those of a user's directory; only the
cut into files is ours. They differ, as real directories do, along these axes:

kind     class                               namespace                            MLP
-------  ----------------------------------  -----------------------------------  ------------
moe      Qwen3_5MoeForConditionalGeneration  model.language_model.* model.visual  experts
dense    Qwen3_5ForConditionalGeneration     model.language_model.* model.visual  one per layer
moe_text Qwen3_5MoeForCausalLM               model.layers.*                       experts
text     Qwen3_5ForCausalLM                  model.layers.*                       one per layer

experts  `fused`: `mlp.experts.gate_up_proj [E, 2I, H]` (gate is rows 0..I) and
         `mlp.experts.down_proj [E, H, I]`, without `.weight`. The official BF16 releases.
         `per_expert`: `mlp.experts.{e}.{gate,up,down}_proj.weight`. What `save_pretrained` writes
         by default, hence what most fine-tunes are.
files    one `model.safetensors`, or `model-0000i-of-0000n.safetensors` with an index; and two
         careless variants: shards without an index, and an index that misnames a single file.
dtype    BF16 throughout, or with F32 `A_log` and `linear_attn.norm`, or an F16 or F32 fine-tune.
mtp      the multi-token-prediction layer: present in releases, ignored by transformers, lost on
         `save_pretrained`. Its one decoder layer is always full attention.
tied     no `lm_head.weight` on disk: the head is the embedding.

Every fourth layer is full attention, the others are linear attention. head_dim, partial rotary
factor and M-RoPE sections are the official ones. Every Linear that gets quantized has dimensions
that are multiples of 128, unless an override says otherwise.
"""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedConfig, PreTrainedModel

MODEL_CLASSES: dict[str, str] = {
    "moe": "Qwen3_5MoeForConditionalGeneration",
    "dense": "Qwen3_5ForConditionalGeneration",
    "moe_text": "Qwen3_5MoeForCausalLM",
    "text": "Qwen3_5ForCausalLM",
}
TOKENS = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
TOKEN_ID = {f"<|{name}|>": 256 + i for i, name in enumerate(TOKENS)}  # 0..255 are the bytes

TEXT_SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
    "eos_token_id": TOKEN_ID["<|endoftext|>"],
    # Not transformers' own: official configs hold them, and engines read them.
    "attn_output_gate": True,
    "mamba_ssm_dtype": "float32",
}
DENSE_SIZES = {"intermediate_size": 512}
MOE_SIZES = {
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
VISION_SIZES = {
    "depth": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 2,
    "num_position_embeddings": 64,
}
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def build(
    path: Path,
    kind: str = "moe",
    *,
    experts: Literal["fused", "per_expert"] = "fused",
    shards: int = 1,
    index: bool | Literal["misnamed"] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    f32_extras: bool = False,
    mtp: bool = True,
    tied: bool = False,
    tokenizer: bool = False,
    seed: int = 0,
    std: float = 0.02,
    **text_overrides: Any,
) -> Path:
    """Write a tiny checkpoint directory and return its path.

    One seed gives the same weights in every layout: `experts`, `shards`, `index`, `f32_extras`,
    `mtp` and `tokenizer` change how they lie on disk, not what they are.

    Args:
        path: directory to write, created if need be.
        kind: a key of `MODEL_CLASSES`.
        experts: layout of the expert weights, in the decoder layers and in `mtp.layers.0`.
        shards: number of safetensors files.
        index: whether to write `model.safetensors.index.json`; None: if there are several shards.
            "misnamed": a single file's index names `model.safetensors-00001-of-00001.safetensors`.
        dtype: of every tensor and of the config.
        f32_extras: store `A_log` and `linear_attn.norm.weight` as F32, unrounded. transformers
            rounds both when it loads a BF16 directory, but not the norm of an FP8 one.
        mtp: add `mtp.*`.
        tied: tie `lm_head` to the embedding; there is no `lm_head.weight` then.
        tokenizer: add a byte-level tokenizer and a chat template.
        seed: of every random value.
        std: standard deviation of every weight matrix.
        text_overrides: keys of the text config, e.g. `num_experts=4`, `hidden_size=192`.

    Raises:
        FileExistsError: the directory already holds safetensors files.
        ValueError: an argument or override that names nothing real.
    """
    if kind not in MODEL_CLASSES or experts not in ("fused", "per_expert"):
        raise ValueError(f"there is no kind={kind!r} with experts={experts!r}")
    if index == "misnamed" and shards != 1:
        raise ValueError("index='misnamed' is a layout of a single file: it needs shards=1")
    if any(path.glob("*.safetensors")):
        raise FileExistsError(f"{path} already holds safetensors files: remove them first")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(kind, _config(kind, std, tied, mtp, text_overrides))
        extras = {
            name: tensor.clone()
            for name, tensor in model.state_dict().items()
            if f32_extras and name.endswith((".A_log", ".linear_attn.norm.weight"))
        }
        model.generation_config.eos_token_id = [TOKEN_ID["<|im_end|>"], TOKEN_ID["<|endoftext|>"]]
        state = _save_and_read(model.to(dtype), path, experts) | extras
        if mtp:
            state |= _mtp_state(model.config.get_text_config(), std, dtype, experts)
    _write_shards(path, state, shards, index)
    if tokenizer:
        _write_tokenizer(path)
    return path


def logits(path: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """Next-token logits of a checkpoint, F32 `[batch, seq, vocab]`, run by transformers on CPU.

    The model runs in the dtype its config names; FP8 weights are dequantized to it on loading.

    Refuses, by assertion, what transformers loads all the same: a directory that does not hold
    exactly the model's tensors (`mtp.*` aside; what is missing would be random), and FP8 weights
    with edge blocks (transformers 5.23 takes 192 rows in two blocks for 96 + 96, not 128 + 64).
    """
    config = transformers.AutoConfig.from_pretrained(path)
    if quantization := getattr(config, "quantization_config", None):
        quantization["dequantize"] = True  # the default without a GPU, but not with one
        for name, tensor in tensors(path).items():
            uneven = tensor.dtype == torch.float8_e4m3fn and any(n % 128 for n in tensor.shape)
            assert not uneven, f"{path}: {name} has edge blocks: transformers would misread it"
    vision_language = config.architectures[0].endswith("ForConditionalGeneration")
    auto = "AutoModelForImageTextToText" if vision_language else "AutoModelForCausalLM"
    model, info = getattr(transformers, auto).from_pretrained(
        path, config=config, dtype="auto", output_loading_info=True
    )
    info["unexpected_keys"] = {k for k in info["unexpected_keys"] if not k.startswith("mtp.")}
    assert not any(info.values()), f"{path}: not this model's tensors: {info}"
    with torch.no_grad():
        return model.eval()(input_ids=input_ids, use_cache=False).logits.float()


def mean_kl(reference_logits: torch.Tensor, other_logits: torch.Tensor) -> float:
    """Mean over tokens of KL(softmax(reference) || softmax(other)), in nats, in float64."""
    log_p = reference_logits.double().log_softmax(-1)
    log_q = other_logits.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file of a directory, whatever the index or config say."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        shard = load_file(file)
        assert not (twice := found.keys() & shard.keys()), f"{file}: stored twice: {sorted(twice)}"
        found |= shard
    return found


def _config(kind: str, std: float, tied: bool, mtp: bool, overrides: dict[str, Any]) -> PreTrainedConfig:
    """The config of a tiny model, such that the real class builds it and engines accept it."""
    config_class = getattr(transformers, MODEL_CLASSES[kind]).config_class
    text = TEXT_SIZES | (MOE_SIZES if kind.startswith("moe") else DENSE_SIZES)
    text |= {"initializer_range": std, "tie_word_embeddings": tied}
    text["mtp_num_hidden_layers"] = int(mtp)
    text_class = config_class.sub_configs.get("text_config", config_class)
    if unknown := [key for key in overrides if key not in text and not hasattr(text_class, key)]:
        raise ValueError(f"{text_class.__name__} has no {unknown}")
    text |= overrides
    if kind.endswith("text"):
        return config_class(**text)
    vision = {"out_hidden_size": text["hidden_size"], "initializer_range": std}
    return config_class(
        text_config=text,
        vision_config=VISION_SIZES | vision,
        tie_word_embeddings=tied,
        vision_start_token_id=TOKEN_ID["<|vision_start|>"],
        vision_end_token_id=TOKEN_ID["<|vision_end|>"],
        image_token_id=TOKEN_ID["<|image_pad|>"],
        video_token_id=TOKEN_ID["<|video_pad|>"],
    )


@torch.no_grad()
def _model(kind: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The model, in F32, with nothing left at the constants that transformers starts norms from.

    transformers has drawn A_log from its range and every matrix from N(0, initializer_range).
    """
    model = getattr(transformers, MODEL_CLASSES[kind])(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # exact zeros or ones would hide a lost one
            parameter += 0.1 * torch.randn_like(parameter)
        if name.endswith("conv1d.weight"):
            # At initializer_range its output vanishes under the gated norm's epsilon, and an error
            # in in_proj_qkv or in_proj_z would not reach the logits. 0.5 is 1 / sqrt(kernel size).
            parameter.normal_(0, 0.5)
    return model


def _mtp_state(
    text_config: PreTrainedConfig, std: float, dtype: torch.dtype, experts: str
) -> dict[str, torch.Tensor]:
    """`mtp.*`: decoder layer and last norm are those of a real one-layer full-attention model."""
    config = copy.deepcopy(text_config)
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    kind = "moe_text" if "moe" in config.model_type else "text"
    model = _model(kind, config).to(dtype)
    hidden = config.hidden_size
    state = {
        "mtp.fc.weight": std * torch.randn(hidden, 2 * hidden),
        "mtp.pre_fc_norm_embedding.weight": 0.1 * torch.randn(hidden),
        "mtp.pre_fc_norm_hidden.weight": 0.1 * torch.randn(hidden),
    }
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    with tempfile.TemporaryDirectory() as scratch:
        for name, tensor in _save_and_read(model, Path(scratch), experts).items():
            if name.startswith(("model.layers.", "model.norm.")):
                state["mtp." + name.removeprefix("model.")] = tensor
    return state


def _save_and_read(model: PreTrainedModel, path: Path, experts: str) -> dict[str, torch.Tensor]:
    """Let transformers write configs and weights into `path`, and take the weights back out."""
    model.save_pretrained(path, save_original_format=experts == "per_expert")
    state = tensors(path)
    (path / "model.safetensors").unlink()  # the tensors are mapped from it: never overwrite it
    return state


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10, as when transformers fills shards."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _write_shards(path: Path, state: dict[str, torch.Tensor], shards: int, index: bool | str | None) -> None:
    """Write the tensors into files of about equal size, and the index `build` was asked for."""
    if not 1 <= shards <= len(state):
        raise ValueError(f"shards={shards}: there are {len(state)} tensors to put into them")
    total_size = sum(tensor.nbytes for tensor in state.values())
    cuts: list[dict[str, torch.Tensor]] = [{}]
    written = 0
    for i, name in enumerate(sorted(state, key=_natural)):
        is_full = written >= total_size * len(cuts) / shards
        is_last_chance = len(state) - i <= shards - len(cuts)  # one tensor for each file left
        if cuts[-1] and len(cuts) < shards and (is_full or is_last_chance):
            cuts.append({})
        cuts[-1][name] = state[name]
        written += state[name].nbytes

    weight_map = {}
    for i, cut in enumerate(cuts, start=1):
        file = "model.safetensors" if shards == 1 else f"model-{i:05d}-of-{shards:05d}.safetensors"
        save_file(cut, path / file, metadata={"format": "pt"})
        named = "model.safetensors-00001-of-00001.safetensors" if index == "misnamed" else file
        weight_map |= dict.fromkeys(cut, named)
    if index or (index is None and shards > 1):
        content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (path / "model.safetensors.index.json").write_text(text)


def _write_tokenizer(path: Path) -> None:
    """A byte-level BPE without merges: one token per byte, and the special tokens of Qwen3.5."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(ByteLevel.alphabet()))} | TOKEN_ID
    tokenizer = transformers.Qwen3_5Tokenizer(
        vocab=vocab,
        merges=[],
        eos_token="<|im_end|>",
        extra_special_tokens=list(TOKEN_ID),
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(path)
