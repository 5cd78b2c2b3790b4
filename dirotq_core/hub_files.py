"""Which files of a repository a checkpoint consists of, and fetching them into the Hub's cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from .hub_errors import HubError, hub_errors, reading_sentence

#: Files of a transformer beside its weights.
_JSON = ("config.json", "diffusion_pytorch_model.safetensors.index.json", "dirotq_report.json")
#: Files beside the folder of a pipeline's transformer.
_PIPELINE = ("model_index.json", "dirotq_report.json")
#: Seconds until the Hub counts as unreachable.
TIMEOUT = 20


def checkpoint_names(files: Iterable[str], where: str) -> list[str]:
    """Of a repository's `files` those of its transformer, or its only single file.

    Raises ValueError, which names `where`, if there is neither.
    """
    files = list(files)
    for prefix in ("transformer/", ""):
        if prefix + "config.json" in files:
            weights = [f for f in files if re.fullmatch(re.escape(prefix) + r"[^/]+\.safetensors", f)]
            beside = _PIPELINE if prefix and "model_index.json" in files else ()
            return weights + [f for f in [*(prefix + j for j in _JSON), *beside] if f in files]
    single = [f for f in files if "/" not in f and f.endswith(".safetensors")]
    if len(single) != 1:
        found = f"several single files ({', '.join(sorted(single))})" if single else "no config.json and no single file"
        raise ValueError(f"{where} has {found}; a repository must hold one DiRotQ checkpoint")
    return single


def local_checkpoint(source: str | Path, revision: str | None = None) -> Path:
    """`source` if it is there; else what "owner/name", or "owner/name/file.safetensors", is on the Hub, in its cache.

    Where the Hub cannot be reached the cache is used as it is. Raises HubError, one sentence, if there is nothing;
    ValueError if the repository holds no checkpoint.
    """
    path, name = Path(source), str(source)
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+\.safetensors))?", name)
    if path.exists() or match is None:
        if revision is not None:
            raise ValueError(f"a revision is for the Hub, and {name} is " + ("here" if path.exists() else "no Hub id"))
        return path
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    repo_id, file = match.groups()
    try:
        if file is not None:
            return Path(hf_hub_download(repo_id, file, revision=revision))
        root = None
        try:
            listed = HfApi().model_info(repo_id, revision=revision, timeout=TIMEOUT).siblings or []
            names = checkpoint_names((s.rfilename for s in listed), repr(repo_id))
        except hub_errors() as error:
            root = None if getattr(error, "response", None) is not None else _cached(repo_id, revision or "main")
            if root is None:  # it has answered, or there is nothing to use instead
                raise
            names = checkpoint_names((f.relative_to(root).as_posix() for f in root.rglob("*")), str(root))
        root = root or Path(snapshot_download(repo_id, revision=revision, allow_patterns=names))
    except hub_errors() as error:
        raise HubError(f"{name!r} is no file or folder, and {reading_sentence(error, repo_id, revision)}") from error
    return root if any(n.endswith("config.json") for n in names) else root / names[0]


def _cached(repo_id: str, revision: str) -> Path | None:
    """The folder of a revision in the Hub's cache, complete or not."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return None
    revisions = [
        r for repo in repositories if (repo.repo_type, repo.repo_id) == ("model", repo_id) for r in repo.revisions
    ]
    return next((r.snapshot_path for r in revisions if revision in r.refs or revision == r.commit_hash), None)
