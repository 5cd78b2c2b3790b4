"""Quantizing a MODEL of this process: what is kept, what is refused."""

import errno
import gc
import os
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch

from dirotq.dirotq_core.single_file import to_native

from . import models
from .core import condition, relative, run
from .loras import lora, with_core_loras


def dense_flux(core):
    state = to_native(models.flux().state_dict(), {"_class_name": "FluxTransformer2DModel", **models.flux().config})
    return core.comfy.sd.load_diffusion_model_state_dict(dict(state))


def test_apply_keeps_options_and_leaves_the_source(core, make):
    source = dense_flux(core)
    source.model_options["transformer_options"]["mark"] = 1
    before = run(core, source)
    made = core.quantizing.quantize_instantly(with_core_loras(core, source, 1.0), 8)
    assert made.model_options["transformer_options"]["mark"] == 1 and not made.patches
    assert made.model_size() < 0.5 * source.model_size()
    expected = run(core, with_core_loras(core, source, 1.0))
    assert relative(run(core, made), expected) < 0.1 < relative(before, expected)  # the LoRA went in
    assert torch.equal(run(core, source), before)
    with pytest.raises(ValueError, match="quantized already"):
        core.quantizing.quantize_instantly(made, 8)


def bypassed(core, source):
    """The source with a LoRA as core's *Load LoRA (Bypass)* adds it, beside the weights."""
    return core.comfy.sd.load_bypass_lora_for_models(source, None, lora(0), 1.0, 0)[0]


@pytest.mark.parametrize("loaded", [False, True])
def test_a_lora_beside_the_weights_is_refused(core, tmp_path, loaded):
    """It would be lost without a word, and the dense model would keep it."""
    source = dense_flux(core)
    before = run(core, source)
    with_lora = bypassed(core, source)
    effect = run(core, with_lora) if loaded else None
    with pytest.raises(ValueError, match=r"injections: bypass_lora.*; add a bypass LoRA behind this node, or .*"):
        core.quantizing.quantize_instantly(with_lora, 8)
    with pytest.raises(ValueError, match="injections: bypass_lora"):
        config = core.quantizing.calibrated_config("dirotq", 64, 4, 0)
        core.quantizing.quantize_calibrated(sampling(core, with_lora, 64), config, tmp_path / "m.safetensors")
    assert effect is None or torch.equal(run(core, with_lora), effect)
    assert torch.equal(run(core, source), before)
    behind = bypassed(core, core.quantizing.quantize_instantly(source, 16))
    made = core.quantizing.quantize_instantly(source, 16)
    assert relative(run(core, behind), run(core, made)) > 0.05
    assert torch.equal(run(core, source), before)


def test_the_dense_model_is_freed(core):
    source = dense_flux(core)
    dense = weakref.ref(source.model)
    made = core.quantizing.quantize_instantly(source, 8)
    run(core, made)
    del source
    gc.collect()
    assert dense() is None
    assert torch.isfinite(run(core, made.clone())).all()


def sampling(core, source, size):
    from dirotq.nodes.calibrate import Sampling

    given = condition()
    positive = [[given["context"], {"pooled_output": given["y"], "guidance": 3.5}]]
    return Sampling(source, [positive], None, 1, 1, 1.0, size, size, 0)


def interrupt(core):
    """What ComfyUI's button does."""
    core.comfy.model_management.interrupt_current_processing(True)


def fill_the_disk(core):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("happens", [interrupt, fill_the_disk])
def test_nothing_is_left_if_writing_ends_early(core, tmp_path, monkeypatch, happens):
    source = dense_flux(core)
    config = core.quantizing.calibrated_config("dirotq", 64, 4, 0)
    path, write, seen = tmp_path / "m.safetensors", core.quantizing.write_native, []

    def disturbed(*args, before_each):
        def each():
            seen.extend(p.name for p in tmp_path.iterdir())
            if len(seen) == 3:
                happens(core)
            before_each()

        write(*args, before_each=each)

    interrupted = core.comfy.model_management.InterruptProcessingException
    with monkeypatch.context() as patch, pytest.raises(interrupted if happens is interrupt else OSError):
        patch.setattr(core.quantizing, "write_native", disturbed)
        core.quantizing.quantize_calibrated(sampling(core, source, 64), config, path)
    assert len(seen) == 3 and set(seen) == {seen[0]} and seen[0].endswith(".partial") and not list(tmp_path.iterdir())
    # And the next one finds everything as it was.
    model, report = core.quantizing.quantize_calibrated(sampling(core, source, 64), config, path)
    assert report.startswith(f"saved {path} ") and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    assert torch.isfinite(run(core, model)).all()


def test_pixart_is_calibrated_at_sizes_it_can_draw(core, tmp_path):
    state = to_native(
        models.pixart().state_dict(), {"_class_name": "PixArtTransformer2DModel", **models.pixart().config}
    )
    source = core.comfy.sd.load_diffusion_model_state_dict(dict(state))
    config = core.quantizing.calibrated_config("dirotq", 64, 4, 0)
    with pytest.raises(ValueError, match="divides by zero at 256 x 256 pixels"):
        core.quantizing.quantize_calibrated(sampling(core, source, 256), config, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def root(core, tmp_path, monkeypatch):
    monkeypatch.setattr(core.quantizing, "checkpoint_root", lambda: tmp_path)
    return tmp_path.resolve()


@pytest.mark.parametrize(
    ("filename", "kind", "message"),
    [
        ("a\0b", ValueError, r"filename must not contain a NUL character, got 'a\\x00b'"),
        ("x/" + "ü" * 101, ValueError, "each part of filename can have 200 bytes, got one of 202"),
        ("taken/model", NotADirectoryError, r".*model\.safetensors cannot be written: .*taken is not a folder; .*"),
        ("taken/a/model", NotADirectoryError, r".*cannot be written: .*taken is not a folder; .*"),
        ("there", FileExistsError, ".*there.safetensors exists; choose another filename"),
        ("../up", ValueError, "filename must be a name below .*, got '../up'"),
        ("locked/new/model", PermissionError, ".*: no permission to write in .*locked; choose another filename"),
    ],
)
def test_where_nothing_can_be_written(core, root, monkeypatch, filename, kind, message):
    (root / "taken").write_text("a file")
    (root / "there.safetensors").write_text("a file")
    (root / "locked").mkdir()
    allowed = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and allowed(path, mode))
    with pytest.raises(kind, match=f"^{message}$"):
        core.quantizing.target_path(filename)
    assert core.quantizing.target_path("new/" + "ü" * 100) == root / "new" / ("ü" * 100 + ".safetensors")
    assert len(list(root.iterdir())) == 3


def test_room_is_looked_for_before_any_work(core, root, monkeypatch):
    """The size that is asked for is that of the file."""
    source, path = dense_flux(core), root / "m.safetensors"
    config = core.quantizing.calibrated_config("dirotq", 64, 4, 0)
    weights, _, plans = core.quantizing.examine(source, config, 64, 64)
    core.quantizing.quantize_calibrated(sampling(core, source, 64), config, path)
    size = path.stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))
    core.quantizing.check_room(path, weights, plans)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0.95 * size))
    with pytest.raises(OSError, match=rf"^the checkpoint takes 0\.\d\d GB, but the disk of {root} has only 0\.\d\d GB"):
        core.quantizing.check_room(path, weights, plans)


@pytest.mark.parametrize("asked", [torch.float8_e4m3fn, torch.float64])
def test_a_dtype_that_packed_weights_cannot_have(core, make, monkeypatch, asked):
    """As --fp8_e4m3fn-unet and --fp64-unet ask for."""
    expected = run(core, make())
    monkeypatch.setattr(core.comfy.model_management, "unet_dtype", lambda *_, **__: asked)
    model = make()
    assert {p.dtype for p in model.model.parameters()} <= {torch.bfloat16, torch.float32}
    assert relative(run(core, model), expected) < 0.05
