"""Shards of an object store are copied once and completely; error messages name what is wrong."""

import errno
import os
import time
from unittest import mock

import numpy as np
import pytest
from object_store import ObjectStore, register
from token_shards import write_tokens

from tokenbridge_jax.data.loader import make_loader
from tokenbridge_jax.data.local_copy import local_copy
from tokenbridge_jax.runtime.errors import UserError

FOLDER = "gs://bucket/run/tokens"


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An object store with the files in `tmp_path / "tokens"`; copies go to `tmp_path/"cache"`."""
    monkeypatch.setenv("TOKENBRIDGE_CACHE", str(tmp_path / "cache"))
    write_tokens(tmp_path / "tokens", {"train": [10, 9], "validation": [4]})
    files = ObjectStore()
    files.store.clear()
    for path in (tmp_path / "tokens").glob("*.*"):
        files.pipe(f"{FOLDER}/{path.name}", path.read_bytes())
    files.read.clear()
    return files


def test_batches_are_those_of_the_folder_that_was_copied(store, tmp_path):
    ours, theirs = make_loader(FOLDER, 8, 1), make_loader(tmp_path / "tokens", 8, 1)
    for _ in range(5):
        np.testing.assert_equal(next(ours), next(theirs))


def test_only_missing_files_are_copied(store, tmp_path):
    copy = local_copy(FOLDER)
    assert copy.is_relative_to(tmp_path / "cache")
    assert sorted(path.name for path in copy.iterdir()) == sorted(
        path.name for path in (tmp_path / "tokens").glob("*.*")
    )
    cut = copy / "train-00001-of-00002.array_record"
    cut.write_bytes(cut.read_bytes()[:-1])
    store.read.clear()
    assert local_copy(FOLDER) == copy
    assert store.read == ["dataset.json", cut.name]
    assert cut.read_bytes() == (tmp_path / "tokens" / cut.name).read_bytes()


def test_leftovers_of_killed_copies_are_removed(store):
    copy = local_copy(FOLDER)
    for name, age in [("old", 7200), ("young", 60)]:
        left = copy / f".{name}.tmp"
        left.touch()
        os.utime(left, (time.time() - age,) * 2)
    local_copy(FOLDER)
    assert [path.name for path in copy.glob(".*.tmp")] == [".young.tmp"]


def test_other_shards_under_the_same_name_are_another_copy(store, tmp_path):
    first = local_copy(FOLDER)
    described = store.cat(f"{FOLDER}/dataset.json")
    store.pipe(f"{FOLDER}/dataset.json", described.replace(b'"seed": 0', b'"seed": 1'))
    assert local_copy(FOLDER) != first


def test_a_folder_of_the_file_system_is_not_copied(tmp_path):
    assert local_copy(tmp_path) == tmp_path
    assert local_copy(str(tmp_path)) == tmp_path


def test_failed_copies_are_named(store, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="gs://bucket/other holds no finished token shards"):
        local_copy("gs://bucket/other")

    shard = f"{FOLDER}/train-00000-of-00002.array_record"
    content = store.cat(shard)
    store.pipe(shard, content[:-3])
    lengths = f"{len(content) - 3} bytes, not {len(content)}"
    with pytest.raises(UserError, match=rf"train-00000-of-00002\.array_record has {lengths}"):
        local_copy(FOLDER)
    store.rm(shard)
    with pytest.raises(UserError, match=r"train-00000-of-00002\.array_record is missing"):
        local_copy(FOLDER)
    assert not list((tmp_path / "cache").rglob("*.tmp"))

    opened = mock.Mock(side_effect=PermissionError("no credentials"))
    monkeypatch.setattr(ObjectStore, "_open", opened)
    with pytest.raises(UserError, match="cannot read gs://bucket/run/tokens: no credentials"):
        local_copy(FOLDER)
    # This is not a mistake of the user, and launch scripts may try again.
    opened.side_effect = ConnectionResetError("the network is down")
    with pytest.raises(ConnectionResetError):
        local_copy(FOLDER)


def test_a_full_disk_is_named(store, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("os.fsync", mock.Mock(side_effect=full))
    with pytest.raises(UserError, match=r"cannot write .*array_record: the disk is full"):
        local_copy(FOLDER)
    assert not list((tmp_path / "cache").rglob("*.tmp"))
