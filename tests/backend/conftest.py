"""Tiny transformers of both architectures, random weights, saved dense and quantized without data."""

import json
import shutil

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

import dirotq


def pixart():
    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=256,
        sample_size=16,
        caption_channels=64,
        use_additional_conditions=False,
    )


def flux():
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )


def inputs(model, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    if type(model).__name__ == "PixArtTransformer2DModel":
        return {
            "hidden_states": randn(1, 4, 16, 16),
            "encoder_hidden_states": randn(1, 7, 64),
            "timestep": torch.tensor([500]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
    return {
        "hidden_states": randn(1, 64, 16),
        "encoder_hidden_states": randn(1, 7, 64),
        "pooled_projections": randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(7, 3),
    }


def moved(arguments, device):
    """The arguments of a model with their tensors on `device`."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def run(model):
    with torch.no_grad():
        return model(**inputs(model, model.dtype))[0]


def sqnr(y, reference):
    reference, y = reference.double(), y.double()
    return float(10 * torch.log10(reference.square().sum() / (reference - y).square().sum()))


class Case:
    """One architecture: its class, its dense folder, its data-free quantized folder."""

    def __init__(self, make, folder):
        torch.manual_seed(0)
        model = make().to(torch.bfloat16)
        self.cls = type(model)
        self.dense = folder / "dense"
        self.quantized = folder / "quantized"
        model.save_pretrained(self.dense)
        self.on_the_fly().save_pretrained(self.quantized)

    def on_the_fly(self, config=None, **kwargs):
        return self.cls.from_pretrained(
            self.dense, quantization_config=config or dirotq.DiRotQConfig(), torch_dtype=torch.bfloat16, **kwargs
        )

    def load(self, folder=None, **kwargs):
        return self.cls.from_pretrained(folder or self.quantized, **{"torch_dtype": torch.bfloat16, **kwargs})


@pytest.fixture(scope="session", params=[pixart, flux], ids=["pixart", "flux"])
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param.__name__))


@pytest.fixture(scope="session")
def pixart_case(tmp_path_factory):
    return Case(pixart, tmp_path_factory.mktemp("pixart-only"))


@pytest.fixture(scope="session")
def flux_case(tmp_path_factory):
    return Case(flux, tmp_path_factory.mktemp("flux-only"))


@pytest.fixture(scope="session")
def helpers():
    """`run(model)` → output on fixed inputs; `sqnr(y, reference)` in dB; `inputs(model)`, `moved(…, device)`."""
    from types import SimpleNamespace

    return SimpleNamespace(run=run, sqnr=sqnr, inputs=inputs, moved=moved)


@pytest.fixture(scope="session", params=["pixart-sigma-tiny", "flux-tiny"])
def pipeline(request):
    """An embedded pipeline with its transformer quantized without data; leave it as it was."""
    from dirotq.dirotq_core.demo.embedded import load_pipeline

    made = load_pipeline(request.param, torch.bfloat16)
    dirotq.quantize(made, dirotq.DiRotQConfig(activation_bits=8), progress=False)
    return made


@pytest.fixture(scope="session")
def draw():
    """`draw(pipeline, …)` → pictures of one caption, two steps, one seed."""
    from dirotq.dirotq_core.demo.embedded import MODELS

    calls = {m.pipeline: m.call for m in MODELS.values()}

    def make(pipeline, prompt="a large red square above a small yellow triangle on orange", **kwargs):
        call = calls["PixArtSigmaPipeline" if "PixArt" in type(pipeline).__name__ else "FluxPipeline"]
        arguments = {**call, "num_inference_steps": 2, "output_type": "pt", **kwargs}
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompt, generator=generator, **arguments).images

    return make


FILE = "diffusion_pytorch_model.safetensors"
WEIGHT = "single_transformer_blocks.0.proj_out.weight"
SCALE = "single_transformer_blocks.0.proj_out.weight_scale"
SIGNS = "transformer_blocks.0.attn.to_q.input_site.signs"


def set_to(name, value):
    def change(tensors):
        tensors[name] = value(tensors[name])

    return change


def poison(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


#: A change to the tensors, and what the error says.
BROKEN = [
    (lambda t: t.pop(WEIGHT), f"1 missing tensor: '{WEIGHT}'"),
    (lambda t: t.pop("x_embedder.bias"), "1 missing tensor: 'x_embedder.bias'"),
    (lambda t: t.update(surplus=torch.zeros(3)), "1 unexpected tensor: 'surplus'"),
    (set_to(WEIGHT, lambda w: w.to(torch.int32)), f"'{WEIGHT}' has dtype torch.int32, expected torch.uint8"),
    (set_to(SCALE, lambda s: s.to(torch.bfloat16)), f"'{SCALE}' has dtype torch.bfloat16, expected torch.float32"),
    (set_to(WEIGHT, lambda w: w[:, :-1].contiguous()), f"'{WEIGHT}' has shape"),
    (set_to(SCALE, lambda s: s[:-1]), f"'{SCALE}' has shape"),
    (set_to(SCALE, poison), f"'{SCALE}' holds NaN or infinity"),
    (set_to(SCALE, lambda s: -s), f"'{SCALE}' holds a negative scale"),
    (set_to(SIGNS, lambda s: s * 2), f"'{SIGNS}' holds values other than"),
    (set_to("x_embedder.weight", poison), "'x_embedder.weight' holds NaN or infinity"),
    (set_to("x_embedder.weight", lambda w: w.to(torch.int32)), "'x_embedder.weight' has dtype torch.int32, expected a"),
    (set_to("x_embedder.weight", lambda w: w[:-1]), "x_embedder.weight"),
]


@pytest.fixture(params=BROKEN, ids=[message for _, message in BROKEN])
def broken(request):
    """(change, message): a way to break `flux_case`'s checkpoint, and a part of the error that it must raise."""
    return request.param


@pytest.fixture
def copy(flux_case, tmp_path):
    """Copy the quantized checkpoint with `change(tensors)` applied, and return its folder."""

    def make(change=lambda tensors: None, config=lambda c: None):
        folder = tmp_path / "copy"
        shutil.copytree(flux_case.quantized, folder)
        tensors = load_file(folder / FILE)
        change(tensors)
        save_file(tensors, folder / FILE, metadata={"format": "pt"})
        raw = json.loads((folder / "config.json").read_text())
        config(raw["quantization_config"])
        (folder / "config.json").write_text(json.dumps(raw))
        return folder

    return make
