"""What a run leaves behind: its folder, the lines of its rounds, checkpoints. `docs/record.md` documents every field.

Begin with `folders.py`. No JAX at the top of what only reads, so that reading a run is fast. How results are shown is in `report/`.
"""

from __future__ import annotations

from fedsim.record.environment import PACKAGES, commit, machine, processor
from fedsim.record.files import (
    CHECKPOINTS,
    CLIENTS,
    CONFIG,
    MEMORIES,
    ROUNDS,
    SCHEMA,
    SUMMARY,
    TRAINED,
    checksum,
    plain,
    write_bytes,
    write_json,
)
from fedsim.record.folders import Run, finish, folder, load, lock, options, refuse_used, start
from fedsim.record.lines import Round, append, check_line, flat, rounds, truncate
from fedsim.record.schemas import INTEGERS, LEAVES
