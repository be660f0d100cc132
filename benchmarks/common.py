"""What the benchmarks share: what a figure was measured on, and the file that it is written to."""

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))  # the package need not be installed; configs import each other


def facts() -> dict[str, Any]:
    """The command, the commit (and whether code was changed since), the machine and the versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "commit": commit(),
        "machine": platform.machine(),
        "cpu": next((line.partition(": ")[2] for line in lines if line.startswith("model name")), ""),
        "cores": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit, and whether code was changed since; "unknown" for a copy without its history, or without git."""
    git = ("git", "-C", str(ROOT))
    try:
        head = subprocess.run((*git, "rev-parse", "HEAD"), capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ", with changes" * subprocess.run((*git, "diff", "--quiet", "HEAD", "--", "*.py")).returncode


def write(path: Path | None, results: list[dict[str, Any]], notes: tuple[str, ...] = (), **versions: Any) -> None:
    """The facts, the rows of a table and the sentences below it, as JSON; nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        contents = {"facts": facts() | versions, "results": results, "notes": notes}
        path.write_text(json.dumps(contents, indent=2) + "\n")
