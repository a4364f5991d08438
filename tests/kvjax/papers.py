"""What the papers decide, transcribed step by step in NumPy, as policies for `table_decoder.simulate`.

Written after the papers and, where a docstring names it, their official code. Heads of a query group are averaged,
as every kvjax method states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

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
class KeyDiffByBlock(KeyDiff):
    """KeyDiff, algorithm 2: after every block of the prompt the cache shrinks to its budget."""

    prompt: int = 0  # tokens of it; afterwards nothing happens

    def __call__(self, probability, slots, keys, done):
        self.acted = slots[0][-1] >= self.prompt
        return super().__call__(probability, slots, keys, done)


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
            for query in range(weights.shape[1]):
                step = at[len(at) - weights.shape[1] + query]
                for token, p in zip(at, weights[:, query].max(axis=0)):  # over the query group
                    last, gap = state.get(token, (token, 0))
                    if p > self.alpha:
                        last, gap = step, max(gap, step - last)
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


class Slots(NamedTuple):
    """What one head holds, in token order."""

    pos: np.ndarray  # [n]
    k: np.ndarray  # [n, H], rotated
    v: np.ndarray  # [n, H]


@dataclasses.dataclass
class D2O:
    """D2O: H2O with sinks; the evicted go to their most similar kept key, unless below a moving threshold."""

    budget: int
    recent: int
    sinks: int
    smoothing: float
    mass: list[dict] | None = None
    threshold: float | None = None

    def __call__(self, probability, heads):
        if self.mass is None:
            self.mass = [{} for _ in heads]
        found = []
        for weights, head, mass in zip(probability, heads, self.mass):
            for j, token in enumerate(head.pos):
                mass[token] = mass.get(token, 0.0) + weights[:, :, j].sum(axis=1).mean()
            excess = max(len(head.pos) - self.budget, 0)
            older = np.flatnonzero((head.pos >= self.sinks) & (head.pos <= head.pos[-1] - self.recent))
            lightest = older[np.argsort([mass[t] for t in head.pos[older]], kind="stable")][:excess]
            evicted = np.sort(lightest)
            kept = np.setdiff1d(np.arange(len(head.pos)), evicted)
            unit = head.k / np.linalg.norm(head.k, axis=-1, keepdims=True)
            found.append((kept, evicted, unit[evicted] @ unit[kept].T))
        if any(len(evicted) for _, evicted, _ in found):
            mean = np.mean(np.concatenate([similar.max(axis=1) for _, _, similar in found]))
            old = mean if self.threshold is None else self.threshold
            self.threshold = (1 - self.smoothing) * old + self.smoothing * mean
        after = []
        for (kept, evicted, similar), head in zip(found, heads):
            k, v = head.k.copy(), head.v.copy()
            for c, slot in enumerate(kept):
                mine = [e for e in range(len(evicted)) if similar[e].argmax() == c and similar[e, c] >= self.threshold]
                w = np.exp([1.0, *(similar[e, c] for e in mine)])
                of = [slot, *evicted[mine]]
                k[slot], v[slot] = (w @ x[of] / w.sum() for x in (head.k, head.v))
            after.append(Slots(head.pos[kept], k[kept], v[kept]))
        return after


@dataclasses.dataclass
class KVMerger:
    """KVMerger: from the last token to the first, grow runs; merge each into its most attended token."""

    budget: int
    recent: int
    heavy: int
    threshold: float
    width: float
    acted: bool = False

    def __call__(self, probability, heads):
        if self.acted:
            return heads
        self.acted = True
        return [self.merged(weights.sum(axis=1).mean(axis=0), head) for weights, head in zip(probability, heads)]

    def merged(self, mass, head):
        T = len(head.pos)
        excess = T - self.budget
        older = np.arange(T - self.recent)
        free = np.setdiff1d(older, older[_top(mass[older], self.heavy)])
        cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        links = {i: cosine(head.k[i], head.k[i - 1]) for i in free if i - 1 in free}
        links = {i: c for i, c in links.items() if c > self.threshold}
        links = sorted(links, key=links.get, reverse=True)[:excess]
        k, v, kept, i = head.k.copy(), head.v.copy(), [], T - 1
        while i >= 0:
            run = [i]
            while run[0] in links:
                run = [run[0] - 1, *run]
            pivot = run[int(np.argmax(mass[run]))]
            g = np.exp(-((head.k[pivot] - head.k[run]) ** 2).sum(axis=-1) / (2 * self.width**2))
            k[pivot], v[pivot] = (g @ x[run] / g.sum() for x in (head.k, head.v))
            kept.append(pivot)
            i = run[0] - 1
        droppable = [i for i in kept if i < T - self.recent]
        dropped = sorted(droppable, key=lambda i: mass[i])[: len(kept) - self.budget]
        kept = np.array(sorted(set(kept) - set(dropped)))
        return Slots(head.pos[kept], k[kept], v[kept])


@dataclasses.dataclass
class LoCoCo:
    """LoCoCo, `memory_compressor.py`: heavy hitters of the chunk stay, a convolution mixes the rest into C slots.

    `turn(x, pos)` rotates; kernel [width, 2 H, C], bias [C] and mix are of the layer.
    """

    budget: int
    recent: int
    kernel: np.ndarray
    bias: np.ndarray
    mix: float
    turn: Callable
    prompt: int  # tokens of it; afterwards nothing happens

    def __call__(self, probability, heads):
        if heads[0].pos[-1] >= self.prompt or len(heads[0].pos) <= self.budget:
            return heads
        return [self.mixed(weights.sum(axis=1).mean(axis=0), head) for weights, head in zip(probability, heads)]

    def mixed(self, mass, head):
        count = self.kernel.shape[2]
        worth = np.where(head.pos > head.pos[-1] - self.recent, 1e9 + head.pos, mass)
        ranked = np.argsort(-worth, kind="stable")
        stays, pivots = np.sort(ranked[: self.budget - count]), np.sort(ranked[self.budget - count : self.budget])
        rest = np.sort(ranked[self.budget - count :])
        k = self.turn(head.k[rest], -head.pos[rest])
        v = head.v[rest]
        half = len(self.kernel) // 2
        x = np.pad(np.concatenate([k, v], axis=1), ((half, half), (0, 0)))
        windows = [np.einsum("wi,wic->c", x[p : p + len(self.kernel)], self.kernel) for p in range(len(rest))]
        weights = np.exp(np.maximum(np.stack(windows) + self.bias, 0.0))
        weights = (1 - self.mix) * (rest[:, None] == pivots) + self.mix * weights / weights.sum(axis=0)
        new = Slots(head.pos[pivots], self.turn(weights.T @ k, head.pos[pivots]), weights.T @ v)
        order = np.argsort(np.concatenate([head.pos[stays], new.pos]))
        return Slots(*(np.concatenate([x[stays], y])[order] for x, y in zip(head, new)))


@dataclasses.dataclass
class Fixed:
    """Keeps, when the prompt is in, what was decided elsewhere."""

    kept: list[np.ndarray]  # per KV head
    acted: bool = False

    def __call__(self, probability, slots, keys, done):
        if self.acted or not done:
            return slots
        self.acted = True
        return self.kept


def cake_budgets(preference: np.ndarray, total: int, most: int) -> np.ndarray:
    """CAKE: tokens of each layer by preference, at most `most`; what is left over goes evenly to layers with room."""
    budgets = np.minimum((preference / preference.sum() * total).astype(int), most)
    while budgets.sum() < min(total, most * len(budgets)):
        room = np.flatnonzero(budgets < most)
        each, rest = divmod(total - budgets.sum(), len(room))
        budgets[room] += each
        budgets[room[:rest]] += 1
        budgets = np.minimum(budgets, most)
    return budgets


def cake_cascade(preference: np.ndarray, indicator: np.ndarray, budget: int) -> list[list[np.ndarray]]:
    """CAKE's prefill: after each layer the same total is split over the layers read so far, and they shrink again.

    Args:
      preference: [L].
      indicator: [L, K, T - W], kept beside the tokens once they are chosen.
      budget: tokens of a layer on average, beside the window.

    Returns:
      Per layer and head, the indices of the tokens that are left in the end.
    """
    L, K, tokens = indicator.shape
    held = []
    for layer in range(L):
        held.append([np.arange(tokens)] * K)
        budgets = cake_budgets(preference[: layer + 1], budget * L, tokens)
        for earlier, count in enumerate(budgets):
            scores = [indicator[earlier, head, held[earlier][head]] for head in range(K)]
            held[earlier] = [at[_top(score, count)] for at, score in zip(held[earlier], scores)]
    return held


def cake(probability: list[list[np.ndarray]], window: int, kernel: int, gamma: float, taus: tuple[float, float]):
    """CAKE's preference [L] and indicator [L, K, T - W] from the prompt's attention, per layer and head [G, T, T]."""
    preferences, indicators = [], []
    for layer in probability:
        last = np.stack([head[:, -window:, :-window] for head in layer])  # [K, G, W, T - W]
        entropy = -(last * np.log(last + 1e-10)).sum()
        variance = last.var(axis=2, ddof=1)  # [K, G, T - W]
        preferences.append(entropy ** (1 / taus[0]) * variance.sum() ** (1 / taus[1]))
        padded = np.pad(last.mean(axis=2) + gamma * variance, ((0, 0), (0, 0), (kernel // 2, kernel // 2)))
        pooled = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=-1).mean(axis=-1)
        indicators.append(pooled.mean(axis=1))
    return np.array(preferences), np.array(indicators)


def kvzip_input(tokens: np.ndarray, start: int, chunk: int, overlap: int, instruction) -> np.ndarray:
    """KVzip, `self_task`: what is read behind the context to score one of its chunks."""
    first, later, answer = (np.array(ids, int) for ids in instruction)
    told = first if start == 0 else np.concatenate([later, tokens[max(start - overlap, 0) : start]])
    return np.concatenate([told, answer, tokens[start : start + chunk]])


def kvzip_scores(q: np.ndarray, k: np.ndarray, k_again: np.ndarray, start: int, chunk: int, sinks: int) -> np.ndarray:
    """KVzip, `_get_score`: the largest probability of each of a chunk's slots, for one KV head.

    Args:
      q: [G, n, H], rotated queries of the second reading.
      k: [T, H], rotated keys of the context.
      k_again: [n, H], those of the second reading.
      start: first token of the chunk.
      chunk: tokens of it.
      sinks: first tokens of the context that every chunk is weighed against.
    """
    sinks = min(sinks, start)
    keys = np.concatenate([k[:sinks], k[start : start + chunk], k_again])
    logits = q @ keys.T / np.sqrt(q.shape[-1])
    n = len(k_again)
    logits[..., -n:] = np.where(np.tri(n, dtype=bool), logits[..., -n:], -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights[..., sinks : len(keys) - n].max(axis=(0, 1))


def kvzip_kept(scores: np.ndarray, budget: int, sinks: int) -> list[list[np.ndarray]]:
    """KVzip: the highest scores [L, K, T] of the whole cache stay, the first tokens in every head."""
    scores = scores.copy()
    scores[..., :sinks] = 2.0
    flat = np.zeros(scores.size, bool)
    flat[_top(scores.ravel(), budget * scores.shape[0] * scores.shape[1])] = True
    return [[np.flatnonzero(head) for head in layer] for layer in flat.reshape(scores.shape)]


def attention_gate(qkv: np.ndarray, out: np.ndarray, bias: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention-Gate: what a gate makes of every token and head, [K, T], from un-rotated k and v [T, K, H].

    qkv [2, K, H, 3, A, C] reads keys and values, each by its root mean square, into A heads of an attention of every
    token to every token; out [A, C, K] reads the sum of that and of the token's own value.
    """
    T = len(k)
    x = np.concatenate([(y / np.sqrt((y**2).mean(axis=(1, 2), keepdims=True))).reshape(T, -1) for y in (k, v)], axis=1)
    logits = np.tile(bias[:, None], (1, T))
    for a in range(out.shape[0]):
        zq, zk, zv = (x @ qkv[:, :, :, i, a].reshape(x.shape[1], -1) for i in range(3))
        weights = np.exp(zq @ zk.T / np.sqrt(out.shape[1]))
        weights /= weights.sum(axis=1, keepdims=True)
        read = weights @ zv + zv
        logits += (read / (1 + np.exp(-read)) @ out[a]).T
    return 1 / (1 + np.exp(-logits))


def gated_kept(p: np.ndarray, budget: int, sinks: int, recent: int) -> list[np.ndarray]:
    """The tokens of each head that pass: those of p [K, T] above the tau that lets `budget` times K through."""
    p = p.copy()
    p[:, :sinks], p[:, p.shape[1] - recent :] = 2.0, 2.0
    tau = np.sort(p.ravel())[::-1][budget * len(p)]
    return [np.flatnonzero(head > tau) for head in p]


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


def lagkv(k: np.ndarray, v: np.ndarray, budget: int, lag: int, sinks: int) -> np.ndarray:
    """LagKV, `LagKVPress.score` for one head, [T, H] each: the tokens that stay."""
    T = len(k)
    newest_first = 10.0 + np.arange(T)  # above every rank
    newest_first[:sinks] = np.inf
    if T < sinks + 2 * lag:
        return _top(newest_first, budget)
    end = sinks + (T - sinks) // lag * lag

    def part(x):
        x = x[sinks:end].reshape(-1, lag, x.shape[1])
        low, high = x[1:].min(axis=1, keepdims=True), x[1:].max(axis=1, keepdims=True)
        deviation = ((x[:-1] - low) / (high - low)).std(axis=-1, ddof=1)
        weights = np.exp(deviation - deviation.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    score = ((part(k) + part(v)) / 2).argsort(axis=-1).argsort(axis=-1) / lag
    newest_first[sinks : end - lag] = score.ravel()
    return _top(newest_first, budget)


@dataclasses.dataclass
class RKV:
    """R-KV, `R1KV.update_kv` and `cal_similarity`, every `interval` tokens; attention as SnapKV has it."""

    budget: int
    window: int
    kernel: int
    mix: float
    threshold: float
    interval: int
    since: int | None = None

    def __call__(self, probability, slots, keys, done):
        self.since = self.interval if self.since is None else self.since + 1
        if self.since < self.interval:
            return slots
        self.since = 0
        return [self.kept(*head) for head in zip(probability, slots, keys)]

    def kept(self, weights, at, key):
        older = len(at) - self.window
        vote = np.pad(weights[:, -self.window :, :older].mean(axis=(0, 1)), self.kernel // 2)
        important = np.lib.stride_tricks.sliding_window_view(vote, self.kernel).max(axis=-1)
        unit = key / np.linalg.norm(key, axis=-1, keepdims=True)
        cosine = unit @ unit.T
        np.fill_diagonal(cosine, 0.0)
        for row in cosine:
            alike = np.flatnonzero(row > self.threshold)
            if len(alike):
                row[alike[-1]] = 0.0
        redundant = np.exp(cosine.mean(axis=0))
        redundant = (redundant / redundant.sum())[:older]
        chosen = _top(self.mix * important - (1 - self.mix) * redundant, self.budget - self.window)
        return np.concatenate([at[chosen], at[older:]])


def chunkkv(probability: list[np.ndarray], budget: int, chunk: int, window: int) -> np.ndarray:
    """ChunkKV, `ChunkKVPress.compress`: the tokens of a layer that stay, of attention per KV head [G, T, T].

    Tokens of the last chunk that is chosen stay while there is room, oldest first.
    """
    T = probability[0].shape[-1]
    score = np.mean([head[:, -window:, :-window].mean(axis=(0, 1)) for head in probability], axis=0)
    score = np.append(score, np.zeros(window))
    chunks = [np.arange(at, min(at + chunk, T)) for at in range(0, T, chunk)]
    best = sorted(chunks, key=lambda c: -score[c].mean())
    chosen = [t for c in best for t in c if t < T - window][: budget - window]
    return np.array(sorted([*chosen, *range(T - window, T)]))


def criticalkv(
    weights: np.ndarray, v: np.ndarray, output: np.ndarray, budget: int, window: int, kernel: int, first: float
) -> np.ndarray:
    """CriticalKV, algorithm 1 over SnapKV's scores, for one KV head.

    Args:
      weights: [G, T, T].
      v: [T, H].
      output: [G, H, D].
      budget: tokens, the window included.
      window: of SnapKV.
      kernel: the same.
      first: share of the first stage.
    """
    older = weights.shape[-1] - window
    vote = np.pad(weights[:, -window:, :older].mean(axis=(0, 1)), kernel // 2)
    score = np.lib.stride_tricks.sliding_window_view(vote, kernel).mean(axis=-1)
    norm = np.mean([np.abs(v[:older] @ w).sum(axis=-1) for w in output], axis=0)
    count = int(first * (budget - window))
    stage_one = _top(score, count)
    weighted = (score + 1e-4) * norm
    weighted[stage_one] = -np.inf
    stage_two = _top(weighted, budget - window - count)
    return np.array(sorted([*stage_one, *stage_two, *range(older, older + window)]))


def gumbel_noise(seed: int, head: int, query: int, key: int) -> float:
    """-log(-log u), u of the top 23 bits of a hash of (seed, head, query, key): MurmurHash3's finaliser, in turn."""
    mask, mixed = 0xFFFFFFFF, seed
    for number in (head, query, key):
        mixed ^= number * 0x9E3779B1 & mask
        mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B & mask
        mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 & mask
        mixed ^= mixed >> 16
    return -np.log(-np.log(((mixed >> 9) + 0.5) / 2**23))


@dataclasses.dataclass
class Keyformer:
    """Keyformer, `attention.py`: H2O's loop over softmax((x + zeta) / tau), tau growing with every generated token."""

    budget: int
    recent: int
    temperature: float
    growth: float
    seed: int
    first_head: int  # query heads of the layers below
    prompt: int
    mass: list[dict] | None = None

    def __call__(self, probability, slots, keys, done):
        self.mass = self.mass or [{} for _ in slots]
        kept = []
        for index, (weights, at, mass) in enumerate(zip(probability, slots, self.mass)):
            group, calls, _ = weights.shape
            for g, t in np.ndindex(group, calls):
                query = at[len(at) - calls + t]
                sees = at <= query
                head = self.first_head + index * group + g
                noise = np.array([gumbel_noise(self.seed, head, int(query), int(key)) for key in at[sees]])
                tau = self.temperature + self.growth * max(query - self.prompt + 1, 0)
                x = np.exp((np.log(weights[g, t, sees]) + noise) / tau)
                for token, p in zip(at[sees], x / x.sum()):
                    mass[token] = mass.get(token, 0.0) + p / group
            older, recent = at[at <= at[-1] - self.recent], at[at > at[-1] - self.recent]
            heavy = older[_top(np.array([mass[t] for t in older]), self.budget - len(recent))]
            kept.append(np.concatenate([heavy, recent]))
        return kept


def leverage(k: np.ndarray, sketch: np.ndarray) -> np.ndarray:
    """Compactor, `compute_leverage_scores` for one head: un-rotated keys [T, H], a sketch [H, n]."""
    x = (k - k.mean(axis=0)) @ sketch
    gram = x.T @ x
    inverse = np.linalg.inv(gram + (1e-2 + 1e-5 * np.trace(gram) / len(gram)) * np.eye(len(gram)))
    return np.einsum("ti,ij,tj->t", x, inverse, x)


def noncausal(q: np.ndarray, k: np.ndarray, v: np.ndarray, chunk: np.ndarray) -> np.ndarray:
    """Compactor, `NonCausalAttnPress.score` before it is standardised: q [G, T, H], k, v [T, H], chunk of each [T]."""
    received = np.zeros(len(k))
    for each in set(chunk.tolist()):
        part = chunk == each
        x = np.exp(q[:, part] @ k[part].T / np.sqrt(k.shape[1]))
        received[part] = (x / x.sum(axis=-1, keepdims=True)).sum(axis=1).mean(axis=0)
    received = np.pad(received * np.linalg.norm(v, axis=-1), 1)
    return (received[:-2] + received[1:-1] + received[2:]) / 3


def prefixkv_budgets(coverage: np.ndarray, fraction: float, tokens: int) -> np.ndarray:
    """PrefixKV: bisects the share of attention whose prefixes [L], in tokens, are a fraction of all on average."""
    low, high = 0.0, 1.0
    grid = np.linspace(0, 1, coverage.shape[1])
    for _ in range(60):
        share = (low + high) / 2
        needed = np.array([np.interp(share, curve, grid) for curve in coverage])
        low, high = (share, high) if needed.mean() < fraction else (low, share)
    return needed * tokens


@dataclasses.dataclass
class PrefixKV:
    """PrefixKV, online: of a layer the most attended tokens, averaged over heads, and the first and the last one."""

    keep: int
    acted: bool = False

    def __call__(self, probability, slots, keys, done):
        if self.acted:
            return slots
        self.acted = True
        score = np.concatenate(probability).sum(axis=1).mean(axis=0)
        score[[0, -1]] = np.inf
        return [slots[0][_top(score, self.keep)]] * len(slots)


def windowkv_budgets(layers: int, cap: int, group: int, beta: float) -> list[int]:
    """WindowKV, `compress_utils.py`: beside the suffix, equal in a group, falling linearly from group to group."""
    groups = layers // group
    last = int(cap / beta) if groups > 1 else cap
    first = 2 * cap - last
    return [first - layer // group * ((first - last) // max(groups - 1, 1)) for layer in range(layers)]


def windowkv(probability: list[np.ndarray], budget: int, suffix: int, window: int, strategy: str) -> np.ndarray:
    """WindowKV: the tokens of a layer that stay, of attention per KV head [G, T, T]; a window may stay in part."""
    T = probability[0].shape[-1]
    score = np.stack([head[:, -suffix:, :-suffix].mean(axis=(0, 1)) for head in probability])
    score = np.pad(score, ((0, 0), (0, suffix)))
    windows = [np.arange(at, min(at + window, T)) for at in range(0, T, window)]
    top = window // 2 if strategy == "max" else window
    worth = [np.sort(score[:, w], axis=1)[:, ::-1][:, :top].mean() for w in windows]
    chosen = [t for i in np.argsort(-np.array(worth), kind="stable") for t in windows[i] if t < T - suffix][:budget]
    return np.array(sorted([*chosen, *range(T - suffix, T)]))


def kvcrush(
    probability: list[np.ndarray], budget: int, window: int, kernel: int, sinks: int, share: float, anchor: str
) -> np.ndarray:
    """KVCrush, `kvcrush.cpp` on single tokens: the tokens of a layer that stay, of attention per KV head [G, T, T]."""
    T, K = probability[0].shape[-1], len(probability)
    votes = [np.pad(head[:, -window:, :-window].mean(axis=(0, 1)), kernel // 2) for head in probability]
    score = np.lib.stride_tricks.sliding_window_view(np.stack(votes), kernel, axis=-1).mean(axis=-1)
    room = budget - window - sinks
    important = int((1 - share) * room + 1e-9)
    free = np.arange(sinks, T - window)
    ranked = free[np.argsort(-score[:, free].mean(axis=0), kind="stable")]
    kept, rest = ranked[:important], np.sort(ranked[important:])
    bits = np.zeros((K, len(rest)), bool)
    for head in range(K):
        bits[head, np.argsort(-score[head, rest], kind="stable")[: (len(rest) + 1) // 2]] = True
    reference = {"alternate": np.arange(K) % 2 == 1, "ones": np.ones(K, bool), "mean": bits.mean(axis=1) > 0.5}[anchor]
    distance = (bits != reference[:, None]).sum(axis=0)
    nearest, count = rest[np.argsort(distance, kind="stable")], room - important
    stands = [nearest[-(-(i + 1) * len(rest) // count) - 1] for i in range(count)]
    return np.array(sorted([*range(sinks), *kept, *stands, *range(T - window, T)]))


@dataclasses.dataclass
class CRITIC:
    """CRITIC, appendix A, with sums over what a token receives: scaled to [0, 1], weighted, the lowest dropped."""

    budget: int
    recent: int
    weights: tuple[float, float]
    mass: dict | None = None
    entropy: dict | None = None

    def __call__(self, probability, slots, keys, done):
        self.mass, self.entropy = self.mass or {}, self.entropy or {}
        p, at = np.concatenate(probability), slots[0]
        surprise = -p * np.log(np.where(p > 0, p, 1.0))
        for j, token in enumerate(at):
            self.mass[token] = self.mass.get(token, 0.0) + p[:, :, j].sum(axis=1).mean()
            self.entropy[token] = self.entropy.get(token, 0.0) + surprise[:, :, j].sum(axis=1).mean()
        score = 0.0
        for weight, of in zip(self.weights, (self.mass, self.entropy)):
            x = np.array([of[t] for t in at])
            score = score + weight * (x - x.min()) / (x.max() - x.min())
        score[at > at[-1] - self.recent] = np.inf
        return [at[_top(score, self.budget)]] * len(slots)


@dataclasses.dataclass
class ALISA:
    """ALISA, section 4: half newest tokens, half those with most attention from the last `window` queries."""

    budget: int
    recent: int
    window: int
    queries: np.ndarray  # [T, N, H], rotated, of the prompt and what follows

    def __call__(self, probability, slots, keys, done):
        kept = []
        for head, (at, key) in enumerate(zip(slots, keys)):
            group = probability[head].shape[0]
            q = self.queries[at[-1] + 1 - self.window : at[-1] + 1, head * group : (head + 1) * group]
            x = np.einsum("wgh,sh->gws", q, key) / np.sqrt(key.shape[1])
            x = np.where(at <= np.arange(at[-1] + 1 - self.window, at[-1] + 1)[:, None], np.exp(x), 0.0)
            score = (x / x.sum(axis=-1, keepdims=True)).sum(axis=1).mean(axis=0)
            score[at > at[-1] - self.recent] = np.inf
            kept.append(at[_top(score, self.budget)])
        return kept


def headkv_counts(retrieval: np.ndarray, base: int, beta: float) -> np.ndarray:
    """HeadKV, `snapkv_utils.py`: slots [L, K] beside the window; a pool for retrieval and the same minimum for all."""
    pool = base / beta * retrieval.size
    return retrieval / retrieval.sum() * pool + base - base / beta


@dataclasses.dataclass
class MergedPrompt:
    """Elastic Cache and LOOK-M: when the prompt is in, the least attended go to those that stay, by a rule each."""

    budget: int
    recent: int
    sinks: int
    rule: str  # "position", or how LOOK-M weighs: "mean", "pivot", "similarity"
    acted: bool = False

    def __call__(self, probability, heads):
        if self.acted:
            return heads
        self.acted = True
        mass = [weights.sum(axis=1).mean(axis=0) for weights in probability]
        if self.rule == "position":
            mass = [np.mean(mass, axis=0)] * len(mass)
        return [self.merged(of, head) for of, head in zip(mass, heads)]

    def merged(self, mass, head):
        mass = mass.copy()
        mass[: self.sinks] = mass[len(mass) - self.recent :] = np.inf
        kept = _top(mass, self.budget)
        evicted = np.setdiff1d(np.arange(len(mass)), kept)
        unit = head.k / np.linalg.norm(head.k, axis=-1, keepdims=True)
        cosine = unit[evicted] @ unit[kept].T
        if self.rule == "position":
            to = [kept[np.argmin(np.abs(kept - e))] for e in evicted]
        else:
            to = kept[cosine.argmax(axis=1)]
        u, x = cosine.max(axis=1), [head.k, head.v]
        new = [of.copy() for of in x]
        for c in kept:
            mine = np.flatnonzero(np.array(to) == c)
            for of, out in zip(x, new):
                source = of[evicted[mine]]
                if self.rule == "pivot":
                    source = (source + of[c]) / 2
                if self.rule == "similarity":
                    mine = [i for i in mine if u[i] >= u.mean()]
                    out[c] = (of[c] + u[mine] @ of[evicted[mine]]) / (1 + u[mine].sum())
                else:
                    out[c] = (of[c] + source.sum(axis=0)) / (1 + len(mine))
        return Slots(head.pos[kept], new[0][kept], new[1][kept])


@dataclasses.dataclass
class CaM:
    """CaM, `kv_cache_cam.py` with the mean of its random mask: v_i p / m to the next m, p = A_i / mean(A of these)."""

    budget: int
    recent: int
    sinks: int
    following: int
    mass: list[dict] | None = None

    def __call__(self, probability, heads):
        self.mass = self.mass or [{} for _ in heads]
        return [self.merged(*each) for each in zip(probability, heads, self.mass)]

    def merged(self, weights, head, mass):
        for j, token in enumerate(head.pos):
            mass[token] = mass.get(token, 0.0) + weights[:, :, j].sum(axis=1).mean()
        worth = np.array([mass[t] for t in head.pos])
        worth[(head.pos < self.sinks) | (head.pos > head.pos[-1] - self.recent)] = np.inf
        kept = _top(worth, self.budget)
        evicted, v = np.setdiff1d(np.arange(len(worth)), kept), head.v.copy()
        for e in evicted[-self.following :]:
            after = kept[kept > e][: self.following]
            share = min(mass[head.pos[e]] / np.mean([mass[head.pos[c]] for c in after]), 1.0)
            v[after] += share * head.v[e] / len(after)
        return Slots(head.pos[kept], head.k[kept], v[kept])


@dataclasses.dataclass
class EMS:
    """EMS as `kvjax.methods.ems` reads it: global or local importance, merges by cos(k) cos(v), weighted by it."""

    budget: int
    window: int
    least: float
    acted: bool = False

    def __call__(self, probability, heads):
        if self.acted:
            return heads
        self.acted = True
        return [self.merged(weights, head) for weights, head in zip(probability, heads)]

    def merged(self, weights, head):
        T = len(head.pos)
        everyone = weights.sum(axis=1).mean(axis=0) / (T - np.arange(T))
        end = weights[:, -self.window :].sum(axis=1).mean(axis=0)
        score = np.maximum(everyone / everyone.mean(), end / end.mean())
        worth = np.where(np.arange(T) >= T - self.window, np.inf, score)
        kept = _top(worth, self.budget)
        evicted = np.setdiff1d(np.arange(T), kept)
        unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (head.k, head.v)]
        similar = np.prod([x[evicted] @ x[kept].T for x in unit], axis=0)
        new = []
        for x in (head.k, head.v):
            y = x.copy()
            for i, c in enumerate(kept):
                mine = (similar.argmax(axis=1) == i) & (similar.max(axis=1) >= self.least)
                w = np.minimum(score[evicted[mine]] / score[c], 1.0)
                y[c] = (x[c] + w @ x[evicted[mine]]) / (1 + w.sum())
            new.append(y[kept])
        return Slots(head.pos[kept], *new)


@dataclasses.dataclass
class MPCacheStatic:
    """MPCache, static stage: of a layer, the tokens that any of the last queries looks at most, averaged over heads."""

    budget: int
    last: int
    acted: bool = False

    def __call__(self, probability, slots, keys, done):
        if self.acted:
            return slots
        self.acted = True
        score = np.mean([head[:, -self.last :].max(axis=(0, 1)) for head in probability], axis=0)
        score[-1] = np.inf
        return [slots[0][_top(score, self.budget)]] * len(slots)


def quest(q: np.ndarray, k: np.ndarray, page: int, count: int) -> np.ndarray:
    """Quest, one KV head: the pages with the highest bound for any of its query heads.

    Args:
      q: [G, H], rotated.
      k: [S, H], rotated, S a multiple of the page.
      page: tokens.
      count: pages.
    """
    pages = k.reshape(-1, page, k.shape[-1])
    bound = [np.maximum(head * pages.max(axis=1), head * pages.min(axis=1)).sum(axis=-1) for head in q]
    return _top(np.max(bound, axis=0), count)


def nearest(q: np.ndarray, k: np.ndarray, count: int, sinks: int = 0, recent: int = 0) -> np.ndarray:
    """RetrievalAttention with an exact index, and a selecting layer of TidalDecode: tokens by their highest logit."""
    score = (q @ k.T).max(axis=0)
    score[:sinks] = np.inf
    score[len(k) - recent :] = np.inf
    return _top(score, count)


def double_sparsity(q: np.ndarray, k: np.ndarray, channels: np.ndarray, count: int) -> np.ndarray:
    """Double Sparsity: tokens by their logit over some channels."""
    return _top((q[:, channels] @ k[:, channels].T).max(axis=0), count)


def sparq(q: np.ndarray, k: np.ndarray, r: int, count: int) -> np.ndarray:
    """SparQ, steps 1 and 2, with channels that a group chooses together."""
    channels = np.argsort(-np.abs(q).sum(axis=0), kind="stable")[:r]
    approximate = []
    for head in q:
        tau = np.sqrt(q.shape[1] * np.abs(head[channels]).sum() / np.abs(head).sum())
        logits = k[:, channels] @ head[channels] / tau
        p = np.exp(logits - logits.max())
        approximate.append(p / p.sum())
    return _top(np.mean(approximate, axis=0), count)


def shadowkv(q: np.ndarray, k: np.ndarray, chunk: int, outliers: int, count: int) -> np.ndarray:
    """ShadowKV, `ShadowKVCache`: outliers by the lowest cosine with their landmark, others by the softmax of these."""
    chunks = k.reshape(-1, chunk, k.shape[-1])
    landmark = chunks.mean(axis=1)
    size = lambda x: np.sqrt((x**2).sum(axis=-1))
    cosine = (chunks * landmark[:, None]).sum(axis=-1) / (size(chunks) * size(landmark)[:, None])
    odd = np.argsort(cosine.min(axis=1), kind="stable")[:outliers]
    logits = q @ landmark.T / np.sqrt(k.shape[-1])
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    score = (p / p.sum(axis=1, keepdims=True)).max(axis=0)
    score[odd] = np.inf
    return _top(score, count)


def mpcache_dynamic(q: np.ndarray, k: np.ndarray, page: int, blend: float, count: int) -> np.ndarray:
    """MPCache, dynamic stage, its last level: the clusters of highest similarity, the first one always."""
    pages = k.reshape(-1, page, k.shape[-1])
    score = (q @ (blend * pages.max(axis=1) + (1 - blend) * pages.min(axis=1)).T).sum(axis=0)
    score[0] = np.inf
    return _top(score, count)


def rekv(q: np.ndarray, k: np.ndarray, page: int, count: int) -> np.ndarray:
    """ReKV, `_calc_block_topk`: the same blocks in all heads, by un-rotated queries [N, H] and keys [K, S, H]."""
    K, S, H = k.shape
    means = np.repeat(k.reshape(K, S // page, page, H).mean(axis=2), len(q) // K, axis=0)  # [N, pages, H]
    return _top(np.einsum("nh,nph->p", q, means), count)
