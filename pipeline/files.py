"""Files and folders, on a local disk by Python, elsewhere by Beam's file systems, which take a second to import."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, BinaryIO

from pipeline.errors import ConfigError

_READ_BYTES = 1 << 20
# By scheme: a module without which Beam's file system fails at first use, and what installs it.
_NEEDED = {
    "s3": ("boto3", "embeam[s3]"),
    "hdfs": ("hdfs", "apache-beam[hadoop]"),
    "azfs": ("azure", "apache-beam[azure]"),
}
_PARTIAL = re.compile(r"(.+)\.[0-9a-f]{8}\.new")  # the name that `create_file` gives to an incomplete file


def is_local(path: str) -> bool:
    return "://" not in path


def file_systems() -> Any:
    """Beam's file systems."""
    from apache_beam.io.filesystems import FileSystems

    return FileSystems


def check_scheme(path: str) -> None:
    """Raises ConfigError for a path on a file system that Beam does not know, or whose packages are not installed."""
    if is_local(path):
        return
    scheme = path.partition("://")[0]
    module, extra = _NEEDED.get(scheme, ("", ""))
    if module and find_spec(module) is None:
        raise ConfigError(f"{path}: the package for {scheme}:// is not installed; pip install '{extra}'")
    try:
        file_systems().get_filesystem(path)
    except Exception as error:  # each file system raises its own exceptions
        raise ConfigError(
            f"{path}: no file system for {scheme}:// is installed; give a path on a local disk or on gs://, or "
            "pip install 'embeam[s3]' for s3://"
        ) from error


def open_file(path: str) -> BinaryIO:
    """Opens a file for reading as it is stored, seekable; each file system raises its own exceptions."""
    if is_local(path):
        return open(path, "rb")
    return file_systems().open(path, compression_type="uncompressed")


def exists(path: str) -> bool:
    """Whether there is such a file or folder."""
    return os.path.exists(path) if is_local(path) else file_systems().exists(path)


def join(folder: str, *names: str) -> str:
    """The path of what is in a folder."""
    return os.path.join(folder, *names) if is_local(folder) else file_systems().join(folder, *names)


def absolute_path(path: str) -> str:
    """A local path in full, `~` included; paths of other file systems as they are."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def read_text(path: str) -> str:
    with open_file(path) as f:
        return f.read().decode()


def strip_partial(name: str) -> str:
    """The final name of an incomplete file of `create_file`, which stays if its process is killed."""
    partial = _PARTIAL.fullmatch(name)
    return partial[1] if partial else name


def create_file(path: str, data: bytes) -> None:
    """Writes a file so that readers see all of it or nothing: by rename on a local disk, in one request elsewhere."""
    if not is_local(path):
        with file_systems().create(path, compression_type="uncompressed") as f:
            f.write(data)
        return
    partial = f"{path}.{uuid.uuid4().hex[:8]}.new"
    try:
        with open(partial, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(partial)
        raise
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename durable
    finally:
        os.close(folder)


def write_atomically(path: str, text: str) -> None:
    """As `create_file`, for text."""
    create_file(path, text.encode())


def make_folder(path: str) -> None:
    if not exists(path):
        try:
            file_systems().mkdirs(path)
        except OSError:
            if not exists(path):
                raise


def list_files(folder: str) -> list[str]:
    """Paths of the files in a folder; none if there is no such folder."""
    if not is_local(folder):
        return [found.path for found in file_systems().match([folder + "/*"])[0].metadata_list]
    return [entry.path for entry in os.scandir(folder) if entry.is_file()] if os.path.isdir(folder) else []


def measure_files(folder: str) -> dict[str, int]:
    """Sizes in bytes of the files in a folder, by path."""
    if not is_local(folder):
        return {found.path: found.size_in_bytes for found in file_systems().match([folder + "/*"])[0].metadata_list}
    return {path: os.path.getsize(path) for path in list_files(folder)}


def last_written(folder: str) -> float:
    """When the newest file in a folder was written, in seconds since the epoch; 0 if there is none or it is unknown."""
    if is_local(folder):
        return max((os.path.getmtime(path) for path in list_files(folder)), default=0.0)
    found = file_systems().match([folder + "/*"])[0].metadata_list
    return max((file.last_updated_in_seconds or 0.0 for file in found), default=0.0)


def read_checksum(path: str) -> tuple[str, int]:
    """Reads a file: its sha256 as hexadecimal digits, and its size in bytes."""
    digest, size = hashlib.sha256(), 0
    with open_file(path) as stream:
        while data := stream.read(_READ_BYTES):
            digest.update(data)
            size += len(data)
    return digest.hexdigest(), size


def list_folders(folder: str) -> list[str]:
    """Names of the folders in a folder that hold anything, sorted."""
    if is_local(folder):
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if os.path.isdir(folder) else []
    paths = [found.path[len(folder) + 1 :] for found in file_systems().match([folder + "/**"])[0].metadata_list]
    return sorted({path.partition("/")[0] for path in paths if "/" in path})


def delete_file(path: str) -> None:
    """Removes one file. Beam's own deletion would read brackets in a local name as a pattern."""
    if is_local(path):
        os.remove(path)
    else:
        file_systems().delete([path])


def delete_folder(path: str) -> None:
    """Removes a folder and what is in it; does nothing if the folder does not exist."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    elif file_systems().match([path + "/**"])[0].metadata_list:
        file_systems().delete([path + "/"])


def delete_empty_folder(path: str) -> None:
    """Removes an empty folder; only local disks have empty folders."""
    if is_local(path):
        with suppress(OSError):  # it is not there, or not empty
            os.rmdir(path)


def copy_file(source: str, target: str) -> None:
    """Gives a finished file a second name: by a hard link on a local disk where it can be, else by a copy."""
    if is_local(source) and is_local(target):
        try:
            os.link(source, target)
        except FileExistsError:
            os.remove(target)
            os.link(source, target)
        except OSError:  # a file system without links
            shutil.copyfile(source, target)
    else:
        file_systems().copy([source], [target])
