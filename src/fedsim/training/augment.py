"""Random changes of images in training, inside the compiled step, drawn from a batch's key.

Each is a function (key, image (H, W, C)) -> image of the same shape and type, so bytes stay bytes, and every example gets
a key of its own. A batch's key derives from (seed, round, client, step): neither lanes nor devices change an image.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedsim.config import nearest, parse_call, take_call
from fedsim.engine.keys import key_for

Augment = Callable[[Array, Array], Array]


def flip(key: Array, image: Array) -> Array:
    """Mirrors left and right, for every second image on average."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def crop(key: Array, image: Array, *, padding: int = 4) -> Array:
    """Pads all sides with zeros and cuts out the old size at random (He et al. 2016, arXiv 1512.03385, section 4.2)."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return lax.dynamic_slice(padded, (top, left, jnp.zeros_like(top)), image.shape)


def resized_crop(key: Array, image: Array, *, scale: float = 0.08, ratio: float = 4 / 3) -> Array:
    """A random part of the image, resized to its size (Szegedy et al. 2015, arXiv 1409.4842, section 6).

    Args:
        scale: smallest share of the area; the share is uniform from it to 1.
        ratio: largest ratio of the part's sides, log-uniform from 1 / ratio. Sides are cut to the image's.
    """
    height, width, _ = image.shape
    of_area, of_ratio, of_place = jax.random.split(key, 3)
    area = jax.random.uniform(of_area, (), minval=scale, maxval=1.0)
    aspect = jnp.exp(jax.random.uniform(of_ratio, (), minval=-1.0, maxval=1.0) * jnp.log(ratio))
    part = jnp.minimum(jnp.sqrt(area * jnp.stack([1 / aspect, aspect])), 1.0)  # (2,): shares of height and width
    start = jax.random.uniform(of_place, (2,)) * (1 - part)
    size = jnp.array([height, width], jnp.float32)
    # Bilinear and antialiased; at the part's edge the filter sees the pixels beside it.
    out = jax.image.scale_and_translate(
        image.astype(jnp.float32), image.shape, (0, 1), 1 / part, -start * size / part, "linear"
    )
    return out.astype(image.dtype) if image.dtype != jnp.uint8 else jnp.round(out).clip(0, 255).astype(jnp.uint8)


KINDS: dict[str, Callable[..., Array]] = {"flip": flip, "crop": crop, "resized_crop": resized_crop}
RANGES = {  # option -> least, most, in words; zero is none of them
    "padding": (1, 2**10, "a whole number > 0, at most 1024"),
    "scale": (0.0, 1.0, "in (0, 1]"),
    "ratio": (1.0, 1000.0, ">= 1, at most 1000"),
}


def make(calls: Sequence[str]) -> Augment:
    """`("flip", "crop(padding=4)")` -> (key, x (B, H, W) or (B, H, W, C)) -> x, one after another.

    Raises:
        ValueError: an unknown call or option, or a value out of its range.
    """
    chosen = [_one(call) for call in calls]
    if not chosen:
        return lambda key, x: x

    def image(key: Array, x: Array) -> Array:
        for place, change in enumerate(chosen):
            x = change(jax.random.fold_in(key, place), x)
        return x

    def batch(key: Array, x: Array) -> Array:
        keys = jax.random.split(key_for(key, "augment"), x.shape[0])
        return jax.vmap(image)(keys, x) if x.ndim == 4 else jax.vmap(image)(keys, x[..., None])[..., 0]

    return batch


def _one(call: str) -> Callable[[Array, Array], Array]:
    name, args, options = parse_call(call, "augment")
    if name not in KINDS:
        raise ValueError(f"Expected augment={name!r} to be one of {', '.join(KINDS)}{nearest(name, KINDS)}.")
    known = [p.name for p in inspect.signature(KINDS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    wrong = [option for option in options if option not in known]
    if args or wrong:
        raise ValueError(f"Expected augment={call!r} to give its options by name, of {known or 'none'}; correct them.")
    taken = take_call(KINDS[name], options, f"augment={call!r}")
    for option, value in taken.items():
        low, high, said = RANGES[option]
        if not low <= value <= high or value == 0:
            raise ValueError(f"Expected {option}={options[option]!r} of augment={call!r} to be {said}; change it.")
    return functools.partial(KINDS[name], **taken)
