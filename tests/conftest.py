"""Settings of all tests: the checkout is what gets imported, every test starts from the same random state."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported first; see `test_on_chip.py`
torch.set_num_threads(1)  # the tensors of the tests are so small that threads only wait for each other

# Properties: quick and the same each time, unless pytest gets --hypothesis-profile=thorough.
settings.register_profile("quick", max_examples=10, derandomize=True, database=None, deadline=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def same_random_state():
    """Random numbers do not depend on which tests ran before, and no test leaves another default dtype behind."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32, "the test changed torch's default dtype"


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param
