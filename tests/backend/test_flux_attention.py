"""The attention processor that FLUX.1 gets when it is quantized."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo.testing
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch.overrides import TorchFunctionMode

from dirotq import kernels
from dirotq.dirotq_core import flux_attention
from dirotq.dirotq_core.flux_attention import DiRotQFluxAttnProcessor
from dirotq.dirotq_core.fused_layers import use_plain_layers
from dirotq.dirotq_core.processors import use_plain_attention

from .. import processes
from ..marks import ON_GPU
from .versions import groups_on_cpu


@pytest.fixture
def model(flux_case):
    """With diffusers' own blocks: ours end an attention's products otherwise."""
    loaded = flux_case.load()
    use_plain_layers(loaded)
    return loaded


@pytest.fixture
def inputs(model, helpers):
    found = helpers.inputs(model)
    ids = torch.zeros(64, 3)
    ids[:, 1], ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
    return {**found, "img_ids": ids, "return_dict": False}


def attentions(model):
    return [m for m in model.modules() if isinstance(m, FluxAttention)]


def called(monkeypatch):
    """Shapes of the queries that `qk_norm_rope` is called with, call by call."""
    calls = []

    def record(queries, *rest, **named):
        calls.append([tuple(q.shape) for q in queries])
        return kernels.qk_norm_rope(queries, *rest, **named)

    monkeypatch.setattr(flux_attention, "qk_norm_rope", record)
    return calls


def test_same_output_as_diffusers_own_steps(model, inputs, monkeypatch):
    assert [type(a.processor) for a in attentions(model)] == 3 * [DiRotQFluxAttnProcessor]
    calls = called(monkeypatch)
    with torch.no_grad():
        ours = model(**inputs)[0]
        assert calls == [[(1, 7, 3, 64), (1, 64, 3, 64)], [(1, 71, 3, 64)], [(1, 71, 3, 64)]]
        use_plain_attention(model)
        assert [type(a.processor) for a in attentions(model)] == 3 * [FluxAttnProcessor]
        plain = model(**inputs)[0]
    assert len(calls) == 3
    assert torch.equal(ours, plain)  # on the CPU the op is those steps


@groups_on_cpu
def test_norms_brought_in_by_group_offload(model, inputs, monkeypatch):
    with torch.no_grad():
        expected = model(**inputs)[0]
        model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
        calls, seen = called(monkeypatch), []
        hook = attentions(model)[0].norm_q._diffusers_hook.hooks["group_offloading"]
        for name in ("pre_forward", "post_forward"):
            method = getattr(hook, name)
            monkeypatch.setattr(hook, name, lambda *args, n=name, m=method: seen.append(n) or m(*args))
        assert torch.equal(model(**inputs)[0], expected)
    assert len(calls) == 3 and seen == ["pre_forward", "post_forward"]


def test_batch(model, inputs):
    one = ("guidance", "timestep", "pooled_projections", "hidden_states", "encoder_hidden_states")
    twice = {**inputs, **{n: torch.cat([inputs[n], inputs[n].flip(-1)]) for n in one}}
    with torch.no_grad():
        both = model(**twice)[0]
        use_plain_attention(model)
        assert torch.equal(both, model(**twice)[0])


def test_gradients_take_diffusers_steps(model, inputs, monkeypatch):
    calls = called(monkeypatch)
    x = inputs["hidden_states"].clone().requires_grad_()
    model(**{**inputs, "hidden_states": x})[0].sum().backward()
    assert x.grad.abs().sum() > 0 and not calls


def test_attention_mask_and_backend_reach_the_attention(model, inputs):
    with attention_backend("_native_math"):  # so that what the next line sets for the process ends with the test
        model.set_attention_backend("_native_math")
    assert {a.processor._attention_backend.value for a in attentions(model)} == {"_native_math"}
    attn = attentions(model)[-1]
    x = torch.randn(1, 71, 192, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(2))
    rotary = model.pos_embed(torch.cat([inputs["txt_ids"], inputs["img_ids"]]))
    mask = torch.rand(1, 1, 71, 71, generator=torch.Generator().manual_seed(3)) > 0.5
    with torch.no_grad():
        ours = attn(x, attention_mask=mask, image_rotary_emb=rotary)
        unmasked = attn(x, image_rotary_emb=rotary)
        use_plain_attention(model)
        assert {a.processor._attention_backend.value for a in attentions(model)} == {"_native_math"}
        plain = attn(x, attention_mask=mask, image_rotary_emb=rotary)
    assert torch.equal(ours, plain) and not torch.equal(ours, unmasked)


def test_ours_unless_somebody_chose_another(model, inputs, monkeypatch):
    calls = []
    monkeypatch.setattr(
        flux_attention, "attend", lambda *args, **named: calls.append(1) or kernels.attend(*args, **named)
    )

    def counted(context):
        calls.clear()
        with context, torch.no_grad():
            model(**inputs)
        return len(calls)

    assert counted(nullcontext()) == 3
    assert counted(attention_backend("_native_math")) == 0
    with attention_backend("native"):  # ends what the next line sets for the process
        model.set_attention_backend("native")
    assert counted(nullcontext()) == 0
    model.reset_attention_backend()
    assert counted(nullcontext()) == 3
    with monkeypatch.context() as patch:
        theirs, own = [], torch.nn.functional.scaled_dot_product_attention
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *args, **named: theirs.append(1) or own(*args, **named),
        )
        assert counted(nullcontext()) == 0 and len(theirs) == 3

    class Watching(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen = []
    assert counted(Watching()) == 0 and seen.count(torch.nn.functional.scaled_dot_product_attention) == 3
    assert counted(torch.device("cpu")) == 3  # a mode, too


def test_a_function_put_in_place_before_the_import_is_seen():
    code = (
        "import torch\nown = torch.nn.functional.scaled_dot_product_attention\n"
        "torch.nn.functional.scaled_dot_product_attention = lambda *a, **n: own(*a, **n)\n"
        "from dirotq.dirotq_core.fusible import attention_is_pytorchs\nprint(attention_is_pytorchs())\n"
        "torch.nn.functional.scaled_dot_product_attention = own\nprint(attention_is_pytorchs())"
    )
    done = processes.run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("text", [19, 0])
def test_heads_of_128_columns_as_diffusers_has_them(device, text, helpers):
    """There, queries hold the factor that makes weights powers of two."""
    make = torch.Generator().manual_seed(4)
    added = {"added_kv_proj_dim": 256, "context_pre_only": False} if text else {"pre_only": True}
    attn = FluxAttention(query_dim=256, dim_head=128, heads=2, out_dim=256, bias=True, eps=1e-6, **added)
    for parameter in attn.parameters():
        parameter.data = torch.randn(parameter.shape, generator=make) / 8 + (parameter.dim() == 1)
    attn = attn.to(device, torch.bfloat16).eval()
    tokens = torch.randn(2, 150, 256, generator=make).to(device, torch.bfloat16)
    angles = torch.randn(150 + text, 128, generator=make).repeat_interleave(2, 1)[:, :128].to(device)
    given_ = {"hidden_states": tokens, "image_rotary_emb": (angles.cos(), angles.sin())}
    if text:
        given_["encoder_hidden_states"] = tokens[:, :text]
    results = []
    with torch.no_grad():
        for processor in (DiRotQFluxAttnProcessor(), FluxAttnProcessor()):
            attn.set_processor(processor)
            results.append(attn(**given_))
    for ours, theirs in zip(*(r if text else [r] for r in results), strict=True):
        assert helpers.sqnr(ours, theirs) > 40


def test_another_processor_is_left_alone(model, flux_case):
    attentions(model)[0].set_processor(FluxIPAdapterAttnProcessor(192, 64))
    use_plain_attention(model)
    assert type(attentions(model)[0].processor) is FluxIPAdapterAttnProcessor


def test_copies_and_dequantized_models(model, inputs):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(**inputs)[0], model(**inputs)[0])
    twin.dequantize()
    assert {type(a.processor) for a in attentions(twin)} == {FluxAttnProcessor}
    assert {type(a.processor) for a in attentions(model)} == {DiRotQFluxAttnProcessor}


def frames(model, inputs):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.compile(fullgraph=True, backend=counter)
    with torch.no_grad():
        return model(**inputs)[0], counter.frame_count


@pytest.mark.untraced
def test_compiles_as_often_as_diffusers_own(model, inputs, flux_case):
    with torch.no_grad():
        eager = model(**inputs)[0]
    ours, graphs = frames(model, inputs)
    assert torch.equal(ours, eager)
    plain = flux_case.load()
    use_plain_attention(plain)
    assert graphs == frames(plain, inputs)[1]
