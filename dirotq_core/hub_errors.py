"""What the Hub and its client can answer, as one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class HubError(ValueError):
    """The Hub did not do what it was asked to; one sentence says why and what to do."""


def hub_errors() -> tuple[type[Exception], ...]:
    """What a request to the Hub raises."""
    from huggingface_hub import errors

    return (errors.HfHubHTTPError, _client_error(), OSError, errors.HFValidationError)


def _client_error() -> type[Exception]:
    """The base of all errors of the HTTP library, which differs between versions of huggingface_hub."""
    from huggingface_hub import errors

    first = errors.HfHubHTTPError.__bases__[0]
    return [c for c in first.__mro__ if c not in OSError.__mro__][-1]


def reading_sentence(error: Exception, repo_id: str, revision: str | None = None) -> str:
    """Why `repo_id` could not be read."""
    from huggingface_hub import errors

    where = f"{repo_id!r} at revision {revision!r}" if revision else repr(repo_id)
    if isinstance(error, errors.HFValidationError):
        return f"{repo_id!r} is no Hub id; it must look like 'owner/name'"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id!r} is gated: accept its licence on the Hub and log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the Hub has {repo_id!r}, but no revision {revision!r}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub has no {repo_id!r}, or it is private and you are not logged in"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{where} is not downloaded, and HF_HUB_OFFLINE is set"
    response = getattr(error, "response", None)
    if response is not None:
        return f"the Hub answered {response.status_code} when asked for {where}"
    return f"could not download {where}: {_unanswered(error)}"


def writing_sentence(error: Exception, repo_id: str) -> str:
    """Why nothing could be written to `repo_id`."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return f"{repo_id!r} is no Hub id; it must look like 'owner/name'"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo_id!r} cannot be written to while HF_HUB_OFFLINE is set"
    if status == 401 or isinstance(error, errors.LocalTokenNotFoundError):
        return (
            f"writing to {repo_id!r} needs a token that the Hub accepts: log in with `hf auth login`, or set HF_TOKEN, "
            "with a token that may write"
        )
    if status == 403:
        return f"your token may not write to {repo_id!r}: use one with write access to {repo_id.split('/')[0]!r}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id!r} has no such branch; create it first, or push to main"
    if status is not None:
        said = getattr(error, "server_message", None)
        return f"the Hub answered {status} when {repo_id!r} was written" + (f": {said}" if said else "")
    return f"could not write to {repo_id!r}: {_unanswered(error)}"


def _unanswered(error: Exception) -> str:
    from huggingface_hub import errors

    what = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, (_client_error(), errors.LocalEntryNotFoundError)):
        return f"the Hub cannot be reached ({what})"
    return what  # a full disk, for one


@contextmanager
def writing(repo_id: str) -> Iterator[None]:
    """Raise HubError, one sentence, for what the Hub answers to a push."""
    try:
        yield
    except hub_errors() as error:
        raise HubError(writing_sentence(error, repo_id)) from error
