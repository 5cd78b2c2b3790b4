"""Folders of images, and what cannot be compared: it is named before anything is drawn."""

import json
import shutil

import pytest
from filelock import FileLock

from dirotq.dirotq_core.cli import main
from dirotq.dirotq_core.evaluate import evaluate


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


def test_a_folder_to_write_inside_of_what_is_read(pixart, folders, four, tmp_path):
    """The next run would take what this one writes for a part of the model."""
    model, _ = folders
    for sources, reference, real, message in [
        ([str(model)], str(tmp_path / "reference"), None, r"model/report is in .*/model, which is read"),
        ([str(pixart.folder)], str(model), None, r"model/report is in .*/model, which is read"),
        ([str(pixart.folder)], pixart.reference, model, r"model/report is in .*/model, which is read"),
    ]:
        options = pixart.options(real=real, metrics=("fid",) if real else ("psnr",))
        with pytest.raises(ValueError, match=message):
            evaluate(sources, reference, four, model / "report", options)
    assert not (model / "report").exists()


def test_the_folder_where_one_stands(folders, four, tmp_path, monkeypatch, pixart):
    model, _ = folders
    monkeypatch.chdir(model)
    result = evaluate(["."], str(tmp_path / "reference"), four, tmp_path / "out", pixart.options())
    assert result["rows"][1]["name"] == "model"


def test_fid_of_one_picture_is_refused_before_drawing(pixart, four, tmp_path, folder_of_images, monkeypatch):
    from dirotq.dirotq_core.evaluate import metrics

    monkeypatch.setattr(metrics, "find_spec", lambda name: True)
    real = folder_of_images(tmp_path / "real", ["x"])
    for prompts, options, message in [
        (four[:1], {}, "FID needs at least 2 prompts, got 1"),
        (four, {"real": real}, "FID needs at least 2 real images, got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(
                pixart.sources, pixart.reference, prompts, tmp_path / "out", pixart.options(metrics=("fid",), **options)
            )
    assert not (tmp_path / "out" / "images").exists()


def test_a_quantized_reference_is_told(pixart, four, tmp_path, caplog):
    result = evaluate([f"x={pixart.folder}"], pixart.sources[1], four[:1], tmp_path, pixart.options())
    assert any("reference 'rtn' is itself quantized" in note for note in result["notes"])
    assert "is itself quantized" in caplog.text


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
