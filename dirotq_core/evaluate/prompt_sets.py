"""Prompts with ids, and the seeds that follow from the ids."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Longest id; it becomes a file name.
MAX_ID = 150
#: Seeds of the control run, which draws the reference's pictures once more with other noise.
CONTROL_SUFFIX = "-control"
#: What a prompt's id may be called.
_IDS = ("id", "image_id")


@dataclass(frozen=True)
class Prompt:
    """id: unique, and a file's name without suffix. text: what is drawn."""

    id: str
    text: str

    def seed(self, control: bool = False) -> int:
        """Seed of its noise; for the control run that of the id with `CONTROL_SUFFIX`."""
        return seed_of(self.id + CONTROL_SUFFIX if control else self.id)


def seed_of(text: str) -> int:
    """Polynomial hash of the code points, base 31, modulo 10⁹ + 7: the seeding of deepcompressor and Nunchaku."""
    value = 0
    for char in text:
        value = (31 * value + ord(char)) % 1_000_000_007
    return value


def read_prompt_set(path: Path, samples: int | None = None) -> list[Prompt]:
    """The prompts of a file, of a form that its suffix and contents tell.

    - .txt: one a line; the id is the number of the prompt, "00000" for the first
    - .csv: columns ``prompt`` (or ``caption``, ``text``) and, if there is one, ``id`` (or ``image_id``)
    - .json, .yaml: a list of strings, a list of objects with ``prompt`` and ``id`` (or ``image_id``), an object from id
      to prompt (sDCI), an object from id to an object with ``prompt`` (MJHQ-30K's meta_data.json), COCO's
      captions_*.json (the first caption of each image), or Karpathy's dataset_coco.json (the validation split, and of
      each image the caption that deepcompressor takes)

    Args:
        samples: so many of them: shuffled by Python's generator with seed 0, cut, and sorted by id, as deepcompressor
            does it; None for all in the order of the file.

    Raises:
        ValueError: names the file and the entry that is empty, is there twice, or cannot be a file's name.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise ValueError(f"{path} must end in one of {', '.join(_READERS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from error
    try:
        prompts = _checked(_READERS[suffix](text))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if samples is None or samples >= len(prompts):
        return prompts
    random.Random(0).shuffle(prompts)
    return sorted(prompts[:samples], key=lambda p: p.id)


def digest(prompts: Sequence[Prompt]) -> str:
    """A short text that changes with any id or prompt."""
    pairs = json.dumps([[p.id, p.text] for p in prompts]).encode()
    return f"{len(prompts)} prompts, {hashlib.sha256(pairs).hexdigest()[:16]}"


def _checked(pairs: Iterable[tuple[Any, Any]]) -> list[Prompt]:
    prompts, seen = [], set()
    for name, text in pairs:
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f"a prompt needs an id and a text, got {name!r:.60} and {text!r:.60}")
        if not _is_file_name(name):
            raise ValueError(f"id {name!r:.60} cannot be the name of a file")
        if not _is_unicode(text):
            raise ValueError(f"the prompt with id {name!r} holds half a surrogate pair, which is no character")
        if not text.strip():
            raise ValueError(f"the prompt with id {name!r} is empty")
        # File systems that ignore case would write two such ids into one file.
        if name.casefold() in seen:
            raise ValueError(f"id {name!r} is there twice")
        seen.add(name.casefold())
        prompts.append(Prompt(name, text))
    if not prompts:
        raise ValueError("no prompt is in it")
    return prompts


def _is_file_name(name: str) -> bool:
    forbidden = set('/\\:*?"<>|')
    return 0 < len(name) <= MAX_ID and name.isprintable() and not forbidden & set(name) and name.strip(" .") == name


def _is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8; JSON's escapes can make what cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _numbered(texts: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    return ((f"{i:05d}", text) for i, text in enumerate(texts))


def _lines(text: str) -> Iterable[tuple[str, str]]:
    # Not splitlines: U+2028 and the like may stand inside a prompt.
    return _numbered(line.strip() for line in text.split("\n") if line.strip())


def _csv(text: str) -> Iterable[tuple[Any, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = [_complete(row, reader) for row in reader]
    except csv.Error as error:
        raise ValueError(f"not a table: {error}") from error
    heads = [name.strip().lower() for name in reader.fieldnames or [] if name.strip()]
    twice = next((name for name in heads if heads.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two columns are called {twice!r}")
    names = {name.strip().lower(): name for name in reader.fieldnames or []}
    column = next((names[n] for n in ("prompt", "caption", "text") if n in names), None)
    if rows and column is None:
        raise ValueError(f"no column is called prompt, caption or text; there are {', '.join(heads)}")
    texts = [row[column] for row in rows]  # type: ignore[index]
    ids = next((names[n] for n in _IDS if n in names), None)
    return zip((row[ids] for row in rows), texts, strict=True) if ids is not None else _numbered(texts)


def _complete(row: dict[Any, Any], reader: csv.DictReader[str]) -> dict[Any, Any]:
    """`row`. ValueError if it has more fields than the header: the rest of a prompt would be lost."""
    if None in row:
        columns = len(reader.fieldnames or [])
        raise ValueError(
            f"line {reader.line_num} has {columns + len(row[None])} fields and the header {columns}; "
            "a prompt with a comma needs quotes"
        )
    return row


def _json(text: str) -> Iterable[tuple[Any, Any]]:
    try:
        return _entries(json.loads(text, object_pairs_hook=_unique))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"id {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return body


def _yaml(text: str) -> Iterable[tuple[Any, Any]]:
    import yaml

    from .yaml_file import load_yaml

    try:
        return _entries(load_yaml(text))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())[:200]}") from error


def _entries(body: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(body, dict) and isinstance(body.get("annotations"), list):
        return _coco(body["annotations"], body.get("images"))
    if isinstance(body, dict) and isinstance(body.get("images"), list):
        return _karpathy(body["images"])
    if isinstance(body, dict):
        return [(name, value.get("prompt") if isinstance(value, dict) else value) for name, value in body.items()]
    if isinstance(body, list):
        if all(isinstance(entry, str) for entry in body):
            return _numbered(body)
        return [_object(i, entry) for i, entry in enumerate(body)]
    raise ValueError(f"a list or an object of prompts is expected, not a {type(body).__name__}")


def _object(i: int, entry: Any) -> tuple[Any, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"entry {i} is {entry!r:.60}, and others are not strings; objects need id and prompt")
    text = next((entry[n] for n in ("prompt", "caption", "text") if n in entry), None)
    return next((entry[n] for n in _IDS if n in entry), f"{i:05d}"), text


def _coco(annotations: list[Any], images: Any) -> Iterable[tuple[str, Any]]:
    """The caption of the lowest id of each image; the image's id is its file's name, or its number without one."""
    first: dict[str, tuple[int, str]] = {}
    for entry in annotations:
        if not isinstance(entry, dict) or not {"image_id", "id", "caption"} <= entry.keys():
            raise ValueError(f"an annotation needs image_id, id and caption, got {entry!r:.60}")
        if type(entry["image_id"]) not in (int, str):
            raise ValueError(f"image_id of an annotation must be a number or a text, got {entry['image_id']!r:.60}")
        image, number = str(entry["image_id"]), _number(entry["id"])
        if image not in first or number < first[image][0]:
            first[image] = (number, entry["caption"])
    named = [i for i in images or [] if isinstance(i, dict) and isinstance(i.get("file_name"), str)]
    names = {str(i.get("id")): Path(i["file_name"]).stem for i in named}
    return [(names.get(image, image.zfill(12)), caption) for image, (_, caption) in first.items()]


def _number(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        return int(value)
    if type(value) is not int:
        raise ValueError(f"the id of an annotation must be a whole number, got {value!r:.60}")
    return value


def _karpathy(images: list[Any]) -> Iterable[tuple[str, Any]]:
    for image in images:
        if not isinstance(image, dict) or not image.get("sentences") or not {"filename", "split"} <= image.keys():
            raise ValueError(f"an image needs filename, split and sentences, got {image!r:.60}")
        if image["split"] != "val":
            continue
        name = Path(image["filename"]).stem
        yield name, image["sentences"][seed_of(name) % len(image["sentences"])].get("raw")


_READERS = {".txt": _lines, ".csv": _csv, ".json": _json, ".yaml": _yaml, ".yml": _yaml}
