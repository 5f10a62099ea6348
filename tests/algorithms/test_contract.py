"""The contract tests on algorithms that are not fedsim's own: the docs', the toys, and those whose server trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedsim import wire
from fedsim.algorithms import find
from fedsim.core import Algorithm, Task
from fedsim.folds import uniform
from fedsim.testing.contract import CHECKS, same
from fedsim.testing.tasks import tiny_task
from fedsim.testing.toys import COHORT, run, tiny_problem
from fedsim.training.local import fit

pytestmark = pytest.mark.usefixtures("compile_once")

ROOT = Path(__file__).parents[2]
BYTES = "bytes equal the packed messages"
WRITTEN = {  # by which checks of each the default run has; the others run with -m slow
    "experiments/scaffold.py:scaffold": {BYTES},
    "experiments/own_algorithm.py:fed_mine": set(),
    "tests/algorithms/toys.py:in_stages": set(),
    "tests/algorithms/toys.py:by_group": {BYTES, "resumed equals uninterrupted"},
    "tests/serves.py:fed_two_sizes": {"another cohort size, nobody"},
}
written = cache(lambda name: find(f"{ROOT}/{name}"))  # one constructor each, whose programs all its checks share


@pytest.mark.parametrize(
    ("algorithm", "check"),
    [
        pytest.param(name, check, marks=() if check in brief else pytest.mark.slow)
        for name, brief in WRITTEN.items()
        for check in CHECKS
    ],
)
def test_contract(algorithm: str, check: str) -> None:
    CHECKS[check](written(algorithm))


def test_the_pages_scaffold_is_fedsims() -> None:
    """Three rounds, clients that come again; the server's parameters, to rounding."""
    task = tiny_task(weight=uniform)
    cohorts = (COHORT, (7, 5, 3, 2, 8, 10), COHORT)
    page, own = (run(make, tiny_problem(), cohorts, task=task)[0]
                 for make in (written("experiments/scaffold.py:scaffold"), find("scaffold")))  # fmt: skip
    same((page.params, page.control), (own.params, own.control), "SCAFFOLD of the page and of fedsim", rtol=1e-6)


def spoilt(change: Callable[[Any, Any], Any]) -> Callable[[Task], Algorithm]:
    """`by_group`, whose round gives `change(server, cohort)` afterwards."""

    def make(task: Task) -> Algorithm:
        plain = written("tests/algorithms/toys.py:by_group")(task)

        def round(key: Any, held: Any, server: Any, cohort: Any) -> Any:
            new, metrics = plain.round(key, held, server, cohort)
            return change(new, cohort), metrics

        return plain._replace(round=round)

    return make


@pytest.mark.slow
def test_what_is_wrong_in_one_group_is_found() -> None:
    """A state whose structure changes, a server that moves without a client, and bytes that are not there."""
    wider = spoilt(lambda server, _: {**server, "round": jnp.int32(1)})
    with pytest.raises(AssertionError, match="changed its structure"):
        CHECKS["structure kept, nothing recompiles"](wider)
    moved = lambda server, _: jax.tree.map(lambda a: a + 1, server)  # noqa: E731 - one expression, named
    with pytest.raises(AssertionError, match="after a cohort of nobody"):
        CHECKS["another cohort size, nobody"](spoilt(moved))

    def claiming(task: Task) -> Algorithm:
        plain = written("tests/algorithms/toys.py:by_group")(task)

        def round(key: Any, held: Any, server: Any, cohort: Any) -> Any:
            exchange = cohort.groups["large"].exchange
            message = lambda tree: jax.tree.map(lambda a: wire.Packet(a, jnp.uint32(a.size)), wire.unmarked(tree))  # noqa: E731 - one expression, named
            cohort.groups["large"].exchange = lambda tree, *given: exchange(message(tree), *given)
            return plain.round(key, held, server, cohort)

        return plain._replace(round=round)

    with pytest.raises(AssertionError, match="from which its value does not come back"):
        CHECKS[BYTES](claiming)


# --- the mistakes of docs/own_algorithm.md, and what is said of them


def gated(server: Any, change: Any, weight: Any) -> Any:
    """The change added where a reply counted."""
    return jax.tree.map(lambda s, c: jnp.where(weight > 0, s + c, s), server, change)


def averaging(
    task: Task, update: Callable[..., Any] = gated, fit: Callable[..., Any] = fit, **fields: Any
) -> Algorithm:
    """FedAvg in its shortest form, the page's first example."""
    local = fit(task.loss, task.optimizer, task.lr, task.passes)

    def round(key: Any, held: Any, server: Any, cohort: Any) -> Any:
        change, info = cohort.exchange(wire.coded(server, change=False), local)
        return update(server, change, info.weight), info.metrics

    algorithm = Algorithm(
        init=lambda key, held: task.init(key),
        round=round,
        predict=lambda held, server, memory, x: task.logits(held, server, x),
        params=lambda server: server,
    )
    return algorithm._replace(**fields)


def ungated(task: Task) -> Algorithm:
    """A round of nobody moves its server."""
    return averaging(task, lambda server, change, weight: jax.tree.map(lambda s, c: 0.9 * s + c, server, change))


def forgetful(task: Task) -> Algorithm:
    """Keeps momentum where no checkpoint sees it."""
    kept: dict[str, Any] = {}

    def update(server: Any, change: Any, weight: Any) -> Any:
        kept["v"] = jax.tree.map(lambda v, c: v / 2 + c, kept.get("v", change), change)
        return gated(server, kept["v"], weight)

    return averaging(task, update)


def remade(task: Task) -> Algorithm:
    """Makes its local anew in every round."""
    return averaging(task, round=lambda *given: averaging(task).round(*given))


def cheaper(task: Task) -> Algorithm:
    """Claims one byte for a bias."""

    def reply(carry: Any, message: Any, client: Any) -> Any:
        change = jax.tree.map(jnp.subtract, carry.params, message)
        return {**change, "bias": wire.Packet(change["bias"], jnp.uint32(1))}, carry.memory

    return averaging(task, fit=partial(fit, reply=reply))


def unmasked(task: Task) -> Algorithm:
    """Its loss is a mean over rows, whether they are padding or not."""
    return averaging(
        task, fit=lambda loss, *rest: fit(lambda held, p, b: loss(held, p, b._replace(mask=b.mask * 0 + 1)), *rest)
    )


def twice(task: Task) -> Algorithm:
    """Asks one client twice."""
    return averaging(task, select=lambda rng, server, population: np.array([1, 1, 2]))


MISTAKES = {
    "the parameters after a cohort of nobody: bias differs": (ungated, "another cohort size, nobody"),
    "the server's state after resuming: bias differs": (forgetful, "resumed equals uninterrupted"),
    "values that change belong in the message": (remade, "structure kept, nothing recompiles"),
    "packet 'bias' claims 1 bytes, from which its value does not come back": (cheaper, BYTES),
    "another padding row: bias differs": (unmasked, "padding and empty clients change nothing"),
    "select gave [1 1 2]": (twice, "select, observe, setup, predict, params"),
}


@pytest.mark.parametrize("says", MISTAKES)
def test_a_mistake_is_told_as_the_page_says(says: str) -> None:
    make, check = MISTAKES[says]
    with pytest.raises(AssertionError) as error:
        CHECKS[check](make)
    assert says in str(error.value)
    assert says in (ROOT / "docs" / "own_algorithm.md").read_text()


def test_the_pages_first_example_has_no_mistake() -> None:
    for check in {check for _, check in MISTAKES.values()}:
        CHECKS[check](averaging)
