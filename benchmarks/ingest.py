"""How fast a 30 s clip is read: Kokanee's `read_clip` beside other readers, all doing the same job in the same run.

The job: open the file, count its frames, take those that a model is shown as full-size RGB arrays, and the sound as
mono 16 kHz float32. "1 fps" is video-SALMONN 2's rule (every 30th frame here: with a key frame every 30 frames, just
the key frames), "1 fps, spread" video-SALMONN 2+'s rule at one frame a second, "10 fps" the same as published. The file
(made here): 720p H.264 at 30 fps with B-frames, AAC stereo sound at 44.1 kHz, a key frame every 30 or 250 frames.

    python benchmarks/ingest.py [--repeats 7] [--threads 1 0] [--work folder]

Readers that are not installed are named and left out: `pip install decord opencv-python-headless torchcodec`. decord
and torchcodec read the sound themselves; OpenCV has no sound reader, so its row adds PyAV's. Threads 0: as many as
there are cores (decord, PyAV and OpenCV's own default; torchcodec's own default is 1).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from kokanee.media import Sampling, read_clip, sample_indices

FPS, SECONDS, HEIGHT, WIDTH = 30, 30, 720, 1280
RULES = {
    "1 fps": Sampling("salmonn2", 1.0, 2, 110),
    "1 fps, spread": Sampling("salmonn2plus", 1.0, 16, 768),
    "10 fps": Sampling("salmonn2plus", 0.1, 16, 768),
}
GOPS = (250, 30)
Reader = Callable[[str, Sampling, int], tuple[np.ndarray | list[np.ndarray], np.ndarray]]


def scene() -> Iterator[np.ndarray]:
    """Frames with detail, motion and some noise: a slow pan over a texture, with discs that cross it."""
    rng = np.random.default_rng(0)
    canvas = np.zeros((HEIGHT + 64, WIDTH + FPS * SECONDS, 3), np.float32)
    for scale in (160, 40, 10, 4):
        shape = (canvas.shape[0] // scale + 2, canvas.shape[1] // scale + 2)
        patch = rng.normal(0, 10 * scale**0.35, (*shape, 3)).astype(np.float32)
        canvas += np.kron(patch, np.ones((scale, scale, 1), np.float32))[: canvas.shape[0], : canvas.shape[1]]
    canvas = np.clip(canvas + 128, 0, 255).astype(np.uint8)
    y, x = np.mgrid[-80:80, -80:80]
    disc_mask = x**2 + y**2 < 80**2
    noise = rng.integers(0, 6, (HEIGHT + 97, WIDTH + 89, 3), np.uint8)
    for number in range(FPS * SECONDS):
        dy, dx = int(32 + 30 * np.sin(number / 40)), number
        frame = np.minimum(canvas[dy : dy + HEIGHT, dx : dx + WIDTH], 249)
        for disc in range(4):
            left = (number * (3 + 2 * disc) + 300 * disc) % (WIDTH - 160)
            top = int(HEIGHT / 2 - 80 + 250 * np.sin(number / 25 + disc))
            frame[top : top + 160, left : left + 160][disc_mask] = (60 * disc, 240 - 50 * disc, 120)
        top, left = number * 37 % 97, number * 53 % 89
        yield frame + noise[top : top + HEIGHT, left : left + WIDTH]


def make_files(folder: Path) -> dict[int, str]:
    """One file for each key frame distance, kept in `folder` for the next run."""
    paths = {gop: folder / f"ingest-gop{gop}.mp4" for gop in GOPS}
    missing = [gop for gop, path in paths.items() if not path.exists()]
    if missing:
        outs = {gop: av.open(str(paths[gop].with_suffix(".part")), "w", format="mp4") for gop in missing}
        streams = {}
        for gop, out in outs.items():
            params = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=3"
            stream = out.add_stream(
                "libx264", rate=FPS, options={"crf": "23", "preset": "veryfast", "x264-params": params}
            )
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            streams[gop] = stream
        sounds = {gop: out.add_stream("aac", rate=44_100, layout="stereo") for gop, out in outs.items()}
        for frame in scene():
            for gop in missing:
                outs[gop].mux(streams[gop].encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        time_s = np.arange(44_100 * SECONDS) / 44_100
        wave = np.stack([np.sin(2500 * time_s + 300 * np.sin(3 * time_s)), np.sin(1300 * time_s)]).astype(np.float32)
        for gop in missing:
            sound = av.AudioFrame.from_ndarray(0.3 * wave, format="fltp", layout="stereo")
            sound.sample_rate, sound.time_base = 44_100, Fraction(1, 44_100)
            outs[gop].mux(streams[gop].encode(None))
            outs[gop].mux(sounds[gop].encode(sound))
            outs[gop].mux(sounds[gop].encode(None))
            outs[gop].close()
            paths[gop].with_suffix(".part").rename(paths[gop])
    return {gop: str(path) for gop, path in paths.items()}


def kokanee(path: str, sampling: Sampling, threads: int):
    clip = read_clip(path, sampling, threads=threads)
    assert clip.frames is not None
    assert clip.waveform is not None
    return clip.frames, clip.waveform


def pyav_sequential(path: str, sampling: Sampling, threads: int):
    """The plain way: decode everything, convert the targets, resample the sound, in one pass."""
    with av.open(path) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        video.codec_context.thread_type, video.codec_context.thread_count = "AUTO", threads
        targets = set(sample_indices(video.frames, float(video.average_rate or FPS), sampling))
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=16_000)
        frames, blocks, number = [], [], 0
        for packet in container.demux(video, audio):
            for frame in packet.decode():
                if isinstance(frame, av.AudioFrame):
                    blocks += [block.to_ndarray()[0] for block in resampler.resample(frame)]
                elif isinstance(frame, av.VideoFrame):
                    if number in targets:
                        frames.append(frame.to_ndarray(format="rgb24"))
                    number += 1
        blocks += [block.to_ndarray()[0] for block in resampler.resample(None)]
    return frames, np.concatenate(blocks)


def pyav_sound(path: str) -> np.ndarray:
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=16_000)
    with av.open(path) as container:
        blocks = [block.to_ndarray()[0] for frame in container.decode(audio=0) for block in resampler.resample(frame)]
    blocks += [block.to_ndarray()[0] for block in resampler.resample(None)]
    return np.concatenate(blocks)


def make_decord() -> tuple[str, Reader]:
    import decord  # pyright: ignore[reportMissingImports]

    def read(path: str, sampling: Sampling, threads: int):
        video = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=threads)
        frames = video.get_batch(sample_indices(len(video), video.get_avg_fps(), sampling)).asnumpy()
        return frames, decord.AudioReader(path, ctx=decord.cpu(0), sample_rate=16_000, mono=True)[:].asnumpy()[0]

    return f"decord {decord.__version__}", read


def make_torchcodec() -> tuple[str, Reader]:
    import torchcodec  # pyright: ignore[reportMissingImports]
    from torchcodec.decoders import AudioDecoder, VideoDecoder  # pyright: ignore[reportMissingImports]

    def read(path: str, sampling: Sampling, threads: int):
        video = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=threads)
        indices = sample_indices(video.metadata.num_frames, video.metadata.average_fps, sampling)
        frames = video.get_frames_at(indices).data.numpy()
        return frames, AudioDecoder(path, sample_rate=16_000, num_channels=1).get_all_samples().data[0].numpy()

    return f"torchcodec {torchcodec.__version__}", read


def make_opencv() -> tuple[str, Reader]:
    import cv2  # pyright: ignore[reportMissingImports]

    def read(path: str, sampling: Sampling, threads: int):
        cv2.setNumThreads(threads or os.cpu_count() or 1)
        options = [cv2.CAP_PROP_N_THREADS, threads] if threads else []
        capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, options)
        n_frames, fps = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
        frames, at = [], -1
        for index in sample_indices(n_frames, fps, sampling):
            while at < index:
                capture.grab()
                at += 1
            frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
        return frames, pyav_sound(path)

    return f"OpenCV {cv2.__version__} grab + PyAV sound", read


def find_readers() -> tuple[dict[str, Reader], list[str]]:
    readers: dict[str, Reader] = {"Kokanee": kokanee}
    missing = []
    for name, make in (("decord", make_decord), ("torchcodec", make_torchcodec), ("OpenCV", make_opencv)):
        try:
            label, reader = make()
            readers[label] = reader
        except (ImportError, OSError, RuntimeError) as error:
            missing.append(f"{name}: not installed ({str(error).strip().splitlines()[0]})")
    readers["PyAV, every frame in turn"] = pyav_sequential
    return readers, missing


def compare(name: str, got: tuple, ours: tuple) -> str:
    """How the same the result is: number and size of frames, largest difference of a pixel, seconds of sound."""
    frames, waveform = got
    assert len(frames) == len(ours[0]) and frames[0].shape == ours[0][0].shape, f"{name} read other frames"
    worst = max(int(np.abs(a.astype(np.int16) - b).max()) for a, b in zip(frames, ours[0]))
    return f"{worst} / {(len(waveform) - len(ours[1])) / 16:+.0f} ms"


def measure(readers: dict[str, Reader], paths: dict[int, str], threads: int, repeats: int) -> None:
    """Print one table: CPU seconds (median, range) and wall seconds (median) of every reader in every cell."""
    cells = [(rate, gop) for rate in RULES for gop in GOPS]
    cpu_s: dict = {(name, cell): [] for name in readers for cell in cells}
    wall_s: dict = {(name, cell): [] for name in readers for cell in cells}
    same: dict = {}
    for repeat in range(repeats + 1):
        for rate, gop in cells:
            sampling = RULES[rate]
            names = list(readers)
            ours = kokanee(paths[gop], sampling, threads) if repeat == 0 else None
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                cpu, wall = time.process_time(), time.perf_counter()
                got = readers[name](paths[gop], sampling, threads)
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                if ours is not None:
                    same[name, (rate, gop)] = compare(name, got, ours)
                else:
                    cpu_s[name, (rate, gop)].append(cpu)
                    wall_s[name, (rate, gop)].append(wall)
                print(f"{threads=} {repeat=} {rate} {gop=} {name}: {cpu:.2f} {wall:.2f}", file=sys.stderr, flush=True)
                del got
    title = "All cores" if threads == 0 else f"{threads} thread"
    print(f"\n### {title}: CPU s (least-most) / wall s, medians of {repeats}\n")
    print("| reader | " + " | ".join(f"{rate}, GOP {gop}" for rate, gop in cells) + " | pixels / sound differ by |")
    print("|---" * (len(cells) + 2) + "|")
    for name in readers:
        row = []
        for cell in cells:
            cpu, wall = cpu_s[name, cell], wall_s[name, cell]
            row.append(f"{statistics.median(cpu):.2f} ({min(cpu):.2f}-{max(cpu):.2f}) / {statistics.median(wall):.2f}")
        print(f"| {name} | " + " | ".join(row) + f" | {same[name, cells[-1]]} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 0], help="0: one per core")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "kokanee-ingest")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    paths = make_files(arguments.work)
    readers, missing = find_readers()
    sizes = ", ".join(f"GOP {gop}: {os.path.getsize(path) / 1e6:.1f} MB" for gop, path in paths.items())
    print(f"{platform.machine()}, {os.cpu_count()} cores, PyAV {av.__version__}; {sizes}")
    for threads in arguments.threads:
        measure(readers, paths, threads, arguments.repeats)
    print("\n" + "\n".join(missing))


if __name__ == "__main__":
    main()
