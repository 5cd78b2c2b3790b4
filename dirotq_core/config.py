"""`DiRotQConfig`: every knob of a quantized model, small enough to live in ``config.json``."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from enum import Enum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from .activations import ACTIVATION_FORMATS
from .methods import METHODS, check_activation, method
from .register import register
from .transforms import aligned_rank

FORMAT_VERSION = 1
MAX_JSON = 2000


class DiRotQMethod(str, Enum):
    """The value of ``quant_method``; diffusers asks for an enumeration that is a string."""

    DIROTQ = "dirotq"


class UnsupportedFormatError(ValueError):
    """The checkpoint was written in a format this version does not read."""


@dataclass(kw_only=True)
class DiRotQConfig(QuantizationConfigMixin):
    """How a diffusion transformer is quantized to 4-bit weights and 4-, 8- or 16-bit activations.

    Values left at None are chosen when the model is made: by the method if calibration data is at hand
    (`dirotq.quantize`), else for data-free use (`from_pretrained(quantization_config=…)`): rank 0, rounding to
    nearest and 8-bit activations. A saved checkpoint holds what was chosen.

    A checkpoint's own configuration wins: diffusers ignores one given when a quantized model is loaded, and says so.
    Change `activation_bits` with `dirotq.set_activation_bits`.

    Args:
        method: "dirotq" (default), "paper" (as published), or a baseline: "hadamard", "svdquant", "rtn", or
            another published method: "orbitquant" (with "_w3", "_w2": fewer weight bits), "lrq" ("_w3"), or a
            floating-point format: "nvfp4", "nf4" (16-bit activations), or "robuq", which is made by training, or
            "nunchaku" (what imported SVDQuant checkpoints have).
        activation_bits: 4, 8 or 16; with some methods also 1, 2, 3, 6. A run-time choice: `dirotq.set_activation_bits`.
        site_activation_bits: a digit for each site with quantized input, in module order, instead of `activation_bits`.
        activation_format: replaces the method's format of as many bits, for example "codebook" (4 bits).
        rank: width r of the 16-bit subspace. Exclusive with `high_fraction`.
        high_fraction: that width as a share of the input width; 0.125 is the paper's.
        basis: "pca" (the paper's) or "joint" (minimizes activation and weight error together).
        rounding: "gptq" or "nearest".
        quantize_modulation: adaLN linears to W4A16 (27 % of FLUX.1's weights); False leaves them in 16 bit.
        modules_to_not_convert: modules left in 16 bit: full names, parts of dotted names, or globs with ``*``.
        weight_only_modules: likewise, for 4-bit weights with 16-bit activations.
        seed: of the random signs, which the checkpoint stores.
        format_version: of the checkpoint; a newer one than this package knows is refused.

    Raises:
        ValueError: a value is out of range; the message names it and the rule.
        UnsupportedFormatError: `format_version` is newer than this package.
    """

    method: str = "dirotq"
    activation_bits: int | None = None
    site_activation_bits: str | None = None
    activation_format: str | None = None
    rank: int | None = None
    high_fraction: float | None = None
    basis: str | None = None
    rounding: str | None = None
    quantize_modulation: bool = True
    modules_to_not_convert: list[str] | None = None
    weight_only_modules: list[str] | None = None
    seed: int = 0
    format_version: int = FORMAT_VERSION
    quant_method: Any = DiRotQMethod.DIROTQ

    def __post_init__(self) -> None:
        if self.quant_method not in (DiRotQMethod.DIROTQ, "dirotq"):
            raise ValueError(f"quant_method must be 'dirotq', got {self.quant_method!r}")
        self.quant_method = DiRotQMethod.DIROTQ
        _check_integer("format_version", self.format_version, 1, None)
        if self.format_version > FORMAT_VERSION:
            raise UnsupportedFormatError(
                f"format_version {self.format_version} is newer than this version of dirotq reads "
                f"({FORMAT_VERSION}); upgrade dirotq"
            )
        chosen = method(self.method)
        if self.activation_format is not None:
            check_activation(self.activation_format, self.method)
        _check_choice("activation_bits", self.activation_bits, self.activation_choices)
        digits = self.site_activation_bits
        if digits is not None and not (
            isinstance(digits, str) and digits and all(d.isdecimal() and int(d) in chosen.activations for d in digits)
        ):
            raise ValueError(
                f"site_activation_bits must be digits out of {tuple(chosen.activations)} for method {self.method!r}, "
                f"got {digits!r}"
            )
        if self.rank is not None and self.high_fraction is not None:
            raise ValueError(f"give rank ({self.rank}) or high_fraction ({self.high_fraction}), not both")
        if self.rank is not None:
            _check_integer("rank", self.rank, 0, 4096)
            if chosen.transform == "dense_pca" and self.rank % 64:
                raise ValueError(f"rank must be a multiple of 64 for method {self.method!r}, got {self.rank}")
        if self.high_fraction is not None and not (
            isinstance(self.high_fraction, (int, float))
            and not isinstance(self.high_fraction, bool)
            and 0 <= self.high_fraction <= 0.5
        ):
            raise ValueError(f"high_fraction must be between 0 and 0.5, got {self.high_fraction!r}")
        if not chosen.input_transform.subspace and (self.rank or self.high_fraction):
            raise ValueError(
                f"method {self.method!r} has no 16-bit subspace; leave rank and high_fraction unset, got "
                + (f"rank {self.rank}" if self.rank else f"high_fraction {self.high_fraction}")
            )
        _check_choice("basis", self.basis, ("pca", "joint"))
        _check_choice("rounding", self.rounding, ("gptq", "nearest"))
        if self.rounding == "gptq" and not chosen.gptq:
            raise ValueError(f"the weights of method {self.method!r} have no one table; rounding must be 'nearest'")
        _check_integer("seed", self.seed, 0, 2**31 - 1)
        if not isinstance(self.quantize_modulation, bool):
            raise ValueError(f"quantize_modulation must be true or false, got {self.quantize_modulation!r}")
        for name in ("modules_to_not_convert", "weight_only_modules"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)):
                raise ValueError(f"{name} must be a list of strings, got {value!r}")
        if len(self.to_json_string(use_diff=False)) > MAX_JSON:
            raise ValueError(
                f"the configuration is longer than {MAX_JSON} characters; use patterns, not lists of names"
            )

    def resolved(self, calibrated: bool) -> DiRotQConfig:
        """A copy without None. ValueError if the method or a given value needs calibration and there is none."""
        m = method(self.method)
        out = copy.deepcopy(self)
        if not calibrated:
            if m.needs_calibration:
                raise ValueError(
                    f"method {self.method!r} needs calibration data: use dirotq.quantize(pipeline, config, prompts=…), "
                    f"or a data-free method ({', '.join(n for n, o in METHODS.items() if not o.needs_calibration)})"
                )
            if self.rank or self.high_fraction:
                raise ValueError(
                    f"rank {self.rank or self.high_fraction} needs calibration data: use "
                    f"dirotq.quantize(pipeline, config, prompts=…), or leave rank unset for data-free quantization"
                )
            if self.rounding == "gptq":
                raise ValueError("rounding='gptq' needs calibration data: use dirotq.quantize, or rounding='nearest'")
            out.rank, out.high_fraction, out.rounding = 0, None, "nearest"
        if out.rank is None and out.high_fraction is None:
            out.rank, out.high_fraction = m.rank, m.high_fraction
        out.basis = out.basis or m.basis
        out.rounding = out.rounding or m.rounding
        if out.activation_bits is None:
            chosen = ACTIVATION_FORMATS[out.activation_format].bits if out.activation_format else None
            out.activation_bits = chosen or m.default_bits(calibrated)
        out.modules_to_not_convert = list(out.modules_to_not_convert or [])
        out.weight_only_modules = list(out.weight_only_modules or [])
        return out

    def site_rank(self, features: int) -> int:
        """r for a site of width K: `rank`, at most K/2, or K·`high_fraction` rounded up to a multiple of 64."""
        wanted = self.rank or 0 if self.high_fraction is None else aligned_rank(features, self.high_fraction)
        if method(self.method).transform == "dense_pca":  # what is left must be whole groups, too
            return min(wanted, features // 128 * 64)
        return min(wanted, features // 2)

    @property
    def activation_choices(self) -> tuple[int, ...]:
        """The activation bits that the method has formats for, and 16."""
        given = () if self.activation_format is None else (ACTIVATION_FORMATS[self.activation_format].bits,)
        return (*sorted({*method(self.method).activations, *given}), 16)

    def activation(self, bits: int) -> str | None:
        """Name of the activation format for `bits`, None for 16."""
        if bits == 16:
            return None
        if self.activation_format is not None and bits == ACTIVATION_FORMATS[self.activation_format].bits:
            return self.activation_format
        return method(self.method).activations[bits]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary of all fields."""
        fields = copy.deepcopy(self.__dict__)
        fields["quant_method"] = DiRotQMethod.DIROTQ.value
        return fields

    def to_diff_dict(self) -> dict[str, Any]:
        """Only the fields that differ from the defaults; the mixin's repr uses it."""
        defaults = {name: field.default for name, field in self.__dataclass_fields__.items()}
        keep = {"method", "quant_method"}
        return {k: v for k, v in self.to_dict().items() if k in keep or v != defaults.get(k)}

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As the mixin's; unknown keys raise ValueError by name (after the version, which explains them better)."""
        version = config_dict.get("format_version", FORMAT_VERSION)
        unknown = sorted(set(config_dict) - set(cls.__dataclass_fields__))
        if unknown and not (isinstance(version, int) and version > FORMAT_VERSION):
            raise ValueError(f"unknown fields in the dirotq quantization_config: {', '.join(unknown)}")
        fields = cls.__dataclass_fields__
        given = {**config_dict, **kwargs}
        config = cls(**{k: v for k, v in given.items() if k in fields})
        return (config, {k: v for k, v in kwargs.items() if k not in fields}) if return_unused_kwargs else config


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    if value is not None and (type(value) is not type(choices[0]) or value not in choices):
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _check_integer(name: str, value: Any, low: int, high: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be an integer {limits}, got {value!r}")


register()
