"""What somebody gave in place of a model's directory, and the way out."""

import os
import re
from contextlib import suppress
from pathlib import Path

from fp8lib.checkpoint.untrusted import open_regular, printable

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_CACHE = "models--"


def mistake(root: Path) -> str | None:
    """What is wrong with a path that holds no model, for an error after the path; None if it may hold one."""
    if not root.is_dir():
        return _no_directory(root)
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return None  # reading it says why
    weights = [n for n in names if n.endswith(".safetensors") and not n.startswith(".")]
    if not weights or set(weights) <= set(_ADAPTER):
        if any(name in _ADAPTER for name in names):
            return (
                "a LoRA adapter without its base model; merge the adapter first, or give the BF16 base as "
                "--input_dir and this as --lora_dir"
            )
        if gguf := [n for n in names if n.lower().endswith(".gguf")]:
            return (
                f"holds GGUF ({printable(gguf[0])}); convert back first, to BF16 safetensors, or give the "
                "original"
            )
        if snapshot := _snapshot_of(root):
            return f"a folder of the hub's cache; give the snapshot in it: {printable(snapshot)}"
    return None


def _no_directory(root: Path) -> str:
    if os.path.lexists(root) and not root.exists():
        return "a link that leads nowhere; check the path"
    if root.exists():
        return _file(root)
    if _HUB_ID.match(str(root)) and not root.parent.exists():
        return (
            f"no such directory; if it is an id of the Hugging Face hub, download it first: "
            f"hf download {root} --local-dir {root.name}"
        )
    return "no such directory; check the path"


def _file(path: Path) -> str:
    if path.suffix.lower() == ".gguf":
        return "a GGUF file; convert back first, to a directory of BF16 safetensors, or give the original"
    return f"a file; give the directory that it is in: {printable(path.absolute().parent)}"


def _snapshot_of(root: Path) -> Path | None:
    """The snapshot to take of `models--…` or of the `snapshots` in it: that of `main`, or the only one."""
    home = root.parent if root.name == "snapshots" else root
    if not home.name.startswith(_CACHE):
        return None
    with suppress(Exception), open_regular(home / "refs" / "main") as file:
        commit = file.read(100).decode("ascii").strip()
        if commit.isalnum() and (home / "snapshots" / commit).is_dir():
            return home / "snapshots" / commit
    with suppress(OSError):
        found = sorted(p for p in (home / "snapshots").iterdir() if p.is_dir())
        return found[0] if len(found) == 1 else None
    return None
