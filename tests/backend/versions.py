"""What some of the promised versions of diffusers cannot do."""

import pytest
import torch
from diffusers.hooks import group_offloading

#: Before 0.41 group offloading asks for a GPU even where it is told to use the CPU.
groups_on_cpu = pytest.mark.skipif(
    not hasattr(group_offloading, "TorchDeviceBackend") and not torch.cuda.is_available(),
    reason="needs a newer diffusers or a GPU",
)
