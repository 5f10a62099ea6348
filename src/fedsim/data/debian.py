"""Files out of a Debian package, fetched by the machine's own apt, never installed."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def download(package: str, version: str, folder: Path) -> Path:
    """Lets `apt-get download` put the package into the folder; returns its file.

    Raises:
        ValueError: this machine has no apt, or apt does not get the package; with the remedy.
    """
    _require("apt-get", package)
    command = ["apt-get", "--quiet", "download", f"{package}={version}"]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    files = sorted(folder.glob("*.deb"))
    if answer.returncode != 0 or not files:
        lines = [line for line in answer.stderr.splitlines() if line.startswith("E:")] or ["apt gave no reason"]
        raise ValueError(
            f"Expected apt to download {package}={version} ({lines[-1]}); run `apt-get update` first, or fetch the data "
            "set by TFDS where there is a network."
        )
    return files[0]


@contextmanager
def opened(deb: Path) -> Iterator[tarfile.TarFile]:
    """The package's files as a tar stream; members must be taken in their order."""
    _require("dpkg-deb", deb.name)
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            yield archive
        process.terminate()  # what comes after the last wanted member is of no use


def unpack(deb: Path, wanted: Sequence[tuple[str, Path]]) -> None:
    """Writes the wanted members, by their path without the leading `./`, to files.

    Raises:
        ValueError: the package lacks one.
    """
    targets = dict(wanted)
    with opened(deb) as archive:
        for entry in archive:
            target = targets.pop(entry.name.removeprefix("./"), None)
            stream = archive.extractfile(entry) if target else None
            if target and stream:
                with target.open("wb") as file:
                    shutil.copyfileobj(stream, file, 1 << 20)
            if not targets:
                return
    raise ValueError(f"Expected {deb.name} to hold {', '.join(targets)}; it is another version of the package.")


def _require(program: str, what: str) -> None:
    if shutil.which(program) is None:
        raise ValueError(
            f"Expected {program} on this machine for {what}, a Debian package; on another system fetch the data set by "
            "TFDS where there is a network."
        )
