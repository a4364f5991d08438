"""Runs the same token ids, weights and budgets through kvpress and through us: likelihood, divergence, bytes.

    python -m experiments.against_kvpress --keep=0.5,0.25 --output_dir=out/against_kvpress

It needs the extra `peer` (torch, transformers, kvpress). Both read an essay in float32, compress it without knowing
what follows, and are fed the essay's next tokens: nll is that of these tokens in nats, KL is to the full cache. Both
get the same parameters, and compress when the prompt is in; docs/against_kvpress.md says where they mean other things.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import kvjax
from experiments import cli, reading
from experiments.calibrations import Calibrations
from experiments.kvpress_peer import Answer, KvpressPeer, Press
from experiments.methods import Method
from experiments.report import human_bytes
from experiments.summaries import write_csv
from kvjax import at_prefill_end, evict, scores
from models import Model, load_model
from models.assets import ESSAYS, fetch
from models.decoder import bind

for _name in ("model", "methods", "keep", "context", "following", "output_dir"):
    flags.declare_key_flag(_name)

_CONTEXT, _KEEP = 1024, (0.5, 0.25)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One method as both have it.

    Attributes:
      ours: `(model, tokens to keep, fraction of the context that is) -> transform`.
      press: the peer's.
      attentions: whether the press needs the whole matrix of attention.
    """

    ours: Callable[[Model, int, float], kvjax.CacheTransform]
    press: Press
    attentions: bool = False


def _instruction(model: Model) -> kvjax.Instruction:
    """KVzip's words in kvpress for a model without a chat template."""
    texts = (
        "\n\nRepeat the previous context exactly.",
        "\n\nRepeat the part of the previous context exactly, starting with",
        "\n",
    )
    return kvjax.Instruction(*(tuple(model.tokenizer.encode(text)) for text in texts))


def _first_and_newest(budget: int) -> kvjax.CacheTransform:
    """StreamingLLM once, with positions as they were."""
    newest = kvjax.Scorer(score=lambda segment, seen: segment.pos.astype(jnp.float32))
    return at_prefill_end(evict(newest, budget, sinks=4))


_SNAPKV = dict(window=64, kernel=5)
PAIRS = {
    "knorm": Pair(lambda m, n, f: kvjax.methods.knorm(n), lambda k, r: k.KnormPress(r)),
    "keydiff": Pair(lambda m, n, f: kvjax.methods.keydiff(n), lambda k, r: k.KeyDiffPress(r)),
    "lagkv": Pair(lambda m, n, f: kvjax.methods.lagkv(n, lag=32), lambda k, r: k.LagKVPress(r, lag_size=32)),
    "streamingllm": Pair(lambda m, n, f: _first_and_newest(n), lambda k, r: k.StreamingLLMPress(r)),
    "snapkv": Pair(lambda m, n, f: kvjax.methods.snapkv(n, **_SNAPKV), lambda k, r: k.SnapKVPress(r)),
    "tova": Pair(
        lambda m, n, f: at_prefill_end(evict(scores.last_query_attention(), n, recent=1)), lambda k, r: k.TOVAPress(r)
    ),
    "h2o": Pair(
        lambda m, n, f: at_prefill_end(evict(scores.accumulated_attention(normalise=True), n)),
        lambda k, r: k.ObservedAttentionPress(r),
        attentions=True,
    ),
    "expected_attention": Pair(
        lambda m, n, f: kvjax.methods.expected_attention(n), lambda k, r: k.ExpectedAttentionPress(r)
    ),
    "pyramidkv": Pair(
        lambda m, n, f: kvjax.methods.pyramidkv(n, window=32, kernel=5, beta=4),
        lambda k, r: k.PyramidKVPress(r, window_size=32, beta=4),
    ),
    "chunkkv": Pair(
        lambda m, n, f: kvjax.methods.chunkkv(n, chunk=20, **_SNAPKV), lambda k, r: k.ChunkKVPress(k.SnapKVPress(r))
    ),
    "criticalkv": Pair(
        lambda m, n, f: kvjax.methods.criticalkv(Calibrations(m)("criticalkv", None), n, **_SNAPKV),
        lambda k, r: k.CriticalKVPress(k.SnapKVPress(r)),
    ),
    "compactor": Pair(
        lambda m, n, f: kvjax.methods.compactor(n, blending=1 - f), lambda k, r: k.CompactorPress(r)
    ),
    "adakv_snapkv": Pair(
        lambda m, n, f: kvjax.methods.adakv_snapkv(n, pooling="avg", normalise=False, **_SNAPKV),
        lambda k, r: k.AdaKVPress(k.SnapKVPress(r)),
    ),
    "adakv_expected": Pair(
        lambda m, n, f: kvjax.methods.adakv_expected(n), lambda k, r: k.AdaKVPress(k.ExpectedAttentionPress(r))
    ),
    "kvzip": Pair(
        lambda m, n, f: kvjax.methods.kvzip(n, instruction=_instruction(m)), lambda k, r: k.KVzipPress(r)
    ),
    "think": Pair(lambda m, n, f: kvjax.methods.think(1 - f), lambda k, r: k.ThinKPress(r)),
}
"""By name; of ThinK the fraction is of the keys' channels."""


def ours(
    model: Model, transform: kvjax.CacheTransform, context: Sequence[int], following: Sequence[int]
) -> Answer:
    """Reads the context, compresses it, and feeds what follows in one call."""
    method = Method("ours", transform, None, "")
    prompt, _ = reading.read(model, [context], reading.shared_needs([method]))
    run = reading.compress(model, method, prompt, [context], room=len(following), call_tokens=len(following))
    positions = len(context) + jnp.arange(len(following))[None]
    out = bind(model.params, model.config)(
        jnp.asarray([list(following)]), positions, run.cache, needs=kvjax.Needs(), last_only=False
    )
    at_rest = jax.eval_shape(
        lambda prompt: reading.compress(model, method, prompt, [context], room=0, call_tokens=1).cache, prompt
    )
    log_probs = jax.nn.log_softmax(out.logits[0].astype(jnp.float32), axis=-1)
    return Answer(np.asarray(log_probs, np.float64), kvjax.nbytes(at_rest), float(kvjax.kept_tokens(run.cache)[0]))


def quality(answer: Answer, full: Answer, following: Sequence[int]) -> tuple[float, float]:
    """Returns the nll of the tokens that follow the fed ones, and the KL divergence from the full cache, in nats."""
    log_probs, reference = answer.log_probs[:-1], full.log_probs[:-1]
    nll = -np.mean(log_probs[np.arange(len(following) - 1), list(following[1:])])
    return float(nll), float(np.mean(np.sum(np.exp(reference) * (reference - log_probs), axis=-1)))


def compare(
    model: Model, peer: KvpressPeer, names: Sequence[str], keeps: Sequence[float], ids: Sequence[int], context: int
):
    """Yields a line of results for the full cache, then for each method and fraction."""
    read, following = ids[:context], ids[context:]
    full = ours(model, kvjax.identity(), read, following), peer(None, 0.0, read, following)
    yield _line("full", 1.0, *full, *full, following)
    for name in names:
        pair = PAIRS[name]
        for keep in keeps:
            budget = int(context * keep + 1e-9)
            got = ours(model, pair.ours(model, budget, budget / context), read, following)
            theirs = peer(pair.press, 1 - budget / context, read, following, attentions=pair.attentions)
            yield _line(name, keep, got, theirs, *full, following)


def _line(name: str, keep: float, ours: Answer, theirs: Answer, full: Answer, their_full: Answer, following) -> dict:
    (nll, kl), (their_nll, their_kl) = quality(ours, full, following), quality(theirs, their_full, following)
    between = np.mean(np.sum(np.exp(theirs.log_probs) * (theirs.log_probs - ours.log_probs), axis=-1))
    return {
        "method": name,
        "keep": keep,
        "nll": nll,
        "kvpress_nll": their_nll,
        "kl": kl,
        "kvpress_kl": their_kl,
        "kl_between": float(between),
        "kept_tokens": ours.kept,
        "kvpress_kept_tokens": theirs.kept,
        "cache_bytes": ours.cache_bytes,
        "kvpress_cache_bytes": theirs.cache_bytes,
    }


_HEADER = (
    f"{'':<20}{'':>6}{'nll':>16}{'':>9}{'KL to full':>16}{'KL':>9}{'tokens kept':>16}{'cache':>22}\n"
    f"{'method':<20}{'keep':>6}{'ours':>8}{'kvpress':>8}{'differ':>9}{'ours':>8}{'kvpress':>8}{'between':>9}"
    f"{'ours':>8}{'kvpress':>8}{'ours':>11}{'kvpress':>11}"
)


def _shown(line: dict) -> str:
    keep = "-" if line["method"] == "full" else f"{line['keep']:g}"
    sizes = (human_bytes(line[name]) for name in ("cache_bytes", "kvpress_cache_bytes"))
    return (
        f"{line['method']:<20}{keep:>6}{line['nll']:>8.3f}{line['kvpress_nll']:>8.3f}"
        f"{line['nll'] - line['kvpress_nll']:>+9.3f}{line['kl']:>8.3f}{line['kvpress_kl']:>8.3f}"
        f"{line['kl_between']:>9.3f}{line['kept_tokens']:>8.1f}{line['kvpress_kept_tokens']:>8.1f}"
        + "".join(f"{size:>11}" for size in sizes)
    )


def run() -> None:
    """The program."""
    names = tuple(PAIRS) if cli.METHODS.value is None else tuple(cli.METHODS.value)
    for name in names:
        if name not in PAIRS:
            raise ValueError(f"--methods: both have {', '.join(PAIRS)}, got {name!r}.")
    keeps = cli.KEEP.value or _KEEP
    context = cli.only(cli.CONTEXT, _CONTEXT)
    following = cli.FOLLOWING.value
    if following < 2 or context < 2:
        raise ValueError(f"--following and --context must be at least 2 tokens, got {following} and {context}.")
    if min(int(context * keep + 1e-9) for keep in keeps) < 1:
        raise ValueError(f"--keep must leave at least one token of {context}, got {min(keeps)}.")
    if cli.OUTPUT_DIR.value is not None:
        pathlib.Path(cli.OUTPUT_DIR.value).mkdir(parents=True, exist_ok=True)
    model = load_model(cli.MODEL.value or "smollm2")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        peer = KvpressPeer(model, threads)
    except ImportError as error:
        raise ValueError(str(error)) from error
    text = (fetch(ESSAYS) / "worked.txt").read_text(encoding="utf-8")
    ids = [*model.tokenizer.opening, *model.tokenizer.encode(text)][: context + cli.FOLLOWING.value]
    if len(ids) < context + cli.FOLLOWING.value:
        raise ValueError(f"--context and --following must be at most {len(ids)} tokens together, those of the text.")
    if len(ids) > model.config.max_positions:
        raise ValueError(f"--context and --following must be at most {model.config.max_positions} together.")
    print(
        f"{model.config.name}, float32, {context} tokens of an essay, {cli.FOLLOWING.value} that follow; kvpress "
        f"{peer.version}\n\n{_HEADER}",
        flush=True,
    )
    lines = []
    for line in compare(model, peer, names, keeps, ids, context):
        lines.append(line)
        print(_shown(line), flush=True)
        if cli.OUTPUT_DIR.value is not None:
            write_csv(pathlib.Path(cli.OUTPUT_DIR.value, "results.csv"), lines)


if __name__ == "__main__":
    cli.start(run)
