"""Locret: heads that predict which tokens an answer will look at.

Huang, Yuan, Han, Xiao, Liu. "Locret: Enhancing Eviction in Long-Context LLM Inference with Trained Retaining Heads".
2024. arXiv:2410.01805.
"""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

import kvjax
from experiments.recipes.recipe import Recipe, read_context, read_follow
from kvjax.scores import retaining_scores
from kvjax.segments.segment import unrotated
from pallas_kernels.logits import capped, factor


@gin.configurable(module="experiments")
def train_locret(hidden: int = 1024, smoothness: float = 0.0025, seed: int = 0) -> Recipe:
    """Trains, in every layer, a network of a token's un-rotated query, key and value: `kvjax.scores.retaining_scores`.

    The label of a token and KV head is the largest logit that any query which predicts a token of the answer gives
    it, over the query group; `loss = mean smooth-L1(score, label) + smoothness sum_layers mean (s_t - s_{t+1})^2`.
    Contexts are read exactly: no eviction while labels are made.

    Args:
      hidden: [F], width of the networks (1024 in the official code, for models sixty times as large).
      smoothness: weight of the second term.
      seed: of the first weights.
    """

    def start(model):
        config = model.config
        L, N, K, H = config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim
        width = (N + 2 * K) * H
        first, second = jax.random.split(jax.random.key(seed))
        normal = lambda key, fan, *shape: jax.random.normal(key, shape) * fan**-0.5
        trained = {"hidden": normal(first, width, L, width, hidden), "out": normal(second, hidden, L, hidden, K)}
        return trained, ()

    def loss(config, trained, frozen, batch, key):
        context = read_context(config, frozen.params, batch, needs=kvjax.Needs(queries=kvjax.ALL))
        follow = read_follow(config, frozen.params, batch, context.cache, needs=kvjax.Needs(queries=kvjax.ALL))
        B, P = batch.context.shape
        real = (jnp.arange(P)[None] < batch.lengths[:, None])[:, None]  # [B, 1, P]
        K, count = config.num_kv_heads, jnp.sum(batch.lengths)
        error = rough = 0.0
        for index, (layer, seen, after) in enumerate(zip(context.cache.layers, context.layers, follow.layers)):
            slots = layer.segments[0]
            label = answer_logits(slots, after, batch.weight)
            k = unrotated(slots, seen.queries.rope).k
            head = {name: x[index] for name, x in trained.items()}
            score = retaining_scores(head, seen.queries.raw, k, slots.v)
            mean = lambda x, there: jnp.sum(jnp.where(there, x, 0.0)) / (K * jnp.maximum(count, 1))
            error += mean(_smooth_l1(score - label), real) / config.num_layers
            rough += mean((score[..., 1:] - score[..., :-1]) ** 2, real[..., 1:])
        return error + smoothness * rough, {"error": error, "roughness": rough}

    def finish(model, trained, constants):
        return trained

    return Recipe("locret", start, loss, finish)


def answer_logits(keys: kvjax.Segment, seen: kvjax.LayerObservation, weight: jax.Array) -> jax.Array:
    """f32[B, K, P]: the largest logit of each slot, over a query group and the queries that predict what counts.

    Args:
      keys: rotated, P slots.
      seen: all queries of what follows.
      weight: f32[B, T], what predicting each token counts.
    """
    B, K, P, H = keys.k.shape
    q = seen.queries.rotated.astype(jnp.float32)
    q = q.reshape(B, q.shape[1], K, -1, H)
    logits = jnp.einsum("btkgh,bkph->bkptg", q, keys.k.astype(jnp.float32)) * factor(seen.scale, H)
    predicts = jnp.pad(weight[:, 1:] > 0, ((0, 0), (0, 1)))[:, None, None, :, None]
    return jnp.max(jnp.where(predicts, capped(logits, seen.scale), -jnp.inf), axis=(3, 4))


def _smooth_l1(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    return jnp.where(size < 1, x * x / 2, size - 0.5)
