"""The sequential federated loop that people write in PyTorch, and a bare forward-backward pass; for `accelerator.py`.

    python benchmarks/accelerators/torch_loop.py '{"backbone": "vit_b16", "peft": "lora", "clients": 8, "steps": 2, "batch": 8}'

Runs in an environment that has torch and nothing of fedsim: compiles, says so, waits for a line of input, and prints one
line of JSON. Clients train one after the other: bfloat16 autocast, `torch.compile`, frozen matrices held in bfloat16, data
on the device, no synchronisation inside a round, parameters copied and averaged by `torch._foreach_*`. The loop is
compiled with CUDA graphs (`reduce-overhead`: on an H200 3.3 to 4.1 times as fast as without), the bare pass, whose kernels
are long, without. Texts are full, so attention needs no mask here.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

LR = 0.01
# width, depth, heads, hidden, patch (0: a text), vocabulary
SHAPES = {
    "vit_b16": (768, 12, 12, 3072, 16, 0),
    "vit_ti16": (192, 12, 3, 768, 16, 0),
    "minilm_l6": (384, 6, 12, 1536, 0, 30522),
    "vit_tiny": (32, 2, 2, 64, 4, 0),
    "bert_tiny": (32, 2, 2, 64, 0, 512),
}


class Block(nn.Module):
    """A transformer block, pre-norm (images) or post-norm (texts), with what PEFT attaches."""

    def __init__(self, width: int, heads: int, hidden: int, post_norm: bool, eps: float, o: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.post_norm, self.kind = heads, post_norm, o["peft"]
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        if self.kind == "lora":
            rank = o["rank"]
            self.scale = o["lora_alpha"] / rank
            self.a = nn.Parameter(0.02 * torch.randn(2 * rank, width))  # of query and value
            self.b = nn.Parameter(torch.zeros(2, width, rank))
        if self.kind == "adapter":
            self.adapter_down, self.adapter_up = (
                nn.Linear(*s) for s in ((width, o["adapter_width"]), (o["adapter_width"], width))
            )
        if self.kind == "prompt":
            self.prompt = nn.Parameter(0.02 * torch.randn(o["prompt_tokens"], width))

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        size, tokens, width = x.shape
        query, key, value = self.qkv(x).chunk(3, -1)
        if self.kind == "lora":
            low = (F.linear(x, self.a) * self.scale).chunk(2, -1)
            query, value = query + F.linear(low[0], self.b[0]), value + F.linear(low[1], self.b[1])
        query, key, value = (t.view(size, tokens, self.heads, -1).transpose(1, 2) for t in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(size, tokens, width))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(F.gelu(self.up(x)))
        return y + self.adapter_up(F.gelu(self.adapter_down(y))) if self.kind == "adapter" else y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[1]
        if self.kind == "prompt":
            x = torch.cat([x, self.prompt.to(x.dtype).expand(len(x), -1, -1)], 1)
        if self.post_norm:
            x = self.norm1(x + self.attention(x))
            x = self.norm2(x + self.mlp(x))
        else:
            x = x + self.attention(self.norm1(x))
            x = x + self.mlp(self.norm2(x))
        return x[:, :tokens]


class Transformer(nn.Module):
    """ViT (B, H, W, 3) uint8, or BERT (B, T) ids -> logits (B, classes)."""

    def __init__(self, o: dict[str, Any]) -> None:
        super().__init__()
        width, depth, heads, hidden, self.p, vocabulary = SHAPES[o["backbone"]]
        tokens = o["shape"][0] if vocabulary else 1 + (o["shape"][0] // self.p) ** 2
        eps = 1e-12 if vocabulary else 1e-6
        if vocabulary:
            self.token = nn.Embedding(vocabulary, width)
            self.first = nn.LayerNorm(width, eps)
        else:
            self.patch, self.cls = nn.Linear(self.p * self.p * 3, width), nn.Parameter(torch.zeros(1, 1, width))
            self.last = nn.LayerNorm(width, eps)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))  # and the type's, for a text
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, bool(vocabulary), eps, o) for _ in range(depth)))
        self.head = nn.Linear(width, o["classes"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.p == 0:
            return self.head(self.blocks(self.first(self.token(x) + self.position)).mean(1))
        size, n, p = len(x), x.shape[1] // self.p, self.p
        x = ((x.float() - 127.5) / 127.5).view(size, n, p, n, p, 3).transpose(2, 3).reshape(size, n * n, -1)
        x = torch.cat([self.cls.expand(size, -1, -1), self.patch(x)], 1) + self.position
        return self.head(self.last(self.blocks(x)[:, 0]))


def freeze(model: nn.Module, kind: str) -> list[torch.Tensor]:
    """What is trained, in float32; frozen matrices become bfloat16."""
    parts = {"bias": ("bias",), "lora": (".a", ".b"), "adapter": ("adapter_",), "prompt": (".prompt",)}[kind]
    trained = []
    for name, value in model.named_parameters():
        value.requires_grad = name.startswith("head.") or any(
            name.endswith(part) or (part == "adapter_" and part in name) for part in parts
        )
        if value.requires_grad:
            trained.append(value)
        elif value.ndim > 1 and not name.startswith("token"):
            value.data = value.data.bfloat16()
    return trained


def main(o: dict[str, Any]) -> dict[str, Any]:
    """Times rounds of the loop, and passes over `rows` examples."""
    o = {"classes": 100, "shape": [224, 224, 3], "rank": 8, "lora_alpha": 16.0, "adapter_width": 8} | o
    o = {"prompt_tokens": 10, "clients": 8, "steps": 2, "batch": 16, "repeats": 3, "rows": 0} | o
    o = {"compile": True, "examples": 1024} | o
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = Transformer(o).to(device)
    params = freeze(model, o["peft"])
    high = SHAPES[o["backbone"]][5] or 256
    dtype = torch.int64 if len(o["shape"]) == 1 else torch.uint8
    x = torch.randint(1, high, (o["examples"], *o["shape"]), dtype=dtype, device=device)
    y = torch.randint(0, o["classes"], (o["examples"],), device=device)

    def gradients(forward: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast(device, torch.bfloat16):
            logits = forward(x)
        return torch.autograd.grad(F.cross_entropy(logits.float(), y), params)

    def rows(i: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.arange(i * size, (i + 1) * size, device=device) % len(x)
        return x[at], y[at]

    def federated_round(forward: Any) -> None:
        start = [p.detach().clone() for p in params]
        total = [torch.zeros_like(p) for p in params]
        with torch.no_grad():
            copies = [p.data for p in params]
        for client in range(o["clients"]):
            torch._foreach_copy_(copies, start)
            for step in range(o["steps"]):
                given = rows(client * o["steps"] + step, o["batch"])
                torch._foreach_add_(copies, gradients(forward, *given), alpha=-LR)
            torch._foreach_add_(total, torch._foreach_sub(copies, start), alpha=1 / o["clients"])
        torch._foreach_copy_(copies, torch._foreach_add(start, total))

    def bare(forward: Any) -> None:
        gradients(forward, *rows(0, o["rows"]))

    def timed(run: Any, forward: Any) -> float:
        began = time.perf_counter()
        run(forward)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    results: dict[str, Any] = {"torch_errors": []}
    ready = []
    for name, run, mode in (("torch_loop", federated_round, "reduce-overhead"), ("torch_bare", bare, "default")):
        if run is bare and not o["rows"]:
            continue
        forward = torch.compile(model, mode=mode, dynamic=False) if o["compile"] else model
        try:
            first = timed(run, forward)
            timed(run, forward)  # what is compiled or captured at the second call
        except Exception as error:  # whatever a compiler raises; the other counts all the same
            results["torch_errors"].append({"name": name, "error": f"{type(error).__name__}: {error}"[-2000:]})
        else:
            ready.append((name, run, mode, forward, first))
        if device == "cuda":
            torch.cuda.empty_cache()
    print("ready to be timed", flush=True)
    sys.stdin.readline()
    for name, run, mode, forward, first in ready:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        timed(run, forward)
        seconds = [timed(run, forward) for _ in range(o["repeats"])]
        examples = o["rows"] if run is bare else o["clients"] * o["steps"] * o["batch"]
        results[name] = {
            "mode": mode if o["compile"] else "eager",
            "seconds": seconds,
            "first": first,
            "examples": examples,
            "examples_per_second": examples / sorted(seconds)[len(seconds) // 2],
            "peak_bytes": torch.cuda.max_memory_allocated()
            if device == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    return results | {
        "trained": sum(p.numel() for p in params),
        "torch": torch.__version__,
        "torch_device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
