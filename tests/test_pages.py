"""Every Python block of the documents runs to its end, a page's in order, in one namespace and a folder of its own.

A comment before a block says what the page does not show: `<!-- test, before: NOTE`, then code that runs first;
`<!-- test, file: NAME -->`, the file into which the reader writes the block; `<!-- test, slow: REASON -->`, the whole page is
a slow test; `<!-- test, not run: REASON -->`, for what a machine may not have.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("compile_once")

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("notebooks/*")])
PARTS = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<tag>[\w+-]*)[^\n]*\n(?P<body>.*?)^(?P=indent)(?P=fence)[`~]*$"
    r"|^ *<!-- test\b(?P<comment>.*?)-->",
    re.MULTILINE | re.DOTALL,
)
PYTHON = ("python", "pycon", "py", "python3", "ipython")
WORDS = ("before", "file", "slow", "not run")


class Block(NamedTuple):
    """A Python block of a page, and what the comments before it say."""

    line: int  # of the page, on which its code begins
    tag: str
    body: str
    said: dict[str, str]  # word -> what stands behind it
    before: int = 1  # line of the code that runs first


def text_of(page: Path) -> str:
    """What a page says: of a notebook its text, as its code runs elsewhere."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def blocks(text: str) -> list[Block]:
    """The Python blocks of a page, in order.

    Raises:
        ValueError: a comment that says nothing that is known, or that stands before no Python block.
    """
    found: list[Block] = []
    said: dict[str, str] = {}
    before = 1
    for part in PARTS.finditer(text):
        line = text.count("\n", 0, part.start()) + 1
        if part["comment"] is not None:
            word, _, rest = part["comment"].removeprefix(",").strip().partition(":")
            if word not in WORDS or not rest.strip():
                raise ValueError(f"Expected <!-- test{part['comment']}--> to be test, WORD: TEXT with one of {WORDS}.")
            said[word], before = rest.strip(), line + 1 if word == "before" else before
        elif part["tag"].lower() in PYTHON:
            found.append(Block(line + 1, part["tag"].lower(), textwrap.dedent(part["body"]), said, before))
            said = {}
        elif said:
            raise ValueError(f"Expected a Python block behind the comment {said}, not one of {part['tag']!r}.")
    if said:
        raise ValueError(f"Expected a Python block behind the comment {said}.")
    return found


def execute(code: str, page: Path, line: int, names: dict[str, Any]) -> None:
    """Runs code that begins on that line of a page, which a traceback then shows."""
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


def examine(body: str, page: Path, line: int, names: dict[str, Any]) -> None:
    """Runs a block with `>>>` and compares what it prints."""
    test = doctest.DocTestParser().get_doctest(body, names, page.name, str(page), line - 1)
    out = io.StringIO()
    failed = doctest.DocTestRunner().run(test, out=out.write, clear_globs=False).failed
    assert test.examples and failed == 0, out.getvalue()
    names |= test.globs


def run_blocks(found: list[Block], page: Path) -> tuple[dict[str, Any], list[Block]]:
    """Runs a page's blocks in the working folder: their names, and the blocks that are not run."""
    names: dict[str, Any] = {"__name__": page.stem}
    left = []
    for block in found:
        if "not run" in block.said:
            left.append(block)
            continue
        execute(block.said.get("before", "").partition("\n")[2], page, block.before, names)
        if "file" in block.said:
            Path(block.said["file"]).write_text(block.body, encoding="utf-8")
        (examine if block.tag == "pycon" else execute)(block.body, page, block.line, names)
    return names, left


def predicts_by_its_own_model(names: dict[str, Any]) -> bool:
    """docs/own_model.md: what is taken out of the run answers as the run does."""
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    leaves = names["leaves"]
    logits = names["make"]().apply(names["params"], x) @ leaves["head/kernel"] + leaves["head/bias"]
    return names["run"].predict(x) == [str(i) for i in np.argmax(logits, axis=1)]


def prints_what_it_says(names: dict[str, Any]) -> bool:
    """docs/network.md: the simulated seconds and the bytes of the four runs are those below the block."""
    page = (ROOT / "docs" / "network.md").read_text(encoding="utf-8")
    said = [(run.summary["simulated"]["seconds"], run.summary["bytes"]["total"]) for run in names["runs"]]
    return Path("network.png").is_file() and all(f" {s:.1f} s, {b:,} B, test " in page for s, b in said)


# What must have come of a page beyond that it ends.
CAME: dict[str, Callable[[dict[str, Any]], bool]] = {
    "data.md": lambda names: names["run"].summary["final"]["test"]["accuracy"] > 0.8,
    "design.md": lambda names: len(names["result"]) == 2 and names["info"].reported == 4,
    "first_hour.md": lambda names: names["run"].about["classes"] == ["billing", "hardware"],
    "network.md": prints_what_it_says,
    "own_model.md": predicts_by_its_own_model,
    "record.md": lambda names: {p.suffix for p in Path("kept").iterdir()} == {".json", ".safetensors"},
    "results.md": lambda names: Path("runs/lora/main_job.png").is_file(),
}


def marked(page: Path) -> Any:
    """A page as a parameter of tests, marked where one of its blocks is slow."""
    slow = any("slow" in block.said for block in blocks(text_of(page)))
    return pytest.param(page, id=page.name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("page", [marked(p) for p in PAGES if any("not run" not in b.said for b in blocks(text_of(p)))])
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSIM_CACHE", str(compiled))
    names, _ = run_blocks(blocks(text_of(page)), page)
    assert page.name not in CAME or CAME[page.name](names)


@pytest.mark.parametrize(
    ("page", "block"),
    [pytest.param(p, b, id=f"{p.name}:{b.line}") for p in PAGES for b in blocks(text_of(p)) if "not run" in b.said],
)
def test_a_block_that_does_not_run_says_why(page: Path, block: Block) -> None:
    """Counted among the skipped tests, whose reasons `pytest -rs` prints."""
    compile(block.body, str(page), "exec")
    assert len(block.said["not run"].split()) >= 3
    pytest.skip(f"{page.name}, line {block.line}: {block.said['not run']}")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_block_is_overlooked(page: Path) -> None:
    """As many Python blocks as lines that begin one, in whatever spelling."""
    opened = re.findall(r"^[ \t>]*(?:`{3,}|~{3,})[ {.]*(?:i?python|pycon|py)\b", text_of(page), re.MULTILINE | re.I)
    assert len(opened) == len(blocks(text_of(page)))
    untagged = [p for p in PARTS.finditer(text_of(page)) if p["comment"] is None and not p["tag"]]
    assert not untagged, f"{page.name}: a block without a language may be Python; name it, or `text`"


def test_pages_with_blocks_are_found() -> None:
    with_blocks = {page.name for page in PAGES if blocks(text_of(page))}
    assert {"README.md", "data.md", "design.md", "distributed.md", "network.md", "own_model.md"} <= with_blocks
    assert CAME.keys() <= with_blocks
    assert any(page.suffix == ".ipynb" for page in PAGES)


PAGE = """
A page.

<!-- test, before: a number
x = 1
-->

```python
y = x + 1
```

<!-- test, not run: it needs another machine -->
```python
y = undefined
```

- in a list

  <!-- test, file: mine.py -->

  ```py
  z = y + 1
  ```

```pycon
>>> y, z
(2, 3)

```
"""


def test_blocks_share_their_names_and_a_fault_has_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail."""
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    names, left = run_blocks(blocks(PAGE), page)
    assert (names["x"], names["y"], names["z"]) == (1, 2, 3) and [block.line for block in left] == [14]
    assert Path("mine.py").read_text() == "z = y + 1\n"
    with pytest.raises(NameError, match="undefined") as caught:
        run_blocks(blocks(PAGE.replace("not run", "slow")), page)
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == (str(page), 14)
    with pytest.raises(AssertionError, match="Expected"), contextlib.redirect_stdout(io.StringIO()):
        run_blocks(blocks(PAGE.replace("(2, 3)", "(2, 4)")), page)
    for wrong in (
        "<!-- test, not run: -->",
        "<!-- test, often: why not -->",
        "<!-- test, slow: it is -->\n```bash\nls\n```",
    ):
        with pytest.raises(ValueError, match="Expected"):
            blocks(wrong)
