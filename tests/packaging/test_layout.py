"""The repository root as an installed package and as a ComfyUI node pack, apart and side by side."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, **kwargs).stdout


#: How ComfyUI imports a folder of custom_nodes (nodes.py, load_custom_node): the module's name is its path.
AS_COMFYUI = f"""
import importlib.util, sys
def load(path):
    name = path.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, path + "/__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
pack = load({str(ROOT)!r})
"""


def test_every_package_is_listed():
    """setuptools installs what pyproject.toml lists, nothing else."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = set(
        re.findall(r'^    "(dirotq[\w.]*)",$', re.search(r"^packages = \[(.*?)^\]", text, re.M | re.S)[1], re.M)
    )
    found = {"dirotq"}
    for top in ("dirotq_core", "kernels", "nodes"):
        for init in (ROOT / top).rglob("__init__.py"):
            found.add(".".join(["dirotq", *init.parent.relative_to(ROOT).parts]))
    assert listed == found


def test_no_foreign_top_level_name_is_installed():
    """`kernels` and `nodes` belong to others."""
    out = run(
        "import dirotq, sys; print([m for m in ('kernels', 'nodes', 'dirotq_core') if m in sys.modules])", cwd="/"
    )
    assert out.strip() == "[]"


def test_tests_have_one_copy():
    """Also under `python -m pytest` in the checkout, whose `kernels` transformers would import as the Hub's."""
    found = importlib.util.find_spec("kernels")
    assert found is None or ROOT not in Path(found.origin).parents


def test_the_pack_loads_as_comfyui_loads_it_and_is_light():
    code = AS_COMFYUI + (
        "assert callable(pack.comfy_entrypoint) and not hasattr(pack, 'NODE_CLASS_MAPPINGS')\n"
        "assert not {m.split('.')[0] for m in sys.modules} & {'torch', 'diffusers', 'transformers', 'comfy_api'}\n"
    )
    run(code)


def test_installed_and_cloned_side_by_side():
    """Two copies in one process: nothing registers twice, and both compute."""
    code = AS_COMFYUI + (
        "import dirotq, torch, importlib\n"
        "from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as table\n"
        "assert table['dirotq'] in (dirotq.DiRotQConfig, pack.DiRotQConfig)\n"
        "assert dirotq.DiRotQConfig is not pack.DiRotQConfig\n"
        "first = importlib.import_module('dirotq.kernels')\n"
        "second = importlib.import_module(pack.__name__ + '.kernels')\n"
        "assert first is not second\n"
        "x = torch.randn(5, 128)\n"
        "a, b = (k.rotate_quantize(x, None, None, 1, 'int8') for k in (first, second))\n"
        "assert all(torch.equal(i, j) for i, j in zip(a, b))\n"
    )
    run(code)


def test_calibration_prompts_are_shipped():
    from dirotq.dirotq_core.prompts import BUILT_IN_PROMPTS, read_prompts

    prompts = read_prompts(BUILT_IN_PROMPTS)
    assert len(prompts) == len(set(prompts)) == 128 and min(map(len, prompts)) > 30
