"""Names of classes: reads `classes.txt`, finds classes by name, compares a model and shards."""

import codecs
import functools
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenbridge_jax.runtime import checks, storage
from tokenbridge_jax.runtime.errors import UserError

# Byte order marks, the longest first, because UTF-32's begins like UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def readable_names(path: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """The names that a `classes.txt` gives to class folders; without one, the folders' own names.

    Lines are `FOLDER human name`. Between them is a space, or as in spreadsheets a tab, comma or
    semicolon, perhaps with quotes. A folder's name may have spaces. Lines of other folders are
    ignored. The text is UTF-8, UTF-16 or Windows-1252.

    Args:
      path: the file, which may be missing.
      folders: names of the class folders.

    Raises:
      UserError: the file cannot be read, or gives a folder two names.
    """
    if not path.is_file():
        return tuple(folders)
    # macOS stores accents in names of folders as separate characters.
    composed = [unicodedata.normalize("NFC", folder) for folder in folders]
    known, names = set(composed), dict[str, str]()
    lines = [line.strip() for line in _text(path).splitlines() if line.strip()]
    for line in lines:
        folder, name = _split(line, known)
        if name and names.setdefault(folder, name) != name:
            raise UserError(
                f"{path} gives the folder {folder} two names, {names[folder]} and {name}; "
                "remove one of the lines"
            )
    if lines and names.keys().isdisjoint(known):
        print(
            f"note: {path} names none of the class folders (its lines are FOLDER name): classes "
            "have the names of their folders",
            file=sys.stderr,
        )
    readable = [names.get(key, folder) for key, folder in zip(composed, folders, strict=True)]
    # Two classes of ImageNet are both "crane". Such names are followed by their folder.
    counts = Counter(readable)
    return tuple(
        name if counts[name] == 1 else f"{name} ({folder})"
        for name, folder in zip(readable, folders, strict=True)
    )


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise storage.read_error(path, error) from error
    marked = next((code for mark, code in _MARKS.items() if data.startswith(mark)), None)
    if not marked and b"\0" in data[:2]:
        marked = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    for code in (marked,) if marked else ("utf-8", "cp1252", "latin-1"):
        try:
            return unicodedata.normalize("NFC", data.decode(code))
        except UnicodeDecodeError:
            continue
    raise UserError(f"{path} begins as {marked} but is something else; save it as UTF-8")


def _split(line: str, folders: Collection[str]) -> tuple[str, str]:
    """A line's folder and name."""
    quoted = re.fullmatch(r'"((?:[^"]|"")*)"(?:[\s,;]+(.*))?', line)
    if quoted:
        folder, name = _unquoted(f'"{quoted[1]}"'), quoted[2] or ""
    else:
        ends = [found.start() for found in re.finditer(r"[\s,;]|$", line)]
        # The longest match, because one folder's name may begin with another's.
        end = next((end for end in reversed(ends) if line[:end].rstrip() in folders), ends[0])
        folder, name = line[:end].rstrip(), line[end:].lstrip(" \t,;")
    return folder, _unquoted(name.strip())


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        return text[1:-1].replace('""', '"')
    return text


def are_numbers(names: Sequence[str]) -> bool:
    """Whether all names of classes are whole numbers."""
    return all(name.isascii() and name.isdigit() for name in names)


def class_number(class_id: Any, names: tuple[str, ...], classes: int) -> int:
    """The number of a class, which is its place in the class table.

    A number and a text of its digits mean the same: the class of that name, or if there is none the
    class at that place. The two differ only where classes are named by numbers that are not their
    places, such as 1 to 12. A number is then always a name.

    Args:
      class_id: a name or a whole number, of Python, numpy or JAX.
      names: by number.
      classes: how many there are; the last ones may have no name.

    Raises:
      UserError: there is no such class, or `class_id` is neither a name nor a whole number.
    """
    places, numbered = _places(names)
    if isinstance(class_id, str):
        if class_id in places:
            return places[class_id]
        if not re.fullmatch("-?[0-9]{1,18}", class_id):
            some = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
            raise UserError(f"there is no class named '{class_id}' among {len(names)}: {some}")
        number = int(class_id)
    else:
        try:
            number = checks.whole("class", class_id)
        except UserError:
            raise UserError(f"{class_id!r} is not a class; give a whole number or a name") from None
    if str(number) in places:
        return places[str(number)]
    if number in numbered:
        return numbered[number]
    if numbered and 0 <= number < len(names):
        raise UserError(f"there is no class {number}: classes are named {_few(names)}")
    if not 0 <= number < classes:
        raise UserError(f"class {number} does not exist; classes are 0..{classes - 1}")
    return number


def class_at(place: int, names: tuple[str, ...]) -> int | str:
    """The argument with which `class_number` returns this place: the place itself, or its name."""
    places, numbered = _places(names)
    meant = places.get(str(place), numbered.get(place, None if numbered else place))
    return names[place] if meant != place and 0 <= place < len(names) else place


@functools.lru_cache(maxsize=4)
def _places(names: tuple[str, ...]) -> tuple[Mapping[str, int], Mapping[int, int]]:
    """Places by name, and also by number if all names are numbers."""
    places = {name: place for place, name in reversed(list(enumerate(names)))}
    if not are_numbers(names):
        return places, {}
    return places, {int(name): place for place, name in enumerate(names)}


def match(model: tuple[str, ...], shards: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """Compares a model's classes with those of token shards.

    Names that are merely their places, such as "0", "1", ... of an imported model, fit any names
    except other numbers, and the shards may then have fewer. In all other cases both must have the
    same number of classes, and a name that both have must have the same label in both.

    Args:
      model: names by label.
      shards: names by label, or those of the model's first labels.

    Returns:
      The names of the classes, and a remark, which is empty if both have the same.

    Raises:
      UserError: a label means different classes, or the numbers of classes differ.
    """
    ours, theirs = _comparable(model), _comparable(shards)
    if theirs == ours:
        return model, ""
    if theirs and theirs == ours[: len(theirs)]:
        return model, (
            f"the token shards have the first {len(shards)} of the model's {len(model)} classes"
        )
    numbers = list(range(len(ours)))
    both_numbers = all(isinstance(name, int) for name in (*ours[:1], *theirs[:1]))
    if ours == numbers and not both_numbers and len(theirs) < len(ours):
        return shards, (
            f"the token shards have {len(shards)} classes, the model {len(model)} without names: "
            f"{_few(shards)} are taken for the first of them"
        )
    if len(theirs) != len(ours):
        raise UserError(
            f"the token shards have {len(shards)} classes, the model {len(model)} ({_few(model)}); "
            "tokenize images of the model's classes, or `train` with "
            f"--config.data.num_classes={len(shards)}, which begins with a new class table"
        )
    if numbers in (ours, theirs) and not both_numbers:
        named, other = (shards, "model") if ours == numbers else (model, "token shards")
        return named, (
            f"the classes of the {other} are numbers: they are taken for {_few(named)} in this "
            "order"
        )
    differing = [i for i in numbers if ours[i] != theirs[i]]
    moved = [i for i in differing if theirs[i] in ours]
    label = (moved or differing)[0]
    if moved or both_numbers:
        raise UserError(
            f"the classes are in another order: label {label} is '{model[label]}' in the model and "
            f"'{shards[label]}' in the token shards; tokenize the images again, with class folders "
            "that sort as the model's classes"
        )
    return shards, (
        f"the token shards have other names: label {label} is '{model[label]}' in the model and "
        f"'{shards[label]}' there; they are taken for the same class"
    )


def _comparable(names: Sequence[str]) -> list[str] | list[int]:
    """Names, or numbers if all are numbers, so that "07" equals "7"."""
    return [int(name) for name in names] if are_numbers(names) else list(names)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
