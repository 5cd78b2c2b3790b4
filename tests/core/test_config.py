"""`DiRotQConfig`: every error names the value and the rule; JSON keeps every field."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq import DiRotQConfig
from dirotq.dirotq_core.activations import ACTIVATION_FORMATS
from dirotq.dirotq_core.adaptive import ADAPTIVE_ROTATION
from dirotq.dirotq_core.codebooks import WEIGHT_FORMATS, PackedFormat
from dirotq.dirotq_core.config import FORMAT_VERSION, MAX_JSON, UnsupportedFormatError
from dirotq.dirotq_core.methods import METHODS, check_activation
from dirotq.dirotq_core.ternary import SVD_BRANCH
from dirotq.dirotq_core.transforms import TRANSFORMS, aligned_rank

# arguments, what the message must contain
INVALID = [
    ({"method": "gptq"}, ["method", "'gptq'", "dirotq, paper"]),
    ({"method": ["paper"]}, ["method", "['paper']", "dirotq, paper"]),
    ({"activation_bits": 5}, ["activation_bits", "(4, 8, 16)", "5"]),
    ({"activation_bits": "4"}, ["activation_bits", "(4, 8, 16)", "'4'"]),
    ({"activation_bits": 4.0}, ["activation_bits", "(4, 8, 16)", "4.0"]),
    ({"activation_bits": 5, "method": "orbitquant"}, ["activation_bits", "(3, 4, 6, 8, 16)", "5"]),
    ({"activation_bits": 6, "method": "paper"}, ["activation_bits", "(4, 8, 16)", "6"]),
    ({"activation_format": ["int4"]}, ["activation_format", "['int4']", "codebook"]),
    ({"activation_format": "fp4"}, ["activation_format", "'fp4'", "codebook"]),
    ({"activation_format": "codebook", "method": "rtn"}, ["'codebook'", "'rtn'", "one weight scale per row"]),
    ({"activation_format": "int4", "method": "paper"}, ["'int4'", "'paper'", "Hadamard"]),
    ({"rank": 64, "high_fraction": 0.125}, ["rank (64)", "high_fraction (0.125)", "not both"]),
    ({"rank": -1}, ["rank", "between 0 and 4096", "-1"]),
    ({"rank": 4097}, ["rank", "between 0 and 4096", "4097"]),
    ({"rank": 64.0}, ["rank", "integer", "64.0"]),
    ({"rank": True}, ["rank", "integer", "True"]),
    ({"rank": 32, "method": "paper"}, ["rank", "multiple of 64", "'paper'", "32"]),
    ({"rank": 8, "method": "rtn"}, ["'rtn'", "no 16-bit subspace", "rank 8"]),
    ({"high_fraction": 0.1, "method": "rtn"}, ["'rtn'", "no 16-bit subspace", "high_fraction 0.1"]),
    ({"high_fraction": 0.6}, ["high_fraction", "between 0 and 0.5", "0.6"]),
    ({"high_fraction": -0.1}, ["high_fraction", "between 0 and 0.5", "-0.1"]),
    ({"high_fraction": float("nan")}, ["high_fraction", "between 0 and 0.5", "nan"]),
    ({"high_fraction": False}, ["high_fraction", "between 0 and 0.5", "False"]),
    ({"high_fraction": "1/8"}, ["high_fraction", "between 0 and 0.5", "'1/8'"]),
    ({"basis": "svd"}, ["basis", "('pca', 'joint')", "'svd'"]),
    ({"rounding": "awq"}, ["rounding", "('gptq', 'nearest')", "'awq'"]),
    ({"seed": -1}, ["seed", "between 0 and 2147483647", "-1"]),
    ({"seed": 2**31}, ["seed", "between 0 and 2147483647", "2147483648"]),
    ({"seed": None}, ["seed", "integer", "None"]),
    ({"quantize_modulation": 1}, ["quantize_modulation", "true or false", "1"]),
    ({"modules_to_not_convert": "proj_out"}, ["modules_to_not_convert", "list of strings", "'proj_out'"]),
    ({"weight_only_modules": [1]}, ["weight_only_modules", "list of strings", "[1]"]),
    ({"modules_to_not_convert": ["x" * MAX_JSON]}, [str(MAX_JSON), "patterns"]),
    ({"format_version": 0}, ["format_version", "at least 1", "0"]),
    ({"format_version": "1"}, ["format_version", "integer", "'1'"]),
    ({"quant_method": "bitsandbytes"}, ["quant_method", "'dirotq'", "'bitsandbytes'"]),
]


@pytest.mark.parametrize(("arguments", "parts"), INVALID, ids=lambda v: str(v)[:40] if isinstance(v, dict) else "")
def test_invalid_value_is_named_with_its_rule(arguments, parts):
    with pytest.raises(ValueError) as error:
        DiRotQConfig(**arguments)
    for part in parts:
        assert part in str(error.value)


def test_the_newer_version_is_refused_before_what_it_brought():
    """Unknown fields and values of a later version are explained by the version."""
    newer = {
        "quant_method": "dirotq",
        "format_version": FORMAT_VERSION + 1,
        "novelty": 3,
        "rounding": "future",
    }
    with pytest.raises(UnsupportedFormatError, match=rf"{FORMAT_VERSION + 1} is newer.*\({FORMAT_VERSION}\).*upgrade"):
        DiRotQConfig.from_dict(newer)


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match=r"unknown fields.*bits, group"):
        DiRotQConfig.from_dict({"quant_method": "dirotq", "group": 64, "bits": 4})


def test_positional_arguments_are_refused():
    with pytest.raises(TypeError, match="positional"):
        DiRotQConfig("paper")


def test_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="bits"):
        DiRotQConfig(bits=4)


def test_a_fraction_of_nothing_resolves_to_what_loads():
    resolved = DiRotQConfig(high_fraction=0.0).resolved(calibrated=False)
    assert DiRotQConfig.from_dict(resolved.to_dict()) == resolved


RANKED = {name for name, m in METHODS.items() if m.input_transform.subspace}


def config_of(method, rank, activation_bits, rounding, **fields):
    """What the method has no choice of stays open."""
    row = METHODS[method]
    return DiRotQConfig(
        method=method,
        rank=rank if method in RANKED else None,
        activation_bits=activation_bits if activation_bits in (*row.activations, 16) else None,
        rounding=rounding if row.gptq else None,
        **fields,
    )


configs = st.builds(
    config_of,
    method=st.sampled_from(sorted(METHODS)),
    activation_bits=st.sampled_from([None, 4, 8, 16]),
    rank=st.none() | st.integers(0, 64).map(lambda n: 64 * n),
    basis=st.sampled_from([None, "pca", "joint"]),
    rounding=st.sampled_from([None, "gptq", "nearest"]),
    quantize_modulation=st.booleans(),
    modules_to_not_convert=st.none() | st.lists(st.text(max_size=20), max_size=4),
    weight_only_modules=st.none() | st.lists(st.text(max_size=20), max_size=4),
    seed=st.integers(0, 2**31 - 1),
)


@settings(deadline=None, max_examples=100)
@given(config=configs, diff=st.booleans())
def test_json_round_trip(config, diff):
    text = config.to_json_string(use_diff=diff)
    assert len(text) <= MAX_JSON or not diff
    assert DiRotQConfig.from_dict(json.loads(text)) == config
    assert DiRotQConfig.from_dict(config.to_dict()) == config


@settings(deadline=None, max_examples=100)
@given(config=configs)
def test_a_resolved_config_is_complete_and_stays_itself(config):
    before = config.to_dict()
    done = config.resolved(calibrated=True)
    assert config.to_dict() == before
    chosen = METHODS[config.method]
    assert (done.rank is None) != (done.high_fraction is None)
    for name in ("activation_bits", "basis", "rounding", "modules_to_not_convert", "weight_only_modules"):
        assert getattr(done, name) is not None
        assert getattr(config, name) in (None, getattr(done, name))
    assert done.rounding == (config.rounding or chosen.rounding)
    assert done.activation_bits == (config.activation_bits or (4 if 4 in chosen.activations else 16))
    assert done.resolved(calibrated=True) == done
    assert DiRotQConfig.from_dict(json.loads(done.to_json_string())) == done


def test_data_free_resolution():
    done = DiRotQConfig().resolved(calibrated=False)
    assert (done.rank, done.high_fraction, done.rounding, done.activation_bits) == (0, None, "nearest", 8)
    assert DiRotQConfig(activation_bits=4).resolved(calibrated=False).activation_bits == 4
    assert DiRotQConfig(activation_format="codebook").resolved(calibrated=False).activation_bits == 4


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"method": "paper"}, ["'paper'", "prompts=", "dirotq, hadamard"]),
        ({"method": "svdquant"}, ["'svdquant'", "prompts="]),
        ({"rank": 64}, ["rank 64", "needs calibration"]),
        ({"high_fraction": 0.125}, ["0.125", "needs calibration"]),
        ({"rounding": "gptq"}, ["rounding='gptq'", "needs calibration"]),
    ],
)
def test_what_needs_data_is_refused_without(arguments, parts):
    with pytest.raises(ValueError) as error:
        DiRotQConfig(**arguments).resolved(calibrated=False)
    assert all(part in str(error.value) for part in parts)


def test_data_free_zero_width_is_fine():
    assert DiRotQConfig(rank=0, rounding="nearest").resolved(calibrated=False).rank == 0


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_are_rows_of_known_parts(name):
    row = METHODS[name]
    assert row.input_transform in (*TRANSFORMS.values(), ADAPTIVE_ROTATION, SVD_BRANCH)
    assert row.weight_format in WEIGHT_FORMATS or isinstance(row.weight_format, PackedFormat)
    assert not row.activations or 4 in row.activations
    assert row.modulation_format in WEIGHT_FORMATS
    assert row.source
    for bits, activation in row.activations.items():
        check_activation(activation, name)
        assert ACTIVATION_FORMATS[activation].bits == bits
        assert DiRotQConfig(method=name).activation(bits) == activation
    assert DiRotQConfig(method=name).activation(16) is None
    assert row.fused <= all(ACTIVATION_FORMATS[a].lattice for a in row.activations.values())


def test_levels_of_a_row_cannot_be_rounded_by_gptq():
    with pytest.raises(ValueError, match=r"'lrq' have no one table.*must be 'nearest'"):
        DiRotQConfig(method="lrq", rounding="gptq")


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("fp4", "dirotq", r"unknown activation_format 'fp4'; known: codebook"),
        ("int8", "svdquant", r"'int8' needs one weight scale per row.*'svdquant'"),
    ],
)
def test_an_activation_format_must_fit(name, method, message):
    with pytest.raises(ValueError, match=message):
        check_activation(name, method)


def test_an_activation_format_sets_the_bits():
    assert DiRotQConfig(activation_format="int8").resolved(calibrated=True).activation_bits == 8
    assert DiRotQConfig(activation_format="codebook").resolved(calibrated=False).activation_bits == 4


def test_activation_format_overrides_its_own_bits_only():
    config = DiRotQConfig(activation_format="codebook", activation_bits=4)
    assert (config.activation(4), config.activation(8), config.activation(16)) == ("codebook", "int8", None)


@settings(deadline=None)
@given(k=st.integers(1, 300).map(lambda n: 64 * n), fraction=st.floats(0, 0.5))
def test_site_rank_of_a_fraction(k, fraction):
    """K·fraction up to the next multiple of 64, at most K/2."""
    rank = DiRotQConfig(high_fraction=fraction).site_rank(k)
    assert rank in (aligned_rank(k, fraction), k // 2)
    assert rank <= k // 2
    assert rank >= min(k * fraction - 1, k // 2)


def test_site_rank_of_a_width():
    assert [DiRotQConfig(rank=64).site_rank(k) for k in (64, 128, 3072)] == [32, 64, 64]
    assert DiRotQConfig(rank=0).site_rank(64) == 0
    assert DiRotQConfig(high_fraction=0.125).site_rank(3072) == 384


def test_repr_names_the_choice():
    assert re.search(r"method='paper'", repr(DiRotQConfig(method="paper")))
