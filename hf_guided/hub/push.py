"""Pushes a finished folder to the Hub in one commit, and says in one sentence what is wrong when it cannot."""

import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

# What training leaves beside a finished pipeline. A star also matches slashes.
_IGNORED = ["checkpoint-*", "*/checkpoint-*", "logs/*", "*/logs/*", "*.log", "*.tmp", "*tfevents*", "*__pycache__*"]

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN, using a token with write access (https://huggingface.co/settings/tokens)"


class PushError(RuntimeError):
    """The Hub could not be reached or refused; the message says how to mend it."""


def check_login(token: str | None = None) -> str:
    """The user whom the Hub takes the token for, asked before a long training whose result is to be pushed.

    Raises:
        `PushError`: If there is no token, the Hub does not accept it, or it may only read.
    """
    try:
        user = HfApi(token=token or True).whoami()
    except (HTTPError, HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise PushError(_mend(error, "the Hub")) from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PushError(f"This token may only read, not push: {_LOGIN}.")
    return user["name"]


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload with hf-guided",
    revision: str | None = None,
) -> str:
    """Pushes a saved pipeline or model to a model repository of the Hub, which is created if need be, in one commit.

    Checkpoints (`checkpoint-*`), logs and temporary files stay behind; files that only the repository has are kept.

    Args:
        folder (`str` or `os.PathLike`): A folder with a `model_index.json` (pipeline) or `config.json` (model).
        repo_id (`str`): `"user/name"`, `"organization/name"`, or `"name"` for the user who is logged in.
        private (`bool`, *optional*): Whether a new repository is private. `None` is the account's default; an existing
            repository is left as it is.
        token (`str`, *optional*): A token with write access. By default the one of `hf auth login` or `HF_TOKEN`.
        commit_message (`str`, defaults to `"Upload with hf-guided"`): First line of the commit.
        revision (`str`, *optional*): The branch to push to, created if need be. By default `main`.

    Returns:
        `str`: The URL of the repository.

    Raises:
        `ValueError`: If the folder is not a saved pipeline or model, or its model card has invalid metadata.
        `PushError`: If the Hub cannot be reached or refuses: the sentence says how to mend it.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("model_index.json", "config.json")):
        raise ValueError(
            f"{folder} has neither model_index.json nor config.json: give the folder that `save_pretrained` wrote."
        )
    api = HfApi(token=token or True)  # True: a token is required
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            ignore_patterns=_IGNORED.copy(),  # the client appends to the list
        )
    except (HTTPError, OSError, RuntimeError) as error:
        raise PushError(_mend(error, repo_id)) from error
    return str(repo)


def _mend(error: BaseException, repo_id: str) -> str:
    """What went wrong, in one sentence with the way out."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # how the client reports a failed LFS upload
        error = error.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return f"No Hugging Face token was found: {_LOGIN}."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return f"The Hub does not accept this token, which may have expired or been revoked: {_LOGIN}."
        if status == 403:
            return f"This token may not write to {repo_id}, being read-only or without rights there: {_LOGIN}."
        if status == 404:
            return f"The Hub has no {repo_id} that this token may see: check the name, or {_LOGIN}."
        return f"Pushing to {repo_id} failed, the Hub answered {status}: {error.server_message or error}"
    if isinstance(error, HTTPError):
        return f"Pushing to {repo_id} failed, the Hub could not be reached: {error}"
    return f"Pushing to {repo_id} failed: {error}"
