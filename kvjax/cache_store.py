"""A folder of compressed caches, which several processes share: put, get, list, evict."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.drivers import Run
from kvjax.saved_runs import check_described, describe, leaves_of

_MAGIC = b"kvjax cache 1\n"
_DIGEST = hashlib.sha256().digest_size
_SUFFIX, _WRITING, _LOCK = ".kvjax", ".writing-", ".lock"


@dataclasses.dataclass(frozen=True)
class Entry:
    """What `CacheStore.list` says of an entry.

    Attributes:
      key: of it.
      nbytes: of its file.
      used: when it was last put or got, in seconds since 1970.
    """

    key: str
    nbytes: int
    used: float


class CacheStore:
    """Keeps runs in files, each under the hash of the model, the tokens and the method that it is of.

    An entry is one file: a description, the arrays as they are (codes stay codes), and a digest of both. It is written
    beside the others and renamed when all of it is on the disk, so that a process which is killed loses nothing that
    was there; what it left is removed by the next `put`. Any number of processes of one machine may use a folder.
    """

    def __init__(self, path: str | os.PathLike[str], *, limit: int | None = None):
        """Makes the folder where it is missing.

        Args:
          path: the folder.
          limit: bytes of all entries; `put` evicts those that were not used for longest. None: any number.

        Raises:
          ValueError: limit is below 1.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 byte or None, got {limit}.")
        self._path, self._limit = pathlib.Path(path).absolute(), limit
        self._path.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def key(model: str, tokens: Any, method: str) -> str:
        """Hashes what an entry is of.

        Args:
          model: what tells its weights apart from any others: a name and a revision, or a fingerprint.
          tokens: i32[B, T], or a list of ids: what was read.
          method: its name with all of its settings.
        """
        tokens = np.asarray(tokens)
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be integers, got {tokens.dtype}.")
        said = json.dumps([model, method, list(tokens.shape)]).encode()
        return hashlib.sha256(said + b"\n" + tokens.astype("<i8").tobytes()).hexdigest()

    def put(self, key: str, run: Run, about: dict[str, Any] | None = None) -> None:
        """Writes a run, in place of what was under its key.

        Args:
          key: of `key`.
          run: outside of jit, with all of its arrays on this host.
          about: JSON that errors quote: the model, the method, the text.

        Raises:
          ValueError: the key is none, arrays lie on several hosts (`kvjax.save_run` writes these), or the entry is
            larger than the limit.
          OSError: it cannot be written; nothing was changed.
        """
        file = self._file(key)
        if not all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(run)):
            raise ValueError("run must have all of its arrays on this host: kvjax.save_run writes those of several.")
        arrays = {path: _raw(x) for path, x in leaves_of(run).items()}
        described = json.dumps({"key": key, **describe(run, about)}).encode()
        size = len(_MAGIC) + 8 + len(described) + sum(x.nbytes for x in arrays.values()) + _DIGEST
        if self._limit is not None and size > self._limit:
            raise ValueError(f"run takes {size} bytes, more than the limit of {self._limit}.")
        with self._new_file() as staging:
            digest = hashlib.sha256()
            for part in (_MAGIC, len(described).to_bytes(8, "little"), described, *map(_bytes, arrays.values())):
                digest.update(part)
                staging.write(part)
            staging.write(digest.digest())
            staging.flush()
            os.fsync(staging.fileno())
            with self._locked():
                os.replace(staging.name, file)
                if self._limit is not None:
                    self._evict(self._limit, keep=key)
        self._sync()

    def get(self, key: str, like: Run) -> Run | None:
        """Reads a run; None where there is none under this key.

        Args:
          key: of `key`.
          like: the shapes that it has, from `jax.eval_shape` of the prefill that made it; see `kvjax.load_run`.

        Raises:
          ValueError: the entry is damaged, of another key or of another method: names its file. It stays.
        """
        file = self._file(key)
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        described, start = _checked(file, content)
        if described.get("key") != key:
            raise ValueError(f"{file} is of another key, {described.get('key')}: remove it.")
        try:
            room = check_described(described, like, str(file))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} cannot be used ({error}).") from error
        placed, tree = jax.tree.flatten(like.placed())
        found = []
        for to, of in zip(placed, jax.tree.leaves(like)):
            raw = jax.eval_shape(jax.random.key_data, of) if jnp.issubdtype(of.dtype, jax.dtypes.prng_key) else of
            count = int(np.prod(raw.shape)) if raw.shape else 1
            x = np.frombuffer(content, jnp.dtype(raw.dtype), count, start).reshape(raw.shape)
            start += x.nbytes
            x = jax.device_put(x, getattr(to, "sharding", None) if raw is of else None)
            found.append(x if raw is of else jax.random.wrap_key_data(x))
        with contextlib.suppress(FileNotFoundError):
            os.utime(file)
        return jax.tree.unflatten(tree, found)._replace(room=room)

    def longest(self, model: str, tokens: Any, method: str, *, every: int) -> tuple[str, int] | None:
        """Finds the entry of the longest beginning of some tokens: what of them need not be read again.

        Prompts that begin alike share it where each was put after every chunk of so many tokens. For methods that act
        at a prompt's end the cache of a beginning is that of a prompt which ended there.

        Args:
          model: as of `key`.
          tokens: i32[B, T], or a list of ids.
          method: as of `key`.
          every: tokens of a chunk: beginnings of so many, twice as many ..., and the whole, are looked for.

        Returns:
          The key, and how many of the tokens it is of; None: there is no such entry.

        Raises:
          ValueError: every is below 1.
        """
        if every < 1:
            raise ValueError(f"every must be at least 1 token, got {every}.")
        tokens = np.asarray(tokens)
        count = tokens.shape[-1]
        for size in dict.fromkeys([count, *range(count // every * every, 0, -every)] if count else ()):
            key = self.key(model, tokens[..., :size], method)
            if self._file(key).is_file():
                return key, size
        return None

    def list(self) -> list[Entry]:
        """Returns what is there, the longest unused first."""
        found = []
        for file in self._path.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                stat = file.stat()
                found.append(Entry(file.stem, stat.st_size, stat.st_mtime))
        return sorted(found, key=lambda entry: (entry.used, entry.key))

    def remove(self, key: str) -> None:
        """Removes an entry, damaged or not; where there is none nothing happens."""
        self._file(key).unlink(missing_ok=True)

    def evict(self, limit: int) -> None:
        """Removes entries, the longest unused first, until all take at most so many bytes."""
        with self._locked():
            self._evict(limit)

    def _evict(self, limit: int, keep: str | None = None) -> None:
        entries = self.list()
        total = sum(entry.nbytes for entry in entries)
        for entry in entries:
            if total <= limit:
                break
            if entry.key != keep:
                self.remove(entry.key)
                total -= entry.nbytes

    def _file(self, key: str) -> pathlib.Path:
        if len(key) != 2 * _DIGEST or set(key) - set("0123456789abcdef"):
            raise ValueError(f"key must be one of CacheStore.key, {2 * _DIGEST} hexadecimal digits, got {key!r}.")
        return self._path / f"{key}{_SUFFIX}"

    @contextlib.contextmanager
    def _new_file(self) -> Iterator[Any]:
        """A file to write into, locked as long as its process lives; removed where it was not renamed."""
        import fcntl  # POSIX has it; the rest of this package can be read elsewhere

        with self._locked():
            self._remove_left()
            staging = tempfile.NamedTemporaryFile(dir=self._path, prefix=_WRITING, delete=False)
            fcntl.flock(staging, fcntl.LOCK_EX)
        try:
            with staging:
                yield staging
        finally:
            pathlib.Path(staging.name).unlink(missing_ok=True)

    def _remove_left(self) -> None:
        """Removes what processes left that were killed while they wrote: nobody holds the lock of such a file."""
        import fcntl

        for left in self._path.glob(f"{_WRITING}*"):
            with contextlib.suppress(OSError), open(left, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time, and one thread; the lock goes with a process however it ends."""
        import fcntl

        with open(self._path / _LOCK, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _sync(self) -> None:
        """Has the folder on the disk, with the new name in it."""
        folder = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _checked(file: pathlib.Path, content: bytes) -> tuple[dict[str, Any], int]:
    """Returns the description of an entry and where its arrays begin."""
    body, digest = content[:-_DIGEST], content[-_DIGEST:]
    if not body.startswith(_MAGIC):
        raise ValueError(f"{file} is no cache that this version wrote: remove it.")
    if hashlib.sha256(body).digest() != digest:
        raise ValueError(f"{file} is damaged: its digest is another: remove it.")
    start = len(_MAGIC) + 8
    end = start + int.from_bytes(body[len(_MAGIC) : start], "little")
    return json.loads(body[start:end]), end


def _raw(x: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def _bytes(x: np.ndarray) -> bytes:
    return np.ascontiguousarray(x).tobytes()
