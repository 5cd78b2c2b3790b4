"""Every code block of the README and of docs/: run on the embedded models, a local Hub and small files, by page."""

import ast
import functools
import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch

import dirotq
from dirotq.dirotq_core import cli, codebooks
from dirotq.dirotq_core.demo.embedded import MODELS
from dirotq.dirotq_core.methods import METHODS

from ..hub.conftest import BASE_CARD, quantized_pipeline, use
from ..hub_server import Hub, Repository
from . import blocks
from .blocks import PAGES, ROOT, blocks_of, commands_of

WITH_BLOCKS = [p for p in PAGES if blocks_of(p)]
EVERY = [b for p in PAGES for b in blocks_of(p)]
#: Pages that go on with a pipeline of the reader's.
WITH_PIPELINE = {"hub.md", "memory.md"}
#: Parts of Python blocks → what runs here instead.
SMALLER = {'"cuda"': '"cpu"', "samples=32": "samples=3"}
SMALL = ["--steps", "4", "--height", "128", "--width", "128"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "quantized"
    quantized_pipeline(MODELS["flux-tiny"].folder).save_pretrained(folder)
    return folder


@pytest.fixture
def desk(tmp_path, monkeypatch, quantized):
    """The reader's folder, with a Hub, a token that may write, small pictures, and a default method that is quick."""
    folder = tmp_path / "desk"
    folder.mkdir()
    blocks.furnish(folder, quantized)
    monkeypatch.chdir(folder)
    monkeypatch.setitem(METHODS, "dirotq", replace(METHODS["dirotq"], basis="pca", rounding="nearest"))
    monkeypatch.setattr(codebooks, "SCALE_FACTORS", (1.0,))  # no search
    for cls in _pipelines():
        monkeypatch.setattr(cls, "__call__", _small(cls.__call__))
    files = Repository.of(MODELS["flux-tiny"].folder).files | {"README.md": BASE_CARD}
    hub = Hub({"black-forest-labs/FLUX.1-dev": Repository(files)}, {"hf_me": ("me", True)})
    with hub:
        use(monkeypatch, hub.url, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        yield folder


def _pipelines():
    from diffusers import FluxPipeline, PixArtSigmaPipeline

    return FluxPipeline, PixArtSigmaPipeline


def _small(call):
    """A pipeline's call that draws 128 × 128 pixels, and pictures (not calibration) in two steps."""

    @functools.wraps(call)
    def small(self, *args, **kwargs):
        given = dict(MODELS["flux-tiny" if "Flux" in type(self).__name__ else "pixart-sigma-tiny"].call)
        del given["num_inference_steps"]
        kwargs |= given
        if kwargs.get("output_type") == "latent":
            kwargs.setdefault("num_inference_steps", 4)
        else:
            kwargs["num_inference_steps"] = 2
        return call(self, *args, **kwargs)

    return small


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda p: p.name)
def test_page(page, desk):
    """All blocks of a page that can run here, one after the other, in one folder and one interpreter."""
    names = {"my_prompts": blocks.captions()}
    ran = [b for b in blocks_of(page) if b.obstacle is None]
    if page.name in WITH_PIPELINE:
        names |= {"pipe": quantized_pipeline(desk / "my-flux-finetune"), "dirotq": dirotq}
    if any("svdq-" in b.text for b in ran):
        blocks.write_nunchaku(desk / "svdq-int4_r32-flux.1-dev.safetensors")
    for block in ran:
        try:
            if block.language == "python":
                run_python(block, names)
            elif block.language == "sh":
                for command in commands_of(block):
                    run_command(command, desk)
            elif block.language == "json":
                json.loads(block.text)
            else:
                raise AssertionError(f"blocks of {block.language!r} are not known here")
        except Exception as error:
            raise AssertionError(f"{block.name}: {type(error).__name__}: {error}") from error


def run_python(block, names):
    text = block.text
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    for name in re.findall(r'quantize_checkpoint\("[^"]+", "([^"]+)"', text):
        shutil.rmtree(name, ignore_errors=True)  # in the page it does not exist yet
    exec(compile(text, block.name, "exec"), names)


def run_command(words, desk):
    """A command of ours; of others only `python -c`."""
    if words[:2] == ["python", "-c"]:
        exec(compile(words[2], "python -c", "exec"), {})
        return
    if words[0] != "dirotq":
        assert check_command(words)
        return
    parsed = cli._parser().parse_args(words[1:])
    out = getattr(parsed, "out", None)
    if out is not None and (desk / out).is_dir():
        shutil.rmtree(desk / out)
    elif out is not None:
        (desk / out).unlink(missing_ok=True)
    assert cli.main([*words[1:], *(SMALL if parsed.command == "quantize" else [])]) == 0, " ".join(words)


@pytest.mark.parametrize("block", [b for b in EVERY if b.obstacle is not None], ids=lambda b: b.name)
def test_block_that_cannot_run_here(block):
    """It is at least well-formed: Python compiles, commands of ours parse, files and options exist. Then skipped."""
    if block.language == "python":
        ast.parse(block.text)
    else:
        for command in commands_of(block):
            assert check_command(command), " ".join(command)
    pytest.skip(f"{block.name} {block.obstacle}")


def check_command(words):
    """Whether everything that a command names is there. A program that is not known here fails."""
    program = words[0].rpartition("/")[2]
    if program == "dirotq":
        return cli._parser().parse_args(words[1:]) is not None
    if program == "torchrun":
        return cli._parser().parse_args(words[words.index("dirotq.dirotq_core.cli") + 1 :]) is not None
    if program in ("pip", "python", "python3") and ("install" in words or program == "pip"):
        return check_install(words)
    if program in ("python", "python3"):
        scripts = [w for w in words[1:] if w.endswith(".py")]
        options = [w for w in words if w.startswith("--") and scripts]
        source = "".join((ROOT / s).read_text(encoding="utf-8") for s in scripts)
        folders = [w for w in words if w.startswith("tests/")]
        return all(f'"{o}"' in source for o in options) and all((ROOT / f).exists() for f in folders)
    if program in ("ruff", "mypy", "git"):
        return True
    raise AssertionError(f"{program!r} is not known here: {' '.join(words)}")


def check_install(words):
    """Whether the extras, constraints and requirements of a pip command exist; others' packages may be anything."""
    if sys.version_info < (3, 11):
        return True
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = [w for i, w in enumerate(words) if words[i - 1] in ("-c", "-r") and "../" not in w]
    files = [re.sub(r"^ComfyUI/custom_nodes/dirotq/", "", w) for w in named]
    wanted = [e for w in words for e in re.findall(r"^\.\[(\w+)\]$", w)]
    return all((ROOT / f).is_file() for f in files) and all(e in extras for e in wanted)


def test_every_obstacle_is_needed():
    for part in blocks.CANNOT_RUN:
        assert any(part in b.text for b in EVERY), f"no block has {part!r} any more"


def test_most_blocks_run():
    assert sum(b.obstacle is None for b in EVERY) >= 0.6 * len(EVERY)
    assert torch.get_default_dtype() == torch.float32  # and leave nothing behind
