"""Which linears are quantized, which share a site, and how a user's patterns choose."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

from dirotq import DiRotQConfig
from dirotq.dirotq_core.layout import plan_sites, site_seed

FLUX_DEV = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
PIXART_SIGMA_XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "sample_size": 128,
    "patch_size": 2,
    "norm_type": "ada_norm_single",
    "use_additional_conditions": False,
}


def plans_of(model, **config):
    return plan_sites(model, DiRotQConfig(**config).resolved(calibrated=True))


def linears(plans, w4a4=True):
    return [n for p in plans if p.quantize_input == w4a4 for n in p.linears]


def weights(plans, w4a4=True):
    return sum(p.in_features * sum(p.out_features) for p in plans if p.quantize_input == w4a4)


@pytest.fixture(scope="module")
def flux_dev():
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(FLUX_DEV)


@pytest.fixture(scope="module")
def pixart_sigma():
    with torch.device("meta"):
        return PixArtTransformer2DModel.from_config(PIXART_SIGMA_XL)


def test_flux_dev(flux_dev):
    assert sum(p.numel() for p in flux_dev.parameters()) == 11_901_408_320
    plans = plans_of(flux_dev)
    assert len(linears(plans)) == 418
    assert weights(plans) == 8_606_711_808
    assert len(linears(plans, w4a4=False)) == 76
    assert weights(plans, w4a4=False) == 3_227_516_928
    assert sum(p.quantize_input for p in plans) == 19 * 8 + 38 * 2


def test_flux_dev_sites(flux_dev):
    plans = {p.owner: p for p in plans_of(flux_dev)}
    double, single = "transformer_blocks.18", "single_transformer_blocks.37"
    assert plans[f"{double}.attn.to_q"].linears == tuple(f"{double}.attn.to_{c}" for c in "qkv")
    assert plans[f"{double}.attn.add_q_proj"].linears == tuple(f"{double}.attn.add_{c}_proj" for c in "qkv")
    fused = plans[f"{single}.attn.to_q"]
    assert fused.linears == (*(f"{single}.attn.to_{c}" for c in "qkv"), f"{single}.proj_mlp")
    assert (fused.in_features, fused.out_features) == (3072, (3072, 3072, 3072, 12288))
    down = plans[f"{single}.proj_out"]
    assert (down.linears, down.in_features, down.out_features) == ((f"{single}.proj_out",), 15360, (3072,))
    modulation = plans[f"{double}.norm1_context.linear"]
    assert (modulation.method, modulation.rank, modulation.out_features) == (None, 0, (18432,))
    kept = {n for n, m in flux_dev.named_modules() if isinstance(m, torch.nn.Linear)}
    kept -= {n for p in plans.values() for n in p.linears}
    assert len(kept) == 504 - 418 - 76
    assert {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"} <= kept


def test_flux_dev_without_modulation(flux_dev):
    plans = plans_of(flux_dev, quantize_modulation=False)
    assert (len(linears(plans)), linears(plans, w4a4=False)) == (418, [])


def test_pixart_sigma(pixart_sigma):
    assert sum(p.numel() for p in pixart_sigma.parameters()) == 610_856_096
    plans = plans_of(pixart_sigma)
    assert len(linears(plans)) == 28 * 8
    assert linears(plans, w4a4=False) == []
    assert weights(plans) == 28 * (6 * 1152 * 1152 + 2 * 1152 * 4608)
    block = [p.linears for p in plans if p.owner.startswith("transformer_blocks.27.")]
    name = "transformer_blocks.27."
    assert block == [
        tuple(f"{name}attn1.to_{c}" for c in "qkv"),
        (f"{name}attn1.to_out.0",),
        (f"{name}attn2.to_q",),
        (f"{name}attn2.to_out.0",),
        (f"{name}ff.net.0.proj",),
        (f"{name}ff.net.2",),
    ]


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_plans_describe_the_real_linears(tiny, family):
    model = tiny(family)
    plans = plans_of(model, rank=16)
    names = [n for p in plans for n in p.linears]
    assert len(names) == len(set(names))
    for p in plans:
        for n, out in zip(p.linears, p.out_features, strict=True):
            linear = model.get_submodule(n)
            assert (linear.in_features, linear.out_features) == (p.in_features, out)
            assert p.linear_spec(out)["weight"] == ((out, p.in_features // 2), torch.uint8)
        if p.quantize_input:
            assert p.site_spec()["basis"] == ((p.in_features, 16), torch.bfloat16)
            assert p.site_spec()["signs"] == ((p.in_features,), torch.int8)


def test_members_of_a_site_read_one_tensor(tiny, run):
    for family in ("flux", "pixart"):
        model, seen = tiny(family), {}
        plans = plans_of(model)
        for n in (n for p in plans for n in p.linears):
            model.get_submodule(n).register_forward_pre_hook(lambda m, a, n=n, seen=seen: seen.__setitem__(n, a[0]))
        run(model)
        for p in plans:
            assert all(seen[n] is seen[p.owner] for n in p.linears), p.linears


def test_seeds_differ_by_site_and_not_by_company(tiny):
    model = tiny("flux")
    seeds = {p.owner: p.seed for p in plans_of(model)}
    assert len(set(seeds.values())) == len(seeds)
    fewer = plans_of(model, modules_to_not_convert=["transformer_blocks.0"])
    assert all(seeds[p.owner] == p.seed for p in fewer)
    assert all(0 <= s < 2**31 for s in seeds.values())
    assert all(seeds[p.owner] != p.seed for p in plans_of(model, seed=1))
    assert site_seed("transformer_blocks.0.attn.to_q", 0) == 1559065534


# --- patterns ---


def test_the_name_of_a_module_means_that_module(tiny):
    """proj_out is FLUX's last linear; the single blocks' linears of that name stay quantized."""
    model = tiny("flux")
    assert linears(plans_of(model, modules_to_not_convert=["proj_out"])) == linears(plans_of(model))
    assert "single_transformer_blocks.0.proj_out" in linears(plans_of(model))


@pytest.mark.parametrize(
    ("entry", "gone"),
    [
        ("*.proj_out", lambda n: n.endswith(".proj_out")),
        ("single_transformer_blocks.?.proj_out", lambda n: n.endswith(".proj_out")),
        ("single_transformer_blocks.[12].*", lambda n: n.startswith("single_") and ".0." not in n[:28]),
        ("transformer_blocks.0.norm1", lambda n: n == "transformer_blocks.0.norm1.linear"),
        ("transformer_blocks.1", lambda n: n.startswith("transformer_blocks.1.")),
        ("transformer_blocks", lambda n: n.startswith("transformer_blocks.")),
        ("to_k", lambda n: n.endswith(".to_k")),
        ("ff.net", lambda n: ".ff.net." in n),
        ("attn.to_out.0", lambda n: n.endswith("attn.to_out.0")),
        ("ff.net.2", lambda n: n.endswith(".ff.net.2")),
        ("norm1", lambda n: ".norm1." in n),
    ],
)  # fmt: skip
def test_patterns(tiny, entry, gone):
    model = tiny("flux")
    every = [n for p in plans_of(model) for n in p.linears]
    left = {n for p in plans_of(model, modules_to_not_convert=[entry]) for n in p.linears}
    assert any(gone(n) for n in every)
    assert left == {n for n in every if not gone(n)}


@pytest.mark.parametrize("field", ["modules_to_not_convert", "weight_only_modules"])
@pytest.mark.parametrize("entry", ["to_kv", "*.to_kv", "transformer_blocks.7", "o_k", "", "TO_K"])
def test_an_entry_that_matches_nothing_is_named(tiny, field, entry):
    with pytest.raises(ValueError, match=f"{field}: '.*' matches no module of FluxTransformer2DModel") as error:
        plans_of(tiny("flux"), **{field: ["to_q", entry]})
    assert repr(entry) in str(error.value)


def test_an_excluded_owner_leaves_its_siblings_together(tiny):
    plans = {p.owner: p.linears for p in plans_of(tiny("pixart"), modules_to_not_convert=["attn1.to_q"])}
    block = "transformer_blocks.0.attn1"
    assert plans[f"{block}.to_k"] == (f"{block}.to_k", f"{block}.to_v")


def test_weight_only_modules_get_a_site_of_their_own(tiny):
    plans = {p.owner: p for p in plans_of(tiny("pixart"), weight_only_modules=["ff.net.2", "to_k"])}
    block = "transformer_blocks.0"
    assert not plans[f"{block}.ff.net.2"].quantize_input
    assert plans[f"{block}.attn1.to_q"].linears == (f"{block}.attn1.to_q", f"{block}.attn1.to_v")
    assert not plans[f"{block}.attn1.to_k"].quantize_input
    assert plans[f"{block}.attn1.to_k"].method == "dirotq"


# --- failures ---


def test_a_class_without_recipe_names_the_supported_ones():
    with pytest.raises(ValueError, match=r"Linear has no.*FluxTransformer2DModel, PixArtTransformer2DModel"):
        plans_of(torch.nn.Linear(64, 64))


def test_a_subclass_of_a_supported_class_is_supported(flux_dev):
    class Variant(FluxTransformer2DModel):
        pass

    with torch.device("meta"):
        model = Variant.from_config({**FLUX_DEV, "num_layers": 1, "num_single_layers": 1})
    assert len(linears(plans_of(model))) == 12 + 5


@pytest.mark.parametrize("entries", [["transformer_blocks", "single_transformer_blocks"], ["*"]])
def test_nothing_left_to_quantize(tiny, entries):
    with pytest.raises(ValueError, match=r"no linear of FluxTransformer2DModel is left.*modules_to_not_convert"):
        plans_of(tiny("flux"), modules_to_not_convert=entries)


def test_widths_that_are_no_multiple_of_64_stay_dense():
    config = {**PIXART_SIGMA_XL, "num_layers": 1, "attention_head_dim": 50, "cross_attention_dim": 800}
    with torch.device("meta"):
        model = PixArtTransformer2DModel.from_config({**config, "num_attention_heads": 16})
    assert linears(plans_of(model)) == ["transformer_blocks.0.ff.net.2"]  # 800 is none, 3200 is one
