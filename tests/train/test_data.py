"""What is trained on, and what is wrong with folders that cannot be."""

from __future__ import annotations

import re

import numpy
import pytest
import torch
from PIL import Image

from attnkit.errors import ConfigError, DataError
from attnkit_models.train.augment import Augmentation
from attnkit_models.train.data import digits, stratified_split
from attnkit_models.train.folder import image_folder
from attnkit_models.train.images import read_image
from attnkit_models.train.order import EpochOrder

SIZE = (16, 16)


def test_digits_are_split_the_same_way_every_time_with_all_classes_alike():
    data = digits((32, 32))
    assert len(data.train) == 1437 and len(data.val) == 360
    assert data.classes == tuple("0123456789")
    assert data.train.pixels.shape == (1437, 1, 32, 32) and data.train.pixels.dtype == torch.uint8
    shares = torch.bincount(data.val.labels) / (torch.bincount(data.train.labels) + torch.bincount(data.val.labels))
    assert (shares - 0.2).abs().max() < 0.01
    normal = data.preprocess.normalise(data.train.pixels.double() / 255)
    assert abs(normal.mean()) < 1e-4 and abs(normal.std() - 1) < 1e-4
    assert digits((32, 32)).fingerprint == data.fingerprint != digits((16, 16)).fingerprint
    with pytest.raises(ConfigError, match="in_chans=3: the digits are grey images with 1 channel"):
        digits((32, 32), 3)


@pytest.mark.parametrize("counts", [(2, 2), (3, 40, 5), (10,) * 7, (1000, 2)])
def test_split_keeps_every_class_in_both_parts(counts):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    train, val = stratified_split(labels)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(len(labels)))
    for part in (train, val):
        assert torch.bincount(labels[part], minlength=len(counts)).min() >= 1
    assert abs(len(val) - 0.2 * len(labels)) <= len(counts)


def test_a_folder_of_class_folders(make_folder):
    root = make_folder(dog=10, cat=5)
    (root / "dog" / "notes.txt").write_text("not an image")
    data = image_folder(root, SIZE)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.val)) == (12, 3)
    assert data.train.pixels.shape == (12, 3, 16, 16)
    assert data.notes == (f"ignored 1 file that is no image by its name: {root}/dog/notes.txt",)
    (root / "dog" / "more.txt").write_text("not an image")
    assert image_folder(root, SIZE).notes == (
        f"ignored 2 files that are no images by their names, such as {root}/dog/more.txt",
    )
    grey = image_folder(root, (8, 24), 1)
    assert grey.train.pixels.shape == (12, 1, 8, 24) and len(grey.preprocess.mean) == 1


def test_a_folder_with_its_own_test_part(make_folder):
    make_folder("data/train", cat=3, dog=4)
    root = make_folder("data/test", dog=2).parent
    data = image_folder(root, SIZE)
    assert (len(data.train), len(data.val)) == (7, 2)
    assert data.val.labels.tolist() == [1, 1]
    assert any("no images of cat" in note for note in data.notes)


def test_reading_on_use_gives_what_the_cache_gives(make_folder, monkeypatch):
    root = make_folder(cat=5, dog=5)
    cached = image_folder(root, SIZE)
    monkeypatch.setattr("attnkit_models.train.folder.CACHE_BYTES", 0)
    lazy = image_folder(root, SIZE)
    assert lazy.train.pixels is None and lazy.preprocess == cached.preprocess
    for name, value in cached.train.__getitems__([5, 0, 3]).items():
        assert torch.equal(lazy.train.__getitems__([5, 0, 3])[name], value)


def broken(root, kind, name="broken.png"):
    path = root / "cat" / name
    if kind == "truncated":
        content = (root / "cat" / "0.png").read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "no image":
        path.write_text("hello")
    elif kind == "empty":
        path.write_bytes(b"")
    return path


@pytest.mark.parametrize("kind", ["truncated", "no image", "empty"])
def test_a_bad_image_is_named_or_skipped(make_folder, kind):
    root = make_folder(cat=5, dog=5)
    path = broken(root, kind)
    with pytest.raises(DataError, match=re.escape(str(path)) + r".*--skip-bad"):
        image_folder(root, SIZE)
    data = image_folder(root, SIZE, skip_bad=True)
    assert len(data.train) + len(data.val) == 10
    assert any("skipped 1 of 11 images" in note and str(path) in note for note in data.notes)


def test_skipping_must_leave_enough_images(make_folder):
    root = make_folder(cat=1, dog=5)
    broken(root, "empty")
    with pytest.raises(
        DataError, match="cat has 1 readable image; it needs at least 2, one to train on and one to test"
    ):
        image_folder(root, SIZE, skip_bad=True)


def test_folders_that_cannot_be_trained_on(make_folder, tmp_path):
    def message(root):
        with pytest.raises(DataError) as caught:
            image_folder(root, SIZE)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "nowhere")
    assert "is empty" in message(make_folder("empty"))
    loose = make_folder("loose")
    Image.new("RGB", (4, 4)).save(loose / "a.png")
    assert "holds 1 image but no class folders" in message(loose)
    assert "only the class folder cat" in message(make_folder("one", cat=3))
    assert re.search(r"class folder \S*/dog holds no image", message(make_folder("hollow", cat=3, dog=0)))
    make_folder("unseen/train", cat=3, dog=3)
    unseen = make_folder("unseen/val", cat=1, dog=1, zebra=2).parent
    assert re.search(r"val has the class 'zebra' \(2 images\) that \S*train does not have", message(unseen))
    alone = make_folder("alone/train", cat=3, dog=3).parent
    assert re.search(r"train has no \S*/val or \S*/test beside it", message(alone))
    with pytest.raises(ConfigError, match="in_chans=4: image files are read with 3 channels"):
        image_folder(make_folder("rgba", cat=3, dog=3), SIZE, 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_images_of_any_mode(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        Image.fromarray(numpy.full((6, 9), 65535, dtype=numpy.uint16)).save(path)
    else:
        Image.new("RGB", (9, 6), "white").convert(mode).save(path)
    for channels in (1, 3):
        pixels = read_image(path, (4, 5), channels)
        assert pixels.shape == (channels, 4, 5)
        assert pixels.min() >= 250


def test_pixels_that_fit_no_scale(tmp_path):
    Image.fromarray(numpy.ones((4, 4), dtype=numpy.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="floating-point pixels"):
        read_image(tmp_path / "a.tif", SIZE, 1)
    Image.fromarray(numpy.full((4, 4), 100_000, dtype=numpy.int32)).save(tmp_path / "b.tif")
    with pytest.raises(DataError, match="pixel values 100000 to 100000"):
        read_image(tmp_path / "b.tif", SIZE, 1)
    with pytest.raises(DataError, match="there is no image file"):
        read_image(tmp_path / "none.png", SIZE, 1)


AUGMENTATION = Augmentation(degrees=10, shift=0.1, zoom=0.1, mirror=True, border="zeros")


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    images = torch.rand(6, 1, 12, 20)
    index = torch.tensor([4, 0, 9, 2, 7, 1])
    varied = AUGMENTATION(images, index, count=10, seed=1, epoch=3)
    alone = AUGMENTATION(images[2:3], index[2:3], count=10, seed=1, epoch=3)
    torch.testing.assert_close(alone, varied[2:3])
    assert not torch.equal(varied, AUGMENTATION(images, index, count=10, seed=1, epoch=4))
    assert not torch.equal(varied, AUGMENTATION(images, index, count=10, seed=2, epoch=3))


def test_augmentation_without_amounts_changes_nothing():
    none = Augmentation(degrees=0, shift=0, zoom=0, mirror=False, border="reflection")
    images = torch.rand(3, 3, 9, 14)
    torch.testing.assert_close(none(images, torch.arange(3), count=3, seed=0, epoch=0), images)


def test_turning_keeps_shapes_in_images_of_any_aspect():
    # A disc stays a disc only if the turn is one in pixels, not in relative coordinates.
    rows, columns = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(121.0) - 60, indexing="ij")
    disc = ((rows**2 + columns**2) < 15**2).float()[None, None]
    turn = Augmentation(degrees=80, shift=0, zoom=0, mirror=True, border="zeros")
    for epoch in range(4):
        turned = turn(disc, torch.zeros(1, dtype=torch.long), count=1, seed=0, epoch=epoch)
        assert (turned - disc).abs().mean() < 0.01


def test_order_is_a_shuffle_that_epochs_change():
    order = EpochOrder(20, seed=5, group=8)
    assert len(order) == 16 and len(list(order)) == 16
    first = list(order)
    assert list(order) == first and len(set(first)) == 16
    order.set_epoch(1)
    assert list(order) != first
    assert len(EpochOrder(5, seed=0, group=8)) == 5
