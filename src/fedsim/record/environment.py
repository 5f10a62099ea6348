"""What a run ran on: versions, commit, platform, processor, devices."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("fedsim-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")
PACKAGE = Path(__file__).parents[1]


def machine() -> dict[str, Any]:
    """Versions, commit, Python, platform, processor and devices of this process; asks JAX for its devices."""
    import jax

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    kinds = sorted({d.device_kind for d in jax.devices()})
    return {
        "versions": versions,
        "git": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": {"platform": jax.default_backend(), "kind": ", ".join(kinds), "count": jax.device_count()},
        "processes": jax.process_count(),
    }


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def commit(source: Path = PACKAGE) -> dict[str, Any] | None:
    """Commit of the checkout that `source`, this package, belongs to and whether it was changed since; None outside of one."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(source), *args], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        # an installed copy may lie in a virtual environment inside somebody else's checkout
        git("ls-files", "--error-unmatch", "core.py")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return None
