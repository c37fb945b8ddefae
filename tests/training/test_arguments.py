"""Recipes and the command line: which wins, and what is refused before anything starts."""

from dataclasses import dataclass, field

import pytest

from lambda_vit_hf.training.arguments import (
    PROGRAM_ARGUMENTS,
    DataArguments,
    LambdaTrainingArguments,
    ModelArguments,
    RemovalArguments,
    parse_arguments,
)


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and returns its path as the command line has it."""

    def write(text: str, name: str = "recipe.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def removal(*argv: str) -> RemovalArguments:
    (arguments,) = parse_arguments(list(argv), [RemovalArguments])
    return arguments


def test_without_arguments_the_defaults_hold():
    assert removal() == RemovalArguments()


def test_a_recipe_replaces_defaults_and_the_command_line_replaces_the_recipe(recipe):
    path = recipe("calibration_size: 64\nstrategy: first\n")
    arguments = removal(path, "--strategy", "last")
    assert (arguments.calibration_size, arguments.strategy, arguments.mask) == (64, "last", None)


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_both_endings_of_yaml_are_recipes(recipe, suffix):
    assert removal(recipe("num_removed_layers: 2\n", f"recipe.{suffix}")).num_removed_layers == 2


def test_each_dataclass_gets_its_own_fields(recipe):
    path = recipe("image_size: 8\ndataset_name: digits\nnum_removed_layers: 6\n")
    model, data, remove = parse_arguments([path], [ModelArguments, DataArguments, RemovalArguments])
    assert (model.image_size, data.dataset_name, remove.num_removed_layers) == (8, "digits", 6)


@pytest.mark.parametrize(
    ("text", "value"), [("5e-4", 5e-4), ("1.0e-3", 1e-3), ("2", 2.0), ("'1e-2'", 1e-2)], ids=lambda value: str(value)
)
def test_numbers_are_numbers_however_yaml_reads_them(recipe, text, value):
    # YAML 1.1 takes 5e-4, without a dot, for text.
    (model,) = parse_arguments([recipe(f"base_learning_rate: {text}\n")], [ModelArguments])
    assert model.base_learning_rate == value and isinstance(model.base_learning_rate, float)


@pytest.mark.parametrize(("text", "value"), [("false", False), ("true", True), ("no", False), ("'false'", False)])
def test_switches_in_a_recipe_are_switches(recipe, text, value):
    assert removal(recipe(f"fold: {text}\n")).fold is value


def test_a_switch_of_the_recipe_can_be_undone(recipe):
    assert removal(recipe("fold: false\n"), "--fold", "true").fold is True
    assert removal(recipe("fold: true\n"), "--no_fold").fold is False


def test_lists_and_nothing_can_stand_in_a_recipe(recipe):
    arguments = removal(recipe("removed_layers: [0, 2, 5]\noutput: null\n"))
    assert (arguments.removed_layers, arguments.output) == ([0, 2, 5], None)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--removed_layers", "0", "1"], (None, None, [0, 1])),
        (["--removal_ratio", "0.5"], (0.5, None, None)),
        (["--removal_ratio=0.5"], (0.5, None, None)),
        (["--num_removed_layers", "3"], (None, 3, None)),
        (["--removal-ratio", "0.5"], (0.5, None, None)),
        (["--removal_rat", "0.5"], (0.5, None, None)),
        ([], (None, 6, None)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_another_way_to_name_the_layers_replaces_the_recipes(recipe, argv, expected):
    # The callback takes exactly one of the three; argparse also takes dashes and unique beginnings.
    arguments = removal(recipe("num_removed_layers: 6\n"), *argv)
    assert (arguments.removal_ratio, arguments.num_removed_layers, arguments.removed_layers) == expected


def test_a_dataset_folder_replaces_the_recipes_dataset(recipe):
    (data,) = parse_arguments([recipe("dataset_name: digits\n"), "--dataset_dir", "pets"], [DataArguments])
    assert (data.dataset_name, data.dataset_dir) == (None, "pets")


@pytest.mark.parametrize(
    "argv",
    [
        ["RECIPE", "--fold", "false", "--removed_layers", "0", "1"],
        ["--fold", "false", "--removed_layers", "0", "1", "RECIPE"],
        ["--fold=false", "RECIPE", "--removed_layers", "0", "1"],
        ["--no_fold", "RECIPE", "--removed-layers", "0", "1"],
        ["--removed_lay", "0", "1", "--no-fold", "RECIPE"],
    ],
    ids=" ".join,
)
def test_recipe_and_options_stand_in_any_order(recipe, argv):
    path = recipe("num_removed_layers: 6\nstrategy: last\n")
    arguments = removal(*(path if word == "RECIPE" else word for word in argv))
    assert (arguments.removed_layers, arguments.num_removed_layers) == ([0, 1], None)
    assert (arguments.fold, arguments.strategy) == (False, "last")


def test_a_switch_before_the_recipe_does_not_take_it_for_its_value():
    argv = ["--use_cpu", "--ignore_mismatched_sizes", "digits", "--image_size", "16"]
    model, *_ = parse_arguments(argv, PROGRAM_ARGUMENTS)
    assert (model.ignore_mismatched_sizes, model.image_size, model.patch_size) == (True, 16, 2)


@pytest.mark.parametrize("argv", [["digits", "--dataset_name", "digits"], ["--dataset_name", "digits", "digits"]])
def test_a_recipes_name_may_be_the_value_of_an_option(argv):
    arguments = parse_arguments([*argv, "--use_cpu", "true"], PROGRAM_ARGUMENTS)
    assert (arguments[1].dataset_name, arguments[3].num_removed_layers) == ("digits", 6)
    assert parse_arguments(["--dataset_name", "digits"], [DataArguments])[0] == DataArguments(dataset_name="digits")


def test_two_recipes_are_refused(recipe):
    with pytest.raises(ValueError, match=r"one recipe, not \['digits', 'finetune'\]"):
        removal("digits", "--fold", "false", "finetune")


def test_an_unknown_recipe_is_answered_with_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"recipe digit does not exist.*deit_base_imagenet.*digits, "):
        removal("digit")


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        ("num_layers: 3\n", [], (3, None)),
        ("layers: [1, 2]\n", [], (None, [1, 2])),
        ("num_removed_layers: 6\n", ["--layers", "1"], (None, [1])),
        ("removed_layers: [0]\n", ["--num-layers=2"], (2, None)),
    ],
)
def test_the_names_of_before_still_work(recipe, text, argv, expected):
    with pytest.warns(FutureWarning, match=r"`(num_)?layers` is called `(num_)?removed_layers` now"):
        arguments = removal(recipe(text), *argv)
    assert (arguments.num_removed_layers, arguments.removed_layers) == expected


def test_folders_of_the_splits_replace_the_recipes_dataset_but_not_each_other(recipe):
    (data,) = parse_arguments([recipe("dataset_name: digits\n"), "--train_dir", "a", "--validation_dir", "b"],
                              [DataArguments])  # fmt: skip
    assert (data.dataset_name, data.train_dir, data.validation_dir) == (None, "a", "b")
    split = recipe("train_dir: a\nvalidation_dir: b\n")
    (data,) = parse_arguments([split, "--validation_dir", "c"], [DataArguments])
    assert (data.train_dir, data.validation_dir) == ("a", "c")
    (data,) = parse_arguments([split, "--dataset_name", "digits"], [DataArguments])
    assert (data.dataset_name, data.train_dir, data.validation_dir) == ("digits", None, None)


def test_an_unknown_field_of_a_recipe_is_named(recipe):
    with pytest.raises(ValueError, match=r"num_layer'.*ratoi"):
        removal(recipe("num_layer: 3\nratoi: 0.4\nstrategy: nose\n"))


def test_an_unknown_option_is_named():
    with pytest.raises(ValueError, match="--num_layerz"):
        removal("--num_layerz", "3")


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recipe .*no-such\.yaml does not exist"):
        removal(str(tmp_path / "no-such.yaml"))


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "broken.yaml"
    for content in (b"a: b: c", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.yaml cannot be read as YAML"):
            removal(str(path))


@pytest.mark.parametrize(("text", "kind"), [("- num_layers\n- 3\n", "list"), ("num_layers 3\n", "str"), ("", "None")])
def test_a_recipe_that_is_no_mapping_says_what_it_is(recipe, text, kind):
    with pytest.raises(ValueError, match=rf"recipe\.yaml must map.*{kind}"):
        removal(recipe(text))


def test_a_value_of_the_wrong_type_is_named(recipe, capsys):
    with pytest.raises(SystemExit):
        removal(recipe("num_removed_layers: two\n"))
    assert "num_removed_layers" in (message := capsys.readouterr().err) and "two" in message


def test_a_recipe_cannot_run_code(recipe, tmp_path):
    path = recipe(f"strategy: !!python/object/apply:os.mkdir ['{tmp_path / 'harm'}']\n")
    with pytest.raises(ValueError, match=r"(?s)cannot be read as YAML.*python/object"):
        removal(path)
    assert not (tmp_path / "harm").exists()


@dataclass
class _Demanding:
    target: str = field(metadata={"help": "Has no default."})


def test_a_recipe_can_give_what_is_required(recipe):
    (arguments,) = parse_arguments([recipe("target: here\n")], [_Demanding])
    assert arguments.target == "here"
    with pytest.raises(SystemExit):
        parse_arguments([], [_Demanding])


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(["--help"], PROGRAM_ARGUMENTS)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    names = [name for kind in PROGRAM_ARGUMENTS for name in kind.__dataclass_fields__]
    assert [name for name in names if f"--{name}" not in shown] == []


def test_deepspeed_is_refused_on_the_command_line(tmp_path):
    with pytest.raises(ValueError, match="does not work with DeepSpeed"):
        parse_arguments(["--output_dir", str(tmp_path), "--deepspeed", "zero2.json"], [LambdaTrainingArguments])


def test_deepspeed_is_refused_when_the_launcher_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="does not work with DeepSpeed"):
        parse_arguments(["--output_dir", str(tmp_path)], [LambdaTrainingArguments])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: true", "gives true to learning_rate, which is .*float"),
        ("learning_rate:", "gives no value to learning_rate"),
        ("seed: null", "gives no value to seed"),
        ("fold:", "gives no value to fold"),
        ("eval_strategy: no", "gives false to eval_strategy.*in quotes"),
        ("calibration_size: off", "gives false to calibration_size"),
        ("learning_rate: 0.1\nseed: 1\nlearning_rate: 0.01", r"recipe\.yaml, .*names \['learning_rate'\] twice"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", r"names \['a'\] twice"),
    ],
)
def test_what_a_field_cannot_be_is_one_line_that_names_it(recipe, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_arguments([recipe(text + "\n")], PROGRAM_ARGUMENTS)
    assert "\n" not in str(caught.value)


def test_resuming_may_be_a_switch_in_a_recipe(recipe):
    path = recipe("resume_from_checkpoint: true\noutput_dir: x\nuse_cpu: true\n")
    assert str(parse_arguments([path], PROGRAM_ARGUMENTS)[-1].resume_from_checkpoint) == "True"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: [1, 2]", "gives a list to learning_rate"),
        ("dataset_name: {a: b}", "gives a mapping to dataset_name"),
        ("fold: [true]", "gives a list to fold"),
        ("removed_layers: [1, [2]]", r"gives a list with \[2\] to removed_layers"),
        ("class_names: [cat, null]", "gives a list with None to class_names"),
        ("learning_rate: .nan", "`learning_rate` must be a finite number, got nan"),
        ("num_train_epochs: .inf", "`num_train_epochs` must be a finite number"),
        ("seed: 1\n---\nseed: 2", "cannot be read as YAML: expected a single document"),
        ("x: " + "[" * 5000, "cannot be read as YAML"),
    ],
    ids=lambda text: text[:20],
)
def test_what_no_field_can_hold_is_one_line(recipe, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_arguments([recipe(f"{text}\noutput_dir: x\nuse_cpu: true\n")], PROGRAM_ARGUMENTS)
    assert "\n" not in str(caught.value)


def test_a_number_on_the_command_line_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`weight_decay` must be a finite number"):
        parse_arguments(["--output_dir", str(tmp_path), "--weight_decay", "nan"], [LambdaTrainingArguments])


def test_a_mapping_may_be_merged_into_a_recipe(recipe):
    arguments = removal(recipe("<<: {num_removed_layers: 3, strategy: last}\nstrategy: first\n"))
    assert (arguments.num_removed_layers, arguments.strategy) == (3, "first")
