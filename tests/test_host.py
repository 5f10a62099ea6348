"""The clock of compilation counts every moment once."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import pytest

from fedsim import host

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
