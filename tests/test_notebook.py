"""Notebooks run from top to bottom, without a network, packaged assets or a GPU. Their text is among the pages of `test_pages`."""

from __future__ import annotations

import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("**/*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.name)
def test_a_notebook_runs(
    notebook: Path, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an empty folder and with an empty cache of assets; an error of any cell fails here with its traceback."""
    for name in ("XLA_FLAGS",):  # a reader has one device
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    book = nbformat.read(notebook, as_version=4)
    start = time.monotonic()
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    took = time.monotonic() - start
    printed = "".join(
        out["text"] for cell in book.cells if cell.cell_type == "code" for out in cell.outputs if "text" in out
    )
    print(f"{notebook.name}: {took:.0f} s")
    if notebook.name == "quickstart.ipynb":
        accuracy = float(printed.split("test accuracy ")[1].split()[0])
        assert accuracy > 0.5, f"{accuracy} on five separated classes"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.name)
def test_a_notebook_is_stored_without_outputs(notebook: Path) -> None:
    """Outputs would go stale, and carry the author's paths."""
    book = nbformat.read(notebook, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
