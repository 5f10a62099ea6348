"""Checkpoints: every kind of leaf comes back bit for bit, damage is noticed, kill -9 leaves a usable one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import keystr, tree_flatten_with_path

from fedsim.record import checkpoint
from fedsim.record.checkpoint import Checkpoints


class Server(NamedTuple):
    trained: dict
    optimizer: object
    nothing: None = None
    empty: tuple = ()


class Other(NamedTuple):
    trained: dict
    optimizer: object
    nothing: None = None
    empty: tuple = ()


def state(x: float = 1.0) -> dict:
    """One of each kind of leaf that a run can hold."""
    trained = {
        "blocks/0/query/lora_a": jnp.linspace(x, 2 * x, 12).reshape(3, 4),
        "head/bias": jnp.full(3, x, jnp.bfloat16),
        "head/none": jnp.zeros((0, 5)),
    }
    optimizer = optax.chain(optax.clip(1.0), optax.adam(1e-3))
    return {
        "server": Server(trained, optimizer.init(trained)),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(0, impl="rbg"), 4),
        "memory": {"rows": np.arange(6, dtype=np.int64).reshape(2, 3), "flag": np.array(True)},
        "count": 2**90 + round(x),
        "best": 0.1 + 0.2,
        "stopped": False,
        "note": "x",
        "scalar": np.float32(x),
        "weak": jnp.asarray(2.5),
        "weak_row": jax.lax.full((3,), 1.5),
        "nan": jnp.array([jnp.nan, jnp.inf, -0.0]),
    }


EXTRA = {"config": "abc", "total_bytes_up": 2**70, "history": [{"loss": 0.1}], "auto": {"lanes": 16}}


def assert_same(a: object, b: object) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(tree_flatten_with_path(a)[0], tree_flatten_with_path(b)[0], strict=True):
        name = keystr(path)
        assert isinstance(y, jax.Array) == isinstance(x, jax.Array), name
        if not isinstance(x, (jax.Array, np.ndarray, np.generic)):
            assert (type(x), x) == (type(y), y), name
            continue
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert getattr(x, "weak_type", False) == getattr(y, "weak_type", False), name
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with good checkpoints of rounds 1 and 2."""
    with Checkpoints(tmp_path / "good") as checkpoints:
        for i in (1, 2):
            assert checkpoints.save(i, state(i), EXTRA)
    return tmp_path / "good"


def test_round_trip_of_every_kind_of_leaf(saved: Path) -> None:
    with Checkpoints(saved) as checkpoints:
        found = checkpoints.restore(state(9.0), {"config": "abc", "auto": {"lanes": 16}})
    assert found is not None
    number, tree, extra = found
    assert number == 2
    assert extra == EXTRA
    assert_same(state(2), tree)
    # the key goes on where it stopped
    assert jax.random.uniform(tree["key"]) == jax.random.uniform(state()["key"])


def test_template_from_eval_shape_gives_python_numbers_back(tmp_path: Path) -> None:
    tree = {"count": 2**40, "x": jnp.ones(3), "key": jax.random.key(1)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {})
        template = jax.eval_shape(lambda: {"count": 1, "x": jnp.ones(3), "key": jax.random.key(0)})
        found = checkpoints.restore(template, {})
    assert found is not None
    assert_same(tree, found[1])


def test_nothing_to_restore(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(state(), {}) is None
        assert checkpoints.latest() is None


def test_a_tree_without_arrays(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"a": (), "n": 5, "z": np.zeros((2, 0))}, {"x": 1})
        found = checkpoints.restore({"a": (), "n": 0, "z": np.zeros((2, 0))}, {})
    assert found is not None
    assert found[1]["n"] == 5
    assert found[1]["z"].shape == (2, 0)


def test_donated_and_changed_arrays_do_not_reach_the_checkpoint(tmp_path: Path) -> None:
    double = jax.jit(lambda x: x * 2 - 1, donate_argnums=0)
    x, y = jnp.arange(200_000, dtype=jnp.float32), np.arange(4_000_000)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x, "y": y}, {})
        y[:] = -1
        for _ in range(10):
            x = double(x)
        x.block_until_ready()
        found = checkpoints.restore({"x": jnp.zeros(200_000), "y": np.zeros(4_000_000, np.int64)}, {})
    assert found is not None
    np.testing.assert_array_equal(found[1]["x"], np.arange(200_000, dtype=np.float32))
    np.testing.assert_array_equal(found[1]["y"], np.arange(4_000_000))


def test_devices_of_the_template(tmp_path: Path) -> None:
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("clients",))
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("clients"))
    tree = {"pinned": jax.device_put(jnp.arange(float(8 * len(devices))), sharded), "free": jnp.ones(2)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {})
        found = checkpoints.restore(jax.tree.map(jnp.zeros_like, tree), {})
    assert found is not None
    assert_same(tree, found[1])
    assert found[1]["pinned"].sharding.is_equivalent_to(sharded, 1)
    assert not found[1]["free"].committed  # else it could not meet arrays on other devices


def test_keeps_the_newest(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for i in range(1, 6):
            checkpoints.save(i, {"x": jnp.ones(3)}, {})
        checkpoints.wait()
        assert checkpoints.rounds() == [4, 5]


def test_a_round_is_saved_once(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(1, {"x": jnp.ones(3)}, {})
        assert not checkpoints.save(1, {"x": jnp.ones(3)}, {})
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"Expected round=1 to be above the newest checkpoint 1.*restore before"):
            checkpoints.save(1, {"x": jnp.ones(3)}, {})
        assert checkpoints.restore({"x": jnp.ones(3)}, {}) is not None
        assert not checkpoints.save(1, {"x": jnp.ones(3)}, {})
        assert checkpoints.save(2, {"x": jnp.ones(3)}, {})


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"leaf \['f'\] to be an array"):
            checkpoints.save(1, {"f": len}, {})
        with pytest.raises(ValueError, match=r"extra of round=1 to hold JSON values"):
            checkpoints.save(1, {}, {"x": np.ones(3)})
        assert checkpoints.rounds() == []
    with pytest.raises(ValueError, match="keep=0 >= 1"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize(
    ("change", "expect", "message"),
    [
        (lambda s: s, {"config": "xyz"}, r"config is 'xyz' in this run, 'abc' in the checkpoint"),
        (lambda s: s, {"auto": {"lanes": 8}}, r"auto.lanes is 8 in this run, 16 in the checkpoint"),
        (lambda s: s, {"versions": {"jax": "1"}}, r"versions is \{'jax': '1'\} in this run, None in"),
        (lambda s: {**s, "more": 1}, {}, r"\['more'\] is only in this run"),
        (lambda s: {k: v for k, v in s.items() if k != "best"}, {}, r"\['best'\] is only in the checkpoint"),
        (lambda s: {**s, "count": 1.0}, {}, r"\['count'\] is float in this run, int in the checkpoint"),
        (lambda s: {**s, "nan": jnp.ones(4)}, {}, r"\['nan'\] is float32\(4\) in this run, float32\(3\) in"),
        (lambda s: {**s, "nan": np.ones(3)}, {}, r"\['nan'\] is float64\(3\) in this run, float32\(3\) in"),
        (lambda s: {**s, "key": jax.random.key(0, impl="rbg")}, {}, r"\['key'\] is key<rbg>\(4\) in this run"),
        (lambda s: {**s, "server": Other(*s["server"])}, {}, r"its containers .* are other ones"),
    ],
)
def test_foreign_checkpoint_is_refused_and_left_alone(saved: Path, change, expect: dict, message: str) -> None:
    with Checkpoints(saved) as checkpoints:
        with pytest.raises(ValueError, match=message) as error:
            checkpoints.restore(change(state()), expect)
        assert "Resume with the options it was started with" in str(error.value)
        assert checkpoints.rounds() == [1, 2]
        assert checkpoints.restore(state(), {"config": "abc"}) is not None


def test_newer_format_is_refused_not_called_damaged(saved: Path) -> None:
    path = saved / "2" / "meta" / "metadata"
    body = json.loads(path.read_text())["body"] | {"format": 99}
    path.write_text(json.dumps({"body": body, "sha256": checkpoint.digest(body)}))
    with Checkpoints(saved) as checkpoints, pytest.raises(ValueError, match=r"format=99 <= 1.*newer fedsim"):
        checkpoints.restore(state(), {})


def test_bare_directory_is_not_a_checkpoint(saved: Path) -> None:
    (saved / "99").mkdir()
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.latest() == (2, EXTRA)
        with pytest.warns(UserWarning, match=r"round 99 is damaged .*meta/metadata.*moved to damaged-99.*round 2"):
            found = checkpoints.restore(state(), {})
        assert found is not None
        assert found[0] == 2
        assert checkpoints.save(3, state(3), EXTRA)
        checkpoints.wait()
        assert checkpoints.rounds() == [1, 2, 3]


def test_changed_number_in_the_json_part_is_noticed(saved: Path) -> None:
    path = saved / "2" / "meta" / "metadata"
    text = path.read_text()
    assert str(2**70) in text
    path.write_text(text.replace(str(2**70), str(2**70 + 1)))
    with Checkpoints(saved) as checkpoints:
        with pytest.warns(UserWarning, match=r"round 2 is damaged .*the checksum differs"):
            found = checkpoints.restore(state(), {})
        assert found is not None
        assert found[0] == 1


def test_moved_checkpoint_is_not_taken_for_another_round(saved: Path) -> None:
    (saved / "2").rename(saved / "7")
    with Checkpoints(saved) as checkpoints, pytest.warns(UserWarning, match="saved as round 2"):
        found = checkpoints.restore(state(), {})
    assert found is not None
    assert found[0] == 1


def test_after_a_damaged_one_its_round_can_be_saved_again(saved: Path) -> None:
    (saved / "2" / "meta" / "metadata").write_text("{")
    with Checkpoints(saved) as checkpoints:
        with pytest.warns(UserWarning, match=r"round 2 is damaged .*JSONDecodeError.*moved to damaged-2"):
            found = checkpoints.restore(state(), {})
        assert found is not None
        assert_same(state(1), found[1])
        assert checkpoints.save(2, state(2), EXTRA)
    with Checkpoints(saved) as checkpoints:
        found = checkpoints.restore(state(), {})
    assert found is not None
    assert_same(state(2), found[1])


def test_template_may_follow_the_checkpoint_that_is_tried(tmp_path: Path) -> None:
    """A memory grows from round to round: going back to an older checkpoint needs the older shapes."""
    with Checkpoints(tmp_path) as checkpoints:
        for i in (1, 2):
            checkpoints.save(i, {"rows": np.arange(i)}, {"rows": i, "phase": f"phase {i}"})
        checkpoints.wait()
        shutil.rmtree(tmp_path / "2" / "arrays" / "d")
        with pytest.warns(UserWarning, match="round 2 is damaged"):
            found = checkpoints.restore(
                lambda _, extra: {"rows": np.zeros(extra["rows"], np.int64)},
                lambda number, _: {"phase": f"phase {number}"},
            )
    assert found is not None
    assert found[0] == 1
    np.testing.assert_array_equal(found[1]["rows"], [0])


def test_all_damaged_gives_none(saved: Path) -> None:
    for i in (1, 2):
        (saved / str(i) / "meta" / "metadata").unlink()
    with Checkpoints(saved) as checkpoints, pytest.warns(UserWarning) as caught:
        assert checkpoints.restore(state(), {}) is None
    assert "going back to round 1" in str(caught[0].message)
    assert "there is no older one" in str(caught[1].message)


def files_of(step: Path) -> list[str]:
    return sorted(str(p.relative_to(step)) for p in step.rglob("*") if p.is_file())


# tensorstore may answer a read of a damaged file after Orbax has given up on it
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["truncated", "flipped", "removed", "emptied"])
def test_damage_anywhere_never_gives_other_values(saved: Path, tmp_path: Path, how: str) -> None:
    """Whatever file is hurt: either the exact bits of round 2 come back, or round 1 with a warning."""
    rng = random.Random(0)
    fell_back = []
    for name in files_of(saved / "2"):
        copy = tmp_path / "hurt"
        shutil.copytree(saved, copy)
        path = copy / "2" / name
        data = bytearray(path.read_bytes())
        if how == "removed":
            path.unlink()
        elif how == "emptied":
            path.write_bytes(b"")
        elif how == "truncated":
            path.write_bytes(data[: len(data) // 2])
        elif data:
            for at in rng.sample(range(len(data)), min(3, len(data))):
                data[at] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        with warnings.catch_warnings(record=True) as caught, Checkpoints(copy) as checkpoints:
            warnings.simplefilter("always")
            found = checkpoints.restore(state(), {"config": "abc"})
            assert found is not None, name
            assert_same(state(found[0]), found[1])
            assert found[2] == EXTRA
            if found[0] == 1:
                fell_back.append(name)
                assert "round 2 is damaged" in str([w.message for w in caught]), name
                assert checkpoints.save(2, state(2), EXTRA), name
        shutil.rmtree(copy)
    assert "meta/metadata" in fell_back
    assert any(name.startswith("arrays/") for name in fell_back)


def test_flipped_byte_in_the_data_is_named(tmp_path: Path) -> None:
    """Random bytes are stored as they are, so a flip in them decodes without an error: only the checksum sees it."""
    x = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x}, {})
        checkpoints.wait()
        big = max((p for p in (tmp_path / "1").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        data = bytearray(big.read_bytes())
        data[len(data) // 2] ^= 1
        big.write_bytes(data)
        with pytest.warns(UserWarning, match=r"round 1 is damaged .*/1/arrays"):
            assert checkpoints.restore({"x": x}, {}) is None


def run_child(code: str, *args: object, **more) -> subprocess.Popen:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(checkpoint.__file__).parents[2])}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


FAILING = """
import resource, signal, sys
import numpy as np
from fedsim.record.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
c = Checkpoints(sys.argv[1])
small, big = {"x": np.zeros(3)}, {"x": np.random.default_rng(0).random(400_000)}
c.save(1, small, {})
c.wait()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))   # the disk is "full" for files above 50 kB
print(c.save(2, big, {}))
try:
    c.save(3, small, {}) if sys.argv[2] == "save" else c.wait() if sys.argv[2] == "wait" else c.close()
except OSError as error:
    print(error)
if sys.argv[2] == "close":
    raise SystemExit
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
print(c.save(2, big, {}))
c.wait()
print(c.rounds(), c.restore(big, {})[0])
c.close()
"""


@pytest.mark.parametrize("then", ["save", "wait", "close"])
def test_failed_background_save_surfaces_and_can_be_repeated(tmp_path: Path, then: str) -> None:
    child = run_child(FAILING, tmp_path, then)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    lines = out.splitlines()
    assert lines[0] == "True"
    assert "Expected the checkpoint of round 2 to be written to" in lines[1]
    assert "(File too large); make room or choose another disk, then resume: usable checkpoints are [1]" in lines[1]
    assert "Traceback" not in err
    if then != "close":
        assert lines[2:] == ["True", "[1, 2] 2"]


LOOP = """
import sys
import jax, jax.numpy as jnp
import numpy as np
from fedsim.record.checkpoint import Checkpoints
template = {"x": jnp.zeros(50_000), "n": 0, "key": jax.random.key(0)}
with Checkpoints(sys.argv[1]) as c:
    found = c.restore(template, {"config": "abc"})
    round = found[0] if found else 0
    print("from", round, flush=True)
    while True:
        round += 1
        tree = {"x": jnp.full(50_000, float(round)), "n": round, "key": jax.random.fold_in(jax.random.key(0), round)}
        c.save(round, tree, {"config": "abc", "round": round, "bytes": round * 2**60})
        if round % 3 == 0:
            c.wait()
            print("done", round, flush=True)
"""


@pytest.mark.slow
def test_kill_at_random_moments_during_saves(tmp_path: Path) -> None:
    """A process that saves all the time is killed eight times; the last finished checkpoint is always usable."""
    rng = random.Random(0)
    template = {"x": jnp.zeros(50_000), "n": 0, "key": jax.random.key(0)}
    last = 0
    left_half_written = 0
    for _ in range(8):
        child = run_child(LOOP, tmp_path)
        assert child.stdout is not None
        assert child.stdout.readline() == f"from {last}\n"
        assert child.stdout.readline().startswith("done")  # saves are under way
        time.sleep(rng.uniform(0.0, 0.25))
        child.send_signal(signal.SIGKILL)
        out, _ = child.communicate()
        finished = [int(line.split()[1]) for line in out.splitlines() if line.startswith("done")]
        left_half_written += any("tmp" in p.name for p in tmp_path.iterdir())
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is damaged
            with Checkpoints(tmp_path) as checkpoints:
                found = checkpoints.restore(template, {"config": "abc"})
        assert found is not None
        number, tree, extra = found
        assert number >= max(finished, default=0)
        assert number > last
        assert tree["n"] == extra["round"] == number
        assert extra["bytes"] == number * 2**60
        np.testing.assert_array_equal(tree["x"], np.full(50_000, number, np.float32))
        expected = jax.random.fold_in(jax.random.key(0), number)
        np.testing.assert_array_equal(jax.random.key_data(tree["key"]), jax.random.key_data(expected))
        assert not any("tmp" in p.name for p in tmp_path.iterdir())
        last = number
    assert left_half_written, "no kill fell into a save: the test shows nothing"
