"""Fetching out of a Debian package, and licences that must be accepted; small packages made here, no network."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from fedsim.data import assets, catalogue, debian, show


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A real .deb as the only asset, `tiny`, that a stand-in for apt-get hands out; the cache is empty."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not on this machine")
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: tiny\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: two files\n"
    )
    (root / "usr/share/tiny").mkdir(parents=True)
    (root / "usr/share/tiny/a.gz").write_bytes(b"a" * 1000)
    (root / "usr/share/tiny/b.gz").write_bytes(b"b" * 500)
    file = tmp_path / "tiny_1.0_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(root), str(file)], check=True, capture_output=True)
    tiny = catalogue.Asset(
        name="tiny",
        package="tiny",
        version="1.0",
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        size=file.stat().st_size,
        members=(
            catalogue.Member("usr/share/tiny/b.gz", "b.gz", 500),
            catalogue.Member("usr/share/tiny/a.gz", "a.gz", 1000),
        ),
        kind="data",
        what="two files",
        licence="CC0-1.0",
        channel="apt",
    )
    monkeypatch.setattr(assets, "ASSETS", {"tiny": tiny})
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    tools = tmp_path / "bin"
    tools.mkdir()
    apt = tools / "apt-get"
    apt.write_text(f'#!/bin/sh\n[ "$3" = tiny=1.0 ] || {{ echo "E: no such package" >&2; exit 100; }}\ncp {file} .\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    return file


def test_members_of_a_debian_package_are_fetched(package: Path) -> None:
    (folder,) = assets.fetch(["tiny"])
    assert (folder / "a.gz").read_bytes() == b"a" * 1000
    assert (folder / "b.gz").read_bytes() == b"b" * 500
    assert not list((assets.cache_dir() / "downloads").iterdir())


def test_a_copied_package_is_used(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = assets.cache_dir() / "downloads"
    downloads.mkdir(parents=True)
    shutil.copy(package, downloads)
    monkeypatch.setattr(debian, "download", lambda *_: pytest.fail("apt was asked"))
    assert assets.fetch(["tiny"])


def test_another_version_and_a_missing_tool_are_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = assets.ASSETS["tiny"]
    monkeypatch.setitem(assets.ASSETS, "tiny", tiny._replace(version="2.0"))
    with pytest.raises(ValueError, match="E: no such package"):
        assets.fetch(["tiny"])
    monkeypatch.setitem(assets.ASSETS, "tiny", tiny._replace(sha256="0" * 64))
    with pytest.raises(ValueError, match="apt-cache policy"):
        assets.fetch(["tiny"])
    monkeypatch.setitem(assets.ASSETS, "tiny", tiny._replace(members=(catalogue.Member("usr/c.gz", "c.gz", 1),)))
    with pytest.raises(ValueError, match=r"to hold usr/c\.gz"):
        assets.fetch(["tiny"])
    package_file = next((assets.cache_dir() / "downloads").glob("*.deb"))
    package_file.unlink()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="Expected apt-get on this machine"):
        assets.fetch(["tiny"])


def test_a_licence_must_be_accepted_by_name(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = assets.ASSETS["tiny"]
    monkeypatch.setitem(assets.ASSETS, "strict", tiny._replace(name="strict", accept="CC-BY-NC-SA"))
    for wrong in (None, "MIT"):
        with pytest.raises(
            ValueError, match="add --accept-licence CC-BY-NC-SA, in Python accept_licence='CC-BY-NC-SA'"
        ):
            assets.fetch(["tiny", "strict"], accepted=wrong)
    assert not assets.is_fetched("tiny"), "refused before anything is fetched"
    assert len(assets.fetch(["strict"], accepted="CC-BY-NC-SA")) == 1
    with pytest.raises(ValueError, match="accept_licence=None"):
        assets.fetch(["strict"])


def test_all_assets_are_fetched_but_those_that_ask_for_more(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a name: a licence that is not accepted, or an apt that fails, leaves that asset out and says how."""
    tiny = assets.ASSETS["tiny"]
    strict = tiny._replace(name="strict", accept="CC-BY-NC-SA")
    broken = tiny._replace(name="broken", sha256="0" * 64)
    monkeypatch.setattr(assets, "ASSETS", {"strict": strict, "broken": broken, "tiny": tiny})
    show.data_fetch()
    said = capsys.readouterr().out
    assert [assets.is_fetched(name) for name in assets.ASSETS] == [False, False, True]
    assert "strict: left out" in said and "alone: fedsim data fetch strict --accept-licence CC-BY-NC-SA\n" in said
    assert "broken: left out" in said and "alone: fedsim data fetch broken\n" in said
    show.data_fetch(accepted="CC-BY-NC-SA")
    assert assets.is_fetched("strict")
    with pytest.raises(ValueError, match="sha256"):
        show.data_fetch(["broken"])
    monkeypatch.setitem(assets.ASSETS, "broken", broken._replace(channel="pip"))
    monkeypatch.setattr(assets, "_download", lambda *_: (_ for _ in ()).throw(ValueError("no network")))
    with pytest.raises(ValueError, match="no network"):  # what every user can have is not left out in silence
        show.data_fetch()
