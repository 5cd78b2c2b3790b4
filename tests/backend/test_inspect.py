"""`inspect_checkpoint` refuses what `from_pretrained` refuses, and names the file."""

import json
import shutil

import pytest

from dirotq import CheckpointError
from dirotq.dirotq_core.inspect import format_table, inspect_checkpoint
from dirotq.dirotq_core.report import REPORT_NAME, QuantizationReport

NAME = "diffusion_pytorch_model.safetensors"


def test_totals_are_those_of_the_file(case):
    result = inspect_checkpoint(case.quantized)
    header = int.from_bytes((case.quantized / NAME).read_bytes()[:8], "little")
    assert result.total_bytes == (case.quantized / NAME).stat().st_size - 8 - header


def test_shards_are_followed(case, tmp_path):
    case.load().save_pretrained(tmp_path, max_shard_size="200KB")
    shutil.copy(case.quantized / NAME, tmp_path / "stray.safetensors")
    assert inspect_checkpoint(tmp_path).total_bytes == inspect_checkpoint(case.quantized).total_bytes


def test_tensors_that_do_not_fit(copy, broken):
    change, message = broken
    folder = copy(change)
    if "holds" in message:  # values are not read
        inspect_checkpoint(folder)
        return
    with pytest.raises(CheckpointError) as error:
        inspect_checkpoint(folder)
    assert message in str(error.value)


def test_truncated(copy):
    folder = copy()
    data = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(data[:-1000])
    with pytest.raises(CheckpointError, match=rf"{NAME}: tensor '.*' ends at byte .* it is truncated"):
        inspect_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold a JSON object, not a list"),
        ('{"a": ', "is not valid JSON"),
        ('{"quantization_config": [1]}', "quantization_config must be a JSON object"),
        ('{"quantization_config": {"a": 1}}', "has quant_method None"),
        ('{"quantization_config": {"quant_method": "dirotq", "format_version": 9}}', "format_version 9 is newer"),
        ('{"quantization_config": {"quant_method": "dirotq"}}', "_class_name is None"),
        ('{"quantization_config": {"quant_method": "dirotq"}, "_class_name": ["x"]}', "_class_name is ['x']"),
        ('{"quantization_config": {"quant_method": "dirotq"}, "_class_name": "DDPMScheduler"}', "no model class"),
    ],
)
def test_bad_configurations(copy, text, message):
    folder = copy()
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        inspect_checkpoint(folder)
    assert message in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize("key", ["num_layers", "attention_head_dim"])
def test_a_model_that_cannot_be_made(copy, key):
    folder = copy()
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {key: "many"}))
    with pytest.raises(CheckpointError, match=r"config\.json: FluxTransformer2DModel cannot be made with these"):
        inspect_checkpoint(folder)


def measured(folder, *, db):
    from dirotq.dirotq_core.solve import LinearReport

    name = inspect_checkpoint(folder).rows[0].name
    fields = dict.fromkeys(LinearReport.__dataclass_fields__) | {"name": name, "output_db": db}
    return QuantizationReport("hadamard", 8, [LinearReport(**fields)])


def test_a_report_of_the_folder_above_is_not_ours(copy):
    folder = copy()
    measured(folder, db=12.5).save(folder.parent)
    assert {r.output_db for r in inspect_checkpoint(folder).rows} == {None}
    (folder.parent / "model_index.json").write_text("{}")  # a pipeline, of which this is not the transformer
    assert {r.output_db for r in inspect_checkpoint(folder).rows} == {None}


@pytest.mark.parametrize("path", ["", "transformer", "transformer/../transformer"])
def test_a_report_of_the_pipeline_is_ours(copy, tmp_path, path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(copy(), pipeline / "transformer")
    (pipeline / "model_index.json").write_text("{}")
    measured(pipeline / "transformer", db=12.5).save(pipeline)
    assert inspect_checkpoint(pipeline / path).rows[0].output_db == 12.5


@pytest.mark.parametrize("text", ["[]", "{", '{"method": "x"}', '{"method":1,"activation_bits":1,"linears":[{"x":1}]}'])
def test_a_broken_report_is_named(copy, text):
    folder = copy()
    (folder / REPORT_NAME).write_text(text)
    with pytest.raises(ValueError, match=rf"{REPORT_NAME} is no report"):
        inspect_checkpoint(folder)


def test_limit(case):
    result = inspect_checkpoint(case.quantized)
    assert f"… and {len(result.rows) - 1} more" in format_table(result, 1)
    with pytest.raises(ValueError, match="limit must be at least 0, got -1"):
        format_table(result, -1)
