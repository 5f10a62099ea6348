"""Clients' memory: a dict says the same, wherever the rows lie; a checkpoint writes what has changed and stays as it was."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedsim
from fedsim.engine import client_memory as memories
from fedsim.engine.client_memory import Memory, Table, grown
from fedsim.record.checkpoint import KEEP
from remembers import REMEMBERS

Tree = Any


def init(key: jax.Array, held: Tree) -> Tree:
    """A row of all that may stand in one: an odd flag before floats, half precision, a counter, a leaf of no elements."""
    return {
        "flag": jnp.zeros((3,), bool),
        "matrix": jnp.zeros((2, 5)),
        "half": jnp.zeros((4,), jnp.bfloat16),
        "visits": jnp.zeros((), jnp.int32),
        "none": jnp.zeros((0, 7)),
    }


def drawn(rng: np.random.Generator, members: int) -> Tree:
    """Rows of as many clients, (M, ...)."""
    return {
        "flag": rng.random((members, 3)) < 0.5,
        "matrix": rng.normal(size=(members, 2, 5)).astype(np.float32),
        "half": rng.normal(size=(members, 4)).astype(jnp.bfloat16),
        "visits": rng.integers(0, 9, members).astype(np.int32),
        "none": np.zeros((members, 0, 7), np.float32),
    }


def rounds(count: int, population: int, members: int) -> list[tuple[np.ndarray, Tree]]:
    """Cohorts without replacement and what they keep."""
    rng = np.random.default_rng(0)
    return [(rng.choice(population, members, replace=False), drawn(rng, members)) for _ in range(count)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "memory.rows"


def expect(memory: Memory, oracle: dict[int, Tree], ids: np.ndarray) -> None:
    rows, seen = memory.gather(ids)
    assert seen.tolist() == [i in oracle for i in ids.tolist()]
    for place, i in enumerate(ids.tolist()):
        kept = oracle.get(i, jax.tree.map(lambda r: np.zeros_like(r[0]), rows))
        for got, want in zip(jax.tree.leaves(rows), jax.tree.leaves(kept), strict=True):
            np.testing.assert_array_equal(got[place], want)


@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_dict_keeps_the_same(where: str, file: Path) -> None:
    """Through growth, checkpoints and rows that move."""
    memory, oracle = Memory(init, (), file if where == "file" else None), {}
    expect(memory, oracle, np.array([3, 10**6]))
    for number, (ids, new) in enumerate(rounds(40, 90, 7)):
        memory.scatter(ids, new)
        oracle |= {i: jax.tree.map(lambda r, p=p: r[p], new) for p, i in enumerate(ids.tolist())}
        if where == "file" and number % 3 == 0:
            memory.seal()
        expect(memory, oracle, np.arange(95))
    rows, ids = memory.state()
    assert ids.tolist() == list(oracle), "in the order of first visits"
    assert jax.tree.map(lambda r: (r.shape[1:], r.dtype), rows) == jax.tree.map(
        lambda s: (s.shape, s.dtype), jax.eval_shape(init, None, ())
    )


def test_rows_come_in_the_shape_of_the_ids(file: Path) -> None:
    memory = Memory(init, (), file)
    memory.scatter(np.array([4, 2]), drawn(np.random.default_rng(0), 2))
    rows, seen = memory.gather(np.array([[4, 1], [4, 2]]))
    assert rows["matrix"].shape == (2, 2, 2, 5) and seen.tolist() == [[True, False], [True, True]]


def test_in_a_file_as_in_memory_bit_for_bit(file: Path) -> None:
    one, two = Memory(init, ()), Memory(init, (), file)
    for ids, new in rounds(30, 60, 8):
        one.scatter(ids, new)
        two.scatter(ids, new)
        two.seal()
    assert isinstance(two.rows, np.memmap) and not isinstance(one.rows, np.memmap)
    for a, b in zip(jax.tree.leaves(one.state()), jax.tree.leaves(two.state()), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_nothing_is_made_for_those_who_keep_nothing(file: Path) -> None:
    memory = Memory(lambda key, held: (), (), file)
    memory.scatter(np.arange(5), ())
    assert memory.gather(np.arange(3))[0] == () and memory.count == 0
    assert memory.damage(memory.seal()) is None and not file.exists()


def test_arrays_double(file: Path) -> None:
    assert grown(np.ones(4), 3).shape == (4,) and grown(np.ones(4), 5).tolist() == [1.0] * 4 + [0.0] * 4
    memory, sizes = Memory(init, (), file), set()
    for ids in np.arange(1000).reshape(-1, 5):
        memory.scatter(ids, drawn(np.random.default_rng(0), 5))
        sizes.add(file.stat().st_size)
    assert len(sizes) <= 9 and max(sizes) <= 2 * 1000 * memory.row.itemsize


def test_a_client_of_a_large_population_costs_its_own_row(file: Path) -> None:
    """The index of 10^6 clients is 4 bytes each; nothing else knows of them."""
    memory = Memory(init, (), file)
    memory.scatter(np.array([10**6 - 1, 5]), drawn(np.random.default_rng(0), 2))
    assert memory.place.nbytes <= 4 * 10**6 and len(memory.seen) <= 4 and len(memory.rows) <= 4
    assert memory.seen.itemsize * 2 + memory.place.itemsize <= 64, "bytes of a client that was seen, doubling included"


def test_a_checkpoint_writes_the_rows_of_its_cohort(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many clients were seen: bytes that changed in the file, rows that were read for a checksum."""
    summed = []
    crc32 = memories.zlib.crc32
    monkeypatch.setattr(memories.zlib, "crc32", lambda row: summed.append(1) or crc32(row))
    memory, rng, written = Memory(init, (), file), np.random.default_rng(0), {}
    for seen in (100, 3000):
        while memory.count < seen:
            memory.scatter(np.arange(memory.count, memory.count + 50), drawn(rng, 50))
        memory.seal()
        before = np.fromfile(file, np.uint8)
        summed.clear()
        for _ in range(2):  # two rounds of one cohort between two checkpoints: the rows are written to one place
            memory.scatter(np.arange(20, 30), drawn(rng, 10))
        table = memory.seal()
        after = np.fromfile(file, np.uint8)
        changed = np.flatnonzero(after[: len(before)] != before).tolist()
        rows = {at // memory.row.itemsize for at in changed} | set(
            range(len(before) // memory.row.itemsize, memory.used)
        )
        written[seen] = (len(summed), len(rows))
        assert sum(a.nbytes for a in table) == 12 * memory.count + 8
    assert written[100] == written[3000] == (10, 10)


def test_kept_checkpoints_stay_and_slots_come_back(file: Path) -> None:
    """Every table of the last `KEEP` still finds its rows; the file holds no more than those need."""
    memory, tables = Memory(init, (), file, KEEP), []
    for number, (ids, new) in enumerate(rounds(60, 40, 10)):
        memory.scatter(ids, new)
        assert [memory.damage(t) for t in tables[-KEEP:]] == [None] * len(tables[-KEEP:]), number
        if number % 2:
            tables.append(memory.seal())
    assert memory.damage(tables[0]) is not None, "the test sees rows that were written over"
    assert memory.used <= 40 + (KEEP + 1) * 20


def test_goes_on_from_a_table(file: Path) -> None:
    """What was written after it is forgotten; kept tables survive the second life too."""
    memory, twin = Memory(init, (), file), Memory(init, ())
    visits, tables = rounds(24, 30, 6), []
    for ids, new in visits[:12]:
        memory.scatter(ids, new)
        twin.scatter(ids, new)
        tables.append(memory.seal())
    memory.scatter(*visits[20])  # lost
    memory.scatter(*visits[21])

    memory = Memory(init, (), file)
    assert memory.damage(tables[-1]) is None
    memory.restore(tables[-1])
    for ids, new in visits[12:]:
        memory.scatter(ids, new)
        twin.scatter(ids, new)
        assert [memory.damage(t) for t in tables[-KEEP:]] == [None] * KEEP
        tables.append(memory.seal())
    for a, b in zip(jax.tree.leaves(memory.state()), jax.tree.leaves(twin.state()), strict=True):
        assert a.tobytes() == b.tobytes()
    assert memory.used <= 30 + (KEEP + 1) * 6 * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_store_beside_goes_on_from_its_description(file: Path, dtype: str) -> None:
    """What a codec keeps is described in JSON: shapes and dtypes, those that NumPy has no letter for too."""
    init = lambda key, held: {"b": jnp.zeros((2, 3), dtype), "a": jnp.zeros((), dtype)}  # noqa: E731 - one expression, used twice
    memory = Memory(lambda key, held: (), (), file)
    store = memory.store("codec-0", init, ())
    rows = {"a": np.arange(2).astype(jnp.dtype(dtype)), "b": np.arange(12).reshape(2, 2, 3).astype(jnp.dtype(dtype))}
    store.scatter(np.array([4, 1]), rows)
    table, described = store.seal(), json.loads(json.dumps(memory.described()))
    again = Memory(lambda key, held: (), (), file)
    again.make_beside(described)
    assert again.beside["codec-0"].damage(table) is None
    again.beside["codec-0"].restore(table)
    found, ids = again.store("codec-0", init, ()).state()
    assert ids.tolist() == [4, 1]
    jax.tree.map(np.testing.assert_array_equal, found, rows)


def test_damage_is_named(file: Path) -> None:
    memory = Memory(init, (), file)
    ids, new = rounds(1, 30, 6)[0]
    memory.scatter(ids, new)
    table = memory.seal()
    whole = file.read_bytes()
    at = 3 * memory.row.itemsize + memory.row.fields["1"][1]
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert f"the row of client {ids[3]} differs from its checksum" in str(memory.damage(table))
    file.write_bytes(whole[: 5 * memory.row.itemsize])
    assert "of" in str(memory.damage(table))
    file.unlink()
    assert "has 0 of" in str(memory.damage(table))


def test_a_full_disk_is_an_error_before_anything_changes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(init, (), file)
    ids, new = rounds(1, 30, 6)[0]
    memory.scatter(ids, new)
    before = memory.state()
    full = shutil.disk_usage(file.parent)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match=r"Expected room for \d+ more bytes of clients' memory in .*, got 10; make room"):
        memory.scatter(np.arange(100, 106), new)
    for a, b in zip(jax.tree.leaves(memory.state()), jax.tree.leaves(before), strict=True):
        assert a.tobytes() == b.tobytes()
    memory.scatter(ids, new)  # rows that have their slot need no room


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from fedsim.engine.client_memory import Memory

memory = Memory(lambda key, held: {"x": np.zeros(1000, np.float32)}, (), Path(sys.argv[1]))
memory.scatter(np.arange(2), {"x": np.ones((2, 1000), np.float32)})
table = memory.seal()
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))  # the disk is full for larger files
try:
    memory.scatter(np.arange(2, 4), {"x": np.ones((2, 1000), np.float32)})
except OSError as error:
    print(error)
assert memory.damage(table) is None and memory.state()[1].tolist() == [0, 1], "as before"
"""


def test_a_file_that_cannot_grow_is_named_with_the_remedy(file: Path, environment: dict[str, str]) -> None:
    """The limit of the system on a file's size answers as a full disk does."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(file)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"Expected clients' memory in {file} to be written (File too large); make room or choose another disk.\n"
    )


def test_a_folder_in_the_files_place_is_named_and_damages_no_checkpoint(file: Path) -> None:
    memory = Memory(init, (), file)
    memory.scatter(*rounds(1, 30, 6)[0])
    table = memory.seal()
    file.unlink(), file.mkdir()
    with pytest.raises(
        ValueError, match=r"memory\.rows to be readable \(Is a directory\); move the folder of that name away"
    ):
        memory.damage(table)
    with pytest.raises(
        OSError, match=r"memory\.rows to be written \(Is a directory\); move the folder of that name away"
    ):
        Memory(init, (), file).scatter(*rounds(1, 30, 6)[0])


BARRED = """
import os, sys
from pathlib import Path
import numpy as np
from fedsim.engine.client_memory import Memory

rows = {"x": np.ones((2, 10), np.float32)}
make = lambda: Memory(lambda key, held: {"x": np.zeros(10, np.float32)}, (), Path(sys.argv[1]))
memory = make()
memory.scatter(np.arange(2), rows)
table = memory.seal()
os.chmod(sys.argv[1], 0)
if os.geteuid() == 0:
    os.setuid(65534)  # root may read and write all files
for use in (lambda: memory.damage(table), lambda: make().scatter(np.arange(2), rows)):
    try:
        use()
    except (OSError, ValueError) as error:
        print(error)
"""


def test_a_file_that_one_may_not_read_damages_no_checkpoint(file: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARRED, str(file)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [
        f"Expected {file} to be readable (Permission denied); make it so for you.",
        f"Expected clients' memory in {file} to be written (Permission denied); make its folder writable for you or choose "
        "another one.",
    ], done.stderr


def test_rows_have_their_room_before_they_are_written(file: Path) -> None:
    """Else the system kills a process that writes to a map where the disk is full."""
    memory = Memory(lambda key, held: {"x": np.zeros(100_000, np.float32)}, (), file)
    memory._take(3)
    assert file.stat().st_blocks * 512 >= 3 * memory.row.itemsize
    with pytest.raises(OSError, match=r"File too large|No space left"):
        memories.reserve(file, 2**62, 2**61)


def test_without_a_file_there_is_no_checkpoint() -> None:
    memory = Memory(init, ())
    memory.scatter(*rounds(1, 30, 6)[0])
    with pytest.raises(ValueError, match="Expected the memory to have a file"):
        memory.seal()


@pytest.mark.slow
def test_a_damaged_row_gives_way_to_an_older_checkpoint(
    tmp_path: Path, blobs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, compile_once: None
) -> None:
    """A bit flipped in a row that only the newest checkpoint has: the run goes on from the one before, to the same bits."""
    sealed: list[tuple[Table, int]] = []
    seal = Memory.seal

    def watched(memory: Memory) -> Table:
        sealed.append((seal(memory), memory.row.itemsize))
        return sealed[-1][0]

    monkeypatch.setattr(Memory, "seal", watched)
    (tmp_path / "mine.py").write_text(REMEMBERS)
    config = fedsim.Config(
        dataset=str(blobs(tmp_path)), backbone="mlp", peft="full", clients=12, clients_per_round=4, min_size=3,
        rounds=5, optimizer="sgd(momentum=0.9)", lr=0.01, algorithm=f"{tmp_path / 'mine.py'}:fed_remembers",
    )  # fmt: skip
    speed = fedsim.Speed(devices=1, lanes=2, checkpoint_every=2, compilation_cache=False)
    whole = fedsim.run(config, speed, out=tmp_path / "whole", quiet=True)
    (second, _), (fourth, size) = sealed[0], sealed[1]
    moved = np.setdiff1d(fourth.slots, second.slots)
    assert 4 <= len(moved) <= 8 and size > 9000 * 4

    cut = tmp_path / "cut"  # as if killed in round 5
    shutil.copytree(whole.directory, cut)
    (cut / "summary.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "5")
    with (cut / "memory-peft.rows").open("r+b") as rows:
        rows.seek(int(moved[0]) * size + 100)
        byte = rows.read(1)[0]
        rows.seek(-1, 1)
        rows.write(bytes([byte ^ 1]))
    with pytest.warns(UserWarning, match=r"of round 4 is damaged .*the row of client .* going back to round 2"):
        resumed = fedsim.run(resume=cut, quiet=True)
    trained = [(r.directory / "trained.safetensors").read_bytes() for r in (whole, resumed)]
    assert trained[0] == trained[1] and len(resumed.rounds) == 5
