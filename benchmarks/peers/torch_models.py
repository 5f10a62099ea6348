"""The three models in torch, with the parameter names of `workloads.weights`, for the systems that train torch models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import workloads
from torch import Tensor, nn
from workloads import BERT_EPS, EPS, LORA_SCALE, PATCH, POSITIONS, RANK, Workload


class Cnn(nn.Module):
    """Images (B, 28, 28, 1), bytes -> logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.dense, self.head = nn.Linear(64 * 12 * 12, 128), nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2).float() / 255
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return self.head(F.relu(self.dense(x.flatten(1))))


class Lora(nn.Module):
    """LoRA on queries and values, and what the heads read."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for part in ("q", "v"):
            self.register_parameter(f"{part}_a", nn.Parameter(torch.empty(width, RANK)))
            self.register_parameter(f"{part}_b", nn.Parameter(torch.empty(RANK, width)))

    def attended(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, T, D) of each -> (B, T, D)."""
        q = q + (x @ self.q_a * LORA_SCALE) @ self.q_b
        v = v + (x @ self.v_a * LORA_SCALE) @ self.v_b
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(Lora):
    """The ViT's self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attended(x, *self.qkv(x).chunk(3, dim=-1)))


class Mlp(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=EPS), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=EPS), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    """The patch embedding, under the name that checkpoints give it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)


class Vit(nn.Module):
    """Images (B, image, image, 3), bytes -> logits of the class token."""

    def __init__(self, w: Workload) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, w.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (w.image // PATCH) ** 2, w.width))
        self.patch_embed = Patches(w.width)
        self.blocks = nn.Sequential(*(Block(w.width, w.heads) for _ in range(w.depth)))
        self.norm, self.head = nn.LayerNorm(w.width, eps=EPS), nn.Linear(w.width, w.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x.permute(0, 3, 1, 2).float() / 127.5 - 1).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x)[:, 0]))


class BertAttention(Lora):
    """BERT's self-attention without the layer behind it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.attended(x, self.query(x), self.key(x), self.value(x))


def output(inputs: int, width: int) -> nn.ModuleDict:
    """The layer and the norm that end each half of a BERT block."""
    return nn.ModuleDict({"dense": nn.Linear(inputs, width), "LayerNorm": nn.LayerNorm(width, eps=BERT_EPS)})


class BertBlock(nn.Module):
    """Post-norm transformer block, its parts under the names that checkpoints give them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": BertAttention(width, heads), "output": output(width, width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = output(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        after = self.attention["output"]
        x = after["LayerNorm"](x + after["dense"](self.attention["self"](x)))
        y = F.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](x + self.output["dense"](y))


class Bert(nn.Module):
    """Token ids (B, T) -> logits of the tokens' mean."""

    def __init__(self, w: Workload) -> None:
        super().__init__()
        tables = {"word": w.vocabulary, "position": POSITIONS, "token_type": 2}
        self.embeddings = nn.ModuleDict({f"{n}_embeddings": nn.Embedding(rows, w.width) for n, rows in tables.items()})
        self.embeddings["LayerNorm"] = nn.LayerNorm(w.width, eps=BERT_EPS)
        self.encoder = nn.ModuleDict({"layer": nn.Sequential(*(BertBlock(w.width, w.heads) for _ in range(w.depth)))})
        self.head = nn.Linear(w.width, w.classes)

    def forward(self, x: Tensor) -> Tensor:
        e = self.embeddings
        position, kind = e["position_embeddings"].weight[: x.shape[1]], e["token_type_embeddings"].weight[0]
        x = e["LayerNorm"](e["word_embeddings"](x) + position + kind)
        return self.head(self.encoder["layer"](x).mean(dim=1))


def device_of(platform: str) -> torch.device:
    """Where a torch system computes. On a GPU float32 products are taken in TF32, which is JAX's default there."""
    if platform != "gpu":
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    return torch.device("cuda")


def wait(device: torch.device) -> None:
    """Until the device has computed what it was given: a GPU's kernels run behind the program."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def model(w: Workload) -> nn.Module:
    """The workload's model with its initial weights; only what is trained requires a gradient."""
    trained, frozen = workloads.weights(w)
    made = {"cnn": lambda w: Cnn(w.classes), "vit": Vit, "bert": Bert}[w.model](w)
    made.load_state_dict({name: torch.from_numpy(value) for name, value in {**trained, **frozen}.items()})
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name in trained)
    return made


def trained(made: nn.Module) -> dict[str, nn.Parameter]:
    """What travels, by name."""
    return {name: p for name, p in made.named_parameters() if p.requires_grad}


def numpy(parameters: dict[str, Tensor]) -> workloads.Arrays:
    """Copies for `driver.Stopwatch.finish`."""
    return {name: p.detach().cpu().numpy().copy() for name, p in parameters.items()}
