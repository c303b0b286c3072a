"""State: saved, loaded, copied, pickled, resumed."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import attnkit


def test_a_state_dict_round_trips(model, images):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = attnkit.build(model.config.to_dict()).eval()
    result = twin.load_state_dict(torch.load(file, weights_only=True))
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(twin(images()), model(images()))


def test_safetensors_round_trip(micro, images, tmp_path):
    save_file(micro.state_dict(), tmp_path / "model.safetensors")
    twin = attnkit.build(micro.config.to_dict()).eval()
    twin.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = images(2, 1, 32, 32)
    assert torch.equal(twin(x), micro(x))


def test_a_copy_and_a_pickle_are_the_model(micro, images):
    x = images(2, 1, 32, 32)
    expected = micro(x)
    for twin in (copy.deepcopy(micro), pickle.loads(pickle.dumps(micro))):
        assert torch.equal(twin(x), expected)
        assert twin.config == micro.config


def test_the_same_seed_builds_the_same_model(micro):
    twins = []
    for _ in range(2):
        torch.manual_seed(5)
        twins.append(attnkit.build(micro.config).state_dict())
    torch.testing.assert_close(twins[0], twins[1], rtol=0, atol=0)


def trained(model: torch.nn.Module, x: torch.Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(x.roll(step, 3)), torch.tensor([1, 4]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", attnkit.list_models("*_micro"))
def test_training_resumed_from_a_state_dict_goes_on_exactly(name, images):
    x = images(height=32, width=32)
    model = attnkit.build(name, num_classes=5)
    trained(model, x, 2)
    state = copy.deepcopy(model.state_dict())
    expected = trained(model, x, 2)
    resumed = attnkit.build(name, num_classes=5)
    resumed.load_state_dict(state)
    assert trained(resumed, x, 2) == expected
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_number_of_draws_is_part_of_the_state(images):
    x = images(height=32, width=32)
    bird = attnkit.build("bigbird_vit_micro").train()
    with torch.no_grad():
        first, second = bird(x), bird(x)
        for name, draws in bird.named_buffers():
            assert name.endswith("draws") and int(draws) == 2
            draws.zero_()
        again = [bird(x), bird(x)]
    assert not torch.equal(first, second)
    torch.testing.assert_close(again, [first, second], rtol=0, atol=0)


def test_evaluation_depends_on_the_seed_and_not_on_what_was_trained_before(images):
    x = images(height=32, width=32)
    bird = attnkit.build("bigbird_vit_micro")
    fresh = bird.eval()(x)
    with torch.no_grad():
        bird.train()(x)
    assert torch.equal(bird.eval()(x), fresh)
    other = attnkit.build("bigbird_vit_micro", **{"stages[*].mix.groups[1].seed": 1}).eval()
    other.load_state_dict(bird.state_dict())
    assert not torch.equal(other(x), fresh)
