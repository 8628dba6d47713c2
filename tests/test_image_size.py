"""Teachers that see the images in a size of their own."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd import config as cfg
from sddlskd.files.checkpoint import read
from sddlskd.models import create
from sddlskd.sweeps.precheck import problems
from sddlskd.training.build import build_data
from sddlskd.training.checks import check_scales
from sddlskd.training.evaluation import evaluate
from sddlskd.training.fit import fit
from sddlskd.training.teacher import Teacher
from sddlskd.training.teacher_files import path_of
from tests.conftest import Compose
from tests.tiny import composed, same_outcome, tiny

CPU = torch.device("cpu")


class Untraceable(nn.Module):
    """A network that torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.network = create("resnet8", num_classes=5)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        map_BKHW: Tensor = self.network(images_BCHW if images_BCHW.sum() else -images_BCHW)
        return map_BKHW


def larger(images_BCHW: Tensor, side: int) -> Tensor:
    return F.interpolate(images_BCHW, (side, side), mode="bilinear", antialias=True)


@pytest.mark.parametrize("side", [8, 16, 40])
@pytest.mark.parametrize("traceable", [True, False])
def test_a_teacher_sees_its_own_size(side: int, traceable: bool) -> None:
    network = create("resnet8", num_classes=5) if traceable else Untraceable()
    images_BCHW = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = network.eval()(larger(images_BCHW, side))
    teacher = Teacher(
        network, None, name="x", device=CPU, precision="fp32", compile=False, image_size=side
    )
    got, taps = teacher(images_BCHW), teacher.taps(images_BCHW)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(taps.logit_map, got)
    if traceable:
        assert taps.stages[0].shape[2:] == (side, side)


def test_the_size_of_the_students_images_changes_nothing(tmp_path: Path) -> None:
    words = ["trainer.epochs=1", f"teacher.cache={tmp_path}/cache", "teacher.cache_dtype=float32"]
    jobs = [tiny(tmp_path, *words), tiny(tmp_path, *words, "teacher.image_size=16")]
    assert len({cfg.config_hash(job) for job in jobs}) == 2
    assert len({cfg.sharing_key(job) for job in jobs}) == 2
    for job in jobs:
        fit([job])
    assert same_outcome(*jobs)
    # Maps of one size are not read for another.
    assert len(list((tmp_path / "cache").glob("*.maps"))) == 2


def test_a_student_learns_the_inner_maps_of_a_teacher_that_sees_more(tmp_path: Path) -> None:
    job = tiny(tmp_path, "trainer.epochs=1", "teacher.image_size=32", "recipe=at",
               "tracking.predictions=true")  # fmt: skip
    (result,) = fit([job])
    assert result["status"] == "FINISHED"
    network = create("resnet8", num_classes=10).eval()
    network.load_state_dict(read(path_of(job.home, "fake", "resnet8"))["model"])
    data = build_data(job, CPU)
    seen = evaluate(lambda images: network(larger(images, 32)), data.test_batches())
    assert result["teacher_top1"] == seen["top1"]
    assert Path(job.run_dir, "predictions.npz").exists()


def test_scales_that_are_too_fine_come_with_what_would_fit(tmp_path: Path) -> None:
    words = ("dataset=image_folder", "dataset.num_classes=2", "dataset.size=32", "M=[1,2,4]")
    with pytest.raises(ValueError, match=r"; set M=\[1,2\], or dataset\.size=64, or choose a"):
        check_scales(composed(tmp_path, *words), {"student=a": (1, 1)}, (3, 32, 32))


def test_the_scales_must_fit_the_map_of_the_resized_images(tmp_path: Path) -> None:
    fits = tiny(tmp_path, "M=[8]")
    assert problems([fits]) == []
    ((_, reason),) = problems([tiny(tmp_path, "M=[8]", "teacher.image_size=8")])
    assert reason.startswith(
        "M=[8] is too fine: the largest scale here is 4, because the logit map of teacher=resnet8 "
        "has 2x2 places for images of 16x16 pixels, and twice its side is the limit (scales above "
        "the side repeat places); set M=[1], or choose a network whose"
    )
    # The side of the smaller map counts, and twice that side is still allowed.
    assert problems([tiny(tmp_path, "M=[1,4]", "teacher.image_size=8")]) == []
    with pytest.raises(ValueError, match="the largest scale here is 4"):
        fit([tiny(tmp_path, "M=[8]", "teacher.image_size=8")])


def test_each_of_several_teachers_has_its_size(compose: Compose) -> None:
    words = ["teacher.image_size=64", "more_teachers.resnet14.image_size=48"]
    job = compose("teacher=[resnet8,resnet14,vgg8]", *words)
    assert [one.teacher.image_size for one in cfg.each_teacher(job)] == [64, 48, None]
