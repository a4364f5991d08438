"""The optax chain of a training, from its config."""

from __future__ import annotations

from typing import Literal

import gin
import optax


Schedule = Literal["cosine", "linear", "constant"]


@gin.configurable(module="experiments")
def optimizer(
    steps: int,
    learning_rate: float = 1e-3,
    warmup: float = 0.05,
    schedule: Schedule = "cosine",
    final: float = 0.1,
    cooldown: float = 1.0,
    clip_norm: float | None = 1.0,
    clip_value: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    accumulate: int = 1,
) -> optax.GradientTransformation:
    """AdamW with clipping, a schedule and accumulation.

    Args:
      steps: of the training.
      learning_rate: the highest.
      warmup: fraction of the steps over which it rises linearly from 0.
      schedule: how it falls after that.
      final: fraction of it that is left at the end.
      cooldown: fraction of the steps after the warm-up over which it falls; it is constant before.
      clip_norm: the most that the norm of all gradients may be; None: any.
      clip_value: the most that any entry of a gradient may be; None: any.
      betas: of the moments.
      weight_decay: decoupled.
      accumulate: steps whose gradients are averaged for one update.

    Raises:
      ValueError: names what makes no sense.
    """
    if schedule not in ("cosine", "linear", "constant"):
        raise ValueError(f"optimizer.schedule must be 'cosine', 'linear' or 'constant', got {schedule!r}.")
    if accumulate < 1 or steps < 1:
        raise ValueError(f"optimizer: steps and accumulate must be at least 1, got {steps} and {accumulate}.")
    if not 0 <= warmup < 1 or not 0 < cooldown <= 1:
        raise ValueError(f"optimizer: warmup must be in [0, 1) and cooldown in (0, 1], got {warmup} and {cooldown}.")
    rate = learning_rates(steps, learning_rate, warmup, schedule, final, cooldown, accumulate)
    parts = []
    if clip_value is not None:
        parts.append(optax.clip(clip_value))
    if clip_norm is not None:
        parts.append(optax.clip_by_global_norm(clip_norm))
    chain = optax.chain(*parts, optax.adamw(rate, *betas, weight_decay=weight_decay))
    return chain if accumulate == 1 else optax.MultiSteps(chain, accumulate).gradient_transformation()


def learning_rates(
    steps: int,
    learning_rate: float = 1e-3,
    warmup: float = 0.05,
    schedule: Schedule = "cosine",
    final: float = 0.1,
    cooldown: float = 1.0,
    accumulate: int = 1,
) -> optax.Schedule:
    """Makes the schedule of `optimizer`, whose arguments these are: `(number of the update) -> learning rate`."""
    updates = -(-steps // accumulate)
    rising = round(warmup * updates)
    falling = max(1, round(cooldown * (updates - rising)))
    fall = {
        "cosine": optax.cosine_decay_schedule(learning_rate, falling, final),
        "linear": optax.linear_schedule(learning_rate, final * learning_rate, falling),
        "constant": optax.constant_schedule(learning_rate),
    }[schedule]
    return optax.join_schedules(
        [optax.linear_schedule(0.0, learning_rate, max(rising, 1)), optax.constant_schedule(learning_rate), fall],
        [rising, updates - falling],
    )
