"""What the docstrings of `privacy/` guarantee: each line has a test of the same name, in a file that imports its module."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fedsim.privacy

HERE = Path(__file__).parent
MODULES = sorted(Path(fedsim.privacy.__file__).parent.glob("*.py"))


def guarantees(module: Path) -> dict[str, list[str]]:
    """Function -> the words that its docstring's guarantees begin with."""
    found = {}
    for node in ast.walk(ast.parse(module.read_text())):
        said = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if said and "Guarantees:" in said:
            rest, *lines = said.split("Guarantees:")[1].split("\n\n")[0].split("\n")
            items = [rest.strip()] if rest.strip() else [line[4:] for line in lines if re.match(r"    \S", line)]
            found[node.name] = [re.split("[:,.]", item)[0] for item in items]
    return found


def names_and_text(module: Path) -> tuple[list[str], str]:
    """Names of the tests in files that import the module, and the text of these files."""
    texts = [file.read_text() for file in sorted(HERE.glob("test_*.py"))]
    texts = [text for text in texts if f"from fedsim.privacy.{module.stem} import" in text]
    return [name for text in texts for name in re.findall(r"^def test_(\w+)\(", text, re.MULTILINE)], "\n".join(texts)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_each_guarantee_has_a_test_of_its_name(module: Path) -> None:
    names, text = names_and_text(module)
    for function, lines in guarantees(module).items():
        for words in lines:
            like = re.fullmatch("as `(.*)`", words)
            if like:  # the tests of the other one take both
                assert re.search(rf"parametrize\(.*\[{like[1]}, {function}\]", text), (module.stem, function)
            else:
                assert any(name.startswith(words.replace(" ", "_")) for name in names), (module.stem, function, words)


def test_the_mechanisms_guarantee_what_they_have_to() -> None:
    """A bounded norm or what neighbours move, and the noise: lines that cannot be left out with their tests."""
    for stem, function in (("central", "fold"), ("examples", "private_loss"), ("local", "noised")):
        lines = guarantees(Path(fedsim.privacy.__file__).parent / f"{stem}.py")[function]
        assert {"noise variance", "noise independence"} <= set(lines), stem
        assert any("neighbouring" in words or "bounded norm" in words for words in lines), stem
