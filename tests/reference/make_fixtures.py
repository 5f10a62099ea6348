"""Makes the small reference fixtures under tests/fixtures/backbones with torch and transformers.

They are committed; run this only to renew them, in an environment with the reference libraries, which no test needs:

    pip install torch==2.13.0 transformers safetensors tokenizers
    python tests/reference/make_fixtures.py [DIRECTORY of MiniLM: model.safetensors, config.json, tokenizer.json]

Two-layer models with random weights prove each format on every machine. MiniLM itself is not copied: only its pooled
outputs for a few sentences of our own are kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from transformers import BertConfig, BertForSequenceClassification, BertModel

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"
VERSIONS = f"torch {torch.__version__}, transformers {transformers.__version__}"

SENTENCES = (
    "The shuttle was launched yesterday.",
    "Selling a mountain bike, barely used, new tyres; make me an offer!",
    "Why does my graphics card refuse to show more than 256 colours?",
    "goalie",
    "A federation averages what its members learn, and never sees what they learn from, which is the point of it, "
    "so this sentence is longer than the thirty-two tokens to which it will be cut.",
    "",
)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every leaf at random, LayerNorms too: a swapped or transposed leaf shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            noise = torch.randn(leaf.shape, generator=generator) * 0.3
            leaf.copy_(noise + 1 if "LayerNorm.weight" in name else noise)


def padded_ids(batch: int, tokens: int, vocabulary: int) -> np.ndarray:
    """Random ids (batch, tokens) of different lengths; 0 pads."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, vocabulary, (batch, tokens))
    for row, length in enumerate(rng.integers(1, tokens + 1, batch)):
        ids[row, length:] = 0
    return ids.astype(np.int32)


def mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over real tokens, as sentence-transformers pools: (B, T, D), (B, T) -> (B, D)."""
    weight = mask[..., None].float()
    return (hidden * weight).sum(1) / weight.sum(1)


def bert() -> None:
    """A two-layer BertModel (names without prefix, with pooler), and a classifier (names `bert.*`, with a head)."""
    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=20,
        attn_implementation="eager",
    )
    ids = padded_ids(6, 12, 60)
    tokens = torch.tensor(ids, dtype=torch.long)
    mask = (tokens != 0).long()
    for name, kind in (("bert", BertModel), ("bert_classifier", BertForSequenceClassification)):
        config.num_labels = 3
        model = kind(config).eval()
        randomise(model, seed=1)
        model.save_pretrained(FIXTURES / name, safe_serialization=True)
        with torch.no_grad():
            body = model if kind is BertModel else model.bert
            out = body(tokens, attention_mask=mask)
            expected = {
                "ids": ids,
                "mean": mean(out.last_hidden_state, mask).numpy(),
                "cls": out.last_hidden_state[:, 0].numpy(),
                "pooler": out.pooler_output.numpy(),
                "versions": np.array(VERSIONS),
            }
            if kind is BertForSequenceClassification:
                expected["logits"] = model(tokens, attention_mask=mask).logits.numpy()
        np.savez(FIXTURES / name / "expected.npz", **expected)


def minilm(directory: Path) -> None:
    """Pooled outputs of the published MiniLM for our sentences, cut or padded to 32 tokens."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding(length=32, pad_id=0)
    ids = np.array([encoded.ids for encoded in tokenizer.encode_batch(list(SENTENCES))], np.int32)
    tokens = torch.tensor(ids, dtype=torch.long)
    mask = (tokens != 0).long()
    model = BertModel.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = model(tokens, attention_mask=mask).last_hidden_state
    np.savez(
        FIXTURES / "minilm_l6.npz",
        sentences=np.array(SENTENCES),
        ids=ids,
        mean=mean(hidden, mask).numpy(),
        versions=np.array(VERSIONS),
    )


if __name__ == "__main__":
    FIXTURES.mkdir(parents=True, exist_ok=True)
    bert()
    if len(sys.argv) > 1:
        minilm(Path(sys.argv[1]))
