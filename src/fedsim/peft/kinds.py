"""The kinds of parameter-efficient fine-tuning in one plain table: what each attaches, and which leaves it takes.

A kind is two functions over paths, so that it fits every transformer: `attach` gives leaves to the layers that it finds
by type, `takes` says by path which leaves are trained. Sources and exact counts: `docs/peft.md`.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from fedsim.backbones.kernels import gelu
from fedsim.backbones.layers import ADDED, MLP, STATISTICS, Adapter, Linear, NoRngs, Projections, param
from fedsim.config import Model as Options
from fedsim.config import nearest, one_of


class Leaf(NamedTuple):
    """A leaf and where it lies."""

    path: str
    above: int
    """Blocks above its stage."""
    blocks: int
    """Blocks in all."""

    @property
    def role(self) -> str:
        """Last part of the path."""
        return self.path.rpartition("/")[2]


class Kind(NamedTuple):
    """One row of the table."""

    what: str
    """For people: what is trained beside the head."""
    source: str
    """Paper, and whether placement or values are our own choice."""
    takes: Callable[[Leaf, Options], bool]
    attach: Callable[[Any, Options], None] = lambda module, options: None


def _by_role(*roles: str) -> Callable[[Leaf, Options], bool]:
    return lambda leaf, options: leaf.role in roles


def _norm(leaf: Leaf, options: Options) -> bool:
    """Scale and bias of a normalisation: its module is called norm, norm1, norms/0, LayerNorm_0, ..."""
    return leaf.role in ("scale", "bias") and any("norm" in part.lower() for part in leaf.path.split("/")[:-1])


def _bias(leaf: Leaf, options: Options) -> bool:
    # `b` is what functions without modules call it.
    return leaf.role in ("bias", "b") and (options.bias_patch or leaf.path != "embeddings/patch/bias")


def _last(leaf: Leaf, options: Options) -> bool:
    return leaf.above < options.last_blocks and not is_fresh(leaf.path)


def attach_lora(module: Any, options: Options) -> None:
    """Gives LoRA factors to every linear layer below the outputs whose path ends in one of the target patterns.

    Raises:
        ValueError: a pattern matches nothing, or the rank is above that of a matched matrix.
    """
    layers = {
        "/".join(map(str, path)): layer
        for path, layer in nnx.iter_graph(module)
        if isinstance(layer, Linear) and path[0] not in ("head", "lm_head")
    }
    for path in choose_targets({path: layer.kernel.shape for path, layer in layers.items()}, options):
        if layers[path].lora_a is None:  # "lora+ffa_lora" comes here twice
            layers[path].attach_lora(options.rank, lora_scale(options), NoRngs(), dora=options.dora)


def lora_scale(options: Options) -> float:
    """What LoRA's product is multiplied by."""
    return options.lora_alpha / (math.sqrt(options.rank) if options.rslora else options.rank)


def choose_targets(kernels: Mapping[str, Sequence[int]], options: Options) -> list[str]:
    """The layers that the target patterns choose, among those with matrices of these shapes.

    Raises:
        ValueError: a pattern matches nothing, or the rank is above that of a matched matrix.
    """
    chosen: set[str] = set()
    for pattern in options.targets:
        hits = {path for path in kernels if matches(path, pattern)}
        if not hits:
            ends = sorted({path.rpartition("/")[2] for path in kernels} | {_generic(path) for path in kernels})
            there = ", ".join(sorted({_generic(path) for path in kernels})) or "no linear layer but the head"
            raise ValueError(
                f"Expected targets={pattern!r} to match a linear layer{nearest(pattern, ends)}; there are {there}: "
                "choose among them, or another peft."
            )
        chosen |= hits
    if not chosen:
        raise ValueError("Expected targets=() to name a linear layer for LoRA; give a pattern, or take peft=head.")
    for path in sorted(chosen):
        full = min(kernels[path])
        if options.rank > full:
            raise ValueError(
                f"Expected rank={options.rank} <= {full}, the rank of {path}; lower it, or leave that layer out."
            )
    return sorted(chosen)


def attach_adapter(module: Any, options: Options) -> None:
    """One adapter per block after the MLP or beside it, or a second one after attention."""
    parallel = options.adapter == "parallel"
    for mlp in _every(module, MLP, "adapter"):
        # AdaptFormer: ReLU, and a tenth of the result (its public code's values).
        activation, scale = (jax.nn.relu, 0.1) if parallel else (gelu, 1.0)
        width = mlp.down.kernel.shape[1]
        mlp.adapter = Adapter(width, options.adapter_width, activation, scale, rngs=NoRngs())
        mlp.parallel = parallel
    if options.adapter == "houlsby":
        for attention in _every(module, Projections, "adapter"):
            width = attention.output.kernel.shape[1]
            attention.adapter = Adapter(width, options.adapter_width, gelu, rngs=NoRngs())


def attach_prompt(module: Any, options: Options) -> None:
    """Tokens of its own for every block, or for the first one, from where they go on to the last."""
    width = _every(module, Projections, "prompt")[0].query.kernel.shape[0]
    if not hasattr(module, "blocks"):
        raise ValueError(
            "Expected peft='prompt' to meet the blocks of one transformer, and not several encoders; take last_k, which trains what "
            "fuses them, or lora."
        )
    shallow = options.prompt_depth == "shallow"
    for block in list(module.blocks)[: 1 if shallow else None]:
        block.prompt = param("prompt", (options.prompt_tokens, width), NoRngs())
        block.keep_prompt = shallow


def attach_prefix(module: Any, options: Options) -> None:
    """Keys and values in every attention."""
    for attention in _every(module, Projections, "prefix"):
        attention.attach_prefix(options.prefix_tokens, NoRngs())


def attach_ia3(module: Any, options: Options) -> None:
    """A factor for each key, each value, and each hidden feature of the MLP."""
    for attention in _every(module, Projections, "ia3"):
        attention.key.attach_ia3(NoRngs())
        attention.value.attach_ia3(NoRngs())
    for mlp in _every(module, MLP, "ia3"):
        mlp.down.attach_ia3(NoRngs(), on_input=True)


def _every(module: Any, kind: type, peft: str) -> list[Any]:
    """All layers of that type.

    Raises:
        ValueError: there is none.
    """
    found = [layer for _, layer in nnx.iter_graph(module) if isinstance(layer, kind)]
    if not found:
        raise ValueError(
            f"Expected peft={peft!r} to meet a transformer; this backbone has no attention: take full, head, bias, "
            "norm or last_k."
        )
    return found


KINDS: dict[str, Kind] = {
    "full": Kind("everything", "", lambda leaf, options: not is_fresh(leaf.path)),
    "head": Kind("nothing else", "", lambda leaf, options: False),
    "bias": Kind(
        "every bias, those of LayerNorm included", "FedPEFT-Bias, arXiv 2210.01708; BitFit, 2106.10199", _bias
    ),
    "norm": Kind("scale and bias of every normalisation", "", _norm),
    "adapter": Kind(
        "bottlenecks of adapter_width",
        "FedPEFT-Adapter, arXiv 2210.01708 (place: ours); Houlsby et al., 1902.00751; AdaptFormer, 2205.13535",
        _by_role("down_kernel", "down_bias", "up_kernel", "up_bias"),
        attach_adapter,
    ),
    "prompt": Kind(
        "prompt_tokens for every block, or for the first", "VPT, arXiv 2203.12119", _by_role("prompt"), attach_prompt
    ),
    "prefix": Kind(
        "prefix_tokens keys and values in every attention",
        "Prefix-tuning, arXiv 2101.00190, without its reparametrisation",
        _by_role("prefix_key", "prefix_value"),
        attach_prefix,
    ),
    "lora": Kind(
        "factors of rank r beside the targets",
        "LoRA, arXiv 2106.09685; rsLoRA, 2312.03732; DoRA, 2402.09353",
        _by_role("lora_a", "lora_b", "magnitude"),
        attach_lora,
    ),
    "ffa_lora": Kind(
        "LoRA's B alone; A stays at its random start, common to all",
        "FFA-LoRA, arXiv 2403.12313",
        _by_role("lora_b", "magnitude"),
        attach_lora,
    ),
    "ia3": Kind(
        "a factor for each key, value and hidden feature", "(IA)^3, arXiv 2205.05638", _by_role("ia3"), attach_ia3
    ),
    "last_k": Kind("the last_blocks blocks at the top and all above them", "", _last),
}


def parse(peft: str) -> tuple[str, ...]:
    """The parts of a PEFT option, `lora+bias` -> ("lora", "bias").

    Raises:
        ValueError: an unknown or repeated part.
    """
    parts = tuple(part.strip() for part in peft.split("+"))
    for part in parts:
        one_of(tuple(KINDS), peft=part)
    if len(set(parts)) < len(parts):
        raise ValueError(f"Expected peft={peft!r} to name each part once; drop the repetition.")
    return parts


def rules(leaves: Iterable[Leaf], parts: Sequence[str], options: Options) -> dict[str, str]:
    """Every leaf -> the one rule that takes it: the head, the first part that claims it, or "frozen".

    Raises:
        ValueError: a part takes no leaf, as there is none or as the parts named before it took them.
    """
    leaves = list(leaves)
    blocks = max(leaf.blocks for leaf in leaves)
    if "last_k" in parts and options.last_blocks > blocks:
        raise ValueError(f"Expected last_blocks={options.last_blocks} <= {blocks}, the backbone's; lower it.")
    claims = {
        leaf.path: ["head"]
        if leaf.path.startswith("head/")
        else [part for part in parts if leaf.role not in STATISTICS and KINDS[part].takes(leaf, options)]
        for leaf in leaves
    }
    taken = {path: claim[0] if claim else "frozen" for path, claim in claims.items()}
    for part in parts:
        if part in ("head", "full") or part in taken.values():  # of a backbone that is its head, `full` takes just that
            continue
        rivals = sorted({claim[0] for claim in claims.values() if part in claim})
        if rivals:
            raise ValueError(
                f"Expected each part of peft={options.peft!r} to take leaves; {' and '.join(rivals)} and {part} both "
                f"take those of {part}: drop one."
            )
        others = ", ".join(kind for kind in ("full", "head", "bias", "norm") if kind != part)
        raise ValueError(
            f"Expected peft={part!r} to take leaves of backbone={options.backbone!r}; it has none of that kind: "
            f"take {others} or last_k."
        )
    return taken


def is_fresh(path: str) -> bool:
    """Whether no checkpoint holds this leaf: the head, and what PEFT attached."""
    return path.startswith("head/") or path.rpartition("/")[2] in ADDED


def matches(path: str, pattern: str) -> bool:
    """Whether the whole path or its end, from some "/" on, fits the pattern."""
    return fnmatch.fnmatchcase("/" + path, "*/" + pattern)


def _generic(path: str) -> str:
    """`blocks/3/attention/query` -> `blocks/*/attention/query`."""
    return "/".join("*" if part.isdigit() else part for part in path.split("/"))
