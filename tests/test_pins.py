"""Test the lock file of teachers."""

import json
import multiprocessing
from pathlib import Path

import pytest

from sddlskd.training.teacher_files import check_pin, lock_path, pin, pin_key, pinned

OLD, NEW = "a" * 64, "b" * 64


def test_the_first_use_pins_and_another_file_is_refused(tmp_path: Path) -> None:
    home, key = str(tmp_path), pin_key("cifar100", "resnet56")
    assert not check_pin(home, key, OLD)
    pin(home, key, OLD, "http://place/x")
    assert check_pin(home, key, OLD)
    pin(home, key, OLD, "http://elsewhere/x")  # the same file from another address is accepted
    assert pinned(home)[key]["source"] == "http://place/x"
    before = lock_path(home).read_bytes()
    for use in (lambda: check_pin(home, key, NEW), lambda: pin(home, key, NEW, "http://place/x")):
        with pytest.raises(
            ValueError, match=r"cifar100/resnet56 has changed: .*http://place/x.*remove the entry"
        ) as error:
            use()
        assert str(lock_path(home)) in str(error.value)
    assert lock_path(home).read_bytes() == before
    assert not check_pin(home, "cifar100/other", NEW)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"pins": []}', '{"pins": {"a": 1}}',
                                     '{"pins": {"a": {}}}',
                                     '{"pins": {"a": {"sha256": 1, "source": "x"}}}',
                                     "\xff"])  # fmt: skip
def test_a_damaged_lock_file_is_no_permission(tmp_path: Path, content: str) -> None:
    path = lock_path(str(tmp_path))
    path.parent.mkdir()
    path.write_bytes(content.encode("latin-1"))
    for use in (
        lambda: check_pin(str(tmp_path), "a", OLD),
        lambda: pin(str(tmp_path), "a", OLD, "x"),
    ):
        with pytest.raises(
            ValueError, match=rf"{path} is damaged .*: put a copy back, or remove it"
        ):
            use()
    assert path.read_bytes() == content.encode("latin-1")


def test_pins_of_processes_that_come_together_are_all_kept(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(pin, [(str(tmp_path), f"k{i}", OLD, "x") for i in range(20)], chunksize=1)
    assert sorted(json.loads(lock_path(str(tmp_path)).read_text())["pins"]) == sorted(
        f"k{i}" for i in range(20)
    )
