"""Dropout drops what it should, keeps the mean, and passes the gradient where it kept."""

import pytest
import torch

from ranking.dropout import Dropout

NUM = 1_000_003  # no multiple of four


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_a_share_is_dropped_and_the_rest_makes_up_for_it(p, dtype):
    torch.manual_seed(0)
    found = Dropout(p)(torch.ones(NUM, dtype=dtype))
    assert found.dtype == dtype
    dropped = (found == 0).float().mean().item()
    assert dropped == pytest.approx(p, abs=5 * (p * (1 - p) / NUM) ** 0.5 + 1 / 65_536)
    values = found.unique()
    assert len(values) == 2
    assert values[1].item() == pytest.approx(1 / (1 - p), rel=0.005 if dtype == torch.bfloat16 else 1e-4)


def test_elements_are_dropped_independently():
    torch.manual_seed(0)
    kept = (Dropout(0.3)(torch.ones(1000, 1001)) > 0).double()
    for step in range(1, 9):  # 64 bits make four elements
        pairs = torch.stack([kept[:, :-step].flatten(), kept[:, step:].flatten()])
        assert abs(torch.corrcoef(pairs)[0, 1].item()) < 5e-3
    assert abs(torch.corrcoef(torch.stack([kept[0], kept[1]]))[0, 1].item()) < 0.2


def test_the_seed_decides():
    x, dropout = torch.ones(3, 7, 5), Dropout(0.5)
    torch.manual_seed(1)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


def test_the_gradient_goes_where_the_value_went():
    x = torch.randn(50, 40, requires_grad=True)
    found = Dropout(0.5)(x)
    found.sum().backward()
    torch.testing.assert_close(x.grad, (found != 0) * 2.0)


def test_layouts_and_sizes():
    dropout = Dropout(0.5)
    turned = torch.ones(6, 4).T
    assert dropout(turned).shape == (4, 6)
    assert dropout(torch.ones(0, 3)).shape == (0, 3)


def test_evaluation_and_the_ends_of_the_range():
    x = torch.randn(9, 9)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert not Dropout(1.0)(x).any()
    for p in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"p is {p}; expected 0 to 1"):
            Dropout(p)
    assert repr(Dropout(0.2)) == "Dropout(p=0.2)"
