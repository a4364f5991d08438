"""The store: what was put comes back bit for bit, or is refused by name; processes that die or race lose nothing."""

import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import methods
from tests.kvjax import table_decoder

STEP = table_decoder.decoder(table_decoder.tables())


def _run(transform=methods.full(), tokens=4) -> kvjax.Run:
    given = jnp.int32(table_decoder.distinct_tokens(1, tokens))
    return kvjax.prefill(STEP, transform, given, jnp.array([tokens]), table_decoder.empty(1), room=1)


def _shapes(run: kvjax.Run) -> kvjax.Run:
    return jax.eval_shape(lambda: run)


def _key(name: str) -> str:
    return kvjax.CacheStore.key("tables", [1, 2, 3], name)


def _small(value: float, slots: int = 1) -> kvjax.Run:
    """A run of a few bytes."""
    cache = kvjax.empty_cache(batch=1, layers=1, kv_heads=1, head_dim=2, slots=slots)
    room = kvjax.Room(prompt_slots=1, method="full", total=1)
    return kvjax.Run(jnp.full((1, 1), value), cache, jax.random.key(3), jnp.ones(1, jnp.int32), room)


def test_a_key_is_of_the_model_the_tokens_and_the_method():
    key = kvjax.CacheStore.key
    keys = {key("a", [1, 2], "b"), key("a", [[1, 2]], "b"), key("a", [1, 3], "b"), key("c", [1, 2], "b")}
    assert len(keys | {key("a", [1, 2], "c")}) == 5
    assert key("a", jnp.int32([1, 2]), "b") == key("a", np.int64([1, 2]), "b")


def test_what_was_put_comes_back_and_codes_take_the_bytes_of_codes(tmp_path):
    store = kvjax.CacheStore(tmp_path / "store")
    packed = kvjax.quantize(2, key_group=16, value_group=4, residual=16)
    for name, run in (("small", _small(1.0)), ("full", _run(tokens=64)), ("packed", _run(packed, 64))):
        assert store.get(_key(name), _shapes(run)) is None
        store.put(_key(name), run, {"method": name})
        found = store.get(_key(name), _shapes(run))
        assert jax.tree.structure(found) == jax.tree.structure(run) and found.room == run.room
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(run)):
            same = jnp.array_equal(jax.random.key_data(x), jax.random.key_data(y)) if x.ndim == 0 else (x == y).all()
            assert x.dtype == y.dtype and same
    sizes = {entry.key: entry.nbytes for entry in store.list()}
    assert kvjax.nbytes(run.cache) < sizes[_key("packed")] < sizes[_key("full")]
    with pytest.raises(ValueError, match=r"holds another run \(method packed\)"):
        store.get(_key("packed"), _shapes(_run(tokens=64)))


def test_prompts_that_begin_alike_share_the_longest_beginning_that_was_put(tmp_path):
    store, ids = kvjax.CacheStore(tmp_path), list(range(20))
    assert store.longest("m", ids, "full", every=8) is None
    for size in (8, 16):
        store.put(store.key("m", ids[:size], "full"), _small(float(size)))
    for prompt, found in ((ids, 16), (ids[:15], 8), (ids[:8] + [90] * 12, 8), ([90] + ids, None), (ids[:7], None)):
        at = store.longest("m", prompt, "full", every=8)
        assert at == (found and (store.key("m", prompt[:found], "full"), found))
    assert store.longest("m", ids, "int4", every=8) is None and store.longest("m", [], "full", every=8) is None
    key = store.key("m", ids, "full")
    store.put(key, _small(20.0))
    assert store.longest("m", jnp.int32(ids), "full", every=8) == (key, 20)
    with pytest.raises(ValueError, match="every must be at least 1 token, got 0"):
        store.longest("m", ids, "full", every=0)


def test_a_beginning_goes_on_as_the_whole_prompt(tmp_path):
    """Codes from the first chunk on: read 32 of 48 tokens, put, got, and the rest read from there."""
    packed = kvjax.from_first_chunk(kvjax.quantize(4, key_group=16, value_group=4, residual=16))
    tokens = jnp.int32(table_decoder.distinct_tokens(1, 48))
    store, key = kvjax.CacheStore(tmp_path), kvjax.CacheStore.key("tables", tokens[:, :32], "packed")
    read = lambda tokens, room: kvjax.prefill(
        STEP, packed, tokens, jnp.array([tokens.shape[1]]), table_decoder.empty(1), room=room, call_tokens=16, chunk=16
    )
    begun = read(tokens[:, :32], 17)
    store.put(key, begun)
    assert store.longest("tables", tokens, "packed", every=16) == (key, 32)
    run, _ = kvjax.extend(STEP, packed, store.get(key, _shapes(begun)), tokens[:, 32:], jnp.array([16]))
    np.testing.assert_allclose(run.logits, read(tokens, 1).logits, atol=1e-5)


def test_those_unused_for_longest_are_evicted_first(tmp_path):
    store, run = kvjax.CacheStore(tmp_path), _small(0.0)
    for index, name in enumerate("abc"):
        store.put(_key(name), run)
        os.utime(tmp_path / f"{_key(name)}.kvjax", (index, index))
    each = store.list()[0].nbytes
    store.get(_key("a"), _shapes(run))
    assert [entry.key for entry in store.list()] == [_key(name) for name in "bca"]
    limited = kvjax.CacheStore(tmp_path, limit=2 * each)
    limited.put(_key("d"), run)
    assert [entry.key for entry in store.list()] == [_key(name) for name in "ad"]
    store.evict(0)
    assert store.list() == []
    with pytest.raises(ValueError, match="more than the limit"):
        kvjax.CacheStore(tmp_path, limit=each - 1).put(_key("a"), run)


def test_an_entry_with_any_other_byte_or_of_another_key_is_refused_by_name(tmp_path):
    store, run = kvjax.CacheStore(tmp_path), _small(0.0)
    store.put(_key("a"), run)
    file = tmp_path / f"{_key('a')}.kvjax"
    content, like = file.read_bytes(), _shapes(run)
    for index in range(len(content)):
        file.write_bytes(content[:index] + bytes([content[index] ^ 64]) + content[index + 1 :])
        with pytest.raises(ValueError, match=file.name):
            store.get(_key("a"), like)
    for end in (0, 1, 20, len(content) - 1):
        file.write_bytes(content[:end])
        with pytest.raises(ValueError, match=file.name):
            store.get(_key("a"), like)
    file.write_bytes(content)
    assert store.get(_key("a"), like) is not None
    file.rename(tmp_path / f"{_key('b')}.kvjax")
    with pytest.raises(ValueError, match="is of another key"):
        store.get(_key("b"), like)
    for key in ("../x", "", "A" * 64):
        with pytest.raises(ValueError, match="key must be one of CacheStore.key"):
            store.put(key, run)


_PUTS = """
import sys
from tests.kvjax.test_cache_store import _key, _shapes, _small
import kvjax
folder, first, count, limit = sys.argv[1], *map(int, sys.argv[2:])
store = kvjax.CacheStore(folder, limit=limit or None)
runs = [_small(float(n), slots=8 ** n) for n in range(4)]
print("ready", flush=True)
for index in range(first, first + count):
    name = index % 50 if limit else index
    store.put(_key(str(name)), runs[name % 4])
    if limit:
        other = index * 7 % 50
        found = store.get(_key(str(other)), _shapes(runs[other % 4]))
        assert found is None or found.logits == other % 4
print("done", flush=True)
"""


def _process(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", _PUTS, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


def _files(folder) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.endswith(".kvjax"))


def test_a_process_that_is_killed_while_it_puts_loses_nothing(tmp_path):
    store = kvjax.CacheStore(tmp_path)
    store.put(_key("before"), _small(5.0))
    process = _process(tmp_path, 0, 100_000, 0)
    assert process.stdout.readline() == "ready\n"
    while len(store.list()) < 8:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert store.get(_key("before"), _shapes(_small(5.0))).logits == 5.0
    runs = [_small(float(n), slots=8**n) for n in range(4)]
    written = [index for index in range(len(store.list()) - 1)]
    for index in written:  # in order, each whole
        assert store.get(_key(str(index)), _shapes(runs[index % 4])).logits == index % 4
    (tmp_path / ".writing-left").write_bytes(b"half of an entry")  # what is killed between two writes leaves this
    store.put(_key("after"), _small(6.0))
    assert _files(tmp_path) == [".lock"]


def _race(folder, count: int) -> None:
    limit = 60_000
    processes = [_process(folder, first, count, limit) for first in (0, 25)]
    for process in processes:
        out, _ = process.communicate()
        assert process.returncode == 0 and out.endswith("done\n")
    store = kvjax.CacheStore(folder)
    runs = [_small(float(n), slots=8**n) for n in range(4)]
    entries = {entry.key: entry.nbytes for entry in store.list()}
    assert 0 < sum(entries.values()) <= limit and _files(folder) == [".lock"]
    for name in range(50):
        found = store.get(_key(str(name)), _shapes(runs[name % 4]))
        assert found is None or found.logits == name % 4
    for key in entries:
        store.remove(key)
    assert store.list() == []


@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow, id="ten thousand puts and gets")])
def test_two_processes_leave_whole_entries_and_nothing_else(tmp_path, count):
    _race(tmp_path, count)
