"""The golden round trip: train, push, forget everything local, and load from the Hub what was trained.

Each step runs in a process of its own, as it would on another machine; the Hub is a local one.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.hub.test_push import REMOTE_CODE, Client, client_environment
from tests.hub_server import TOKEN, HubServer


# Loads a model from the Hub, without the package and with it: in two processes, each with an empty cache, forked from
# one that has imported what both need. `argv`: repo id, images.
ASK = """
import gc, json, os, shutil, sys
import PIL.Image
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lambda_vit_hf":
            raise ModuleNotFoundError(name)

def ask(kind, repo_id, paths):
    if kind == "hidden":
        sys.meta_path.insert(0, Hidden())
    else:
        import lambda_vit_hf
    images = [PIL.Image.open(path).convert("RGB") for path in paths]
    options = {"trust_remote_code": True} if kind == "hidden" else {}
    model = AutoModelForImageClassification.from_pretrained(repo_id, **options).eval()
    with torch.no_grad():
        logits = model(**AutoImageProcessor.from_pretrained(repo_id)(images, return_tensors="pt")).logits
    answers = pipeline("image-classification", model=repo_id, **options)(images)
    print(json.dumps({
        "kind": kind, "logits": logits.tolist(), "labels": [[entry["label"] for entry in one] for one in answers],
        "class": f"{type(model).__module__}.{type(model).__name__}", "package": "lambda_vit_hf" in sys.modules,
    }), flush=True)

gc.freeze()
for kind in ("hidden", "package"):
    shutil.rmtree(HF_HUB_CACHE, ignore_errors=True)
    child = os.fork()
    if not child:
        ask(kind, sys.argv[1], sys.argv[2:])
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(1)
"""
TRAIN = """
import contextlib, sys
from pathlib import Path
from huggingface_hub import ModelCard
from lambda_vit_hf.data.folders import load_digits
from tests.end_to_end.test_training import run

output_dir = Path(folder) / "digits"
metrics = run(output_dir, "--hub_model_id", "tester/golden")
images = load_digits()["validation"]["image"][:8]
for index, image in enumerate(images):
    image.save(f"{folder}/{index}.png")
images = [image.convert("RGB") for image in images]
model = lambda_vit_hf.LambdaViTForImageClassification.from_pretrained(output_dir).eval()
processor = transformers.AutoImageProcessor.from_pretrained(output_dir)
with torch.no_grad():
    logits = model(**processor(images, return_tensors="pt")).logits
answers = transformers.pipeline("image-classification", model=str(output_dir))(images)
ModelCard.load(output_dir / "README.md").validate()
push_folder(output_dir, "tester/golden")
labels = [[entry["label"] for entry in answer] for answer in answers]
result = {"metrics": metrics, "logits": logits.tolist(), "labels": labels}
"""
# Ends with a trainer that is ready; `Waits` lets each upload end before training goes on.
TRAINER = """
from pathlib import Path
from tests.conftest import TINY
from tests.small_training import make_trainer
from tests.small_training import StopAt

torch.manual_seed(0)
folder = Path(folder)
if base:
    lambda_vit_hf.LambdaViTForImageClassification(lambda_vit_hf.LambdaViTConfig(**TINY)).push_to_hub(base)
    model = lambda_vit_hf.LambdaViTForImageClassification.from_pretrained(base)
else:
    model = lambda_vit_hf.LambdaViTForImageClassification(lambda_vit_hf.LambdaViTConfig(**TINY))

class Waits(transformers.TrainerCallback):
    def on_save(self, *args, **kwargs):
        trainer._finish_current_push()

removal = lambda_vit_hf.EntropyGuidedRemovalCallback(num_removed_layers=2)
kind = transformers.Trainer if plain else lambda_vit_hf.LambdaViTTrainer
callbacks = [removal, Waits(), *([StopAt(stop)] if stop else [])]
trainer = make_trainer(model, folder, callbacks, kind=kind, **arguments)
for name in ("base/model.safetensors", "runs/events.out.tfevents", "optimizer.pt", ".env"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"private" * 100)
"""


def metadata_of(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    client = Client(hub.url, tmp_path_factory.mktemp("trainer"))
    yield client
    client.close()


@pytest.fixture(scope="module")
def golden(client, tmp_path_factory):
    """What the trained model answered; its files exist on the Hub only."""
    folder = tmp_path_factory.mktemp("golden")
    told = client.run(TRAIN, folder=str(folder))
    shutil.rmtree(folder / "digits")
    return {**told, "images": sorted(map(str, folder.glob("*.png")))}


@pytest.fixture(scope="module")
def told(hub, golden, tmp_path_factory):
    """What the model on the Hub answers, by kind of process."""
    folder = tmp_path_factory.mktemp("asked")
    command = [sys.executable, "-c", ASK, "tester/golden", *golden["images"]]
    environment = client_environment(hub.url, folder)
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return {answer["kind"]: answer for answer in map(json.loads, done.stdout.splitlines()[-2:])}


@pytest.mark.parametrize("kind", ["package", "hidden"])
def test_what_is_loaded_from_the_hub_answers_as_what_was_trained(told, golden, kind):
    answer = told[kind]
    assert answer["logits"] == golden["logits"], "not the same to the bit"
    assert answer["labels"] == golden["labels"]
    assert answer["package"] == (kind == "package")
    module = "lambda_vit_hf." if kind == "package" else "transformers_modules.tester.golden."
    assert answer["class"].startswith(module)


def test_the_card_on_the_hub_has_the_numbers_of_metrics_json(hub, golden):
    files = hub.repos["tester/golden"].files()
    metrics = json.loads(files["metrics.json"])
    assert metrics == golden["metrics"]
    card = files["README.md"].decode()
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.*) \|$", card, re.MULTILINE))
    before, after = metrics["before"], metrics["after"]
    assert rows["top-1"] == f"{100 * before['top1']:.2f} % | {100 * after['top1']:.2f} %"
    assert rows["parameters"] == f"{before['parameters']:,} | {after['parameters']:,}"
    assert float(rows["accuracy"]) == pytest.approx(after["top1"], abs=5e-5)
    metadata = metadata_of(card)
    (result,) = metadata["model-index"][0]["results"]
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [("accuracy", after["top1"])]
    assert (result["dataset"]["name"], result["dataset"]["split"]) == ("digits", "validation")
    assert 'model="tester/golden"' in card
    assert rows["lambda schedule"].startswith("linear, 0 from step ")
    assert after["file_bytes"] == len(files["model.safetensors"])
    assert f"layers {metrics['layers']} (0-based)" in card


def push_from_trainer(client, folder, extra: str, base=None, plain=False, **arguments):
    names = dict(folder=str(folder), base=base, stop=None, plain=plain, arguments=arguments)
    return client.run(TRAINER + extra, **names)


def test_the_trainer_pushes_our_card_and_no_private_file(client, hub, tmp_path):
    extra = """
from lambda_vit_hf.hub.facts import model_size
trainer.train()
accuracy = trainer.evaluate()["eval_accuracy"]
trainer.push_to_hub(license="mit", dataset="blobs", tags="tiny")
result = [accuracy, removal.selection.layers, model_size(model)["parameters"]]
"""
    accuracy, layers, parameters = push_from_trainer(client, tmp_path / "blobs-run", extra, base="tester/base")
    assert (tmp_path / "blobs-run" / "training_args.bin").is_file(), "there is nothing to keep back"
    files = hub.repos["tester/blobs-run"].files()
    model_files = {"config.json", "model.safetensors"} | REMOTE_CODE
    assert set(files) == {".gitattributes", "README.md", "entropy.png"} | model_files
    card = files["README.md"].decode()
    metadata = metadata_of(card)
    assert (metadata["license"], metadata["datasets"], metadata["base_model"]) == ("mit", ["blobs"], "tester/base")
    assert metadata["base_model_relation"] == "finetune"
    assert "tiny" in metadata["tags"] and "generated_from_trainer" not in metadata["tags"]
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == accuracy
    assert "split" not in result["dataset"], "which split was evaluated is not known"
    assert f"Removed: the attention of layers {layers}" in card
    assert f" {parameters:,} |" in card
    assert 'model="tester/blobs-run"' in card
    assert "had access to" not in card
    assert json.loads(files["config.json"])["attention_flags"].count(False) == len(layers)


def test_the_plain_trainer_keeps_private_files_back_and_says_whose_card_it_pushes(client, hub, tmp_path):
    extra = """
trainer.train()
trainer.evaluate()
trainer.push_to_hub()
"""
    push_from_trainer(client, tmp_path / "plain", extra, plain=True)
    files = hub.repos["tester/plain"].files()
    private = ("training_args", "base/", "runs/", ".env", "optimizer")
    assert not [name for name in files if name.startswith(private)]
    assert "Use LambdaViTTrainer" in client.log.read_text()


def test_the_plain_trainer_pushes_no_figures_of_other_weights(client, hub, tmp_path):
    extra = """
trainer.train()
history = trainer.state.log_history
trainer.state.log_history = [entry for entry in history if "eval_loss" not in entry or entry["step"] < 12]
trainer.push_to_hub()
"""
    names = dict(folder=str(tmp_path / "wrong"), base=None, stop=None, plain=True)
    arguments = dict(eval_strategy="steps", eval_steps=5)
    message = client.fail("ValueError", TRAINER + extra, **names, arguments=arguments)
    assert "not of the final weights" in message and "trainer.evaluate()" in message
    assert "tester/wrong" not in hub.repos


def test_the_hubs_token_is_in_no_file(client, hub, tmp_path):
    extra = """
trainer.train()
trainer.push_to_hub()
"""
    settings = dict(push_to_hub=True, hub_token=TOKEN, hub_strategy="all_checkpoints", save_strategy="steps")
    push_from_trainer(client, tmp_path / "secret", extra, save_steps=5, **settings)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"training_args.bin", "trainer_state.json"} <= {path.name for path in written}
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    commits = hub.repos["tester/secret"].branches["main"]
    assert [name for commit in commits for name, blob in commit.files.items() if TOKEN.encode() in blob.data] == []
    assert "checkpoint-10/optimizer.pt" in hub.repos["tester/secret"].files()


def test_a_users_card_survives_the_push_of_the_trainer(client, hub, tmp_path):
    extra = """
(folder / "README.md").write_text("---\\nlicense: cc0-1.0\\n---\\n# My words\\n")
trainer.train()
trainer.push_to_hub()
trainer.push_to_hub()
"""
    push_from_trainer(client, tmp_path / "mine", extra)
    card = hub.repos["tester/mine"].files()["README.md"].decode()
    assert card.startswith("---\nlicense: cc0-1.0\n")
    assert "\n---\n# My words\n" in card
    assert card.count("lambda-vit-hf:begin -->") == 1
    metadata = metadata_of(card)
    assert not {"base_model", "datasets", "model-index"} & set(metadata), "the card says what nobody knows"


def test_a_report_written_before_stays_on_the_card_that_the_trainer_pushes(client, hub, tmp_path):
    extra = """
import copy
from lambda_vit_hf.training.reporting import write_report
before = copy.deepcopy(model)
trainer.train()
trainer.save_model()
write_report(trainer, before, removal, {"top1": 0.5}, {"top1": 0.25}, "blobs")
trainer.push_to_hub()
"""
    push_from_trainer(client, tmp_path / "reported", extra)
    files = hub.repos["tester/reported"].files()
    card = files["README.md"].decode()
    assert "| top-1 | 50.00 % | 25.00 % |" in card and "images/s" in card
    assert metadata_of(card)["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.25
    assert {"metrics.json", "selection.json", "training.png"} <= set(files)


def test_a_half_diluted_model_is_not_pushed(client, hub, tmp_path):
    extra = """
try:
    trainer.train()
except RuntimeError:
    trainer.push_to_hub()
"""
    names = dict(folder=str(tmp_path / "half"), base=None, stop=5, plain=False, arguments={})
    asked = len(hub.requests)
    message = client.fail("ValueError", TRAINER + extra, **names)
    assert "lambda is not 1" in message and "0.5" in message
    assert len(hub.requests) == asked
    assert "tester/half" not in hub.repos


def test_backups_during_training_say_that_they_are_not_finished(client, hub, tmp_path):
    extra = """
trainer.train()
trainer.push_to_hub()
"""
    settings = dict(push_to_hub=True, hub_strategy="every_save", save_strategy="steps", save_steps=5)
    push_from_trainer(client, tmp_path / "backups", extra, **settings)
    commits = {commit.summary: commit.files for commit in hub.repos["tester/backups"].branches["main"]}
    for step in (5, 10):
        files = commits[f"Training in progress, step {step}"]
        card = files["README.md"].data.decode()
        assert "**Not finished**" in card and f"step {step} of 12" in card
        assert "training-in-progress" in metadata_of(card)["tags"]
        assert not [name for name in files if "training_args" in name or name.startswith(("base/", "runs/"))]
    final = commits["End of training"]
    assert "Not finished" not in final["README.md"].data.decode()
    assert "training_args.bin" not in final
