"""Batches: their content on any number of processes, coverage, resumption, damaged shards."""

import collections
import gc
import itertools
import resource
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from refusals import no_more_files, open_files
from token_shards import make_info, random_records, write_tokens

from tokenbridge_jax.data import loader, readers, shard_writer, sources
from tokenbridge_jax.data.loader import (
    TokenRecords,
    make_image_loader,
    make_loader,
    validation_batches,
)
from tokenbridge_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_tokens(folder, {"train": [10, 10, 3], "validation": [5, 2]}, levels=16)
    return folder


@pytest.fixture(scope="module")
def many_views(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    write_tokens(folder, {"train": [20]}, levels=300, flips=True, samples=2)
    return folder


def numbered(info, count: int) -> dict[bytes, tuple[int, int]]:
    """(image, view) by the content of a view."""
    return {
        view.tobytes(): (int(record["image"]), number)
        for record in random_records(info, range(count))
        for number, view in enumerate(record["indices"])
    }


def images_of(batch, names) -> list[int]:
    return [names[indices.tobytes()][0] for indices in batch["indices"]]


def test_batches_hold_the_records(folder):
    names = numbered(make_info(), 23)
    for batch in itertools.islice(make_loader(folder, 4, seed=0), 6):
        assert batch["indices"].shape == (4, 16, 3)
        assert batch["indices"].dtype == np.uint8
        assert batch["labels"].dtype == np.int32
        assert [image % 3 for image in images_of(batch, names)] == batch["labels"].tolist()


def test_batches_are_what_their_definition_says(many_views):
    """Every element has the record that its epoch's order gives, and the view drawn for its row."""
    seed, batch_size, count = 7, 8, 20
    records = random_records(make_info(levels=300, flips=True, samples=2), range(count))
    loader = make_loader(many_views, batch_size, seed)
    for step, batch in enumerate(itertools.islice(loader, 6)):
        views = np.random.default_rng((seed, 1, step)).integers(4, size=batch_size)
        for row in range(batch_size):
            epoch, place = divmod(step * batch_size + row, count)
            order = np.random.default_rng((seed, 0, epoch)).permutation(count)
            record = records[order[place]]
            assert np.array_equal(batch["indices"][row], record["indices"][views[row]])
            assert batch["labels"][row] == record["label"]


def test_every_epoch_holds_every_image_once(folder):
    names = numbered(make_info(), 23)
    loader = make_loader(folder, 5, seed=3)
    stream = [image for batch in itertools.islice(loader, 23) for image in images_of(batch, names)]
    epochs = [stream[start : start + 23] for start in range(0, 5 * 23, 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5
    other_seed = make_loader(folder, 5, seed=4)
    assert [images_of(next(other_seed), names) for _ in range(2)] != [stream[:5], stream[5:10]]


@pytest.mark.parametrize("start_step", [0, 5])
@pytest.mark.parametrize("kind", ["tokens", "views", "images", "many images", "validation"])
def test_rows_of_processes_make_up_the_batches_of_one(
    folder, many_views, kind, start_step, monkeypatch
):
    """The rows of a process may be neighbours or not, and processes may have rows in common."""
    if kind == "many images":
        monkeypatch.setattr(loader, "_DECODED_BYTES", 0)

    def batches(**rows):
        if kind == "validation":
            return list(validation_batches(folder, 4, **rows))
        if "images" in kind:
            digits = sources.Subset(sources.DigitsSource("validation"), np.arange(30))
            stream = make_image_loader(digits, 8, 1, 8, seed=1, start_step=start_step, **rows)
        else:
            tokens = folder if kind == "tokens" else many_views
            stream = make_loader(tokens, 8, 1, start_step=start_step, **rows)
        return list(itertools.islice(stream, 9))  # Over two epochs.

    expected = batches()
    for rows in ([0, 1], [1, 3], [0, 2, 3]):
        parts = batches(rows=np.array(rows))
        for whole, part in zip(expected, parts, strict=True):
            for name, value in whole.items():
                assert np.array_equal(part[name], value[rows])


def test_resumed_loader_goes_on_exactly(many_views):
    """Step 3 crosses the end of an epoch of 20, and step 10 begins with an epoch."""
    whole = list(itertools.islice(make_loader(many_views, 6, seed=2), 14))
    for step in (0, 1, 3, 4, 10):
        resumed = make_loader(many_views, 6, seed=2, start_step=step)
        for expected, batch in zip(whole[step:], resumed, strict=False):
            assert np.array_equal(expected["indices"], batch["indices"])
            assert np.array_equal(expected["labels"], batch["labels"])


def test_views_are_drawn_evenly(many_views):
    names = numbered(make_info(levels=300, flips=True, samples=2), 20)
    seen = collections.Counter()
    of_image = collections.defaultdict(set)
    for batch in itertools.islice(make_loader(many_views, 20, seed=0), 60):
        assert batch["indices"].dtype == np.uint16
        for indices in batch["indices"]:
            image, view = names[indices.tobytes()]
            seen[view] += 1
            of_image[image].add(view)
    # 1200 draws of 4 views: 300 +- 15 each.
    assert all(240 < seen[view] < 360 for view in range(4))
    assert all(views == {0, 1, 2, 3} for views in of_image.values())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_validation_is_one_pass(folder, count, batch_size):
    names = numbered(make_info(), 7)
    parts = [
        list(validation_batches(folder, batch_size, rows=rows))
        for rows in np.split(np.arange(batch_size), count)
    ]
    assert {len(part) for part in parts} == {-(-7 // batch_size)}
    counted = [
        image
        for part in parts
        for batch in part
        for image, weight in zip(images_of(batch, names), batch["weights"], strict=True)
        if weight
    ]
    assert sorted(counted) == list(range(7))
    assert all(len(batch["labels"]) == batch_size // count for part in parts for batch in part)


def test_validation_takes_the_plain_view(many_views):
    names = numbered(make_info(levels=300, flips=True, samples=2), 20)
    (batch,) = validation_batches(many_views, 20, split="train")
    drawn = [names[indices.tobytes()] for indices in batch["indices"]]
    assert drawn == [(image, 0) for image in range(20)]


def test_mistakes_are_named(folder):
    with pytest.raises(UserError, match=r"a batch of 24 needs as many images.* has 23"):
        make_loader(folder, 24, 0)
    with pytest.raises(UserError, match="no split 'test'"):
        validation_batches(folder, 8, split="test")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("content", "is damaged"),
        ("footer", r"is damaged \(it lists"),
        ("fewer records", r"is damaged \(it lists"),
        ("longer records", "holds records of another size than"),
    ],
)
def test_damaged_shards_are_named(tmp_path, damage, message):
    """The file has the right length, but its content, its list or its records are wrong."""
    write_tokens(tmp_path, {"train": [10, 10]})
    path = tmp_path / "train-00001-of-00002.array_record"
    content = path.read_bytes()
    if damage == "content":
        changed = content[:100] + bytes(4900) + content[5000:]
    elif damage == "footer":
        changed = bytes(len(content))
    else:
        sizes = [10, 4 if damage == "fewer records" else 10]
        write_tokens(tmp_path / "other", {"train": sizes}, flips=damage == "longer records")
        changed = (tmp_path / "other" / path.name).read_bytes()
    assert len(changed) == len(content)  # Every small shard has the size of one block.
    path.write_bytes(changed)
    with pytest.raises(UserError, match=rf"train-00001-of-00002\.array_record {message}"):
        list(itertools.islice(make_loader(tmp_path, 10, 0), 2))


def test_few_shards_are_open_at_once_for_any_number_of_threads(tmp_path, monkeypatch):
    info = write_tokens(tmp_path, {"train": [1] * 90})
    expected = random_records(info, range(90))
    gc.collect()  # Closes the shards of earlier tests.
    before = open_files()
    with monkeypatch.context() as patch:
        # macOS's default. It is not set for the process: other tests may have left more open.
        patch.setattr(resource, "getrlimit", lambda _: (256, 256))
        records = TokenRecords(tmp_path, info, "train")
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(90)
        assert np.array_equal(records.read(order), expected[order])
        assert open_files() - before == 256 // 3
    monkeypatch.setattr(readers, "_MOST", 1)
    records = TokenRecords(tmp_path, info, "train")
    with ThreadPoolExecutor(8) as threads:
        orders = [np.random.default_rng(seed).permutation(90) for seed in range(16)]
        for order, found in zip(orders, threads.map(records.read, orders), strict=True):
            assert np.array_equal(found, expected[order])


def test_a_shard_that_the_system_refuses_is_not_called_damaged(tmp_path):
    info = write_tokens(tmp_path, {"train": [4]})
    records = TokenRecords(tmp_path, info, "train")
    summary = tmp_path / "train-00000-of-00001.array_record"
    for read in (lambda: records.read(np.arange(4)), lambda: shard_writer.read_summary(summary)):
        with pytest.raises(UserError) as caught, no_more_files():
            read()
        assert "array_record: Too many open files; " in str(caught.value)
        assert "ulimit" in str(caught.value)
    assert len(records.read(np.arange(4))) == 4


def test_labels_of_no_class_are_refused(tmp_path):
    write_tokens(tmp_path, {"train": [9], "validation": [3]}, class_names=("cat", "dog"))
    message = r"-00000-of-00001.array_record holds label 2, but there are 2 classes"
    with pytest.raises(UserError, match=f"train{message}"):
        next(make_loader(tmp_path, 9, seed=0))
    with pytest.raises(UserError, match=f"validation{message}"):
        next(validation_batches(tmp_path, 3))


def test_empty_shards_are_skipped(tmp_path):
    write_tokens(tmp_path, {"train": [0, 4, 0]})
    names = numbered(make_info(), 4)
    assert sorted(images_of(next(make_loader(tmp_path, 4, 0)), names)) == [0, 1, 2, 3]


@pytest.fixture(params=["decoded once", "decoded for every batch"])
def memory(request, monkeypatch):
    """Both ways to hold the pictures."""
    if request.param == "decoded for every batch":
        monkeypatch.setattr(loader, "_DECODED_BYTES", 0)


@pytest.mark.usefixtures("memory")
def test_image_loader_covers_and_mirrors():
    source = sources.DigitsSource("validation")
    plain = {source.images[i].tobytes(): i for i in range(40)}
    mirrored = {source.images[i][:, ::-1].tobytes(): i for i in range(40)}
    subset = sources.Subset(source, np.arange(40))
    batches = make_image_loader(subset, 8, 1, 10, seed=0)
    flipped, stream = 0, []
    for batch in itertools.islice(batches, 40):
        assert batch["images"].shape == (10, 8, 8, 1)
        assert batch["images"].dtype == np.uint8
        for image, label in zip(batch["images"], batch["labels"], strict=True):
            flipped += image.tobytes() not in plain
            stream.append({**mirrored, **plain}[image.tobytes()])
            assert label == source.labels[stream[-1]]
    assert 130 < flipped < 270
    for start in range(0, 400, 40):
        assert sorted(stream[start : start + 40]) == list(range(40))
    resumed = make_image_loader(subset, 8, 1, 10, seed=0, start_step=39)
    assert np.array_equal(next(resumed)["images"], batch["images"])


@pytest.mark.usefixtures("memory")
def test_image_loader_gives_the_same_batches_with_worker_processes(images):
    source = sources.FolderSource(images)
    subset = sources.Subset(source, np.arange(len(source)))
    plain, parallel = (
        make_image_loader(subset, 16, 3, 8, seed=0, start_step=2, workers=workers)
        for workers in (1, 2)
    )
    pairs = itertools.islice(zip(plain, parallel, strict=True), 6)
    for expected, found in pairs:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert np.array_equal(found[name], value)


def test_image_loader_takes_no_longer_for_more_images():
    """A million places are not listed for every image."""
    source = sources.DigitsSource("validation")
    subset = sources.Subset(source, np.resize(np.arange(40), 10**7))
    pictures = loader._Pictures(subset, 8, 1)
    tracemalloc.start()
    try:
        batch = pictures(np.array([0, 10**7 - 1]), np.zeros(2))
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
    assert np.array_equal(batch["images"], source.images[[0, 39]])


@pytest.mark.usefixtures("memory")
def test_image_loader_names_and_replaces_broken_pictures(capsys):
    class Broken(sources.DigitsSource):
        def load(self, i):
            if i in (3, 4):
                raise ValueError("no picture")
            return super().load(i)

    source = Broken("validation")
    subset = sources.Subset(source, np.arange(6))
    batches = make_image_loader(subset, 8, 1, 6, seed=0, flip=False)
    for batch in itertools.islice(batches, 3):
        found = [bytes(image) for image in batch["images"]]
        expected = [source.images[i].tobytes() for i in (0, 1, 2, 5, 5, 5)]
        assert sorted(found) == sorted(expected)
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == [f"broken image left out: {source.name(i)}: no picture" for i in (3, 4)]
    with pytest.raises(UserError, match="a batch of 7 needs as many"):
        make_image_loader(subset, 8, 1, 7, seed=0)
