"""diffusers' context parallelism: two processes draw what one draws."""

import inspect
import json
from pathlib import Path

import pytest

from .. import processes

pytest.importorskip("diffusers.hooks.context_parallel", reason="needs diffusers 0.36")
SCRIPT = Path(__file__).parents[2] / "benchmarks/context_parallel.py"


def test_two_processes(tmp_path):
    options = ["--tiny", "--steps=2", "--repeats=1", "--bits", "8", "--out", tmp_path / "rows.json"]
    folder, script = str(SCRIPT.parent), str(SCRIPT)
    script = f"import runpy; sys.path.insert(0, {folder!r}); runpy.run_path({script!r}, None, '__main__')"
    for done in processes.together(script, *options):
        assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["scheme"] == "ulysses" and row["gpus"] == 2
    assert row["db_to_one_gpu"] is None or row["db_to_one_gpu"] > row["db_of_quantized_activations"] - 3


def test_tensor_parallelism_is_refused(flux_case):
    """By diffusers: it shards weights by their dense shapes."""
    try:
        from diffusers import TensorParallelConfig
        from diffusers.hooks import tensor_parallel
    except ImportError:
        pytest.skip("needs diffusers 0.40")
    if "quantiz" not in inspect.getsource(tensor_parallel):
        pytest.skip("diffusers 0.40 does not look whether a model is quantized")
    model = flux_case.load()
    with pytest.raises((ValueError, NotImplementedError), match="quantiz"):
        model.enable_parallelism(config=TensorParallelConfig(tp_degree=3))
