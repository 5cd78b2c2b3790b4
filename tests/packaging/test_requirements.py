"""What the pack says where something it needs is missing, and how ComfyUI's version decides."""

import logging
import sys

import pytest

from dirotq.nodes import requirements


@pytest.fixture
def world(monkeypatch):
    """Set what is installed: `world(missing=…, kitchen=…, platform=…)`."""

    def build(missing=(), kitchen="0.2.31", platform="linux"):
        def version(name):
            if kitchen is None:
                raise requirements.PackageNotFoundError(name)
            return kitchen

        monkeypatch.setattr(requirements, "find_spec", lambda name: None if name in missing else object())
        monkeypatch.setattr(requirements, "version", version)
        monkeypatch.setattr(sys, "platform", platform)

    return build


def test_all_there(world, caplog):
    world()
    assert requirements.obstacle() is None
    requirements.log_notices(gpu=True)
    assert not caplog.records


def test_missing_modules_come_with_the_command(world):
    world(missing=("diffusers", "accelerate"))
    message = requirements.obstacle()
    assert message.startswith("missing accelerate, diffusers; install with: ")
    assert message.endswith("requirements.txt") and "\n" not in message


@pytest.mark.parametrize(
    ("kitchen", "said"),
    [
        (None, "not installed"),
        ("0.2.30", "0.2.30 is older than 0.2.31"),
        ("0.2.31.dev4", None),
        ("0.2.40+cu130", None),
        ("1.0", None),
    ],
)
def test_comfy_kitchen(world, kitchen, said):
    world(kitchen=kitchen)
    assert (said is None and requirements.obstacle() is None) or said in requirements.obstacle()


@pytest.mark.parametrize(("platform", "package"), [("win32", "triton-windows"), ("linux", "triton")])
def test_a_gpu_without_triton(world, caplog, platform, package):
    world(missing=("triton",), platform=platform)
    requirements.log_notices(gpu=False)
    assert not caplog.records
    requirements.log_notices(gpu=True)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.getMessage().endswith(f"-m pip install {package}")


def test_a_newer_comfy_kitchen_than_tested(world, caplog):
    world(kitchen="0.3.0")
    requirements.log_notices(gpu=False)
    assert "0.3.0 is installed" in caplog.text
