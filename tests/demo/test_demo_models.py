"""The embedded models: small, of the real architectures, loadable as they are, and able to draw."""

import json

import pytest
import torch
from safetensors import safe_open

from dirotq.dirotq_core.demo.checker import check
from dirotq.dirotq_core.demo.embedded import MODELS, get, load_pipeline, prompts

NAMES = list(MODELS)
# Input and output of the transformer, where no quantizer goes.
EMBEDDERS = ("x_embedder", "pos_embed", "proj_out", "time_proj", "adaln_single.emb", "time_text_embed")


@pytest.fixture(scope="module")
def pipelines():
    return {name: load_pipeline(name, torch.float32) for name in NAMES}


def test_together_at_most_16_megabytes():
    files = [path for model in MODELS.values() for path in model.folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_finite_bf16(name):
    for path in get(name).folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                tensor = file.get_tensor(key)
                assert tensor.dtype == torch.bfloat16, f"{path.name}: {key}"
                assert tensor.isfinite().all(), f"{path.name}: {key}"


@pytest.mark.parametrize("name", NAMES)
def test_widths_are_multiples_of_64(name, pipelines):
    transformer = pipelines[name].transformer
    assert type(transformer).__name__ == get(name).transformer
    for path, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "proj_out" and not path.startswith(EMBEDDERS):
            assert module.in_features % 64 == 0 and module.out_features % 64 == 0, path


def test_the_real_architectures_options():
    pixart = json.loads((get("pixart-sigma-tiny").folder / "transformer/config.json").read_text())
    assert pixart["out_channels"] == 2 * pixart["in_channels"]
    assert pixart["norm_type"] == "ada_norm_single" and not pixart["use_additional_conditions"]
    assert pixart["caption_channels"] and pixart["attention_bias"]
    flux = json.loads((get("flux-tiny").folder / "transformer/config.json").read_text())
    assert flux["guidance_embeds"] and flux["num_layers"] and flux["num_single_layers"]
    assert sum(flux["axes_dims_rope"]) == flux["attention_head_dim"]


@pytest.mark.parametrize("name", NAMES)
def test_plain_from_pretrained_draws(name):
    import diffusers

    pipeline = getattr(diffusers, get(name).pipeline).from_pretrained(str(get(name).folder))
    pipeline.set_progress_bar_config(disable=True)
    caption = prompts(1, seed=0)[0].caption()
    call = {**get(name).call, "num_inference_steps": 2}
    first, again = (pipeline(caption, generator=torch.Generator().manual_seed(0), **call).images[0] for _ in range(2))
    assert first.size == (128, 128) and first.tobytes() == again.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_every_caption_word_is_one_known_token(name, pipelines):
    caption = prompts(1, seed=0)[0].caption()
    for attribute in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipelines[name], attribute, None)
        if tokenizer is not None:
            assert len(tokenizer.tokenize(caption)) == len(caption.split())
            assert tokenizer.unk_token_id not in tokenizer(caption, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", NAMES)
def test_the_captioned_scene_is_recognized(name, pipelines):
    scenes = prompts(16, seed=0)
    generators = [torch.Generator().manual_seed(i) for i in range(len(scenes))]
    images = pipelines[name]([s.caption() for s in scenes], generator=generators, **get(name).call).images
    assert sum(check(image, scene).ok for image, scene in zip(images, scenes, strict=True)) >= 13


def test_both_text_encoders_of_flux_matter(pipelines):
    pipeline = pipelines["flux-tiny"]
    one, other = (scene.caption() for scene in prompts(2, seed=0))
    call = {**get("flux-tiny").call, "output_type": "latent"}

    def latents(prompt: str, prompt_2: str) -> torch.Tensor:
        return pipeline(prompt, prompt_2, generator=torch.Generator().manual_seed(0), **call).images

    plain = latents(one, one)
    for changed in (latents(other, one), latents(one, other)):
        assert (changed - plain).norm() > 0.05 * plain.norm()


def test_a_replaced_transformer_is_used(pipelines):
    name = "pixart-sigma-tiny"
    transformer = pipelines[name].transformer
    assert load_pipeline(name, torch.float32, transformer=transformer).transformer is transformer


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match="sdxl-tiny"):
        get("sdxl-tiny")
