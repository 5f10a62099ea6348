"""What a run was given is known by hash: changes are refused, moves are followed, and strangers' code is not run unasked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fedsim
from fedsim import record
from fedsim.backbones import BACKBONES, Row
from fedsim.backbones.vit import Vit, VitConfig
from fedsim.config import Config, Speed
from fedsim.simulation import inputs

pytestmark = pytest.mark.usefixtures("compile_once")

SPEED = Speed(devices=1, lanes=2, checkpoint_every=1, compilation_cache=False)
X = np.random.default_rng(5).normal(size=(8, 6)).astype(np.float32)
CODE = """
import jax.numpy as jnp
import fedsim
from fedsim.algorithms.fed_avg import fed_avg

print("executed", __name__)


def make():
    return fedsim.Backbone(lambda p, x: jnp.tanh(x @ p), jnp.eye(6))


def mine(task):
    return fed_avg(task)
"""


def cut_back(folder: Path) -> None:
    """As after a kill before the last round's checkpoint."""
    (folder / record.SUMMARY).unlink()
    newest = max((p for p in (folder / record.CHECKPOINTS).iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    shutil.rmtree(newest)


def test_weights_that_change_after_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """r02: neither --resume nor predict goes on with another model; both hashes are said."""
    config = VitConfig(width=16, depth=2, heads=4, hidden=24, patch=4, image=12)
    monkeypatch.setitem(BACKBONES, "fv", Row("image", Vit, config, formats=BACKBONES["vit_b16"].formats))
    fixtures = Path(__file__).parents[1] / "fixtures" / "backbones" / "vit"
    shutil.copytree(fixtures, tmp_path / "w")
    x = np.random.default_rng(0).integers(0, 256, (60, 12, 12, 3)).astype(np.uint8)
    data = fedsim.arrays(x, (x.mean(axis=(1, 2, 3)) > 127.5).astype(int))
    options = Config(
        dataset="arrays", backbone="fv", weights="w", peft="bias", rounds=2, clients=3, clients_per_round=2, min_size=1
    )
    monkeypatch.chdir(tmp_path)
    run = fedsim.run(options, SPEED, out=tmp_path / "run", quiet=True, data=data)
    first = run.predict(x[:4])
    known = run.about["files"]["weights"]
    assert known == {"path": str(tmp_path / "w"), "sha256": inputs.file_sha256(tmp_path / "w" / "model.safetensors")}

    monkeypatch.chdir("/")  # found from anywhere
    assert fedsim.load(tmp_path / "run").predict(x[:4]) == first

    file = tmp_path / "w" / "model.safetensors"
    save_file({k: v + np.float32(0.3) for k, v in load_file(file).items()}, file)
    other = inputs.file_sha256(file)
    words = rf"Expected sha256={other[:16]} of .*w, the weights of .*run, to be {known['sha256'][:16]}, .*bring the old one back"
    with pytest.raises(ValueError, match=words):
        fedsim.load(tmp_path / "run").predict(x[:4])
    cut_back(tmp_path / "run")
    with pytest.raises(ValueError, match=words):
        fedsim.run(resume=tmp_path / "run", quiet=True, data=data)

    monkeypatch.chdir(tmp_path)
    about = json.loads((tmp_path / "run" / record.CONFIG).read_text())  # a record of before: the checkpoint knows too
    del about["files"], about["checksum"]
    (tmp_path / "run" / record.CONFIG).write_text(json.dumps(about))
    with pytest.raises(ValueError, match="to be a checkpoint of this run, but inputs is"):
        fedsim.run(resume=tmp_path / "run", quiet=True, data=data)


@pytest.mark.slow
def test_weights_of_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group's are known by hash, refused where they changed, and found where they were moved."""
    config = VitConfig(width=16, depth=2, heads=4, hidden=24, patch=4, image=12)
    monkeypatch.setitem(BACKBONES, "fv", Row("image", Vit, config, formats=BACKBONES["vit_b16"].formats))
    root = Path(__file__).parents[1]
    for name in ("one", "two"):
        shutil.copytree(root / "fixtures" / "backbones" / "vit", tmp_path / name)
    x = np.random.default_rng(0).integers(0, 256, (60, 12, 12, 3)).astype(np.uint8)
    data = fedsim.arrays(x, (x.mean(axis=(1, 2, 3)) > 127.5).astype(int))
    options = Config(
        dataset="arrays", backbone="fv", weights="random", peft="head", rounds=2, clients=4, clients_per_round=2,
        min_size=1, steps=1, algorithm=f"{root / 'algorithms' / 'toys.py'}:by_group",
        groups=("small(weights='one', share=0.5)", "large(weights='two', share=0.5)"),
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    run = fedsim.run(options, SPEED, out=tmp_path / "run", quiet=True, data=data)
    first, known = run.predict(x[:4]), run.about["files"]
    file = tmp_path / "two" / "model.safetensors"
    assert {n: k["path"] for n, k in known.items() if "weights" in n} == {
        "small.weights": str(tmp_path / "one"), "large.weights": str(tmp_path / "two")
    }  # fmt: skip
    assert known["large.weights"]["sha256"] == inputs.file_sha256(file)
    cut_back(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "again")

    before = file.read_bytes()
    save_file({k: v + np.float32(0.3) for k, v in load_file(file).items()}, file)
    now, then = inputs.file_sha256(file)[:16], known["large.weights"]["sha256"][:16]
    words = rf"Expected sha256={now} of .*two, the large\.weights of .*run, to be {then}, .*bring the old one back"
    with pytest.raises(ValueError, match=words):
        fedsim.run(resume=tmp_path / "run", quiet=True, data=data)
    about = json.loads((tmp_path / "run" / record.CONFIG).read_text())  # without a record the checkpoint knows
    trusted = {name: each for name, each in about.pop("files").items() if "weights" not in name}
    del about["checksum"]
    (tmp_path / "run" / record.CONFIG).write_text(json.dumps({**about, "files": trusted}))
    with pytest.raises(ValueError, match="to be a checkpoint of this run, but inputs is"):
        fedsim.run(resume=tmp_path / "run", quiet=True, data=data)

    file.write_bytes(before)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(tmp_path / "two", "two")  # the typed path leads to it from here
    resumed = fedsim.run(resume=tmp_path / "again", quiet=True, data=data)
    assert (resumed.parameters["head/kernel"] == run.parameters["head/kernel"]).all()
    assert resumed.predict(x[:4]) == first
    shutil.rmtree("two")
    assert fedsim.load(tmp_path / "again").predict(x[:4]) == first, "the group that answers is another one"
    save_file({k: v + np.float32(0.3) for k, v in load_file(tmp_path / "one" / "model.safetensors").items()},
              tmp_path / "one" / "model.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match=r"of .*one, the small\.weights of .*again, to be"):
        fedsim.load(tmp_path / "again").predict(x[:4])


@pytest.mark.slow
def test_a_groups_own_backbone_is_code_too(
    tmp_path: Path, blobs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It runs unasked only where it is the recorded file; an edit is refused on resuming."""
    blobs(tmp_path, rows=90)
    (tmp_path / "mine.py").write_text(CODE)
    toys = Path(__file__).parents[1] / "algorithms" / "toys.py"
    monkeypatch.chdir(tmp_path)
    config = Config(
        dataset="blobs.npz", backbone="mlp", algorithm=f"{toys}:by_group", peft="head", rounds=2, clients=4,
        clients_per_round=2, min_size=1, steps=1, groups=("own(backbone='mine.py:make', share=0.5)", "table(share=0.5)"),
    )  # fmt: skip
    run = fedsim.run(config, SPEED, out="run", quiet=True)
    assert run.about["files"]["own.backbone"] == {
        "path": str(tmp_path / "mine.py"), "sha256": inputs.file_sha256(tmp_path / "mine.py")
    }  # fmt: skip
    first = run.predict(X)
    monkeypatch.chdir("/")
    assert fedsim.load(tmp_path / "run").predict(X) == first
    (tmp_path / "mine.py").write_text(CODE + "\n")
    capfd.readouterr()
    cut_back(tmp_path / "run")
    words = r"Expected sha256=\w+ of .*mine\.py, the own\.backbone of .*run, to be \w+, as when"
    with pytest.raises(ValueError, match=words):
        fedsim.run(resume=tmp_path / "run", quiet=True)
    assert "executed" not in capfd.readouterr().out


@pytest.fixture
def place(tmp_path: Path, blobs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data and code, typed as relative paths, and a finished run; it is not the working directory."""
    home = tmp_path / "home"
    home.mkdir()
    blobs(home, rows=90)
    (home / "mine.py").write_text(CODE)
    monkeypatch.chdir(home)
    config = Config(
        dataset="blobs.npz", backbone="mine.py:make", algorithm="mine.py:mine", peft="head", rounds=2, clients=3,
        clients_per_round=2, min_size=1,
    )  # fmt: skip
    fedsim.run(config, SPEED, out="run", quiet=True)
    away = tmp_path / "away"
    away.mkdir()
    monkeypatch.chdir(away)
    return home


def test_the_record_has_path_and_hash_of_every_file_and_the_config_as_typed(place: Path) -> None:
    run = fedsim.load(place / "run")
    assert run.config.backbone == "mine.py:make" and run.about["config_hash"] == run.config.hash()
    assert {k: v["path"] for k, v in run.about["files"].items() if k != "experiment"} == {
        "algorithm": str(place / "mine.py"),
        "backbone": str(place / "mine.py"),
        "dataset": str(place / "blobs.npz"),
    }


def test_a_run_is_used_from_anywhere(place: Path) -> None:
    whole = fedsim.load(place / "run")
    assert len(whole.predict(X)) == 8
    shutil.copytree(place / "run", place / "stopped")
    cut_back(place / "stopped")
    again = fedsim.run(resume=place / "stopped", quiet=True)
    assert (again.directory / record.TRAINED).read_bytes() == (whole.directory / record.TRAINED).read_bytes()
    assert again.config.dataset == "blobs.npz", "as it was typed"


def test_code_at_another_place_or_changed_is_not_run_unasked(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = tmp_path / "away"
    (place / "mine.py").rename(away / "mine.py")
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"Expected trust_code=True .*mine\.py has the run's sha256=.*--trust-code"):
        fedsim.load(place / "run").predict(X)
    assert len(fedsim.load(place / "run", trust_code=True).predict(X)) == 8
    cut_back(place / "run")
    with pytest.raises(ValueError, match=r"Expected trust_code=True"):
        fedsim.run(resume=place / "run", quiet=True)
    assert fedsim.run(resume=place / "run", quiet=True, trust_code=True).summary is not None

    capsys.readouterr()
    (away / "mine.py").write_text(CODE + "\n# edited\n")
    with pytest.raises(
        ValueError, match=r"Expected sha256=\w+ of mine\.py, the algorithm of .* to be \w+, .*trust_code"
    ):
        fedsim.load(place / "run").predict(X)
    assert "executed" not in capsys.readouterr().out
    assert len(fedsim.load(place / "run", trust_code=True).predict(X)) == 8
    cut_back(place / "run")
    with pytest.raises(ValueError, match="bring the old one back, or start a new run"):
        fedsim.run(resume=place / "run", quiet=True, trust_code=True)
    (away / "mine.py").unlink()
    with pytest.raises(ValueError, match=r"to be .*away/mine\.py or .*home/mine\.py, sha256=.*neither is there"):
        fedsim.run(resume=place / "run", quiet=True)


@pytest.mark.slow
def test_a_record_of_before_asks_before_it_runs_code(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    about = json.loads((place / "run" / record.CONFIG).read_text())
    for name in ("files", "identity", "data_hash", "checksum"):
        del about[name]
    (place / "run" / record.CONFIG).write_text(json.dumps(about))
    for name in (record.SUMMARY, record.ROUNDS):
        lines = [json.loads(line) for line in (place / "run" / name).read_text().splitlines()] if name == record.ROUNDS else [
            json.loads((place / "run" / name).read_text())
        ]  # fmt: skip
        old = [{k: v for k, v in line.items() if k not in ("checksum", "identity", "sha256")} for line in lines]
        (place / "run" / name).write_text("".join(json.dumps(line) + "\n" for line in old))
    with pytest.raises(ValueError, match="whose record does not know that file by hash"):
        fedsim.load(place / "run").predict(X)
    assert len(fedsim.load(place / "run", trust_code=True).predict(X)) == 8


def test_changed_data_are_refused_before_the_first_checkpoint_too(place: Path, blobs: Callable[..., Path]) -> None:
    shutil.rmtree(place / "run" / record.CHECKPOINTS)
    (place / "run" / record.SUMMARY).unlink()
    blobs(place, rows=90, seed=4)
    with pytest.raises(ValueError, match=r"Expected sha256=\w+ of blobs\.npz|of .*blobs\.npz, the dataset of"):
        fedsim.run(resume=place / "run", quiet=True)


def stopped(config: Config, out: Path) -> None:
    """A run of the set as after a kill before the last round's checkpoint."""
    fedsim.run(config, SPEED, out=out, quiet=True)
    cut_back(out)


def refused(out: Path, copy: Path) -> str:
    """What a resume of a copy of the stopped run is refused with."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(out, copy)
    with pytest.raises(
        ValueError, match=r"Expected sha256=\w{16} of .*, the dataset of .*, to be \w{16}, as when"
    ) as error:
        fedsim.run(resume=copy, quiet=True)
    return str(error.value)


@pytest.mark.slow
def test_a_folder_of_images_is_known_by_names_and_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(48):
        file = tmp_path / "set" / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(file)
    config = Config(
        dataset="set", backbone="mlp", peft="head", rounds=2, clients=3, clients_per_round=2, min_size=1, head_rounds=0
    )
    out = tmp_path / "run"
    stopped(config, out)
    assert len(fedsim.load(out).about["files"]["dataset"]["sha256"]) == 64
    image = tmp_path / "set" / "cat" / "0.png"
    before = image.read_bytes()
    image.write_bytes(before + b"\0")  # decodes to the same pixels; who wants the same bits keeps the same files
    assert "set, the dataset" in refused(out, tmp_path / "copy")
    image.rename(image.with_name("zero.png"))
    (image.with_name("zero.png")).write_bytes(before)
    refused(out, tmp_path / "copy")
    image.with_name("zero.png").rename(image)
    (tmp_path / "set" / "cow").mkdir()
    refused(out, tmp_path / "copy")
    (tmp_path / "set" / "cow").rmdir()
    (tmp_path / "set" / "cat" / "notes.txt").write_text("not read")

    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")  # found from anywhere, by the recorded path and by the typed one
    shutil.copytree(out, tmp_path / "copied")
    assert fedsim.run(resume=tmp_path / "copied", quiet=True).summary is not None
    (tmp_path / "set").rename(tmp_path / "away" / "set")
    assert fedsim.run(resume=out, quiet=True).summary is not None


@pytest.mark.slow
def test_a_prepared_set_is_known_by_its_files(tmp_path: Path) -> None:
    fixtures = Path(__file__).parents[1] / "fixtures" / "data"
    shutil.copytree(fixtures, tmp_path / "sets")
    config = Config(
        dataset="tfds:fedsim_quadrants", data_dir=str(tmp_path / "sets"), backbone="mlp", peft="head", rounds=2, clients=3,
        clients_per_round=2, min_size=1, head_rounds=0,
    )  # fmt: skip
    out = tmp_path / "run"
    stopped(config, out)
    known = fedsim.load(out).about["files"]
    assert len(known["dataset"]["sha256"]) == 64 and known["data_dir"] == {"path": str(tmp_path / "sets")}
    info = next((tmp_path / "sets").rglob("dataset_info.json"))
    before = info.read_text()
    info.write_text(before.replace('"description": "', '"description": "another ', 1))
    assert info.read_text() != before
    assert "tfds:fedsim_quadrants, the dataset" in refused(out, tmp_path / "copy")
    info.write_text(before)
    assert fedsim.run(resume=out, quiet=True).summary is not None


def test_many_files_are_hashed_once_and_by_name(tmp_path: Path) -> None:
    from fedsim.digests import files_sha256

    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    (tmp_path / "c").mkdir()
    files = {name: tmp_path / name for name in ("b", "a", "c")}
    told: list[tuple[int, int]] = []
    first = files_sha256(files, lambda done, of: told.append((done, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert files_sha256(dict(reversed(files.items())), lambda done, of: told.append((0, 0))) == first and len(told) == 3
    assert files_sha256({"a": files["a"], "b": files["b"]}) != first, "a folder counts"
    assert files_sha256({"a": files["b"], "b": files["a"], "c": files["c"]}) != first, "names count"
    (tmp_path / "a").write_text("x")
    assert files_sha256(files) != first


@pytest.mark.slow
def test_a_graphs_file_is_known_by_hash_and_found_again(
    tmp_path: Path, blobs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers on the edges of a file: an edited one is refused on resuming, a moved one found."""
    blobs(tmp_path, rows=90)
    edges = tmp_path / "edges.txt"
    edges.write_text("0 1\n1 2\n2 0\n")
    monkeypatch.chdir(tmp_path)
    config = Config(
        dataset="blobs.npz", backbone="mlp", algorithm="dfed_alt(graph='edges.txt', personal_rate=0.5)", peft="lora", rank=2,
        targets=("layers/*",), rounds=2, clients=3, clients_per_round=3, min_size=1, steps=1, local_test=0.2,
    )  # fmt: skip
    run = fedsim.run(config, SPEED, out="run", quiet=True)
    assert run.about["files"]["graph"] == {"path": str(edges), "sha256": inputs.file_sha256(edges)}
    assert run.rounds[0]["peers"]["transmissions"] == 3
    assert 0 < run.rounds[0]["metrics"]["spectral_gap"] < 1 and run.rounds[0]["metrics"]["consensus_distance"] > 0
    cut_back(tmp_path / "run")
    edges.write_text("0 1\n1 2\n2 0\n0 2\n")
    with pytest.raises(ValueError, match=r"of .*edges\.txt, the graph of .*run, to be"):
        fedsim.run(resume=tmp_path / "run", quiet=True)
    edges.write_text("0 1\n1 2\n2 0\n")
    monkeypatch.chdir("/")
    again = fedsim.run(resume=tmp_path / "run", quiet=True)
    assert all((again.parameters[path] == leaf).all() for path, leaf in run.parameters.items())
