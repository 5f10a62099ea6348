"""Several architectures in one run: each group of clients has a backbone and a trained part of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fedsim.config.calls import parse_call
from fedsim.config.words import nearest, shown

if TYPE_CHECKING:
    from fedsim.config.options import Config

# Options of the model that groups may differ in.
OWN = (
    "backbone",
    "weights",
    "pool",
    "image_size",
    "interpolation",
    "peft",
    "rank",
    "lora_alpha",
    "targets",
    "rslora",
    "dora",
)
OWN += ("adapter", "adapter_width", "prompt_tokens", "prompt_depth", "prefix_tokens", "bias_patch", "last_blocks")
LIKE = "--groups \"small(backbone='mlp', share=0.5)\" \"large(backbone='cnn', share=0.5)\""
SLACK = 1e-6  # that shares may differ from 1 by


class Group(NamedTuple):
    """One architecture."""

    name: str
    share: float | None  # of the clients; None: nobody is given it, the server alone has it
    config: Config  # the run's, with this group's model


def groups_of(config: Config) -> tuple[Group, ...]:
    """The groups that `Config.groups` describes; () where all clients have one architecture.

    Raises:
        ValueError: names option, value, rule and remedy.
    """
    found: list[Group] = []
    for text in config.groups:
        name, args, options = parse_call(text, "groups")
        if args or not name.isidentifier() or name in [group.name for group in found]:
            raise ValueError(f"Expected groups={shown(text)} to be a call with a name of its own, like {LIKE}.")
        share = options.pop("share", None)
        unknown = [option for option in options if option not in OWN]
        if unknown:
            raise ValueError(
                f"Expected group {name!r} to set options of the model, not {unknown[0]!r}{nearest(unknown[0], OWN)}."
            )
        if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1):
            raise ValueError(
                f"Expected 0 < share={shown(share)} <= 1 of group {name!r}; leave it out for a model of the server."
            )
        found.append(Group(name, share, config.replace(groups=(), **listed(options))))
    shares = [group.share for group in found if group.share is not None]
    if found and abs(sum(shares) - 1) > SLACK:
        raise ValueError(
            f"Expected the shares of groups={config.groups} to sum to 1, not {sum(shares):.6g}, so that every client is in one; "
            f"like {LIKE}."
        )
    return tuple(found)


def answering(config: Config) -> Config:
    """The config of the model that is scored and exported: of several architectures the group `server`'s, or the first's."""
    groups = {group.name: group.config for group in groups_of(config)}
    return groups.get(scored(config), config)


def scored(config: Config) -> str:
    """The name of that group; "" where there is one architecture."""
    names = [group.name for group in groups_of(config)]
    return "server" if "server" in names else next(iter(names), "")


def listed(options: dict[str, Any]) -> dict[str, Any]:
    """Lists as tuples, as `Config` has them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def check_groups(config: Config) -> None:
    """Refuses groups that cannot be, and options that say nothing of several models.

    Raises:
        ValueError: as `groups_of`.
    """
    if not groups_of(config):
        return
    for name, why in {
        "head_rounds": "a head alone is a phase of one model",
        "personal_epochs": "the model that is tuned is one",
    }.items():
        if getattr(config, name):
            raise ValueError(f"Expected {name}={getattr(config, name)} to be 0 with groups: {why}; leave it out.")
