"""What a TPU's compiler says of a round's training program, on a machine without a TPU.

    pip install libtpu
    TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost TPU_SKIP_MDS_QUERY=1 python benchmarks/accelerators/tpu_compile.py
    python benchmarks/accelerators/tpu_compile.py --small

Compiles `segment`, the program that trains all lanes, for one chip of a described topology (random weights, a MiniLM with
LoRA unless said otherwise) and prints its memory by XLA's own analysis. Nothing runs. It says so where the compiler
cannot be had.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import tyro

sys.path.append(str(Path(__file__).parents[1]))  # where `report` lies


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled."""

    topology: str = "v5e:2x2"
    """As `jax.experimental.topologies` names it."""
    backbone: str = "minilm_l6"
    """Its weights do not matter."""
    peft: str = "lora"
    """What is trained beside the head."""
    lanes: tuple[int, ...] = (16, 64, 256)
    """Lanes on the chip; a program for each."""
    batch_size: int = 16
    """Rows of a lane's step."""
    tokens: int = 32
    """Length of a text."""
    image: int = 224
    """Side of an image."""
    small: bool = False
    """Tiny, to see that it works."""


class FoundError(Exception):
    """Ends an exchange at its first segment."""


def arguments(engine: Any, exchange: Any) -> Any:
    """What the exchange hands to its first segment; the state as shapes. Nothing is compiled or run."""
    import jax

    made, found = engine.programs, []

    def programs(*args: Any) -> Any:
        real = made(*args)

        def segment(*args: Any) -> Any:
            found.append(args)
            raise FoundError

        return real._replace(begin=lambda *args: jax.eval_shape(real.begin, *args), segment=segment)

    engine.programs = programs
    try:
        exchange()
    except FoundError:
        del engine.programs
    return found[0]


def main(o: Options) -> None:
    """Compiles, prints, writes JSON."""
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"), ("JAX_PLATFORMS", "cpu")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    if o.small:
        o = dataclasses.replace(o, backbone="vit_tiny", image=16, lanes=(8,))
    import jax
    import numpy as np
    import optax
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import report
    from fedsim import peft
    from fedsim.backbones import backbone
    from fedsim.core import Passes
    from fedsim.engine.client_memory import Memory
    from fedsim.engine.cohort import Cohort
    from fedsim.engine.device_memory import Need
    from fedsim.engine.lanes import Lanes, Request
    from fedsim.evaluation.evaluate import classification_loss
    from fedsim.folds import mean
    from fedsim.training.local import fit
    from fedsim.units import size

    try:
        chip = topologies.get_topology_desc(platform="tpu", topology_name=o.topology).devices[0]
    except Exception as error:  # what a missing or unwilling compiler raises has no common type
        sys.exit(f"not possible here: {type(error).__name__}: {error}")

    rng, rows = np.random.default_rng(0), []
    shape = (o.tokens,) if backbone(o.backbone).kind == "text" else (o.image, o.image, 3)
    clients = max(o.lanes)
    x = rng.integers(1, 200, (clients * o.batch_size, *shape)).astype(np.int32 if len(shape) == 1 else np.uint8)
    model = peft.build(o.backbone, 20, input_shape=shape, peft=o.peft)
    params, frozen = peft.start(model, "random", 0)
    owned = np.arange(len(x), dtype=np.int32), np.arange(clients + 1) * o.batch_size
    local = fit(
        classification_loss(model.apply), optax.sgd, lambda client, message: client.lr, Passes(1, None, o.batch_size)
    )
    mesh = Mesh(np.array([chip]), ("clients",), axis_types=(AxisType.Auto,))

    def moved(a: Any) -> Any:
        """The same shape, on the described chip."""
        spec = a.sharding.spec if isinstance(getattr(a, "sharding", None), NamedSharding) else P("clients")
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

    for lanes in o.lanes:
        engine = Lanes(frozen, x, np.zeros(len(x), np.int32), *owned, lanes=lanes, devices=1, segment_steps=4)
        vars(engine)["_compiled"] = lambda programs, *_: (programs, Need(0, 0))  # not for this machine's device
        cohort = Cohort(engine, np.arange(lanes), 1, Memory(lambda key, held: (), engine.held), lr=0.1)
        args = arguments(
            engine, lambda cohort=cohort, engine=engine: cohort.exchange(engine.put(params), local, mean())
        )
        engine.mesh, engine._programs = mesh, {}  # the same programs over the chip instead of this machine's device
        engine.everywhere, engine.apart = NamedSharding(mesh, P()), NamedSharding(mesh, P("clients"))
        request = Request(local, mean(), False, lambda key, held: (), params)
        made = engine.programs(request, lanes, cohort.sizes)
        use = made.segment.lower(*jax.tree.map(moved, args)).compile().memory_analysis()
        row = {
            "arguments": use.argument_size_in_bytes,
            "outputs": use.output_size_in_bytes - use.alias_size_in_bytes,
            "temporaries": use.temp_size_in_bytes,
            "code": use.generated_code_size_in_bytes,
        }
        rows.append({"name": f"{lanes} lanes", **row})
        print(f"{chip.device_kind}, {lanes:4} lanes: " + ", ".join(f"{name} {size(n)}" for name, n in row.items()))
    report.write("tpu_compile", o, rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
