"""Everything that can be set, as frozen dataclasses: what is simulated (`Config`) apart from how fast (`Speed`).

No JAX here, so that `fedsim --help` and every check of the options are immediate. `Config` is flat in Python
(`Config(peft="lora", rank=4)`) and on the command line (`--peft lora --rank 4`); its base classes only group the
options for the reader and for `--help`. Values that come from a library are written as a call in a string: any optax
optimizer as `"adamw(weight_decay=0.01)"`, any optax schedule as `"cosine_decay_schedule(1.0, 20)"`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from fedsim.config import older
from fedsim.config.checks import PartitionLaw, check
from fedsim.config.fields import gate
from fedsim.config.limits import in_range
from fedsim.config.privacy import Accountant, Mechanism, Relation, Sampling
from fedsim.config.words import require_known


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is learned from, and how it is spread over the clients."""

    dataset: str = "20newsgroups"
    """Packaged name (`fedsim data list`), `tfds:NAME`, `hf:NAME`, a folder of images by class, a file (.csv, .jsonl,
    .parquet, .npz), or `arrays` for those given to `fedsim.run` (docs/data.md)."""
    accept_licence: str | None = None
    """Name of a licence that you accept; some packaged sets are neither fetched nor read without it (default: none)."""
    data_dir: str | None = None
    """Where TFDS looks for prepared sets (default: TFDS' own)."""
    text_column: str = "text"
    """Column or feature with the input: of a table its text; a TFDS set's `image` is found by itself."""
    label_column: str = "label"
    """Column or feature with the class."""
    client_column: str | None = None
    """Column or feature that names the client of an example (author, writer, episode), for a partition by clients
    (default: none)."""
    domain_column: str | None = None
    """Column or feature that names the domain of an example (camera, hospital), for `partition=domain` (default: none)."""
    image_store: int | None = None
    """Side to which images are resized once, when they are read: the shorter side, then the centre is cut out (default:
    they stay as they are, and must be of one size)."""
    tokens: int = 32
    """Length to which texts are cut or padded, special tokens included."""
    turns: Literal["template", "plain"] = "template"
    """How conversations are written: by the model's chat template, or prompt and completion one after the other."""
    loss_on: Literal["answers", "all"] = "answers"
    """Tokens of conversations that a language model learns: those of answers, or all."""
    too_long: Literal["cut", "refuse"] = "cut"
    """What becomes of conversations with more than `tokens` tokens."""
    packing: bool = False
    """Texts of a language model, one behind the other, in windows of `tokens` (docs/language_models.md), in place of one
    text a row, cut or padded."""
    validation: float = 0.1
    """Share of the training examples held out for every choice (where the set has no validation split)."""
    examples: int | None = None
    """Keep only this many training examples, drawn by seed (default: all)."""
    public_share: float = 0.0
    """Share of the training examples that the server holds without their labels (`cohort.public`); no client has them."""
    server_share: float = 0.0
    """Share of the training examples that the server holds with their labels (`cohort.shard`); no client has them."""
    clients: int = 100
    """Number of clients N."""
    partition: PartitionLaw = "dirichlet"
    """How training examples go to clients (docs/partitions.md): by label, by size, by the set's own key (`natural`: its
    clients; `domain`: each client in one domain, such as ELPV's two cell types), or at random."""
    alpha: float = 0.3
    """Concentration of the Dirichlet partitions over labels; smaller is more skewed."""
    classes_per_client: int = 2
    """Shards of a client under `shards`, and the most classes that it can have."""
    size_law: str = "lognormal(sigma=1.0)"
    """Sizes of clients under `quantity`: `"lognormal(sigma=1.0)"`, or `"power(exponent=1.5)"` of a client's rank."""
    min_size: int = 8
    """Every client has at least this many examples, those of its local test set included; 0 allows empty clients."""
    local_test: float = 0.0
    """Share of each client's examples that is held out as its own test set and never trained on."""
    seed: int = 0
    """Seed of everything: splits, partition, cohorts, batches, initial values."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The frozen backbone and the small part of it that is trained and travels."""

    task: Literal["classification", "language_model"] = "classification"
    """What the model answers: the class of an input, or each next token of a text (docs/language_models.md)."""
    backbone: str = "minilm_l6"
    """Name of a backbone (`fedsim list backbones`), or `file.py:name` of your own (docs/own_model.md)."""
    weights: str | None = None
    """File, directory or hub name with its checkpoint; `random` for none (default: the packaged weights)."""
    pool: Literal["mean", "cls", "pooler"] | None = None
    """Features of a transformer that the head reads (default: the backbone's own)."""
    image_size: int | None = None
    """Side to which images are resized inside the backbone (default: as they are)."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized; both are antialiased when the image shrinks."""
    peft: str = "lora"
    """What is trained beside the classification head (`fedsim list peft`), parts joined by `+`; `full` is everything,
    `head` nothing else."""
    rank: int = 8
    """LoRA rank r."""
    lora_alpha: float = 16.0
    """LoRA scale is lora_alpha / rank."""
    targets: tuple[str, ...] = ("query", "value")
    """Linear layers that LoRA adapts: path patterns, `*` allowed."""
    rslora: bool = False
    """LoRA scale is lora_alpha / sqrt(rank)."""
    dora: bool = False
    """LoRA with a trained length per output of the adapted matrix."""
    adapter: Literal["single", "houlsby", "parallel"] = "single"
    """Adapters: one per block after its MLP, two per block (after attention too), or one beside the MLP (AdaptFormer)."""
    adapter_width: int = 8
    """Width of an adapter's bottleneck."""
    prompt_tokens: int = 10
    """Trained tokens of a prompt."""
    prompt_depth: Literal["deep", "shallow"] = "deep"
    """A prompt of its own for every block, or one that enters the first block and stays."""
    prefix_tokens: int = 10
    """Trained keys and values in every attention."""
    bias_patch: bool = True
    """Whether `bias` trains the bias of the patch embedding too."""
    last_blocks: int = 1
    """Blocks at the top that `last_k` trains."""
    head_rounds: int = 0
    """Rounds at the start that train the head alone, from cached features, before the PEFT part joins (LP-FT)."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Rounds, cohorts and both optimizers."""

    algorithm: str = "fed_avg"
    """Name (`fedsim list algorithms`) or `file.py:function`, with options as a call: `"fed_prox(mu=0.1)"`."""
    groups: tuple[str, ...] = ()
    """Several architectures at once, for algorithms that train such: a call for each with its model's options and its share
    of the clients, `"small(backbone='mlp', share=0.5)"`; without a share the server alone has it (docs/own_algorithm.md)."""
    rounds: int = 20
    """Communication rounds in all, head_rounds included."""
    clients_per_round: int = 10
    """Cohort size M, drawn without replacement."""
    epochs: int = 1
    """Passes of a client over its examples in a round."""
    steps: int | None = None
    """Exact number of local steps instead of epochs (default: as many as the epochs take)."""
    batch_size: int = 8
    """Examples in a local step."""
    augment: tuple[str, ...] = ()
    """Random changes of images in training: `flip`, `"crop(padding=4)"`, `"resized_crop(scale=0.08)"`, in this
    order (default: none)."""
    optimizer: str = "adam"
    """Clients' optax optimizer, as a name or a call: `"sgd(momentum=0.9)"`."""
    lr: float = 2e-3
    """Clients' learning rate in round 1."""
    lr_schedule: str = "constant_schedule(1.0)"
    """optax schedule over rounds; multiplies lr."""
    head_lr: float | None = None
    """Clients' learning rate in the head_rounds (default: lr)."""
    server_optimizer: str = "sgd"
    """Server's optax optimizer on the mean update; `sgd` with server_lr 1 is plain FedAvg."""
    server_lr: float = 1.0
    """Server's learning rate."""
    server_lr_schedule: str = "constant_schedule(1.0)"
    """optax schedule over rounds; multiplies server_lr."""
    weighting: Literal["examples", "uniform"] = "examples"
    """Weight of a client in the mean; under dp every client counts alike."""
    codec_up: str = "none"
    """How clients' messages are coded on the wire: `bfloat16`, `"qsgd(4)"`, `"topk(0.01)"`, several with + between them;
    `fedsim list codecs` names them (docs/codecs.md)."""
    codec_down: str = "none"
    """How the server's messages are coded: values by `bfloat16`, `"quantise(8)"`, `"eden(4)"`; where every client is in every
    round, what has changed since the message before by `"topk(0.1)"` and others that act on changes (docs/codecs.md)."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Which clients take part and how long it takes them (docs/network.md); laws are numbers, `uniform(5, 50)`,
    `lognormal(median=20, sigma=0.5)` or `choice(5, 20, 100)`, drawn once for each client."""

    availability: str = "always"
    """Who can be reached in a round: `always`, `"bernoulli(p=0.8)"`, `"diurnal(period=24, peak=0.9, low=0.1)"` (a wave
    over rounds, each client with a phase of its own), or a .csv trace with columns client, start, end (rounds)."""
    dropout: float = 0.0
    """Probability that a client of the cohort drops out in mid-round: its download is paid, nothing returns."""
    over_selection: float = 1.0
    """Invite this many times clients_per_round; the first clients_per_round that report count."""
    deadline: float | None = None
    """Simulated seconds after which a round ends (default: none)."""
    late: Literal["discard", "partial"] = "discard"
    """Clients that cannot be ready by the deadline are left out, or report after the local steps that fit."""
    download: str | None = None
    """Law of the clients' bandwidth from the server in Mbit/s (default: takes no time)."""
    upload: str | None = None
    """Law of the clients' bandwidth to the server in Mbit/s (default: takes no time)."""
    latency: str | None = None
    """Law of the time of every message on its way in ms (default: none)."""
    compute: str | None = None
    """Law of the clients' local steps per second (default: take no time)."""
    device_table: str | None = None
    """A .csv with a row for each client: client, and any of download, upload, latency, compute instead of their laws
    (default: none)."""

    @property
    def timed(self) -> bool:
        """Whether anything takes simulated time."""
        return any((self.download, self.upload, self.latency, self.compute, self.device_table))

    @property
    def traced(self) -> bool:
        """Whether a file says who can be reached."""
        return self.availability.lower().endswith(".csv")

    @property
    def reliable(self) -> bool:
        """Whether every client takes part and nothing takes simulated time."""
        return self.availability == "always" and not self.dropout and self.over_selection == 1 and not self.timed


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """When to look at the validation set, and when to stop."""

    eval_every: int = 1
    """Rounds between evaluations on the validation set; the last round is always evaluated. The test set is read once, at the end."""
    metric: str | None = None
    """Score on the validation set that judges the run (docs/evaluation.md; default: accuracy, of a language model
    perplexity)."""
    target: float | None = None
    """Stop once the metric reaches this value: from below, but a loss or perplexity from above (default: never)."""
    personal_epochs: int = 0
    """At the end also tune the global model on each client's own examples, this many epochs, before its local test."""
    personal_lr: float | None = None
    """Learning rate of that tuning (default: lr)."""
    eval_clients: int = 1000
    """Most clients whose local tests (`local_test`) are read at the end; more are drawn by seed."""
    patience: int | None = None
    """Stop after this many evaluations without a better value of the metric (default: never)."""


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """Differential privacy, simulated (docs/privacy.md): what of one client, or one example, the trained model can tell."""

    dp: Mechanism = "none"
    """Where what is clipped gets its noise: `central`, on the sum of changes at the server; `local`, on each client's change;
    `example`, on the gradients of each local step (DP-SGD). Every client then counts alike."""
    epsilon: float | None = None
    """The budget of the whole run: it gives the noise multiplier, or with one given ends the run before it is overspent
    (default: none)."""
    delta: float | None = None
    """The delta of (epsilon, delta), below one over the number of clients or examples (default: none, needed with dp)."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise over clip_norm (default: the least that keeps epsilon)."""
    clip_norm: float = 1.0
    """Norm to which each change, or each example's gradient, is cut down."""
    clip_quantile: float | None = None
    """Under dp=central the share of changes that the norm leaves uncut: from clip_norm on it follows a noisy count of
    them, paid from the same budget (default: the norm is fixed)."""
    per_layer: bool = False
    """Cut each of K leaves to clip_norm / sqrt(K) instead of all together."""
    bands: int = 1
    """Under dp=central b cohorts that come round in order, and noise that is correlated over b rounds, which takes part of it away
    again (DP-FTRL by banded matrix factorisation; 1: noise of its own in every round)."""
    sampling: Sampling = "poisson"
    """How clients come into a round: each by itself with chance clients_per_round / clients, or a fixed number of them."""
    relation: Relation | None = None
    """What neighbouring data sets differ by (default: by dp and sampling)."""
    accountant: Accountant | None = None
    """Privacy loss distributions, or Renyi differential privacy (default: by the sampling)."""


@dataclass(frozen=True, kw_only=True)
class Config(Data, Model, Training, Network, Evaluation, Privacy):
    """What is simulated. Two runs with equal `Config` and `Speed` on the same machine give the same bits."""

    def __post_init__(self) -> None:
        check(self)

    def replace(self, **changes: Any) -> Config:
        """A copy with some options changed; checked like a new one.

        Raises:
            ValueError: an unknown option (the nearest ones are named) or an impossible value.
        """
        require_known(changes, [f.name for f in dataclasses.fields(self)], "option")
        return dataclasses.replace(self, **changes)

    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON of all options (`older.hashed`)."""
        text = json.dumps(older.hashed(vars(self)), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast it is simulated: no option here but the precision changes a result beyond float summation order."""

    lanes: int | Literal["auto"] = "auto"
    """Clients that train side by side on one device."""
    devices: int | None = None
    """Local devices to use; a CPU is divided into so many, which share its cores (default: all; two of a CPU)."""
    parallel: Literal["shard_map", "pmap"] = "shard_map"
    """How lanes are spread over devices."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward pass; trained parameters, optimizers, messages and losses are float32 in both."""
    remat: Literal["none", "blocks", "dots"] = "none"
    """What the backward pass computes again to save memory: nothing, all within a block, all but products with weights."""
    resident: Literal["auto", "on", "off"] = "auto"
    """Keep the examples on the device; off leaves them on the host, from which batches are sent ahead of their use."""
    cache: Literal["auto", "on", "off"] = "auto"
    """Compute the frozen layers below the first trained one once and keep their output as the data set."""
    segment_steps: int | Literal["auto"] = "auto"
    """Steps of the plan that one call of the compiled program runs."""
    length_buckets: int = 4
    """Lengths for which programs over texts are compiled at most, so that short texts do not pay for long ones."""
    eval_batch: int | Literal["auto"] = "auto"
    """Examples in one evaluation step (auto: 64 on a CPU, whose caches a larger one leaves, 256 elsewhere)."""
    checkpoint_every: int = 5
    """Rounds between checkpoints; the last round is always saved."""
    keep_checkpoints: int | None = None
    """Checkpoints that stay in the run's folder, the newest; 0 keeps none once the run is over (default: three)."""
    compilation_cache: bool = True
    """Keep compiled programs on disk between runs."""

    def __post_init__(self) -> None:
        gate(self)
        in_range(self)
        if self.keep_checkpoints is not None and self.keep_checkpoints < 0:
            raise ValueError(f"Expected keep_checkpoints={self.keep_checkpoints} >= 0; 0 keeps none after the end.")


GROUPS: tuple[type, ...] = (Data, Model, Training, Network, Evaluation, Privacy)

RELIABLE: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Network)}  # all are there, nothing takes time

# What `fedsim run` does without an option: head first from cached features, then LoRA in the upper third of MiniLM, whose
# lower four blocks are evaluated once per text (experiments/main_job.py has time and result).
MAIN_JOB: dict[str, Any] = {
    "targets": ("blocks/[45]/attention/query", "blocks/[45]/attention/value", "blocks/[45]/mlp/*"),
    "head_rounds": 400,
    "head_lr": 5e-3,
    "rounds": 440,
    "steps": 4,
    "batch_size": 16,
    "lr": 8e-3,
    "lr_schedule": "linear_schedule(1.0, 0.1, 40, 400)",  # constant for the head, then down to a tenth
    "eval_every": 5,
}


# Learning rates of other PEFT kinds in the main job, whose own is LoRA's: each chosen once, on validation
# (`python experiments/peft_rates.py`; docs/peft.md has the table).
RATES: dict[str, float] = {
    "adapter": 3.2e-2,
    "full": 1e-4,
    "ia3": 3.2e-2,
    "last_k": 5e-4,
    "prefix": 2e-3,
    "prompt": 5e-4,
}


def main_job(**changes: Any) -> Config:
    """The config of `fedsim run` without an option, with some options changed.

    Another PEFT kind gets its own learning rate (`RATES`), unless `lr` is among the changes.

    Raises:
        ValueError: an unknown option or an impossible value.
    """
    rate = {"lr": RATES[changes["peft"]]} if changes.get("peft") in RATES else {}
    return Config().replace(**{**MAIN_JOB, **rate, **changes})


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Options in which two configs differ: name -> (value in a, value in b)."""
    fields = [f.name for f in dataclasses.fields(a)]
    return {f: (getattr(a, f), getattr(b, f)) for f in fields if getattr(a, f) != getattr(b, f)}
