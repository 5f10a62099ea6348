"""The run's folder: whole lines only, exact bytes, no run overwritten, one writer."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim import record
from fedsim.config import Config, Speed
from fedsim.report import summaries


def line(number: int, **changes) -> dict:
    """A round's line as a run writes it; every byte count is exact."""
    up, down = 1000 + number, 2**40 + number
    made = {
        "round": number,
        "phase": "head" if number <= 2 else "peft",
        "loss": 3.0 / number,
        "accuracy": 0.1 * math.sqrt(number),
        "validation": {"loss": 2.5, "accuracy": 0.05 * number},
        "bytes_up": up,
        "bytes_down": down,
        "bytes_up_leaves": {"head/kernel": up - 4, "head/bias": 4},
        "bytes_down_leaves": {"head/kernel": down - 4, "head/bias": 4},
        "setup_bytes": 500 if number == 1 else 0,
        "total_bytes_up": sum(1000 + i for i in range(1, number + 1)),
        "total_bytes_down": sum(2**40 + i for i in range(1, number + 1)),
        "clients": 10,
        "reported": 9,
        "nonfinite": 0,
        "examples": 640,
        "seconds": 4.0,
        "compile_seconds": 2.0 if number == 1 else 0.0,
        "clients_per_second": 2.5,
        "examples_per_second": 160.0,
        "lane_occupancy": 0.75,
        "row_occupancy": 0.5,
    }
    return made | changes


def written(directory: Path, rounds: int) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    record.start(directory, Config(), Speed())
    for i in range(1, rounds + 1):
        record.append(directory, line(i))
    return directory


def ended(directory: Path) -> dict:
    """The summary of what was written."""
    scores = {"loss": 1.0, "accuracy": 0.5}
    return summaries.summary(
        record.rounds(directory), start={"validation": scores}, final={"validation": scores, "test": scores},
        full={"bytes_up": 9, "bytes_down": 9}, parameters={"trained": 1, "frozen": 2}, seconds=9.0, stopped="rounds",
    )  # fmt: skip


def test_rounds_come_back_with_schema_and_exact_integers(tmp_path: Path) -> None:
    written(tmp_path, 3)
    found = record.rounds(tmp_path)
    assert found == [{"schema": record.SCHEMA, **line(i)} for i in (1, 2, 3)]
    assert all(isinstance(found[2][k], int) for k in record.INTEGERS)
    big = line(4, bytes_up=2**80, bytes_up_leaves={"x": 2**80}, total_bytes_up=2**81)
    record.append(tmp_path, big)
    assert record.rounds(tmp_path)[3]["bytes_up"] == 2**80


def test_numpy_numbers_and_nan_are_written_as_plain_json(tmp_path: Path) -> None:
    record.append(tmp_path, line(1, loss=np.float32("nan"), accuracy=np.float32(0.5), examples=np.int64(640)))
    raw = (tmp_path / record.ROUNDS).read_text()
    assert "NaN" not in raw
    found = json.loads(raw)
    assert found["loss"] is None
    assert found["accuracy"] == 0.5
    assert found["examples"] == 640


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bytes_up": 1000.0}, r"bytes_up=1000.0 to be an integer"),
        ({"bytes_down": True}, r"bytes_down=True to be an integer"),
        ({"clients": -1}, r"clients=-1 to be an integer >= 0"),
        ({"seconds": None}, r"seconds=None to be a number"),
        ({"loss": "low"}, r"loss='low' to be a number"),
        ({"phase": "tail"}, r"phase='tail' to be head or peft"),
        ({"bytes_up_leaves": {"x": 7}}, r"sum of bytes_up_leaves=7 to be 1001"),
        ({"validation": {"accuracy": 0.5}}, r"validation=.* to hold a loss"),
    ],
)
def test_a_line_against_the_schema_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record.append(tmp_path, line(1, **changes))
    assert record.rounds(tmp_path) == []


def test_missing_fields_are_named(tmp_path: Path) -> None:
    short = {k: v for k, v in line(1).items() if k not in ("loss", "setup_bytes")}
    with pytest.raises(ValueError, match=r"fields setup_bytes, loss in the line of round 1"):
        record.append(tmp_path, short)


def test_a_round_in_which_nobody_reported(tmp_path: Path) -> None:
    record.append(tmp_path, line(1, loss=None, accuracy=None, clients_per_second=None, reported=0))
    assert record.rounds(tmp_path)[0]["loss"] is None


def test_the_servers_own_training_is_no_clients_time(tmp_path: Path) -> None:
    """4 s a round, 2 s of compiling in the first, 1 s of the server's: 5 s for 20 clients."""
    written(tmp_path, 0)
    for i in (1, 2):
        record.append(tmp_path, line(i, server_seconds=1.0 if i == 2 else 0.0, server_flops=5e9))
    found = ended(tmp_path)
    assert (found["server_seconds"], found["server_flops"]) == (1.0, 1e10)
    assert found["clients_per_second"] == 20 / 5 and found["seconds_in_rounds"] == 8
    record.append(tmp_path, line(3, server_seconds="long"))
    with pytest.raises(ValueError, match="server_seconds to be a number, not 'long'"):
        record.rounds(tmp_path)


def test_more_fields_are_kept(tmp_path: Path) -> None:
    record.append(tmp_path, line(1, epsilon=1.5))
    assert record.rounds(tmp_path)[0]["epsilon"] == 1.5


@given(cut=st.integers(1, 400), keep=st.integers(0, 4))
def test_half_written_line_is_dropped_and_lines_after_a_round_are_cut(tmp_path_factory, cut: int, keep: int) -> None:
    directory = tmp_path_factory.mktemp("run")
    for i in range(1, 5):
        record.append(directory, line(i))
    path = directory / record.ROUNDS
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines(keepends=True)[0][:-1][:cut])
    assert len(record.rounds(directory)) == 4
    kept = record.truncate(directory, keep)
    assert [x["round"] for x in kept] == list(range(1, keep + 1))
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:keep])
    for i in range(keep + 1, 5):  # rewriting gives the same bytes
        record.append(directory, line(i))
    assert path.read_bytes() == whole


def test_truncate_takes_the_old_summary_away(tmp_path: Path) -> None:
    written(tmp_path, 3)
    record.finish(tmp_path, {"rounds": 3}, {})
    record.truncate(tmp_path, 2)
    assert record.load(tmp_path).summary is None


def test_truncate_refuses_missing_rounds_and_changes_nothing(tmp_path: Path) -> None:
    written(tmp_path, 2)
    before = (tmp_path / record.ROUNDS).read_bytes()
    with pytest.raises(ValueError, match=r"to hold rounds 1 to 5, found 2"):
        record.truncate(tmp_path, 5)
    assert (tmp_path / record.ROUNDS).read_bytes() == before


def test_truncate_to_zero_without_a_file(tmp_path: Path) -> None:
    assert record.truncate(tmp_path, 0) == []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda rows: [rows[0], rows[2]], r"round=3 to be 2 in line 2"),
        (lambda rows: [rows[0], rows[0], rows[1]], r"round=1 to be 2 in line 2"),
        (lambda rows: [rows[0], b'{"round": 2\n', rows[2]], r"line 2 of .* to be a round's JSON"),
        (lambda rows: [rows[0].replace(b'"schema": 1', b'"schema": 9')], r"schema=9 <= 1 in line 1"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, edit, message: str) -> None:
    for i in (1, 2, 3):
        record.append(tmp_path, line(i))
    path = tmp_path / record.ROUNDS
    path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(ValueError, match=message):
        record.rounds(tmp_path)


def test_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record.append(tmp_path, line(1))
    before = (tmp_path / record.ROUNDS).read_bytes()
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:10]))
    with pytest.raises(OSError, match="make room"):
        record.append(tmp_path, line(2))
    monkeypatch.undo()
    assert (tmp_path / record.ROUNDS).read_bytes() == before


def test_config_json_tells_what_ran_and_where(tmp_path: Path) -> None:
    config = Config(peft="lora", rank=4, targets=("query", "key", "value"), head_lr=0.01)
    speed = Speed(lanes=4)
    about = record.start(tmp_path, config, speed, {"auto": {"lanes": 4, "cut": (1, 2)}})
    run = record.load(tmp_path)
    assert run.config == config
    assert run.speed == speed
    assert run.about == about
    assert about["auto"] == {"lanes": 4, "cut": [1, 2]}
    assert about["config_hash"] == config.hash()
    assert about["schema"] == record.SCHEMA
    assert {"jax", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(about["versions"])
    assert about["device"]["platform"] == "cpu"
    assert about["device"]["count"] >= 1
    assert about["cores"] == os.cpu_count() and isinstance(about["processor"], str)
    assert about["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert about["started"].startswith("20")


def test_commit_of_a_checkout_and_of_none(tmp_path: Path) -> None:
    def git(*args: str) -> str:
        name = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", "-C", tmp_path, *name, *args], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert record.commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "core.py").write_text("x = 1\n")
    assert record.commit(tmp_path) is None  # a copy in somebody else's checkout
    git("add", "core.py")
    git("commit", "-qm", "x")
    assert record.commit(tmp_path) == {"commit": git("rev-parse", "HEAD"), "changed": False}
    (tmp_path / "core.py").write_text("x = 2\n")
    assert record.commit(tmp_path) == {"commit": git("rev-parse", "HEAD"), "changed": True}
    assert record.commit(tmp_path / "absent") is None


def test_default_folders_are_named_by_time_and_hash_and_never_shared(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [record.folder(None, Config()) for _ in range(3)]
    assert len(set(made)) == 3
    for path in made:
        assert path.parent == Path("runs")
        assert Config().hash() in path.name
        assert path.is_dir()


def test_a_folder_with_a_run_is_refused_with_both_remedies(tmp_path: Path) -> None:
    directory = record.folder(tmp_path / "a" / "b", Config())
    record.start(directory, Config(), Speed())
    for refuse in (lambda: record.folder(directory, Config()), lambda: record.start(directory, Config(), Speed())):
        with pytest.raises(
            ValueError, match=r"to hold no run; go on with it by --resume .*a/b, or choose another --out"
        ):
            refuse()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="to be a folder, not a file"):
        record.folder(tmp_path / "file", Config())


LOCKER = """
import sys, time
from pathlib import Path
from fedsim import record
with record.lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def child(code: str, *args: object) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(Path(record.__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=env, stdout=subprocess.PIPE, text=True)


def test_one_process_at_a_time_writes_a_folder_and_a_killed_one_frees_it(tmp_path: Path) -> None:
    other = child(LOCKER, tmp_path)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"process {other.pid} on .* writes it"), record.lock(tmp_path):
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    with record.lock(tmp_path):
        pass
    with record.lock(tmp_path):  # leaving it frees it too
        pass


APPENDER = """
import json, sys
from pathlib import Path
from fedsim import record
line = json.loads(sys.argv[2])
number = len(record.truncate(Path(sys.argv[1]), len(record.rounds(Path(sys.argv[1])))))
print("go", flush=True)
while True:
    number += 1
    record.append(Path(sys.argv[1]), {**line, "round": number})
"""


def test_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    rng = random.Random(0)
    before = 0
    for _ in range(4):
        other = child(APPENDER, tmp_path, json.dumps(line(1)))
        assert other.stdout is not None
        other.stdout.readline()
        time.sleep(0.05 + rng.random() * 0.1)
        other.send_signal(signal.SIGKILL)
        other.communicate()
        found = record.rounds(tmp_path)  # raises if a line is damaged, missing or double
        assert len(found) > before
        before = len(found)
        # The system may end a write between two pages: less than a line may stand behind the last one, and is cut off.
        assert (tmp_path / record.ROUNDS).read_bytes().count(b"\n") == len(found)


def test_load_reads_parameters_summary_and_table(tmp_path: Path) -> None:
    import ml_dtypes

    written(tmp_path, 3)
    parameters = {
        "blocks/0/query/lora_a": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
        "head/bias": np.ones(3, ml_dtypes.bfloat16),
        "none": np.zeros((0, 2), np.float32),
    }
    record.finish(tmp_path, ended(tmp_path), parameters)
    run = record.load(str(tmp_path))
    assert run.summary is not None and ended(tmp_path).items() <= run.summary.items()
    assert run.summary["sha256"].keys() == {record.TRAINED}
    assert run.parameters.keys() == parameters.keys()
    for name, x in parameters.items():
        assert run.parameters[name].dtype == x.dtype
        np.testing.assert_array_equal(run.parameters[name], x)
    table = run.table()
    assert list(table["round"]) == [1, 2, 3]
    assert list(table["bytes_down"]) == [line(i)["bytes_down"] for i in (1, 2, 3)]
    assert table["validation_accuracy"].iloc[1] == 0.1
    assert "bytes_up_leaves" not in table


def test_table_of_rounds_without_evaluation(tmp_path: Path) -> None:
    written(tmp_path, 0)
    record.append(tmp_path, line(1, validation=None))
    assert math.isnan(record.load(tmp_path).table()["validation_loss"][0])


def test_table_without_pandas_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, 1)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match="pip install pandas, or use"):
        record.load(tmp_path).table()


def test_load_of_a_run_that_is_not_over(tmp_path: Path) -> None:
    run = record.load(written(tmp_path, 2))
    assert run.summary is None
    assert run.parameters == {}
    assert len(run.rounds) == 2


def test_load_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to hold a run"):
        record.load(tmp_path)
    written(tmp_path, 1)
    path = tmp_path / record.CONFIG
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about)[:-5])
    with pytest.raises(ValueError, match=r"config.json to be whole JSON"):
        record.load(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="to hold a JSON object"):
        record.load(tmp_path)
    path.write_text(json.dumps({**about, "seed": 3}))
    with pytest.raises(ValueError, match=r"its checksum differs; .* take 'checksum' out of it"):
        record.load(tmp_path)
    del about["checksum"]
    path.write_text(json.dumps({**about, "config": {**about["config"], "rnak": 8}}))
    with pytest.raises(ValueError, match=r"'rnak' to be a known one \(did you mean rank"):
        record.load(tmp_path)
    path.write_text(json.dumps({**about, "schema": 9}))
    with pytest.raises(ValueError, match="schema=9 <= 1"):
        record.load(tmp_path)


def test_reading_a_run_does_not_import_jax(tmp_path: Path) -> None:
    written(tmp_path, 2)
    code = (
        "import sys\nfrom fedsim import record\nfrom fedsim.report import plots, progress, tables as report\n"
        f"run = record.load({str(tmp_path)!r})\nreport.print_comparison(run, run)\n"
        "assert not {'jax', 'orbax', 'tensorflow_datasets'} & set(sys.modules), 'slow import'"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(record.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, stdout=subprocess.DEVNULL)


def test_docs_name_every_field() -> None:
    text = (Path(__file__).parents[2] / "docs" / "record.md").read_text()
    for name in (*line(1), "schema"):
        assert f"`{name}`" in text, name
