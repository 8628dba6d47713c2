"""Test what is counted of a network: its parameters and its operations."""

import pytest
import torch
from torch import nn

from sddlskd.models import create
from sddlskd.training.size import size_of


def test_a_convolution_and_a_product_are_counted_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten())
    network.append(nn.Linear(8 * 16, 10, bias=False))
    found = size_of(network, (3, 4, 4))
    assert found["parameters"] == 3 * 8 * 9 + 8 * 16 * 10
    assert found["flops"] == 2 * (3 * 8 * 9 * 16 + 8 * 16 * 10)


# Millions of parameters, from RepDistiller's and mdistiller's networks (architectures.md).
@pytest.mark.parametrize(("name", "millions"), [("resnet8x4", 1.23), ("resnet32x4", 7.43)])
def test_networks_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    found = size_of(create(name, num_classes=100), (3, 32, 32))
    assert found["parameters"] / 1e6 == pytest.approx(millions, abs=0.01)
    assert found["flops"] > 100 * found["parameters"]


def test_counting_changes_neither_the_network_nor_the_generators() -> None:
    network = create("resnet8", num_classes=10).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = torch.get_rng_state()
    size_of(network, (3, 32, 32))
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


class Odd(nn.Module):
    """A network of somebody else that refuses tensors without values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.device.type in ("cpu", "cuda")
        return x


class Draws(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn(1)


def test_no_run_ends_because_its_network_cannot_be_counted() -> None:
    assert size_of(Odd(), (3, 4, 4)) == {"parameters": 0}
    assert size_of(nn.LazyConv2d(4, 3), (3, 4, 4)) == {}


def test_hooks_and_generators_notice_nothing() -> None:
    seen: list[str] = []
    network = nn.Conv2d(3, 4, 3)
    network.register_forward_hook(lambda *arguments: seen.append("called"))
    size_of(network, (3, 4, 4))
    assert seen == []
    state = torch.get_rng_state()
    size_of(Draws(), (3, 4, 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_that_needs_values_has_parameters_alone() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.sum()) * self.scale.sum()

    assert size_of(Reads(), (3, 4, 4)) == {"parameters": 2}
