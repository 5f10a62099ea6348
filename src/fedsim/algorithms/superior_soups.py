"""Local Superior Soups (Chen et al., arXiv 2410.23660): every client trains a pool of models and sends their mean.

Model f_j begins at the mean of the pool and is then part of it; it alone is trained, the others rest. At each step

    L(sum_k alpha_k f_k) + affinity(f_j, what the server sent) - diversity(f_j, pool),   alpha ~ Dirichlet(1, ..., 1)

so the whole simplex between the models is trained, near the start and wide. The server is FedAvg's, its message too: P numbers
each way, however many models there are. The pool never leaves the client.

The paper's form has distances, |f_j - sent| and the mean of |f_j - f_k|; the form of the authors' code has |f_j - sent|^2 and the
squared volume of the simplex, trains its first model longer, and leaves what the server sent out of the pool.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedsim.algorithms.fed_avg import Server, averaging
from fedsim.core import Algorithm, Batch, Client, Local, Metrics, Params, Passes, Task, Tree
from fedsim.engine.device_memory import device_memory
from fedsim.training.local import stepped
from fedsim.units import size as words_of
from fedsim.wire import coded

Alphas = Callable[[Array, Array, Array], Array]  # (key, active (n,) bool, place of the trained one ()) -> (n,)


class Recipe(NamedTuple):
    """How a pool is made; `superior_soups` has the meanings."""

    form: str
    models: int
    lambda_a: float
    lambda_d: float
    anchor: bool
    samples: int


class Soup(NamedTuple):
    """A client in training. Place 0 of the pool is what the server sent, place j the j-th model."""

    pool: Params  # leaves (models + 1, ...)
    optimizer: Tree  # of the model that is trained
    lr: Array  # (), float32
    first: Array  # (), int32: steps of the first model
    each: Array  # (), int32: steps of every other
    begun: Array  # (), int32: models so far


def superior_soups(
    task: Task,
    form: str = "paper",
    models: int = 4,
    lambda_a: float | None = None,
    lambda_d: float | None = None,
    anchor: bool | None = None,
    samples: int | None = None,
) -> Algorithm:
    """Local Superior Soups (Chen et al., arXiv 2410.23660): clients send the mean of a pool of models that they train.

    A model takes as many steps as a client of FedAvg: the run's epochs or steps. With form="code" the second and later ones take
    an eighth of the epochs, one at least.

    Args:
        form: "paper", the paper's equations, or "code", what the authors' code computes.
        models: that are trained, one after the other.
        lambda_a: weight of affinity; default: 3 of the paper's distance, 1e-3 of the code's squared one.
        lambda_d: weight of diversity; default: as much.
        anchor: what the server sent is a member of the pool; default: in the paper's form.
        samples: points of the simplex a step, of whose losses the mean is taken; default: 1, and 2 in the code's form.

    Raises:
        ValueError: an unknown form, numbers out of range; when a run begins, a pool that no memory holds.
    """
    if form not in ("paper", "code"):
        raise ValueError(f"Expected form={form!r} to be 'paper' or 'code'; leave it out for the paper's.")
    paper = form == "paper"
    weight = 3.0 if paper else 1e-3
    recipe = Recipe(
        form,
        models,
        weight if lambda_a is None else lambda_a,
        weight if lambda_d is None else lambda_d,
        paper if anchor is None else anchor,
        (1 if paper else 2) if samples is None else samples,
    )
    check(recipe)
    return soup(task, recipe)


def soup(task: Task, recipe: Recipe, alphas: Alphas | None = None) -> Algorithm:
    """The algorithm of a recipe; `alphas` draws points of the simplex, default: `flat`."""
    plain = averaging(task, local_soup(task, recipe, alphas or flat))

    def init(key: Array, held: Tree) -> Server:
        refuse_pool(recipe.models, sum(leaf.size for leaf in task.init(key).values()))
        return plain.init(key, held)

    # Model after model goes over the examples, more often than example-level privacy counts.
    return plain._replace(init=init, plain_steps=False)


def check(recipe: Recipe) -> None:
    """Raises `ValueError` for numbers out of range; warns of a loss without a bound."""
    for name, whole in (("models", recipe.models), ("samples", recipe.samples)):
        if isinstance(whole, bool) or not isinstance(whole, int) or not 1 <= whole <= 64:
            raise ValueError(f"Expected 1 <= {name}={whole!r} <= 64, a whole number; give models=4, samples=1.")
    for name, value in (("lambda_a", recipe.lambda_a), ("lambda_d", recipe.lambda_d)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"Expected {name}={value!r} >= 0, a weight in the loss; 0 leaves it out.")
    if not isinstance(recipe.anchor, bool):
        raise ValueError(f"Expected anchor={recipe.anchor!r} to be True or False; leave it out for the form's own.")
    if recipe.form == "paper" and recipe.lambda_d > recipe.lambda_a:
        warnings.warn(
            f"lambda_d={recipe.lambda_d:g} is above lambda_a={recipe.lambda_a:g}: the farther a model goes, the lower its loss, "
            "without a bound; give lambda_d <= lambda_a.",
            stacklevel=3,
        )


def refuse_pool(models: int, entries: int) -> None:
    """Raises `ValueError` where one client's pool of this many parameters each does not fit into a device's memory."""
    need, there = 4 * entries * (models + 1), device_memory(jax.local_devices()[0])
    if need > there:
        raise ValueError(
            f"Expected models={models} of {entries:,} parameters and what the server sent to fit into a device's memory, "
            f"{words_of(there)}, not {words_of(need)}; train fewer models, or less of each (--peft lora)."
        )


# --- a client


def local_soup(task: Task, recipe: Recipe, alphas: Alphas) -> Local:
    """What a client does: model after model, and the mean of the pool."""
    places = jnp.arange(recipe.models + 1)
    given = task.passes
    later = later_passes(given, recipe)
    many = recipe.models - 1
    passes = given._replace(epochs=given.epochs + many * later.epochs)
    if isinstance(given.steps, int) and isinstance(later.steps, int):
        passes = passes._replace(steps=given.steps + many * later.steps)

    def members(begun: Array) -> Array:
        """Who is in the pool, (models + 1,) bool; what the server sent where there is nobody else."""
        among = (places >= 1) & (places <= begun)
        return among | ((places == 0) & (jnp.bool_(recipe.anchor) | (begun == 0)))

    def start(held: Tree, message: Params, client: Client, batch: Batch) -> Soup:
        pool = {path: jnp.broadcast_to(leaf, (recipe.models + 1, *leaf.shape)) for path, leaf in message.items()}
        lr, batches = task.lr(client, message), -(-client.n // given.batch_size)
        first, each = (
            jnp.asarray(one.steps if isinstance(one.steps, int) else batches * one.epochs, jnp.int32)
            for one in (given, later)
        )
        return Soup(pool, task.optimizer(lr).init(message), lr, first, each, jnp.int32(0))

    def step(held: Tree, message: Params, carry: Soup, batch: Batch) -> tuple[Soup, Metrics]:
        over = jnp.maximum(batch.step - carry.first, 0) // jnp.maximum(carry.each, 1)
        now = jnp.where(batch.step < carry.first, 1, jnp.minimum(2 + over, recipe.models)).astype(jnp.int32)
        begins, older = now > carry.begun, members(now - 1)
        own = {path: jnp.where(begins, mean_of(leaf, older), leaf[now]) for path, leaf in carry.pool.items()}
        optimizer = task.optimizer(carry.lr)
        with jax.numpy_dtype_promotion("standard"):  # as in `local.fit`
            fresh = optimizer.init(own)
        state = jax.tree.map(lambda new, old: jnp.where(begins, new, old), fresh, carry.optimizer)
        active = members(now)

        def total(own: Params) -> tuple[Array, Metrics]:
            pool = {path: leaf.at[now].set(own[path]) for path, leaf in carry.pool.items()}
            found = []
            for number in range(recipe.samples):
                alpha = alphas(jax.random.fold_in(batch.key, number), active, now)
                found.append(task.loss(held, mixed(pool, alpha), batch))
            value, metrics = jax.tree.map(lambda *each: sum(each) / recipe.samples, *found)
            return value + pull(recipe, own, message, pool, active), metrics

        grads, metrics = jax.grad(total, has_aux=True)(own)
        moved, state = stepped(optimizer, grads, state, own)
        pool = {path: leaf.at[now].set(moved[path]) for path, leaf in carry.pool.items()}
        return carry._replace(pool=pool, optimizer=state, begun=now), metrics

    def finish(held: Tree, message: Params, carry: Soup, client: Client) -> tuple[Tree, Tree, Metrics]:
        active = members(carry.begun)
        center = {path: mean_of(leaf, active) for path, leaf in carry.pool.items()}
        change = jax.tree.map(jnp.subtract, center, message)
        spread = jax.tree.map(lambda leaf, mean: leaf - mean, carry.pool, center)
        width = jnp.sqrt(jnp.where(active, squares(spread), 0.0).sum() / active.sum(dtype=jnp.float32))
        return coded(change), client.memory, {"pool_width": width}

    return Local(start, step, finish, passes)


def later_passes(given: Passes, recipe: Recipe) -> Passes:
    """What the second and later models take."""
    if recipe.form == "paper":
        return given
    steps = max(given.steps // 8, 1) if isinstance(given.steps, int) else given.steps
    return given._replace(epochs=max(given.epochs // 8, 1) if given.epochs else 0, steps=steps)


def flat(key: Array, active: Array, own: Array) -> Array:
    """A point of the simplex over the active places, (n,): exponentials divided by their sum, Dirichlet(1, ..., 1)."""
    drawn = jnp.where(active, jax.random.exponential(key, active.shape), 0.0)
    return drawn / drawn.sum()


def mean_of(leaf: Array, active: Array) -> Array:
    """The mean over the active places of (n, ...)."""
    picked = jnp.where(active.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0.0)
    return picked.sum(axis=0) / active.sum(dtype=jnp.float32)


def mixed(pool: Params, alpha: Array) -> Params:
    """sum_k alpha_k f_k."""
    return {
        path: (alpha.reshape(-1, *[1] * (leaf.ndim - 1)) * leaf).sum(axis=0, dtype=leaf.dtype)
        for path, leaf in pool.items()
    }


# --- affinity and diversity


def pull(recipe: Recipe, own: Params, anchor: Params, pool: Params, active: Array) -> Array:
    """lambda_a affinity - lambda_d diversity, ()."""
    away = squares(jax.tree.map(lambda w, w0: (w - w0)[None], own, anchor))[0]
    if recipe.form == "code":
        alone = active.sum() < 2  # a simplex of one point has no volume to speak of
        wide = jnp.where(alone, 0.0, squared_volume(pool, active)) if recipe.lambda_d else 0.0
        return recipe.lambda_a * away - recipe.lambda_d * wide
    between = squares(jax.tree.map(lambda w, members: w - members, own, pool))
    distances = jnp.where(active, root(between), 0.0)
    return recipe.lambda_a * root(away) - recipe.lambda_d * distances.sum() / active.sum(dtype=jnp.float32)


def root(square: Array) -> Array:
    """The square root, whose gradient at zero is zero: where a model begins it lies on others of the pool."""
    there = square > 0
    return jnp.where(there, jnp.sqrt(jnp.where(there, square, 1.0)), 0.0)


def squares(points: Params) -> Array:
    """|.|_2^2 over all leaves of (n, ...), (n,)."""
    found = [(leaf**2).reshape(leaf.shape[0], -1).sum(axis=1) for leaf in points.values()]
    return jnp.stack(found).sum(axis=0)


def squared_volume(points: Params, active: Array) -> Array:
    """Squared volume of the simplex whose corners are the active points of (n, ...), (); that of one point is 1.

    The product of the corners' squared distances from the plane through those before them, divided by ((m - 1)!)^2. That is what
    Cayley and Menger's determinant gives, without a matrix that is singular where two corners are equal.
    """
    flat = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in points.values()], axis=1)
    first = jnp.argmax(active)
    origin = flat[first]
    basis: list[Array] = []
    product = jnp.ones(())
    for place in range(flat.shape[0]):
        counts = active[place] & (place != first)
        rest = jnp.where(counts, flat[place] - origin, 0.0)
        for _ in range(2):  # twice, as once leaves what was rounded
            for one in basis:
                rest = rest - jnp.dot(one, rest, precision="highest") * one
        square = (rest**2).sum()
        product *= jnp.where(counts, square, 1.0)
        there = square > 0
        basis.append(jnp.where(there, rest / jnp.sqrt(jnp.where(there, square, 1.0)), 0.0))
    factors = jnp.asarray([math.factorial(max(m - 1, 0)) ** -2.0 for m in range(flat.shape[0] + 1)], jnp.float32)
    return product * factors[active.sum()]
