import os

import pytest
import torch

THINNED = ("test_faults.py", "test_overflow.py")
"""Of these, `make test` runs a third of what Triton's interpreter takes seconds for; `make soak` and a GPU run all."""


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available() or "VLLM_S2O_EXAMPLES" in os.environ:
        return
    slow = [item for item in items if item.path.name in THINNED and "triton" in item.nodeid]
    left_out = {item for index, item in enumerate(slow) if index % 3}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors here are so small that threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
