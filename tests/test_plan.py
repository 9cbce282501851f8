"""What a plan decides, against a table written here, on checkpoints that are headers alone.

A header of a few lines is a checkpoint of any size: the files have holes for data, and no plan reads any.
So every member of every group that engines fuse can be spoiled in every way, in milliseconds each.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fp8lib import Fp8Error
from fp8lib.checkpoint.directory import open_checkpoint
from fp8lib.checkpoint.headers import read_shard
from fp8lib.checkpoint.plan import Plan, make_plan
from fp8lib.checkpoint.rules import fused_experts_part, fusion_group, one_expert_part

ITEM_SIZE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1}
ITEM_SIZE |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0"), 1)
Entries = dict[str, tuple[str, tuple[int, ...]]]
"""name -> (dtype, shape)."""


def write(
    folder: Path, entries: Entries, config: dict | None = None, file: str = "model.safetensors"
) -> Path:
    """A checkpoint directory of these tensors, whose data is a hole."""
    folder.mkdir(exist_ok=True)
    header, end = {}, 0
    for name, (dtype, shape) in entries.items():
        size = ITEM_SIZE[dtype]
        for extent in shape:
            size *= extent
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / file).open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5", **(config or {})}))
    return folder


def plan_of(folder: Path, entries: Entries, config: dict | None = None) -> Plan:
    return make_plan(open_checkpoint(write(folder, entries, config)))


def quantized(plan: Plan) -> set[str]:
    return {matrix.weight.name for matrix in plan.matrices}


def kept(plan: Plan) -> set[str]:
    return {k.tensor.name for k in plan.kept}


# --- groups ------------------------------------------------------------------------------------

GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "qkvz": ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""What engines load as one parameter: vLLM's packed_modules_mapping of Qwen3.5, and single modules."""
ALONE = ("o", "down")
"""Groups of one row-parallel module, whose last block of rows may be partial."""
SPOILED = {
    "64 rows": (64, 256),
    "64 columns": (256, 64),
    "127 rows": (127, 256),
    "192 columns": (256, 192),
    "192 rows": (192, 256),
    "one dimension": (256,),
    "three dimensions": (2, 256, 256),
}
PREFIXES = ("model.language_model.layers.0", "model.layers.11", "mtp.layers.0", "layers.3")


def layer(prefix: str) -> Entries:
    return {f"{prefix}.{m}.weight": ("BF16", (256, 256)) for members in GROUPS.values() for m in members}


def test_a_servable_layer_is_quantized_whole_under_every_prefix(tmp_path: Path) -> None:
    entries = {name: entry for prefix in PREFIXES for name, entry in layer(prefix).items()}
    plan = plan_of(tmp_path, entries)
    assert quantized(plan) == entries.keys()
    assert plan.modules_to_not_convert == ()


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize(
    ("group", "member"), [(group, member) for group, members in GROUPS.items() for member in members]
)
def test_one_member_that_engines_cannot_serve_keeps_its_group_and_nothing_else(
    group: str, member: str, how: str, tmp_path: Path
) -> None:
    spoiled, sound = PREFIXES[0], PREFIXES[0].replace("0", "1")
    entries = layer(spoiled) | layer(sound)
    entries[f"{spoiled}.{member}.weight"] = ("BF16", SPOILED[how])
    if how == "one dimension" and group not in ALONE:
        # It is no Linear and cannot be listed, so vLLM would take the rest of its parameter for FP8.
        with pytest.raises(Fp8Error, match=r"only in part in modules_to_not_convert"):
            plan_of(tmp_path, entries)
        return
    plan = plan_of(tmp_path, entries)
    partial_rows = how == "192 rows" and group in ALONE
    expected = set() if partial_rows else {f"{spoiled}.{m}" for m in GROUPS[group]}
    assert kept(plan) == {f"{module}.weight" for module in expected}
    assert quantized(plan) == entries.keys() - kept(plan)
    # A module with a one-dimensional weight is no Linear, and engines ask about Linears only.
    listed = {m for m in expected if len(entries[f"{m}.weight"][1]) > 1}
    assert set(plan.modules_to_not_convert) == listed


EXPERTS = {"64 rows": (64, 256), "192 rows": (192, 256), "64 columns": (256, 64), "192 columns": (256, 192)}
"""(rows of gate and up, their columns); down is the other way round."""


def experts(prefix: str, rows: int, columns: int, fused: bool, count: int = 3) -> Entries:
    if fused:
        return {
            f"{prefix}.mlp.experts.gate_up_proj": ("BF16", (count, 2 * rows, columns)),
            f"{prefix}.mlp.experts.down_proj": ("BF16", (count, columns, rows)),
        }
    tall, wide = ("BF16", (rows, columns)), ("BF16", (columns, rows))
    parts = {"gate_proj": tall, "up_proj": tall, "down_proj": wide}
    return {f"{prefix}.mlp.experts.{e}.{p}.weight": entry for e in range(count) for p, entry in parts.items()}


def single_experts(prefix: str, count: int = 3) -> set[str]:
    return set(experts(prefix, 128, 128, fused=False, count=count))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "per expert"])
@pytest.mark.parametrize(("rows", "columns"), EXPERTS.values(), ids=EXPERTS)
def test_experts_that_engines_cannot_serve_stay_as_they_are_in_their_layer_alone(
    rows: int, columns: int, fused: bool, tmp_path: Path
) -> None:
    spoiled, sound = PREFIXES[0], PREFIXES[0].replace("0", "1")
    odd = experts(spoiled, rows, columns, fused)
    entries = layer(spoiled) | odd | experts(sound, 256, 128, fused)
    plan = plan_of(tmp_path, entries)
    assert kept(plan) == odd.keys()
    assert quantized(plan) == layer(spoiled).keys() | single_experts(sound)
    # One entry for all experts: it is a prefix for vLLM and transformers, a part of each name for SGLang.
    assert plan.modules_to_not_convert == (f"{spoiled}.mlp.experts",)


# --- names -------------------------------------------------------------------------------------

LOOK_ALIKES = (
    "model.visual.layers.0.self_attn.q_proj.weight",
    "model.visual.layers.0.mlp.gate_proj.weight",
    "model.visual.layers.0.mlp.experts.0.gate_proj.weight",
    "model.visual.layers.0.mlp.experts.gate_up_proj",
    "model.visual.blocks.0.mlp.down_proj.weight",
    "visual.layers.0.mlp.down_proj.weight",
    "visual.layers.0.mlp.experts.down_proj",
    "model.layers.0.visual.layers.0.mlp.up_proj.weight",
    "model.sublayers.0.mlp.gate_proj.weight",
    "model.layers.mlp.gate_proj.weight",
    "model.layers.x.mlp.gate_proj.weight",
    "model.layers.0.cross.self_attn.q_proj.weight",
    "model.layers.0.self_attn.qkv_proj.weight",
    "model.layers.0.self_attn.q_proj.weight.old",
    "model.layers.0.self_attn.q_proj.lora.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.mlp.shared_expert_gate.weight",
    "model.layers.0.mlp.experts.x.gate_proj.weight",
    "model.layers.0.mlp.experts.0.gate_proj.bias",
    "model.layers.0.mlp.experts.gate_up_proj.weight",
    "model.layers.0.linear_attn.in_proj_a.weight",
    "model.layers.0.linear_attn.in_proj_ba.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
    "mtp.fc.weight",
)


BESIDE = (*GROUPS.values(), ("linear_attn.in_proj_a", "linear_attn.in_proj_b"))


def with_partners(name: str) -> set[str]:
    """A weight and those that engines load into one parameter with it: they must be kept together."""
    for members in BESIDE:
        for member in members:
            if name.endswith(f".{member}.weight"):
                return {f"{name.removesuffix(f'{member}.weight')}{other}.weight" for other in members}
    return {name}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_name_that_only_looks_like_a_quantized_one_is_kept(name: str, tmp_path: Path) -> None:
    shape = (2, 256, 256) if name.endswith(("gate_up_proj", "experts.down_proj")) else (256, 256)
    names = with_partners(name)
    plan = plan_of(tmp_path, dict.fromkeys(names, ("BF16", shape)) | layer("model.layers.7"))
    assert kept(plan) == names
    assert quantized(plan) == layer("model.layers.7").keys()
    listed = {each.removesuffix(".weight") for each in names if each.endswith(".weight")}
    assert set(plan.modules_to_not_convert) == listed
    # Calibration, which asks the rules about names alone, sees nothing to record in it.
    assert (fusion_group(name), fused_experts_part(name), one_expert_part(name)) == (None, None, None)


def test_modules_of_the_official_set_are_kept_whole_by_default(tmp_path: Path) -> None:
    shared = {f"model.layers.0.mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")}
    names = {"model.layers.0.linear_attn.out_proj.weight", *shared}
    plan = plan_of(tmp_path, dict.fromkeys(names, ("BF16", (256, 256))) | layer("model.layers.7"))
    assert kept(plan) == names
    assert set(plan.modules_to_not_convert) == {name.removesuffix(".weight") for name in names}
    assert all(fusion_group(name) for name in names)  # calibration records their inputs for the other set


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True),
        ({"text_config": {}}, False),
        ({}, False),
    ],
)
def test_a_tied_head_is_listed_like_the_embedding_it_is(config: dict, tied: bool, tmp_path: Path) -> None:
    entries = {"model.embed_tokens.weight": ("BF16", (512, 256))} | layer("model.layers.0")
    listed = plan_of(tmp_path, entries, config).modules_to_not_convert
    assert set(listed) == {"model.embed_tokens"} | ({"lm_head"} if tied else set())


# --- where bytes lie ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_output_tensor_says_which_input_bytes_it_is_made_of(dtype: str, tmp_path: Path) -> None:
    """Sources cover the input's bytes of each tensor once, gate before up, expert after expert."""
    size = ITEM_SIZE[dtype]
    fused = {name: (dtype, shape) for name, (_, shape) in experts("layers.0", 128, 256, True).items()}
    entries = (
        {"a.norm.weight": (dtype, (3,))} | fused | {"layers.0.mlp.down_proj.weight": (dtype, (192, 256))}
    )
    plan = plan_of(tmp_path, entries)
    start_of = {t.name: t.start for t in plan.checkpoint.shards[0].tensors}
    gate_up, down = (start_of[f"layers.0.mlp.experts.{p}"] for p in ("gate_up_proj", "down_proj"))
    matrix = 128 * 256 * size
    expected = {"layers.0.mlp.down_proj.weight": (start_of["layers.0.mlp.down_proj.weight"], 192, 256)}
    for e in range(3):
        one = f"layers.0.mlp.experts.{e}"
        expected[f"{one}.gate_proj.weight"] = (gate_up + 2 * e * matrix, 128, 256)
        expected[f"{one}.up_proj.weight"] = (gate_up + (2 * e + 1) * matrix, 128, 256)
        expected[f"{one}.down_proj.weight"] = (down + e * matrix, 256, 128)
    assert {m.weight.name: (m.start, m.rows, m.columns) for m in plan.matrices} == expected
    assert {m.dtype for m in plan.matrices} == {dtype}
    assert all(m.input_row_bytes == m.columns * size for m in plan.matrices)
    assert [(p.start, p.output.nbytes) for p in plan.shards[0].passthrough] == [
        (start_of["a.norm.weight"], 3 * size)
    ]


def test_the_output_is_in_the_order_of_the_input_within_four_stretches(tmp_path: Path) -> None:
    """Kept tensors by element size, FP8 weights, scales, kept bytes; so both files are read front to back."""
    entries = {
        "b.flags": ("BOOL", (5,)),
        "a.half": ("BF16", (3,)),
        "layers.1.mlp.down_proj.weight": ("BF16", (192, 128)),
        "d.single": ("F32", (5,)),
        "layers.0.mlp.down_proj.weight": ("F32", (128, 128)),
        "c.counts": ("I64", (1,)),
        "a.bytes": ("U8", (2,)),
        "e.double": ("F64", (1,)),
        "z.half": ("F16", (1,)),
    }
    (shard,) = plan_of(tmp_path, entries).shards
    outputs = list(shard.outputs())
    weights = ["layers.1.mlp.down_proj.weight", "layers.0.mlp.down_proj.weight"]
    assert [o.name for o in outputs] == [
        "c.counts", "e.double", "d.single", "a.half", "z.half",
        *weights, *(f"{name}_scale_inv" for name in weights), "b.flags", "a.bytes",
    ]  # fmt: skip
    end = len(shard.header)
    for output in outputs:
        assert output.start == end
        end += output.nbytes
    assert end == shard.size
    # What was planned is what a header says that is read back by the same rules as any input's.
    path = tmp_path / "written.safetensors"
    path.write_bytes(shard.header)
    with path.open("r+b") as file:
        file.truncate(shard.size)
    assert read_shard(path).tensors == tuple(outputs)


@pytest.mark.parametrize("longer", range(8))
def test_whatever_the_headers_length_data_begins_aligned_and_fp8_on_a_page(
    longer: int, tmp_path: Path
) -> None:
    entries = {"n" * (1 + longer): ("F32", (2,))} | layer("layers.0")
    plan = plan_of(tmp_path, entries)
    outputs = list(plan.shards[0].outputs())
    assert outputs[0].start == len(plan.shards[0].header)
    assert outputs[0].start % 8 == 0  # as the safetensors library writes it
    assert (outputs[1].dtype, outputs[1].start % 4096) == ("F8_E4M3", 0)
    kept_only = write(tmp_path / "kept", {"n" * (1 + longer): ("BF16", (3,))}, file="a.safetensors")
    write(kept_only, layer("layers.0"), file="b.safetensors")
    shard = make_plan(open_checkpoint(kept_only)).shards[0]
    assert next(shard.outputs()).start % 8 == 0


@pytest.mark.parametrize("tensor", range(3))
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("by", [-2, 2])
def test_tensors_must_lie_side_by_side_from_the_first_byte_to_the_last(
    by: int, side: int, tensor: int, tmp_path: Path
) -> None:
    path = write(tmp_path, dict.fromkeys("abc", ("BF16", (4,)))) / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    entry = list(header.values())[tensor]
    entry["data_offsets"][side] += by
    entry["shape"] = [(entry["data_offsets"][1] - entry["data_offsets"][0]) // 2]  # true to the offsets
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(Fp8Error, match=r"overlaps|a hole|describes|valid"):
        read_shard(path)


# --- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F64", "I64", "U8", "BOOL", "F8_E5M2"])
def test_a_weight_of_another_dtype_is_refused_by_name(dtype: str, tmp_path: Path) -> None:

    entries = layer("layers.0")
    entries["layers.0.mlp.up_proj.weight"] = (dtype, (256, 256))
    with pytest.raises(Fp8Error, match=r"layers\.0\.mlp\.up_proj\.weight: "):
        plan_of(tmp_path, entries)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_tensor_that_the_output_would_hold_twice_is_refused(shards: int, tmp_path: Path) -> None:
    """Such as the scales that an interrupted conversion by another tool has left."""
    name = "layers.0.mlp.down_proj.weight_scale_inv"
    stale = {name: ("BF16", (2, 2))}
    if shards == 1:
        folder = write(tmp_path / "in", layer("layers.0") | stale)
    else:
        write(tmp_path / "in", layer("layers.0"), file="a.safetensors")
        folder = write(tmp_path / "in", stale, file="b.safetensors")
    with pytest.raises(Fp8Error, match=f"{name}: the output would hold it twice"):
        make_plan(open_checkpoint(folder))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_any_8_bit_float_is_refused_also_where_it_would_be_kept(dtype: str, tmp_path: Path) -> None:
    entries = layer("layers.0") | {"lm_head.weight": (dtype, (256, 256))}
    with pytest.raises(Fp8Error, match=r"lm_head\.weight: .*already quantized"):
        plan_of(tmp_path, entries)


def _without(name: str) -> Callable[[Entries], object]:
    return lambda entries: entries.pop(name)


E = "layers.0.mlp.experts"
MISFITS: dict[str, tuple[bool, Callable[[Entries], object]]] = {
    "another number of experts below": (
        True,
        lambda e: e.update({f"{E}.down_proj": ("BF16", (4, 128, 256))}),
    ),
    "down of another width": (True, lambda e: e.update({f"{E}.down_proj": ("BF16", (3, 128, 128))})),
    "down of another height": (True, lambda e: e.update({f"{E}.down_proj": ("BF16", (3, 256, 256))})),
    "no down": (True, _without(f"{E}.down_proj")),
    "no gate and up": (True, _without(f"{E}.gate_up_proj")),
    "an odd number of rows": (True, lambda e: e.update({f"{E}.gate_up_proj": ("BF16", (3, 513, 128))})),
    "fused and single": (True, lambda e: e.update(experts("layers.0", 256, 128, False))),
    "one single beside fused": (True, lambda e: e.update({f"{E}.0.up_proj.weight": ("BF16", (256, 128))})),
    **{
        f"without expert {i}'s {p}": (False, _without(f"{E}.{i}.{p}_proj.weight"))
        for i in range(3)
        for p in ("gate", "up", "down")
    },
    "expert 1 taller": (False, lambda e: e.update({f"{E}.1.up_proj.weight": ("BF16", (384, 128))})),
    "expert 2 wider": (False, lambda e: e.update({f"{E}.2.down_proj.weight": ("BF16", (128, 384))})),
    "down not turned": (
        False,
        lambda e: e.update({f"{E}.{i}.down_proj.weight": ("BF16", (256, 128)) for i in range(3)}),
    ),
    "up unlike gate": (
        False,
        lambda e: e.update({f"{E}.{i}.up_proj.weight": ("BF16", (128, 128)) for i in range(3)}),
    ),
}


@pytest.mark.parametrize(("fused", "spoil"), MISFITS.values(), ids=MISFITS)
def test_experts_that_do_not_fit_together_are_refused(fused: bool, spoil: Callable, tmp_path: Path) -> None:

    entries = layer("layers.1") | experts("layers.0", 256, 128, fused)
    plan_of(tmp_path, entries)  # they fit before
    spoil(entries)
    with pytest.raises(Fp8Error, match=r"layers\.0\.mlp\.experts"):
        plan_of(tmp_path, entries)
