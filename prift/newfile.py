"""A file that appears whole or not at all, and knows the hash of its bytes."""

import hashlib
import os
import socket
import uuid
from pathlib import Path
from typing import Any


class NewFile:
    """Written under a hidden name in `folder`, hashed on the way; `publish` gives it its name.

    Unbuffered, so that closing it cannot fail for want of room. A file object to pyarrow.
    """

    def __init__(self, folder: Path):
        # Random too: a container started again has the same host name and process ids.
        unique = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._folder, self._path = folder, folder / f".{unique}.tmp"
        self._raw = open(self._path, "xb", buffering=0)
        self._hash = hashlib.sha256()
        self.closed = self._abandoned = False

    def write(self, data: Any) -> int:
        """All of `data`; none of it once the file was abandoned."""
        rest = memoryview(data)
        while len(rest) and not self._abandoned:
            written = self._raw.write(rest)
            self._hash.update(rest[:written])
            rest = rest[written:]
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Ends writing."""
        self.closed = True
        self._raw.close()

    def sha256(self) -> str:
        """Hash of what was written so far, hex."""
        return self._hash.hexdigest()

    def publish(self, name: str) -> Path:
        """Makes the file durable and visible."""
        os.fsync(self._raw.fileno())
        self.close()
        os.replace(self._path, self._folder / name)
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(handle)  # or a power cut may forget the name
        finally:
            os.close(handle)
        return self._folder / name

    def abandon(self) -> None:
        """Removes what was written; what is still written goes nowhere."""
        self._abandoned = True
        self._raw.close()
        self._path.unlink(missing_ok=True)
