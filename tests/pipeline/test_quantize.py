"""`dirotq.quantize` and what users do with its result, on the embedded models."""

import shutil

import diffusers
import pytest
import torch
from accelerate.utils import align_module_device
from diffusers import PipelineQuantizationConfig
from diffusers.quantizers.base import DiffusersQuantizer
from safetensors.torch import load_file, save_file

import dirotq
import dirotq.dirotq_core.quantize as quantize_module
from dirotq.dirotq_core import backend
from dirotq.dirotq_core.build import quantized_linears

from .. import processes
from ..marks import thorough


def test_every_planned_linear_is_reported(embedded):
    linears = quantized_linears(embedded.quantized.transformer)
    assert [r.name for r in embedded.report.linears] and {r.name for r in embedded.report.linears} == set(linears)
    for r in embedded.report.linears:
        assert r.tokens > 0 and r.weight_db > 15 and r.output_db > 10, r
        assert (r.energy is not None and 0.3 < r.energy <= 1) == linears[r.name].plan.quantize_input
    assert embedded.report.median_output_db > 25


def test_reloaded_checkpoint_draws_the_same_bits(embedded):
    cls = getattr(diffusers, embedded.model.pipeline)
    reloaded = cls.from_pretrained(embedded.folder, torch_dtype=torch.bfloat16)
    assert torch.equal(embedded.draw(reloaded), embedded.draw(embedded.quantized))


def test_reloaded_in_a_new_process(pixart):
    """Plain `from_pretrained` after `import dirotq`, nothing else."""
    code = (
        "import dirotq, torch, sys\n"
        "from diffusers import PixArtSigmaPipeline\n"
        f"pipe = PixArtSigmaPipeline.from_pretrained({str(pixart.folder)!r}, torch_dtype=torch.bfloat16)\n"
        "from dirotq.dirotq_core.linear import DiRotQLinear\n"
        "assert isinstance(pipe.transformer.transformer_blocks[0].ff.net[2], DiRotQLinear)\n"
        "assert pipe.transformer.transformer_blocks[0].ff.net[2].activation_bits == 4\n"
    )
    done = processes.run(code)
    assert done.returncode == 0, done.stderr


def test_images_stay_close(embedded):
    dense = embedded.draw(embedded.load()).float()
    quantized = embedded.draw(embedded.quantized).float()
    assert (dense - quantized).square().mean() < 0.05 * dense.square().mean()


@pytest.mark.parametrize("granular", [True, False], ids=["quant_mapping", "quant_backend"])
def test_pipeline_quantization_config(pixart, granular):
    if granular:
        config = PipelineQuantizationConfig(quant_mapping={"transformer": dirotq.DiRotQConfig(method="hadamard")})
    else:
        config = PipelineQuantizationConfig(
            quant_backend="dirotq", quant_kwargs={"method": "hadamard"}, components_to_quantize=["transformer"]
        )
    pipeline = diffusers.PixArtSigmaPipeline.from_pretrained(
        pixart.model.folder, quantization_config=config, torch_dtype=torch.bfloat16
    )
    linears = quantized_linears(pipeline.transformer)
    assert linears and all(m.plan.method == "hadamard" for m in linears.values())
    assert torch.isfinite(pixart.draw(pipeline)).all()


def test_a_failure_leaves_the_pipeline_as_it_was(pixart, monkeypatch):
    pipeline = pixart.load()
    before = {n: p.clone() for n, p in pipeline.transformer.named_parameters()}
    import dirotq.dirotq_core.quantize as module

    calls = []

    def fail_late(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original = module.solve_site
    monkeypatch.setattr(module, "solve_site", fail_late)
    with pytest.raises(KeyboardInterrupt):
        dirotq.quantize(pipeline, None, pixart.captions[:2], call=pixart.call, progress=False)
    after = dict(pipeline.transformer.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(after[n], p) for n, p in before.items())
    assert not any(m._forward_pre_hooks for m in pipeline.transformer.modules())
    assert not getattr(pipeline.transformer, "is_quantized", False)


def test_data_free_through_quantize(pixart):
    pipeline = pixart.load()
    report = dirotq.quantize(pipeline, progress=False)
    assert report.activation_bits == 8 and all(r.output_db is None for r in report.linears)
    assert torch.isfinite(pixart.draw(pipeline)).all()


def test_bad_calls(pixart):
    with pytest.raises(ValueError, match="is quantized already"):
        dirotq.quantize(pixart.quantized, None, ["x"])
    with pytest.raises(ValueError, match="must be a list of strings"):
        dirotq.quantize(pixart.load(), None, "one string")
    with pytest.raises(ValueError, match="needs calibration data"):
        dirotq.quantize(pixart.load(), dirotq.DiRotQConfig(method="paper"))


def test_too_few_tokens_are_remarked(pixart):
    pipeline = pixart.load()
    config = dirotq.DiRotQConfig(basis="pca", rounding="nearest")  # quick
    report = dirotq.quantize(
        pipeline, config, pixart.captions[:2], call={**pixart.call, "num_inference_steps": 2}, progress=False
    )
    assert any("calibration tokens for" in note for note in report.notes())


@pytest.mark.parametrize("method", ["paper", "svdquant", thorough("rtn"), thorough("hadamard")])
def test_every_method_round_trips(pixart, method, tmp_path):
    pipeline = pixart.load()
    report = dirotq.quantize(
        pipeline, dirotq.DiRotQConfig(method=method), pixart.captions[:4], call=pixart.call, progress=False
    )
    assert report.median_output_db > 12
    pipeline.transformer.save_pretrained(tmp_path)
    reloaded = type(pipeline.transformer).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    expected = pixart.draw(pipeline)
    pipeline.transformer = reloaded
    assert torch.equal(pixart.draw(pipeline), expected)


def test_weight_only_modules(pixart):
    """The paper's published PixArt row keeps ff.net.2's activations in 16 bit."""
    pipeline = pixart.load()
    config = dirotq.DiRotQConfig(method="paper", weight_only_modules=["ff.net.2"])
    dirotq.quantize(pipeline, config, pixart.captions[:2], call=pixart.call, progress=False)
    bits = {n: m.activation_bits for n, m in quantized_linears(pipeline.transformer).items()}
    assert all((b == 16) == n.endswith("ff.net.2") for n, b in bits.items())
    dirotq.set_activation_bits(pipeline, 8)
    assert {m.activation_bits for m in quantized_linears(pipeline.transformer).values()} == {8, 16}


@pytest.mark.skipif(not hasattr(DiffusersQuantizer, "maybe_update_loaded_keys"), reason="needs diffusers 0.39")
def test_disk_offload_keeps_every_bit(pixart, tmp_path):
    """Also in float16, which cannot hold bfloat16's smallest numbers."""
    folder = tmp_path / "copy"
    shutil.copytree(pixart.folder / "transformer", folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith(".low_rank"))
    tensors[name][:] = 1e-9
    save_file(tensors, file, metadata={"format": "pt"})
    cls = type(pixart.quantized.transformer)
    plain = cls.from_pretrained(folder, torch_dtype=torch.float16)
    offloaded = cls.from_pretrained(
        folder, torch_dtype=torch.float16, device_map={"": "disk"}, offload_folder=str(tmp_path / "offload")
    )
    for name, module in offloaded.named_modules():
        with align_module_device(module):
            for leaf, p in module.named_parameters(recurse=False):
                expected = plain.get_parameter(f"{name}.{leaf}" if name else leaf)
                assert p.dtype == expected.dtype and torch.equal(p, expected), (name, leaf)


def test_the_hint_at_eight_bits_is_given_after_quantize(pixart, monkeypatch, caplog):
    pipeline = pixart.load()
    backend._hint_at_eight_bits.cache_clear()
    install = quantize_module.install_all

    def with_gpu(*args):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        install(*args)

    monkeypatch.setattr(quantize_module, "install_all", with_gpu)
    dirotq.quantize(pipeline, dirotq.DiRotQConfig(activation_bits=4), progress=False)
    assert "set_activation_bits(model, 8)" in caplog.text
    backend._hint_at_eight_bits.cache_clear()
