"""Where weights may be read from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tandem.server.api.errors import ApiError
from tandem.server.api.weights_root import confined
from tandem.server.engine.commands import AnyCommand, LoadAdapter, Pause, UpdateWeights


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "inside").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root" / "loop")
    (tmp_path / "root-2").mkdir()
    return tmp_path / "root"


def commands(path: str) -> list[AnyCommand]:
    return [
        UpdateWeights("policy", "disk", path),
        UpdateWeights("policy", "lora", path),
        LoadAdapter("policy", "adapter", path),
    ]


def test_paths_below_the_root_are_resolved(root: Path) -> None:
    inside = str(root / "inside")
    for path in ("inside", "./inside/../inside", inside, f"{root}/link/../root/inside"):
        assert [confined(command, str(root)).path for command in commands(path)] == [inside] * 3, path


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("..", "outside"),
        ("../outside", "outside"),
        ("link", "outside"),
        ("link/x", "outside"),
        ("../root-2", "outside"),
        ("/etc", "outside"),
        ("nothing", "there is nothing at"),
        ("a\0b", "null"),
        ("loop", "loop"),
    ],
)
def test_others_are_refused(root: Path, path: str, words: str) -> None:
    for command in commands(path):
        with pytest.raises(ApiError) as caught:
            confined(command, str(root))
        assert (caught.value.status, caught.value.param) == (400, "path") and words in caught.value.message


def test_links_and_pipes_in_a_directory(root: Path) -> None:
    snapshot = root / "snapshot"
    snapshot.mkdir()
    (root / "blob").write_bytes(b"")
    (snapshot / "model.safetensors").symlink_to("../blob")  # as in the hub's cache
    assert confined(LoadAdapter("policy", "adapter", "snapshot"), str(root)).path == str(snapshot)
    os.mkfifo(root / "pipe")
    for name, target, words in (
        ("out", root.parent / "outside" / "x", "leads outside"),
        ("pipe", "../pipe", "regular"),
    ):
        (snapshot / name).symlink_to(target)
        for command in commands("snapshot"):
            with pytest.raises(ApiError, match=words):
                confined(command, str(root))
        (snapshot / name).unlink()
    with pytest.raises(ApiError, match="no regular file"):
        confined(UpdateWeights("policy", "disk", "pipe"), str(root))


def test_without_a_root_no_path_is_read(root: Path) -> None:
    for command in commands(str(root / "inside")):
        with pytest.raises(ApiError, match="--weights-root"):
            confined(command, None)


def test_what_is_no_path_is_left_alone() -> None:
    memory = UpdateWeights("policy", "shm", "/psm_1")
    assert confined(memory, None) is memory and confined(Pause(), None) == Pause()
