"""FedPAQ (Reisizadeh et al., arXiv 1909.13014): FedAvg of a drawn cohort, whose changes go up quantised without bias.

    w += sum_k p_k Q(w_k - w),     Q(v) = |v|_2 sign(v) l / s,  l one of the two whole numbers around s |v_i| / |v|_2

with chances that make the mean of Q(v) equal v (QSGD). Down goes w as it is. Bytes up: `bits` an entry and 4 a leaf.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedsim.algorithms.fed_avg import averaging
from fedsim.core import Algorithm, Client, Params, Task, Tree
from fedsim.training.local import Fit, fit
from fedsim.wire import coded
from fedsim.wire.codecs.quantisers import qsgd


def fed_paq(task: Task, bits: int = 9, block: int = 0) -> Algorithm:
    """FedPAQ (Reisizadeh et al., arXiv 1909.13014): FedAvg whose changes go up quantised without bias.

    Args:
        bits: of an entry with its sign, so that s = 2^(bits - 1) - 1; 9 are the 255 levels of FedOBD's comparison.
        block: entries that share a norm; 0 for the whole leaf.

    Raises:
        ValueError: numbers out of range.
    """
    codec = qsgd(bits, block)

    def reply(carry: Fit, message: Params, client: Client) -> tuple[Tree, Tree]:
        return coded(jax.tree.map(jnp.subtract, carry.params, message), by=codec), client.memory

    return averaging(task, fit(task.loss, task.optimizer, task.lr, task.passes, reply=reply))
