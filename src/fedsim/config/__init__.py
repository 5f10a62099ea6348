"""What can be set: the options as frozen dataclasses, and all that is refused without data, weights or JAX.

Begin with `options.py`. `checks.py` has the rules, `calls.py` reads values like `"adamw(weight_decay=0.01)"`. How the
command line reads them is in `cli/options.py`.
"""

from __future__ import annotations

from fedsim.config.calls import parse_call
from fedsim.config.checks import (
    PARTITIONS,
    SIZE_LAWS,
    check_model,
    check_network,
    invited,
    nearest,
    one_of,
    positive,
    require_known,
    size_law,
)
from fedsim.config.options import (
    GROUPS,
    MAIN_JOB,
    RELIABLE,
    Config,
    Data,
    Evaluation,
    Model,
    Network,
    Speed,
    Training,
    differences,
    main_job,
)
