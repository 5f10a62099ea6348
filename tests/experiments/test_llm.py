"""`experiments/llm/speakers.py` in small: the federation it draws, and the table's figures."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim
from fedsim import own
from fedsim.data.dataset import Source

FILE = Path(__file__).parents[2] / "experiments" / "llm" / "speakers.py"
pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture
def speakers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module on a play of six speakers, of whom four say neither little nor much."""
    module = own.execute(FILE, "experiment", beside=True)
    words = np.random.default_rng(0).choice(["thou", "art", "noble", "king", "and", "sword"], 6000)
    counts = {"a": 5, "b": 12, "c": 13, "d": 14, "e": 15, "f": 50}  # speeches of ten words
    who = np.repeat(list(counts), list(counts.values()))
    said = [" ".join(words[10 * row : 10 * row + 10]) for row in range(len(who))]
    source = Source("plays", said, np.zeros(len(who), np.int32), {"train": np.arange(len(who))}, ("one",), "text", "none",
                    natural={"client": who})  # fmt: skip
    monkeypatch.setattr(module, "read", lambda config: source)
    monkeypatch.setattr(module, "SPEAKERS", 3)
    monkeypatch.setattr(module, "WORDS", (100, 200))
    return module


def test_the_same_speakers_are_drawn_again(speakers: Any, tmp_path: Path) -> None:
    one, again = (speakers.spoken(tmp_path / name, 0).read_text() for name in ("one.jsonl", "again.jsonl"))
    assert one == again
    rows = [json.loads(line) for line in one.splitlines()]
    who = {row["who"] for row in rows}
    assert len(who) == 3 and who < {"b", "c", "d", "e"}
    assert {row["split"] for row in rows} <= {"train", "validation", "test"}


def test_centralised_takes_the_cohorts_steps(speakers: Any) -> None:
    """As many windows a round, of the same size of batch."""
    base = speakers.BASE
    central = base.replace(**speakers.compared(base, 1e-3)["centralised"])
    assert (central.clients, central.rounds, central.batch_size) == (1, base.rounds, base.batch_size)
    assert central.steps == base.clients_per_round * base.steps


@pytest.mark.slow
def test_the_small_form_has_the_clients_perplexities(
    speakers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = lambda base, rate: {k: v for k, v in compared(base, rate).items() if k in ("FedSA-LoRA", "zero-shot")}  # noqa: E731 - one expression, named
    compared = speakers.compared
    monkeypatch.setattr(speakers, "compared", two)
    monkeypatch.setattr(speakers, "BASE", speakers.BASE.replace(clients=3, clients_per_round=2, min_size=2))
    found = speakers.main(tmp_path, small=True, keep=tmp_path / "kept.json")
    personal, before = found["rows"]
    runs = [fedsim.load(folder) for folder in sorted((tmp_path / "table").glob("cells/*"))]
    own = {run.config.algorithm: [client["perplexity"] for client in run.clients()] for run in runs}
    assert personal["scores"] == [statistics.mean(of["memory"] for of in own["fed_sa_lora"])]
    assert before["scores"] == [statistics.mean(of["global"] for of in own["fed_it"])] and before["bytes"] == 0
    assert personal["bytes"] > 0 and personal["worst"] == max(of["memory"] for of in own["fed_sa_lora"])
    assert (tmp_path / "perplexity_speakers.png").stat().st_size > 10_000
