"""The single-file layout of ComfyUI: the original repositories' names, fused projections, and a header.

A fused linear is the rows of its parts one after the other, and rows are quantized independently, so a checkpoint goes
from one layout to the other and back without loss.
"""

from .convert import from_native, to_native
from .folder import convert
from .infer import infer_config
from .inspect import inspect_native
from .names import NATIVE, Fusion, fusions
from .read import NativeCheckpoint, read_native
from .write import write_native

__all__ = [
    "NATIVE",
    "Fusion",
    "NativeCheckpoint",
    "convert",
    "from_native",
    "fusions",
    "infer_config",
    "inspect_native",
    "read_native",
    "to_native",
    "write_native",
]
