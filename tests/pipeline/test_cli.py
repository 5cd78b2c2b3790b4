"""The command line, run as a user runs it."""

import json

import pytest

from dirotq.dirotq_core.cli import main


def run(capsys, *argv):
    status = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def prompt_file(pixart, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(pixart.captions[:3]) + "\n\n", encoding="utf-8")
    return path


def quantize(capsys, pixart, out, *extra):
    size = ("--steps", 2, "--height", 128, "--width", 128, "--guidance", 2)
    return run(capsys, "quantize", pixart.model.folder, "--out", out, *size, *extra)


def test_quantize_then_inspect(capsys, pixart, prompt_file, tmp_path):
    out = tmp_path / "out"
    status, text, err = quantize(capsys, pixart, out, "--prompts", prompt_file, "--rank", 32, "--basis", "pca")
    assert status == 0, err
    assert "bits per weight on average" in text
    config = json.loads((out / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["rank"] == 32 and config["method"] == "dirotq"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "prompts.txt"]  # no temporary folder is left
    status, text, err = run(capsys, "inspect", out)
    assert status == 0, err
    row = next(line for line in text.splitlines() if line.startswith("transformer_blocks.0.ff.net.2"))
    assert "W4A4" in row and " 32 " in row and float(row.split()[-1]) > 10


def test_data_free_transformer_only(capsys, pixart, tmp_path):
    out = tmp_path / "out"
    status, _, err = quantize(capsys, pixart, out, "--data-free", "--transformer-only")
    assert status == 0, err
    assert (out / "config.json").is_file() and not (out / "model_index.json").exists()


def test_weight_only_modules(capsys, pixart, tmp_path):
    out = tmp_path / "out"
    status, text, err = quantize(capsys, pixart, out, "--data-free", "--method", "rtn", "--weight-only", "ff.net.2")
    assert status == 0, err
    status, text, err = run(capsys, "inspect", out)
    schemes = {
        line.split()[0]: line.split()[4] for line in text.splitlines() if line.startswith("transformer_blocks.0.")
    }
    assert schemes["transformer_blocks.0.ff.net.2"] == "W4A16" and schemes["transformer_blocks.0.attn1.to_q"] != "W4A16"


def test_what_goes_wrong_is_one_line(capsys, pixart, tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9\n")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    (tmp_path / "there").mkdir()
    cases = [
        (("--prompts", latin), "latin.txt is not UTF-8 (byte 3)"),
        (("--prompts", empty), "empty.txt holds no prompt"),
        (("--prompts", tmp_path / "absent.txt"), "No such file"),
        (("--data-free", "--method", "paper"), "method 'paper' needs calibration data"),
        (("--data-free", "--rank", 8), "rank 8 needs calibration data"),
        (("--method", "magic"), "unknown method 'magic'"),
        (("--method", "rtn", "--rank", 8), "method 'rtn' has no 16-bit subspace"),
        (("--device", "tpu9000"), "--device 'tpu9000'"),
        (("--rank", 8, "--high-fraction", 0.1), "give rank (8) or high_fraction (0.1), not both"),
    ]
    for extra, message in cases:
        status, _, err = quantize(capsys, pixart, tmp_path / "out", *extra)
        assert status == 1 and message in err and err.count("\n") == 1, (extra, err)
    status, _, err = quantize(capsys, pixart, tmp_path / "there", "--data-free")
    assert status == 1 and "exists already" in err
    assert not (tmp_path / "out").exists()


def test_inspect_what_is_not_a_checkpoint(capsys, pixart, tmp_path):
    for path, message in [
        (tmp_path, "holds no transformer"),
        (pixart.model.folder, "is not a DiRotQ checkpoint: its config.json has no quantization_config"),
    ]:
        status, _, err = run(capsys, "inspect", path)
        assert status == 1 and message in err


@pytest.mark.parametrize("argv", [["quantize", "x", "--out", "y", "--steps", "0"], ["demo", "--prompts", "-1"]])
def test_counts_below_one_are_refused(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and "must be a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["demo"], ["quantize"], ["inspect"]])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0 and "usage: dirotq" in capsys.readouterr().out


def test_inspect_of_something_broken_is_one_line(capsys, pixart, tmp_path):
    folder = tmp_path / "out"
    status, _, err = quantize(capsys, pixart, folder, "--data-free", "--method", "rtn", "--transformer-only")
    assert status == 0, err
    status, _, err = run(capsys, "inspect", folder, "--limit", -1)
    assert status == 1 and err == "dirotq inspect: limit must be at least 0, got -1\n"
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    status, _, err = run(capsys, "inspect", folder)
    assert status == 1 and "it is truncated" in err and err.count("\n") == 1
    (folder / "config.json").write_text("[]")
    status, _, err = run(capsys, "inspect", folder)
    assert status == 1 and "must hold a JSON object, not a list" in err and err.count("\n") == 1
