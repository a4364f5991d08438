"""What a model, a context and a method take on each device of a TPU slice: counted, and asked of the compiler."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import kvjax
from experiments.methods import Method
from kvjax import sharding
from kvjax.cache import segments_read
from models.config import DecoderConfig
from models.decoder import bind
from models.weights import abstract_params, param_axes

LONGEST = 2**28  # tokens: what a search for the largest context does not look beyond
_ITEMSIZE = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (\(?\w+\[.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\("
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is planned for.

    Attributes:
      config: the decoder's shape.
      context: tokens of every prompt.
      batch: prompts.
      mesh: of compile-only devices.
      rules: from names of axes to the mesh.
      int8_weights: matrices of the layers in 8 bits.
      chunk: tokens of a chunk of the prompt, for methods that do not say so themselves.
      room: tokens that follow the prompt.
    """

    config: DecoderConfig
    context: int
    batch: int
    mesh: Mesh
    rules: sharding.Rules = sharding.RULES
    int8_weights: bool = False
    chunk: int = 2048
    room: int = 1024


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program, bytes on one device.

    Attributes:
      argument_bytes: of what it is given.
      temporary_bytes: the most it holds beside that at any time.
      output_bytes: of its results, without those that take the place of arguments.
      compile_seconds: tracing and compiling.
      collectives: by kind, how many there are in the program's text (one in a loop counts once) and the bytes of
        their results.
      needs_bytes: where the compiler refused it for want of memory, what it says the program needs; None: it compiled.
    """

    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    compile_seconds: float
    collectives: dict[str, tuple[int, int]]
    needs_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        """All it needs at once."""
        return self.needs_bytes or self.argument_bytes + self.temporary_bytes + self.output_bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one method takes on one device.

    Attributes:
      method: its name.
      weight_bytes: of the weights.
      cache_bytes: of the compressed cache with its room, counted from the shapes of its shards.
      step_bytes: read from HBM by a decoding step: weights and cache, once each.
      step_flops: of its products.
      prefill: reads the prompt in chunks and compresses.
      decode: one token of every row.
      largest_context: tokens whose prefill and decoding fit, see `largest_context`; None: none was looked for.
    """

    method: str
    weight_bytes: int
    cache_bytes: int
    step_bytes: int
    step_flops: float
    prefill: Program
    decode: Program
    largest_context: int | None = None

    @property
    def peak_bytes(self) -> int:
        """Of the program that needs more."""
        return max(self.prefill.peak_bytes, self.decode.peak_bytes)


class Planner:
    """Traces and compiles one method after another in one setting; weights are shapes only."""

    def __init__(self, setting: Setting, dtype=jnp.bfloat16):
        self._setting = setting
        c, int8 = setting.config, setting.int8_weights
        params = abstract_params(c, dtype, int8=int8)
        placed = sharding.shardings(param_axes(c, int8=int8), params, setting.mesh, setting.rules)
        self._params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, placed)

    def plan(self, method: Method, capacity: float | None, say: Callable[[str], None] = lambda what: None) -> Plan:
        """Compiles the method's prefill and decoding.

        Args:
          method: what is planned.
          capacity: bytes of a device, to search the largest context; None: no search.
          say: is told what is going on.
        """
        context = self._setting.context
        with sharding.use_mesh(self._setting.mesh, self._setting.rules):
            say("compiling its decoding")
            run = self.run(method, context)
            decode, _ = self.decode(method, run)
            say("compiling its prefill")
            prompt = self._replicated(self._setting.batch, context), self._replicated(self._setting.batch)
            prefill, _ = compile_program(jax.jit(functools.partial(self._prefill, method)), self._params, *prompt)
            found = Plan(
                method.name,
                weight_bytes=self.weight_bytes,
                cache_bytes=bytes_on_device((run.cache, run.state)),
                step_bytes=self._bytes_read(run),
                step_flops=self._flops(run),
                prefill=prefill,
                decode=decode,
            )
            if capacity is None:
                return found
            say("looking for the largest context")
            cache_bytes = lambda tokens: bytes_on_device(self.run(method, tokens).cache)
            return dataclasses.replace(found, largest_context=largest_context(found, context, capacity, cache_bytes))

    def decode(self, method: Method, run: kvjax.Run) -> tuple[Program, str]:
        """A decoding step after `run`, and the text of its program; inside `use_mesh`."""
        token = self._replicated(self._setting.batch, 1)
        step = functools.partial(self._extend, method)
        return compile_program(jax.jit(step, donate_argnums=1), self._params, run, token)

    @property
    def weight_bytes(self) -> int:
        """Of the weights, on one device."""
        return bytes_on_device(self._params)

    def run(self, method: Method, context: int) -> kvjax.Run:
        """The shapes after a prompt of `context` tokens, and where they lie; inside `use_mesh`."""
        tokens = jax.ShapeDtypeStruct((self._setting.batch, context), jnp.int32)
        lengths = jax.ShapeDtypeStruct((self._setting.batch,), jnp.int32)
        return jax.eval_shape(functools.partial(self._prefill, method), self._params, tokens, lengths).placed()

    def _prefill(self, method: Method, params, tokens, lengths) -> kvjax.Run:
        s = self._setting
        lm = self._bound(method, params, tokens.shape[1])
        return lm.prefill(tokens, lengths, room=s.room, chunk=method.prefill_chunk or s.chunk)

    def _extend(self, method: Method, params, run, tokens) -> kvjax.Run:
        one = jnp.ones((self._setting.batch,), jnp.int32)
        return self._bound(method, params, run.room.prompt_slots).extend(run, tokens, one)[0]

    def _bound(self, method: Method, params, context: int) -> kvjax.BoundMethod:
        """What a context would cost, also one that the model was not trained for."""
        step = bind(params, self._setting.config, max_positions=context + self._setting.room)
        return kvjax.bind(step, method.transform)

    def _replicated(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(self._setting.mesh, P()))

    def _bytes_read(self, run: kvjax.Run) -> int:
        read = self._params
        if read.head is not None:
            read = read.replace(embed=None)  # one row of it
        return bytes_on_device(read) + round(sum(bytes_on_device(s) * part for s, part in _read_parts(run.cache)))

    def _flops(self, run: kvjax.Run) -> float:
        """2 for every weight of a matrix and row, 4 H G for every slot of a KV head that is attended to."""
        c = self._setting.config
        of_experts = c.experts_per_token / c.num_experts if c.num_experts else 1.0
        flops = 0.0
        for (_, weight, *_), leaf in jax.tree_util.tree_leaves_with_path(self._params.layers):
            if leaf.ndim >= 2:
                chosen = weight.name in ("w_gate", "w_up", "w_down") and leaf.ndim == 3
                flops += 2 * _entries(leaf) * (of_experts if chosen else 1.0)
        flops += 2 * _entries(self._params.output_head)
        split = sharding.layout({"batch": self._setting.batch})["batch"]
        flops *= self._setting.batch / sharding.shards(split)
        slots = 0
        for segment, part in _read_parts(run.cache):
            for path, leaf in jax.tree_util.tree_leaves_with_path(segment):
                if getattr(path[-1], "name", None) == "pos":
                    shared = leaf.shape[1] == 1 and c.num_kv_heads > 1  # coordinates that all heads read
                    slots += part * _entries(leaf) * (c.num_kv_heads if shared else 1)
        return flops + 4 * c.head_dim * (c.num_heads // c.num_kv_heads) * slots


def _read_parts(cache: kvjax.Cache) -> list[tuple[Any, float]]:
    """The segments that a decoding step reads, and which part of the bytes of each."""
    read = lambda segment: kvjax.bytes_read(kvjax.Cache((kvjax.LayerCache((segment,)),), cache.length))
    return [(segment, read(segment) / max(kvjax.nbytes(segment), 1)) for segment in segments_read(cache)]


def bytes_on_device(tree: Any) -> int:
    """Of all leaves that have a sharding, what one device holds."""
    return sum(_entries(x) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _entries(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape))


def compile_program(function: Any, *arguments: Any) -> tuple[Program, str]:
    """Compiles a jitted function for shapes with shardings: what it takes, and its text."""
    started = time.perf_counter()
    lowered = function.lower(*arguments)
    given = bytes_on_device(arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needs = memory_wanted(str(error))
        if needs is None:
            raise
        return Program(given, 0, 0, time.perf_counter() - started, {}, needs_bytes=needs), ""
    seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    program = Program(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        compile_seconds=seconds,
        collectives=collectives(text),
    )
    return program, text


def memory_wanted(message: str) -> int | None:
    """Bytes that a compiler says it lacks room for, from its error; None: it is about something else."""
    found = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", message)
    if found is None:
        return None
    return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]])


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """How many collectives of each kind a compiled program's text has, and the bytes of their results."""
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for result, kind, started in _COLLECTIVE.findall(text):
        sizes = [_bytes_of(dtype, shape) for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", result)]
        if started and kind != "all-reduce":  # names its operands before its results
            sizes = sizes[len(sizes) // 2 :]
        counts[kind][0] += 1
        counts[kind][1] += sum(sizes)
    return {kind: (count, size) for kind, (count, size) in sorted(counts.items())}


def _bytes_of(dtype: str, shape: str) -> int:
    bits = re.search(r"\d+$", dtype)
    itemsize = _ITEMSIZE.get(dtype) or max(int(bits[0]) / 8 if bits else 1, 0.25)
    return int(itemsize * math.prod(int(n) for n in shape.split(",") if n))


def largest_context(plan: Plan, context: int, capacity: float, cache_bytes: Callable[[int], int]) -> int:
    """The most tokens whose programs fit, in units of 1,024 tokens (of 128 below that); 0: not even the weights do.

    Weights and cache are counted at each context that is tried; what programs hold beside them grows in proportion to
    the context. No context but the first is compiled.
    """
    beside = max(p.peak_bytes - plan.weight_bytes - plan.cache_bytes for p in (plan.prefill, plan.decode))

    def fits(tokens: int) -> bool:
        return plan.weight_bytes + cache_bytes(tokens) + beside * tokens / context <= capacity

    unit = 1024 if capacity - plan.weight_bytes > 0 and fits(1024) else 128
    if plan.weight_bytes > capacity or not fits(unit):
        return 0
    # Bytes are nearly linear in tokens: a line through two contexts leads close, a few steps settle it.
    low, high = unit, LONGEST
    a, b = (plan.cache_bytes + beside, cache_bytes(2 * context) + 2 * beside)
    slope = (b - a) / context
    guess = context + (capacity - plan.weight_bytes - a) / slope if slope > 0 else high
    guess = int(min(max(guess, low), high)) // unit * unit
    step = max(guess // 64 // unit, 1) * unit
    if fits(guess):
        low = guess
        while low + step <= high and fits(low + step):
            low += step
            step *= 2
        high = min(low + step, high)
    else:
        high = guess
        while high - step > low and not fits(high - step):
            high -= step
            step *= 2
        low = max(high - step, low)
    while high - low > max(unit, low // 256):
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
