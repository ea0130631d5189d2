"""Arrays that are written some rows at a time: .npy files that grow, so that they needn't fit in memory.

numpy leaves room in a file's head for as many rows as there may come; the head is written anew at the end.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray


class Growing:
    """A folder of such files; `np.load` reads them once it is closed. rows: of each, how many there are."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        folder.mkdir()
        self._files: dict[str, BinaryIO] = {name: (folder / f"{name}.npy").open("wb") for name in names}
        self._heads: dict[str, dict[str, Any]] = {}
        self.rows = dict.fromkeys(self._files, 0)

    def add(self, name: str, rows: NDArray[Any]) -> None:
        """To those before, of the same type and width."""
        rows = np.ascontiguousarray(rows)
        if name not in self._heads:
            self._heads[name] = npy.header_data_from_array_1_0(rows)
            self._write_head(name)
        assert self._heads[name]["shape"][1:] == rows.shape[1:]
        self._files[name].write(rows.tobytes())
        self.rows[name] += len(rows)

    def _write_head(self, name: str) -> None:
        head = self._heads[name]
        npy.write_array_header_1_0(self._files[name], {**head, "shape": (self.rows[name], *head["shape"][1:])})

    def close(self) -> None:
        for name, file in self._files.items():
            with file:
                if name in self._heads:
                    file.seek(0)
                    self._write_head(name)
