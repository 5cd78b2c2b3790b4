"""The first step calls one block of each kind twice, to compile its kernels together; nothing else of it is seen."""

import contextlib
import os

import pytest
import torch

from dirotq.dirotq_core import first_step, input_site
from dirotq.kernels import rehearsal

from .. import processes
from ..marks import on_gpu


class Rehearsals:
    """As if on a GPU: in a rehearsal, what sites compute is nothing but NaN."""

    def __init__(self, monkeypatch):
        self.count, self.under_way, self.error = 0, False, None
        monkeypatch.setattr(first_step, "_compiles_for", lambda device: True)
        monkeypatch.setattr(first_step, "rehearsal", self.one)
        monkeypatch.setenv(rehearsal.ENVIRONMENT, "2")
        compute = input_site.InputSite.compute

        def spoilt(site, x):
            made = compute(site, x)
            if not self.under_way:
                return made
            return made._replace(scale=torch.full_like(made.scale, torch.nan)) if made.scale is not None else made

        monkeypatch.setattr(input_site.InputSite, "compute", spoilt)

    @contextlib.contextmanager
    def one(self):
        self.count += 1
        self.under_way = True
        try:
            if self.error is not None:
                raise self.error
            yield
        finally:
            self.under_way = False


@pytest.fixture
def rehearsals(monkeypatch):
    return Rehearsals(monkeypatch)


def kinds(model):
    return 2 if hasattr(model, "single_transformer_blocks") else 1


def test_each_kind_of_block_rehearses_once(case, helpers, rehearsals, monkeypatch):
    model = case.load()
    with monkeypatch.context() as alone:
        alone.setenv(rehearsal.ENVIRONMENT, "1")
        expected = helpers.run(model)
    assert rehearsals.count == 0
    for _ in range(3):
        assert torch.equal(helpers.run(model), expected)
    assert rehearsals.count == kinds(model)
    assert all(block._compiled_call_impl is None for block in model.modules())


def test_other_shapes_rehearse_again(flux_case, helpers, rehearsals):
    model = flux_case.load()
    arguments = helpers.inputs(model)
    half = {**arguments, "hidden_states": arguments["hidden_states"][:, :32], "img_ids": torch.zeros(32, 3)}
    with torch.no_grad():
        for given in (arguments, half, arguments, half):
            model(**given)
    assert rehearsals.count == 4


@pytest.mark.parametrize("backend", ["eager"])
def test_compiled_blocks_rehearse_as_they_are(case, helpers, rehearsals, backend):
    model = case.load()
    expected = helpers.run(model)
    before = rehearsals.count
    torch._dynamo.reset()
    model = case.load()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    compiled = [block._compiled_call_impl for block in model.modules()]
    for _ in range(2):
        assert torch.equal(helpers.run(model), expected)
    assert rehearsals.count == before + kinds(model)
    assert [block._compiled_call_impl for block in model.modules()] == compiled


def test_not_where_somebody_looks(flux_case, helpers, rehearsals):
    model = flux_case.load()
    calls = []
    hooked = model.transformer_blocks[0].attn.register_forward_hook(lambda *_: calls.append("double"))
    whole = model.single_transformer_blocks[0]
    whole.forward = lambda *args, **kwargs: calls.append("single") or type(whole).forward(whole, *args, **kwargs)
    helpers.run(model)
    assert calls == ["double", "single"] and rehearsals.count == 0
    hooked.remove()
    del whole.forward
    model(**helpers.inputs(model))  # records gradients
    with torch.no_grad(), torch.autograd.profiler.profile(use_cpu=True):
        model(**helpers.inputs(model))
    model.train()
    helpers.run(model)
    assert rehearsals.count == 0


def test_not_on_the_cpu(flux_case, helpers, monkeypatch):
    monkeypatch.setenv(rehearsal.ENVIRONMENT, "2")
    monkeypatch.setattr(first_step, "rehearsal", lambda: pytest.fail("rehearsed"))
    helpers.run(flux_case.load())


def test_without_memory_there_is_none(flux_case, helpers, rehearsals, caplog):
    model = flux_case.load()
    rehearsals.error = torch.OutOfMemoryError("out of memory")
    output = helpers.run(model)
    assert sum("one after the other" in record.message for record in caplog.records) == 2
    assert torch.isfinite(output).all() and torch.equal(output, helpers.run(model))


def test_an_error_is_the_models_own(flux_case, helpers, rehearsals):
    model = flux_case.load()
    arguments = helpers.inputs(model) | {"joint_attention_kwargs": {"unknown": 1}}
    rehearsals.error = RuntimeError("no such thing")
    with torch.no_grad(), pytest.raises(RuntimeError, match="no such thing"):
        model(**arguments)
    rehearsals.error = None
    assert torch.isfinite(helpers.run(model)).all()


def test_a_dense_model_forgets(flux_case, helpers, rehearsals):
    model = flux_case.load()
    helpers.run(model)
    model.dequantize()
    assert first_step._SEEN not in vars(model) and not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs


@on_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_cold_kernels_compile_in_threads(case, helpers, tmp_path, compiled):
    """And the model computes what it does without: to the last bit, from the first step on."""
    torch.save(helpers.inputs(case.load()), tmp_path / "arguments.pt")
    code = f"""
import os, threading, torch, diffusers, dirotq, triton.compiler
if {compiled}:
    import torch._inductor.config
    torch._inductor.config.compile_threads = 1
names, original = [], triton.compiler.compile
def compile(src, *args, **kwargs):
    if "dirotq" in src.fn.__module__:
        names.append(threading.current_thread().name.rpartition("_")[0])
    return original(src, *args, **kwargs)
triton.compiler.compile = compile
cls = getattr(diffusers, {case.cls.__name__!r})
model = cls.from_pretrained({str(case.quantized)!r}, torch_dtype=torch.bfloat16).to("cuda")
arguments = torch.load({str(tmp_path / "arguments.pt")!r})
arguments = {{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}}
if {compiled}:
    model.compile_repeated_blocks(fullgraph=True)
with torch.no_grad():
    outputs = [model(**arguments)[0] for _ in range(3)]
assert all(torch.equal(y, outputs[0]) for y in outputs)
torch.save([outputs[0].cpu(), names], os.environ["RESULT"])
"""
    found = []
    for threads in ("1", "4"):
        env = os.environ | {
            "TRITON_CACHE_DIR": str(tmp_path / threads), rehearsal.ENVIRONMENT: threads,
            "RESULT": str(tmp_path / f"{threads}.pt"),
        }  # fmt: skip
        done = processes.run(code, env=env)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(tmp_path / f"{threads}.pt"))
    (alone, one), (ahead, several) = found
    assert torch.equal(alone, ahead)
    in_threads = several.count("dirotq-compile")
    assert not one.count("dirotq-compile") and len(one) > 5
    assert in_threads >= len(one) - 2 and len(several) - in_threads <= 2, (one, several)
