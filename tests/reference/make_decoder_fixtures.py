"""Makes the small reference fixtures of decoders under tests/fixtures/backbones, as `make_fixtures.py` does for the others.

    python tests/reference/make_decoder_fixtures.py [DIRECTORY of SmolLM2, as `fedsim data fetch smollm2_135m` leaves it]

SmolLM2 itself is not copied: only losses, best tokens and an answer for texts of our own are kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from make_fixtures import FIXTURES, VERSIONS, padded_ids, randomise
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def decoders() -> None:
    """A two-layer LlamaForCausalLM with grouped queries, its output tied to its token embedding, and one with an output of its
    own in shards; a GPT-2."""
    llama = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 20,
        "rope_theta": 100.0,
        "rms_norm_eps": 1e-5,
        "attn_implementation": "eager",
    }
    sizes = {"vocab_size": 40, "n_positions": 20, "n_embd": 16, "n_layer": 2, "n_head": 4}
    gpt2 = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, attn_implementation="eager")
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=True)),
        "llama_untied": LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=False)),
        "gpt2": GPT2LMHeadModel(gpt2),
    }
    ids = padded_ids(6, 12, 40)
    tokens = torch.tensor(ids, dtype=torch.long)
    for name, model in models.items():
        randomise(model.eval(), seed=8)
        model.save_pretrained(FIXTURES / name, max_shard_size="8KB" if name == "llama_untied" else "1GB")
        (FIXTURES / name / "generation_config.json").unlink()  # nothing here generates
        with torch.no_grad():
            out = model(tokens, attention_mask=(tokens != 0).long())
        np.savez(FIXTURES / name / "expected.npz", ids=ids, logits=out.logits.numpy(), versions=np.array(VERSIONS))


PARAGRAPH = (
    "The lighthouse keeper climbed the stairs every evening to light the lamp. Ships far out at sea could see it through the "
    "fog, and their captains knew how far they were from the rocks. In winter the wind shook the windows, and the keeper read "
    "old letters by the stove until the morning came."
)
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


def smollm2(directory: Path) -> None:
    """What transformers makes of the packaged decoder: losses and best next tokens of a paragraph, and an answer."""
    model = LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    tokenizer.chat_template = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    ids = torch.tensor([tokenizer(PARAGRAPH)["input_ids"]])
    asked = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    question = torch.tensor([tokenizer(asked)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0]
        answer = model.generate(question, max_new_tokens=16, do_sample=False, pad_token_id=2)[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    np.savez(
        FIXTURES / "smollm2_135m.npz",
        paragraph=np.array(PARAGRAPH),
        ids=ids.numpy().astype(np.int32),
        losses=losses.numpy(),
        best=logits.argmax(-1).numpy().astype(np.int32),
        asked=np.array(asked),
        question=question.numpy().astype(np.int32),
        answer=answer[question.shape[1] :].numpy().astype(np.int32),
        said=np.array(tokenizer.decode(answer[question.shape[1] :])),
        versions=np.array(VERSIONS),
    )


if __name__ == "__main__":
    decoders()
    if len(sys.argv) > 1:
        smollm2(Path(sys.argv[1]))
