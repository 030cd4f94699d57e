"""Frames to files: videos, animations, contact sheets, images.

Files are written whole or not at all: what was written is read back before it takes its name.
"""

from __future__ import annotations

import subprocess
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffsparse import files
from diffsparse.errors import ConfigError, InputFileError
from diffsparse.files import reason, whole

if TYPE_CHECKING:
    from PIL.Image import Image

Frames = np.ndarray
VIDEO = (".mp4", ".gif")
IMAGE = (".png", ".jpg", ".jpeg", ".webp")
_VISIBLE = 256  # pixels: smaller frames are enlarged in files


def check_suffix(path: Path, frames: int | None = None) -> None:
    """Check, before any work, that a file can hold so many frames, and that what writes it is installed.

    Args:
        path: the file.
        frames: how many; None if unknown.

    Raises:
        ConfigError: it ends in no such format.
        ModuleNotFoundError: a package is missing.
    """
    kinds = {None: (*VIDEO, *IMAGE), 1: IMAGE}
    known = kinds.get(frames, (*VIDEO, ".png"))
    if path.suffix.lower() not in known:
        what = {None: "frames", 1: "an image"}.get(frames, "a video")
        raise ConfigError(f"can't write {what} to {path.name!r}; wanted a name that ends in {', '.join(known)}")
    import_module("imageio_ffmpeg" if path.suffix.lower() == ".mp4" else "PIL")


def save(frames: Frames, path: str | Path, fps: int = 16) -> Path:
    """Write frames in the format that the name asks for.

    .mp4 and .gif show all frames; an image is a sheet of up to 8 of them side by side.

    Args:
        frames: float [F, H, W, C] in [0, 1].
        path: of the file.
        fps: frames a second of a video.

    Raises:
        ConfigError: no such format.
        OutputFileError: the file can't be written, or not be read back.
    """
    path = Path(path)
    check_suffix(path)
    pixels = _enlarged(to_bytes(frames))
    with whole(path) as temporary:
        if path.suffix.lower() == ".mp4":
            _write_mp4(_even(pixels), temporary, fps)
        elif path.suffix.lower() == ".gif":
            _write_gif(pixels, temporary, fps)
        else:
            _write_image(side_by_side(pixels), temporary)
    return path


def to_bytes(frames: Frames) -> Frames:
    """float [0, 1] -> uint8, rounded."""
    pixels: Frames = (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)
    return pixels


def side_by_side(pixels: Frames, most: int = 8) -> Frames:
    """Frames as one picture [H, W', C] with white gaps.

    Args:
        pixels: uint8 [F, H, W, C].
        most: how many frames are shown, evenly spread.
    """
    chosen = pixels[np.unique(np.linspace(0, len(pixels) - 1, min(most, len(pixels))).round().astype(int))]
    gap = np.full_like(chosen[0][:, :2], 255)
    return np.concatenate([part for frame in chosen for part in (frame, gap)][:-1], axis=1)


def sheet(rows: dict[str, Frames], path: str | Path) -> Path:
    """Write a picture with one labelled row of frames for each entry.

    Args:
        rows: frames, float [F, H, W, C] in [0, 1], by label.
        path: of the picture.

    Raises:
        OutputFileError: the file can't be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    strips = {label: side_by_side(_enlarged(to_bytes(frames), 96)) for label, frames in rows.items()}
    width, label_height = max(strip.shape[1] for strip in strips.values()), 26
    height = sum(strip.shape[0] + label_height for strip in strips.values())
    canvas = Image.new("RGB", (width, height), "white")
    draw, font, top = ImageDraw.Draw(canvas), ImageFont.load_default(18), 0
    for label, strip in strips.items():
        draw.text((2, top + 2), label, fill="black", font=font)
        canvas.paste(Image.fromarray(strip), (0, top + label_height))
        top += strip.shape[0] + label_height
    with whole(path) as temporary:
        _write_image(np.asarray(canvas), temporary)
    return Path(path)


def read(path: str | Path) -> Frames:
    """Frames float32 [F, H, W, C] in [0, 1] of a video or image file, after its codec: for pictures, not for metrics.

    Raises:
        InputFileError: the file can't be read.
    """
    import imageio.v3 as imageio

    try:
        plugin = "FFMPEG" if Path(path).suffix.lower() == ".mp4" else "pillow"
        pixels = np.asarray(imageio.imread(path, plugin=plugin))
    except OSError as error:
        raise InputFileError(f"can't read {path}: {reason(error)}; wanted a video or an image") from error
    return (pixels if pixels.ndim == 4 else pixels[None]).astype(np.float32) / 255


def read_image(path: str | Path) -> Image:
    """An RGB image from a file.

    Raises:
        InputFileError: no such file, or not an image.
    """
    return files.read_image(path, "the image", "wanted a file such as photo.png")


def _enlarged(pixels: Frames, least: int = _VISIBLE) -> Frames:
    factor = max(1, -(-least // min(pixels.shape[1:3])))
    return pixels.repeat(factor, 1).repeat(factor, 2)


def _even(pixels: Frames) -> Frames:
    """H.264 wants even sizes: the last row and column are repeated."""
    _, height, width, _ = pixels.shape
    return np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _write_mp4(pixels: Frames, path: Path, fps: int) -> None:
    from imageio_ffmpeg import get_ffmpeg_exe

    _, height, width, _ = pixels.shape
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    command = [get_ffmpeg_exe(), "-y", "-v", "error", *raw, "-c:v", "libx264", "-crf", "10", "-pix_fmt", "yuv420p"]
    frames = np.ascontiguousarray(pixels).data.cast("B")
    done = subprocess.run([*command, str(path)], input=frames, capture_output=True, check=False)
    if done.returncode:
        raise OSError(_why(done))
    _check(_frames_of_mp4(path), len(pixels))


def _frames_of_mp4(path: Path) -> int:
    """The frames of a video that can be decoded from end to end."""
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-v", "error", "-xerror", "-i", str(path)]
    done = subprocess.run([*command, "-f", "framehash", "-"], capture_output=True, check=False)
    if done.returncode or done.stderr:
        raise OSError(_why(done))
    return sum(not line.startswith(b"#") for line in done.stdout.splitlines())  # a line for each


def _why(done: subprocess.CompletedProcess[bytes]) -> str:
    """What ffmpeg said first, without the addresses of its parts."""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return f"ffmpeg: {lines[0].rpartition('] ')[2] if lines else f'exit code {done.returncode}'}"


def _write_gif(pixels: Frames, path: Path, fps: int) -> None:
    from PIL import Image, ImageSequence

    first, *rest = [Image.fromarray(frame) for frame in pixels]
    duration = 10 * max(1, round(100 / fps))  # milliseconds; the format counts hundredths of a second
    first.save(path, save_all=True, append_images=rest, duration=duration, loop=0)
    with Image.open(path) as written:  # equal neighbours are one frame, shown for longer
        shown = sum(frame.copy().info["duration"] for frame in ImageSequence.Iterator(written))
    _check(shown // duration, len(pixels))


def _write_image(pixels: Frames, path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path)
    with Image.open(path) as written:
        written.load()


def _check(found: int, wanted: int) -> None:
    if found != wanted:
        raise OSError(f"{found} of {wanted} frames could be read back")
