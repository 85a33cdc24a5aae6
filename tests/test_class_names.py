"""Names of classes: read from `classes.txt` in any encoding, found by name, compared."""

import itertools

import numpy as np
import pytest

from tokenbridge_jax.data.class_names import class_at, class_number, match, readable_names
from tokenbridge_jax.runtime.errors import UserError

FOLDERS = ("Golden Retriever", "n01", "n02")
NAMES = ("golden retriever", "tench", "coucal de côte")
LINES = {"n01": NAMES[1], "n02": NAMES[2], "Golden Retriever": NAMES[0]}


def saved(path, text, encoding="utf-8"):
    (path / "classes.txt").write_bytes(text.encode(encoding))
    return path / "classes.txt"


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "latin-1", "cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32"],
)
@pytest.mark.parametrize("line", ["{} {}", "{}\t{}", "{}   {} ", '"{}"\t"{}"', "{},{}", '"{}";{}'])
def test_files_of_every_program_are_read(tmp_path, encoding, line):
    text = "\r\n".join(line.format(*pair) for pair in LINES.items()) + "\r\n\r\n"
    assert readable_names(saved(tmp_path, text, encoding), FOLDERS) == NAMES


def test_a_folder_that_begins_another(tmp_path):
    folders = ("Golden", "Golden Retriever", "cafe\u0301")  # A separate accent, as on macOS.
    path = saved(tmp_path, "Golden a colour\nGolden Retriever a dog\ncafé a place\nother x\n")
    assert readable_names(path, folders) == ("a colour", "a dog", "a place")


def test_files_without_names_and_with_two_names(tmp_path, capsys):
    assert readable_names(saved(tmp_path, "cat\ndog\n"), FOLDERS) == FOLDERS
    assert capsys.readouterr().err.startswith(f"note: {tmp_path}/classes.txt names none of the")
    assert readable_names(saved(tmp_path, "n01 a\nn01 a\n"), ("n01",)) == ("a",)
    with pytest.raises(UserError, match="gives the folder n01 two names, a and b"):
        readable_names(saved(tmp_path, "n01 a\nn01 b\n"), ("n01",))
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfen")
    with pytest.raises(UserError, match="begins as utf-16 but is something else"):
        readable_names(tmp_path / "classes.txt", ("n01",))


def outcome(class_id, names, classes):
    try:
        return class_number(class_id, names, classes)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    "names",
    [
        tuple(map(str, range(12))),
        tuple(sorted(map(str, range(12)))),
        tuple(map(str, range(1, 13))),
        ("3", "7", "9"),
        ("00", "01", "02"),
        ("cat", "2", "dog"),
        ("cat", "dog"),
    ],
)
def test_a_number_and_its_digits_are_one_class(names):
    for number in range(-1, 15):
        for same in (str(number), np.int64(number), np.array(number), np.str_(number)):
            assert outcome(same, names, 13) == outcome(number, names, 13)
    for place, name in enumerate(names):
        assert class_number(name, names, 13) == place
        assert class_number(class_at(place, names), names, 13) == place


def test_numbers_are_places_or_names():
    assert class_number(1, ("cat", "dog"), 2) == 1
    assert class_number(2, ("cat", "dog"), 3) == 2  # Without a name.
    assert class_number(2, ("1", "2", "3"), 3) == 1
    assert class_number("1", ("00", "01"), 2) == 1
    assert "there is no class 0: classes are named 3, 7, 9" in outcome(0, ("3", "7", "9"), 3)
    assert "class 3 does not exist; classes are 0..2" in outcome("3", ("a", "b", "c"), 3)
    assert "there is no class named 'cow' among 3" in outcome("cow", ("a", "b", "c"), 3)


@pytest.mark.parametrize(
    "value", [3.7, 1.0, np.float32(1), float("nan"), True, np.True_, [1], b"1", np.array([1, 2])]
)
def test_values_that_are_not_classes(value):
    with pytest.raises(UserError, match="is not a class; give a whole number or a name"):
        class_number(value, ("a", "b", "c"), 3)
    for text in ("1.0", " 1", "+1", "1_0", "²", "9" * 5000):
        assert "there is no class named" in outcome(text, ("a", "b", "c"), 3)


IMPORTED = tuple(map(str, range(12)))
WORDS = tuple("abcdefghijkl")


def test_the_same_classes_go_together():
    padded = tuple(f"{i:02}" for i in range(12))
    for model, shards in ((WORDS, WORDS), (IMPORTED, padded)):
        assert match(model, shards) == (model, "")
    remark = "the token shards have the first 5 of the model's 12 classes"
    assert match(WORDS, WORDS[:5]) == (WORDS, remark)
    # Numbers, of an imported model or of folders such as ImageNetV2's, give way to names.
    for model, shards in ((IMPORTED, WORDS), (WORDS, IMPORTED)):
        names, remark = match(model, shards)
        assert names == WORDS
        assert "are numbers: they are taken for a, b, c, ... in this order" in remark
    names, remark = match(IMPORTED, WORDS[:5])
    assert names == WORDS[:5]
    assert "5 classes, the model 12 without names: a, b, c, ... are taken for the first" in remark
    names, remark = match(("cat", "n02", "owl"), ("cat", "dog", "owl"))
    assert names == ("cat", "dog", "owl")
    assert "label 1 is 'n02' in the model and 'dog' there" in remark


def test_classes_in_another_order_or_number_are_refused():
    for shards in itertools.permutations("abcd"):
        if shards != tuple("abcd"):
            with pytest.raises(UserError, match="the classes are in another order: label"):
                match(tuple("abcd"), shards)
    for model, shards in (
        (IMPORTED, tuple(sorted(IMPORTED))),  # As text.
        (tuple(sorted(IMPORTED)), IMPORTED),
        (IMPORTED, tuple(map(str, range(1, 13)))),
        (tuple("abcd"), tuple("acde")),
    ):
        with pytest.raises(UserError, match=r"label \d+ is '\w+' in the model and '\w+' in the"):
            match(model, shards)
    for model, shards in ((WORDS, IMPORTED[:5]), (WORDS[:5], WORDS), (WORDS, WORDS[1:])):
        with pytest.raises(UserError, match=f"shards have {len(shards)} classes, the model"):
            match(model, shards)
