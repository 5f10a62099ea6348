"""What tyro is told of our options: how `--help` shows them, and how words become values. No JAX here."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import operator
import re
import sys
import types
from collections.abc import Sequence
from types import NoneType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro
from tyro import constructors as rules

from fedsim.config import nearest

RULES = rules.ConstructorRegistry()
DEFAULT = re.compile(r"\s*\(default: (?P<meaning>.*)\)\.?$", re.DOTALL)  # at the end of an option's text


def read(kind: Any, argv: Sequence[str], prog: str, default: Any = None) -> Any:
    """An instance of a dataclass from the command line; ends the process after `--help`, and where words are no values.

    Args:
        kind: the dataclass; the text below a field is its help, and says at its end what no value means, `(default: all)`.
        default: an instance whose values hold unless given (default: the fields' own).
    """
    _trust_defaults()
    given = {} if default is None else {"default": default}
    return tyro.cli(kind, prog=prog, args=list(argv), registry=RULES, **given)


@RULES.struct_rule
def dataclass_rule(info: rules.StructTypeInfo) -> rules.StructConstructorSpec | None:
    """Fields of our dataclasses with their texts, read once; groups of them have the docstring of theirs.

    tyro would find the texts too, but in Python before 3.13 it parses the whole source file again for every class, which is
    half of what `fedsim run --help` takes.
    """
    if not (dataclasses.is_dataclass(info.type) and info.type.__module__.startswith("fedsim.")):
        return None
    kind, texts = info.type, {}
    for base in reversed(kind.__mro__[:-1]):
        texts |= texts_of(base.__module__).get(base.__name__, {})
    hints, fields = get_type_hints(kind, include_extras=True), []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        default = getattr(info.default, field.name, field.default)
        if dataclasses.is_dataclass(hint):
            fields.append(rules.StructFieldSpec(field.name, hint, default, inspect.getdoc(hint)))
            continue
        text, said = described(texts.get(field.name, ""), default)
        shown: Any = Annotated[hint, tyro.conf.arg(help_behavior_hint=said)]
        given = rules.MISSING_NONPROP if default is dataclasses.MISSING else default
        fields.append(rules.StructFieldSpec(field.name, shown, given, text))
    return rules.StructConstructorSpec(kind, tuple(fields))


def described(text: str, default: Any) -> tuple[str, str | None]:
    """An option's text without what it says of the default, and that, `(default: all)`; None where tyro writes the value."""
    text = " ".join(text.split())
    found = DEFAULT.search(text)
    if found is not None:
        text = text[: found.start()] + "."
    if default is dataclasses.MISSING:
        return text, "(required)"
    if default is None or default == ():
        return text, f"(default: {found['meaning'] if found else 'none'})"
    if isinstance(default, bool):
        return text, f"(default: {'on' if default else 'off'})"
    return text, None


@RULES.primitive_rule
def optional_rule(
    info: rules.PrimitiveTypeInfo,
) -> rules.PrimitiveConstructorSpec | rules.UnsupportedTypeAnnotationError | None:
    """`X | None` is shown and read as X. The word None takes back what the main job or an experiment file has set."""
    kinds = get_args(info.type) if get_origin(info.type) in (Union, types.UnionType) else ()
    if NoneType not in kinds:
        return None
    alone = functools.reduce(operator.or_, (kind for kind in kinds if kind is not NoneType))
    spec = rules.ConstructorRegistry.get_primitive_spec(rules.PrimitiveTypeInfo.make(alone, info.markers))
    if not isinstance(spec, rules.PrimitiveConstructorSpec):
        return spec

    def value(words: list[str]) -> Any:
        if words == ["None"]:
            return None
        for word in words:
            if spec.choices is not None and word not in spec.choices:
                raise ValueError(f"Expected one of {', '.join(spec.choices)}, not {word}{nearest(word, spec.choices)}.")
        return spec.instance_from_str(words)

    return dataclasses.replace(
        spec,
        instance_from_str=value,
        is_instance=lambda v: v is None or spec.is_instance(v),
        str_from_instance=lambda v: ["None"] if v is None else spec.str_from_instance(v),
        choices=None,
    )


@functools.cache
def texts_of(module: str) -> dict[str, dict[str, str]]:
    """The string below each annotated name of each class of a module, by class and name."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {
        node.name: {
            name.target.id: text.value.value
            for name, text in zip(node.body, node.body[1:], strict=False)
            if isinstance(name, ast.AnnAssign) and isinstance(name.target, ast.Name)
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


@functools.cache
def _trust_defaults() -> None:
    """Takes the defaults of optional and of several values at their word.

    tyro has typeguard check them, whose import (unittest.mock, asyncio) is a quarter of what `fedsim run --help` takes;
    `Config` and `Speed` have checked them already. A tyro that does it otherwise is left as it is.
    """
    resolver = sys.modules.get("tyro._resolver")
    checked = getattr(resolver, "is_instance", None)
    if checked is not None:
        trusted = (tuple, types.UnionType)
        vars(resolver)["is_instance"] = lambda kind, value: get_origin(kind) in trusted or checked(kind, value)
