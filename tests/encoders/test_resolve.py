"""Encoders by handle: a hub handle from the hub's own cache, and a path on another file system."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from apache_beam.io.localfilesystem import LocalFileSystem

from pipeline.encoders.saved_model import describe_saved_model, resolve_handle
from pipeline.errors import EncoderError
from tests.support.paths import ENCODER

HANDLE = "https://tfhub.dev/tensorflow/talkheads_ggelu_bert_en_large/1"


class AttachedFileSystem(LocalFileSystem):
    """A file system of its own scheme, `attached://`, as Beam finds those of the cloud: by subclass."""

    root = ""

    @classmethod
    def scheme(cls):
        return "attached"

    def _local(self, path):
        return path.replace("attached:/", self.root, 1)

    def split(self, path):
        head, _, tail = path.rpartition("/")
        return head, tail

    def match(self, patterns, limits=None):
        found = super().match([self._local(pattern) for pattern in patterns], limits)
        for result in found:
            for metadata in result.metadata_list:
                metadata.path = metadata.path.replace(self.root, "attached:/", 1)
        return found

    def open(self, path, mime_type="application/octet-stream", compression_type="auto"):
        return super().open(self._local(path), mime_type, compression_type)


@pytest.fixture
def attached(tmp_path, monkeypatch):
    monkeypatch.setattr(AttachedFileSystem, "root", str(tmp_path / "bucket"))
    monkeypatch.setenv("EMBEAM_CACHE_DIR", str(tmp_path / "cache"))
    shutil.copytree(ENCODER, tmp_path / "bucket" / "models" / "tiny")
    return tmp_path / "bucket" / "models" / "tiny"


def read_files(folder):
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != "checksums.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_hub_handle_is_found_in_the_hubs_own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    os.symlink(ENCODER, tmp_path / hashlib.sha1(HANDLE.encode()).hexdigest())
    spec = describe_saved_model(resolve_handle(HANDLE), HANDLE)
    assert spec.outputs["pooled_output"] == (None, 64)


def test_a_remote_folder_is_copied_whole_and_once(attached):
    folder = resolve_handle("attached://models/tiny")
    assert read_files(folder) == read_files(ENCODER)
    made = os.stat(folder).st_mtime_ns
    assert resolve_handle("attached://models/tiny/") == folder
    assert os.stat(folder).st_mtime_ns == made


def test_a_remote_folder_that_changed_is_copied_again(attached):
    before = resolve_handle("attached://models/tiny")
    (attached / "assets" / "vocab.txt").write_text("another\n")
    after = resolve_handle("attached://models/tiny")
    assert after != before and Path(after, "assets", "vocab.txt").read_text() == "another\n"


def test_a_remote_folder_without_files_is_an_error_that_says_so(attached):
    with pytest.raises(
        EncoderError, match="attached://models/none holds no files; give the folder that holds saved_model"
    ):
        resolve_handle("attached://models/none")
