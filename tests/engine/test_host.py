"""The CPU as several devices, which share memory; the clock of compilation counts every moment once."""

from __future__ import annotations

import gc
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brief import brief
from fedsim.config import Speed
from fedsim.engine import host
from fedsim.engine.lanes import Lanes

DIVIDED = """
import sys
import fedsim
import jax
from fedsim import record
from fedsim.__main__ import main

finish = record.finish
def stop(*args):
    raise KeyboardInterrupt
record.finish = stop  # as killed before the end
assert main(sys.argv[1:]) == 130
run = fedsim.load("run")
print(len(jax.devices()), run.rounds[-1]["round"])
"""
RESUMED = """
import jax
from fedsim.__main__ import main

assert main(["run", "--resume", "run", "--quiet"]) == 0
print(len(jax.devices()))
"""

TRACE = "/jax/core/compile/jaxpr_trace_duration"


def test_what_is_traced_within_a_trace_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 1 s within 3 s, then 2 s apart; other events do not count."""
    clock = host.CompileClock()
    for now, event, seconds in (
        (11.0, TRACE, 1.0),
        (11.5, TRACE, 0.4),
        (12.0, TRACE, 3.0),
        (15.0, "/jax/core/compile/backend_compile_duration", 2.0),
        (16.0, "/jax/compilation_cache/cache_retrieval_time_sec", 5.0),
    ):
        monkeypatch.setattr(time, "perf_counter", lambda now=now: now)
        clock._listen(event, seconds)
    assert clock.seconds == pytest.approx(3.0 + 2.0)


def test_a_nested_program_takes_no_longer_than_it_took() -> None:
    clock = host.compile_clock()
    inner = jax.jit(lambda x: jnp.sin(x) + 1)
    for _ in range(6):
        inner = jax.jit(lambda x, below=inner: jnp.cos(below(x)) * below(x + 1))
    before, start = clock.seconds, time.perf_counter()
    inner(jnp.ones(3)).block_until_ready()
    assert 0 < clock.seconds - before <= time.perf_counter() - start


@pytest.mark.slow
def test_devices_divide_a_cpu_and_a_resumed_run_has_as_many(
    tmp_path: Path, environment: dict[str, str], blobs: Callable[..., Path]
) -> None:
    def fresh(*command: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1].split()

    options = (
        f"run --dataset {blobs(tmp_path)} --backbone mlp --weights random --peft head --clients 8 --clients-per-round 4"
    )
    # Three, which is not what is taken where nothing is said.
    assert fresh(DIVIDED, *options.split(), "--rounds=2", "--devices=3", "--quiet", "--out=run") == ["3", "2"]
    assert fresh(RESUMED) == ["3"]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fed_sa_lora", "flora"])
def test_no_program_of_a_run_makes_host_devices_wait_for_each_other(
    tmp_path: Path, environment: dict[str, str], blobs: Callable[..., Path], algorithm: str
) -> None:
    """In none is a collective, in which XLA's threads may stand still for ever: of rounds, evaluation, clients' tests."""
    options = (
        f"run --dataset {blobs(tmp_path)} --backbone mlp --weights random --peft lora --rank 2 --targets layers/* "
        f"--clients 8 --devices 2 --clients-per-round 4 --rounds 3 --head-rounds 1 --algorithm {algorithm} --local-test 0.2 --quiet "
        "--no-head-baseline --no-compilation-cache --server-optimizer adam --out run"
    )
    dump = f"--xla_dump_to={tmp_path / 'programs'} --xla_dump_hlo_as_text"
    own = environment | {"XLA_FLAGS": f"{environment.get('XLA_FLAGS', '')} {dump}"}
    command = [sys.executable, "-m", "fedsim", *options.split()]
    done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    texts = [file.read_text() for file in (tmp_path / "programs").glob("*after_optimizations.txt")]
    assert sum("num_partitions=2" in text for text in texts) > 5, "the programs of two devices"
    waits = [
        text.partition("\n")[0] for text in texts if re.search(r"all-(reduce|gather|to-all)|collective|permute", text)
    ]
    assert waits == []


def test_devices_of_a_cpu_share_what_is_kept() -> None:
    devices = jax.devices("cpu")[:2]
    everywhere = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices), ("d",)), jax.sharding.PartitionSpec())
    strided = np.arange(2**18, dtype=np.float32).reshape(512, -1).T
    values = host.aligned(strided)
    np.testing.assert_array_equal(values, strided)
    copies = [shard.data for shard in jax.device_put(values, everywhere).addressable_shards]
    assert [copy.unsafe_buffer_pointer() for copy in copies] == 2 * [values.ctypes.data]
    assert host.aligned(values) is values and host.aligned(few := np.ones(3)) is few


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 7)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, jnp.bfloat16])
def test_zeros_lie_where_xla_takes_them(shape: tuple[int, ...], dtype: type) -> None:
    made = host.zeros(shape, dtype)
    assert (made.shape, made.dtype) == (shape, dtype) and not made.any()
    assert made.size == 0 or made.ctypes.data % host.ALIGNMENT == 0


@pytest.mark.slow
def test_a_cpu_that_the_user_has_divided_stays_so(tmp_path: Path, environment: dict[str, str]) -> None:
    code = "from fedsim.engine.host import divide_cpu; import jax; divide_cpu(2); print(len(jax.devices()))"
    for name, value in (("XLA_FLAGS", "--xla_force_host_platform_device_count=3"), ("JAX_NUM_CPU_DEVICES", "3")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | {name: value}, capture_output=True, text=True, check=True
        )
        assert done.stdout == "3\n"


def test_an_engine_of_several_host_devices_holds_backbone_and_examples_once() -> None:
    held, x = {"w": np.ones((256, 256), np.float32)}, np.ones((300, 64), np.float32)
    engine = Lanes(held, x, np.zeros(300), np.arange(300), np.array([0, 150, 300]), seed=0, devices=2)
    for kept in (engine.held["w"], engine.x):
        first, second = (shard.data.unsafe_buffer_pointer() for shard in kept.addressable_shards)
        assert first == second


def test_the_garbage_collectors_thresholds_are_raised_but_where_somebody_chose_them():
    before = gc.get_threshold()
    try:
        for chosen, found in (((700, 10, 10), host.COLLECT), ((0, 10, 10), (0, 10, 10)), ((9000, 5, 5), (9000, 5, 5))):
            gc.set_threshold(*chosen)
            host.tune_host(Speed(compilation_cache=False))
            assert gc.get_threshold() == found
    finally:
        gc.set_threshold(*before)


ROUNDS = """
import sys
import numpy as np
import fedsim

x = np.random.default_rng(0).normal(size=(400, 6)).astype("float32")
config = fedsim.Config(dataset="arrays", backbone="linear", peft="head", clients=10, clients_per_round=5, rounds=10**6, min_size=1)
try:
    fedsim.run(config, fedsim.Speed(devices=1, lanes=2), out="run a", data=fedsim.arrays(x, (x[:, 0] > 0).astype(int)))
except KeyboardInterrupt as stop:
    print(stop, flush=True)
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("times", brief([1, 2]))
def test_a_signal_stops_a_run_after_its_round_and_says_the_way_on(
    tmp_path: Path, environment: dict[str, str], number: signal.Signals, times: int
) -> None:
    """A real process; a second signal ends it at once, without a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-c", ROUNDS], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for row in process.stdout:
            if row.strip().startswith("3/"):
                break
        for _ in range(times):
            process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err, err
    assert "go on with: fedsim run --resume 'run a'" in out
    if times == 1:
        assert "Stopping after this round" in err and "Stopped after round" in out
        kept = [int(folder.name) for folder in (tmp_path / "run a" / "checkpoints").iterdir() if folder.name.isdigit()]
        assert f"Stopped after round {max(kept)};" in out


def test_who_watches_is_told_how_far_something_is() -> None:
    told: list[tuple[str, int, int]] = []
    host.went("nobody watches", 1, 2)
    with host.watched(lambda *far: told.append(far)):
        host.went("features", 64, 128)
    host.went("nobody watches", 2, 2)
    assert told == [("features", 64, 128)]
