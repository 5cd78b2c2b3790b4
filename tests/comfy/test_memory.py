"""What ComfyUI does to our weights: count, move, stream, patch on the way, clone and unload."""

import gc
import weakref

import pytest
import torch

from . import loras
from .core import forward, relative, run
from .loras import WIDTH, lora, with_core_loras

LOKR = {"transformer_blocks.0.attn.to_q": (1, 1), "single_transformer_blocks.1.proj_out": (5, 1)}


def tensors_of(module):
    """Every tensor that a module's parameters and buffers hold, those inside packed weights included."""
    for t in (*module.parameters(), *module.buffers()):
        if hasattr(t, "_params"):
            yield t._qdata
            yield from (getattr(t._params, name) for name in t._params._tensor_fields())
        else:
            yield t


def test_model_size_is_what_is_held(core, make):
    model = make()
    held = {t.untyped_storage().data_ptr(): t.nbytes for t in tensors_of(model.model)}
    # Storages are counted once; nothing of a packed weight is missing and nothing is counted twice.
    assert model.model_size() == sum(t.nbytes for t in tensors_of(model.model))
    assert len(held) == len([t for t in tensors_of(model.model) if t.nbytes])


def held_bytes(model):
    """Of all tensors that a module holds, those of LoRAs beside its linears included; memory they share once."""
    found = list(tensors_of(model))
    for module in model.modules():
        for branches in getattr(module, "side_loras", {}).values():
            found += [t for b in branches for t in vars(b).values() if isinstance(t, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.nbytes for t in found if t.nbytes}
    assert sum(storages.values()) == sum(t.nbytes for t in found)
    return sum(storages.values())


@pytest.mark.parametrize("mode", ["side branch", "requantize"])
def test_model_size_counts_loras(core, make, mode):
    """LoRAs of core's loader, which become part of the weights, of our node, and both; and none of them afterwards."""
    model = make(lora=mode)
    alone = model.model_size()
    theirs = with_core_loras(core, model, 1.0)
    ours = core.branches.apply_lora(
        core.branches.apply_lora(model, lora(1), 0.7), loras.lokr(LOKR, WIDTH, scale=8.0), 1.0
    )
    both = core.branches.apply_lora(theirs, lora(1), 0.7)
    assert ours.model_size() > alone  # before it is loaded, too: ComfyUI makes room for that much
    for patcher in (theirs, ours, both, theirs, model):
        run(core, patcher)
        assert patcher.model_size() == held_bytes(patcher.model) == patcher.loaded_size()
        assert patcher.clone().model_size() == patcher.model_size()
    assert model.model_size() == alone == held_bytes(model.model)
    assert ours.model_size() > alone and both.model_size() > alone
    assert (theirs.model_size() > alone) == (mode == "side branch")
    core.comfy.model_management.unload_all_models()
    assert held_bytes(model.model) == alone


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
@pytest.mark.parametrize("budget", [1, 10**6])
def test_partial_load_with_our_lora(core, make, budget, bits):
    """Branches beside the linears are the same wherever the weights are."""
    model = core.branches.apply_lora(make(bits=bits), lora(0), 1.0)
    expected = run(core, model)
    core.comfy.model_management.unload_all_models()
    model.patch_model(torch.device("cpu"), lowvram_model_memory=budget)
    assert torch.equal(forward(model), expected)
    model.detach()


def test_a_lokr_on_weights_that_stream(core, make, dense):
    """Of full rank, and still no weight is rounded anew where it arrives for every use."""
    model = make(bits="16")
    state = loras.lokr(LOKR, WIDTH, scale=8.0)
    plain, plain_dense = run(core, model), run(core, dense)
    patched = core.comfy.sd.load_lora_for_models(model, None, state, 1.0, 0)[0]
    core.comfy.model_management.unload_all_models()
    patched.load(torch.device("cpu"), lowvram_model_memory=1, force_patch_weights=False, full_load=False)
    expected = run(core, core.comfy.sd.load_lora_for_models(dense, None, state, 1.0, 0)[0]) - plain_dense
    assert relative(forward(patched) - plain, expected) < 0.01


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


def test_unloading_frees_everything(core, checkpoint):
    settings_ = core.model.make_settings(checkpoint, "4", "auto", "side branch")
    model = with_core_loras(core, core.model.make_model(checkpoint, settings_), 1.0)
    model = core.branches.apply_lora(model, lora(1), 1.0)
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
