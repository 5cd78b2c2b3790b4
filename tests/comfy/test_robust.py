"""Loading where something is missing or broken: an extension without nodes and one log line, never an exception."""

import os
import subprocess
import sys

import pytest

from .server import ROOT

#: ComfyUI's way of importing a pack and asking for its nodes; {change} is made in between.
LOAD = """
import sys
sys.argv = ["main.py", "--cpu"]
import asyncio, importlib.util, logging, importlib
import comfy.options; comfy.options.enable_args_parsing()
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
spec = importlib.util.spec_from_file_location("pack", {root!r} + "/__init__.py")
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
from comfy_api.latest import ComfyExtension
{change}
extension = asyncio.run(pack.comfy_entrypoint())
assert isinstance(extension, ComfyExtension)
asyncio.run(extension.on_load())
print("nodes:", len(asyncio.run(extension.get_node_list())))
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "importlib.import_module('pack.nodes.requirements').NEEDED += ('no_such_module',)",
            "missing no_such_module; ",
        ),
        ("sys.modules['pack.nodes.compare'] = None", "import of pack.nodes.compare halted"),
    ],
    ids=["a requirement is missing", "a module cannot be imported"],
)
def test_one_line_and_no_nodes(checkout, change, said):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])}
    code = LOAD.format(root=str(ROOT), change=change)
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True, cwd=checkout
    )
    ours = [line for line in out.stdout.splitlines() if "DiRotQ" in line]
    assert len(ours) == 1 and ours[0].startswith("ERROR DiRotQ's nodes are not available: ") and said in ours[0]
    assert out.stdout.splitlines()[-1] == "nodes: 0"
