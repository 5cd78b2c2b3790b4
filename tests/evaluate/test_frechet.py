"""FID: the distance against its definition, and features that are extracted once."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from dirotq.dirotq_core.evaluate import evaluate, frechet, metrics
from dirotq.dirotq_core.evaluate.frechet import Chunk, chunks, extract, frechet_distance, gather, resized
from dirotq.dirotq_core.evaluate.images import find_images, real_images

from .stand_ins import random_inception


def definition(x, y):
    """Heusel et al. 2017, eq. 6, with SciPy's matrix square root, regularized by nothing."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    sx, sy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.asarray(sqrtm(sx @ sy))
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(sx) + np.trace(sy) - 2 * np.trace(root).real


@pytest.mark.parametrize(("width", "n", "m"), [(8, 100, 70), (16, 17, 400), (5, 6, 6)])
def test_against_the_definition(width, n, m):
    generator = np.random.default_rng(width)
    mix = generator.normal(size=(width, width))
    x = generator.normal(size=(n, width)).astype(np.float32)
    y = (generator.normal(0.3, 1.5, size=(m, width)) @ mix).astype(np.float32)
    assert frechet_distance(x, y) == pytest.approx(definition(x, y), rel=1e-6)


def test_fewer_pictures_than_features():
    """Singular covariances: the square root's trace through eigenvalues of the product, clipped at 0."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(10, 40)), generator.normal(1, 2, size=(12, 40))
    sx, sy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values = np.linalg.eigvals(sx @ sy).real.clip(0)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(sx) + np.trace(sy) - 2 * np.sqrt(values).sum()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_equal_sets_and_shifts():
    x = np.random.default_rng(1).normal(size=(50, 6))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(4 * 6, rel=1e-9)
    assert frechet_distance(x, 3 * x - 2 * x.mean(0)) == pytest.approx(4 * np.cov(x, rowvar=False).trace(), rel=1e-9)


@pytest.mark.parametrize("y", [np.zeros((1, 3)), np.zeros((5, 4)), np.zeros(3)])
def test_sets_that_have_no_distance(y):
    with pytest.raises(ValueError, match="two sets of at least 2 features"):
        frechet_distance(np.zeros((5, 3)), y)


def test_features_are_extracted_once(tmp_path, folder_of_images):
    folder = folder_of_images(tmp_path / "images", map(str, range(70)), size=(20, 12))
    calls = []

    def network(batch):
        calls.append(len(batch))
        assert batch.dtype == torch.uint8 and batch.shape[1:] == (3, 299, 299)
        return batch.float().mean((2, 3))

    parts = chunks(sorted(folder.iterdir()), tmp_path / "features")
    extract(parts, network, "", progress=False)
    first = gather(parts)
    assert first.shape == (70, 3) and calls == [64, 6]
    extract(chunks(sorted(folder.iterdir()), tmp_path / "features"), network, "", progress=False)
    assert calls == [64, 6]
    changed = sorted(folder.iterdir())[69]
    Image.new("RGB", (20, 12), (9, 8, 7)).save(changed)
    assert parts[1].features() is None
    with pytest.raises(ValueError, match=r"00001\.npz is missing or of other pictures"):
        gather(parts)
    extract(parts, network, "", progress=False)
    again = gather(parts)
    assert calls == [64, 6, 6] and again[69].tolist() == [9, 8, 7]
    np.testing.assert_array_equal(again[:69], first[:69])


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 broken", b"\x93NUMPY"])
def test_damaged_features_are_extracted_again(tmp_path, folder_of_images, damage):
    folder = folder_of_images(tmp_path / "images", ["a"])
    part = Chunk(tuple(folder.iterdir()), tmp_path / "x.npz")
    part.save(np.ones((1, 2), np.float32))
    assert part.features().tolist() == [[1, 1]]
    part.target.write_bytes(damage)
    assert part.features() is None


def test_resizing_averages(tmp_path):
    """Antialiased: a fine checkerboard becomes grey, where sampling would keep black and white."""
    board = (np.indices((1196, 1196)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).convert("RGB").save(tmp_path / "board.png")
    small = resized(tmp_path / "board.png")
    assert small.shape == (3, 299, 299) and small[:, 5:-5, 5:-5].float().std() < 2
    assert float(small.float().mean()) == pytest.approx(127.5, abs=1)


def test_real_images_of_the_prompts(tmp_path, folder_of_images):
    """In folders by category, as MJHQ-30K's."""
    folder_of_images(tmp_path / "people", ["b", "x"])
    folder_of_images(tmp_path / "animals", ["a"])
    assert [f.stem for f in real_images(tmp_path, None)] == ["a", "b", "x"]
    assert [f.stem for f in real_images(tmp_path, ["b", "a"])] == ["b", "a"]
    with pytest.raises(ValueError, match=r"lacks 1 of 2 images, the first c\.png"):
        real_images(tmp_path, ["a", "c"])
    folder_of_images(tmp_path / "more", ["a"])
    with pytest.raises(ValueError, match="has 2 images for 'a'"):
        real_images(tmp_path, ["a"])
    with pytest.raises(ValueError, match="is not a folder of images"):
        real_images(tmp_path / "nowhere", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image"):
        real_images(tmp_path / "empty", ["a"])


def test_ids_with_a_suffix(tmp_path, folder_of_images):
    """Ids that are file names: the file itself, or what is drawn for such an id."""
    folder_of_images(tmp_path, ["a", "b", "b.png"])
    found = find_images("", tmp_path, ["a.png", "b", "b.png"]).files
    assert {i: f.name for i, f in found.items()} == {"a.png": "a.png", "b": "b.png", "b.png": "b.png.png"}
    folder_of_images(tmp_path / "more", ["a"])
    with pytest.raises(ValueError, match=r"has 2 images for 'a\.png'"):
        find_images("", tmp_path, ["a.png"])


def test_fid_in_a_run(tmp_path, folder_of_images, four, pixart, monkeypatch):
    """Against the reference's pictures and real ones, of features that are mean colours; the note says it is of few."""
    monkeypatch.setattr(metrics, "find_spec", lambda name: True)
    monkeypatch.setattr(frechet, "load_extractor", lambda device: lambda batch: batch.float().mean((2, 3)))
    ids = [p.id for p in four]
    folders = [folder_of_images(tmp_path / name, ids, seed) for seed, name in enumerate(("a", "b", "real"))]
    options = pixart.options(metrics=("psnr", "fid"), real=folders[2])
    result = evaluate([str(folders[1])], str(folders[0]), four, tmp_path / "out", options)
    features = [np.stack([resized(f / f"{i}.png").float().mean((1, 2)).numpy() for i in ids]) for f in folders]
    first, second = result["rows"]
    assert first["fid_real"] == pytest.approx(definition(features[0], features[2]), rel=1e-4)
    assert second["fid_real"] == pytest.approx(definition(features[1], features[2]), rel=1e-4)
    assert second["fid"] == pytest.approx(definition(features[1], features[0]), rel=1e-4) and "fid" not in first
    assert any(note.startswith("FID is of 4 images; below 2049") for note in result["notes"])
    assert "FID to real images ↓" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_the_real_network(tmp_path, monkeypatch, folder_of_images):
    """torch-fidelity's Inception with random weights: the plumbing, not the numbers."""
    pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    random_inception(monkeypatch)
    extractor = frechet.load_extractor("cpu")
    parts = chunks(sorted(folder_of_images(tmp_path / "i", ["a", "b", "c"]).iterdir()), tmp_path / "f")
    extract(parts, extractor, "", progress=False)
    features = gather(parts)
    assert features.shape == (3, 2048) and np.isfinite(features).all() and features.std() > 0
