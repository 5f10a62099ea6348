"""Draws the pictures of docs/partitions.md: one for each partition, clients x classes and sizes.

    python experiments/partition_pictures.py          (10 s; needs `fedsim data fetch 20newsgroups`)

Each is what `fedsim data show` draws with the options beside its name, smaller. `domain` is drawn on ELPV where that is
in the cache, its licence accepted. `natural` needs a set that says whose its examples are; here the authors are
invented: 60 of them, each writing about a few of 10 subjects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedsim.config import Config
from fedsim.data import assets, partition, show
from fedsim.data.dataset import Dataset

FOLDER = Path(__file__).parents[1] / "docs" / "images" / "partitions"
PICTURES: dict[str, dict[str, Any]] = {
    "iid": {"partition": "iid"},
    "dirichlet": {"partition": "dirichlet"},
    "dirichlet_balanced": {"partition": "dirichlet_balanced"},
    "dirichlet_pfllib": {"partition": "dirichlet_pfllib"},
    "shards": {"partition": "shards"},
    "quantity_lognormal": {"partition": "quantity"},
    "quantity_power": {"partition": "quantity", "size_law": "power(exponent=1.0)"},
}


def authors(rows: int = 6000, classes: int = 10, people: int = 60) -> Dataset:
    """Labels and invented authors: sizes are log-normal, and an author's subjects ~ Dir(0.2)."""
    rng = np.random.default_rng(0)
    weights = rng.lognormal(size=people)
    author = np.sort(rng.choice(people, rows, p=weights / weights.sum()))
    subjects = rng.dirichlet(np.full(classes, 0.2), people)
    y = np.array([rng.choice(classes, p=subjects[a]) for a in author], np.int32)
    names = tuple(f"subject {i}" for i in range(classes))
    none = np.arange(0)
    return Dataset("invented authors", None, y, np.arange(rows), none, none, names, "text", "none", {"client": author})


def picture(name: str, config: Config, dataset: Dataset) -> None:
    """Draws one picture with a palette of 128 colours, which is half of the bytes."""
    file = FOLDER / f"{name}.png"
    show.draw(config, dataset, partition.make(config, dataset), file, dpi=90)
    Image.open(file).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    """Draws them all."""
    newsgroups = show.labels_only(Config())
    for name, options in PICTURES.items():
        picture(name, Config(clients=50, **options), newsgroups)
    picture("natural", Config(clients=50, partition="natural"), authors())
    if assets.is_fetched("elpv"):
        elpv = Config(dataset="elpv", accept_licence="CC-BY-NC-SA", clients=50, partition="domain")
        picture("domain", elpv, show.labels_only(elpv))


if __name__ == "__main__":
    main()
