"""A run on conversations from a folder as Hugging Face's library saves one: weights, tokenizer, chat template; and its answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import fedsim
from fedsim.backbones import BACKBONES, decoder_row
from fedsim.backbones.decoder import DecoderConfig
from fedsim.config import Config, Speed
from fedsim.simulation import build

pytestmark = pytest.mark.usefixtures("compile_once")

LLAMA = Path(__file__).parents[1] / "fixtures" / "backbones" / "llama"
SPEED = Speed(devices=1, lanes=2)
WORDS = ["<pad>", "<s>", "</s>", "user", "assistant", "what", "says", "the", "cat", "dog", "meow", "bark"]
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m.role + ' ' + m.content + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    c = DecoderConfig("llama", 40, 16, 2, 4, 2, 24, positions=20, theta=100.0, pad=-1)
    monkeypatch.setitem(BACKBONES, "small", decoder_row(c, ("llama",)))
    folder = tmp_path / "model"
    shutil.copytree(LLAMA, folder)
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    rows = []
    for i in range(60):
        asked, said = (("what says the cat", "meow"), ("what says the dog", "bark"))[i % 2]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        rows.append(json.dumps({"messages": turns, "who": ["anna", "bert", "carl"][i % 3]}) + "\n")
    (tmp_path / "talks.jsonl").write_text("".join(rows))
    return Config(
        task="language_model", backbone="small", weights=str(folder), dataset=str(tmp_path / "talks.jsonl"), tokens=16,
        partition="natural", client_column="who", clients=3, clients_per_round=3, rounds=3, steps=10, batch_size=8, peft="full",
        lr=0.03, min_size=2,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_learns_answers_and_gives_them(config: Config, tmp_path: Path) -> None:
    problem = build.problem(config, SPEED)
    ids, loss = problem.dataset.x["ids"][0], problem.dataset.x["loss"][0]
    assert [WORDS[at] for at in ids[loss > 0]] in (["meow", "</s>"], ["bark", "</s>"]) and ids.min() == -1
    run = fedsim.run(config, SPEED, out=tmp_path / "run", quiet=True, problem=problem)
    assert (run.summary or {})["final"]["test"]["perplexity"] < 1.3
    assert run.generate(["what says the dog", "what says the cat"], tokens=4, chat=True) == ["bark", "meow"]
    assert run.choose("what says the dog", ["meow", "bark"], chat=True) == "bark"
    marks = Path(config.weights or "") / "tokenizer_config.json"
    assert run.about["files"]["chat_template"].keys() == {"sha256"}
    marks.write_text(json.dumps({"chat_template": TEMPLATE + " "}))
    with pytest.raises(
        ValueError,
        match=r"Expected sha256=.* of .*tokenizer_config.json, the chat_template of .*bring the old one back",
    ):
        run.generate("what says the dog", tokens=4, chat=True)
