"""PIE: an edit in the middle of what was read.

He et al. "Let the Code LLM Edit Itself When You Edit the Code". 2024. arXiv:2407.03157.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Int32

from kvjax.drivers import Run, Step
from kvjax.reuse.material import moved, without
from kvjax.reuse.rewriting import rewrite
from kvjax.rope import Rope


def pie(
    step: Step, run: Run, start: int, stop: int, tokens: Int32[Array, "B m"], ropes: Rope | Sequence[Rope]
) -> Run:
    """Replaces the tokens at positions `start .. stop - 1` of every row by m others, and reads only these.

    What comes behind moves by `m - (stop - start)`: its keys are turned, its values stay, and it does not know of the
    edit. The logits stay those of before, which the next token's replace.

    Deviations: keys are turned in float32, so repeated edits add rounding of the storage alone.

    Args:
      step: the decoder.
      run: with rotated keys as arrays, or un-rotated keys.
      start: first position of the edit.
      stop: the position behind it; `start` inserts.
      tokens: i32[B, m]; m = 0 deletes.
      ropes: of every layer, or one for all.

    Raises:
      ValueError: start and stop are not in order; see `moved` and `rewrite`.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"start and stop must be positions in order, got {start} and {stop}.")
    m = tokens.shape[1]
    cache = without(run.cache, lambda pos: (pos >= start) & (pos < stop))
    by = m - (stop - start)
    if by:
        cache = moved(cache, by, ropes, start=stop)
    edited = run._replace(cache=cache, prompt=run.prompt + cache.length - run.cache.length)
    if not m:
        return edited
    return rewrite(step, edited, tokens, jnp.broadcast_to(start + jnp.arange(m, dtype=jnp.int32), tokens.shape))
