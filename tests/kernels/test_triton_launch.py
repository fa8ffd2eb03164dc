"""Sizes of launches."""

from __future__ import annotations

import pytest
import torch

from tandem.kernels.triton import launch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "counts_as", "entry"),
    [
        ((8, 0), 80, "a"),
        ((8, 6), 89, "b"),
        ((8, 9), 89, "b"),
        ((9, 0), 90, "c"),
        ((10, 3), 103, "c"),
        ((12, 0), 89, "b"),
    ],
)
def test_the_newest_entry_that_is_not_newer_than_the_device(
    capability: tuple[int, int], counts_as: int, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(launch, "architecture", launch.architecture.__wrapped__)
    assert launch.architecture(CUDA) == counts_as
    assert launch.pick({90: "c", 80: "a", 89: "b"}, CUDA) == entry


def test_devices_that_are_too_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(RuntimeError, match=r"Tesla T4 has compute capability 7.5; 8.0 is needed"):
        launch.architecture.__wrapped__(CUDA)


def test_the_interpreter_stands_for_an_h200() -> None:
    assert launch.pick({80: "a", 90: "b", 100: "c"}, CPU) == "b"
    assert launch.processors(CPU) == launch.INTERPRETED_PROCESSORS


@pytest.mark.parametrize(("elements", "warps"), [(1, 1), (512, 1), (1024, 2), (4096, 8), (65536, 16)])
def test_warps(elements: int, warps: int) -> None:
    assert launch.warps(elements) == warps
