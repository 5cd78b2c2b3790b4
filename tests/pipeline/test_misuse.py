"""What `dirotq.quantize` refuses, and that an interrupt leaves the model as it was."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FluxKontextPipeline, FluxPipeline
from peft import LoraConfig
from PIL import Image

import dirotq
from dirotq.dirotq_core import backend
from dirotq.dirotq_core import quantize as quantize_module
from dirotq.dirotq_core.build import quantized_linears
from dirotq.dirotq_core.demo.embedded import load_pipeline

PROMPTS = ["a large red circle left of a small blue square on green"] * 2


@pytest.fixture
def flux():
    return load_pipeline("flux-tiny", torch_dtype=torch.bfloat16)


CALL = {"num_inference_steps": 1, "height": 128, "width": 128}
#: What takes a second: none of this depends on how codes are found.
QUICK = dirotq.DiRotQConfig(rank=16, basis="pca", rounding="nearest")
DATA_FREE = dirotq.DiRotQConfig()


def quantize(pipeline, config=None, prompts=PROMPTS, **call):
    if config is None:
        config = DATA_FREE if prompts is None else QUICK
    return dirotq.quantize(pipeline, config, prompts, call={**CALL, **call}, progress=False)


def snapshot(model):
    return {n: (type(model.get_submodule(n.rpartition(".")[0])), t.clone()) for n, t in model.state_dict().items()}


def unchanged(model, before):
    after = snapshot(model)
    return after.keys() == before.keys() and all(
        after[n][0] is before[n][0] and torch.equal(after[n][1], before[n][1]) for n in before
    )


def test_a_model_with_a_lora_is_refused(flux):
    flux.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"]))
    before = snapshot(flux.transformer)
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn\.to_q has a LoRA adapter; quantize first"):
        quantize(flux)
    assert unchanged(flux.transformer, before)


def test_fused_projections_are_refused(flux):
    flux.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn are fused; call unfuse_qkv_projections"):
        quantize(flux)


def test_a_site_that_nothing_calls_is_named(flux):
    block = flux.transformer.transformer_blocks[0].ff_context
    block.forward = torch.zeros_like
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.ff_context\.net\.0\.proj saw no token"):
        quantize(flux)
    assert not quantized_linears(flux.transformer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "one string"}, "list of strings"),
        ({"prompts": [1]}, "list of strings"),
        ({"config": {"rank": 4}}, "config must be a DiRotQConfig, got dict"),
        ({"output_type": "pil"}, "call must not hold 'output_type'"),
        ({"prompt": "x"}, "call must not hold 'prompt'"),
    ],
)
def test_misuse(flux, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(flux, **arguments)


def test_a_transformer_is_not_a_pipeline(flux):
    with pytest.raises(ValueError, match="must be a diffusers pipeline with a transformer, got FluxTransformer2DModel"):
        quantize(flux.transformer)


def test_an_interrupt_while_installing_leaves_the_model_dense(flux, monkeypatch):
    before = snapshot(flux.transformer)
    monkeypatch.setattr(quantize_module, "attach_quantizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(flux)
    assert unchanged(flux.transformer, before) and not getattr(flux.transformer, "is_quantized", False)


def interrupt(*_):
    raise KeyboardInterrupt


def test_fusing_a_quantized_model_is_said_and_ignored(flux, caplog):
    quantize(flux)
    before = snapshot(flux.transformer)
    flux.transformer.fuse_qkv_projections()
    assert unchanged(flux.transformer, before) and "not fused" in caplog.text
    flux.transformer.unfuse_qkv_projections()
    flux.transformer.dequantize()
    flux.transformer.fuse_qkv_projections()
    assert flux.transformer.transformer_blocks[0].attn.fused_projections


def test_flux_loads_a_lora(flux, tmp_path):
    """`load_lora_weights` does to the quantized model what it does to the dense one that it stands for."""
    maker = load_pipeline("flux-tiny", torch_dtype=torch.bfloat16)
    targets = ["to_q", "to_out.0", "ff.net.2", "proj_mlp", "x_embedder"]
    maker.transformer.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=lora_of(maker.transformer))
    quantize(flux)
    dirotq.set_activation_bits(flux, 16)
    dense = load_pipeline("flux-tiny", torch_dtype=torch.bfloat16)
    dense.transformer = copy.deepcopy(flux.transformer)
    dense.transformer.dequantize()
    plain = draw(flux)
    for pipeline in (flux, dense):
        pipeline.load_lora_weights(tmp_path)
    adapted = draw(flux)
    assert (adapted - plain).norm() > 0.1 * plain.norm()
    assert (adapted - draw(dense)).norm() < 0.05 * (adapted - plain).norm()
    flux.unload_lora_weights()
    assert torch.equal(draw(flux), plain)


def lora_of(model):
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def draw(pipeline):
    generator = torch.Generator().manual_seed(3)
    return pipeline(PROMPTS[0], generator=generator, output_type="latent", **CALL).images.float()


def test_the_hook_is_put_on_once(flux):
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    quantize(flux, prompts=None)
    first = FluxLoraLoaderMixin._calculate_module_shape
    backend._finish(flux.transformer)
    assert FluxLoraLoaderMixin._calculate_module_shape is first


@pytest.mark.parametrize("how", ["sequential", "group", "layerwise"])
def test_offloaded_and_cast_models_are_refused(flux, how):
    if how == "sequential":
        cpu_offload(flux.transformer, torch.device("cpu"), offload_buffers=True)
    elif how == "group":
        flux.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    else:
        flux.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    for prompts in (PROMPTS, None):
        with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn\.to_q.*(is offloaded or has a hook|float8)"):
            quantize(flux, prompts=prompts)
    assert not quantized_linears(flux.transformer)


def test_pipelines_that_want_an_image(flux):
    kontext = FluxKontextPipeline(**flux.components)
    image = Image.new("RGB", (128, 128), "red")
    quantize(kontext, prompts=PROMPTS, image=image, max_area=128 * 128, _auto_resize=False)
    assert quantized_linears(kontext.transformer)


def test_a_quantized_model_survives_pickling(flux, tmp_path, caplog):
    quantize(flux, prompts=None)
    torch.save(flux.transformer, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    again.fuse_qkv_projections()
    assert "FluxTransformer2DModel is quantized" in caplog.text
    flux.transformer, plain = again, draw(flux)
    assert torch.equal(draw(flux), plain)
