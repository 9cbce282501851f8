"""The packages of fp8lib import downward only, and stay readable: no long file, no long function."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "fp8lib"

MAY_IMPORT = {
    "numerics": set(),
    "checkpoint": {"numerics"},
    "streaming": {"checkpoint", "numerics"},
    "verification": {"streaming", "checkpoint", "numerics", "terminal"},
    "model": {"streaming", "checkpoint", "numerics"},
    "calibration": {"model", "verification", "streaming", "checkpoint", "numerics", "terminal"},
    "outputs": {"model", "verification", "streaming", "checkpoint", "numerics", "terminal"},
    "reports": {
        "outputs",
        "model",
        "verification",
        "streaming",
        "checkpoint",
        "numerics",
        "terminal",
    },
    "job": {
        "reports",
        "calibration",
        "outputs",
        "model",
        "verification",
        "streaming",
        "checkpoint",
        "numerics",
        "terminal",
    },
    "terminal": set(),
    "command_line": {"job", "terminal"},
}
"""Package or module of fp8lib -> the others it may import. Everything may import fp8lib itself."""

WITHOUT_TORCH = ("checkpoint", "terminal", "command_line", "numerics.blocks", "numerics.modes")
"""Imported by `--help`, by `--dry_run` or by refusals, which must not wait for torch."""

LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def modules() -> list[Path]:
    return sorted(path for path in LIBRARY.rglob("*.py") if path != LIBRARY / "__init__.py")


def name_of(path: Path) -> str:
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """Modules below fp8lib that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (n.name.partition(".")[2] for n in node.names if n.name.startswith("fp8lib."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fp8lib":
            below = node.module.partition(".")[2]
            for alias in node.names:
                full = f"{below}.{alias.name}".strip(".")
                if below or (LIBRARY / alias.name).exists() or (LIBRARY / f"{alias.name}.py").exists():
                    yield full
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_downward(path: Path) -> None:
    package = name_of(path).partition(".")[0]
    imported = {name.partition(".")[0] for name in imports_of(path)}
    assert imported - {package} <= MAY_IMPORT[package]


def test_every_package_is_in_the_table() -> None:
    assert {name_of(path).partition(".")[0] for path in modules()} == MAY_IMPORT.keys()


def test_flags_are_known_to_jobs_and_the_command_line_only() -> None:
    for path in modules():
        if name_of(path).partition(".")[0] not in ("job", "command_line"):
            assert "argparse" not in path.read_text(), path


def test_what_refuses_does_not_import_torch() -> None:
    chosen = [name_of(p) for p in modules() if name_of(p).startswith(WITHOUT_TORCH)]
    assert len(chosen) > len(WITHOUT_TORCH)
    code = (
        "; ".join(f"import fp8lib.{name}" for name in chosen)
        + "; import sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name
