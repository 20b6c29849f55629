"""What an audit has found out so far, a line for each answer, so that a killed audit goes on where it was."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, BinaryIO

from gve.synth.folder import encode


class Notes:
    """Keys and values in an append-only file. Thread-safe; a torn last line is as good as not written.

    Args:
        path: of the file; its folder is made.

    Raises:
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._values: dict[str, Any] = {}
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            try:
                record = json.loads(line)
                self._values[record["key"]] = record["value"]
            except (ValueError, KeyError, TypeError):
                break
            whole += len(line)
        # Unbuffered: what is written survives a kill of this process at once.
        self._file: BinaryIO = open(path, "ab", buffering=0)  # noqa: SIM115
        self._file.truncate(whole)

    def get(self, key: str) -> Any:
        """The value of a key; None if there is none."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Notes a value of plain JSON.

        Raises:
            OSError: the disk is full.
        """
        with self._lock:
            self._values[key] = value
            self._file.write(encode({"key": key, "value": value}) + b"\n")

    def close(self) -> None:
        self._file.close()
