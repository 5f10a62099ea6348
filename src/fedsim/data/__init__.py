"""Data: packaged sets, users' files and TFDS to arrays with train, validation and test; partitions over clients.

Begin with `read` and `load` below: they choose a reader by the name of the set, and each reader is a file here. `partition/`
says who owns what. Nothing here knows of models; images are resized and augmented on the device, in `backbones/` and `training/`.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.config import Data, nearest
from fedsim.data import assets
from fedsim.data.dataset import Columns, Dataset, Source, divide, unheld
from fedsim.data.gate import check, printable, require_vocabulary

__all__ = ["Dataset", "Source", "load", "needed", "read", "require_given"]

PACKAGED = ("20newsgroups", "shakespeare", "fashion_mnist", "elpv", "digits")
TABLES = (".csv", ".jsonl", ".parquet")
FORMS = {
    "tfds:NAME": "a set of TensorFlow Datasets, also NAME/CONFIG:VERSION, after fedsim data prepare tfds:NAME",
    "hf:NAME": "a set of the Hugging Face hub, OWNER/NAME[:CONFIG], or a folder that its library reads",
    "FOLDER": "images by class: FOLDER/CLASS/*.png, or FOLDER/{train,validation,test}/CLASS/*.png",
    "FILE": "texts: .csv, .jsonl, .parquet; arrays: .npz",
    "arrays": "arrays in memory, in Python only: fedsim.run(config, data=fedsim.arrays(x, y))",
}


def needed(options: Data) -> tuple[str, ...]:
    """Names of the packaged assets that the config's data set lies in (`assets.fetch` brings them)."""
    return (options.dataset,) if options.dataset in PACKAGED else ()


def require_given(options: Data, given: Source | None) -> None:
    """Raises `ValueError` unless arrays are given for `dataset="arrays"`, and for nothing else."""
    if options.dataset == "arrays" and given is None:
        raise ValueError(
            "Expected data=fedsim.arrays(x, y) for dataset='arrays'; give it to fedsim.run, also beside resume "
            "(the command line has no arrays: write them by np.savez and name the .npz file)."
        )
    if options.dataset != "arrays" and given is not None:
        raise ValueError(
            f"Expected dataset='arrays' beside data=..., got {options.dataset!r}; set it, or leave out data."
        )


def require_there(options: Data) -> None:
    """Raises `ValueError` for a set that is neither known nor a file or folder that exists. Nothing is read."""
    name, file = options.dataset, Path(os.path.expanduser(options.dataset))
    if name in PACKAGED or name == "arrays" or name.startswith(("tfds:", "hf:")):
        return
    if file.suffix.lower() in (*TABLES, ".npz"):
        from fedsim.data.tables import existing

        existing(file)
    elif not file.is_dir():
        beside = (
            [str(file.parent / p.name) for p in file.parent.iterdir() if p.is_dir()] if file.parent.is_dir() else []
        )
        raise ValueError(
            f"Expected dataset={name!r} to be one of {', '.join(PACKAGED)}, tfds:NAME, hf:NAME, arrays, a folder of images by "
            f"class, or a file that ends in {', '.join((*TABLES, '.npz'))}{nearest(name, (*PACKAGED, 'arrays', *beside))}."
        )


def read(options: Data, given: Source | None = None) -> Source:
    """The config's data set as it was read, checked, texts not yet tokenised.

    Args:
        given: the set itself, from `fedsim.arrays`, for `dataset="arrays"`.

    Raises:
        ValueError: a set that is unknown, not fetched, not prepared, or that holds what cannot be used; a packaged one
            whose licence the config does not accept, even if it is in the cache.
    """
    require_given(options, given)
    try:
        source = _read(options, given)
    except OSError as error:  # unreadable folders and files, names that the system does not take
        raise ValueError(
            f"Expected dataset={options.dataset!r} to be readable ({error}); check its name and its permissions."
        ) from error
    check(source)
    return source


def _read(options: Data, given: Source | None) -> Source:
    """The set by the reader that its name calls for."""
    name, side = options.dataset, options.image_store
    if not name.strip() or "\0" in name:
        raise ValueError(
            f"Expected dataset={name!r} to be a name, a file or a folder; give one of fedsim list data ('.' is this folder)."
        )
    columns = Columns(options.text_column, options.label_column, options.client_column, options.domain_column)
    file = Path(os.path.expanduser(name))  # an unknown ~user stays as it is
    suffix = file.suffix.lower()
    if name.startswith("tfds:"):
        from fedsim.data.tfds import read_tfds

        source = read_tfds(name.removeprefix("tfds:"), options.data_dir, columns, side)
    elif name.startswith("hf:"):
        from fedsim.data.hugging_face import read_hugging_face

        source = read_hugging_face(name.removeprefix("hf:"), columns, side)
    elif name not in PACKAGED and suffix in TABLES:
        from fedsim.data.tables import read_table

        source = read_table(file, columns)
    elif name not in PACKAGED and suffix == ".npz":
        from fedsim.data.arrays import read_arrays

        source = read_arrays(file, columns)
    else:
        _refuse_columns(options, columns)
        source = given if given is not None else _without_columns(options, file, side)
    if side is not None:
        source = _resized(source, side)
    return source


def _without_columns(options: Data, file: Path, side: int | None) -> Source:
    """A packaged set, or a folder of images."""
    if options.dataset in PACKAGED:
        assets.require_accepted([options.dataset], options.accept_licence)
        return _packaged(options.dataset)
    require_there(options)
    from fedsim.data.folder import read_folder

    return read_folder(file, side)


def _refuse_columns(options: Data, columns: Columns) -> None:
    for key, column in columns.natural.items():
        raise ValueError(
            f"Expected no {key}_column={column!r} for dataset={options.dataset!r}, which has no columns to name; leave it out"
            f"{f', and give {key}= to fedsim.arrays' if options.dataset == 'arrays' else ''}."
        )


def _resized(source: Source, side: int) -> Source:
    """The set with its images at the side; those that their reader has resized already stay as they are."""
    from fedsim.data.pixels import all_resized

    if source.kind != "image" or not isinstance(source.x, np.ndarray):
        raise ValueError(
            f"Expected image_store={side} for a set of images, not {source.kind} as in {source.name}; leave it out."
        )
    return source._replace(x=all_resized(source.x, side))


def load(
    options: Data,
    tokenizer_file: Path | None,
    given: Source | None = None,
    *,
    backbone: str | None = None,
    vocabulary: int | None = None,
    learn: tuple[int, int] | None = None,
    taught: bool = True,
    outside: int | None = None,
) -> Dataset:
    """The config's data set, tokenised and with distinct train, validation and test rows.

    Own splits are kept. Where they are missing, a fifth of the rows becomes test, then the share `options.validation`
    of the training rows becomes validation, and last `options.examples` training rows are kept, all drawn by seed.
    Warns where a class is taught and tested that no training row has.

    Args:
        tokenizer_file: of the backbone; None where it reads no texts.
        backbone: its name, for the error where it cannot read the texts.
        vocabulary: tokens that it knows; None where that is not known, or where it takes any.
        learn: where the backbone brings no tokenizer, one is trained on the training texts: its tokens at most, and the id
            of padding (`text.trained_tokenizer`).
        taught: labels are what is learned; else they only say who owns what.
        outside: what stands for padding where no token of the tokenizer's does (`text.tokenize`).

    Raises:
        ValueError: as `read`; texts without a tokenizer; token ids beyond the vocabulary; splits that would be empty.
    """
    source = read(options, given)
    if source.turns is not None and taught:
        raise ValueError(
            f"Expected task='language_model' for the conversations of {source.name}, which have no classes to learn; give --task "
            "language_model, or name a column of texts by text_column."
        )
    train, validation, test = divide(
        source.splits, validation=options.validation, examples=options.examples, seed=options.seed
    )
    tested = source.y[np.concatenate([validation, test])]
    missing = np.intersect1d(unheld(source.y, train, len(source.classes)), tested)
    if taught and len(missing):
        named = ", ".join(printable(source.classes[c]) for c in missing[:5]) + (" ..." if len(missing) > 5 else "")
        warnings.warn(
            f"{source.name}: {len(missing)} of {len(source.classes)} classes are in validation or test and have no training "
            f"example ({named}); nobody can learn them.",
            stacklevel=2,
        )
    tokenizer, trained = tokenizer_file, None
    if isinstance(source.x, list) and tokenizer_file is None and learn is not None:
        from fedsim.data.text import trained_tokenizer

        tokenizer = trained_tokenizer([source.x[row] for row in train.tolist()], *learn)
        trained, outside = tokenizer.to_str(), learn[1]
    splits = {"train": train, "validation": validation, "test": test}
    if options.packing and not taught:
        x, used, splits = _packed(source, splits, tokenizer, options, backbone, outside)
    else:
        # Rows that nobody uses (`examples`) are left out, so that no cached feature is computed for them.
        used = np.sort(np.concatenate([train, validation, test]))
        splits = {name: np.searchsorted(used, rows) for name, rows in splits.items()}
        x = _inputs(source, tokenizer, options, backbone, outside)
        x = _of(x, used) if len(used) < len(source.x) else x  # no second copy of a large set
    dataset = Dataset(
        source.name,
        x,
        source.y[used],
        splits["train"],
        splits["validation"],
        splits["test"],
        source.classes,
        source.kind,
        source.licence,
        {key: values[used] for key, values in source.natural.items()},
        trained,
    )
    require_vocabulary(dataset, vocabulary)
    return dataset


def _packed(
    source: Source,
    splits: dict[str, np.ndarray],
    tokenizer: Any,
    options: Data,
    backbone: str | None,
    outside: int | None,
) -> tuple[Any, np.ndarray, dict[str, np.ndarray]]:
    """Texts in windows: the inputs, for each window the row of its first text, and the windows of the splits.

    Raises:
        ValueError: there are no texts, or no tokenizer.
    """
    from fedsim.data import chat, windows
    from fedsim.data.text import opened

    if not isinstance(source.x, list):
        raise ValueError(f"Expected texts for packing=True, not {source.kind}s as in {source.name}; leave it out.")
    file = tokenizer if isinstance(tokenizer, Path) else None
    _require_tokenizer(source, tokenizer, backbone)
    reader = tokenizer if file is None else opened(file)
    if source.turns is None:
        end = chat.marks(file).tokens.get("eos_token")
        adds = reader.num_special_tokens_to_add(is_pair=False) > 0
        pieces = list(windows.pieces_of(source.x, reader, None if adds or end is None else reader.token_to_id(end)))
    else:
        pieces = list(chat.pieces(source.turns, reader, **_writing(options, file, backbone)))
    made = windows.packed(
        pieces, [source.y, *source.natural.values()], splits, options.tokens, -1 if outside is None else outside
    )
    x = made.ids if source.turns is None else {"ids": made.ids, "loss": made.loss}
    return x, made.first, made.splits


def _of(x: Any, rows: np.ndarray) -> Any:
    return {name: leaf[rows] for name, leaf in x.items()} if isinstance(x, dict) else x[rows]


def _writing(options: Data, file: Path | None, backbone: str | None) -> dict[str, Any]:
    """How conversations become tokens; see `chat.pieces`."""
    from fedsim.data import chat

    return {
        "written": chat.opened(chat.marks(file), f"backbone={backbone!r}", options.turns),
        "answers": options.loss_on == "answers",
        "marked": options.turns == "plain",
    }


def _packaged(name: str) -> Source:
    from fedsim.data import images, text
    from fedsim.data.shakespeare import shakespeare

    readers = {"fashion_mnist": images.fashion_mnist, "elpv": images.elpv, "digits": images.digits}
    return {**readers, "20newsgroups": text.newsgroups, "shakespeare": shakespeare}[name]()


def _require_tokenizer(source: Source, tokenizer: Any, backbone: str | None) -> None:
    if tokenizer is None:
        raise ValueError(
            f"Expected backbone={backbone!r} to have a tokenizer for the texts of {source.name}; "
            "choose a backbone for text."
        )


def _inputs(source: Source, tokenizer: Any, options: Data, backbone: str | None, outside: int | None) -> Any:
    """The inputs as arrays, a row each; only packaged texts leave their tokens in the cache, users' own never do.

    Args:
        tokenizer: itself, or its file, beside which the model's chat template lies.
    """
    if isinstance(source.x, np.ndarray):
        return source.x
    _require_tokenizer(source, tokenizer, backbone)
    from fedsim.data import chat
    from fedsim.data.text import cached_tokens, opened, tokenize

    file = tokenizer if isinstance(tokenizer, Path) else None
    if source.turns is not None:
        return chat.tokenized(
            source.turns,
            tokenizer if file is None else opened(file),
            options.tokens,
            -1 if outside is None else outside,
            refuse_long=options.too_long == "refuse",
            **_writing(options, file, backbone),
        )
    if source.key is None or file is None:
        return tokenize(source.x, tokenizer, options.tokens, outside)
    return cached_tokens(source.x, file, options.tokens, source.key, outside)
