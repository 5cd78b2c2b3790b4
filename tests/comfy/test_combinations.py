"""Every pair of choices that the nodes offer: it works, or one sentence says before any work why it does not."""

from types import SimpleNamespace

import pytest

from dirotq.dirotq_core.activations import ACTIVATION_FORMATS
from dirotq.dirotq_core.config import DiRotQConfig
from dirotq.dirotq_core.methods import METHODS

from . import graphs, models
from .graphs import node
from .server import GraphError

#: Method → activation bits out of 4, 8 and 16 that it has no format for.
LACKING = {"nvfp4": {8}, "robuq": {8}, "nf4": {4, 8}}


def options(object_info, kind, name):
    return object_info[kind]["input"]["required"][name][1]["options"]


@pytest.fixture(scope="module")
def shapes(checkpoint):
    """Of the dense FLUX.1's tensors."""
    from dirotq.dirotq_core.single_file import to_native

    dense = models.flux()
    return {n: tuple(t.shape) for n, t in to_native(dense.state_dict(), checkpoint.config).items()}


def sentence(method, bits, known):
    return f"method '{method}' has no {bits}-bit activations; choose {known}"


def test_methods_and_bits_of_quantizing(core, object_info, shapes):
    from dirotq.nodes.quantize import Quantize

    bits_offered = options(object_info, "DiRotQQuantizeModel", "activation_bits")
    assert options(object_info, "DiRotQQuantizeModel", "method") == list(METHODS) and bits_offered == ["4", "8", "16"]
    for method in METHODS:
        for bits in bits_offered:
            said = Quantize.validate_inputs(method, bits)
            if int(bits) in LACKING.get(method, ()):
                known = " or ".join(b for b in bits_offered if int(b) not in LACKING[method])
                assert said == sentence(method, bits, known)
                continue
            assert said is True
            config = core.quantizing.calibrated_config(method, 64, int(bits), 0)
            _, plans = core.quantizing.native_plans(shapes, config)
            for plan in plans:
                name = config.activation(plan.bits_of(config)) if plan.quantize_input else None
                assert name is None or ACTIVATION_FORMATS[name].bits == int(bits)


def test_values_that_are_not_offered(core):
    from dirotq.nodes.quantize import Quantize

    assert Quantize.validate_inputs("gguf", "4").startswith("method must be one of dirotq, paper, ")
    assert Quantize.validate_inputs("dirotq", "5") == "activation_bits must be one of 4, 8, 16, got '5'"
    # What the graph computes is not known yet; execute refuses it.
    assert Quantize.validate_inputs(None, "4") is True and Quantize.validate_inputs("nf4", None) is True


def test_bits_of_applying(core, object_info, shapes):
    """Data-free: no method is asked for that needs calibration."""
    for bits in options(object_info, "DiRotQApply", "activation_bits"):
        config = DiRotQConfig(activation_bits=int(bits)).resolved(calibrated=False)
        assert core.quantizing.native_plans(shapes, config)[1]
        assert not METHODS[config.method].needs_calibration


def test_methods_and_bits_of_loading(core, object_info, shapes):
    for method in METHODS:
        config = DiRotQConfig(method=method).resolved(calibrated=True)
        plans = {p.owner: p for p in core.quantizing.native_plans(shapes, config)[1]}
        checkpoint = SimpleNamespace(quantization=config, plans=plans)
        for bits in options(object_info, "DiRotQLoadModel", "activation_bits"):
            for lora in options(object_info, "DiRotQLoadModel", "lora"):
                if bits != "default" and int(bits) in LACKING.get(method, ()):
                    with pytest.raises(ValueError, match=f"^this checkpoint's {sentence(method, bits, 'default or ')}"):
                        core.model.make_settings(checkpoint, bits, "auto", lora)
                    continue
                settings = core.model.make_settings(checkpoint, bits, "auto", lora)
                wanted = config.activation_bits if bits == "default" else int(bits)
                for name, activation in settings.activations.items():
                    quantized = plans[name].quantize_input and wanted != 16
                    assert (activation is not None) == quantized
                    assert not quantized or ACTIVATION_FORMATS[activation].bits == wanted


def test_a_graph_is_refused_before_it_is_queued(client):
    prompt = {
        "dense": graphs.dense_flux(),
        "clip": node("DiRotQTestTextEncoder"),
        "model": node(
            "DiRotQQuantizeModel", model=["dense", 0], filename="never", method="nf4", rank=64, activation_bits="4",
            samples=1, steps=1, width=64, height=64, cfg=1.0, seed=0, prompts="", clip=["clip", 0],
        ),
        "report": node("PreviewAny", source=["model", 1]),
    }  # fmt: skip
    with pytest.raises(GraphError, match="method 'nf4' has no 4-bit activations; choose 16"):
        client.queue(prompt)


def test_a_model_is_examined_before_prompts_are_encoded(core, folders, monkeypatch):
    """An encoder of 10 GB is not asked for anything if the model cannot be quantized."""
    from dirotq.dirotq_core.single_file import read_native
    from dirotq.nodes.quantize import Quantize

    def encode(*_):
        raise AssertionError("encoded")

    checkpoint = read_native(folders["flux"])
    model = core.model.make_model(checkpoint, core.model.make_settings(checkpoint, "4", "auto", "side branch"))
    clip = SimpleNamespace(tokenize=encode, encode_from_tokens_scheduled=encode)
    monkeypatch.setattr(core.quantizing, "target_path", lambda name: name)
    settings = dict.fromkeys(("samples", "steps"), 1) | {"width": 64, "height": 64, "cfg": 1.0, "seed": 0}
    with pytest.raises(ValueError, match="this MODEL is quantized already"):
        Quantize.execute(model, "x", "dirotq", 64, "4", prompts="a cat", clip=clip, **settings)
