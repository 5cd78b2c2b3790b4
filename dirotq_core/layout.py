"""What a quantized model consists of: which linears, sharing which input sites, with which tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch

from .codebooks import WeightFormat, weight_format
from .config import DiRotQConfig
from .methods import method
from .transforms import SITE_DTYPES, TRANSFORMS, Transform

#: Format of weight-only (W4A16) linears that see no transform, such as modulation layers.
WEIGHT_ONLY_FORMAT = "codebook_g64"

Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class SitePlan:
    """An input site: the linears that read one tensor, in module order; the first owns the site's tensors.

    Attributes:
        linears: full module names. in_features: K. out_features: N of each linear.
        rank: r. quantize_input: False for W4A16.
        method: name in `METHODS`; None for a modulation layer, which sees no transform.
        seed: of this site's random signs, derived from its name so that it does not depend on the other sites.
    """

    linears: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    rank: int
    quantize_input: bool
    method: str | None
    seed: int

    @property
    def owner(self) -> str:
        return self.linears[0]

    @property
    def transform(self) -> Transform | None:
        return TRANSFORMS[method(self.method).transform] if self.method else None

    @property
    def format(self) -> WeightFormat:
        return weight_format(method(self.method).weight_format if self.method else WEIGHT_ONLY_FORMAT)

    @property
    def low_features(self) -> int:
        """K', the width of the 4-bit part."""
        t = self.transform
        return t.low_features(self.in_features, self.rank) if t else self.in_features

    def site_spec(self) -> Spec:
        """Shape and dtype of each tensor of the site."""
        t = self.transform
        shapes = t.shapes(self.in_features, self.rank) if t else {}
        return {name: (shape, SITE_DTYPES[name]) for name, shape in shapes.items()}

    def linear_spec(self, out_features: int) -> Spec:
        """Shape and dtype of each tensor of a linear with `out_features` rows, bias excepted."""
        k = self.low_features
        spec: Spec = {"weight": ((out_features, k // 2), torch.uint8)}
        if self.rank:
            spec["low_rank"] = ((out_features, self.rank), torch.bfloat16)
        if self.format.grouped:  # many: 16 bit
            spec["weight_scale"] = ((out_features, self.format.scale_columns(k)), torch.bfloat16)
        else:  # one a row, times an exact integer sum: 32 bit
            spec["weight_scale"] = ((out_features,), torch.float32)
        return spec


def linear_at(model: torch.nn.Module, name: str) -> torch.nn.Linear:
    """The linear called `name`, typed as one."""
    return cast(torch.nn.Linear, model.get_submodule(name))


def site_seed(name: str, seed: int) -> int:
    """A 31-bit seed for the site called `name`; the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFFFFFF


def plan_sites(model: torch.nn.Module, config: DiRotQConfig) -> list[SitePlan]:
    """The sites of `model` under a resolved `config`, in module order.

    Raises:
        ValueError: the model's class has no recipe (the message names those that have), or nothing is left to
            quantize.
    """
    from .architectures import recipe_for

    recipe = recipe_for(model)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    names = _Patterns(config.modules_to_not_convert or [], model, "modules_to_not_convert")
    weight_only = _Patterns(config.weight_only_modules or [], model, "weight_only_modules")
    plans = []
    for group, modulation in recipe.groups(linears):
        if modulation and not config.quantize_modulation:
            continue
        kept = [n for n in group if n not in names]
        for members, quantize_input in _split(kept, weight_only, modulation):
            plan = _plan(members, linears, config, quantize_input, modulation)
            if plan is not None:
                plans.append(plan)
    if not plans:
        raise ValueError(
            f"no linear of {type(model).__name__} is left to quantize: every one is excluded by "
            "modules_to_not_convert or its width is not a multiple of 64"
        )
    return plans


def _split(kept: list[str], weight_only: _Patterns, modulation: bool) -> Iterator[tuple[list[str], bool]]:
    if modulation:
        yield kept, False
        return
    yield [n for n in kept if n not in weight_only], True
    yield [n for n in kept if n in weight_only], False


def _plan(
    members: list[str], linears: dict, config: DiRotQConfig, quantize_input: bool, modulation: bool
) -> SitePlan | None:
    if not members:
        return None
    k = linears[members[0]].in_features
    if any(linears[n].in_features != k for n in members):
        raise ValueError(f"linears of one site must have one input width: {members}")
    if k % 64:
        return None
    return SitePlan(
        linears=tuple(members),
        in_features=k,
        out_features=tuple(linears[n].out_features for n in members),
        rank=0 if modulation else config.site_rank(k),
        quantize_input=quantize_input,
        method=None if modulation else config.method,
        seed=site_seed(members[0], config.seed),
    )


class _Patterns:
    """Module names selected by a user's list.

    An entry with ``*``, ``?`` or ``[`` is a glob over the full name. An entry that is itself a module's full name
    selects that module and all below it, nothing else: "proj_out" leaves FLUX's last linear alone, not the 38
    proj_out of its single blocks. Any other entry selects names that contain it as a run of dotted parts.
    """

    def __init__(self, entries: list[str], model: torch.nn.Module, field: str):
        import fnmatch

        modules = {n for n, _ in model.named_modules() if n}
        self._selected: set[str] = set()
        for entry in entries:
            if any(c in entry for c in "*?["):
                hits = {n for n in modules if fnmatch.fnmatchcase(n, entry)}
            elif entry in modules:
                hits = {n for n in modules if n == entry or n.startswith(entry + ".")}
            else:
                hits = {n for n in modules if f".{entry}." in f".{n}."}
            if not hits:
                raise ValueError(f"{field}: {entry!r} matches no module of {type(model).__name__}")
            self._selected |= hits

    def __contains__(self, name: str) -> bool:
        return name in self._selected
