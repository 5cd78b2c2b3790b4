"""Switching the activation format of a quantized model."""

import pytest
import torch

from dirotq import DiRotQConfig, set_activation_bits
from dirotq.dirotq_core.build import quantized_linears


def formats(model):
    return {m.site.activation for m in quantized_linears(model).values() if m.plan.quantize_input}


def test_bits_change_the_run_and_nothing_stored(quantized, run):
    model, _ = quantized("flux")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    outputs = {}
    for bits, name in ((8, "int8"), (4, "int4"), (16, None)):
        set_activation_bits(model, bits)
        assert formats(model) == {name}
        outputs[bits] = run(model)
    set_activation_bits(model, 8)
    assert torch.equal(run(model), outputs[8])
    error = {b: (outputs[b] - outputs[16]).norm() for b in (4, 8)}
    assert 0 < error[8] < error[4] / 4
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_modulation_stays_at_16_bit(quantized):
    model, plans = quantized("flux")
    set_activation_bits(model, 4)
    linears = quantized_linears(model)
    bits = {plan.quantize_input: {linears[n].activation_bits for n in plan.linears} for plan in plans}
    assert bits == {True: {4}, False: {16}}


@pytest.mark.parametrize("bits", [5, 0, "8", None])
def test_other_bits_are_refused(quantized, bits):
    with pytest.raises(ValueError, match=r"\(4, 8, 16\)"):
        set_activation_bits(quantized("pixart")[0], bits)


def test_a_dense_model_is_refused(tiny):
    with pytest.raises(ValueError, match="PixArtTransformer2DModel has no DiRotQ linears"):
        set_activation_bits(tiny("pixart"), 8)


def test_a_chosen_format_survives_other_bits(quantized):
    """activation_format is the format of its own bits: it returns with them, and the configuration loads."""
    model, _ = quantized("pixart", activation_format="codebook", activation_bits=4)
    assert formats(model) == {"codebook"}
    for bits, name in ((8, "int8"), (4, "codebook"), (16, None), (4, "codebook")):
        set_activation_bits(model, bits)
        assert formats(model) == {name}
        saved = model.hf_quantizer.quantization_config.to_dict()
        assert DiRotQConfig.from_dict(saved).activation_bits == bits
