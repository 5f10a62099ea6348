"""`import fedsim` is fast, gives every public name when it is asked for, and notices a project of the same name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fedsim


def test_every_public_name_resolves_once() -> None:
    assert fedsim.__all__ == sorted(set(fedsim.__all__)) and len(fedsim.__all__) > 15
    for name in fedsim.__all__:
        assert getattr(fedsim, name) is getattr(fedsim, name)
        assert name in dir(fedsim)


def test_type_checkers_and_the_table_agree() -> None:
    """The imports under TYPE_CHECKING are what `__getattr__` gives."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(fedsim))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {(node.module, alias.asname) for node in block.body for alias in node.names}
    assert seen == {(module, name) for module, names in fedsim._HOME.items() for name in names}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'fedavg'"):
        _ = fedsim.fedavg
    assert not hasattr(fedsim, "__path_of_nothing__")


def test_import_does_not_import_jax(environment: dict[str, str]) -> None:
    code = (
        "import sys, fedsim, fedsim.__main__; "
        "print([m for m in ('jax', 'flax', 'orbax', 'numpy', 'tensorflow_datasets', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[]\n"


@pytest.fixture
def namesake(tmp_path: Path) -> Path:
    """A folder that holds the metadata of the unrelated distribution `fedsim`."""
    info = tmp_path / "fedsim-0.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fedsim\nVersion: 0.9.0\n")
    return tmp_path


@pytest.mark.parametrize(
    "command", [["-c", "import fedsim"], ["-m", "fedsim", "--help"], ["-c", "import fedsim.config"]]
)
def test_the_namesake_is_refused_with_the_remedy(
    namesake: Path, environment: dict[str, str], command: list[str]
) -> None:
    path = f"{environment['PYTHONPATH']}:{namesake}"
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env={**environment, "PYTHONPATH": path}, check=False
    )
    assert done.returncode != 0
    assert "fedsim 0.9.0" in done.stderr and "pip uninstall fedsim" in done.stderr and "fedsim-jax" in done.stderr


def test_without_the_namesake_nothing_is_said(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "fedsim", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_version_is_that_of_the_distribution(environment: dict[str, str]) -> None:
    from importlib import metadata

    try:
        version = metadata.version("fedsim-jax")
    except metadata.PackageNotFoundError:
        pytest.skip("fedsim-jax is not installed, only on the path")
    command = [sys.executable, "-m", "fedsim", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == f"fedsim-jax {version}\n"
