"""MatryoshkaKV: orthogonal projections of keys and values, trained at all ranks at once.

Lin, Zeng, Xiao, Kou, Hou, Gao, Zhang, Deng. "MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal
Projection". ICLR 2025. arXiv:2410.14731.
"""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from experiments import measurements
from experiments.recipes.recipe import Recipe, cross_entropy, divergence, read_context, read_follow
from kvjax.segments import LatentSegment
from kvjax.segments.bases import Matrix


@gin.configurable(module="experiments")
def train_matryoshka(
    distillation: float = 0.25,
    widths: int = 8,
    rates: tuple[float, ...] = (0.75, 0.625, 0.5, 0.375, 0.25),
    remat: bool = False,
) -> Recipe:
    """Turns the principal axes of every head's rotated keys, and values, so that their first R say most.

    `U = U_0 C(X)` with the Cayley map `C(X) = (I - A / 2)^-1 (I + A / 2)`, `A = tril(X, -1) - tril(X, -1)^T`, and
    `U_0` the principal components: X starts at zero, and U is orthogonal at every step. In each step every layer, KV
    head, and keys and values apart, draw their own rank `H / widths * {1 .. widths}`; the loss on what follows a
    context whose cache is cut so is `d KL(full || cut) + (1 - d) CE`. Afterwards a greedy search finds ranks for each
    head at several mean rates.

    Deviations: the paper's `C(X)` alone has to reach `U_0`, which it cannot where an eigenvalue is -1; no means are
    trained, so that a cut cache takes the bytes of the untrained one; what follows attends to itself exactly within
    the call, as it does when the method runs.

    Args:
      distillation: d.
      widths: how many ranks there are to draw from; divides H.
      rates: of the search, as fractions of H.
      remat: compute the layers' activations again in the backward pass instead of keeping them.
    """

    def start(model):
        bases = measurements.principal_components(model, measurements.Settings.of(model))
        axes = jnp.stack([bases["key_axes"], bases["value_axes"]], axis=1)  # [L, 2, K, H, H]
        if axes.shape[-1] % widths:
            raise ValueError(f"train_matryoshka.widths must divide a head's {axes.shape[-1]} channels, got {widths}.")
        return {"turn": jnp.zeros_like(axes)}, {"axes": axes}

    def loss(config, trained, frozen, batch, key):
        axes = turned(frozen.constants["axes"], trained["turn"])
        cache = read_context(config, frozen.params, batch).cache
        teacher = read_follow(config, frozen.params, batch, cache).logits
        H = axes.shape[-1]
        ranks = H // widths * jax.random.randint(key, axes.shape[:3], 1, widths + 1)
        # Columns of zeros in place of columns cut off: one shape for all ranks.
        cut = axes * (jnp.arange(H) < ranks[..., None])[..., None, :]
        layers = [
            layer.with_tail(LatentSegment.of(layer.segments[0], Matrix(k[None]), Matrix(v[None])))
            for layer, (k, v) in zip(cache.layers, cut)
        ]
        cache = cache.replace(layers=tuple(layers))
        student = read_follow(config, frozen.params, batch, cache, remat=remat).logits
        kl, ce = divergence(teacher, student, batch), cross_entropy(student, batch)
        metrics = {"kl": kl, "ce": ce, "full_ce": cross_entropy(teacher, batch), "orthogonality": _defect(axes)}
        return distillation * kl + (1 - distillation) * ce, metrics

    def finish(model, trained, constants):
        axes = turned(constants["axes"], trained["turn"])
        bases = {"key_axes": axes[:, 0], "value_axes": axes[:, 1]}
        return bases | measurements.search_ranks(model, measurements.Settings.of(model), bases, rates=rates)

    return Recipe("matryoshka_trained", start, loss, finish)


def turned(axes: jax.Array, turn: jax.Array) -> jax.Array:
    """`axes C(turn)`, f32[..., H, H]; see `train_matryoshka`."""
    lower = jnp.tril(turn, -1)
    half, eye = (lower - lower.mT) / 2, jnp.eye(turn.shape[-1])
    with jax.default_matmul_precision("highest"):  # the default of accelerators is not orthogonal to 1e-5
        return axes @ jnp.linalg.solve(eye - half, eye + half)


def _defect(axes: jax.Array) -> jax.Array:
    """f32[]: the largest entry of |U^T U - I|."""
    with jax.default_matmul_precision("highest"):
        return jnp.max(jnp.abs(axes.mT @ axes - jnp.eye(axes.shape[-1])))
