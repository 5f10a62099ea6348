"""What can be set: the options as frozen dataclasses, and all that is refused without data, weights or JAX.

Begin with `options.py`. Every config passes `fields.py` (types), `limits.py` (sizes) and `checks.py` (rules between
options); `scores.py` has the scores of each task, `groups.py` several architectures, `meaning.py` knows which options
nothing reads, `calls.py` reads values like `"adamw(weight_decay=0.01)"`, `older.py` options of older runs, and `words.py`
has the sentences. How the command line reads them is in `cli/options.py`.
"""

from __future__ import annotations

from fedsim.config.calls import parse_call
from fedsim.config.checks import PARTITIONS, SIZE_LAWS, check_model, check_network, invited, size_law
from fedsim.config.fields import take_call
from fedsim.config.groups import answering, groups_of, scored
from fedsim.config.limits import at_most, plan_fits
from fedsim.config.meaning import OF_PEFT, idle_alone, refuse_idle, refuse_idle_everywhere
from fedsim.config.options import (
    GROUPS,
    MAIN_JOB,
    RATES,
    RELIABLE,
    Config,
    Data,
    Evaluation,
    Model,
    Network,
    Privacy,
    Speed,
    Training,
    differences,
    main_job,
)
from fedsim.config.scores import (
    SCORES,
    SMALLER,
    TASKS,
    TRAINED,
    USUAL,
    is_better,
    is_reached,
    metric_of,
    metric_of_clients,
)
from fedsim.config.words import nearest, one_of, positive, require_known, shown, whole_number
