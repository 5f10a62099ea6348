"""FLOPs counted in a traced program: matrix products and convolutions, a multiplication and an addition each.

Sums, normalisations, softmax and activation functions are left out, as is usual where utilisation of matrix units is
meant; so is what is computed once a batch and not for every example, and what rematerialisation computes again. Nothing
is computed: in a batch of as many examples as a prime, sizes alone say what belongs to the examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import jax
from jax import Array
from jax.extend import core

from fedsim.core import Local, Tree
from fedsim.engine.replies import beginning, of_rows, split_message

# Examples in the batch of a model that is traced: a prime that divides no size of one, so that an array has the
# examples' axis, merged with others or not, exactly where its size is a multiple.
EXAMPLES = 104_729
PRIMES = (4_099, 7_919, EXAMPLES)  # of a client's step, which may make an array of pairs of examples on the host
PRODUCTS = ("dot_general", "conv_general_dilated")
AGAIN = "rematted_computation"  # how JAX calls what `jax.checkpoint` computes a second time


def of_local(local: Local, init_memory: Any, message: Tree, held: Tree, x: Tree, y: Array, root: Array) -> float:
    """What a client's steps cost for each example, forward passes and gradients as they are: traces `local.step`.

    Where rows are the client's own choice (`Passes.rows`), what a whole step costs: it may be one without data.
    """
    shared, own, _ = split_message(message)
    begin = beginning(local, init_memory, message)
    msg, _, batch, carry = jax.eval_shape(begin, held, shared, own, x, y, root)
    sizes = {axis for leaf in jax.tree.leaves((held, msg, batch, carry)) for axis in leaf.shape if axis}
    prime = next((p for p in PRIMES if all(axis % p for axis in sizes)), EXAMPLES)
    size, by_step = local.passes.batch_size, local.passes.rows is not None

    def traced(rows: int) -> core.Jaxpr:
        return jax.make_jaxpr(local.step)(held, msg, carry, of_rows(batch, rows)).jaxpr

    if by_step:
        return all_products(traced(size))
    with suppress(Exception):  # whatever a step that is made for one number of rows says to another
        return sum(of_examples(traced(prime), prime, size))
    return all_products(traced(size)) / size


def products(fn: Callable[..., Any], *shapes: Any) -> tuple[float, float]:
    """FLOPs an example of the products in `fn` on a batch of EXAMPLES: those that keep their axis, those that sum over it."""
    with jax.numpy_dtype_promotion("standard"):
        return of_examples(jax.make_jaxpr(fn)(*shapes).jaxpr, EXAMPLES)


def of_examples(jaxpr: core.Jaxpr, prime: int, batch: int = 1) -> tuple[float, float]:
    """FLOPs an example of the products in a program on a batch of `prime`: those that keep its axis, those that sum over it.

    Args:
        batch: examples of a real one, for products of examples with one another.
    """
    found: dict[tuple[bool, int], int] = {}  # (keeps the axis, its powers) -> FLOPs
    for eqn, times in equations(jaxpr, again=False):
        if any(_size(v) % prime == 0 for v in (*eqn.invars, *eqn.outvars)):
            kind = _size(eqn.outvars[0]) % prime == 0, _powers(_product(eqn), prime)
            found[kind] = found.get(kind, 0) + times * _product(eqn)
    kept, summed = (
        sum(
            flops / prime * (batch / prime) ** (powers - 1)
            for (keeps, powers), flops in found.items()
            if keeps == which
        )
        for which in (True, False)
    )
    return float(kept), float(summed)


def all_products(jaxpr: core.Jaxpr) -> float:
    """FLOPs of all products of a program, on whatever they compute; a loop of known length counts every turn."""
    return float(sum(times * _product(eqn) for eqn, times in equations(jaxpr, again=False)))


def equations(jaxpr: core.Jaxpr, *, again: bool = True) -> Iterator[tuple[core.JaxprEqn, int]]:
    """Every product of a program and of those inside it, and how often it runs; a `while` counts as one turn.

    Args:
        again: with what rematerialisation computes again.
    """
    found = all_equations(jaxpr, again=again)
    return ((eqn, times) for eqn, times in found if eqn.primitive.name in PRODUCTS)


def all_equations(jaxpr: core.Jaxpr, times: int = 1, *, again: bool = True) -> Iterator[tuple[core.JaxprEqn, int]]:
    """As `equations`, not of products alone; what a program inside does is told, and its results once more."""
    for eqn in jaxpr.eqns:
        if not again and AGAIN in str(eqn.source_info.name_stack):
            continue
        yield eqn, times
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                program = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
                yield from all_equations(program, times * eqn.params.get("length", 1), again=again)


def _is_program(value: Any) -> bool:
    return isinstance(value, (core.Jaxpr, core.ClosedJaxpr))


def _product(eqn: core.JaxprEqn) -> int:
    left, right, out = (_shape(v) for v in (*eqn.invars[:2], eqn.outvars[0]))
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    # A convolution: every output adds up the kernel's entries of its channel, borders as if there were no padding; the
    # zeros that a gradient puts between the pixels of a strided one are no work.
    numbers, spread = eqn.params["dimension_numbers"], eqn.params["lhs_dilation"]
    return 2 * math.prod(out) * math.prod(right) // (right[numbers.rhs_spec[0]] * math.prod(spread))


def _powers(number: int, prime: int) -> int:
    """How often the prime divides it, at least once: what a strided gradient leaves of a size may be rounded."""
    found = 0
    while number and number % prime == 0:
        number, found = number // prime, found + 1
    return max(found, 1)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _size(variable: Any) -> int:
    return math.prod(_shape(variable))
