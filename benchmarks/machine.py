"""What all benchmarks share: flags, what machine they ran on, tables, results."""

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser that shows a module's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def describe() -> dict[str, object]:
    """Processor, cores, memory, devices and versions."""
    import torch

    from fp8lib import __version__

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.open() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(pages * page / 1e9, 1),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "quantize_fp8": __version__,
    }


def heading(machine: dict[str, object]) -> str:
    """One line for the top of a table."""
    devices = ", ".join(machine["devices"]) or "no CUDA device"
    return (
        f"{machine['date']}: {machine['cores']} cores of {machine['cpu']}, {machine['memory_gb']} GB, "
        f"{devices}; Python {machine['python']}, torch {machine['torch']}, "
        f"quantize_fp8 {machine['quantize_fp8']}"
    )


def table(rows: list[dict[str, object]]) -> str:
    """A Markdown table with the rows' keys as its head."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---" for _ in head) + "|"]
    lines += ["| " + " | ".join(_cell(row[key]) for key in head) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and abs(value) < 100
        else (f"{value:,.0f}" if isinstance(value, float) else str(value))
    )


def save(path: Path | None, machine: dict[str, object], rows: list[dict[str, object]]) -> None:
    """Write the results as JSON, if a path was given."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
        print(f"\nwrote {path}")
