"""A device map that sends a part of the model to disk: same checks, same bits."""

from functools import partial

import pytest
import torch
from diffusers.models import modeling_utils

from dirotq.dirotq_core.offloading import offloaded

from .versions import KNOWS_FILES, all_on_disk, knows_files


def maps(case):
    """All on disk, and the blocks on disk with the rest on the CPU."""
    model = case.load()
    names = {n.split(".")[0] for n, _ in model.named_parameters()}
    return {"": "disk"}, {n: "disk" if n.endswith("blocks") else "cpu" for n in names}


@knows_files
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_disk_offload_keeps_the_bits(case, helpers, tmp_path, which, dtype):
    expected = helpers.run(case.load(torch_dtype=dtype))
    with all_on_disk():
        model = case.load(torch_dtype=dtype, device_map=maps(case)[which], offload_folder=str(tmp_path / "offload"))
    assert any(p.is_meta for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(**helpers.inputs(model, dtype))[0], expected)


@knows_files
@pytest.mark.parametrize("which", [0, 1])
def test_disk_offload_checks_what_it_offloads(flux_case, copy, broken, tmp_path, which):
    change, message = broken
    with pytest.raises(ValueError) as error:
        flux_case.load(copy(change), device_map=maps(flux_case)[which], offload_folder=str(tmp_path / "offload"))
    assert message in str(error.value)


@pytest.mark.skipif(KNOWS_FILES, reason="diffusers 0.39 and newer name the files")
def test_disk_offload_that_cannot_be_checked_is_refused(flux_case, tmp_path):
    with pytest.raises(ValueError, match=r"a device_map with 'disk' needs diffusers 0\.39"):
        flux_case.load(device_map={"": "disk"}, offload_folder=str(tmp_path))


def test_quantizing_to_disk_is_refused(flux_case, tmp_path):
    with pytest.raises(ValueError, match="cannot offload to disk"):
        flux_case.on_the_fly(device_map={"": "disk"}, offload_folder=str(tmp_path))


def test_blocks_on_the_cpu_beside_a_gpu(case, helpers, monkeypatch):
    """As with a GPU for the rest: accelerate takes what stays on the CPU to meta before the model is looked at."""
    as_on_a_gpu = partial(modeling_utils.dispatch_model, main_device=torch.device("cpu"), force_hooks=True)
    monkeypatch.setattr(modeling_utils, "dispatch_model", as_on_a_gpu)
    expected = helpers.run(case.load())
    model = case.load(device_map={n.split(".")[0]: "cpu" for n, _ in case.load().named_parameters()})
    assert sum(p.is_meta for p in model.parameters()) > 50
    assert torch.equal(helpers.run(model), expected)
    block = next(m for m in model.modules() if hasattr(m, "_hf_hook") and "weight" in dict(m.named_parameters()))
    names = {f"{n}.weight" for n, m in model.named_modules() if m is block}
    assert names <= offloaded(model)
    block._hf_hook.weights_map = {}  # of a tensor that the checkpoint lacked
    assert not names & offloaded(model)
