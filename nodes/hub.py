"""Downloads from the Hugging Face Hub into ComfyUI's models folder."""

from __future__ import annotations

import inspect
import logging
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
from tqdm.auto import tqdm

from ..dirotq_core.checkpoint import CheckpointError
from ..dirotq_core.files import read_json
from ..dirotq_core.hub_errors import hub_errors, reading_sentence
from ..dirotq_core.hub_files import TIMEOUT, checkpoint_names
from .hub_folder import Record, folder_of, read_record, write_record

logger = logging.getLogger(__name__)


def download(repo_id: str, revision: str, into: Path) -> Path:
    """Bring the checkpoint of `repo_id` below `into`; its folder, or its file if it is a single one.

    What is there is not fetched again. If the Hub does not answer as it should, a complete folder is used as it is,
    with a warning in the log.

    Raises:
        ValueError: the id is no "owner/name", the Hub does not have it, refuses it or cannot be reached, or it holds
            no DiRotQ checkpoint; one sentence each.
        InterruptProcessingException: ComfyUI's interrupt. Files that are complete by then are not fetched again.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"{repo_id!r} is no Hub id; it must look like 'owner/name'")
    if not re.fullmatch(r"[\w./+-]+", revision):
        raise ValueError(f"{revision!r} is no revision; give the name of a branch or tag, or a commit")
    target = folder_of(repo_id, revision, into)
    record = read_record(target)
    try:
        commit, files = _listing(repo_id, revision)
        if record is None or record.commit != commit:
            record = _fetch(repo_id, revision, commit, files, target)
    except _Unavailable as error:
        record = read_record(target)  # none where the folder is between two commits
        if record is None:
            raise ValueError(str(error)) from error.__cause__
        logger.warning("%s; using commit %s of it in %s", error, record.commit[:12], target)
    single = [f for f in record.files if f.endswith(".safetensors")]
    return target if any(f.endswith("config.json") for f in record.files) else target / single[0]


class _Unavailable(Exception):
    """One sentence on why the Hub did not give what it was asked for."""


def _listing(repo_id: str, revision: str) -> tuple[str, dict[str, int]]:
    """The commit of `revision`, and the files to fetch with their sizes in bytes, small ones first."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT)
    except hub_errors() as error:
        raise _Unavailable(reading_sentence(error, repo_id, revision)) from error
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
    names = checkpoint_names(sizes, f"{repo_id!r} at revision {revision!r}")
    return str(info.sha), {name: sizes[name] for name in sorted(names, key=sizes.__getitem__)}


def _fetch(repo_id: str, revision: str, commit: str, files: Mapping[str, int], target: Path) -> Record:
    """Download `files`. Until all are there the folder has no record."""
    from huggingface_hub import hf_hub_download

    write_record(target, None)
    progress = _Progress(sum(files.values()))
    # huggingface_hub before 1.0 cannot be told a bar: it moves file by file then.
    told = "tqdm_class" in inspect.signature(hf_hub_download).parameters
    for name, size in files.items():
        bar: dict[str, Any] = {"tqdm_class": progress.of_a_file()} if told else {}
        try:
            hf_hub_download(repo_id, name, revision=commit, local_dir=target, **bar)
        except hub_errors() as error:
            raise _Unavailable(reading_sentence(error, repo_id, revision)) from error
        progress.file_done(size)
        if name.endswith("config.json"):
            _check_method(target / name, repo_id)
    record = Record(repo_id, revision, commit, {name: (target / name).stat().st_size for name in files})
    write_record(target, record)
    return record


def _check_method(config: Path, repo_id: str) -> None:
    """Raise CheckpointError before the weights of another model are fetched."""
    quantization = read_json(config).get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "dirotq":
        raise CheckpointError(
            f"{repo_id!r} is not a DiRotQ checkpoint: its config.json has "
            + (f"quant_method {method!r}" if method else "no quantization_config of dirotq")
        )


class _Progress:
    """One bar on the node over the bytes of several files."""

    def __init__(self, total: int):
        self._bar = comfy.utils.ProgressBar(max(total, 1))
        self._before = 0
        self._thread = threading.get_ident()

    def file_done(self, size: int) -> None:
        self._before += size
        self._show(0)

    def _show(self, done: int) -> None:
        """done: bytes of the present file. Notices an interrupt, in the thread of the node."""
        # In another thread, which Xet has, the exception would be lost and the interrupt forgotten.
        if threading.get_ident() == self._thread:
            comfy.model_management.throw_exception_if_processing_interrupted()
        elif comfy.model_management.processing_interrupted():
            return
        self._bar.update_absolute(max(self._bar.current, self._before + done))

    def of_a_file(self) -> type[tqdm]:
        """The class of the console's bar, which tells this one."""
        progress = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **kwargs: Any):
                kwargs.pop("name", None)
                super().__init__(*args, **kwargs)
                self._done = kwargs.get("initial") or 0  # tqdm's own count stands still where it is disabled

            def update(self, n: float | None = 1) -> bool | None:
                self._done += n or 0
                progress._show(int(self._done))
                return super().update(n)

        return Bar
