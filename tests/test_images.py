"""The crop against ADM's description in numpy, and pictures of every kind; the sources."""

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from sklearn.datasets import load_digits

from tokenbridge_jax.data import images, sources
from tokenbridge_jax.data.images import ImageError, center_crop, prepare
from tokenbridge_jax.runtime.errors import UserError

SAMPLE = Path(
    os.environ.get("TOKENBRIDGE_IMAGENET_SAMPLE")
    or Path(__file__).parent.parent.parent / "shared" / "imagenet-sample"
)


def halve(pixels: np.ndarray) -> np.ndarray:
    """A box filter from (h, w) to (h // 2, w // 2), odd sizes included, rounded as Pillow does."""
    for axis in (1, 0):  # Pillow goes along rows first and rounds in between.
        pixels = np.moveaxis(pixels, axis, 0)
        n, half = len(pixels), len(pixels) // 2
        if n == 2 * half:
            mean = (pixels[0::2].astype(np.float64) + pixels[1::2]) / 2
        else:
            # Output i averages the inputs within half a window of its centre. At a tie (the middle
            # of an odd length) rounding decides, so the arithmetic is Pillow's.
            windows = []
            for centre in (np.arange(half) + 0.5) * (n / half):
                x = np.arange(n) - centre + 0.5
                inside = (x * (1.0 / (n / half)) > -0.5) & (x * (1.0 / (n / half)) <= 0.5)
                inside[: int(centre - 0.5 * (n / half) + 0.5)] = False
                windows.append(pixels[inside].mean(axis=0))
            mean = np.stack(windows)
        pixels = np.moveaxis(np.floor(mean + 0.5).astype(np.uint8), 0, axis)
    return pixels


def bicubic(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Separable, antialiased bicubic (a = -0.5) by explicit weight matrices, rounded between."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0.0))

    def resize(pixels: np.ndarray, axis: int, size: int) -> np.ndarray:
        pixels = np.moveaxis(pixels, axis, 0)
        scale = len(pixels) / size
        stretch = max(scale, 1.0)
        centres = (np.arange(size) + 0.5) * scale
        weights = kernel((np.arange(len(pixels)) + 0.5 - centres[:, None]) / stretch)
        weights /= weights.sum(axis=1, keepdims=True)
        resized = np.einsum("oi,i...->o...", weights, pixels.astype(np.float64))
        return np.moveaxis(np.clip(np.floor(resized + 0.5), 0, 255).astype(np.uint8), 0, axis)

    if width != pixels.shape[1]:
        pixels = resize(pixels, 1, width)
    return resize(pixels, 0, height) if height != pixels.shape[0] else pixels


def adm(pixels: np.ndarray, size: int) -> np.ndarray:
    """ADM's centre crop, from its description, without Pillow."""
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = halve(pixels)
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    pixels = bicubic(pixels, round(height * scale), round(width * scale))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def encoded(image: Image.Image, format: str, **options) -> Image.Image:
    """The picture as it comes back from a file of the given format."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        *[(40, 40, 16), (64, 64, 16), (31, 32, 16), (33, 47, 16), (130, 65, 16), (129, 203, 32)],
        *[(5, 9, 16), (1, 1, 8), (3, 31, 8), (16, 16, 16), (16, 21, 16)],
    ],
)
def test_crop_is_adms(height, width, size):
    pixels = noise(height, width, seed=height)
    ours = center_crop(Image.fromarray(pixels), size)
    assert ours.shape == (size, size, 3)
    assert ours.dtype == np.uint8
    # Pillow's fixed-point weights may round a tie the other way.
    difference = np.abs(ours.astype(int) - adm(pixels, size))
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 0.02


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="TOKENBRIDGE_IMAGENET_SAMPLE is not set")
def test_crop_of_real_photographs_is_adms():
    source = sources.FolderSource(SAMPLE)
    for i in range(0, len(source), max(1, len(source) // 12)):
        image, _ = source.load(i)
        ours, _ = sources.load_prepared(source, i, 256, 3)
        difference = np.abs(ours.astype(int) - adm(np.asarray(image.convert("RGB")), 256))
        assert difference.max() <= 1
        assert np.mean(difference > 0) < 0.01


def test_grey_becomes_rgb_and_rgb_grey():
    grey = noise(20, 20, 1)
    assert np.array_equal(prepare(Image.fromarray(grey), 20, 3), np.stack([grey] * 3, axis=-1))
    assert np.array_equal(prepare(Image.fromarray(grey), 20, 1)[..., 0], grey)
    rgb = noise(20, 20)
    luma = rgb @ np.array([299, 587, 114]) / 1000
    assert np.abs(prepare(Image.fromarray(rgb), 20, 1)[..., 0] - luma).max() <= 1


def test_cmyk_jpeg():
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[..., 1:3] = 255  # Full magenta and yellow: red.
    red = prepare(encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100), 16)
    assert red[..., 0].min() > 250
    assert red[..., 1:].max() < 5


def test_palettes_and_transparency_keep_the_stored_colours():
    colours = np.array([[200, 10, 30], [0, 90, 250], [7, 7, 7]], np.uint8)
    places = np.random.default_rng(0).integers(0, 3, (12, 12)).astype(np.uint8)
    expected = colours[places]
    image = Image.fromarray(places, "L")
    image.putpalette(colours.tobytes())
    assert image.mode == "P"
    assert np.array_equal(prepare(encoded(image, "PNG"), 12), expected)
    for transparency in (1, b"\x00\x80\xff"):  # One transparent entry, or alpha for each.
        transparent = encoded(image, "PNG", transparency=transparency)
        assert transparent.mode == "P"
        assert np.array_equal(prepare(transparent, 12), expected)
    rgba = np.dstack([expected, places * 80])
    assert np.array_equal(prepare(encoded(Image.fromarray(rgba), "PNG"), 12), expected)
    grey_alpha = Image.merge("LA", [Image.fromarray(places * 100), Image.fromarray(places)])
    assert np.array_equal(prepare(encoded(grey_alpha, "PNG"), 12, 1)[..., 0], places * 100)


def test_bilevel():
    bits = noise(9, 9, 1) > 127
    ours = prepare(encoded(Image.fromarray(bits), "PNG"), 9)
    assert np.array_equal(ours, np.stack([bits * np.uint8(255)] * 3, axis=-1))


def test_16_bit_grey_is_scaled_not_clipped():
    deep = np.random.default_rng(0).integers(0, 65536, (32, 32)).astype(np.uint16)
    deep[0, :2] = 0, 65535
    expected = np.round(deep / 257).astype(np.uint8)
    from_png = encoded(Image.fromarray(deep), "PNG")
    assert from_png.mode == "I;16"
    for image in (from_png, Image.fromarray(deep.astype(np.int32))):  # The latter is mode "I".
        assert np.array_equal(prepare(image, 32, 1)[..., 0], expected)
        assert np.array_equal(prepare(image, 32, 3)[..., 2], expected)


def test_float_pictures_are_refused():
    with pytest.raises(ImageError, match="floating-point"):
        prepare(Image.fromarray(np.ones((8, 8), np.float32)), 8)


@pytest.mark.parametrize("orientation", range(0, 10))
def test_exif_orientation_is_applied(orientation):
    stored = noise(10, 10, seed=1)
    # What the picture's first row and column are, by the EXIF standard.
    shown = {
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }.get(orientation, stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(prepare(encoded(Image.fromarray(stored), "PNG", exif=exif), 10), shown)
    # Pillow turns TIFFs itself: they must not be turned twice.
    tiff = encoded(Image.fromarray(stored), "TIFF", tiffinfo={0x0112: orientation})
    assert np.array_equal(prepare(tiff, 10), shown)


def test_unreadable_exif_counts_as_none():
    pixels = noise(8, 8)
    image = encoded(Image.fromarray(pixels), "PNG", exif=b"Exif\x00\x00garbage garbage")
    assert np.array_equal(prepare(image, 8), pixels)


def test_huge_picture(tmp_path):
    # 225 megapixels: beyond where Pillow refuses, within what is allowed here.
    Image.new("L", (15000, 15000), 77).save(tmp_path / "huge.png", compress_level=1)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "huge.png")
    for file in (tmp_path / "huge.png", io.BytesIO((tmp_path / "huge.png").read_bytes())):
        assert images.open_picture(file).size == (15000, 15000)
    assert np.all(prepare(images.open_picture(tmp_path / "huge.png"), 8, 1) == 77)


@pytest.mark.parametrize("size", [(2**16, 2**14), (1, 2**20)])
def test_excessive_pictures_are_refused(size):
    # The second is small as a file, but its short side is 1: it would be 32 x 33 million pixels.
    image = Image.new("L", (1, 1))
    image = image.resize(size) if size[0] == 1 else _Pretends(size)
    with pytest.raises(ImageError, match="pixels are more than"):
        prepare(image, 32, 1)


class _Pretends(Image.Image):
    """A picture of a size that was never allocated."""

    def __init__(self, size):
        super().__init__()
        self._size = size


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_named(tmp_path, format):
    (tmp_path / "cat").mkdir()
    file = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(file, format)
    path = tmp_path / "cat" / f"half.{format.lower()}"
    path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
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
    with pytest.raises(UserError, match="does not exist"):
        sources.make_source(config(source="folder", path=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="no class folders"):
        sources.make_source(config(source="folder", path=str(tmp_path)))
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        sources.make_source(config(source="folder", path=str(tmp_path)))
    with pytest.raises(UserError, match=r"data\.path is not set"):
        sources.make_source(config(source="folder"))
    with pytest.raises(UserError, match="must be folder, tfds or digits"):
        sources.make_source(config(source="webdataset"))
    with pytest.raises(UserError, match="num_classes=10"):
        sources.make_source(config(source="digits", num_classes=5))
    for channels in (0, 2, 4):
        with pytest.raises(UserError, match=f"image_channels is {channels}; it must be 3"):
            sources.make_source(config(source="digits", image_channels=channels))
    with pytest.raises(UserError, match="'test'"):
        sources.make_source(config(source="digits"), "test")
    with pytest.raises(UserError, match="TFDS data directory"):
        sources.make_source(config(source="tfds", path=str(tmp_path)))


def test_folder_split_is_a_subfolder(tmp_path):
    write_tree(tmp_path, {"train/a/1.png": noise(2, 2), "val/a/2.png": noise(2, 2)})
    data = config(source="folder", path=str(tmp_path), num_classes=1000)
    data.split = "train"
    assert sources.make_source(data).name(0) == "a/1.png"
    assert sources.make_source(data, "val").name(0) == "a/2.png"
    data.path = str(tmp_path / "val")  # No subfolder "train": it is the training tree.
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
    root: Path, shards: dict[str, list[list[tuple[bytes, int, str]]]], features: dict | None = None
) -> Path:
    """An archive as `tfds build --file_format=array_record` leaves it, of (JPEG, label, name)."""
    import json

    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    folder = root / "imagenet2012" / "5.1.0"
    folder.mkdir(parents=True)
    features = features or {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=["n1", "n2", "n3"]),
        "file_name": tfds.features.Text(),
    }
    tfds.features.FeaturesDict(features).save_config(str(folder))

    def feature(**value):
        return tf_feature_pb2.Feature(**value)

    for split, lists in shards.items():
        for number, examples in enumerate(lists):
            name = f"imagenet2012-{split}.array_record-{number:05d}-of-{len(lists):05d}"
            writer = ArrayRecordWriter(str(folder / name), "group_size:1")
            for jpeg, label, file_name in examples:
                values = {
                    "image": feature(bytes_list=tf_feature_pb2.BytesList(value=[jpeg])),
                    "label": feature(int64_list=tf_feature_pb2.Int64List(value=[label])),
                    "file_name": feature(
                        bytes_list=tf_feature_pb2.BytesList(value=[file_name.encode()])
                    ),
                }
                example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=values))
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
    return folder


@pytest.fixture(scope="module")
def tfds_archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")

    def example(i: int) -> tuple[bytes, int, str]:
        file = io.BytesIO()
        Image.fromarray(np.full((20, 30 + i, 3), 20 * i, np.uint8)).save(file, "JPEG")
        return file.getvalue(), i % 3, f"n{i % 3 + 1}_{i}.JPEG"

    write_tfds_archive(
        root,
        {
            "train": [[example(0), example(1), example(2)], [example(3), example(4)]],
            "validation": [[example(5), example(6)]],
        },
    )
    return root


def test_tfds_source(tfds_archive):
    version_folder = tfds_archive / "imagenet2012" / "5.1.0"
    for path in (tfds_archive, version_folder):
        source = sources.make_source(config(source="tfds", path=str(path), split="train"))
        assert len(source) == 5
        assert source.class_names == ("n1", "n2", "n3")
        for i in range(5):
            image, label = source.load(i)
            assert image.format == "JPEG"  # The archive's own bytes, decoded by nobody before us.
            assert image.size == (30 + i, 20)
            pixels, _ = sources.load_prepared(source, i, 16, 3)
            assert np.abs(pixels.astype(int) - 20 * i).max() <= 2
            assert label == i % 3
    data = config(source="tfds", path=str(tfds_archive), split="train[1:3]")
    assert len(sources.make_source(data)) == 2
    assert len(sources.make_source(data, "validation")) == 2
    with pytest.raises(UserError, match="cannot read split 'test'"):
        sources.make_source(data, "test")


def tfds_config(root: Path, split: str, **data) -> ConfigDict:
    return config(source="tfds", path=str(root), split=split, **data)


def test_an_empty_tfds_split_is_named(tfds_archive):
    for split in ("train[:0%]", "validation[1:1]"):
        with pytest.raises(UserError, match=r"split '.*' of .*5\.1\.0 holds no pictures"):
            sources.make_source(tfds_config(tfds_archive, split))


def test_tfds_labels(tmp_path):
    import tensorflow_datasets as tfds

    image, scalar = tfds.features.Image(encoding_format="jpeg"), tfds.features.Scalar(np.int64)
    file = io.BytesIO()
    Image.fromarray(noise(9, 9)).save(file, "JPEG")
    examples = {"train": [[(file.getvalue(), label, "") for label in (0, 1, 1)]]}
    for name, label in (
        ("integers", scalar),
        ("text", tfds.features.Text()),
        ("several", tfds.features.Sequence(tfds.features.ClassLabel(num_classes=2))),
        ("none", None),
    ):
        features = {"image": image} | ({"label": label} if label else {})
        write_tfds_archive(tmp_path / name, examples, features)
    source = sources.make_source(tfds_config(tmp_path / "integers", "train", num_classes=3))
    assert source.class_names == ("0", "1", "2")
    assert [source.label(i) for i in range(3)] == [0, 1, 1]
    assert sources.load_prepared(source, 2, 9, 3)[1] == 1
    for name, message in (
        ("text", "labels of .* are no classes but Text"),
        ("several", "labels of .* are no classes but Sequence"),
        ("none", "has no feature 'label', only image: its pictures have no classes"),
    ):
        with pytest.raises(UserError, match=message):
            sources.make_source(tfds_config(tmp_path / name, "train"))
    write_tfds_archive(tmp_path / "numbers", examples, {"image": scalar, "label": scalar})
    with pytest.raises(UserError, match="has no feature 'image' of pictures, only image, label"):
        sources.make_source(tfds_config(tmp_path / "numbers", "train"))


def test_tfds_needs_no_tensorflow(tfds_archive):
    code = (
        "import sys\n"
        "from tokenbridge_jax.data import sources\n"
        f"source = sources.TfdsSource({str(tfds_archive)!r})\n"
        "print(sources.load_prepared(source, 4, 16, 3)[0].mean().round())\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert done.stdout.strip() == "80.0", done.stderr


def test_pillows_own_limit_is_left_alone(monkeypatch):
    assert Image.MAX_IMAGE_PIXELS == 1024 * 1024 * 1024 // 4 // 3
    file = io.BytesIO()
    Image.fromarray(noise(10, 10)).save(file, "BMP")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(images.decode(images.open_picture(file)), noise(10, 10))
    with pytest.raises(OSError, match="cannot identify"):
        images.open_picture(io.BytesIO(b"no picture"))


def tiff(pixels: np.ndarray, **options) -> Image.Image:
    return encoded(Image.fromarray(pixels), "TIFF", **options)


def test_the_white_of_deep_grey():
    rng = np.random.default_rng(0)
    twelve = rng.integers(0, 4096, (16, 16)).astype(np.uint16)
    twelve[0, :2] = 0, 4095
    expected = np.floor(twelve.astype(float) * 255 / 4095 + 0.5)
    for tag in (281, 341):  # MaxSampleValue, SMaxSampleValue.
        image = tiff(twelve, tiffinfo={tag: 4095})
        assert np.array_equal(prepare(image, 16, 1)[..., 0], expected)
    # Without a tag: neither black nor a guess. The same in a PNG, and in three colours.
    for image in (tiff(twelve), encoded(Image.fromarray(twelve), "PNG"), deep_rgb(twelve)):
        with pytest.raises(ImageError, match="16-bit pixels of which none reaches a sixteenth"):
            prepare(image, 16, 3)
    # A largest value that is a statistic moves nothing, and black is black.
    sixteen = twelve * 16
    scaled = np.round(sixteen / 257)
    for image in (tiff(sixteen, tiffinfo={281: int(sixteen.max())}), tiff(sixteen)):
        assert np.array_equal(prepare(image, 16, 1)[..., 0], scaled)
    assert np.array_equal(prepare(deep_rgb(sixteen), 16)[..., 1], sixteen >> 8)
    assert not prepare(tiff(np.zeros((9, 9), np.uint16)), 9).any()


def deep_rgb(grey: np.ndarray) -> Image.Image:
    """A PNG of three times 16 bits, which Pillow reads but does not write."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width = grey.shape
    rows = np.stack([grey] * 3, axis=-1).astype(">u2").reshape(height, -1).view(np.uint8)
    lines = np.pad(rows, ((0, 0), (1, 0)))  # Filter 0 in front of every line.
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    return Image.open(io.BytesIO(data))


def test_integers_without_a_known_white_are_refused():
    pixels = np.random.default_rng(0).integers(0, 2**20, (8, 8)).astype(np.int32)
    with pytest.raises(ImageError, match="32-bit integer pixels, whose white is unknown"):
        prepare(tiff(pixels), 8)
    expected = np.floor(pixels.astype(float) * 255 / (2**20 - 1) + 0.5)
    image = tiff(pixels, tiffinfo={341: 2**20 - 1})
    assert np.array_equal(prepare(image, 8, 1)[..., 0], expected)
