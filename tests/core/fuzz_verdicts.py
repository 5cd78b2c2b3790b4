"""The verdict on a case of `fuzz`: through our own readers, and through diffusers' `from_pretrained`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dirotq.dirotq_core.inspect import inspect_checkpoint
from dirotq.dirotq_core.single_file import inspect_native, read_native

Tensors = dict[str, torch.Tensor]


class TooSlow(BaseException):
    """Not an Exception, so that no handler of the code under test takes it for one of its own."""


def alarm(*_: Any) -> None:
    raise TooSlow


def read_verdict(expected: Tensors, path: Path) -> str:
    """ "refused", "same", or what is wrong."""
    for inspect in (True, False):
        try:
            if inspect:
                (inspect_checkpoint if path.is_dir() else inspect_native)(path)
                continue
            found = read_native(path).tensors
        except ValueError as error:
            lines = str(error).splitlines()
            if len(lines) != 1 or len(lines[0]) > 2000:
                return f"message of {len(lines)} lines, {len(str(error))} characters"
            if not inspect:
                return "refused"
        except TooSlow:
            return "too slow"
        except (Exception, SystemExit) as error:
            return f"{type(error).__module__}.{type(error).__name__}: {str(error)[:120]}"
    return "same" if same_tensors(found, expected) else "other tensors"


def load_verdict(cls: Any, expected: Tensors, path: Path) -> str:
    """`read_verdict` of diffusers' `from_pretrained` of `cls`; "other" if the folder's configuration is not ours."""
    try:
        if not (path / "config.json").is_file():  # one that never ends, for one
            return "other"
        quantization = json.loads((path / "config.json").read_bytes())["quantization_config"]
        if quantization["quant_method"] != "dirotq":
            return "other"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "other"
    try:
        found = cls.from_pretrained(path, torch_dtype=torch.bfloat16).state_dict()
    except (ValueError, OSError) as error:  # diffusers' own for a file that is not there
        long = isinstance(error, ValueError) and (len(str(error).splitlines()) != 1 or len(str(error)) > 2000)
        return f"message of {len(str(error))} characters: {str(error)[:120]}" if long else "refused"
    except TooSlow:
        return "too slow"
    except (Exception, SystemExit) as error:
        return f"{type(error).__module__}.{type(error).__name__}: {str(error)[:120]}"
    return "same" if same_tensors(found, expected) else "other tensors"


def same_tensors(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        t.dtype == expected[n].dtype and torch.equal(t, expected[n]) for n, t in found.items()
    )
