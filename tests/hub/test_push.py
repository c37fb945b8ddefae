"""Pushes with the real huggingface_hub client to a local Hub.

The client reads its endpoint, and whether it is offline, when it is imported. So it runs in a process of its own:
one for all tests here, for an import takes seconds; it executes the code that a test sends.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lambda_vit_hf import LambdaViTForImageClassification
from lambda_vit_hf.hub.exported_folder import EXPORTED_FILES
from lambda_vit_hf.hub.push import push_folder
from lambda_vit_hf.models.checksums import write_checksums
from tests.hub_server import TOKEN, Fault, HubServer
from tests.models.test_remote_code import CODE


class Client:
    """A Python process that talks to the test Hub. Everything it ever writes is searched for the token."""

    def __init__(self, url: str, folder: Path, **environment: str):
        self.log = folder / "client.log"
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=client_environment(url, folder, **environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            cwd=ROOT,
        )

    def answer_to(self, code: str, **names) -> dict:
        watchdog = threading.Timer(60, self.process.kill)
        watchdog.start()
        try:
            self.process.stdin.write(json.dumps({"code": code, "names": names}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        finally:
            watchdog.cancel()
        assert line, f"the client died or took over 60 s:\n{self.log.read_text()[-3000:]}"
        assert TOKEN not in line, "the token was printed, or stands in a traceback"
        return json.loads(line)

    def run(self, code: str, **names):
        """What `code` leaves in `result`."""
        answer = self.answer_to(code, **names)
        assert answer["error"] is None, answer["traceback"]
        return answer["result"]

    def fail(self, error: str, code: str, **names) -> str:
        """The message of the error that `code` must raise."""
        answer = self.answer_to(code, **names)
        assert answer["error"] == error, f"expected {error}, got {answer['traceback'] or answer['result']}"
        return answer["message"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        assert TOKEN not in self.log.read_text(), "the token stands in the logs"


ROOT = Path(__file__).parents[2]
PUSH = "result = vars(push_folder(folder, repo_id, first_wait=0.01, **options))"
PRIVATE_FILES = ("optimizer.pt", "training_args.bin", ".env", "trainer_state.json", "notes.txt")
REMOTE_CODE = set(CODE)
WORKER = """
import contextlib, gc, io, json, os, sys, traceback

answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    command, printed = json.loads(line), io.StringIO()
    names = command["names"]
    answer = {"error": None, "result": None, "message": "", "traceback": ""}
    try:
        with contextlib.redirect_stdout(printed):
            exec("import torch, transformers, lambda_vit_hf; from lambda_vit_hf.hub.push import push_folder", names)
            gc.freeze()  # see conftest.py
            exec(command["code"], names)
        answer["result"] = names.get("result", printed.getvalue())
    except BaseException as error:
        answer |= {"error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
    print(json.dumps(answer), file=answers, flush=True)
"""
SAVE_A_FINISHED_MODEL = """
torch.manual_seed(0)
config = lambda_vit_hf.LambdaViTConfig(
    image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
    num_labels=5,
)
model = lambda_vit_hf.LambdaViTForImageClassification(config)
if diluted:
    model.set_attention_lambda(0.5, [0])
    model.set_attention_lambda(0.0, [1])
else:
    model.remove_attention([1])
    model.fold_removed_attention()
model.save_pretrained(folder)
transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
"""
LOGITS = """
pixel_values = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
def logits(name):
    model = transformers.AutoModelForImageClassification.from_pretrained(name).eval()
    with torch.no_grad():
        return model(pixel_values).logits
"""


def client_environment(url: str, folder: Path, **changes: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    settings = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {
        **environment,
        **settings,
        "HF_HOME": str(folder / "hf_home"),
        "HF_TOKEN": TOKEN,
        "PYTHONPATH": str(ROOT),
    } | changes


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def running_hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(running_hub, tmp_path_factory):
    client = Client(running_hub.url, tmp_path_factory.mktemp("client"))
    yield client
    client.close()


@pytest.fixture
def hub(running_hub):
    """The Hub, empty and without faults."""
    running_hub.repos.clear()
    running_hub.faults.clear()
    running_hub.requests.clear()
    return running_hub


@pytest.fixture(scope="module")
def saved_model(client, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    client.run(SAVE_A_FINISHED_MODEL, folder=str(folder), diluted=False)
    for name in PRIVATE_FILES:
        (folder / name).write_text("HF_TOKEN=not for others")
    (folder / "checkpoint-3").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "checkpoint-3")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A tiny model\n")
    (folder / "entropy.png").write_bytes(b"\x89PNG" + bytes(600))
    (folder / "metrics.json").write_text("{}")
    return folder


@pytest.fixture
def folder(saved_model, tmp_path):
    """A finished model's folder, with what a training run leaves beside it."""
    return shutil.copytree(saved_model, tmp_path / "outputs")


def push(client, folder, repo_id="tester/tiny", **options):
    return client.run(PUSH, folder=str(folder), repo_id=repo_id, options=options)


def push_fails(client, folder, error="PushError", repo_id="tester/tiny", **options):
    before = contents(folder)
    message = client.fail(error, PUSH, folder=str(folder), repo_id=repo_id, options=options)
    assert contents(folder) == before, "a failed push changed the local folder"
    return message


def commits(hub, repo_id="tester/tiny", branch="main") -> list[str]:
    """Commits made by pushes, oldest first."""
    return [commit.summary for commit in hub.repos[repo_id].branches[branch][1:]]


def test_a_pushed_model_answers_as_the_local_one_to_the_bit(client, hub, folder):
    push(client, folder)
    code = (
        LOGITS
        + """
image = __import__("PIL.Image").Image.effect_noise((20, 24), 90).convert("RGB")
answers = [transformers.pipeline("image-classification", model=name)(image) for name in (folder, "tester/tiny")]
model = transformers.AutoModelForImageClassification.from_pretrained("tester/tiny")
result = [torch.equal(logits(folder), logits("tester/tiny")), answers[0] == answers[1], len(answers[0]),
          type(model).__name__, model.config.removed_layers, model.config.fold_removed]
"""
    )
    assert client.run(code, folder=str(folder)) == [True, True, 5, "LambdaViTForImageClassification", [1], True]


def test_push_to_hub_of_the_model_gives_the_same_logits(client, hub, folder):
    code = (
        LOGITS
        + """
model = lambda_vit_hf.LambdaViTForImageClassification.from_pretrained(folder)
model.push_to_hub("tester/by-model")
result = torch.equal(logits(folder), logits("tester/by-model"))
"""
    )
    assert client.run(code, folder=str(folder)) is True
    expected = {".gitattributes", "README.md", "config.json", "model.safetensors"} | REMOTE_CODE
    assert set(hub.repos["tester/by-model"].files()) == expected


def test_only_files_meant_for_others_arrive(client, hub, folder):
    result = push(client, folder, commit_message="Six layers")
    expected = {
        "README.md",
        "config.json",
        "entropy.png",
        "metrics.json",
        "model.safetensors",
        "preprocessor_config.json",
        *REMOTE_CODE,
    }
    assert set(hub.repos["tester/tiny"].files()) - {".gitattributes"} == expected
    for name in expected:
        assert hub.repos["tester/tiny"].files()[name] == (folder / name).read_bytes()
    assert result["files"] == {name: (folder / name).stat().st_size for name in expected}
    assert commits(hub) == ["Six layers"]
    assert result["commit_url"] == f"{hub.url}/tester/tiny/commit/{hub.repos['tester/tiny'].find('main').oid}"


def test_an_export_arrives_under_its_paths(client, hub, tmp_path):
    for name in (*EXPORTED_FILES, "onnx/model.pt", "optimizer.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path)
    push(client, tmp_path)
    files = hub.repos["tester/tiny"].files()
    assert {name: files[name] for name in files if name != ".gitattributes"} == {
        name: (tmp_path / name).read_bytes() for name in EXPORTED_FILES
    }


def test_a_snapshot_of_the_repository_holds_the_pushed_bytes(client, hub, folder):
    push(client, folder)
    code = 'import huggingface_hub; result = huggingface_hub.snapshot_download("tester/tiny")'
    snapshot = Path(client.run(code))
    for name in ("config.json", "model.safetensors"):
        assert (snapshot / name).read_bytes() == (folder / name).read_bytes()
    client.run('import huggingface_hub; huggingface_hub.delete_repo("tester/tiny")')
    assert hub.repos == {}


def test_a_dry_run_lists_the_files_and_sends_nothing(client, hub, folder):
    assert push(client, folder, dry_run=True)["files"]["model.safetensors"] > 10_000
    code = 'from lambda_vit_hf.cli.push import main; main([folder, "tester/tiny", "--dry_run"])'
    printed = client.run(code, folder=str(folder))
    assert "model.safetensors" in printed
    assert "nothing was sent" in printed
    assert "optimizer" not in printed
    assert hub.requests == []


def test_the_script_pushes_and_prints_the_commit(client, hub, folder):
    code = 'from lambda_vit_hf.cli.push import main; main([folder, "tiny", "--private"])'
    printed = client.run(code, folder=str(folder))
    assert printed.splitlines()[-1] == f"{hub.url}/tester/tiny/commit/{hub.repos['tester/tiny'].find('main').oid}"
    assert hub.repos["tester/tiny"].private


def test_pushing_twice_makes_no_second_commit(client, hub, folder):
    first, second = push(client, folder), push(client, folder)
    assert first["commit_url"] == second["commit_url"]
    assert len(commits(hub)) == 1
    assert hub.count("PUT", "") == 2
    (folder / "metrics.json").write_text('{"top1": 0.9}')
    push(client, folder)
    assert len(commits(hub)) == 2
    assert hub.count("PUT", "") == 2, "an unchanged large file was sent again"


def test_a_revision_becomes_a_branch(client, hub, folder):
    for _ in range(2):
        push(client, folder, revision="removed-1")
    assert len(commits(hub, branch="removed-1")) == 1
    assert commits(hub) == []


def test_a_pull_request_is_opened_once_even_if_the_connection_breaks(client, hub, folder):
    result = push(client, folder, create_pr=True)
    assert result["pull_request_url"] == f"{hub.url}/tester/tiny/discussions/1"
    assert commits(hub) == []
    hub.faults.append(Fault("POST", "/commit/", after_commit=True))
    message = push_fails(client, folder, create_pr=True)
    assert sum(name.startswith("refs/pr/") for name in hub.repos["tester/tiny"].branches) == 2
    assert "pull requests first" in message


@pytest.mark.parametrize("repo_id", ["../x", "a/b/c", "with space", "x.git", "a/b--c", "a\nb", "ü", "x" * 97])
def test_an_invalid_repo_id_is_refused_before_any_request(client, hub, folder, repo_id):
    push_fails(client, folder, "HFValidationError", repo_id)
    assert hub.requests == []


def test_a_bad_token_fails_before_anything_is_created(client, hub, folder):
    message = push_fails(client, folder, token="hf_wrong")
    assert "Invalid user token" in message
    assert "hf_wrong" not in message
    assert hub.requests == [("GET", "/api/whoami-v2")]
    assert hub.repos == {}


def test_a_token_that_may_only_read_fails_before_anything_is_created(client, hub, folder):
    hub.tokens["hf_reader"] = {"name": "reader", "role": "read"}
    message = push_fails(client, folder, token="hf_reader")
    assert "may only read" in message
    assert "hf_reader" not in message
    assert hub.requests == [("GET", "/api/whoami-v2")]


@pytest.mark.parametrize("status", [401, 403, 409])
def test_a_refused_commit_is_reported_once_and_not_tried_again(client, hub, folder, status):
    hub.faults.append(Fault("POST", "/commit/", status=status, message="no, never", times=9))
    message = push_fails(client, folder)
    assert hub.count("POST", "/commit/") == 1
    assert str(status) in message
    assert "no, never" in message
    assert "commit to tester/tiny as tester" in message
    assert commits(hub) == []


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 409, "message": "Cannot commit: another conflicting operation is in progress"},
        {"status": 412, "message": "A commit has happened since. Please refresh and try again."},
        {"status": 429},
        {"status": 500},
        {"status": 502},
        {"status": 503},
        {"status": 504},
        {"cut": True},
        {"after_commit": True},
        {"empty": True},
    ],
    ids=[
        "409 conflict",
        "412",
        "429",
        "500",
        "502",
        "503",
        "504",
        "connection cut",
        "connection dropped after the commit",
        "an answer without a body",
    ],
)
def test_a_passing_fault_of_the_commit_ends_in_exactly_one_commit(client, hub, folder, fault):
    hub.faults.append(Fault("POST", "/commit/", times=1 if {"after_commit", "empty"} & set(fault) else 2, **fault))
    result = push(client, folder)
    assert hub.faults[0].times == 0
    assert len(commits(hub)) == 1
    assert result["commit_url"].endswith(hub.repos["tester/tiny"].find("main").oid)
    assert hub.repos["tester/tiny"].files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_retry_after_is_honoured(client, hub, folder):
    hub.faults.append(Fault("POST", "/commit/", status=429, headers={"Retry-After": "1"}))
    start = time.monotonic()
    push(client, folder)
    assert time.monotonic() - start >= 1.0
    assert len(commits(hub)) == 1


def test_a_wait_of_hours_is_reported_instead_of_slept(client, hub, folder):
    hub.faults.append(Fault("POST", "/commit/", status=429, headers={"Retry-After": "7200"}))
    assert "7200" in push_fails(client, folder)
    assert hub.count("POST", "/commit/") == 1


def test_attempts_are_bounded_and_the_call_in_the_message_goes_on(client, hub, folder):
    hub.faults.append(Fault("POST", "/commit/", status=503, times=3))
    message = push_fails(client, folder, max_attempts=3, commit_message="It's done", private=True)
    assert hub.count("POST", "/commit/") == 3
    assert commits(hub) == []
    call = re.search(r"To go on: (.*)", message)[1]
    client.run(f"import lambda_vit_hf.hub.push\n{call}")
    assert commits(hub) == ["It's done"]
    assert hub.repos["tester/tiny"].private


@pytest.mark.parametrize("fault", [{"empty": True}, {"status": 200}], ids=["no body", "a proxy's body"])
def test_an_answer_that_is_none_is_a_clear_error_in_the_end(client, hub, folder, fault):
    hub.faults.append(Fault("POST", "/commit/", times=9, **fault))
    message = push_fails(client, folder, max_attempts=1)
    assert "the answer has no content, or not what the Hub answers" in message
    assert "nothing is committed twice" in message


def test_a_hub_that_hangs_is_given_up_by_the_stated_limit(client, hub, folder):
    hub.faults.append(Fault("POST", "/commit/", hang=5.0, times=2))
    message = push_fails(client, folder, max_attempts=2, timeout=0.2)
    assert "attempt 2 of 2" in message and "timed out" in message.lower()
    hub.faults.clear()
    push(client, folder)
    assert len(commits(hub)) == 1


def test_a_model_that_answers_in_no_numbers_is_not_pushed(client, hub, folder):
    weights = load_file(folder / "model.safetensors")
    weights["vit.layers.1.mlp.fc1.weight"][:] = 3e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = push_fails(client, folder, error="FloatingPointError", force=True)
    assert "gives NaN or infinity for an image" in message
    assert hub.requests == []


def test_a_damaged_folder_is_not_pushed(client, hub, folder):
    write_checksums(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    message = push_fails(client, folder, error="OSError")
    assert "model.safetensors: not the content that SHA256SUMS lists" in message
    assert hub.requests == []


def test_a_busy_hub_does_not_keep_the_creation_of_a_repository_for_ever(client, hub, folder):
    conflict = "Cannot create repo: another conflicting operation is in progress"
    hub.faults.append(Fault("POST", "/repos/create", status=409, message=conflict, times=1000))
    push_fails(client, folder, max_attempts=3)
    assert hub.count("POST", "/repos/create") == 3
    hub.faults[0].times = 2
    push(client, folder)
    assert len(commits(hub)) == 1


def test_an_upload_cut_in_the_middle_goes_on(client, hub, folder):
    hub.faults.append(Fault("PUT", "/lfs/", cut=True))
    push(client, folder)
    assert hub.faults[0].times == 0
    assert len(commits(hub)) == 1
    assert hub.repos["tester/tiny"].files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_hub_that_cannot_be_reached_is_reported_after_bounded_attempts(client, hub, folder):
    hub.faults.append(Fault("GET", "/whoami", cut=True, times=9))
    assert "attempt 2 of 2" in push_fails(client, folder, max_attempts=2)
    assert hub.requests == [("GET", "/api/whoami-v2")] * 2


def test_a_refused_upload_leaves_the_repository_as_it_was_and_a_second_push_completes_it(client, hub, folder):
    hub.faults.append(Fault("PUT", "/lfs/", status=403))
    message = push_fails(client, folder)
    assert "403" in message
    assert re.search("uploading '(model.safetensors|entropy.png)'", message)
    assert commits(hub) == []
    assert hub.count("POST", "/commit/") == 0
    push(client, folder)
    assert len(commits(hub)) == 1


def test_an_unfinished_model_is_refused_before_any_request_unless_forced(client, hub, tmp_path):
    client.run(SAVE_A_FINISHED_MODEL, folder=str(tmp_path), diluted=True)
    message = push_fails(client, tmp_path, "ValueError")
    assert "'vit.layers.0.attention_lambda': 0.5" in message
    assert "'vit.layers.1.attention_lambda': 0.0" in message
    assert hub.requests == []
    push(client, tmp_path, force=True)
    assert len(commits(hub)) == 1


def test_a_head_that_was_never_trained_is_refused_unless_forced(vit_folder, tmp_path):
    model = LambdaViTForImageClassification.from_pretrained(vit_folder, num_labels=3, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="saved before any training"):
        push_folder(tmp_path / "new", "tester/tiny", dry_run=True)
    assert push_folder(tmp_path / "new", "tester/tiny", dry_run=True, force=True).files


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_even_if_forced(client, hub, folder, value):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][2] = torch.tensor(value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "classifier.bias" in push_fails(client, folder, "ValueError", force=True)
    assert hub.requests == []


def test_a_folder_without_a_whole_model_is_refused_before_any_request(client, hub, folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "cut short" in push_fails(client, folder, "ValueError")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert "no whole model" in push_fails(client, folder, "ValueError")
    shards = {"metadata": {}, "weight_map": {str(n): f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    assert "model-00002-of-00002.safetensors" in push_fails(client, folder, "ValueError")
    (folder / "config.json").unlink()
    assert "config.json" in push_fails(client, folder, "ValueError")
    assert "no whole model" in push_fails(client, folder / "nowhere", "ValueError")
    assert hub.requests == []


@pytest.mark.parametrize("flags", [[True, True, True], [False, False, True], [True, True, False]])
def test_weights_that_do_not_fit_the_config_are_refused_even_if_forced(client, hub, folder, flags):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_flags": flags}))
    message = push_fails(client, folder, "ValueError", force=True)
    assert "attention in layers [0, 2]" in message and str(flags) in message
    assert hub.requests == []


def test_a_plain_vit_is_named_before_any_request(client, hub, tmp_path):
    code = """
shape = dict(image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
transformers.ViTForImageClassification(transformers.ViTConfig(**shape)).save_pretrained(folder)
"""
    client.run(code, folder=str(tmp_path / "vit"))
    assert "holds a model of type 'vit', none of this package" in push_fails(client, tmp_path / "vit", "ValueError")
    assert hub.requests == []


def test_whatever_uploads_the_folder_private_files_stay_behind(client, hub, folder):
    (folder / ".gitignore").write_text("notes.txt")
    for name in ("base/model.safetensors", "runs/events.out"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(b"x" * 1000)
    code = """
from lambda_vit_hf.hub.push import keep_back_private_files
keep_back_private_files(folder)
keep_back_private_files(folder)
from huggingface_hub import HfApi
HfApi().create_repo("tester/tiny")
HfApi().upload_folder(repo_id="tester/tiny", folder_path=folder, ignore_patterns=["checkpoint-*"])
"""
    client.run(code, folder=str(folder))
    arrived = set(hub.repos["tester/tiny"].files())
    assert not arrived & {"optimizer.pt", "training_args.bin", ".env", "notes.txt"}
    assert not [name for name in arrived if "/" in name]
    assert {"config.json", "model.safetensors", "README.md"} <= arrived
    lines = (folder / ".gitignore").read_text().splitlines()
    assert lines[0] == "notes.txt" and len(lines) == len(set(lines))


def test_offline_the_script_says_so_and_how_to_go_on(hub, folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "trainer_scripts/push_to_hub.py", str(folder), "tester/tiny", "--revision", "v1"],
        env=client_environment(hub.url, tmp_path, HF_HUB_OFFLINE="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "unset HF_HUB_OFFLINE" in done.stderr
    assert "Traceback" not in done.stderr
    assert f"lambda-vit push {folder} tester/tiny --revision v1" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert hub.requests == []
