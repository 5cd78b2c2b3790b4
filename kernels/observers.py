"""Whether anybody but the op itself sees a call: what PyTorch's dispatcher asks for us, at ten times the cost."""

from collections.abc import Callable
from typing import Any

import torch

# Compilers that trace (`torch.jit`, `make_fx`, `torch.export`), modes of functions and ops, transforms such as
# `torch.vmap`, a profiler: none of them misses a call that is not there.
_QUESTIONS = (
    "_len_torch_dispatch_stack", "_len_torch_function_stack", "_are_functorch_transforms_active", "_get_tracing_state",
    "_autograd._profiler_enabled",
)  # fmt: skip


def _question(path: str) -> Callable[[], Any] | None:
    place: Any = torch._C
    for name in path.split("."):
        place = getattr(place, name, None)
    return place


_questions = tuple(_question(path) for path in _QUESTIONS)
_modes, _functions, _transforms, _trace, _profiler = (question or (lambda: True) for question in _questions)
"""Of a PyTorch that has no such question, anybody may be looking."""


def observed() -> bool:
    """Whether gradients are recorded or somebody sees a call of this thread. `torch.compile` is asked for apart."""
    return (
        torch.is_grad_enabled()
        or _modes() != 0
        or _functions() != 0
        or bool(_transforms())
        or bool(_profiler())
        or _trace() is not None
    )
