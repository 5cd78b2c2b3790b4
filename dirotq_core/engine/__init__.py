"""The streaming engine: quantize a checkpoint on disk block by block, with one block on the device at a time.

`quantize_checkpoint` (run.py) is the way in. source.py reads the dense model, blocks.py cuts it into blocks, draw.py
gets the first block's inputs by running the pipeline, process.py quantizes one block, journal.py makes it survive a
kill, shards.py and output.py write the result, estimate.py says beforehand what it takes.
"""

from .options import EngineOptions
from .run import plan_checkpoint, quantize_checkpoint

__all__ = ["EngineOptions", "plan_checkpoint", "quantize_checkpoint"]
