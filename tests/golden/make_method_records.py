"""Writes method_records.npz: what every method computes and keeps on the tiny model, and compares with it.

  python -m tests.golden.make_method_records                    # writes all of it, 3 minutes on a CPU core
  python -m tests.golden.make_method_records --only=h2o,tova    # writes these, keeps the others as they are
  python -m tests.golden.make_method_records --check            # compares; exit status 1 if something differs

It runs on the CPU, whatever else there is. With `JAX_COMPILATION_CACHE_DIR` set, programs that did not change are not
compiled again: two minutes.

The methods are the cases of `tests/kvjax/cases.py`: every config, and the compositions that stress the algebra. Each
reads two prompts of different lengths, in one shot and in chunks; after the former come a question, of which the rows
have 4 and 2 tokens, and ten given tokens, one by one, while the second row rests once. The arrays:

  names     str[C], of the cases
  logits    f32[C, 13, B, 9]: of the next token, after the prompts in one shot, the prompts in chunks, the question, and
            each of the ten tokens: those of the ids in `COLUMNS`, then the sum of all over the square root of their
            number, whose rounding is that of one
  kept      i16[C, 3, L, B, K, S]: positions of the occupied slots of each layer, row and KV head, sorted, then -1;
            after the prompts in one shot, the prompts in chunks, and all tokens
  nbytes    i64[C], bytes of the cache after the prompts in one shot
  versions  str[2], of what computed them
"""

from __future__ import annotations

import argparse
import gc
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from tests.kvjax import tiny_model
from tests.kvjax.cases import CASES
from tests.kvjax.conformance import B, Case, Harness

PATH = pathlib.Path(__file__).with_name("method_records.npz")
COLUMNS = np.arange(50, tiny_model.CONFIG.vocab_size, 100)
CALLS = ((4, 2), *[(1, 1)] * 4, (1, 0), *[(1, 1)] * 5)
"""Tokens of each row in each call after the prompts."""
MOMENTS = ("one shot", "chunks", "question", *(f"token {i}" for i in range(1, len(CALLS))))
HELD_AT = ("one shot", "chunks", "end")

# Float32 sums in another order: compiled with all optimisations, the 34 cases tried are within 2.5e-6 and keep the same
# positions; compiled for AVX2 in the same way, all 55 give the same bits as for AVX-512. Logits are of order one.
CLOSE = dict(rtol=1e-5, atol=1e-5)


class MethodRecord(NamedTuple):
    """What one method computed and kept: see the arrays of the file, without their first axis."""

    logits: np.ndarray  # f32[13, B, 9]
    kept: np.ndarray  # i16[3, L, B, K, S]
    nbytes: np.ndarray  # i64[]


def record(case: Case) -> MethodRecord:
    """Runs one method."""
    harness = Harness(case, room=max(map(sum, zip(*CALLS))), call_tokens=max(map(max, CALLS)))
    runs = [harness.prefill("one_shot"), harness.prefill("chunked")]
    run = runs[0]
    question, given = tiny_model.prompt(B, max(CALLS[0]), seed=4), tiny_model.prompt(B, len(CALLS) - 1, seed=3)
    for tokens, counts in zip([question, *jnp.split(given, len(CALLS) - 1, axis=1)], CALLS):
        run = harness.extend(harness.params, run, tokens, jnp.int32(counts))
        runs.append(run)
    kept = [_kept(run.cache) for run in (*runs[:2], run)]
    logits = np.stack([_in_short(np.asarray(run.logits)) for run in runs])
    return MethodRecord(logits, _stacked(kept), np.int64(kvjax.nbytes(runs[0].cache)))


def _in_short(logits: np.ndarray) -> np.ndarray:
    """Returns f32[B, 9] of f32[B, V]."""
    total = np.sum(logits, axis=-1, keepdims=True, dtype=np.float64) / logits.shape[-1] ** 0.5
    return np.concatenate([logits[:, COLUMNS], total.astype(np.float32)], axis=-1)


def _kept(cache: kvjax.Cache) -> np.ndarray:
    """Returns i16[L, B, K, S], the positions that a cache holds, whatever it is made of."""
    rows = [kvjax.inspection.held_positions(cache, row) for row in range(B)]  # [B][L][K]
    longest = max(len(held) for row in rows for layer in row for held in layer)
    padded = lambda held: np.pad(np.int16(held), (0, longest - len(held)), constant_values=-1)
    return np.stack([[[padded(held) for held in layer] for layer in row] for row in rows], axis=1)


def _stacked(kept: list[np.ndarray]) -> np.ndarray:
    """Stacks positions whose last axes differ."""
    longest = max(x.shape[-1] for x in kept)
    pad = lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, longest - x.shape[-1])], constant_values=-1)
    return np.stack([pad(x) for x in kept])


def load() -> dict[str, MethodRecord]:
    """Returns the records of the file by name, none if there is no file."""
    if not PATH.exists():
        return {}
    with np.load(PATH) as file:
        return {str(name): MethodRecord(*each) for name, *each in zip(*(file[key] for key in _KEYS))}


_KEYS = ("names", *MethodRecord._fields)


def save(records: dict[str, MethodRecord]) -> None:
    """Writes the file."""
    logits, kept, nbytes = zip(*records.values())
    np.savez_compressed(
        PATH,
        names=np.array(list(records)),
        logits=np.stack(logits),
        kept=_stacked(list(kept)),
        nbytes=np.stack(nbytes),
        versions=np.array([f"jax {jax.__version__}", f"numpy {np.__version__}"]),
    )


def differences(new: MethodRecord, old: MethodRecord) -> list[str]:
    """Returns what a record says otherwise than an older one: logits, kept positions, more bytes; [] if nothing."""
    found = []
    wrong = ~np.isclose(new.logits, old.logits, **CLOSE)  # NaN, too
    if wrong.any():
        first = MOMENTS[int(np.argmax(wrong.any(axis=(1, 2))))]
        largest = np.max(np.abs(new.logits - old.logits))
        found.append(f"logits differ by up to {largest:.1e}, first after {first}")
    kept, before = _stacked([new.kept, old.kept])
    other = np.argwhere((kept != before).any(axis=-1))
    if len(other):
        moment, layer, row, head = first = tuple(other[0])
        lists = [x[first][x[first] >= 0].tolist() for x in (kept, before)]
        found.append(
            f"kept positions differ in {len(other)} lists of {before[..., 0].size}, first after {HELD_AT[moment]} in "
            f"layer {layer}, row {row}, head {head}: {lists[0]}, before {lists[1]}"
        )
    if new.nbytes > old.nbytes:
        found.append(f"{new.nbytes} bytes, before {old.nbytes}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Writes the records, or compares with them."""
    parser = argparse.ArgumentParser(description="Records what every method computes and keeps on the tiny model.")
    parser.add_argument("--check", action="store_true", help="compare with the file and leave it as it is")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="these cases; otherwise all of them")
    options = parser.parse_args(arguments)
    # Most programs compile in less than the second that JAX asks for before it stores one.
    cache = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}
    for name, value in {"jax_platforms": "cpu", **cache}.items():
        jax.config.update(name, value)

    cases = {case.name: case for case in CASES}
    names = options.only.split(",") if options.only else list(cases)
    if unknown := [name for name in names if name not in cases]:
        parser.error(f"--only must name cases of tests/kvjax/cases.py, got {', '.join(unknown)}.")
    recorded = load()
    differ = [] if options.only else [name for name in recorded if name not in cases]
    for name in differ:
        print(f"{name:28s} is recorded, and no case")
    records = dict(recorded)
    for name in names:
        new, old = record(cases[name]), recorded.get(name)
        records[name] = new
        found = ["not recorded"] if old is None else differences(new, old)
        print("\n    ".join([f"{name:28s} {_compared(new, old)}", *found]), flush=True)
        differ += [name] if found else []
        jax.clear_caches()
        gc.collect()
    print(f"{len(names)} cases, {len(differ)} differ from what was recorded{': ' if differ else ''}{', '.join(differ)}")
    if options.check:
        return 1 if differ else 0
    save({name: records[name] for name in cases if name in records})
    print(f"wrote {PATH.name}, {PATH.stat().st_size} bytes")
    return 0


def _compared(new: MethodRecord, old: MethodRecord | None) -> str:
    if old is None:
        return f"{new.nbytes:6d} bytes"
    same = "equal" if np.array_equal(*_stacked([new.kept, old.kept])) else "DIFFER"
    difference = float(np.max(np.abs(new.logits - old.logits)))
    return f"{new.nbytes:6d} bytes, before {old.nbytes:6d}; positions {same}; logits within {difference:.1e}"


if __name__ == "__main__":
    sys.exit(main())
