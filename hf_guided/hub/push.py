"""Pushing a finished folder to the Hub in one commit, with errors that name the cause and the fix."""

import logging
import os
import shlex
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from ..credentials import without_credentials
from .card_edits import merge, sign
from .model_card import address
from .saved_card import card_of_saved
from .selection import CODE_FILES, select_files
from .standalone import write_standalone

logger = logging.getLogger(__name__)

_ATTEMPTS = 3  # if others push to the same branch at the same time

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN, using a token with write access (https://huggingface.co/settings/tokens)"


class PushError(RuntimeError):
    """The Hub could not be reached or refused the push; the message says how to fix it."""

    def __init__(self, message: str):
        super().__init__(without_credentials(message))  # the client's messages hold URLs, some of them signed


def prepare_push(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """The full name, `"user/name"`, of the repository to push to, created if needed; called before a long training.

    Takes the arguments of [`push_folder`]. A `PushError` if there is no token, the Hub does not accept it, or it has no
    write access.
    """
    api = HfApi(token=token or True)
    try:
        if api.whoami().get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise PushError(f"This token is read-only: {_LOGIN}.")
        return api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    except (HTTPError, HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise PushError(_explain(error, repo_id)) from error


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload with hf-guided",
    revision: str | None = None,
    create_pr: bool = False,
    standalone: bool = False,
    repo_type: str = "model",
    include: Sequence[str] | None = None,
    license: str | None = None,
) -> str:
    """Pushes a saved pipeline or model to a repository on the Hub, created if needed, in one commit.

    The files of a model are pushed, see [`select_files`]; the log names the others. Files that are in the repository
    already are not uploaded again; those that are only there are kept, and so are edits of its model card. If neither
    the folder nor the repository has a card, one is generated from the configs.

    Args:
        folder (`str` or `os.PathLike`): A folder with a `model_index.json` (pipeline) or `config.json` (model).
        repo_id (`str`): `"user/name"`, `"organization/name"`, or `"name"` for the user who is logged in.
        private (`bool`, *optional*): Whether a new repository is private. By default what the account says.
        token (`str`, *optional*): A token with write access. By default the one of `hf auth login` or `HF_TOKEN`.
        commit_message (`str`, defaults to `"Upload with hf-guided"`): First line of the commit.
        revision (`str`, *optional*): The branch to push to, created if needed. By default `main`.
        create_pr (`bool`, defaults to `False`): Propose the commit as a pull request to `main` instead.
        standalone (`bool`, defaults to `False`): Add the model's code to the repository, see [`write_standalone`].
        repo_type (`str`, defaults to `"model"`): `"space"` for the folder of [`write_space`].
        include (`Sequence[str]`, *optional*): Further files: paths in the folder, or patterns such as `"assets/*"`.
        license (`str`, *optional*): Identifier of the licence, such as `"apache-2.0"`, for a model card that is added.

    Returns:
        `str`: The URL of the repository, or of the pull request.

    Raises:
        `ValueError`: If the folder is not a saved pipeline or model, a model card has invalid metadata, or something in
            `include` matches no file.
        `PushError`: If the Hub cannot be reached or refuses the push; the message says how to fix it.
    """
    folder = Path(folder)
    if repo_type == "model" and not any((folder / name).is_file() for name in ("model_index.json", "config.json")):
        raise ValueError(
            f"{folder} has neither model_index.json nor config.json: give the folder that `save_pretrained` wrote."
        )
    if create_pr and revision is not None:
        raise ValueError(f"A pull request is made to main; leave out the revision {revision!r}, or create_pr.")
    with ExitStack() as stack:
        if standalone:
            # On the same disk as the folder, so that weights are linked and not copied.
            parent = TemporaryDirectory(dir=folder.absolute().parent, prefix=".standalone-")
            folder = write_standalone(folder, Path(stack.enter_context(parent), folder.absolute().name), include)
        paths = select_files(folder, include, repo_type)
        api = HfApi(token=token or True)  # True: a token is required
        try:
            sdk = "gradio" if repo_type == "space" else None
            repo = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type, space_sdk=sdk)
            place = {"repo_id": repo.repo_id, "revision": revision, "repo_type": repo_type}
            if revision is not None:
                api.create_branch(repo.repo_id, branch=revision, exist_ok=True, repo_type=repo_type)
            commit = _commit(api, place, folder, paths, license, commit_message=commit_message, create_pr=create_pr)
        except (HTTPError, OSError, RuntimeError) as error:
            raise PushError(_explain(error, repo_id)) from error
    return commit.pr_url or str(repo)


def _commit(
    api: HfApi, place: dict[str, Any], folder: Path, paths: list[str], license: str | None, **options: Any
) -> CommitInfo:
    """Commits files of a folder, again if another commit came first."""
    attempt = 0
    while True:
        attempt += 1
        # The card is merged with the card of this commit, and a later commit of others is not overwritten.
        head: Any = api.repo_info(**place)
        there = {file.rfilename for file in head.siblings or ()}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path, folder / path) for path in paths if path != "README.md"
        ]
        if place["repo_type"] == "model":  # code of an earlier push that is no longer used is removed
            stale = [path for path in there.difference(paths) if Path(path).name in CODE_FILES]
            operations += [CommitOperationDelete(path) for path in stale]
        card = _card(place, folder, paths, license, there)
        if card is not None:
            if "README.md" in there:
                edited = api.hf_hub_download(filename="README.md", **{**place, "revision": head.sha})
                card = merge(Path(edited).read_text(encoding="utf-8"), card)
            operations.append(CommitOperationAdd("README.md", card.encode()))
        try:
            return api.create_commit(operations=operations, parent_commit=head.sha, **place, **options)
        except (HfHubHTTPError, HTTPError) as error:
            # Others were first, or the answer was lost: the next attempt then finds the files already there.
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
            if (status != 412 and (status < 500 or options["create_pr"])) or attempt == _ATTEMPTS:
                raise


def _card(place: dict[str, Any], folder: Path, paths: list[str], license: str | None, there: set[str]) -> str | None:
    """The card to push: the folder's, or one of its configs where the repository has none either."""
    repo_id, card = place["repo_id"], None
    if "README.md" in paths:
        card = (folder / "README.md").read_text(encoding="utf-8")
    elif "README.md" not in there and place["repo_type"] == "model":
        card = card_of_saved(folder, repo_id.rpartition("/")[2], license)
    if license is not None and "README.md" in there.union(paths):
        logger.warning(f"The existing model card is kept; write the licence {license} into it.")
    return None if card is None else sign(address(card, repo_id, standalone=not CODE_FILES.isdisjoint(paths)))


def push_command(folder: str | os.PathLike, repo_id: str, private: bool = False) -> str:
    """The command that pushes a folder whose push has failed."""
    return f"hf-guided push {shlex.quote(str(folder))} {repo_id}" + (" --hub_private" if private else "")


class BackgroundPush:
    """Pushes snapshots of a training in the background, one at a time; a failed push does not stop the training.

    Takes `repo_id`, `private` and `token` as [`push_folder`]. `failure` says why the latest push failed, if it did.
    """

    def __init__(self, repo_id: str, *, private: bool | None = None, token: str | None = None):
        self.repo_id, self.private, self.token = repo_id, private, token
        self.failure: str | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a push is running; its folder must not change until it has finished."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, folder: Path, commit_message: str) -> None:
        """Starts a push; the previous one must have finished."""
        self._thread = threading.Thread(target=self._push, args=(folder, commit_message), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _push(self, folder: Path, commit_message: str) -> None:
        had_bars = not are_progress_bars_disabled()
        disable_progress_bars()  # the training has its own
        try:
            push_folder(folder, self.repo_id, commit_message=commit_message, private=self.private, token=self.token)
            self.failure = None
        except Exception as error:  # no failure may end the training
            self.failure = str(error)
        finally:
            if had_bars:
                enable_progress_bars()


def _explain(error: BaseException, repo_id: str) -> str:
    """The cause of a failure and its fix, in one sentence."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # how the client reports a failed LFS upload
        error = error.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return f"No Hugging Face token was found: {_LOGIN}."
    if not isinstance(error, HfHubHTTPError):
        unreachable = ", the Hub could not be reached" if isinstance(error, HTTPError) else ""
        return f"Pushing to {repo_id} failed{unreachable}: {error}"
    match error.response.status_code:
        case 401:
            return f"The Hub does not accept this token, which may have expired or been revoked: {_LOGIN}."
        case 403:
            return f"This token has no write access to {repo_id}: {_LOGIN}."
        case 404:
            return f"{repo_id} was not found on the Hub with this token: check the name, or {_LOGIN}."
        case 412:
            return f"Others are pushing to {repo_id} at the same time: push again when they have finished."
        case status:
            return f"Pushing to {repo_id} failed, the Hub answered {status}: {error.server_message or error}"
