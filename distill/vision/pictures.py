"""Pictures from anywhere, of any kind, as what a backbone reads.

Shape legend: H, W a picture's own size, S a backbone's.
"""

import base64
import contextlib
import hashlib
import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from distill.errors import BadInput

Picture = str | PathLike[str] | bytes | Image.Image | Tensor
"""A path, a file's bytes, an image of Pillow, or a tensor (3 or 1, H, W) or (H, W)."""

Box = tuple[float, float, float, float]
"""A part of a picture: left, top, right and bottom as shares of its width and height."""

MOST_PIXELS = 64_000_000
"""More are refused before they are decoded: 64 megapixels take 0.2 GB."""
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "AVIF")
"""What is decoded; Pillow's others run programs, or are no pictures."""
LONGEST = 8
"""Times as long as wide: of longer pictures the middle is taken where the middle is all that is looked at."""


WHOLE = 384
"""Pixels of a side from which on transformers' ConvNext processor, which is ResNet's, too, cuts nothing off."""


@dataclass(frozen=True)
class Preparation:
    """How pixels become what a backbone was trained on.

    crop: the shortest side becomes `resize` pixels and the middle is cut out, as transformers' processors do;
    otherwise the whole picture fits in, and what it leaves free is the mean's grey. resample: Pillow's number of the
    filter. mean, std: of each channel, of pixels from 0 to 1.
    """

    size: int = 224
    crop: bool = False
    resize: int = 224
    resample: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @classmethod
    def of(cls, config: dict[str, Any], size: int) -> "Preparation":
        """What a preprocessor_config.json says; without its words of a size, `size` whole."""
        own: Any = config.get("crop_size", config.get("size")) or size
        size = int(own.get("height", own.get("shortest_edge", size)) if isinstance(own, dict) else own)
        edge: Any = config.get("size") or size
        resize = int(edge.get("shortest_edge", edge.get("height", size)) if isinstance(edge, dict) else edge)
        crop = bool(config.get("do_center_crop"))
        if (share := config.get("crop_pct")) and size < WHOLE:
            crop, resize = True, int(size / share)
        return cls(
            size,
            crop,
            resize,
            int(config.get("resample", 3)),
            tuple(config.get("image_mean", cls.mean)),
            tuple(config.get("image_std", cls.std)),
        )


def read_picture(source: Picture) -> Image.Image | Tensor:
    """The picture upright, in RGB: the first frame, what is transparent on white, 16 bits as 8. A tensor as it is.

    Raises BadInput, in one line, for what is no picture, is broken or has more than MOST_PIXELS.
    """
    if isinstance(source, Tensor):
        return source
    if isinstance(source, Image.Image):
        return _decoded(source, "image")
    name = "bytes" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except (OSError, ValueError) as error:
        raise BadInput(f"{name}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    if not data:
        raise BadInput(f"{name}: is empty, not a picture")
    try:
        with _unwarned():
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadInput(f"{name}: has more than {MOST_PIXELS:,} pixels; make it smaller") from error
    except Exception as error:  # whatever a decoder makes of bytes that it doesn't know
        raise BadInput(f"{name}: is not a picture that we read") from error
    return _decoded(image, name)


def as_image(source: Picture) -> Image.Image:
    """The same of a tensor too: values are taken as `prepare` does, normalized ones are put back. Raises BadInput."""
    if isinstance(content := read_picture(source), Image.Image):
        return content
    pixels, normalized = _of_tensor(content)
    if normalized:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (Preparation.mean, Preparation.std))
        pixels = pixels * std + mean
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def thumbnail(picture: Picture, side: int, part: Box = (0, 0, 1, 1)) -> str:
    """A part of a picture as base64 of a JPEG. Raises BadInput."""
    whole = as_image(picture)
    left, top, right, bottom = (round(share * length) for share, length in zip(part, 2 * whole.size, strict=True))
    small = whole.crop((max(0, left), max(0, top), min(whole.width, right), min(whole.height, bottom)))
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()


def thumbnails(pictures: Iterable[Picture], side: int) -> list[str]:
    """Of those that can be read."""
    found = list[str]()
    for picture in pictures:
        with contextlib.suppress(BadInput):
            found.append(thumbnail(picture, side))
    return found


def png(image: Image.Image) -> bytes:
    """Its file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _unwarned() -> "warnings.catch_warnings[None]":
    """Without Pillow's warnings: what matters is raised."""
    return warnings.catch_warnings(action="ignore")


def _decoded(image: Image.Image, name: str) -> Image.Image:
    _check_size(*image.size, name)
    try:
        with _unwarned():
            image.load()
            # It copies what is upright already.
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            return _rgb(ImageOps.exif_transpose(image) if turned else image)
    except Exception as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise BadInput(f"{name}: the picture is broken: {reason}") from error


def _check_size(width: int, height: int, name: str) -> None:
    if not 0 < width * height <= MOST_PIXELS:
        raise BadInput(f"{name}: {width} × {height} pixels; a picture has 1 to {MOST_PIXELS:,}: make it smaller")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 bits, as PNG and TIFF have them, or more
        values = np.nan_to_num(np.asarray(image, np.float32))
        most = next((top for top in (1.0, 255.0, 65535.0) if values.max() <= top), values.max())
        whole = 65535.0 if image.mode.startswith("I;16") else most if image.mode == "F" else max(most, 255.0)
        return Image.fromarray((np.clip(values / whole, 0, 1) * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")


def content_digest(content: Image.Image | Tensor) -> str:
    """Hex SHA-256 of what `read_picture` gave."""
    if isinstance(content, Image.Image):
        about, data = str(content.size), content.tobytes()
    else:
        about, data = f"{content.dtype} {content.shape}", content.detach().cpu().double().numpy().tobytes()
    digest = hashlib.sha256(about.encode())
    digest.update(data)
    return digest.hexdigest()


def prepare(content: Image.Image | Tensor, how: Preparation) -> Tensor:
    """(3, S, S) float32 of what `read_picture` gave, as the backbone was trained on. Raises BadInput.

    Of a tensor whole numbers are pixels from 0 to 255, fractions pixels from 0 to 1; with values outside of that it
    is taken as normalized already.
    """
    normalized = False
    if isinstance(content, Tensor):
        pixels, normalized = _of_tensor(content)
        left, top, right, bottom = _looked_at(pixels.shape[2], pixels.shape[1], how)
        pixels = pixels[None, :, top:bottom, left:right]
        width, height = _sides(right - left, bottom - top, how)
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]
    else:
        part = _looked_at(*content.size, how)
        image = content if part == (0, 0, *content.size) else content.crop(part)
        image = image.resize(_sides(*image.size, how), Image.Resampling(how.resample))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    if not normalized:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (how.mean, how.std))
        pixels.sub_(mean).div_(std)
    # Its middle, and zeros, which are the mean, where it is too small.
    across, down = -((pixels.shape[2] - how.size) // 2), -((pixels.shape[1] - how.size) // 2)
    rest = (how.size - pixels.shape[2] - across, how.size - pixels.shape[1] - down)
    return F.pad(pixels, (across, rest[0], down, rest[1])) if any((across, down, *rest)) else pixels


def _looked_at(width: int, height: int, how: Preparation) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is resized: all, but of very long pictures that are cropped the middle."""
    most = LONGEST * min(width, height) if how.crop else max(width, height)
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return left, top, left + min(width, most), top + min(height, most)


def _sides(width: int, height: int, how: Preparation) -> tuple[int, int]:
    """Width and height after resizing."""
    if how.crop:  # as transformers rounds
        other = int(how.resize * max(width, height) / min(width, height))
        return (how.resize, other) if width <= height else (other, how.resize)
    scale = how.size / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _of_tensor(source: Tensor) -> tuple[Tensor, bool]:
    """(3, H, W) float32 and whether it is normalized already."""
    name, pixels = f"a tensor of shape {tuple(source.shape)}", source.detach().cpu()
    pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise BadInput(f"{name}: a picture's is (3, H, W), (1, H, W) or (H, W)")
    _check_size(pixels.shape[2], pixels.shape[1], name)
    whole = not pixels.is_floating_point() and pixels.dtype != torch.bool
    pixels = pixels.float().expand(3, -1, -1)
    if not torch.isfinite(pixels).all():
        raise BadInput(f"{name}: has values that are not finite")
    if whole:
        return pixels.clamp(0, 255) / 255, False
    return pixels, bool(pixels.min() < 0 or pixels.max() > 1)
