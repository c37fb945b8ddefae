"""Lambda over training: the paper's schedule exactly, and what every schedule promises."""

import itertools

import pytest

from lambda_vit_hf.training.dilution import SCHEDULES, DilutionConfig, DilutionSchedule, cosine, linear


@pytest.mark.parametrize("steps_per_epoch", [1, 7])
def test_the_papers_recipe_is_reproduced_at_every_epoch(steps_per_epoch):
    schedule = DilutionSchedule(400 * steps_per_epoch, hold_share=0.25, steps_per_update=steps_per_epoch)
    for epoch in range(400):
        for step in (epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch - 1):
            assert schedule.at(step) == max(0, 1 - epoch / 299), f"epoch {epoch}, step {step}"


def test_the_papers_hold_share_and_shape_are_the_defaults():
    schedule = DilutionSchedule(400)
    assert [schedule.at(epoch) for epoch in range(400)] == [max(0, 1 - epoch / 299) for epoch in range(400)]


GRID = [
    (total, hold, shape, every)
    for total, hold, shape, every in itertools.product(
        (2, 3, 4, 5, 10, 97, 1000), (0.0, 0.1, 0.25, 0.5, 0.9, 0.999), sorted(SCHEDULES), (1, 2, 3, 10, 48, 96, 500)
    )
    if every < total
]


def test_every_schedule_starts_at_one_and_ends_at_zero_without_rising():
    for arguments in GRID:
        schedule = DilutionSchedule(*arguments)
        lambdas = [schedule.at(step) for step in range(schedule.total_steps)]
        assert lambdas[0] == 1.0, f"{schedule} starts at {lambdas[0]}"
        # Exactly: the model that is evaluated last must be the removed one.
        assert lambdas[-1] == 0.0, f"{schedule} ends at {lambdas[-1]}"
        assert lambdas == sorted(lambdas, reverse=True), f"{schedule} rises"
        assert all(isinstance(value, float) for value in lambdas)


def test_the_first_zero_step_is_the_first_at_zero():
    for arguments in GRID:
        schedule = DilutionSchedule(*arguments)
        zeros = [step for step in range(schedule.total_steps) if schedule.at(step) == 0.0]
        assert zeros == list(range(schedule.first_zero_step, schedule.total_steps)), schedule


def test_lambda_changes_only_at_updates():
    for arguments in GRID:
        schedule = DilutionSchedule(*arguments)
        changes = [step for step in range(1, schedule.total_steps) if schedule.at(step) != schedule.at(step - 1)]
        assert all(step % schedule.steps_per_update == 0 for step in changes), f"{schedule} changes at {changes}"


def test_lambda_stays_zero_after_training():
    assert DilutionSchedule(10).at(10) == DilutionSchedule(10).at(10_000) == 0.0


@pytest.mark.parametrize(("hold_share", "first_zero"), [(0.0, 99), (0.25, 74), (0.5, 49), (0.9, 9)])
def test_hold_share_is_the_part_of_training_at_zero(hold_share, first_zero):
    # One more than the share: the phase itself ends at zero.
    assert DilutionSchedule(100, hold_share=hold_share).first_zero_step == first_zero


def test_a_short_last_epoch_is_an_epoch():
    # 10 steps in epochs of 3: lambda is 1, 2/3, 1/3, and 0 in the last step alone.
    schedule = DilutionSchedule(10, hold_share=0.0, steps_per_update=3)
    assert [schedule.at(step) for step in (0, 3, 6, 8, 9)] == pytest.approx([1, 2 / 3, 1 / 3, 1 / 3, 0])


def test_the_shapes_are_a_line_and_half_a_cosine():
    progress = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [linear(p) for p in progress] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [cosine(p) for p in progress] == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466, 0.0], abs=1e-7)
    assert DilutionSchedule(5, 0.0, "cosine").at(1) == pytest.approx(0.8535534, abs=1e-7)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"total_steps": 1}, "2 training steps"),
        ({"total_steps": 0}, "2 training steps"),
        ({"total_steps": -5}, "2 training steps"),
        ({"hold_share": 1.0}, "hold_share"),
        ({"hold_share": -0.1}, "hold_share"),
        ({"hold_share": float("nan")}, "hold_share"),
        ({"shape": "square"}, "square"),
        ({"steps_per_update": 0}, "steps_per_update"),
        ({"steps_per_update": -1}, "steps_per_update"),
        # One update in the whole training: lambda would stay at 1.
        ({"steps_per_update": 100}, "cannot fall"),
        ({"steps_per_update": 101}, "cannot fall"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        DilutionSchedule(**{"total_steps": 100, **arguments})


@pytest.mark.parametrize("fold", ["false", "no", "True"])
def test_words_are_not_taken_for_true(fold):
    with pytest.raises(ValueError, match="`fold` must be True or False"):
        DilutionConfig(fold=fold)


@pytest.mark.parametrize(
    "wrong", [{"hold_share": None}, {"hold_share": "0.3"}, {"fold": None}, {"fold": 2}, {"fold": "no"}]
)
def test_values_of_the_wrong_kind_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DilutionConfig(**wrong)
