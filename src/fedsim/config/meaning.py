"""Options that something else reads: under which other options each means something, in one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

from fedsim.config.options import MAIN_JOB, Config, Privacy
from fedsim.config.words import shown


class Reader(NamedTuple):
    """What reads an option."""

    by: str  # the option that decides it
    needs: str  # for people
    there: Callable[
        [Config, str | None], bool
    ]  # (config, the backbone's kind: text, image, array or unknown) -> is read


def _peft(*kinds: str) -> Reader:
    return Reader("peft", f"peft={' or '.join(kinds)}", lambda c, _: bool({*kinds} & {*_parts(c.peft)}))


def _parts(peft: str) -> list[str]:
    return [part.strip() for part in peft.split("+")]


def _partition(*laws: str) -> Reader:
    return Reader("partition", f"partition={' or '.join(laws)}", lambda c, _: c.partition in laws)


# Which sets have columns, and that texts are no images, is refused where they are read; an .npz would be read all the same.
_COLUMNS = Reader("dataset", "a set that has columns", lambda c, _: not c.dataset.lower().endswith(".npz"))

# Options that only these PEFT kinds read.
OF_PEFT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("rank", "lora_alpha", "targets", "rslora", "dora"), ("lora", "ffa_lora")),
    **dict.fromkeys(("adapter", "adapter_width"), ("adapter",)),
    **dict.fromkeys(("prompt_tokens", "prompt_depth"), ("prompt",)),
    "prefix_tokens": ("prefix",),
    "bias_patch": ("bias",),
    "last_blocks": ("last_k",),
}

OF_PRIVACY = tuple(f.name for f in dataclasses.fields(Privacy) if f.name != "dp")

READERS: dict[str, Reader] = {
    **{option: _peft(*kinds) for option, kinds in OF_PEFT.items()},
    "head_rounds": Reader("peft", "another peft than head", lambda c, _: c.peft != "head" or not c.head_rounds),
    "alpha": _partition("dirichlet", "dirichlet_balanced", "dirichlet_pfllib"),
    "classes_per_client": _partition("shards"),
    "size_law": _partition("quantity"),
    "domain_column": _partition("domain"),
    "text_column": _COLUMNS,
    "label_column": _COLUMNS,
    "data_dir": Reader("dataset", "a set of tfds:", lambda c, _: c.dataset.startswith("tfds:")),
    "tokens": Reader("backbone", "a backbone that reads texts", lambda c, kind: kind in ("text", None)),
    **dict.fromkeys(
        ("turns", "loss_on", "too_long", "packing"),
        Reader("task", "task=language_model", lambda c, _: c.task == "language_model"),
    ),
    "epochs": Reader("steps", "steps=None", lambda c, _: c.steps is None),
    "personal_lr": Reader("personal_epochs", "personal_epochs above 0", lambda c, _: c.personal_epochs > 0),
    **dict.fromkeys(OF_PRIVACY, Reader("dp", "a dp that is not none", lambda c, _: c.dp != "none")),
    "eval_clients": Reader("local_test", "local_test above 0", lambda c, _: c.local_test > 0),
}


def idle(config: Config, base: Config, kind: str | None = None) -> dict[str, str]:
    """The options that differ from `base` and that nothing reads, each with a sentence.

    Args:
        base: what the run starts from; what is as there was not asked for.
        kind: what the backbone reads: text, image or array; None where it is unknown.
    """
    return {
        name: f"Expected {name}={shown(value)} with {reader.needs}: under {reader.by}={shown(getattr(config, reader.by))} "
        f"it means nothing; leave it out, or change {reader.by}."
        for name, reader in READERS.items()
        if (value := getattr(config, name)) != getattr(base, name) and not reader.there(config, kind)
    }


def refuse_idle(config: Config, base: Config, kind: str | None = None) -> None:
    """Raises `ValueError` for the first option that differs from `base` and that nothing reads."""
    refuse_idle_everywhere([config], base, kind)


def refuse_idle_everywhere(configs: Iterable[Config], base: Config, kind: str | None = None) -> None:
    """Raises `ValueError` for the first option that differs from `base` and that none of the configs reads."""
    nowhere: dict[str, str] | None = None
    for config in configs:
        here = idle(config, base, kind)
        nowhere = here if nowhere is None else {name: nowhere[name] for name in nowhere if name in here}
        if not nowhere:
            return
    for sentence in (nowhere or {}).values():
        raise ValueError(sentence)


def idle_alone(config: Config, kind: str | None = None) -> list[str]:
    """Lines about a config that came as a whole, from a file or from Python, and may serve several runs: what is not read.

    What the main job sets was not asked for.
    """
    plain = Config()
    usual = {name: MAIN_JOB[name] for name in READERS if MAIN_JOB.get(name, plain) == getattr(config, name)}
    base = plain.replace(**({"rounds": config.rounds} | usual))
    return [f"Not read: {sentence.removeprefix('Expected ')}" for sentence in idle(config, base, kind).values()]
