"""Every loss of stage one: what each asks of the formulas, and that a model learns by it."""

import dataclasses

import pytest
import torch

from training import retrieval_losses
from training.losses import alignment_loss, bpr_loss, sampled_softmax_loss, uniformity_loss
from training.retrieval_losses import BPR, CosineContrastive, DirectAU, EdgeBatch, SampledSoftmax, UltraGCN

LOSSES = [
    SampledSoftmax(num_negatives=16),
    SampledSoftmax(num_negatives=16, popularity=0.5),
    BPR(),
    DirectAU(),
    CosineContrastive(num_negatives=16, margin=0.4, negative_weight=10),
    UltraGCN(num_negatives=16, negative_weight=1),
]


def batch_of(users, items, user_vectors, item_vectors):
    return EdgeBatch(
        users=users,
        items=items,
        user_vectors=user_vectors,
        item_vectors=item_vectors,
        user_degrees=torch.bincount(users, minlength=len(user_vectors)).float(),
        item_degrees=torch.bincount(items, minlength=len(item_vectors)).float(),
    )


@pytest.fixture
def batch():
    torch.manual_seed(0)
    users, items = torch.tensor([1, 2, 2, 3]), torch.tensor([1, 1, 4, 5])
    vectors = [torch.randn(n, 6, requires_grad=True) for n in (4, 6)]
    return batch_of(users, items, *vectors)


def test_the_list_is_whole():
    kinds = {
        kind
        for kind in vars(retrieval_losses).values()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind is not EdgeBatch
    }
    assert kinds == {type(loss) for loss in LOSSES}


def test_an_item_without_edges_is_no_negative(batch):
    torch.manual_seed(0)
    assert batch.uniform(1000).unique().tolist() == [1, 4, 5]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_two_groups_are_told_apart(loss):
    """Users 1 to 10 touch items 1 to 10, the others the other ten: own items must come first."""
    torch.manual_seed(1)
    users = torch.arange(1, 21).repeat_interleave(5)
    items = (users - 1) // 10 * 10 + torch.randint(1, 11, users.shape)
    vectors = [torch.nn.Parameter(0.3 * torch.randn(21, 8)) for _ in range(2)]
    optimizer = torch.optim.Adam(vectors, lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss(batch_of(users, items, *vectors)).backward()
        assert all(vector.grad is not None and vector.grad.isfinite().all() for vector in vectors)
        assert not vectors[0].grad[0].any()
        optimizer.step()
    directions = [torch.nn.functional.normalize(vector.detach()[1:]) for vector in vectors]
    scores = directions[0] @ directions[1].T
    own = torch.block_diag(torch.ones(10, 10), torch.ones(10, 10)).bool()
    assert scores[own].mean() > scores[~own].mean() + 0.3


def test_sampled_softmax_draws_from_all_items_with_edges(batch):
    torch.manual_seed(5)
    found = SampledSoftmax(num_negatives=50)(batch)
    torch.manual_seed(5)
    negatives = torch.tensor([1, 4, 5])[torch.randint(3, (50,))]
    expected = sampled_softmax_loss(batch.states, batch.item_vectors, batch.items, negatives)
    assert found.item() == pytest.approx(expected.item())


def test_popular_negatives_are_corrected_for(batch):
    """Whatever the draw, the loss is an estimate of the softmax over the items that occur."""
    torch.manual_seed(2)
    occurring = torch.tensor([1, 4, 5])
    expected = sampled_softmax_loss(batch.states, batch.item_vectors, batch.items, occurring)
    for popularity in (0.5, 1.0):
        found = SampledSoftmax(num_negatives=20_000, popularity=popularity)(batch)
        assert found.item() == pytest.approx(expected.item(), rel=0.02)


def test_bpr_by_its_formula(batch):
    torch.manual_seed(3)
    found = BPR()(batch)
    torch.manual_seed(3)
    negatives = batch.item_vectors[torch.tensor([1, 4, 5])[torch.randint(3, (4,))]]
    users = batch.user_vectors[batch.users]
    expected = bpr_loss((users * batch.item_vectors[batch.items]).sum(1), (users * negatives).sum(1))
    assert found.item() == pytest.approx(expected.item())


def test_direct_au_by_its_formula(batch):
    users, items = batch.user_vectors[batch.users], batch.item_vectors[batch.items]
    expected = alignment_loss(users, items) + 2.0 * (uniformity_loss(users) + uniformity_loss(items))
    assert DirectAU(gamma=4.0)(batch).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_last_batch_of_one_edge_has_a_loss(loss, batch):
    one = batch_of(batch.users[:1], batch.items[:1], batch.user_vectors, batch.item_vectors)
    value = loss(one)
    value.backward()
    assert value.isfinite()
    assert batch.item_vectors.grad.isfinite().all()
