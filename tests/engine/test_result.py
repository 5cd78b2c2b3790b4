"""What the engine writes: the same codes as in memory, loadable by diffusers, wherever its inputs wait."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import dirotq
from dirotq.dirotq_core.build import quantized_linears
from dirotq.dirotq_core.demo.embedded import load_pipeline
from dirotq.dirotq_core.engine import output
from dirotq.dirotq_core.inspect import inspect_checkpoint
from dirotq.dirotq_core.report import QuantizationReport
from dirotq.dirotq_core.single_file import convert

from ..marks import thorough
from .conftest import CAPTIONS, tree

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("short", "calibrated"),
    [
        ("pixart-sigma-tiny", True), ("flux-tiny", False),
        thorough("flux-tiny", True),
        thorough("pixart-sigma-tiny", False),
    ],
    indirect=["short"],
)  # fmt: skip
def test_the_same_codes_as_in_memory(short, calibrated, tmp_path):
    """From the same statistics: every step of every prompt, one prompt at a time, blocks fed by dense blocks."""
    prompts = CAPTIONS if calibrated else []
    # The widest take longest.
    config = {"modules_to_not_convert": ["ff.net.2"]}
    report = short.run(tmp_path / "out", config, prompts, sequential=False, draw_batch=1)
    pipeline = load_pipeline(short.model.name, torch_dtype=torch.bfloat16)
    expected = dirotq.quantize(pipeline, dirotq.DiRotQConfig(**config), prompts, call=short.call, progress=False)
    assert report == expected == QuantizationReport.load(tmp_path / "out")
    pipeline.transformer.save_pretrained(tmp_path / "memory")
    ours, theirs = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "memory" / WEIGHTS.split("/")[1])
    assert ours.keys() == theirs.keys()
    assert all(ours[n].dtype == t.dtype and torch.equal(ours[n], t) for n, t in theirs.items())
    config = json.loads((tmp_path / "memory" / "config.json").read_text())
    del config["_name_or_path"]
    assert json.loads((tmp_path / "out" / "transformer" / "config.json").read_text()) == config


def test_sequential_result_loads_and_draws(short, tmp_path):
    report = short.run(tmp_path / "out")
    assert all(r.tokens > 0 and r.output_db > 8 for r in report.linears), report
    assert len(report.linears) == len(inspect_checkpoint(tmp_path / "out").rows)
    assert (tmp_path / "out" / output.PLOT_NAME).is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    pipeline = getattr(diffusers, short.model.pipeline).from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    assert len(quantized_linears(pipeline.transformer)) == len(report.linears)
    draw = {**short.call, "generator": torch.Generator().manual_seed(1), "output_type": "latent"}
    assert torch.isfinite(pipeline(CAPTIONS[0], **draw).images).all()


def test_sequential_differs_from_parallel_after_the_first_block(flux, undisturbed, tmp_path):
    flux.run(tmp_path / "parallel", sequential=False)
    a, b = load_file(undisturbed / WEIGHTS), load_file(tmp_path / "parallel" / WEIGHTS)
    changed = {n.rpartition(".")[0] for n in a if not torch.equal(a[n], b[n])}
    assert changed and not any(n.startswith("transformer_blocks.0.") for n in changed)


def test_where_inputs_wait_does_not_show(flux, reference, tmp_path):
    flux.run(tmp_path / "out", max_host_memory=1e-6)
    assert tree(tmp_path / "out") == reference


def test_shards_in_and_out(flux, reference, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(flux.model.folder, source)
    dense = load_pipeline(flux.model.name, torch_dtype=torch.bfloat16).transformer
    shutil.rmtree(source / "transformer")
    dense.save_pretrained(source / "transformer", max_shard_size="2MB")
    assert len(list((source / "transformer").glob("*.safetensors"))) > 2
    flux.run(tmp_path / "one", source=source)
    assert tree(tmp_path / "one")[WEIGHTS] == reference[WEIGHTS]
    monkeypatch.setattr(output, "SHARD_BYTES", 1_000_000)
    flux.run(tmp_path / "many", source=source)
    shards = list((tmp_path / "many" / "transformer").glob("*.safetensors"))
    assert len(shards) > 1 and all(f.stat().st_size < 1_100_000 for f in shards)
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "many" / "transformer").state_dict()
    one = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "one" / "transformer").state_dict()
    assert loaded.keys() == one.keys() and all(torch.equal(loaded[n], t) for n, t in one.items())


@pytest.mark.parametrize("limit", [None, 1_000_000], ids=["one file", "shards"])
def test_converted_there_and_back(flux, tmp_path, monkeypatch, limit):
    if limit:
        monkeypatch.setattr(output, "SHARD_BYTES", limit)
    flux.run(tmp_path / "out", prompts=CAPTIONS[:2], transformer_only=True)
    one = convert(tmp_path / "out", tmp_path / "one.safetensors")
    back = convert(one, tmp_path / "back")
    assert convert(back, tmp_path / "again.safetensors").read_bytes() == one.read_bytes()
    written = {n: d for n, d in tree(tmp_path / "out").items() if n not in ("README.md", output.PLOT_NAME)}
    assert tree(back) == written and "dirotq_report.json" in written and len(written) > (4 if limit else 2)
    assert any(row.output_db for row in inspect_checkpoint(one).rows)


def test_fewer_tokens_and_more_images_than_prompts(flux, tmp_path):
    report = flux.run(
        tmp_path / "out", samples=6, draw_batch=4, prompts=CAPTIONS[:2], tokens_per_sample=16, transformer_only=True
    )
    by_name = {r.name: r.tokens for r in report.linears}
    assert by_name["transformer_blocks.0.attn.to_q"] == 5 * 2 * 16
    assert by_name["transformer_blocks.0.norm1.linear"] == 5 * 2
    assert (tmp_path / "out" / "config.json").is_file()


def test_float32(flux, tmp_path):
    flux.run(tmp_path / "out", prompts=[], config={}, dtype=torch.float32, transformer_only=True)
    tensors = load_file(tmp_path / "out" / WEIGHTS.split("/")[1])
    assert tensors["x_embedder.weight"].dtype == torch.float32


def test_other_methods(flux, tmp_path):
    for method in ("paper", "svdquant"):
        report = flux.run(tmp_path / method, {"method": method}, transformer_only=True)
        assert report.median_output_db > 8
