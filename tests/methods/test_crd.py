"""CRD against loops over images and negatives, and the draw of its negatives."""

import pytest
import torch
from torch import Tensor

from sddlskd.methods import Taps, create
from sddlskd.methods.crd import CRD
from tests.methods.drawn import STUDENT, TEACHER, assert_same, batch, detached, taps

LABELS_N = torch.arange(20) % 3  # as the labels of `batch`
T, MOMENTUM, K = 0.5, 0.25, 8


def crd(student: Taps, teacher: Taps, **options: object) -> CRD:
    torch.manual_seed(0)
    settings = {"labels_N": LABELS_N, "num_classes": 3, "seed": 4, "dim": 3, "K": K} | options
    method = create("crd", student, teacher, **settings).double()
    assert isinstance(method, CRD)
    return method


def pair() -> tuple[Taps, Taps]:
    return taps(STUDENT, 6, seed=1), taps(TEACHER, 9, seed=2)


def embedded(method: CRD, student: Taps, teacher: Taps) -> list[Tensor]:
    vectors = []
    for embed, shown in ((method.embed_s, student), (method.embed_t, teacher)):
        linear = embed.linear
        x_BD = shown.pooled @ linear.weight.T + linear.bias
        vectors.append(x_BD / (x_BD**2).sum(1, keepdim=True) ** 0.5)
    return vectors


def naive(
    method: CRD, student: Taps, teacher: Taps, epoch: int = 1, z: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and the two normalisers; `z` are those of an earlier batch."""
    N = len(LABELS_N)
    images = len(student.pooled)
    vectors = embedded(method, student, detached(teacher))
    memories = [method.memory_t.clone(), method.memory_s.clone()]
    negatives_BK = method.negatives(batch(images, epoch=epoch))
    loss, found = torch.zeros((), dtype=torch.float64), []
    for side, (v_BD, memory_ND) in enumerate(zip(vectors, memories, strict=True)):
        scores = [
            [torch.exp((memory_ND[n] * v_BD[b]).sum() / T) for n in [b, *negatives_BK[b].tolist()]]
            for b in range(images)
        ]
        mean = sum(sum(row) for row in scores) / (images * (K + 1))
        found.append((mean * N).detach() if z is None else z[side])
        for row in scores:
            q = [score / found[side] for score in row]
            loss = loss - torch.log(q[0] / (q[0] + K / N + 1e-7)) / images
            for other in q[1:]:
                loss = loss - torch.log(K / N / (other + K / N + 1e-7)) / images
    return loss, found


def test_loss_gradients_and_memories() -> None:
    student, teacher = pair()
    method = crd(student, teacher, temperature=T, momentum=MOMENTUM)
    expected, z = naive(method, student, teacher)
    before = method.memory_s.clone(), method.memory_t.clone()
    vectors = embedded(method, student, teacher)
    assert_same(method, expected, student, teacher)
    torch.testing.assert_close([method.z_s, method.z_t], z)
    for old_ND, new_ND, v_BD in zip(
        before, (method.memory_s, method.memory_t), vectors, strict=True
    ):
        assert torch.equal(new_ND[5:], old_ND[5:])  # images that were not in the batch
        mixed_BD = MOMENTUM * old_ND[:5] + (1 - MOMENTUM) * v_BD
        torch.testing.assert_close(new_ND[:5], mixed_BD / mixed_BD.norm(dim=1, keepdim=True))
        assert not new_ND.requires_grad

    # The normalisers are those of the first batch; the negatives are those of the epoch.
    student, teacher = taps(STUDENT, 6, seed=3, images=2), taps(TEACHER, 9, seed=4, images=2)
    expected, _ = naive(method, student, teacher, epoch=7, z=z)
    loss = method(student, detached(teacher), batch(2, epoch=7))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close([method.z_s, method.z_t], z)


def test_negatives_are_of_other_classes_and_differ() -> None:
    method = crd(*pair(), K=13)  # as many as class 0, the largest with 7 images, leaves
    whole = method.negatives(batch(20))
    for image, row in enumerate(whole):
        assert len(row.unique()) == 13
        assert (LABELS_N[row] != LABELS_N[image]).all()
    part = batch(20)._replace(index=torch.tensor([9, 2]), labels=LABELS_N[[9, 2]])
    assert torch.equal(method.negatives(part), whole[[9, 2]])
    torch.manual_seed(99)
    assert torch.equal(method.negatives(batch(20)), whole)
    assert not torch.equal(method.negatives(batch(20, epoch=2)), whole)
    assert not torch.equal(crd(*pair(), K=13, seed=5).negatives(batch(20)), whole)


def test_negatives_with_replacement() -> None:
    method = crd(*pair(), K=4000, replacement=True)
    for image, row in enumerate(method.negatives(batch(3))):
        counts = torch.bincount(row, minlength=20)
        others = LABELS_N[image] != LABELS_N
        assert (counts[~others] == 0).all()
        assert (counts[others] - 4000 / others.sum()).abs().max() < 90  # 5 deviations


def test_state_holds_memories_and_normalisers_alone() -> None:
    state = crd(*pair()).state_dict()
    assert {name for name in state if "embed" not in name} == {"memory_s", "memory_t", "z_s", "z_t"}
    assert state["embed_s.linear.weight"].shape == (3, 6)
    bound = 1.0  # sqrt(3 / dim)
    assert 0.8 < state["memory_t"].abs().max() <= bound


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"K": 14}, "K=14 is more than the 13 training images of other classes"),
        ({"labels_N": torch.ones(9, dtype=torch.int64)}, "all training images are of one class"),
    ],
)
def test_what_is_refused(options: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        crd(*pair(), **options)
    with pytest.raises(ValueError, match="the teacher has no taps, which CRD needs"):
        crd(taps(STUDENT), Taps.of_map(torch.zeros(2, 3, 1, 1)))
