"""Models and pipelines pushed to a Hub: files, cards, gates, and every refusal in one sentence."""

import json
import logging
import re
import shutil

import accelerate
import pytest
import torch

import dirotq
from dirotq.dirotq_core.card import MARKER
from dirotq.dirotq_core.card_metrics import evaluation_text
from dirotq.dirotq_core.cli import main
from dirotq.dirotq_core.demo.embedded import MODELS, load_pipeline, prompts
from dirotq.dirotq_core.hub_errors import HubError

from ..hub_server import Repository, card_data
from .conftest import BASE, quantized_pipeline

ID = "ada/flux-tiny-dirotq"


@pytest.fixture(scope="module")
def model():
    """A quantized transformer that comes from no Hub."""
    return quantized_pipeline(MODELS["flux-tiny"].folder).transformer


def test_a_pipeline(hub, login, pipeline_folder):
    login("hf_writer")
    url = dirotq.push(pipeline_folder, ID, base_model=BASE)
    repository = hub.repositories[ID]
    assert url == f"{hub.url}/{ID}/commit/{repository.commit}"
    on_disk = Repository.of(pipeline_folder).files
    assert {n: d for n, d in repository.files.items() if n not in ("README.md", ".gitattributes")} == on_disk
    assert repository.gated == "auto"

    card = repository.files["README.md"].decode()
    data = card_data(card.encode())
    assert data == {
        "library_name": "diffusers",
        "base_model": BASE,
        "base_model_relation": "quantized",
        "pipeline_tag": "text-to-image",
        "tags": ["dirotq", "quantized", "4-bit", "w4a8", "comfyui"],
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": f"https://huggingface.co/{BASE}/blob/main/LICENSE.md",
        "extra_gated_prompt": 'By clicking "Agree", you agree to the licence.',
    }
    for text in (
        f'FluxPipeline.from_pretrained("{ID}"', f"`repo_id` set to `{ID}`", "`dirotq`: DiRotQ's subspace",
        "Not measured", "non-commercial", "is gated",
    ):  # fmt: skip
        assert text in card
    # Pushed again, nothing has changed.
    assert dirotq.push(pipeline_folder, ID, base_model=BASE) == url


def test_diffusers_own_methods(hub, login):
    """A transformer loaded from the Hub, quantized while it loads, pushed by itself and in its pipeline."""
    login("hf_writer")
    pipeline = quantized_pipeline(BASE)
    pipeline.transformer.push_to_hub("ada/transformer")
    pipeline.push_to_hub("ada/pipeline", private=True)
    alone, whole = (hub.repositories[f"ada/{n}"] for n in ("transformer", "pipeline"))
    assert (alone.gated, whole.gated, whole.private) == ("auto", False, True)  # nobody else sees a private one
    for repository in (alone, whole):
        data = card_data(repository.files["README.md"])
        assert (data["base_model"], data["license"], data["base_model_relation"]) == (BASE, "other", "quantized")
    assert "model_index.json" in whole.files and "config.json" in alone.files
    assert f'FluxPipeline.from_pretrained("{BASE}", transformer=transformer' in alone.files["README.md"].decode()

    # Loaded from there and pushed elsewhere, the base is still the base.
    again = type(pipeline.transformer).from_pretrained("ada/transformer", torch_dtype=torch.bfloat16)
    again.push_to_hub("ada/again")
    assert card_data(hub.repositories["ada/again"].files["README.md"])["base_model"] == BASE


def test_what_a_card_says_works(hub, login, pipeline_folder):
    """Its Python block, of a pipeline and of a transformer alone, but for the GPU and the drawing."""
    login("hf_writer")
    dirotq.push(pipeline_folder, ID, base_model=BASE)
    dirotq.push(pipeline_folder / "transformer", "ada/transformer", base_model=BASE)
    for repo_id in (ID, "ada/transformer"):
        card = hub.repositories[repo_id].files["README.md"].decode()
        (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        *load, draw = block.replace('"cuda"', '"cpu"').splitlines()
        names = {}
        exec("\n".join(load), names)
        assert draw.startswith("image = pipe(") and names["pipe"].transformer.is_quantized


def test_save_pretrained_that_pushes(hub, login, tmp_path):
    login("hf_writer")
    pipeline = quantized_pipeline(BASE)
    pipeline.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, repo_id="ada/saved")
    assert MARKER in hub.repositories["ada/saved"].files["README.md"].decode()
    assert hub.repositories["ada/saved"].gated == "auto"


def test_models_of_others_are_pushed_as_ever(hub, login):
    from diffusers import FluxTransformer2DModel

    quantized_pipeline(BASE, token="hf_writer")  # installs what pushing learns
    login("hf_writer")
    dense = FluxTransformer2DModel.from_pretrained(BASE, subfolder="transformer")
    dense.push_to_hub("ada/dense")
    assert "dirotq" not in hub.repositories["ada/dense"].files["README.md"].decode()
    assert hub.repositories["ada/dense"].gated is False


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_users_card_is_kept(hub, login, pipeline_folder, tmp_path, where):
    login("hf_writer")
    own = b"---\nlicense: mit\n---\n# Mine\n"
    folder = tmp_path / "model"
    shutil.copytree(pipeline_folder, folder)
    if where == "folder":
        (folder / "README.md").write_bytes(own)
        assert main(["card", str(folder)]) == 0
    else:
        hub.repositories[ID] = Repository({"README.md": own})
    dirotq.push(folder, ID, base_model=BASE)
    assert hub.repositories[ID].files["README.md"] == own
    if where == "hub":
        quantized_pipeline(BASE).push_to_hub(ID)
        assert hub.repositories[ID].files["README.md"] == own


def test_a_card_of_ours_is_written_anew(hub, login, pipeline_folder, tmp_path, capsys):
    login("hf_writer")
    folder = tmp_path / "model"
    shutil.copytree(pipeline_folder, folder)
    assert main(["card", str(folder), "--base-model", BASE]) == 0
    first = (folder / "README.md").read_text()
    assert MARKER in first and f"base_model: {BASE}" in first
    assert capsys.readouterr().out == f"{folder / 'README.md'}\n"
    assert main(["push", str(folder), ID]) == 0  # the card in the folder says what the base is
    assert capsys.readouterr().out.startswith(hub.url)
    pushed = hub.repositories[ID].files["README.md"].decode()
    assert card_data(pushed.encode())["base_model"] == BASE and ID in pushed


def test_a_single_file(hub, login, pipeline_folder, tmp_path):
    login("hf_writer")
    file = tmp_path / "flux-tiny.safetensors"
    assert main(["convert", str(pipeline_folder), "--out", str(file)]) == 0
    dirotq.push(file, "ada/single", base_model=BASE, gated=False)
    repository = hub.repositories["ada/single"]
    assert repository.files["flux-tiny.safetensors"] == file.read_bytes() and repository.gated is False
    card = repository.files["README.md"].decode()
    assert "## In ComfyUI" in card and "## In diffusers" not in card
    assert main(["card", str(file)]) == 1  # there is no place for it


def test_what_was_measured_is_in_the_card(hub, login, embedded_report):
    login("hf_writer")
    pipeline, report = embedded_report
    pipeline.push_to_hub("ada/measured")
    files = hub.repositories["ada/measured"].files
    assert "dirotq_report.json" in files
    card = files["README.md"].decode()
    median, worst = re.search(r"median ([\d.]+) dB; lowest: `([\w.]+)`", card).groups()
    known = {r.name: r.output_db for r in report.linears if r.output_db is not None}
    assert float(median) == pytest.approx(report.median_output_db, abs=0.06)
    assert known[worst] == min(known.values())


def evaluated(source, **changes):
    """A report as an evaluation writes it: a reference, its control and one model."""
    row = {"control": False, "reference": False, "activation_bits": None, "metrics": {}}
    psnr = {"mean": 41.234, "low": 40.5, "high": 42.0}
    ours = {"name": "w4a4", "source": str(source), "activation_bits": 4, "fid": 3.4567}
    rows = [
        row | {"name": "bf16", "source": "x", "reference": True},
        row | {"name": "other seeds", "source": "x", "control": True},
        row | ours | {"metrics": {"psnr": psnr, "ssim": {"mean": 0.98765, "low": 0.9, "high": 0.99}}},
    ]
    return {"version": 1, "prompts": {"count": 128}, "rows": rows} | changes


def test_an_evaluation_is_in_the_card(hub, login, pipeline_folder, tmp_path):
    login("hf_writer")
    (tmp_path / "report.json").write_text(json.dumps(evaluated(pipeline_folder)))
    dirotq.push(pipeline_folder, ID, base_model=BASE, evaluation=tmp_path)
    card = hub.repositories[ID].files["README.md"].decode()
    assert "Pictures of 128 prompts, 4-bit activations, against `bf16` with the same seeds" in card
    assert "| PSNR, dB | 41.23 (40.50 to 42.00) |" in card and "| SSIM | 0.988 (0.900 to 0.990) |" in card
    assert "| FID to the original | 3.46 |" in card and "Not measured" not in card


def test_seeds_of_pictures_by_others_are_not_claimed(tmp_path):
    """A mean of activation bits is shortened, and of the reference's pictures only the files are known."""
    report = evaluated(tmp_path)
    report["rows"][0]["kind"] = "images"
    report["rows"][2]["activation_bits"] = 158 / 53
    (tmp_path / "report.json").write_text(json.dumps(report))
    text = evaluation_text(tmp_path, tmp_path)
    assert text.startswith("Pictures of 128 prompts, 2.98-bit activations, against `bf16`; mean and 95 % interval:")


def test_what_means_nothing_is_in_no_card(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(evaluated(tmp_path, meaningless=["fid", "ssim", "judge"])))
    text = evaluation_text(tmp_path, tmp_path)
    assert "PSNR" in text and "FID" not in text and "SSIM" not in text


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (None, "does not exist; give the report.json of an evaluation"),
        ({"rows": []}, "is no report of an evaluation"),
        ({"a": 1}, "is no report of an evaluation: KeyError"),
        (evaluated("a", rows=[*evaluated("a")["rows"], evaluated("b")["rows"][2]]), "it has w4a4, w4a4"),
        (evaluated("a", rows=evaluated("a")["rows"][:2]), "it has none to choose from"),
    ],
)
def test_a_report_that_does_not_fit(hub, login, pipeline_folder, tmp_path, report, message):
    login("hf_writer")
    if report is not None:
        (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=message):
        dirotq.push(pipeline_folder, ID, evaluation=tmp_path / "report.json")
    assert ID not in hub.repositories


@pytest.fixture
def embedded_report():
    pipeline = load_pipeline("flux-tiny", torch.bfloat16)
    captions = [s.caption() for s in prompts(3, seed=5, held_out=False)]
    config = dirotq.DiRotQConfig(rank=16, basis="pca", rounding="nearest")
    call = {**MODELS["flux-tiny"].call, "num_inference_steps": 1}
    return pipeline, dirotq.quantize(pipeline, config, captions, call=call, progress=False)


def test_a_branch_a_tag_and_a_pull_request(hub, login, pipeline_folder):
    from huggingface_hub import HfApi

    login("hf_writer")
    dirotq.push(pipeline_folder, ID, base_model=BASE)
    HfApi().create_branch(ID, branch="next")
    HfApi().create_tag(ID, tag="v1")
    before = hub.repositories[ID].commit
    url = dirotq.push(pipeline_folder, ID, base_model="lab/other", revision="next", commit_message="Another base")
    assert hub.repositories[ID].commit == before and url.split("/")[-1] != before
    assert b"lab/other" in hub.repositories[ID].past["next"]["README.md"]
    url = dirotq.push(pipeline_folder, ID, base_model="lab/other", create_pr=True)
    assert url == f"{hub.url}/{ID}/discussions/1" and hub.repositories[ID].commit == before
    assert b"lab/other" in hub.repositories[ID].past["refs/pr/1"]["README.md"]


def test_a_repository_with_a_model_keeps_its_gate(hub, login, pipeline_folder, caplog):
    login("hf_writer")
    hub.repositories[ID] = Repository({"x.safetensors": b"0"})
    with caplog.at_level(logging.WARNING):
        dirotq.push(pipeline_folder, ID, base_model=BASE)
    assert hub.repositories[ID].gated is False and f"{BASE} is gated, {ID} is not" in caplog.text
    dirotq.push(pipeline_folder, ID, base_model=BASE, gated="manual")
    assert hub.repositories[ID].gated == "manual"


def test_an_unknown_base(hub, login, pipeline_folder, caplog):
    login("hf_writer")
    dirotq.push(pipeline_folder, ID)
    assert "nothing says which model was quantized" in caplog.text
    data = card_data(hub.repositories[ID].files["README.md"])
    assert "base_model" not in data and "license" not in data
    dirotq.push(pipeline_folder, "ada/second", base_model="lab/absent")
    assert "the licence of lab/absent is not known (the Hub has no 'lab/absent'" in caplog.text
    assert card_data(hub.repositories["ada/second"].files["README.md"])["base_model"] == "lab/absent"


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (None, ID, f"writing to '{ID}' needs a token that the Hub accepts: log in with `hf auth login`.*"),
        ("hf_wrong", ID, f"writing to '{ID}' needs a token that the Hub accepts.*"),
        ("hf_reader", ID, f"your token may not write to '{ID}': use one with write access to 'ada'"),
        ("hf_writer", "bob/model", "your token may not write to 'bob/model': use one with write access to 'bob'"),
        ("hf_writer", "a/b/c", "'a/b/c' is no Hub id; it must look like 'owner/name'"),
    ],
)
def test_refused(hub, login, pipeline_folder, model, token, repo_id, message):
    if token:
        login(token)
    before = set(hub.repositories)
    with pytest.raises(HubError) as failed:
        dirotq.push(pipeline_folder, repo_id)
    assert re.fullmatch(message, str(failed.value)), failed.value
    with pytest.raises(HubError) as failed:
        model.push_to_hub(repo_id)
    assert re.fullmatch(message, str(failed.value)), failed.value
    assert set(hub.repositories) == before


def test_an_existing_repository_of_somebody_else(hub, login, pipeline_folder):
    login("hf_writer")
    hub.repositories["bob/model"] = Repository({"README.md": b"# His\n"})
    with pytest.raises(HubError, match=r"^your token may not write to 'bob/model'"):
        dirotq.push(pipeline_folder, "bob/model")
    assert set(hub.repositories["bob/model"].files) == {"README.md"}


def test_unreachable(hub, login, pipeline_folder, capsys):
    login("hf_writer")
    hub.__exit__()
    try:
        assert main(["push", str(pipeline_folder), ID]) == 1
    finally:
        hub.__enter__()
    error = capsys.readouterr().err
    assert re.match(rf"dirotq push: could not write to '{ID}': the Hub cannot be reached \(", error), error


@pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "transformer"])
def test_what_cannot_be_saved_makes_no_repository(hub, login, model, whole):
    login("hf_writer")
    pushed = load_pipeline("flux-tiny", torch.bfloat16, model) if whole else model
    for args, kwargs in (((), {"safe_serialization": False}), ((None, None, None, False, False), {})):
        with pytest.raises(ValueError, match="safetensors only"):
            pushed.push_to_hub(ID, *args, **kwargs)
    with pytest.raises(TypeError, match="surprise"):
        pushed.push_to_hub(ID, surprise=1)
    assert ID not in hub.repositories


def test_what_is_offloaded_makes_no_repository(hub, login):
    login("hf_writer")
    pipeline = quantized_pipeline(MODELS["flux-tiny"].folder)
    accelerate.cpu_offload(pipeline.transformer, torch.device("cpu"))
    for pushed in (pipeline, pipeline.transformer):
        with pytest.raises(ValueError, match=r"cannot be saved: .* offloaded"):
            pushed.push_to_hub(ID)
    assert ID not in hub.repositories


@pytest.mark.parametrize("repo_id", [ID, ID.split("/")[1]])
def test_what_would_fail_later_makes_no_repository(hub, login, pipeline_folder, repo_id):
    login("hf_writer")
    for wrong, message in (
        ({"gated": "yes"}, "gated must be 'auto', 'manual', False or None, got 'yes'"),
        ({"revision": "next"}, f"'{ID}' does not exist, so it has no branch 'next'"),
        ({"base_model": "./my flux"}, r"base model '\./my flux' is no Hub id"),
        ({"base_model": "https://huggingface.co/lab/x/discussions/3"}, "is no Hub id"),
    ):
        with pytest.raises(ValueError, match=message):
            dirotq.push(pipeline_folder, repo_id, **wrong)
    assert ID not in hub.repositories
    dirotq.push(pipeline_folder, repo_id, base_model=BASE)
    with pytest.raises(HubError, match="has no such branch"):
        dirotq.push(pipeline_folder, repo_id, base_model=BASE, revision="next")


@pytest.mark.parametrize(
    "address", ["https://huggingface.co/{}", "https://hf.co/{}/tree/main", "huggingface.co/{}/blob/main/README.md?x=1"]
)
def test_a_base_model_by_its_address(hub, login, pipeline_folder, address):
    login("hf_writer")
    assert main(["push", str(pipeline_folder), ID, "--base-model", address.format(BASE)]) == 0
    data = card_data(hub.repositories[ID].files["README.md"])
    assert data["base_model"] == BASE and data["license"] == "other"


@pytest.mark.parametrize("shard", [None, "200KB"])
def test_a_variant_is_in_the_card(hub, login, tmp_path, shard):
    """Whose example then loads what was pushed."""
    login("hf_writer")
    pipeline = quantized_pipeline(MODELS["flux-tiny"].folder)
    if shard:
        pipeline.save_pretrained(tmp_path / "local", variant="w4a8", max_shard_size=shard)
        dirotq.push(tmp_path / "local", ID)
    else:
        pipeline.push_to_hub(ID, variant="w4a8")
    card = hub.repositories[ID].files["README.md"].decode()
    assert f'FluxPipeline.from_pretrained("{ID}", variant="w4a8", torch_dtype=torch.bfloat16)' in card
    code = card.split("```python\n")[1].split("```")[0].replace('.to("cuda")', "")
    names = {}
    exec(code.split("image =")[0], names)
    assert names["pipe"].transformer.is_quantized


def test_what_is_not_quantized_is_not_pushed(hub, login, tmp_path):
    login("hf_writer")
    for path, message in (
        (MODELS["flux-tiny"].folder, "is not a DiRotQ checkpoint"),
        (tmp_path / "no", "does not exist"),
    ):
        with pytest.raises(dirotq.CheckpointError, match=message):
            dirotq.push(path, ID)
    assert ID not in hub.repositories
