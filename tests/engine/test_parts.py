"""The engine's small parts: steps, samples, files, the journal, estimates."""

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dirotq.dirotq_core.checkpoint import CheckpointError
from dirotq.dirotq_core.cli import main
from dirotq.dirotq_core.engine import EngineOptions, plan_checkpoint, source
from dirotq.dirotq_core.engine.blocks import read_ahead, take_rows
from dirotq.dirotq_core.engine.draw import chosen_steps
from dirotq.dirotq_core.engine.journal import Journal, differences
from dirotq.dirotq_core.engine.samples import Activations, Sample, pack_samples, read_samples
from dirotq.dirotq_core.files import read_headers
from dirotq.dirotq_core.inspect import skeleton
from dirotq.dirotq_core.prompts import read_prompts
from dirotq.dirotq_core.safetensors_file import write_safetensors

from .conftest import CAPTIONS


@given(st.integers(0, 500), st.integers(1, 60), st.integers(1, 70))
def test_chosen_steps(image, steps, wanted):
    chosen = chosen_steps(image, steps, wanted)
    assert len(chosen) == min(steps, wanted) and chosen <= set(range(steps))
    gaps = [b - a for a, b in zip(sorted(chosen), sorted(chosen)[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_together_images_see_the_whole_schedule():
    assert set().union(*(chosen_steps(i, 20, 4) for i in range(16))) == set(range(20))


def test_samples_survive_a_file(tmp_path):
    shared = torch.randn(3, 4)
    samples = [
        Sample({"x": torch.randn(2, 3, 4).bfloat16(), "rope": (shared, shared.clone()), "mask": None, "scale": 2.5,
                "more": {"a": [torch.zeros(0, 2), True]}}, held_out=i == 1)
        for i in range(2)
    ]  # fmt: skip
    tensors, form = pack_samples(samples)
    assert len(tensors) == 2 + 1 + 1  # what is nested once
    write_safetensors(tmp_path / "s.safetensors", tensors, form)
    for before, after in zip(samples, read_samples(tmp_path / "s.safetensors"), strict=True):
        assert after.held_out == before.held_out
        assert str(after.arguments) == str(before.arguments)
    with pytest.raises(ValueError, match="called with a set"):
        pack_samples([Sample({"x": {1, 2}}, False)])


@pytest.mark.parametrize("limit", [0, 1e9])
def test_activations(limit, tmp_path):
    samples = [Sample({"x": torch.full((1, 5), float(i)), "t": torch.ones(1)}, False) for i in range(3)]
    kept = Activations(samples, ("x",), limit, tmp_path / "scratch")
    assert kept.on_disk == (limit == 0) == (tmp_path / "scratch").exists()
    assert kept.arguments(2)["x"][0, 0] == 2
    for turn in (10.0, 20.0):
        for i in range(3):
            kept.put(i, {"x": torch.full((1, 5), turn + i)})
        assert [kept.arguments(i)["x"][0, 4].item() for i in range(3)] == [turn, turn + 1, turn + 2]
    assert kept.arguments(0)["t"] is samples[0].arguments["t"] and samples[1].arguments["x"][0, 0] == 1


def test_text_encoders_see_a_few_prompts_at_a_time(flux, monkeypatch):
    from dirotq.dirotq_core.demo.embedded import load_pipeline
    from dirotq.dirotq_core.engine.pipeline import in_rows

    pipe = load_pipeline("flux-tiny")
    ids = pipe.tokenizer([f"{i} circles" for i in range(6)], padding="max_length", return_tensors="pt").input_ids
    seen, forward = [], pipe.text_encoder.forward

    def watched(ids, **kwargs):
        seen.append(len(ids))
        return forward(ids, **kwargs)

    whole, parts = forward(ids, output_hidden_states=True), in_rows(watched, ids, output_hidden_states=True)
    assert seen == [4, 2] and type(parts) is type(whole) and parts.keys() == whole.keys()
    torch.testing.assert_close(parts.pooler_output, whole.pooler_output)
    torch.testing.assert_close(parts.hidden_states, whole.hidden_states)


def test_take_rows_splits_what_belongs_to_rows():
    arguments = {"x": torch.arange(12).reshape(4, 3), "rope": (torch.zeros(4, 2),), "mask": None, "one": torch.ones(1)}
    some = take_rows(arguments, 4, [1, 3])
    assert some["x"].tolist() == [[3, 4, 5], [9, 10, 11]] and some["rope"][0].shape == (4, 2) and some["one"].ndim


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int8])
shapes = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text("abc.é", min_size=1, max_size=4), st.tuples(dtypes, shapes), min_size=1, max_size=6))
def test_written_files_are_safetensors(tmp_path_factory, spec):
    folder = tmp_path_factory.mktemp("f")
    tensors = {n: torch.randn(shape).mul(9).to(dtype) for n, (dtype, shape) in spec.items()}
    write_safetensors(folder / "a.safetensors", tensors)
    loaded = load_file(folder / "a.safetensors")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[n], t) for n, t in tensors.items())
    write_safetensors(folder / "b.safetensors", read_headers([folder / "a.safetensors"]))
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()


def test_prompts_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "p.txt") == ["a red circle"]


def test_an_empty_work_folder_binds_to_nothing(tmp_path):
    journal = Journal(tmp_path / "out", {"a": 1})
    journal.close()  # killed: nothing is tidied up
    with Journal(tmp_path / "out", {"a": 2}) as journal:
        assert not journal.resumed
    assert not list(tmp_path.iterdir())


def test_journal(tmp_path):
    with Journal(tmp_path / "out", {"a": 1}) as journal:
        assert not journal.resumed and journal.record("x") is None
        journal.commit("x", {"t": torch.ones(2)}, {"n": 3})
        assert journal.record("x") == {"n": 3}
    with Journal(tmp_path / "out", {"a": 1}) as journal:
        assert journal.resumed and journal.record("x") == {"n": 3}
        record = journal.part("x").with_suffix(".json")
        body = json.loads(record.read_text())
        assert body["sha256"] == hashlib.sha256(journal.part("x").read_bytes()).hexdigest()
        record.write_text(json.dumps(body)[:20])
        assert journal.record("x") is None
        journal.remove()
    assert not list(tmp_path.iterdir())


def test_differences_name_the_value():
    assert differences({"a": {"b": 1, "c": [2]}}, {"a": {"b": 1, "c": [3]}, "d": None}) == ["a.c was [2] and is [3]"]


def test_read_ahead_keeps_the_order_and_passes_errors_on():
    assert list(read_ahead(iter([lambda i=i: i for i in range(5)]))) == list(range(5))
    results = read_ahead(iter([lambda: 1, lambda: 1 / 0]))
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(read_ahead(iter([]))) == []


def fake_flux(folder):
    """A header of FLUX.1-dev's shape; the data are a hole in the file."""
    config = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True, "num_layers": 19}
    model, header, end = skeleton({**config, "num_single_layers": 38}), {}, 0
    for name, t in model.state_dict().items():
        header[name] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [end, end + 2 * t.numel()]}
        end += 2 * t.numel()
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "num_single_layers": 38}))
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)


def test_plan_of_flux(tmp_path, capsys):
    fake_flux(tmp_path / "flux")
    plan = plan_checkpoint(tmp_path / "flux", prompts=CAPTIONS, options=EngineOptions(samples=16))
    assert plan.seconds is not None and plan.seconds > 1 and "TFLOP/s" in plan.text()
    assert plan.linears == 418 + 76 and plan.blocks == 57 and plan.tokens_per_input == 4608
    assert plan.dense_bytes == pytest.approx(23.80e9, rel=0.01) and plan.output_bytes == pytest.approx(6.6e9, rel=0.01)
    assert plan.inputs == 64 and plan.input_bytes == 64 * 4608 * 3072 * 2
    assert plan.gpu_bytes < 11e9
    assert main(["quantize", str(tmp_path / "flux"), "--out", str(tmp_path / "o"), "--dry-run", "--data-free"]) == 0
    assert "494 linears at 304 sites in 57 blocks" in capsys.readouterr().out
    small = EngineOptions(max_gpu_memory=2, device="cuda")
    assert ["exists already", "no pipeline around", "2 are allowed"] == [
        next(part for part in ("exists already", "no pipeline around", "2 are allowed") if part in problem)
        for problem in plan.obstacles(tmp_path / "flux", tmp_path / "work", small)
        if "of room" not in problem
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["flux"]


def test_a_model_on_the_hub(flux, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns, ignore_patterns=None):
        asked.append(allow_patterns)
        return str(flux.model.folder)

    def no_card(name, filename):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_card)
    assert not source.open_source("some/flux", weights=False).entries and asked == [["*.json", "*/*.json"]]
    assert source.open_source("some/flux").entries
    assert "transformer/*.safetensors" in asked[-1] and not any("*.bin" in p for p in asked[-1])

    def fail(*args, **kwargs):
        raise huggingface_hub.errors.HFValidationError("Repo id must be\nsomething")

    def stop(kind, message):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(kind(message)))
        with pytest.raises(CheckpointError) as error:
            source.open_source("some/flux")
        return str(error.value)

    class Refused(huggingface_hub.errors.GatedRepoError):
        def __init__(self, message):
            Exception.__init__(self, message)

    class Unknown(huggingface_hub.errors.RepositoryNotFoundError):
        def __init__(self, message):
            Exception.__init__(self, message)

    assert "is no folder, and 'some/flux' is gated: accept its licence on the Hub and log in" in stop(Refused, "403")
    assert "is no folder, and the Hub has no 'some/flux', or it is private" in stop(Unknown, "401 Client Error.")
    broken = huggingface_hub.errors.HfHubHTTPError.__bases__[0]
    assert "the Hub cannot be reached (peer closed)" in stop(broken, "peer closed")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"^'no/such' is no folder, and 'no/such' is no Hub id; it must look"):
        source.open_source("no/such")


@pytest.mark.parametrize("options", [{"samples": 0}, {"timesteps": 1.5}, {"max_gpu_memory": -1}, {"dtype": torch.int8}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        EngineOptions(**options)
