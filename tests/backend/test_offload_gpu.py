"""Every way of keeping weights elsewhere gives the bits of the model that is whole on the GPU. `pytest -m gpu`."""

import copy
import gc

import peft
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline

import dirotq

from ..marks import ON_GPU

pytestmark = ON_GPU
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
STREAMS = {
    "blocking": {},
    "stream": {"use_stream": True},
    "recorded stream": {"use_stream": True, "record_stream": True},
    "stream, pinned late": {"use_stream": True, "low_cpu_mem_usage": True},
}
LEVELS = {"leaf_level": {}, "block_level": {"num_blocks_per_group": 1}}


@pytest.fixture(autouse=True)
def clean():
    yield
    gc.collect()
    torch.cuda.empty_cache()


@torch.no_grad()
def run(model, helpers):
    return model(**helpers.moved(helpers.inputs(model), CUDA))[0].to(CPU)


def loaded(case, bits=8, **kwargs):
    model = case.load(**kwargs)
    dirotq.set_activation_bits(model, bits)
    return model


def resident(case, helpers, bits=8):
    return run(loaded(case, bits).to(CUDA), helpers)


# --- the transformer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("level", LEVELS)
def test_groups(case, helpers, level, stream, bits):
    model = loaded(case, bits)
    model.enable_group_offload(CUDA, CPU, level, **LEVELS[level], **STREAMS[stream])
    expected = resident(case, helpers, bits)
    for _ in range(3):  # the second run with streams is the first that prefetches
        assert torch.equal(run(model, helpers), expected)


@pytest.mark.parametrize("stream", ["blocking", "stream"])
@pytest.mark.parametrize("level", LEVELS)
def test_groups_on_disk(case, helpers, tmp_path, level, stream):
    model = loaded(case)
    model.enable_group_offload(CUDA, CPU, level, offload_to_disk_path=str(tmp_path), **LEVELS[level], **STREAMS[stream])
    expected = resident(case, helpers)
    for _ in range(3):
        assert torch.equal(run(model, helpers), expected)


@pytest.mark.parametrize("stream", ["blocking", "stream"])
@pytest.mark.parametrize("level", LEVELS)
def test_groups_with_an_adapter(flux_case, helpers, level, stream):
    lora = peft.LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False)
    torch.manual_seed(0)
    model = loaded(flux_case)
    model.add_adapter(lora)
    expected = run(copy.deepcopy(model).to(CUDA), helpers)
    model.enable_group_offload(CUDA, CPU, level, **LEVELS[level], **STREAMS[stream])
    for _ in range(3):
        assert torch.equal(run(model, helpers), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_groups_compiled(case, helpers, level):
    model = loaded(case)
    expected = resident(case, helpers)
    torch._dynamo.reset()
    model.enable_group_offload(CUDA, CPU, level, use_stream=True, **LEVELS[level])
    model.compile(backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1000):
        for _ in range(3):
            assert torch.equal(run(model, helpers), expected)


@pytest.mark.parametrize("device_map", ["auto", "cuda", {"": 0}, "balanced"])
def test_device_maps(case, helpers, device_map):
    model = loaded(case, device_map=device_map)
    assert model.device.type == "cuda"
    assert torch.equal(run(model, helpers), resident(case, helpers))


@pytest.mark.parametrize("rest", ["cpu", "disk"])
def test_a_device_map_with_blocks_elsewhere(case, helpers, tmp_path, rest):
    names = {n.split(".")[0] for n, _ in case.load().named_parameters()}
    device_map = {n: rest if n.endswith("transformer_blocks") else 0 for n in names}
    model = loaded(case, device_map=device_map, offload_folder=str(tmp_path))
    expected = resident(case, helpers)
    for _ in range(2):
        assert torch.equal(run(model, helpers), expected)


def test_quantizing_onto_the_gpu_is_quantizing_on_the_cpu(case, helpers):
    made = case.on_the_fly(device_map="cuda")
    kept = {n: p for n, p in case.load().named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    found = dict(made.named_parameters())
    different = sum(int((found[n].to(CPU) != p).sum()) for n, p in kept.items()) / sum(p.numel() for p in kept.values())
    assert different < 1e-3  # a rounding at a tie


# --- whole pipelines ----------------------------------------------------------------------------------------------


@pytest.fixture
def images(pipeline, draw):
    """Those of the resident pipeline; `pipeline` is on the CPU again."""
    made = draw(pipeline.to(CUDA)).to(CPU)
    pipeline.to(CPU)
    return made


@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_pipelines(pipeline, draw, images, method):
    getattr(pipeline, method)()
    try:
        for _ in range(2):
            assert torch.equal(draw(pipeline).to(CPU), images)
    finally:
        pipeline.remove_all_hooks()
        pipeline.to(CPU)


@pytest.mark.parametrize("stream", ["blocking", "stream"])
@pytest.mark.parametrize("level", LEVELS)
def test_pipelines_in_groups(pipeline, draw, images, level, stream):
    twin = copy.deepcopy(pipeline.transformer)
    parts = {**pipeline.components, "transformer": twin}
    other = type(pipeline)(**parts)
    other.set_progress_bar_config(disable=True)
    twin.enable_group_offload(CUDA, CPU, level, **LEVELS[level], **STREAMS[stream])
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module) and name != "transformer":
            part.to(CUDA)
    try:
        for _ in range(2):
            assert torch.equal(draw(other).to(CPU), images)
    finally:
        pipeline.to(CPU)


def lora(seed):
    g, state = torch.Generator().manual_seed(seed), {}
    for name in ("transformer_blocks.0.attn.to_k", "single_transformer_blocks.1.attn.to_q"):
        for ab, shape in {"A": (4, 192), "B": (192, 4)}.items():
            state[f"transformer.{name}.lora_{ab}.weight"] = 0.2 * torch.randn(shape, generator=g)
    return state


def test_loras_come_and_go_under_offload(flux_case, helpers):
    """diffusers takes its hooks off, changes the layers, and puts the hooks back."""
    outputs = []
    for method in (None, "enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        pipe = FluxPipeline(None, None, None, None, None, None, loaded(flux_case))
        if method is None:
            pipe.to(CUDA)
        else:
            getattr(pipe, method)()
        plain = run(pipe.transformer, helpers)
        pipe.load_lora_weights(lora(0), adapter_name="a")
        pipe.load_lora_weights(lora(1), adapter_name="b")
        pipe.set_adapters(["a", "b"], [0.7, -0.3])
        both = run(pipe.transformer, helpers)
        pipe.delete_adapters("a")
        one = run(pipe.transformer, helpers)
        pipe.unload_lora_weights()
        assert torch.equal(run(pipe.transformer, helpers), plain)
        outputs.append((plain, both, one))
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))
    assert not torch.equal(*outputs[0][:2]) and not torch.equal(*outputs[0][1:])


def test_a_pipelines_device_map(pipeline, draw, images, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, device_map="balanced")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again).to(CPU), images)


# --- no room ------------------------------------------------------------------------------------------------------


def test_out_of_memory_leaves_a_working_model(case, helpers):
    model = loaded(case).to(CUDA)
    expected = run(model, helpers)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 32 * 2**20) / total)
    try:
        arguments = helpers.moved(helpers.inputs(model), CUDA)
        x = arguments["hidden_states"]
        with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
            model(**{**arguments, "hidden_states": x.repeat(4096, *[1] * (x.ndim - 1))})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
    assert torch.equal(run(model, helpers), expected)
