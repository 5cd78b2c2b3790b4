"""The judge through transformers: a vision-language model that really runs, of random weights, so its verdicts mean
nothing. Its vocabulary is a few words, the three answers among them."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from dirotq.dirotq_core.cli import main
from dirotq.dirotq_core.evaluate.judge.local import LocalJudge, load_processor
from dirotq.dirotq_core.evaluate.judge.protocol import REMINDER, Message, judge_pair

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "FIRST",
    "SECOND",
    "TIE",
    "maybe",
    "image",
    "the",
    "USER",
    "ASSISTANT",
]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }} "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT {% endif %}"
)  # fmt: skip


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """A LLaVA of 2 + 2 layers: a CLIP encoder of 9 patches a picture, and a Llama."""
    folder = tmp_path_factory.mktemp("vlm")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, additional_special_tokens=["<image>"],
    )  # fmt: skip
    size = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    processor = LlavaProcessor(
        CLIPImageProcessor(**size), tokenizer, patch_size=8, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=24, patch_size=8),
        text_config=LlamaConfig(**small, vocab_size=len(WORDS), max_position_embeddings=512, pad_token_id=0,
                                bos_token_id=1, eos_token_id=2),
        image_token_index=4, image_token_id=4, vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.5)
    said = [WORDS.index(w) for w in ("FIRST", "SECOND", "TIE", "maybe")]
    model.generation_config.suppress_tokens = [i for i in range(len(WORDS)) if i not in said]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pair(seed=0, size=(40, 30)):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) for _ in range(2)]


def test_it_answers_the_same_every_time(vlm):
    judge = LocalJudge(str(vlm), max_tokens=2, dtype=torch.float32)
    message = Message("user", ("First image:", pair()[0], "Second image:", pair()[1], "Which?"))
    replies = [judge([message]) for _ in range(2)]
    assert replies[0] == replies[1] and replies[0].strip()
    assert set(replies[0].split()) <= set(WORDS)


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
    assert (seen[0]["input_ids"] == WORDS.index("<image>")).sum() == 2 * 9
    assert seen[0]["do_sample"] is False


def test_it_can_be_reminded(vlm):
    judge = LocalJudge(str(vlm), max_tokens=1, dtype=torch.float32)
    asked = []

    def ask(messages):
        asked.append(messages[-1].parts[-1])
        return "maybe " + judge(messages)[:0]  # it has run; what it said is of no use

    verdict = judge_pair(ask, "quality", *pair(), "a cat")
    assert verdict.choice is None and verdict.replies == 3 and asked[1:] == [REMINDER, REMINDER]


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
    assert len(verdicts) == 16 and all(v["reply"].strip() in WORDS[5:9] for v in verdicts.values())
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
