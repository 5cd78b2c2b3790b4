"""What happens around a loaded model: imports, compilation, gradients, adapters, copies."""

import copy
import subprocess
import sys

import peft
import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

import dirotq
from dirotq import kernels
from dirotq.dirotq_core.build import quantized_linears
from dirotq.dirotq_core.fused_layers import use_plain_layers

from .. import processes
from ..marks import on_gpu, thorough


def test_import_is_light():
    """Neither triton nor transformers, and well under a second beyond torch and diffusers."""
    code = (
        "import sys, time, torch, diffusers\n"
        "before = set(sys.modules); start = time.perf_counter()\n"
        "import dirotq\n"
        "seconds = time.perf_counter() - start\n"
        "new = set(sys.modules) - before\n"
        "heavy = {m.split('.')[0] for m in new} & {'triton', 'transformers', 'comfy', 'comfy_api', 'matplotlib'}\n"
        "assert not heavy, heavy\n"
        "assert seconds < 1, seconds\n"
        "from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert 'dirotq' in AUTO_QUANTIZER_MAPPING\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_import_diffusers_does_not_know_us(flux_case):
    code = (
        "from diffusers import FluxTransformer2DModel\n"
        "try:\n"
        f"    FluxTransformer2DModel.from_pretrained({str(flux_case.quantized)!r})\n"
        "except ValueError as error:\n"
        "    assert 'Unknown quantization type, got dirotq' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('loaded')\n"
    )
    done = processes.run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["import diffusers.quantizers.auto", "import dirotq.dirotq_core.config", "pass"])
def test_registration_in_any_import_order(first):
    code = (
        f"{first}\nimport dirotq\nfrom diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as table\n"
        "assert table['dirotq'] is dirotq.DiRotQConfig\n"
    )
    done = processes.run(code)
    assert done.returncode == 0, done.stderr


def test_siblings_share_one_rotation(case, helpers, monkeypatch):
    model = case.load()
    calls = []
    for name in ("rotate_quantize", "rotate_quantize_parts"):
        original = getattr(kernels.ops, name)
        monkeypatch.setattr(kernels.ops, name, lambda x, *a, run=original: calls.append(x) or run(x, *a))
    helpers.run(model)
    owners = {m.plan.owner for m in quantized_linears(model).values() if m.plan.quantize_input}
    assert len(calls) == len(owners)


@pytest.mark.untraced
def test_siblings_share_one_rotation_when_compiled(case, helpers):
    model = case.load()
    owners = {m.plan.owner for m in quantized_linears(model).values() if m.plan.quantize_input}
    counts = []

    def backend(graph, example_inputs):
        ops = torch.ops.dirotq
        sites = (ops.rotate_quantize.default, ops.rotate_quantize_parts.default)
        counts.append(sum(n.target in sites for n in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=backend)(**helpers.inputs(model))
    assert counts == [len(owners)]


@pytest.mark.untraced
def test_compile_inductor_one_block(flux_case, helpers):
    model = flux_case.load()
    expected = helpers.run(model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True)
    assert helpers.sqnr(helpers.run(model), expected) > 35


def block_graphs(model, arguments):
    """How many times each op of ours stands in each graph that `compile_repeated_blocks` makes."""
    graphs = []

    def backend(graph, example_inputs):
        targets = [str(n.target) for n in graph.graph.nodes]
        graphs.append({t: targets.count(t) for t in targets if t.startswith("dirotq.")})
        return graph.forward

    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    with torch.no_grad():
        output = model(**arguments)[0]
        assert torch.equal(model(**arguments)[0], output)
    return graphs, output


FLUX = {
    "patch_size": 1, "in_channels": 16, "num_layers": 3, "num_single_layers": 4, "attention_head_dim": 64,
    "num_attention_heads": 1, "joint_attention_dim": 64, "pooled_projection_dim": 64, "guidance_embeds": True,
    "axes_dims_rope": (16, 24, 24),
}  # fmt: skip
PIXART = {
    "num_attention_heads": 1, "attention_head_dim": 64, "num_layers": 4, "cross_attention_dim": 64, "sample_size": 16,
    "caption_channels": 64, "use_additional_conditions": False,
}  # fmt: skip


@pytest.mark.untraced
@pytest.mark.parametrize(
    ("cls", "shape", "sites_and_products"),
    [
        (FluxTransformer2DModel, FLUX, {(8, 8), (2, 2)}),  # double blocks, single blocks
        thorough(PixArtTransformer2DModel, PIXART, {(6, 6)}),
    ],
)
def test_blocks_share_compiled_graphs(cls, shape, sites_and_products, helpers, tmp_path):
    """No more graphs than without us, one for a kind of block and a layout of its inputs, however many blocks, and two
    for what all blocks read; and in each of a block siblings share one rotation and one product."""
    torch.manual_seed(0)
    dense = cls(**shape).to(torch.bfloat16)
    dense.save_pretrained(tmp_path)
    model = cls.from_pretrained(tmp_path, quantization_config=dirotq.DiRotQConfig(), torch_dtype=torch.bfloat16)
    expected = helpers.run(model)
    # diffusers names no repeated blocks in PixArt's class; a quantized model does, and leaves the class alone.
    graphs, output = block_graphs(model, helpers.inputs(model))
    assert torch.equal(output, expected)
    products = tuple(f"dirotq.linear_a8{how}.default" for how in ("", "_add", "_siblings"))
    sites = ("dirotq.rotate_quantize.default", "dirotq.rotate_quantize_parts.default")
    counts = {tuple(sum(g.get(name, 0) for name in names) for names in (sites, products)) for g in graphs}
    assert counts == {*sites_and_products, (0, 0)}
    dense._repeated_blocks = model._repeated_blocks
    assert len(graphs) <= len(block_graphs(dense, helpers.inputs(dense))[0]) < 6
    assert cls is FluxTransformer2DModel or not getattr(cls, "_repeated_blocks", None)


@on_gpu
@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=["manual", "reduce-overhead"])
def test_cuda_graphs(case, helpers, options):
    model = case.load().to("cuda")
    arguments = helpers.moved(helpers.inputs(model), "cuda")
    with torch.no_grad():
        expected = model(**arguments)[0].clone()
        if options:
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, **options)
            outputs = [compiled(**arguments)[0].clone() for _ in range(4)]
            assert all(torch.equal(y, outputs[0]) for y in outputs)
            assert helpers.sqnr(outputs[0], expected) > 25  # other roundings between our ops
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = model(**arguments)[0]
            arguments["hidden_states"].add_(0.5)
            graph.replay()
            assert torch.equal(output, model(**arguments)[0]) and not torch.equal(output, expected)


@on_gpu
def test_blocks_in_cuda_graphs(case, helpers):
    """As people run it: nothing says where a step begins, and guidance keeps one output while it makes the next."""
    model = case.load().to("cuda")
    dirotq.set_activation_bits(model, 16)
    arguments = helpers.moved(helpers.inputs(model), "cuda")

    def steps():
        outputs = []
        with torch.no_grad():
            for i in range(8):
                shifted = {**arguments, "hidden_states": arguments["hidden_states"] + i // 4}
                outputs.append(model(**shifted)[0])
        return outputs

    expected = steps()
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, mode="reduce-overhead")
    outputs = steps()
    assert all(helpers.sqnr(y, e) > 35 for y, e in zip(outputs, expected, strict=True))
    assert all(torch.equal(y, outputs[4 * (i // 4) + 3]) for i, y in enumerate(outputs))


def in_a_new_process(case, helpers, folder, code):
    """Run `code` in a process where nothing was compiled: it has `model`, on the GPU if any, and its `arguments`."""
    torch.save(helpers.inputs(case.load()), folder / "arguments.pt")
    before = (
        "import sys, torch, diffusers, dirotq\n"
        "device = 'cuda' if torch.cuda.is_available() else 'cpu'\n"
        f"cls, folder = getattr(diffusers, {case.cls.__name__!r}), {str(folder)!r}\n"
        f"model = cls.from_pretrained({str(case.quantized)!r}, torch_dtype=torch.bfloat16).to(device)\n"
        "arguments = {name: value.to(device) if isinstance(value, torch.Tensor) else value\n"
        "             for name, value in torch.load(folder + '/arguments.pt').items()}\n"
    )
    done = processes.run(before + code)
    assert done.returncode == 0, done.stderr


def test_the_first_step_of_a_process_is_marked(flux_case, helpers, tmp_path):
    """Before any block is called, though nothing of CUDA graphs has been imported by then."""
    code = (
        "sys.modules.pop('torch._inductor.cudagraph_trees', None)\n"
        "seen = []\n"
        "torch.compiler.cudagraph_mark_step_begin = lambda: seen.append('mark')\n"
        "model.transformer_blocks[0].register_forward_pre_hook(lambda *_: seen.append('block'))\n"
        "with torch.no_grad():\n"
        "    model(**arguments)\n"
        "    assert seen == ['block'], seen\n"
        "    model.compile_repeated_blocks(backend='eager')\n"
        "    model(**arguments), model(**arguments)\n"
        "assert seen == ['block', *['mark', 'block'] * 2], seen\n"
    )
    in_a_new_process(flux_case, helpers, tmp_path, code)


@on_gpu
def test_blocks_in_cuda_graphs_of_a_new_process(case, helpers, tmp_path):
    code = (
        "dirotq.set_activation_bits(model, 16)\n"
        "with torch.no_grad():\n"
        "    expected = model(**arguments)[0]\n"
        "    model.compile_repeated_blocks(fullgraph=True, mode='reduce-overhead')\n"
        "    for _ in range(4):\n"
        "        error = (model(**arguments)[0] - expected).float().norm() / expected.float().norm()\n"
        "        assert error < 0.02, error\n"
    )
    in_a_new_process(case, helpers, tmp_path, code)


@on_gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("cls", [FluxTransformer2DModel, PixArtTransformer2DModel])
def test_real_widths_and_thousands_of_tokens(cls, bits, helpers, tmp_path):
    """The same finite output from run to run; with guidance, so that a product has 8192 rows and more."""
    wide = {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 1, "num_single_layers": 2}
    if cls is PixArtTransformer2DModel:
        wide = {"num_attention_heads": 16, "attention_head_dim": 72, "cross_attention_dim": 1152, "sample_size": 128}
    torch.manual_seed(0)
    shape = {**(FLUX if cls is FluxTransformer2DModel else PIXART), **wide}
    if cls is FluxTransformer2DModel:
        shape["axes_dims_rope"] = (16, 56, 56)
    cls(**shape).to(torch.bfloat16).save_pretrained(tmp_path)
    config = dirotq.DiRotQConfig(activation_bits=bits)
    model = cls.from_pretrained(tmp_path, quantization_config=config, torch_dtype=torch.bfloat16).to("cuda")
    arguments = helpers.moved(helpers.inputs(model), "cuda")
    g = torch.Generator("cuda").manual_seed(0)
    x = (2, 4096, 16) if cls is FluxTransformer2DModel else (2, 4, 128, 128)
    arguments["hidden_states"] = torch.randn(x, device="cuda", generator=g).bfloat16()
    for name in ("encoder_hidden_states", "pooled_projections", "timestep", "guidance"):
        if name in arguments:
            arguments[name] = torch.cat([arguments[name]] * 2)
    if "img_ids" in arguments:
        arguments["img_ids"] = torch.zeros(4096, 3, device="cuda")
    with torch.no_grad():
        outputs = [model(**arguments)[0] for _ in range(8)]
    assert torch.isfinite(outputs[0]).all() and all(torch.equal(y, outputs[0]) for y in outputs)


def test_gradients_reach_an_adapter(flux_case, helpers):
    model = flux_case.load()
    model.requires_grad_(False)
    lora = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "proj_mlp"], init_lora_weights=False)
    model.add_adapter(lora)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in n for n in trained)
    model(**helpers.inputs(model))[0].float().square().mean().backward()
    for name, p in trained.items():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name


def test_saving_with_an_adapter_is_refused(flux_case, tmp_path):
    model = flux_case.load()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="a LoRA is loaded; unload it"):
        model.save_pretrained(tmp_path)


def test_forward_is_the_same_with_and_without_gradients(case, helpers):
    """Of layers that compute in steps; where steps are one kernel without gradients, their roundings differ."""
    model = case.load()
    fused = helpers.run(model)
    use_plain_layers(model)
    expected = helpers.run(model)
    assert helpers.sqnr(fused, expected) > 25
    arguments = helpers.inputs(model)
    arguments["hidden_states"].requires_grad_(True)
    y = model(**arguments)[0]
    assert torch.equal(y.detach(), expected)
    y.float().square().mean().backward()
    assert arguments["hidden_states"].grad.abs().max() > 0


def test_deepcopy_shares_inside_the_copy(flux_case, helpers):
    model = flux_case.load()
    twin = copy.deepcopy(model)
    assert torch.equal(helpers.run(twin), helpers.run(model))
    k = twin.transformer_blocks[0].attn.to_k
    assert k.site is twin.transformer_blocks[0].attn.to_q.input_site
    assert k.site is not model.transformer_blocks[0].attn.to_q.input_site


def test_inference_mode(case, helpers):
    model = case.load()
    expected = helpers.run(model)
    with torch.inference_mode():
        assert torch.equal(model(**helpers.inputs(model))[0], expected)
