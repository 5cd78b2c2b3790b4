"""`benchmarks/methods.py` finishes its table whatever a row does, and goes on where it was killed."""

import json
import sys

import pytest

#: What the stand-in measures: labels of two methods, one of which may fail.
METHODS = {"good W4A4": {"method": "rtn"}, "bad W4A4": {"method": "nf4"}, "late W4A4": {"method": "hadamard"}}


class Bench:
    """Says what was asked of it; `fails` holds labels, or the name of a model that does not load."""

    made, fails, killed = [], set(), None

    def __init__(self, name, device, n_prompts, n_calibration, batch):
        if name in self.fails:
            raise OSError(f"no {name} here")
        self.name, self.made = name, Bench.made
        self.made.append(name)

    def row(self, label, **more):
        self.made.append((self.name, label))
        if label == Bench.killed:
            raise KeyboardInterrupt
        if label in self.fails:
            raise ValueError("table | has 13 values;\n16 are needed")
        base = {"model": self.name, "method": label, "accuracy": 1.0, "bits": 4.0, "bytes": 9, "step_ms": 1.0}
        return base | more

    def dense_row(self):
        return self.row("bf16")

    def quantized_row(self, label, options):
        return self.row(label, config=options, sqnr=20.0, psnr=30.0, ssim=0.9, linear_bits=4.0)


@pytest.fixture
def methods(script, monkeypatch):
    """run(out, *arguments) → the exit code of `methods.py` with `Bench` and `METHODS`."""
    module = script("methods")
    monkeypatch.setattr(module, "ROWS", METHODS)
    monkeypatch.setattr(sys.modules["embedded"], "Bench", Bench)
    monkeypatch.setattr(Bench, "made", [])
    monkeypatch.setattr(Bench, "fails", set())
    monkeypatch.setattr(Bench, "killed", None)

    def run(out, *arguments):
        Bench.made.clear()
        monkeypatch.setattr(sys, "argv", ["methods.py", "--out", str(out), "--device", "cpu", *arguments])
        with pytest.raises(SystemExit) as end:
            module.main()
        return end.value.code

    return run


def labels(model):
    return [model, *((model, label) for label in ("bf16", *METHODS))]


def table(path):
    return {(r["model"], r["method"]): r for r in json.loads(path.with_suffix(".json").read_text())["rows"]}


def test_all_rows(methods, tmp_path):
    assert methods(tmp_path / "t") is None  # exit code 0
    assert Bench.made == [*labels("pixart-sigma-tiny"), *labels("flux-tiny")]
    assert len(table(tmp_path / "t")) == 8 and not (tmp_path / "t.part.json").exists()
    assert (tmp_path / "t.png").exists() and "failed" not in (tmp_path / "t.md").read_text()


def test_a_failing_row_does_not_keep_the_others(methods, tmp_path, capsys):
    Bench.fails = {"bad W4A4"}
    code = methods(tmp_path / "t")
    said = "ValueError: table | has 13 values;\n16 are needed"
    assert isinstance(code, str) and code.startswith("2 of 8 rows failed") and code.count(said) == 2
    assert Bench.made == [*labels("pixart-sigma-tiny"), *labels("flux-tiny")]
    rows = table(tmp_path / "t")
    assert len(rows) == 8 and rows["flux-tiny", "bad W4A4"]["error"] == said
    line = next(x for x in (tmp_path / "t.md").read_text().splitlines() if x.startswith("| bad"))
    assert r"**failed**: ValueError: table \| has 13 values; 16 are needed" in line
    assert line.replace(r"\|", "").count("|") == 10 and "Traceback" in capsys.readouterr().err
    Bench.fails = set()  # mended: only what failed is measured again
    assert methods(tmp_path / "t") is None
    assert Bench.made == [x for m in ("pixart-sigma-tiny", "flux-tiny") for x in (m, (m, "bad W4A4"))]
    assert not any("error" in r for r in table(tmp_path / "t").values()) and len(table(tmp_path / "t")) == 8


def test_a_model_that_does_not_load_fails_once(methods, tmp_path):
    Bench.fails = {"pixart-sigma-tiny"}
    assert methods(tmp_path / "t").startswith("4 of 8 rows failed")
    assert Bench.made == labels("flux-tiny")


def test_a_killed_run_goes_on(methods, tmp_path, monkeypatch):
    Bench.killed = "late W4A4"
    with pytest.raises(KeyboardInterrupt):
        methods(tmp_path / "t", "--models", "flux-tiny")
    assert not (tmp_path / "t.json").exists()
    Bench.killed = "bad W4A4"  # killed again, before what was kept is reached: nothing is lost
    monkeypatch.setitem(METHODS, "bad W4A4", {"method": "nf4", "rank": 3})  # another configuration is another row
    with pytest.raises(KeyboardInterrupt):
        methods(tmp_path / "t", "--models", "flux-tiny")
    Bench.killed = None
    assert methods(tmp_path / "t", "--models", "flux-tiny") is None
    assert Bench.made == ["flux-tiny", ("flux-tiny", "bad W4A4"), ("flux-tiny", "late W4A4")]
    assert [m for _, m in table(tmp_path / "t")] == ["bf16", *METHODS]


def test_what_was_left_must_be_of_the_same_kind(methods, tmp_path, monkeypatch):
    Bench.fails = {"bad W4A4"}
    methods(tmp_path / "t", "--prompts", "8")
    monkeypatch.setattr(sys, "argv", ["methods.py", "--out", str(tmp_path / "t"), "--device", "cpu", "--prompts", "9"])
    with pytest.raises(
        ValueError, match=r"t\.part\.json is left of a run that ended early, .*'prompts': 8.*'prompts': 9"
    ):
        sys.modules["methods"].main()
