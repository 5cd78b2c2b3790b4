"""Pushing quantized models to the Hub, with a card, under the terms of the model they were made of."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .base_model import CARD_NAME, BaseModel, base_of, look_up, named_id
from .card import card_text, is_users, is_users_text, write_card
from .card_metrics import evaluation_text
from .checkpoint import CheckpointError
from .hub_errors import HubError, writing
from .inspect import find_transformer, inspect_checkpoint
from .report import REPORT_NAME
from .saving import check_savable

logger = logging.getLogger(__name__)

_IGNORED = ["*.partial", ".*", "__pycache__"]


def push(
    path: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool | None = None,
    gated: str | bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    evaluation: str | Path | None = None,
) -> str:
    """Upload a quantized checkpoint with its model card and return the commit's address.

    The card is README.md of the folder if the user wrote one; else it is generated, unless the repository has one that
    the user wrote. A new repository of a gated base model is gated like that before anything is uploaded.

    Args:
        path: folder of a quantized pipeline or transformer, or a single file. repo_id: "owner/name"; made if absent.
        base_model: Hub id of the dense model; None: what the checkpoint's card and configuration say.
        private: of a new repository. gated: "auto", "manual" or False instead of what the base model is.
        evaluation: report.json of an evaluation, or its folder, for the card.
        revision: branch to push to. token: access token; None: that of `hf auth login` or HF_TOKEN.

    Raises:
        CheckpointError: `path` holds no DiRotQ checkpoint. HubError: the Hub refused; one sentence.
        ValueError: a card's metadata is no YAML, or `gated` or `base_model` is no such thing.
    """
    from huggingface_hub import HfApi

    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    inspect_checkpoint(path)  # before anything is made on the Hub
    if evaluation is not None:
        evaluation_text(evaluation, path)
    if gated not in (None, False, "auto", "manual"):
        raise ValueError(f"gated must be 'auto', 'manual', False or None, got {gated!r}")
    api = HfApi(token=token)
    base = look_up(named_id(base_model) if base_model else base_of_files(path), token)
    with writing(repo_id):
        if revision not in (None, "main"):
            _check_branch(api, repo_id, str(revision))
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        respect_gate(api, repo_id, base, gated)
        readme = None if _users_card(api, path, repo_id, revision) else card_text(path, base, repo_id, None, evaluation)
        upload: dict[str, Any] = {"repo_id": repo_id, "revision": revision, "create_pr": create_pr}
        message = commit_message or "Upload a model quantized by dirotq"
        with tempfile.TemporaryDirectory() as folder:
            staged = Path(folder)
            if path.is_file():
                _link(path, staged / path.name)
            if readme is not None:
                (staged / CARD_NAME).write_text(readme, encoding="utf-8")
            if path.is_dir():
                for item in path.iterdir():
                    if item.name != CARD_NAME or (readme is None and is_users(item)):
                        _link(item, staged / item.name)
            info = api.upload_folder(
                folder_path=staged, commit_message=message, ignore_patterns=list(_IGNORED), **upload
            )  # fmt: skip
    return str((info.pr_url if create_pr else None) or info.commit_url)


def _check_branch(api: Any, repo_id: str, revision: str) -> None:
    """HubError if a push to `revision` would fail, which would leave a new repository behind."""
    from huggingface_hub.errors import RepositoryNotFoundError

    whole = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
    try:
        api.model_info(whole, revision=revision)
    except RepositoryNotFoundError as error:
        if getattr(error.response, "status_code", None) == 401:
            raise
        raise HubError(
            f"{whole!r} does not exist, so it has no branch {revision!r}; push to main, or create both first"
        ) from error


def _link(item: Path, target: Path) -> None:
    if item.is_dir():
        target.mkdir()
        for inner in item.iterdir():
            _link(inner, target / inner.name)
    else:
        for make in (os.symlink, os.link, shutil.copyfile):  # Windows wants a right for links, hard ones one disk
            try:
                make(item.resolve(), target)
                return
            except OSError:
                if make is shutil.copyfile:
                    raise


def base_of_files(path: Path) -> str | None:
    """The base model that a checkpoint's own files name."""
    if path.is_file():
        from .single_file.read import read_config

        return base_of(read_config(path).get("_name_or_path"))
    from .files import read_json

    said = base_of(path)  # its card
    if said is None:
        said = base_of(read_json(find_transformer(path) / "config.json").get("_name_or_path"))
    return said


def respect_gate(api: Any, repo_id: str, base: BaseModel, gated: str | bool | None = None) -> None:
    """Gate `repo_id` as its base model is, if nothing was uploaded to it yet. gated: what it becomes instead."""
    wanted = base.gated if gated is None else gated
    info = api.model_info(repo_id)
    if gated is None and (not wanted or info.private):
        return
    if (getattr(info, "gated", None) or False) == wanted:
        return
    fresh = not any(s.rfilename.endswith(".safetensors") for s in info.siblings or [])
    if gated is None and not fresh:
        logger.warning("%s is gated, %s is not: see whether its licence allows that", base.name, repo_id)
        return
    api.update_repo_settings(repo_id, gated=wanted)
    logger.info("%s is gated now (%s), as %s is", repo_id, wanted, base.name)


def _users_card(api: Any, path: Path, repo_id: str, revision: str | None) -> bool:
    """Whether the user has written a card, here or on the Hub."""
    if path.is_dir() and is_users(path / CARD_NAME):
        return True
    there = _remote_card(api, repo_id, revision)
    return there is not None and is_users_text(there)


def _remote_card(api: Any, repo_id: str, revision: str | None) -> bytes | None:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with tempfile.TemporaryDirectory() as folder:
            return Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision, local_dir=folder)).read_bytes()
    except EntryNotFoundError:
        return None


# --- model.push_to_hub, pipeline.push_to_hub, save_pretrained(push_to_hub=True) ---


def quantized_part(thing: Any) -> Any | None:
    """`thing`, or its transformer, if that is quantized by dirotq; None for everything else."""
    for model in (thing, getattr(thing, "transformer", None)):
        config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
        if getattr(config, "quant_method", None) == "dirotq":
            return model
    return None


def teach_pushing() -> None:
    """Let diffusers' `push_to_hub` of what we quantized write our card, keep gates, and say what failed. Idempotent."""
    from diffusers.utils.hub_utils import PushToHubMixin

    if getattr(PushToHubMixin.push_to_hub, "knows_dirotq", False):
        return
    push_original, upload_original = PushToHubMixin.push_to_hub, PushToHubMixin._upload_folder
    signature = inspect.signature(push_original)

    @functools.wraps(push_original)
    def push_to_hub(self: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        model = quantized_part(self)
        if model is None:
            return push_original(self, repo_id, *args, **kwargs)
        # diffusers makes the repository before it saves: what cannot be saved is refused first.
        given = signature.bind(self, repo_id, *args, **kwargs).arguments
        check_savable(model, given.get("safe_serialization", True))
        with writing(repo_id):
            return push_original(self, repo_id, *args, **kwargs)

    @functools.wraps(upload_original)
    def upload_folder(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        model = quantized_part(self)
        if model is not None:
            token = args[0] if args else kwargs.get("token")
            subfolder = args[3] if len(args) > 3 else kwargs.get("subfolder")
            _prepare_upload(self, model, Path(working_dir), repo_id, token, bool(subfolder))
        return upload_original(self, working_dir, repo_id, *args, **kwargs)

    push_to_hub.knows_dirotq = True  # type: ignore[attr-defined]
    PushToHubMixin.push_to_hub = push_to_hub  # type: ignore[method-assign]
    PushToHubMixin._upload_folder = upload_folder  # type: ignore[method-assign]


def _prepare_upload(thing: Any, model: Any, folder: Path, repo_id: str, token: Any, subfolder: bool) -> None:
    from huggingface_hub import HfApi

    names = (getattr(owner.config, "_name_or_path", None) for owner in (thing, model))
    base = look_up(next((b for b in map(base_of, names) if b), None), token)
    api = HfApi(token=token)
    with writing(repo_id):
        respect_gate(api, repo_id, base)
    report = getattr(model.hf_quantizer, "report", None)
    if report is not None and not (folder / REPORT_NAME).exists():
        report.save(folder)
    if not subfolder and write_card(folder, base, repo_id) is None:
        # The repository's own card, to which diffusers has added metadata: as it was.
        own = _remote_card(api, repo_id, None)
        if own is not None:
            (folder / CARD_NAME).write_bytes(own)


__all__ = ["HubError", "push", "teach_pushing"]
