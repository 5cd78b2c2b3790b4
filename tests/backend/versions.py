"""What some of the promised versions of diffusers cannot do."""

import inspect
from contextlib import contextmanager

import pytest
import torch
from diffusers.hooks import group_offloading
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.base import DiffusersQuantizer

#: Before 0.41 group offloading asks for a GPU even where it is told to use the CPU.
groups_on_cpu = pytest.mark.skipif(
    not hasattr(group_offloading, "TorchDeviceBackend") and not torch.cuda.is_available(),
    reason="needs a newer diffusers or a GPU",
)

#: Before 0.39 diffusers does not name the files to a quantizer.
KNOWS_FILES = hasattr(DiffusersQuantizer, "maybe_update_loaded_keys")
knows_files = pytest.mark.skipif(not KNOWS_FILES, reason="needs diffusers 0.39")

#: Older ones take the argument for one of `push_to_hub` and ignore it.
writes_flashpack = pytest.mark.skipif(
    "use_flashpack" not in inspect.signature(ModelMixin.save_pretrained).parameters, reason="needs a newer diffusers"
)


@contextmanager
def all_on_disk():
    """Skips where accelerate refuses, in the block, a model that is all on disk."""
    try:
        yield
    except ValueError as error:
        if "offload the whole model to the disk" not in str(error):
            raise
        pytest.skip("this version of accelerate refuses a model that is all on disk")
