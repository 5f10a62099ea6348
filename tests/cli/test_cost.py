"""`fedsim cost`: the exact counts and bytes of FedPEFT's table, the same bytes as real messages and runs, no arrays."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import fedsim
from brief import brief
from fedsim import algorithms, peft, wire
from fedsim.backbones import BACKBONES, Row, load
from fedsim.backbones.vit import Vit, VitConfig
from fedsim.cli import cost
from fedsim.cli import main as cli
from fedsim.cli.estimate import dry_run
from fedsim.config import Config

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"

CLASSES = {"CIFAR-100": 100, "Resisc45": 45, "PCam": 2}
# Method -> (backbone, options, trained parameters for 100, 45, 2 classes), computed from the architectures.
METHODS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int]]] = {
    "full": ("vit_b16", {"peft": "full"}, (85_875_556, 85_833_261, 85_800_194)),
    "head": ("vit_b16", {"peft": "head"}, (76_900, 34_605, 1_538)),
    "bias": ("vit_b16", {"peft": "bias"}, (179_812, 137_517, 104_450)),
    "bias without patch": ("vit_b16", {"peft": "bias", "bias_patch": False}, (179_044, 136_749, 103_682)),
    "adapter": ("vit_b16", {"peft": "adapter", "adapter_width": 8}, (233_668, 191_373, 158_306)),
    "prompt": ("vit_b16", {"peft": "prompt", "prompt_tokens": 10}, (169_060, 126_765, 93_698)),
    "lora": ("vit_b16", {"peft": "lora", "rank": 4}, (224_356, 182_061, 148_994)),
    "shufflenet": ("shufflenet_v2_x0_5", {"peft": "full"}, (444_292, 387_917, 343_842)),
}


def every(**layers: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of leaves of all 12 blocks."""
    return {f"blocks/{i}/{path.replace('__', '/')}": shape for i in range(12) for path, shape in layers.items()}


BIASES = every(
    **{f"attention__{part}__bias": (768,) for part in ("query", "key", "value", "output")},
    norm1__bias=(768,),
    norm2__bias=(768,),
    mlp__up__bias=(3072,),
    mlp__down__bias=(768,),
) | {"norm/bias": (768,)}
SHAPES = {
    "head": {},
    "bias": BIASES | {"embeddings/patch/bias": (768,)},
    "bias without patch": BIASES,
    "adapter": every(
        mlp__adapter__down_kernel=(768, 8),
        mlp__adapter__down_bias=(8,),
        mlp__adapter__up_kernel=(8, 768),
        mlp__adapter__up_bias=(768,),
    ),
    "prompt": every(prompt=(10, 768)),
    "lora": every(
        attention__query__lora_a=(768, 4),
        attention__query__lora_b=(4, 768),
        attention__value__lora_a=(768, 4),
        attention__value__lora_b=(4, 768),
    ),
}


def config(method: str, **more: Any) -> Config:
    backbone, options, _ = METHODS[method]
    return Config(backbone=backbone, **options, **more)


@pytest.mark.parametrize("method", METHODS)
def test_counts_and_bytes_of_the_table(method: str) -> None:
    for classes, expected in zip(CLASSES.values(), METHODS[method][2], strict=True):
        row = cost.cost(config(method, clients=64, clients_per_round=8, rounds=50), classes)
        assert row.trainable_parameters == expected
        assert row.bytes_up == row.bytes_down == 4 * expected
        assert row.round_bytes_up == row.round_bytes_down == 8 * 4 * expected
        assert row.run_bytes_up == row.run_bytes_down == 50 * 8 * 4 * expected
        whole = METHODS["shufflenet" if method == "shufflenet" else "full"][2][[100, 45, 2].index(classes)]
        assert row.total_parameters == whole
        assert row.full_bytes == 4 * whole
        assert row.full_ratio == pytest.approx(whole / expected)
        assert row.share == pytest.approx(expected / whole)


@pytest.mark.parametrize("method", SHAPES)
def test_shapes_of_the_table(method: str) -> None:
    """Counts collide (LoRA of rank 4 trains as much as a prompt of 16 tokens); shapes do not."""
    leaves = cost.rules(config(method), 45)
    trained = {leaf.path: leaf.shape for leaf in leaves if leaf.rule != "frozen"}
    assert trained == SHAPES[method] | {"head/kernel": (768, 45), "head/bias": (45,)}
    assert {leaf.rule for leaf in leaves if leaf.path.startswith("head/")} == {"head"}
    assert len({leaf.path for leaf in leaves}) == len(leaves)
    assert all(leaf.parameters == math.prod(leaf.shape) for leaf in leaves)


def test_the_papers_two_figures() -> None:
    """About 328MB and 0.68MB a client, one way: what rounds to them, and what does not."""
    mib = {name: cost.cost(config(name), 100).bytes_up / 2**20 for name in METHODS}
    assert round(mib["full"], 3) == 327.589
    assert round(mib["bias"], 3) == 0.686
    assert round(mib["bias without patch"], 3) == 0.683
    assert round(cost.cost(config("prompt"), 100).bytes_up / 1e6, 3) == 0.676


@pytest.mark.parametrize("codec", ["none", "bfloat16"])
@pytest.mark.parametrize("kind", ["lora+bias", "adapter", "prompt", "full"])
def test_a_row_equals_the_serialised_message(kind: str, codec: str) -> None:
    row = cost.cost(Config(backbone="vit_tiny", peft=kind, codec_up=codec), 7)
    trained, frozen = peft.start(peft.build("vit_tiny", 7, peft=kind), "random", 0)
    sent = {name: np.asarray(leaf, np.float32) for name, leaf in trained.items()}
    coder, key, leaves = wire.codec(codec), jax.random.key(0), wire.changes(wire.coded(sent))
    assert row.bytes_up == len(wire.pack(coder.encode(leaves, key, key, ())[0] if coder else leaves, coder))
    assert row.bytes_down == len(wire.serialise(sent))
    assert row.setup_bytes == len(wire.serialise(frozen))
    assert row.trainable_parameters == sum(leaf.size for leaf in sent.values())


PERSONAL = ("ditto", "dfed_alt", "fed_rep", "fed_res", "local_only")  # clients are given more than the backbone


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", PERSONAL)
def test_what_clients_are_given_once_counts_what_they_start_from(
    algorithm: str, tmp_path: Path, blobs: Callable[..., Path], compile_once: None
) -> None:
    setting = Config(
        dataset=str(blobs(tmp_path)), backbone="mlp", peft="full", head_rounds=0, rounds=1, clients=6, clients_per_round=6,
        min_size=3, local_test=0.3, algorithm=algorithm,
    )  # fmt: skip
    run = fedsim.run(setting, out=tmp_path / "run", quiet=True)
    row = cost.cost(setting, 3, input_shape=(6,))
    assert run.rounds[0]["setup_bytes"] == 6 * row.setup_bytes > 0
    assert (run.rounds[0]["bytes_up"], run.rounds[0]["bytes_down"]) == (row.round_bytes_up, row.round_bytes_down)


@pytest.mark.parametrize("algorithm", algorithms.ALGORITHMS)
def test_every_algorithm_is_priced_from_the_command_line(algorithm: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each on what it trains; `weighting` is uniform, as some need."""
    images = ["--backbone", "vit_tiny", "--input-shape", "32", "32", "3", "--peft"]
    asked = {
        "ffa_lora": [*images, "ffa_lora"],
        "fed_et": [*images, "lora", "--groups", "small(peft='bias', share=1.0)", "server()"],
        "fed_kseed": [*images, "lora", "--optimizer", "sgd"],
        "fed_sp": ["--task", "language_model", "--backbone", "decoder_tiny", "--peft", "prefix"],
    }
    argv = [*asked.get(algorithm, [*images, "lora"]), "--clients", "12", "--clients-per-round", "6"]
    assert (
        cli.main(["cost", *argv, "--rounds", "120", "--algorithm", algorithm, "--weighting", "uniform", "--json"]) == 0
    )
    (row,) = json.loads(capsys.readouterr().out)
    assert row["algorithm"] == algorithm
    assert (row["bytes_up"] == 0) == (algorithm == "local_only")


@pytest.mark.parametrize(("kind", "head_rounds"), brief([("bias", 1), ("full", 0), ("head", 0)]))
def test_a_row_equals_what_a_run_reports(
    kind: str, head_rounds: int, tmp_path: Path, blobs: Callable[..., Path], compile_once: None
) -> None:
    setting = Config(
        dataset=str(blobs(tmp_path)), backbone="mlp", peft=kind, head_rounds=head_rounds, rounds=3, clients=6,
        clients_per_round=4, min_size=1, codec_up="float16",
    )  # fmt: skip
    run = fedsim.run(setting, out=tmp_path / "run", quiet=True)
    row = cost.cost(setting, 3, input_shape=(6,))
    last, summary = run.rounds[-1], run.summary or {}
    assert (last["bytes_up"], last["bytes_down"]) == (row.round_bytes_up, row.round_bytes_down)
    assert (last["total_bytes_up"], last["total_bytes_down"]) == (row.run_bytes_up, row.run_bytes_down)
    assert run.rounds[0]["setup_bytes"] == 4 * row.setup_bytes
    # Three cohorts of four of six clients meet all six. Who is met after the head's rounds is given less.
    given = sum(line["setup_bytes"] for line in run.rounds)
    assert row.run_setup_bytes == 6 * row.setup_bytes
    assert given < row.run_setup_bytes if head_rounds else given == row.run_setup_bytes
    assert summary["parameters"]["trained"] == row.trainable_parameters
    assert row.head_rounds == head_rounds


@pytest.mark.slow
def test_a_row_of_groups_equals_what_a_run_reports(
    tmp_path: Path, blobs: Callable[..., Path], capsys: pytest.CaptureFixture[str], compile_once: None
) -> None:
    """Two groups and a model of the server alone; by the command line as by Python."""
    toys = Path(__file__).parents[1] / "algorithms" / "toys.py"
    groups = ("small(peft='head', share=0.25)", "large(peft='full', share=0.75)", "server(peft='bias')")
    setting = Config(
        dataset=str(blobs(tmp_path)), backbone="mlp", algorithm=f"{toys}:by_group", groups=groups, rounds=4, clients=8,
        clients_per_round=4, min_size=1,
    )  # fmt: skip
    run = fedsim.run(setting, out=tmp_path / "run", quiet=True)
    words = (
        f"cost --backbone mlp --algorithm {toys}:by_group --rounds 4 --clients 8 --clients-per-round 4 --input-shape 6"
    )
    assert cli.main([*words.split(), "--classes", "3", "--json", "--rules", "--groups", *groups]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert cli.main([*words.split(), "--classes", "3", "--groups", *groups]) == 0
    assert "small(peft='head'" in capsys.readouterr().out
    found = cost.cost(setting, 3, input_shape=(6,))
    assert {k: v for k, v in row.items() if k != "rules"} == json.loads(json.dumps(found._asdict()))
    last, summary = run.rounds[-1], run.summary or {}
    assert (last["bytes_up"], last["bytes_down"]) == (row["round_bytes_up"], row["round_bytes_down"])
    assert (last["total_bytes_up"], last["total_bytes_down"]) == (row["run_bytes_up"], row["run_bytes_down"])
    assert row["bytes_up_range"][0] < row["bytes_up"] < row["bytes_up_range"][1] and row["members"] == 4
    frozen = sum(
        leaf["parameters"] for leaf in row["rules"] if (leaf["path"][:6], leaf["rule"]) == ("small/", "frozen")
    )
    assert row["setup_bytes"] == round(4 * frozen * 2 / 8), "given to a quarter of the clients; the large one sends all"
    assert row["run_setup_bytes"] == 2 * 4 * frozen >= sum(line["setup_bytes"] for line in run.rounds) > 0
    assert row["trainable_parameters"] == summary["parameters"]["trained"] and row["peft"] == "bias"
    assert 16 * row["full_bytes"] == summary["full_fine_tuning_bytes"]["up"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"groups": ("a(share=0.5)", "b(share=0.5)")}, "to fit algorithm='fed_avg', which trains one: leave out --groups"),
        ({"algorithm": "TOYS:by_group"}, "which trains several architectures: describe them by --groups"),
        ({"algorithm": "TOYS:at_once", "groups": ("a(share=0.5)", "b(share=0.5)")}, "an exchange with one of the groups, a, b"),
    ],
)  # fmt: skip
def test_groups_that_do_not_fit_are_refused_as_by_a_run(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    toys = tmp_path / "toys.py"
    shared = (Path(__file__).parents[1] / "algorithms" / "toys.py").read_text()
    toys.write_text(shared + AT_ONCE)
    if "algorithm" in changes:
        changes = {**changes, "algorithm": changes["algorithm"].replace("TOYS", str(toys))}
    with pytest.raises(ValueError, match=re.escape(said)):
        cost.cost(Config(backbone="mlp", peft="full", **changes), 3, input_shape=(6,))


# An algorithm of several architectures that asks them all at once.
AT_ONCE = """

def at_once(task):
    def round(key, held, server, cohort):
        return cohort.exchange(server, None, None), {}

    return by_group(task)._replace(round=round)
"""


@pytest.fixture
def small_vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a ViT of the table for 20 px, a checkpoint learned at 12 px, and images."""
    config = VitConfig(width=16, depth=2, heads=4, hidden=24, patch=4, image=20)
    monkeypatch.setitem(BACKBONES, "small", Row("image", Vit, config, formats=BACKBONES["vit_b16"].formats))
    y = np.arange(60) % 3
    np.savez(
        tmp_path / "images.npz", x=np.random.default_rng(0).integers(0, 255, (60, 20, 20, 3)).astype(np.uint8), y=y
    )
    return {"dataset": str(tmp_path / "images.npz"), "backbone": "small", "weights": str(FIXTURES / "vit")}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head_rounds"), [("full", 0), ("bias", 1)])
def test_a_checkpoint_with_its_own_positions_counts_as_in_its_run(
    kind: str,
    head_rounds: int,
    small_vit: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    compile_once: None,
) -> None:
    """9 + 1 positions in the place of 25 + 1: in the trained part, in what a client is given once, and in full fine-tuning."""
    config = Config(
        **small_vit, peft=kind, head_rounds=head_rounds, rounds=2, clients=4, clients_per_round=2, min_size=1
    )
    run = fedsim.run(config, out=tmp_path / "run", quiet=True)
    summary = run.summary or {}
    found = dry_run(config, run.speed)
    capsys.readouterr()
    monkeypatch.setattr(load, "_read", lambda *args: pytest.fail("a value was read"))
    row = cost.cost(config, 3)

    last = run.rounds[-1]
    for e, line in zip(found, (run.rounds[0], last)[-len(found) :], strict=True):
        assert (e.up.together, e.down.together) == (line["bytes_up"], line["bytes_down"])
        assert (2 * e.up.mean, 2 * e.down.mean) == (line["bytes_up"], line["bytes_down"])
    assert (found[-1].trained, found[-1].frozen) == tuple(summary["parameters"][n] for n in ("trained", "frozen"))
    assert found[-1].full == row.full_bytes and 4 * row.full_bytes == summary["full_fine_tuning_bytes"]["up"]
    assert 2 * found[0].setup == 2 * row.setup_bytes == run.rounds[0]["setup_bytes"]
    assert row.trainable_parameters == summary["parameters"]["trained"]
    assert (row.round_bytes_up, row.run_bytes_up) == (last["bytes_up"], last["total_bytes_up"])
    positions = next(leaf for leaf in cost.rules(config, 3) if leaf.path == load.POSITION)
    assert (positions.shape, positions.rule) == ((10, 16), "full" if kind == "full" else "frozen")

    table = cost.cost(config.replace(weights=None), 3)
    assert table.full_bytes - row.full_bytes == 4 * 16 * (26 - 10)
    assert cost.cost(config.replace(weights="random"), 3) == table


def test_weights_of_a_row_are_compared_and_not_fetched(
    small_vit: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line, where each row is of the same file."""
    argv = f"cost --backbone small --weights {small_vit['weights']} --peft full bias --classes 3 --json".split()
    assert cli.main(argv) == 0
    full, bias = json.loads(capsys.readouterr().out)
    table = cost.cost(Config(backbone="small", peft="full"), 3)
    assert full["bytes_up"] == bias["full_bytes"] == 4 * (table.total_parameters - 16 * 16)
    for weights, backbone, message in (
        (tmp_path / "none.safetensors", "small", "to be a file or a directory"),
        (small_vit["weights"], "vit_b16", "choose the backbone that it is of"),
        (small_vit["weights"], "mlp --input-shape 6", "to be 'random'; it has no checkpoint"),
    ):
        assert cli.main(f"cost --peft full --weights {weights} --backbone {backbone}".split()) == 2
        assert message in capsys.readouterr().err


WITH_BODY = ["resnet18", *sorted(set(BACKBONES) - {"linear", "resnet18"})]  # "linear" has nothing but the head


@pytest.mark.parametrize("name", brief(WITH_BODY, 9))
def test_full_fine_tuning_sends_what_it_is_compared_with(name: str) -> None:
    """Batch norm's statistics are neither trained nor sent, so they count in no total."""
    row = cost.cost(
        Config(backbone=name, peft="full"), 10, input_shape=(6,) if BACKBONES[name].kind == "array" else None
    )
    assert row.bytes_up == row.full_bytes == 4 * row.total_parameters
    assert row.share == row.full_ratio == 1
    if name == "resnet18":
        assert row.total_parameters == 11_176_512 + 10 * 513
        assert row.setup_bytes == 2 * 4 * 4800  # two statistics for each of the 4,800 channels


def test_dtype_and_attached_leaves() -> None:
    half = cost.cost(Config(backbone="vit_tiny", peft="ffa_lora", rank=4), 3, dtype="bfloat16")
    whole = cost.cost(Config(backbone="vit_tiny", peft="ffa_lora", rank=4), 3)
    assert (2 * half.bytes_up, 2 * half.setup_bytes, 2 * half.full_bytes) == (
        whole.bytes_up,
        whole.setup_bytes,
        whole.full_bytes,
    )
    head = cost.cost(Config(backbone="vit_tiny", peft="head"), 3)
    assert whole.total_parameters == head.total_parameters
    assert whole.setup_bytes == head.setup_bytes + 2 * 2 * 32 * 4 * 4  # FFA-LoRA's A is frozen, and given once
    assert whole.options == {"rank": 4} and head.options == {}


def said(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["cost", *argv]) == 0
    return capsys.readouterr().out


def test_json_has_a_row_for_each_combination(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "--backbone vit_tiny bert_tiny --peft bias adapter --classes 3 5 --adapter-width 2 --json"
    rows = json.loads(said(argv.split(), capsys))
    assert [(r["backbone"], r["peft"], r["classes"]) for r in rows] == [
        (b, p, c) for b in ("vit_tiny", "bert_tiny") for p in ("bias", "adapter") for c in (3, 5)
    ]
    for r in rows:
        built = peft.build(r["backbone"], r["classes"], peft=r["peft"], adapter_width=2)
        assert r["trainable_parameters"] == cost.count(built.trained)
        assert r["bytes_up"] == r["bytes_down"] == 4 * r["trainable_parameters"]
        assert r["options"] == ({"adapter_width": 2} if r["peft"] == "adapter" else {})
        assert {"total_parameters", "setup_bytes", "dtype", "run_bytes_up", "run_bytes_down"} <= set(r)


def test_tables_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(["--backbone", "vit_tiny", "--peft", "lora", "--rank", "4", "--classes", "3", "--rules"], capsys)
    row = cost.cost(Config(backbone="vit_tiny", rank=4), 3)
    for part in (f"{row.bytes_up:,} B", f"{row.run_bytes_down:,} B", f"{row.total_parameters:,}", "MiB", "rank=4"):
        assert part in text
    assert "blocks/1/attention/value/lora_b" in text and "frozen" in text and "32x4" in text
    row = json.loads(said(["--backbone", "vit_tiny", "--peft", "lora", "--rules", "--json"], capsys))[0]
    assert {r["rule"] for r in row["rules"]} == {"head", "lora", "frozen"}


LORA = Config(backbone="vit_tiny", peft="lora", rank=4, clients=12, clients_per_round=6, rounds=5)


def test_a_row_is_of_the_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    """SCAFFOLD doubles both ways; ranks have a mean and a range; gossip costs every transmission; once a client as before."""
    plain = cost.cost(LORA, 3)
    double = cost.cost(LORA.replace(algorithm="scaffold", weighting="uniform"), 3)
    assert double.bytes_up == 2 * plain.bytes_up and double.run_bytes_down == 2 * plain.run_bytes_down
    assert double.full_ratio == pytest.approx((plain.full_ratio or 0) / 2) and double.setup_bytes == plain.setup_bytes

    mixed = cost.cost(LORA.replace(algorithm="het_lora(ranks=[1, 4])"), 3)
    less = plain.bytes_up - 4 * 3 * 2 * 2 * (32 + 32)  # three ranks less of two matrices in two blocks
    assert mixed.bytes_up_range == mixed.bytes_down_range == (less, plain.bytes_up)
    assert less < mixed.bytes_up == round(mixed.round_bytes_up / 6) < plain.bytes_up
    assert mixed.bytes_up_are == "exact"

    gossip = cost.cost(LORA.replace(algorithm="dfed_alt(personal=())"), 3)
    assert (gossip.bytes_up, gossip.bytes_down, gossip.members) == (2 * plain.bytes_up, 0, 12)
    assert gossip.run_bytes_up == 5 * 12 * 2 * plain.bytes_up

    argv = ["--backbone", "vit_tiny", "--rank", "4", "--algorithm", "het_lora(ranks=[1, 4], gamma=0.5)"]
    shown, row = said(argv, capsys), json.loads(said([*argv, "--json"], capsys))[0]
    assert row["bytes_up_are"] == row["bytes_down_are"] == "at most" and f"at most {row['bytes_up']:,} B" in shown
    assert row["bytes_up"] >= plain.bytes_up and "het_lora" in shown


def test_an_algorithm_whose_round_needs_numbers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from fedsim.algorithms.fed_avg import fed_avg\n"
        "def looks(task):\n"
        "    plain = fed_avg(task)\n"
        "    def round(key, held, server, cohort):\n"
        "        new, metrics = plain.round(key, held, server, cohort)\n"
        "        return (new if float(metrics['loss']) > 0 else server), metrics\n"
        "    return plain._replace(round=round)\n"
    )
    assert cli.main(["cost", "--backbone", "vit_tiny", "--algorithm", f"{file}:looks"]) == 2
    assert "to be priced by shapes, but its round reads values" in capsys.readouterr().err


@pytest.mark.slow
def test_a_huge_model_is_a_matter_of_seconds(environment: dict[str, str]) -> None:
    """ViT-H/14 has 2.5 GB of parameters; none of them is allocated."""
    code = (
        "import re, sys; from pathlib import Path; from fedsim.__main__ import main; "
        "main(['cost', '--backbone', 'vit_h14', '--classes', '100', '--peft', 'lora', 'full', '--json']); "
        # Of this process alone: getrusage's maximum is also that of the process that started it.
        "peak = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]; "
        "import jax; print(peak, len(jax.live_arrays()), file=sys.stderr)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lora, full = json.loads(done.stdout)
    assert full["trainable_parameters"] == full["total_parameters"] == 630_764_800 + 1281 * 100
    assert lora["trainable_parameters"] == 32 * 2 * 2 * 1280 * 8 + 1281 * 100
    kibibytes, arrays = map(int, done.stderr.split()[-2:])
    assert kibibytes < 1.5 * 2**20 and arrays < 10
    assert time.perf_counter() - began < 120  # 5 s alone; other work may run beside the tests


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--backbone vit_b1", "did you mean vit_b16"),
        ("--peft biass", "did you mean bias"),
        ("--targets querry", "Expected targets='querry' to match a linear layer (did you mean query?)"),
        ("--backbone resnet18", "no linear layer but the head"),
        ("--preset plain --rank 500", "Expected rank=500 <= 384, the rank of blocks/0/attention/query; lower it"),
        ("--backbone vit_b16 --image-size 225", "image_size=224, or another multiple of 16"),
        ("--backbone mlp --peft full", "Expected input_shape of backbone='mlp' to be given"),
        ("--backbone resnet18 --peft prompt", "to meet a transformer"),
        ("--classes 0", "Expected classes=0 > 0"),
        ("--classes", "Expected classes to have a value"),
        ("--peft bias --peft lora", "Expected --peft once; put all its values behind it"),
        ("--dtype float31", "did you mean float32"),
        ("--codec-up bfloat", "did you mean bfloat16"),
        ("--algorithm fed_av", "did you mean fed_avg"),
        ("--algorithm flora --peft bias", "give --peft lora"),
        ("--clients 5", "Expected clients_per_round=10 <= clients=5"),
        ("--backbone vit_b16 --pool pooler", "Expected pool='pooler' to be one of"),
    ],
)
def test_nonsense_is_refused_before_anything_is_allocated(
    argv: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(jax.live_arrays())
    assert cli.main(["cost", *argv.split()]) == 2
    assert message in capsys.readouterr().err
    assert len(jax.live_arrays()) == before


def test_a_decoder_of_billions_is_priced_from_shapes_alone() -> None:
    """LoRA r = 8 in query and value of 32 blocks, 4096 wide, 1024 of them keys and values; everything else is frozen."""
    priced = cost.cost(Config(task="language_model", backbone="llama3_8b", peft="lora"), 2)
    trained = 32 * 8 * ((4096 + 4096) + (4096 + 1024))
    assert (priced.trainable_parameters, priced.bytes_up, priced.bytes_down) == (trained, 4 * trained, 4 * trained)
    assert priced.total_parameters == 8_030_261_248 and priced.setup_bytes == 4 * 8_030_261_248
    assert priced.classes == 128_256, "tokens of the vocabulary"
