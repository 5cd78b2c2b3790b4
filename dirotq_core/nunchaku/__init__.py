"""SVDQuant INT4 checkpoints of FLUX.1 as Nunchaku and diffusers' ``nunchaku_lite`` store them, read into our format."""

from .convert import import_nunchaku
from .source import is_nunchaku

__all__ = ["import_nunchaku", "is_nunchaku"]
