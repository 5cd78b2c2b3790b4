"""Layers whose elementwise steps run inside our kernels: results of diffusers' steps, and those where they must be."""

import copy
import pickle

import peft
import pytest
import torch
import torch._dynamo.testing
from diffusers.hooks import HookRegistry, LayerSkipConfig, ModelHook, apply_layer_skip
from diffusers.models.activations import GELU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

import dirotq
from dirotq.dirotq_core import fused_layers, pixart_layers
from dirotq.dirotq_core.fused_layers import use_fused_layers, use_plain_layers
from dirotq.dirotq_core.processors import use_plain_attention
from dirotq.kernels import ops

from ..marks import thorough

FLUX = {GELU, AdaLayerNormZero, FluxTransformerBlock, FluxSingleTransformerBlock}
PIXART = {GELU, BasicTransformerBlock}
PLAIN = FLUX | PIXART


def classes(model):
    return {type(m) for m in model.modules()}


def ours(plain):
    return {getattr(fused_layers, cls.__name__) for cls in plain}


@pytest.fixture
def calls(monkeypatch):
    """Names of the ops that are called, those of a product ending with GELU marked."""
    made = []

    def record(name):
        run = getattr(ops, name)

        def call(*args):
            curved = name in ("linear_a8", "linear_a8_siblings") and len(args) > 9 and bool(args[9])
            made.append(name + (" gelu" if curved else ""))
            return run(*args)

        return call

    names = ("rotate_quantize", "rotate_quantize_parts", "linear_a8", "linear_a8_add", "linear_a8_siblings")
    for name in names:
        monkeypatch.setattr(ops, name, record(name))
    modulate = fused_layers.norm_modulate
    for module in (fused_layers, pixart_layers):
        monkeypatch.setattr(module, "norm_modulate", lambda *a: made.append("norm_modulate") or modulate(*a))
    return made


def test_a_loaded_model_has_them_and_a_dequantized_one_has_not(case):
    model = case.load()
    plain = PIXART if type(model).__name__.startswith("PixArt") else FLUX
    assert not classes(model) & PLAIN and classes(model) >= ours(plain)
    processors = {type(m.processor).__name__ for m in model.modules() if hasattr(m, "processor")}
    assert processors and all(name.startswith("DiRotQ") for name in processors)
    model.dequantize()
    assert classes(model) & PLAIN == plain and not classes(model) & ours(PLAIN)
    processors = {type(m.processor).__name__ for m in model.modules() if hasattr(m, "processor")}
    assert processors and not any(name.startswith("DiRotQ") for name in processors)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_results_as_diffusers_steps(case, helpers, dtype, bits):
    model = case.load(torch_dtype=dtype)
    dirotq.set_activation_bits(model, bits)
    arguments = helpers.inputs(model, dtype)
    with torch.no_grad():
        fused = model(**arguments)[0]
        use_plain_layers(model)
        plain = model(**arguments)[0]
        use_fused_layers(model)
        assert torch.equal(model(**arguments)[0], fused)
    assert fused.dtype == dtype and helpers.sqnr(fused, plain) > (45 if bits == 16 else 30)


def test_what_runs_in_one_kernel(flux_case, helpers, calls):
    model = flux_case.load()
    helpers.run(model)
    blocks, singles = len(model.transformer_blocks), len(model.single_transformer_blocks)
    assert calls.count("norm_modulate") == 4 * blocks + singles  # two, of image and text
    assert calls.count("linear_a8 gelu") == 2 * blocks
    assert calls.count("linear_a8_add") == 4 * blocks + singles  # what leaves an attention, an MLP, or both
    assert "linear_a8" not in calls
    assert calls.count("linear_a8_siblings gelu") == calls.count("rotate_quantize_parts") == singles
    assert calls.count("linear_a8_siblings") == 2 * blocks  # queries, keys and values of the double blocks


def test_what_runs_in_one_kernel_in_pixart(pixart_case, helpers, calls):
    model = pixart_case.load()
    helpers.run(model)
    blocks = len(model.transformer_blocks)
    assert calls.count("norm_modulate") == 2 * blocks
    assert calls.count("linear_a8 gelu") == blocks
    assert calls.count("linear_a8_add") == 3 * blocks  # two attentions and the MLP
    assert calls.count("linear_a8") == blocks  # queries of the text; its keys and values stay in 16 bit


def test_loras_see_what_they_see_in_a_dense_model(flux_case, helpers, calls):
    """Only the layers beside them compute in steps."""
    for target in ("proj_mlp", "proj_out", "net.0.proj", "to_q"):
        model = flux_case.load()
        dirotq.set_activation_bits(model, 16)
        twin = copy.deepcopy(model)
        use_plain_layers(twin)
        blocks, singles = len(model.transformer_blocks), len(model.single_transformer_blocks)
        lora = peft.LoraConfig(r=4, target_modules=f".*{target}", init_lora_weights=False)
        for one in (model, twin):
            torch.manual_seed(1)
            one.add_adapter(lora)
        with_lora = helpers.run(model)
        assert helpers.sqnr(with_lora, helpers.run(twin)) > 45
        dirotq.set_activation_bits(model, 8)
        calls.clear()
        helpers.run(model)
        dirotq.set_activation_bits(model, 16)
        assert calls.count("norm_modulate") == 4 * blocks + singles
        assert calls.count("linear_a8_add") == 4 * blocks + singles * (target != "proj_out")
        assert calls.count("linear_a8_siblings gelu") == singles * (target != "proj_mlp")
        assert calls.count("rotate_quantize_parts") == singles * (target != "proj_out")
        assert calls.count("linear_a8 gelu") == 2 * blocks * (target != "net.0.proj")
        for one in (model, twin):
            one.disable_adapters()
        assert helpers.sqnr(helpers.run(model), helpers.run(twin)) > 45
        assert helpers.sqnr(with_lora, helpers.run(twin)) < 40


def test_an_absorbed_lora_reads_the_whole_input(flux_case, helpers, calls):
    model = flux_case.load()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=".*proj_out", init_lora_weights=False))
    beside = helpers.run(model)
    model.fuse_lora()
    model.unload_lora()
    calls.clear()
    assert helpers.sqnr(helpers.run(model), beside) > 25 and "rotate_quantize_parts" not in calls


@pytest.mark.parametrize("name", ["proj_mlp", "act_mlp"])
def test_hooks_see_the_step_they_are_on(flux_case, helpers, name):
    model, seen = flux_case.load(), []
    block = model.single_transformer_blocks[0]
    handle = getattr(block, name).register_forward_hook(lambda module, args, out: seen.append(out))
    with_hook = helpers.run(model)
    handle.remove()
    assert seen[0].shape[-1] == block.mlp_hidden_dim and (seen[0].min() < -0.2) == (name == "proj_mlp")
    assert helpers.sqnr(with_hook, helpers.run(model)) > 25


class Counting(ModelHook):
    def __init__(self):
        self.calls, self.seen = 0, None

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs

    def post_forward(self, module, output):
        self.seen = output
        return output


DOUBLE = [
    "attn",
    "attn.to_out.0",
    "attn.to_out.1",
    "attn.to_add_out",
    "norm2",
    "norm2_context",
    "ff",
    "ff.net.2",
    "ff_context.net.1",
]


BASIC = ["attn1", "attn1.to_out.0", "attn2", "attn2.to_out.0", "attn2.to_out.1", "norm1", "norm2", "ff", "ff.net.2"]


@pytest.mark.parametrize("of_torch", [True, False])
@pytest.mark.parametrize(("of", "name"), [*(("flux", n) for n in DOUBLE), *(("pixart", n) for n in BASIC)])
def test_hooks_in_a_block_see_diffusers_steps(flux_case, pixart_case, helpers, of, name, of_torch):
    model = (pixart_case if of == "pixart" else flux_case).load()
    dirotq.set_activation_bits(model, 16)
    twin = copy.deepcopy(model)
    use_plain_layers(twin)
    outputs, seen = [], []
    for one in (model, twin):
        hook, found = Counting(), []
        module = one.transformer_blocks[0].get_submodule(name)
        if of_torch:
            module.register_forward_hook(lambda module, args, out, found=found: found.append(out))
        else:
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "counting")
        outputs.append(helpers.run(one))
        seen.append(found[0] if of_torch else hook.seen)
        assert len(found) + hook.calls == 1
    assert helpers.sqnr(*outputs) > 45
    ours, plain = (torch.cat([t.flatten() for t in out]) if isinstance(out, tuple) else out for out in seen)
    assert helpers.sqnr(ours, plain) > 40


@pytest.mark.parametrize("scores", [True, False])
def test_guiders_skip_attention(pixart_case, helpers, scores):
    """They look processors up by their class; those of FLUX.1 fail on diffusers' own, too."""
    model = pixart_case.load()
    dirotq.set_activation_bits(model, 16)
    twin = copy.deepcopy(model)
    use_plain_layers(twin)
    use_plain_attention(twin)
    before = helpers.run(model)
    for one in (model, twin):
        how = {"skip_attention_scores": scores, "skip_attention": not scores, "skip_ff": False}
        apply_layer_skip(one, LayerSkipConfig([0], fqn="transformer_blocks", **how))
    ours, plain = helpers.run(model), helpers.run(twin)
    assert helpers.sqnr(ours, plain) > 45 and helpers.sqnr(ours, before) < 40


def test_a_mask_and_a_batch_in_pixart(pixart_case, helpers, monkeypatch):
    model = pixart_case.load()
    dirotq.set_activation_bits(model, 16)
    twin = copy.deepcopy(model)
    use_plain_layers(twin)
    arguments = helpers.inputs(model)
    g = torch.Generator().manual_seed(0)
    more = {n: torch.randn(3, *arguments[n].shape[1:], generator=g).bfloat16() for n in list(arguments)[:2]}
    mask = torch.ones(3, 7)
    mask[0, 3:] = mask[2, 1:] = 0
    more |= {"timestep": torch.tensor([500, 20, 900]), "encoder_attention_mask": mask}
    with torch.no_grad():
        ours_, plain = (one(**arguments | more)[0] for one in (model, twin))
        assert helpers.sqnr(ours_, plain) > 45
        theirs, own = [], torch.nn.functional.scaled_dot_product_attention
        with monkeypatch.context() as patch:  # what somebody put in its place is called
            patch.setattr(
                torch.nn.functional, "scaled_dot_product_attention", lambda *a, **n: theirs.append(1) or own(*a, **n)
            )
            patch.setattr(pixart_layers, "attend", None)
            assert helpers.sqnr(model(**arguments | more)[0], plain) > 45
        assert len(theirs) == 2 * len(model.transformer_blocks)
        more["encoder_attention_mask"] = torch.ones(3, 7)
        assert helpers.sqnr(model(**arguments | more)[0], plain) < 40


@pytest.mark.parametrize("batch", [2, 3])
def test_gates_of_a_batch(flux_case, helpers, batch):
    """Each image has its own, in products of all images."""
    model = flux_case.load()
    dirotq.set_activation_bits(model, 16)
    arguments = helpers.inputs(model)
    g = torch.Generator().manual_seed(0)
    many = {n: v.repeat(batch, *[1] * (v.ndim - 1)) for n, v in arguments.items() if not n.endswith("ids")}
    many["pooled_projections"] = torch.randn(batch, 64, generator=g).bfloat16()
    with torch.no_grad():
        together = model(**arguments | many)[0]
        for i in range(batch):
            alone = model(**arguments | {n: v[i : i + 1] for n, v in many.items()})[0]
            assert helpers.sqnr(together[i : i + 1], alone) > 45


@pytest.mark.parametrize("name", ["attn", "norm", "norm.norm", "act_mlp", "proj_mlp", "proj_out"])
def test_hooks_of_diffusers_run(flux_case, helpers, name):
    model = flux_case.load()
    plain = helpers.run(model)
    hook = Counting()
    module = model.single_transformer_blocks[0].get_submodule(name)
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "counting")
    assert helpers.sqnr(helpers.run(model), plain) > 25 and hook.calls == 1


@pytest.mark.untraced
@pytest.mark.parametrize("stack", ["transformer_blocks", "single_transformer_blocks"])
def test_an_attention_is_called_where_that_makes_a_difference(flux_case, helpers, stack, monkeypatch):
    """Its processor is otherwise; diffusers' own `forward` names arguments that no processor knows, and leaves them."""
    model = flux_case.load()
    expected, attn = helpers.run(model), getattr(model, stack)[0].attn
    calls = []
    original = type(attn).forward
    monkeypatch.setattr(type(attn), "forward", lambda self, *a, **kw: calls.append(kw) or original(self, *a, **kw))
    assert torch.equal(helpers.run(model), expected) and not calls
    with torch.no_grad():
        output = model(**helpers.inputs(model), joint_attention_kwargs={"unknown": 1})[0]
    assert torch.equal(output, expected) and [kw["unknown"] for kw in calls] == [1] * 3
    calls.clear()
    seen = []
    attn.forward = lambda *a, **kw: seen.append(kw) or original(attn, *a, **kw)  # as accelerate wraps it
    assert helpers.sqnr(helpers.run(model), expected) > 25 and len(seen) == 1 and not calls
    del attn.forward
    handle = attn.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    helpers.run(model)
    handle.remove()
    assert len(seen) == 2
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *rest: seen.append(module))
    helpers.run(model)
    handle.remove()
    assert sum(module is attn for module in seen[2:]) == 1
    graphs = []
    attn.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    assert helpers.sqnr(helpers.run(model), expected) > 25 and graphs
    torch._dynamo.reset()


class Louder(Counting):
    def post_forward(self, module, output):
        return 30 * output


@pytest.mark.untraced
@pytest.mark.parametrize(
    ("of", "name"),
    [
        ("pixart", "transformer_blocks.0.ff"),
        thorough("flux", "single_transformer_blocks.0.attn"),
        thorough("flux", "transformer_blocks.0.norm2"),
        thorough("pixart", "transformer_blocks.0.attn1"),
    ],
)
def test_a_hook_set_after_compiling_runs(flux_case, pixart_case, helpers, of, name):
    model = (pixart_case if of == "pixart" else flux_case).load()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    arguments, hook = helpers.inputs(model), Louder()
    with torch.no_grad():
        before = compiled(**arguments)[0]
        HookRegistry.check_if_exists_or_initialize(model.get_submodule(name)).register_hook(hook, "louder")
        after, expected = compiled(**arguments)[0], model(**arguments)[0]
    assert helpers.sqnr(after, before) + 10 < helpers.sqnr(after, expected)
    torch._dynamo.reset()


def test_another_activation_is_computed(flux_case, helpers):
    model = flux_case.load()
    dirotq.set_activation_bits(model, 16)
    for block in model.single_transformer_blocks:
        block.act_mlp = torch.nn.ReLU()
    fused = helpers.run(model)
    use_plain_layers(model)
    assert helpers.sqnr(fused, helpers.run(model)) > 45


def test_autocast_and_broadcast_embeddings(flux_case, helpers):
    """Where diffusers' steps cast or broadcast, they are taken."""
    model = flux_case.load()
    dirotq.set_activation_bits(model, 16)
    arguments = helpers.inputs(model)
    twice = {n: torch.cat([arguments[n]] * 2) for n in ("hidden_states", "encoder_hidden_states")}
    with torch.no_grad():
        one, both = model(**arguments)[0], model(**{**arguments, **twice})[0]
        assert all(helpers.sqnr(part, one) > 45 for part in both.split(1))
        half = {n: v.float() if n == "hidden_states" else v for n, v in arguments.items()}
        with torch.autocast("cpu", torch.bfloat16):
            fused = model(**half)[0]
            use_plain_layers(model)
            assert torch.equal(fused, model(**half)[0])


def test_parts_of_two_dtypes(flux_case):
    linear = flux_case.load().single_transformer_blocks[0].proj_out
    g = torch.Generator().manual_seed(0)
    attention, mlp = torch.randn(1, 5, 192, generator=g), torch.randn(1, 5, 768, generator=g).bfloat16()
    with torch.no_grad():
        assert torch.equal(linear((attention, mlp)), linear(torch.cat([attention, mlp], 2)))


@pytest.mark.untraced
def test_compiled_with_gradients(flux_case, helpers):
    model = flux_case.load()
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "proj_out"], init_lora_weights=False))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    compiled(**helpers.inputs(model))[0].float().square().mean().backward()
    assert counter.frame_count == 1
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_a_deep_copy_and_a_pickle_have_them(flux_case, helpers):
    model = flux_case.load()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not classes(twin) & PLAIN and classes(twin) >= ours(FLUX)
        assert torch.equal(helpers.run(twin), helpers.run(model))
