"""Headers of safetensors files: every broken one raises an error that names the file, the tensor and the rule."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dirotq import CheckpointError
from dirotq.dirotq_core.files import check_files, checkpoint_files, read_headers, read_json

NAME = "diffusion_pytorch_model.safetensors"


def write(folder, header, data=b"", name=NAME, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / name
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_what_safetensors_writes_is_read(tmp_path):
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.ones(0, 4, dtype=torch.int8)}
    save_file(tensors, tmp_path / NAME, metadata={"format": "pt"})
    entries = read_headers([tmp_path / NAME])
    assert {n: (e.shape, e.dtype, e.bytes) for n, e in entries.items()} == {
        n: (tuple(t.shape), t.dtype, t.nbytes) for n, t in tensors.items()
    }


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, bytes(7), "tensor 'a' ends at byte 8 of the data, of which the file has 7; it is truncated"),
        ({"a": entry(offsets=(0, 800))}, bytes(8), "tensor 'a' has 800 bytes, but F32 of shape [2] takes 8"),
        ({"a": entry(offsets=(8, 0))}, bytes(8), "tensor 'a' has data_offsets [8, 0], not [begin, end] with"),
        ({"a": entry(offsets=(-8, 0))}, bytes(8), "tensor 'a' has data_offsets [-8, 0], not [begin, end] with"),
        ({"a": entry(offsets=(0, 4, 8))}, bytes(8), "tensor 'a' has data_offsets [0, 4, 8]"),
        ({"a": entry(offsets=(0, 8.0))}, bytes(8), "tensor 'a' has data_offsets [0, 8.0]"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "tensor 'b' overlaps 'a'"),
        ({"a": entry(), "b": entry(offsets=(9, 17))}, bytes(17), "1 bytes before tensor 'b' belong to no tensor"),
        ({"a": entry()}, bytes(11), "3 bytes after the last tensor belong to no tensor"),
        ({"a": entry(dtype="F33")}, bytes(8), "tensor 'a' has the unknown dtype 'F33'"),
        ({"a": entry(dtype=["F32"])}, bytes(8), "tensor 'a' has the unknown dtype ['F32']"),
        ({"a": entry(shape=(-2,))}, bytes(8), "tensor 'a' has shape [-2], not a list of non-negative integers"),
        ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), "tensor 'a' has shape None"),
        ({"a": 3}, b"", "tensor 'a' has no header entry of dtype, shape and data_offsets"),
        ([1], b"", "its header must hold a JSON object, not a list"),
        (b'{"a": ', b"", "its header is not valid JSON"),
        (b"\xff\xfe", b"", "its header is not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "its header names 'a' twice"),
    ],
)
def test_a_broken_header_is_named(tmp_path, header, data, message):
    path = write(tmp_path, header, data)
    with pytest.raises(CheckpointError) as error:
        read_headers([path])
    assert str(path) in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("length", [0, 3, 2**40, 2**64 - 1])
def test_a_header_longer_than_the_file(tmp_path, length):
    path = write(tmp_path, b"{", length=length) if length else tmp_path / NAME
    path.touch()
    with pytest.raises(CheckpointError, match=f"{NAME} is truncated or no safetensors file: its header claims"):
        read_headers([path])


@given(cut=st.integers(min_value=0))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_truncation_is_seen(tmp_path, cut):
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.ones(9), "b": torch.ones(3, 2)}, whole)
    data = whole.read_bytes()
    path = tmp_path / NAME
    path.write_bytes(data[: cut % len(data)])
    with pytest.raises(CheckpointError, match=NAME):
        read_headers([path])


def test_one_tensor_in_two_files(tmp_path):
    files = [write(tmp_path, {"a": entry()}, bytes(8), name) for name in ("x.safetensors", "y.safetensors")]
    with pytest.raises(CheckpointError, match=r"tensor 'a' is in .*x\.safetensors and in .*y\.safetensors"):
        read_headers(files)


def test_which_files_are_the_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="has no safetensors file"):
        checkpoint_files(tmp_path)
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").touch()
    assert [f.name for f in checkpoint_files(tmp_path)] == ["diffusion_pytorch_model.fp16.safetensors"]
    (tmp_path / NAME).touch()
    assert [f.name for f in checkpoint_files(tmp_path)] == [NAME]
    index = tmp_path / f"{NAME}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "absent.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"absent\.safetensors is missing"):
        checkpoint_files(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json has no weight_map"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "must hold a JSON object, not a list"), ("{", "is not valid JSON"), ('{"a": 1, "a": 1}', "'a' twice")],
)
def test_bad_json_names_the_file(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json .*{message}"):
        read_json(tmp_path / "config.json")


def test_values_are_checked_from_the_files(tmp_path):
    spec = {"x.weight": ((2, 2), torch.uint8), "norm.weight": ((2,), None)}
    tensors = {"x.weight": torch.zeros(2, 2, dtype=torch.uint8), "norm.weight": torch.ones(2, dtype=torch.float16)}
    save_file(tensors, tmp_path / NAME)
    check_files([tmp_path / NAME], spec)
    save_file(tensors | {"norm.weight": torch.tensor([0.0, float("nan")])}, tmp_path / NAME)
    with pytest.raises(CheckpointError, match=r"tensor 'norm\.weight' holds NaN or infinity"):
        check_files([tmp_path / NAME], spec)
    save_file(tensors | {"norm.weight": torch.zeros(2, dtype=torch.int32)}, tmp_path / NAME)
    with pytest.raises(CheckpointError, match=r"tensor 'norm\.weight' has dtype torch\.int32, expected a floating"):
        check_files([tmp_path / NAME], spec)
