"""Kernels of oneDNN that TensorFlow has no Python functions for: a whole dense layer, and a layer norm.

TensorFlow itself replaces several ops by them, but only if its optimisers have not rearranged these ops before, and
only with weights that are constants of the graph, which it then copies many times. Called directly, they take weights
from outside the graph. They exist only on x86 processors.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pipeline.encoders.runtime import load_tensorflow

if TYPE_CHECKING:
    import tensorflow as tf

DENSE, LAYER_NORM = "_MklNativeFusedMatMul", "_MklLayerNorm"
_LABEL = "MklNameChangeOp"  # the label of the kernels that take TensorFlow's own layout of tensors


def has_fused_kernels() -> bool:
    """Whether this TensorFlow has the kernels and oneDNN is not turned off."""
    load_tensorflow()
    from tensorflow.python.framework import op_def_registry

    wanted = os.environ["TF_ENABLE_ONEDNN_OPTS"] != "0"
    return wanted and all(op_def_registry.get(op) is not None for op in (DENSE, LAYER_NORM))


def fused_dense(
    x: tf.Tensor,
    kernel: tf.Tensor,
    bias: tf.Tensor,
    gelu: bool = False,
    residual: tf.Tensor | None = None,
    laid_out: bool = False,
) -> tf.Tensor:
    """x [N, inputs] times the kernel plus the bias, and its GELU or its sum with a residual: [N, outputs].

    All are of one type, in which the result is rounded once.

    Args:
      gelu: apply the tanh form of GELU.
      residual: [N, outputs] to be added, or None; not with a GELU.
      laid_out: the kernel is laid out at the first call, for all that follow.
    """
    from tensorflow.python.framework import ops

    more = ["GeluApproximate"] if gelu else [] if residual is None else ["Add"]
    with ops.get_default_graph()._kernel_label_map({DENSE: _LABEL}):
        return _apply(
            DENSE,
            a=x,
            b=kernel,
            args=[bias] if residual is None else [bias, residual],
            fused_ops=["BiasAdd", *more],
            is_filter_const=laid_out,
            transpose_a=False,
            transpose_b=False,
            epsilon=0.0,
            leakyrelu_alpha=0.0,
        )


def layer_norm(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float) -> tf.Tensor:
    """Shifts and scales each row of x [N, D] to mean 0 and variance 1, then by beta and gamma [D]."""
    return _apply(LAYER_NORM, x=x, scale=gamma, offset=beta, epsilon=epsilon)


def _apply(op: str, **arguments: Any) -> tf.Tensor:
    from tensorflow.python.framework import op_def_library

    return op_def_library.apply_op(op, name=op.strip("_"), **arguments)
