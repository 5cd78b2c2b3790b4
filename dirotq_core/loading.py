"""The checks that come before diffusers builds a model from a folder.

A configuration may ask for more blocks than a machine can build, a shard may be a pipe that never ends, and what
diffusers raises for values of another type is open. All of that is in the headers, which take no time to read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .register import METHOD


def is_ours(config: Any) -> bool:
    """Whether a config.json, as parsed, is that of a model which is quantized by this method."""
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def check_folder(cls: type, source: Any, options: Mapping[str, Any]) -> None:
    """Raise CheckpointError, one sentence, if `source` is a quantized model's folder that breaks a rule of the format.

    Nothing is said of other folders, Hub ids, and classes without a recipe: those are for diffusers.

    Args:
        cls: of the model that is to be loaded. options: of its `from_pretrained`.
    """
    if not isinstance(source, (str, os.PathLike)) or not isinstance(options.get("subfolder"), (str, type(None))):
        return
    folder = Path(source, options.get("subfolder") or "")
    file = folder / "config.json"
    if not file.is_file():
        return
    data = file.read_bytes()
    try:
        # An escape may hide the name; then, too, it is what the parser finds.
        config = json.loads(data)
    except (ValueError, RecursionError):
        config = None
    if is_ours(config) or (not isinstance(config, dict) and METHOD.encode() in data):
        _check(cls, folder, file, options)


def _check(cls: type, folder: Path, file: Path, options: Mapping[str, Any]) -> None:
    from .architectures import SUPPORTED
    from .checkpoint import CheckpointError, checkpoint_tensors
    from .files import WEIGHTS_NAME, check_headers, indexed_files, read_headers, read_json
    from .inspect import sites_of

    name = next((c.__name__ for c in cls.__mro__ if c.__name__ in SUPPORTED), None)
    if name is None:
        return
    raw = read_json(file)
    given = {k: v for k, v in options.items() if k in raw and k != "quantization_config"}
    # The class decides, as in diffusers: a class of one's own may have written its own name.
    _, plans, model = sites_of(raw | given | {"_class_name": name}, file)
    if options.get("use_safetensors") is False or options.get("use_flashpack"):
        return  # refused later, by what is there
    variant = f".{options['variant']}" if options.get("variant") else ""
    stem, _, suffix = WEIGHTS_NAME.rpartition(".")
    weights, index = folder / f"{stem}{variant}.{suffix}", folder / f"{WEIGHTS_NAME}.index{variant}.json"
    if index.is_file():
        body = read_json(index)
        files = indexed_files(index, body)
        if not isinstance(body.get("metadata"), dict):  # nothing of ours, but diffusers writes into it
            raise CheckpointError(f"{index} has no JSON object called metadata")
    elif os.path.lexists(weights):
        files = [weights]
    else:
        return  # diffusers names what it looked for
    if not all(f.is_file() for f in files):
        missing = next(f for f in files if not f.is_file())
        raise CheckpointError(f"{missing} is missing or no regular file")
    try:
        check_headers(read_headers(files), checkpoint_tensors(model, plans))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
