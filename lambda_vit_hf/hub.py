"""Push of a finished model's folder to the Hub: checked first, one commit, safe to repeat."""

import fnmatch
import json
import logging
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_session, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status, validate_repo_id
from safetensors import SafetensorError, safe_open


class PushError(OSError):
    """A push that did not succeed. Says what happened and how to go on; the folder on disk is as it was."""


@dataclass
class PushResult:
    """
    What [`push_folder`] sent, or would send.

    Attributes:
        files (`dict[str, int]`): name and size in bytes.
        commit_url (`str`, *optional*): the newest commit; `None` after a dry run.
        pull_request_url (`str`, *optional*): with `create_pr`.
    """

    files: dict[str, int]
    commit_url: str | None = None
    pull_request_url: str | None = None


logger = logging.getLogger(__name__)

PUSHED_FILES = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "README.md",
    "selection.json",
    "metrics.json",
    "*.png",
    "configuration_lambda_vit.py",
    "modeling_lambda_vit.py",
    "removal.py",
)
# httpx or httpx2, by the version of huggingface_hub: the ancestor of its own errors and of every broken connection.
_HTTPError = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
_RETRIED_BY_LIBRARY = ("/preupload/", "/info/lfs/")
_LONGEST_WAIT = 300.0  # seconds
_CONFLICT = "another conflicting operation"
_INDEX = "model.safetensors.index.json"
_HINTS = {
    401: "The token is wrong or has expired: run `hf auth login` or set HF_TOKEN.",
    403: "The token may not write there: make one with that right.",
}
_UNKNOWN = "It may have arrived all the same; pushing again is safe, nothing is committed twice."
_UNKNOWN_PULL_REQUEST = "It may have arrived all the same: look at the repository's pull requests first."


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload LambdaViT",
    create_pr: bool = False,
    force: bool = False,
    dry_run: bool = False,
    max_attempts: int = 5,
    first_wait: float = 1.0,
) -> PushResult:
    """
    Push a saved model to the Hub in one commit.

    Only the files named by `PUSHED_FILES` at the top of the folder are sent: no optimizer state, no pickled training
    arguments, no checkpoints. Pushing an unchanged folder again makes no commit, so a failed push can be repeated.

    Args:
        folder (`str` or `Path`):
            A folder written by `save_pretrained` or the main job.
        repo_id (`str`):
            `"user/name"`, or `"name"` for a repository of one's own. It is created if it does not exist.
        private (`bool`, *optional*):
            Visibility of a repository that is created now; by default that of the account.
        token (`str`, *optional*):
            A token that may write. By default `HF_TOKEN`, or that of `hf auth login`.
        revision (`str`, *optional*, defaults to `"main"`):
            Branch to commit to; created from the main branch if it does not exist.
        commit_message (`str`, *optional*, defaults to `"Upload LambdaViT"`):
            First line of the commit's message.
        create_pr (`bool`, *optional*, defaults to `False`):
            Open a pull request instead of committing to the branch.
        force (`bool`, *optional*, defaults to `False`):
            Push a model whose lambda is not 1 in a layer that still has attention, all the same.
        dry_run (`bool`, *optional*, defaults to `False`):
            Check the folder and return what would be sent, without any request.
        max_attempts (`int`, *optional*, defaults to 5):
            How often to try when the Hub is busy (409 "another conflicting operation", 412, 429, 503) or a connection
            breaks. 401 and 403 are never tried again.
        first_wait (`float`, *optional*, defaults to 1.0):
            Seconds before the second attempt, doubled for each further one. A `Retry-After` in seconds goes first.

    Returns:
        [`PushResult`]: the files with their sizes, and where the commit is.

    Raises:
        ValueError: if the repo id is invalid; if the folder has no config or no weights, weights are cut short, NaN or
            infinite, or a lambda is not 1 (see `force`). Nothing was sent then.
        PushError: if the Hub refuses or cannot be reached. The folder on disk is untouched.

    Example:

    ```python
    >>> from lambda_vit_hf.hub import push_folder

    >>> push_folder("outputs/digits", "me/lambda-vit-digits", dry_run=True).files  # doctest: +SKIP
    {'config.json': 802, 'model.safetensors': 412040, 'preprocessor_config.json': 455}
    ```
    """
    validate_repo_id(repo_id)
    if max_attempts < 1:
        raise ValueError(f"`max_attempts` must be at least 1, got {max_attempts}.")
    paths = check_folder(folder, force=force)
    files = {path.name: path.stat().st_size for path in paths}
    if dry_run:
        return PushResult(files)
    options = dict(
        private=private, revision=revision, commit_message=commit_message, create_pr=create_pr, force=force
    )  # fmt: skip
    changed = [f", {name}={value!r}" for name, value in options.items() if value != push_folder.__kwdefaults__[name]]
    go_on = f"To go on: lambda_vit_hf.hub.push_folder({str(folder)!r}, {repo_id!r}{''.join(changed)})"
    if is_offline_mode():
        raise PushError(f"Cannot push to {repo_id} offline: unset HF_HUB_OFFLINE and start again. {go_on}")
    api = HfApi(token=token)
    attempt = partial(_with_retries, go_on=go_on, max_attempts=max_attempts, first_wait=first_wait)
    user = attempt("ask the Hub whose token this is", api.whoami)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PushError(f"The token of {user['name']} may only read; pass one that may write. {go_on}")
    repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"

    def commit():
        # Built anew for each attempt: only then is the Hub asked again which files it already has.
        operations = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in paths]
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )

    with _conflicts_raised():
        attempt(f"create {repo_id}", lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if revision is not None and not revision.startswith("refs/pr/"):
        attempt(f"create branch {revision}", lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    info = attempt(f"commit to {repo_id} as {user['name']}", commit, opens_pull_request=create_pr)
    return PushResult(files, info.commit_url, info.pr_url)


def check_folder(folder: str | Path, *, force: bool = False) -> list[Path]:
    """
    The files of a model's folder that may be published, after a look at every weight.

    Raises:
        ValueError: as [`push_folder`].
    """
    folder = Path(folder)
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()} if folder.is_dir() else {}
    paths = [path for name, path in found.items() if any(fnmatch.fnmatchcase(name, p) for p in PUSHED_FILES)]
    if "config.json" not in found or not {"model.safetensors", _INDEX} & set(found):
        raise ValueError(
            f"{folder} holds no model: expected config.json and model.safetensors (or {_INDEX}), found"
            f" {sorted(found) or 'no files'}. Write it with `save_pretrained`."
        )
    if _INDEX in found:
        shards = set(json.loads(found[_INDEX].read_text(encoding="utf-8"))["weight_map"].values())
        if shards - set(found):
            raise ValueError(f"{folder} lacks {sorted(shards - set(found))}, named in {_INDEX}. Save the model again.")
    lambdas = {}
    for path in paths:
        if path.suffix == ".safetensors":
            lambdas |= _check_weights(path)
    diluted = {key: value for key, value in lambdas.items() if value != 1.0}
    if diluted and not force:
        raise ValueError(
            f"{folder} is not finished, lambda is not 1 in layers that still have attention: {diluted}. Finish the"
            " training, or call `remove_attention` and save again; `force=True` pushes it as it is."
        )
    return paths


def _check_weights(path: Path) -> dict[str, float]:
    """Raises on weights that are not finite; returns the values of lambda by key."""
    lambdas = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(key)
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{path} has NaN or infinite values in {key}. Push an earlier, finite model.")
                if key.endswith("attention_lambda"):
                    lambdas[key] = tensor.item()
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}). Save the model again.") from error
    return lambdas


@contextmanager
def _conflicts_raised():
    # create_repo repeats a conflict without pause or end (`while True` in huggingface_hub 2.4). Let it raise instead.
    def raise_conflict(response):
        if response.status_code == 409 and response.request.url.path.endswith("/api/repos/create"):
            response.read()
            if _CONFLICT in response.text:
                hf_raise_for_status(response)

    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {**hooks, "response": [*hooks["response"], raise_conflict]}
    try:
        yield
    finally:
        session.event_hooks = hooks


def _with_retries(what: str, call: Callable, *, go_on, max_attempts, first_wait, opens_pull_request=False):
    for attempt in range(1, max_attempts + 1):
        try:
            return call()
        except (_HTTPError, OSError, RuntimeError, ValueError) as error:
            outcome = _outcome(error)
            may_repeat = outcome == "not done" or (outcome == "unknown" and not opens_pull_request)
            pause = _retry_after(error) or first_wait * 2 ** (attempt - 1)
            if not may_repeat or attempt == max_attempts or pause > _LONGEST_WAIT:
                hint = _HINTS.get(_status(error), "")
                if outcome == "unknown":
                    hint = _UNKNOWN_PULL_REQUEST if opens_pull_request else _UNKNOWN
                raise PushError(
                    f"Could not {what} (attempt {attempt} of {max_attempts}): {str(error).strip()}\n{hint} {go_on}"
                ) from error
            logger.warning("Could not %s: %s. Attempt %d follows in %.1f s.", what, error, attempt + 1, pause)
        time.sleep(pause)


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _outcome(error: Exception) -> str:
    """Whether a failed request may have had its effect: "not done", "unknown", or "final" where repeating is vain."""
    if not isinstance(error, _HTTPError) or any(part in error.request.url.path for part in _RETRIED_BY_LIBRARY):
        return "final"
    status = _status(error)
    if status in (412, 429) or (status == 409 and _CONFLICT in str(error)):
        return "not done"
    return "unknown" if status in (None, 503) else "final"


def _retry_after(error: Exception) -> float | None:
    seconds = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(seconds) if seconds.isdigit() else None
