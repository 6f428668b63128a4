"""Compare-and-replace of a small file: the pointer is replaced only if it has not changed since it was read.

On gs:// the store compares the object's generation; on a local disk a lock of the folder protects the comparison and
the write. Beam's other file systems have neither: there, two runs that replace the file at the same moment may both
succeed, and the last text stays.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Optional

from pipeline.files import exists, file_systems, is_local, open_file, write_atomically

_GCS = "gs://"
_WRITER = "embeam-writer"
_TIMEOUT_SECONDS = 60.0


def is_gcs(path: str) -> bool:
    return path.startswith(_GCS)


def read_versioned(path: str) -> tuple[str, str]:
    """Reads a small file, and a version that changes whenever its content does.

    Returns:
      The text and the version; "" and "" where there is no file. Bytes that are not UTF-8 become U+FFFD.
    """
    if is_gcs(path):
        stored = GcsObject(path).read()
        return (_decode(stored.data), str(stored.generation)) if stored else ("", "")
    data = _read_bytes(path)
    return (_decode(data), _hash(data)) if data is not None else ("", "")


def replace_if(path: str, text: str, version: str) -> bool:
    """Writes a small file if it still has the version that `read_versioned` returned.

    Args:
      path: of the file, in a folder that exists.
      text: its new content.
      version: the expected one; "" if there must be no file.

    Returns:
      Whether it was written; False if another run has changed it.
    """
    if is_gcs(path):
        return bool(GcsObject(path).write_if(text, int(version or 0), uuid.uuid4().hex))
    if not is_local(path):
        return _compare_and_write(path, text, version)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        return _compare_and_write(path, text, version)
    finally:
        os.close(folder)


def _compare_and_write(path: str, text: str, version: str) -> bool:
    data = _read_bytes(path)
    if (_hash(data) if data is not None else "") != version:
        return False
    write_atomically(path, text)
    return True


def _read_bytes(path: str) -> Optional[bytes]:
    if is_local(path):
        try:
            return Path(path).read_bytes()
        except FileNotFoundError:
            return None
    if not exists(path):
        return None
    with open_file(path) as file:
        return bytes(file.read())


def _decode(data: bytes) -> str:
    return data.decode(errors="replace")  # a damaged file may be replaced too


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class StoredObject(NamedTuple):
    """One version of an object: its content, generation, who wrote it, and when by the store's clock."""

    data: bytes
    generation: int
    writer: str
    updated: datetime.datetime


class GcsObject:
    """A small object of Cloud Storage with conditional writes and deletes, which Beam's file system lacks.

    Args:
      path: gs://BUCKET/NAME.
      timeout_seconds: for each request.
      persistent: whether requests are repeated for about two minutes when the network or the store fails.
    """

    def __init__(self, path: str, timeout_seconds: float = _TIMEOUT_SECONDS, persistent: bool = True) -> None:
        # Imported here, because `import pipeline` must not import Beam's GCP parts.
        from apache_beam.io.gcp import gcsio
        from google.cloud.storage.retry import DEFAULT_RETRY

        # Beam's own client: the same credentials, options and emulator as for all other files.
        options = getattr(file_systems().get_filesystem(path), "_pipeline_options", None)
        bucket, self._name = gcsio.parse_gcs_path(path)
        self._bucket: Any = gcsio.GcsIO(pipeline_options=options).client.bucket(bucket)
        self._request = {"timeout": timeout_seconds, "retry": DEFAULT_RETRY if persistent else None}

    def read(self) -> Optional[StoredObject]:
        """The live version; None if there is no such object."""
        from google.api_core.exceptions import NotFound

        while True:
            blob = self._bucket.get_blob(self._name, **self._request)
            if blob is None:
                return None
            with suppress(NotFound):  # replaced since
                data = self._bucket.blob(self._name, generation=blob.generation).download_as_bytes(**self._request)
                return StoredObject(data, blob.generation, (blob.metadata or {}).get(_WRITER, ""), blob.updated)

    def write_if(self, text: str, generation: int, writer: str) -> int:
        """Writes the object if it has a generation.

        Args:
          text: the content.
          generation: the expected one; 0 if there must be no object.
          writer: stored with the object. If a request succeeds and its response is lost, the client repeats it and gets
            a conflict. The stored writer then shows that the object is its own.

        Returns:
          The new generation; 0 if the object's was another.
        """
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._name)
        blob.metadata = {_WRITER: writer}
        blob.cache_control = "no-store"  # else the store would serve public objects from a cache for an hour
        try:
            blob.upload_from_string(text.encode(), "text/plain", if_generation_match=generation, **self._request)
            return int(blob.generation)
        except Exception as error:
            try:
                stored = self.read()
            except Exception:
                raise error from None
            if stored is not None and stored.writer == writer:
                return stored.generation
            if isinstance(error, PreconditionFailed):
                return 0
            raise

    def delete_if(self, generation: int) -> bool:
        """Deletes that version of the object; False if there is another or none."""
        from google.api_core.exceptions import NotFound

        try:
            self._bucket.delete_blob(self._name, generation=generation, **self._request)
        except NotFound:
            return False
        return True

    def read_clock(self) -> datetime.datetime:
        """The store's time, from an object that is created and deleted beside this one."""
        from google.api_core.exceptions import NotFound

        blob = self._bucket.blob(self._name + ".clock")
        blob.upload_from_string(b"", **self._request)
        now: datetime.datetime = blob.updated
        with suppress(NotFound):  # other processes do the same
            blob.delete(**self._request)
        return now
