"""LoRA files of DiRotQ LoRA: unreadable ones are named, and one written anew is read anew."""

import os
import struct

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def node(core):
    """The node's module, which needs ComfyUI."""
    from dirotq.nodes import lora

    return lora


def gguf(path):
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + bytes(64))


def corrupt(path):
    path.write_bytes(struct.pack("<Q", 64) + b"{" + b"\xff" * 63 + bytes(16))


def truncated(path):
    save_file({"a.lora_A.weight": torch.zeros(64, 64)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def no_tensors(path):
    torch.save({"epoch": 3, "loss": 0.5}, path)


def one_tensor(path):
    torch.save(torch.zeros(3), path)


def empty(path):
    path.write_bytes(b"")


def none_at_all(path):
    save_file({}, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("make", [gguf, corrupt, truncated, no_tensors, one_tensor, empty, none_at_all])
def test_an_unreadable_file_is_named(node, tmp_path, make, suffix):
    path = tmp_path / f"bad{suffix}"
    make(path)
    with pytest.raises(ValueError) as failed:
        node.read_lora(str(path))
    found = str(failed.value)
    assert found.startswith(f"{path} is no readable LoRA: ") and "\n" not in found and len(found) > len(str(path)) + 24


def test_a_good_file(node, tmp_path):
    state = {"a.lora_A.weight": torch.ones(2, 2)}
    save_file(state, tmp_path / "good.safetensors")
    torch.save(state, tmp_path / "good.pt")
    for name in ("good.safetensors", "good.pt"):
        assert torch.equal(node.read_lora(str(tmp_path / name))["a.lora_A.weight"], torch.ones(2, 2))


def test_a_file_that_changed_is_read_again(node, tmp_path, monkeypatch):
    path = tmp_path / "mine.safetensors"
    monkeypatch.setattr(node.folder_paths, "get_full_path", lambda kind, name: str(tmp_path / name))
    seen = [node.LoRA.fingerprint_inputs(lora_name=path.name, model=None, strength=1.0)]
    for size in (2, 3):
        save_file({"a.lora_A.weight": torch.ones(size)}, path)
        seen.append(node.LoRA.fingerprint_inputs(lora_name=path.name, model=None, strength=1.0))
    os.utime(path, ns=(0, 0))
    seen.append(node.LoRA.fingerprint_inputs(lora_name=path.name, model=None, strength=1.0))
    assert len({*seen}) == 4 and seen[0] is None
    assert node.LoRA.fingerprint_inputs(lora_name=path.name, model=None, strength=0.5) == seen[-1]
    assert node.LoRA.fingerprint_inputs(lora_name=None, model=None, strength=1.0) is None


def test_where_checkpoints_are_written(node, tmp_path, monkeypatch):
    """The user's default folder, whatever its name; else ComfyUI's models/diffusion_models, not models/unet."""
    from dirotq.nodes.folders import checkpoint_root

    models, mine = tmp_path / "models", tmp_path / "mine"
    own = [str(models / "unet"), str(models / "diffusion_models")]
    listed = list(own)
    monkeypatch.setattr(node.folder_paths, "models_dir", str(models))
    monkeypatch.setattr(node.folder_paths, "get_folder_paths", lambda kind: listed)
    assert checkpoint_root() == models / "diffusion_models"
    listed.append(str(mine))
    assert checkpoint_root() == models / "diffusion_models"
    listed[:] = [str(mine), *own]
    assert checkpoint_root() == mine
