"""diffusers' pipelines around a quantized transformer, called as with a dense one.

Each draws with a quantized transformer at 16-bit activations and with the dense one that it stands for: what a pipeline
feeds in and takes out must arrive the same. The parts are those of the embedded models; where a pipeline wants another
transformer or more parts, they are made from these at random.
"""

import copy
import inspect

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxPriorReduxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
    PyramidAttentionBroadcastConfig,
)
from diffusers.models.embeddings import ImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

import dirotq
from dirotq.dirotq_core.build import quantized_linears
from dirotq.dirotq_core.demo.embedded import MODELS, load_pipeline

from ..marks import thorough

SIDE = 64
CAPTION = "a large red square above a small yellow triangle on orange"


class Parts:
    """An embedded pipeline's components without its transformer, and (quantized, dense) pairs of transformers."""

    def __init__(self, name):
        self.loaded = load_pipeline(name, torch.float32)
        self.components = {k: v for k, v in self.loaded.components.items() if k != "transformer"}
        self.call = {**MODELS[name].call, "height": SIDE, "width": SIDE, "num_inference_steps": 3}
        self.pairs = {}

    def pair(self, in_channels=None):
        """The embedded transformer, its input layer replaced by one of `in_channels`."""
        if in_channels not in self.pairs:
            model = copy.deepcopy(self.loaded.transformer)
            if in_channels is not None:
                model = self.widened(model, in_channels)
            pipeline = copy.copy(self.loaded)
            pipeline.transformer = model
            dirotq.quantize(pipeline, dirotq.DiRotQConfig(activation_bits=16), progress=False)
            dense = copy.deepcopy(pipeline.transformer)
            dense.dequantize()
            assert quantized_linears(pipeline.transformer) and not quantized_linears(dense)
            self.pairs[in_channels] = pipeline.transformer, dense
        return self.pairs[in_channels]

    @staticmethod
    def widened(model, in_channels):
        torch.manual_seed(0)
        out = model.config.out_channels or model.config.in_channels
        config = {**model.config, "in_channels": in_channels, "out_channels": out}
        wide = FluxTransformer2DModel.from_config(config)
        kept = {k: v for k, v in model.state_dict().items() if not k.startswith("x_embedder")}
        wide.load_state_dict(kept, strict=False)
        return wide.eval()


@pytest.fixture(scope="module")
def flux():
    return Parts("flux-tiny")


@pytest.fixture(scope="module")
def pixart():
    return Parts("pixart-sigma-tiny")


def picture(seed, channels=3):
    return torch.rand(1, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def both(cls, parts, helpers, transformers=None, extra=None, prepare=None, **call):
    """Latents that `cls` draws with the quantized transformer, after comparing them with the dense one's."""
    latents = []
    for transformer in transformers or parts.pair():
        arguments = {**parts.call, "prompt": CAPTION, **call}
        arguments = {k: v for k, v in arguments.items() if v is not None}
        with torch.no_grad():
            wanted = inspect.signature(cls.__init__).parameters
            components = {**parts.components, **(extra or {}), "transformer": transformer}
            pipeline = cls(**{k: v for k, v in components.items() if k in wanted})
            pipeline.set_progress_bar_config(disable=True)
            if prepare is not None:
                prepare(pipeline)
            latents.append(
                pipeline(generator=torch.Generator().manual_seed(0), output_type="latent", **arguments).images
            )
    assert torch.isfinite(latents[0]).all() and helpers.sqnr(latents[0], latents[-1]) > 40
    return latents[0]


def test_flux_batches_and_true_guidance(flux, helpers):
    one = both(FluxPipeline, flux, helpers)
    two = both(FluxPipeline, flux, helpers, num_images_per_prompt=2)
    assert two.shape[0] == 2 * one.shape[0] and not torch.equal(two[0], two[1])
    prompts = both(FluxPipeline, flux, helpers, prompt=[CAPTION, "a small blue circle on white"])
    assert prompts.shape[0] == 2
    guided = both(FluxPipeline, flux, helpers, true_cfg_scale=3.0, negative_prompt="a small blue circle on white")
    assert not torch.equal(guided, one)


def test_a_batch_is_its_pictures(flux, helpers):
    """Tokens are quantized one by one, so a picture does not depend on its neighbours. In a batch dense layers add in
    another order, though, and a code at a tie that turns on it is an error as large as any of quantization's."""
    x = [torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    model, exact = copy.deepcopy(flux.pair()[0]), None
    for bits in (16, 8, 4):
        dirotq.set_activation_bits(model, bits)
        alone = torch.cat([both(FluxPipeline, flux, helpers, (model, model), latents=t) for t in x])
        together = both(FluxPipeline, flux, helpers, (model, model), latents=torch.cat(x), num_images_per_prompt=2)
        exact = alone if exact is None else exact
        assert helpers.sqnr(together, alone) > (100 if bits == 16 else helpers.sqnr(alone, exact) - 3)


def test_image_to_image(flux, helpers):
    latents = [both(FluxImg2ImgPipeline, flux, helpers, image=picture(s), strength=0.5) for s in (0, 1)]
    assert not torch.equal(*latents)


def test_inpainting(flux, helpers):
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 1
    both(FluxInpaintPipeline, flux, helpers, image=picture(0), mask_image=mask, strength=0.5)


def test_fill(flux, helpers):
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 1
    # latents, those of the masked picture, and the mask's 4 x 4 pixels a latent, each of them 2 x 2 to a token
    pair = flux.pair(16 + 16 + 4 * 4 * 4)
    both(FluxFillPipeline, flux, helpers, pair, image=picture(0), mask_image=mask)


def test_control(flux, helpers):
    """FLUX.1 Depth and Canny: the picture's latents come beside the latents, in channels."""
    latents = [both(FluxControlPipeline, flux, helpers, flux.pair(32), control_image=picture(s)) for s in (0, 1)]
    assert not torch.equal(*latents)


def test_kontext(flux, helpers):
    """The picture's tokens come behind the others."""
    latents = [
        both(FluxKontextPipeline, flux, helpers, image=picture(s), max_area=SIDE * SIDE, _auto_resize=False)
        for s in (0, 1)
    ]
    assert not torch.equal(*latents)


def test_controlnet(flux, helpers):
    torch.manual_seed(0)
    net = FluxControlNetModel.from_transformer(
        flux.loaded.transformer, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=3,
        load_weights_from_transformer=False,
    )  # fmt: skip
    for p in net.parameters():  # its last layers begin at zero
        torch.nn.init.normal_(p, std=0.05)
    extra = {"controlnet": net.eval()}
    plain = both(FluxPipeline, flux, helpers)
    guided = both(FluxControlNetPipeline, flux, helpers, extra=extra, control_image=picture(0))
    assert helpers.sqnr(guided, plain) < 40


def test_redux(flux, helpers):
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    width = flux.loaded.transformer.config.joint_attention_dim
    prior = FluxPriorReduxPipeline(
        SiglipVisionModel(vision).eval(), SiglipImageProcessor(size={"height": 32, "width": 32}),
        ReduxImageEncoder(32, width), **{k: v for k, v in flux.components.items() if "text" in k or "token" in k},
    )  # fmt: skip
    for seed in (0, 1):
        made = prior(picture(seed), prompt=CAPTION)
        both(FluxPipeline, flux, helpers, prompt=None, prompt_embeds=made.prompt_embeds,
             pooled_prompt_embeds=made.pooled_prompt_embeds)  # fmt: skip


def test_ip_adapter(flux, helpers):
    model = flux.loaded.transformer
    width = model.config.num_attention_heads * model.config.attention_head_dim
    torch.manual_seed(0)
    layers = {}
    for i in range(model.config.num_layers):
        state = FluxIPAdapterAttnProcessor(width, model.config.joint_attention_dim, scale=1.0).state_dict()
        layers |= {f"{i}.{k.replace('.0.', '.')}": v for k, v in state.items()}
    projection = ImageProjection(64, model.config.joint_attention_dim, 4).state_dict()
    adapter = {
        "image_proj": {k.replace("image_embeds", "proj"): v for k, v in projection.items()},
        "ip_adapter": layers,
    }

    def prepare(pipeline):
        pipeline.load_ip_adapter(
            copy.deepcopy(adapter), weight_name=None, image_encoder_pretrained_model_name_or_path=None
        )

    plain = both(FluxPipeline, flux, helpers)
    pair = tuple(copy.deepcopy(m) for m in flux.pair())
    embeds = [torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))]
    guided = both(FluxPipeline, flux, helpers, pair, prepare=prepare, ip_adapter_image_embeds=embeds,
                  negative_ip_adapter_image_embeds=[torch.zeros_like(embeds[0])])  # fmt: skip
    assert helpers.sqnr(guided, plain) < 60


@pytest.mark.parametrize("cls", [PixArtSigmaPipeline, PixArtAlphaPipeline])
def test_pixart_batches(pixart, helpers, cls):
    one = both(cls, pixart, helpers)
    two = both(cls, pixart, helpers, num_images_per_prompt=2)
    assert two.shape[0] == 2 * one.shape[0]
    unguided = both(cls, pixart, helpers, guidance_scale=1.0)
    assert not torch.equal(unguided, one)


def test_pixart_perturbed_attention(pixart, helpers):
    """It replaces attention processors of some blocks, which then skip q and k for a part of the batch."""
    extra = {"pag_applied_layers": "blocks.1"}
    pair = tuple(copy.deepcopy(m) for m in pixart.pair())
    guided = both(PixArtSigmaPAGPipeline, pixart, helpers, pair, extra=extra, pag_scale=2.0)
    assert not torch.equal(guided, both(PixArtSigmaPipeline, pixart, helpers))


# --- caches -------------------------------------------------------------------------------------------------------


def caches(pipeline):
    timestep = {"current_timestep_callback": lambda: pipeline.current_timestep}
    always = (-1, 901)  # after the first step
    yield "first block", FirstBlockCacheConfig(threshold=1e9)
    yield (
        "pyramid",
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=always, **timestep
        ),
    )
    yield "faster", FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=always,
        unconditional_batch_skip_range=2, unconditional_batch_timestep_skip_range=always, is_guidance_distilled=True,
        attention_weight_callback=lambda _: 0.5, **timestep,
    )  # fmt: skip
    try:
        from diffusers import TaylorSeerCacheConfig
    except ImportError:  # diffusers 0.37
        return
    yield "taylor", TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1)


NAMES = [name for name, _ in caches(None)]


@pytest.mark.parametrize("name", NAMES)
def test_caches(flux, helpers, name):
    quantized, dense = flux.pair()
    steps = {"num_inference_steps": 5}
    plain = both(FluxPipeline, flux, helpers, **steps)

    def prepare(pipeline):
        pipeline.transformer.enable_cache(dict(caches(pipeline))[name])

    try:
        both(FluxPipeline, flux, helpers, (dense,), prepare=prepare, **steps)
    except ValueError as error:
        pytest.skip(f"this version of diffusers fails with a dense model, too: {error}")
    finally:
        dense.disable_cache()
    try:
        cached = both(FluxPipeline, flux, helpers, prepare=prepare, **steps)
    finally:
        quantized.disable_cache()
        dense.disable_cache()
    assert not torch.equal(cached, plain)  # something was skipped
    assert torch.equal(both(FluxPipeline, flux, helpers, **steps), plain)


# --- compiled, with LoRAs that change -----------------------------------------------------------------------------


def lora(transformer, rank, seed):
    g, state = torch.Generator().manual_seed(seed), {}
    for name, module in transformer.named_modules():
        if name.endswith(("attn.to_q", "attn.to_v", "proj_mlp", "ff.net.0.proj")):
            state[f"transformer.{name}.lora_A.weight"] = 0.1 * torch.randn(rank, module.in_features, generator=g)
            state[f"transformer.{name}.lora_B.weight"] = 0.1 * torch.randn(module.out_features, rank, generator=g)
    return state


def swapped(model, helpers, how):
    """Outputs with three LoRAs in turn, which must not make a model that is compiled compile again."""
    pipeline = FluxPipeline(None, None, None, None, None, None, model)
    pipeline.enable_lora_hotswap(target_rank=8)
    pipeline.load_lora_weights(lora(model, 8, 0), adapter_name="style")
    if how:
        torch._dynamo.reset()
        getattr(model, how)(fullgraph=True, backend="eager")
    outputs = [helpers.run(model)]
    for rank in (4, 8):
        with torch._dynamo.config.patch(error_on_recompile=True):
            pipeline.load_lora_weights(lora(model, rank, rank), adapter_name="style", hotswap=True)
            outputs.append(helpers.run(model))
    return outputs


@pytest.mark.untraced
@pytest.mark.parametrize("how", ["compile", thorough("compile_repeated_blocks")])
def test_hot_swapping_into_a_compiled_model(flux_case, helpers, how):
    """No recompilation for a LoRA of another rank and other values."""
    try:
        swapped(flux_case.load(flux_case.dense), helpers, how)
    except torch._dynamo.exc.RecompileError:
        pytest.skip("these versions of diffusers and peft compile a dense model again, too")
    outputs = swapped(flux_case.load(), helpers, how)
    expected = swapped(flux_case.load(), helpers, None)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert not torch.equal(*outputs[:2]) and not torch.equal(*outputs[1:])


def test_the_quantizer_stays_attached(flux):
    """Pipelines hand the very transformer on; a second pipeline's parts are the first's."""
    model = flux.pair()[0]
    again = FluxImg2ImgPipeline.from_pipe(
        FluxPipeline(**{**flux.components, "transformer": model}), torch_dtype=torch.float32
    )
    assert again.transformer is model and again.transformer.hf_quantizer is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_pipeline_made_from_another_keeps_its_dtype(dtype):
    """diffusers casts every part to float32 where nothing is said, those it shares with the first pipeline, too."""
    pipeline = load_pipeline("flux-tiny", dtype)
    dirotq.quantize(pipeline, dirotq.DiRotQConfig(activation_bits=16), progress=False)
    again = FluxImg2ImgPipeline.from_pipe(pipeline)
    assert again.transformer is pipeline.transformer and again.text_encoder is pipeline.text_encoder
    assert {p.dtype for p in (again.text_encoder, again.text_encoder_2, again.transformer)} == {dtype}


def test_a_cast_is_refused_before_any_part_is_cast():
    pipeline = load_pipeline("flux-tiny", torch.bfloat16)
    dirotq.quantize(pipeline, dirotq.DiRotQConfig(activation_bits=16), progress=False)
    for cast in (
        lambda: pipeline.to(torch.float16),
        lambda: pipeline.to("cpu", torch.float16),
        lambda: pipeline.to(dtype=torch.float16),
        lambda: FluxImg2ImgPipeline.from_pipe(pipeline, torch_dtype=torch.float16),
    ):
        with pytest.raises(ValueError, match=r"transformer is quantized by dirotq and computes in torch.bfloat16, so"):
            cast()
        assert {c.dtype for c in pipeline.components.values() if isinstance(c, torch.nn.Module)} == {torch.bfloat16}
    pipeline.to("cpu", torch.bfloat16)
