"""Frames to pixel patches: target sizes, resizing and the patch order of Qwen2.5-VL, without torchvision.

Tensor axes: T frames, H and W pixels, C channels, P patches, D numbers in a patch (C * temporal patch * p * p).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from kokanee.errors import KokaneeError

MAX_ASPECT = 200


def target_size(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """Height and width: multiples of `factor` with `min_pixels` to `max_pixels` pixels and about the old aspect ratio.

    Sides are rounded (half to even), then shrunk (floor) or enlarged (ceil) to the limits, as in the published code. No
    side falls below `factor`, and the other side then still keeps to `max_pixels`; there the published code refuses the
    frame or fails on a side of 0. Raises `KokaneeError` for an empty frame and for an aspect ratio above 200.
    """
    if min(height, width) < 1:
        raise KokaneeError(f"A frame of {width} x {height} pixels has no content. Check the file.")
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise KokaneeError(
            f"A frame of {width} x {height} pixels is more than {MAX_ASPECT} times as long as wide. Crop it first."
        )
    new_height = max(round(height / factor), 1) * factor
    new_width = max(round(width / factor), 1) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = math.floor(height / shrink / factor) * factor
        new_width = math.floor(width / shrink / factor) * factor
        if min(new_height, new_width) < factor:
            longest = max(math.floor(max_pixels / factor / factor), 1) * factor
            new_height = min(max(new_height, factor), longest)
            new_width = min(max(new_width, factor), longest)
    elif new_height * new_width < min_pixels:
        enlarge = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * enlarge / factor) * factor
        new_width = math.ceil(width * enlarge / factor) * factor
    return new_height, new_width


def resize(frame_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """The frame (H, W, 3) uint8 at the new size: bicubic with antialiasing on uint8, as in training."""
    check_frame(frame_HWC)
    if frame_HWC.shape[:2] == (height, width):
        return frame_HWC
    frame_1CHW = torch.from_numpy(np.ascontiguousarray(frame_HWC)).permute(2, 0, 1)[None]
    resized_1CHW = torch.nn.functional.interpolate(frame_1CHW, (height, width), mode="bicubic", antialias=True)
    return resized_1CHW[0].permute(1, 2, 0).contiguous().numpy()


def check_frame(frame_HWC: np.ndarray) -> None:
    """Raises `KokaneeError` unless the frame is (H, W, 3) uint8."""
    if frame_HWC.ndim != 3 or frame_HWC.shape[2] != 3 or frame_HWC.dtype != np.uint8:
        raise KokaneeError(
            f"A frame of shape {tuple(frame_HWC.shape)} and type {frame_HWC.dtype} is not an RGB picture. "
            "Give height x width x 3 numbers of type uint8."
        )


def patchify(
    frames: Sequence[np.ndarray],
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Resized frames (H, W, 3) uint8 -> patches (P, D) float32 and their grid (time steps, rows, columns).

    The last frame is repeated until the frames fill whole time steps. Pixels become (x - 255 mean) / (255 std) in
    float32. Patches are ordered by time step, row and column of merged patches, then row and column inside one.
    Raises `KokaneeError` for frames of several sizes, or of a size that is no multiple of patch times merge size.
    """
    shapes, factor = {frame.shape for frame in frames}, patch_size * merge_size
    height, width = frames[0].shape[:2]
    if len(shapes) > 1 or height % factor or width % factor:
        sizes = ", ".join(" x ".join(map(str, shape[1::-1])) for shape in sorted(shapes))
        raise KokaneeError(
            f"Frames of {sizes} pixels do not divide into patches: all must have one size, in multiples of {factor}. "
            "Let Processor.read or Processor.make_clip resize them."
        )
    check_frame(frames[0])
    frames = [*frames, *[frames[-1]] * (-len(frames) % temporal_patch_size)]
    grid_thw = (len(frames) // temporal_patch_size, height // patch_size, width // patch_size)
    n_steps, n_rows, n_columns = grid_thw
    rows, columns = (n_rows // merge_size, merge_size, patch_size), (n_columns // merge_size, merge_size, patch_size)
    split = np.stack(frames).reshape(n_steps, temporal_patch_size, *rows, *columns, 3)
    ordered = np.ascontiguousarray(split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7))
    patches_PCN = torch.from_numpy(ordered).view(n_steps * n_rows * n_columns, 3, -1)
    mean_C1 = torch.tensor(mean)[:, None] * 255.0
    std_C1 = torch.tensor(std)[:, None] * 255.0
    return patches_PCN.to(torch.float32).sub_(mean_C1).div_(std_C1).flatten(1), grid_thw
