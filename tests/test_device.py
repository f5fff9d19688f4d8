"""`on_device.py`, on the GPU if there is one, and on a pretended device."""

import os
import subprocess
import sys

import pytest
import torch
from scripts import PATIENCE, ROOT


@pytest.mark.parametrize("part", ["layers", "training", "not layers and not training"])
@pytest.mark.parametrize("device", ["pretended", "cuda"])
def test_on_device(device, part):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    command = [sys.executable, "-m", "pytest", "tests/on_device.py", "-q", "-k", part, "-p", "no:cacheprovider"]
    environment = os.environ | {"SE3_TEST_DEVICE": device}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
