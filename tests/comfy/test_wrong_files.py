"""Load DiRotQ Model on files that it cannot read: one sentence, and the server goes on."""

import json
import pickle
import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from . import graphs, models
from .graphs import node
from .server import GraphError


def load(name):
    return {
        "load": graphs.four_bit(name),
        "info": node("DiRotQModelInfo", checkpoint="", limit=0, model=["load", 0]),
    }


def quantized(folder):
    """(tensors, metadata) of a good single file."""
    from dirotq.dirotq_core.single_file import read_native

    checkpoint = read_native(folder / models.FLUX_4BIT)
    return checkpoint.tensors, {"dirotq": json.dumps(checkpoint.config)}


def pickled(folder, path):
    torch.save({"weight": torch.zeros(2)}, path)


def old_pickle(folder, path):
    path.write_bytes(pickle.dumps({"weight": [0.0] * 99}, protocol=2))


def gguf(folder, path):
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + bytes(64))


def fp8(folder, path):
    weight = torch.zeros(8, 8, dtype=torch.float8_e4m3fn)
    save_file({"double_blocks.0.img_attn.qkv.weight": weight, "scaled_fp8": torch.zeros(0)}, path)


def dense(folder, path):
    path.symlink_to(folder / models.FLUX)


def stripped(folder, path):
    save_file(quantized(folder)[0], path)


def other_architecture(folder, path):
    tensors, metadata = quantized(folder)
    config = json.loads(metadata["dirotq"]) | {"_class_name": "UNet2DConditionModel"}
    save_file(tensors, path, {"dirotq": json.dumps(config)})


def no_model(folder, path):
    tensors, metadata = quantized(folder)
    config = json.loads(metadata["dirotq"]) | {"_class_name": "os.system"}
    save_file(tensors, path, {"dirotq": json.dumps(config)})


def newer_format(folder, path):
    tensors, metadata = quantized(folder)
    config = json.loads(metadata["dirotq"])
    config["quantization_config"]["format_version"] = 99
    save_file(tensors, path, {"dirotq": json.dumps(config)})


def bad_configuration(folder, path):
    tensors, _ = quantized(folder)
    save_file(tensors, path, {"dirotq": "{"})


def corrupt_header(folder, path):
    path.write_bytes(struct.pack("<Q", 64) + b"{" + b"\xff" * 63 + bytes(16))


def truncated(folder, path):
    whole = path.with_suffix(".whole")
    save_file(*quantized(folder)[:1], whole, quantized(folder)[1])
    path.write_bytes(whole.read_bytes()[:-1000])
    whole.unlink()


def empty(folder, path):
    path.write_bytes(b"")


def nan(folder, path):
    tensors, metadata = quantized(folder)
    bias = tensors["img_in.bias"].clone()
    bias[3] = float("nan")
    save_file(tensors | {"img_in.bias": bias}, path, metadata)


def lacking(folder, path):
    tensors, metadata = quantized(folder)
    save_file({n: t for n, t in tensors.items() if n != "img_in.bias"}, path, metadata)


@pytest.mark.parametrize(
    ("make", "suffix", "message"),
    [
        (pickled, ".ckpt", "is a pickle, which is never opened; DiRotQ checkpoints are .safetensors files"),
        (old_pickle, ".pt", "is a pickle, which is never opened; DiRotQ checkpoints are .safetensors files"),
        (gguf, ".safetensors", "is a GGUF file, not a DiRotQ checkpoint"),
        (fp8, ".safetensors", "is not a DiRotQ checkpoint, but a model quantized in another way; use the loader .*"),
        (dense, ".safetensors", "is not a DiRotQ checkpoint, but a model that is not quantized; use 'Load Diff.*"),
        (stripped, ".safetensors", "is not a DiRotQ checkpoint, but tensors of one without their configuration, .*"),
        (other_architecture, ".safetensors", ".*UNet2DConditionModel.*"),
        (no_model, ".safetensors", "_class_name is 'os.system', which is no model class of diffusers"),
        (newer_format, ".safetensors", ".*format_version.*99.*"),
        (bad_configuration, ".safetensors", "the configuration in its header is not valid JSON: .*"),
        (corrupt_header, ".safetensors", "its header is not valid JSON: .*"),
        (truncated, ".safetensors", "tensor '.*' ends at byte .* it is truncated"),
        (empty, ".safetensors", ".*truncated or no safetensors file.*"),
        (nan, ".safetensors", "tensor 'x_embedder.bias' holds NaN or infinity"),
        (lacking, ".safetensors", "checkpoint does not fit its configuration: 1 missing tensor: 'x_embedder.bias'"),
    ],
)
def test_one_sentence(client, server, make, suffix, message):
    folder = client.base / "models" / "diffusion_models"
    path = folder / f"wrong-{make.__name__}{suffix}"
    make(folder, path)
    try:
        with pytest.raises(GraphError) as failed:
            client.run(load(path.name))
    finally:
        path.unlink()
    found = str(failed.value)
    assert failed.value.node == "DiRotQLoadModel" and server.alive
    assert found.startswith(str(path)) and "\n" not in found
    assert re.fullmatch(message, found.removeprefix(str(path)).lstrip(": ")), found


def test_a_file_that_is_not_there(client):
    with pytest.raises(
        GraphError, match=r"'absent\.safetensors' is not in /.*; choose another model_name, or give the"
    ):
        client.run(load("absent.safetensors"))
    with pytest.raises(GraphError, match="choose a model_name or give a repo_id"):
        client.run(load("(none)"))


def test_a_header_as_long_as_a_pickle_begins(client):
    """The length of a header comes first, and its bytes may be those that a pickle begins with."""
    from dirotq.dirotq_core.single_file import read_native

    folder = client.base / "models" / "diffusion_models"
    path = folder / "unlucky.safetensors"
    tensors, metadata = quantized(folder)
    save_file(tensors, path, metadata)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    padded = (length | 0xFFFF) + 1 + 0x0280  # 80 02 as the length's first bytes
    path.write_bytes(padded.to_bytes(8, "little") + data[8 : 8 + length].ljust(padded) + data[8 + length :])
    try:
        assert read_native(path).tensors.keys() == load_file(path).keys()
        client.run(load(path.name))
    finally:
        path.unlink()


def test_what_core_saves_of_a_quantized_model(client):
    """It has no place for the configuration; the sentence says where such a file comes from."""
    saved = node("ModelSave", model=["load", 0], filename_prefix="saved/model")
    client.run({"load": graphs.four_bit(models.FLUX_4BIT), "save": saved})
    (file,) = (client.base / "output" / "saved").iterdir()
    path = client.base / "models" / "diffusion_models" / "saved.safetensors"
    path.symlink_to(file)
    try:
        with pytest.raises(GraphError, match="without their configuration, as ComfyUI's ModelSave and CheckpointSave"):
            client.run(load(path.name))
    finally:
        path.unlink()
