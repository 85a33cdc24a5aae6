"""An object store in memory."""

from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class ObjectStore(MemoryFileSystem):
    """Takes the place of gs:// and lists the files that were read."""

    protocol = "gs"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    read: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))

    def _open(self, path, mode="rb", **options):
        if mode == "rb":
            self.read.append(path.rpartition("/")[2])
        return super()._open(path, mode, **options)


def register() -> None:
    """Makes gs:// this store from now on."""
    fsspec.register_implementation("gcs", ObjectStore, clobber=True)  # The name that epath uses.
