"""Hugging Face hub ids: `tandem serve org/name`.

huggingface-hub fetches and keeps the files, where and as it is told to for every program: HF_HOME or HF_HUB_CACHE (the
cache), HF_TOKEN or `hf auth login`, HF_HUB_OFFLINE, HF_ENDPOINT. What is cached is not fetched again.
"""

# pyright: reportUnknownVariableType=false
# huggingface-hub's types leave some parameters open

from __future__ import annotations

import re
from pathlib import Path

from .engine.options import OptionsError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WANTED = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model")  # no pickle and no code
# Other formats of the same weights; fnmatch's * takes slashes too.
UNWANTED = ("*/*.safetensors", "*/*.json", "consolidated*.safetensors")
SHOWN = 300  # characters of an error that is not ours


def snapshot(repo: str, revision: str | None = None) -> str:
    """The directory of a checkpoint from the hub. Raises OptionsError, in one line, where it cannot be had."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = repo if revision is None else f"{repo}, revision {revision}"
    token = "give a token (`hf auth login`, or HF_TOKEN)"
    download = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    try:
        directory = Path(
            snapshot_download(repo, revision=revision, allow_patterns=[*WANTED], ignore_patterns=[*UNWANTED])
        )
    except GatedRepoError:
        raise OptionsError(f"model {repo} is gated: accept its terms on its page at the hub, and {token}") from None
    except RepositoryNotFoundError:
        raise OptionsError(
            f"model {repo}: no such directory, and no such model on the Hugging Face hub, or it is private: "
            f"check the name, or {token}"
        ) from None
    except RevisionNotFoundError:
        raise OptionsError(f"model {repo} has no revision {revision}: give a branch, a tag or a commit of it") from None
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set: unset it, or"
        else:
            why = f"the hub cannot be reached ({_short(error.__cause__ or error)}): where it can,"
        raise OptionsError(
            f"model {at} is not, or not wholly, in the cache {constants.HF_HUB_CACHE}, and {why} run `{download}`"
        ) from None
    except Exception as error:  # whatever its HTTP client raises
        raise OptionsError(f"model {at} cannot be fetched from the Hugging Face hub: {_short(error)}") from None
    if not (directory / "config.json").is_file():
        raise OptionsError(f"model {at}: has no config.json, so it is no checkpoint of transformers")
    if not any(directory.glob("*.safetensors")):
        raise OptionsError(
            f"model {at}: has no safetensors; only these are fetched. Run `{download}`, convert the weights with "
            "transformers (from_pretrained, save_pretrained) and give the directory"
        )
    return str(directory)


def _short(error: BaseException) -> str:
    """Its first line."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:SHOWN]
