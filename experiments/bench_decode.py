"""Prefill and decode speed of our decoder, beside Hugging Face transformers' on the same weights.

    python -m experiments.bench_decode --lengths=512,2048,8192 --output_dir=out/bench

Both read the same tokens in float32 with the same number of threads, in turn within one run; figures are medians.
The ceilings of the machine are measured in the same run, so that every figure stands beside what limits it. The peer
needs the extra `peer` (torch, transformers); without it its columns say so. The methods are compared at the longest
length, where the prompt is read once for all of them: their prefill is that reading and the compression of each. About
15 minutes on 2 cores.

    python -m experiments.bench_decode --model=llama3_1_8b --random_weights --dtype=bfloat16 --batch=8 \
        --mesh=data:2,model:4 --lengths=32768 --methods=int8,int4,snapkv_int4

times the shape of a model with untrained weights, on several devices. There is no peer then.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import kvjax
from experiments import cli, reading
from experiments.calibrations import Calibrations
from experiments.ceilings import Ceilings, prefill_flops, processor, threads, weight_bytes
from experiments.loading import on_mesh
from experiments.methods import READ, Method, check_method_names, load_method
from experiments.report import human_bytes
from experiments.shapes import read_model
from experiments.stopwatch import in_turn, seconds
from experiments.transformers_peer import TransformersPeer
from kvjax import sharding
from models import Model
from models.assets import ESSAYS, fetch
from models.decoder import bind
from models.weights import abstract_params, param_axes, random_params

_DECLARED = ("gin_file", "gin_bindings", "model", "methods", "keep", "read", "dtype", "batch", "mesh", "output_dir")
for _name in _DECLARED:
    flags.declare_key_flag(_name)
_RANDOM = flags.DEFINE_bool(
    "random_weights", False, "Untrained weights in the shape of --model: a name in configs/models, or a config.json."
)
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
      prompt_tokens: length of each prompt.
      prefill_seconds: reading and compressing the prompts.
      decode_tokens_per_second: greedy, of all rows together.
      prefill_bound_seconds: the FLOPs of a causal prefill at the machine's GFLOP/s.
      decode_bound_tokens_per_second: the bytes that a step must read, weights and caches, at its GB/s.
      cache_bytes: all arrays of the cache, room for the new tokens included; None for the peer.
      read_bytes: what attention reads of them in a step.
      tokens: what was decoded in the first row.
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


class Ours:
    """Our decoder with one method, compiled as two programs: a prefill, and a loop of which the cache is donated.

    With `prompt`, what `reading.read` returned, the first program only compresses it; reading counts as it took.
    """

    def __init__(self, model: Model, method: Method, rows: Sequence[Sequence[int]], new_tokens: int, prompt=None):
        config, lengths = model.config, reading.row_lengths(rows)

        def lm(params):
            return kvjax.bind(bind(params, config), method.transform)

        def compress(params, out):
            return reading.compress(dataclasses.replace(model, params=params), method, out, rows, room=new_tokens)

        def read(params, tokens):
            return lm(params).prefill(tokens, lengths, room=new_tokens, chunk=method.prefill_chunk)

        def write(params, run):
            done = lm(params).generate(run, new_tokens)
            return done._replace(tokens=sharding.constrain(done.tokens, None, None))  # every host has them

        shared = prompt is not None and not method.reads_alone
        self._params, self._prompt = model.params, prompt[0] if shared else reading.padded(rows)
        self._read, self._write = jax.jit(compress if shared else read), jax.jit(write, donate_argnums=1)
        self._seconds_before = prompt[1] if shared else 0.0
        run = jax.eval_shape(self._read, self._params, self._prompt)
        self.cache_bytes = kvjax.nbytes((run.cache, run.state))
        self.read_bytes = kvjax.bytes_read(run.cache)

    def __call__(self) -> tuple[float, float, tuple[int, ...]]:
        """Seconds of a prefill, seconds of the decoding, the tokens of the first row."""
        prefill, run = seconds(lambda: jax.block_until_ready(self._read(self._params, self._prompt)))
        decode, done = seconds(lambda: jax.block_until_ready(self._write(self._params, run)))
        return self._seconds_before + prefill, decode, tuple(jax.device_get(done.tokens)[0].tolist())


@contextlib.contextmanager
def loaded(name: str, dtype: str, random_weights: bool, mesh: str | None) -> Iterator[Model]:
    """Loads the model onto its mesh, in whose scope all that follows runs; with random weights it has no tokenizer."""
    with on_mesh(mesh) as load:
        if not random_weights:
            yield load(name, dtype)
            return
        config = read_model(name, None)
        named, shapes = param_axes(config), abstract_params(config, dtype)
        placed = None if mesh is None else sharding.shardings(named, shapes, jax.sharding.get_mesh())
        draw = jax.jit(functools.partial(random_params, config, dtype=jnp.dtype(dtype)), out_shardings=placed)
        yield Model(config, draw(jax.random.key(0)), None)


def read_prompt(model: Model, lengths: Sequence[int], new_tokens: int) -> tuple[list[int], list[int]]:
    """Token ids of essays, or any without a tokenizer, and the lengths, cut to what the model was trained for."""
    longest = model.config.max_positions - new_tokens
    if longest < 1:
        raise ValueError(f"--new_tokens must be below the model's {model.config.max_positions}, got {new_tokens}.")
    lengths = sorted({min(length, longest) for length in lengths})
    if model.tokenizer is None:
        return np.random.default_rng(0).integers(model.config.vocab_size, size=lengths[-1]).tolist(), lengths
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(fetch(ESSAYS).glob("*.txt")))
    ids = [*model.tokenizer.opening, *model.tokenizer.encode(text[: 16 * lengths[-1]])]
    if len(ids) < lengths[-1]:
        raise ValueError(f"--lengths must be at most {len(ids)}, the tokens of the text, got {lengths[-1]}.")
    return list(ids[: lengths[-1]]), lengths


def rows_of(ids: Sequence[int], batch: int) -> list[list[int]]:
    """Makes rows of the same tokens, each from another place on."""
    starts = [row * len(ids) // batch for row in range(batch)]
    return [[*ids[start:], *ids[:start]] for start in starts]


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
    batch: int = 1,
    whole: bool = False,
) -> Iterator[list[Speed]]:
    """Yields, per length, the full cache and the peer; then all methods, the full cache first, at the longest.

    With `whole`, for a mesh, every method reads the prompts by itself, as one program.
    """
    rows = {length: rows_of(ids[:length], batch) for length in lengths}
    groups = [(n, {methods[0].name: Ours(model, methods[0], rows[n], new_tokens)}) for n in lengths]
    if len(methods) > 1:
        groups.append((lengths[-1], None))
    for index, (length, candidates) in enumerate(groups):
        if candidates is None:  # read once for all of them
            prompt = None
            if not whole:
                needs = reading.shared_needs(methods)
                reading.read(model, rows[length], needs)  # compiles
                prompt = reading.read(model, rows[length], needs)
            candidates = {m.name: Ours(model, m, rows[length], new_tokens, prompt) for m in methods}
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
                    decode_tokens_per_second=batch * new_tokens / decode,
                    prefill_bound_seconds=batch * prefill_flops(model.config, length)
                    / (ceilings.gigaflops_per_second * 1e9),
                    decode_bound_tokens_per_second=batch * ceilings.gigabytes_per_second * 1e9 / read,
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
    batch = 1 if cli.BATCH.value is None else cli.BATCH.value
    for name, value in (("new_tokens", _NEW_TOKENS.value), ("repeats", _REPEATS.value), ("batch", batch)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    names = _COMPRESSED if cli.METHODS.value is None else cli.METHODS.value
    check_method_names(names, paths=True)
    if _RANDOM.value and cli.MODEL.value is None:
        raise ValueError("--random_weights needs the shape of a --model.")
    if cli.OUTPUT_DIR.value is not None:
        pathlib.Path(cli.OUTPUT_DIR.value).mkdir(parents=True, exist_ok=True)
    dtype, mesh = cli.DTYPE.value or "float32", cli.MESH.value
    with loaded(cli.MODEL.value or "smollm2", dtype, _RANDOM.value, mesh) as model:
        _bench(model, lengths, names, batch, dtype)


def _bench(model: Model, lengths: Sequence[int], names: Sequence[str], batch: int, dtype: str) -> None:
    mesh = cli.MESH.value
    measured = {} if model.tokenizer is None else dict(calibrate=Calibrations(model), tokenizer=model.tokenizer)
    how = dict(budget=cli.only(cli.KEEP, _COMPRESSED_KEEP), read=cli.only(cli.READ, READ), **cli.configs(), **measured)
    methods = [load_method(name, **how) for name in dict.fromkeys(["full", *names])]
    cli.check_reached(method.config for method in methods)
    ids, lengths = read_prompt(model, lengths, _NEW_TOKENS.value)
    cores = threads()
    peer = None
    if batch > 1 or dtype != "float32" or mesh is not None or model.tokenizer is None:
        print("No peer: it is compared on one device, with one prompt, in float32, on the weights of a checkpoint.")
    else:
        peer = _peer(model, cores)
    versions = {name: version for name in _PACKAGES if (version := _version(name))}
    ceilings = Ceilings.measure(dtype, jax.device_count() if mesh else 1)
    settings = ", ".join(
        [
            f"{model.config.name}{'' if model.tokenizer else ' (random weights)'}, {dtype}",
            *([f"{batch} rows"] if batch > 1 else []),
            *([f"mesh {mesh} of {jax.devices()[0].device_kind}"] if mesh else []),
        ]
    )
    print(
        f"{settings}, {processor()}, {cores} threads, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}\n"
        f"machine: {ceilings.gigabytes_per_second:.1f} GB/s memory read, "
        f"{ceilings.gigaflops_per_second:.0f} GFLOP/s {dtype}; a step reads {weight_bytes(model) / 1e6:.0f} MB of "
        f"weights\n\n{_header(_PEER)}"
    )
    parts = []
    how = dict(new_tokens=_NEW_TOKENS.value, repeats=_REPEATS.value, batch=batch, whole=mesh is not None)
    for speeds in bench(model, ids, lengths, methods, peer, ceilings, **how):
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
        "of peak: FLOPs of a causal prefill over time and peak. bound: tokens/s if a step cost no more than reading\n"
        "weights and what attention reads of the cache once at that bandwidth."
    )
    if cli.OUTPUT_DIR.value is not None:
        report = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "model": model.config.name,
            "random_weights": model.tokenizer is None,
            "dtype": dtype,
            "batch": batch,
            "mesh": mesh,
            "device": jax.devices()[0].device_kind,
            "processor": processor(),
            "threads": cores,
            "versions": versions,
            "ceilings": dataclasses.asdict(ceilings),
            "weight_bytes": weight_bytes(model),
            "speeds": [dataclasses.asdict(speed) for speeds in parts for speed in speeds],
        }
        path = pathlib.Path(cli.OUTPUT_DIR.value, "bench.json")
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _peer(model: Model, cores: int) -> TransformersPeer | None:
    try:
        return TransformersPeer(model, cores)
    except ImportError as error:
        print(f"No peer: {error}. Install the extra `peer` to compare.")
    except ValueError as error:  # another family
        print(f"No peer: {error}")
    return None


def _read_lengths() -> list[int]:
    try:
        lengths = [int(text) for text in _LENGTHS.value]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise ValueError(f"--lengths must be whole numbers of at least 1, got {','.join(_LENGTHS.value)!r}.")
    return lengths


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    cli.start(run)
