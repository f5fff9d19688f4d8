"""The cache on disk: what is written comes back, and nothing else is ever accepted."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from scripts import KILL_AT, ROOT

from dataloader.cache import CacheError, CacheWriter, fingerprint, open_cache, same_content
from se3_transformer.runtime.files import exclusive, write_file
from se3_transformer.runtime.script import UserError

REBUILD = "python rebuild.py --all"
SETTINGS = {"delta": 5, "rule": "spread", "pair": (1, 2)}


def write(directory, settings=SETTINGS, sources=None, value=0):
    with CacheWriter(directory, settings, sources or {"a": {"bytes": 3, "mtime_ns": 1, "sha256": "ab"}}) as writer:
        writer.create("x", np.array([4, 3]), "float32")[:] = np.arange(12).reshape(4, 3) + value
        writer.create("i", (5,), "int64")[:] = value
        writer.info["note"] = value


@pytest.fixture
def directory(tmp_path):
    write(tmp_path / "cache" / "set")
    return tmp_path / "cache" / "set"


def test_what_was_written_comes_back(directory):
    cache = open_cache(directory, REBUILD, SETTINGS, {"a": {"bytes": 3, "mtime_ns": 2, "sha256": "ab"}}, verify=True)
    np.testing.assert_array_equal(cache.arrays["x"], np.arange(12, dtype=np.float32).reshape(4, 3))
    np.testing.assert_array_equal(cache.arrays["i"], np.zeros(5, dtype=np.int64))
    assert {name: array.dtype for name, array in cache.arrays.items()} == {"x": np.float32, "i": np.int64}
    assert cache.info == {"note": 0} and cache.num_bytes == 4 * 3 * 4 + 5 * 8
    assert isinstance(cache.arrays["x"], np.memmap)


def test_changing_an_array_changes_nothing_on_disk(directory):
    open_cache(directory, REBUILD).arrays["x"][:] = -1
    assert open_cache(directory, REBUILD, verify=True).arrays["x"][0, 1] == 1


def test_writing_again_replaces(directory):
    before = open_cache(directory, REBUILD)
    write(directory, value=7)
    assert open_cache(directory, REBUILD, verify=True).info == {"note": 7}
    assert before.arrays["x"][0, 1] == 1, "an open cache changed"
    assert [path.name for path in directory.parent.iterdir() if path.is_dir()] == ["set"]


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit_manifest(directory, **changes):
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FAULTS = {  # what happens to a cache, and what the error says besides the command
    "no cache": (lambda d: d.rename(d.with_name("other")), r"manifest\.json: expected the manifest of a cache"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), r"manifest\.json: expected .* got no such file"),
    "manifest cut": (lambda d: os.truncate(d / "manifest.json", 100), r"manifest\.json: expected JSON"),
    "other JSON": (lambda d: (d / "manifest.json").write_text("[1]"), r"expected a manifest with a format version"),
    "manifest not text": (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe"), r"manifest\.json: expected JSON"),
    "other version": (lambda d: edit_manifest(d, format=99), r"expected format version 1, got 99"),
    "edited manifest": (lambda d: edit_manifest(d, info={"note": 1}), r"manifest\.json: expected the checksum"),
    "no checksum": (lambda d: edit_manifest(d, checksum=None), r"manifest\.json: expected the checksum"),
    "no array": (lambda d: (d / "x.npy").unlink(), r"x\.npy: expected an array of 176 bytes, got no such file"),
    "array cut": (lambda d: os.truncate(d / "x.npy", 150), r"x\.npy: expected 176 bytes, got 150"),
    "array cut to nothing": (lambda d: os.truncate(d / "x.npy", 0), r"x\.npy: expected 176 bytes, got 0"),
    "array grown": (lambda d: os.truncate(d / "x.npy", 200), r"x\.npy: expected 176 bytes, got 200"),
    "not an array": (lambda d: (d / "x.npy").write_bytes(b"?" * 176), r"x\.npy: expected an \.npy file"),
    "other dtype": (lambda d: np.save(d / "x.npy", np.zeros((4, 3), "int32")), r"x\.npy: expected dtype <f4, got <i4"),
    "other shape": (lambda d: np.save(d / "x.npy", np.zeros((3, 4), "float32")), r"expected shape \[4, 3\], got"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_cache_is_refused(directory, fault):
    damage, message = FAULTS[fault]
    damage(directory)
    with pytest.raises(CacheError, match=message) as error:
        open_cache(directory, REBUILD)
    assert str(error.value).endswith(f"Make the cache with: {REBUILD}")
    assert REBUILD not in error.value.problem


def test_a_changed_bit_anywhere_in_the_manifest_is_noticed(directory):
    path = directory / "manifest.json"
    for position in range(0, path.stat().st_size, 3):
        flip_bit(path, position)
        with pytest.raises(CacheError):
            open_cache(directory, REBUILD)
        flip_bit(path, position)
    open_cache(directory, REBUILD)


def test_a_changed_bit_of_an_array_is_noticed_on_verification(directory):
    flip_bit(directory / "x.npy", 150)
    open_cache(directory, REBUILD)
    with pytest.raises(CacheError, match=r"x\.npy: expected the checksum"):
        open_cache(directory, REBUILD, verify=True)


@pytest.mark.parametrize(("settings", "message"), [
    ({"delta": 10}, "expected delta = 10, got 5"),
    ({"rule": "first"}, "expected rule = 'first', got 'spread'"),
])  # fmt: skip
def test_other_settings_are_refused(directory, settings, message):
    with pytest.raises(CacheError, match=message):
        open_cache(directory, REBUILD, settings)


def test_a_cache_of_other_data_is_refused(directory):
    with pytest.raises(UserError, match="is a cache of other data: expected one with the setting more, got one with"):
        open_cache(directory, REBUILD, {"more": 1})


def test_other_sources_are_refused(directory, tmp_path):
    with pytest.raises(CacheError, match="the present content of a"):
        open_cache(directory, REBUILD, sources={"a": {"bytes": 3, "mtime_ns": 1, "sha256": "ac"}})
    with pytest.raises(CacheError, match=re.escape("expected sources ['a', 'b'], got ['a']")):
        open_cache(directory, REBUILD, sources={"a": {"bytes": 3, "sha256": "ab"}, "b": {"bytes": 3, "sha256": "ab"}})


def test_fingerprint(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    first = fingerprint(path)
    assert fingerprint(path, first | {"sha256": "known"})["sha256"] == "known", "an unchanged file was read again"
    os.utime(path, ns=(1, 1))
    touched = fingerprint(path, first | {"sha256": "known"})
    assert touched["sha256"] == first["sha256"] and same_content(first, touched)
    path.write_bytes(b"Content")
    assert not same_content(first, fingerprint(path, first))


def test_a_failing_writer_leaves_the_old_cache(directory):
    def fail():
        with CacheWriter(directory, SETTINGS, {}) as writer:
            writer.create("x", (4, 3), "float32")[:] = 9
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert open_cache(directory, REBUILD, SETTINGS, verify=True).info == {"note": 0}
    assert [path.name for path in directory.parent.iterdir() if path.is_dir()] == ["set"]


REPLACE_A_CACHE = """
import sys
from pathlib import Path
from dataloader.cache import CacheWriter
directory, name, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
with CacheWriter(directory, {"delta": 6}, {}) as writer:
    kill_at(os if name == "fsync" else Path, name, calls)
    writer.create("x", (4, 3), "float32")[:] = 1
    writer.create("i", (5,), "int64")[:] = 1
"""


@pytest.mark.parametrize(("name", "calls", "left"), [
    ("fsync", 1, "old"), ("replace", 1, "old"), ("rename", 1, "old"), ("rename", 2, "none"), ("fsync", 3, "new"),
])  # fmt: skip
def test_a_killed_writer_leaves_nothing_half_done(directory, name, calls, left):
    """Killed in writing the manifest, before renaming it, before and between renaming the directories, and after."""
    command = [sys.executable, "-c", KILL_AT + REPLACE_A_CACHE, directory, name, str(calls)]
    process = subprocess.run(command, cwd=ROOT, check=False)
    assert process.returncode == -signal.SIGKILL
    if left == "none":
        with pytest.raises(CacheError, match="no such file"):
            open_cache(directory, REBUILD)
    else:
        assert open_cache(directory, REBUILD, verify=True).settings["delta"] == {"old": 5, "new": 6}[left]
    write(directory, value=3)
    assert open_cache(directory, REBUILD, verify=True).info == {"note": 3}
    assert [path.name for path in directory.parent.iterdir() if path.is_dir()] == ["set"], "leftovers"


def test_one_writer_at_a_time(directory):
    with exclusive(directory), pytest.raises(BlockingIOError, match="another process is writing it"):
        write(directory)
    write(directory)


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"new")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_file(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
