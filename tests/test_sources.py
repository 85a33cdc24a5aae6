"""Sources of pictures: folders, digits, TFDS archives; splits of them."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from sklearn.datasets import load_digits

from tokenbridge_jax.data import sources
from tokenbridge_jax.data.images import ImageError
from tokenbridge_jax.runtime.errors import UserError


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_named(tmp_path, format):
    path = tmp_path / "cat" / f"half.{format.lower()}"
    write_tree(tmp_path, {f"cat/{path.name}": noise(64, 64)})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "cat" / "junk.png").write_bytes(b"this is no picture")
    (tmp_path / "cat" / "nothing.png").write_bytes(b"")
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "elsewhere.png")
    source = sources.FolderSource(tmp_path)
    assert len(source) == 4
    with pytest.raises(ImageError, match=f"cannot identify image file '{tmp_path}/cat/junk.png'"):
        sources.load_prepared(source, 2, 16, 3)
    for i in range(4):
        with pytest.raises(ImageError, match=f"^{source.name(i)}: "):
            sources.load_prepared(source, i, 16, 3)


def test_failing_storage_is_not_a_broken_picture():
    class Failing(sources.DigitsSource):
        def load(self, i):
            raise OSError(5, "Input/output error")

    with pytest.raises(UserError, match=r"digit 0: Input/output error"):
        sources.load_prepared(Failing(), 0, 8, 3)


def write_tree(root: Path, files: dict[str, np.ndarray]) -> None:
    for name, pixels in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def test_folder_source(tmp_path, monkeypatch):
    files = {
        f"{name}.png": np.full((4, 4), value, np.uint8)
        for value, name in enumerate(["b/2", "b/10", "a/z", "a/deep/y", "c/x"])
    }
    write_tree(tmp_path, files)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(sources.FolderSource("~")) == len(files)
    write_tree(tmp_path, {".hidden/no.png": noise(4, 4), "a/.no.png": noise(4, 4)})
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "a" / "UPPER.PNG").write_bytes((tmp_path / "a" / "z.png").read_bytes())
    (tmp_path / "stray.png").write_bytes(b"")
    source = sources.FolderSource(tmp_path)
    assert source.class_names == ("a", "b", "c")
    names = [source.name(i) for i in range(len(source))]
    assert names == ["a/UPPER.PNG", "a/deep/y.png", "a/z.png", "b/10.png", "b/2.png", "c/x.png"]
    loaded = [sources.load_prepared(source, i, 4, 1) for i in range(6)]
    assert [label for _, label in loaded] == [0, 0, 0, 1, 1, 2]
    assert [pixels[0, 0, 0] for pixels, _ in loaded] == [2, 3, 2, 1, 0, 4]


def test_folder_description_follows_the_names_only(tmp_path):
    for root in ("one", "two", "three"):
        write_tree(tmp_path / root, {"a/1.png": noise(2, 2), "b/2.png": noise(2, 2)})
    write_tree(tmp_path / "three", {"b/3.png": noise(2, 2)})
    described = [sources.FolderSource(tmp_path / r).describe() for r in ("one", "two", "three")]
    for description in described:
        description.pop("path")
    assert described[0] == described[1]
    assert described[0]["names_sha256"] != described[2]["names_sha256"]


def test_readable_class_names(tmp_path):
    write_tree(tmp_path, {f"n{i}/1.png": noise(2, 2) for i in range(4)})
    (tmp_path / "classes.txt").write_text("n0 gold fish\nn1 crane\nn3 crane\n\nn9 other\n")
    source = sources.FolderSource(tmp_path)
    assert source.class_names == ("gold fish", "crane (n1)", "n2", "crane (n3)")


def config(**data) -> ConfigDict:
    common = {"split": "", "path": "", "name": "imagenet2012"}
    return ConfigDict({**common, "num_classes": 1000, "image_channels": 3, **data})


def test_bad_sources_are_named(tmp_path):
    (tmp_path / "classes" / "a").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for data, message in [
        ({"source": "folder", "path": str(tmp_path / "nowhere")}, "does not exist"),
        ({"source": "folder", "path": str(tmp_path / "empty")}, "no class folders"),
        ({"source": "folder", "path": str(tmp_path / "classes")}, "no pictures"),
        ({"source": "folder"}, r"data\.path is not set"),
        ({"source": "webdataset"}, "must be folder, tfds or digits"),
        ({"source": "digits", "num_classes": 5}, "num_classes=10"),
        (
            {"source": "digits", "path": "/pictures"},
            "path='/pictures' has no effect on data.source",
        ),
        *[({"source": "digits", "image_channels": n}, f"is {n}; it must be 3") for n in (0, 2, 4)],
        ({"source": "digits", "split": "test"}, "'test'"),
        ({"source": "tfds", "path": str(tmp_path)}, "TFDS data directory"),
    ]:
        with pytest.raises(UserError, match=message):
            sources.make_source(config(**data))


def test_folder_split_is_a_subfolder(tmp_path):
    write_tree(tmp_path, {"train/a/1.png": noise(2, 2), "val/a/2.png": noise(2, 2)})
    data = config(source="folder", path=str(tmp_path), num_classes=1000)
    data.split = "train"
    assert sources.make_source(data).name(0) == "a/1.png"
    assert sources.make_source(data, "val").name(0) == "a/2.png"
    data.path = str(tmp_path / "val")  # Without a subfolder "train" it is the training tree.
    assert sources.make_source(data).name(0) == "a/2.png"
    with pytest.raises(UserError, match="val/val does not exist"):
        sources.make_source(data, "val")


def test_digits():
    pixels, labels = load_digits(return_X_y=True)
    train, validation = sources.DigitsSource("train"), sources.DigitsSource("validation")
    assert len(train) + len(validation) == 1797
    for label in range(10):
        of_class = pixels[labels == label]
        first = train.images[train.labels == label]
        last = validation.images[validation.labels == label]
        assert len(first) == int(0.8 * len(of_class))
        ours = np.concatenate([first, last]).reshape(-1, 64)
        assert np.array_equal(ours, np.round(of_class * 255 / 16).astype(np.uint8))
    image, label = sources.load_prepared(train, 5, 8, 1)
    assert np.array_equal(image, train.images[5])
    assert label == train.labels[5]
    assert train.class_names[3] == "3"


def test_hold_out_is_by_name(tmp_path):
    write_tree(tmp_path, {f"a/{i}.png": np.zeros((1, 1), np.uint8) for i in range(300)})
    source = sources.FolderSource(tmp_path)
    train, validation = sources.hold_out(source, 0.2)
    assert sorted([*train, *validation]) == list(range(300))
    assert 30 < len(validation) < 90
    held_out = {source.name(int(i)) for i in validation}
    (tmp_path / "a" / "0.png").unlink()
    fewer = sources.FolderSource(tmp_path)
    again = {fewer.name(int(i)) for i in sources.hold_out(fewer, 0.2)[1]}
    assert again == held_out - {"a/0.png"}
    train, validation = sources.hold_out(source, 1e-9)
    assert (len(train), len(validation)) == (299, 1)


def write_tfds_archive(
    root: Path, shards: dict[str, list[list[tuple[bytes, int]]]], features: dict | None = None
) -> None:
    """Writes an archive of (JPEG, label) pairs as `tfds build --file_format=array_record` does."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2
    from tensorflow_datasets.proto import tf_feature_pb2 as proto

    folder = root / "imagenet2012" / "5.1.0"
    folder.mkdir(parents=True)
    features = features or {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=["n1", "n2", "n3"]),
        "file_name": tfds.features.Text(),
    }
    tfds.features.FeaturesDict(features).save_config(str(folder))
    for split, lists in shards.items():
        for number, examples in enumerate(lists):
            name = f"imagenet2012-{split}.array_record-{number:05d}-of-{len(lists):05d}"
            writer = ArrayRecordWriter(str(folder / name), "group_size:1")
            for jpeg, label in examples:
                values = {
                    "image": proto.Feature(bytes_list=proto.BytesList(value=[jpeg])),
                    "label": proto.Feature(int64_list=proto.Int64List(value=[label])),
                    "file_name": proto.Feature(bytes_list=proto.BytesList(value=[b"n1_1.JPEG"])),
                }
                example = tf_example_pb2.Example(features=proto.Features(feature=values))
                writer.write(example.SerializeToString())
            writer.close()
    info = {
        "name": "imagenet2012",
        "version": "5.1.0",
        "fileFormat": "array_record",
        "moduleName": "tensorflow_datasets.image_classification.imagenet",
        "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
        "splits": [
            {
                "name": split,
                "numBytes": "1000",
                "shardLengths": [str(len(examples)) for examples in lists],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
            for split, lists in shards.items()
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def tfds_archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    grey = [np.full((20, 30 + i, 3), 20 * i, np.uint8) for i in range(7)]
    examples = [(jpeg(pixels), i % 3) for i, pixels in enumerate(grey)]
    write_tfds_archive(root, {"train": [examples[:3], examples[3:5]], "validation": [examples[5:]]})
    return root


def tfds_config(root: Path, split: str, **data) -> ConfigDict:
    return config(source="tfds", path=str(root), split=split, **data)


def test_tfds_source(tfds_archive):
    for path in (tfds_archive, tfds_archive / "imagenet2012" / "5.1.0"):
        source = sources.make_source(tfds_config(path, "train"))
        assert len(source) == 5
        assert source.class_names == ("n1", "n2", "n3")
        for i in range(5):
            image, label = source.load(i)
            assert image.format == "JPEG"  # The bytes of the archive, not decoded before.
            assert image.size == (30 + i, 20)
            pixels, _ = sources.load_prepared(source, i, 16, 3)
            assert np.abs(pixels.astype(int) - 20 * i).max() <= 2
            assert label == i % 3
    data = tfds_config(tfds_archive, "train[1:3]")
    assert len(sources.make_source(data)) == 2
    assert len(sources.make_source(data, "validation")) == 2
    with pytest.raises(UserError, match="cannot read split 'test'"):
        sources.make_source(data, "test")
    for split in ("train[:0%]", "validation[1:1]"):
        with pytest.raises(UserError, match=r"split '.*' of .*5\.1\.0 holds no pictures"):
            sources.make_source(data, split)


def test_tfds_labels(tmp_path):
    import tensorflow_datasets as tfds

    image, scalar = tfds.features.Image(encoding_format="jpeg"), tfds.features.Scalar(np.int64)
    several = tfds.features.Sequence(tfds.features.ClassLabel(num_classes=2))
    picture = jpeg(noise(9, 9))

    def source(name, **features):
        examples = {"train": [[(picture, label) for label in (0, 1, 1)]]}
        write_tfds_archive(tmp_path / name, examples, features)
        return sources.make_source(tfds_config(tmp_path / name, "train", num_classes=3))

    integers = source("integers", image=image, label=scalar)
    assert integers.class_names == ("0", "1", "2")
    assert [integers.label(i) for i in range(3)] == [0, 1, 1]
    assert sources.load_prepared(integers, 2, 9, 3)[1] == 1
    for features, message in (
        ({"image": image, "label": tfds.features.Text()}, "labels of .* are not classes but Text"),
        ({"image": image, "label": several}, "labels of .* are not classes but Sequence"),
        ({"image": image}, "has no feature 'label', only image: its pictures have no classes"),
        ({"image": scalar, "label": scalar}, "has no feature 'image' of pictures, only image, lab"),
    ):
        with pytest.raises(UserError, match=message):
            source(f"{len(message)}", **features)


def test_tfds_needs_no_tensorflow(tfds_archive):
    code = (
        "import sys\n"
        "from tokenbridge_jax.data import sources\n"
        f"source = sources.TfdsSource({str(tfds_archive)!r})\n"
        # Worker processes get a copy.
        "import pickle\n"
        "source = pickle.loads(pickle.dumps(source))\n"
        "print(sources.load_prepared(source, 4, 16, 3)[0].mean().round())\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code]
    folder = Path(__file__).parent.parent
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=folder, check=True)
    assert done.stdout.strip() == "80.0"


def test_spread_covers_a_subset_evenly():
    source = sources.DigitsSource()
    subset = sources.Subset(source, np.arange(10, 40))
    assert subset.spread(4).images.tolist() == [10, 19, 29, 39]
    assert subset.spread(1).images.tolist() == [10]
    assert np.array_equal(subset.spread(100).images, subset.images)
    assert not len(sources.Subset(source, np.arange(0)).spread(3).images)
