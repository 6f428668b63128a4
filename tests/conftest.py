"""What holds for all tests: how TensorFlow is imported, and that an encoder is loaded once in a process."""

import os

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")

from pipeline.runtime import load_tensorflow

load_tensorflow()  # as the product does, with the same kernels, whichever test comes first

from pipeline.encoders import load  # noqa: E402
from tests.support.encoders import load_once  # noqa: E402

settings.register_profile("tests", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def loaded_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs find the encoders that earlier runs of the same process have loaded."""
    monkeypatch.setattr(load, "_load_and_measure", load_once)
