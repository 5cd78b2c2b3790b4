"""The first step calls one block of each kind twice, to compile its kernels together; nothing else of it is seen."""

import contextlib
import copy
import os
import threading

import pytest
import torch

from dirotq.dirotq_core import first_step, input_site
from dirotq.kernels import backend, rehearsal

from .. import processes
from ..marks import on_gpu


class Rehearsals:
    """As if on a GPU: in a rehearsal, what sites compute is nothing but NaN."""

    def __init__(self, monkeypatch):
        self.count, self.under_way, self.error, self.spoil = 0, False, None, True
        monkeypatch.setattr(first_step, "_compiles_for", lambda device: True)
        monkeypatch.setattr(first_step, "rehearsal", self.one)
        monkeypatch.setenv(rehearsal.ENVIRONMENT, "2")
        monkeypatch.setattr(rehearsal, "_PARSES_IN_THREADS", True)  # nothing is parsed here
        compute = input_site.InputSite.compute

        def spoilt(site, x):
            made = compute(site, x)
            if not (self.under_way and self.spoil):
                return made
            return made._replace(scale=torch.full_like(made.scale, torch.nan)) if made.scale is not None else made

        monkeypatch.setattr(input_site.InputSite, "compute", spoilt)

    def of(self, call):
        """How many there are in a call."""
        before = self.count
        call()
        return self.count - before

    @contextlib.contextmanager
    def one(self):
        self.count += 1
        self.under_way = True
        try:
            yield
            if self.error is not None:
                raise self.error
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


def test_compiled_blocks_rehearse_as_they_are(case, helpers, rehearsals):
    model = case.load()
    expected = helpers.run(model)
    before = rehearsals.count
    torch._dynamo.reset()
    model = case.load()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    compiled = [block._compiled_call_impl for block in model.modules()]
    for _ in range(2):
        assert torch.equal(helpers.run(model), expected)
    assert rehearsals.count == before + kinds(model)
    assert [block._compiled_call_impl for block in model.modules()] == compiled


def test_not_where_somebody_looks(flux_case, helpers, rehearsals):
    model = flux_case.load()
    double, single = model.transformer_blocks[0], model.single_transformer_blocks[0]

    def count(call=lambda: helpers.run(model)):
        first_step.forget_rehearsals(model)
        return rehearsals.of(call)

    def profiled():
        with torch.autograd.profiler.profile(use_cpu=True):
            helpers.run(model)

    assert count() == 2
    assert count(lambda: model(**helpers.inputs(model))) == 0  # records gradients
    assert count(profiled) == 0
    model.train()
    assert count() == 0
    model.eval()
    for register in (double.attn.register_forward_hook, double.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert count() == 1  # the other kind
        handle.remove()
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert count() == 0
    everywhere.remove()
    single.forward = lambda *args, **kwargs: type(single).forward(single, *args, **kwargs)
    assert count() == 1
    del single.forward
    for name in ("_hf_hook", "_diffusers_hook"):
        vars(single)[name] = object()
        first_step.forget_rehearsals(model)
        assert not first_step._may_rehearse(single, [torch.zeros(1)], {})
        del vars(single)[name]
    with torch.no_grad():
        assert first_step._may_rehearse(single, [torch.zeros(1)], {})
    with torch.inference_mode():
        assert count(lambda: model(**helpers.inputs(model))) == 2


def test_not_with_attention_that_may_keep_what_it_sees(flux_case, helpers, rehearsals):
    model = flux_case.load()
    attn = model.single_transformer_blocks[0].attn
    usual, seen = attn.processor, []

    class Counting(type(usual)):
        def __call__(self, *args, **kwargs):
            seen.append(self)
            return super().__call__(*args, **kwargs)

    attn.set_processor(Counting())
    assert rehearsals.of(lambda: helpers.run(model)) == 1 and len(seen) == 1
    usual._parallel_config = object()  # over several GPUs, which wait for one another
    attn.set_processor(usual)
    assert not first_step._forgetful(attn)
    usual._parallel_config = None
    assert first_step._forgetful(attn)


def test_not_without_a_gpu(flux_case, helpers, monkeypatch):
    monkeypatch.setenv(rehearsal.ENVIRONMENT, "2")
    monkeypatch.setattr(rehearsal, "_PARSES_IN_THREADS", True)
    monkeypatch.setattr(first_step, "rehearsal", lambda: pytest.fail("rehearsed"))
    helpers.run(flux_case.load())


def test_where_triton_compiles(monkeypatch):
    device, state = torch.device("cuda"), {"obstacle": None, "capturing": False}
    monkeypatch.setattr(backend, "obstacle", lambda device: state["obstacle"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    assert first_step._compiles_for(device) and not first_step._compiles_for(torch.device("cpu"))
    for name, value in (("obstacle", "Triton is not installed"), ("capturing", True)):
        monkeypatch.setitem(state, name, value)
        assert not first_step._compiles_for(device)
        monkeypatch.setitem(state, name, None)
    for name, value in ((backend.ENVIRONMENT, "reference"), ("TRITON_INTERPRET", "1")):
        with monkeypatch.context() as asked:
            asked.setenv(name, value)
            assert not first_step._compiles_for(device)
    assert first_step._compiles_for(device)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("can't start new thread")])
def test_what_fails_in_one_is_only_said(flux_case, helpers, rehearsals, caplog, error):
    model = flux_case.load()
    with pytest.MonkeyPatch.context() as alone:
        alone.setenv(rehearsal.ENVIRONMENT, "1")
        expected = helpers.run(model)
    rehearsals.error = error
    assert rehearsals.of(lambda: torch.testing.assert_close(helpers.run(model), expected, rtol=0, atol=0)) == 2
    assert sum(str(error) in record.message for record in caplog.records) == 2


@pytest.mark.parametrize("error", [None, RuntimeError("ends early")])
def test_nothing_of_it_is_remembered(flux_case, helpers, rehearsals, error):
    """Not even where a sibling is left out, so that the last site still waits for it."""
    model = flux_case.load()
    block = model.single_transformer_blocks[0]
    site = next(m for m in block.modules() if isinstance(m, input_site.InputSite) and m.users > 1)

    class LeavesOneOut(type(block)):
        def forward(self, *args, **kwargs):
            site.memo.entry = (site, None, None, None, 1)
            if error is not None:
                raise error

    block.__class__ = LeavesOneOut
    first_step._rehearse(block, (), {})
    assert rehearsals.count == 1 and site.memo.entry is None


def test_after_a_step_that_failed(flux_case, helpers, rehearsals):
    """As people do: out of memory, so they turn offloading on. No block runs behind its hooks."""
    model = flux_case.load()
    expected = helpers.run(model)
    first_step.forget_rehearsals(model)
    block = model.single_transformer_blocks[0]
    fail = model.transformer_blocks[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        helpers.run(model)
    fail.remove()
    assert block._compiled_call_impl is not None
    calls = []
    block.forward = lambda *args, **kwargs: calls.append("hooked") or type(block).forward(block, *args, **kwargs)
    assert rehearsals.of(lambda: torch.testing.assert_close(helpers.run(model), expected, rtol=0, atol=0)) == 0
    assert calls == ["hooked"] and block._compiled_call_impl is None


def test_threads_share_a_model(flux_case, helpers, rehearsals):
    model = flux_case.load()
    with pytest.MonkeyPatch.context() as alone:
        alone.setenv(rehearsal.ENVIRONMENT, "1")
        expected = helpers.run(model)
    rehearsals.spoil = False  # whether one is under way is kept for all threads here
    outputs = []
    workers = [threading.Thread(target=lambda: outputs.append(helpers.run(model))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(outputs) == 4 and all(torch.equal(y, expected) for y in outputs)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_copies_begin_anew_and_a_dense_model_forgets(flux_case, helpers, rehearsals):
    model = flux_case.load()
    helpers.run(model)
    assert rehearsals.of(lambda: helpers.run(copy.deepcopy(model))) == 2
    with torch.no_grad():
        first_step.rehearse_blocks(model, list(model.transformer_blocks), (), {})
    assert model.transformer_blocks[0]._compiled_call_impl is not None
    model.dequantize()
    assert model not in first_step._seen and not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs
    assert all(module._compiled_call_impl is None for module in model.modules())


@on_gpu
@pytest.mark.skipif(not rehearsal._PARSES_IN_THREADS, reason="this Python compiles one kernel after the other")
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
