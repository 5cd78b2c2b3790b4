"""What diffusers' own test suite asks of every quantizer, asked of ours, for both architectures.

The behaviours that other files test already are listed with theirs in docs/compatibility.md.
"""

import copy
import json

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel
from torch import nn

import dirotq
from dirotq.dirotq_core.build import quantized_linears, replace_linears
from dirotq.dirotq_core.layout import plan_sites
from dirotq.dirotq_core.linear import DiRotQLinear

from .versions import groups_on_cpu

ATTENTION = ("to_q", "to_k", "to_v")


# --- parameter and memory ratio -----------------------------------------------------------------------------------


def test_parameters_are_counted_as_in_the_dense_model(case):
    dense, model = case.load(case.dense), case.load()
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) < dense.num_parameters()  # packed weights are frozen
    model.dequantize()
    assert model.num_parameters() == dense.num_parameters()


def test_the_footprint_is_that_of_the_tensors(case):
    dense, model = case.load(case.dense), case.load()
    assert model.get_memory_footprint() < dense.get_memory_footprint() / 1.9  # narrow: embedders weigh much here
    kept = dense.get_memory_footprint() - sum(2 * m.in_features * m.out_features for m in linears(model))
    packed = sum(p.nbytes for m in linears(model) for n, p in m.named_parameters() if n != "bias")
    assert model.get_memory_footprint() == kept + packed


@pytest.mark.parametrize(
    ("cls", "shape", "ratio"),
    [
        (FluxTransformer2DModel, {"guidance_embeds": True}, 3.5),
        (PixArtTransformer2DModel, {"sample_size": 128, "caption_channels": 4096}, 2.2),  # cross-attention K, V stay
    ],
)
def test_the_footprint_at_the_real_shape(cls, shape, ratio):
    """The default rank, calibrated; no memory is taken."""
    with torch.device("meta"):
        dense = cls(**shape).to(torch.bfloat16)
    config = dirotq.DiRotQConfig().resolved(calibrated=True)
    before = dense.get_memory_footprint()
    replace_linears(dense, plan_sites(dense, config), config, torch.bfloat16)
    assert before / dense.get_memory_footprint() > ratio


def linears(model):
    return quantized_linears(model).values()


# --- dtypes -------------------------------------------------------------------------------------------------------


def test_casting_is_refused(case, helpers):
    model = case.load()
    expected = helpers.run(model)
    for cast in (
        lambda: model.to(torch.float16),
        lambda: model.to("cpu", torch.float16),
        lambda: model.to(device="cpu", dtype=torch.float16),
        model.float,
        model.half,
    ):
        with pytest.raises(ValueError, match="quantized model"):
            cast()
    for move in (("cpu",), (torch.bfloat16,), ("cpu", torch.bfloat16), (torch.zeros(1, dtype=torch.bfloat16),)):
        assert model.to(*move) is model
    assert torch.equal(helpers.run(model.to(device="cpu", dtype=torch.bfloat16, non_blocking=True)), expected)


def test_casts_that_diffusers_lets_through_change_no_bit(case, helpers):
    model = case.load()
    expected = helpers.run(model)
    stored = {n: p.clone() for n, p in model.named_parameters()}
    model.bfloat16()
    assert all(p.dtype == stored[n].dtype and torch.equal(p, stored[n]) for n, p in model.named_parameters())
    assert helpers.sqnr(helpers.run(model), expected) > 25  # PixArt's position embedding is a buffer, and cast
    model.double()
    own = {f"{n}.{k}" for n, m in quantized_linears(model).items() for k, _ in m.named_parameters() if k != "bias"}
    assert all((p.dtype == stored[n].dtype) == (n in own) for n, p in model.named_parameters())


@pytest.mark.parametrize("from_dense", [True, False], ids=["while loading", "from a checkpoint"])
def test_modules_kept_in_float32(case, tmp_path, monkeypatch, from_dense):
    """Neither class names any today; a list of its own must be kept to, and stay out of ours."""
    kept, packed = ("proj_out", "to_k") if "Pix" in case.cls.__name__ else ("x_embedder", "to_k")
    names = [kept, packed]
    monkeypatch.setattr(case.cls, "_keep_in_fp32_modules", names, raising=False)
    model = case.on_the_fly() if from_dense else case.load()
    if from_dense:  # what is float32 is not quantized, and the checkpoint says so
        assert not any(n.endswith(packed) for n in quantized_linears(model))
        model.save_pretrained(tmp_path)
        assert packed in json.loads((tmp_path / "config.json").read_text())["quantization_config"][
            "modules_to_not_convert"
        ]  # fmt: skip
        model = case.load(tmp_path)
    named = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and set(n.split(".")) & {*names}}
    assert named and all(m.weight.dtype == torch.float32 for m in named.values() if not isinstance(m, DiRotQLinear))
    assert names == [kept, packed]


# --- configuration, exclusions, device maps -----------------------------------------------------------------------


def test_the_configuration_is_serializable(case):
    config = case.load().config["quantization_config"]
    assert isinstance(config, dirotq.DiRotQConfig)
    assert json.loads(config.to_json_string()).items() <= json.loads(json.dumps(config.to_dict())).items()
    assert config.to_diff_dict().items() <= config.to_dict().items()
    assert dirotq.DiRotQConfig.from_dict(config.to_dict()) == config
    assert case.load().config["_pre_quantization_dtype"] == torch.bfloat16
    assert repr(config)


def test_excluded_modules_stay_dense_and_run(case, helpers):
    model = case.on_the_fly(dirotq.DiRotQConfig(modules_to_not_convert=["to_q"]))
    dense = {n for n, m in model.named_modules() if n.endswith(".to_q") and type(m) is nn.Linear}
    assert dense and not dense & quantized_linears(model).keys() and quantized_linears(model)
    assert torch.isfinite(helpers.run(model)).all()
    assert model.get_memory_footprint() > case.load().get_memory_footprint()


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_a_device_map_leaves_nothing_on_meta(case, device_map):
    for model in (case.load(device_map=device_map), case.on_the_fly(device_map=device_map)):
        assert {str(d) for d in model.hf_device_map.values()} == {"cpu"} and model.device.type == "cpu"
        tensors = [*model.named_parameters(), *model.named_buffers()]
        assert not [n for n, t in tensors if t.device.type != "cpu"]


# --- adapters -----------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A linear with a low-rank product beside it, zero at first, as training scripts outside PEFT make them."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(linear.in_features, 4, False), nn.Linear(4, linear.out_features, False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def small(p):
    return p.ndim == 1


@pytest.mark.parametrize("cast", [small, lambda p: p.is_floating_point()], ids=["small", "all"])
def test_training_beside_weights_cast_to_float32(case, helpers, cast):
    """Scripts freeze a quantized model and cast its norms and biases in place; PEFT's helper casts all floats."""
    model = case.load()
    expected = helpers.run(model)
    for p in model.parameters():
        p.requires_grad = False
        if cast(p):
            p.data = p.data.to(torch.float32)
    for module in list(model.modules()):
        for name in ATTENTION if "Attention" in type(module).__name__ else ():
            if hasattr(module, name):
                setattr(module, name, Adapter(getattr(module, name)))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(**helpers.inputs(model, torch.bfloat16))[0]
        y.norm().backward()
    assert helpers.sqnr(y.detach(), expected) > 25
    adapters = [m for m in model.modules() if isinstance(m, Adapter)]
    assert len(adapters) >= 6
    for adapter in adapters:
        gradient = adapter.up.weight.grad
        assert gradient is not None and torch.isfinite(gradient).all() and gradient.norm() > 0


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 0.01), (8, 0.1)])
def test_gradients_are_the_dense_models(case, helpers, bits, tolerance):
    """Of a LoRA's factors: at 16-bit activations those of the dequantized model, else within what activations cost."""
    import peft

    quantized = case.load(torch_dtype=torch.float32)
    dirotq.set_activation_bits(quantized, bits)
    dense = copy.deepcopy(quantized)
    dense.dequantize()
    gradients = []
    for model in (quantized, dense):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules=["to_q", "to_v", "ff.net.0.proj"], init_lora_weights=False)
        wrapped = peft.get_peft_model(model.requires_grad_(False), lora)
        model(**helpers.inputs(model, torch.float32))[0].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in wrapped.parameters() if p.requires_grad]))
    assert (gradients[0] - gradients[1]).norm() < tolerance * gradients[1].norm()


@pytest.mark.parametrize("upcast", [False, True])
def test_a_trained_adapter_is_saved_by_the_model(flux_case, tmp_path, upcast):
    import peft
    from safetensors.torch import load_file

    model = flux_case.load()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    dtypes = {n: p.dtype for n, p in model.named_parameters() if "lora" not in n}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.save_lora_adapter(tmp_path, upcast_before_saving=upcast)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(saved) == sum("lora" in n for n in before)
    for name, tensor in saved.items():
        assert torch.equal(tensor, before[name.replace(".weight", ".default.weight")].to(tensor.dtype))
        assert tensor.dtype == torch.float32 or not upcast
    assert {n: p.dtype for n, p in model.named_parameters() if "lora" not in n} == dtypes


def test_a_few_steps_of_training_reduce_the_loss(flux_case, helpers):
    import peft

    model = flux_case.load().requires_grad_(False)
    dirotq.set_activation_bits(model, 8)
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v", "proj_mlp"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    target = helpers.run(model) + 0.05
    losses = []
    for _ in range(8):
        loss = (model(**helpers.inputs(model))[0].float() - target).square().mean()
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


# --- compilation --------------------------------------------------------------------------------------------------


@pytest.mark.untraced
def test_compiled_once(case, helpers):
    """One graph, and no second one for other values, another thread's flags or bits that come back."""
    model = case.load()
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    arguments = helpers.inputs(model)
    with torch.no_grad():
        first = model(**arguments)[0]
        with torch._dynamo.config.patch(error_on_recompile=True):
            arguments = {k: v + 0.25 if k == "hidden_states" else v for k, v in arguments.items()}
            assert torch.equal(model(**arguments)[0], twin(**arguments)[0])
            assert not torch.equal(model(**arguments)[0], first)


@pytest.mark.untraced
@pytest.mark.thorough
@groups_on_cpu
def test_compiled_with_group_offload(case, helpers):
    """Single layers in FLUX.1, which is the harder of the two and slow to trace, and blocks in PixArt."""
    model = case.load()
    expected = helpers.run(model)
    torch._dynamo.reset()
    level = {"offload_type": "leaf_level"}
    if "PixArt" in case.cls.__name__:
        level = {"offload_type": "block_level", "num_blocks_per_group": 1}
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **level)
    model.compile(backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1000):
        for _ in range(2):
            assert torch.equal(helpers.run(model), expected)
