"""Short runs of the streaming engine on the embedded models."""

import hashlib
from pathlib import Path

import pytest

import dirotq
from dirotq.dirotq_core.demo.embedded import MODELS, prompts
from dirotq.dirotq_core.engine import EngineOptions, quantize_checkpoint

CAPTIONS = [s.caption() for s in prompts(4, seed=5, held_out=False)]
#: What takes a second: no GPTQ, a subspace without the weights.
QUICK = {"rank": 16, "basis": "pca", "rounding": "nearest"}


class Short:
    """Runs of an embedded model: 4 prompts, 2 steps."""

    def __init__(self, name):
        self.model = MODELS[name]
        self.call = {**self.model.call, "num_inference_steps": 2}

    def run(self, out, config=None, prompts=CAPTIONS, source=None, call=None, **options):
        config = dirotq.DiRotQConfig(**QUICK if config is None else config)
        options = EngineOptions(**{"timesteps": 2, "draw_batch": 2, **options})
        return quantize_checkpoint(
            source or self.model.folder, out, config, prompts, call={**self.call, **(call or {})}, options=options,
            progress=False,
        )  # fmt: skip


def tree(folder):
    """File name → digest, of everything under `folder`."""
    files = (p for p in Path(folder).rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="session", params=list(MODELS))
def short(request):
    return Short(request.param)


@pytest.fixture(scope="session")
def flux():
    return Short("flux-tiny")


@pytest.fixture(scope="session")
def undisturbed(flux, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("reference") / "out"
    flux.run(out)
    return out


@pytest.fixture(scope="session")
def reference(undisturbed):
    """Its files' digests."""
    return tree(undisturbed)
