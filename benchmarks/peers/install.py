"""Makes the peers' environments, one each, from their pinned requirements: `python benchmarks/peers/install.py [NAME...]`.

They go to benchmarks/peers/.envs/NAME, which git ignores. An environment whose requirements have not changed since it was
made is left alone; one that has changed, or whose installation was interrupted, is made anew. Nothing of a peer is ever
imported by fedsim, and fedsim is in none of these environments.
"""

from __future__ import annotations

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


def installed(name: str) -> bool:
    """Whether the environment is complete and of the present requirements."""
    done = ENVS / name / "requirements.txt"
    return done.exists() and done.read_text() == REQUIREMENTS[name].read_text()


def install(name: str) -> None:
    """Makes one environment; its copy of the requirements is written last, as the sign that it is complete."""
    shutil.rmtree(ENVS / name, ignore_errors=True)
    venv.create(ENVS / name, with_pip=True)
    pip = [str(python_of(name)), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(REQUIREMENTS[name])], check=True)
    shutil.copy(REQUIREMENTS[name], ENVS / name / "requirements.txt")


def main(names: list[str]) -> None:
    """Makes those that are missing."""
    unknown = sorted(set(names) - set(REQUIREMENTS))
    if unknown:
        raise SystemExit(f"Expected {', '.join(unknown)} to be among {', '.join(REQUIREMENTS)}.")
    for name in names or REQUIREMENTS:
        if installed(name):
            print(f"{name}: there already")
            continue
        print(f"{name}: installing", flush=True)
        install(name)


if __name__ == "__main__":
    main(sys.argv[1:])
