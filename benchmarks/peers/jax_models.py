"""The three models as pure JAX functions of `workloads.weights`' dicts, for FedJAX, DrJAX, the padded vmap and the judge.

`prepared` turns a torch model's layouts into those that JAX computes fastest with, once; `published` is its inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import workloads
from workloads import BERT_EPS, EPS, LORA_SCALE, PATCH, Workload

Params = Mapping[str, Any]
Apply = Callable[[Params, Params, Any], Any]
"""(trained, frozen, images (B, H, W, C) bytes or token ids (B, T)) -> logits (B, classes)."""


def prepared(w: Workload, arrays: workloads.Arrays) -> workloads.Arrays:
    """Kernels as (in, out), convolutions' as (height, width, in, out), for images with channels last; tables as they are."""

    def one(name: str, value: np.ndarray) -> np.ndarray:
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
            return value.reshape(-1, value.shape[-1]) if name.startswith("patch_embed") else value
        if name == "dense.weight":  # torch flattens channels first
            return value.reshape(-1, 64, 12, 12).transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
        return value.T if value.ndim == 2 and name.endswith(".weight") and "embeddings" not in name else value

    return {name: np.ascontiguousarray(one(name, value)) for name, value in arrays.items()}


def published(w: Workload, params: Params) -> workloads.Arrays:
    """The inverse of `prepared`, for trained parameters."""

    def one(name: str, value: np.ndarray) -> np.ndarray:
        if value.ndim == 4:
            return value.transpose(3, 2, 0, 1)
        if name == "dense.weight":
            return value.reshape(12, 12, 64, -1).transpose(3, 2, 0, 1).reshape(value.shape[1], -1)
        return value.T if value.ndim == 2 and name.endswith(".weight") else value

    return {name: one(name, np.asarray(value)) for name, value in params.items()}


def lax_conv(x: Any, kernel: Any) -> Any:
    """3x3 convolution without padding, by XLA's own."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def matmul_conv(x: Any, kernel: Any) -> Any:
    """The same as one matrix product over patches: under vmap over kernels XLA's own is a slow grouped convolution."""
    height, width = x.shape[1] - 2, x.shape[2] - 2
    patches = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def cnn(conv: Callable[[Any, Any], Any]) -> Apply:
    """The CNN; `conv` is one of the two above."""

    def apply(params: Params, frozen: Params, x: Any) -> Any:
        x = x.astype(jnp.float32) / 255
        for name in ("conv1", "conv2"):
            x = jax.nn.relu(conv(x, params[f"{name}.weight"]) + params[f"{name}.bias"])
        x = x.reshape(x.shape[0], 12, 2, 12, 2, 64).max(axis=(2, 4)).reshape(x.shape[0], -1)
        x = jax.nn.relu(x @ params["dense.weight"] + params["dense.bias"])
        return x @ params["head.weight"] + params["head.bias"]

    return apply


def norm(p: Params, name: str, x: Any, eps: float) -> Any:
    """LayerNorm."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps) * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(p: Params, name: str, x: Any) -> Any:
    """x W + b."""
    return x @ p[f"{name}.weight"] + p[f"{name}.bias"]


def attended(w: Workload, p: Params, name: str, x: Any, q: Any, k: Any, v: Any) -> Any:
    """What the heads read, with LoRA on queries and values; (B, T, D)."""
    q = q + (x @ p[f"{name}.q_a"] * LORA_SCALE) @ p[f"{name}.q_b"]
    v = v + (x @ p[f"{name}.v_a"] * LORA_SCALE) @ p[f"{name}.v_b"]
    q, k, v = (t.reshape(*t.shape[:-1], w.heads, -1) for t in (q, k, v))
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k))
    return jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(x.shape)


def vit(w: Workload) -> Apply:
    """The ViT, pre-norm, its class token read."""
    side = w.image // PATCH

    def apply(trained: Params, frozen: Params, x: Any) -> Any:
        p = {**frozen, **trained}
        x = x.astype(jnp.float32) / 127.5 - 1
        x = x.reshape(x.shape[0], side, PATCH, side, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
        x = linear(p, "patch_embed.proj", x.reshape(x.shape[0], side * side, -1))
        first = jnp.broadcast_to(p["cls_token"], (x.shape[0], 1, w.width))
        x = jnp.concatenate([first, x], axis=1) + p["pos_embed"]
        for i in range(w.depth):
            name = f"blocks.{i}"
            y = norm(p, f"{name}.norm1", x, EPS)
            y = attended(w, p, f"{name}.attn", y, *jnp.split(linear(p, f"{name}.attn.qkv", y), 3, axis=-1))
            x = x + linear(p, f"{name}.attn.proj", y)
            y = jax.nn.gelu(linear(p, f"{name}.mlp.fc1", norm(p, f"{name}.norm2", x, EPS)), approximate=False)
            x = x + linear(p, f"{name}.mlp.fc2", y)
        return linear(p, "head", norm(p, "norm", x[:, 0], EPS))

    return apply


def bert(w: Workload) -> Apply:
    """MiniLM, a BERT: post-norm, the mean of all tokens read."""

    def apply(trained: Params, frozen: Params, x: Any) -> Any:
        p = {**frozen, **trained}
        table = {name: p[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
        x = table["word"][x] + table["position"][: x.shape[1]] + table["token_type"][0]
        x = norm(p, "embeddings.LayerNorm", x, BERT_EPS)
        for i in range(w.depth):
            name = f"encoder.layer.{i}"
            own = f"{name}.attention.self"
            y = attended(w, p, own, x, *(linear(p, f"{own}.{part}", x) for part in ("query", "key", "value")))
            x = x + linear(p, f"{name}.attention.output.dense", y)
            x = norm(p, f"{name}.attention.output.LayerNorm", x, BERT_EPS)
            y = jax.nn.gelu(linear(p, f"{name}.intermediate.dense", x), approximate=False)
            x = norm(p, f"{name}.output.LayerNorm", x + linear(p, f"{name}.output.dense", y), BERT_EPS)
        return linear(p, "head", x.mean(axis=1))

    return apply


def divide_cpu(devices: int | None) -> None:
    """Has JAX show the CPU as several devices; before JAX starts."""
    if devices:
        jax.config.update("jax_num_cpu_devices", devices)


def apply_of(w: Workload, conv: Callable[[Any, Any], Any] = lax_conv) -> Apply:
    """The workload's model."""
    return {"cnn": lambda w: cnn(conv), "vit": vit, "bert": bert}[w.model](w)


def weights(w: Workload) -> tuple[workloads.Arrays, workloads.Arrays]:
    """(trained, frozen) before the first round, prepared."""
    trained, frozen = workloads.weights(w)
    return prepared(w, trained), prepared(w, frozen)


def cross_entropy(logits: Any, y: Any) -> Any:
    """Of each example, (B,)."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=-1)[:, 0]


def masked_loss(apply: Apply) -> Callable[..., Any]:
    """(trained, frozen, x, y, mask (B,)) -> mean cross-entropy over the examples that the mask keeps."""

    def loss(trained: Params, frozen: Params, x: Any, y: Any, mask: Any) -> Any:
        return (cross_entropy(apply(trained, frozen, x), y) * mask).sum() / jnp.maximum(mask.sum(), 1)

    return loss


def client_update(w: Workload, apply: Apply) -> Callable[..., Any]:
    """(trained, frozen, x (T, B, ...), y (T, B), mask (T, B)) -> trained after a client's epoch; empty steps change nothing."""
    loss = masked_loss(apply)

    def update(trained: Params, frozen: Params, x: Any, y: Any, mask: Any) -> Any:
        def step(now: Params, batch: Any) -> tuple[Params, None]:
            grads = jax.grad(loss)(now, frozen, *batch)  # zero where the mask is
            return jax.tree.map(lambda p, g: p - w.lr * g, now, grads), None

        return jax.lax.scan(step, trained, (x, y, mask))[0]

    return update
