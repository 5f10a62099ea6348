"""Both axes of the survey as pure functions: times, energy and memory of a client from what it computes and sends.

The formulas are the standard ones of the specification's 5.3 (G, MFU and energy efficiency also in Woisetschläger et al., arXiv
2310.03150). Times are those of `fedsim.network`, as a run with these options would count them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsim import network, peft, wire
from fedsim.cli import cost
from fedsim.config import Config, Network
from fedsim.training.optimizers import optimizer


class Place(NamedTuple):
    """A client's device and its network. All of it is given, nothing measured."""

    download: float  # Mbit/s
    upload: float  # Mbit/s
    latency: float  # ms, each way
    peak: float  # FLOP/s that the device has at most
    reached: float  # share of the peak that training reaches, MFU, 0 to 1
    computing: float  # watts while it computes
    sending: float  # watts while it sends and receives

    @property
    def rate(self) -> float:
        """FLOP/s that it reaches."""
        return self.peak * self.reached


class Work(NamedTuple):
    """What a client does in a round."""

    down: float  # bytes
    up: float  # bytes
    flops: float  # of all its local steps
    steps: float


class Times(NamedTuple):
    """What a round takes a client."""

    communication: float  # T_comm, s
    computation: float  # T_comp, s
    energy: float  # J

    @property
    def granularity(self) -> float:
        """G = T_comp / T_comm; below 1 the network is the bottleneck."""
        return self.computation / self.communication if self.communication else float("inf")


def times(work: Work, place: Place) -> Times:
    """T_comm = 2 latency + 8 down / download + 8 up / upload; T_comp = FLOPs / (peak MFU); both powers times their times.

    Raises:
        ValueError: a place whose numbers are not positive, or a share above 1.
    """
    if not (min(place) > 0 and place.reached <= 1):
        raise ValueError(f"Expected {place} to hold positive numbers, and reached <= 1; give what the device has.")
    flops = max(work.flops / max(work.steps, 1), 1e-9)  # of a step
    speed = min(max(place.rate / flops, 1e-12), 1e12)  # local steps a second, within the option's limits
    options = Network(
        download=repr(place.download), upload=repr(place.upload), latency=repr(place.latency), compute=repr(speed)
    )
    fleet = network.fleet(options, clients=1, rounds=1, wanted=1, seed=0)
    one = network.conditions(fleet, np.zeros(1, np.int64), 1)
    each = [np.array([number], np.float64) for number in (work.down, work.up, work.steps)]
    found = network.outcome(one, np.ones(1, bool), *each, left=np.inf)
    communication, computation = float(found.communication[0]), work.steps / speed
    return Times(communication, computation, place.sending * communication + place.computing * computation)


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Share of a given peak (FLOP/s) that was reached."""
    return flops / seconds / peak


class Memory(NamedTuple):
    """Bytes on a client's device while it trains, by what they are."""

    weights: int  # of the whole model, and what PEFT attaches
    training: int  # gradients and the optimizer's state; of zeroth-order steps the shifted weights
    activations: int  # kept from the forward for the backward pass, of a batch

    @property
    def total(self) -> int:
        return sum(self)


def memory(config: Config, classes: int, *, gradients: bool = True) -> Memory:
    """What a client holds, counted from shapes: e P_total + e P_train (1 gradient + the optimizer's slots) + activations.

    Activations are what JAX keeps between the two passes, before XLA fuses or computes again; what a forward pass takes for a
    moment is left out. Zeroth-order steps keep none, and hold the trained weights a second time.
    """
    model = cost.split(config, classes, None)
    weights = sum(wire.price({**model.frozen, **model.trained}).values())
    trained = sum(wire.price(model.trained).values())
    if not gradients:
        return Memory(weights, trained, 0)
    state = jax.eval_shape(optimizer(config.optimizer, "optimizer")(1e-3).init, model.trained)
    slots = sum(wire.array_bytes(leaf) for leaf in jax.tree.leaves(state) if leaf.ndim)
    return Memory(weights, trained + slots, config.batch_size * kept(model, config))


def kept(model: peft.Model, config: Config) -> int:
    """Bytes of one example that the backward pass needs."""
    like = cost.example(config, None)

    def residuals(rows: int) -> int:
        x = jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows, *a.shape), a.dtype), like)

        def back(trained: Any, frozen: Any, x: Any) -> Any:
            return jax.vjp(lambda trained: jax.nn.log_softmax(model.apply(trained, frozen, x)), trained)[1]

        with jax.numpy_dtype_promotion("standard"):
            found = jax.eval_shape(back, model.trained, model.frozen, x)
        return sum(wire.array_bytes(leaf) for leaf in jax.tree.leaves(found) if jnp.issubdtype(leaf.dtype, jnp.inexact))

    return residuals(3) - residuals(2)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points (cost, score) that no other one beats: none costs as little or less and scores more, or less and as much.

    In the order of their costs.
    """
    best, found = -float("inf"), []
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[place][1] > best:
            best = points[place][1]
            found.append(place)
    return found
