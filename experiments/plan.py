"""Will this model, this context and this method fit on a TPU slice, and what bounds its speed? Asked before renting it.

    python -m experiments.plan --model=llama3_1_8b --context=1048576 --batch=1 --topology=v5e:16x16 \
        --methods=full,int4,kivi2,snapkv_int4 [--mesh=seq:32,model:8] [--output_dir=DIR] [--json]

For every method the real prefill and decoding programs are compiled for the slice, on this machine and without a TPU.
Bytes and FLOPs are of one device and one step; times divide them by the published bandwidth and peak of the chip, so
they are bounds: no program is faster. What the compiler itself thinks of the time is not shown.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import dataclasses
import json
import math
import os
import pathlib
import re
import sys

from absl import flags

from experiments import cli, pictures
from experiments.methods import READ, load_method
from experiments.planner import Plan, Planner, Setting
from experiments.report import human_bytes
from experiments.shapes import model_names, read_model
from experiments.tpu_compiler import GENERATIONS, V4, Generation, compile_only_devices
from kvjax import sharding
from models.config import DecoderConfig

for _name in ("gin_file", "gin_bindings", "model", "methods", "keep", "context", "batch", "mesh", "output_dir", "json"):
    flags.declare_key_flag(_name)
flags.declare_key_flag("read")
_TOKENS = 131072  # of each prompt, without --context
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "Slice, such as v5e:16x16 or v5p:4x4x4.")
_SPLIT_WEIGHTS = flags.DEFINE_bool("split_weights", False, "Split weights over the sequence axis too.")
_INT8_WEIGHTS = flags.DEFINE_bool("int8_weights", False, "Matrices of the layers in 8 bits.")
_CHUNK = flags.DEFINE_integer("chunk", 2048, "Tokens of a chunk of the prompt.")
_ROOM = flags.DEFINE_integer("room", 1024, "Tokens to make room for behind the prompt.")
_LARGEST = flags.DEFINE_bool("largest", True, "Look for the largest context that fits.")

_CHIPS = {generation.name: generation for generation in (*GENERATIONS, V4)}
_EXAMPLES = ("v5e:2x2", "v5e:4x4", "v5e:16x16", "v6e:16x16", "v5p:2x2x1", "v5p:8x8x8", "v4:2x2x1", "tpu7x:2x2x1")


def read_topology(name: str) -> tuple[Generation, int]:
    """The chip of a slice such as "v5e:16x16", and how many of them.

    Raises:
      ValueError: it is not one, with those that are known.
    """
    chip, _, shape = name.partition(":")
    if chip not in _CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise ValueError(f"--topology: unknown slice {name!r}; slices are written like {', '.join(_EXAMPLES)}.")
    return _CHIPS[chip], math.prod(map(int, shape.split("x")))


def default_mesh(config: DecoderConfig, devices: int) -> str:
    """KV heads over as many devices as they divide into, slots over the rest."""
    model = math.gcd(config.num_kv_heads, devices)
    return ",".join(f"{name}:{n}" for name, n in (("seq", devices // model), ("model", model)) if n > 1) or "model:1"


def figures(plan: Plan, chip: Generation, devices_per_chip: int) -> dict:
    """What is said of a method, for the table and as JSON; bytes and times are of one device."""
    capacity = chip.hbm_gibibytes * 2**30 / devices_per_chip
    bandwidth = plan.step_bytes / (chip.gigabytes_per_second * 1e9 / devices_per_chip)
    compute = plan.step_flops / (chip.teraflops * 1e12 / devices_per_chip)
    return dataclasses.asdict(plan) | {
        "peak_bytes": plan.peak_bytes,
        "hbm_bytes": int(capacity),
        "fits": plan.peak_bytes <= capacity,
        "bandwidth_seconds": bandwidth,
        "compute_seconds": compute,
        "bound_by": "bandwidth" if bandwidth >= compute else "compute",
    }


def table(rows: list[dict]) -> str:
    """A line a method, and below it what the programs send between devices."""
    width = max(len("method"), *(len(row["method"]) for row in rows))
    titles = ("weights", "cache", "beside", "total", "of HBM", "fits", "largest", "reads", "bandwidth", "compute")
    lines = [f"{'method':<{width}}" + "".join(f"{title:>11}" for title in titles) + f"{'compiled':>10}"]
    lines.append("-" * len(lines[0]))
    for row in rows:
        beside = row["peak_bytes"] - row["weight_bytes"] - row["cache_bytes"]
        seconds = row["prefill"]["compile_seconds"] + row["decode"]["compile_seconds"]
        largest = row["largest_context"]
        cells = (
            human_bytes(row["weight_bytes"]),
            human_bytes(row["cache_bytes"]),
            human_bytes(max(beside, 0)),
            human_bytes(row["peak_bytes"]),
            f"{100 * row['peak_bytes'] / row['hbm_bytes']:.1f} %",
            "yes" if row["fits"] else "NO",
            "" if largest is None else f"{largest:,}",
            human_bytes(row["step_bytes"]),
            f"{1e3 * row['bandwidth_seconds']:.3f} ms",
            f"{1e3 * row['compute_seconds']:.3f} ms",
        )
        lines.append(f"{row['method']:<{width}}" + "".join(f"{cell:>11}" for cell in cells) + f"{seconds:>8.0f} s")
    lines.append("")
    for row in rows:
        for name in ("prefill", "decode"):
            sent = ", ".join(
                f"{count} {kind} of {human_bytes(size)}" for kind, (count, size) in row[name]["collectives"].items()
            )
            lines.append(f"{row['method']:<{width}}  {name:<8}{sent or 'nothing is sent'}")
    return "\n".join(lines)


_LEGEND = """
All of one device. beside: the most that the prefill or a decoding step holds beside weights and cache. reads: weights
and cache, once each, by a decoding step; bandwidth and compute: the least times that reading and the products take on
this chip; the larger one binds. Collectives are counted in the program's text, once where they stand in a loop, with
the bytes of their results. largest: tokens that fit, with what is beside growing as the context does (not compiled).
"""


def run() -> None:
    """The program."""
    context, batch = cli.only(cli.CONTEXT, _TOKENS), 1 if cli.BATCH.value is None else cli.BATCH.value
    for name, value in (("context", context), ("batch", batch), *((f.name, f.value) for f in (_CHUNK, _ROOM))):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    if cli.MODEL.value is None:
        raise ValueError(f"--model says which shape: one of {', '.join(model_names())}, or a path of a config.json.")
    config = read_model(cli.MODEL.value, context)
    chip, chips = read_topology(_TOPOLOGY.value)
    budget = cli.only(cli.KEEP, 0.25)
    how = dict(budget=budget, read=cli.only(cli.READ, READ), **cli.configs())
    methods = [load_method(name, **how) for name in dict.fromkeys(cli.METHODS.value or ["full", "int4"])]
    cli.check_reached(method.config for method in methods)
    devices = compile_only_devices(_TOPOLOGY.value)
    text = cli.MESH.value or default_mesh(config, len(devices))
    setting = Setting(
        config,
        context=context,
        batch=batch,
        mesh=sharding.make_mesh(text, devices),
        rules=sharding.WEIGHTS_OVER_SEQUENCE if _SPLIT_WEIGHTS.value else sharding.RULES,
        int8_weights=_INT8_WEIGHTS.value,
        chunk=_CHUNK.value,
        room=_ROOM.value,
    )
    planner, rows = Planner(setting), []
    per_chip = len(devices) // chips
    capacity = chip.hbm_gibibytes * 2**30 / per_chip
    for index, method in enumerate(methods, start=1):
        say = lambda what: cli.show_progress(f"[{index}/{len(methods)}] {method.name}: {what} for {_TOPOLOGY.value}")
        rows.append(figures(planner.plan(method, capacity if _LARGEST.value else None, say), chip, per_chip))
    cli.show_progress("")
    about = {
        "model": config.name,
        "context": setting.context,
        "batch": setting.batch,
        "topology": _TOPOLOGY.value,
        "mesh": text,
        "devices": len(devices),
        "keep": budget,
        "chunk": setting.chunk,
        "command": [os.path.basename(sys.executable), "-m", "experiments.plan", *sys.argv[1:]],
    }
    document = json.dumps(about | {"methods": rows}, indent=1)
    if cli.JSON.value:
        print(document)
    else:
        each = "chips" if per_chip == 1 else f"devices, {per_chip} a chip"
        print(f"{config.name}, {setting.batch} x {setting.context:,} tokens, {_TOPOLOGY.value}: {len(devices)} {each},")
        print(f"mesh {text}, {human_bytes(capacity)} of HBM each; methods with a token budget keep {budget:g}\n")
        print(table(rows))
        print(_LEGEND)
    if cli.OUTPUT_DIR.value is not None:
        folder = pathlib.Path(cli.OUTPUT_DIR.value)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(document + "\n", encoding="utf-8")
        title = f"{config.name}, {setting.batch} x {setting.context:,} tokens, {_TOPOLOGY.value}"
        pictures.plot_memory(rows, folder / "plan.png", title=title)
        if not cli.JSON.value:
            print(f"plan.json, plan.png are in {folder}.")


if __name__ == "__main__":
    cli.start(run)
