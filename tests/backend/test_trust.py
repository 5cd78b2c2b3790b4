"""Saving that is killed, threads that share a process, and what is said where Triton cannot run."""

import copy
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings

import pytest
import torch

import dirotq
from dirotq import kernels
from dirotq.dirotq_core import saving
from dirotq.kernels import backend

from .. import processes

# --- saving -------------------------------------------------------------------------------------------------------

#: Saves other activation bits over a checkpoint, and is killed when a part of the weights is written.
KILLED = """
import os, signal, sys, torch, dirotq, safetensors.torch
from diffusers import FluxTransformer2DModel
model = FluxTransformer2DModel.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
dirotq.set_activation_bits(model, 4)
with torch.no_grad():
    model.x_embedder.bias.add_(1)
write, files = safetensors.torch.save_file, []
def interrupted(tensors, path, metadata=None):
    files.append(path)
    if len(files) == int(sys.argv[2]):
        open(path, "wb").write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(tensors, path, metadata)
safetensors.torch.save_file = interrupted
model.save_pretrained(sys.argv[1], max_shard_size=sys.argv[3])
"""


def files_of(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize(("write", "shard"), [(1, "5GB"), (2, "200KB")])
def test_killed_while_saving_over_a_checkpoint(flux_case, helpers, tmp_path, write, shard):
    model = flux_case.load()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    before = files_of(tmp_path)
    killed = processes.run(KILLED, tmp_path, write, shard)
    assert killed.returncode == -signal.SIGKILL
    assert files_of(tmp_path) == before
    assert torch.equal(helpers.run(flux_case.load(tmp_path)), helpers.run(model))
    model.save_pretrained(tmp_path, max_shard_size=shard)  # which clears what the killed one left
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == [] and files_of(tmp_path) == before


def test_a_full_disk_while_saving(flux_case, tmp_path, monkeypatch):
    import safetensors.torch

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    model = flux_case.load()
    model.save_pretrained(tmp_path)
    before = files_of(tmp_path)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert files_of(tmp_path) == before and len(list(tmp_path.iterdir())) == len(before)


def test_variants_share_a_configuration(flux_case, helpers, tmp_path):
    """Weights of another variant must not get this model's quantization, or a dense model any."""
    model = flux_case.load()
    for variant in (None, "again"):
        model.save_pretrained(tmp_path / "ours", variant=variant)
    assert torch.equal(helpers.run(flux_case.load(tmp_path / "ours", variant="again")), helpers.run(model))
    dense = flux_case.load()
    dense.dequantize()
    dense.save_pretrained(tmp_path / "dense")
    before = {p.name: p.read_bytes() for p in (tmp_path / "dense").iterdir()}
    with pytest.raises(
        ValueError, match=r"holds diffusion_pytorch_model\.safetensors, a variant of another quantization"
    ):
        model.save_pretrained(tmp_path / "dense", variant="w4")
    assert {p.name: p.read_bytes() for p in (tmp_path / "dense").iterdir()} == before
    other = flux_case.on_the_fly(dirotq.DiRotQConfig(activation_bits=4))
    with pytest.raises(ValueError, match="save this model in a folder of its own"):
        other.save_pretrained(tmp_path / "ours", variant="w4a4")
    model.save_pretrained(tmp_path / "dense")  # over the same weights, as with any model
    assert torch.equal(helpers.run(flux_case.load(tmp_path / "dense")), helpers.run(model))


@pytest.mark.parametrize("variant", [None, "w4a8"])
def test_saving_over_the_own_source(flux_case, helpers, tmp_path, variant):
    """Tensors may still be mapped from the file; shards that the new save has not are gone, other files stay."""
    flux_case.load().save_pretrained(tmp_path, max_shard_size="200KB", variant=variant)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "diffusion_pytorch_model.other.safetensors").write_bytes(b"another variant")
    model = flux_case.load(tmp_path, variant=variant)
    expected = helpers.run(model)
    model.save_pretrained(tmp_path, variant=variant)
    stem = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
    others = {"README.md", "config.json", "diffusion_pytorch_model.other.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == {f"{stem}.safetensors"} | others
    assert torch.equal(helpers.run(model), expected)
    assert torch.equal(helpers.run(flux_case.load(tmp_path, variant=variant)), expected)


#: Waits for the others, then saves three times.
SAVES = """
import sys, torch, dirotq
from diffusers import FluxTransformer2DModel
model = FluxTransformer2DModel.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
gate.wait(100)
for _ in range(3):
    model.save_pretrained(sys.argv[2], max_shard_size="200KB", is_main_process=sys.argv[3] == "0")
"""


@pytest.mark.parametrize("mains", [["0", "0", "0"], ["0", "1", "1"]], ids=["every rank", "one main process"])
def test_processes_saving_into_one_folder(flux_case, tmp_path, mains):
    """As scripts under torchrun do, all of them or with `is_main_process` of one."""
    flux_case.load().save_pretrained(tmp_path, max_shard_size="200KB")
    before = files_of(tmp_path)
    gate = processes.CONTEXT.Barrier(len(mains))
    ranks = [processes.start(SAVES, flux_case.quantized, tmp_path, main, gate=gate) for main in mains]
    for rank in ranks:
        assert rank.wait().returncode == 0, rank.stderr[-2000:]
    assert files_of(tmp_path) == before and all(p.is_file() for p in tmp_path.iterdir())


def test_threads_saving_into_one_folder(flux_case, tmp_path):
    """Models that differ: one of them is whole in the end."""
    models, wanted = [flux_case.load() for _ in range(4)], []
    for i, model in enumerate(models):
        with torch.no_grad():
            model.x_embedder.bias.fill_(i)
            model.proj_out.bias.fill_(i)
        model.save_pretrained(tmp_path / f"{i}", max_shard_size="100KB")
        wanted.append(files_of(tmp_path / f"{i}"))
    for _ in range(3):
        at_once(*(lambda m=m: m.save_pretrained(tmp_path / "all", max_shard_size="100KB") for m in models))
        assert files_of(tmp_path / "all") in wanted
        assert all(p.is_file() for p in (tmp_path / "all").iterdir())


def test_a_folder_just_made_is_not_cleared(flux_case, tmp_path, monkeypatch):
    """One thread saves between another's making its folder and listing it."""
    models, others, there = [flux_case.load() for _ in range(2)], [], []
    make = tempfile.mkdtemp

    def made(**kwargs):
        folder = make(**kwargs)
        if not others:
            others.append(threading.Thread(target=models[1].save_pretrained, args=(tmp_path,)))
            others[0].start()
            others[0].join(0.5)
            there.append(os.path.isdir(folder))
        return folder

    monkeypatch.setattr(saving.tempfile, "mkdtemp", made)
    models[0].save_pretrained(tmp_path)
    others[0].join()
    assert there == [True]
    assert {p.name for p in tmp_path.iterdir()} == set(files_of(flux_case.quantized))


def test_only_what_a_dead_process_left_is_cleared(flux_case, tmp_path):
    model, pid = flux_case.load(), os.getpid()
    dead = processes.run("print(os.getpid())")
    names = {f"{saving._place()}-{dead.stdout.strip()}-a": False, f"{saving._place()}-{pid}-a": False}  # pids return
    names |= {f"{saving._place()}-{os.getppid()}-a": True, f"otherhost-{pid}-a": True, "mine": True}
    for name in names:
        (tmp_path / f"{saving.PREFIX}{name}").mkdir()
    model.save_pretrained(tmp_path)
    assert {n: (tmp_path / f"{saving.PREFIX}{n}").exists() for n in names} == names


def test_a_file_in_the_way_is_named(flux_case, tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(ValueError, match=r"model is a file; give a folder"):
        flux_case.load().save_pretrained(tmp_path / "model")


def test_other_models_are_saved_as_ever(flux_case, tmp_path):
    flux_case.load()  # which teaches diffusers
    flux_case.load(flux_case.dense).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}


# --- threads ------------------------------------------------------------------------------------------------------


def at_once(*jobs):
    """Results of the functions, each in a thread of its own, begun together."""
    results, errors = [None] * len(jobs), []
    gate = threading.Barrier(len(jobs))

    def work(i, job):
        gate.wait()
        try:
            results[i] = job()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(jobs)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors
    return results


def test_two_pipelines_at_once(pipeline, draw):
    """Each its own transformer, activation bits, scheduler and tokenizers (of which old ones know one thread)."""
    pipes, captions = [], ["a small blue circle on white", "a large red square on green"]
    for bits in (4, 8):
        twin = copy.deepcopy(pipeline.transformer)
        dirotq.set_activation_bits(twin, bits)
        own = {k: copy.deepcopy(v) for k, v in pipeline.components.items() if not isinstance(v, torch.nn.Module)}
        pipes.append(type(pipeline)(**{**pipeline.components, **own, "transformer": twin}))
        pipes[-1].set_progress_bar_config(disable=True)
    jobs = [lambda p=p, c=c: draw(p, c, num_inference_steps=4) for p, c in zip(pipes, captions, strict=True)]
    expected = [job() for job in jobs]
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(at_once(*jobs), expected, strict=True))


@pytest.mark.parametrize("fused", [True, False], ids=["one product", "one by one"])
def test_one_transformer_in_two_threads(case, helpers, fused):
    """What siblings share of an input is kept per model, in one slot, which the threads write in turn."""
    model = case.load()
    dirotq.set_activation_bits(model, 8 if fused else 16)
    arguments = [helpers.inputs(model) for _ in range(2)]
    arguments[1]["hidden_states"] = -arguments[1]["hidden_states"]

    @torch.no_grad()
    def job(i):
        return [model(**arguments[i])[0] for _ in range(8)]

    expected = [job(0)[0], job(1)[0]]
    assert not torch.equal(*expected)
    for result, y in zip(at_once(lambda: job(0), lambda: job(1)), expected, strict=True):
        assert all(torch.equal(x, y) for x in result)


# --- where Triton cannot run --------------------------------------------------------------------------------------


@pytest.fixture
def untold():
    """Nothing has been found out or said before, or is remembered afterwards."""
    for cached in (backend._obstacle, backend._say_once):
        cached.cache_clear()
    yield
    for cached in (backend._obstacle, backend._say_once):
        cached.cache_clear()


def test_on_the_cpu_nothing_is_warned_of(flux_case, helpers, untold):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isfinite(helpers.run(flux_case.load())).all()


@pytest.mark.parametrize(
    ("kind", "said"),
    [("mps", "Triton kernels run on CUDA and ROCm devices, not on mps"),
     ("xpu", "Triton kernels run on CUDA and ROCm devices, not on xpu")],
)  # fmt: skip
def test_other_devices_are_told_that_it_is_plain_pytorch(kind, said, untold):
    """macOS's among them."""
    with pytest.warns(RuntimeWarning, match=f"dirotq computes in plain PyTorch: {said}"):
        function = backend.implementation("linear_a8", torch.device(kind))
    assert function is kernels.reference.linear_a8
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        backend.implementation("linear_a8", torch.device(kind))


@pytest.mark.parametrize(
    ("properties", "said"),
    [
        ({"version": "3.2.0"}, r"Triton 3\.2\.0 is older than 3\.4, which the kernels need"),
        ({"capability": (7, 5)}, "Tesla T4 is sm_75; the kernels need sm_80 or newer"),
        ({"missing": "linux"}, r"Triton is not installed \(pip install triton\)"),
        ({"missing": "win32"}, r"Triton is not installed \(pip install triton-windows\)"),
    ],
)
def test_a_gpu_that_cannot_is_named_with_the_reason(monkeypatch, untold, properties, said):
    from types import SimpleNamespace

    version = SimpleNamespace(__version__=properties.get("version", "3.6.0"))
    monkeypatch.setattr(backend, "find_spec", lambda name: None if "missing" in properties else version)
    monkeypatch.setattr(backend, "import_module", lambda name, *a: version)
    monkeypatch.setattr(sys, "platform", properties.get("missing", sys.platform))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: properties.get("capability", (8, 0)))
    monkeypatch.setattr(backend, "_module", lambda name: kernels.reference)
    with pytest.warns(RuntimeWarning, match=said):
        backend.implementation("linear_a8", torch.device("cuda", 0))
    backend._obstacle.cache_clear()
    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=f"DIROTQ_BACKEND=triton cannot run linear_a8 on cuda:0: {said}"):
        backend.implementation("linear_a8", torch.device("cuda", 0))


def test_without_triton_everything_imports_and_runs(flux_case):
    code = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n.split('.')[0] == 'triton' else find(n, *a)\n"
        "sys.modules['triton'] = None\n"
        "import torch, dirotq\n"
        "from diffusers import FluxTransformer2DModel\n"
        f"m = FluxTransformer2DModel.from_pretrained({str(flux_case.quantized)!r}, torch_dtype=torch.bfloat16)\n"
        "y = m.transformer_blocks[0].attn.to_q(torch.ones(3, 192, dtype=torch.bfloat16))\n"
        "assert torch.isfinite(y).all()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]


# --- pickles ------------------------------------------------------------------------------------------------------

#: Unpickles a model where nothing was made or loaded, and does what diffusers refuses or miscounts if not taught.
UNPICKLED = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
print(model.num_parameters())
model.to("cpu", torch.bfloat16)
lora = torch.load(sys.argv[2])
from diffusers import FluxPipeline
pipe = FluxPipeline(None, None, None, None, None, None, model)
pipe.load_lora_weights(lora)
pipe.fuse_lora()
try:
    model.save_pretrained(sys.argv[3])
except ValueError as error:
    print(error)
pipe.unfuse_lora()
pipe.unload_lora_weights()
model.save_pretrained(sys.argv[3])
"""


def test_a_model_unpickled_in_a_new_process(flux_case, tmp_path):
    pytest.importorskip("peft")
    model = flux_case.load()
    torch.save(model, tmp_path / "model.pt")
    name, (n, k) = "transformer.transformer_blocks.0.attn.to_q", (model.inner_dim, model.inner_dim)
    torch.save(
        {f"{name}.lora_A.weight": torch.ones(4, k), f"{name}.lora_B.weight": torch.ones(n, 4)}, tmp_path / "lora"
    )
    paths = [str(tmp_path / p) for p in ("model.pt", "lora", "saved")]
    done = processes.run(UNPICKLED, *paths)
    assert done.returncode == 0, done.stderr[-3000:]
    count, refused = done.stdout.splitlines()
    assert int(count) == model.num_parameters() and "a LoRA is loaded" in refused
    model.save_pretrained(tmp_path / "here")
    assert files_of(tmp_path / "saved") == files_of(tmp_path / "here")
