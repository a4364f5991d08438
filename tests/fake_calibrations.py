"""What methods need of a model, of the right shape with random contents: for tests of how they run, not how well."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from models.config import DecoderConfig


class Words:
    """A tokenizer that gives every word an id below 800, and knows no chat."""

    chat_template = None
    opening = ()

    def encode(self, text: str) -> list[int]:
        """One id a word; a line break is a word."""
        return [700 + len(word) for word in text.replace("\n", " ; ").split()]


def calibrate(config: DecoderConfig):
    """What `load_method` takes as `calibrate`: `(recipe, path) -> arrays`."""
    L, K, H = config.num_layers, config.num_kv_heads, config.head_dim

    @functools.cache
    def make(recipe: str):
        rng = np.random.default_rng(0)
        rotation = lambda *shape: jnp.float32(np.linalg.qr(rng.normal(size=(*shape, shape[-1])))[0])
        normal = lambda *shape: jnp.float32(rng.normal(size=shape))
        if recipe == "matryoshka_pca":
            ranks = H // 4 * (1 + np.arange(L * K).reshape(1, L, K) % 3)  # a quarter, a half, three quarters, ...
            return {
                "rates": jnp.float32([0.5]),
                "key_ranks": jnp.float32(ranks),
                "value_ranks": jnp.float32(ranks[:, :, ::-1]),
                "key_axes": rotation(L, K, H),
                "value_axes": rotation(L, K, H),
                "key_mean": normal(L, K, H),
                "value_mean": normal(L, K, H),
            }
        if recipe == "matryoshka_trained":
            return {name: x for name, x in make("matryoshka_pca").items() if "mean" not in name}
        if recipe == "cskv_trained":
            axes, parts = make("cskv"), {"axes": 2.0, "inverse": 0.5}  # A and B differ
            return {f"{n}_{part}": axes[f"{n}_axes"] * x for n in ("key", "value") for part, x in parts.items()}
        if recipe == "duoattention_trained":
            return {"gates": jnp.float32(rng.uniform(size=(L, K)))}
        if recipe == "locret":
            width = (config.num_heads + 2 * K) * H
            return {"hidden": normal(L, width, 8) * width**-0.5, "out": normal(L, 8, K)}
        if recipe == "attention_gate":
            gate = {"qkv": normal(L, 2, K, H, 3, 2, 4) * (2 * K * H) ** -0.5, "out": normal(L, 2, 4, K)}
            return gate | {"bias": normal(L, K)}
        if recipe == "prefixkv":  # even attention in the first layer, the root of that in the second, ...
            return {"coverage": jnp.linspace(0.0, 1.0, 257) ** (1 / (1 + jnp.arange(L)[:, None]))}
        if recipe == "double_sparsity":
            return {"strength": jnp.float32(rng.uniform(size=(L, K, H)))}
        if recipe == "minference":  # all three kinds in every layer
            kinds = jnp.float32([[0, 2, 4], [1, 30, 50], [2, 1, 0]])
            return {"candidates": kinds, "pattern": jnp.float32(np.arange(L * config.num_heads).reshape(L, -1) % 3)}
        if recipe == "headkv":
            return {"retrieval": jnp.float32(rng.uniform(size=(L, K)))}
        if recipe == "criticalkv":
            return {"output": normal(L, config.num_heads, H, config.width)}
        if recipe == "reasoncache":
            return {"key": normal(L, K, 3, H), "value": normal(L, K, 3, H)}
        if recipe == "lococo":
            return {"kernel": normal(L, 5, 2 * H, 4) * H**-0.5, "bias": normal(L, 4), "mix": jnp.full(L, 0.5)}
        if recipe == "kqsvd":
            stretch = lambda x: {"axes": x * 2.0, "inverse": x / 2.0}
            bases = {name: stretch(rotation(L, K, H)) for name in ("key", "value")}
            return {f"{name}_{part}": x for name, parts in bases.items() for part, x in parts.items()}
        if recipe == "cskv":
            joint = lambda: rotation(L, K * H).reshape(L, K, H, K * H)
            return {"key_axes": joint(), "value_axes": joint()}
        if recipe == "palu":  # heads in pairs
            pairs = lambda: rotation(L, K // 2, 2 * H).reshape(L, K, H, 2 * H)
            return {"key_axes": pairs(), "value_axes": pairs()}
        if recipe == "d2o":
            return {"variance": jnp.float32(rng.uniform(size=L))}
        if recipe == "fp8_scaled":
            return {name: jnp.float32(rng.uniform(3.0, 5.0, (L, K, H))) for name in ("key_peak", "value_peak")}
        if recipe == "kvsharer":  # the last layer reads the first
            last = jnp.arange(L) == L - 1
            return {"giver": jnp.where(last, 0.0, jnp.arange(L)), "turn": jnp.where(last, 0.0, L)}
        if recipe == "kvquant":
            ends = {"key_low": -2 - rng.uniform(size=(L, K, H)), "key_high": 2 + rng.uniform(size=(L, K, H))}
            levels = {b: np.sort(np.tanh(np.linspace(-1.5, 1.5, 2**b))) for b in (2, 3, 4)}
            ends |= {f"{name}_levels{b}": x for name in ("key", "value") for b, x in levels.items()}
            return {name: jnp.float32(x) for name, x in ends.items()}
        if recipe == "rotatekv":
            return {"key_mean": normal(L, K, H)}
        if recipe == "million":
            return {name: normal(L, H // 2, 256, 2) for name in ("key_codebook", "value_codebook")}
        return {"echo": normal(L, K), "induction": normal(L, K)}

    return lambda recipe, path: make(recipe)
