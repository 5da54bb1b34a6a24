"""Errors of huggingface_hub in words: what is wrong, and what to set or write instead."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class Unavailable(ValueError):
    """A model cannot be had from the hub; the message says why."""


_OFFLINE = "HF_HUB_OFFLINE is set, so the hub is not asked"
_FILL = "download it where there is a network, with the same HF_HOME, or name a directory"


@contextmanager
def explained(repo: str, revision: str, file: str = "") -> Iterator[None]:
    """Turns whatever huggingface_hub raises into Unavailable. `file` is the one that is asked for alone, if any."""
    try:
        yield
    except Unavailable:
        raise
    except Exception as error:  # its own, those of three HTTP libraries, and OSErrors of the disk
        raise Unavailable(why(error, repo, revision, file)) from error


def why(error: BaseException, repo: str, revision: str, file: str = "") -> str:
    """A part of a sentence about an error that came while `repo` was asked for at `revision`."""
    from huggingface_hub import constants, errors

    if any(isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT) for link in _chain(error)):
        return f"no room for {repo} in {constants.HF_HUB_CACHE}; make room, or let HF_HOME name another disk"
    match error:
        case errors.GatedRepoError():
            page = f"{constants.ENDPOINT}/{repo}"
            return f"the hub's is gated: accept its terms at {page}, and {_token('of the account that did')}"
        case errors.RevisionNotFoundError():
            return f"the hub's has no branch, tag or commit '{revision}'"
        case errors.RepositoryNotFoundError():
            return _unknown()
        case errors.RemoteEntryNotFoundError():
            return f"the hub's {revision} has no file {file}" if file else _first_line(error)
        case errors.HFValidationError():
            return "it is no name of the hub (Org/Name or Org/Name@revision)"
        case errors.HfHubHTTPError():
            return _answered(error, repo)
        case errors.EntryNotFoundError():  # of the cache: the hub was not asked, or did not answer
            return _not_here(error, repo, revision)
    return (
        f"the download of {repo} failed: {_first_line(error)}. What is there is kept, and the same command goes on"
        " from it"
    )


def _unknown() -> str:
    hidden = _token("of an account that may read it")
    return f"the hub has none of that name, or it is private: then {hidden}"


def _answered(error: BaseException, repo: str) -> str:
    from huggingface_hub import get_token

    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status == 404 or (status == 401 and not get_token()):  # 401 is also the answer for what does not exist
        return _unknown()
    if status in (401, 403):
        return f"the hub refuses {repo} ({status}): {_token('that is valid and may read it')}"
    return f"the hub answered {status} for {repo}: {_first_line(error)}. Try again later, or name a directory"


def _not_here(error: BaseException, repo: str, revision: str) -> str:
    from huggingface_hub import constants, errors

    part = "has only a part of" if isinstance(error, getattr(errors, "IncompleteSnapshotError", ())) else "has no"
    cache = f"the cache {constants.HF_HUB_CACHE} {part} {repo}@{revision}"
    if constants.HF_HUB_OFFLINE:
        return f"{_OFFLINE}, and {cache}: {_FILL}"
    causes = [link for link in _chain(error) if link is not error]
    said = _first_line(causes[0] if causes else error)
    return f"no answer came from {constants.ENDPOINT} ({said}), and {cache}: {_FILL}"


def _token(whose: str) -> str:
    from huggingface_hub import get_token

    has = "replace the token (HF_TOKEN, or `hf auth login`) by one" if get_token() else "set HF_TOKEN to a token"
    return f"{has} {whose}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised from or in the handling of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
