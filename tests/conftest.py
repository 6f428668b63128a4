"""TensorFlow is imported as the product imports it, with the same kernels, whichever test comes first."""

from pipeline.runtime import load_tensorflow

load_tensorflow()
