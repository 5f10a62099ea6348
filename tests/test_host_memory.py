"""What a process may have of the machine's memory, by files as Linux shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim import host_memory
from fedsim.data.gate import require_memory

LARGE = 2**40
UNLIMITED = "9223372036854771712\n"  # as version 1 of cgroups says it


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 1 TiB, of which 4,000,000 kB are free, and of which nothing is known of groups."""
    (tmp_path / "meminfo").write_text("MemTotal:  9000000 kB\nMemAvailable:  4000000 kB\n")
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "OWN", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(host_memory, "physical", lambda: LARGE)
    return tmp_path


def write(folder: Path, **files: str) -> None:
    """Files of a group; `memory_max` stands for memory.max."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("memory_", "memory.", 1)).write_text(text)


def found() -> tuple[int, int]:
    return host_memory.total(), host_memory.available()


def test_without_groups_it_is_the_machines(machine: Path) -> None:
    assert found() == (LARGE, 4_096_000_000)
    (machine / "cgroup").write_text("0::/\nno line of it\n")
    assert found() == (LARGE, 4_096_000_000)
    (machine / "meminfo").unlink()
    assert found() == (LARGE, LARGE)


def test_a_container_sees_its_own_limit_at_the_top(machine: Path) -> None:
    (machine / "cgroup").write_text("0::/\n")
    write(
        machine / "groups",
        memory_max="3000000\n",
        memory_current="2500000\n",
        memory_stat="anon 7\ninactive_file 100000\n",
    )
    assert found() == (3_000_000, 600_000), "cached files can be had back"
    write(machine / "groups", memory_max="max\n")
    assert found() == (LARGE, 4_096_000_000)
    write(machine / "groups", memory_max="junk\n", memory_stat="\x00")
    assert found() == (LARGE, 4_096_000_000)


def test_the_lowest_limit_of_the_groups_around_it_holds(machine: Path) -> None:
    """As of a job of a batch system: the step has no limit, the job has one, the user a higher one."""
    (machine / "cgroup").write_text("0::/user.slice/job_7/step_0\n")
    write(machine / "groups" / "user.slice", memory_max="9000000\n", memory_current="8900000\n")
    write(machine / "groups" / "user.slice" / "job_7", memory_max="5000000\n", memory_current="1000000\n")
    write(machine / "groups" / "user.slice" / "job_7" / "step_0", memory_max="max\n", memory_current="900000\n")
    assert found() == (5_000_000, 100_000), "what the user's other jobs use is gone, too"


@pytest.mark.parametrize("visible", [True, False])
def test_version_one(machine: Path, visible: bool) -> None:
    """Its folder of memory; in a container the path is the host's, and the files lie at the top."""
    (machine / "cgroup").write_text("9:name=systemd:/\n4:cpu,memory:/docker/ab\n3:cpuset:/\n0::/\n")
    where = machine / "groups" / "memory" / ("docker/ab" if visible else "")
    write(machine / "groups" / "memory", memory_limit_in_bytes=UNLIMITED, memory_usage_in_bytes="1\n")
    write(where, memory_limit_in_bytes="3000000\n", memory_usage_in_bytes="2500000\n")
    write(where, memory_stat="inactive_file 5\ntotal_inactive_file 100000\n")
    assert found() == (3_000_000, 600_000)


def test_unified_groups_beside_version_one(machine: Path) -> None:
    (machine / "cgroup").write_text("4:memory:/\n0::/job\n")
    write(machine / "groups" / "memory", memory_limit_in_bytes=UNLIMITED)
    write(machine / "groups" / "unified" / "job", memory_max="7000\n", memory_current="1000\n")
    assert found() == (7000, 6000)


def test_the_gate_of_data_goes_by_it(machine: Path) -> None:
    (machine / "cgroup").write_text("0::/\n")
    write(machine / "groups", memory_max="2000\n")
    require_memory(2000, "images", "lower image_size")
    with pytest.raises(
        ValueError, match=r"Expected images to need less memory than there is, not .*; lower image_size\."
    ):
        require_memory(2001, "images", "lower image_size")


def test_this_machine_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 2**28 < host_memory.total() <= host_memory.physical()
    assert 0 < host_memory.available() <= host_memory.total()
