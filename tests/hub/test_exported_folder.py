"""A push of an export: the Hub's layout and nothing else, and only if it is whole."""

import pytest

from lambda_vit_hf.hub.exported_folder import EXPORTED_FILES
from lambda_vit_hf.hub.push import push_folder
from lambda_vit_hf.models.checksums import MANIFEST, write_checksums


@pytest.fixture
def export(tmp_path):
    for name in (*EXPORTED_FILES, "optimizer.pt", "onnx/secret.bin"):
        path = tmp_path / "export" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    write_checksums(tmp_path / "export")
    return tmp_path / "export"


def test_the_files_of_the_layout_are_sent_under_their_paths(export):
    assert set(push_folder(export, "me/model-ONNX", dry_run=True).files) == set(EXPORTED_FILES)


def test_a_half_written_or_damaged_export_is_not_sent(export):
    (export / "onnx" / "model_quantized.onnx").write_text("other", encoding="utf-8")
    with pytest.raises(OSError, match=r"onnx/model_quantized\.onnx: not the content"):
        push_folder(export, "me/model-ONNX", dry_run=True)
    (export / "onnx" / "model_quantized.onnx").unlink()
    with pytest.raises(OSError, match=r"no onnx/model_quantized\.onnx"):
        push_folder(export, "me/model-ONNX", dry_run=True)
    (export / MANIFEST).unlink()
    with pytest.raises(ValueError, match="not finished"):
        push_folder(export, "me/model-ONNX", dry_run=True)
