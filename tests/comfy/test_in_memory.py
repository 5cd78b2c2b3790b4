"""Quantizing a MODEL of this process: what is kept, what is refused."""

import pytest
import torch

from dirotq.dirotq_core.single_file import to_native

from . import models
from .core import relative, run
from .loras import with_core_loras


def test_apply_keeps_options_and_leaves_the_source(core, make):
    state = to_native(models.flux().state_dict(), {"_class_name": "FluxTransformer2DModel", **models.flux().config})
    source = core.comfy.sd.load_diffusion_model_state_dict(dict(state))
    source.model_options["transformer_options"]["mark"] = 1
    before = run(core, source)
    made = core.quantizing.quantize_instantly(with_core_loras(core, source, 1.0), 8)
    assert made.model_options["transformer_options"]["mark"] == 1 and not made.patches
    assert made.model_size() < 0.5 * source.model_size()
    expected = run(core, with_core_loras(core, source, 1.0))
    assert relative(run(core, made), expected) < 0.1 < relative(before, expected)  # the LoRA went in
    assert torch.equal(run(core, source), before)
    with pytest.raises(ValueError, match="quantized already"):
        core.quantizing.quantize_instantly(made, 8)


def test_pixart_is_calibrated_at_sizes_it_can_draw(core, tmp_path):
    from dirotq.nodes.calibrate import Sampling

    state = to_native(
        models.pixart().state_dict(), {"_class_name": "PixArtTransformer2DModel", **models.pixart().config}
    )
    source = core.comfy.sd.load_diffusion_model_state_dict(dict(state))
    config = core.quantizing.calibrated_config("dirotq", 64, 4, 0)
    sampling = Sampling(source, [], None, 1, 1, 1.0, 256, 256, 0)
    with pytest.raises(ValueError, match="divides by zero at 256 x 256 pixels"):
        core.quantizing.quantize_calibrated(sampling, config, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())
