"""Any single flipped bit of a directory that this tool made is found by --verify_only --verify_samples all.

Shards and copied files are flipped many at a time, one bit in each, and every one must be told by a line of
its own. A flip in a header, config.json, the index or the manifest may end the run: it has one for itself.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fp8lib.checkpoint.headers import read_shard
from fp8lib.job import verifying

SHARDS = 24
COPIED = ["tokenizer.json", "merges.txt", "chat_template.jinja", "sub/notes.txt"]
NAMED = ["config.json", "model.safetensors.index.json", "fp8_quantization.json", "SHA256SUMS"]
DATA_RUNS, OTHER_FLIPS, HEADER_FLIPS = 12, 26, 60
"""12 x (24 + 4) + 4 x 26 + 60 = 500 flips."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bits") / "in"
    (folder / "sub").mkdir(parents=True)
    generator = torch.Generator().manual_seed(5)
    for i in range(SHARDS):
        layer = f"model.layers.{i}"
        state = {
            f"{layer}.self_attn.o_proj.weight": torch.randn(128, 256, generator=generator) * 0.01,
            f"{layer}.input_layernorm.weight": torch.randn(256, generator=generator),
            f"{layer}.mlp.gate.weight": torch.randn(4, 256, generator=generator),
        }
        state[f"{layer}.self_attn.o_proj.weight"][:, 128:] = 0  # its scale is 1, its codes are 0
        state = {name: tensor.bfloat16() for name, tensor in state.items()}
        save_file(state, folder / f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5_text", "hidden_size": 256}))
    for name in COPIED:
        (folder / name).write_text(f"{name}, and what is in it\n" * 3)
    return folder


@pytest.fixture(scope="module")
def finished(original: Path, cli: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    assert cli("--input_dir", original, "--output_dir", folder, "--checksums").rc == 0
    return folder


@contextmanager
def flipped(path: Path, byte: int, bit: int) -> Iterator[None]:
    with path.open("r+b") as file:
        file.seek(byte)
        before = file.read(1)
        file.seek(byte)
        file.write(bytes([before[0] ^ 1 << bit]))
    try:
        yield
    finally:
        with path.open("r+b") as file:
            file.seek(byte)
            file.write(before)


@pytest.fixture
def problems(
    original: Path, finished: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[str]]:
    """`problems()`: every line that --verify_only has to say of the directory, or its refusal."""
    found = []
    summarize = verifying.summarize

    def noted(flags: object, talk: object, findings: object, *rest: object) -> object:
        found.extend(findings.problems)
        return summarize(flags, talk, findings, *rest)

    monkeypatch.setattr(verifying, "summarize", noted)

    def call() -> list[str]:
        found.clear()
        flags = ("--verify_only", "--verify_samples", "all", "--quiet", "--workers", 1)
        result = cli("--input_dir", original, "--output_dir", finished, *flags)
        assert result.rc == (0 if not found and not result.err else 1 if found else 2), result
        return list(found) or result.err.splitlines()

    return call


def test_there_is_nothing_to_find_in_a_sound_directory(problems: Callable) -> None:
    assert problems() == []


def test_flips_in_weights_scales_kept_tensors_and_copied_files(finished: Path, problems: Callable) -> None:
    rng = random.Random(0)
    shards = [read_shard(path) for path in sorted(finished.glob("*.safetensors"))]
    for number in range(DATA_RUNS):
        flips = []
        for shard in shards:
            # A fourth of the flips in scales, of which there are 2 to 65,536 weights.
            kinds = [t for t in shard.tensors if t.name.endswith("_scale_inv") == (number % 4 == 0)]
            tensor = rng.choice(kinds)
            flips.append((shard.path, tensor.start + rng.randrange(tensor.nbytes), shard.name, tensor.name))
        flips += [(finished / n, rng.randrange((finished / n).stat().st_size), n, n) for n in COPIED]
        with_flips = [flipped(path, byte, rng.randrange(8)) for path, byte, *_ in flips]
        for each in with_flips:
            each.__enter__()
        try:
            lines = problems()
        finally:
            for each in with_flips:
                each.__exit__(None, None, None)
        # By another way than SHA256SUMS, which a directory need not have.
        lines = [line for line in lines if "SHA256SUMS" not in line]
        for _, byte, *names in flips:
            assert any(line.startswith(tuple(names)) for line in lines), (names, byte, lines)


@pytest.mark.parametrize("name", NAMED)
def test_flips_in_what_the_tool_writes_beside_the_shards(
    name: str, finished: Path, problems: Callable
) -> None:
    rng, size = random.Random(name), (finished / name).stat().st_size
    for _ in range(OTHER_FLIPS):
        byte, bit = rng.randrange(size), rng.randrange(8)
        with flipped(finished / name, byte, bit):
            assert problems(), (byte, bit)


def test_flips_in_headers(finished: Path, problems: Callable) -> None:
    rng = random.Random(1)
    for _ in range(HEADER_FLIPS):
        path = rng.choice(sorted(finished.glob("*.safetensors")))
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        # Half of them before the padding.
        byte, bit = rng.randrange(rng.choice([header, header // 8])), rng.randrange(8)
        with flipped(path, byte, bit):
            assert problems(), (path, byte, bit)


def test_a_manifest_of_an_earlier_version_is_not_damaged(
    finished: Path, original: Path, tmp_path: Path, cli: Callable
) -> None:
    folder = shutil.copytree(finished, tmp_path / "fp8")
    (folder / "SHA256SUMS").unlink()
    document = json.loads((folder / "fp8_quantization.json").read_text())
    for key in ("files", "headers", "sha256"):
        del document[key]
    (folder / "fp8_quantization.json").write_text(json.dumps(document))
    result = cli("--input_dir", original, "--output_dir", folder, "--verify_only")
    assert result.rc == 0, result.out
    assert "of an earlier version, which took no checksums" in result.err


# --- without a flip ----------------------------------------------------------------------------


def test_a_copied_file_that_is_missing_is_named(
    finished: Path, original: Path, tmp_path: Path, cli: Callable
):
    folder = shutil.copytree(finished, tmp_path / "fp8")
    (folder / "tokenizer.json").unlink()
    result = cli("--input_dir", original, "--output_dir", folder, "--verify_only")
    assert result.rc == 1
    assert "tokenizer.json: missing from the directory" in result.out
