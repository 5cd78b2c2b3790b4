"""`dirotq convert` there and back: every byte of what diffusers and ComfyUI's nodes write."""

import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

import dirotq
from dirotq import CheckpointError
from dirotq.dirotq_core.inspect import inspect_checkpoint
from dirotq.dirotq_core.report import QuantizationReport
from dirotq.dirotq_core.safetensors_file import write_safetensors
from dirotq.dirotq_core.single_file import convert, folder_notes, read_native, write_native
from dirotq.dirotq_core.single_file.folder_notes import FOLDER_KEY, FolderNotes
from dirotq.dirotq_core.single_file.read import read_metadata
from dirotq.dirotq_core.solve import LinearReport

from .test_native_layout import flux


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    dense = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    flux().save_pretrained(dense)
    return FluxTransformer2DModel.from_pretrained(
        dense, quantization_config=dirotq.DiRotQConfig(), torch_dtype=torch.bfloat16
    )


def measured(model):
    """A report in which each linear has an SQNR of its own."""
    rows = inspect_names(model)
    return QuantizationReport(
        "dirotq", 8, [LinearReport(n, 9, 0.5, 20.0, None, 20 + i / 7) for i, n in enumerate(rows)]
    )


def inspect_names(model):
    return [n for n, m in model.named_modules() if type(m).__name__ == "DiRotQLinear"]


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def there_and_back(source, tmp_path):
    convert(source, tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    return tmp_path / "back"


@pytest.mark.parametrize("report", [False, True], ids=["", "report"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "200KB"}, {"variant": "w4a8"}], ids=str)
def test_a_folder_of_diffusers(model, tmp_path, options, report):
    source = tmp_path / "source"
    model.save_pretrained(source, **options)
    if report:
        measured(model).save(source)
    assert files_of(there_and_back(source, tmp_path)) == files_of(source)


def test_the_report_beside_a_pipeline(model, tmp_path):
    source = tmp_path / "pipe" / "transformer"
    model.save_pretrained(source)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    report = measured(model).save(tmp_path / "pipe")
    back = there_and_back(tmp_path / "pipe", tmp_path)
    assert files_of(back) == files_of(source) | {report.name: report.read_bytes()}


@pytest.mark.parametrize("known", [True, False], ids=["report", ""])
@pytest.mark.parametrize("limit", [None, 200_000], ids=["", "shards"])
def test_a_file_of_comfyui(model, tmp_path, monkeypatch, known, limit):
    model.save_pretrained(tmp_path / "folder")
    native = read_native(tmp_path / "folder")
    decibels = {name: 20 + i / 7 for i, name in enumerate(native.plans)} if known else None
    write_native(tmp_path / "one.safetensors", native.tensors, native.config, decibels)
    if limit:  # a file above it has shards of which it does not know yet
        monkeypatch.setattr(folder_notes, "SHARD_BYTES", limit)
    folder = convert(tmp_path / "one.safetensors", tmp_path / "back")
    assert len(list(folder.glob("*.safetensors"))) > (3 if limit else 0)
    again = convert(folder, tmp_path / "again.safetensors")
    if limit:
        assert files_of(convert(again, tmp_path / "twice")) == files_of(folder)
    else:
        assert again.read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_what_was_measured_is_shown_on_both_sides(model, tmp_path):
    source, report = tmp_path / "source", measured(model)
    model.save_pretrained(source)
    report.save(source)
    of = {r.name: r.output_db for r in report.linears}
    file = {r.name: r.output_db for r in inspect_checkpoint(convert(source, tmp_path / "one.safetensors")).rows}
    assert None not in file.values()
    name = "transformer_blocks.0.attn."  # together they have at least the lowest of them
    assert file["double_blocks.0.img_attn.qkv"] == round(min(of[name + p] for p in ("to_q", "to_k", "to_v")), 2)

    native = read_native(source)
    write_native(tmp_path / "comfy.safetensors", native.tensors, native.config, file)
    rows = inspect_checkpoint(convert(tmp_path / "comfy.safetensors", tmp_path / "comfy")).rows
    assert {r.output_db for r in rows} == set(file.values())
    assert {r.output_db for r in rows if r.name.startswith(name + "to_") and "out" not in r.name} == {
        file["double_blocks.0.img_attn.qkv"]
    }


def test_what_was_not_measured_is_left_out(model, tmp_path):
    report = measured(model)
    report.linears = [replace(r, output_db=v) for r, v in zip(report.linears, [None, math.nan, 30.0], strict=False)]
    model.save_pretrained(tmp_path / "source")
    report.save(tmp_path / "source")
    assert files_of(there_and_back(tmp_path / "source", tmp_path)) == files_of(tmp_path / "source")


def test_tensors_stand_in_the_order_of_safetensors(tmp_path):
    kinds = [torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int16, torch.uint16]
    kinds += [torch.float16, torch.bfloat16, torch.int32, torch.uint32, torch.float32, torch.float64, torch.int64]
    tensors = {f"{name}{i}": torch.zeros(3, dtype=kind) for i, kind in enumerate(kinds) for name in "ba"}
    write_safetensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def index(weight_map):
    return json.dumps({"index": json.dumps({"weight_map": weight_map})})


@pytest.mark.parametrize(
    "notes, message",
    [
        ("[]", "must hold a JSON object"),
        ("{", "not valid JSON"),
        ('{"report": 1}', "no strings"),
        ('{"surprise": "1"}', "surprise"),
        ('{"index": "["}', "not valid JSON"),
        (index([]), "no weight_map"),
        (index({"a": 1}), "no weight_map"),
        (index({"a": "../x.safetensors"}), r"no \.safetensors file of its own folder"),
        (index({"a": "x.safetensors"}), "missing tensor"),
        ('{"weights": "/tmp/x.safetensors"}', r"no \.safetensors file of its own folder"),
    ],
)
def test_hostile_notes(model, tmp_path, notes, message):
    model.save_pretrained(tmp_path / "source")
    one = convert(tmp_path / "source", tmp_path / "one.safetensors")
    save_file(load_file(one), one, read_metadata(one)[0] | {FOLDER_KEY: notes})
    with pytest.raises(CheckpointError, match=message) as error:
        convert(one, tmp_path / "back")
    assert "one.safetensors" in str(error.value) and not (tmp_path / "back").exists()


def test_a_broken_report_is_named(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "dirotq_report.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"dirotq_report\.json is no report"):
        convert(tmp_path / "source", tmp_path / "one.safetensors")


def test_notes_of_nothing_are_not_written():
    assert FolderNotes().to_json() is None
