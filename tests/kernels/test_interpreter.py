"""Runs the `cpu` cases of the kernel tests in a process whose Triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.timeout(300)
def test_interpreted_kernels_agree_with_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cpu", "-p", "no:cacheprovider"]
    names = ("test_triton.py", "test_attention.py", "test_norm.py", "test_parts.py", "test_add.py", "test_attend.py")
    files = [str(Path(__file__).with_name(name)) for name in names]
    done = subprocess.run([*command, *files], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
