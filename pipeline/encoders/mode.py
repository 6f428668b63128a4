"""Switches of the fast graph that change its speed on one kind of device."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.encoders.onednn import has_fused_kernels
from pipeline.encoders.runtime import has_gpu, hear_onednn_out, native_half_precision

VERSION = 3  # of the arithmetic: raise it when numbers may change, so that cached parity checks are repeated


class Mode(NamedTuple):
    """How the graph runs.

    Attributes:
      precision: of the dense layers' matmuls; norms and the residual stream stay in float32.
      attention: of the matmuls of scores and of context, and on processors of all between them; float32 or `precision`.
      compiled: each layer goes through XLA.
      packed: padding is removed from the dense layers. Not for XLA: their shapes then vary with every batch.
      fused: a dense layer is one kernel of oneDNN, with its bias, its GELU and the sum with the residual, and so is a
        layer norm. They have no gradients.
      laid_out: those kernels lay out their weights once, for one more copy in memory. It pays in 16 bits, where
        laying out takes a large part of a matmul's time.
      emulated: the device lacks the precision: numbers are rounded to it and multiplied in float32, at its speed.
    """

    precision: str = "float32"
    attention: str = "float32"
    compiled: bool = False
    packed: bool = True
    fused: bool = False
    laid_out: bool = False
    emulated: bool = False


def choose_modes(precision: str) -> list[Mode]:
    """The modes for this machine's devices, the fastest first; each next one rounds less than the one before."""
    native = native_half_precision() == precision
    emulated = precision != "float32" and not native
    if has_gpu():
        attention = precision if native else "float32"
        return [Mode(precision, attention, compiled=True, packed=False, emulated=emulated)]
    if emulated:
        hear_onednn_out()
    mode = Mode(precision, fused=has_fused_kernels(), laid_out=native, emulated=emulated)
    return [mode._replace(attention=precision), mode] if native else [mode]


def choose_mode(precision: str, attention: str = "float32") -> Mode:
    """The mode for this machine's devices that has these precisions, or the nearest one to it."""
    modes = choose_modes(precision)
    return next((mode for mode in modes if mode.attention == attention), modes[-1])
