"""LoRA files in the names of the original FLUX.1 repository, where q, k, v (and the MLP) are one tensor: fused qkv and
linear1 of kohya's, BFL's, fal's and XLabs' files. diffusers splits linear1 at FLUX.1's own width only, so a single
block of that width is here, too. And LoKr, on both architectures.
"""

import copy

import peft
import pytest
import torch
from diffusers import FluxControlPipeline, FluxPipeline, FluxTransformer2DModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

import dirotq
from dirotq.dirotq_core.backend import attach_quantizer
from dirotq.dirotq_core.build import replace_linears
from dirotq.dirotq_core.layout import plan_sites

from ..marks import thorough
from .tensors import relative, same, state_of
from .versions import groups_on_cpu

TRUE_WIDTH = 3072
RANK = 4
#: native name → inputs and outputs, in widths
DOUBLE = {
    "img_attn.qkv": (1, 3),
    "img_attn.proj": (1, 1),
    "img_mlp.0": (1, 4),
    "img_mlp.2": (4, 1),
    "img_mod.lin": (1, 6),
}
DOUBLE |= {name.replace("img", "txt"): shape for name, shape in DOUBLE.items()}
SINGLE = {"linear1": (1, 7), "linear2": (5, 1), "modulation.lin": (1, 3)}
BLOCKS = {"double_blocks": (19, DOUBLE), "single_blocks": (38, SINGLE)}


def outer(width, channels):
    """Layers outside the blocks: inputs and outputs."""
    embedders = {f"{e}_in.{which}_layer": (k if which == "in" else width, width)
                 for e, k in (("time", 256), ("vector", 64), ("guidance", 256)) for which in ("in", "out")}  # fmt: skip
    return embedders | {
        "img_in": (channels, width),
        "txt_in": (64, width),
        "final_layer.linear": (width, 16),
        "final_layer.adaLN_modulation.1": (width, 2 * width),
    }


class Factors:
    """Random A [RANK, K] and B [N, RANK] by name; nothing for blocks that the model does not have."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, k, n, empty=False):
        if empty:
            return torch.zeros(1, 1).expand(RANK, k), torch.zeros(1, 1).expand(n, RANK)
        a, b = (torch.randn(shape, generator=self.generator) for shape in ((RANK, k), (n, RANK)))
        return a * k**-0.5, b * 0.3


def block_layers(model, make, all_blocks):
    """(native name, A, B) of the blocks of `model`; with `all_blocks` of FLUX.1's 19 + 38, zeros if it lacks one."""
    width = model.config.num_attention_heads * model.config.attention_head_dim
    present = {"double_blocks": model.config.num_layers, "single_blocks": model.config.num_single_layers}
    for stack, (number, layers) in BLOCKS.items():
        for i in range(number if all_blocks else present[stack]):
            missing = i >= present[stack]
            for name, (k, n) in layers.items():
                w = TRUE_WIDTH if missing else width
                yield f"{stack}.{i}.{name}", *make(k * w, n * w, missing)


def kohya(model, seed, channels):
    state = {}
    for name, a, b in block_layers(model, Factors(seed), False):
        key = "lora_unet_" + name.replace(".", "_")
        state |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(2.0 * RANK)}
    return state


def bfl(model, seed, channels):
    """A Control LoRA of Black Forest Labs: every linear, biases, and the norms of q and k."""
    make, state = Factors(seed), {}
    width = model.config.num_attention_heads * model.config.attention_head_dim
    layers = [*block_layers(model, make, True)]
    layers += [(name, *make(*shape)) for name, shape in outer(width, channels).items()]
    for name, a, b in layers:
        state |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.lora_B.bias": b[:, 0].clone()}
    for stack, (number, _) in BLOCKS.items():
        for i in range(number):
            for part in ("img_attn.", "txt_attn.") if stack == "double_blocks" else ("",):
                for which in ("query", "key"):
                    norm = torch.linspace(0.5, 1.5, model.config.attention_head_dim)
                    state[f"{stack}.{i}.{part}norm.{which}_norm.scale"] = norm
    return state


def fal(model, seed, channels):
    make, state = Factors(seed), {}
    width = model.config.num_attention_heads * model.config.attention_head_dim
    layers = [*block_layers(model, make, True), ("final_layer.linear", *make(width, 16))]
    for name, a, b in layers:
        state |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    return state


def xlabs(model, seed, channels):
    names = {"img_attn.qkv": "qkv_lora1", "txt_attn.qkv": "qkv_lora2", "img_attn.proj": "proj_lora1"}
    names |= {"txt_attn.proj": "proj_lora2"}
    state = {}
    for name, a, b in block_layers(model, Factors(seed), False):
        stack, i, layer = name.split(".", 2)
        if layer in names:
            key = f"{stack}.{i}.processor.{names[layer]}"
            state |= {f"{key}.down.weight": a, f"{key}.up.weight": b}
    return state


FORMATS = {"kohya": kohya, "bfl": bfl, "fal": fal, "xlabs": xlabs}


def packed_at_random(**shape):
    """A quantized FLUX whose codes are drawn: nothing here depends on what they stand for."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(in_channels=16, joint_attention_dim=64, pooled_projection_dim=64, **shape)
    config = dirotq.DiRotQConfig(activation_bits=8).resolved(calibrated=False)
    replace_linears(model, plan_sites(model, config), config, torch.float32)
    model.to_empty(device="cpu")
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.dtype == torch.uint8:
            p.data = torch.randint(256, p.shape, generator=g, dtype=torch.uint8)
        elif name.endswith("signs"):
            p.data = torch.randint(2, p.shape, generator=g, dtype=torch.int8) * 2 - 1
        elif name.endswith("weight_scale"):
            p.data.fill_(TRUE_WIDTH**-0.5 / 36)
        elif p.dtype == torch.float32:
            p.data = torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1) + (p.ndim == 1)
    attach_quantizer(model, config, torch.float32)
    dirotq.set_activation_bits(model, 16)
    return model.eval()


@pytest.fixture(scope="module")
def double():
    """One double block, narrow; with its dense twin."""
    return twins(packed_at_random(num_layers=1, num_single_layers=0, attention_head_dim=64, num_attention_heads=3,
                                  guidance_embeds=True, axes_dims_rope=(16, 24, 24)))  # fmt: skip


@pytest.fixture(scope="module")
def single():
    """One single block of FLUX.1's width."""
    return twins(packed_at_random(num_layers=0, num_single_layers=1, guidance_embeds=True))


def twins(model):
    dense = copy.deepcopy(model)
    dense.dequantize()
    return model, dense


def run(model, helpers, channels=16):
    arguments = helpers.inputs(model, torch.float32)
    x = arguments["hidden_states"][:, :16]
    arguments |= {"hidden_states": x.repeat(1, 1, channels // 16), "img_ids": arguments["img_ids"][:16]}
    with torch.no_grad():
        return model(**arguments)[0]


@pytest.mark.parametrize(
    ("block", "form"),
    [
        ("double", "fal"), ("double", "xlabs"), ("single", "kohya"),
        *(thorough(*form) for form in (("double", "kohya"), ("double", "bfl"), ("single", "bfl"))),
    ],
)  # fmt: skip
def test_the_effect_of_fused_layers(request, helpers, block, form):
    models = request.getfixturevalue(block)
    plain = [run(m, helpers) for m in models]
    before = state_of(models[0])
    pipelines = [FluxPipeline(None, None, None, None, None, None, m) for m in models]
    for p in pipelines:
        p.load_lora_weights(FORMATS[form](p.transformer, 0, 16), adapter_name="a")
        if form == "bfl":  # they bring norms, of which diffusers remembers one earlier set
            p.set_adapters("a", 0.8)
            continue
        p.load_lora_weights(FORMATS[form](p.transformer, 1, 16), adapter_name="b")
        p.set_adapters(["a", "b"], [0.8, -0.4])
    effects = [run(m, helpers) - y for m, y in zip(models, plain, strict=True)]
    assert effects[1].norm() > 0.05 * plain[1].norm()
    assert relative(*effects) < 0.01
    beside = run(models[0], helpers)
    pipelines[0].fuse_lora(adapter_names=pipelines[0].get_active_adapters())
    assert relative(run(models[0], helpers) - plain[0], effects[1]) < 0.01
    pipelines[0].unfuse_lora()
    if form != "bfl":  # diffusers puts the model's own norms back when it unfuses
        assert torch.equal(run(models[0], helpers), beside)
    for p in pipelines:
        p.unload_lora_weights()
    assert same(state_of(models[0]), before) and torch.equal(run(models[0], helpers), plain[0])


@groups_on_cpu  # diffusers asks for it when it unloads
def test_a_control_lora_widens_the_input(double, helpers):
    """Depth and Canny of BFL: the picture's channels come beside the latent's, in a layer that stays dense."""
    plain = run(double[0], helpers)
    before = state_of(double[0])
    outputs = []
    for model in double:
        pipeline = FluxControlPipeline(None, None, None, None, None, None, model)
        pipeline.load_lora_weights(bfl(model, 0, 32), adapter_name="depth")
        assert model.config.in_channels == 32 and model.x_embedder.in_features == 32
        outputs.append(run(model, helpers, 32))
        loaded = state_of(model)
        pipeline.fuse_lora()
        assert not same(state_of(model), loaded)
        pipeline.unfuse_lora()
        if model is double[0]:  # diffusers puts the norms of q and k back when it unfuses
            changed = [n for n, t in state_of(model).items() if not torch.equal(t, loaded[n])]
            assert changed and all("norm_q." in n or "norm_k." in n or "norm_added" in n for n in changed)
        pipeline.unload_lora_weights(reset_to_overwritten_params=True)
    assert relative(outputs[0] - plain, outputs[1] - plain) < 0.01
    assert same(state_of(double[0]), before) and torch.equal(run(double[0], helpers), plain)


# --- LoKr ---------------------------------------------------------------------------------------------------------


def test_lokr(case, helpers, tmp_path):
    """Two, with weights, saved and read back, deleted and unloaded; through PEFT, which both architectures have."""
    quantized = case.load(torch_dtype=torch.float32)
    dirotq.set_activation_bits(quantized, 16)
    models = twins(quantized)
    plain = [helpers.run(m) for m in models]
    before = state_of(quantized)
    config = peft.LoKrConfig(r=4, alpha=8, target_modules=["to_q", "to_v", "ff.net.0.proj"], init_weights=False)
    effects, tuned = [], []
    for model, y in zip(models, plain, strict=True):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, config, "first")
        wrapped.add_adapter("second", config)
        wrapped.base_model.set_adapter(["first", "second"])
        for layer in wrapped.modules():
            if isinstance(layer, peft.tuners.lokr.layer.LoKrLayer):
                layer.set_scale("second", -0.5)
        tuned.append(wrapped.eval())
        effects.append(helpers.run(model) - y)
    assert relative(*effects) < 0.01 and effects[1].norm() > 0.01 * plain[1].norm()
    wrapped = tuned[0]
    both = helpers.run(quantized)
    saved = {n: t.clone() for n, t in get_peft_model_state_dict(wrapped, adapter_name="first").items()}
    assert saved and all("lokr" in n for n in saved)
    for p in wrapped.parameters():
        p.data = torch.zeros_like(p) if p.requires_grad else p.data
    set_peft_model_state_dict(wrapped, saved, adapter_name="first")
    wrapped.delete_adapter("second")
    wrapped.set_adapter("first")
    assert not torch.equal(helpers.run(quantized), both)
    tuned[1].delete_adapter("second")
    tuned[1].set_adapter("first")
    assert relative(helpers.run(quantized) - plain[0], helpers.run(models[1]) - plain[1]) < 0.01
    assert same(state_of(wrapped.unload()), before) and torch.equal(helpers.run(quantized), plain[0])
