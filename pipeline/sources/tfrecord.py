"""TFRecord files of tf.Example records; the framing is read by our own code.

A record is: uint64 length, masked crc32c of the length, data, masked crc32c of the data, all little-endian. A wrong
checksum of data costs that record; a wrong checksum of a length costs the rest of the file, since the next
record cannot be found.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import google_crc32c

from pipeline.read_config import ReadConfig
from pipeline.sources.compression import ByteReader, FileError, TruncatedFile, open_stream, skip_bytes
from pipeline.sources.decoders import find_compression
from pipeline.sources.source import FileRange, InputFile, Record, Source, describe_too_large, needed_fields

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_MASK_DELTA = 0xA282EAD8


class Frame(NamedTuple):
    """One framed record; `data` is empty if it is too large to be held."""

    data: bytes
    size: int
    is_intact: bool = True
    is_too_large: bool = False


class BrokenFraming(FileError):
    """A length with a wrong checksum: the records after it cannot be found."""

    reason = "bad_checksum"


class TfrecordSource(Source):
    """TFRecord files; a file is read by one worker since records can only be found in order."""

    is_text = False

    def find_compression(self, head: bytes) -> str:
        """Also zlib streams, which TensorFlow writes and which have no magic bytes."""
        if self.may_begin_with(head):
            return ""
        is_zlib = head[:1] == b"\x78" and int.from_bytes(head[:2], "big") % 31 == 0
        return find_compression(head) or ("zlib" if is_zlib else "")

    def may_begin_with(self, head: bytes) -> bool:
        """Whether they are the length of a record and its checksum."""
        return len(head) >= _HEADER.size and mask_crc(google_crc32c.value(head[:8])) == _HEADER.unpack_from(head)[1]

    def describe_fields(self, file: InputFile, config: ReadConfig) -> dict[str, str]:
        from google.protobuf.message import DecodeError
        from tensorflow.core.example.example_pb2 import Example

        with open_stream(file.path, file.compression, max_window=config.max_window) as stream:
            first = next(iterate_frames(stream, config.max_document_bytes), None)
        try:
            return dict.fromkeys(Example.FromString(first.data).features.feature if first else (), "")
        except DecodeError:
            return {}

    def read_records(self, file_range: FileRange, config: ReadConfig) -> Iterator[Record]:
        from google.protobuf.message import DecodeError
        from tensorflow.core.example.example_pb2 import Example

        file, names = file_range.file, needed_fields(config)
        with open_stream(file.path, file.compression, max_window=config.max_window) as stream:
            for number, frame in enumerate(iterate_frames(stream, config.max_document_bytes)):
                n_read = stream.position
                if frame.is_too_large:
                    message = describe_too_large(frame.size, config)
                    yield Record(number, n_read, reason="too_large", message=message)
                elif not frame.is_intact:
                    message = f"record {number} of {frame.size} bytes has a wrong checksum"
                    yield Record(number, n_read, reason="bad_checksum", message=message)
                else:
                    try:
                        values = read_example(Example.FromString(frame.data), names)
                    except DecodeError as error:
                        message = f"record {number} is not a tf.Example: {error}"
                        yield Record(number, n_read, reason="malformed_example", message=message)
                    else:
                        yield Record(number, n_read, values)


def iterate_frames(stream: ByteReader, limit: int) -> Iterator[Frame]:
    """Yields the framed records of a stream, without holding any of more than `limit` bytes.

    Raises:
      TruncatedFile: if the stream ends within a record.
      BrokenFraming: if a length does not have its checksum.
    """
    while header := stream.read(_HEADER.size):
        if len(header) < _HEADER.size:
            raise TruncatedFile("the file ends within a record's length")
        size, checksum = _HEADER.unpack(header)
        if mask_crc(google_crc32c.value(header[:8])) != checksum:
            raise BrokenFraming("a record's length has a wrong checksum; the rest of the file cannot be read")
        if size > limit:
            if skip_bytes(stream, size + _FOOTER.size) < size + _FOOTER.size:
                raise TruncatedFile("the file ends within a record")
            yield Frame(b"", size, is_too_large=True)
            continue
        data = stream.read(size)
        footer = stream.read(_FOOTER.size)
        if len(data) < size or len(footer) < _FOOTER.size:
            raise TruncatedFile("the file ends within a record")
        yield Frame(data, size, mask_crc(google_crc32c.value(data)) == _FOOTER.unpack(footer)[0])


def mask_crc(crc: int) -> int:
    """The masked checksum that TFRecord files store, after tensorflow/core/lib/hash/crc32c.h."""
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def read_example(example: Any, names: list[str]) -> dict[str, Any]:
    """The named features: the value itself where there is one, None where there is none, else a list."""
    values = {}
    features = example.features.feature
    for name in names:
        if name in features:
            feature = features[name]
            kind = feature.WhichOneof("kind")
            items = getattr(feature, kind).value if kind else []
            values[name] = items[0] if len(items) == 1 else list(items) or None
    return values
