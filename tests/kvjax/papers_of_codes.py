"""What papers on codes store, transcribed step by step in NumPy: vectors [T, H] of one head, and what is read of them.

Written after the papers; where a paper's official code has known faults (VidKV), after the paper alone.
"""

from __future__ import annotations

import numpy as np


def affine(x: np.ndarray, bits: int, axis: int, group: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Min/max codes in groups along an axis: what they stand for, and how far each was from a tie, in steps."""
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    parts = x.reshape(*x.shape[:-1], -1, group or x.shape[-1])
    low, high = parts.min(axis=-1, keepdims=True), parts.max(axis=-1, keepdims=True)
    step = np.where(high > low, high - low, 1.0) / (2**bits - 1)
    exact = (parts - low) / step
    back = lambda y: np.moveaxis(y.reshape(x.shape), -1, axis)
    return back(np.rint(exact) * step + low), back(np.abs(exact - np.floor(exact) - 0.5))


def qserve(k: np.ndarray, bits: int, power: float) -> tuple[np.ndarray, np.ndarray]:
    """SmoothAttention: one factor a RoPE pair; then a scale and a zero a token."""
    half = k.shape[1] // 2
    largest = np.abs(k).max(axis=0)
    paired = np.maximum(largest[:half], largest[half:]) ** power
    factor = np.concatenate([paired, paired])
    restored, tie = affine(k / factor, bits, 1)
    return restored * factor, tie


def separable_values(v: np.ndarray, bits: int, largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ZipCache's channel-separable tokenwise quantization."""
    c = np.sqrt(largest)
    restored, tie = affine(v / c, bits, 1)
    return restored * c, tie


def saliency(probability: np.ndarray) -> np.ndarray:
    """ZipCache's normalised attention: the column sum of [G, T, T] over its non-zero entries, averaged over G."""
    return (probability.sum(axis=1) / (probability > 0).sum(axis=1)).mean(axis=0)


def staircase(x: np.ndarray, bits: list[int], group: int, axis: int) -> np.ndarray:
    """SAQ as we read it: quantized at every step that it has come down."""
    for b in bits:
        x, _ = affine(x, b, axis, group)
    return x


def trits(v: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """VidKV's 1.58-bit values: per channel and group, 0 within half the mean magnitude; and which are no ties."""
    x = v.reshape(-1, group, v.shape[1])
    mean = np.abs(x).mean(axis=1, keepdims=True)
    sure = np.abs(np.abs(x) - mean / 2) > 0.01 * mean
    return (mean * ((x > mean / 2) * 1.0 - (x < -mean / 2))).reshape(v.shape), sure.reshape(v.shape)


def vidkv_keys(k: np.ndarray, fraction: float, group: int) -> tuple[np.ndarray, np.ndarray]:
    """VidKV's 1.5-bit keys: 2 bits for the widest channels, signs in the Fourier domain for the others."""
    order = np.argsort(-(k.max(axis=0) - k.min(axis=0)), kind="stable")
    wide, rest = np.split(order, [int(fraction * k.shape[1])])
    out, tie = np.zeros_like(k), np.ones_like(k)
    out[:, wide], tie[:, wide] = affine(k[:, wide], 2, 0, group)
    spectrum = np.fft.rfft(k[:, rest], axis=1, norm="ortho")
    mean = lambda x: np.abs(x).reshape(-1, group, x.shape[1]).mean(axis=1).repeat(group, 0)
    sign = lambda x: np.where(x >= 0, 1.0, -1.0) * mean(x)
    out[:, rest] = np.fft.irfft(sign(spectrum.real) + 1j * sign(spectrum.imag), n=len(rest), axis=1, norm="ortho")
    return out, tie


def mustafar(x: np.ndarray, sparsity: float) -> np.ndarray:
    """Zeros the floor(s H) smallest magnitudes of every token."""
    out = x.copy()
    for row in out:
        row[np.argsort(np.abs(row), kind="stable")[: int(sparsity * len(row))]] = 0
    return out


def olive(x: np.ndarray) -> np.ndarray:
    """OliVe on one vector, the scale searched for; in units of int4 steps, outliers abfloat E2M1."""
    outliers = np.array([48, 64, 96, 128, 192, 256, 384]) / 4
    best, least = None, np.inf
    for percent in range(40, 121, 10):
        scale = (abs(x.mean()) + 3 * x.std()) * percent / 100 / 7
        q = x / scale
        y = np.clip(np.rint(q), -7, 7)
        for i in range(0, len(x), 2):
            for here, other in ((i, i + 1), (i + 1, i)):
                if abs(q[here]) * 4 >= 32:
                    y[here] = np.sign(q[here]) * outliers[np.argmin(np.abs(outliers - abs(q[here])))]
                    y[other] = 0
                    break
        error = np.sum((y * scale - x) ** 2)
        if error < least:
            best, least = y * scale, error
    return best


def qjl_logits(q: np.ndarray, k: np.ndarray, inlier: np.ndarray, outlier: np.ndarray, group: int, count: int):
    """QJL's estimate of `q k^T`: signs and norms of the inlier and of the outlier channels of every group of tokens."""
    logits = np.zeros((len(q), len(k)))
    for start in range(0, len(k), group):
        part = k[start : start + group]
        out = np.argsort(-np.linalg.norm(part, axis=0), kind="stable")[:count]
        apart = np.zeros_like(part)
        apart[:, out] = part[:, out]
        for x, s in ((part - apart, inlier), (apart, outlier)):
            norm = np.linalg.norm(x, axis=1)
            estimate = np.sqrt(np.pi / 2) / s.shape[1] * norm * ((q @ s) @ np.where(x @ s > 0, 1.0, -1.0).T)
            logits[:, start : start + group] += estimate
    return logits


def nonuniform(x: np.ndarray, levels: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KVQuant's nuq: normalise by mid-range and half-range, take the nearest level, and go back."""
    middle, half = (low + high) / 2, (high - low) / 2
    distance = np.abs(((x - middle) / half)[..., None] - levels)
    nearest = np.sort(distance, axis=-1)
    return levels[distance.argmin(axis=-1)] * half + middle, nearest[..., 1] - nearest[..., 0]


def without_extremes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest and the smallest entry of each vector: where they are, and the vector with its mean there."""
    mark = np.zeros(x.shape, bool)
    rows = np.arange(len(x))
    mark[rows, x.argmax(axis=1)] = mark[rows, x.argmin(axis=1)] = True
    return mark, np.where(mark, x.mean(axis=1, keepdims=True), x)
