"""The subset has the images of the whole, each with its own label."""

import numpy as np

from benchmarks.fashion_mnist_subset import main
from lambda_vit_hf.data.folders import load_image_dataset


def write(folder, name, images, labels):
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
        (folder / f"{name}-{kind}-ubyte").write_bytes(header + values.tobytes())


def test_a_subset_keeps_images_with_their_labels(tmp_path):
    (tmp_path / "whole").mkdir()
    for name, size in (("train", 40), ("t10k", 20)):
        labels = (np.arange(size) % 10).astype(np.uint8)
        write(tmp_path / "whole", name, np.broadcast_to(labels[:, None, None] * 20, (size, 4, 4)).copy(), labels)
    main([str(tmp_path / "whole"), str(tmp_path / "part"), "--num_train", "30", "--num_test", "15"])
    part = load_image_dataset(directory=tmp_path / "part")
    assert {split: len(images) for split, images in part.items()} == {"train": 30, "validation": 15}
    for images in part.values():
        assert [np.asarray(image).max() // 20 for image in images["image"]] == images["label"]
