"""The judge in a run: verdicts that are kept and counted, questions that it refuses, and a run that goes on."""

import csv
import json
import re
import threading
import time

import pytest

from dirotq.dirotq_core.engine.dist import World
from dirotq.dirotq_core.evaluate import Prompt
from dirotq.dirotq_core.evaluate.images import find_images
from dirotq.dirotq_core.evaluate.judge.endpoint import Endpoint
from dirotq.dirotq_core.evaluate.judge.protocol import (
    ORDERS,
    QUESTIONS,
    JudgeError,
)
from dirotq.dirotq_core.evaluate.judge.run import Docket, Task, tasks
from dirotq.dirotq_core.evaluate.judge.tally import against_control, tally

from .endpoint import Answer, Server, quick, said


@pytest.fixture
def pictures(tmp_path, folder_of_images):
    """Pictures of a model and of the reference, whose brightness tells which it is, and their prompts."""
    from PIL import Image

    prompts = [Prompt(f"p{i}", f"scene {i}") for i in range(6)]
    for name, level in (("reference", 40), ("model", 220)):
        folder = tmp_path / name
        folder.mkdir()
        for i, p in enumerate(prompts):
            Image.new("RGB", (8, 8), (level, i, 0)).save(folder / f"{p.id}.png")
    sets = [find_images(n, tmp_path / n, [p.id for p in prompts]) for n in ("model", "reference")]
    return sets, prompts


def brighter(question):
    """A judge who prefers the brighter picture in quality, the first one in alignment, and cannot speak about p5."""
    if question.images[0][0, 0, 1] == 5:
        return said("I'd rather not")
    if "perceptual quality" in question.texts[-1]:
        return said("FIRST" if question.images[0].mean() > question.images[1].mean() else "SECOND")
    return said("FIRST")


def judged(docket, prompts):
    return {
        q: [tuple(docket.verdict(Task(p, q, o)) for o in ORDERS) for p in prompts] for q in QUESTIONS
    }  # fmt: skip


@pytest.mark.parametrize("parallel", [1, 4])
def test_both_orders_are_asked_and_counted(pictures, tmp_path, parallel):
    (model, reference), prompts = pictures
    with Server(brighter, delay=0.01) as server:
        judge = quick(server)
        docket = Docket(tmp_path / "judge", model, reference, judge.identity)
        docket.run(judge, tasks(prompts), World(), parallel, progress=False)
        assert server.most <= parallel and (parallel == 1 or server.most > 1)
        # Both orders of everything, and two reminders wherever nothing was said.
        assert len(server.questions) == 6 * 4 + 4 * 2
        docket.run(judge, tasks(prompts), World(), parallel, progress=False)
        assert len(server.questions) == 6 * 4 + 4 * 2, "nothing is asked twice"
    verdicts = judged(docket, prompts)
    assert verdicts["quality"] == [("second", "first")] * 5 + [(None, None)]
    assert verdicts["alignment"] == [("first", "first")] * 5 + [(None, None)]
    quality, alignment = (tally(verdicts[q], 100) for q in ("quality", "alignment"))
    assert quality.preference.mean == 1 and (quality.won, quality.tied, quality.lost) == (1, 0, 0)
    assert (quality.agreement, quality.first, quality.judged, quality.unread) == (1, 0.5, 5, 2)
    assert alignment.preference.mean == 0 and (alignment.tied, alignment.agreement, alignment.first) == (1, 0, 1)


def test_a_judge_that_dies_and_comes_back(pictures, tmp_path):
    (model, reference), prompts = pictures
    with Server(brighter) as server:
        whole = Docket(tmp_path / "whole", model, reference, quick(server).identity)
        whole.run(quick(server), tasks(prompts), World(), 2, progress=False)

    def dying(question):
        return brighter(question) if len(server.questions) <= 9 else Answer(b"gone", 500)

    identity = {"model": "judge-7b"}  # at another address
    with Server(dying) as server:
        judge = Endpoint(server.url, "judge-7b", tries=2, pause=0.01)
        docket = Docket(tmp_path / "judge", model, reference, identity)
        with pytest.raises(JudgeError, match="gone"):
            docket.run(judge, tasks(prompts), World(), 2, progress=False)
        left = Docket(tmp_path / "judge", model, reference, identity).missing(tasks(prompts))
        assert 0 < len(left) < 24
    with Server(brighter) as server:
        docket = Docket(tmp_path / "judge", model, reference, identity)
        docket.run(quick(server), tasks(prompts), World(), 2, progress=False)
        asked_about_p5 = sum(t.prompt.id == "p5" for t in left)
        assert len(server.questions) == len(left) + 2 * asked_about_p5
    assert judged(docket, prompts) == judged(whole, prompts)


def test_an_interrupt_does_not_wait_for_answers(pictures, tmp_path, monkeypatch):
    from dirotq.dirotq_core.evaluate.judge import run

    (model, reference), prompts = pictures
    release, asked, kept = threading.Event(), [], []

    def slow(messages):
        asked.append(1)
        if len(asked) > 3:
            release.wait(30)
        return "TIE"

    class Bar(run.tqdm):
        def update(self, n=1):
            kept.append(n)
            if len(kept) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(run, "tqdm", Bar)
    docket = Docket(tmp_path / "judge", model, reference, {"model": "a"})
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        docket.run(slow, tasks(prompts), World(), 4, progress=False)
    assert time.monotonic() - started < 5
    release.set()
    assert len(Docket(tmp_path / "judge", model, reference, {"model": "a"}).missing(tasks(prompts))) == 24 - 3


def test_verdicts_belong_to_a_judge_and_to_pictures(pictures, tmp_path):
    from PIL import Image

    (model, reference), prompts = pictures
    everything = tasks(prompts)
    docket = Docket(tmp_path / "judge", model, reference, {"model": "a"})
    docket.run(lambda m: "TIE", everything, World(), 1, progress=False)
    assert docket.missing(everything) == []
    assert len(Docket(tmp_path / "judge", model, reference, {"model": "b"}).missing(everything)) == 24
    Image.new("RGB", (9, 8)).save(model.files["p0"])
    assert {t.prompt.id for t in Docket(tmp_path / "judge", model, reference, {"model": "a"}).missing(everything)} == {
        "p0"
    }


@pytest.mark.parametrize(("ranks", "size"), [((0, 1, 2), 3)])
def test_processes_share_the_questions(pictures, tmp_path, monkeypatch, ranks, size):
    """What each of three processes would do, one after the other."""
    (model, reference), prompts = pictures
    monkeypatch.setattr(World, "gather", lambda self, mine, shares: mine)
    monkeypatch.setattr(World, "share", lambda self, value: tasks(prompts))
    counts = []
    for rank in ranks:
        docket = Docket(tmp_path / "judge", model, reference, {"model": "a"}, rank)
        asked = []
        docket.run(lambda m, asked=asked: asked.append(1) or "TIE", tasks(prompts), World(rank, size), 1, False)
        counts.append(len(asked))
    assert counts == [8, 8, 8]
    assert Docket(tmp_path / "judge", model, reference, {"model": "a"}).missing(tasks(prompts)) == []


def test_counts_by_hand():
    pairs = [
        ("second", "first"),  # the model both times
        ("second", "tie"),  # half
        ("first", "second"),  # the reference both times
        ("tie", "tie"),
        ("first", "first"),  # the first both times: a contradiction
        (None, "first"),
    ]
    found = tally(pairs, 4000)
    assert found.preference.mean == pytest.approx((1 + 0.5 - 1 + 0 + 0) / 5)
    assert (found.won, found.lost) == (0.2, 0.2) and found.tied == pytest.approx(0.6)
    assert found.agreement == pytest.approx(3 / 5)
    assert found.first == pytest.approx(5 / 8) and found.judged == 5 and found.unread == 1
    control = [("tie", "tie")] * 5 + [("second", "first")]
    net = against_control(pairs, control, 100)
    assert net.mean == pytest.approx(0.1)
    unread = tally([(None, "tie")], 10)
    assert (unread.preference, unread.won, unread.tied, unread.agreement, unread.judged) == (None, None, None, None, 0)
    assert against_control([(None, None)], control[:1], 10) is None


@pytest.mark.parametrize(("won", "lost"), [(7, 93), (14, 86), (29, 71), (3, 4)])
def test_shares_are_counted(won, lost):
    """1 − 0.07 − 0.93 is less than 0, and would be shown as −0 %."""
    found = tally([("second", "first")] * won + [("first", "second")] * lost, 10)
    assert found.tied == 0 and not str(found.tied).startswith("-") and found.won == won / (won + lost)


def test_judges_in_turn_are_not_asked_again(pictures, tmp_path):
    (model, reference), prompts = pictures
    counts = []
    for name in "ABA":
        asked = []
        docket = Docket(tmp_path / "judge", model, reference, {"model": name})
        docket.run(lambda m, asked=asked: asked.append(1) or "TIE", tasks(prompts), World(), 1, progress=False)
        counts.append(len(asked))
    assert counts == [24, 24, 0]


def refusing(wanted):
    """A judge who refuses the prompts that `wanted` names, with the status of a content filter."""

    def answer(question):
        refused = int(question.images[0][0, 0, 1]) in wanted
        return Answer(b'{"error": {"code": "content_filter"}}', 400) if refused else said("FIRST")

    return answer


def test_a_question_that_is_refused_ends_nothing(pictures, tmp_path):
    (model, reference), prompts = pictures
    everything = tasks(prompts)
    with Server(refusing({0, 3})) as server:
        docket = Docket(tmp_path / "judge", model, reference, quick(server).identity)
        docket.run(quick(server), everything, World(), 2, progress=False)
        docket.check(everything)
        assert docket.missing(everything) == [] and len(server.questions) == 24
    assert judged(docket, prompts)["quality"] == [(None, None), *[("first", "first")] * 2, (None, None),
                                                  *[("first", "first")] * 2]  # fmt: skip
    (file,) = (tmp_path / "judge" / "model").iterdir()
    replies = [value["reply"] for _, _, value in map(json.loads, file.read_text().splitlines())]
    assert sum("content_filter" in reply for reply in replies) == 8


def test_a_judge_that_refuses_everything_has_failed(pictures, tmp_path, monkeypatch):
    """At the end, or sooner where there are many questions; what it refused is asked again."""
    (model, reference), prompts = pictures
    everything = tasks(prompts)
    with Server(refusing(range(6))) as server:
        docket = Docket(tmp_path / "judge", model, reference, {"model": "a"})
        docket.run(quick(server), everything, World(), 1, progress=False)
        with pytest.raises(JudgeError, match=r"refused all 24 questions about 'model'; .*content_filter"):
            docket.check(everything)
        assert len(docket.missing(everything)) == 24
        monkeypatch.setattr("dirotq.dirotq_core.evaluate.judge.run.HOPELESS", 5)
        with pytest.raises(JudgeError, match="refused the first 5 questions"):
            docket.run(quick(server), everything, World(), 1, progress=False)
    with Server(refusing({0})) as server:
        Docket(tmp_path / "judge", model, reference, {"model": "a"}).run(
            quick(server), everything, World(), 1, progress=False
        )
    Docket(tmp_path / "judge", model, reference, {"model": "a"}).check(everything)


@pytest.fixture
def compare(tmp_path, folder_of_images):
    """A function that runs the command on two folders of images and three prompts with the judge of a server."""
    from dirotq.dirotq_core.cli import main

    ids = [f"{i:05d}" for i in range(3)]
    folders = [folder_of_images(tmp_path / name, ids, seed) for seed, name in enumerate(("reference", "model"))]
    (tmp_path / "p.txt").write_text("scene 0\nscene 1\nscene 2\n")

    def run(server, *more):
        command = ["evaluate", str(folders[1]), "--reference", str(folders[0]), "--out", str(tmp_path / "out")]
        command += ["--prompts", str(tmp_path / "p.txt"), "--resamples", "50", "--device", "cpu"]
        return main([*command, "--judge", "judge-7b", "--judge-url", server.url, *more])

    return run


def test_a_judge_that_nobody_understands(compare, tmp_path):
    """Blank, and not 0, wherever there is no verdict; questions are counted, and not the replies to them."""
    with Server(lambda q: said("I cannot help with that request.")) as server:
        assert compare(server) == 0
    (row,) = [r for r in csv.DictReader((tmp_path / "out" / "table.csv").open()) if r["model"] == "model"]
    cells = {name: value for name, value in row.items() if name.startswith("judge_quality_")}
    assert {name for name, value in cells.items() if value} == {"judge_quality_judged", "judge_quality_unread"}
    assert (row["judge_quality_judged"], row["judge_quality_unread"]) == ("0", "6")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any(n.startswith("6 of 6 questions about quality of 'model' have no verdict") for n in report["notes"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "0%" not in re.sub(r"<(style|svg).*?</\1>", "", page, flags=re.DOTALL).partition("A model as judge")[2]


def test_a_judge_is_tried_before_anything_is_drawn(compare, tmp_path, capsys):
    with Server(lambda q: Answer(b'{"error": "no images, please"}', 400)) as server:
        assert compare(server) == 1 and len(server.questions) == 1
        assert server.questions[0].images[0].shape == (64, 64, 3)
    assert "two small pictures on trial" in (err := capsys.readouterr().err) and "no images, please" in err
    assert not (tmp_path / "out" / "scores").exists()


def test_a_judge_that_fails_leaves_a_report_without_it(compare, tmp_path, capsys):
    """It answers on trial and 5 questions; the report has the metrics. It comes back, and the rest is asked."""
    with Server(lambda q: said("TIE") if len(server.questions) <= 6 else Answer(b"no", 403)) as server:
        assert compare(server, "--judge-parallel", "1") == 1
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["judge"] is None and "status 403" in report["judge_failed"]
        assert report["rows"][1]["metrics"]["psnr"] and report["rows"][1]["judge"] == {}
        assert any("as the judge failed: " in note for note in report["notes"])
        assert "is without the judge" in capsys.readouterr().err and (tmp_path / "out" / "index.html").exists()
        server.answer = lambda q: said("TIE")
        server.questions.clear()
        assert compare(server) == 0 and len(server.questions) == 1 + 12 - 5
        assert json.loads((tmp_path / "out" / "report.json").read_text())["rows"][1]["judge"]["quality"]["judged"] == 3
    assert compare(server) == 0, "all is judged, and nobody need be there"


def test_the_whole_command(pixart, four, tmp_path, capsys):
    """A judge at an endpoint who cannot tell apart: both models tie with the reference, and so does the control."""
    from dirotq.dirotq_core.cli import main

    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"id": p.id, "prompt": p.text} for p in four]))
    extra = [f"--call={name}={json.dumps(value)}" for name, value in pixart.call.items()]
    with Server(lambda q: said("TIE" if q.images[0].shape == q.images[1].shape else "FIRST")) as server:
        command = ["evaluate", pixart.sources[1], "--reference", pixart.reference, "--out", str(tmp_path / "out"),
                   "--prompts", str(prompts), "--resamples", "50", "--device", "cpu", "--judge", "judge-7b",
                   "--judge-url", server.url, *extra]  # fmt: skip
        assert main(command) == 0
        assert len(server.questions) == 1 + 2 * 4 * 4, "one on trial"
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    control, model = report["rows"][1:]
    assert control["control"] and model["name"] == "rtn"
    assert model["judge"]["quality"]["tied"] == 1 and model["judge"]["alignment"]["preference"]["mean"] == 0
    assert model["judge"]["quality"]["against_control"] == {"mean": 0, "low": 0, "high": 0}
    assert report["judge"]["model"] == "judge-7b" and report["judge"]["protocol"] == 2
    page = (tmp_path / "out" / "index.html").read_text()
    assert "judge-7b was asked" in page and "quality" in out and "100%" in out
    key = "DIROTQ_JUDGE_API_KEY"
    assert key not in page
