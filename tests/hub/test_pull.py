"""Quantized models loaded from a Hub: by id, revision and token, offline, over a bad connection, from a mirror."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel

import dirotq
from dirotq.dirotq_core.cli import main
from dirotq.dirotq_core.demo.embedded import MODELS

from ..hub_server import Repository

ID = "ada/flux-tiny-dirotq"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pushed(hub, login, pipeline_folder, monkeypatch):
    """The Hub after a push; nobody is logged in any more."""
    login("hf_writer")
    dirotq.push(pipeline_folder, ID)
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    return hub


@pytest.fixture(scope="session")
def reference(pipeline_folder):
    return state(FluxTransformer2DModel.from_pretrained(pipeline_folder / "transformer", torch_dtype=torch.bfloat16))


def state(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(model, reference):
    found = model.state_dict()
    return found.keys() == reference.keys() and all(torch.equal(found[n], t) for n, t in reference.items())


def load(repo_id=ID, **kwargs):
    return FluxTransformer2DModel.from_pretrained(
        repo_id, subfolder="transformer", torch_dtype=torch.bfloat16, **kwargs
    )


def test_by_id_and_offline(pushed, reference, monkeypatch, tmp_path):
    """The whole pipeline, drawn; then without the Hub, from the cache, the same picture."""
    call = {**MODELS["flux-tiny"].call, "num_inference_steps": 1, "output_type": "np"}

    def draw():
        pipeline = DiffusionPipeline.from_pretrained(ID, torch_dtype=torch.bfloat16)
        pipeline.set_progress_bar_config(disable=True)
        assert type(pipeline) is FluxPipeline and same(pipeline.transformer, reference)
        return torch.from_numpy(pipeline("a red circle", generator=torch.Generator().manual_seed(1), **call).images)

    online = draw()
    assert pushed.downloads(WEIGHTS)
    pushed.requests.clear()
    assert torch.equal(draw(), online) and not pushed.downloads()
    pushed.__exit__()
    try:
        assert torch.equal(draw(), online)
    finally:
        pushed.__enter__()


def test_by_revision(pushed, reference):
    first = pushed.repositories[ID].commit
    files = dict(pushed.repositories[ID].files)
    config = json.loads(files["transformer/config.json"])
    config["quantization_config"]["activation_bits"] = 4
    pushed.repositories[ID].past["v1"] = pushed.repositories[ID].files
    second = pushed.repositories[ID].put(files | {"transformer/config.json": json.dumps(config).encode()})
    bits = {r: load(revision=r).hf_quantizer.quantization_config.activation_bits for r in ("v1", first, "main", second)}
    assert bits == {"v1": 8, first: 8, "main": 4, second: 4}
    assert len(pushed.downloads(WEIGHTS)) == 1  # the weights are the same blob
    with pytest.raises(OSError, match="v9"):
        load(revision="v9")


def test_with_a_token(pushed, reference, login, monkeypatch):
    repository = pushed.repositories[ID]
    repository.private = True
    with pytest.raises(OSError, match=r"(?s)not a valid model identifier .* private repository"):
        load()
    assert same(load(token="hf_writer"), reference)
    repository.private, repository.gated = False, "manual"
    with pytest.raises(OSError, match=r"gated|is not the path to a directory"):  # the latter from older diffusers
        load(force_download=True)
    login("hf_reader")
    assert same(load(force_download=True), reference)


def test_shards_by_id(hub, login, pipeline_folder, reference, tmp_path):
    folder = tmp_path / "sharded"
    load(pipeline_folder).save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    login("hf_writer")
    dirotq.push(folder, "ada/sharded")

    def reload(**kwargs):
        return FluxTransformer2DModel.from_pretrained("ada/sharded", torch_dtype=torch.bfloat16, **kwargs)

    assert same(reload(), reference)
    hub.__exit__()
    try:
        assert same(reload(local_files_only=True), reference)
    finally:
        hub.__enter__()


@pytest.fixture
def large(hub):
    """A repository with a file larger than the 10 MiB that come in one piece."""
    hub.repositories["ada/large"] = Repository({"a.safetensors": os.urandom(13 << 20), "config.json": b"{}"})
    return "ada/large"


def test_a_broken_connection_is_resumed(hub, large, monkeypatch):
    from huggingface_hub import file_download, hf_hub_download

    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    hub.cut_after = 12 << 20
    try:
        path = hf_hub_download(large, "a.safetensors")
    except OSError:  # before 1.0 the client stops there, and goes on when it is called again
        path = hf_hub_download(large, "a.safetensors")
    assert Path(path).read_bytes() == hub.repositories[large].files["a.safetensors"]
    ranges = [r for _, r in hub.downloads(".safetensors")]
    assert ranges[0] == "" and re.fullmatch(r"bytes=\d{7,}-", ranges[1])
    assert hub.sent < 16 << 20  # the client goes on from the last 10 MiB it has written


def test_an_interrupted_download_keeps_what_is_complete(pushed, reference, monkeypatch):
    """Files that are there are not fetched again; no half of a file is taken for the whole."""
    from huggingface_hub import snapshot_download

    repository = pushed.repositories[ID]
    repository.lost = (f"transformer/{WEIGHTS}",)
    with pytest.raises(OSError):
        snapshot_download(ID)
    complete = {p for p, _ in pushed.downloads()}
    with pytest.raises(OSError):
        load(local_files_only=True)
    repository.lost = ()
    pushed.requests.clear()
    assert same(load(snapshot_download(ID)), reference)
    again = {p for p, _ in pushed.downloads()}
    assert f"/{ID}/resolve/{repository.commit}/transformer/{WEIGHTS}" in again
    assert f"/{ID}/resolve/{repository.commit}/transformer/config.json" not in again & complete


def test_a_damaged_download_is_named(pushed):
    data = pushed.repositories[ID].files[f"transformer/{WEIGHTS}"]
    pushed.repositories[ID].files[f"transformer/{WEIGHTS}"] = data[: len(data) // 2]
    with pytest.raises(Exception, match=rf"Unable to load weights .*{WEIGHTS}"):
        load()


def test_convert_from_the_hub(pushed, pipeline_folder, monkeypatch, tmp_path, capsys):
    """A repository, a single file of one, a revision; offline from the cache; only what is needed is fetched."""
    from huggingface_hub import constants

    assert main(["convert", str(pipeline_folder), "--out", str(tmp_path / "here.safetensors")]) == 0
    expected = (tmp_path / "here.safetensors").read_bytes()
    pushed.repositories["ada/single"] = Repository({"flux.safetensors": expected, "README.md": b""})
    first = pushed.repositories[ID].commit
    for i, source in enumerate(([ID], [ID, "--revision", first])):
        out = tmp_path / f"{i}.safetensors"
        assert main(["convert", *source, "--out", str(out)]) == 0 and out.read_bytes() == expected
    assert not any("text_encoder" in p for p, _ in pushed.downloads())
    for i, source in enumerate(("ada/single", "ada/single/flux.safetensors")):
        assert main(["convert", source, "--out", str(tmp_path / f"folder{i}")]) == 0
        assert same(load_folder(tmp_path / f"folder{i}"), state(load_folder(pipeline_folder / "transformer")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for source, out in ((ID, "offline.safetensors"), ("ada/single", "offline")):
        assert main(["convert", source, "--out", str(tmp_path / out)]) == 0
    assert (tmp_path / "offline.safetensors").read_bytes() == expected
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    pushed.__exit__()
    try:
        assert main(["convert", ID, "--out", str(tmp_path / "unreachable.safetensors")]) == 0
    finally:
        pushed.__enter__()


def load_folder(folder):
    return FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["ada/absent"], "'ada/absent' is no file or folder, and the Hub has no 'ada/absent', or it is private"),
        ([ID, "--revision", "v9"], f"'{ID}' is no file or folder, and the Hub has '{ID}', but no revision 'v9'"),
        ([f"{ID}/x.safetensors"], f"'{ID}/x.safetensors' is no file or folder, and the Hub answered 404"),
        (["nothing.safetensors"], "nothing.safetensors is missing or no regular file"),
        (
            ["nothing.safetensors", "--revision", "v1"],
            "a revision is for the Hub, and nothing.safetensors is no",
        ),
        (["lab/flux-tiny"], "'lab/flux-tiny' is no file or folder, and 'lab/flux-tiny' is gated"),
    ],
)
def test_convert_says_what_is_not_there(pushed, tmp_path, monkeypatch, capsys, source, message):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *source, "--out", "out"]) == 1
    assert f"dirotq convert: {message}" in capsys.readouterr().err and not (tmp_path / "out").exists()


MIRROR = """
import sys, torch, dirotq
from diffusers import FluxTransformer2DModel
repo, target = sys.argv[1:]
model = FluxTransformer2DModel.from_pretrained(repo, subfolder="transformer", torch_dtype=torch.bfloat16)
model.push_to_hub(target)
print(sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.thorough
def test_a_mirror_named_by_the_environment(pushed, reference, tmp_path):
    """HF_ENDPOINT, HF_TOKEN and then HF_HUB_OFFLINE, as a user sets them, in a process of its own."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))},
        "HF_ENDPOINT": pushed.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_writer",
    }  # fmt: skip

    def run(*args, **more):
        command = [sys.executable, "-c", MIRROR, *args]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, cwd=tmp_path)

    done = run(ID, "ada/copied")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(t.numel() for t in reference.values())
    assert "config.json" in pushed.repositories["ada/copied"].files
    pushed.requests.clear()
    done = run(ID, "ada/copied", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and not pushed.requests
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .endswith("HubError: 'ada/copied' cannot be written to while HF_HUB_OFFLINE is set")
    )


def test_quantize_from_the_hub(hub, login, tmp_path, caplog):
    """Streaming from a Hub id; the card of the result knows its base without asking again."""
    from dirotq.dirotq_core.engine import quantize_checkpoint

    login("hf_reader")
    out = tmp_path / "out"
    quantize_checkpoint("lab/flux-tiny", out, calibration="none", progress=False)
    card = (out / "README.md").read_text()
    assert "base_model: lab/flux-tiny" in card and "license_name: flux-1-dev-non-commercial-license" in card
    assert 'FluxPipeline.from_pretrained("out"' in card and "models/diffusion_models" in card
    hub.__exit__()  # and again from the cache, with the same card
    try:
        quantize_checkpoint("lab/flux-tiny", tmp_path / "again", calibration="none", progress=False)
    finally:
        hub.__enter__()
    assert (tmp_path / "again" / "README.md").read_text() == card.replace('"out"', '"again"').replace(
        "# out", "# again"
    )
