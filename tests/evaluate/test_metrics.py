"""Metrics with networks of random weights: what goes in and what comes out, not what it means."""

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from dirotq.dirotq_core.evaluate import evaluate, image_reward, metrics
from dirotq.dirotq_core.evaluate.image_reward import preprocess

from .stand_ins import published, random_alexnet, reward_tokenizer, small_reward


def noise(seed, height=40, width=56):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_clip_score(clip, monkeypatch):
    """Against the projections of the two encoders, called apart."""
    monkeypatch.setattr(metrics, "CLIP_MODEL", str(clip))
    score = metrics.load_scorer("clip", "cpu")
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    for seed, prompt in enumerate(("a red cat", "circle " * 30)):
        image = noise(seed)
        inputs = processor(text=[prompt], images=[image], return_tensors="pt", truncation=True)
        with torch.no_grad():
            text = model.text_model(inputs["input_ids"], inputs["attention_mask"]).pooler_output
            x = model.text_projection(text)[0].double().numpy()
            y = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)[0].double().numpy()
        expected = 100 * max(float(x @ y / np.sqrt((x @ x) * (y @ y))), 0)
        assert score(image, image[::-1], prompt) == pytest.approx(expected, abs=1e-4)


def test_clip_and_judge_free_columns(clip, monkeypatch, tmp_path, folder_of_images, four, pixart):
    """A metric of single pictures is of the reference as well."""
    monkeypatch.setattr(metrics, "CLIP_MODEL", str(clip))
    ids = [p.id for p in four]
    a, b = folder_of_images(tmp_path / "a", ids), folder_of_images(tmp_path / "b", ids, seed=1)
    result = evaluate([str(b)], str(a), four, tmp_path / "out", pixart.options(metrics=("clip", "psnr")))
    assert [sorted(row["metrics"]) for row in result["rows"]] == [["clip"], ["clip", "psnr"]]
    assert "CLIP score ↑" in (tmp_path / "out" / "index.html").read_text()


def oracle(w, pixels, ids, mask):
    """The published network, written out in float64 from the papers: ViT (pre-norm), BERT with cross-attention."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name, eps):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    def attend(q, k, v, allowed=None):
        q, k, v = (x.unflatten(-1, (4, 8)).transpose(0, 1) for x in (q, k, v))
        logits = q @ k.transpose(1, 2) / 8**0.5
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        return (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)

    v = "blip.visual_encoder"
    kernel = w[f"{v}.patch_embed.proj.weight"].flatten(1)
    patches = pixels.double().unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).reshape(49, -1)
    x = torch.cat([w[f"{v}.cls_token"][0], patches @ kernel.T + w[f"{v}.patch_embed.proj.bias"]])
    x = x + w[f"{v}.pos_embed"][0]
    for i in range(2):
        b = f"{v}.blocks.{i}"
        x = x + linear(attend(*linear(norm(x, f"{b}.norm1", 1e-6), f"{b}.attn.qkv").chunk(3, -1)), f"{b}.attn.proj")
        x = x + linear(gelu(linear(norm(x, f"{b}.norm2", 1e-6), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
    image = norm(x, f"{v}.norm", 1e-6)
    t = "blip.text_encoder"
    h = w[f"{t}.embeddings.word_embeddings.weight"][ids] + w[f"{t}.embeddings.position_embeddings.weight"][: len(ids)]
    h = norm(h, f"{t}.embeddings.LayerNorm", 1e-12)
    for i in range(2):
        b = f"{t}.encoder.layer.{i}"
        for kind, source, allowed in (("attention", None, mask.bool()[None, None]), ("crossattention", image, None)):
            names = [f"{b}.{kind}.self.{part}" for part in ("query", "key", "value")]
            kv = h if source is None else source
            out = attend(linear(h, names[0]), linear(kv, names[1]), linear(kv, names[2]), allowed)
            h = norm(h + linear(out, f"{b}.{kind}.output.dense"), f"{b}.{kind}.output.LayerNorm", 1e-12)
        out = linear(gelu(linear(h, f"{b}.intermediate.dense")), f"{b}.output.dense")
        h = norm(h + out, f"{b}.output.LayerNorm", 1e-12)
    y = h[0]
    for index in (0, 2, 4, 6, 7):
        y = linear(y, f"mlp.layers.{index}")
    return (float(y) - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_against_its_equations():
    model, weights = small_reward()
    pixels = torch.stack([preprocess(noise(i, 300, 260)) for i in range(2)])
    ids, mask = torch.tensor([[2, 6, 7, 8, 3, 0, 0], [2, 9, 10, 3, 0, 0, 0]]), torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:], mask[1, 4:] = 0, 0
    with torch.no_grad():
        found = model(pixels, ids, mask)
    for i in range(2):
        assert float(found[i]) == pytest.approx(oracle(weights, pixels[i], ids[i], mask[i]), rel=1e-3, abs=1e-4)


def test_image_reward_names_what_does_not_fit():
    model, _ = small_reward()
    state = published(2, 2)
    for change, message in (
        (lambda s: s.pop("mlp.layers.7.bias"), r"lack 'head\.4\.bias'"),
        (lambda s: s.update({"mlp.layers.9.bias": torch.ones(1)}), r"have no use for 'head\.mlp\.layers\.9\.bias'"),
        (lambda s: s.update({"blip.visual_encoder.norm.bias": torch.ones(5)}), "have another .*post_layernorm.bias"),
    ):
        changed = dict(state)
        change(changed)
        with pytest.raises(ValueError, match=message):
            model.load_published(changed)


def test_image_reward_scores_a_picture(monkeypatch, tmp_path):
    """From the published file to a number, without the Hub."""
    model, weights = small_reward()
    score = image_reward.scorer(model, reward_tokenizer(), "cpu")
    image = noise(3, 224, 300)
    ids = torch.tensor([2, 6, 7, 8, 3] + [0] * 30)
    expected = oracle(weights, preprocess(image), ids, (ids != 0).long())
    assert score(image, image, "a red cat") == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert score(image, image, "a large circle") != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (448, 448), (300, 600), (600, 300), (100, 90)])
def test_preprocessing_cuts_the_middle(height, width):
    """A picture whose left half is black and right half white keeps its halves, normalized by CLIP's numbers."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, width // 2 :] = 255
    pixels = preprocess(image)
    assert pixels.shape == (3, 224, 224)
    means, stds = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for c in range(3):
        assert float(pixels[c, :, :100].mean()) == pytest.approx(-means[c] / stds[c], abs=1e-4)
        assert float(pixels[c, :, 124:].mean()) == pytest.approx((1 - means[c]) / stds[c], abs=1e-4)


def test_lpips_with_random_weights(monkeypatch, tmp_path):
    pytest.importorskip("torchmetrics")
    pytest.importorskip("torchvision")
    random_alexnet(tmp_path, monkeypatch)
    score = metrics.load_scorer("lpips", "cpu")
    a, b = noise(0, 70, 80), noise(1, 70, 80)
    assert score(a, a, "") == 0 and score(a, b, "") > 0
    assert score(a, b, "") == pytest.approx(score(b, a, ""), rel=1e-5)
    half = ((a.astype(float) + b) / 2).astype(np.uint8)
    assert 0 < score(a, half, "") < score(a, b, "")
