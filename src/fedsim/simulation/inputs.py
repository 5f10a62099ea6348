"""What a run was given from outside - weights, tokenizer, data, code, tables - known by hash, and found again.

The config keeps each path as it was typed. `config.json` holds, beside it, the absolute path and the SHA-256 of what the
run read there (`files`). A later process takes the typed path if that leads to the same file, else the recorded one.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.backbones import Row, backbone, load, sources
from fedsim.backbones.fused import is_fused
from fedsim.backbones.own import file_of
from fedsim.config import Config, answering, groups_of, parse_call
from fedsim.data import PACKAGED, TABLES, hashes
from fedsim.data.chat import template_file
from fedsim.digests import file_sha256, shown
from fedsim.engine.host import went
from fedsim.record.files import decode, read_bytes
from fedsim.simulation import needs

if TYPE_CHECKING:
    from fedsim.record import Run

HUB = "hf:"  # before a name of the Hugging Face hub, or a folder as its library writes one
CODE = ("algorithm", "backbone")  # options that may name a Python file, `file.py:name`
LISTS = ("availability", "device_table", "download", "upload", "latency", "compute")  # that may name a .csv
GRAPH = "graph"  # an algorithm's option that may name a file of edges
TRUST = "say so by --trust-code, in Python trust_code=True"
PACKAGE = Path(__file__).parents[1]

# option -> path (absolute), sha256; either may be missing. Of several architectures "GROUP.weights" and "GROUP.backbone".
Known = dict[str, dict[str, str]]


def architectures(config: Config) -> dict[str, Config]:
    """The models that a run has, by what the names of their options begin with: one under "", or "GROUP." of each group."""
    return {f"{group.name}.": group.config for group in groups_of(config)} or {"": config}


def models(config: Config) -> dict[str, Config]:
    """The models that a run reads: as it has them, and of one that fuses encoders each of these, "encoder_0." and so on."""
    return encoders(architectures(config))


def encoders(models: dict[str, Config]) -> dict[str, Config]:
    """Models with fused ones divided into their encoders, each with the weights that it reads."""
    found = {}
    for at, model in models.items():
        row = backbone(model.backbone) if is_fused(model.backbone) else None
        if not isinstance(row, Row):
            found[at] = model
            continue
        for number, encoder in enumerate(row.encoders):
            given = "random" if needs.weights(model) == "random" else encoder.weights
            found[f"{at}encoder_{number}."] = model.replace(backbone=encoder.name, weights=given)
    return found


def codes(config: Config) -> dict[str, str]:
    """The options that may name a Python file, with their values: the run's own, and the backbones of groups."""
    found = {option: getattr(config, option) for option in CODE}
    return found | {f"{at}backbone": model.backbone for at, model in models(config).items()}


def plain(option: str) -> str:
    """An option's name without its group."""
    return option.rpartition(".")[2]


def files(config: Config) -> Known:
    """What `config.json` says of the files that the options name, and of weights and tokenizer wherever they come from.

    Raises:
        ValueError: weights that cannot be read.
    """
    found: Known = {}
    for option, path in named(config).items():
        digest = digest_of(option, path, config)
        found[option] = {"path": str(path.resolve())} | ({"sha256": digest} if digest else {})
    if "dataset" not in found and (digest := set_sha256(config)) is not None:
        found["dataset"] = {"sha256": digest}  # of TFDS or the hub: no path that was typed
    for at, model in models(config).items():
        if f"{at}weights" not in found and (file := weights(model)) is not None:
            # Of the hub or packaged: no path that was typed.
            found[f"{at}weights"] = {"sha256": checkpoint_sha256(file)}
    if (file := tokenizer(config)) is not None:
        found["tokenizer"] = {"sha256": file_sha256(file)}
    if (file := template(config)) is not None:
        found["chat_template"] = {"sha256": file_sha256(file)}
    for argument in map(Path, sys.argv):  # what described the run; nothing is read from it again
        if argument.suffix == ".py" and argument.is_file() and PACKAGE not in argument.resolve().parents:
            found["experiment"] = {"path": str(argument.resolve()), "sha256": file_sha256(argument)}
            break
    return found


def named(config: Config) -> dict[str, Path]:
    """The paths that options name, by option."""
    found = {option: file_of(text) for option, text in codes(config).items() if ":" in text.partition("(")[0]}
    for option in LISTS:
        text = getattr(config, option)
        if text is not None and (option == "device_table" or text.lower().endswith(".csv")):
            found[option] = Path(text)
    if (edges := graph(config)) is not None:
        found[GRAPH] = edges
    data = Path(config.dataset.removeprefix(HUB)).expanduser()
    is_file = data.suffix.lower() in (*TABLES, ".npz") and not config.dataset.startswith(HUB)
    if config.dataset not in (*PACKAGED, "arrays") and (is_file or data.is_dir()):
        found["dataset"] = data
    if config.data_dir is not None:
        found["data_dir"] = Path(config.data_dir)
    for at, model in models(config).items():
        given = model.weights
        if given not in (None, "random") and not sources.is_hub_name(given):
            found[f"{at}weights"] = Path(given).expanduser()
    return found


def graph(config: Config) -> Path | None:
    """The file of edges that peers' algorithm reads, `dfed_salt(graph='edges.txt')`; None where it names no file."""
    text = parse_call(config.algorithm, "algorithm")[2].get(GRAPH)
    return Path(text).expanduser() if isinstance(text, str) and Path(text).suffix else None


def weights(config: Config) -> Path | None:
    """The file of the weights that the run reads; None for random ones and a user's own backbone."""
    if ":" in config.backbone or needs.weights(config) == "random":
        return None
    return sources.open_source(load.locate(config.backbone, config.weights)).file


def tokenizer(config: Config) -> Path | None:
    """The tokenizer that the run reads; None where there is none, as of arrays of token ids."""
    try:
        return needs.tokenizer(config)
    except ValueError:
        if config.dataset == "arrays":
            return None
        raise


def template(config: Config) -> Path | None:
    """The file of the chat template by which a language model's conversations are written; None where there is none."""
    file = tokenizer(config) if config.task == "language_model" and config.turns == "template" else None
    return None if file is None else template_file(file)


def digest_of(option: str, path: Path, config: Config) -> str | None:
    """SHA-256 of what an option's path leads to; None where there is no such file, and of `data_dir`."""
    try:
        if plain(option) == "weights":
            return checkpoint_sha256(sources.open_source(path).file)
        if option == "dataset" and path.exists():
            return set_sha256(config.replace(dataset=retyped(config.dataset, option, path)))
        return file_sha256(path) if path.is_file() else None
    except (OSError, ValueError):
        return None


def set_sha256(config: Config) -> str | None:
    """SHA-256 of the data set, as `hashes.sha256` has it; None of packaged sets, which are known, and of arrays."""
    if config.dataset in (*PACKAGED, "arrays"):
        return None
    what = f"hashing the files of {config.dataset}"
    return hashes.sha256(config.dataset, config.data_dir, lambda done, of: went(what, done, of))


def checkpoint_sha256(file: Path) -> str:
    """SHA-256 of a checkpoint's file; of an index of shards, of it and all that it names."""
    if not file.name.endswith(".index.json"):
        return file_sha256(file)
    shards = decode(read_bytes(file), str(file), "give another checkpoint").get("weight_map", {})
    parts = [file, *(file.parent / name for name in sorted(set(shards.values())))]
    return hashlib.sha256("".join(map(file_sha256, parts)).encode()).hexdigest()


def read_hash(config: Config) -> str:
    """A hash of weights and tokenizer for checkpoints; empty where the run reads none from a file."""
    read = [(f"{at}weights", weights(model)) for at, model in models(config).items()]
    found = [(name, file) for name, file in (*read, ("tokenizer", tokenizer(config))) if file]
    if not found:
        return ""
    return hashlib.sha256("".join(f"{n} {checkpoint_sha256(f)} " for n, f in found).encode()).hexdigest()[:16]


# --- finding them again


def located(run: Run, *, resumed: bool = False) -> Config:
    """The run's config with paths that lead to what it was given, after a look at every hash.

    Args:
        resumed: it is to go on, so that changed code cannot be trusted; else it answers, and needs no data.

    Raises:
        ValueError: a file is gone or was changed, or a user's code is not surely the run's and nobody trusts it.
    """
    config = placed(run, resumed=resumed)
    asked = [(f"{at}weights", weights, model) for at, model in asked_for(config, resumed=resumed).items()]
    beside = (("tokenizer", tokenizer, config), ("chat_template", template, config))
    for option, read, of in (*asked, *beside):  # packaged, of the hub, or beside the weights
        expected = run.about.get("files", {}).get(option, {}).get("sha256")
        if expected is not None and (now := read(of)) is not None:
            found = checkpoint_sha256(now)
            if found != expected:
                raise changed(run, option, now, expected, found)
    known_set = run.about.get("files", {}).get("dataset", {})
    if resumed and "path" not in known_set and "sha256" in known_set:
        found = set_sha256(config)
        if found not in (None, known_set["sha256"]):
            raise changed(run, "dataset", config.dataset, known_set["sha256"], found)
    return config


def asked_for(config: Config, *, resumed: bool) -> dict[str, Config]:
    """Of the models those that a resumed run needs, all of them, or a run that answers: of several groups one."""
    asked = {at: model for at, model in architectures(config).items() if resumed or model == answering(config)}
    return encoders(asked)


def placed(run: Run, *, resumed: bool = False) -> Config:
    """As `located`, without a look at weights and tokenizers that no path names: they may still have to be fetched."""
    config, known = run.config, run.about.get("files", {})
    for option, text in codes(config).items():
        if ":" in text.partition("(")[0] and option not in known and not run.trust_code:
            raise ValueError(
                f"Expected trust_code=True for {option}={text!r} of {run.directory}, whose record does not know that file by "
                f"hash: it would be executed here. Read it, then {TRUST}."
            )
    paths = named(config)
    if "path" in known.get("dataset", {}):  # a folder is known as one only where the typed path leads to it
        paths.setdefault("dataset", Path(config.dataset.removeprefix(HUB)).expanduser())
    needed = {*codes(config), GRAPH, *(f"{at}weights" for at in asked_for(config, resumed=resumed))}
    for option, typed in paths.items():
        if "path" in known.get(option, {}) and (resumed or option in needed):
            path = find(run, option, typed, known[option], resumed=resumed)
            if path != typed:
                config = moved(config, option, path)
    return config


def moved(config: Config, option: str, path: Path) -> Config:
    """The config with another path in an option, the run's own or "GROUP.option"."""
    at, _, name = option.rpartition(".")
    if option == GRAPH:
        called, _, options = parse_call(config.algorithm, "algorithm")
        return config.replace(algorithm=call(called, {**options, GRAPH: str(path)}))
    if not at:
        return config.replace(**{name: retyped(getattr(config, name), name, path)})
    texts = []
    for text in config.groups:
        group, _, options = parse_call(text, "groups")
        if group == at:
            typed = options.get(name, getattr(config, name))
            options[name] = retyped(typed, name, path)
        texts.append(call(group, options))
    return config.replace(groups=tuple(texts))


def call(name: str, options: dict[str, Any]) -> str:
    """The text of a call."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})"


def find(run: Run, option: str, typed: Path, known: dict[str, str], *, resumed: bool) -> Path:
    """Where an option's file is now: as typed, or where the record has it.

    Raises:
        ValueError: as `located`.
    """
    recorded, expected = Path(known["path"]), known.get("sha256")
    if expected is None:  # a folder of data that was recorded without: it is compared once it is read
        return typed if typed.exists() or not recorded.exists() else recorded
    if plain(option) in CODE and digest_of(option, recorded, run.config) == expected:
        return typed if typed.exists() and typed.resolve() == recorded else recorded
    for path in (typed, recorded):
        if digest_of(option, path, run.config) != expected:
            continue
        if plain(option) in CODE and not run.trust_code:
            raise ValueError(
                f"Expected trust_code=True for {option}={codes(run.config)[option]!r} of {run.directory}: {path.resolve()} "
                f"has the run's sha256={shown(expected)}, but the run had it as {recorded}, and it would be executed here. "
                f"Read it, then {TRUST}."
            )
        return path
    other = next((path for path in (typed, recorded) if path.exists()), None)
    if other is None:
        raise ValueError(
            f"Expected {option}={str(typed)!r} of {run.directory} to be {typed.absolute()} or {recorded}, sha256="
            f"{shown(expected)}, but neither is there; bring it back, or start in a folder from which {str(typed)!r} leads "
            "to it."
        )
    found = digest_of(option, other, run.config)
    if plain(option) not in CODE or resumed:
        raise changed(run, option, other, expected, found)
    if not run.trust_code:
        raise ValueError(
            f"Expected sha256={shown(found)} of {other}, the {option} of {run.directory}, to be "
            f"{shown(expected)}, as when the run started; bring the old file back, or read this one, then {TRUST}."
        )
    return other


def changed(run: Run, option: str, path: Path | str, expected: str, found: str | None) -> ValueError:
    """What is said of a file that is not the one with which the run started."""
    return ValueError(
        f"Expected sha256={shown(found)} of {path}, the {option} of {run.directory}, to be {shown(expected)}, as when the run "
        "started; bring the old one back, or start a new run in another folder."
    )


def retyped(text: str, option: str, path: Path) -> Any:
    """An option's value with another path in it."""
    if option not in CODE:
        return f"{HUB if option == 'dataset' and text.startswith(HUB) else ''}{path}"
    return f"{path}:{text.removeprefix(text.partition('(')[0].rpartition(':')[0] + ':')}"
