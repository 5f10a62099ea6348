"""Makes the peers' environments, one each, from their pinned requirements: `python benchmarks/peers/install.py [NAME...]`.

With `--cuda` JAX gets its plugin for CUDA 12, which a CPU's requirements leave out.

They go to benchmarks/peers/.envs/NAME, which git ignores. An environment whose requirements have not changed since it was
made is left alone; one that has changed, or whose installation was interrupted, is made anew. Nothing of a peer is ever
imported by fedsim, and fedsim is in none of these environments.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
ENVS = HERE / ".envs"
REQUIREMENTS = {file.stem: file for file in sorted((HERE / "requirements").glob("*.txt"))}


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment."""
    return ENVS / name / "bin" / "python"


def requirements(name: str, cuda: bool = False) -> str:
    """The text of an environment's requirements."""
    text = REQUIREMENTS[name].read_text()
    return re.sub("^jax==", "jax[cuda12]==", text, flags=re.MULTILINE) if cuda else text


def installed(name: str, cuda: bool = False) -> bool:
    """Whether the environment is complete and of the present requirements; one with CUDA serves a CPU too."""
    done = ENVS / name / "requirements.txt"
    fit = {requirements(name, cuda), requirements(name, cuda=True)}
    return done.exists() and done.read_text() in fit


def install(name: str, cuda: bool = False) -> None:
    """Makes one environment; its copy of the requirements is written last, as the sign that it is complete."""
    shutil.rmtree(ENVS / name, ignore_errors=True)
    venv.create(ENVS / name, with_pip=True)
    pip = [str(python_of(name)), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    given = ENVS / name / "given.txt"
    given.write_text(requirements(name, cuda))
    subprocess.run([*pip, "-r", str(given)], check=True)
    given.rename(ENVS / name / "requirements.txt")


def main(names: list[str], cuda: bool = False) -> None:
    """Makes those that are missing."""
    unknown = sorted(set(names) - set(REQUIREMENTS))
    if unknown:
        raise SystemExit(f"Expected {', '.join(unknown)} to be among {', '.join(REQUIREMENTS)}.")
    for name in names or REQUIREMENTS:
        if installed(name, cuda):
            print(f"{name}: there already")
            continue
        print(f"{name}: installing", flush=True)
        install(name, cuda)


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if name != "--cuda"], "--cuda" in sys.argv[1:])
