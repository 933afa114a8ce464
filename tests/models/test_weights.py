"""A model that takes over weights is the one that was built for real, down to its buffers."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from navit_clip.models.patch_embed import PatchEmbed
from navit_clip.models.position import PositionConfig, build_position
from navit_clip.models.weights import build_with


class Own(nn.Module):
    """Of a task of one's own, with a buffer as anyone makes one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("steps", torch.arange(3.0), persistent=False)


class Asking(Own):
    """Asks for the value of a tensor."""

    def __init__(self):
        super().__init__()
        self.rates = torch.linspace(0, 0.1, 3).tolist()


class Keeping(Own):
    """Keeps a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        del self.steps
        self.places = torch.arange(3.0)


MODULES = {
    "patches": lambda: PatchEmbed(4, 8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), bias=True),
    "sinusoids": lambda: build_position(PositionConfig(embedding="sinusoidal"), 12),
    "a table": lambda: build_position(PositionConfig(), 12),
    "one's own": Own,
    "one's own, asking": Asking,
    "one's own, keeping": Keeping,
}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_differs_from_one_that_was_built(name):
    torch.manual_seed(0)
    built = MODULES[name]()
    weights, state = built.state_dict(), torch.get_rng_state()
    found = build_with(MODULES[name], weights)
    assert torch.equal(torch.get_rng_state(), state)
    for parts in ("named_parameters", "named_buffers"):
        one, other = dict(getattr(found, parts)()), dict(getattr(built, parts)())
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            assert tensor.device == other[key].device
            assert torch.equal(tensor, other[key])
    assert all(p.data_ptr() == weights[n].data_ptr() for n, p in found.named_parameters())
    assert found.state_dict().keys() == weights.keys()
    assert not any(value.is_meta for value in vars(found).values() if torch.is_tensor(value))


@pytest.mark.parametrize("names", [("patches", "sinusoids"), ("patches", "one's own")])
def test_all_of_it_is_where_the_weights_are(names):
    def build():
        return nn.ModuleList(MODULES[name]() for name in names)

    shapes = {key: value.shape for key, value in build().state_dict().items()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {key: torch.empty(shape, device="cuda") for key, shape in shapes.items()}
        found = build_with(build, weights)
    assert len(list(found.buffers())) > 2
    assert all(value.is_cuda for value in (*found.parameters(), *found.buffers()))


@pytest.mark.parametrize("name", [name for name in MODULES if "own" not in name])
def test_no_random_weights_are_made(name, monkeypatch):
    weights = MODULES[name]().state_dict()

    def refuse(tensor, *args, **kwargs):
        assert tensor.is_meta
        return tensor

    for init in ("xavier_uniform_", "normal_", "kaiming_uniform_", "trunc_normal_"):
        monkeypatch.setattr(nn.init, init, refuse)
    build_with(MODULES[name], weights)


def test_weights_of_another_model_are_refused():
    with pytest.raises(RuntimeError, match="Missing key"):
        build_with(Own, {})
