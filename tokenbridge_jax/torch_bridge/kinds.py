"""Recognises the kind of a weight file by its content, not by its name."""

import contextlib
import json
import zipfile
from pathlib import Path
from typing import Literal

from tokenbridge_jax.runtime.errors import UserError

Kind = Literal["torch", "safetensors", "npz", "index"]

# The longest header of a safetensors file. Its length is in the first 8 bytes of the file.
_LONGEST_HEADER = 100_000_000
_LONGEST_TEXT = 2**24

_UNPACK = "unpack it, and name the file inside it"
# The first bytes of files that cannot be read as they are, what these files are, and what to do.
_FOREIGN = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer; get its file: `git lfs pull`",
    b"/annex/objects/": "a git-annex pointer; get its file: `git annex get`",
    b"\x1f\x8b": f"compressed with gzip; {_UNPACK}",
    b"BZh": f"compressed with bzip2; {_UNPACK}",
    b"\xfd7zXZ\0": f"compressed with xz; {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"compressed with zstd; {_UNPACK}",
    b"7z\xbc\xaf\x27\x1c": f"a 7z archive; {_UNPACK}",
    b"Rar!\x1a\x07": f"a RAR archive; {_UNPACK}",
    b"\x93NUMPY": "a single array (.npy); name a file with a whole state dict",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, not a PyTorch file; save its state dict with torch.save",
    b"GGUF": "a GGUF file, not a PyTorch file; name the file that it was converted from",
}
# PyTorch's archives of programs: a member that only they have, and how to get their state dict.
_PROGRAMS = (
    ("constants.pkl", "TorchScript", "torch.jit.load(FILE).state_dict()"),
    ("archive_format", "torch.export", "torch.export.load(FILE).state_dict"),
)


def recognise(path: Path) -> Kind:
    """Returns the kind of a file; "index" is the list of the files of split safetensors weights.

    Raises:
      UserError: the file is of another kind, empty or cut short. The message says what it is and
        what to do.
    """
    if path.is_dir():
        raise unreadable(path, "it is a folder; name a file in it")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise unreadable(path, error.strerror or str(error)) from error
    if not head:
        raise unreadable(path, "it is empty; download or copy it again")
    for signature, what in _FOREIGN.items():
        if head.startswith(signature):
            raise unreadable(path, f"it is {what}")
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:
        return "safetensors"
    if head.startswith(b"\x80"):
        return "torch"  # A pickle: PyTorch's format before it used zip archives.
    if head[257:262] == b"ustar":
        raise unreadable(path, f"it is a tar archive; {_UNPACK}")
    return _kind_of_text(path, head)


def unreadable(path: Path, reason: str) -> UserError:
    """Returns the error for a file that cannot be read."""
    return UserError(f"{path} cannot be read: {reason}")


def _kind_of_zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise unreadable(
            path, "it is cut short or damaged: its end is missing; download or copy it again"
        ) from error
    inside = {name.partition("/")[2] for name in names}
    for member, what, state_dict in _PROGRAMS:
        if member in inside:
            raise unreadable(
                path,
                f"it is a program ({what}); save only its state dict: "
                f"torch.save({state_dict}, OTHER_FILE)",
            )
    if "data.pkl" in inside:
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    held = ", ".join(names[:3]) or "nothing"
    raise unreadable(path, f"it is a zip archive of {held}; {_UNPACK}")


def _kind_of_text(path: Path, head: bytes) -> Kind:
    text = head.decode("utf-8-sig", errors="replace").rstrip("\ufffd").strip()
    if not any(head):
        raise unreadable(path, "it begins with zeros that were never filled; get it again")
    begins = " ".join(text[:60].split())
    if text.startswith("<"):
        raise unreadable(
            path,
            f'it is a web page or a server\'s answer, "{begins}"; download it again from the '
            "address of the file itself",
        )
    if not text or not all(c != "\ufffd" and (c.isprintable() or c.isspace()) for c in text):
        raise unreadable(
            path, "it is not a PyTorch, safetensors or numpy file, or is damaged; get it again"
        )
    if text.startswith("{") and path.stat().st_size <= _LONGEST_TEXT:
        with contextlib.suppress(ValueError):
            content = json.loads(path.read_text("utf-8"))
            if isinstance(content.get("weight_map"), dict):
                return "index"
    raise unreadable(
        path, f'it is a text that begins with "{begins}"; name or download the weight file itself'
    )
