"""`benchmarks/peers/`: the work is the same everywhere, fedsim and plain JAX learn the same from it, verdicts follow from repeats.

The peers themselves are in environments of their own and are not run here.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.backbones import BACKBONES
from fedsim.config import Speed

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
sys.path.insert(0, str(PEERS))

import document
import driver
import jax_models
import processes
import run
import verdicts
import with_fedsim
import with_padded_vmap
import workloads


@pytest.fixture(autouse=True)
def keep_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """fedsim's side adds a row to the table of backbones; it is taken away again."""
    monkeypatch.setitem(BACKBONES, with_fedsim.TRANSFORMER, BACKBONES["vit_ti16"])


def count(arrays: workloads.Arrays) -> int:
    return sum(value.size for value in arrays.values())


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_work_is_as_defined_and_the_same_every_time(name: str) -> None:
    w = workloads.WORKLOADS[name]
    trained, frozen = workloads.weights(w)
    assert (count(trained), count(frozen)) == ((1_206_590, 0) if name == "W1" else (38_794, 5_489_856))
    sizes = workloads.client_sizes(w)
    low, high = {"uniform": (20, 100), "equal": (32, 32), "lognormal": (2, 60)}[w.sizes]
    assert len(sizes) == w.clients and sizes.min() >= low and sizes.max() <= high
    if w.sizes == "lognormal":
        assert 8 <= np.median(sizes) <= 10 and sizes.max() == 60
    ids = workloads.cohort(w, 1)
    assert len(set(ids.tolist())) == w.cohort and not np.array_equal(ids, workloads.cohort(w, 2))

    tiny = workloads.small(w)
    once, again = workloads.data(tiny), workloads.data(tiny)
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    for client in range(tiny.clients):
        batches = workloads.batches(tiny, once, 3, client)
        assert all(len(b) == w.batch_size for b in batches[:-1])
        assert sorted(np.concatenate(batches)) == list(range(*once.offsets[client : client + 2]))
    rows, mask = workloads.padded(tiny, once, 3, np.arange(tiny.clients))
    assert mask.sum() == once.sizes.sum() and rows.shape[1] == workloads.most_steps(tiny, once)


def test_texts_have_a_models_tokens_and_no_padding() -> None:
    w = workloads.small(workloads.GPU_WORKLOADS["G-L-8"])
    d = workloads.data(w)
    assert (d.x.dtype, d.x.shape[1:], len(d.probe_x)) == (np.int32, (w.tokens,), w.probe)
    assert d.x.min() > 0 and d.x.max() < w.vocabulary
    assert all(np.array_equal(a, b) for a, b in zip(d, workloads.data(w), strict=True))


def test_data_are_made_once_for_all_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = workloads.small(workloads.GPU_WORKLOADS["G-L-8"])
    workloads.keep(w, tmp_path)
    once = workloads.data(w)
    monkeypatch.setenv(workloads.KEPT, str(tmp_path))
    monkeypatch.setattr(workloads, "made", None)
    assert all(np.array_equal(a, b) for a, b in zip(once, workloads.data(w), strict=True))


@pytest.mark.parametrize("name", ["W1", "W2", "G-L-8"])
def test_layouts_return(name: str) -> None:
    w = workloads.small(workloads.ALL[name])
    trained = workloads.weights(w)[0]
    back = jax_models.published(w, jax_models.prepared(w, trained))
    assert all(np.array_equal(back[key], value) for key, value in trained.items())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "clients"), [("W1", 3), ("W3-4", 6), ("G-L-8", 6)])
def test_fedsim_and_plain_jax_learn_the_same(name: str, clients: int) -> None:
    """With one batch a client the order within a client does not matter, so the parameters are equal, not only the loss."""
    few = {"clients": clients, "cohort": clients - 1, "classes": 5}  # so few clients do not hold all 62 classes
    few |= {"tokens": 32, "vocabulary": 1000}
    w = dataclasses.replace(workloads.ALL[name], **few, batch_size=100, depth=1, probe=32)
    d, judge = workloads.data(w), run.Judge(w)
    ours = with_fedsim.prepare(w, d, Speed(lanes=2, devices=1, compilation_cache=False))
    plain = with_padded_vmap.prepare(w, d)
    for round, _ in (ours, plain):
        for number in (1, 2):
            round(number)
    start, (left, right) = workloads.weights(w)[0], (ours[1](), plain[1]())
    for key, value in right.items():
        np.testing.assert_allclose(left[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
    assert any(np.abs(right[key] - value).max() > 1e-3 for key, value in start.items())
    assert judge(left) == pytest.approx(judge(right), rel=1e-5)
    assert judge(left) != pytest.approx(judge.start, rel=1e-4)


def record(system: str, seconds: list[float], **changes: Any) -> dict[str, Any]:
    made = {"workload": "W2", "system": system, "startup": 2.0, "first": 9.0, "warm": 3.0, "pss": 500.0, "loss": 1.0}
    made |= {"error": None, "repeats": [[s, s] for s in seconds], "others": [[0.01, 0.02] for _ in seconds]}
    return made | changes


def said(records: list[dict[str, Any]], workload: str = "W2") -> dict[str, str]:
    records = json.loads(json.dumps([r | {"workload": workload} for r in records]))  # as they come from the file
    return {v.target: v.verdict for v in verdicts.verdicts(workload, verdicts.rows(records, workload, 2.0))}


AHEAD = "at least 1.3x the fastest, 1.15x in each repeat"


def test_ahead_needs_the_median_and_each_repeat() -> None:
    ours = record("fedsim", [1.0] * 5)
    assert said([ours, record("torch", [1.4] * 5)]) == {AHEAD: "met", "at least 1x of torch": "met"}
    assert said([ours, record("torch", [1.25] * 5)])[AHEAD] == "missed, a tie"
    assert said([ours, record("torch", [1.4] * 4 + [1.1])])[AHEAD] == "missed, a tie"
    # The fastest of each repeat counts, whoever it is.
    others = [record("torch", [1.4, 1.4, 1.1, 1.4, 1.4]), record("flower", [1.5] * 5)]
    assert said([ours, *others])[AHEAD] == "missed, a tie"
    behind = said([ours, record("torch", [0.7] * 5)])
    assert behind == {AHEAD: "missed, behind", "at least 1x of torch": "missed"}


def test_targets_of_w1_and_w3() -> None:
    ours, slow = record("fedsim", [1.0] * 5), record("padded-vmap", [3.1] * 2)  # a slow one has two repeats
    assert said([ours, record("torch", [1.35] * 5), slow], "W3-8") == {
        "at least 1.3x the fastest": "met",
        "at least 3x of padded-vmap": "met",
        "at least 1x of torch": "met",
    }
    found = said([ours, record("fedjax", [0.9] * 5), record("pfl", [0.6] * 5), record("pfl-2", [0.7] * 5)], "W1")
    assert found == {"at least 1x of fedjax": "missed", "at least 0.667x of pfl and pfl-2": "missed"}
    assert said([ours], "W3-4") == {"all": "not measured"}


def test_targets_of_a_gpu() -> None:
    records = [record("fedsim", [1.0] * 5), record("drjax", [1.9] * 5)]
    missing = {"at least 1x of torch": "not measured"}
    assert said(records, "G-Ti-8") == {"at least 2x the fastest": "missed, a tie", **missing}
    assert said(records, "G-L-8") == {"at least 2x the fastest": "missed, a tie", **missing}
    assert said(records, "G-B-16") == {"at least 1.2x the fastest": "met", **missing}


def test_void_rows_do_not_count() -> None:
    ours = record("fedsim", [1.0] * 5)
    wrong = record("torch", [0.5] * 5, loss=1.2)
    failed = record("pfl", [], error="ended instead of 'ready': no module")
    others = [record("flower", [1.4] * 5, loss=1.01), record("drjax", [1.6] * 5, loss=0.99)]
    records = [ours, wrong, failed, *others]
    assert said(records) == {AHEAD: "met", "at least 1x of torch": "not measured"}
    table = verdicts.rows(records, "W2", 2.0)
    assert [r.system for r in table] == ["fedsim", "flower", "drjax", "torch", "pfl"]
    text = verdicts.markdown({"W2": table})
    assert len(text.splitlines()) == 2 + 5
    assert "| W2 | flower | 1.40 (1.40-1.40) | 5 | 1.40 | 2.0 | 9.0 |  | 500 | 2% | 1.0100 |  |" in text
    assert all(line.count("|") == len(verdicts.RESULT) + 1 for line in text.splitlines())
    assert "torch void: loss 1.2000" in text and "void: ended instead of 'ready'" in text
    assert said([record("fedsim", [1.0], loss=float("nan")), *others]) == {"all": "not measured"}


def test_several_starts_are_one_row() -> None:
    starts = [record("fedsim", [s], startup=s) for s in (1.0, 3.0, 2.0)]
    row = verdicts.rows(starts, "W2", 2.0)[0]
    assert (row.repeats, row.median, row.startup) == ([1.0, 3.0, 2.0], 2.0, 2.0)


def test_a_row_measured_apart_from_fedsims_is_marked_and_does_not_count() -> None:
    """The machine's speed drifts by a factor of two within an hour."""
    ours = record("fedsim", [1.0] * 5, batch="b", commit="0123456789", changed=True, compiling=6.25)
    other, apart = record("torch", [1.4] * 5, batch="b", compiling=None), record("flower", [0.5] * 5, batch="a")
    old = record("pfl", [0.4] * 5)  # from before batches were noted
    assert said([ours, other, apart, old]) == {AHEAD: "met", "at least 1x of torch": "met"}
    text = verdicts.markdown({"W2": verdicts.rows([ours, other, apart, old], "W2", 2.0)})
    assert "| W2 | fedsim | 1.00 (1.00-1.00) | 5 | 1.00 | 2.0 | 9.0 | 6.2 | 500 | 2% | 1.0000 | 0123456+ |" in text
    assert (
        "| W2 | flower (measured apart) | 0.50 (0.50-0.50) | 5 |  | " in text
        and "| W2 | pfl (measured apart) |" in text
    )
    # Two starts of one system, one of them in another measurement than fedsim's: they make one row, which is apart.
    table = verdicts.rows([ours, record("torch", [1.4], batch="b"), record("torch", [1.4], batch="a")], "W2", 2.0)
    assert [r.apart for r in table] == [False, True]
    assert said([ours, apart]) == {"all": "not measured"}
    assert said([record("fedsim", [1.0] * 5), record("torch", [1.4] * 5)])[AHEAD] == "met"  # old records are read


def test_the_start_of_those_that_start_together_is_marked() -> None:
    records = [record("fedsim", [1.0], together=True), record("torch", [1.0], together=False)]
    text = verdicts.markdown({"W2": verdicts.rows(records, "W2", 2.0)})
    assert "| W2 | fedsim | 1.00 (1.00-1.00) | 1 | 1.00 | 2.0* |" in text
    assert "| W2 | torch | 1.00 (1.00-1.00) | 1 | 1.00 | 2.0 |" in text


@pytest.mark.slow
@pytest.mark.parametrize("order", [{}, {"alone": True}, {"together": True}, {"together": True, "alone": True}])
def test_orders_of_a_measurement(order: dict[str, bool], tmp_path: Path) -> None:
    o = run.Options(systems=("padded-vmap", "padded-vmap-2"), small=True, repeats=2, **order)
    records, start = run.measure("W2", o, tmp_path)
    assert [r["system"] for r in records] == list(o.systems)
    for r in records:
        assert r["error"] is None and len(r["repeats"]) == 2 and r["loss"] < start
        assert (r["together"], r["alone"]) == (o.together, o.alone)


def test_after_the_budget_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.Judge, "start", 1.0)
    o = run.Options(systems=("padded-vmap",), small=True, budget=0.0)
    assert run.measure("W2", o, tmp_path) == ([], 1.0)


def test_records_of_what_was_not_asked_for_are_kept() -> None:
    before = [record("fedsim", [1.0]), record("torch", [1.0]), record("fedsim", [3.0], workload="W1")]
    new = [record("fedsim", [2.0]), record("fedsim", [2.5])]  # two starts
    found = {(r["workload"], r["system"], r["repeats"][0][0]) for r in run.merged(before, new)}
    assert found == {("W2", "torch", 1.0), ("W1", "fedsim", 3.0), ("W2", "fedsim", 2.0), ("W2", "fedsim", 2.5)}


def test_the_documents_tables_are_those_of_the_kept_records() -> None:
    """`run.py --write-docs` writes them."""
    text = document.DOCUMENT.read_text()
    assert document.written(text) == text
    assert document.inserted("<!-- table a -->old<!-- end of a -->\n", {"a": "new"}) == (
        "<!-- table a -->\n\nnew\n\n<!-- end of a -->\n"
    )
    with pytest.raises(ValueError, match="table a"):
        document.inserted("", {"a": "new"})


def test_kept_records_have_commits() -> None:
    for platform in document.FILES:
        content = document.kept(platform)
        assert all(r["commit"] for r in (content["results"] if content else []))


def test_systems_have_scripts_and_platforms_their_rows() -> None:
    assert all((PEERS / kind.script).exists() for kind in run.SYSTEMS.values())
    cpu, gpu = run.completed(run.Options()), run.completed(run.Options(platform="gpu"))
    assert cpu.workloads == ("W1", "W2", "W3-4", "W3-8", "W3-16") and gpu.workloads == (
        "G-B-8",
        "G-B-16",
        "G-Ti-8",
        "G-L-8",
    )
    assert {"drjax-2", "padded-vmap-2", "fedsim-1"} <= set(cpu.systems) and "flower-0.25" not in cpu.systems
    assert {"pfl-8", "flower-0.25", "torch.func"} <= set(gpu.systems) and "fedsim-1" not in gpu.systems
    with pytest.raises(SystemExit, match=r"platform=cpu; flower-0\.25 do not"):
        run.check(run.completed(run.Options(systems=("flower-0.25",))))


def test_without_a_gpu_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SEES_GPU", "raise SystemExit(1)")
    with pytest.raises(SystemExit, match="Expected a GPU with platform=gpu; the environments of fedsim find none"):
        run.main(run.Options(platform="gpu", systems=("fedsim",)))


@pytest.mark.parametrize("name", ["G-B-8", "G-Ti-8"])
def test_models_for_a_gpu_have_their_published_sizes(name: str) -> None:
    """ViT-B/16 has 85.8 million parameters without a head, ViT-Ti/16 5.5 million (their papers' tables)."""
    w = workloads.GPU_WORKLOADS[name]
    block = 12 * w.width**2 + 13 * w.width  # qkv, proj, two of the feed-forward part, two norms
    rest = w.width * (3 * workloads.PATCH**2 + 1 + 1 + 197 + 2)  # patches and their bias, class token, positions, norm
    assert count(workloads.weights(w)[1]) == w.depth * block + rest
    assert w.depth * block + rest == {768: 85_798_656, 192: 5_524_416}[w.width]


def test_minilm_has_its_published_size() -> None:
    """All-MiniLM-L6-v2 has 22,713,216 parameters, of which the pooler, that sentence encoders leave out, is a 384 x 384 layer."""
    w = workloads.GPU_WORKLOADS["G-L-8"]
    trained, frozen = workloads.weights(w)
    assert count(frozen) == 22_713_216 - (384 * 384 + 384)
    assert count(trained) == w.depth * 2 * 2 * w.width * workloads.RANK + w.width * w.classes + w.classes


def test_compiling_counts_nested_and_parallel_spans_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = driver.CompileClock.__new__(driver.CompileClock)  # without listening to JAX
    clock.spans = []
    for until, duration in ((2.0, 1.0), (3.0, 0.5), (3.5, 2.0), (10.0, 1.0)):  # 1-2, 2.5-3, 1.5-3.5, 9-10
        monkeypatch.setattr("driver.time.perf_counter", lambda until=until: until)
        clock.note("/jax/core/compile/jaxpr_trace_duration", duration, fun_name="f")
    clock.note("/jax/checkpoint/write/duration", 5.0)
    assert clock.seconds == 3.5


@pytest.mark.slow
def test_padded_vmap_on_two_devices_learns_the_same() -> None:
    few = {"clients": 6, "cohort": 4, "depth": 1, "classes": 5, "probe": 8}
    w = dataclasses.replace(workloads.WORKLOADS["W3-16"], **few)
    d = workloads.data(w)
    one, two = with_padded_vmap.prepare(w, d), with_padded_vmap.prepare(w, d, devices=2)
    for round, _ in (one, two):
        round(1)
    for key, value in one[1]().items():
        np.testing.assert_allclose(two[1]()[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


SCRIPT = """
import subprocess, sys, time
sys.path.insert(0, {peers!r})
import driver, numpy
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("a line of its own")
driver.loop(driver.options(), lambda number: time.sleep(0.05 * number), lambda: dict(w=numpy.ones(2)))
"""


@pytest.mark.slow
def test_a_system_is_timed_round_by_round_and_ended_with_its_children(tmp_path: Path) -> None:
    script, out = tmp_path / "system.py", tmp_path / "out.npz"
    script.write_text(SCRIPT.format(peers=str(PEERS)))
    command = [sys.executable, str(script), "W2", "--rounds", "3", "--out", str(out)]
    system = processes.System(command, tmp_path / "log", tmp_path)
    try:
        assert system.ready(60) > 0
        seconds = [system.round(60)["seconds"] for _ in range(3)]
        assert seconds[0] >= 0.05 and seconds[2] >= 0.15
        system.wait("judged", 60)
        assert np.load(out)["w"].tolist() == [1, 1]
        assert system.peak_pss > 5 and "a line of its own" in (tmp_path / "log").read_text()
        with pytest.raises(processes.SystemFailedError, match="ended"):
            system.round(60)
        assert len(system._pids()) >= 1  # the child that it left behind
    finally:
        system.end()
    assert system._pids() == []
