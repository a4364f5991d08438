"""Measures what limits prefill and decoding, and counts what a model asks of it."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import platform

import jax
import jax.numpy as jnp

import kvjax
from experiments.stopwatch import seconds
from models import Model
from models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Holds what the machine reaches in the simplest programs, at best of several tries."""

    gigabytes_per_second: float  # XLA's sum over 256 MB of float32
    gigaflops_per_second: float  # XLA's product of two 2048 x 2048 matrices

    @classmethod
    def measure(cls, dtype: str = "float32", devices: int = 1) -> Ceilings:
        """Takes about a second.

        Args:
          dtype: of the matrices.
          devices: that work together. One of them is measured; several chips reach so many times as much, the virtual
            devices of a CPU are one machine.
        """
        long, square = jnp.ones((64_000_000,)), jnp.ones((2048, 2048), dtype)

        def best(f, x) -> float:
            jax.block_until_ready(f(x))
            return min(seconds(lambda: jax.block_until_ready(f(x)))[0] for _ in range(9))

        read, product = best(jax.jit(jnp.sum), long), best(jax.jit(lambda a: a @ a), square)
        chips = 1 if jax.default_backend() == "cpu" else devices
        return cls(chips * 4 * long.size / read / 1e9, chips * 2 * 2048**3 / product / 1e9)


def prefill_flops(config: DecoderConfig, tokens: int) -> int:
    """Multiplications and additions of a causal prefill of one row: matrices, attention, the head of the last token."""
    N, K, H, D, F = config.num_heads, config.num_kv_heads, config.head_dim, config.width, config.ffn_width
    feed_forward = (3 if config.gated else 2) * D * (F * max(config.experts_per_token, 1) + config.shared_ffn_width)
    matrices = D * (N + 2 * K) * H + N * H * D + feed_forward
    if config.latent_rank:
        C, P, R, V = config.still_channels, config.rotated, config.latent_rank, config.value_channels
        matrices = D * (N * (C + P) + H) + N * R * (C + V) + N * V * D + feed_forward
    attention = 2 * N * H * (tokens + 1) / 2  # per query: its logits and its mix, over half the keys on average
    return int(2 * (config.num_layers * tokens * (matrices + attention) + D * config.vocab_size))


def weight_bytes(model: Model) -> int:
    """Bytes of weights that a step reads: all but an embedding of which it needs a row for each token."""
    unread = 0 if model.params.head is None else model.params.embed.nbytes
    return kvjax.nbytes(model.params) - unread


def threads() -> int:
    """Cores that this process may use: as many threads as XLA starts."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor() -> str:
    """The processor's name where Linux tells it, or its family."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
