"""The program that compares ways of choosing layers: what it trains, prints, keeps, and goes on from."""

import json
from pathlib import Path

import pytest

from benchmarks import compare_selections, comparison_tables


def compare(folder: Path, *more: str) -> dict:
    small = [
        "--hidden_size", "16", "--num_hidden_layers", "3", "--num_attention_heads", "2", "--intermediate_size", "32",
        "--base_num_train_epochs", "0.5", "--num_train_epochs", "0.5", "--use_cpu", "true", "--warmup_steps", "0",
        "--per_device_train_batch_size", "128", "--calibration_size", "32",
    ]  # fmt: skip
    recipe = str(Path(__file__).parents[2] / "trainer_scripts" / "recipes" / "digits.yaml")
    compare_selections.main(
        [recipe, *small, "--num_removed", "1", "--random_sets", "3", "--output_dir", str(folder / "runs"), *more]
    )
    return json.loads((folder / "runs.json").read_text())


def test_each_set_of_layers_is_trained_once_from_the_same_base(tmp_path, capsys):
    chosen = ["--seeds", "0", "1", "--strategies", "nose", "first", "cosine"]
    results = compare(tmp_path, *chosen)
    assert [run["layers"] for run in results["runs"] if run["strategy"] == "first"] == [[0], [0]]
    for seed in (0, 1):
        of_seed = [run for run in results["runs"] if run["seed"] == seed]
        assert len({run["top1_before"] for run in of_seed}) == 1, "the strategies started from different models"
        assert all(
            run["top1_diluted"] == results["trainings"][f"seed {seed}, layers {run['layers'][0]}"]["top1"]
            for run in of_seed
        )
    chosen_sets = {(run["seed"], *run["layers"]) for run in results["runs"]}
    assert len(results["trainings"]) == len(chosen_sets) + 2, "each set once, and the whole model once per seed"
    for seed, control in enumerate(results["controls"]):
        assert control["top1_diluted"] == results["trainings"][f"seed {seed}, layers none"]["top1"]
    first = next(row for row in results["table"] if row["strategy"] == "first")
    values = [run["top1_diluted"] for run in results["runs"] if run["strategy"] == "first"]
    assert first["top1_diluted"]["mean"] == pytest.approx(sum(values) / 2)
    assert len(results["choices"]) == 2 * 12
    assert [tried["seed"] for tried in results["random_sets"]] == [0, 1]
    printed = capsys.readouterr().out
    assert "| 1 | identity | first |" in printed
    assert printed.count("| 1 | class_head | skip | magnitude |") == 2, "one row of choices, one of correlations"
    for choice in results["choices"]:  # what a strategy chose too was trained
        training = results["trainings"].get(f"seed {choice['seed']}, layers {choice['layers'][0]}")
        assert choice.get("top1_diluted") == (training and training["top1"])
    assert any("top1_diluted" in choice for choice in results["choices"])


def test_there_is_no_mean_before_every_seed_has_its_figure():
    runs = [{"num_removed": 1, "strategy": "last", "layers": [2], "top1_before": 0.9} for _ in range(2)]
    runs[0]["top1_diluted"] = 0.8
    (row,) = comparison_tables.tabulate(runs, ("strategy",))
    assert row["top1_before"]["mean"] == pytest.approx(0.9)
    assert "top1_diluted" not in row


def test_it_goes_on_where_it_was_stopped(tmp_path, capsys):
    chosen = ["--seeds", "0", "--strategies", "first"]
    results = compare(tmp_path, *chosen)
    capsys.readouterr()

    again = compare(tmp_path, *chosen)
    assert "seed 0" not in capsys.readouterr().out.split("| removed")[0], "something was measured again"
    for name in ("trainings", "controls", "runs", "choices", "random_sets"):
        assert again[name] == results[name]
    with pytest.raises(ValueError, match="other settings"):
        compare(tmp_path, *chosen, "--num_train_images", "500")
    more = compare(tmp_path, "--seeds", "0", "--strategies", "first", "last")
    printed = capsys.readouterr().out
    assert "layers 0: top-1" not in printed and "layers 2: top-1" in printed
    assert [run["strategy"] for run in more["runs"]] == ["first", "last"]
    assert more["runs"][0]["top1_diluted"] == results["runs"][0]["top1_diluted"]

    # Stopped half-way, and by a version that knew no controls.
    half = {**results, "trainings": {"seed 0, layers 0": results["trainings"]["seed 0, layers 0"]}}
    del half["controls"]
    (tmp_path / "runs.json").write_text(json.dumps(half))
    completed = compare(tmp_path, *chosen)
    printed = capsys.readouterr().out
    assert "layers none: top-1" in printed and "layers 0: top-1" not in printed
    assert [control["top1_before"] for control in completed["controls"]] == [results["runs"][0]["top1_before"]]
    assert completed["trainings"]["seed 0, layers none"]["top1"] == results["trainings"]["seed 0, layers none"]["top1"]


def test_it_takes_base_models_and_fewer_images(tmp_path, capsys, digits_vit):
    results = compare(
        tmp_path,
        "--seeds",
        "7",
        "--strategies",
        "last",
        "--base_models",
        digits_vit,
        "--num_train_images",
        "400",
        "--random_sets",
        "0",
    )
    assert results["runs"][0]["layers"] == [2]
    assert not (tmp_path / "runs" / "seed-7" / "base").exists(), "a base model was trained"
    assert results["settings"]["num_train_images"] == 400


def test_figures_of_before_are_printed_again(capsys):
    compare_selections.main([str(Path(__file__).parents[2] / "results" / "fashion_mnist_comparison.json")])
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| 6 |") and "| last |" in line)
    assert "87.05 ± 0.32" in row and row in printed


def test_attention_fades_to_each_thing_for_each_budget(tmp_path, digits_vit, capsys):
    results = compare(
        tmp_path, "--seeds", "7", "--strategies", "last", "--base_models", digits_vit, "--num_train_images", "300",
        "--random_sets", "0", "--no_choices", "--fades", "identity", "skip", "linear", "--budgets", "0.5", "1",
        "--num_masked_images", "50",
    )  # fmt: skip
    assert set(results["trainings"]) == {
        f"seed 7, layers {what}, {epochs} epochs"
        for what in ("none", "2", "2, faded to skip", "2, faded to linear")
        for epochs in ("0.5", "1")
    }
    for run in results["runs"]:
        faded = "" if run["fade_to"] == "identity" else f", faded to {run['fade_to']}"
        assert run["top1_after_1_epochs"] == results["trainings"][f"seed 7, layers 2{faded}, 1 epochs"]["top1"]
        assert round(run["top1_skip"] * 50) == pytest.approx(run["top1_skip"] * 50)
    mapped = next(run for run in results["runs"] if run["fade_to"] == "linear")
    assert mapped["top1_linear"] >= mapped["top1_skip"] and 0 < mapped["divergence"] < 1
    assert "after 0.5 epochs (%) | after 1 epochs (%)" in capsys.readouterr().out


def test_nothing_is_trained_where_nobody_asks_for_it(tmp_path, digits_vit, capsys):
    results = compare(
        tmp_path, "--seeds", "7", "--strategies", "last", "weight_entropy", "--base_models", digits_vit,
        "--random_sets", "0", "--no_choices", "--no_training",
    )  # fmt: skip
    assert results["trainings"] == {} and len(results["runs"]) == 2
    assert "diluted" not in capsys.readouterr().out


def test_whole_blocks_and_a_teacher(tmp_path, digits_vit, capsys):
    results = compare(
        tmp_path, "--seeds", "7", "--strategies", "loss", "random:0", "random:1", "--base_models", digits_vit,
        "--num_train_images", "300", "--random_sets", "0", "--no_choices", "--blocks", "--distillation", "soft",
    )  # fmt: skip
    blocks = results["runs"][-1]
    assert (blocks["strategy"], len(blocks["blocks"]), blocks["layers"]) == ("whole blocks", 1, [])
    trained = results["trainings"][f"seed 7, blocks {blocks['blocks'][0]}"]["top1"]
    assert blocks["top1_diluted"] == trained
    printed = capsys.readouterr().out
    assert "| 1 |  | whole blocks |" in printed and "| regret (points) |" in printed


def test_regrets_and_predictions_are_of_the_same_seed_and_number(capsys):
    after = {0: [0.80, 0.82, 0.84, 0.86, 0.88], 1: [0.70, 0.72, 0.74, 0.78, 0.76]}
    runs = [
        {"seed": seed, "fade_to": "skip", "strategy": f"random:{k}", "num_removed": 2, "layers": [0, k + 1],
         "transfer_entropy": k - 5.0, "divergence": 5.0 - k, "top1_skip": k / 10, "top1_diluted": after[seed][k]}
        for seed in (0, 1) for k in range(5)
    ]  # fmt: skip
    comparison_tables.print_regrets(runs)
    comparison_tables.print_predictions(runs)
    printed = capsys.readouterr().out
    assert "| 2 | diluted (%) | skip | random:4 | 1.00 ± 1.00 |" in printed  # 0 and 2 points
    assert "| 2 | diluted (%) | skip | random:0 | 8.00 ± 0.00 |" in printed
    assert "| 2 | diluted (%) | skip | 5 | 0.95 | 0.95 | 0.95 |" in printed  # 1 and 0.9
