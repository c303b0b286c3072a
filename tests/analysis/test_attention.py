"""draw_attention: heat maps of real models, in the right place and of the right layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnkit
from attnkit.analysis import draw_attention
from attnkit.analysis.attention import _glance, _lively_place
from attnkit.analysis.sight import Sight
from attnkit.analysis.tracing import unmarked, visits
from attnkit.errors import ConfigError, ShapeError

FAMILIES = ["bigbird_vit_micro", "biformer_micro", "qna_vit_micro", "sparsifiner_micro", "vit_micro"]


def small(name: str, **overrides: object) -> nn.Module:
    return attnkit.build(name, num_classes=3, img_size=32, in_chans=1, **overrides)


def titles(figure) -> list[str]:
    return [axes.get_title("left") for axes in figure.axes]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_drawn(name, tmp_path):
    draw_attention(small(name), torch.randn(1, 32, 32), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_rows_are_the_last_layers_of_the_stages():
    figure = draw_attention(small("bigbird_vit_micro"), torch.randn(1, 1, 32, 32))
    groups = ["conv", "random_window", "pooled_global"]
    assert titles(figure) == ["query, of 8 x 8 tokens", *groups, "query, of 4 x 4 tokens", *groups]
    assert [text.get_text() for text in figure.texts] == ["stages.0.blocks.1", "stages.1.blocks.1"]


def test_a_title_stands_above_everything():
    image = torch.randn(1, 32, 32)
    plain, titled = (draw_attention(small("vit_micro"), image, title=title) for title in ("", "true class 3"))
    assert titled.texts[0].get_text() == "true class 3" and len(titled.texts) == len(plain.texts) + 1
    heights = [figure.get_figheight() for figure in (plain, titled)]
    assert heights[1] > heights[0]
    for one, other in zip(plain.axes, titled.axes, strict=True):
        tops = [axes.get_position().y1 * height for axes, height in zip((one, other), heights, strict=True)]
        assert tops[0] == pytest.approx(tops[1])


def test_layers_of_one_group_share_a_row():
    figure = draw_attention(small("vit_micro"), torch.randn(1, 32, 32))
    assert titles(figure)[1:] == [f"blocks.{at} dense" for at in range(4)]
    assert all("on prefix tokens" in axes.get_xlabel() for axes in figure.axes[1:])


def test_layers_are_chosen_by_name():
    model = small("bigbird_vit_micro")
    figure = draw_attention(model, torch.randn(1, 32, 32), layers=["stages.0.blocks.*.mix"])
    assert [text.get_text() for text in figure.texts] == ["stages.0.blocks.0", "stages.0.blocks.1"]
    with pytest.raises(ConfigError, match="nothing"):
        draw_attention(model, torch.randn(1, 32, 32), layers=["nothing"])


def test_the_heat_is_the_mean_attention_of_the_heads():
    model = small("vit_micro").eval()
    image = torch.randn(1, 1, 32, 32)
    with unmarked(model):
        sight = Sight(visits(model, (image,))[1])
        glance = _glance(sight, (13, 22), (32, 32))
    call = sight.calls[0]
    query = 1 + (13 // 4) * 8 + 22 // 4
    weights = (call.scale * call.k[0] @ call.q[0, :, query, :, None])[..., 0].softmax(-1).mean(0)
    heat = weights[1:].view(8, 8)
    assert torch.allclose(glance.heat, heat / heat.max(), atol=1e-5)
    assert glance.prefix == pytest.approx(weights[0].item(), abs=1e-5)
    assert glance.box == (12, 16, 20, 24)


def test_a_window_holds_all_heat():
    model = small("bigbird_vit_micro").eval()
    with unmarked(model):
        found = visits(model, (torch.randn(1, 1, 32, 32),))
        conv, random_window = (_glance(Sight(visit), (17, 17), (32, 32)).heat for visit in found[:2])
    assert (conv > 0).nonzero().amin(0).tolist() == [3, 3] and (conv > 0).sum() == 9
    assert (random_window > 0).sum() == 16


def test_the_place_is_where_something_is():
    image = torch.zeros(1, 32, 48)
    image[:, 8:14, 30:36] = 1
    row, column = _lively_place(image)
    assert 7 <= row <= 14 and 29 <= column <= 36
    row, column = _lively_place(torch.zeros(1, 9, 9))
    assert (row, column) == (4, 4)


def test_pictures_of_other_shapes_are_shown():
    model = small("vit_micro")
    for picture in (
        torch.rand(32, 32),
        torch.rand(3, 64, 64),
        torch.randint(0, 256, (1, 20, 20)),
        torch.rand(1, 1, 9, 9),
    ):
        draw_attention(model, torch.randn(1, 32, 32), picture=picture)


def test_it_leaves_no_mark():
    model = small("bigbird_vit_micro").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    draw_attention(model, torch.zeros(1, 32, 32))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and all(one.grad is None for one in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "image", "extra", "error", "words"),
    [
        ("vit_micro", torch.zeros(3, 32, 32), {}, ShapeError, r"\(1, H, W\)"),
        ("vit_micro", torch.zeros(2, 1, 32, 32), {}, ShapeError, "one image"),
        ("vit_micro", torch.zeros(1, 32, 32), {"query": (32, 0)}, ShapeError, r"\(32, 0\)"),
        ("vit_micro", torch.zeros(1, 32, 32), {"path": "a.gif"}, ConfigError, "gif"),
        (nn.Conv2d(1, 4, 1), torch.zeros(1, 8, 8), {}, ConfigError, "head mixes"),
        (None, torch.zeros(1, 8, 8), {}, ConfigError, "needs a module"),
    ],
)
def test_mistakes_are_named(model, image, extra, error, words):
    with pytest.raises(error, match=words):
        draw_attention(small(model) if isinstance(model, str) else model, image, **extra)
