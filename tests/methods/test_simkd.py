"""SimKD: the student that ends in the teacher's head is trained, evaluated and exported."""

from pathlib import Path

import pytest
import torch
from torch import nn

from sddlskd import evaluate, export
from sddlskd.config import Config
from sddlskd.files import checkpoint
from sddlskd.methods import Taps, create
from sddlskd.methods.simkd import SimKD, WithTeacherHead
from sddlskd.models import create as create_network
from sddlskd.sweeps.precheck import problems
from sddlskd.training.features import rebuild_student
from sddlskd.training.fit import fit
from sddlskd.training.measure import measure
from tests.methods.drawn import STUDENT, TEACHER, batch, taps
from tests.tiny import Net, leave_teacher, net, rows, tiny

JOB = ("recipe=simkd", "student=wrn_16_1", "trainer.epochs=1", "optimizer.lr=0.01")
DATA = ("+dataset.load.train=192", "+dataset.load.test=64", "+dataset.load.size=16", "trainer=cpu")


def test_loss_by_hand() -> None:
    student, teacher = taps(STUDENT, images=1), taps(TEACHER, images=1)
    student = student._replace(last=torch.tensor([[[[1.0]], [[5.0]]]]))
    teacher = teacher._replace(last=torch.tensor([[[[0.0, 1.0], [2.0, 5.0]], [[4.0] * 2] * 2]]))
    # The teacher's map is pooled to (2, 4): (1 + 1) / 2.
    assert create("simkd", student, teacher)(student, teacher, batch(1)).item() == 1.0


def wrapped(**options: int) -> tuple[WithTeacherHead, nn.Module]:
    student, teacher = create_network("resnet8", 10), create_network("resnet8x4", 10)
    network = SimKD.student_network(
        student, teacher.eval(), student.eval().taps(torch.zeros(2, 3, 32, 32)), **options
    )
    assert isinstance(network, WithTeacherHead)
    return network.eval(), teacher


def test_the_network_projects_the_last_stage_for_the_teachers_head() -> None:
    network, teacher = wrapped()
    x_BCHW = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        shown = network.taps(x_BCHW)
        assert shown.last is not None
        assert shown.last.shape == (2, 256, 4, 4)
        torch.testing.assert_close(shown.last, network.transfer(shown.stages[-1]))
        torch.testing.assert_close(network(x_BCHW).mean((2, 3)), teacher.fc(shown.pooled))
        assert torch.equal(shown.logit_map, network(x_BCHW))
        assert torch.equal(shown.last, network.features(x_BCHW))
    assert network.transfer[3].weight.shape == (128, 128, 3, 3)
    assert wrapped(factor=4)[0].transfer[3].weight.shape == (64, 64, 3, 3)
    assert network.head is not teacher.fc
    assert not any(parameter.requires_grad for parameter in network.head.parameters())
    assert all(parameter.requires_grad for parameter in network.transfer.parameters())


def test_what_is_refused() -> None:
    resnet, other = create_network("resnet8", 10), Net(10)
    shown = resnet.taps(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match="the teacher, a Net, is no network with a linear head"):
        SimKD.student_network(resnet, other, shown)
    with pytest.raises(ValueError, match="the student, a Net, is no network with a linear head"):
        SimKD.student_network(other, resnet, shown)
    with pytest.raises(ValueError, match=r"factor=65 does not fit .* 64 channels; give 1..64"):
        SimKD.student_network(resnet, resnet, shown, factor=65)
    with pytest.raises(ValueError, match="the student has no taps, which SimKD needs"):
        create("simkd", Taps.of_map(torch.zeros(2, 3, 1, 1)), taps(TEACHER))


def test_precheck_and_fit_refuse_alike(tmp_path: Path) -> None:
    job = tiny(tmp_path, *JOB, model=net())
    ((_, reason),) = problems([job])
    assert reason.startswith("features=simkd cannot serve teacher=resnet8 and student=wrn_16_1: ")
    with pytest.raises(ValueError, match="the student, a Net, is no network") as raised:
        fit([job])
    assert reason == str(raised.value)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Config:
    # With a large weight decay, which must leave the head as it is.
    home = tmp_path_factory.mktemp("simkd")
    job = tiny(home, *JOB, "optimizer.algorithm.weight_decay=0.5")
    assert problems([job]) == []
    fit([job])
    return job


def test_the_teachers_head_stays_as_it_is(job: Config) -> None:
    teacher = checkpoint.read_weights(leave_teacher(Path(job.home)))
    for name in ("best", "last"):
        state = checkpoint.read(Path(job.run_dir, f"{name}.ckpt"))["model"]
        assert torch.equal(state["teacher_head.weight"], teacher["fc.weight"])
        assert torch.equal(state["teacher_head.bias"], teacher["fc.bias"])
    last = checkpoint.read(Path(job.run_dir, "last.ckpt"))
    trained = [name for name in last["model"] if "running" not in name and "num_b" not in name]
    assert len(last["optimizer"]["param_groups"][0]["params"]) == len(trained) - 2
    assert last["methods"] == {}
    assert rows(job)[-1]["train/loss"] == pytest.approx(rows(job)[-1]["train/loss_simkd"])


def test_a_finished_run_is_evaluated_and_exported_without_the_teachers_file(
    job: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    best = Path(job.run_dir, "best.ckpt")
    top1 = checkpoint.read(best)["top1"]
    found = measure(job, best)
    assert found["top1"] == pytest.approx(top1)

    path = leave_teacher(Path(job.home))
    path.rename(path.with_suffix(".away"))
    export.main([job.run_dir])
    exported = Path(capsys.readouterr().out.strip())
    shown = evaluate._job_and_weights(exported, ["dataset.num_classes=10", *DATA])
    assert measure(*shown)["top1"] == pytest.approx(top1)
    # With another teacher to compare with, the head is still that of the run's teacher.
    _, _, trained = evaluate._job_and_weights(Path(job.run_dir), ["teacher=resnet20"])
    assert trained.teacher.name == "resnet8"
    network = rebuild_student(trained, torch.device("cpu"))
    checkpoint.load_weights(network, best, "wrn_16_1")
