"""What a file of weights is by its first bytes, whatever its name ends in."""

import contextlib
import json
import zipfile
from pathlib import Path
from typing import Literal

from tokenbridge_jax.runtime.errors import UserError

Kind = Literal["torch", "safetensors", "npz", "index"]

# A header of safetensors, which follows its own length in 8 bytes, is no longer than this.
_LONGEST_HEADER = 100_000_000
_LONGEST_TEXT = 2**24

# How files begin that cannot be read as they are: what they are, and what mends it.
_FOREIGN = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the file itself; fetch that with `git lfs pull`",
    ),
    (
        b"/annex/objects/",
        "a git-annex pointer, not the file itself; fetch that with `git annex get`",
    ),
    (b"\x1f\x8b", "compressed with gzip; unpack it, and name the file that was in it"),
    (b"BZh", "compressed with bzip2; unpack it, and name the file that was in it"),
    (b"\xfd7zXZ\0", "compressed with xz; unpack it, and name the file that was in it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it, and name the file that was in it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it, and name the file that was in it"),
    (b"Rar!\x1a\x07", "a RAR archive; unpack it, and name the file that was in it"),
    (b"\x93NUMPY", "a single array (.npy); name a file of a whole state dict"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, not one of PyTorch; save its state dict with torch.save"),
    (b"GGUF", "a GGUF file, not one of PyTorch; name the file that it was converted from"),
)

# Archives of PyTorch that hold programs: what is only in these, and how their weights are got.
_PROGRAMS = (
    ("constants.pkl", "TorchScript", "torch.jit.load(FILE).state_dict()"),
    ("archive_format", "torch.export", "torch.export.load(FILE).state_dict"),
)


def recognise(path: Path) -> Kind:
    """The kind of a file that can be read: "index" is the list of the parts of a safetensors file.

    Raises:
      UserError: it is of another kind, empty or cut short; the message says what it is and what
        mends that.
    """
    if path.is_dir():
        raise unreadable(path, "it is a folder; name the file in it")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise unreadable(path, error.strerror or str(error)) from error
    if not head:
        raise unreadable(path, "it is empty; download or copy it again")
    for signature, what in _FOREIGN:
        if head.startswith(signature):
            raise unreadable(path, f"it is {what}")
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:
        return "safetensors"
    if head.startswith(b"\x80"):
        return "torch"  # A pickle, as PyTorch's files were before they were zip archives.
    if head[257:262] == b"ustar":
        raise unreadable(path, "it is a tar archive; unpack it, and name the file that was in it")
    return _kind_of_text(path, head)


def unreadable(path: Path, reason: str) -> UserError:
    """The error about a file that cannot be read."""
    return UserError(f"{path} cannot be read: {reason}")


def _kind_of_zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise unreadable(
            path, "it is cut short or damaged, its end is missing; download or copy it again"
        ) from error
    inside = {name.partition("/")[2] for name in names}
    for member, what, state_dict in _PROGRAMS:
        if member in inside:
            raise unreadable(
                path,
                f"it is an archive of {what}, a program; save its state dict alone: "
                f"torch.save({state_dict}, OTHER_FILE)",
            )
    if "data.pkl" in inside:
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    held = ", ".join(names[:3]) or "nothing"
    raise unreadable(
        path, f"it is a zip archive of {held}; unpack it, and name the file that was in it"
    )


def _kind_of_text(path: Path, head: bytes) -> Kind:
    text = head.decode("utf-8-sig", errors="replace").rstrip("\ufffd").strip()
    if not any(head):
        raise unreadable(path, "it begins with zeros, where nothing was written; get it again")
    begins = " ".join(text[:60].split())
    if text.startswith("<"):
        raise unreadable(
            path,
            f'it is a web page or an answer of a server, "{begins}"; download it again, from the '
            "address of the file itself",
        )
    if not text or not all(c != "\ufffd" and (c.isprintable() or c.isspace()) for c in text):
        raise unreadable(
            path, "it is no file of PyTorch, safetensors or numpy, or it is damaged; get it again"
        )
    if text.startswith("{") and path.stat().st_size <= _LONGEST_TEXT:
        with contextlib.suppress(ValueError):
            content = json.loads(path.read_text("utf-8"))
            if isinstance(content.get("weight_map"), dict):
                return "index"
    raise unreadable(
        path, f'it is a text that begins "{begins}"; name or download the file of weights itself'
    )
