"""Which model a quantized one was made of, and what its card on the Hub says: licence, gate, kind of pipeline."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .hub_errors import hub_errors, reading_sentence
from .hub_files import TIMEOUT

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
#: Metadata that a quantized model takes over from its base.
INHERITED = (
    "license", "license_name", "license_link", "language", "pipeline_tag", "extra_gated_prompt", "extra_gated_fields",
    "extra_gated_heading", "extra_gated_description", "extra_gated_button_content",
)  # fmt: skip


@dataclass(frozen=True)
class BaseModel:
    """What is known of the model that was quantized.

    Attributes:
        name: its Hub id, None if unknown. gated: "auto" or "manual" if its files are, False if not, None if unknown.
        metadata: of its card, `INHERITED` only; `license_link` as an address that works from anywhere.
    """

    name: str | None = None
    gated: str | bool | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def hub_id(name: Any) -> str | None:
    """The Hub id in a model's `_name_or_path`: itself, or that of the cache's folder; None for other folders."""
    if not isinstance(name, (str, os.PathLike)) or not str(name):
        return None
    text = str(name).replace("\\", "/")
    cached = re.search(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)/snapshots/", text + "/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) and not Path(name).exists():
        return text
    return None


def read_metadata(card: Path) -> dict[str, Any]:
    """The metadata of a card; empty if the file is not there or has none. ValueError names a file that is broken."""
    from huggingface_hub import ModelCard

    if not card.is_file():
        return {}
    try:
        return dict(ModelCard.load(card, ignore_metadata_errors=True).data.to_dict())
    except Exception as error:  # whatever a YAML parser and its wrapper raise for a user's file
        raise ValueError(f"{card}: its metadata cannot be read: {error}") from error


def base_of(name_or_path: Any) -> str | None:
    """The Hub id of the base of a model that was loaded from `name_or_path`; None if nothing says it."""
    if isinstance(name_or_path, (str, os.PathLike)) and str(name_or_path):
        path = Path(name_or_path)
        for folder in (path, path.parent) if path.name == "transformer" else (path,):
            named = _named_base(read_metadata(folder / CARD_NAME))
            if named:
                return named
    return hub_id(name_or_path)


def _named_base(metadata: dict[str, Any]) -> str | None:
    """The base of a quantized model's card."""
    base = metadata.get("base_model")
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    return base if isinstance(base, str) and metadata.get("base_model_relation") == "quantized" else None


def named_id(name: str) -> str:
    """The Hub id that a user means with `name`: itself, or that in the address of its page. ValueError for others."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    wanted = name.strip()
    if address := re.match(r"(?:https?://[^/]+|hf\.co|huggingface\.co)/(.*)", wanted):
        parts = [p for p in re.split(r"[?#]", address[1])[0].split("/") if p]
        wanted = "/".join(parts[:2]) if len(parts) <= 2 or parts[2] in ("tree", "blob", "resolve") else ""
    try:
        validate_repo_id(wanted)
    except HFValidationError as error:
        raise ValueError(f"base model {name!r} is no Hub id; it must look like 'owner/name'") from error
    return wanted


def look_up(name: str | None, token: str | bool | None = None) -> BaseModel:
    """What the Hub says of the model called `name`, or of its own base if that is a quantized model.

    Where the Hub does not answer, a warning says so and only the name is known; where `name` is None, nothing is.
    """
    from huggingface_hub import HfApi

    if name is None:
        logger.warning("nothing says which model was quantized; the card names neither it nor its licence")
        return BaseModel()
    try:
        info = HfApi().model_info(name, timeout=TIMEOUT, token=token)
    except hub_errors() as error:
        logger.warning(
            "the licence of %s is not known (%s); add it to the card's metadata", name, reading_sentence(error, name)
        )
        return BaseModel(name)
    said = dict(info.card_data.to_dict()) if info.card_data else {}
    inner = _named_base(said)
    if inner and inner != name:
        return look_up(inner, token)
    return BaseModel(name, getattr(info, "gated", None) or False, inherit(said, name))


def of_folder(folder: Path) -> BaseModel:
    """What the folder of a dense model says of itself, without asking the Hub."""
    name = hub_id(folder)
    try:
        metadata = read_metadata(folder / CARD_NAME)
    except ValueError as error:
        logger.warning("%s", error)
        metadata = {}
    return BaseModel(name, None, inherit(metadata, name))


def inherit(metadata: dict[str, Any], name: str | None) -> dict[str, Any]:
    """What the card of a quantized model takes over of the metadata of its base, the model `name` of the Hub."""
    kept = {key: metadata[key] for key in INHERITED if metadata.get(key) not in (None, "", [])}
    link = kept.get("license_link")
    if isinstance(link, str) and not re.match(r"https?://", link):
        if name is None:
            del kept["license_link"]  # it means a file that is not here
        else:
            kept["license_link"] = f"https://huggingface.co/{name}/blob/main/{link.removeprefix('./')}"
    return kept
