"""Every file of a run's folder, damaged in every way: the right result, or a refusal that names the file."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim
from brief import brief
from fedsim import record
from fedsim.config import Config, Speed
from fedsim.report import tables
from fedsim.simulation.loaded import Run
from remembers import REMEMBERS

pytestmark = pytest.mark.usefixtures("compile_once")

X = np.random.default_rng(5).normal(size=(20, 6)).astype(np.float32)
SPEED = Speed(devices=1, lanes=2, checkpoint_every=1, compilation_cache=False)
END = (record.CONFIG, record.ROUNDS, record.SUMMARY, record.TRAINED, record.CLIENTS)
ODD: tuple[Any, ...] = (None, True, -1, 1.5, "odd", "\ud800", [], {}, [[1]], 10**400, "1e999", "NaN", "deep")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, blobs: Callable[..., Path]) -> tuple[Run, Run]:
    """A tiny finished run with head rounds and clients' own tests, and another one of another seed."""
    folder = tmp_path_factory.mktemp("runs")
    config = Config(
        dataset=str(blobs(folder)), backbone="mlp", peft="full", clients=4, clients_per_round=2, rounds=3, head_rounds=1,
        optimizer="sgd", lr=0.05, min_size=6, local_test=0.3,
    )  # fmt: skip
    one, other = (fedsim.run(config.replace(seed=s), SPEED, out=folder / str(s), quiet=True) for s in (0, 1))
    return one, other


@pytest.fixture
def folder(runs: tuple[Run, Run], tmp_path: Path) -> Path:
    shutil.copytree(runs[0].directory, tmp_path / "run", ignore=shutil.ignore_patterns("*.png"))
    return tmp_path / "run"


def flip(data: bytes) -> Iterator[bytes]:
    """The bytes with one bit changed, at several places."""
    for at in np.linspace(0, len(data) - 1, 12).astype(int).tolist():
        yield data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def looked_at(folder: Path, good: Run, file: Path) -> None:
    """`load`, `compare`, `predict` and `clients` give what the good run gives, or name the file."""

    def same(run: Run) -> None:
        assert (
            run.config == good.config and run.rounds == good.rounds and run.parameters.keys() == good.parameters.keys()
        )
        assert all((run.parameters[k] == v).all() for k, v in good.parameters.items())

    asked: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("load", lambda: same(fedsim.load(folder))),
        ("compare", lambda: compared(fedsim.load(folder), good)),
        ("predict", lambda: predicted(fedsim.load(folder), good)),
        ("clients", lambda: owned(fedsim.load(folder), good)),
    )
    for what, ask in asked:
        try:
            ask()
        except ValueError as error:
            assert file.name in str(error) and ";" in str(error), f"{what}: {error}"


def compared(run: Run, good: Run) -> None:
    found = tables.compare(run, good)["results"]
    assert all(a == b for a, b in found.values())


def predicted(run: Run, good: Run) -> None:
    assert run.predict(X[:1]) == good.predict(X[:1])


def owned(run: Run, good: Run) -> None:
    assert run.clients() == good.clients()


def said(file: Path, data: bytes) -> Any:
    """What the bytes of one of these files say: JSON values, by lines where it holds lines, or just the bytes."""
    if file.suffix == ".safetensors":
        return data
    try:
        text = data.decode()
        return [json.loads(line) for line in (text.split("\n")[:-1] if file.suffix == ".jsonl" else [text])]
    except ValueError:
        return data


@pytest.mark.parametrize("name", brief(END, 2))
def test_bytes(runs: tuple[Run, Run], folder: Path, name: str) -> None:
    """Cut, emptied, with a bit changed, replaced by another run's: noticed."""
    file = folder / name
    data = file.read_bytes()
    for damaged in (
        *(bad for bad in flip(data) if said(file, bad) != said(file, data)),  # see test_another_text_of_a_number
        data[: len(data) // 2],
        data[:-9],
        b"",
        b"\xff\xfe",
        (runs[1].directory / name).read_bytes(),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=file.name):
            fedsim.load(folder).clients()
    file.write_bytes(data)
    fedsim.load(folder).clients()


@pytest.mark.parametrize("name", [record.CONFIG, record.ROUNDS, record.SUMMARY])
def test_the_name_of_a_checksum(runs: tuple[Run, Run], folder: Path, name: str) -> None:
    """A bit changed in it does not take the comparison away."""
    file = folder / name
    data = file.read_bytes()
    starts = [m.start() + 1 for m in re.finditer(b'"checksum"', data)]
    assert len(starts) == (len(runs[0].rounds) if name == record.ROUNDS else 1)
    for start in starts:
        for at in range(start, start + len("checksum")):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(ValueError, match=f"{name}.* but its checksum differs"):
                fedsim.load(folder).clients()


def test_another_text_of_a_number(runs: tuple[Run, Run], folder: Path) -> None:
    """The last of 17 digits may be another one of the same float: what is read is what was written."""
    file = folder / record.ROUNDS
    first, *rest = file.read_text().splitlines()
    number = repr(runs[0].rounds[0]["loss"])
    longer = f"{runs[0].rounds[0]['loss']:.25f}"
    assert longer != number and float(longer) == float(number)
    file.write_text("\n".join([first.replace(f'"loss": {number}', f'"loss": {longer}', 1), *rest, ""]))
    assert longer in file.read_text()
    looked_at(folder, runs[0], file)
    assert fedsim.load(folder).rounds == runs[0].rounds


@pytest.mark.parametrize("name", [n for n in END if n != record.CONFIG])
def test_gone(runs: tuple[Run, Run], folder: Path, name: str) -> None:
    (folder / name).unlink()
    if name == record.SUMMARY:  # as if it were not over
        with pytest.raises(ValueError, match="to hold a finished run; go on with it by --resume"):
            fedsim.load(folder).predict(X)
    else:
        with pytest.raises(ValueError, match=name):
            fedsim.load(folder).clients()


def odd_texts(found: Any) -> Iterator[tuple[str, str]]:
    """JSON texts of an object with one field of another type, for every field down to the third level."""

    def places(value: Any, depth: int) -> Iterator[tuple[Any, ...]]:
        pairs = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
        for key, inner in pairs:
            yield (key,)
            if depth < 3:
                yield from ((key, *rest) for rest in places(inner, depth + 1))

    for i, place in enumerate(places(found, 1)):
        for value in (ODD[i % len(ODD)], ODD[(i + 5) % len(ODD)]):  # every kind of value comes to many fields
            changed = copy.deepcopy(found)
            at = changed
            for key in place[:-1]:
                at = at[key]
            at[place[-1]] = value
            text = json.dumps(changed).replace('"1e999"', "1e999").replace('"NaN"', "NaN")
            yield ".".join(map(str, place)), text.replace('"deep"', "[" * 9000 + "]" * 9000)


@pytest.mark.parametrize("name", [record.CONFIG, record.SUMMARY, record.CLIENTS, record.ROUNDS])
def test_fields_of_another_type_without_a_checksum(runs: tuple[Run, Run], folder: Path, name: str) -> None:
    """As runs of before have none: whatever is believed can be used, whatever cannot be is refused by name."""
    file = folder / name
    first, *rest = file.read_text().splitlines() if name == record.ROUNDS else [file.read_text()]
    found = json.loads(first)
    del found["checksum"]
    summary = json.loads((folder / record.SUMMARY).read_text())
    summary.pop("sha256"), summary.pop("checksum")
    if name != record.SUMMARY:
        (folder / record.SUMMARY).write_text(json.dumps(summary))
    for field, text in odd_texts(found):
        file.write_text("\n".join([text, *rest, ""]))
        try:
            run = fedsim.load(folder)
            run.clients()
            tables.compare(run, runs[0])
            tables.rows(run.summary or summary)
        except ValueError as error:
            assert str(folder) in str(error), f"{field}: {error}"
        except Exception as error:
            raise AssertionError(f"{name}, {field}: {text[:200]}") from error


@pytest.mark.parametrize("text", ["{}", "[]", "null", "3", "[" * 100_000, '{"a":' * 100_000, "NaN", "\x00"])
@pytest.mark.parametrize("name", [record.CONFIG, record.SUMMARY, record.CLIENTS, record.ROUNDS])
def test_json_that_is_something_else(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text + "\n")
    with pytest.raises(ValueError, match=name):
        fedsim.load(folder).clients()


def test_a_damaged_end_is_looked_at_by_every_reader(runs: tuple[Run, Run], folder: Path) -> None:
    for name in (record.TRAINED, record.ROUNDS, record.SUMMARY):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-3])
        looked_at(folder, runs[0], folder / name)
        (folder / name).write_bytes(data)
    looked_at(folder, runs[0], folder / name)


def test_lines_cut_to_the_head_phase_do_not_answer_with_the_head(folder: Path) -> None:
    lines = (folder / record.ROUNDS).read_bytes().splitlines(keepends=True)
    (folder / record.ROUNDS).write_bytes(lines[0])
    with pytest.raises(
        ValueError, match=r"Expected rounds=1 of the lines of .*rounds\.jsonl to be 3, as .*summary\.json says"
    ):
        fedsim.load(folder).predict(X)


def same_end(a: Run, b: Run) -> None:
    assert [line["loss"] for line in a.rounds] == [line["loss"] for line in b.rounds]
    assert (a.directory / record.TRAINED).read_bytes() == (b.directory / record.TRAINED).read_bytes()


def resumed(folder: Path) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a damaged checkpoint was set aside
        return fedsim.run(resume=folder, quiet=True)


@pytest.mark.parametrize("name", [record.SUMMARY, record.TRAINED, record.CLIENTS])
def test_the_remedy_for_a_damaged_end_works(runs: tuple[Run, Run], folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"{")
    with pytest.raises(ValueError, match=r"or delete .*and go on by --resume .*, which ends the run anew"):
        fedsim.load(folder).clients()
    (folder / record.SUMMARY).unlink()
    same_end(runs[0], resumed(folder))
    assert fedsim.load(folder).clients() == runs[0].clients()


@pytest.mark.parametrize("damage", brief(["cut", "flipped", "emptied", "other types", "deep", "another run's"], 3))
def test_checkpoints(runs: tuple[Run, Run], folder: Path, damage: str) -> None:
    """The newest one is set aside, or refused if it is another run's; what was lost is trained again to the same bits."""
    (folder / record.SUMMARY).unlink()
    meta = folder / record.CHECKPOINTS / "3" / "meta" / "metadata"
    data = meta.read_bytes()
    if damage == "another run's":
        shutil.rmtree(folder / record.CHECKPOINTS / "3")
        shutil.copytree(runs[1].directory / record.CHECKPOINTS / "3", folder / record.CHECKPOINTS / "3")
        with pytest.raises(ValueError, match=r"checkpoints/3 to be a checkpoint of this run, but config is"):
            resumed(folder)
        return
    body = json.loads(data)
    meta.write_bytes(
        {
            "cut": data[:50],
            "flipped": data.replace(b"1", b"2", 1),
            "emptied": b"",
            "other types": json.dumps({"sha256": 3, "body": [body]}).encode(),
            "deep": b"[" * 100_000,
        }[damage]
    )
    same_end(runs[0], resumed(folder))
    assert (folder / record.CHECKPOINTS / "damaged-3").is_dir()


@pytest.fixture(scope="module")
def remembering(tmp_path_factory: pytest.TempPathFactory, blobs: Callable[..., Path]) -> tuple[Run, Run]:
    """A finished run whose clients keep something between rounds, and another one of another seed."""
    folder = tmp_path_factory.mktemp("remembering")
    (folder / "mine.py").write_text(REMEMBERS)
    config = Config(
        dataset=str(blobs(folder)), backbone="mlp", peft="full", clients=5, clients_per_round=3, rounds=3,
        optimizer="sgd", lr=0.05, min_size=6, algorithm=f"{folder / 'mine.py'}:fed_remembers",
    )  # fmt: skip
    return tuple(fedsim.run(config.replace(seed=s), SPEED, out=folder / str(s), quiet=True) for s in (0, 1))  # type: ignore[return-value]  # two of them


@pytest.fixture
def stopped(remembering: tuple[Run, Run], tmp_path: Path) -> Path:
    """The first run as killed in its last round."""
    folder = tmp_path / "run"
    shutil.copytree(remembering[0].directory, folder, ignore=shutil.ignore_patterns("*.png"))
    (folder / record.SUMMARY).unlink()
    shutil.rmtree(folder / record.CHECKPOINTS / "3")
    return folder


def hurt(file: Path, damage: str, other: Path) -> None:
    """Damages a file; `other` is another run's of that name."""
    data = file.read_bytes()
    flipped = bytearray(data)
    for at in range(len(data) // 2 % 512, len(data), 512):
        flipped[at] ^= 1
    if damage == "deleted":
        file.unlink()
    elif damage == "another run's":
        shutil.copyfile(other, file)
    else:
        file.write_bytes({"cut": data[: min(len(data) // 2, 1000)], "flipped": flipped, "emptied": b""}[damage])


WAYS = ("cut", "flipped", "emptied", "deleted", "another run's")


@pytest.mark.slow
@pytest.mark.parametrize("damage", WAYS)
def test_rows_of_clients_memory(remembering: tuple[Run, Run], stopped: Path, damage: str) -> None:
    """No checkpoint that needs a damaged row is used; what was lost is trained again to the same bits."""
    rows = stopped / "memory-peft.rows"
    hurt(rows, damage, remembering[1].directory / rows.name)
    same_end(remembering[0], resumed(stopped))
    assert rows.stat().st_size
    assert (stopped / record.CHECKPOINTS / "damaged-2").is_dir()


@pytest.mark.parametrize("name", brief([record.MEMORIES, "memory-peft.rows"]))
def test_what_an_export_of_memories_reads(remembering: tuple[Run, Run], tmp_path: Path, name: str) -> None:
    """The table and the rows of a finished run: damaged in every way they are refused by name, and the remedy works."""
    folder, out = tmp_path / "run", tmp_path / "kept"
    shutil.copytree(remembering[0].directory, folder, ignore=shutil.ignore_patterns("*.png"))
    file, whole = folder / name, (folder / name).read_bytes()
    for damage in WAYS:
        hurt(file, damage, remembering[1].directory / name)
        with pytest.raises(ValueError, match=rf"{name}.*; restore the file, or delete .*summary\.json and go on by"):
            fedsim.load(folder).export("memories", out)
        assert not out.exists() or not list(out.iterdir()), damage
        file.write_bytes(whole)
    if name == record.MEMORIES:
        for damaged in flip(whole):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=name):
                fedsim.load(folder).export("memories", out)
    hurt(file, "cut", file)
    (folder / record.SUMMARY).unlink()
    resumed(folder).export("memories", out)
    remembering[0].export("memories", tmp_path / "whole")
    kept = sorted(p.name for p in out.iterdir())
    assert len(kept) == 2 and all((out / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in kept)


@pytest.mark.slow
@pytest.mark.parametrize("damage", WAYS)
def test_arrays_of_a_checkpoint(remembering: tuple[Run, Run], stopped: Path, tmp_path: Path, damage: str) -> None:
    """Every file of Orbax' in the newest checkpoint: it is read right, or the one before is taken."""
    for file in sorted(p for p in (stopped / record.CHECKPOINTS / "2").rglob("*") if p.is_file()):
        folder, name = tmp_path / "hurt", file.relative_to(stopped)
        shutil.copytree(stopped, folder)
        other = remembering[1].directory / name
        same_name = other if other.is_file() else largest(other.parent)  # Orbax draws some names anew
        hurt(folder / name, damage, same_name)
        try:
            same_end(remembering[0], resumed(folder))
        except ValueError as error:
            assert damage == "another run's" and "to be a checkpoint of this run, but config is" in str(error), name
        shutil.rmtree(folder)


def largest(folder: Path) -> Path:
    """The largest file below a folder."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_lock_of_odd_bytes_and_one_that_is_a_folder(runs: tuple[Run, Run], folder: Path) -> None:
    (folder / ".lock").write_bytes(b"\xff\x00\x1b[2J")
    with record.lock(folder), pytest.raises(ValueError, match="to be free, but process"), record.lock(folder):
        pass
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()
    with pytest.raises(ValueError, match=r"\.lock to be a file that can be written"), record.lock(folder):
        pass


@pytest.mark.slow
def test_no_checkpoints_are_kept_where_none_are_wanted(runs: tuple[Run, Run], tmp_path: Path) -> None:
    for keep, rounds in ((0, []), (1, ["3"])):
        speed = dataclasses.replace(SPEED, keep_checkpoints=keep)
        run = fedsim.run(runs[0].config, speed, out=tmp_path / str(keep), quiet=True)
        assert [p.name for p in (run.directory / record.CHECKPOINTS).iterdir()] == rounds
        same_end(runs[0], run)
    before = (tmp_path / "0" / record.ROUNDS).read_bytes()
    same_end(runs[0], fedsim.run(resume=tmp_path / "0", quiet=True))
    assert (tmp_path / "0" / record.ROUNDS).read_bytes() == before, "what is over is not done again"
    with pytest.raises(ValueError, match="keep_checkpoints=-1"):
        Speed(keep_checkpoints=-1)
