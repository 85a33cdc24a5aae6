"""The shard format: round trips, plain-Python reading, comparison of settings, failing disks."""

import dataclasses
import errno
import json
import os
from unittest import mock

import numpy as np
import pytest
from token_shards import documented_records, full_disk, make_info, random_records, write_tokens

from tokenbridge_jax.channels import ChannelStatistics
from tokenbridge_jax.data import shards
from tokenbridge_jax.data.shard_writer import ShardWriter, read_summary
from tokenbridge_jax.data.shards import DatasetInfo
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime.errors import UserError


def statistics_of(info, records) -> ChannelStatistics:
    statistics = ChannelStatistics(info.channels, info.quantizer.levels)
    statistics.update(records["indices"], np.ones((len(records), info.channels), np.int32))
    return statistics


@pytest.mark.parametrize(
    ("levels", "flips", "samples", "views"),
    [(2, False, 0, 1), (256, True, 1, 2), (257, True, 3, 6), (4096, False, 2, 2)],
)
def test_info_survives_json(levels, flips, samples, views):
    info = make_info(levels=levels, flips=flips, samples=samples)
    read = DatasetInfo.from_json(json.loads(json.dumps(info.to_json())))
    assert read == info
    assert info.views == views == len(info.to_json()["views"])
    assert read.record["indices"].shape == (views, 16, 3)
    assert read.record["indices"].base == ("u1" if levels <= 256 else "<u2")
    assert read.record.itemsize == 12 + views * 48 * (1 if levels <= 256 else 2)


def test_views_are_sample_major_and_plain_first():
    views = make_info(flips=True, samples=2).to_json()["views"]
    assert views == [{"sample": s, "flipped": f} for s in (0, 1) for f in (False, True)]


def test_the_five_documented_lines(tmp_path):
    info = write_tokens(tmp_path, {"train": [7, 3]}, levels=300, flips=True)
    found, expected = documented_records(tmp_path), random_records(info, range(7))
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


def test_documented_formula_dequantizes(tmp_path):
    # The formula in the module's documentation, in float32.
    quantizer = Quantizer.gaussian(64)
    described = make_info(levels=64).to_json()["quantizer"]
    v = np.array(described["level_values"], np.float32)
    low, high = np.float32(described["minimum"]), np.float32(described["maximum"])
    assert np.array_equal((v + 3) / 6 * (high - low) + low, quantizer.dequantize(np.arange(64)))


def test_writing_is_deterministic_and_summarised(tmp_path):
    info = make_info()
    records = random_records(info, range(20))
    skipped = [{"split": "train", "image": 20, "reason": "x"}]
    contents = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.array_record"
        with ShardWriter(path) as writer:
            for part in np.split(records, [3, 4, 17]):
                writer.write(part)
            assert not path.exists()
            written = writer.commit(skipped, statistics_of(info, records))
        contents.append(path.read_bytes())
        summary = read_summary(path)
        assert summary.records == written.records == 20
        assert summary.size == written.size == path.stat().st_size
        assert summary.skipped == skipped
        assert np.array_equal(summary.statistics.counts, statistics_of(info, records).counts)
        assert summary.statistics.clipped.tolist() == [20, 20, 20]
    assert contents[0] == contents[1]
    assert not list(tmp_path.glob(".*")) + list(tmp_path.glob("statistics/.*"))


def test_incomplete_shards_have_no_summary(tmp_path):
    info = write_tokens(tmp_path, {"train": [5]})
    path = tmp_path / info.splits["train"]["shards"][0]["file"]
    whole = path.read_bytes()
    assert read_summary(path) is not None
    path.write_bytes(whole[:-1])
    assert read_summary(path) is None
    path.write_bytes(b"\0" * len(whole))
    assert read_summary(path) is None
    path.unlink()
    assert read_summary(path) is None
    path.write_bytes(whole)
    assert read_summary(path) is not None
    (summary,) = (tmp_path / "statistics").iterdir()
    summary.write_text("{}")
    assert read_summary(path) is None


def write(folder, records, before_commit=lambda: None):
    with ShardWriter(folder / "x.array_record") as writer:
        writer.write(records)
        before_commit()
        writer.commit([], statistics_of(make_info(), records))


def test_failures_leave_nothing(tmp_path):
    records = random_records(make_info(), range(5))
    with pytest.raises(KeyError):
        write(tmp_path, records, before_commit=lambda: {}["missing"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="temporary file vanished; let only one run"):
        write(tmp_path, records, before_commit=lambda: next(tmp_path.glob(".*.tmp")).unlink())


def test_full_disks_are_named_and_nothing_is_left(tmp_path, monkeypatch):
    records = random_records(make_info(), range(3000))
    message = r"cannot write .*x\.array_record: the disk is full"
    with full_disk(), pytest.raises(UserError, match=message):
        write(tmp_path, np.tile(records, 100))
    assert list(tmp_path.iterdir()) == []
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=full))
    with pytest.raises(UserError, match=message):
        write(tmp_path, records)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        ShardWriter(tmp_path / "file" / "x.array_record")


def test_check_names_the_field(tmp_path):
    info = make_info(levels=16)
    info.check(levels=16, quantizer=Quantizer.gaussian(16), image_size=16, channel_order=(2, 0, 1))
    advice = "tokenize again with another --workdir, or set it back$"
    with pytest.raises(UserError, match=f"levels = 16 but this run has 64; {advice}"):
        info.check(image_size=16, levels=64)
    with pytest.raises(UserError, match=r"quantizer\.minimum = -5\.0 but this run has -4\.0"):
        info.check(quantizer=Quantizer(info.quantizer.level_values, -4.0, 5.0))
    with pytest.raises(UserError, match=r"autoencoder\.latent_channels = 3 but this run has 4"):
        info.check(autoencoder=dataclasses.replace(info.autoencoder, latent_channels=4))
    message = r"autoencoder_hash = 0{12} but.* put the autoencoder back$"
    with pytest.raises(UserError, match=message):
        info.check(autoencoder_hash="abc")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("seed", 1), ("flips", True), ("records_per_shard", 7), ("precision", "bfloat16")],
        *[("channel_order", (0, 1, 2)), ("class_names", ("a",))],
        ("sources", {"train": {"kind": "folder", "images": 9}}),
    ],
)
def test_any_difference_in_making_is_refused(name, value):
    info = make_info(sources={"train": {"path": "/a", "images": 1}})
    same = make_info(sources={"train": {"path": "/b", "images": 1}}, skipped=({},))
    info.check_same_making(dataclasses.replace(same, splits={"train": {}}))
    with pytest.raises(UserError, match=name):
        info.check_same_making(dataclasses.replace(info, **{name: value}))


def test_missing_and_foreign_folders(tmp_path):
    with pytest.raises(UserError, match="holds no token shards; run `tokenbridge tokenize` first"):
        shards.read_info(tmp_path)
    shards.write_info(tmp_path, make_info(), partial=True)
    with pytest.raises(UserError, match="is not finished"):
        shards.read_info(tmp_path)
    with pytest.raises(UserError, match="mount the bucket"):
        shards.local_folder("gs://bucket")
    path = tmp_path / shards.INFO_FILE
    for content, complaint in [
        ("{", "not valid JSON"),
        ('{"format": "other"}', "format 'other'"),
        (json.dumps(make_info().to_json() | {"format_version": 2}), "version 2"),
        (json.dumps({k: v for k, v in make_info().to_json().items() if k != "seed"}), "'seed'"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=rf"cannot read .*dataset\.json.*{complaint}"):
            shards.read_info(tmp_path)


def test_missing_and_truncated_shards_are_named(tmp_path):
    info = write_tokens(tmp_path, {"train": [5, 5]})
    assert [records for _, records in shards.shard_files(tmp_path, info, "train")] == [5, 5]
    path = tmp_path / "train-00001-of-00002.array_record"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"train-00001-of-00002\.array_record has \d+ bytes"):
        shards.shard_files(tmp_path, info, "train")
    path.unlink()
    with pytest.raises(UserError, match=r"train-00001-of-00002\.array_record is missing"):
        shards.shard_files(tmp_path, info, "train")
    with pytest.raises(UserError, match="no split 'validation'"):
        shards.shard_files(tmp_path, info, "validation")
