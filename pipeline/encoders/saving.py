"""Helpers that write a SavedModel: an atomic folder, a vocabulary file, a module."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import EncoderError
from pipeline.signals import on_stop

if TYPE_CHECKING:
    import tensorflow as tf

SPECIAL_TOKENS = {
    "padding_id": "[PAD]",
    "start_of_sequence_id": "[CLS]",
    "end_of_segment_id": "[SEP]",
    "mask_id": "[MASK]",
}
UNKNOWN = "[UNK]"


def check_vocabulary(vocabulary: Sequence[str]) -> None:
    """Checks that a list of word pieces can be written as a file of lines and read back by TensorFlow.

    Raises:
      EncoderError: if a special token is missing, or a piece is empty, repeated or holds a line break.
    """
    seen: set[str] = set()
    for number, piece in enumerate(vocabulary):
        if not piece or "\n" in piece or "\r" in piece:
            raise EncoderError(
                f"piece {number} of the vocabulary, {piece!r}, is empty or holds a line break; remove it"
            )
        if piece in seen:
            raise EncoderError(f"piece {number} of the vocabulary, {piece!r}, occurs twice; keep one of them")
        seen.add(piece)
    for token in [*SPECIAL_TOKENS.values(), UNKNOWN]:
        if token not in seen:
            raise EncoderError(f"the vocabulary lacks {token}; add it as a piece of its own")


@contextlib.contextmanager
def new_folder(folder: str) -> Iterator[str]:
    """Yields a temporary folder beside `folder`; renames it to `folder` if the block succeeds, else removes it.

    Raises:
      EncoderError: if `folder` exists already and is not empty.
    """
    folder = os.path.abspath(folder)
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f".{os.path.basename(folder)}.", dir=os.path.dirname(folder))
    forget = on_stop(lambda: shutil.rmtree(temporary, ignore_errors=True))
    try:
        yield temporary
        # mkdtemp makes folders that only their owner may read.
        os.chmod(temporary, 0o755)
        try:
            os.rename(temporary, folder)
        except OSError as error:
            if not os.path.lexists(folder):
                raise
            raise EncoderError(f"{folder} exists already; remove it or name another folder") from error
    finally:
        forget()
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def vocabulary_file(vocabulary: Sequence[str]) -> Iterator[str]:
    """Yields the path of a temporary `vocab.txt`, one piece per line."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "vocab.txt")
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(piece + "\n" for piece in vocabulary)
        yield path


def saveable(**attributes: Any) -> tf.Module:
    """Returns an object with these attributes, all of which `tf.saved_model.save` writes."""
    import tensorflow as tf

    class Saveable(tf.Module):
        variables = trainable_variables = None  # properties in tf.Module, which could not be saved under these names

    result = Saveable()
    for name, value in attributes.items():
        setattr(result, name, value)
    return result
