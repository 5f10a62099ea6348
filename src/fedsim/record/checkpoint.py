"""Checkpoints of a run: Orbax writes them in the background, each whole or not at all, and checked when read.

Orbax alone restores NamedTuples, optax states, typed keys, `()`, `None` and Python numbers only with a template, casts
a wrong dtype silently and does not notice a flipped byte. So a checkpoint is two items: `arrays`, the plain arrays
under running numbers, and `meta`, a JSON text with the path, shape, dtype and SHA-256 of every leaf, the Python
numbers (of any size), what the caller adds (`extra`), and its own SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.tree_util import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from fedsim.disk import reason, remedy_for, unreadable, unwritten
from fedsim.record.files import as_json, parse
from fedsim.record.leaves import describe, digest_array, pack, place, shown, structure_hash
from fedsim.record.orbax import alone, quiet_orbax
from fedsim.stops import Stop

FORMAT = 1  # of the meta item; raised when older checkpoints can no longer be read
KEEP = 3  # checkpoints that stay; also how long `memory.Memory` leaves old rows alone


class DamagedError(Exception):
    """Why a checkpoint cannot be used although it belongs to this run."""


class Checkpoints:
    """The checkpoints of one run in `directory`, of which the newest `keep` stay. One process writes at a time.

    Example:
        with Checkpoints(run / "checkpoints") as checkpoints:
            found = checkpoints.restore(state, expect={"config": config.hash()})
            round, state, extra = found or (0, state, {})
            ...
            checkpoints.save(round, state, {"config": config.hash(), "bytes_up": total})

    Guarantees:
        A process killed at any moment, in the middle of `save` too, leaves the last finished checkpoint usable.
        `restore` gives the saved bits back or takes an older checkpoint; it never returns damaged values.
        Arrays may be donated or changed as soon as `save` returns.
    """

    def __init__(self, directory: Path | str, keep: int = KEEP) -> None:
        if keep < 1:
            raise ValueError(f"Expected keep={keep} >= 1; a run without a checkpoint cannot go on after a stop.")
        self.directory = Path(directory).absolute()
        self._held: set[int] = set()  # rounds that this process wrote or restored
        self._pending: int | None = None
        self._keep = keep
        self._manager = self._open()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Stop) and error.hard:
            return  # a disk that does not answer would be waited for
        with contextlib.suppress(*([Exception] if kind else [])):  # what ended the block is what is told
            self.close()

    def _open(self) -> ocp.CheckpointManager:
        quiet_orbax()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritten(f"the folder {self.directory}", error) from None
        for left in self.directory.glob("*.orbax-checkpoint-tmp*"):  # of a process killed while it saved
            shutil.rmtree(left, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, enable_async_checkpointing=True, create=False, multiprocessing_options=alone()
        )
        return ocp.CheckpointManager(self.directory, options=options, item_names=("arrays", "meta"))

    def rounds(self) -> list[int]:
        """Rounds that have a finished checkpoint, good or damaged, oldest first."""
        return sorted(int(p.name) for p in self.directory.iterdir() if p.is_dir() and p.name.isdigit())

    def save(self, round: int, arrays: Any, extra: Mapping[str, Any]) -> bool:
        """Copies `arrays` to the host and writes them and `extra` in the background.

        Args:
            round: rounds done; each round is saved once, since its state is a function of the round.
            arrays: any pytree of JAX or NumPy arrays, typed keys and Python numbers or strings.
            extra: what JSON can hold; integers of any size; keys are strings, tuples come back as lists.

        Returns:
            False where this process wrote or restored that round already, and nothing was done.

        Raises:
            OSError: this save could not start, or the save before it failed.
            ValueError: a leaf or `extra` cannot be stored, or `round` is not above the newest one.
        """
        self.wait()
        if round in self._held:
            return False
        packed = pack(arrays)
        body = {"format": FORMAT, "round": round, "structure": packed.structure, "leaves": packed.leaves}
        try:
            body = as_json({**body, "extra": dict(extra)})
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Expected extra of round={round} to hold JSON values only ({error}); put arrays in arrays."
            ) from None
        items: dict[str, Any] = {"meta": ocp.args.JsonSave({"sha256": digest(body), "body": body})}
        if packed.arrays:
            items["arrays"] = ocp.args.PyTreeSave(packed.arrays)
        try:
            written = self._manager.save(round, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._failed(round, error) from None
        if not written:  # Orbax says so and writes nothing
            raise ValueError(
                f"Expected round={round} to be above the newest checkpoint {max(self.rounds(), default=0)} in "
                f"{self.directory}; restore before saving, or save into another folder."
            )
        self._held.add(round)
        self._pending = round
        return True

    def wait(self) -> None:
        """Returns when the last save is on the disk.

        Raises:
            OSError: it failed; the checkpoint before it is still usable.
        """
        if self._pending is None:
            return
        round, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._held.discard(round)
            with contextlib.suppress(Exception):  # it raises the same error again
                self._manager.close()
            self._manager = self._open()  # a manager that failed once keeps the failed step in its list
            raise self._failed(round, error) from None

    def _failed(self, round: int, error: Exception) -> OSError:
        return OSError(
            f"Expected the checkpoint of round {round} to be written to {self.directory} "
            f"({reason(error)}); {remedy_for(error)}, then resume: usable checkpoints are {self.rounds() or 'none'}."
        )

    def close(self) -> None:
        """Waits for the last save and ends Orbax' threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def clear(self, keep: Collection[str] = ()) -> None:
        """Removes every checkpoint, and the rows of clients' memory beside the folder, which are of no use without.

        Args:
            keep: names of files with rows that something else refers to.
        """
        self.wait()
        for round in self.rounds():
            shutil.rmtree(self.directory / str(round), ignore_errors=True)
        for rows in self.directory.parent.glob("memory-*.rows"):
            if rows.name not in keep:
                rows.unlink(missing_ok=True)

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Round and `extra` of the newest checkpoint whose JSON part is whole; needs no template, changes nothing."""
        self.wait()
        for round in reversed(self.rounds()):
            try:
                return round, self._read_meta(round)["extra"]
            except DamagedError:
                continue
        return None

    def restore(
        self,
        template: Any,
        expect: Mapping[str, Any] | Callable[[int, dict[str, Any]], Mapping[str, Any]],
        damage: Callable[[Any], str | None] = lambda arrays: None,
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest good checkpoint as `(round, arrays, extra)`, or None if there is none.

        A damaged one is reported with a warning and renamed to `damaged-ROUND`, so that its round can be saved again.

        Args:
            template: a pytree like the saved one; arrays come back as what stands there: NumPy arrays as NumPy
                arrays, committed JAX arrays on the same devices, `jax.ShapeDtypeStruct` as JAX arrays.
            expect: what `extra` must hold, such as the config's hash, nested dicts compared entry by entry.
            damage: what is wrong with files that the arrays refer to, None for nothing; such a checkpoint is damaged.

        Where they change over the rounds (another phase, a memory that grows), both may be functions of
        `(round, extra)` of the checkpoint that is tried; the template's is called first.

        Raises:
            ValueError: the newest whole checkpoint is of another run: names what differs. Nothing is changed.
        """
        self.wait()
        for round in reversed(self.rounds()):
            try:
                body = self._read_meta(round)
                like = template(round, body["extra"]) if callable(template) else template
                wanted = expect(round, body["extra"]) if callable(expect) else expect
                refuse_foreign(body, like, wanted, where=self.directory / str(round))
                leaves = self._read_leaves(round, body)
                given, structure = tree_flatten(like)
                tree = tree_unflatten(structure, [place(x, t) for x, t in zip(leaves, given, strict=True)])
                if (why := damage(tree)) is not None:
                    raise DamagedError(why)
            except DamagedError as why:
                self._set_aside(round, why)
                continue
            self._held.add(round)
            return round, tree, body["extra"]
        return None

    def _read_meta(self, round: int) -> dict[str, Any]:
        """The JSON part, checked against its own SHA-256."""
        path = self.directory / str(round) / "meta" / "metadata"
        try:  # read as a file: Orbax would first parse its own files, whose damage does not concern us
            text = parse(path.read_bytes())
            body, expected = text["body"], text["sha256"]
            if digest(body) != expected:
                raise DamagedError(f"{path}: the checksum differs")
            if body["round"] != round:
                raise DamagedError(f"{path}: it was saved as round {body['round']}")
        except (MemoryError, DamagedError):
            raise
        except PermissionError as error:
            raise unreadable(path, error) from None
        except Exception as error:
            raise DamagedError(f"{path}: {reason(error)}") from error
        if body["format"] > FORMAT:
            raise ValueError(f"Expected format={body['format']} <= {FORMAT} in {path}; use the newer fedsim.")
        return body

    def _read_leaves(self, round: int, body: dict[str, Any]) -> list[Any]:
        """All leaves in order: NumPy arrays, checked against their SHA-256, typed keys and Python scalars."""
        path = self.directory / str(round) / "arrays"
        stored: dict[str, np.ndarray] = {}
        if any("sha256" in leaf for leaf in body["leaves"]):
            try:
                names = [str(i) for i, leaf in enumerate(body["leaves"]) if "sha256" in leaf]
                wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
                handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone())
                with ocp.Checkpointer(handler, multiprocessing_options=alone()) as reader:
                    stored = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=wanted))
            except MemoryError:
                raise
            except PermissionError as error:
                raise unreadable(path, error) from None
            except Exception as error:
                raise DamagedError(f"{path}: {reason(error)}") from error
        leaves = []
        for i, leaf in enumerate(body["leaves"]):
            if "value" in leaf:
                leaves.append(leaf["value"])
                continue
            x = stored[str(i)] if "sha256" in leaf else np.zeros(leaf["shape"], jnp.dtype(leaf["dtype"]))
            found = (list(x.shape), str(x.dtype))
            if found != (leaf["shape"], leaf["dtype"]) or ("sha256" in leaf and digest_array(x) != leaf["sha256"]):
                raise DamagedError(f"{path}: leaf {leaf['path'] or '(root)'} differs from its checksum")
            leaves.append(jax.random.wrap_key_data(jnp.array(x), impl=leaf["impl"]) if leaf["kind"] == "key" else x)
        return leaves

    def _set_aside(self, round: int, why: DamagedError) -> None:
        kept = self.directory / f"damaged-{round}"
        shutil.rmtree(kept, ignore_errors=True)
        (self.directory / str(round)).rename(kept)
        self._manager.close()
        self._manager = self._open()  # `reload` would keep the step in its list, and `save` would write nothing
        older = max(self.rounds(), default=None)
        then = "there is no older one" if older is None else f"going back to round {older}"
        warnings.warn(
            f"The checkpoint of round {round} is damaged ({why}); it was moved to {kept.name}, {then}.", stacklevel=3
        )


def refuse_foreign(body: Mapping[str, Any], template: Any, expect: Mapping[str, Any], where: Path) -> None:
    """Raises `ValueError` unless a checkpoint fits the template and holds what is expected; names the differences."""
    wrong = [
        f"{name} is {ours!r} in this run, {theirs!r} in the checkpoint"
        for name, theirs, ours in differences(body["extra"], as_json(dict(expect)))
    ]
    found, structure = tree_flatten_with_path(template)
    ours = {keystr(path): describe(x, keystr(path)) for path, x in found}
    theirs = {leaf["path"]: leaf for leaf in body["leaves"]}
    wrong += [f"{path or '(root)'} is only in the checkpoint" for path in theirs if path not in ours]
    wrong += [f"{path or '(root)'} is only in this run" for path in ours if path not in theirs]
    templates = {keystr(path): x for path, x in found}
    for path in (p for p in ours if p in theirs):
        a, b = shown(ours[path]), shown(theirs[path])
        # eval_shape turns Python numbers into scalar arrays: the checkpoint knows better
        traced = isinstance(templates[path], jax.ShapeDtypeStruct) and "value" in theirs[path]
        if a != b and not (traced and ours[path].get("shape") == []):
            wrong.append(f"{path or '(root)'} is {a} in this run, {b} in the checkpoint")
    if not wrong and structure_hash(structure) != body["structure"]:
        wrong.append("its containers (tuples, NamedTuples, dicts, None) are other ones")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(
            f"Expected {where} to be a checkpoint of this run, but {'; '.join(wrong[:8])}{more}. "
            "Resume with the options it was started with, or start a new run in another folder."
        )


def differences(have: Any, want: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Where `have` lacks what `want` holds: `(dotted name, have, want)`; entries that are only in `have` are fine."""
    if isinstance(have, Mapping) and isinstance(want, Mapping):
        pairs = [(f"{name}.{k}" if name else str(k), have.get(k), v) for k, v in want.items()]
        return [d for path, a, b in pairs for d in differences(a, b, path)]
    return [] if have == want else [(name, have, want)]


def digest(body: Any) -> str:
    """SHA-256 of the canonical JSON of a value."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
