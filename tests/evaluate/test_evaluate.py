"""From models to the report, with the embedded pipelines; interrupted, killed, and with what cannot be compared."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from filelock import FileLock
from PIL import Image

import dirotq
from dirotq.dirotq_core.cli import main
from dirotq.dirotq_core.evaluate import Prompt, draw, evaluate, seed_of
from dirotq.dirotq_core.evaluate.run import CONTROL
from dirotq.dirotq_core.inspect import inspect_checkpoint
from dirotq.dirotq_core.metrics import psnr


def pixels(folder, prompts):
    return [np.asarray(Image.open(folder / f"{p.id}.png")) for p in prompts]


@pytest.mark.parametrize("models", ["pixart", "flux"])
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
    code = "import sys; from dirotq.dirotq_core.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (out / "images" / "hadamard" / "scene-1.png").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
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


@pytest.fixture
def folders(tmp_path, folder_of_images, four):
    """A function that evaluates a folder of images against another one."""
    ids = [p.id for p in four]
    reference = folder_of_images(tmp_path / "reference", ids)
    model = folder_of_images(tmp_path / "model", ids, seed=1)

    def run(pixart, **changes):
        return evaluate([str(model)], str(reference), four, tmp_path / "out", pixart.options(**changes))

    return model, run


def test_folders_of_images(pixart, folders, folder_of_images, four):
    model, run = folders
    result = run(pixart)
    assert [row["kind"] for row in result["rows"]] == ["images", "images"]
    assert result["rows"][1]["bits"] is None and 5 < result["rows"][1]["metrics"]["psnr"]["mean"] < 9
    folder_of_images(model, [p.id for p in four])  # the reference's pictures
    assert run(pixart)["rows"][1]["metrics"]["psnr"] == {"mean": 100.0, "low": 100.0, "high": 100.0}


def test_missing_and_unlike_images(pixart, folders, folder_of_images, four):
    model, run = folders
    (model / "scene-2.png").unlink()
    with pytest.raises(ValueError, match=r"model lacks 1 of 4 images, the first scene-2\.png"):
        run(pixart)
    folder_of_images(model, ["scene-2"], size=(48, 64))
    with pytest.raises(ValueError, match=r"scene-2\.png has 48 × 64 pixels and .* 64 × 48; pairs are compared at one"):
        run(pixart)
    (model / "scene-2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"scene-2\.png is not a readable image"):
        run(pixart)


def test_a_control_cannot_be_drawn_from_images(pixart, folders, caplog):
    result = folders[1](pixart, control=True)
    assert len(result["rows"]) == 2 and "there will be no control" in caplog.text


def test_what_cannot_be_compared(pixart, flux, four, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for sources, reference, message in [
        ([f"x={flux.folder}"], pixart.reference, "is a FluxTransformer2DModel and the reference .* a PixArt"),
        ([str(flux.folder / "transformer")], pixart.reference, "is a FluxTransformer2DModel and the reference"),
        ([str(pixart.folder)], str(pixart.folder / "transformer"), "is a transformer alone; the reference must be"),
        ([f"a={pixart.folder}", f"A={pixart.folder}"], pixart.reference, "two rows are called 'a'"),
        ([str(empty)], pixart.reference, "neither a pipeline, nor a transformer, nor a folder of images"),
        ([f"../up={pixart.folder}"], pixart.reference, "must be SOURCE or NAME=SOURCE"),
        ([], pixart.reference, "no model to evaluate"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(sources, reference, four, tmp_path / "out", pixart.options())
    assert not (tmp_path / "out" / "images").exists()


def test_a_transformer_of_another_shape(pixart, four, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pixart.folder / "transformer", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_layers": 77}))
    with pytest.raises(ValueError, match=r"other has num_layers 77 and the reference .*; its pipeline cannot draw"):
        evaluate([str(other)], pixart.reference, four, tmp_path / "out", pixart.options())


def test_a_folder_that_lacks_images_is_refused_before_drawing(pixart, four, tmp_path, folder_of_images):
    theirs = folder_of_images(tmp_path / "theirs", [p.id for p in four[1:]])
    with pytest.raises(ValueError, match=r"theirs lacks 1 of 4 images, the first scene-0\.png"):
        evaluate([str(theirs)], pixart.reference, four, tmp_path / "out", pixart.options())
    assert not (tmp_path / "out" / "images").exists()


def test_two_runs_in_one_folder(pixart, folders, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / "lock"), pytest.raises(ValueError, match="another process is working in"):
        folders[1](pixart)
    assert folders[1](pixart)


def test_pictures_of_somebody_else_are_left_alone(pixart, four, tmp_path):
    theirs = tmp_path / "images" / "bf16" / "holiday.png"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"precious")
    with pytest.raises(ValueError, match="holds files that were not drawn here"):
        evaluate(pixart.sources, pixart.reference, four, tmp_path, pixart.options())
    assert theirs.read_bytes() == b"precious"


def test_a_wrong_argument_leaves_nothing_to_go_on_from(pixart, four, tmp_path):
    with pytest.raises(ValueError, match="PixArtSigmaPipeline has no argument 'foo'; it has prompt, "):
        evaluate(pixart.sources, pixart.reference, four, tmp_path, pixart.options(call={**pixart.call, "foo": 1}))
    assert evaluate(pixart.sources[:1], pixart.reference, four[:1], tmp_path, pixart.options())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--metrics", "beauty"], "unknown metric 'beauty', expected psnr, ssim, lpips, fid, clip, imagereward"),
        (["--call", "prompt=x"], "call must not hold 'prompt'"),
        (["--call", "x y=1"], "--call 'x y=1' must be NAME=VALUE"),
        (["--real", "x"], "real images serve FID; add fid to the metrics"),
        (["--prompts", "absent.txt"], "No such file"),
        (["--activation-bits", "5"], "must be of (4, 8, 16), got 5"),
        (["--judge-url", "http://localhost:1/v1"], "--judge-url needs --judge"),
        (["--judge-url", "localhost:1", "--judge", "x"], "must begin with http:// or https://"),
        (["--judge-url", "http://a:b@c/v1", "--judge", "x"], "a key goes to DIROTQ_JUDGE_API_KEY"),
        (["--judge", "no/such/judge"], "the judge 'no/such/judge' cannot be loaded"),
        (["--judge-revision", "x"], "--judge-revision needs --judge"),
        (["--judge", "x", "--judge-parallel", "4"], "--judge-parallel is for --judge-url"),
    ],
)
def test_a_command_that_cannot_run_says_why_in_one_line(pixart, tmp_path, capsys, argv, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "p.txt").write_text("a cat")
    command = ["evaluate", *pixart.sources, "--reference", pixart.reference, "--out", str(tmp_path / "out"),
               "--prompts", str(tmp_path / "p.txt"), *argv]  # fmt: skip
    assert main(command) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "out" / "images").exists()


def test_a_package_that_is_missing(pixart, four, tmp_path, monkeypatch):
    from dirotq.dirotq_core.evaluate import metrics

    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name in ("torchvision", "torch_fidelity") else 1)
    with pytest.raises(ImportError, match="metric 'fid' needs torch-fidelity torchvision; install with: pip install"):
        evaluate(pixart.sources, pixart.reference, four, tmp_path, pixart.options(metrics=("psnr", "fid")))


def test_weights_that_cannot_be_had_are_missed_before_drawing(pixart, four, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from dirotq.dirotq_core.evaluate import metrics

    monkeypatch.setattr(metrics, "CLIP_MODEL", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="metric 'clip' cannot be loaded: "):
        evaluate(pixart.sources, pixart.reference, four, tmp_path / "out", pixart.options(metrics=("clip",)))
    assert not (tmp_path / "out" / "images").exists()


def test_two_processes_make_what_one_makes(pixart, four, done, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"id": p.id, "prompt": p.text} for p in four]))
    out = tmp_path / "out"
    extra = [f"--call={name}={json.dumps(value)}" for name, value in pixart.call.items()]
    child = tmp_path / "child.py"
    child.write_text("import sys; from dirotq.dirotq_core.cli import main; sys.exit(main(sys.argv[1:]))")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(child),
               "evaluate", *pixart.sources, "--reference", pixart.reference, "--out", str(out), "--prompts",
               str(prompts), "--resamples", "200", "--device", "cpu", *extra]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    assert (out / "scores" / "rtn" / "psnr.1.jsonl").exists()
    assert results_of(out) == results_of(done)
