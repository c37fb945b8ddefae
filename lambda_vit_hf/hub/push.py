"""Push of a finished model's folder to the Hub: checked first, one commit, safe to repeat."""

import fnmatch
import json
import logging
import re
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_session, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status, validate_repo_id
from safetensors import SafetensorError, safe_open

from ..models.checksums import check_checksums
from ..models.families import load_as_saved
from ..models.finite import check_finite
from .exported_folder import check_exported_folder, is_exported_folder


class PushError(OSError):
    """A push that did not succeed: what happened, and the call to go on with. The folder on disk is as it was."""


@dataclass
class PushResult:
    """Files with sizes in bytes; URL of the newest commit (`None`: dry run); URL of the pull request, if any."""

    files: dict[str, int]
    commit_url: str | None = None
    pull_request_url: str | None = None


logger = logging.getLogger(__name__)
_INDEX = "model.safetensors.index.json"
PUSHED_FILES = (
    *("config.json", "*.safetensors", _INDEX, "preprocessor_config.json"),  # from_pretrained reads them
    *("README.md", "selection.json", "metrics.json", "*.png"),  # people read them
    # Remote code: what `save_pretrained` copies, today and (merging, removal) in older versions.
    *sorted(path.name for path in resources.files("lambda_vit_hf.models").iterdir() if path.name.endswith(".py")),
    *("merging.py", "removal.py"),
)
_NOT_FOR_THE_HUB = ("training_args.bin", ".env", "/*.bin", "/*.pt", "/*.pth", "/*.pkl", "/base/", "/runs/")
# Of httpx or httpx2, by the version of huggingface_hub: the ancestor of its own errors and of a broken connection's.
_HTTPError = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
_ATTENTION_KEY = re.compile(r"layers?\.(\d+)\.(?:attention|self_attn|layernorm_before)")
_NO_ANSWER = (json.JSONDecodeError, KeyError)  # what huggingface_hub makes of a body that is empty, or a proxy's
_CONFLICT = "another conflicting operation"
_LONGEST_WAIT = 300.0  # seconds
TIMEOUT = 120.0  # seconds
_LOST = "Pushing again is safe even if it arrived: nothing is committed twice."
_LOST_PULL_REQUEST = "It may have arrived all the same: look at the repository's pull requests first."


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
    timeout: float = TIMEOUT,
) -> PushResult:
    """
    Push a saved model to the Hub in one commit. Of the folder's top level, only `PUSHED_FILES` are sent (of an export
    `EXPORTED_FILES`): no optimizer state, pickles or checkpoints. An unchanged folder makes no new commit, so a failed
    push can be repeated.

    Args:
        folder (`str` or `Path`): What `save_pretrained`, `lambda-vit train` or `lambda-vit export` wrote.
        repo_id (`str`): `"user/name"`, or `"name"` for one's own. Created if it does not exist.
        private (`bool`, *optional*): Visibility of a repository created now; by default that of the account.
        token (`str`, *optional*): By default `HF_TOKEN`, or that of `hf auth login`.
        revision (`str`, *optional*, defaults to `"main"`): Branch; created if it does not exist.
        commit_message (`str`, *optional*, defaults to `"Upload LambdaViT"`): First line of the commit's message.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead.
        force (`bool`, *optional*, defaults to `False`): Push even if lambda is not 1 where attention is left, or the
            class head was never trained.
        dry_run (`bool`, *optional*, defaults to `False`): Check the folder and list the files, without any request.
        max_attempts (`int`, *optional*, defaults to 5): How often to try when the Hub is busy (409 "another
            conflicting operation", 412, 429, 500, 502, 503, 504) or the connection breaks; 401 and 403 are final.
        first_wait (`float`, *optional*, defaults to 1.0): Seconds before the second attempt, doubled for each further
            one. A `Retry-After` of the Hub goes first, up to 300 s.
        timeout (`float`, *optional*, defaults to 120.0): Seconds without a sign of life from the Hub after which a
            request counts as failed; huggingface_hub itself would wait for ever.

    Raises:
        ValueError: on an invalid repo id; if the folder lacks config or weights; if weights are cut short, NaN or
            infinite, or do not fit the config; if lambda is not 1 or the head new (see `force`). Nothing was sent.
        OSError: if a file is not what the folder's `SHA256SUMS` lists. Nothing was sent then.
        FloatingPointError: if the model answers in NaN or infinity. Nothing was sent then.
        PushError: if the Hub refuses or cannot be reached. The folder on disk is untouched.

    Example:

    ```python
    push_folder("outputs/digits", "me/lambda-vit-digits", dry_run=True).files
    # {'config.json': 802, 'model.safetensors': 412040, 'preprocessor_config.json': 455}
    ```
    """
    validate_repo_id(repo_id)
    paths = check_exported_folder(folder) if is_exported_folder(folder) else check_folder(folder, force=force)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    if dry_run:
        return PushResult(files)
    given = {"private": private, "revision": revision, "create_pr": create_pr, "force": force}
    options = {name: value for name, value in given.items() if value} | {"commit_message": commit_message}
    arguments = [repr(str(folder)), repr(repo_id), *(f"{name}={value!r}" for name, value in options.items())]
    go_on = f"To go on: lambda_vit_hf.hub.push.push_folder({', '.join(arguments + ['token=token'] * bool(token))})"
    if is_offline_mode():
        raise PushError(f"Cannot push to {repo_id} offline: unset HF_HUB_OFFLINE and start again.\n{go_on}")
    api = HfApi(token=token)
    attempt = partial(_with_retries, go_on=go_on, max_attempts=max_attempts, first_wait=first_wait)
    with _time_limit(timeout):
        user = attempt("ask the Hub whose token this is (see `hf auth login`)", api.whoami)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PushError(f"The token of {user['name']} may only read; pass one that may write.\n{go_on}")
    repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"

    def commit():
        # Built anew for each attempt: only then is the Hub asked again which files it already has.
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=Path(folder, name)) for name in files]
        options = {"commit_message": commit_message, "revision": revision, "create_pr": create_pr}
        return api.create_commit(repo_id, operations, **options)

    with _time_limit(timeout), _conflicts_raised():
        attempt(f"create {repo_id}", lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    with _time_limit(timeout):
        if revision is not None and not revision.startswith("refs/pr/"):
            attempt(f"create branch {revision}", lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        info = attempt(f"commit to {repo_id} as {user['name']}", commit, is_repeatable=not create_pr)
    return PushResult(files, info.commit_url, info.pr_url)


def upload_files(
    folder: str | Path,
    repo_id: str,
    patterns: Sequence[str],
    max_attempts: int = 5,
    first_wait: float = 1.0,
    **options,
) -> CommitInfo:
    """
    `HfApi.upload_folder` for a Trainer's pushes: of the top level the files of these patterns, with the attempts and
    the time limit of [`push_folder`].

    Raises:
        PushError: if the Hub refuses or cannot be reached.
    """

    def upload():
        # A pattern without a slash matches in folders too.
        return HfApi().upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(patterns), ignore_patterns=["*/*"], **options
        )

    with _time_limit(TIMEOUT):
        return _with_retries(
            f"push {folder} to {repo_id}", upload, go_on=f"To go on: lambda-vit push {folder} {repo_id}",
            max_attempts=max_attempts, first_wait=first_wait,
        )  # fmt: skip


def is_for_the_hub(name: str) -> bool:
    """Whether a file of a model's folder serves others; see `PUSHED_FILES`."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in PUSHED_FILES)


def check_folder(folder: str | Path, *, force: bool = False) -> list[Path]:
    """The files for others in a model's folder, after a look at weights and answers. Raises as [`push_folder`]."""
    folder, diluted, kept = Path(folder), {}, set()
    check_checksums(folder, is_complete=False)
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()} if folder.is_dir() else {}
    paths = [path for name, path in found.items() if is_for_the_hub(name)]
    shards = json.loads(found[_INDEX].read_text("utf-8"))["weight_map"] if _INDEX in found else {}
    missing = {"config.json", *(shards.values() or ["model.safetensors"])} - set(found)
    if missing:
        raise ValueError(f"{folder} is no whole model: it lacks {sorted(missing)}. Write it with `save_pretrained`.")
    config = json.loads(found["config.json"].read_text("utf-8"))
    if "attention_flags" not in config:
        raise ValueError(
            f"{folder} holds a model of type {config.get('model_type')!r}, none of this package: `push_folder` checks"
            " and sends Lambda models. Push it with its own `push_to_hub`, or save it from a Lambda class first."
        )
    for path in (path for path in paths if path.suffix == ".safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    kept |= {int(layer) for layer in _ATTENTION_KEY.findall(key)}
                    tensor = file.get_tensor(key)
                    if not torch.isfinite(tensor).all():
                        raise ValueError(f"{path} has NaN or infinite values in {key}. Push an earlier, finite model.")
                    if key.endswith("attention_lambda") and tensor != 1:
                        diluted[key] = tensor.item()
        except SafetensorError as error:
            raise ValueError(f"{path} is cut short or damaged ({error}). Save the model again.") from error
    flags = config["attention_flags"] or []
    if kept != {layer for layer, flag in enumerate(flags) if flag}:
        raise ValueError(
            f"{folder} mixes two models: its weights have attention in layers {sorted(kept)}, but the"
            f" `attention_flags` of config.json are {flags}. Save the model again."
        )
    if config.get("newly_initialized_head") and not force:
        raise ValueError(f"The class head of {folder} was saved before any training. Train it, or use `force=True`.")
    if diluted and not force:
        raise ValueError(
            f"{folder} is not finished, lambda is not 1 in layers that still have attention: {diluted}. Train on, or"
            " call `remove_attention` and save again; `force=True` pushes it as it is."
        )
    check_finite(load_as_saved(folder), f"The model in {folder}")
    return paths


def keep_back_private_files(folder: str | Path) -> None:
    """Add what a training run leaves for itself to a folder's `.gitignore`: the Hub keeps it out of any commit."""
    # https://github.com/huggingface/huggingface_hub/pull/1868
    path = Path(folder) / ".gitignore"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(dict.fromkeys([*lines, *_NOT_FOR_THE_HUB])) + "\n", "utf-8")


@contextmanager
def _time_limit(seconds: float):
    session = get_session()
    before, session.timeout = session.timeout, seconds
    try:
        yield
    finally:
        session.timeout = before


@contextmanager
def _conflicts_raised():
    # create_repo repeats a conflict without pause or end (`while True` in huggingface_hub 2.4): let it raise instead.
    def raise_conflict(response):
        if response.status_code == 409 and _CONFLICT in response.read().decode(errors="replace"):
            hf_raise_for_status(response)

    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {**hooks, "response": [*hooks["response"], raise_conflict]}
    try:
        yield
    finally:
        session.event_hooks = hooks


def _with_retries(what, call, *, go_on, max_attempts, first_wait, is_repeatable=True):
    for attempt in range(1, max_attempts + 1):
        try:
            return call()
        except (_HTTPError, OSError, RuntimeError, ValueError, KeyError) as error:
            # huggingface_hub wraps what happened to an upload in a RuntimeError that only names the file.
            reason = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            may_pass, is_lost, wait = _outlook(reason)
            wait = wait or min(first_wait * 2 ** (attempt - 1), 60.0)
            may_repeat = may_pass and reason is error and (is_repeatable or not is_lost)
            if not may_repeat or attempt == max_attempts or wait > _LONGEST_WAIT:
                parts = [f"Could not {what}, attempt {attempt} of {max_attempts}:"]
                parts += dict.fromkeys([_words(error), _words(reason)])
                parts += [f"The Hub asks to wait {wait:.0f} s."] if wait > _LONGEST_WAIT else []
                parts += [_LOST if is_repeatable else _LOST_PULL_REQUEST] if is_lost else []
                raise PushError(" ".join(" ".join(parts).split()) + f"\n{go_on}") from error
            logger.warning("Could not %s: %s. Attempt %d follows in %.1f s.", what, _words(error), attempt + 1, wait)
        time.sleep(wait)
    raise ValueError(f"`max_attempts` must be at least 1, got {max_attempts}.")


def _words(error: Exception) -> str:
    if isinstance(error, _NO_ANSWER):
        return "the answer has no content, or not what the Hub answers"
    return str(error) or type(error).__name__


def _outlook(error: Exception) -> tuple[bool, bool, int]:
    """May it go well later; may it have had its effect all the same; seconds that the Hub asks to wait."""
    if isinstance(error, _NO_ANSWER):
        return True, True, 0
    if not isinstance(error, _HTTPError):
        return False, False, 0
    response = getattr(error, "response", None)
    status, seconds = getattr(response, "status_code", None), getattr(response, "headers", {}).get("Retry-After", "")
    path = (error if response is None else response).request.url.path
    is_lost = status in (None, 500, 502, 503, 504)
    is_busy = status in (412, 429) or (status == 409 and _CONFLICT in str(error))
    is_retried_already = any(part in path for part in ("/preupload/", "/info/lfs/"))  # by huggingface_hub
    return (is_lost or is_busy) and not is_retried_already, is_lost, int(seconds) if seconds.isdigit() else 0
