"""What holds for all tests: how TensorFlow is imported, that an encoder is loaded once in a process, and `call`."""

import functools
import os

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")

from pipeline.encoders.runtime import load_tensorflow

load_tensorflow()  # as the product does, with the same kernels, whichever test comes first

import pipeline.coders  # noqa: E402, F401  a transform that is tested by itself moves records as in a run
from pipeline.encoders import load  # noqa: E402
from tests.support.encoders import load_once  # noqa: E402
from tests.support.processes import Call, call_cli  # noqa: E402

settings.register_profile("tests", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def loaded_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs find the encoders that earlier runs of the same process have loaded."""
    monkeypatch.setattr(load, "_load_and_measure", load_once)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs the command line in this process: arguments -> exit code, stdout and stderr."""
    return functools.partial(call_cli, capfd)
