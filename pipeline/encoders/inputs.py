"""A batch to the encoder's input arrays."""

from __future__ import annotations

import numpy as np

from pipeline.records import Batch, Chunk


def pack_chunks(chunks: list[Chunk], rows: int, length: int) -> dict[str, np.ndarray]:
    """Packs chunks into the encoder's three inputs.

    Padding is id 0, mask 0, type 0, as in the published preprocessor. A padding row has the mask of one token, so that
    its softmax is defined for every encoder.

    Args:
      chunks: at most `rows` chunks of at most `length` tokens.
      rows: B, the padded batch size.
      length: L, the padded length.

    Returns:
      `input_word_ids`, `input_mask`, `input_type_ids`, each int32 `[B, L]`.
    """
    sizes = np.array([chunk.n_tokens for chunk in chunks] + [1] * (rows - len(chunks)))  # [B]
    firsts = np.array([chunk.n_first for chunk in chunks] + [1] * (rows - len(chunks)))  # [B]
    positions = np.arange(length)  # [L]
    mask = positions < sizes[:, None]  # [B, L]
    ids = np.zeros((rows, length), np.int32)  # [B, L]
    tokens = np.frombuffer(b"".join(chunk.ids for chunk in chunks), "<i4")
    ids[: len(chunks)][mask[: len(chunks)]] = tokens
    types = mask & (positions >= firsts[:, None])  # [B, L]
    return {
        "input_word_ids": ids,
        "input_mask": mask.astype(np.int32),
        "input_type_ids": types.astype(np.int32),
    }


def pack_batch(batch: Batch) -> dict[str, np.ndarray]:
    """Packs a whole batch to its own grid shape; see `pack_chunks`."""
    return pack_chunks(batch, batch.rows, batch.length)


def pack_texts(batch: Batch) -> np.ndarray:
    """The texts of a batch for an encoder that takes strings: bytes objects, `[B]`."""
    return np.array([chunk.ids for chunk in batch] or [b""], dtype=object)
