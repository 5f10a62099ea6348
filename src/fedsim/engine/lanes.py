"""The engine: packs a cohort into lanes, runs `Local` in all lanes at once, folds the replies, counts every byte.

The vmapped axis is a fixed number of LANES, not the clients: at a client's first step a lane's carry is `start(...)`, at
its last step `finish(...)` hands the reply to the fold and the memory to its slot, and the next client begins. A plan
(`plan.py`) runs as SEGMENTS of one compiled program - batches in, lane state in and out - so its length is data, not a
shape, and batches from the device's memory or from the host go through the same program.

Every mapped array has a leading device axis D, sharded over the mesh axis "clients"; `shard_map` (or `pmap`) gives each
device its own block, its own trip count, and no collective inside. The sums over devices happen once, in `end`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedsim import wire
from fedsim.core import Local, Reduce, Tree
from fedsim.engine import flops, packing, processes
from fedsim.engine.device_memory import Need, device_memory, exhausted, free_memory, refuse_too_large
from fedsim.engine.downlink import Downlink
from fedsim.engine.host import aligned
from fedsim.engine.lane_count import choose_lanes, own_convolutions
from fedsim.engine.packing import Labels
from fedsim.engine.programs import Programs, make_programs
from fedsim.engine.replies import Reply, reply_bytes, reply_shapes, split_message, takes_rows
from fedsim.engine.state import Clock, Parts, Slots
from fedsim.folds import stack

PREFETCH_BYTES = 256 * 2**20  # of batches that a segment may hold on a device at once
RESIDENT_SHARE = 0.4  # of a device's memory that the examples may take; larger sets stay on the host
MEMORY_SHARE = 0.8  # of a device's free memory that "auto" lets the program take; the rest is for fragments
SPOKEN = stack(lambda client, reply: jnp.ones((), jnp.float32))  # every reply that came, whatever a fold weighs it by


class Request(NamedTuple):
    """One exchange, as far as its programs depend on it."""

    local: Local
    reduce: Reduce
    averages: bool  # by the run's average, whose `done` gives an `Averaged`
    init_memory: Any  # (key, held) -> what a new client keeps
    message: Tree  # as the clients decode it; parts that differ by client are marked
    args: Tree = ()  # of the fold
    into: Any = None  # `Peers.into`, where replies go from peer to peer

    @property
    def asked(self) -> tuple[Any, ...]:
        """What a reply's shape depends on."""
        return self.local, self.init_memory, _structure(self.message)


class Lanes:
    """Holds what stays on the devices - backbone, examples, partition - and runs cohorts over it.

    Args:
        held: frozen parameters, a pytree; replicated.
        x, y: the examples, leading axis n. `x` may be a pytree.
        rows, offsets: the partition: client i owns rows[offsets[i]:offsets[i + 1]].
        lanes: lanes a device, or "auto".
        devices: how many local devices, of every process; None for all.
        parallel: "shard_map", or "pmap" within one process.
        segment_steps: steps of the plan in one call, or "auto".
        resident: "on" copies the examples to every device, "off" leaves them on the host and sends batches, "auto"
            takes the first where they fit. The same programs run, so the results are equal bit for bit.
        widths: columns of a batch that a step may compute, ascending up to the batch size; None for those that the
            clients' sizes make worthwhile. Each further one compiles another step.
        may_refuse: whether a program that should not fit by its own analysis is an error; else it is tried.
        up, down: codecs of replies and messages; None for none.
        group: its name, where several engines are one cohort's: no two draw the same.
        public, shard: rows of the examples that the server holds, without and with labels; they are put whole on every
            device, whether the others are or not.
    """

    def __init__(
        self,
        held: Tree,
        x: Tree,
        y: np.ndarray,
        rows: np.ndarray,
        offsets: np.ndarray,
        *,
        seed: int = 0,
        lanes: int | str = "auto",
        devices: int | None = None,
        parallel: str = "shard_map",
        segment_steps: int | str = "auto",
        resident: str = "auto",
        widths: tuple[int, ...] | None = None,
        may_refuse: bool = True,
        up: wire.Codec | None = None,
        down: wire.Codec | None = None,
        group: str = "",
        public: np.ndarray | None = None,
        shard: np.ndarray | None = None,
    ) -> None:
        self.devices = processes.devices(devices)
        self.own = [d for d in self.devices if d.process_index == jax.process_index()]
        if parallel == "pmap" and len(self.own) < len(self.devices):
            raise ValueError("Expected parallel='pmap' with one process only; several take shard_map, the default.")
        self.mesh = Mesh(np.array(self.devices), ("clients",), axis_types=(AxisType.Auto,))
        self.everywhere = NamedSharding(self.mesh, P())
        self.apart = NamedSharding(self.mesh, P("clients"))
        self.parallel = parallel
        self.lanes, self.segment_steps, self.seed = lanes, segment_steps, seed
        self.rows, self.offsets = np.asarray(rows), np.asarray(offsets)
        self.held, self.root = self.keep((held, jax.random.key(seed)))
        self.x, self.y = x, np.asarray(y, np.int32)
        self.labels = self.y  # on the host, for plans that read them
        self.public, self.shard = self._of_server(x, public), self._of_server((x, self.y), shard)
        size = sum(wire.array_bytes(leaf) for leaf in jax.tree.leaves(x))
        self.row_bytes = size // max(len(self.y), 1)
        self.resident = resident == "on" or (
            resident == "auto" and processes.all_true(size <= RESIDENT_SHARE * device_memory(self.own[0]))
        )
        if self.resident:
            self.x, self.y = self.keep((self.x, self.y))
        self.widths, self.may_refuse = widths, may_refuse
        self.need = Need(0, 0)  # of the programs that were made last
        self.up, self.down, self.group = up, down, group
        self.downlink = Downlink(down, self.everywhere)
        self._programs: dict[Any, Programs] = {}
        self._replies: dict[Any, Reply] = {}
        self._reply_bytes: dict[Any, int] = {}
        self._flops: dict[Any, float] = {}
        self._gather = self.spread(
            lambda x, y, rows: (jax.tree.map(lambda leaf: leaf[rows], x), y[rows]), (False, False, True)
        )

    def gather(self, rows: np.ndarray) -> tuple[Tree, Array]:
        """Examples on the devices, split by the leading axis: rows (D, ...) -> x (D, ..., *), y (D, ...)."""
        if self.resident:
            return self._gather(self.x, self.y, self.split(rows))
        return processes.put_rows((self.x, self.y), rows, self.apart)

    def _of_server(self, tree: Tree, rows: np.ndarray | None) -> Tree:
        """These rows whole on every device; None for none."""
        if rows is None or not len(rows):
            return None
        return self.keep(jax.tree.map(lambda leaf: leaf[rows], tree))

    @property
    def shapes(self) -> tuple[Tree, Any]:
        """Shapes of the examples, wherever they lie: x (n, ...), y (n,)."""
        x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), self.x)
        return x, jax.ShapeDtypeStruct(self.y.shape, self.y.dtype)

    @property
    def population(self) -> int:
        """Number of clients N."""
        return len(self.offsets) - 1

    def put(self, tree: Tree) -> Tree:
        """Copies a tree to every device."""
        return processes.put(tree, self.everywhere)

    def keep(self, tree: Tree) -> Tree:
        """As `put`, for what nobody changes: where it can, a CPU's devices share one copy, the caller's."""
        return self.put(jax.tree.map(aligned, tree) if self.devices[0].platform == "cpu" else tree)

    def split(self, tree: Tree) -> Tree:
        """Gives every device its block of arrays (D, ...)."""
        return processes.put(tree, self.apart)

    def together(self, tree: Tree) -> Tree:
        """What is split over the devices (D, ...), for a program that sums over them: of host devices, on the host.

        A collective of host devices blocks threads of XLA that another of them may need to get there: with as many devices
        as cores, a run stood still now and then until XLA gave up. So no program of theirs has one.
        """
        shared = len(self.devices) > 1 and self.devices[0].platform == "cpu" and not processes.several()
        return jax.device_get(tree) if shared else tree

    def spread(self, fn: Callable[..., Any], mapped: Sequence[bool], donate: Sequence[int] = ()) -> Callable[..., Any]:
        """Runs `fn` on every device: mapped arguments lose their leading device axis, results gain one."""
        if self.parallel == "pmap":
            axes = tuple(0 if m else None for m in mapped)
            return jax.pmap(fn, "clients", in_axes=axes, devices=self.devices, donate_argnums=tuple(donate))

        def block(*args: Any) -> Any:
            own = [jax.tree.map(lambda a: a[0], arg) if m else arg for arg, m in zip(args, mapped, strict=True)]
            return jax.tree.map(lambda a: a[None], fn(*own))

        specs = tuple(P("clients") if m else P() for m in mapped)
        # check_vma: the gradient with respect to a replicated input would be summed over devices.
        program = jax.shard_map(block, mesh=self.mesh, in_specs=specs, out_specs=P("clients"), check_vma=False)
        return jax.jit(program, donate_argnums=tuple(donate))

    def reply(self, request: Request) -> Reply:
        """What one client would reply; traced once."""
        if (asked := request.asked) not in self._replies:
            self._replies[asked] = reply_shapes(*self._traced(request))
        return self._replies[asked]

    def reply_bytes(self, request: Request) -> int:
        """Bytes of one client's reply before there is one; see `replies.reply_bytes`."""
        if (asked := request.asked) not in self._reply_bytes:
            self._reply_bytes[asked] = reply_bytes(*self._traced(request))
        return self._reply_bytes[asked]

    def flops(self, request: Request) -> float:
        """FLOPs of an example in a client's steps, or of a step; see `flops.of_local`. Traced once."""
        if (asked := request.asked) not in self._flops:
            local, init_memory, message, _, *known = self._traced(request)
            self._flops[asked] = flops.of_local(local, init_memory, message, *known)
        return self._flops[asked]

    def _traced(self, request: Request) -> tuple[Any, ...]:
        local, init_memory, message = request.local, request.init_memory, request.message
        return local, init_memory, message, self.up, self.held, *self.shapes, self.root

    def name(self, local: Local) -> str:
        """Of an exchange's randomness: the group's and the stream's."""
        return "/".join(filter(None, (self.group, local.passes.stream)))

    def programs(self, request: Request, members: int, sizes: np.ndarray, labels: Labels | None = None) -> Programs:
        """The programs of an exchange with a cohort of `members`; made once per (local, reduce, cohort size).

        Where "auto" is to choose the lanes, it halves what the cohort keeps busy until the compiled program fits into
        the memory of the device, and stays with that for the exchanges that follow.

        Args:
            sizes: (K,) examples of those who are somebody.
            labels: place among these -> that client's labels, where its steps follow from them.

        Raises:
            ValueError: the program does not fit, by its own analysis; nothing has run.
        """
        local, known = (
            request.local,
            (*request.asked, request.reduce, request.into, _structure(request.args), members),
        )
        if known not in self._programs:
            reply, widths = self.reply(request), self._widths_for(request)

            def made(lanes: int) -> tuple[Programs, Need]:
                steps = self.resolve_segment(lanes, local.passes.batch_size)
                return self._compiled(self._made(request, reply, members, lanes, widths, steps), request, members)

            platform, own = self.devices[0].platform, own_convolutions(reply.values)
            sharing = len(self.own) if platform == "cpu" else 1  # host devices share the machine's memory
            free, asked = free_memory(self.own[0], sharing), self.lanes
            if not len(sizes):  # a cohort of nobody: lanes for those that follow
                sizes = np.diff(self.offsets)[: max(members, 1)]
            lanes = (
                choose_lanes(sizes, local.passes, len(self.devices), platform, widths, convolutions=own, labels=labels)
                if asked == "auto"
                else int(asked)
            )
            programs, need = made(lanes)
            while asked == "auto" and lanes > 1 and processes.any_true(need.lanes > MEMORY_SHARE * free):
                lanes = halved(lanes, need, MEMORY_SHARE * free)
                programs, need = made(lanes)
            if self.may_refuse and not self._programs:  # what fitted in a phase's first round may go on
                refuse_too_large(need, free, lanes, local.passes.batch_size, sharing)
            self.lanes, self.segment_steps, self.need = lanes, programs.steps, need
            self._programs[known] = programs
        return self._programs[known]

    def _made(
        self, request: Request, reply: Reply, members: int, lanes: int, widths: tuple[int, ...], steps: int
    ) -> Programs:
        _, _, (structure, own) = split_message(request.message)
        fold = request.reduce if request.into else None  # peers keep their replies until all are there
        parts = Parts(
            reduce=SPOKEN if fold else request.reduce, members=members, lanes=lanes, widths=widths, reply=reply,
            local=request.local, averages=request.averages, init_memory=request.init_memory, codec=self.up,
            name=self.name(request.local), message=structure, own=own,
        )  # fmt: skip
        return make_programs(self.spread, self.everywhere, parts, steps, request.into, fold)

    def _widths_for(self, request: Request) -> tuple[int, ...]:
        """The widths of this local's steps; the whole batch where its carry depends on the number of rows."""
        passes = request.local.passes
        if passes.rows is not None:
            return (passes.batch_size,)
        multiple = packing.width_multiple(self.population, len(self.devices), self.devices[0].platform)
        widths = self.widths or packing.choose_widths(np.diff(self.offsets), passes, multiple)
        narrow = min(width or passes.batch_size for width in widths)
        common = (request.local, request.init_memory, request.message, self.held, *self.shapes, self.root)
        return widths if narrow == passes.batch_size or takes_rows(narrow, *common) else (passes.batch_size,)

    def _compiled(self, programs: Programs, request: Request, members: int) -> tuple[Programs, Need]:
        """Compiles the segment ahead of its first call; what it takes on a device, by XLA's own analysis."""
        common, (x, y, at, trip) = self._arguments(programs, request, members)
        state = self._apart(jax.eval_shape(programs.begin, *common, x, y, at))
        held, servers = (
            sum(wire.array_bytes(leaf) for leaf in jax.tree.leaves(tree))
            for tree in (self.held, (self.public, self.shard))
        )
        there = held + servers + self.resident * self.row_bytes * len(self.y)
        try:
            segment = programs.segment.lower(*common, state, x, y, at, trip).compile()
        except jax.errors.JaxRuntimeError as error:
            if not exhausted(error):
                raise
            return programs, Need(math.inf, there)  # a TPU's compiler knows the memory and refuses by itself
        use = segment.memory_analysis()
        lanes = use.temp_size_in_bytes + use.argument_size_in_bytes + use.output_size_in_bytes
        return programs._replace(segment=segment), Need(lanes - use.alias_size_in_bytes - held, there)

    def _arguments(self, programs: Programs, request: Request, members: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What a segment is called with, as arrays or their shapes: for the whole exchange, and batches with their plan."""

        def array(dtype: Any, *shape: int) -> Any:
            return jax.ShapeDtypeStruct((len(self.devices), *shape), dtype)

        passes = request.local.passes
        slots, grid = -(-max(members, 1) // len(self.devices)), (programs.steps, programs.lanes)

        def by_slot(shapes: Tree) -> Tree:
            return jax.tree.map(lambda s: array(s.dtype, slots, *s.shape), shapes)

        kept = by_slot(jax.eval_shape(request.init_memory, self.root, self.held))
        coding = by_slot(self.coding_shapes(programs.reply))
        number, flag = array(jnp.int32, slots), array(jnp.bool_, slots)
        shared, own, _ = split_message(request.message)
        own = jax.tree.map(lambda a: array(a.dtype, slots, *a.shape[1:]), own)
        clock = Clock(jnp.int32(0), jnp.int32(0), jnp.float32(0))
        shared, clock, args = self.put((shared, clock, request.args))
        coded = flag if jax.tree.leaves(coding) else ()
        own, cohort = self._apart((own, Slots(number, number, number, number, flag, flag, kept, coded, coding)))
        rows = (len(self.devices), *grid, passes.batch_size)
        at = {name: array(jnp.int32, *grid) for name in ("count", "step", "slot")}
        at |= {name: array(jnp.bool_, *grid) for name in ("first", "last")}
        at["width"] = array(jnp.int32, programs.steps)
        if passes.rows is not None:
            at |= {"live": array(jnp.bool_, *grid), "mask": array(jnp.bool_, *rows[1:])}
        x, y = jax.tree.map(lambda a: jax.ShapeDtypeStruct((*rows, *a.shape[1:]), a.dtype), (self.x, self.y))
        batches = self._apart((x, y, at, array(jnp.int32)))
        return (self.held, shared, own, cohort, clock, self.root, args), batches

    def coding_shapes(self, reply: Reply) -> Tree:
        """What one client keeps for the codec of its replies; () for nothing."""
        if self.up is None or not reply.changes:
            return ()
        return jax.eval_shape(self.up.init, self.root, reply.changes)

    def _apart(self, tree: Tree) -> Tree:
        """Shapes of arrays that are split over the devices."""
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self.apart), tree)

    def reuse(self, lanes: int | str, segment_steps: int | str) -> None:
        """Takes what "auto" chose in an earlier process, so that a resumed run sums in the same order."""
        self.lanes = lanes if self.lanes == "auto" else self.lanes
        self.segment_steps = segment_steps if self.segment_steps == "auto" else self.segment_steps

    def resolve_segment(self, lanes: int, batch_size: int) -> int:
        """Steps a segment: short where a step's batches are large, so that they fit beside the model."""
        if self.segment_steps != "auto":
            return int(self.segment_steps)
        return int(np.clip(PREFETCH_BYTES // max(lanes * batch_size * self.row_bytes, 1), 1, 32))


def _structure(message: Tree) -> tuple[Any, Any]:
    return jax.tree.structure(message), tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(message))


def halved(lanes: int, need: Need, limit: float) -> int:
    """The lanes halved until they should fit, since what they need grows with them: each try compiles a program."""
    fewer = lanes // 2
    while fewer > 1 and math.isfinite(need.lanes) and processes.any_true(need.lanes * fewer > limit * lanes):
        fewer //= 2
    return fewer
