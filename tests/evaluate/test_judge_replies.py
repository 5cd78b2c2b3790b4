"""The judge: replies that are read or not, and a server that fails, refuses or says nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirotq.dirotq_core.evaluate.judge.endpoint import Endpoint
from dirotq.dirotq_core.evaluate.judge.protocol import (
    REMINDER_OF_SILENCE,
    JudgeError,
    Message,
    QuestionRefused,
    Verdict,
    judge_pair,
    read_reply,
)

from .endpoint import Answer, Server, quick, said


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("FIRST", "first"),
        (" second.\n", "second"),
        ("**TIE**", "tie"),
        ("The answer is FIRST", "first"),
        ("Answer: TIE", "tie"),
        ("The first one has noise, the second has not. Answer: SECOND", "second"),
        ("Verdict: first. No, wait. Verdict: second", "second"),
        ("<think>FIRST? no, SECOND looks better</think>TIE", "tie"),
        ("<THINK>\nlong\n</THINK>\nfirst", "first"),
        ('{"answer": "second"}', "second"),
        ("It's a tie", "tie"),
        ("Final answer: the SECOND image.", "second"),
        ("<answer>FIRST</answer>", "first"),
        ("The answer is \\boxed{TIE}.", "tie"),
        ("I see no difference, so the answer is a tie.", "tie"),
        ("Answer: FIRST\nThe first image is sharper.", "first"),
        ("Is it SECOND? Yes, it is clearer.</think>\n\nFIRST", "first"),
        ("<think>a</think>Answer: SECOND</think>Answer: TIE", "tie"),
        ("", None),
        ("I cannot see images.", None),
        ("FIRST or SECOND", None),
        ("The first image shows a cat on a mat.", None),
        ("<think>FIRST", None),
        ("necktie", None),
        ("1", None),
        ("Answer: FIRST or SECOND", None),
        ("Answer: FIRST/SECOND/TIE", None),
        ("Answer: First, let me look at the images. The second one is sharper.", None),
        ("Answer: FIRST. But the second is sharper.", None),
        ("I would answer second-guessing myself: FIRST", None),
        ("Not first.", None),
        ("not a tie", None),
        ("I do not think the answer is FIRST.", None),
        ("The answer isn't FIRST.", None),
        ("FIRST?", None),
    ],
)
def test_replies(reply, choice):
    assert read_reply(reply) == choice


@given(st.text(max_size=200))
def test_any_reply_is_read_or_not(reply):
    assert read_reply(reply) in ("first", "second", "tie", None)


A, B = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 200, np.uint8)


def test_a_reply_that_cannot_be_read_is_asked_for_again():
    replies, seen = ["hm", "well", "SECOND"], []

    def ask(messages):
        seen.append(list(messages))
        return replies[len(seen) - 1]

    verdict = judge_pair(ask, "alignment", A, B, "a {prompt} cat")
    assert (verdict.choice, verdict.reply, verdict.replies) == ("second", "SECOND", 3)
    assert [len(m) for m in seen] == [1, 3, 5] and seen[2][1].parts == ("hm",)
    text = seen[0][0].parts[-1]
    assert "\n\na {prompt} cat\n\n" in text
    assert [p is A for p in seen[0][0].parts[1:4:2]] == [True, False]
    assert judge_pair(lambda m: "no", "quality", A, B, "x").choice is None


def test_a_refusal_is_no_verdict():
    """At once, and after a reply that was not read: its text is kept."""
    replies = iter(["hm", QuestionRefused("status 400, too long")])

    def ask(messages):
        reply = next(replies)
        if isinstance(reply, Exception):
            raise reply
        return reply

    assert judge_pair(ask, "quality", A, B, "x") == Verdict(None, "status 400, too long", 1)
    replies = iter([QuestionRefused("filtered")])
    assert judge_pair(ask, "quality", A, B, "x") == Verdict(None, "filtered", 0, refused=True)


def messages():
    return [Message("user", ("First image:", A, "Second image:", B, "Which?"))]


def test_a_request(monkeypatch):
    monkeypatch.setenv("DIROTQ_JUDGE_API_KEY", "sesame")
    monkeypatch.setenv("OPENAI_API_KEY", "of somebody else")
    with Server(lambda q: said([{"type": "text", "text": "TIE"}])) as server:
        assert quick(server)(messages()) == "TIE"
    (question,) = server.questions
    assert question.headers["Authorization"] == "Bearer sesame"
    assert question.body["model"] == "judge-7b" and question.body["temperature"] == 0
    np.testing.assert_array_equal(question.images[0], A)
    np.testing.assert_array_equal(question.images[1], B)
    assert question.texts == ["First image:", "Second image:", "Which?"]


@pytest.mark.parametrize(
    "trouble",
    [
        Answer(b"busy", 503),
        Answer(b"slow down", 429, {"Retry-After": "0"}),
        Answer(b"<html>a proxy</html>"),
        Answer(b'{"choices": []}'),
        Answer(b"[]"),
        Answer(b"\xff\xfe"),
        Answer(b"", cut=True),
    ],
    ids=lambda a: f"{a.status} {a.body[:12]!r}",
)
def test_trouble_that_passes(trouble):
    answers = [trouble, trouble, said("FIRST")]
    with Server(lambda q: answers[len(server.questions) - 1]) as server:
        assert quick(server)(messages()) == "FIRST"
        assert len(server.questions) == 3


def test_trouble_that_stays():
    with Server(lambda q: Answer(b"out of memory", 500)) as server:
        with pytest.raises(JudgeError, match="failed 3 times, at last with status 500, out of memory"):
            quick(server)(messages())
        assert len(server.questions) == 3
        url = server.url
    with pytest.raises(JudgeError, match="failed 2 times, at last with URLError"):
        Endpoint(url, "x", tries=2, pause=0.01)(messages())


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 302])
def test_a_refusal_is_not_repeated(status):
    with Server(lambda q: Answer(b'{"error": "no such\\n model"}', status, {"Location": "/elsewhere"})) as server:
        with pytest.raises(JudgeError, match=f"refused: status {status}, .*no such") as error:
            quick(server)(messages())
        assert len(server.questions) == 1
    assert isinstance(error.value, QuestionRefused) is (status in (400, 413, 422))


def test_an_answer_that_takes_too_long():
    with Server(lambda q: said("TIE"), delay=0.5) as server, pytest.raises(JudgeError, match=r"(?i)time"):
        quick(server, tries=1, timeout=0.1)(messages())


def test_a_silent_model_is_reminded():
    """In the question itself: some servers refuse a conversation with an empty turn."""
    answers = [said(None), said(" "), said("TIE")]
    with Server(lambda q: answers[len(server.questions) - 1]) as server:
        assert judge_pair(quick(server), "quality", A, B, "x").choice == "tie"
    assert [q.turns for q in server.questions] == [1, 1, 1]
    assert [q.texts.count(REMINDER_OF_SILENCE) for q in server.questions] == [0, 1, 2]


def test_waiting_grows_and_has_an_end():
    judge = Endpoint("http://localhost/v1", "x")
    assert [judge._wait(n, None) for n in (1, 2, 3, 9)] == [1, 2, 4, 60]
    assert judge._wait(1, "7") == 7 and judge._wait(1, "Wed, 21 Oct") == 1 and judge._wait(1, "9999") == 60
