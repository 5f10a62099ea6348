"""Data: packaged sets, users' files and TFDS to arrays with train, validation and test; partitions over clients."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsim.config import Config, nearest
from fedsim.data import assets
from fedsim.data.dataset import Dataset, Source, check, divide

__all__ = ["Dataset", "Source", "load", "needed", "read"]

PACKAGED = ("20newsgroups", "fashion_mnist", "elpv")
FILES = (".csv", ".jsonl", ".npz")


def needed(config: Config) -> tuple[str, ...]:
    """Names of the packaged assets that the config's data set lies in (`assets.fetch` brings them)."""
    return (config.dataset,) if config.dataset in PACKAGED else ()


def read(config: Config) -> Source:
    """The config's data set as it was read, checked, texts not yet tokenised.

    Raises:
        ValueError: a set that is unknown, not fetched, not prepared, or that holds what cannot be used; a packaged one
            whose licence the config does not accept, even if it is in the cache.
    """
    name = config.dataset
    file = Path(name).expanduser()
    if name in PACKAGED:
        assets.require_accepted([name], config.accept_licence)
        source = _packaged(name)
    elif name.startswith("tfds:"):
        from fedsim.data.tfds import read_tfds

        source = read_tfds(name.removeprefix("tfds:"), config.data_dir, config.text_column, config.label_column)
    elif file.suffix.lower() in FILES:
        from fedsim.data.tables import read_arrays, read_table

        if file.suffix.lower() == ".npz":
            source = read_arrays(file)
        else:
            source = read_table(file, config.text_column, config.label_column)
    else:
        raise ValueError(
            f"Expected dataset={name!r} to be one of {', '.join(PACKAGED)}, tfds:NAME, or a file that ends in "
            f"{', '.join(FILES)}{nearest(name, PACKAGED)}."
        )
    check(source)
    return source


def load(config: Config, tokenizer_file: Path | None) -> Dataset:
    """The config's data set, tokenised and with distinct train, validation and test rows.

    Own splits are kept. Where they are missing, a fifth of the rows becomes test, then the share `config.validation`
    of the training rows becomes validation, and last `config.examples` training rows are kept, all drawn by seed.

    Raises:
        ValueError: as `read`; texts without a tokenizer; splits that would be empty.
    """
    source = read(config)
    train, validation, test = divide(
        source.splits, validation=config.validation, examples=config.examples, seed=config.seed
    )
    x = _arrays(source, tokenizer_file, config)
    # Rows that nobody uses (`examples`) are left out, so that no cached feature is computed for them.
    used = np.sort(np.concatenate([train, validation, test]))
    train, validation, test = (np.searchsorted(used, rows) for rows in (train, validation, test))
    return Dataset(
        source.name,
        x[used],
        source.y[used],
        train,
        validation,
        test,
        source.classes,
        source.kind,
        source.licence,
        {key: values[used] for key, values in source.natural.items()},
    )


def _packaged(name: str) -> Source:
    from fedsim.data import images, text

    return {"20newsgroups": text.newsgroups, "fashion_mnist": images.fashion_mnist, "elpv": images.elpv}[name]()


def _arrays(source: Source, tokenizer_file: Path | None, config: Config) -> np.ndarray:
    """The inputs as arrays; only packaged texts leave their tokens in the cache, users' own never do."""
    if isinstance(source.x, np.ndarray):
        return source.x
    if tokenizer_file is None:
        raise ValueError(
            f"Expected backbone={config.backbone!r} to have a tokenizer for the texts of {source.name}; "
            "choose a backbone for text."
        )
    from fedsim.data.text import cached_tokens, tokenize

    if source.key is None:
        return tokenize(source.x, tokenizer_file, config.tokens)
    return cached_tokens(source.x, tokenizer_file, config.tokens, source.key)
