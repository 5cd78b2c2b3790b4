"""From models to the report, with the embedded pipelines; interrupted, killed, and on several processes."""

import csv
import hashlib
import json
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import dirotq
from dirotq.dirotq_core.cli import main
from dirotq.dirotq_core.demo.embedded import load_pipeline
from dirotq.dirotq_core.evaluate import Prompt, draw, evaluate, seed_of
from dirotq.dirotq_core.evaluate.prepare import CONTROL
from dirotq.dirotq_core.inspect import format_table, inspect_checkpoint
from dirotq.dirotq_core.layout import plan_sites
from dirotq.dirotq_core.metrics import psnr

from .. import processes
from ..marks import thorough

COMMAND = "import sys; from dirotq.dirotq_core.cli import main; sys.exit(main(sys.argv[1:]))"


def pixels(folder, prompts):
    return [np.asarray(Image.open(folder / f"{p.id}.png")) for p in prompts]


@pytest.mark.parametrize("models", ["pixart", thorough("flux")])
def test_two_checkpoints_against_one_reference(request, models, four, tmp_path):
    models = request.getfixturevalue(models)
    result = evaluate(models.sources, models.reference, four, tmp_path, models.options(control=True))
    assert result == json.loads((tmp_path / "report.json").read_text())
    names = [row["name"] for row in result["rows"]]
    assert names == ["bf16", CONTROL, "hadamard", "rtn"]
    reference = pixels(tmp_path / "images" / "bf16", four)
    for row in result["rows"][1:]:
        mine = pixels(tmp_path / "images" / row["name"], four)
        expected = [10 * np.log10(255**2 / np.mean((a - b.astype(float)) ** 2)) for a, b in
                    zip(mine, reference, strict=True)]  # fmt: skip
        assert row["metrics"]["psnr"]["mean"] == pytest.approx(np.mean(expected))
        assert row["metrics"]["psnr"]["low"] <= np.mean(expected) <= row["metrics"]["psnr"]["high"]
    for row in result["rows"][2:]:
        found = inspect_checkpoint(models.checkpoints[row["name"]])
        assert (row["bytes"], row["bits"], row["linear_bits"]) == (
            found.total_bytes, found.average_bits, found.quantized_bits)  # fmt: skip
        assert (row["method"], row["activation_bits"]) == (row["name"], found.config.activation_bits)
    assert result["rows"][0]["bits"] == 16 and result["rows"][0]["bytes"] == 2 * found.parameters
    (difference,) = [d for d in result["differences"] if d["metric"] == "psnr"]
    assert (difference["model"], difference["minus"]) == ("hadamard", "rtn")
    rows = {row["name"]: row["metrics"]["psnr"]["mean"] for row in result["rows"][1:]}
    assert difference["mean"] == pytest.approx(rows["hadamard"] - rows["rtn"])


@pytest.fixture(scope="module")
def done(pixart, four, tmp_path_factory):
    """A finished run's folder."""
    out = tmp_path_factory.mktemp("done")
    evaluate(pixart.sources, pixart.reference, four, out, pixart.options())
    return out


def test_pictures_are_what_a_user_would_draw(pixart, four, done):
    pipeline = DiffusionPipeline.from_pretrained(pixart.folder, torch_dtype=torch.bfloat16)
    prompt = four[1]
    generator = torch.Generator().manual_seed(seed_of("scene-1"))
    image = pipeline(prompt.text, generator=generator, **pixart.call).images[0]
    with Image.open(done / "images" / "bf16" / "scene-1.png") as drawn:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(drawn))
        assert drawn.text == {"prompt": prompt.text, "seed": str(seed_of("scene-1"))}


def test_tables(done, four):
    rows = list(csv.DictReader((done / "table.csv").open(encoding="utf-8")))
    report = json.loads((done / "report.json").read_text())
    assert [r["model"] for r in rows] == [r["name"] for r in report["rows"]]
    assert float(rows[1]["psnr_low"]) == report["rows"][1]["metrics"]["psnr"]["low"] and rows[0]["psnr"] == ""
    lines = list(csv.DictReader((done / "prompts.csv").open(encoding="utf-8")))
    assert len(lines) == 8 and lines[0]["id"] == "scene-0" and lines[0]["prompt"] == four[0].text
    assert np.mean([float(r["psnr"]) for r in lines if r["model"] == "rtn"]) == pytest.approx(
        report["rows"][2]["metrics"]["psnr"]["mean"]
    )


def digests(paths):
    """Not the bytes: pytest takes minutes to show how two pictures differ."""
    return {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in paths if f.is_file()}


def test_a_finished_run_draws_and_scores_nothing(pixart, four, done, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("it loads")

    monkeypatch.setattr(draw, "load_pipeline", refuse)
    monkeypatch.setattr("dirotq.dirotq_core.evaluate.score.load_scorer", refuse)
    before = digests(done.rglob("*"))
    evaluate(pixart.sources, pixart.reference, four, done, pixart.options())
    assert digests(done.rglob("*")) == before


def results_of(folder):
    """What a run is about: reports, tables, and pictures."""
    files = [f for f in folder.rglob("*") if f.suffix in (".png", ".csv", ".json", ".html") and "scores" not in f.parts]
    return {f.relative_to(folder).as_posix(): d for f, d in digests(files).items()}


def test_killed_and_gone_on(pixart, four, done, tmp_path):
    """SIGKILL after the second picture of the first checkpoint; the same command makes the same files."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"id": p.id, "prompt": p.text} for p in four]))
    out = tmp_path / "out"
    extra = [f"--call={name}={json.dumps(value)}" for name, value in pixart.call.items()]
    command = ["evaluate", *pixart.sources, "--reference", pixart.reference, "--out", str(out), "--prompts",
               str(prompts), "--resamples", "200", "--device", "cpu", *extra]  # fmt: skip
    running = processes.start(COMMAND, *command)
    try:
        deadline = time.monotonic() + 120
        while not (out / "images" / "hadamard" / "scene-1.png").exists():
            assert running.process.is_alive() and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        running.kill()
        assert running.wait().returncode == -signal.SIGKILL
    assert not (out / "index.html").exists() and not (out / "images" / "rtn" / "scene-3.png").exists()
    assert main(command) == 0
    assert results_of(out) == results_of(done)


def test_interrupted_while_scoring(pixart, four, done, tmp_path, monkeypatch):
    from dirotq.dirotq_core.evaluate import metrics, score

    out = tmp_path / "out"
    shutil.copytree(done / "images", out / "images")
    seen = []

    def interrupt(image, reference):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(1)
        return psnr(image, reference)

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "psnr", interrupt)
        patch.setattr(score, "THREADS", 1)
        with pytest.raises(KeyboardInterrupt):
            evaluate(pixart.sources, pixart.reference, four, out, pixart.options())
    kept = (out / "scores" / "rtn" / "psnr.0.jsonl").read_text()
    assert len(kept.splitlines()) == 1
    # As if killed in the middle of a line.
    (out / "scores" / "rtn" / "psnr.0.jsonl").write_text(kept + '["scene-1", "12')
    evaluate(pixart.sources, pixart.reference, four, out, pixart.options())
    assert (out / "index.html").read_bytes() == (done / "index.html").read_bytes()


def test_a_batch_is_drawn_again_as_a_whole(pixart, four, tmp_path):
    options = pixart.options(batch=3)
    evaluate(pixart.sources[:1], pixart.reference, four, tmp_path / "a", options)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "images" / "hadamard" / "scene-1.png").unlink()
    evaluate(pixart.sources[:1], pixart.reference, four, tmp_path / "b", options)
    assert results_of(tmp_path / "a") == results_of(tmp_path / "b")


def test_more_prompts_and_other_drawing(pixart, four, done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    more = [*four, Prompt("scene-9", "a small red circle above a large blue square on white")]
    with pytest.raises(ValueError, match=r"was drawn for '.*', but 'scene-0' now is 'a dog'"):
        evaluate(pixart.sources, pixart.reference, [Prompt("scene-0", "a dog")], out, pixart.options())
    with pytest.raises(ValueError, match=r"drawn differently: call.num_inference_steps was 2 and is 3\. Give another"):
        evaluate(
            pixart.sources, pixart.reference, four, out, pixart.options(call={**pixart.call, "num_inference_steps": 3})
        )
    assert results_of(out) == results_of(done)
    result = evaluate(pixart.sources, pixart.reference, more, out, pixart.options())
    assert result["prompts"]["count"] == 5 and len(list((out / "images" / "rtn").glob("*.png"))) == 5


def test_activation_bits_make_rows(pixart, four, tmp_path):
    options = pixart.options(activation_bits=(4, 8))
    result = evaluate([pixart.sources[0]], pixart.reference, four[:2], tmp_path, options)
    names = [row["name"] for row in result["rows"]]
    assert names == ["bf16", "hadamard, A4", "hadamard, A8"]
    assert [row["activation_bits"] for row in result["rows"]] == [None, 4, 8]
    pipeline = DiffusionPipeline.from_pretrained(pixart.checkpoints["hadamard"], torch_dtype=torch.bfloat16)
    for bits in (4, 8):
        dirotq.set_activation_bits(pipeline, bits)
        image = pipeline(four[0].text, generator=torch.Generator().manual_seed(four[0].seed()), **pixart.call).images[0]
        drawn = pixels(tmp_path / "images" / f"hadamard, A{bits}", four[:1])[0]
        np.testing.assert_array_equal(np.asarray(image), drawn)
    with pytest.raises(ValueError, match=r"activation bits of .* must be of \(4, 8, 16\), got 5"):
        evaluate([pixart.sources[0]], pixart.reference, four, tmp_path, replace(options, activation_bits=(5,)))
    with pytest.raises(ValueError, match="none is among the models"):
        evaluate([f"x={pixart.folder}"], pixart.reference, four, tmp_path, options)


def test_sites_with_activation_bits_of_their_own(pixart, four, tmp_path):
    """The table tells their mean over layers, and what is drawn if other bits are asked for."""
    pipeline = load_pipeline("pixart-sigma-tiny", torch_dtype=torch.bfloat16)
    sites = [p for p in plan_sites(pipeline.transformer, dirotq.DiRotQConfig(method="robuq").resolved(calibrated=False))
             if p.quantize_input]  # fmt: skip
    digits = "".join("43"[i % 2] for i in range(len(sites)))
    config = dirotq.DiRotQConfig(method="robuq", activation_bits=4, site_activation_bits=digits)
    dirotq.quantize(pipeline, config, None, progress=False)
    pipeline.save_pretrained(tmp_path / "mixed")
    layers = [len(p.linears) for p in sites]
    mean = sum(n * int(d) for n, d in zip(layers, digits, strict=True)) / sum(layers)
    assert 3 < mean < 4 and mean != 3.5
    source = [f"mixed={tmp_path / 'mixed'}"]
    result = evaluate(source, pixart.reference, four[:1], tmp_path / "own", pixart.options())
    assert result["rows"][1]["activation_bits"] == pytest.approx(mean)
    assert f"<td>{mean:.2f}</td>" in (tmp_path / "own" / "index.html").read_text(encoding="utf-8")
    assert f"{mean:.2f}-bit activations" in format_table(inspect_checkpoint(tmp_path / "mixed"))
    result = evaluate(source, pixart.reference, four[:1], tmp_path / "3", pixart.options(activation_bits=(3,)))
    assert (result["rows"][1]["name"], result["rows"][1]["activation_bits"]) == ("mixed, A3", 3)
    assert "<td>3</td>" in (tmp_path / "3" / "index.html").read_text(encoding="utf-8")


def test_a_transformer_and_a_single_file_draw_with_the_references_parts(pixart, flux, four, tmp_path):
    for models, kind in ((pixart, "transformer"), (flux, "file")):
        source = models.checkpoints["hadamard"] / "transformer"
        if kind == "file":
            source = tmp_path / "hadamard.safetensors"
            assert main(["convert", str(models.checkpoints["hadamard"]), "--out", str(source)]) == 0
        out = tmp_path / kind
        evaluate([f"alone={source}", models.sources[0]], models.reference, four[:1], out, models.options())
        alone, whole = (pixels(out / "images" / name, four[:1])[0] for name in ("alone", "hadamard"))
        np.testing.assert_array_equal(alone, whole)


def test_models_on_the_hub(pixart, four, tmp_path, monkeypatch):
    from dirotq.dirotq_core.evaluate import subjects

    there = {"me/model": pixart.checkpoints["rtn"] / "transformer", "me/original": pixart.folder}
    monkeypatch.setattr(subjects, "download", lambda name, weights: there[name])
    result = evaluate(["me/model"], "bf16=me/original", four[:1], tmp_path, pixart.options())
    assert [row["name"] for row in result["rows"]] == ["bf16", "model"]
    assert result["rows"][1]["source"] == str(there["me/model"])


def test_a_model_that_is_nowhere(pixart, four, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'me/nothing' is "):
        evaluate(["me/nothing"], pixart.reference, four, tmp_path, pixart.options())


@pytest.mark.thorough
def test_two_processes_make_what_one_makes(pixart, four, done, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"id": p.id, "prompt": p.text} for p in four]))
    out = tmp_path / "out"
    extra = [f"--call={name}={json.dumps(value)}" for name, value in pixart.call.items()]
    command = ["evaluate", *pixart.sources, "--reference", pixart.reference, "--out", out, "--prompts", prompts,
               "--resamples", "200", "--device", "cpu", *extra]  # fmt: skip
    for done_ in processes.together(COMMAND, *command):
        assert done_.returncode == 0, done_.stderr
    assert (out / "scores" / "rtn" / "psnr.1.jsonl").exists()
    assert results_of(out) == results_of(done)
