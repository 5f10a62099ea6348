"""What of a backbone is trained, and what that costs: the split, its kinds, formats of others, precision, FLOPs.

Begin with `split.py`; `kinds.py` has the rules by name. How the trained part is trained is in `training/`.
"""

from __future__ import annotations

from fedsim.peft.kinds import KINDS, Leaf, parse
from fedsim.peft.split import (
    Leaves,
    Model,
    Options,
    Shapes,
    build,
    factors,
    fitted,
    fitted_to,
    from_config,
    parameters,
    published,
    start,
)
