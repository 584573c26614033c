"""A model by its id on the Hugging Face hub: fetched into that library's cache, as a directory. Needs the extra hf."""

import errno
import re
from collections.abc import Sequence
from pathlib import Path

from gshardx.errors import BadInput

ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^@\s]+))?")
FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""Weights, configs, tokenizers and their like."""
LEFT = ["*/*", "consolidated*"]
"""The same weights once more, in other layouts."""


def fetched(name: str | Path, revision: str | None = None, files: Sequence[str] = FETCHED) -> Path:
    """The directory ``name``, or if there is none and it looks like a hub id, ``org/name`` or ``org/name@revision``,
    the one in the cache of huggingface_hub with that model's files; what is missing of them is fetched.

    HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are that library's, and hold.

    Args:
        name: a directory or an id.
        revision: a branch, tag or commit; None: the main one.
        files: patterns of those that are needed.

    Raises:
        BadInput: a revision of a directory, or of an id that has one; no such model; no access to it; no network and
            nothing in the cache; or huggingface_hub is missing.
    """
    found = ID.fullmatch(str(name))
    if Path(name).exists() or found is None:
        if revision is not None:
            raise BadInput(f"--revision {revision}: is for models on the hub, and {name} is a directory; leave it out")
        return Path(name)
    if found["revision"] and revision not in (None, found["revision"]):
        raise BadInput(f"--revision {revision}: {name} names another; leave one of them out")
    return _fetched(found["repo"], found["revision"] or revision, files)


def _fetched(repo: str, revision: str | None, files: Sequence[str]) -> Path:
    said = f"{repo}: no such directory, and as a model on the hub"
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise BadInput(f"{said} it needs the package huggingface_hub; pip install 'gshardx[hf]'") from error
    try:
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(files), ignore_patterns=LEFT)
        )
    except errors.GatedRepoError as error:
        mend = "ask for access on its page, and log in (hf auth login, or HF_TOKEN)"
        raise BadInput(f"{said} it is gated; {mend}") from error
    except errors.RepositoryNotFoundError as error:
        raise BadInput(f"{said} it is not there, or private; check the name, or log in (hf auth login)") from error
    except errors.RevisionNotFoundError as error:
        raise BadInput(f"{said} it has no revision {revision}; give a branch, tag or commit of it") from error
    except errors.LocalEntryNotFoundError as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else f"{huggingface_hub.constants.ENDPOINT} can't be reached"
        raise BadInput(f"{said} it is not in the cache, or in part, and {why}; fetch it once with a network") from error
    except Exception as error:  # each version has its own network library, which raises its own
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise BadInput(f"{said} it can't be fetched ({reason}); try again, the cache keeps what has come") from error
