"""Which model a checkpoint was made of, and what its card hands on."""

import logging

import pytest

from dirotq.dirotq_core.base_model import base_of, hub_id, inherit, look_up, of_folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev"),
        ("/home/me/.cache/huggingface/hub/models--lab--flux-tiny/snapshots/0a1b/transformer", "lab/flux-tiny"),
        ("models--lab--flux--tiny/snapshots/0a1b", "lab/flux--tiny"),
        ("my-flux", None),
        ("./lab/model", None),
        ("../lab", None),
        ("/lab/model", None),
        ("a/b/c", None),
        ("", None),
        (None, None),
        (3, None),
    ],
)
def test_hub_id(name, expected):
    assert hub_id(name) == expected


def test_a_folder_that_exists_is_no_id(tmp_path, monkeypatch):
    (tmp_path / "lab" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("lab/model") is None and base_of("lab/model") is None


def test_base_of_a_quantized_folder(tmp_path):
    """Its card says it, also to who loads the transformer alone; a dense model's card says nothing about itself."""
    (tmp_path / "transformer").mkdir()
    card = tmp_path / "README.md"
    card.write_text("---\nbase_model: lab/dense\nbase_model_relation: quantized\n---\n")
    assert base_of(tmp_path) == base_of(str(tmp_path / "transformer")) == "lab/dense"
    card.write_text("---\nbase_model:\n- lab/dense\nbase_model_relation: quantized\n---\n")
    assert base_of(tmp_path) == "lab/dense"
    card.write_text("---\nbase_model: lab/dense\nbase_model_relation: finetune\n---\n")
    assert base_of(tmp_path) is None
    card.write_text("# no metadata\n")
    assert base_of(tmp_path) is None


def test_inherit():
    given = {
        "license": "other",
        "license_link": "./LICENSE.md",
        "tags": ["x"],
        "language": [],
        "extra_gated_fields": {"a": 1},
    }
    kept = {"license": "other", "extra_gated_fields": {"a": 1}}
    assert inherit(given, None) == kept
    assert inherit(given, "lab/m") == kept | {"license_link": "https://huggingface.co/lab/m/blob/main/LICENSE.md"}
    assert inherit({"license_link": "https://example.org/l"}, "lab/m") == {"license_link": "https://example.org/l"}


def test_a_broken_card_does_not_stop_quantization(tmp_path, caplog):
    (tmp_path / "README.md").write_text("---\n: : [\n---\n")
    with caplog.at_level(logging.WARNING):
        found = of_folder(tmp_path)
    assert (found.name, found.metadata) == (None, {}) and "README.md" in caplog.text


def test_look_up(hub, caplog):
    found = look_up("lab/flux-tiny")
    assert (found.name, found.gated, found.metadata["license"]) == ("lab/flux-tiny", "auto", "other")
    assert look_up(None).name is None and "nothing says which model" in caplog.text
