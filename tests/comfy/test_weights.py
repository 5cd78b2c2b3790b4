"""What ComfyUI does to our weights: count, move, patch, clone, unload; and what the model then computes."""

import gc
import weakref
from itertools import pairwise

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

import dirotq
from dirotq.dirotq_core.single_file import read_native, to_native

from . import models
from .core import condition, forward, load, relative, run
from .training import image_ids, packed

WIDTH = models.FLUX_WIDTH


@pytest.fixture(scope="session")
def core(checkout):
    return load(checkout)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders in the diffusers layout: calibrated FLUX.1 with a 16-bit subspace, data-free PixArt."""
    from dirotq.dirotq_core.calibrate import Calibration
    from dirotq.dirotq_core.layout import plan_sites
    from dirotq.dirotq_core.quantize import install_all, solve_all

    flux, pixart = tmp_path_factory.mktemp("flux"), tmp_path_factory.mktemp("pixart")
    model = models.flux()
    config = dirotq.DiRotQConfig(rank=64).resolved(calibrated=True)
    plans = plan_sites(model, config)
    calibration = Calibration(model, plans)
    calibration.ran = True
    ids = image_ids()
    with torch.no_grad(), calibration.recording():
        for i in range(24):
            g = torch.Generator().manual_seed(i)
            model(
                hidden_states=torch.randn(1, 16, 64, generator=g).bfloat16(),
                encoder_hidden_states=torch.randn(1, 12, 4096, generator=g).bfloat16(),
                pooled_projections=torch.randn(1, 768, generator=g).bfloat16(),
                timestep=torch.tensor([i / 24]).bfloat16(),
                img_ids=ids,
                txt_ids=torch.zeros(12, 3),
                guidance=torch.tensor([3.5]),
            )
    install_all(model, plans, config, solve_all(model, plans, config, calibration, progress=False)[1])
    model.save_pretrained(flux)
    dense = tmp_path_factory.mktemp("dense")
    models.pixart().save_pretrained(dense)
    quantized = PixArtTransformer2DModel.from_pretrained(
        dense, quantization_config=dirotq.DiRotQConfig(), torch_dtype=torch.bfloat16
    )
    quantized.save_pretrained(pixart)
    return {"flux": flux, "pixart": pixart}


@pytest.fixture(scope="session")
def checkpoint(folders):
    return read_native(folders["flux"])


@pytest.fixture
def make(core, checkpoint):
    """A fresh MODEL of the FLUX.1 checkpoint."""

    def make(bits="16", lora="side branch", backend="auto"):
        return core.model.make_model(checkpoint, core.model.make_settings(checkpoint, bits, backend, lora))

    yield make
    core.comfy.model_management.unload_all_models()


@pytest.fixture
def dense(core, make):
    """The dense MODEL in float32 with the weights that the 4-bit ones stand for."""
    state = {}
    source = make().model.diffusion_model
    for name, tensor in source.state_dict().items():
        weight = source.get_submodule(name.rpartition(".")[0]).weight if name.endswith(".weight") else None
        if hasattr(weight, "_params"):
            state[name] = core.layout.DiRotQLayout.dequantize32(weight._qdata, weight._params)
        elif ".input_site." not in name and not name.endswith(("weight_scale", "low_rank")):
            state[name] = tensor.float()
    return core.comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.float32})


def lora(seed, scale=0.3, rank=8):
    """diffusers' names: fused q and v of the double block, a v and an MLP of a single block, and unfused linears."""
    g = torch.Generator().manual_seed(seed)
    targets = {
        "transformer_blocks.0.attn.to_q": (WIDTH, WIDTH),
        "transformer_blocks.0.attn.to_v": (WIDTH, WIDTH),
        "transformer_blocks.0.ff.net.0.proj": (WIDTH, 4 * WIDTH),
        "single_transformer_blocks.1.attn.to_v": (WIDTH, WIDTH),
        "single_transformer_blocks.1.proj_mlp": (WIDTH, 4 * WIDTH),
        "single_transformer_blocks.0.proj_out": (5 * WIDTH, WIDTH),
    }
    state = {}
    for name, (k, n) in targets.items():
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, k, generator=g) * k**-0.5
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(n, rank, generator=g) * scale
    return state


def with_core_loras(core, patcher, *strengths):
    for seed, strength in enumerate(strengths):
        patcher = core.comfy.sd.load_lora_for_models(patcher, None, lora(seed), strength, 0)[0]
    return patcher


def tensors_of(module):
    """Every tensor that a module's parameters and buffers hold, those inside packed weights included."""
    for t in (*module.parameters(), *module.buffers()):
        if hasattr(t, "_params"):
            yield t._qdata
            yield from (getattr(t._params, name) for name in t._params._tensor_fields())
        else:
            yield t


# --- what it computes ---------------------------------------------------------------------------------------------


def unpacked(x, h, w):
    return x.view(len(x), h // 2, w // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, h, w)


# Codes are decided by comparisons, so one unit in the last place of float32 moves some of them, which moves the output
# by 0.4 % at 8 bit and 2 % at 4. What equality means there is: no further apart than the same model with inputs that
# differ by as little. With 16-bit activations only the
# 16-bit part z is rounded, to bfloat16.
LAST_PLACES = [1 + sign * 2**-power for power in (22, 21, 20) for sign in (1, -1)]


def assert_equal(ours, model_on, x, bits):
    """`ours` is what `model_on` makes of x, but for rounding."""
    theirs = model_on(x)
    least = 2**-8 if bits == 16 else 0  # a unit in bfloat16's last place, by which z may differ
    assert relative(ours, theirs) < max(least, 2 * max(relative(model_on(x * p), theirs) for p in LAST_PLACES))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_latents_equal_those_of_diffusers(core, make, folders, bits):
    """Same checkpoint, noise and schedule: ComfyUI's sampler against the diffusers model in a loop of its own."""
    patcher, steps, given = make(bits=str(bits)), 4, condition()
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(9))
    positive = [[given["context"], {"pooled_output": given["y"], "guidance": 3.5}]]
    latent = core.comfy.sample.sample(
        patcher, noise, steps, 1.0, "euler", "simple", positive, positive, torch.zeros_like(noise), disable_pbar=True
    )
    model = FluxTransformer2DModel.from_pretrained(folders["flux"], torch_dtype=torch.float32)
    dirotq.set_activation_bits(model, bits)
    from comfy.samplers import calculate_sigmas

    sigmas = calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", steps)
    ids = image_ids()

    @torch.no_grad()
    def sampled(noise):
        x = packed(noise * sigmas[0])
        for now, then in pairwise(sigmas):
            velocity = model(
                hidden_states=x, encoder_hidden_states=given["context"], pooled_projections=given["y"],
                timestep=now[None], img_ids=ids, txt_ids=torch.zeros(12, 3), guidance=given["guidance"],
            ).sample  # fmt: skip
            x = x + (then - now) * velocity
        return patcher.get_model_object("latent_format").process_out(unpacked(x, 8, 8))

    assert_equal(latent, sampled, noise, bits)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_pixart_equals_diffusers(core, folders, bits):
    checkpoint = read_native(folders["pixart"])
    patcher = core.model.make_model(checkpoint, core.model.make_settings(checkpoint, str(bits), "auto", "side branch"))
    core.comfy.model_management.load_models_gpu([patcher])
    g = torch.Generator().manual_seed(5)
    # 512 pixels: below, ComfyUI's PixArt divides by zero.
    x, text = torch.randn(1, 4, 64, 64, generator=g), torch.randn(1, 9, 4096, generator=g)
    time = torch.tensor([500.0])
    model = PixArtTransformer2DModel.from_pretrained(folders["pixart"], torch_dtype=torch.float32)
    dirotq.set_activation_bits(model, bits)

    @torch.no_grad()
    def theirs(x):
        none = {"resolution": None, "aspect_ratio": None}
        return model(x, encoder_hidden_states=text, timestep=time, added_cond_kwargs=none).sample[:, :4]

    with torch.no_grad():
        ours = patcher.model.diffusion_model(x, time, text)
    assert_equal(ours, theirs, x, bits)


def test_16_bit_activations_equal_the_dense_weights(core, make, dense):
    assert relative(run(core, make()), run(core, dense)) < 2e-3  # the low-rank branch's z is bfloat16


def test_a_quantized_file_equals_its_source(core, make, checkpoint, tmp_path):
    from dirotq.dirotq_core.single_file import write_native

    write_native(tmp_path / "one.safetensors", checkpoint.tensors, checkpoint.config)
    again = read_native(tmp_path / "one.safetensors")
    settings_ = core.model.make_settings(again, "4", "auto", "side branch")
    assert torch.equal(run(core, core.model.make_model(again, settings_)), run(core, make(bits="4")))


def test_two_loads_keep_their_settings(core, make):
    four, eight = make(bits="4"), make(bits="8")
    a, b = run(core, four), run(core, eight)
    assert not torch.equal(a, b)
    assert torch.equal(run(core, four), a) and torch.equal(run(core, eight), b)
    plain = make(bits="4", backend="pytorch")
    assert relative(run(core, plain), a) < 1e-5
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: "):
        make(backend="triton")


# --- LoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "tolerance"), [("side branch", 0.01), ("requantize", 0.2)])
@pytest.mark.parametrize("strengths", [(1.0,), (1.0, 0.7), (-0.5, 1.5)])
def test_core_lora_loader(core, make, dense, mode, tolerance, strengths):
    """The effect equals the dense model's, and what is removed leaves no bit behind."""
    model = make(lora=mode)
    before = {n: t.clone() for n, t in model.model.state_dict().items()}
    plain, plain_dense = run(core, model), run(core, dense)
    effect = run(core, with_core_loras(core, model, *strengths)) - plain
    expected = run(core, with_core_loras(core, dense, *strengths)) - plain_dense
    assert float(expected.norm() / plain_dense.norm()) > 0.05  # a LoRA that does something
    assert relative(effect, expected) < tolerance
    assert torch.equal(run(core, model), plain)
    after = model.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())


@pytest.mark.parametrize("strengths", [(1.0,), (1.0, 0.7)])
def test_our_lora_node(core, make, dense, strengths):
    model = make()
    before = {n: t.clone() for n, t in model.model.state_dict().items()}
    plain, plain_dense = run(core, model), run(core, dense)
    stacked = model
    for seed, strength in enumerate(strengths):
        stacked = core.branches.apply_lora(stacked, lora(seed), strength)
    effect = run(core, stacked) - plain
    assert relative(effect, run(core, with_core_loras(core, dense, *strengths)) - plain_dense) < 0.01
    assert torch.equal(run(core, model), plain)
    assert torch.equal(run(core, stacked) - plain, effect)
    assert all(torch.equal(model.model.state_dict()[n], t) for n, t in before.items())


def test_loras_of_both_kinds_add_up(core, make, dense):
    model = make()
    both = core.branches.apply_lora(with_core_loras(core, model, 1.0), lora(1), 0.7)
    effect = run(core, both) - run(core, model)
    expected = run(core, with_core_loras(core, dense, 1.0, 0.7)) - run(core, dense)
    assert relative(effect, expected) < 0.01


def test_clones_do_not_leak(core, make):
    model = make(bits="4")
    plain = run(core, model)
    one, two = core.branches.apply_lora(model, lora(0), 1.0), core.branches.apply_lora(model, lora(1), 1.0)
    first, second = run(core, one), run(core, two)
    assert not torch.equal(first, second) and not torch.equal(first, plain)
    assert torch.equal(run(core, one), first) and torch.equal(run(core, two.clone()), second)
    assert torch.equal(run(core, model), plain)


def test_a_foreign_lora_is_refused(core, make):
    model = make()
    with pytest.raises(ValueError, match="no key of this LoRA belongs to this model"):
        core.branches.apply_lora(model, {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(4, 4)}, 1.0)
    wrong = lora(0)
    name = "transformer.single_transformer_blocks.0.proj_out.lora_A.weight"
    wrong[name] = wrong[name][:, :-64]
    with pytest.raises(ValueError, match=r"linear2.*made for another model"):
        core.branches.apply_lora(model, wrong, 1.0)


def test_requantizing_keeps_untouched_rows(core, make):
    """A LoRA on v of a fused linear leaves the codes of q, k and the MLP as they are."""
    model = make(lora="requantize")
    old = model.model.diffusion_model.single_blocks[1].linear1.weight
    codes = old._qdata.clone()
    only_v = {n: t for n, t in lora(0).items() if "single_transformer_blocks.1.attn.to_v" in n}
    run(core, core.comfy.sd.load_lora_for_models(model, None, only_v, 1.0, 0)[0])
    new = model.model.diffusion_model.single_blocks[1].linear1.weight
    rows = (new._qdata != codes).any(1)
    assert rows[2 * WIDTH : 3 * WIDTH].any() and not rows[: 2 * WIDTH].any() and not rows[3 * WIDTH :].any()


@given(n=st.integers(130, 300), k=st.integers(130, 300), rank=st.integers(1, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_side_branch_finds_low_ranks(core, n, k, rank, seed):
    g = torch.Generator().manual_seed(seed)
    difference = torch.randn(n, rank, generator=g) @ torch.randn(rank, k, generator=g)
    down, up = core.side_branch.side_branch(difference)
    assert down.shape == (rank, k) and up.shape == (n, rank) and down.dtype == up.dtype == torch.bfloat16
    assert relative(up.float() @ down.float(), difference) < 0.006


def test_side_branch_refuses_full_rank(core):
    assert core.side_branch.side_branch(torch.randn(200, 200)) is None
    assert core.side_branch.side_branch(torch.zeros(200, 200)) is None


# --- memory -------------------------------------------------------------------------------------------------------


def test_model_size_is_what_is_held(core, make):
    model = make()
    held = {t.untyped_storage().data_ptr(): t.nbytes for t in tensors_of(model.model)}
    # Storages are counted once; nothing of a packed weight is missing and nothing is counted twice.
    assert model.model_size() == sum(t.nbytes for t in tensors_of(model.model))
    assert len(held) == len([t for t in tensors_of(model.model) if t.nbytes])


@pytest.mark.parametrize("bits", ["4", "16"])
@pytest.mark.parametrize("budget", [1, 10**6])
@pytest.mark.parametrize("loras", [(), (1.0, 0.7)])
def test_partial_load_computes_the_same(core, make, budget, loras, bits):
    model = with_core_loras(core, make(bits=bits), *loras)
    expected, plain = run(core, model), run(core, make(bits=bits))
    core.comfy.model_management.unload_all_models()
    model.load(torch.device("cpu"), lowvram_model_memory=budget, force_patch_weights=False, full_load=False)
    low = forward(model)
    if not loras:
        assert torch.equal(low, expected)
    elif bits == "16":
        # A LoRA is its own branch there, and one taken from the patched weight in bfloat16 otherwise.
        assert relative(low, expected) < 2e-3
    else:  # as far apart as rounding in the input's last places moves codes, which is little beside the LoRA
        assert relative(low, expected) < 0.2 * relative(expected, plain)


@pytest.mark.parametrize("bits", ["4", "16"])
def test_core_loras_on_weights_that_stream(core, make, dense, bits):
    """Dynamic VRAM leaves core's LoRAs in `weight_lowvram_function` and applies them whenever a weight arrives."""
    from comfy.model_patcher import LowVramPatch

    model = make(bits=bits)
    plain, plain_dense = run(core, model), run(core, dense)
    patched = with_core_loras(core, model, 1.0, 0.7)
    modules = dict(model.model.named_modules())
    linears = {k: modules[k.removesuffix(".weight")] for k in patched.patches}
    codes = {k: m.weight._qdata.clone() for k, m in linears.items()}
    for key, module in linears.items():
        module.weight_lowvram_function = LowVramPatch(key, patched.patches)
        assert module.weight_lowvram_function is None  # nothing that ComfyUI would round the weight anew for
    effect = forward(model) - plain
    expected = run(core, with_core_loras(core, dense, 1.0, 0.7)) - plain_dense
    assert relative(effect, expected) < (0.01 if bits == "16" else 0.5)
    assert all(torch.equal(m.weight._qdata, codes[k]) for k, m in linears.items())
    for module in linears.values():
        module.weight_lowvram_function = None
    assert torch.equal(forward(model), plain)


def test_other_patches_and_requantizing_stay_with_comfyui(core, make):
    from comfy.model_patcher import LowVramPatch

    key = "diffusion_model.single_blocks.1.linear2.weight"
    difference = {key: [(1.0, ("diff", (torch.zeros(WIDTH, 5 * WIDTH),)), 1.0, None, None)]}
    module = make().model.diffusion_model.single_blocks[1].linear2
    module.weight_lowvram_function = patch = LowVramPatch(key, difference)
    assert module.weight_lowvram_function is patch
    rounding = make(lora="requantize")
    patched = with_core_loras(core, rounding, 1.0)
    own = next(k for k in patched.patches if k.endswith("img_attn.qkv.weight"))
    module = dict(rounding.model.named_modules())[own.removesuffix(".weight")]
    module.weight_lowvram_function = patch = LowVramPatch(own, patched.patches)
    assert module.weight_lowvram_function is patch


def test_rounding_to_16_bit_changes_no_codes(core, make):
    """A patch of some rows, on a weight that ComfyUI has unpacked to bfloat16."""
    weight = make().model.diffusion_model.single_blocks[1].linear1.weight
    patched = core.layout.DiRotQLayout.dequantize32(weight._qdata, weight._params)
    patched[10:20] += torch.randn(10, patched.shape[1], generator=torch.Generator().manual_seed(1)) * patched.std()
    codes, _ = core.layout.DiRotQLayout.quantize(patched.bfloat16(), like=(weight._qdata, weight._params))
    rows = (codes != weight._qdata).any(1)
    assert rows[10:20].all() and not rows[:10].any() and not rows[20:].any()


def test_unloading_frees_everything(core, checkpoint):
    settings_ = core.model.make_settings(checkpoint, "4", "auto", "side branch")
    model = core.branches.apply_lora(core.model.make_model(checkpoint, settings_), lora(0), 1.0)
    run(core, model)
    inner = weakref.ref(model.model.diffusion_model)
    core.comfy.model_management.unload_all_models()
    del model
    gc.collect()
    assert inner() is None


def test_a_weight_survives_one_buffer(core, make):
    """Dynamic VRAM gathers all tensors of a module in one buffer and reads them back in place."""
    module = make(bits="4").model.diffusion_model.single_blocks[0].linear1
    memory = core.comfy.memory_management
    buffer = torch.empty(memory.vram_aligned_size([module.weight, module.bias]), dtype=torch.uint8)
    core.comfy.model_management.cast_to_gathered([module.weight, module.bias], buffer)
    weight, bias = memory.interpret_gathered_like([module.weight, module.bias], buffer)
    x = torch.randn(3, WIDTH)
    assert torch.equal(
        core.layout.linear(x, weight, bias.float()), core.layout.linear(x, module.weight, module.bias.float())
    )
    # and a patch is written back into it
    patched = module.weight.requantize_from_float(module.convert_weight(module.weight) + 0.01, scale="recalculate")
    weight.copy_(patched)
    assert torch.equal(core.layout.linear(x, weight, None), core.layout.linear(x, patched, None))


def test_moving_and_casting(core, make):
    weight = make(bits="4").model.diffusion_model.single_blocks[0].linear1.weight
    x = torch.randn(2, WIDTH)
    expected = core.layout.linear(x, weight, None)
    for same in (
        weight.to("cpu", copy=True),
        weight.clone(),
        weight.detach(),
        torch.nn.Parameter(weight.clone(), False),
    ):
        assert torch.equal(core.layout.linear(x, same, None), expected)
    assert weight.to(torch.float16).dtype == torch.float16
    # F.linear finds the layout's handler where autograd does not take it apart; else the weight is dequantized.
    with torch.inference_mode():
        assert torch.equal(torch.nn.functional.linear(x, weight), expected)
    assert relative(torch.nn.functional.linear(x, weight), expected) < 0.2
    assert weight.dequantize().shape == weight.shape
    meta = torch.empty_like(weight, device="meta")
    assert meta.device.type == "meta" and meta._params.basis.device.type == "meta"


# --- quantizing ---------------------------------------------------------------------------------------------------


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


def test_pixart_is_calibrated_at_sizes_it_can_draw(core, folders, tmp_path):
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
