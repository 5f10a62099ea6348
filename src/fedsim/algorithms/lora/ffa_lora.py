"""FFA-LoRA (Sun et al., arXiv 2403.12313): A stays at a random start that all share, B alone is trained and averaged.

As A is the same for all, A (sum_k p_k B_k) is the mean of the products, and under differential privacy no two noises are
multiplied. Bytes: r out numbers per matrix, each way; A comes once, with the frozen backbone.
"""

from __future__ import annotations

from fedsim.algorithms.fed_avg import fed_avg
from fedsim.algorithms.lora.factors import adapted
from fedsim.core import Algorithm, Task


def ffa_lora(task: Task) -> Algorithm:
    """FFA-LoRA (Sun et al., arXiv 2403.12313): FedAvg on LoRA's B, with one frozen A for all; needs peft=ffa_lora."""
    adapted(task, "ffa_lora", trains_a=False)
    return fed_avg(task)
