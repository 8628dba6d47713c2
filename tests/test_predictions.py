"""Test that the arrays kept for figures are the outputs of the networks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sddlskd.config import Config
from sddlskd.data.device import DeviceData
from sddlskd.training import predictions
from sddlskd.training.build import build_data, build_network
from sddlskd.training.evaluation import evaluate
from sddlskd.training.fit import fit
from tests.tiny import final, tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Config:
    job = tiny(
        tmp_path_factory.mktemp("job"), "tracking.predictions=true", "M=[1,2,4]", "trainer.epochs=1"
    )
    fit([job])
    return job


@pytest.fixture(scope="module")
def data(job: Config) -> DeviceData:
    return build_data(job, CPU)


@pytest.fixture(scope="module")
def kept(job: Config) -> dict[str, np.ndarray]:
    with np.load(Path(job.run_dir, "predictions.npz")) as arrays:
        return dict(arrays)


def network(model: dict[str, object], weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    built = build_network(model, 10, 0, CPU)
    built.load_state_dict(weights)
    return built.eval()


@torch.inference_mode()
def test_they_are_what_the_last_weights_say(
    job: Config, data: DeviceData, kept: dict[str, np.ndarray]
) -> None:
    teacher_file = Path(job.home, "teachers", "fake", "resnet8.pt")
    weights = {
        "": final(job)["model"],
        "teacher_": torch.load(teacher_file, weights_only=True)["model"],
    }
    images, target = (torch.cat(tensors) for tensors in zip(*data.test_batches(), strict=True))
    assert np.array_equal(kept["target"], target)
    assert int(kept["scale"]) == 4
    for prefix, regions in (("", "student_regions"), ("teacher_", "regions")):
        net = network(job.student.model, weights[prefix])
        logit_map, features = net(images), net.features(images)  # type: ignore[operator]
        np.testing.assert_allclose(
            kept[f"{prefix}logits"], logit_map.mean((2, 3)), rtol=2e-3, atol=2e-3
        )
        np.testing.assert_allclose(
            kept[f"{prefix}features"], features.mean((2, 3)), rtol=2e-3, atol=2e-3
        )
        side = logit_map.shape[-1] // 4
        cells = (
            logit_map.unfold(2, side, side).unfold(3, side, side).mean((4, 5)).flatten(2).argmax(1)
        )
        # Rounding may decide a tie the other way.
        assert (kept[regions] == cells.numpy()).mean() > 0.99
    top1 = evaluate(network(job.student.model, weights[""]), data.test_batches())["top1"]
    assert 100 * (kept["logits"].argmax(1) == kept["target"]).mean() == pytest.approx(top1, abs=2)


def test_the_examples_are_images_where_a_region_disagrees(
    job: Config, data: DeviceData, kept: dict[str, np.ndarray]
) -> None:
    whole = kept["teacher_logits"].argmax(1)
    assert 0 < len(kept["sample"]) <= predictions.EXAMPLES
    for index, image in zip(kept["sample"], kept["images"], strict=True):
        assert set(kept["regions"][index]) != {whole[index]}
        assert np.array_equal(image, data.test_images([int(index)])[0])


def test_a_student_alone_has_no_teachers_part(tmp_path: Path) -> None:
    job = tiny(
        tmp_path,
        "tracking.predictions=true",
        "distiller=vanilla",
        "trainer.epochs=1",
        "trainer.max_steps=1",
    )
    fit([job])
    with np.load(Path(job.run_dir, "predictions.npz")) as arrays:
        assert set(arrays) == {"target", "logits", "features"}


def test_none_are_kept_unless_asked_for(tmp_path: Path) -> None:
    job = tiny(tmp_path, "trainer.epochs=1")
    fit([job])
    assert not Path(job.run_dir, "predictions.npz").exists()


def test_few_features_of_many_images() -> None:
    images, target = torch.randn(600, 3, 8, 8), torch.zeros(600, dtype=torch.int64)
    net = build_network({"_target_": "sddlskd.models.create", "name": "resnet8"}, 10, 0, CPU)
    arrays = predictions.collect(net, None, [(images, target)] * 2, [1])
    assert len(arrays["logits"]) == 1200
    assert len(arrays["features"]) == predictions.FEATURES
