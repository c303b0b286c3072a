"""Any image size at call time, whatever size the model was built for."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit.errors import ShapeError

SIZES = [(1, 1), (5, 7), (33, 64), (64, 33), (32, 32), (96, 40)]


@pytest.mark.parametrize("size", SIZES)
def test_micro_models_take_any_size(micro, images, size):
    x = images(2, 1, *size)
    with torch.no_grad():
        logits = micro(x)
        features, maps = micro.forward_intermediates(x)
    assert logits.shape == (2, 10) and logits.isfinite().all()
    assert all(image.isfinite().all() for image in (features, *maps))
    for image, level in zip(maps, micro.feature_info, strict=True):
        assert image.shape[2:] == tuple(-(-side // level["reduction"]) for side in size)


@pytest.mark.parametrize("size", [(1, 1), (40, 72)])
def test_every_recipe_takes_any_size(model, images, size):
    with torch.no_grad():
        logits = model(images(1, 3, *size))
    assert logits.shape == (1, 5) and logits.isfinite().all()


def test_images_of_a_batch_do_not_meet(micro, images):
    x = images(3, 1, 33, 40)
    with torch.no_grad():
        together = micro(x)
        alone = torch.cat([micro(one[None]) for one in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_no_images_give_no_logits(micro):
    assert micro(torch.zeros(0, 1, 32, 32)).shape == (0, 10)


@pytest.mark.parametrize("name", attnkit.list_models("*_micro"))
def test_built_for_another_size(name, images):
    model = attnkit.build(name, img_size=(48, 80), num_classes=3).eval()
    assert model(images(1, 3, 48, 80)).shape == model(images(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(1, 4, 32, 32), "in_chans"),
        (torch.zeros(1, 32, 32, 1), "(B, 1, H, W)"),
        (torch.zeros(1, 32, 32), "(1, 32, 32)"),
        (torch.zeros(32, 32), "(32, 32)"),
        (torch.zeros(1, 1, 0, 32), "1 x 1 pixels"),
        (torch.zeros(1, 1, 32, 0), "1 x 1 pixels"),
        (torch.zeros(1, 1, 32, 32, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(1, 1, 32, 32, dtype=torch.int64), "torch.int64"),
        (torch.zeros(1, 1, 32, 32, dtype=torch.bool), "torch.bool"),
        (torch.zeros(1, 1, 32, 32, dtype=torch.complex64), "torch.complex64"),
    ],
)
def test_images_that_do_not_fit(micro, x, says):
    for run in (micro, micro.forward_features, micro.forward_intermediates):
        with pytest.raises(ShapeError) as caught:
            run(x)
        assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("x", [None, [[1.0]], 3, "a" * 10_000])
def test_what_is_no_image_at_all(x):
    with pytest.raises(ShapeError, match="images") as caught:
        attnkit.build("vit_micro")(x)
    assert len(str(caught.value)) < 300


def test_images_of_another_precision_than_the_weights():
    with pytest.raises(ShapeError, match="float64"):
        attnkit.build("vit_micro", in_chans=1)(torch.zeros(1, 1, 32, 32, dtype=torch.float64))
    # The meta device has no autocast to ask for.
    with pytest.raises(ShapeError, match="float64"):
        attnkit.build("vit_micro", in_chans=1).to("meta")(torch.zeros(1, 1, 32, 32, dtype=torch.float64, device="meta"))
    double = attnkit.build("vit_micro", in_chans=1).double()
    assert double(torch.zeros(1, 1, 32, 32, dtype=torch.float64)).dtype == torch.float64
