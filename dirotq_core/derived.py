"""What a transform computes from a site's tensors alone, kept between calls while those stay as and where they are.

Offloading gives a site's tensors new memory for every call. What was derived from them must not stay behind on the GPU
then, so a site whose tensors were found to move keeps nothing: its transform computes what it needs in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..kernels import lasting

Tensors = Mapping[str, torch.Tensor]
Parameters = Mapping[str, torch.Tensor | None]


class Derived:
    """The derived tensors of one site, empty until its first call outside of a graph; copies and pickles are empty."""

    __slots__ = ("_own", "_seen", "moves", "tensors")

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The site's tensors were moved or loaded: begin anew."""
        self.tensors: dict[str, torch.Tensor] = {}
        self.moves = False
        self._own: Parameters = {}
        self._seen: dict[str, tuple[torch.Tensor, int]] = {}

    def get(
        self, own: Parameters, derive: Callable[[Tensors], dict[str, torch.Tensor]], others: list[Derived]
    ) -> dict[str, torch.Tensor]:
        """`derive(own)`, as computed before if that still holds; empty where nothing can be kept.

        Args:
            own: the parameters of the site. others: of the model, to which this is added.
        """
        if torch.compiler.is_compiling():
            return self.tensors  # a graph takes what is there; it cannot add to it
        present = {name: tensor for name, tensor in own.items() if tensor is not None}
        if self.moves or not all(lasting(tensor) and not tensor.is_meta for tensor in present.values()):
            return {}
        if not (self._seen and self._in_place(own) and self._unchanged(own)):
            with torch.inference_mode(False), torch.no_grad():
                self.tensors = derive(present)
            self._own = own
            # The detached tensors keep the memory from being given to others, so that its address identifies it.
            self._seen = {name: (tensor.detach(), _version(tensor)) for name, tensor in present.items()}
            _drop_moved(others)
            if self not in others:
                others.append(self)
        return self.tensors

    def _in_place(self, own: Parameters) -> bool:
        for name, (seen, _) in self._seen.items():
            now = own.get(name)
            if now is None or now.device != seen.device or now.data_ptr() != seen.data_ptr():
                return False
        return True

    def _unchanged(self, own: Parameters) -> bool:
        return all((now := own.get(n)) is not None and _version(now) == v for n, (_, v) in self._seen.items())

    def __deepcopy__(self, memo: dict) -> Derived:
        return Derived()

    def __reduce__(self) -> tuple:
        return Derived, ()


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _drop_moved(kept: list[Derived]) -> None:
    """Let go of what sites hold whose tensors have gone elsewhere since."""
    for derived in [d for d in kept if not d._in_place(d._own)]:
        derived.forget()
        derived.moves = True
        kept.remove(derived)
