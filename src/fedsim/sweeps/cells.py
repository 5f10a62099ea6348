"""Which cells a sweep has: every combination of its axes, each a config with a name of its own."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedsim.config import Config, Model, Speed, at_most, nearest, parse_call, refuse_idle, shown
from fedsim.randomness import stream

MOST = 10_000  # cells that are run without being asked for twice
LARGEST = 10**6  # values of one axis
LONGEST = 80  # letters of a name before its hash
FIELDS = tuple(f.name for f in dataclasses.fields(Config))
OF_SPEED = tuple(f.name for f in dataclasses.fields(Speed))
ONCE = ("devices", "compilation_cache")  # of Speed: set once for a whole process
# What makes a method, as against the data, the cohort and the network that it meets: a rate is chosen once for each.
METHOD = (*(f.name for f in dataclasses.fields(Model)), "algorithm", "groups", "optimizer", "server_optimizer")

AGAIN = ("seed", "repeat")  # what tells the cells of one setting apart

Values = Sequence[Any] | Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A base config, and what varies: the cells are all combinations of the axes.

    An axis is an option with its values, `{"lr": [1e-3, 1e-2]}`, or a name of your own with named choices of several
    options, `{"method": {"LoRA 4": {"peft": "lora", "rank": 4}, "bias": {"peft": "bias"}}}`. Any option of `Config` and of
    `Speed` can vary.

    Example:
        sweep = Sweep(base=main_job(), grid={"peft": ["lora", "bias"], "clients_per_round": [3, 6]}, seeds=3)
    """

    base: Config = field(default_factory=Config)
    """What the cells have in common."""
    grid: Mapping[str, Values] = field(default_factory=dict)
    """Axes of which every combination is run."""
    zip: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Options that vary together: the first values of all, the second values of all. One axis."""
    random: Mapping[str, str] = field(default_factory=dict)
    """Options that are drawn, each by a law: `uniform(0, 1)`, `log_uniform(1e-5, 1e-1)`, `integers(1, 8)` (both ends
    included) or `choice('lora', 'bias')`. One axis of `draws` points."""
    draws: int = 0
    """Points of `random`; more of them keep the first ones."""
    seeds: int | Sequence[int] = ()
    """Seeds of every cell: a number of them from 0 on, or the seeds themselves (default: that of the base)."""
    repeat: int = 1
    """Times that every cell is run with the same seed, to see how its times vary."""
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Options whose values are chosen on validation before the cells, once for each method, such as `{"lr": [1e-3, 1e-2]}`."""
    tune_by: Sequence[str] | None = None
    """Axes that make a method (default: those of the model, its PEFT kind, the algorithm and the optimizers)."""
    configs: Mapping[str, Config] = field(default_factory=dict)
    """Cells that are given one by one, by name, instead of axes."""
    speed: Speed = field(default_factory=Speed)
    """How fast; a cell keeps no checkpoints once it is over, unless this says how many."""

    def __post_init__(self) -> None:
        check(self)

    @functools.cached_property
    def axes(self) -> list[Axis]:
        """The axes in the order in which they were given, seeds last."""
        found = [axis(name, values) for name, values in self.grid.items()]
        if self.zip:
            rows = zip(*self.zip.values(), strict=True)
            found.append(
                Axis("+".join(self.zip), tuple(Point("", dict(zip(self.zip, row, strict=True))) for row in rows))
            )
        if self.random:
            found.append(Axis("draw", tuple(Point(str(i), drawn(self.random, i)) for i in range(self.draws))))
        seeds = range(self.seeds) if isinstance(self.seeds, int) else self.seeds
        if len(seeds):
            found.append(Axis("seed", tuple(Point("", {"seed": int(seed)}) for seed in seeds)))
        return found

    @functools.cached_property
    def fast(self) -> Speed:
        """The speed of a cell where it does not vary."""
        return (
            self.speed
            if self.speed.keep_checkpoints is not None
            else dataclasses.replace(self.speed, keep_checkpoints=0)
        )

    @functools.cached_property
    def methods(self) -> list[str]:
        """Names of the axes that make a method."""
        if self.tune_by is not None:
            return [a.name for a in self.axes if a.name in self.tune_by]
        return [a.name for a in self.axes if any(name in METHOD for point in a.points for name in point.options)]


class Point(NamedTuple):
    """One place on an axis."""

    label: str  # of a named axis; "" where its options say it all
    options: Mapping[str, Any]
    shown: bool = True  # whether the options stand in the tables; else the label stands for them


class Axis(NamedTuple):
    """What varies."""

    name: str
    points: tuple[Point, ...]


class Cell(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder
    config: Config
    speed: Speed
    varied: Mapping[str, Any]  # what tells it from the others: names of axes and options -> their values here
    repeat: int = 1

    @property
    def key(self) -> str:
        """The end of the name, which says which cell it is (`key_of`); what stands before it is for people."""
        return self.name.rpartition("-")[2]


def cells(sweep: Sweep, chosen: Mapping[str, Mapping[str, Any]] | None = None) -> list[Cell]:
    """All cells in the order of the axes, the last axis quickest.

    Args:
        chosen: by `method_of` a point, the options that tuning chose for it.

    Raises:
        ValueError: an impossible config, two cells that are the same.
    """
    if sweep.configs:
        made = [cell(config, sweep.fast, {"cell": name}) for name, config in sweep.configs.items()]
    else:
        made = [one for points in itertools.product(*(a.points for a in sweep.axes))
                for one in at(sweep, points, (chosen or {}).get(method_of(sweep, points), {}))]  # fmt: skip
    refuse_twins(made)
    return made


def at(sweep: Sweep, points: Sequence[Point], chosen: Mapping[str, Any]) -> Iterator[Cell]:
    """The cell at these points of all axes, as often as it is repeated."""
    options: dict[str, Any] = {}
    varied: dict[str, Any] = {}
    for a, point in zip(sweep.axes, points, strict=True):
        options |= point.options
        varied |= {a.name: point.label} if point.label else {}
        varied |= point.options if point.shown else {}
    options |= chosen
    varied |= chosen
    config = sweep.base.replace(**{name: value for name, value in options.items() if name in FIELDS})
    try:
        refuse_idle(config, sweep.base)
    except ValueError as error:
        raise ValueError(
            f"{error} (In the cell {words_of(varied)}; an axis of named choices has options of its own.)"
        ) from None
    of_speed = {name: value for name, value in options.items() if name in OF_SPEED}
    speed = dataclasses.replace(sweep.fast, **of_speed) if of_speed else sweep.fast
    for number in range(1, sweep.repeat + 1):
        yield cell(config, speed, varied | ({"repeat": number} if sweep.repeat > 1 else {}), number)


def cell(config: Config, speed: Speed, varied: Mapping[str, Any], repeat: int = 1) -> Cell:
    """A cell with its name: readable, then a hash of all options of its config.

    The hash is of the whole config, so that it depends neither on what else varies nor on the base.
    """
    key = key_of(config, {name: getattr(speed, name) for name in varied if name in OF_SPEED}, repeat)
    readable = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", words_of(varied, ","))[:LONGEST].strip("_,.")
    return Cell(f"{readable}-{key}" if readable else key, config, speed, varied, repeat)


def key_of(config: Config, speed: Mapping[str, Any], repeat: int) -> str:
    """Which cell it is: 12 hex digits of its config; of `Speed` only what the sweep varies counts."""
    more = hashlib.sha256(json.dumps(dict(speed), sort_keys=True).encode()).hexdigest()[:4] if speed else ""
    return config.hash() + more + (f".{repeat}" if repeat > 1 else "")


def words_of(varied: Mapping[str, Any], between: str = ", ") -> str:
    """`peft=lora, seed=0`: what tells a cell from the others."""
    return between.join(f"{name}={said(value)}" for name, value in varied.items())


def said(value: Any) -> str:
    """A value of an option, as a person writes it."""
    if isinstance(value, (tuple, list)):
        return "+".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def axis(name: str, values: Values) -> Axis:
    """An axis of `Sweep.grid`."""
    if isinstance(values, Mapping):
        return Axis(name, tuple(Point(str(label), options, shown=False) for label, options in values.items()))
    return Axis(name, tuple(Point("", {name: plain(value)}) for value in values))


def plain(value: Any) -> Any:
    """A value as `Config` has it: lists as tuples, NumPy's numbers as Python's."""
    value = value.item() if hasattr(value, "item") else value
    return tuple(value) if isinstance(value, list) else value


# --- what is drawn


LAWS = ("uniform", "log_uniform", "integers", "choice")


def drawn(laws: Mapping[str, str], number: int) -> dict[str, Any]:
    """The options of one draw; each depends on its own name, law and number alone, so that a sweep can grow."""
    return {name: draw(law, name, number) for name, law in laws.items()}


def draw(law: str, name: str, number: int) -> Any:
    """One value of a law.

    Raises:
        ValueError: an unknown law, or arguments that it does not take.
    """
    kind, args, options = parse_call(law, f"random[{name!r}]")
    if kind not in LAWS or options or not args or (kind != "choice" and len(args) != 2):
        raise ValueError(
            f"Expected random[{name!r}]={shown(law)} to be one of uniform(low, high), log_uniform(low, high), "
            f"integers(low, high), choice(a, b, ...){nearest(kind, LAWS)}."
        )
    rng = stream(0, f"sweep {name} {law} {number}")
    if kind == "choice":
        return args[int(rng.integers(len(args)))]
    low, high = args
    if not low < high or (kind == "log_uniform" and low <= 0):
        raise ValueError(
            f"Expected random[{name!r}]={shown(law)} to go from a lower to a higher number; turn them round."
        )
    if kind == "integers":
        return int(rng.integers(low, high + 1))
    if kind == "log_uniform":
        return float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.6g}")
    return float(f"{rng.uniform(low, high):.6g}")


# --- tuning


def method_of(sweep: Sweep, points: Sequence[Point]) -> str:
    """The method at these points of all axes, in words; "" where there is one alone."""
    of = sweep.methods
    mine = [(a.name, p) for a, p in zip(sweep.axes, points, strict=True) if a.name in of]
    return ", ".join(p.label or words_of(p.options) for _, p in mine)


def tuning(sweep: Sweep) -> dict[str, list[Cell]]:
    """The runs in which options are chosen: by method, one for each combination of the values of `tune`.

    Data, cohort and network are those of the first point of each other axis, the seed is the first.
    """
    of, found = sweep.methods, {}
    axes = sweep.axes
    choices = [dict(zip(sweep.tune, row, strict=True)) for row in itertools.product(*sweep.tune.values())]
    for points in itertools.product(*(a.points if a.name in of else a.points[:1] for a in axes)):
        once = dataclasses.replace(sweep, repeat=1)
        name = method_of(sweep, points)
        found[name] = [one for choice in choices for one in at(once, points, {k: plain(v) for k, v in choice.items()})]
    return found


def foreseen(sweep: Sweep) -> tuple[dict[str, list[Cell]], list[Cell]]:
    """The runs of `tuning`, and the cells as if it had chosen the first of its values, as long as the choice is not known.

    Raises:
        ValueError: as `cells`.
    """
    planned = tuning(sweep) if sweep.tune else {}
    first = {method: {name: getattr(of[0].config, name) for name in sweep.tune} for method, of in planned.items()}
    return planned, cells(sweep, first)


# --- what is refused


def check(sweep: Sweep) -> None:
    """Refuses what can be seen without making the cells.

    Raises:
        ValueError: an unknown option, an axis without a value, values of unequal number in `zip`, one option on two axes.
    """
    s = sweep
    if s.configs:
        given = [name for name in ("grid", "zip", "random", "seeds", "tune") if getattr(s, name)]
        if given:
            raise ValueError(f"Expected configs without {given[0]}; they are all the cells: leave one out.")
        return
    for name, values in s.grid.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise ValueError(f"Expected grid[{name!r}]={shown(values)} to be a list of values; write [{values!r}].")
        if not isinstance(values, Mapping):
            known(name, "grid")
        elif name in (*FIELDS, *OF_SPEED):
            raise ValueError(
                f"Expected the named choices of grid[{name!r}] under a name that no option has; give another."
            )
        for options in values.values() if isinstance(values, Mapping) else ():
            for option in options:
                known(option, f"grid[{name!r}]")
    for name in (*s.zip, *s.random, *s.tune):
        known(name, "the sweep")
    if len({len(values) for values in s.zip.values()}) > 1:
        lengths = ", ".join(f"{name} {len(values)}" for name, values in s.zip.items())
        raise ValueError(f"Expected as many values for each option of zip, got {lengths}; give as many.")
    if bool(s.random) != (s.draws > 0):
        raise ValueError(f"Expected draws={s.draws} > 0 with random, and 0 without; give both or none.")
    if s.repeat < 1:
        raise ValueError(f"Expected repeat={s.repeat} >= 1; it is how often each cell is run.")
    if isinstance(s.seeds, int):
        if s.seeds < 0:
            raise ValueError(f"Expected seeds={s.seeds} >= 0; give a number of seeds, or a list of them.")
        at_most(LARGEST, seeds=s.seeds)
    at_most(LARGEST, draws=s.draws, repeat=s.repeat)
    for name, values in {**s.grid, **s.zip, **s.tune}.items():
        if not len(values):
            raise ValueError(f"Expected {name} to have a value on its axis; give one or more, or leave it out.")
    for name in s.tune:
        if name not in FIELDS:
            raise ValueError(f"Expected tune to choose an option of Config, not {name!r}, which changes no result.")
    refuse_overlap(s)


def refuse_many(sweep: Sweep, *, yes: bool) -> None:
    """Raises `ValueError` for a sweep of nothing, and for one of more than `MOST` runs that was not asked for twice."""
    if not (sweep.configs or sweep.axes or sweep.tune or sweep.repeat > 1):
        raise ValueError("Expected a sweep with cells; give an option several values, or seeds, a grid or configs.")
    count = len(sweep.configs) or math.prod(len(a.points) for a in sweep.axes) * sweep.repeat
    if sweep.tune:
        methods = math.prod(len(a.points) for a in sweep.axes if a.name in sweep.methods)
        count += methods * math.prod(map(len, sweep.tune.values()))
    if count > MOST and not yes:
        raise ValueError(f"Expected {count:,} cells <= {MOST:,}; add --yes (yes=True) if they are meant.")


def refuse_overlap(sweep: Sweep) -> None:
    """Raises `ValueError` for an option on two axes, and for an unknown name in `tune_by`."""
    axes = sweep.axes
    owner: dict[str, str] = {}
    for a in axes:
        for option in dict.fromkeys(name for point in a.points for name in point.options):
            if option in owner:
                raise ValueError(
                    f"Expected {option} on one axis, not on {owner[option]} and {a.name}; leave it out of one."
                )
            owner[option] = a.name
    for name in sweep.tune:
        if name in owner:
            raise ValueError(
                f"Expected {name} to be chosen by tune or to vary on {owner[name]}, not both; leave one out."
            )
    for name in sweep.tune_by or ():
        if name not in (a.name for a in axes):
            raise ValueError(
                f"Expected tune_by {name!r} to be an axis{nearest(name, [a.name for a in axes])}; name one of them."
            )


def known(name: str, where: str) -> None:
    """Raises `ValueError` for an option that neither `Config` nor `Speed` has, or that cannot vary in one process."""
    if name in ONCE:
        raise ValueError(
            f"Expected {name} not to vary in {where}: it is set once for a whole process; start a sweep for each value, or use "
            "fedsim profile."
        )
    if name not in (*FIELDS, *OF_SPEED):
        raise ValueError(
            f"Expected option {name!r} in {where} to be one of Config's or Speed's{nearest(name, (*FIELDS, *OF_SPEED))}."
        )


def refuse_twins(found: Sequence[Cell]) -> None:
    """Raises `ValueError` if two cells are the same run."""
    seen: dict[str, Cell] = {}
    for one in found:
        if one.key in seen:
            raise ValueError(
                f"Expected every cell to differ from the others, but {words_of(one.varied) or one.name} and "
                f"{words_of(seen[one.key].varied) or seen[one.key].name} are the same run; leave one out."
            )
        seen[one.key] = one
