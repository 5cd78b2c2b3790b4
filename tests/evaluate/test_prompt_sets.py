"""Prompts of every file form, their ids, and the seeds that follow."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirotq.dirotq_core.evaluate import Prompt, read_prompt_set, seed_of

#: By hand: (97·31 + 98)·31 + 99 = 96354; 48·(31⁴ + 31³ + 31² + 31 + 1);
#: 50·31⁵ + 98·31⁴ + 54·31³ + 101·31² + 52·31 + 99, less the modulus.
SEEDS = {
    "": 0,
    "a": 97,
    "ab": 3105,
    "abc": 96354,
    "00000": 45806640,
    "2b6e4c": 1_523_670_094 - 1_000_000_007,
    "é": 233,
}


@pytest.mark.parametrize(("text", "seed"), SEEDS.items())
def test_seeds(text, seed):
    assert seed_of(text) == seed


@given(st.text())
def test_a_seed_is_the_polynomial_at_31(text):
    powers = sum(ord(c) * 31 ** (len(text) - 1 - i) for i, c in enumerate(text))
    assert seed_of(text) == powers % 1_000_000_007


def test_the_control_has_other_seeds():
    prompt = Prompt("abc", "a cat")
    assert prompt.seed() == 96354 and prompt.seed(control=True) == seed_of("abc-control") != prompt.seed()


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


COCO = {
    "images": [{"id": 9, "file_name": "COCO_val2014_000000000009.jpg"}],
    "annotations": [
        {"image_id": 9, "id": 12, "caption": "later"},
        {"image_id": 9, "id": 3, "caption": "a dog\n"},
        {"image_id": 25, "id": 4, "caption": "a giraffe"},
    ],
}
MIXED = {"annotations": [{"image_id": 1, "id": "12", "caption": "later"},
                         {"image_id": "1", "id": 3, "caption": "first"}]}  # fmt: skip
KARPATHY = {
    "images": [
        {"filename": "COCO_val2014_000000000042.jpg", "split": "val",
         "sentences": [{"raw": "zero"}, {"raw": "one"}, {"raw": "two"}]},
        {"filename": "x.jpg", "split": "train", "sentences": [{"raw": "not this"}]},
    ]
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "\ufeffa cat\n\n  a dog  \n", [("00000", "a cat"), ("00001", "a dog")]),
        ("p.json", ["a cat", "a dog"], [("00000", "a cat"), ("00001", "a dog")]),
        ("p.json", [{"id": 7, "prompt": "a cat"}, {"caption": "a dog"}], [("7", "a cat"), ("00001", "a dog")]),
        ("meta_data.json", {"0a1": {"category": "animals", "prompt": "a cat"}}, [("0a1", "a cat")]),
        ("sDCI.yaml", "sa_1: a cat\nsa_2: 'a dog: brown'\n", [("sa_1", "a cat"), ("sa_2", "a dog: brown")]),
        ("p.csv", 'ID,Prompt\nx,"a cat, small"\ny,"a\ndog"\n', [("x", "a cat, small"), ("y", "a\ndog")]),
        ("p.csv", "caption\na cat\n", [("00000", "a cat")]),
        ("p.csv", 'Index,Image_ID,Category,Prompt\n1,0a,food,"udon, "\n', [("0a", "udon, ")]),
        (
            "p.txt",
            "a\u2028cat\r\na\x0bdog\na \x85 fox",
            [("00000", "a\u2028cat"), ("00001", "a\x0bdog"), ("00002", "a \x85 fox")],
        ),
        ("p.json", [{"image_id": "x9", "prompt": "a cat"}], [("x9", "a cat")]),
        ("p.yaml", "0010: a cat\n2020-01-01: yes\n1e3: 3\n", [("0010", "a cat"), ("2020-01-01", "yes"), ("1e3", "3")]),
        (
            "p.yaml",
            "- {id: 007, prompt: a cat}\n- image_id: no\n  prompt: a dog\n",
            [("007", "a cat"), ("no", "a dog")],
        ),
        ("p.yaml", "a: &b {prompt: a cat}\nc:\n  <<: *b\n", [("a", "a cat"), ("c", "a cat")]),
        ("captions_val2014.json", MIXED, [("000000000001", "first")]),
        ("captions_val2014.json", COCO, [("COCO_val2014_000000000009", "a dog\n"), ("000000000025", "a giraffe")]),
    ],
)
def test_forms(tmp_path, name, content, expected):
    assert [(p.id, p.text) for p in read_prompt_set(write(tmp_path, name, content))] == expected


def test_karpathys_captions_are_those_that_the_field_takes(tmp_path):
    (prompt,) = read_prompt_set(write(tmp_path, "dataset_coco.json", KARPATHY))
    assert prompt.id == "COCO_val2014_000000000042"
    assert prompt.text == ["zero", "one", "two"][seed_of(prompt.id) % 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", " \n\n", "no prompt is in it"),
        ("p.json", [], "no prompt is in it"),
        ("p.csv", "", "no prompt is in it"),
        ("p.csv", "id,words\n1,x\n", "no column is called prompt, caption or text"),
        ("p.csv", "id,prompt\n1\n", "a prompt needs an id and a text"),
        ("p.json", '{"a": "x", "a": "y"}', "id 'a' is there twice"),
        ("p.json", [{"id": "a", "prompt": "x"}, {"id": "A", "prompt": "y"}], "id 'A' is there twice"),
        ("p.json", {"a": " "}, "the prompt with id 'a' is empty"),
        ("p.json", {"a": {"text": "x"}}, "a prompt needs an id and a text"),
        ("p.json", {"a/b": "x"}, "id 'a/b' cannot be the name of a file"),
        ("p.json", {"..": "x"}, "id '..' cannot be the name of a file"),
        ("p.json", {"a" * 151: "x"}, "cannot be the name of a file"),
        ("p.json", "3", "a list or an object of prompts is expected, not a int"),
        ("p.json", '{"a"', "p.json"),
        ("p.json", "[" * 100_000, "nested too deeply"),
        ("p.json", ["x", {"prompt": "y"}], "entry 0 is 'x', and others are not strings"),
        ("p.yaml", "a: [", "not valid YAML"),
        ("p.json", {"annotations": [{"id": 1}]}, "an annotation needs image_id, id and caption"),
        ("p.csv", "id,prompt\n1,a cat\n2,a red cat, on a mat\n", "line 3 has 3 fields and the header 2"),
        ("p.csv", "prompt,Prompt \na cat,a dog\n", "two columns are called 'prompt'"),
        ("p.yaml", "a: x\n'a': y\n", "id 'a' is there twice, again in line 2"),
        ("p.yaml", "? [a]\n: x\n", "line 1: a key must be a text"),
        ("p.yaml", "a: ~\n", "a prompt needs an id and a text, got 'a' and None"),
        ("p.yaml", "[" * 10_000, "nested too deeply"),
        ("p.json", '["a \\ud800 b"]', "the prompt with id '00000' holds half a surrogate pair"),
        ("p.json", '{"\\ud800": "x"}', r"id '\ud800' cannot be the name of a file"),
        (
            "p.json",
            {"annotations": [{"image_id": [1], "id": 1, "caption": "x"}]},
            "image_id of an annotation must be a number or a text, got [1]",
        ),
        (
            "p.json",
            {"annotations": [{"image_id": 1, "id": None, "caption": "x"}]},
            "the id of an annotation must be a whole number, got None",
        ),
        ("p.xlsx", "x", "must end in one of .txt, .csv, .json, .yaml, .yml"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError) as error:
        read_prompt_set(path)
    assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_not_utf8(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"p\.txt is not UTF-8 \(byte 3\)"):
        read_prompt_set(path)


def test_samples_are_the_fields(tmp_path):
    """Shuffled with seed 0, cut, sorted by name: written out here as deepcompressor's data sets do it."""
    ids = [f"{i * 7919 % 1000:03d}" for i in range(60)]
    path = write(tmp_path, "meta_data.json", {i: {"prompt": f"prompt {i}"} for i in ids})
    names = list(ids)
    random.Random(0).shuffle(names)
    found = read_prompt_set(path, samples=10)
    assert [p.id for p in found] == sorted(names[:10])
    assert all(p.text == f"prompt {p.id}" for p in found)
    assert [p.id for p in read_prompt_set(path, samples=60)] == ids
