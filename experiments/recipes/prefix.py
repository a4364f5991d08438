"""A prefix: keys and values before every prompt that make what follows likely.

Gupta et al. "ReasonCACHE: Teaching LLMs To Reason Without Weight Updates". 2026. arXiv:2602.02366.
Li, Liang. "Prefix-Tuning: Optimizing Continuous Prompts for Generation". ACL 2021. arXiv:2101.00190.
"""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from experiments import measurements
from experiments.recipes.recipe import Recipe, cross_entropy, read_context, read_follow
from kvjax.transforms import prefix


@gin.configurable(module="experiments")
def train_prefix(slots: int = 32, remat: bool = False) -> Recipe:
    """Trains m keys and values in every layer and KV head, which the context and what follows attend to.

    `loss = CE(what follows | prefix, context)`: of answers, and of text where batches hold text. Starts from the keys
    and values of the first m tokens of a text, as if they had been read just before.

    Deviations: the paper's start is not published; its demonstrations are of reasoning, ours are what `TrainingText`
    holds. Trained are offsets in units of the root mean square of a layer's keys, and values, so that one learning
    rate suits all layers.

    Args:
      slots: [m].
      remat: compute the layers' activations again in the backward pass instead of keeping them.
    """

    def start(model):
        first = measurements.demonstration(model, slots)
        return jax.tree.map(jnp.zeros_like, first), first

    def loss(config, trained, frozen, batch, key):
        made = _moved(trained, frozen.constants)
        put = prefix(list(zip(made["key"], made["value"]))).schedule.before
        cache = read_context(config, frozen.params, batch, before=put, remat=remat).cache
        ce = cross_entropy(read_follow(config, frozen.params, batch, cache, remat=remat).logits, batch)
        return ce, {}

    def finish(model, trained, constants):
        return _moved(trained, constants)

    return Recipe("reasoncache", start, loss, finish)


def _moved(offsets: dict[str, jax.Array], first: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """f32[L, K, m, H] each: the first keys and values, and offsets of them in units of a layer's root mean square."""
    unit = lambda x: jnp.sqrt(jnp.mean(x * x, axis=(1, 2, 3), keepdims=True))
    return {name: x + offsets[name] * unit(x) for name, x in first.items()}
