"""A soft cap bends logits before the softmax, the same in every op."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention_mass import attention_mass
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.logits import SoftCap
from pallas_kernels.prefill_attention import prefill_attention

HOW = dict(window=4, scale=SoftCap(0.5, 2.0))


def test_ops_agree_with_the_formula_written_out():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    B, T, N, K, H = 1, 6, 4, 2, 8
    q, k, v = 3 * draw(B, T, N, H), draw(B, K, T, H), draw(B, K, T, H)
    pos = np.arange(T)[None]
    dots = 0.5 * np.einsum("btnh,bnsh->btns", q, k.repeat(N // K, axis=1))
    assert np.abs(dots).max() > 4  # far beyond the cap
    logits = 2.0 * np.tanh(dots / 2.0)
    age = pos[0][:, None] - pos[0]
    logits = np.where(((age >= 0) & (age < 4))[:, None], logits, -np.inf)
    lse = np.log(np.exp(logits).sum(-1))
    p = np.exp(logits - lse[..., None])
    out = np.einsum("btns,bnsh->btnh", p, v.repeat(N // K, axis=1))

    slots = jnp.broadcast_to(pos[:, None], (B, K, T))
    for found in (prefill_attention(q, k, v, pos, **HOW), decode_attention(q, k, v, pos, slots, **HOW)):
        np.testing.assert_allclose(found.out, out, atol=1e-5)  # float32
        np.testing.assert_allclose(found.lse, lse, atol=1e-5)
    mass = attention_mass(q, k, pos, slots, lse, **HOW)
    np.testing.assert_allclose(mass, p.sum(1), atol=1e-5)
