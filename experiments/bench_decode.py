"""Prefill and decode speed of our decoder, beside Hugging Face transformers' on the same weights.

    python -m experiments.bench_decode --lengths=512,2048,8192 --output_dir=out/bench

Both read the same tokens in float32 with the same number of threads, in turn within one run; figures are medians.
The ceilings of the machine are measured in the same run, so that every figure stands beside what limits it. The peer
needs the extra `peer` (torch, transformers); without it its columns say so. The methods are compared at the longest
length, where the prompt is read once for all of them: their prefill is that reading and the compression of each. About
15 minutes on 2 cores.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from absl import flags

import kvjax
from experiments import cli, reading
from experiments.calibrations import Calibrations
from experiments.methods import READ, Method, check_method_names, load_method
from experiments.report import human_bytes
from experiments.stopwatch import in_turn, seconds
from experiments.transformers_peer import TransformersPeer
from models import Model, load_model
from models.assets import ESSAYS, fetch
from models.config import DecoderConfig
from models.decoder import bind

for _name in ("gin_file", "gin_bindings", "model", "methods", "keep", "read", "output_dir"):
    flags.declare_key_flag(_name)
_LENGTHS = flags.DEFINE_list("lengths", ["512", "2048", "8192"], "Prompt lengths in tokens.")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 32, "Tokens decoded per repeat.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed repeats; the median is printed.")

# What runs without --methods and --keep: at the longest length, beside the full cache.
_COMPRESSED = ("int8", "int4", "int2", "snapkv", "snapkv_int4", "streamingllm")
_COMPRESSED_KEEP = 0.25
_PACKAGES = ("jax", "jaxlib", "torch", "transformers")
_PEER = "transformers"


@dataclasses.dataclass(frozen=True)
class Speed:
    """One line of the tables: medians over the repeats.

    Attributes:
      name: of the method, or of the peer.
      prompt_tokens: length of the prompt.
      prefill_seconds: reading and compressing the prompt.
      decode_tokens_per_second: greedy, one sequence.
      prefill_bound_seconds: the FLOPs of a causal prefill at the machine's GFLOP/s.
      decode_bound_tokens_per_second: the bytes that a token must read, weights and cache, at its GB/s.
      cache_bytes: all arrays of the cache, room for the new tokens included; None for the peer.
      read_bytes: what attention reads of them for a token.
      tokens: what was decoded.
    """

    name: str
    prompt_tokens: int
    prefill_seconds: float
    decode_tokens_per_second: float
    prefill_bound_seconds: float
    decode_bound_tokens_per_second: float
    cache_bytes: int | None
    read_bytes: int | None
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the machine reaches in the simplest programs, at best of several tries."""

    gigabytes_per_second: float  # XLA's sum over 256 MB of float32
    gigaflops_per_second: float  # XLA's product of two 2048 x 2048 float32 matrices

    @classmethod
    def measure(cls) -> Ceilings:
        """Takes about a second."""
        long, square = jnp.ones((64_000_000,)), jnp.ones((2048, 2048))

        def best(f, x) -> float:
            jax.block_until_ready(f(x))
            return min(seconds(lambda: jax.block_until_ready(f(x)))[0] for _ in range(9))

        read, product = best(jax.jit(jnp.sum), long), best(jax.jit(lambda a: a @ a), square)
        return cls(4 * long.size / read / 1e9, 2 * 2048**3 / product / 1e9)


def prefill_flops(config: DecoderConfig, tokens: int) -> int:
    """Multiplications and additions of a causal prefill: matrices, attention, and the head of the last token."""
    N, K, H, D, F = config.num_heads, config.num_kv_heads, config.head_dim, config.width, config.ffn_width
    feed_forward = (3 if config.gated else 2) * D * (F * max(config.experts_per_token, 1) + config.shared_ffn_width)
    matrices = D * (N + 2 * K) * H + N * H * D + feed_forward
    if config.latent_rank:
        C, P, R, V = config.still_channels, config.rotated, config.latent_rank, config.value_channels
        matrices = D * (N * (C + P) + H) + N * R * (C + V) + N * V * D + feed_forward
    attention = 2 * N * H * (tokens + 1) / 2  # per query: its logits and its mix, over half the keys on average
    return int(2 * (config.num_layers * tokens * (matrices + attention) + D * config.vocab_size))


def weight_bytes(model: Model) -> int:
    """Bytes of weights that one token reads: all but an embedding of which it needs a single row."""
    unread = 0 if model.params.head is None else model.params.embed.nbytes
    return kvjax.nbytes(model.params) - unread


class Ours:
    """Our decoder with one method, compiled as two programs: a prefill, and a loop of which the cache is donated.

    With `prompt`, what `reading.read` returned, the first program only compresses it; reading counts as it took.
    """

    def __init__(self, model: Model, method: Method, ids: Sequence[int], new_tokens: int, prompt=None):
        config, T = model.config, len(ids)

        def lm(params):
            return kvjax.bind(bind(params, config), method.transform)

        def compress(params, out):
            return reading.compress(dataclasses.replace(model, params=params), method, out, [ids], room=new_tokens)

        def read(params, tokens):
            return lm(params).prefill(tokens, jnp.array([T]), room=new_tokens, chunk=method.prefill_chunk)

        def write(params, run):
            return lm(params).generate(run, new_tokens)

        shared = prompt is not None and not method.reads_alone
        self._params, self._prompt = model.params, prompt[0] if shared else jnp.asarray([ids])
        self._read, self._write = jax.jit(compress if shared else read), jax.jit(write, donate_argnums=1)
        self._seconds_before = prompt[1] if shared else 0.0
        run = jax.eval_shape(self._read, self._params, self._prompt)
        self.cache_bytes = kvjax.nbytes((run.cache, run.state))
        self.read_bytes = kvjax.bytes_read(run.cache)

    def __call__(self) -> tuple[float, float, tuple[int, ...]]:
        """Seconds of a prefill, seconds of the decoding, the tokens."""
        prefill, run = seconds(lambda: jax.block_until_ready(self._read(self._params, self._prompt)))
        decode, done = seconds(lambda: jax.block_until_ready(self._write(self._params, run)))
        return self._seconds_before + prefill, decode, tuple(done.tokens[0].tolist())


def read_prompt(model: Model, lengths: Sequence[int], new_tokens: int) -> tuple[list[int], list[int]]:
    """Token ids of essays, and the lengths, cut to what the model was trained for."""
    longest = model.config.max_positions - new_tokens
    if longest < 1:
        raise ValueError(f"--new_tokens must be below the model's {model.config.max_positions}, got {new_tokens}.")
    lengths = sorted({min(length, longest) for length in lengths})
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(fetch(ESSAYS).glob("*.txt")))
    ids = [*model.tokenizer.opening, *model.tokenizer.encode(text[: 16 * lengths[-1]])]
    if len(ids) < lengths[-1]:
        raise ValueError(f"--lengths must be at most {len(ids)}, the tokens of the text, got {lengths[-1]}.")
    return list(ids[: lengths[-1]]), lengths


def bench(
    model: Model,
    ids: Sequence[int],
    lengths: Sequence[int],
    methods: Sequence[Method],
    peer: TransformersPeer | None,
    ceilings: Ceilings,
    *,
    new_tokens: int,
    repeats: int,
) -> Iterator[list[Speed]]:
    """Yields, per length, the full cache and the peer; then all methods, the full cache first, at the longest."""
    groups = [(n, {methods[0].name: Ours(model, methods[0], ids[:n], new_tokens)}) for n in lengths]
    if len(methods) > 1:
        groups.append((lengths[-1], None))
    for index, (length, candidates) in enumerate(groups):
        if candidates is None:  # read once for all of them
            needs = reading.shared_needs(methods)
            reading.read(model, [ids[:length]], needs)  # compiles
            prompt = reading.read(model, [ids[:length]], needs)
            candidates = {m.name: Ours(model, m, ids[:length], new_tokens, prompt) for m in methods}
        full_bytes = candidates[methods[0].name].read_bytes
        if peer is not None and index < len(lengths):
            candidates = candidates | {_PEER: functools.partial(peer, ids[:length], new_tokens)}
        speeds = []
        for name, (prefill, decode, tokens) in in_turn(candidates, repeats).items():
            size, read_bytes = (getattr(candidates[name], f"{what}_bytes", None) for what in ("cache", "read"))
            read = weight_bytes(model) + (full_bytes if read_bytes is None else read_bytes)
            speeds.append(
                Speed(
                    name,
                    length,
                    prefill_seconds=prefill,
                    decode_tokens_per_second=new_tokens / decode,
                    prefill_bound_seconds=prefill_flops(model.config, length) / ceilings.gigaflops_per_second / 1e9,
                    decode_bound_tokens_per_second=ceilings.gigabytes_per_second * 1e9 / read,
                    cache_bytes=size,
                    read_bytes=read_bytes,
                    tokens=tokens,
                )
            )
        yield speeds


def _header(base: str) -> str:
    titles = f"{'prompt':>7}  {'':<14}{'prefill':>10}{'of peak':>9}{base:>14}"
    return titles + f"{'decode':>14}{'bound':>8}{base:>14}{'cache':>11}{'read':>11}"


def table(speeds: Sequence[Speed], base: str | None) -> str:
    """One line a candidate; ratios are speed relative to `base`, within this run."""
    reference = next((s for s in speeds if s.name == base), None)
    lines = []
    for s in speeds:
        ratios = ("", "") if reference is None else (
            f"{reference.prefill_seconds / s.prefill_seconds:.2f}x",
            f"{s.decode_tokens_per_second / reference.decode_tokens_per_second:.2f}x",
        )
        lines.append(
            f"{s.prompt_tokens:>7}  {s.name:<14}{s.prefill_seconds:>8.2f} s"
            f"{s.prefill_bound_seconds / s.prefill_seconds:>9.0%}{ratios[0]:>14}"
            f"{s.decode_tokens_per_second:>8.1f} tok/s{s.decode_bound_tokens_per_second:>8.1f}{ratios[1]:>14}"
            f"{'' if s.cache_bytes is None else human_bytes(s.cache_bytes):>11}"
            f"{'' if s.read_bytes is None else human_bytes(s.read_bytes):>11}"
        )
    return "\n".join(line.rstrip() for line in lines)


def run() -> None:
    """The program."""
    lengths = _read_lengths()
    for flag in (_NEW_TOKENS, _REPEATS):
        if flag.value < 1:
            raise ValueError(f"--{flag.name} must be at least 1, got {flag.value}.")
    names = _COMPRESSED if cli.METHODS.value is None else cli.METHODS.value
    keep = cli.only(cli.KEEP, _COMPRESSED_KEEP)
    check_method_names(names, paths=True)
    if cli.OUTPUT_DIR.value is not None:
        pathlib.Path(cli.OUTPUT_DIR.value).mkdir(parents=True, exist_ok=True)
    model = load_model(cli.MODEL.value or "smollm2")
    configs = dict(
        **cli.configs(),
        calibrate=Calibrations(model),
        tokenizer=model.tokenizer,
    )
    read = cli.only(cli.READ, READ)
    methods = [load_method(name, budget=keep, read=read, **configs) for name in dict.fromkeys(["full", *names])]
    cli.check_reached(method.config for method in methods)
    ids, lengths = read_prompt(model, lengths, _NEW_TOKENS.value)
    threads = _threads()
    try:
        peer = TransformersPeer(model, threads)
    except ImportError as error:
        peer = None
        print(f"No peer: {error}. Install the extra `peer` to compare.")
    except ValueError as error:  # another family
        peer = None
        print(f"No peer: {error}")
    versions = {name: version for name in _PACKAGES if (version := _version(name))}
    ceilings = Ceilings.measure()
    print(
        f"{model.config.name}, float32, {_processor()}, {threads} threads, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}\n"
        f"machine: {ceilings.gigabytes_per_second:.1f} GB/s memory read, "
        f"{ceilings.gigaflops_per_second:.0f} GFLOP/s float32; a token reads {weight_bytes(model) / 1e6:.0f} MB of "
        f"weights\n\n{_header(_PEER)}"
    )
    parts = []
    settings = dict(new_tokens=_NEW_TOKENS.value, repeats=_REPEATS.value)
    for speeds in bench(model, ids, lengths, methods, peer, ceilings, **settings):
        parts.append(speeds)
        if len(parts) > len(lengths):
            print(f"\n{_header('full')}\n{table(speeds, 'full')}", flush=True)
        else:
            print(table(speeds, _PEER), flush=True)
    if peer is not None:
        same = all(len({s.tokens for s in speeds}) == 1 for speeds in parts[: len(lengths)])
        print(f"\nBoth decoded {'the same' if same else 'DIFFERENT'} tokens at every length.")
    print(
        f"\n{_PEER}, full: speed relative to it in this run; medians of {_REPEATS.value} runs in turn.\n"
        "of peak: FLOPs of a causal prefill over time and peak. bound: tokens/s if a token cost no more than reading\n"
        "weights and what attention reads of the cache once at that bandwidth."
    )
    if cli.OUTPUT_DIR.value is not None:
        report = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "processor": _processor(),
            "threads": threads,
            "versions": versions,
            "ceilings": dataclasses.asdict(ceilings),
            "weight_bytes": weight_bytes(model),
            "speeds": [dataclasses.asdict(speed) for speeds in parts for speed in speeds],
        }
        path = pathlib.Path(cli.OUTPUT_DIR.value, "bench.json")
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _read_lengths() -> list[int]:
    try:
        lengths = [int(text) for text in _LENGTHS.value]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise ValueError(f"--lengths must be whole numbers of at least 1, got {','.join(_LENGTHS.value)!r}.")
    return lengths


def _threads() -> int:
    """Cores that this process may use: as many threads as XLA starts."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name where Linux tells it, or its family."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    cli.start(run)
