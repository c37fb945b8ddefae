"""The model card: metadata that the Hub reads, measured facts, and names that stay where they belong."""

import ast
import dataclasses
import html
import re
from types import SimpleNamespace

import markdown  # comes with tensorboard
import pytest
import yaml
from huggingface_hub import ModelCard

from lambda_vit_hf.hub.card_sections import BEGIN, END
from lambda_vit_hf.hub.facts import ModelCardFacts, final_evaluation, hub_base_model
from lambda_vit_hf.hub.model_card import card_metadata, markdown_table, write_model_card
from lambda_vit_hf.selection.config import SelectionConfig
from lambda_vit_hf.selection.output_change import OutputChange
from lambda_vit_hf.selection.select import AttentionSelection, SelectionStep
from tests.hub_server import metadata_errors


@pytest.fixture
def selection():
    return AttentionSelection(
        order=[2, 0],
        config=SelectionConfig(output="class_head"),
        num_images=48,
        output_entropy=3.0,
        attention_entropy=[1.0, 2.0, 3.0],
        mlp_entropy=[4.0, 5.0, 6.0],
        steps=[SelectionStep([], {0: 0.5, 1: 0.6, 2: -0.125}, 2), SelectionStep([2], {0: 0.25, 1: 0.75}, 0)],
    )


@pytest.fixture
def facts(selection):
    """Everything is known; `facts(name=...)` changes some of it."""
    known = {
        "name": "lambda-vit-tiny",
        "rows": {"top-1": ("81.80 %", "81.23 %"), "parameters": ("86,567,656", "74,748,136")},
        "selection": selection,
        "training": {"epochs": "30", "hardware": "a test machine"},
        "dataset": "digits",
        "split": "validation",
        "accuracy": 0.8123,
        "measured_on": "a test machine, float32",
        "base_model": "facebook/deit-base-patch16-224",
        "license": "apache-2.0",
        "pictures": {"entropy": "entropy.png", "training": "training.png"},
    }
    return lambda **changes: ModelCardFacts(**{**known, **changes})


HOSTILE = {
    "pipe": "a|b",
    "newline": "a\nb",
    "heading": "a\n\n# Not my heading",
    "end of the metadata": "a\n---\nlicense: other\n---\n",
    "template": "{{ 7 * 7 }}{% raw %}",
    "quotes": "a\"b'c",
    "YAML": "a: [b, !!python/name:os.system",
    "HTML": "<img src=x onerror=alert(1)>&amp;",
    "a link": "[look](https://evil.example) ![](https://evil.example/pixel.png) <https://evil.example>",
    "code": "`a` ``b``",
}
NAMES = pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)


def parts(folder, facts) -> tuple[dict, str]:
    """Metadata, as a YAML reader of its own sees it, and text of a card written into `folder`."""
    path = write_model_card(folder, facts)
    assert path == folder / "README.md"
    text = path.read_text(encoding="utf-8")
    # As huggingface_hub looks for it: up to the first line of three dashes.
    block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert block, f"no metadata at the beginning of {text[:200]!r}"
    return yaml.safe_load(block[1]), text[block.end() :]


def headings(text: str) -> list[str]:
    outside_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"^#+ .*$", outside_code, re.MULTILINE)


def table_cells(text: str) -> list[list[str]]:
    """Cells of every table row of the text, split where Markdown splits them."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_the_metadata_says_what_the_hub_asks_for(facts, tmp_path):
    metadata, _ = parts(tmp_path, facts())
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "image-classification"
    assert metadata["license"] == "apache-2.0"
    assert metadata["datasets"] == ["digits"]
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("facebook/deit-base-patch16-224", "finetune")
    assert "lambda-vit" in metadata["tags"]


def test_the_model_index_has_the_accuracy_given(facts, tmp_path):
    metadata, _ = parts(tmp_path, facts())
    (entry,) = metadata["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "lambda-vit-tiny"
    assert result["task"]["type"] == "image-classification"
    assert (result["dataset"]["name"], result["dataset"]["split"]) == ("digits", "validation")
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [("accuracy", 0.8123)]


def test_huggingface_hub_reads_the_card_back(facts, tmp_path):
    card = ModelCard.load(write_model_card(tmp_path, facts()))
    assert card.data.to_dict() == card_metadata(facts()).to_dict()
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.8123, "digits")


def test_the_text_has_every_fact(facts, tmp_path):
    _, text = parts(tmp_path, facts())
    cells = table_cells(text)
    assert ["top-1", "81.80 %", "81.23 %"] in cells and ["parameters", "86,567,656", "74,748,136"] in cells
    assert ["epochs", "30"] in cells and ["hardware", "a test machine"] in cells
    assert "Measured on a test machine, float32." in text
    assert "(entropy.png)" in text and "(training.png)" in text
    assert headings(text)[0] == "# lambda-vit-tiny"


def test_the_text_tells_the_search_in_the_order_picked(facts, tmp_path):
    _, text = parts(tmp_path, facts())
    assert "layers [0, 2] (0-based) of 3" in text
    assert "`nose` on 48 images" in text
    assert "2 (-0.125), 0 (+0.250)" in text


def test_the_usage_example_loads_this_model(facts, tmp_path):
    _, text = parts(tmp_path, facts(name="me/lambda-vit"))
    assert pipeline_model(text) == "me/lambda-vit"


def pipeline_model(text: str):
    """The `model` argument of the card's first Python example, read by Python."""
    call = ast.parse(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]).body[1].value
    return next(ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "model")


def test_unknown_facts_are_absent(tmp_path):
    bare = ModelCardFacts("x", {}, AttentionSelection([1]))
    metadata, text = parts(tmp_path, bare)
    assert set(metadata) <= {"library_name", "pipeline_tag", "tags", "model_name"}
    for invented in ("None", "Measured on", "![", "nats", "images:", "undefined"):
        assert invented not in text, f"{invented!r} is on a card that knows nothing of it"


@pytest.mark.parametrize("unknown", ["accuracy", "dataset"])
def test_a_result_needs_an_accuracy_and_a_dataset(facts, tmp_path, unknown):
    metadata, _ = parts(tmp_path, facts(**{unknown: None}))
    assert "model-index" not in metadata


def test_an_accuracy_of_zero_is_a_result(facts, tmp_path):
    metadata, _ = parts(tmp_path, facts(accuracy=0.0))
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.0


@pytest.mark.parametrize("strategy", ["given", "first", "random"])
def test_layers_that_entropy_did_not_choose_are_not_said_to_be(facts, tmp_path, strategy):
    chosen = AttentionSelection(
        [0], None if strategy == "given" else SelectionConfig(strategy), mlp_entropy=[1.0, 2.0]
    )
    _, text = parts(tmp_path, facts(selection=chosen))
    assert f"`{strategy}`" in text
    assert "NOSE" not in text and "Entropy chose" not in text, "the card invents a search"


def as_shown(cell: str) -> str:
    """What a reader sees of Markdown whose every special character is escaped."""
    return html.unescape(re.sub(r"\\([^|])", r"\1", cell))


@NAMES
def test_no_name_breaks_out_of_the_metadata(facts, tmp_path, name):
    plain, _ = parts(tmp_path, facts())
    metadata, _ = parts(
        tmp_path,
        facts(name=name, dataset=name, base_model=name, license=name, measured_on=name, training={name: name}),
    )
    assert set(metadata) == set(plain)
    assert (metadata["license"], metadata["base_model"], metadata["datasets"]) == (name, name, [name])
    assert metadata["model-index"][0]["name"] == name
    assert ModelCard.load(tmp_path / "README.md").data.license == name


@NAMES
def test_no_name_breaks_out_of_its_table_cell(facts, tmp_path, name):
    _, text = parts(tmp_path, facts(rows={name: (name, "after")}, training={name: name, "epochs": "30"}))
    assert [len(row) for row in table_cells(text)] == [3, 3, 3, 2, 2, 2, 2]
    comparison, training = ([as_shown(cell) for cell in table_cells(text)[row]] for row in (2, 5))
    cell = name.replace("|", "\\|").replace("\n", " ").strip()
    assert comparison == [cell, cell, "after"]
    assert training == [cell, cell]


@NAMES
def test_no_name_breaks_out_of_its_line(facts, tmp_path, name):
    _, plain = parts(tmp_path, facts())
    _, text = parts(tmp_path, facts(name=name, measured_on=name))
    assert headings(text)[1:] == headings(plain)[1:], "the name adds a heading"
    assert len(text.splitlines()) == len(plain.splitlines()), "the name goes on in other lines"


@NAMES
def test_the_usage_example_is_python_whatever_the_name(facts, tmp_path, name):
    _, text = parts(tmp_path, facts(name=name))
    assert pipeline_model(text) == name


@NAMES
def test_names_are_not_run_as_templates(facts, tmp_path, name):
    _, text = parts(tmp_path, facts(rows={name: ("1", "2")}))
    assert "49" not in text


def test_a_table_is_a_table():
    assert markdown_table(["name", "value"], [["a|b", 1], ["c\nd", 2]]).splitlines() == [
        "| name | value |",
        "| --- | --- |",
        "| a\\|b | 1 |",
        "| c d | 2 |",
    ]


def test_every_kind_of_line_break_stays_in_its_cell():
    # Markdown ends a line at a carriage return too.
    assert len(re.split(r"\r\n|\r|\n", markdown_table(["name"], [["a\r\nb"], ["a\rb"]]))) == 4


def test_a_card_is_replaced_by_the_next(facts, tmp_path):
    write_model_card(tmp_path, facts(name="first"))
    _, text = parts(tmp_path, facts(name="second"))
    assert "second" in text and "first" not in headings(text)[0]


def test_the_folder_may_be_given_as_text(facts, tmp_path):
    assert write_model_card(str(tmp_path), facts()).is_file()


def test_the_usage_example_names_the_repository_where_it_is_known(facts, tmp_path):
    _, text = parts(tmp_path, facts(repo_id="me/elsewhere"))
    assert pipeline_model(text) == "me/elsewhere"
    assert headings(text)[0] == "# lambda-vit-tiny"


def test_a_model_without_a_class_head_is_not_put_into_a_classification_pipeline(facts, tmp_path):
    metadata, text = parts(tmp_path, facts(is_classifier=False, accuracy=None))
    assert "pipeline_tag" not in metadata
    assert "image-classification" not in text
    assert "AutoModel.from_pretrained" in text


def test_the_hub_finds_nothing_wrong_with_the_metadata(facts, tmp_path):
    card = write_model_card(tmp_path, facts(language="en", tags=["tiny"])).read_text()
    assert metadata_errors(card) == []
    assert metadata_errors(card.replace("facebook/deit-base-patch16-224", "/home/me/vit")) != []


def test_an_unfinished_model_says_so_and_has_no_results(facts, tmp_path):
    metadata, text = parts(tmp_path, facts(progress="step 5 of 12, lambda = 0.5", rows={}, accuracy=None))
    assert "training-in-progress" in metadata["tags"]
    assert "model-index" not in metadata
    assert "**Not finished**" in text and "step 5 of 12, lambda = 0.5" in text
    assert "To be removed: the attention of layers [0, 2]" in text
    assert "were removed" not in text and "## Before and after" not in text


def test_the_card_tells_what_each_number_of_layers_changes(facts, selection, tmp_path):
    selection.changes = [OutputChange(0.0125, 0.98), OutputChange(0.25, 0.755)]
    _, text = parts(tmp_path, facts(rows={}, training={}))
    assert table_cells(text)[-4:] == [
        ["masked", "last added", "KL (nats)", "same class"], ["---"] * 4,
        ["1", "2", "0.013", "98.0 %"], ["2", "0", "0.250", "75.5 %"],
    ]  # fmt: skip
    selection.config = SelectionConfig(output="class_token")
    selection.changes = [OutputChange(0.5, None)] * 2
    _, text = parts(tmp_path, facts(rows={}, training={}))
    assert table_cells(text)[-1] == ["2", "0", "0.500"] and "1 - cosine" in text
    for change, cells in (
        (OutputChange(0.5, 0.25, "multi_label_classification"), ["KL (nats)", "same labels"]),
        (OutputChange(0.5, None, "regression"), ["squared change / 2"]),
    ):
        selection.changes = [change] * 2
        assert ["masked", "last added", *cells] in table_cells(parts(tmp_path, facts(rows={}, training={}))[1])
    selection.changes = []
    assert "Before any training" not in parts(tmp_path, facts())[1]


def test_the_card_of_a_model_that_merges_tokens_says_so(facts, tmp_path):
    assert "merge" not in parts(tmp_path, facts(merged_tokens=[0, 0, 0]))[1]
    _, text = parts(tmp_path, facts(merged_tokens=[0, 16, 16]))
    assert "in layers [1, 2] (0-based)" in text and "16 of them in a layer" in text
    assert "8 to 16 of them in a layer" in parts(tmp_path, facts(merged_tokens=[8, 0, 16]))[1]


def test_the_card_of_a_model_with_linear_maps_says_so(facts, tmp_path):
    _, text = parts(tmp_path, facts(selection=AttentionSelection(order=[]), fade_to="linear", linear_maps=[1, 4]))
    assert "linear maps in the place of the attention in 2 of its layers" in text
    assert "took the place of the attention of layers [1, 4] (0-based)" in text
    assert "faded" not in text and "weights were removed" not in text


def test_of_several_datasets_none_is_credited_with_the_accuracy(facts, tmp_path):
    metadata, _ = parts(tmp_path, facts(dataset=["a", "b"]))
    assert metadata["datasets"] == ["a", "b"]
    assert "model-index" not in metadata


# A card belongs to its user: our text and our keys are added to it, and nothing else changes.

USER_CARDS = {
    "empty": b"",
    "text only": b"# Mine\n\nAbout it.\n",
    "no newline at the end": b"# Mine",
    "metadata with comments": b"---\n# who may use it\nlicense: mit   # really\nfoo: [1,  2]\n---\n# Mine\n",
    "metadata only": b"---\nlicense: mit\n---\n",
    "Windows": b"---\r\nlicense: mit\r\nfoo: bar\r\n---\r\n# Mine\r\n\r\nAbout it.\r\n",
    "not UTF-8": b"# Gr\xfc\xdfe\n",
    "a lone marker": f"# Mine\n{BEGIN}\nAbout it.\n".encode(),
    "edited card of the Trainer": b"---\ntags:\n- generated_from_trainer\n---\n# Mine\n\nRewritten.\n",
}


def without_ours(card: bytes) -> bytes:
    text = re.sub(rb"(?m)^# lambda-vit-hf:begin\r?\n(.*\r?\n)*?# lambda-vit-hf:end\r?\n", b"", card)
    begin, end = text.rindex(BEGIN.encode()), text.rindex(END.encode())
    return text[:begin] + text[end + len(END) :]


@pytest.mark.parametrize("card", USER_CARDS.values(), ids=USER_CARDS)
def test_what_the_user_wrote_stays_byte_for_byte(facts, tmp_path, card):
    path = tmp_path / "README.md"
    path.write_bytes(card)
    write_model_card(tmp_path, facts(accuracy=0.5))
    first = path.read_bytes()
    write_model_card(tmp_path, facts(accuracy=0.25))
    second = path.read_bytes()
    assert without_ours(first) == without_ours(second), "the second card changed what is the user's"
    left = without_ours(second)
    if not card.startswith(b"---"):
        left = left.removeprefix(b"---\n---\n")
    assert left.startswith(card) and not left[len(card) :].strip()
    write_model_card(tmp_path, facts(accuracy=0.5))
    assert path.read_bytes() == first, "the same facts give another card"


def test_text_below_ours_stays_below(facts, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# Mine\n\n{BEGIN}\nold\n{END}\n\nAfterword.\n")
    _, text = parts(tmp_path, facts())
    assert text.startswith("# Mine\n\n") and text.endswith(f"{END}\n\nAfterword.\n")
    assert "old" not in text and text.count(BEGIN) == 1


def test_keys_that_the_user_set_are_kept_and_ours_follow_the_facts(facts, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\ntags: [mine]\nwidget: []\n---\n# Mine\n")
    parts(tmp_path, facts(accuracy=0.5, dataset="first"))
    metadata, _ = parts(tmp_path, facts(accuracy=0.25, dataset="second"))
    assert (metadata["license"], metadata["tags"], metadata["widget"]) == ("mit", ["mine"], [])
    assert metadata["datasets"] == ["second"]
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.25
    unknown, _ = parts(tmp_path, facts(accuracy=None, dataset=None))
    assert not {"datasets", "model-index"} & set(unknown), "a fact no longer known is still on the card"


@pytest.mark.parametrize("block", ["license: [mit", "{license: mit}", "- license", "just words"])
def test_metadata_that_cannot_be_added_to_stays_and_is_reported(facts, tmp_path, block, caplog):
    path = tmp_path / "README.md"
    path.write_text(f"---\n{block}\n---\n# Mine\n")
    write_model_card(tmp_path, facts())
    assert path.read_text().startswith(f"---\n{block}\n---\n# Mine\n")
    assert "81.23 %" in path.read_text()
    assert "left as it is" in caplog.text


def test_the_generic_card_of_the_trainer_is_replaced(facts, tmp_path):
    from transformers.modelcard import TrainingSummary

    generic = TrainingSummary("out", tags="generated_from_trainer", eval_results={}, hyperparameters={"seed": 1})
    generic.eval_lines = []
    (tmp_path / "README.md").write_text(generic.to_model_card())
    metadata, text = parts(tmp_path, facts())
    assert "generated_from_trainer" not in metadata["tags"]
    assert text.startswith(f"\n{BEGIN}\n# lambda-vit-tiny")
    assert "More information needed" not in text


def test_a_marker_in_a_name_does_not_end_our_section(facts, tmp_path):
    for _ in range(2):
        _, text = parts(tmp_path, facts(name=f"a {END} b", training={BEGIN: END}))
    assert (text.count(BEGIN), text.count(END)) == (1, 1)


# What the Trainer's log tells of the weights that are left.


def log(*entries) -> list[dict]:
    return [{"step": step, "eval_accuracy": value, "lambda": lam} for step, value, lam in entries]


TRAINED = [{"step": 12, "train_runtime": 1.0}]


@pytest.mark.parametrize(
    ("history", "best", "expected"),
    [
        (log((6, 0.9, 0.5), (12, 0.7, 0.0)) + TRAINED, None, 0.7),
        (log((6, 0.9, 0.5), (10, 0.8, 0.0)) + TRAINED, None, None),
        (log((12, 0.7, 0.25)) + TRAINED, None, None),
        (log((9, 0.8, 0.0), (12, 0.7, 0.0)) + TRAINED, 9, 0.8),
        (log((9, 0.8, 0.0), (12, 0.7, 0.0)) + TRAINED + log((12, 0.6, 0.0)), 9, 0.6),
        ([], None, None),
    ],
    ids=["after the last step", "too early", "half-diluted", "of the best", "after training", "none"],
)
def test_only_an_evaluation_of_the_weights_that_are_left_counts(history, best, expected):
    args = SimpleNamespace(load_best_model_at_end=best is not None)
    state = SimpleNamespace(global_step=12, best_global_step=best, log_history=history)
    assert final_evaluation(args, state).get("eval_accuracy") == expected


def test_how_long_an_evaluation_took_is_no_metric():
    entry = {"step": 1, "lambda": 0.0, "epoch": 1.0, "eval_loss": 2.0, "eval_runtime": 3, "eval_samples_per_second": 4}
    state = SimpleNamespace(global_step=1, best_global_step=None, log_history=[entry])
    assert final_evaluation(SimpleNamespace(load_best_model_at_end=False), state) == {"eval_loss": 2.0}


def test_a_local_folder_is_no_base_model(model, tmp_path):
    from lambda_vit_hf import LambdaViTForImageClassification

    assert hub_base_model(model.config) is None
    model.save_pretrained(tmp_path / "me" / "vit")
    loaded = LambdaViTForImageClassification.from_pretrained(tmp_path / "me" / "vit")
    assert hub_base_model(loaded.config) is None
    # Nor is one that has been deleted since, even if its name looks like an id.
    loaded.config._name_or_path = "me/vit"
    assert hub_base_model(loaded.config) is None


@pytest.mark.parametrize("field", ["name", "measured_on", "evaluation", "training", "strategy", "progress"])
@pytest.mark.parametrize("kind", ["HTML", "a link", "code"])
def test_a_name_is_shown_as_it_is_and_not_as_html_or_markdown(facts, selection, tmp_path, field, kind):
    name = HOSTILE[kind]
    if field == "strategy":
        changes = {
            "selection": dataclasses.replace(
                selection, config=SimpleNamespace(strategy_name=name, output="", mask="", compare="")
            )
        }
    elif field in ("evaluation", "training"):
        changes = {field: {name: name}}
    else:
        changes = {field: name}
    card = write_model_card(tmp_path, facts(**{"repo_id": "me/model", **changes})).read_text()
    shown = markdown.markdown(card.partition(BEGIN)[2], extensions=["tables", "fenced_code"])
    assert "<img src=x" not in shown and 'https://evil.example"' not in shown


@pytest.mark.parametrize("character", ["\x00", "\x1b[31m", "\u202e", "\u2066", "\x9b", "\ud800"])
def test_characters_that_are_no_text_are_replaced(facts, tmp_path, character):
    named = facts(name=f"a{character}b", evaluation={f"a{character}b": "1"})
    card = write_model_card(tmp_path, named).read_bytes().decode()
    assert character[0] not in card.partition(BEGIN)[2].partition("```")[0]
    assert "# a\N{REPLACEMENT CHARACTER}" in card
