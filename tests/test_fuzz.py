"""A fuzzer: real checkpoints, changed in structured and in senseless ways, under all sorts of flags.

Whatever the input, a run ends with a directory that an independent reader accepts (exit 0, or 1 where the
verdict is FAIL), or with one line and nothing that looks like a model (exit 2). It never hangs, never
writes outside its output directory, and never fails in a way that nobody has thought of.

    pytest tests/test_fuzz.py                      2,000 cases, always the same
    FP8_FUZZ_CASES=100000 pytest tests/test_fuzz.py    as many as you like, always others
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import quantize_fp8
from forked import PATIENCE
from fp8lib.checkpoint.headers import ITEM_SIZE
from safetensors_by_hand import put_together, take_apart

pytestmark = pytest.mark.xdist_group("fuzz")  # its last test looks at what the others counted

CASES = int(os.environ.get("FP8_FUZZ_CASES", 0))
CONFIG, INDEX, MANIFEST, SUMS = (
    "config.json",
    "model.safetensors.index.json",
    "fp8_quantization.json",
    "SHA256SUMS",
)
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
HANGS_AFTER = PATIENCE
"""Seconds; a case takes 20 ms."""

outcomes: Counter[tuple[str, str]] = Counter()
"""(test, what became of a case) -> how many."""
reasons: Counter[str] = Counter()
"""Error line, without names and numbers -> how many; `pytest -s` shows them."""


def fuzz(share: float) -> settings:
    """Settings of a test that gets this share of the cases."""
    return settings(
        max_examples=round((CASES or 2000) * share),
        derandomize=not CASES,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# --- checkpoints in memory ---------------------------------------------------------------------


@dataclass
class Stored:
    """A tensor as a file holds it; a dtype that is not known has 1 byte."""

    dtype: str
    shape: list[int]
    data: bytes


@dataclass(repr=False)
class Model:
    """A checkpoint directory, before it is written: shards as tensors, everything else as bytes.

    `raw` are changes to be made to the files' bytes, `odd` things that are no files.
    """

    shards: dict[str, dict[str, Stored]]
    files: dict[str, bytes]
    metadata: dict[str, object] = field(default_factory=lambda: {"format": "pt"})
    headers: list[Callable[[str, dict], None]] = field(default_factory=list)
    raw: list[Callable[[Path], None]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        folder.mkdir()
        for name, tensors in self.shards.items():
            header, data = {"__metadata__": self.metadata}, b""
            for tensor_name, t in tensors.items():
                offsets = [len(data), len(data) + len(t.data)]
                header[tensor_name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": offsets}
                data += t.data
            for change in self.headers:
                change(name, header)
            put_together(folder / name, header, data)
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        for change in self.raw:
            change(folder)

    def tensors(self) -> list[tuple[str, str]]:
        return [(shard, name) for shard, tensors in self.shards.items() for name in tensors]


SMALL = {"num_hidden_layers": 1, "hidden_size": 128, "mtp": False}
MOE = {**SMALL, "num_experts": 2, "num_experts_per_tok": 1}
KINDS = {
    "dense": ("text", {**SMALL, "intermediate_size": 128, "shards": 2}),
    "fused": ("moe_text", {**MOE, "shards": 2}),
    "single": ("moe_text", {**MOE, "experts": "per_expert"}),
}


@pytest.fixture(scope="module")
def models(checkpoint: Callable) -> dict[str, Model]:
    return {kind: load(checkpoint(name, **arguments)) for kind, (name, arguments) in KINDS.items()}


def load(folder: Path) -> Model:
    """Read a checkpoint, with embeddings of 4 tokens: they are most of it and nobody looks at them."""
    shards, files = {}, {}
    for path in sorted(folder.iterdir()):
        if path.suffix != ".safetensors":
            files[path.name] = path.read_bytes()
            continue
        shards[path.name] = read(path)
        for name, t in shards[path.name].items():
            if "embed_tokens" in name or "lm_head" in name:
                shards[path.name][name] = Stored(t.dtype, [4, t.shape[1]], t.data[: 8 * t.shape[1]])
    return Model(shards, files)


def read(path: Path) -> dict[str, Stored]:
    """The tensors of a file, on trust."""
    header, data = take_apart(path)
    header.pop("__metadata__", None)
    return {
        name: Stored(entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def fresh(model: Model) -> Model:
    """A copy that may be changed."""
    shards = {shard: dict(tensors) for shard, tensors in model.shards.items()}
    return Model(shards, dict(model.files), dict(model.metadata))


# --- what can be changed -----------------------------------------------------------------------

DIMENSIONS = st.sampled_from([0, 1, 2, 3, 64, 127, 128, 129, 192, 256])
NUMBERS = st.one_of(
    st.integers(-2, 300),
    st.sampled_from([2**31, 2**32, 2**53, 2**61, 2**62, 2**63, 2**64, 2**70, 10**400, -1, 0.5, 1e300]),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            ".",
            "..",
            "/",
            "a/b",
            "../x",
            "/etc/passwd",
            "\0",
            "\n",
            "\x1b[31m",
            "\u202e",
            "\ud800",
            "a" * 300,
        ]
    ),
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
DTYPES = st.sampled_from([*ITEM_SIZE, "F4", "F6_E2M3", "bf16", "", "\x1b[31m"])
MODULES = [
    "embed_tokens", "norm", "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.0.mlp.down_proj",
    "layers.1.mlp.gate_proj", "layers.0.mlp.gate", "layers.0.mlp.shared_expert.up_proj",
    "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj",
    "layers.0.self_attn.o_proj", "layers.0.linear_attn.in_proj_qkv", "layers.0.linear_attn.in_proj_z",
    "layers.0.linear_attn.out_proj", "layers.0.mlp.experts.0.gate_proj", "layers.0.mlp.experts.1.up_proj",
    "layers.0.mlp.experts.7.down_proj", "layers.0.mlp.experts.00.down_proj",
    "layers.1.mlp.experts.0.down_proj",
    "layers.٣.mlp.down_proj", "visual.layers.0.mlp.down_proj", "mtp.layers.0.mlp.down_proj",
]  # fmt: skip
NAMES = st.one_of(
    st.builds(
        lambda prefix, module, suffix: prefix + module + suffix,
        st.sampled_from(["model.", "model.language_model.", "mtp.", ""]),
        st.sampled_from(MODULES),
        st.sampled_from([".weight", ".bias", ".weight_scale_inv", ""]),
    ),
    st.builds(
        lambda layer, part: f"model.layers.{layer}.mlp.experts.{part}",
        st.integers(0, 2),
        st.sampled_from(["gate_up_proj", "down_proj"]),
    ),
    TEXTS,
)
FILE_NAMES = st.one_of(
    TEXTS,
    st.builds(lambda text: text + ".safetensors", TEXTS),
    st.sampled_from(
        ["model.safetensors", "tokenizer.json", CONFIG, INDEX, MANIFEST, SUMS, "sub/config.json",
         "Config.JSON", ".hidden", "a.bin", "checkpoint-1/x.json", "README.md",
         "model-00003-of-00003.safetensors"]
    ),
)  # fmt: skip


def stored(draw: Callable, dtype: str, shape: list[int]) -> Stored:
    """A tensor of plausible values, or of awkward ones."""
    count = int(np.prod(shape, dtype=np.int64))
    size = ITEM_SIZE.get(dtype, 1)
    kind = draw(st.sampled_from(["gauss", "zeros", "ones", "bytes"]))
    if kind == "zeros" or not count:
        return Stored(dtype, shape, bytes(count * size))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    if kind == "bytes":  # NaN and infinity among them
        return Stored(dtype, shape, generator.bytes(count * size))
    values = torch.from_numpy(generator.normal(0, 0.02, count) if kind == "gauss" else np.ones(count))
    if dtype not in FLOATS:
        return Stored(dtype, shape, bytes([1]) * (count * size))
    return Stored(dtype, shape, values.to(FLOATS[dtype]).view(torch.uint8).numpy().tobytes())


def replace_tensor(draw: Callable, model: Model) -> None:
    """Another dtype and shape, consistently."""
    shard, name = draw(st.sampled_from(model.tensors()))
    shape = draw(st.one_of(st.just(model.shards[shard][name].shape), st.lists(DIMENSIONS, max_size=3)))
    if np.prod(shape, dtype=np.int64) < 2**18:
        model.shards[shard][name] = stored(draw, draw(DTYPES), shape)


def reshape_group(draw: Callable, model: Model) -> None:
    """Other dimensions for all that belongs together, so that it still fits."""
    rows, columns = draw(DIMENSIONS), draw(DIMENSIONS)
    dtype = draw(st.sampled_from(["BF16", "F16", "F32"]))
    for shard, name in model.tensors():
        shape = model.shards[shard][name].shape
        if "gate_up" in name and len(shape) == 3:
            model.shards[shard][name] = stored(draw, dtype, [shape[0], 2 * rows, columns])
        elif name.endswith("experts.down_proj") and len(shape) == 3:
            model.shards[shard][name] = stored(draw, dtype, [shape[0], columns, rows])
        elif ".mlp." in name and "shared" not in name and len(shape) == 2:
            down = "down_proj" in name
            model.shards[shard][name] = stored(draw, dtype, [columns, rows] if down else [rows, columns])


def rename_tensor(draw: Callable, model: Model) -> None:
    shard, name = draw(st.sampled_from(model.tensors()))
    model.shards[shard][draw(NAMES)] = model.shards[shard].pop(name)


def remove_tensor(draw: Callable, model: Model) -> None:
    shard, name = draw(st.sampled_from(model.tensors()))
    if len(model.shards[shard]) > 1:
        del model.shards[shard][name]


def add_tensor(draw: Callable, model: Model) -> None:
    shape = draw(st.lists(DIMENSIONS, max_size=3))
    if np.prod(shape, dtype=np.int64) < 2**18:
        model.shards[draw(st.sampled_from(sorted(model.shards)))][draw(NAMES)] = stored(
            draw, draw(DTYPES), shape
        )


def move_tensor(draw: Callable, model: Model) -> None:
    shard, name = draw(st.sampled_from(model.tensors()))
    model.shards[draw(st.sampled_from(sorted(model.shards)))][name] = model.shards[shard][name]


def rename_shard(draw: Callable, model: Model) -> None:
    name = draw(FILE_NAMES)
    with contextlib.suppress(ValueError, OSError):
        os.fsencode(name)
        if (
            0 < len(os.fsencode(name)) < 250
            and name not in (".", "..")
            and "/" not in name
            and "\0" not in name
        ):
            model.shards[name] = model.shards.pop(draw(st.sampled_from(sorted(model.shards))))
            model.files.pop(name, None)


def edit_entry(draw: Callable, model: Model) -> None:
    """A header that says something that may not be so."""
    shard, name = draw(st.sampled_from(model.tensors()))
    key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))
    value = draw(st.one_of(JSON, st.lists(NUMBERS, max_size=10), DTYPES))

    def change(where: str, header: dict) -> None:
        if where == shard and name in header:
            header[name][key] = value

    model.headers.append(change)


def edit_header(draw: Callable, model: Model) -> None:
    key, value = draw(st.one_of(NAMES, st.just("__metadata__"))), draw(JSON)
    model.headers.append(lambda where, header: header.update({key: value}))


def edit_metadata(draw: Callable, model: Model) -> None:
    model.metadata = draw(st.dictionaries(TEXTS, TEXTS, max_size=3))


def edit_bytes(draw: Callable, model: Model) -> None:
    """Bytes of a file, in its header or anywhere."""
    name = draw(st.sampled_from(sorted({*model.shards, CONFIG, INDEX} & {*model.shards, *model.files})))
    changes = draw(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=4))
    cut = draw(st.one_of(st.none(), st.integers(0, 5000), st.integers(-100, -1)))
    more = draw(st.binary(max_size=9))

    def change(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        for position, value in changes:
            if position < len(raw):
                raw[position] = value
        (folder / name).write_bytes(bytes(raw[:cut]) + more)

    model.raw.append(change)


def edit_length(draw: Callable, model: Model) -> None:
    shard = draw(st.sampled_from(sorted(model.shards)))
    value = draw(st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 4000)))

    def change(folder: Path) -> None:
        with (folder / shard).open("r+b") as file:
            file.write(struct.pack("<Q", value))

    model.raw.append(change)


def edit_json(draw: Callable, model: Model) -> None:
    """Members of config.json and of the index."""
    name = draw(st.sampled_from(sorted({CONFIG, INDEX} & model.files.keys()) or [CONFIG]))
    try:
        document = json.loads(model.files.get(name, b"{}"))
        place = {**document} and document
    except (ValueError, TypeError):  # an earlier change has made something else of it
        document = place = {}
    if draw(st.booleans()):
        place = document.get("text_config" if name == CONFIG else "weight_map")
        place = place if isinstance(place, dict) else document
    keys = st.sampled_from(sorted(place)) if place else TEXTS
    key = draw(st.one_of(keys, TEXTS, st.sampled_from(["model_type", "text_config", "quantization_config"])))
    if draw(st.integers(0, 3)):
        place[key] = draw(st.one_of(JSON, FILE_NAMES, st.sampled_from(sorted(model.shards))))
    else:
        place.pop(key, None)
    model.files[name] = json.dumps(document).encode()


def replace_json(draw: Callable, model: Model) -> None:
    name = draw(st.sampled_from([CONFIG, INDEX]))
    model.files[name] = draw(
        st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode()))
    )


def remove_file(draw: Callable, model: Model) -> None:
    name = draw(st.sampled_from(sorted({*model.files, *model.shards})))
    model.files.pop(name, None)
    if len(model.shards) > 1:
        model.shards.pop(name, None)


def add_file(draw: Callable, model: Model) -> None:
    """A file, a directory, a link or a FIFO, of any name."""
    name, kind = draw(FILE_NAMES), draw(st.sampled_from(["file", "file", "directory", "link", "fifo"]))
    target = draw(
        st.sampled_from(["nowhere", "../outside.txt", CONFIG, ".", "..", "/dev/zero", "/etc/passwd", name])
    )
    content = draw(st.binary(max_size=50))

    def change(folder: Path) -> None:
        with contextlib.suppress(OSError, ValueError):
            path = folder / name
            if os.path.isabs(name) or ".." in name or os.path.lexists(path):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file":
                path.write_bytes(content)
            elif kind == "directory":
                path.mkdir()
            elif kind == "link":
                path.symlink_to(target)
            else:
                os.mkfifo(path)

    model.raw.append(change)


HEADERS = [replace_tensor, reshape_group, rename_tensor, remove_tensor, add_tensor, move_tensor, edit_entry,
           edit_header, edit_metadata]  # fmt: skip
DIRECTORIES = [edit_json, replace_json, remove_file, add_file, rename_shard, remove_tensor, move_tensor]
BYTES = [edit_bytes, edit_length]

# --- flags -------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.floats().map(str),
    st.integers(-5, 500).map(str),
    st.sampled_from(
        ["all", "0", "1e999", "nan", "-", "٣", "", "1_000", " 5", "9" * 5000, "x", "cpu", "auto"]
    ),
)
FLAGS = st.one_of(
    st.tuples(st.just("--calib_mode"), st.sampled_from(["rms", "max", "percentile", "mse", "mse ", ""])),
    st.tuples(st.just("--rms_factor"), st.floats(0.01, 100).map(str)),
    st.tuples(st.just("--calib_percentile"), st.floats(0.01, 100).map(str)),
    st.tuples(st.just("--mse_grid_size"), st.integers(1, 128).map(str)),
    st.tuples(st.just("--verify_samples"), st.one_of(st.just("all"), st.integers(1, 9).map(str))),
    st.tuples(st.just("--seed"), st.integers().map(str)),
    st.tuples(st.just("--workers"), st.integers(0, 5).map(str)),
    st.tuples(
        st.sampled_from(
            ["--rms_factor", "--calib_percentile", "--mse_grid_size", "--verify_samples", "--seed",
             "--device", "--nonsense"]
        ),
        VALUES,
    ),
    st.tuples(st.sampled_from(["--rms_saturate", "--checksums", "--skip_verify", "--quiet", "--overwrite"])),
    st.tuples(st.sampled_from(["--dry_run", "--verify_only"])),
    st.tuples(TEXTS.filter(lambda text: "\0" not in text)),
)  # fmt: skip
STATISTICS = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(
        st.one_of(NAMES, st.just("model.layers.0.linear_attn.in_proj_z.weight")),
        st.dictionaries(
            st.sampled_from(["input_channel_max", "input_channel_mean_square", "tokens"]),
            st.one_of(
                st.floats(0, 1e30).map(lambda value: [value] * 128),
                st.just([0.5] * 128),
                st.lists(NUMBERS),
                JSON,
            ),
            min_size=1,
        ),
        min_size=1,
        max_size=4,
    ).map(lambda value: json.dumps(value).encode()),
)
EARLIER = [
    "nothing",
    "empty",
    "finished",
    "finished otherwise",
    "begun",
    "a damaged manifest",
    "a foreign file",
]

# --- a case ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arena() -> Iterator[Path]:
    """Where cases play: in memory, if there is such a place."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fp8-fuzz-", dir=place) as folder:
        yield Path(folder)


def snapshot(folder: Path) -> dict[str, tuple]:
    """Everything below a directory, without following links or opening what is no file."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(place, name)
            status = os.lstat(path)
            found[os.path.relpath(path, folder)] = (
                status.st_mode,
                status.st_size,
                status.st_mtime_ns,
                status.st_ino,
            )
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Hang(BaseException):
    """A case took too long."""


@dataclass(frozen=True)
class Result:
    rc: object
    out: str
    err: str


def call(arguments: list[str]) -> Result:
    def hang(*_: object) -> None:
        raise Hang(arguments)

    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, HANGS_AFTER)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            rc = quantize_fp8.main(arguments)
    except SystemExit as stop:
        rc = stop.code
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return Result(rc, out.getvalue(), err.getvalue())


def play(
    test: str, arena: Path, model: Model, flags: list[str], before: Callable[[Path], None] = lambda _: None
) -> None:
    """Write a checkpoint, run the tool on it and judge what became of it."""
    home = arena / "case"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    (home / "outside.txt").write_text("mine")
    model.write(home / "in")
    before(home)
    output = home / "out"
    around = {k: v for k, v in snapshot(home).items() if k.split("/")[0] != "out"}
    there = snapshot(output)
    result = call(["--input_dir", str(home / "in"), "--output_dir", str(output), *flags])
    assert {k: v for k, v in snapshot(home).items() if k.split("/")[0] != "out"} == around
    now = snapshot(output)
    assert "Traceback" not in result.err
    assert result.rc in (0, 1, 2)
    if result.rc == 2:
        errors = [line for line in result.err.split("\n") if not line.startswith(("note: ", "["))]
        assert errors[1:] == [""], result.err
        assert errors[0].startswith("error: ")
        assert errors[0].isprintable(), result.err
        assert "--debug" not in errors[0], result.err
        assert "SUMMARY" not in result.out
        assert CONFIG not in now or now == there
    elif "--help" in flags or "--version" in flags:
        assert now == there
    elif "--dry_run" in flags or "--verify_only" in flags:
        assert now == there
        assert result.rc == 0 or "FAIL" in result.out
    else:
        assert result.rc == 0 or "FAIL" in result.out
        assert result.out.replace("\n", "").isprintable()
        accept(
            home / "in",
            output,
            clips=not {"--rms_saturate", "--calib_percentile", "percentile"}.isdisjoint(flags),
        )
    leftover = [name for name in now.keys() - there.keys() if os.path.basename(name).startswith(".")]
    assert leftover == []
    what = {0: "quantized", 1: "FAIL", 2: "refused"}[result.rc]
    if result.rc != 2 and not {"--dry_run", "--verify_only", "--help", "--version"}.isdisjoint(flags):
        what = "looked at"
    outcomes[test, what] += 1
    if what == "refused":
        why = re.sub(r"\(.*?\)|'.*?'|\S*[./\\]\S*", "…", errors[0]).removeprefix("error: … ")
        reasons[re.sub(r"\d+", "#", why)[:70]] += 1


def listed(name: str, kept: set[str]) -> bool:
    """Whether modules_to_not_convert has a weight's module, or all experts of its layer."""
    module = name.removesuffix(".weight")
    return not kept.isdisjoint({module, f"{module.partition('.mlp.experts.')[0]}.mlp.experts"})


def accept(folder: Path, output: Path, clips: bool) -> None:
    """What an engine would find, read with the safetensors library and nothing of this tool."""

    def never(constant: str) -> None:
        raise AssertionError(constant)

    config = json.loads((output / CONFIG).read_text("utf-8"), parse_constant=never)
    index = json.loads((output / INDEX).read_text("utf-8"))
    found, total = {}, 0
    for name in sorted(set(index["weight_map"].values())):
        with safe_open(output / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                assert index["weight_map"][key] == name
                found[key] = file.get_tensor(key)
                total += found[key].nbytes
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == total
    kept = set(config["quantization_config"]["modules_to_not_convert"])
    for name, tensor in found.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = found[f"{name}_scale_inv"]
            assert scale.dtype == torch.bfloat16
            assert list(scale.shape) == [-(-n // 128) for n in tensor.shape]
            assert bool((scale.isfinite() & (scale > 0)).all())
            assert not listed(name, kept)
        elif name.endswith(".weight") and tensor.dim() >= 2:
            assert listed(name, kept)
    for path in folder.glob("*.safetensors"):
        if path.name in set(index["weight_map"].values()):
            for key, source in read(path).items():
                assert_kept_or_near(key, source, found, clips)
    copied = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}
    copied -= {CONFIG, INDEX, MANIFEST, SUMS, "notes.txt", *index["weight_map"].values()}
    for name in copied:
        assert (output / name).read_bytes() == (folder / name).read_bytes()


def assert_kept_or_near(name: str, source: Stored, found: dict[str, torch.Tensor], clips: bool) -> None:
    """A tensor is there as it was, or quantized, or expert by expert."""
    if name in found and found[name].dtype != torch.float8_e4m3fn:
        assert list(found[name].shape) == source.shape
        assert found[name].reshape(-1).view(torch.uint8).numpy().tobytes() == source.data
        return
    tensor = torch.frombuffer(bytearray(source.data), dtype=FLOATS[source.dtype]).view(source.shape).double()
    experts, _, part = name.rpartition(".")
    parts = {name: tensor}
    if part == "gate_up_proj":
        parts = {
            f"{experts}.{e}.{projection}.weight": half
            for e, one in enumerate(tensor)
            for projection, half in zip(("gate_proj", "up_proj"), one.chunk(2), strict=True)
        }
    elif part == "down_proj" and tensor.dim() == 3:
        parts = {f"{experts}.{e}.down_proj.weight": one for e, one in enumerate(tensor)}
    for key, weight in parts.items():
        scale = found[f"{key}_scale_inv"].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        near = found[key].double() * scale[: weight.shape[0], : weight.shape[1]]
        # Half a step of E4M3 is 1/16 of a weight, and a BF16 scale may clip a little more than that.
        assert clips or (near - weight).abs().max() <= weight.abs().max() / 15 + 1e-30, key


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_that_are_fuzzed_are_accepted(kind: str, models: dict[str, Model], arena: Path) -> None:
    play("as they are", arena, fresh(models[kind]), [])
    assert outcomes["as they are", "quantized"]


def changed(draw: Callable, models: dict[str, Model], kinds: list[Callable], most: int) -> Model:
    model = fresh(models[draw(st.sampled_from(sorted(KINDS)))])
    if draw(st.booleans()):
        model.files.pop(INDEX, None)  # which would refuse most changes of names
    for change in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=most)):
        change(draw, model)
    return model


@fuzz(0.4)
@given(data=st.data())
def test_headers(data: st.DataObject, models: dict[str, Model], arena: Path) -> None:
    play("headers", arena, changed(data.draw, models, HEADERS, 3), [])


@fuzz(0.2)
@given(data=st.data())
def test_indexes_configs_and_files(data: st.DataObject, models: dict[str, Model], arena: Path) -> None:
    play("directories", arena, changed(data.draw, models, DIRECTORIES, 3), [])


@fuzz(0.15)
@given(data=st.data())
def test_bytes(data: st.DataObject, models: dict[str, Model], arena: Path) -> None:
    play("bytes", arena, changed(data.draw, models, BYTES, 2), [])


@fuzz(0.25)
@given(data=st.data())
def test_flags_statistics_and_earlier_runs(
    data: st.DataObject, models: dict[str, Model], arena: Path
) -> None:
    draw = data.draw
    kind = draw(st.sampled_from(sorted(KINDS)))
    model = fresh(models[kind])
    if draw(st.integers(0, 3)) == 0:
        model = changed(draw, models, HEADERS + DIRECTORIES, 2)
    flags = [word for flag in draw(st.lists(FLAGS, max_size=3)) for word in flag]
    earlier = draw(st.sampled_from(EARLIER))
    statistics = draw(st.none() | STATISTICS)
    damage = draw(JSON)

    def before(home: Path) -> None:
        output = home / "out"
        if statistics is not None:
            (home / "stats.json").write_bytes(statistics)
            flags.extend(("--activation_stats", str(home / "stats.json")))
        if earlier in ("empty", "a foreign file"):
            output.mkdir()
        if earlier == "a foreign file":
            (output / "notes.txt").write_text("mine")
        if earlier in ("finished", "finished otherwise", "begun", "a damaged manifest"):
            mode = ["--calib_mode", "max"] if earlier == "finished otherwise" else []
            call(["--input_dir", str(home / "in"), "--output_dir", str(output), *mode])
            if earlier == "begun" and (output / CONFIG).exists():
                (output / CONFIG).unlink()
                next(output.glob("*.safetensors")).unlink()
            if earlier == "a damaged manifest" and (output / MANIFEST).exists():
                document = json.loads((output / MANIFEST).read_text())
                place = damage if isinstance(damage, dict) else {"shards": damage}
                (output / MANIFEST).write_text(json.dumps(document | place))

    play("flags", arena, model, flags, before)


def test_the_cases_end_in_every_way() -> None:
    """Or the fuzzer would only knock at the front door."""
    ran = Counter()
    for (test, what), count in outcomes.items():
        ran[test] += count
        print(f"{test}: {count} {what}")
    for reason, count in reasons.most_common():
        print(f"{count:6} {reason}")
    if set(ran) != {"as they are", "headers", "directories", "bytes", "flags"}:
        pytest.skip("only a part of the fuzzer was run")
    assert sum(ran.values()) >= 2000
    for test in ("headers", "directories", "flags"):
        assert outcomes[test, "quantized"] > 0.1 * ran[test], outcomes
        assert outcomes[test, "refused"] > 0.2 * ran[test], outcomes
    assert outcomes["bytes", "refused"] > 0.5 * ran["bytes"], outcomes
