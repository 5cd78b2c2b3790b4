"""The process that tests run in, before PyTorch and transformers are imported."""

import gc
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# `python -m pytest` puts the checkout on the path, where transformers takes our `kernels` for the Hub's library of that
# name. It would come a second time, and the ops of the copy that comes first are those of the process.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != ROOT]

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:  # `pytest -n`: PyTorch's threads share the processors, here and in the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


def pytest_collection_finish(session):
    """Collections of garbage, of which an evaluation makes several, no longer look through all that was imported."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    gc.unfreeze()  # what libraries tidy up when Python ends


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """What is marked `untraced` is; pytest-cov's `no_cover` leaves a second tracer on in pytest-xdist's workers."""
    if item.get_closest_marker("untraced") is None:
        return (yield)
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)
