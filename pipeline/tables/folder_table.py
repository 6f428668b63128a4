"""A table in a folder of snapshots, for readers, without the imports that only a run needs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline.files import absolute_path, join
from pipeline.sinks.layout import Columns
from pipeline.sinks.readers import ROWS, FileReader, VectorFile
from pipeline.table_folders import POINTER
from pipeline.tables.manifest import Manifest, check_place, read_manifest, read_pointer, snapshot_folder
from pipeline.tables.pointer import read_versioned
from pipeline.tables.store import Live


class FolderTable:
    """A folder of snapshots, on any file system of Beam."""

    def __init__(self, output: str, work_dir: str = "") -> None:
        self.shown = output
        self.work = absolute_path(output)

    def read_live(self) -> Live:
        check_place(self.work)
        _, version = read_versioned(join(self.work, POINTER))
        name = read_pointer(self.work)
        return Live(read_manifest(self.work, name) if name else None, version)

    def locate_dead_letters(self, live: Manifest, name: str) -> str:
        return join(snapshot_folder(self.work, live.snapshot), name)

    def read_columns(self, live: Manifest) -> Iterator[Columns]:
        reader, none = FileReader(live.file_format, live.layout, live.compression), np.zeros(0, int)
        for file in live.files:
            path = join(snapshot_folder(self.work, live.snapshot), file.name)
            for stored in reader.read(VectorFile(path, ROWS, 0, file.rows), none):
                yield reader.columns(stored, np.arange(len(stored.numbers)))
