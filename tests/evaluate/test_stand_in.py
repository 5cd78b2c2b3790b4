"""One command with everything: all metrics and a judge on networks of random weights, and a report that says so."""

import csv
import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from dirotq.dirotq_core.cli import main
from dirotq.dirotq_core.evaluate import frechet, image_reward, metrics

from .stand_ins import random_alexnet, random_inception, reward_tokenizer, small_reward

NETWORKS = ["lpips", "fid", "clip", "imagereward", "judge"]


@pytest.fixture
def networks(monkeypatch, tmp_path, clip):
    """Random weights for every metric; where LPIPS' and FID's packages are not installed, a random projection."""
    monkeypatch.setattr(metrics, "CLIP_MODEL", str(clip))
    model, _ = small_reward()
    monkeypatch.setattr(
        image_reward, "load_image_reward", lambda device: image_reward.scorer(model, reward_tokenizer(), device)
    )
    if find_spec("torchmetrics") and find_spec("torchvision"):
        random_alexnet(tmp_path, monkeypatch)
    else:
        plain = replace(metrics.METRICS["lpips"], load=_difference, modules=("transformers",))
        monkeypatch.setitem(metrics.METRICS, "lpips", plain)
    if find_spec("torch_fidelity") and find_spec("torchvision"):
        random_inception(monkeypatch)
    else:
        plain = replace(metrics.METRICS["fid"], modules=("transformers",))
        monkeypatch.setitem(metrics.METRICS, "fid", plain)
        monkeypatch.setattr(frechet, "load_extractor", lambda device: _project)


def _difference(device):
    projection = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).numpy()
    return lambda image, reference, prompt: float(abs((image / 255.0 - reference / 255.0) @ projection).mean())


def _project(batch):
    projection = torch.randn(3 * 23 * 23, 16, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.avg_pool2d(batch.float(), 13).flatten(1) @ projection


@pytest.fixture
def command(pixart, four, vlm, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"id": p.id, "prompt": p.text} for p in four[:2]]))
    extra = [f"--call={name}={json.dumps(value)}" for name, value in pixart.call.items()]
    return ["evaluate", *pixart.sources, "--reference", pixart.reference, "--out", str(tmp_path / "out"), "--prompts",
            str(prompts), "--resamples", "50", "--device", "cpu", "--metrics", "all", "--judge", str(vlm),
            "--judge-tokens", "1", *extra]  # fmt: skip


def test_all_metrics_and_a_judge_that_mean_nothing(networks, command, tmp_path, capsys):
    assert main([*command, "--stand-in"]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["meaningless"] == NETWORKS
    note = "The numbers of LPIPS, FID, CLIP score, ImageReward, the judge mean nothing: networks of random weights"
    assert report["notes"][0].startswith(note)
    for row in report["rows"][2:]:
        assert set(row["metrics"]) == {"psnr", "ssim", "lpips", "clip", "imagereward"} and row["fid"] > 0
        assert set(row["judge"]) == {"quality", "alignment"}
    with (tmp_path / "out" / "table.csv").open(encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert {row["meaningless"] for row in rows} == {" ".join(NETWORKS)} and all(row["lpips"] for row in rows[1:])
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert note in page and "<h2>A model as judge (means nothing)</h2>" in page
    heads = ["LPIPS ↓", "CLIP score ↑", "ImageReward ↑", "FID to reference ↓"]
    text = capsys.readouterr().out
    for head in heads:
        assert f"<th>{head} (means nothing)</th>" in page and f"{head} (means nothing)" in text
    assert "PSNR dB ↑ (" not in page and "<td>LPIPS (means nothing)</td>" in page and "<td>SSIM</td>" in page
    assert "question (means nothing)" in text and note in text

    assert main(command) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["meaningless"] == [] and not any("mean nothing" in n for n in report["notes"])
    assert "means nothing" not in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
