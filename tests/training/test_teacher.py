"""Another teacher than the model before removal: of the same classes and images, or refused before any training."""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from lambda_vit_hf.training.arguments import PROGRAM_ARGUMENTS, parse_arguments
from lambda_vit_hf.training.tasks import find_task
from lambda_vit_hf.training.teacher import check_hidden_states, load_teacher
from tests.conftest import TINY, perturb


NAMES = ["ant", "bee", "cat", "dog", "eel"]
SQUARE = {"height": 16, "width": 16}


def save_teacher(folder, names=NAMES, processor=None, **shape):
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(names))} if isinstance(names, list) else {"num_labels": names}
    teacher = perturb(ViTForImageClassification(ViTConfig(**{**TINY, **shape, **labels})))
    teacher.save_pretrained(folder)
    (processor or ViTImageProcessor(size=SQUARE)).save_pretrained(folder)
    return teacher.eval()


@pytest.fixture
def student(model):
    model.config.id2label = dict(enumerate(NAMES))
    return model


@pytest.mark.parametrize("names", [NAMES, 5], ids=["named", "unnamed"])
def test_a_teacher_is_loaded_whole(student, tmp_path, pixel_values, names):
    teacher = save_teacher(tmp_path, names, hidden_size=64)
    found = load_teacher(str(tmp_path), student, ViTImageProcessor(size=SQUARE))
    assert torch.equal(found(pixel_values).logits, teacher(pixel_values).logits)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"names": NAMES[::-1]}, "another order"),
        ({"names": 4}, r"\(4\), not .*\(5\)"),
        ({"processor": ViTImageProcessor(size=SQUARE, image_mean=[0.1] * 3)}, r"image_mean = \[0\.1, 0\.1, 0\.1\]"),
        ({"image_size": 32}, "does not take the model's images of 16 x 16 pixels"),
        ({"problem_type": "multi_label_classification"}, "was trained for multi label classification"),
        ({"problem_type": "regression"}, "was trained for regression"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(student, tmp_path, options, said):
    save_teacher(tmp_path, **options)
    with pytest.raises(ValueError, match=said):
        load_teacher(str(tmp_path), student, ViTImageProcessor(size=SQUARE))


def test_a_teacher_needs_distillation(tmp_path):
    words = ["digits", "--teacher_model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path)]
    model, data, augmentation, _, training = parse_arguments(words, PROGRAM_ARGUMENTS)
    with pytest.raises(ValueError, match="needs --distillation"):
        find_task("image_classification").check(model, data, augmentation, training)


def test_hidden_states_need_a_teacher_of_the_same_shape_and_tokens_of_their_own(student, tmp_path):
    check_hidden_states(student)
    check_hidden_states(student, save_teacher(tmp_path))
    with pytest.raises(ValueError, match=r"hidden_size is 64, not 32\): set it to 0"):
        check_hidden_states(student, save_teacher(tmp_path, hidden_size=64))
    student.set_token_merging(2)
    with pytest.raises(ValueError, match="merges"):
        check_hidden_states(student)
