"""Downloads from the Hugging Face Hub into ComfyUI's models folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
from tqdm.auto import tqdm

#: What a quantized transformer consists of, in either layout.
PATTERNS = ["*.safetensors", "*.safetensors.index.json", "config.json", "model_index.json", "*.dirotq.json"]
OTHER_PARTS = ["text_encoder*", "tokenizer*", "vae*", "image_encoder*", "feature_extractor*", "scheduler*"]


def download(repo_id: str, revision: str, into: Path) -> Path:
    """Bring the transformer of `repo_id` below `into` and return its folder; what is there is not fetched again.

    Raises:
        ValueError: the id is no "owner/name", or the Hub does not have it, refuses it, or cannot be reached and the
            folder is not complete; one sentence each.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    target = into / f"{repo_id.replace('/', '--')}@{revision.replace('/', '--')}"
    where = f"{repo_id!r} at revision {revision!r}"
    patterns = PATTERNS + [f"transformer/{p}" for p in PATTERNS]
    ignored = [f"{p}/*" for p in OTHER_PARTS]
    try:
        snapshot_download(
            repo_id, revision=revision, local_dir=target, allow_patterns=patterns, ignore_patterns=ignored,
            tqdm_class=_Progress,
        )  # fmt: skip
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no Hub id; it must look like 'owner/name'") from error
    except GatedRepoError as error:
        raise ValueError(f"{where} is gated: accept its licence on the Hub and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"the Hub has {repo_id!r}, but no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"the Hub has no {repo_id!r}, or it is private and you are not logged in") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"could not download {where}: {error}") from error
    if not any(target.rglob("*.safetensors")):
        raise ValueError(f"{where} has no safetensors file of a transformer")
    files = [f for f in target.glob("*.safetensors") if not (target / "config.json").exists()]
    return files[0] if len(files) == 1 and not (target / "transformer").exists() else target


class _Progress(tqdm):
    """The console's bar, shown on the node as well; every tick also notices an interrupt."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.pop("name", None)
        super().__init__(*args, **kwargs)
        self._bar = comfy.utils.ProgressBar(100)

    def update(self, n: float | None = 1) -> bool | None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        shown = super().update(n)
        if self.total:
            self._bar.update_absolute(int(100 * self.n / self.total))
        return shown
