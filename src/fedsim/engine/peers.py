"""Replies that go from peer to peer: a graph over the cohort, who hears whom in a round, and the mixing, leaf by leaf.

mixed_i = own_i z_i + sum_k weight_ik z_whom_ik. Who did not report is heard by nobody, and its weight goes to each
hearer's own reply. Cost in the edges: no M x M array is made unless the graph is dense.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim.core import Graph

DENSE = 0.25  # of all members heard, from which on the graph is a matrix
SLACK = 1e-4  # that a row's weights may differ from 1 by: they are float32, and may be many


class Edges(NamedTuple):
    """A graph that was looked at."""

    whom: np.ndarray  # (M, k), int32
    weight: np.ndarray  # (M, k), float32
    own: np.ndarray  # (M,), float32

    def between(self, reports: np.ndarray) -> np.ndarray:
        """(M, k) bool: the edges over which something travels, where these (M,) members report."""
        apart = self.whom != np.arange(len(self.own))[:, None]
        return (self.weight != 0) & apart & reports[:, None] & reports[self.whom]

    def hearers(self, reports: np.ndarray) -> np.ndarray:
        """(M,) int64: how often each member's reply travels, once for each that hears it."""
        return np.bincount(self.whom[self.between(reports)], minlength=len(self.own)).astype(np.int64)

    def heard(self, reports: np.ndarray) -> np.ndarray:
        """(M,) int64: replies that each member hears."""
        return self.between(reports).sum(axis=1)


def edges(graph: Graph, ids: np.ndarray) -> Edges:
    """The graph as edges of this cohort.

    Raises:
        ValueError: shapes, places or weights that are none; the member and the remedy are named.
    """
    whom, weight, own = np.asarray(graph.whom), np.asarray(graph.weight), np.asarray(graph.own)
    members = len(ids)
    if whom.ndim != 2 or whom.shape != weight.shape or whom.shape[0] != members or own.shape != (members,):
        raise ValueError(
            f"Expected a graph of {members} members to have whom and weight (M, k) and own (M,), got {whom.shape}, "
            f"{weight.shape} and {own.shape}; give a row for each member of the cohort."
        )
    outside = np.argwhere((whom < 0) | (whom >= members)) if whom.size else np.zeros((0, 2), int)
    if not np.issubdtype(whom.dtype, np.integer) or len(outside):
        i, k = outside[0] if len(outside) else (0, 0)
        raise ValueError(
            f"Expected whom to hold places in the cohort, 0 to {members - 1}, got {whom[i, k]} for member {i}; give places, "
            "not ids, and weight 0 where there is no edge."
        )
    sums = own.astype(np.float64) + weight.astype(np.float64).sum(axis=1)
    wrong = np.flatnonzero(~(np.abs(sums - 1) <= SLACK))
    if len(wrong):
        raise ValueError(
            f"Expected own and weight of member {wrong[0]} to sum to 1, not {sums[wrong[0]]:.6g}; divide the row by its sum."
        )
    return Edges(whom.astype(np.int32), weight.astype(np.float32), own.astype(np.float32))


def heard(engine: Any, programs: Any, plan: Any, given: tuple[Any, ...], state: Any, edges: Edges) -> Any:
    """The state after every member that reported has heard those that did; the total is a fold of what was heard."""
    # Of host devices through the host; accelerators gather one leaf at a time, so that never all of M replies lie on one.
    member = engine.together(engine.split(plan.member))
    own, weight = effective(edges.whom, edges.weight, edges.own, engine.together(state.total.weight), member)

    def mixed(leaf: Array) -> Array:
        return engine.split(mix(engine.together(leaf), member, edges.whom, weight, own))

    return programs.hear(*given, state, jax.tree.map(mixed, state.total.replies))


@jax.jit
def effective(whom: Array, weight: Array, own: Array, counted: Array, member: Array) -> tuple[Array, Array]:
    """Own weights (M,) and others' (M, k), where those whose reply did not count are heard by nobody."""
    spoke = jnp.zeros(own.shape, bool).at[member].set(counted > 0, mode="drop")
    kept = jnp.where(spoke[whom], weight, 0.0)
    return own + (weight - kept).sum(axis=1), kept


@jax.jit
def mix(rows: Array, member: Array, whom: Array, weight: Array, own: Array) -> Array:
    """Replies (D, S, ...) mixed; (D, S, ...), an unused slot gets some member's."""
    members, hears = whom.shape
    flat = jnp.zeros((members, rows[0, 0].size), rows.dtype)
    flat = flat.at[member].set(rows.reshape(*rows.shape[:2], -1), mode="drop")

    def add(k: Array, total: Array) -> Array:
        return total + weight[:, k, None].astype(rows.dtype) * flat[whom[:, k]]

    first = own[:, None].astype(rows.dtype) * flat
    if hears < members * DENSE:
        mixed = jax.lax.fori_loop(0, hears, add, first)
    else:  # a matrix product does better than as many passes over the rows
        matrix = jnp.zeros((members, members), rows.dtype).at[jnp.arange(members)[:, None], whom].add(weight)
        mixed = first + jnp.matmul(matrix, flat, precision=jax.lax.Precision.HIGHEST)
    return mixed[jnp.minimum(member, members - 1)].reshape(rows.shape)
