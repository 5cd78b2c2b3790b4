"""Mutated checkpoints: some thousand cases of `fuzz`, what it found, and values of any kind in the configuration."""

import json
import shutil

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dirotq
from dirotq import CheckpointError
from dirotq.dirotq_core.files import checkpoint_files, read_headers
from dirotq.dirotq_core.inspect import skeleton
from dirotq.dirotq_core.single_file import read_native

from .. import processes
from ..marks import thorough
from . import fuzz, fuzz_verdicts


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return fuzz.Fuzzer(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("part", [0, *(thorough(part) for part in (1, 2, 3))])
def test_every_case_is_refused_or_the_same(fuzzer, part):
    found = [(n, *fuzzer.run(n)) for n in range(part, 1600, 4)]
    assert [f for f in found if f[2] not in ("refused", "same")] == []
    assert sum(f[2] == "refused" for f in found) > 300


#: Cases with which diffusers hung (a pipe for a shard, models of millions of blocks), and an index without metadata.
FOUND = [102, 572, 4431, 8277, 8292, 9242, 14512]


def test_every_case_is_loaded_as_it_was_or_refused(fuzzer):
    """By diffusers, a sample."""
    numbers = [*FOUND, *range(400, 800)]
    found = [(n, *fuzzer.run(n, load=True)) for n in numbers]
    assert [f for f in found if f[2] not in ("refused", "same", "other")] == []
    assert sum(f[2] == "refused" for f in found) > 150 and sum(f[2] == "same" for f in found) > 10
    assert {f[2] for f in found[: len(FOUND)]} == {"refused"}


@pytest.fixture
def folder(fuzzer, tmp_path):
    """A good checkpoint of PixArt, in a folder of its own."""
    shutil.copytree(fuzzer.folder / "seeds" / "pixart", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_layers", 10**6, "num_layers is 1000000; at most 128"),
        ("num_layers", "2", "cannot be made with these values: TypeError"),
        ("attention_head_dim", 2**53, "attention_head_dim is 9007199254740992; at most"),
        ("activation_fn", "nn", "cannot be made with these values"),
        ("quantization_config", {"quant_method": "dirotq", "format_version": []}, "format_version"),
        ("num_attention_heads", 2, "has shape"),
    ],
)
def test_a_configuration_is_checked_before_the_model_is_made(folder, key, value, message, monkeypatch):
    config = json.loads((folder / fuzz.CONFIG).read_text())
    (folder / fuzz.CONFIG).write_text(json.dumps({**config, key: value}))
    monkeypatch.setattr(PixArtTransformer2DModel, "load_config", None)  # which diffusers calls first
    with pytest.raises(ValueError, match=message) as error:
        PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": []},
        {"weight_map": {"a": "x.safetensors"}, "metadata": None},
        {"weight_map": {"a": "x.safetensors"}},
    ],
)
def test_an_index_is_checked_before_the_model_is_made(folder, index):
    (folder / fuzz.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)


def test_a_pipe_for_a_file(folder):
    (folder / fuzz.WEIGHTS).unlink()
    fuzz.MAKE["fifo"](folder / fuzz.WEIGHTS)
    with pytest.raises(CheckpointError, match="missing or no regular file"):
        PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)


def test_nested_configuration(folder):
    (folder / fuzz.CONFIG).write_text('{"a":' * 50_000 + '"dirotq"' + "}" * 50_000)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)


def test_what_a_caller_gives_goes_before_the_configuration(fuzzer, folder):
    config = json.loads((folder / fuzz.CONFIG).read_text())
    (folder / fuzz.CONFIG).write_text(json.dumps({**config, "num_layers": 10**6, "_class_name": "MyOwn"}))
    model = PixArtTransformer2DModel.from_pretrained(folder, num_layers=1, torch_dtype=torch.bfloat16)
    assert fuzz_verdicts.same_tensors(model.state_dict(), next(s for s in fuzzer.seeds if s.name == "pixart").loaded)


@pytest.mark.parametrize("before", ["", "import diffusers.models.modeling_utils"])
def test_folders_are_checked_whichever_is_imported_first(folder, before):
    config = json.loads((folder / fuzz.CONFIG).read_text())
    (folder / fuzz.CONFIG).write_text(json.dumps({**config, "num_layers": 10**6}))
    script = f"""
import sys
{before}
import dirotq
from diffusers import PixArtTransformer2DModel
PixArtTransformer2DModel.from_pretrained(sys.argv[1])
"""
    done = processes.run(script, folder)
    assert "num_layers is 1000000" in done.stderr.splitlines()[-1]


def test_a_case_is_the_same_on_every_machine(fuzzer):
    assert fuzzer.files(7)[1:] == fuzzer.files(7)[1:]
    assert all((fuzzer.files(n)[2] != fuzzer.files(n)[0].files) for n in (1, 2))


# --- what was found -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/x.safetensors", "a/b.safetensors", "C:x.safetensors", "a\\b.safetensors", "x.bin",
     "\n.safetensors", "."],
)  # fmt: skip
def test_an_index_stays_in_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.safetensors").touch()
    (folder / "x.bin").touch()
    (folder / fuzz.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"which is no \.safetensors file of its own folder"):
        checkpoint_files(folder)


@pytest.mark.parametrize("metadata", [3, ["a"], {"format": 1}, {"format": None}, {"a": {}}])
def test_metadata_that_safetensors_does_not_read(tmp_path, metadata):
    path = tmp_path / "x.safetensors"
    path.write_bytes(fuzz.joined({"__metadata__": metadata}, b""))
    with pytest.raises(CheckpointError, match="its __metadata__ is no JSON object of strings"):
        read_headers([path])


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [0, 10**30], [0, 2**60]])
def test_an_empty_tensor_of_an_enormous_shape(tmp_path, shape):
    path = tmp_path / "x.safetensors"
    path.write_bytes(fuzz.joined({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}, b""))
    with pytest.raises(CheckpointError, match="tensor 'a' has a shape of more than"):
        read_headers([path])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_layers", 10**9, "num_layers is 1000000000; at most 128 is supported"),
        ("num_single_layers", 10**400, "num_single_layers is 1000"),
        ("sample_size", 10**9, "sample_size is 1000000000; at most"),
        ("sample_size", 2**19, "makes a table of positions too large to hold"),
        ("activation_fn", "gelu-approximatf", "PixArtTransformer2DModel cannot be made with these values"),
        ("_class_name", "StableDiffusionPipeline", "which is no model class of diffusers"),
        ("_class_name", "UNet2DConditionModel", "has no DiRotQ recipe"),
    ],
)
def test_models_that_are_not_made(key, value, message):
    config = {"_class_name": "PixArtTransformer2DModel", **fuzz.pixart().config}
    del config["_use_default_values"]  # diffusers would take its own for these
    with pytest.raises(ValueError, match=message):
        skeleton({**config, key: value})


@pytest.mark.parametrize("kind", sorted(fuzz.MAKE))
def test_a_file_that_is_none(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    fuzz.MAKE[kind](path)
    with pytest.raises(CheckpointError):
        read_native(path)


def test_an_error_is_one_short_line():
    assert str(CheckpointError("a\nb" + "c" * 5000)) == "a b" + "c" * 995 + " …"


# --- configuration ------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(key=st.sampled_from(sorted(dirotq.DiRotQConfig().to_dict())), value=JSON)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_value_in_the_configuration(key, value):
    """It is refused by name, or it is one that comes back the same from JSON."""
    try:
        config = dirotq.DiRotQConfig.from_dict({**dirotq.DiRotQConfig().to_dict(), key: value})
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert dirotq.DiRotQConfig.from_dict(json.loads(config.to_json_string(use_diff=False))) == config
