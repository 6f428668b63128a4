"""Where tables may be kept. To add a kind: a class with the interface of `Store`, and a line in `STORES`."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.tables.store import Store, Table


def open_duckdb(output: str, work_dir: str) -> Store:
    from pipeline.tables.duckdb import DuckdbStore

    return DuckdbStore(output, work_dir)


def open_bigquery(output: str, work_dir: str) -> Store:
    from pipeline.tables.bigquery import BigqueryStore

    return BigqueryStore(output, work_dir)


def open_folder(output: str, work_dir: str) -> Store:
    from pipeline.tables.folder import FolderStore

    return FolderStore(output, work_dir)


def open_folder_table(output: str, work_dir: str) -> Table:
    from pipeline.tables.folder_table import FolderTable

    return FolderTable(output, work_dir)


# By scheme; the first that fits counts. A kind of table is imported when one is opened.
STORES: dict[str, Callable[[str, str], Store]] = {
    "duckdb://": open_duckdb,
    "bq://": open_bigquery,
    "": open_folder,
}
TABLES: dict[str, Callable[[str, str], Table]] = {**STORES, "": open_folder_table}  # the same, for readers


def open_store(output: str, work_dir: str = "") -> Store:
    """The store that an output names.

    Args:
      output: a folder, or a database's table.
      work_dir: folder for what the runs on a table of BigQuery keep; not needed for reading.

    Raises:
      ConfigError: if it names none.
    """
    opens = next(opens for scheme, opens in STORES.items() if output.startswith(scheme))
    return opens(output, work_dir)


def find_table(name: str, work_dir: str = "") -> Table:
    """As `open_store`, for readers: of a folder on a local disk, it loads neither Beam nor TensorFlow."""
    opens = next(opens for scheme, opens in TABLES.items() if name.startswith(scheme))
    return opens(name, work_dir)
