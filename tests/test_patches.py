"""Golden data: sizes and pixel values made once by the published code of video-SALMONN 2+ (commit 61faec0)."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kokanee.patches
from kokanee.errors import KokaneeError
from kokanee.patches import patchify, resize, target_size

GOLDEN = Path(__file__).parent / "golden" / "salmonn2plus"
SIZING = json.loads((GOLDEN / "sizing.json").read_text())
PIXELS = load_file(GOLDEN / "pixels_and_mel.safetensors")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize("case", SIZING["image_sizing"])
def test_image_sizes_are_the_published_ones(case):
    size = target_size(case["height"], case["width"], 28, case["min_pixels"], case["max_pixels"])
    assert [1, size[0] // 14, size[1] // 14] == case["grid_thw"]


def patches_of(frames: list[np.ndarray], height: int, width: int) -> torch.Tensor:
    return patchify([resize(frame, height, width) for frame in frames], 14, 2, 2, MEAN, STD)[0]


def test_pixel_values_are_the_published_ones():
    """Of a shrunk pair of frames, of a frame that stands alone in the last time step, and of an image."""
    pair = [frame.permute(1, 2, 0).numpy() for frame in PIXELS["av.frames"]]
    last = [frame.permute(1, 2, 0).numpy() for frame in PIXELS["video.frames"]]
    image = [PIXELS["image.frames"].numpy()]
    exactly = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(patches_of(pair, 84, 140)[::6], PIXELS["av.patches"], **exactly)
    torch.testing.assert_close(patches_of(last, 112, 56)[::2], PIXELS["video.patches"], **exactly)
    torch.testing.assert_close(patches_of(image, 56, 112)[::4], PIXELS["image.patches"], **exactly)


@pytest.mark.parametrize("merge_size", [1, 2, 4])
def test_patches_hold_every_pixel_once_in_merge_order(merge_size):
    """A patch is channel, then frame, row and column; patches run through merged cells row by row."""
    generator = np.random.default_rng(0)
    frames = [generator.integers(0, 256, (8 * 4, 16 * 4, 3), dtype=np.uint8) for _ in range(4)]
    patches, grid = patchify(frames, 4, 2, merge_size, (0.0,) * 3, (1 / 255,) * 3)
    assert grid == (2, 8, 16) and patches.shape == (2 * 8 * 16, 3 * 2 * 4 * 4)
    cells = [
        (step, row * merge_size + inner_row, column * merge_size + inner_column)
        for step in range(2)
        for row in range(8 // merge_size)
        for column in range(16 // merge_size)
        for inner_row in range(merge_size)
        for inner_column in range(merge_size)
    ]
    for patch, (step, row, column) in zip(patches, cells, strict=True):
        region = np.stack(frames[2 * step : 2 * step + 2])[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert patch.round().reshape(3, 2, 4, 4).numpy().tolist() == region.transpose(3, 0, 1, 2).tolist()


def test_an_odd_last_frame_is_repeated():
    frames = [np.full((28, 28, 3), value, dtype=np.uint8) for value in (10, 20, 30)]
    odd, grid = patchify(frames, 14, 2, 2, MEAN, STD)
    even, _ = patchify([*frames, frames[-1]], 14, 2, 2, MEAN, STD)
    assert grid == (2, 2, 2) and torch.equal(odd, even)


def test_sizes_keep_to_their_limits_and_stay_when_applied_again():
    generator = np.random.default_rng(1)
    for _ in range(2000):
        factor = int(generator.choice([28, 56]))
        height, width = (int(side) for side in generator.integers(1, 3000, 2))
        most = float(generator.uniform(factor**2 * 4, 200_000))
        if max(height, width) > 200 * min(height, width):
            continue
        size = target_size(height, width, factor, factor**2, most)
        assert all(side % factor == 0 and side >= factor for side in size)
        assert size[0] * size[1] <= most
        assert target_size(*size, factor, factor**2, most) == size


def test_a_frame_of_the_right_size_is_left_alone():
    frame = np.random.default_rng(2).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    assert resize(frame, 56, 84) is frame


def test_resizing_does_not_depend_on_the_memory_order_of_the_frame():
    frame = np.random.default_rng(3).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    planar = np.ascontiguousarray(frame.transpose(2, 0, 1)).transpose(1, 2, 0)
    assert np.array_equal(resize(frame, 28, 56), resize(planar, 28, 56))


def test_no_file_of_the_package_imports_torchvision():
    for path in Path(kokanee.patches.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "torchvision" for name in names), path


@pytest.mark.parametrize(("height", "width"), [(0, 10), (28, 5700)])
def test_frames_without_content_or_far_too_long_are_refused(height, width):
    with pytest.raises(KokaneeError):
        target_size(height, width, 28, 784, 61250)


@pytest.mark.parametrize("shape", [(10, 10), (10, 10, 4), (3, 10, 10)])
def test_frames_that_are_no_rgb_picture_are_refused(shape):
    with pytest.raises(KokaneeError, match="RGB"):
        resize(np.zeros(shape, dtype=np.uint8), 28, 28)
    with pytest.raises(KokaneeError, match="uint8"):
        resize(np.zeros((10, 10, 3), dtype=np.float32), 28, 28)
