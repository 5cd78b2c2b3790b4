"""The training loop: what it leaves, and that it stops where nothing is learned."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dirotq.dirotq_core.demo.fit import EMA, Diverged, fit
from dirotq.dirotq_core.ternary_training import TernaryLinear, TernarySite
from dirotq.dirotq_core.transforms import random_signs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Small(nn.Module):
    """Two ternary linears of one site with a normalization, as RobuQ trains them."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        start = {"basis": torch.randn(64, 4, generator=g) / 8, "signs": random_signs(64, 0)}
        site = TernarySite(start, "uniform_4", torch.device("cpu"))
        self.norm = nn.LayerNorm(64)
        self.parts = nn.ModuleList(
            TernaryLinear(torch.randn(64, 64, generator=g) / 8, torch.zeros(64, 4), torch.zeros(64), site) for _ in "qk"
        )

    def forward(self, x):
        for part in self.parts:
            x = x + part(self.norm(x))
        return x


def train(steps=30, every=4, lr=1e-2, spoil=lambda step, value: value, compiled=False):
    """(model, weights at each checkpoint, `Fit`) of learning a linear map."""
    model, seen, made = Small(), [], []
    if compiled:
        torch.compiler.reset()
        model.compile()
    g = torch.Generator().manual_seed(1)
    target = torch.randn(64, 64, generator=g) / 8

    def loss():
        made.append(len(made) + 1)
        x = torch.randn(32, 64, generator=g)
        return spoil(len(made), (model(x).float() - x @ target).square().mean())

    def checkpoint():
        seen.append([p.detach().clone() for p in model.parameters()])

    done = fit([model], loss, steps, lr, "small", checkpoint, every)
    return model, seen, done


def weights(model):
    return [p.detach() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_checkpoints_do_not_disturb_training():
    often, seen, done = train(every=4)
    never, none, other = train(every=1000)
    assert len(seen) == 7 and not none and done == other and same(weights(often), weights(never))
    assert done.curve[-1][0] == 30 and done.curve[-1][1] < done.curve[0][1]
    assert done.average < done.curve[0][1]


def test_the_average_is_what_stays(monkeypatch):
    """Against the recursion, with the weights of every step."""
    steps, original, trajectory = 12, torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        trajectory.append([p.detach().clone() for p in self.param_groups[0]["params"]])
        return out

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    model, seen, _ = train(steps, every=steps)
    average = copy.deepcopy(trajectory[0])
    for i, now in enumerate(trajectory, 1):
        average = [a + max(1 - EMA, 1 / i) * (p - a) for a, p in zip(average, now, strict=True)]
    assert same(seen[0], weights(model))
    for ours, expected in zip(weights(model), average, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.untraced
def test_compiled_and_eager_training_agree():
    """Also after the weights were exchanged with their average under the compiled graph."""
    eager, compiled = train(every=3), train(every=3, compiled=True)
    moved = sum((a - b).square().sum() for a, b in zip(weights(eager[0]), weights(Small()), strict=True)).sqrt()
    for ours, theirs in zip((*eager[1], weights(eager[0])), (*compiled[1], weights(compiled[0])), strict=True):
        apart = sum((a - b).square().sum() for a, b in zip(ours, theirs, strict=True)).sqrt()
        assert apart < 0.05 * moved
    assert eager[2].average == pytest.approx(compiled[2].average, rel=0.02)


def test_addresses_stay():
    model = Small()
    before = [p.data_ptr() for p in model.parameters()]
    fit([model], lambda: model(torch.ones(2, 64)).square().mean(), 6, 1e-3, "small", checkpoint_every=2)
    assert [p.data_ptr() for p in model.parameters()] == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_it(bad):
    said = r"small: the loss is (nan|inf) at step 20; it was \d\.\d+ at step 15"
    with pytest.raises(Diverged, match=said) as error:
        train(steps=100, spoil=lambda step, value: value * bad if step == 17 else value)
    assert [step for step, _ in error.value.curve] == [5, 10, 15, 20]


def test_a_loss_that_never_was_finite():
    with pytest.raises(Diverged, match=r"small: the loss is nan at step 1; it never was finite"):
        train(spoil=lambda step, value: value * float("nan"))


def test_a_loss_that_grows_ends_it():
    with pytest.raises(Diverged, match=r"at step \d+, over 5 times the lowest, \d\.\d+ at step") as error:
        train(steps=60, spoil=lambda step, value: value * (1 if step < 30 else 300))
    assert error.value.curve[-1][0] < 40


def test_a_broken_average_ends_it(monkeypatch):
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda average, weights, share: [a.mul_(3) for a in average])
    with pytest.raises(Diverged, match="the averaged weights have a loss of"):
        train()


@pytest.fixture
def robuq():
    spec = importlib.util.spec_from_file_location("robuq_benchmark", BENCHMARKS / "robuq.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_reports_what_diverged_and_goes_on(robuq, monkeypatch, tmp_path):
    trained = []

    def diverge(name, images, captions, args, report):
        trained.append(name)
        report["a4"] = {"steps": 3}
        if name.startswith("pixart"):
            raise Diverged("pixart: the loss is nan at step 7", [(5, 0.5), (7, float("inf"))])

    monkeypatch.setattr(robuq, "_train_model", diverge)
    monkeypatch.setattr(robuq.train, "render", lambda scenes: torch.zeros(len(scenes), 3, 2, 2))
    monkeypatch.setattr(sys, "argv", ["robuq.py", "--out", str(tmp_path), "--images", "2", "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        robuq.main()
    assert end.value.code == "pixart-sigma-tiny is not trained to its end: pixart: the loss is nan at step 7"
    assert trained == ["pixart-sigma-tiny", "flux-tiny"]
    report = json.loads((tmp_path / "pixart-sigma-tiny.json").read_text())
    assert report["a4"] == {"steps": 3} and report["error"]["curve"][0] == [5, 0.5]
    assert "error" not in json.loads((tmp_path / "flux-tiny.json").read_text())
