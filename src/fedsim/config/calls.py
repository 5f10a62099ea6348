"""What comes from a library, written as a call in a string: `"adamw(weight_decay=0.01)"`."""

from __future__ import annotations

import ast
from typing import Any


def parse_call(text: str, option: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Splits `"name(1, key=2)"` into name, positional and keyword arguments; arguments are Python literals.

    A bare name is a call without arguments. The name may contain what a path contains (`my.py:fed_mine`).
    """
    name, bracket, _ = text.partition("(")
    try:
        call = ast.parse("f" + text[len(name) :] if bracket else "f()", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or not name.strip():
            raise ValueError("not a call")
        args = [ast.literal_eval(a) for a in call.args]
        options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f'Expected {option}={text!r} to be a name or a call with literal arguments, like "sgd(momentum=0.9)" ({error}).'
        ) from None
    return name.strip(), args, options
