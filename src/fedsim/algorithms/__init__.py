"""Algorithms: one paper, one file, and the one table of names -> constructors, `(task, **options) -> Algorithm`.

Begin with `fed_avg.py`. `lora/` has the rules for LoRA's factors. Users' own algorithms are found here by their file; how a
client trains is in `training/`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedsim import own
from fedsim.algorithms.dfed_salt import dfed_alt, dfed_salt
from fedsim.algorithms.ditto import ditto
from fedsim.algorithms.fed_avg import fed_avg, fed_prox
from fedsim.algorithms.fed_df import fed_df
from fedsim.algorithms.fed_dm import fed_dm
from fedsim.algorithms.fed_dropout_avg import fed_dropout_avg
from fedsim.algorithms.fed_dyn import fed_dyn
from fedsim.algorithms.fed_et import fed_et
from fedsim.algorithms.fed_kseed import fed_kseed
from fedsim.algorithms.fed_obd import fed_obd
from fedsim.algorithms.fed_paq import fed_paq
from fedsim.algorithms.fed_pcl import fed_pcl
from fedsim.algorithms.fed_proto import fed_proto
from fedsim.algorithms.fed_ptr import fed_ptr
from fedsim.algorithms.fed_rep import fed_rep
from fedsim.algorithms.fed_res import fed_res
from fedsim.algorithms.fed_sp import fed_sp
from fedsim.algorithms.local_only import local_only
from fedsim.algorithms.lora.fed_ex_lora import fed_ex_lora
from fedsim.algorithms.lora.fed_it import fed_it
from fedsim.algorithms.lora.fed_sa_lora import fed_sa_lora
from fedsim.algorithms.lora.ffa_lora import ffa_lora
from fedsim.algorithms.lora.flex_lora import flex_lora
from fedsim.algorithms.lora.flora import flora
from fedsim.algorithms.lora.het_lora import het_lora
from fedsim.algorithms.scaffold import scaffold
from fedsim.algorithms.superior_soups import superior_soups
from fedsim.config import nearest, parse_call, take_call
from fedsim.core import Algorithm, Task

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "fed_avg": fed_avg,
    "fed_prox": fed_prox,
    "fed_obd": fed_obd,
    "fed_paq": fed_paq,
    "fed_dropout_avg": fed_dropout_avg,
    "fed_kseed": fed_kseed,
    "superior_soups": superior_soups,
    "fed_ptr": fed_ptr,
    "fed_pcl": fed_pcl,
    "fed_dm": fed_dm,
    "fed_et": fed_et,
    "fed_df": fed_df,
    "fed_sp": fed_sp,
    "fed_it": fed_it,
    "ffa_lora": ffa_lora,
    "flora": flora,
    "het_lora": het_lora,
    "flex_lora": flex_lora,
    "fed_sa_lora": fed_sa_lora,
    "fed_ex_lora": fed_ex_lora,
    "scaffold": scaffold,
    "fed_proto": fed_proto,
    "fed_dyn": fed_dyn,
    "local_only": local_only,
    "fed_rep": fed_rep,
    "ditto": ditto,
    "fed_res": fed_res,
    "dfed_alt": dfed_alt,
    "dfed_salt": dfed_salt,
}


def find(text: str) -> Callable[[Task], Algorithm]:
    """The constructor that `"fed_prox(mu=0.1)"` or `"my.py:fed_mine(mu=0.1)"` names, its options bound.

    Raises:
        ValueError: an unknown name, file, function or option.
    """
    name, args, options = parse_call(text, "algorithm")
    if args:
        raise ValueError(f"Expected algorithm={text!r} to give its options by name, like fed_prox(mu=0.1).")
    file, colon, function = name.rpartition(":")
    if colon:
        make = own.find(Path(file).expanduser(), function, "algorithm")
        if not callable(make):
            raise ValueError(f"Expected {name!r} to be a function, task -> Algorithm, not {make!r}; give its name.")
    elif name in ALGORITHMS:
        make = ALGORITHMS[name]
    else:
        raise ValueError(
            f"Expected algorithm={name!r} to be one of {', '.join(ALGORITHMS)}, or file.py:function"
            f"{nearest(name, ALGORITHMS)}."
        )
    own.require_options(make, options, name, given=1)
    taken = take_call(make, options, f"algorithm={text!r}")
    return lambda task: make(task, **taken)
