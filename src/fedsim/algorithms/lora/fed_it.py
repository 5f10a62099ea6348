"""FedIT (Zhang et al., arXiv 2305.05644): FedAvg on LoRA's A and B, each by itself.

The server then works with (sum_k p_k A_k)(sum_k p_k B_k), which is not the mean of the clients' products; the other
rules of this family are about that difference. Bytes: r (in + out) numbers per matrix, each way.
"""

from __future__ import annotations

from fedsim.algorithms.fed_avg import fed_avg
from fedsim.algorithms.lora.factors import adapted
from fedsim.core import Algorithm, Task


def fed_it(task: Task) -> Algorithm:
    """FedIT (Zhang et al., arXiv 2305.05644): FedAvg on LoRA's A and B, each by itself; needs peft=lora."""
    adapted(task, "fed_it", dora=True)
    return fed_avg(task)
