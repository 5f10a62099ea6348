"""What comes from a library, written as a call in a string: `"adamw(weight_decay=0.01)"`."""

from __future__ import annotations

import ast
from typing import Any

from fedsim.config.fields import finite
from fedsim.config.words import shown

LONGEST = 10_000  # letters of a call


def parse_call(text: str, option: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Splits `"name(1, key=2)"` into name, positional and keyword arguments; arguments are Python literals.

    A bare name is a call without arguments. The name may contain what a path contains (`my.py:fed_mine`).

    Raises:
        ValueError: no call, an argument that is no literal, or a number that is infinite or too large.
    """
    name, bracket, _ = text.partition("(")
    try:
        if len(text) > LONGEST:
            raise ValueError(f"more than {LONGEST} letters")
        call = ast.parse("f" + text[len(name) :] if bracket else "f()", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or not name.strip():
            raise ValueError("not a call")
        args = [_literal(a) for a in call.args]
        options = {str(k.arg): _literal(k.value) for k in call.keywords}
        if len(options) < len(call.keywords) or any(k.arg is None for k in call.keywords):
            raise ValueError("an option twice, or **")
    # Unhashable keys, brackets deeper than the parser goes: whatever Python's reader raises at text that is no call.
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"Expected {option}={shown(text)} to be a name or a call with literal arguments, like "
            f'"sgd(momentum=0.9)" ({str(error)[:100] or type(error).__name__}).'
        ) from None
    return name.strip(), args, options


def _literal(node: ast.expr) -> Any:
    value = ast.literal_eval(node)
    if not finite(value):
        raise ValueError("a number in it is infinite or beyond float32")
    return value
