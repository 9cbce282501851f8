"""Broken and hostile files: refused with one line, soon, in little memory, and nothing is written.

Every case runs in a process of its own, which is killed if it hangs and measured if it does not.
"""

import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import forked
from safetensors_by_hand import put_together, read_header, take_apart
from test_resume import assert_same

CONFIG, INDEX, SHARD = "config.json", "model.safetensors.index.json", "model.safetensors"
ONE_LAYER = {"num_hidden_layers": 1, "hidden_size": 128, "mtp": False}
MODEL = ("moe_text", {**ONE_LAYER, "num_experts": 2, "num_experts_per_tok": 1, "index": True})
NORM = "model.norm.weight"
EXPERTS = "model.layers.0.mlp.experts"

SECONDS = 3
"""Of processor time: a second, and a margin for slow machines (45,000 layers took 1.95 s in a slow hour)."""
MEMORY = 400_000_000
"""Bytes above what a run starts with: the largest header that may be valid takes about this much."""


@pytest.fixture
def folder(checkpoint: Callable, copy_of: Callable) -> Path:
    """A good checkpoint, with an index, to be spoiled."""
    return copy_of(checkpoint(MODEL[0], **MODEL[1]))


def run_within(seconds: float, *arguments: object) -> forked.Ended:
    """A run that takes so much processor time at most, and `MEMORY`.

    What else the machine does (a core's other thread, its caches) can double the time of a run, not that of
    the quickest of three.
    """
    for _ in range(3):
        ended = forked.run(*arguments)
        assert ended.grown < MEMORY
        if ended.cpu < seconds:
            return ended
    raise AssertionError(f"it took {ended.cpu} s each time")


def assert_refused(folder: Path, *flags: object, fragment: str = "") -> None:
    """Exit 2, one line that can be read on a terminal, in time, in bounds, and no output directory."""
    output = folder.parent / "out"
    around = sorted(os.listdir(folder.parent))
    ended = run_within(SECONDS, "--input_dir", folder, "--output_dir", output, *flags)
    assert (ended.rc, ended.out) == (2, ""), ended.err
    assert ended.err.startswith("error: ")
    assert ended.err.endswith("\n")
    assert ended.err[:-1].isprintable(), ended.err
    assert len(ended.err) < 3000
    assert fragment in ended.err
    assert "--debug" not in ended.err, "an error that nobody has thought of"
    assert sorted(os.listdir(folder.parent)) == around


# --- headers -----------------------------------------------------------------------------------


def length(value: int) -> Callable[[Path], None]:
    """The header's length is another."""

    def spoil(path: Path) -> None:
        path.write_bytes(value.to_bytes(8, "little") + path.read_bytes()[8:])

    return spoil


def text(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """The header's text is another."""

    def spoil(path: Path) -> None:
        header, data = take_apart(path)
        put_together(path, change(json.dumps(header).encode()), data)

    return spoil


def header(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    """The header says something else."""

    def spoil(path: Path) -> None:
        document, data = take_apart(path)
        edit(document)
        put_together(path, document, data)

    return spoil


def norm(**changes: object) -> Callable[[Path], None]:
    """The header says something else about one tensor."""
    return header(lambda document: document[NORM].update(changes))


def named(name: str) -> Callable[[Path], None]:
    """A tensor has another name."""
    return header(lambda document: document.update({name: document.pop(NORM)}))


def added(name: str, dtype: str, shape: list[int], size: int = 0) -> Callable[[Path], None]:
    """One tensor more, of `size` bytes that take no room on disk."""

    def spoil(path: Path) -> None:
        document, data = take_apart(path)
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        put_together(path, document, data)
        os.truncate(path, path.stat().st_size + size)

    return spoil


def overlapping(path: Path) -> None:
    document, data = take_apart(path)
    first, second = sorted(
        (v for k, v in document.items() if k != "__metadata__"), key=lambda v: v["data_offsets"]
    )[:2]
    second["data_offsets"] = [x - 2 for x in second["data_offsets"]]
    assert first["data_offsets"][1] == second["data_offsets"][0] + 2
    put_together(path, document, data)


def shifted(by: int) -> Callable[[Path], None]:
    """All offsets move, with the data."""

    def spoil(path: Path) -> None:
        document, data = take_apart(path)
        for entry in (v for k, v in document.items() if k != "__metadata__"):
            entry["data_offsets"] = [x + by for x in entry["data_offsets"]]
        put_together(path, document, bytes(by) + data)

    return spoil


def twice(path: Path) -> None:
    """The same name, once more, for the same bytes."""
    document, data = take_apart(path)
    raw = json.dumps(document).encode()
    again = json.dumps({NORM: document[NORM]}).encode()
    put_together(path, raw[:-1] + b", " + again[1:], data)


def a_million_tensors(path: Path) -> None:
    entry = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    put_together(path, b"{" + b",".join(entry % i for i in range(1_000_000)) + b"}")


def fused(count: int, size: int) -> Callable[[Path], None]:
    """Experts in a second layer, many and small: [count, 2 * size, 1] and [count, 1, size]."""

    def spoil(path: Path) -> None:
        experts = "model.layers.1.mlp.experts"
        added(f"{experts}.gate_up_proj", "BF16", [count, 2 * size, 1], 4 * count * size)(path)
        added(f"{experts}.down_proj", "BF16", [count, 1, size], 2 * count * size)(path)

    return spoil


def many_fused(path: Path) -> None:
    """No byte of data, 90,000 tensors, and 4 billion experts."""
    document, data = take_apart(path)
    end = [len(data)] * 2
    for layer in range(1, 45_000):
        experts = f"model.layers.{layer}.mlp.experts"
        document[f"{experts}.gate_up_proj"] = {
            "dtype": "BF16",
            "shape": [100_000, 0, 128],
            "data_offsets": end,
        }
        document[f"{experts}.down_proj"] = {"dtype": "BF16", "shape": [100_000, 128, 0], "data_offsets": end}
    put_together(path, document, data)


HEADERS = {
    "of length 0": length(0),
    "of length 1": length(1),
    "longer than the file": lambda path: length(path.stat().st_size)(path),
    "one byte longer than the file": lambda path: length(path.stat().st_size - 7)(path),
    "of length 2^31": length(2**31),
    "of length 2^63": length(2**63),
    "of length 2^64 - 1": length(2**64 - 1),
    "shorter than it is": lambda path: length(read_header(path)[1] - 9)(path),
    "of more than 100 MB": lambda path: (length(10**8 + 1)(path), os.truncate(path, 2 * 10**8)),
    "of 100 MB of zeros": lambda path: (length(10**8)(path), os.truncate(path, 2 * 10**8)),
    "of a file of 7 bytes": lambda path: path.write_bytes(b"1234567"),
    "of an empty file": lambda path: path.write_bytes(b""),
    "not JSON": text(lambda raw: b"PK\x03\x04" + raw),
    "a list": text(lambda raw: b"[" + raw + b"]"),
    "a number": text(lambda raw: b"17"),
    "null": text(lambda raw: b"null"),
    "with a byte order mark": text(lambda raw: b"\xef\xbb\xbf" + raw),
    "in UTF-16": text(lambda raw: raw.decode().encode("utf-16")),
    "not UTF-8": text(lambda raw: raw.replace(b"model.norm", b"model.n\xffrm")),
    "with more behind it": text(lambda raw: raw + b"{}"),
    "cut short": text(lambda raw: raw[:-2]),
    "nested 100,000 deep": text(lambda raw: b'{"a":' * 100_000),
    "lists 50 million deep": text(lambda raw: b"[" * 50_000_000),
    "33 million lists": text(lambda raw: b"[" + b"[]," * 33_000_000 + b"[]]"),
    "a million lists, which are allowed": text(lambda raw: b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"),
    "a million tensors": a_million_tensors,
    "a tensor twice": twice,
    "a field twice": text(lambda raw: raw.replace(b'"dtype": "BF16"', b'"dtype": "BF16", "dtype": "F32"', 1)),
    "metadata twice": text(lambda raw: raw[:-1] + b', "__metadata__": {}}'),
    "metadata that are a list": header(lambda document: document.update(__metadata__=[])),
    "metadata of numbers": header(lambda document: document.update(__metadata__={"a": 1})),
    "metadata that no UTF-8 holds": header(lambda document: document.update(__metadata__={"\ud800": "a"})),
    "overlapping": overlapping,
    "a hole at the beginning": shifted(8),
    "a hole at the end": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a hole of 2^40": lambda path: os.truncate(path, 2**40),
    "offsets past the end": lambda path: os.truncate(path, path.stat().st_size - 1),
    "offsets of 2^62": norm(data_offsets=[2**62, 2**62 + 256]),
    "negative offsets": norm(data_offsets=[-256, 0]),
    "offsets the wrong way round": norm(data_offsets=[256, 0]),
    "one offset": norm(data_offsets=[0]),
    "three offsets": norm(data_offsets=[0, 128, 256]),
    "offsets that are fractions": norm(data_offsets=[0.0, 256.0]),
    "offsets that are words": norm(data_offsets=["0", "256"]),
    "no offsets": norm(data_offsets=None),
    "another shape than bytes": norm(shape=[127]),
    "a shape of fractions": norm(shape=[128.0]),
    "a shape of truths": norm(shape=[True] * 7 + [128]),
    "a shape of 9 dimensions": norm(shape=[1] * 8 + [128]),
    "a shape of a million dimensions": norm(shape=[1] * 1_000_000),
    "a shape that is a number": norm(shape=128),
    "a shape of 1e400": text(lambda raw: raw.replace(b"[128]", b"[1e400]", 1)),
    "a shape of 5,000 digits": text(lambda raw: raw.replace(b"[128]", b"[" + b"1" * 5000 + b"]", 1)),
    "a shape of NaN": text(lambda raw: raw.replace(b"[128]", b"[NaN]", 1)),
    "a shape whose product is 2^64 + 128": norm(shape=[2**57 + 1, 128]),
    "a shape whose product overflows to 0": norm(shape=[2**32, 2**32]),
    "an empty shape that overflows on the way": added("model.empty", "BF16", [2**61, 2**61, 0]),
    "a dtype that does not exist": norm(dtype="F24"),
    "a dtype that writes to the terminal": norm(dtype="\x1b[2J"),
    "a dtype that is a list": norm(dtype=["BF16"]),
    "no dtype": norm(dtype=None),
    "an entry that is a number": header(lambda document: document.update({NORM: 1})),
    "an entry that is a list": header(lambda document: document.update({NORM: []})),
    "a name with a slash": named("model/norm.weight"),
    "a name that leads up": named("../model.norm.weight"),
    "a name with dots": named("model..norm"),
    "a name with NUL": named("model.norm\0.weight"),
    "a name with a new line": named("model.norm\nerror: none"),
    "a name that clears the terminal": named("\x1b[2J\x1b]0;owned\x07model.norm"),
    "a name with C1 controls": named("model.\x9b31mnorm"),
    "a name written from right to left": named("model.\u202enorm"),
    "a name with half a surrogate pair": named("model.\ud800norm"),
    "a name of nothing": named(""),
    "a name of 10 MB": named("n" * 10_000_000),
    "a name of 10 MB of escapes": named("\x1b" * 10_000_000),
    "an expert's number of 400 digits": named(f"{EXPERTS}.{'9' * 400}.gate_proj.weight"),
    "2^50 empty experts": fused(2**50, 0),
    "10 million experts of 6 bytes": fused(10**7, 1),
    "4 billion empty experts in 45,000 layers": many_fused,
}  # fmt: skip


@pytest.mark.parametrize("spoil", HEADERS.values(), ids=HEADERS)
def test_a_header_is_refused(spoil: Callable, folder: Path) -> None:
    spoil(folder / SHARD)
    assert_refused(folder)


@pytest.mark.parametrize("shape", [[], [0], [0, 4], [4, 0], [1] * 8], ids=str)
def test_a_shape_may_be_odd_where_nothing_is_quantized(shape: list[int], folder: Path) -> None:
    (folder / INDEX).unlink()
    added("model.odd", "BF16", shape, 0 if 0 in shape else 2)(folder / SHARD)
    output = folder.parent / "out"
    ended = forked.run("--input_dir", folder, "--output_dir", output)
    assert ended.rc == 0, ended.err
    assert list(load_file(output / SHARD)["model.odd"].shape) == shape


@pytest.mark.parametrize(
    "name", ["model.Norm.weight", "MODEL.NORM.WEIGHT", "model.norm.weight ", "model.нorm.weight"]
)
def test_names_may_be_alike(name: str, folder: Path) -> None:
    """In another case, with a space at the end, in another script: other tensors."""
    (folder / INDEX).unlink()
    added(name, "BF16", [1], 2)(folder / SHARD)
    output = folder.parent / "out"
    assert forked.run("--input_dir", folder, "--output_dir", output).rc == 0
    assert {name, NORM} < load_file(output / SHARD).keys()


# --- the index ---------------------------------------------------------------------------------


def weight_map(value: object) -> Callable[[Path], None]:
    """The index puts a tensor somewhere else."""

    def spoil(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][NORM] = value
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def placed(make: Callable[[Path], object], name: str = "other.safetensors") -> Callable[[Path], None]:
    """The index puts a tensor into what `make` makes in the directory."""

    def spoil(folder: Path) -> None:
        weight_map(name)(folder)
        make(folder / name)

    return spoil


def index(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / INDEX).write_bytes(content)


def outside(path: Path) -> None:
    """A link to a good shard beside the directory."""
    target = path.parent.parent / "elsewhere"
    target.mkdir()
    shutil.copy(path.parent / SHARD, target / "shard")
    path.unlink(missing_ok=True)
    path.symlink_to("../elsewhere/shard")


def copied(path: Path) -> None:
    """A copy of the shard."""
    shutil.copy(path.parent / SHARD, path)


def bound(path: Path) -> None:
    """A socket; its path must be short, so it is made from within."""
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """What `make` makes in the place of a file."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def sparse(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(b"")
        os.truncate(path, size)

    return make


ODD_FILES: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a directory": Path.mkdir,
    "a socket": bound,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to /dev/stdin": lambda path: path.symlink_to("/dev/stdin"),
    "a link to /etc/passwd": lambda path: path.symlink_to("/etc/passwd"),
    "a link up and down again": lambda path: path.symlink_to("../elsewhere.json"),
    "a link to a FIFO": lambda path: (os.mkfifo(path.with_name("fifo")), path.symlink_to("fifo")),
}

INDEXES = {
    **{f"names {what}": placed(make) for what, make in ODD_FILES.items()},
    **{f"is {what}": instead(INDEX, make) for what, make in ODD_FILES.items()},
    "names a good shard beside the directory": placed(outside),
    "names an absolute path": weight_map("/etc/passwd"),
    "names an absolute shard": weight_map("/tmp/model.safetensors"),
    "names its directory": weight_map("."),
    "names the directory above": weight_map(".."),
    "names a path upwards": weight_map("../model.safetensors"),
    "names a path down and up": weight_map("a/../../model.safetensors"),
    "names a path upwards with backslashes": weight_map("..\\model.safetensors"),
    "names a path with a slash": weight_map("folder/model.safetensors"),
    "names a path to itself": weight_map("./model.safetensors"),
    "names nothing": weight_map(""),
    "names a number": weight_map(1),
    "names null": weight_map(None),
    "names a list": weight_map([SHARD]),
    "names NUL": weight_map("a\0b.safetensors"),
    "names a new line": weight_map("a\nb.safetensors"),
    "names an escape": weight_map("\x1b[2J.safetensors"),
    "names half a surrogate pair": weight_map("\ud800.safetensors"),
    "names what is not UTF-8": weight_map("\udcff.safetensors"),
    "names 300 letters": weight_map("n" * 300 + ".safetensors"),
    "names a megabyte": weight_map("n" * 1_000_000 + ".safetensors"),
    "names a million dots": weight_map("." * 1_000_000 + ".safetensors"),
    "names a hidden file": placed(copied, ".hidden.safetensors"),
    "names a pickle": placed(lambda path: path.write_bytes(pickle.dumps({})), "pytorch_model.bin"),
    "names a file in another case": placed(copied, SHARD.upper()),
    "is empty": index(b""),
    "is a list": index(b"[]"),
    "is a word": index(b'"index"'),
    "is not UTF-8": index(b'{"weight_map": {"\xff": "a"}}'),
    "has an empty map": index(b'{"weight_map": {}}'),
    "has a list for a map": index(b'{"weight_map": []}'),
    "is nested deeply": index(b"[" * 1_000_000),
    "is a gigabyte": instead(INDEX, sparse(10**9)),
    "has 3 million entries": index(
        b'{"weight_map": {' + b",".join(b'"%d":"a"' % i for i in range(3_000_000)) + b"}}"
    ),
    "has an entry twice": index(b'{"weight_map": {"a": "model.safetensors", "a": "model.safetensors"}}'),
    "has 100,000 shards": index(
        json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(100_000)}}).encode()
    ),
}  # fmt: skip


@pytest.mark.parametrize("spoil", INDEXES.values(), ids=INDEXES)
def test_an_index_is_refused(spoil: Callable, folder: Path) -> None:
    spoil(folder)
    assert_refused(folder)


@pytest.mark.parametrize("make", [*ODD_FILES.values(), outside], ids=[*ODD_FILES, "a link to a good shard"])
def test_a_shard_that_is_no_file_of_the_directory_is_refused(make: Callable, folder: Path) -> None:
    (folder / INDEX).unlink()
    if make is outside:
        outside(folder / "other.safetensors")
        (folder / SHARD).unlink()
    else:
        instead(SHARD, make)(folder)
    assert_refused(folder)


@pytest.mark.parametrize(
    "name",
    [b"\xff.safetensors", b"a\nb.safetensors", b"\x1b[31m.safetensors"],
    ids=["not UTF-8", "new line", "escape"],
)
def test_a_shard_with_a_name_that_cannot_be_shown_is_refused(name: bytes, folder: Path) -> None:
    (folder / INDEX).unlink()
    os.rename(folder / SHARD, os.fsencode(folder) + b"/" + name)
    assert_refused(folder, fragment="rename it")


def test_the_notes_of_other_systems_are_no_shards(folder: Path) -> None:
    """macOS leaves `._` files on disks it does not trust with its own."""
    (folder / INDEX).unlink()
    (folder / f"._{SHARD}").write_bytes(b"\0\x05\x16\x07" * 30)
    ended = forked.run("--input_dir", folder, "--output_dir", folder.parent / "out")
    assert ended.rc == 0, ended.err


def test_links_within_the_directory_are_followed(folder: Path) -> None:
    (folder / "files").mkdir()
    for name in (SHARD, INDEX, CONFIG, "generation_config.json"):
        (folder / name).rename(folder / "files" / name)
        (folder / name).symlink_to(f"files/{name}")
    output = folder.parent / "out"
    assert forked.run("--input_dir", folder, "--output_dir", output).rc == 0
    assert not any(path.is_symlink() for path in output.rglob("*"))


# --- config.json -------------------------------------------------------------------------------


def config(**changes: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        document = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(document | changes))

    return spoil


def config_text(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / CONFIG).write_bytes(content)


def added_to_config(member: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        raw = (folder / CONFIG).read_bytes().rstrip()
        (folder / CONFIG).write_bytes(raw[:-1] + b"," + member + b"}")

    return spoil


CONFIGS = {
    **{f"is {what}": instead(CONFIG, make) for what, make in ODD_FILES.items()},
    "is missing": lambda folder: (folder / CONFIG).unlink(),
    "is empty": config_text(b""),
    "is a list": config_text(b'[{"model_type": "qwen3_5"}]'),
    "is a word": config_text(b'"qwen3_5"'),
    "is null": config_text(b"null"),
    "is a gigabyte of zeros": instead(CONFIG, sparse(10**9)),
    "is a gigabyte of spaces": lambda folder: (
        (folder / CONFIG).write_bytes(b" " * 10_000_001 + (folder / CONFIG).read_bytes())
    ),
    "is nested 100,000 deep": config_text(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "is nested 900 deep": added_to_config(b'"a":' + b"[" * 900 + b"]" * 900),
    "is nested 101 deep": added_to_config(b'"a":' + b'{"b":' * 100 + b"1" + b"}" * 100),
    "is in UTF-16": lambda folder: (
        (folder / CONFIG).write_bytes((folder / CONFIG).read_text().encode("utf-16"))
    ),
    "begins with a byte order mark": lambda folder: (
        (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())
    ),
    "is not UTF-8": added_to_config(b'"a": "\xff"'),
    "holds NaN": added_to_config(b'"a": NaN'),
    "holds infinity": added_to_config(b'"a": -Infinity'),
    "holds 1e999": added_to_config(b'"a": 1e999'),
    "holds a number of 5,000 digits": added_to_config(b'"a": ' + b"9" * 5000),
    "holds half a surrogate pair": added_to_config(b'"a": {"b": ["\\ud800"]}'),
    "holds half a surrogate pair for a key": added_to_config(b'"\\udfff": 1'),
    "holds a key twice": added_to_config(b'"a": 1, "a": 1'),
    "holds a million lists": added_to_config(b'"a": [' + b"[]," * 3_000_000 + b"[]]"),
    "has a list for a model type": config(model_type=["qwen3_5"]),
    "has an object for a model type": config(model_type={"qwen3_5": 1}),
    "has a number for a model type": config(model_type=5),
    "has a megabyte for a model type": config(model_type="\x1b" * 1_000_000),
}  # fmt: skip


@pytest.mark.parametrize("spoil", CONFIGS.values(), ids=CONFIGS)
def test_a_config_is_refused(spoil: Callable, folder: Path) -> None:
    spoil(folder)
    assert_refused(folder, fragment=CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config": []},
        {"text_config": "x"},
        {"text_config": None},
        {"tie_word_embeddings": "yes"},
        {"tie_word_embeddings": []},
        {"quantization_config": None},
        {"a": [[[["\u00e9\u2028\x1b"]]]]},
    ],
    ids=str,
)
def test_a_config_is_handed_on_as_it_is(changes: dict, folder: Path) -> None:
    """What this tool has no use for is none of its business."""
    config(**changes)(folder)
    output = folder.parent / "out"
    ended = forked.run("--input_dir", folder, "--output_dir", output)
    assert ended.rc == 0, ended.err
    found = json.loads((output / CONFIG).read_text("utf-8"))
    assert found.pop("quantization_config")["quant_method"] == "fp8"
    expected = json.loads((folder / CONFIG).read_text())
    expected.pop("quantization_config", None)
    assert found == expected


# --- other files -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "extra/vocab.txt"])
@pytest.mark.parametrize("make", [v for k, v in ODD_FILES.items() if k != "a directory"],
                         ids=[k for k in ODD_FILES if k != "a directory"])  # fmt: skip
def test_a_small_file_is_refused(make: Callable, name: str, folder: Path) -> None:
    (folder / "extra").mkdir()
    instead(name, make)(folder)
    assert_refused(folder, fragment="not a regular file" if list(folder.rglob("fifo")) else Path(name).name)


def test_a_link_to_a_directory_is_refused(folder: Path) -> None:
    (folder / "assets").symlink_to("/etc")
    assert_refused(folder, fragment="assets")


def test_a_small_file_whose_name_is_not_utf8_is_refused(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text("x")
    assert_refused(folder, fragment="rename it")


def test_a_small_file_may_have_a_name_that_cannot_be_shown(folder: Path) -> None:
    name = "line one\nline two\x1b[31m.txt"
    (folder / name).write_text("x")
    output = folder.parent / "out"
    for _ in range(2):
        ended = forked.run("--input_dir", folder, "--output_dir", output)
        assert ended.rc == 0
        assert "\x1b" not in ended.out + ended.err
    assert (output / name).read_text() == "x"


def test_excluded_files_are_not_even_looked_at(folder: Path) -> None:
    os.mkfifo(folder / "pytorch_model.bin")
    os.mkfifo(folder / ".hidden")
    (folder / ".cache").symlink_to("/proc")
    (folder / "checkpoint-500").symlink_to("/proc")
    assert forked.run("--input_dir", folder, "--output_dir", folder.parent / "out").rc == 0


NO_DIRECTORIES = {
    "a FIFO": os.mkfifo,
    "a file": Path.touch,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("make", NO_DIRECTORIES.values(), ids=NO_DIRECTORIES)
def test_an_input_that_is_no_directory_is_refused(make: Callable, tmp_path: Path) -> None:
    make(tmp_path / "input")
    assert_refused(tmp_path / "input", fragment="input")


@pytest.mark.parametrize("make", NO_DIRECTORIES.values(), ids=NO_DIRECTORIES)
def test_an_output_that_is_no_directory_is_refused(make: Callable, folder: Path) -> None:
    make(folder.parent / "out")
    assert_refused(folder, fragment="out")


# --- statistics --------------------------------------------------------------------------------

WEIGHT = "model.layers.0.linear_attn.in_proj_z.weight"


TWINS = [b'"%s": {"input_channel_max": [1]}' % n.encode() for n in (WEIGHT, WEIGHT.removeprefix("model."))]


def ten_million_entries(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"{" + b'"k":{"input_channel_max":[1]},' * 10**7 + b'"z":{}}')


def statistics(members: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(b"{" + members + b"}")


def of_weight(values: bytes) -> Callable[[Path], None]:
    return statistics(b'"%s": {"input_channel_mean_square": %s}' % (WEIGHT.encode(), values))


STATISTICS = {
    **{f"that are {what}": make for what, make in ODD_FILES.items() if "/etc" not in what},
    "of 10 million entries": ten_million_entries,
    "of one entry of 10 million numbers": of_weight(b"[" + b"1," * 10_000_000 + b"1]"),
    "of NaN": of_weight(b"[" + b"NaN," * 127 + b"NaN]"),
    "of 1e999": of_weight(b"[" + b"1e999," * 127 + b"1]"),
    "of a number of 5,000 digits": of_weight(b"[" + b"9" * 5000 + b"]"),
    "of a number of 400 digits": of_weight(b"[" + b"9" * 400 + b"," + b"1," * 126 + b"1]"),
    "of words": of_weight(b'["one"]'),
    "of objects": of_weight(b"[{}]"),
    "of null": of_weight(b"[null]"),
    "nested deeply": of_weight(b"[" * 100_000),
    "nested deeply as objects": statistics(b'"a":{' * 100_000),
    "nested deeply in an entry": statistics(b'"a": {"b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "with names that write to the terminal": statistics(b'"\\u001b[2J": {}'),
    "with an entry twice": statistics(b", ".join(TWINS[:1] * 2)),
    "with an entry under two names": statistics(b", ".join(TWINS)),
    "of a terabyte": sparse(2**40),
    "of 2 GB of zeros": sparse(1_999_999_999),
    "with more behind them": lambda path: path.write_bytes(b"{}{}"),
    "cut short": lambda path: path.write_bytes(b'{"a": {"input_channel_max": [1'),
    "cut in a name": lambda path: path.write_bytes(b'{"a": {"input_channel_max": [1]}, "b'),
    "that are pickled": lambda path: path.write_bytes(pickle.dumps({WEIGHT: {}})),
}  # fmt: skip


@pytest.mark.parametrize("make", STATISTICS.values(), ids=STATISTICS)
def test_statistics_are_refused(make: Callable, folder: Path) -> None:
    path = folder.parent / "stats.json"
    make(path)
    limit = SECONDS if path.is_symlink() or not path.is_file() or path.stat().st_size < 10**8 else 4 * SECONDS
    output = folder.parent / "out"
    ended = run_within(limit, "--input_dir", folder, "--output_dir", output, "--activation_stats", path)
    assert (ended.rc, ended.out) == (2, ""), ended.err
    assert ended.err.startswith("error: ")
    assert ended.err[:-1].isprintable(), ended.err
    assert "--debug" not in ended.err
    assert not output.exists()


OF_ANY_FILE = {
    what: spoil
    for what, spoil in HEADERS.items()
    if any(word in what for word in ("of ", "a million", "nested", "cut")) and "expert" not in what
}


@pytest.mark.parametrize("spoil", OF_ANY_FILE.values(), ids=OF_ANY_FILE)
def test_statistics_in_safetensors_are_refused(spoil: Callable, folder: Path) -> None:
    path = folder.parent / "stats.safetensors"
    save_file(
        {f"{WEIGHT}.input_channel_mean_square": torch.ones(128), NORM: torch.ones(128).bfloat16()}, path
    )
    spoil(path)
    assert_refused(folder, "--activation_stats", path, fragment=str(path))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F64", "I64", "U8"])
def test_statistics_of_another_dtype_are_refused(dtype: str, folder: Path) -> None:
    path = folder.parent / "stats.safetensors"
    size = 128 * {"BF16": 2, "F16": 2, "F64": 8, "I64": 8, "U8": 1}[dtype]
    entry = {"dtype": dtype, "shape": [128], "data_offsets": [0, size]}
    put_together(path, {f"{WEIGHT}.input_channel_max": entry}, bytes(size))
    assert_refused(folder, "--activation_stats", path, fragment="F32")


def test_statistics_that_become_shorter_while_they_are_used_are_named(folder: Path) -> None:
    """Mapped into memory, they would have ended the process with SIGBUS."""
    path = folder.parent / "stats.safetensors"
    save_file({f"{WEIGHT}.input_channel_mean_square": torch.ones(128)}, path)
    cut = forked.At("ftruncate", 2, ".safetensors", f"os.truncate({str(path)!r}, 100)")
    output = folder.parent / "out"
    ended = forked.run("--input_dir", folder, "--output_dir", output, "--activation_stats", path, at=cut)
    if ended.rc:  # it may have been read before
        assert ended.rc == 2
        assert str(path) in ended.err
        assert not (output / CONFIG).exists()


# --- code in disguise --------------------------------------------------------------------------


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.path}'",)


PICKLES = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "model.pth",
           "rng_state.pth", "model.ckpt", "tokenizer.pkl", "data.npy", "stats.pickle")  # fmt: skip


def test_no_pickle_is_ever_opened(folder: Path) -> None:
    exploded = folder.parent / "exploded"
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Bomb(exploded)))
    forbidden = """
import pickle, torch
def never(*_, **__): raise AssertionError("unpickled")
pickle.load = pickle.loads = pickle.Unpickler = torch.load = never
"""
    output = folder.parent / "out"
    ended = forked.run("--input_dir", folder, "--output_dir", output, before=forbidden)
    assert ended.rc == 0, ended.err
    assert not exploded.exists()


@pytest.mark.parametrize("name", [SHARD, INDEX, CONFIG])
def test_a_pickle_in_the_place_of_another_file_is_refused(name: str, folder: Path) -> None:
    exploded = folder.parent / "exploded"
    (folder / name).write_bytes(pickle.dumps(Bomb(exploded)))
    assert_refused(folder, fragment=name)
    assert not exploded.exists()


def test_code_that_comes_with_a_model_is_copied_and_never_run(folder: Path, checkpoint: Callable) -> None:
    ran = folder.parent / "ran"
    config(auto_map={"AutoConfig": "configuration_evil.Evil", "AutoModel": "modeling_evil.Evil"})(folder)
    for name in (
        "configuration_evil.py",
        "modeling_evil.py",
        "setup.py",
        "__init__.py",
        "conftest.py",
        "torch.py",
    ):
        (folder / name).write_text(f"open({str(ran)!r}, 'w')")
    output = folder.parent / "out"
    here = os.getcwd()
    os.chdir(folder)
    try:
        ended = forked.run(
            "--input_dir", ".", "--output_dir", output, before=f"import os; os.chdir({str(folder)!r})"
        )
    finally:
        os.chdir(here)
    assert ended.rc == 0, ended.err
    assert not ran.exists()
    assert (output / "modeling_evil.py").read_text() == (folder / "modeling_evil.py").read_text()


def test_the_cases_start_from_a_checkpoint_that_is_accepted(folder: Path, checkpoint: Callable) -> None:
    """Or they would be refused for another reason."""
    output = folder.parent / "out"
    ended = forked.run("--input_dir", folder, "--output_dir", output)
    assert ended.rc == 0, ended.err
    again = forked.run(
        "--input_dir", checkpoint(MODEL[0], **MODEL[1]), "--output_dir", folder.parent / "again"
    )
    assert again.rc == 0
    assert_same(output, folder.parent / "again")
