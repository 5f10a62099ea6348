"""What clients keep, exported from a finished run, against the memory itself and against who was in which round."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import fedsim
from fedsim import record
from fedsim.config import Config, Speed
from fedsim.engine.client_memory import Memory
from fedsim.randomness import stream
from fedsim.simulation import build, memories, simulate
from fedsim.simulation.loaded import Run
from fedsim.simulation.predict import final_model
from remembers import REMEMBERS

pytestmark = pytest.mark.usefixtures("compile_once")

ROUNDS, CLIENTS, COHORT = 4, 7, 3
SPEED = Speed(devices=1, lanes=2, checkpoint_every=1, compilation_cache=False)

# FedAvg of each group by itself; clients count their visits in every leaf, and keep as many leaves as their group freezes.
GROUPED = """
import jax
import jax.numpy as jnp

import fedsim


def fed_counted(task):
    def counted(carry, message, client):
        change = jax.tree.map(jnp.subtract, carry.params, message)
        return fedsim.coded(change), jax.tree.map(lambda m: m + 1, client.memory)

    locals_ = {n: fedsim.fit(t.loss, t.optimizer, t.lr, t.passes, reply=counted) for n, t in task.groups.items()}
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))

    def round(key, held, server, cohort):
        new = dict(server)
        for name, members in cohort.groups.items():
            change, info = members.exchange(server[name], locals_[name])
            new[name] = add(server[name], change)
        return new, info.metrics

    return fedsim.Algorithm(
        init=lambda key, held: {n: t.init(key) for n, t in task.groups.items()},
        round=round,
        predict=lambda held, server, memory, x: task.groups["small"].logits(held["small"], server["small"], x),
        memory=lambda key, held: {"visits": jnp.zeros((), jnp.int32), "like": jax.tree.map(jnp.zeros_like, held)},
        params=lambda server: server["small"],
        groups=True,
    )
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, blobs: Callable[..., Path]) -> Config:
    folder = tmp_path_factory.mktemp("data")
    (folder / "mine.py").write_text(REMEMBERS)
    return Config(
        dataset=str(blobs(folder)), backbone="mlp", peft="full", clients=CLIENTS, clients_per_round=COHORT, rounds=ROUNDS,
        optimizer="sgd", lr=0.05, min_size=6, algorithm=f"{folder / 'mine.py'}:fed_remembers",
    )  # fmt: skip


@pytest.fixture(scope="module")
def ran(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Any, np.ndarray]:
    """A finished run, and the memory of its clients as it was at the end: rows by client, and their ids."""
    seen: list[Any] = []

    def noted(*args: Any, **options: Any) -> None:
        seen.append(next(a for a in args if hasattr(a, "memory")).memory.state())
        finish(*args, **options)

    finish = simulate.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "finish", noted)
        run = fedsim.run(config, SPEED, out=tmp_path_factory.mktemp("runs") / "run", quiet=True)
    return run, *seen[0]


def visits(seed: int, rounds: int = ROUNDS) -> dict[int, int]:
    """How often each client is in a round, by the drawing alone."""
    drawn = [stream(seed, f"sample {r}").choice(CLIENTS, COHORT, replace=False) for r in range(1, rounds + 1)]
    clients, counts = np.unique(drawn, return_counts=True)
    return dict(zip(clients.tolist(), counts.tolist(), strict=True))


def read(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All shards of an export behind one another, and the index; each shard is what the index says."""
    index = json.loads((folder / memories.INDEX).read_text())
    parts = [load_file(folder / shard["file"]) for shard in index["shards"]]
    for part, shard in zip(parts, index["shards"], strict=True):
        assert (len(part["ids"]), part["ids"][0], part["ids"][-1]) == tuple(
            shard[n] for n in ("clients", "first", "last")
        )
        assert set(part) == {"ids", *index["leaves"]}
        for path, leaf in index["leaves"].items():
            assert part[path].dtype.name == leaf["dtype"] and list(part[path].shape[1:]) == leaf["shape"]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    assert index["clients"] == len(whole.get("ids", ()))
    assert {p.name for p in folder.iterdir()} == {memories.INDEX, *(shard["file"] for shard in index["shards"])}
    return whole, index


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- whole runs


@pytest.mark.slow
def test_an_export_is_what_clients_keep(ran: tuple[Run, Any, np.ndarray], tmp_path: Path) -> None:
    """Every leaf of every client that was ever there, ascending; visits are those of the drawing."""
    run, rows, ids = ran
    file = fedsim.load(run.directory).export("memories", str(tmp_path / "kept"))
    assert file == tmp_path / "kept" / "memories.json"
    found, index = read(file.parent)
    assert dict(zip(found["ids"].tolist(), found["visits"].tolist(), strict=True)) == visits(0)
    assert 0 < len(ids) < CLIENTS, "or it does not show that clients never seen have no row"
    order = np.argsort(ids)
    assert found["ids"].tolist() == ids[order].tolist()
    assert set(index["leaves"]) == {"visits", *(f"last/{path}" for path in rows["last"])}
    for path, each in rows["last"].items():
        np.testing.assert_array_equal(found[f"last/{path}"], each[order])
        assert np.abs(each).max() > 0
    fedsim.export(str(run.directory), "memories", tmp_path / "again")
    assert files(tmp_path / "again") == files(file.parent)


@pytest.mark.slow
def test_eight_devices_keep_the_same(ran: tuple[Run, Any, np.ndarray], config: Config, tmp_path: Path) -> None:
    run = fedsim.run(config, dataclasses.replace(SPEED, devices=8), out=tmp_path / "run", quiet=True)
    wide, _ = read(run.export("memories", tmp_path / "wide").parent)
    one, _ = read(ran[0].export("memories", tmp_path / "one").parent)
    assert wide["ids"].tolist() == one["ids"].tolist() and wide["visits"].tolist() == one["visits"].tolist()
    for path in one:
        np.testing.assert_allclose(wide[path], one[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_a_resumed_run_exports_the_same_bits(ran: tuple[Run, Any, np.ndarray], tmp_path: Path) -> None:
    """Rows lie in other slots after a resume; what is exported is the same."""
    folder = tmp_path / "run"
    shutil.copytree(ran[0].directory, folder)
    for name in (record.SUMMARY, record.TRAINED, record.MEMORIES):
        (folder / name).unlink()
    for later in (3, 4):
        shutil.rmtree(folder / record.CHECKPOINTS / str(later))
    assert (folder / record.CHECKPOINTS / "2").is_dir()
    with pytest.raises(ValueError, match="to hold a finished run; go on with it by --resume"):
        fedsim.load(folder).export("memories", tmp_path / "early")
    resumed = fedsim.run(resume=folder, quiet=True)
    resumed.export("memories", tmp_path / "resumed")
    ran[0].export("memories", tmp_path / "whole")
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")


def test_rows_stay_where_checkpoints_do_not(ran: tuple[Run, Any, np.ndarray], config: Config, tmp_path: Path) -> None:
    """`keep_checkpoints=0` clears checkpoints and what a codec keeps; the memory's rows are what the export reads."""
    few = dataclasses.replace(SPEED, keep_checkpoints=0)
    run = fedsim.run(config.replace(codec_up="topk(0.5)"), few, out=tmp_path / "run", quiet=True)
    assert [p.name for p in run.directory.glob("*.rows")] == ["memory-peft.rows"]
    assert not list((run.directory / record.CHECKPOINTS).iterdir())
    found, _ = read(run.export("memories", tmp_path / "kept").parent)
    assert dict(zip(found["ids"].tolist(), found["visits"].tolist(), strict=True)) == visits(0)
    assert fedsim.run(resume=run.directory, quiet=True).export("memories", tmp_path / "later").is_file()


@pytest.mark.slow
def test_groups_have_a_folder_each(config: Config, tmp_path: Path) -> None:
    """Every group's clients, with the leaves that they keep; the server's own group has none."""
    (tmp_path / "grouped.py").write_text(GROUPED)
    groups = (
        "small(backbone='mlp', peft='head', share=0.5)",
        "large(backbone='mlp', share=0.5)",
        "server(backbone='mlp')",
    )
    run = fedsim.run(
        config.replace(algorithm=f"{tmp_path / 'grouped.py'}:fed_counted", groups=groups, clients_per_round=4),
        dataclasses.replace(SPEED, keep_checkpoints=0), out=tmp_path / "run", quiet=True,
    )  # fmt: skip
    kept = run.export("memories", tmp_path / "kept")
    assert kept == tmp_path / "kept" and {p.name for p in kept.iterdir()} == {"small", "large"}
    small, large = (read(kept / name)[0] for name in ("small", "large"))
    assert set(large) == {"ids", "visits"} and len(small) > 2, "the small one freezes its layers"
    assert small["visits"].sum() + large["visits"].sum() == 4 * ROUNDS
    assert not set(small["ids"].tolist()) & set(large["ids"].tolist())
    for path in set(small) - {"ids", "visits"}:
        each = small[path].reshape(len(small["ids"]), -1)
        np.testing.assert_array_equal(each, np.broadcast_to(small["visits"][:, None], each.shape))


@pytest.mark.slow
def test_a_client_answers_with_what_was_exported(config: Config, tmp_path: Path) -> None:
    """FedSA-LoRA: the published model with a client's own B scores on its test rows as the run's own test of it says."""
    kept = config.replace(
        peft="lora", rank=2, targets=("layers/*",), algorithm="fed_sa_lora", local_test=0.3, rounds=2, lr=0.02
    )
    run = fedsim.run(kept, SPEED, out=tmp_path / "run", quiet=True)
    found, index = read(run.export("memories", tmp_path / "kept").parent)
    assert index["leaves"]["layers/0/lora_b"]["shape"][0] == 2
    problem = build.problem(kept, SPEED)
    held_out = problem.local_test
    assert held_out is not None
    model, frozen = final_model(run, kept, problem.dataset.x.shape[1:])
    tested = 0
    for row in run.clients():
        rows, at = held_out.client(row["client"]), np.flatnonzero(found["ids"] == row["client"])
        own = {path: leaf[at[0]] for path, leaf in found.items() if path != "ids"} if len(at) else {}
        logits = np.asarray(model.apply({**run.parameters, **own}, frozen, problem.dataset.x[rows]), np.float64)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(rows)), problem.dataset.y[rows]]
        assert row["loss"]["memory"] == pytest.approx(losses.mean(), rel=1e-4)
        tested += bool(own) and abs(row["loss"]["memory"] - row["loss"]["global"]) > 1e-6
    assert tested >= 3


@pytest.mark.slow
def test_a_run_whose_clients_keep_nothing(config: Config, tmp_path: Path) -> None:
    run = fedsim.run(config.replace(algorithm="fed_avg", rounds=1), SPEED, out=tmp_path / "run", quiet=True)
    assert not (run.directory / record.MEMORIES).exists()
    with pytest.raises(
        ValueError, match=r"Expected clients of algorithm='fed_avg' in .* to keep something between rounds"
    ):
        run.export("memories", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


# --- the export alone, of a memory made by hand


def held(tmp_path: Path, leaf: Any, ids: tuple[int, ...] = (9, 2, 5, 30, 0)) -> tuple[Run, Any]:
    """A folder as a run leaves it, of clients with random values like `leaf`; the values by client, (M, ...)."""
    directory = tmp_path / "run"
    directory.mkdir()
    rng = np.random.default_rng(3)
    memory = Memory(lambda key, held: leaf, (), directory / "memory-peft.rows")
    for _ in range(3):  # slots change places between sealed tables
        rows = jax.tree.map(lambda a: np.asarray(4 * rng.normal(size=(len(ids), *a.shape))).astype(a.dtype), leaf)
        memory.scatter(np.array(ids), rows)
        table = memories.table_of(memory, {})
    assert table is not None
    (directory / record.MEMORIES).write_bytes(table)
    summary = {"sha256": {record.MEMORIES: hashlib.sha256(table).hexdigest()}}
    return Run(directory, Config(), Speed(), {}, [], summary, {}), rows


LEAVES: dict[str, tuple[Any, set[str]]] = {
    "one array": (jnp.zeros((3, 2), jnp.bfloat16), {"memory"}),
    "a number": (jnp.zeros((), jnp.int8), {"memory"}),
    "nested": ({"a": (jnp.zeros(5, bool), jnp.zeros((), jnp.uint32)), "b": None}, {"a/0", "a/1"}),
    "names that clash": ({"a/b": jnp.zeros(2), "a": {"b": jnp.zeros(3)}}, {"['a/b']", "['a']['b']"}),
    "a leaf called ids": ({"ids": jnp.zeros(2), "x": jnp.zeros(1)}, {"['ids']", "['x']"}),
}


@pytest.mark.parametrize("case", LEAVES)
def test_leaves_of_every_kind(tmp_path: Path, case: str) -> None:
    leaf, names = LEAVES[case]
    run, rows = held(tmp_path, leaf)
    found, index = read(run.export("memories", tmp_path / "kept").parent)
    assert set(index["leaves"]) == names and found["ids"].tolist() == [0, 2, 5, 9, 30]
    for path, each in zip(sorted(names) if case == "nested" else index["leaves"], jax.tree.leaves(rows), strict=True):
        np.testing.assert_array_equal(found[path], each[[4, 1, 2, 0, 3]], err_msg=path)


def test_shards_are_written_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three shards of at most two clients, none of which is in memory any more when the next is written."""
    run, rows = held(tmp_path, {"x": jnp.zeros((4, 2))})
    write, alive = memories.write, []

    def noted(file: Path, arrays: dict[str, np.ndarray]) -> None:
        assert [ref for ref in alive if ref() is not None] == []
        alive.append(weakref.ref(arrays["x"]))
        assert sum(array.nbytes for array in arrays.values()) <= 80
        write(file, arrays)

    monkeypatch.setattr(memories, "write", noted)
    file = fedsim.export(run, "memories", tmp_path / "kept", shard_bytes=80)  # a client has 4 + 32
    found, index = read(file.parent)
    assert [shard["file"] for shard in index["shards"]] == [f"memories-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [(shard["first"], shard["last"]) for shard in index["shards"]] == [(0, 2), (5, 9), (30, 30)]
    np.testing.assert_array_equal(found["x"], rows["x"][[4, 1, 2, 0, 3]])


def test_nobody_was_ever_there(tmp_path: Path) -> None:
    run, _ = held(tmp_path, jnp.zeros(3), ids=())
    assert not (run.directory / "memory-peft.rows").exists()
    found, index = read(run.export("memories", tmp_path / "kept").parent)
    assert found == {} and (index["clients"], index["shards"]) == (0, [])


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "Expected shard_bytes=0 > 0"),
        (True, "Expected shard_bytes=True to be a whole number"),
        ("1", "Expected shard_bytes='1' to be a whole number"),
        (15, r"Expected shard_bytes=15 >= 16, which one client of .*run keeps; raise it"),
    ],
)
def test_shards_that_cannot_be(tmp_path: Path, size: Any, words: str) -> None:
    run, _ = held(tmp_path, jnp.zeros(3))
    with pytest.raises(ValueError, match=words):
        run.export("memories", tmp_path / "kept", shard_bytes=size)
    assert not (tmp_path / "kept").exists()
    with pytest.raises(ValueError, match=r"Expected no shard_bytes=5 for kind='peft'"):
        run.export("peft", tmp_path / "kept", shard_bytes=5)
    with pytest.raises(ValueError, match=r"Expected kind='memory' to be one of peft, merged, memories"):
        run.export("memory", tmp_path / "kept")


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    run, _ = held(tmp_path, jnp.zeros(3))
    before = files(run.directory)
    with pytest.raises(ValueError, match=r"to be another than the run's own; give a new folder"):
        run.export("memories", run.directory / ".." / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file' to be one that can be written \(File exists\); give another folder"):
        run.export("memories", tmp_path / "file")
    run.export("memories", tmp_path / "kept")
    kept = files(tmp_path / "kept")
    with pytest.raises(
        ValueError, match=r"kept' to hold no memories, not memories-00001-of-00001.safetensors; give a new"
    ):
        run.export("memories", tmp_path / "kept")
    assert files(tmp_path / "kept") == kept and files(run.directory) == before


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full at the second shard, and a row that is damaged there."""
    run, _ = held(tmp_path, jnp.zeros(3))
    save, calls = memories.save_file, []

    def full(arrays: Any, file: Path) -> None:
        calls.append(file)
        save(arrays, file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(memories, "save_file", full)
    with pytest.raises(
        OSError, match=r"memories-00002-of-00005.* to be written \(No space left on device\); make room or"
    ):
        run.export("memories", tmp_path / "kept", shard_bytes=16)
    assert len(calls) == 2 and files(tmp_path / "kept") == {}
    monkeypatch.undo()
    store = memories.stores_in(run.directory / record.MEMORIES)[""]
    file = run.directory / "memory-peft.rows"
    content = bytearray(file.read_bytes())
    content[int(store.table.slots[3]) * store.row().itemsize] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"memory-peft\.rows: the row of client 9 differs .*delete .*summary\.json"):
        run.export("memories", tmp_path / "kept", shard_bytes=16)
    assert files(tmp_path / "kept") == {}
