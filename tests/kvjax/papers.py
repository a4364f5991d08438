"""What the papers decide, transcribed step by step in NumPy, as policies for `table_decoder.simulate`.

Written after the papers and, where a docstring names it, their official code. Heads of a query group are averaged,
as every kvjax method states.
"""

from __future__ import annotations

import dataclasses

import numpy as np


def _top(score: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest, increasing."""
    return np.sort(np.argsort(-score, kind="stable")[: max(count, 0)])


@dataclasses.dataclass
class KeepAll:
    """The full cache."""

    def __call__(self, probability, slots, keys, done):
        return slots


@dataclasses.dataclass
class SnapKV:
    """SnapKV, `SnapKVCluster.update_kv`: vote, pool, top-(cap - W), concatenate the window."""

    budget: int
    window: int
    kernel: int
    pooling: str
    pad: float = 0.0
    acted: bool = False

    def __call__(self, probability, slots, keys, done):
        if self.acted or len(slots[0]) < self.budget:
            return slots
        self.acted = True
        kept = []
        for weights, at in zip(probability, slots):
            vote = weights[:, -self.window :, : -self.window].sum(axis=1).mean(axis=0)
            half = self.kernel // 2
            padded = np.pad(vote, half, constant_values=self.pad)
            windows = np.lib.stride_tricks.sliding_window_view(padded, self.kernel)
            pooled = windows.mean(axis=-1) if self.pooling == "avg" else windows.max(axis=-1)
            chosen = _top(pooled, self.budget - self.window)
            kept.append(np.concatenate([at[chosen], at[-self.window :]]))
        return kept


@dataclasses.dataclass
class H2O:
    """H2O, `H2OKVCache_LayerWise`: add up attention, keep the last n_r and the n_h heaviest of the rest."""

    budget: int
    recent: int
    normalise: bool = False
    mass: list[dict] | None = None
    seen: list[dict] | None = None

    def __call__(self, probability, slots, keys, done):
        if self.mass is None:
            self.mass, self.seen = [{} for _ in slots], [{} for _ in slots]
        kept = []
        for weights, at, mass, seen in zip(probability, slots, self.mass, self.seen):
            new = at[-weights.shape[1] :]
            for j, token in enumerate(at):
                mass[token] = mass.get(token, 0.0) + weights[:, :, j].sum(axis=1).mean()
                seen[token] = seen.get(token, 0) + int((new >= token).sum())
            older = at[at <= at[-1] - self.recent]
            recent = at[at > at[-1] - self.recent]
            score = np.array([mass[t] / (seen[t] if self.normalise else 1) for t in older])
            heavy = older[_top(score, self.budget - len(recent))]
            kept.append(np.concatenate([heavy, recent]))
        return kept


@dataclasses.dataclass
class Tova:
    """TOVA: of the newest query's attention, averaged over all heads, drop the lowest until the budget holds."""

    budget: int

    def __call__(self, probability, slots, keys, done):
        score = np.concatenate(probability)[:, -1].mean(axis=0)
        score[-1] = np.inf
        chosen = _top(score, self.budget)
        return [at[chosen] for at in slots]


@dataclasses.dataclass
class Knorm:
    """L2 norm: keep the keys of smallest norm."""

    budget: int
    acted: bool = False

    def score(self, key):
        return -np.sqrt((key**2).sum(axis=-1))

    def __call__(self, probability, slots, keys, done):
        if self.acted:
            return slots
        self.acted = True
        return [at[_top(self.score(key), self.budget)] for at, key in zip(slots, keys)]


class KeyDiff(Knorm):
    """KeyDiff, algorithm 1: the anchor is the mean of the unit keys; keep the least similar."""

    def score(self, key):
        unit = key / np.linalg.norm(key, axis=-1, keepdims=True)
        anchor = unit.mean(axis=0)
        return -(unit @ anchor) / np.linalg.norm(anchor)


@dataclasses.dataclass
class StreamingLLM:
    """StreamingLLM, `StartRecentKVCache`: slots [0, n_s) and the newest n_r."""

    sinks: int
    recent: int

    def __call__(self, probability, slots, keys, done):
        at = slots[0]
        if len(at) > self.sinks + self.recent:
            at = np.concatenate([at[: self.sinks], at[-self.recent :]])
        return [at] * len(slots)


@dataclasses.dataclass
class AdaKV:
    """Ada-KV, `adaptive_snapkv`: SnapKV's pooled scores of all heads in one list decide how many each head keeps."""

    budget: int
    window: int
    kernel: int
    floor: float
    normalise: bool
    acted: bool = False

    def __call__(self, probability, slots, keys, done):
        if self.acted:
            return slots
        self.acted = True
        base, half = self.budget - self.window, self.kernel // 2
        pooled = []
        for weights in probability:
            vote = weights[:, -self.window :, : -self.window].sum(axis=1).mean(axis=0)
            padded = np.pad(vote, half)
            pooled.append(np.lib.stride_tricks.sliding_window_view(padded, self.kernel).max(axis=-1))
        compared = pooled
        if self.normalise:
            compared = [x * np.sort(x)[::-1][:base].sum() / x.sum() for x in pooled]
        flat = np.concatenate(compared)
        owner = np.repeat(np.arange(len(pooled)), [len(x) for x in pooled])
        adaptive = np.bincount(owner[np.argsort(-flat, kind="stable")[: base * len(pooled)]], minlength=len(pooled))
        counts = np.rint(adaptive * (1 - self.floor) + self.floor * base).astype(int)
        return [
            np.concatenate([at[_top(x, n)], at[-self.window :]]) for at, x, n in zip(slots, pooled, counts)
        ]


def pyramid_budgets(layers: int, capacity: int, window: int, tokens: int, beta: int) -> list[int]:
    """PyramidKV, `pyramidkv_utils.py`: tokens of each layer, its window included."""
    capacity -= window
    low = capacity // beta
    high = capacity * 2 - low
    if high >= tokens - window:
        high = tokens - window
        low = capacity * 2 - high
    if tokens - window < capacity * 2:
        return [capacity + window] * layers
    return [high - layer * ((high - low) // (layers - 1)) + window for layer in range(layers)]


@dataclasses.dataclass
class LazyEviction:
    """LazyEviction, step by step: timestamps and longest rests of every token, judged every `window` tokens."""

    budget: int
    window: int
    alpha: float
    states: list[dict] | None = None
    since: int | None = None

    def __call__(self, probability, slots, keys, done):
        if self.states is None:
            self.states = [{} for _ in slots]
        now = slots[0][-1]
        for weights, at, state in zip(probability, slots, self.states):
            seen = weights[:, -1].max(axis=0)  # over the query group
            for token, p in zip(at, seen):
                last, gap = state.get(token, (token, 0))
                if p > self.alpha:
                    last, gap = now, max(gap, now - last)
                state[token] = (last, gap)
        self.since = self.window if self.since is None else self.since + 1
        if self.since < self.window:
            return slots
        self.since = 0
        kept = []
        for at, state in zip(slots, self.states):
            older = at[at <= now - self.window]
            score = np.array([self.importance(now, *state[token]) for token in older])
            count = self.budget - (len(at) - len(older))
            kept.append(np.concatenate([older[_top(score, count)], at[at > now - self.window]]))
        return kept

    def importance(self, now, last, gap):
        if gap == 0:
            return 1.0 if now == last else 1e-3 / (1 + now - last)
        sigmoid = lambda x: 1 / (1 + np.exp(-x))
        return 2 * sigmoid(-(now - last) / gap) + 2 * sigmoid(-gap / self.window)


def expected_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, turn, future: int, sinks: int, covariance: bool = True
) -> np.ndarray:
    """`ExpectedAttentionPress.score` for one KV head: queries [T, G, H] before and keys [T, H] after rotation."""
    T, G, H = q.shape
    rotation = np.mean([[turn(e, T + i) for e in np.eye(H)] for i in range(future)], axis=0).T
    scores = []
    for g in range(G):
        used = q[sinks:, g]
        mean = rotation @ used.mean(axis=0)
        logits = k[sinks:] @ mean / np.sqrt(H)
        if covariance:
            second = rotation @ np.cov(used.T, bias=True) @ rotation.T
            logits = logits + np.einsum("ti,ij,tj->t", k[sinks:], second, k[sinks:]) / H / 2
        p = np.exp(logits - logits.max())
        scores.append(p / p.sum())
    return np.mean(scores, axis=0) * np.linalg.norm(v[sinks:], axis=-1)


def xkv(layers: list[np.ndarray], rank: int) -> list[np.ndarray]:
    """xKV, `fake_svd`: concatenate the heads of all layers, [K, n, H] each, cut the SVD, split again."""
    K, n, H = layers[0].shape
    joint = np.concatenate([x.swapaxes(0, 1).reshape(n, K * H) for x in layers], axis=1)
    u, s, vt = np.linalg.svd(joint, full_matrices=False)
    cut = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return [part.reshape(n, K, H).swapaxes(0, 1) for part in np.split(cut, len(layers), axis=1)]


def minicache(keys, values, retain: int, t: float):
    """MiniCache, section 4: spherical interpolation of one head's two layers, [n, H] each, token by token.

    Returns the retained tokens, and keys and values as the two layers read them. The paper retains the tokens
    whose angle is above `max - gamma (max - min)`; gamma is lowered here until `retain` of them are.
    """
    n = len(keys[0])
    merged, closeness = [], np.zeros(n)
    for one, other in (keys, values):
        angles, directions = np.zeros(n), []
        for i, (x, y) in enumerate(zip(one, other)):
            x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
            angles[i] = np.arccos(np.clip(x @ y, -1, 1))
            directions.append((np.sin((1 - t) * angles[i]) * x + np.sin(t * angles[i]) * y) / np.sin(angles[i]))
        merged.append([np.linalg.norm(x, axis=-1, keepdims=True) * np.stack(directions) for x in (one, other)])
        closeness = np.maximum(closeness, (angles - angles.min()) / (angles.max() - angles.min()))
    exact = sorted(_top(closeness, retain).tolist())
    for (one, other), new in zip((keys, values), merged):
        new[0][exact], new[1][exact] = one[exact], other[exact]
    return exact, *merged
