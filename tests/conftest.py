"""Eight devices on the host's CPU, strict dtype promotion, and environments for tests that start processes."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

# Before JAX is imported: it reads both once. An accelerator is tested only where it is asked for by JAX_PLATFORMS.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
COUNT = "--xla_force_host_platform_device_count"
if COUNT not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COUNT}=8".strip()

import jax
import numpy as np
import pytest
from hypothesis import settings

from fedsim.engine.host import COLLECT

jax.config.update("jax_numpy_dtype_promotion", "strict")

# No test fails because a machine is slow or busy; the number of examples bounds the time.
settings.register_profile("fedsim", deadline=None)
settings.load_profile("fedsim")

# XLA's older way to compile element-wise loops takes half the time where nothing is optimised. A flag that XLA does not
# know ends the process, so a newer one, in which it may be gone, does without.
QUICK = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""


def pytest_configure(config: pytest.Config) -> None:
    """Programs are compiled without most optimisations, which takes less time; the full-size models' have them."""
    gc.set_threshold(*COLLECT)
    if config.getoption("markexpr") != "reference":
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # for the processes that tests start
        jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
        os.environ["XLA_FLAGS"] += f" {QUICK}"


@pytest.fixture(scope="module", autouse=True)
def few_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """A step is compiled at one width of a batch instead of four, but where widths are what is tested.

    Afterwards a module's programs are forgotten: they are of no use to the next one, and a whole run of them takes 5 GB.
    """
    from fedsim.engine import packing

    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.rpartition(".")[2] not in ("test_packing", "test_widths"):
            patch.setattr(packing, "MOST_WIDTHS", 1)
        yield
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def no_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs of this process draw their pictures, two seconds each, only in modules that speak of such files."""
    from fedsim.simulation import ending

    with pytest.MonkeyPatch.context() as patch:
        if not re.search(r"\.png|drawn", request.path.read_text("utf-8")):
            patch.setattr(ending, "undrawn", lambda name, draw: "")
        yield


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder (FEDSIM_CACHE), one for all processes: of this test session, or FEDSIM_TEST_CACHE for several sessions."""
    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent
    folder = Path(os.environ.get("FEDSIM_TEST_CACHE") or base / "fedsim-cache")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def compile_once(compiled: Path) -> Iterator[None]:
    """For modules whose tests compile the same programs again and again: they are kept for this test session."""
    from jax.experimental.compilation_cache import compilation_cache

    options = {
        "jax_compilation_cache_dir": str(compiled / "tests"),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        compilation_cache.reset_cache()
        for name, value in values.items():
            jax.config.update(name, value)
        if values is options:
            yield


@pytest.fixture(scope="session")
def environment(compiled: Path) -> dict[str, str]:
    """For `fedsim` in a process of its own, as a user has it: no strictness, nothing of the user's cache."""
    import fedsim

    package = Path(fedsim.__file__).parents[1]
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTEST_CURRENT_TEST", "COLUMNS")}
    path = os.pathsep.join([str(package), *filter(None, [kept.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "FEDSIM_CACHE": str(compiled), "PYTHONUNBUFFERED": "1", "COLUMNS": "100"}
    quick = {"XLA_FLAGS": QUICK} if QUICK in os.environ["XLA_FLAGS"] else {}
    return kept | own | quick


@pytest.fixture(scope="session")
def blobs() -> Callable[..., Path]:
    """`blobs(folder, rows=, features=, classes=, noise=, seed=)` writes an .npz data set of Gaussian classes."""

    def write(
        folder: Path, rows: int = 240, features: int = 6, classes: int = 3, noise: float = 1.0, seed: int = 0
    ) -> Path:
        rng = np.random.default_rng(seed)
        y = rng.integers(0, classes, rows)
        centres = rng.normal(size=(classes, features)) * 1.5
        x = (centres[y] + noise * rng.normal(size=(rows, features))).astype(np.float32)
        file = folder / "blobs.npz"
        np.savez(file, x=x, y=y)
        return file

    return write
