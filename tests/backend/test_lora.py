"""LoRAs on quantized models: loaded, stacked, removed, absorbed and released, in each format diffusers reads.

The measure is the LoRA's effect: what it changes in the output of the model that the quantized one stands for.
"""

import copy

import peft
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft.utils import get_peft_model_state_dict

import dirotq
from dirotq.dirotq_core import absorb as absorbing
from dirotq.dirotq_core.absorb import absorb, release
from dirotq.dirotq_core.backend import attach_quantizer
from dirotq.dirotq_core.build import quantized_linears
from dirotq.dirotq_core.calibrate import Calibration
from dirotq.dirotq_core.layout import plan_sites
from dirotq.dirotq_core.quantize import install_all, solve_all

from .tensors import relative, same, state_of

WIDTH = 192
#: FLUX modules of every kind: split q and v of both streams, weight-only modulation, a dense embedder.
FLUX = {
    "transformer_blocks.0.attn.to_q": (WIDTH, WIDTH),
    "transformer_blocks.0.attn.to_v": (WIDTH, WIDTH),
    "transformer_blocks.0.attn.add_k_proj": (WIDTH, WIDTH),
    "transformer_blocks.0.ff.net.0.proj": (WIDTH, 4 * WIDTH),
    "transformer_blocks.0.norm1.linear": (WIDTH, 6 * WIDTH),
    "single_transformer_blocks.1.attn.to_v": (WIDTH, WIDTH),
    "single_transformer_blocks.1.proj_mlp": (WIDTH, 4 * WIDTH),
    "single_transformer_blocks.0.proj_out": (5 * WIDTH, WIDTH),
    "x_embedder": (16, WIDTH),
}
#: kohya's name → the modules it stands for; FLUX.1's width is written into the rest of diffusers' converter.
KOHYA = {
    "lora_unet_double_blocks_0_img_attn_qkv": ("to_q", "to_k", "to_v"),
    "lora_unet_double_blocks_0_txt_attn_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "lora_unet_double_blocks_0_img_attn_proj": ("to_out.0",),
}
PIXART = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "linear_1"]


def factors(k, n, generator, rank=8):
    return torch.randn(rank, k, generator=generator) * k**-0.5, torch.randn(n, rank, generator=generator) * 0.3


def diffusers_lora(seed):
    g, state = torch.Generator().manual_seed(seed), {}
    for name, (k, n) in FLUX.items():
        a, b = factors(k, n, g)
        state |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    return state


def kohya_lora(seed):
    g, state = torch.Generator().manual_seed(seed), {}
    for name, parts in KOHYA.items():
        a, b = factors(WIDTH, WIDTH * len(parts), g)
        state |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(40.0)}
    return state


FORMATS = {"diffusers": diffusers_lora, "kohya": kohya_lora}


def pipeline_of(transformer):
    return FluxPipeline(None, None, None, None, None, None, transformer)


@pytest.fixture
def pair(flux_case):
    """Pipelines of a quantized FLUX at 16-bit activations and of the dense one it stands for, both in float32."""
    quantized = flux_case.load(torch_dtype=torch.float32)
    dirotq.set_activation_bits(quantized, 16)
    dense = copy.deepcopy(quantized)
    dense.dequantize()
    return pipeline_of(quantized), pipeline_of(dense)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("strengths", [(1.0,), (1.0, 0.7), (-0.5, 1.5)])
def test_the_effect_is_the_dense_models(pair, helpers, form, strengths):
    plain = [helpers.run(p.transformer) for p in pair]
    before = state_of(pair[0].transformer)
    names = [f"lora{i}" for i in range(len(strengths))]
    for p in pair:
        for seed, name in enumerate(names):
            p.load_lora_weights(FORMATS[form](seed), adapter_name=name)
        p.set_adapters(names, list(strengths))
    effect, expected = (helpers.run(p.transformer) - y for p, y in zip(pair, plain, strict=True))
    assert expected.norm() > 0.05 * plain[1].norm()  # a LoRA that does something
    assert relative(effect, expected) < 0.01
    for p in pair:
        p.delete_adapters(names[0])
    if names[1:]:
        changed = (helpers.run(p.transformer) - y for p, y in zip(pair, plain, strict=True))
        assert relative(*changed) < 0.01
    for p in pair:
        p.unload_lora_weights()
    assert same(state_of(pair[0].transformer), before) and torch.equal(helpers.run(pair[0].transformer), plain[0])


@pytest.mark.parametrize(("side", "width"), [("A", 96), ("A", 100), ("A", 384), ("B", 96), ("B", 384)])
@pytest.mark.parametrize("beside", [False, True])
def test_a_lora_of_another_width_is_refused(flux_case, helpers, side, width, beside):
    pipe = pipeline_of(flux_case.load())
    if beside:
        pipe.load_lora_weights(diffusers_lora(0), adapter_name="first")
    before, y = state_of(pipe.transformer), helpers.run(pipe.transformer)
    wrong = diffusers_lora(1)
    key = next(k for k in wrong if k.endswith(f"to_q.lora_{side}.weight"))
    old = wrong[key]
    wrong[key] = torch.randn((old.shape[0], width) if side == "A" else (width, old.shape[1]))
    with pytest.raises(ValueError, match=rf"the LoRA has .*{width} .*a quantized linear of 192 and 192; it was made"):
        pipe.load_lora_weights(wrong, adapter_name="second")
    assert same(state_of(pipe.transformer), before) and torch.equal(helpers.run(pipe.transformer), y)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_activations(flux_case, helpers, bits):
    """Later layers quantize other inputs then, so the effect is compared by what activations cost without a LoRA."""
    quantized = flux_case.load(torch_dtype=torch.float32)
    dirotq.set_activation_bits(quantized, bits)
    dense = copy.deepcopy(quantized)
    dense.dequantize()
    error = relative(helpers.run(quantized), helpers.run(dense))
    for model in (quantized, dense):
        pipeline_of(model).load_lora_weights(diffusers_lora(0))
    assert relative(helpers.run(quantized), helpers.run(dense)) < 1.5 * error + 0.01


def test_an_adapter_can_be_swapped_for_another(pair, helpers):
    for p in pair:
        p.load_lora_weights(diffusers_lora(0), adapter_name="a")
        p.load_lora_weights(diffusers_lora(1), adapter_name="a", hotswap=True)
    swapped = helpers.run(pair[0].transformer)
    assert relative(swapped, helpers.run(pair[1].transformer)) < 0.01
    pair[0].unload_lora_weights()
    pair[0].load_lora_weights(diffusers_lora(1))
    assert torch.equal(helpers.run(pair[0].transformer), swapped)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_absorbing_changes_nothing_and_is_undone(flux_case, helpers, form, bits):
    pipeline = pipeline_of(flux_case.load())
    model = pipeline.transformer
    dirotq.set_activation_bits(model, bits)
    plain, before = helpers.run(model), state_of(model)
    for seed in (0, 1):
        pipeline.load_lora_weights(FORMATS[form](seed), adapter_name=f"l{seed}")
    pipeline.set_adapters(["l0", "l1"], [1.0, 0.5])
    beside, loaded = helpers.run(model), state_of(model)
    pipeline.fuse_lora()
    inside = helpers.run(model)
    assert helpers.sqnr(inside, beside) > helpers.sqnr(plain, beside) + 10
    pipeline.fuse_lora()  # a second time adds nothing
    assert torch.equal(helpers.run(model), inside)
    pipeline.unfuse_lora()
    assert same(state_of(model), loaded) and torch.equal(helpers.run(model), beside)
    pipeline.fuse_lora()
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    assert same(state_of(model), before) and torch.equal(helpers.run(model), plain)


@pytest.mark.parametrize("how", ["fuse_lora", "unfuse_lora"])
def test_out_of_memory_in_between(flux_case, helpers, monkeypatch, how):
    """Whatever tensor there is no room for, the model runs, and `unfuse_lora` brings every bit back."""
    pipeline = pipeline_of(flux_case.load())
    model = pipeline.transformer
    for seed in (0, 1):
        pipeline.load_lora_weights(diffusers_lora(seed), adapter_name=f"l{seed}")
    pipeline.set_adapters(["l0", "l1"])
    loaded, beside, make = state_of(model), helpers.run(model), absorbing._parameter
    for last in range(12):
        if how == "unfuse_lora":
            pipeline.fuse_lora()
        made = []

        def out_of_memory(tensor, made=made, last=last):
            if len(made) == last:
                raise torch.OutOfMemoryError("no room")
            made.append(tensor)
            return make(tensor)

        with monkeypatch.context() as patch:
            patch.setattr(absorbing, "_parameter", out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                getattr(pipeline, how)()
        if last % 4 == 0:
            helpers.run(model)
        pipeline.unfuse_lora()
        assert same(state_of(model), loaded)
    assert torch.equal(helpers.run(model), beside)


@pytest.fixture(scope="module")
def calibrated(flux_case, helpers, tmp_path_factory):
    """A checkpoint with a 16-bit branch of rank 16 in every site."""
    model = flux_case.cls.from_pretrained(flux_case.dense, torch_dtype=torch.float32)
    config = dirotq.DiRotQConfig(rank=16).resolved(calibrated=True)
    plans = plan_sites(model, config)
    seen = Calibration(model, plans)
    with seen.recording():
        helpers.run(model)
    _, solved = solve_all(model, plans, config, seen, progress=False)
    install_all(model.to(torch.bfloat16), plans, config, solved)
    attach_quantizer(model, config, torch.bfloat16)
    folder = tmp_path_factory.mktemp("calibrated")
    model.save_pretrained(folder)
    return folder


def test_the_effect_beside_a_branch(flux_case, helpers, calibrated):
    """Loaded and absorbed: within 1 % in float32, and in bfloat16 as far off as a dense model's is by its roundings."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        quantized = flux_case.load(calibrated, torch_dtype=dtype)
        dirotq.set_activation_bits(quantized, 16)
        dense = copy.deepcopy(quantized)
        dense.dequantize()
        for name, model in (("loaded", quantized), ("dense", dense)):
            plain, pipeline = helpers.run(model).double(), pipeline_of(model)
            pipeline.load_lora_weights(diffusers_lora(0), adapter_name="a")
            found[name, dtype] = helpers.run(model).double() - plain
            assert found[name, dtype].norm() > 0.05 * plain.norm()
            if name == "loaded":
                before = state_of(model)
                pipeline.fuse_lora()
                found["absorbed", dtype] = helpers.run(model).double() - plain
                pipeline.unfuse_lora()
                assert same(state_of(model), before)
    exact = found["dense", torch.float32]
    for name in ("loaded", "absorbed"):
        assert relative(found[name, torch.float32], exact) < 0.01
        off, allowed = (relative(found[n, torch.bfloat16], exact) for n in (name, "dense"))
        assert off < 1.2 * allowed


def test_absorbed_is_the_dense_models_merged(pair, helpers):
    plain = [helpers.run(p.transformer) for p in pair]
    for p in pair:
        p.load_lora_weights(diffusers_lora(0))
        p.fuse_lora(lora_scale=0.7)
        p.unload_lora_weights()  # it stays inside
    effect, expected = (helpers.run(p.transformer) - y for p, y in zip(pair, plain, strict=True))
    assert relative(effect, expected) < 0.01
    other = copy.deepcopy(pair[0].transformer)
    assert torch.equal(helpers.run(other), helpers.run(pair[0].transformer))
    other.dequantize()
    assert relative(helpers.run(other) - plain[0], expected) < 0.01


def test_an_absorbed_lora_is_not_saved(flux_case, tmp_path):
    pipeline = pipeline_of(flux_case.load())
    pipeline.load_lora_weights(diffusers_lora(0))
    pipeline.fuse_lora()
    with pytest.raises(ValueError, match="a LoRA is loaded; unload it"):
        pipeline.transformer.save_pretrained(tmp_path)
    pipeline.unload_lora_weights()
    with pytest.raises(ValueError, match=r"a LoRA is absorbed \(fuse_lora\): call unfuse_lora before"):
        pipeline.transformer.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_gradients_pass_an_absorbed_lora(flux_case, helpers):
    pipeline = pipeline_of(flux_case.load(torch_dtype=torch.float32))
    pipeline.load_lora_weights(diffusers_lora(0))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    model = pipeline.transformer
    expected = helpers.run(model)
    arguments = helpers.inputs(model, torch.float32)
    arguments["hidden_states"].requires_grad_(True)
    y = model(**arguments)[0]
    assert relative(y.detach(), expected) < 0.01
    y.square().mean().backward()
    assert arguments["hidden_states"].grad.abs().max() > 0


def others():
    common = {"r": 4, "target_modules": ["to_q", "proj_mlp"]}
    yield "dora", lambda: peft.LoraConfig(**common, use_dora=True, init_lora_weights=False)
    yield "lokr", lambda: peft.LoKrConfig(**common, alpha=8, init_weights=False)
    yield "adalora", lambda: peft.AdaLoraConfig(**common, total_step=10, init_lora_weights=False)
    yield "loha", lambda: peft.LoHaConfig(**common, alpha=400, init_weights=False)


@pytest.mark.parametrize(("kind", "make"), others(), ids=[k for k, _ in others()])
def test_other_adapters(pair, helpers, kind, make):
    """They work beside the weights, as on the dense model, and are not absorbed."""
    plain = [helpers.run(p.transformer) for p in pair]
    before = state_of(pair[0].transformer)
    effects = []
    for p, y in zip(pair, plain, strict=True):
        torch.manual_seed(0)
        peft.get_peft_model(p.transformer, make()).eval()
        effects.append(helpers.run(p.transformer) - y)
    assert relative(*effects) < 0.01 and effects[1].norm() > 0.01 * plain[1].norm()
    beside = state_of(pair[0].transformer)
    tuned = next(m for n, m in pair[0].transformer.named_modules() if n.endswith("to_q"))
    with pytest.raises(ValueError, match="4-bit weights cannot absorb it, so leave it loaded beside"):
        tuned.merge()
    assert same(state_of(pair[0].transformer), beside) and set(before) != set(beside)


def test_a_refused_fusion_changes_nothing(case, helpers):
    """Dense layers come first in both models; none of them may be merged when a quantized one refuses."""
    model = case.load()
    before_all = state_of(model)
    dense = "x_embedder" if "Flux" in case.cls.__name__ else "linear_1"
    dora = peft.LoraConfig(r=4, target_modules=[dense, "to_q"], use_dora=True, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, dora, "a")
    before = state_of(model)
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises(ValueError, match="adapter 'a' is Dora, not a plain LoRA: 4-bit weights cannot absorb it"):
            merge()
        assert same(state_of(model), before)
    if isinstance(model, FluxTransformer2DModel):
        with pytest.raises(ValueError, match="cannot absorb it"):
            pipeline_of(model).fuse_lora()
    assert same(state_of(model), before)
    assert same(state_of(wrapped.unload()), before_all)


# --- PixArt, which diffusers gives no LoRA loader; PEFT itself works -----------------------------------------------


def adapted(model, seeds):
    for i, seed in enumerate(seeds):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=PIXART, init_lora_weights=False)
        if i:
            model.add_adapter(f"l{i}", config)
        else:
            model = peft.get_peft_model(model, config, f"l{i}")
    model.base_model.set_adapter([f"l{i}" for i in range(len(seeds))])
    return model.eval()


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_pixart_with_peft(pixart_case, helpers, seeds):
    quantized = pixart_case.load(torch_dtype=torch.float32)
    dirotq.set_activation_bits(quantized, 16)
    dense = copy.deepcopy(quantized)
    dense.dequantize()
    plain, plain_dense = helpers.run(quantized), helpers.run(dense)
    before = state_of(quantized)
    with torch.no_grad():
        arguments = helpers.inputs(dense, torch.float32)
        expected = adapted(dense, seeds)(**arguments)[0] - plain_dense
        model = adapted(quantized, seeds)
        beside = model(**arguments)[0]
        assert relative(beside - plain, expected) < 0.01 and expected.norm() > 0.05 * plain.norm()
        assert get_peft_model_state_dict(model, adapter_name="l0")
        model.merge_adapter()
        assert relative(model(**arguments)[0] - plain, expected) < 0.01
        model.unmerge_adapter()
        assert torch.equal(model(**arguments)[0], beside)
        model.merge_adapter()
        model.unmerge_adapter()
        again = model.unload()
    assert same(state_of(again), before)


def test_pixart_merge_and_unload(pixart_case, helpers):
    quantized = pixart_case.load(torch_dtype=torch.float32)
    with torch.no_grad():
        model = adapted(quantized, (0,))
        beside = model(**helpers.inputs(quantized, torch.float32))[0]
        merged = model.merge_and_unload()
        assert not any("lora" in n for n, _ in merged.named_modules())
        assert relative(helpers.run(merged), beside) < 0.05


# --- one linear ---------------------------------------------------------------------------------------------------


def test_absorbing_in_any_order(flux_case):
    q, k, _v = (getattr(flux_case.load().transformer_blocks[0].attn, n) for n in ("to_q", "to_k", "to_v"))
    g = torch.Generator().manual_seed(0)
    before = [state_of(m) for m in (q, k)]
    weights = q.dequantized_weight(), k.dequantized_weight()
    pairs = [tuple(t.bfloat16() for t in factors(WIDTH, WIDTH, g, rank)) for rank in (3, 8, 5)]
    numbers = [absorb(m, a, b) for m, (a, b) in zip((q, k, q), pairs, strict=True)]
    delta = sum((pairs[i][1].float() @ pairs[i][0].float() for i in (0, 2)), torch.zeros(()))
    torch.testing.assert_close(q.dequantized_weight() - weights[0], delta, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(k.dequantized_weight() - weights[1], pairs[1][1].float() @ pairs[1][0].float(),
                               atol=1e-5, rtol=1e-4)  # fmt: skip
    release(q, numbers[0])
    with pytest.raises(KeyError):
        release(q, numbers[0])
    release(k, numbers[1])
    torch.testing.assert_close(k.dequantized_weight(), weights[1])
    release(q, numbers[2])
    assert all(same(state_of(m), b) for m, b in zip((q, k), before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: (a[:, 1:], b), "factors of shapes"),
        (lambda a, b: (a * float("nan"), b), "NaN or infinity"),
        (lambda a, b: (a, b * 1e39), "NaN or infinity"),
    ],
)
def test_what_cannot_be_absorbed(flux_case, change, message):
    linear = next(iter(quantized_linears(flux_case.load()).values()))
    before = state_of(linear)
    a, b = factors(linear.in_features, linear.out_features, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=message):
        absorb(linear, *change(a, b))
    assert same(state_of(linear), before)


@pytest.mark.untraced
def test_compiled_blocks_absorb(flux_case, helpers):
    pipeline = pipeline_of(flux_case.load())
    pipeline.load_lora_weights(diffusers_lora(0))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    model = pipeline.transformer
    expected = helpers.run(model)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**helpers.inputs(model))[0], expected)
