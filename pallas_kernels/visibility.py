"""Which slots a query may see: derived from positions, never passed around as a mask."""

from __future__ import annotations

import jax


def visible(q_pos: jax.Array, k_pos: jax.Array, window: int | None = None) -> jax.Array:
    """Whether each query sees each slot: occupied, not in its future, inside its window.

    Args:
      q_pos: i32[..., T], token positions of the queries; -1 is padding, which sees nothing.
      k_pos: i32[..., S], token positions of the slots; -1 is an empty slot.
      window: tokens a query looks back over, itself included; None for no limit.

    Returns:
      bool[..., T, S].
    """
    q, k = q_pos[..., :, None], k_pos[..., None, :]
    mask = (k >= 0) & (k <= q)
    if window is not None:
        mask &= k > q - window
    return mask
