"""The judge through transformers: a vision-language model that really runs, of random weights, so its verdicts mean
nothing. Its vocabulary is a few words, the three answers among them."""

import json

import numpy as np
import pytest
import torch

from dirotq.dirotq_core.cli import main
from dirotq.dirotq_core.evaluate.judge.local import LocalJudge, load_processor
from dirotq.dirotq_core.evaluate.judge.protocol import REMINDER, JudgeError, Message, judge_pair

from .stand_ins import VLM_WORDS


def pair(seed=0, size=(40, 30)):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) for _ in range(2)]


def test_it_answers_the_same_every_time(vlm):
    judge = LocalJudge(str(vlm), max_tokens=2, dtype=torch.float32)
    message = Message("user", ("First image:", pair()[0], "Second image:", pair()[1], "Which?"))
    replies = [judge([message]) for _ in range(2)]
    assert replies[0] == replies[1] and replies[0].strip()
    assert set(replies[0].split()) <= set(VLM_WORDS)


def test_it_sees_the_pictures_and_their_order(vlm, monkeypatch):
    """What the network is given: both pictures, in the order of the question, and the words."""
    judge = LocalJudge(str(vlm), max_tokens=1, dtype=torch.float32)
    seen = []
    generate = judge.network.generate
    monkeypatch.setattr(judge.network, "generate", lambda **k: seen.append(k) or generate(**k))
    a, b = np.zeros((30, 30, 3), np.uint8), np.full((30, 30, 3), 255, np.uint8)
    judge([Message("user", (a, b, "the image"))])
    judge([Message("user", (b, a, "the image"))])
    first, second = (k["pixel_values"] for k in seen)
    assert first.shape == (2, 3, 24, 24) and first[0].mean() < 0 < first[1].mean()
    torch.testing.assert_close(first.flip(0), second)
    assert (seen[0]["input_ids"] == VLM_WORDS.index("<image>")).sum() == 2 * 9
    assert seen[0]["do_sample"] is False


def test_it_can_be_reminded(vlm):
    judge = LocalJudge(str(vlm), max_tokens=1, dtype=torch.float32)
    asked = []

    def ask(messages):
        asked.append(messages[-1].parts[-1])
        return "maybe " + judge(messages)[:0]  # it has run; what it said is of no use

    verdict = judge_pair(ask, "quality", *pair(), "a cat")
    assert verdict.choice is None and verdict.replies == 3 and asked[1:] == [REMINDER, REMINDER]


def test_a_model_that_cannot_answer_is_named(vlm, monkeypatch):
    judge = LocalJudge(str(vlm), max_tokens=1, dtype=torch.float32)

    def generate(**_):
        raise torch.OutOfMemoryError("CUDA out of memory\nand how")

    monkeypatch.setattr(judge.network, "generate", generate)
    with pytest.raises(JudgeError, match=r"the judge '.*' failed: CUDA out of memory$"):
        judge([Message("user", (*pair(), "Which?"))])


def test_the_whole_command(vlm, pixart, four, tmp_path, capsys):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"id": p.id, "prompt": p.text} for p in four]))
    extra = [f"--call={name}={json.dumps(value)}" for name, value in pixart.call.items()]
    command = ["evaluate", pixart.sources[0], "--reference", pixart.reference, "--out", str(tmp_path / "out"),
               "--prompts", str(prompts), "--resamples", "50", "--device", "cpu", "--judge", str(vlm),
               "--judge-tokens", "1", *extra]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    lines = (tmp_path / "out" / "judge" / "hadamard" / "verdicts.0.jsonl").read_text().splitlines()
    verdicts = {key: value for key, _, value in map(json.loads, lines)}
    assert len(verdicts) == 16 and all(v["reply"].strip() in VLM_WORDS[5:9] for v in verdicts.values())
    for question, entry in report["rows"][2]["judge"].items():
        mine = {key: v["choice"] for key, v in verdicts.items() if key.startswith(question)}
        assert entry["unread"] == sum(choice is None for choice in mine.values())
        both = [p.id for p in four if None not in [c for key, c in mine.items() if key.endswith(p.id)]]
        assert entry["judged"] == len(both)


def test_what_is_no_judge(vlm, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the judge .*empty' cannot be loaded"):
        load_processor(str(tmp_path / "empty"))
    (vlm / "chat_template.jinja").rename(tmp_path / "template")
    try:
        with pytest.raises(ValueError, match="has no chat template for images"):
            load_processor(str(vlm))
    finally:
        (tmp_path / "template").rename(vlm / "chat_template.jinja")
