"""Pictures from anywhere, of any kind, as what a backbone reads.

Shape legend: H, W a picture's own size, S a backbone's.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.errors import BadInput

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    Picture = str | PathLike[str] | bytes | Image | torch.Tensor
    """A path, a file's bytes, an image of Pillow, or a tensor (3 or 1, H, W) or (H, W)."""

MOST_PIXELS = 64_000_000
"""More are refused before they are decoded: 64 megapixels take 0.2 GB."""
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "AVIF")
"""What is decoded; Pillow's others run programs, or are no pictures."""
LONGEST = 8
"""Times as long as wide: of longer pictures the middle is taken where the middle is all that is looked at."""


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
        return cls(
            size,
            bool(config.get("do_center_crop")),
            resize,
            int(config.get("resample", 3)),
            tuple(config.get("image_mean", cls.mean)),
            tuple(config.get("image_std", cls.std)),
        )


def read_picture(source: "Picture") -> "tuple[str, bytes | Image | torch.Tensor]":
    """What errors call it, and its content: of a path the file's bytes. Raises BadInput where they can't be read."""
    if not isinstance(source, str | PathLike):
        return ("bytes" if isinstance(source, bytes) else "image"), source
    try:
        return str(source), Path(source).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{source}: can't be read: {reason}") from error


def open_picture(source: "str | PathLike[str] | bytes | Image", name: str = "") -> "Image":
    """The picture upright, in RGB: the first frame, what is transparent on white, 16 bits as 8.

    Raises BadInput, in one line, for what is no picture, is broken or has more than MOST_PIXELS.
    """
    from PIL import Image

    called, content = read_picture(source)
    name = name or called
    if isinstance(content, Image.Image):
        return _decoded(content, name)
    assert isinstance(content, bytes)
    if not content:
        raise BadInput(f"{name}: is empty, not a picture")
    try:
        with _unwarned():
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:  # whatever a decoder makes of bytes that it doesn't know
        bomb = isinstance(error, Image.DecompressionBombError)
        reason = f"has more than {MOST_PIXELS:,} pixels; make it smaller" if bomb else "is not a picture that we read"
        raise BadInput(f"{name}: {reason}") from error
    return _decoded(image, name)


def _unwarned() -> "warnings.catch_warnings[None]":
    """Without Pillow's warnings: what matters is raised."""
    return warnings.catch_warnings(action="ignore")


def _decoded(image: "Image", name: str) -> "Image":
    from PIL import ImageOps

    width, height = image.size
    if width * height > MOST_PIXELS:
        raise BadInput(f"{name}: {width} × {height} are more than {MOST_PIXELS:,} pixels; make it smaller")
    if not width * height:
        raise BadInput(f"{name}: has no pixels")
    try:
        with _unwarned():
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise BadInput(f"{name}: the picture is broken: {reason}") from error


def _rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # 16 bits, as PNG and TIFF have them, or more
        values = np.nan_to_num(np.asarray(image, np.float64))
        most = next((top for top in (1.0, 255.0, 65535.0) if values.max() <= top), values.max())
        whole = 65535.0 if image.mode.startswith("I;16") else most if image.mode == "F" else max(most, 255.0)
        return Image.fromarray((np.clip(values / whole, 0, 1) * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        return Image.alpha_composite(white, seen).convert("RGB")
    return image.convert("RGB")


def content_digest(content: "bytes | Image | torch.Tensor") -> str:
    """Hex SHA-256 of what a picture is made of."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    if hasattr(content, "detach"):
        tensor: Any = content
        about = f"{tensor.dtype} {tuple(tensor.shape)}"
        data = tensor.detach().cpu().float().contiguous().numpy().tobytes()
    else:
        image: Any = content
        turned, transparent = image.getexif().get(0x0112, 1), image.info.get("transparency")
        about = f"{image.mode} {image.size} {turned} {transparent} {image.getpalette()}"
        data = image.tobytes()
    return hashlib.sha256(about.encode() + data).hexdigest()


def prepare(source: "Picture", how: Preparation, name: str = "") -> "torch.Tensor":
    """(3, S, S) float32, as the backbone was trained on. Raises BadInput.

    Of a tensor whole numbers are pixels from 0 to 255, fractions pixels from 0 to 1; with values outside of that it
    is taken as normalized already.
    """
    import torch

    if isinstance(source, torch.Tensor):
        pixels, normalized = _of_tensor(source)
        resized = _resize_tensor(pixels, how)
        if normalized:
            return _placed(resized, how.size)
    else:
        image = _resize(open_picture(source, name), how)
        resized = torch.from_numpy(np.asarray(image, np.uint8).copy()).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (how.mean, how.std))
    return _placed((resized - mean) / std, how.size)


def _sides(width: int, height: int, how: Preparation) -> tuple[int, int]:
    """Width and height after resizing."""
    if how.crop:  # as transformers rounds
        short, long = min(width, height), max(width, height)
        other = int(how.resize * long / short)
        return (how.resize, other) if width <= height else (other, how.resize)
    scale = how.size / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resize(image: "Image", how: Preparation) -> "Image":
    from PIL import Image

    width, height = image.size
    if how.crop and max(width, height) > LONGEST * min(width, height):
        half_w, half_h = (min(side, LONGEST * min(width, height)) / 2 for side in (width, height))
        left, top = int(width / 2 - half_w), int(height / 2 - half_h)
        image = image.crop((left, top, left + int(2 * half_w), top + int(2 * half_h)))
    return image.resize(_sides(*image.size, how), Image.Resampling(how.resample))


def _of_tensor(source: "torch.Tensor") -> "tuple[torch.Tensor, bool]":
    """(3, H, W) float32 and whether it is normalized already."""
    import torch

    pixels = source.detach().cpu()
    pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or not pixels.numel():
        raise BadInput(f"a tensor of shape {tuple(source.shape)}: a picture's is (3, H, W), (1, H, W) or (H, W)")
    if pixels.shape[1] * pixels.shape[2] > MOST_PIXELS:
        raise BadInput(
            f"a tensor of shape {tuple(source.shape)}: has more than {MOST_PIXELS:,} pixels; make it smaller"
        )
    whole = not pixels.is_floating_point() and pixels.dtype != torch.bool
    pixels = pixels.float().expand(3, -1, -1)
    if not torch.isfinite(pixels).all():
        raise BadInput("a tensor with values that are not finite: no picture")
    if whole:
        return pixels.clamp(0, 255) / 255, False
    return pixels, bool(pixels.min() < 0 or pixels.max() > 1)


def _resize_tensor(pixels: "torch.Tensor", how: Preparation) -> "torch.Tensor":
    import torch

    height, width = pixels.shape[1:]
    if how.crop:
        most = LONGEST * min(width, height)
        top, left = max(0, (height - most) // 2), max(0, (width - most) // 2)
        pixels = pixels[:, top : top + most, left : left + most]
    width, height = _sides(pixels.shape[2], pixels.shape[1], how)
    if pixels.shape[1:] == (height, width):
        return pixels
    return torch.nn.functional.interpolate(
        pixels[None], (height, width), mode="bicubic", antialias=True, align_corners=False
    )[0]


def _placed(pixels: "torch.Tensor", size: int) -> "torch.Tensor":
    """(3, h, w) → (3, S, S): its middle, and zeros, which are the mean, where it is too small."""
    canvas = pixels.new_zeros((3, size, size))
    height, width = pixels.shape[1:]
    top, left = (height - size) // 2, (width - size) // 2
    part = pixels[:, max(top, 0) : max(top, 0) + size, max(left, 0) : max(left, 0) + size]
    y, x = max(-top, 0), max(-left, 0)
    canvas[:, y : y + part.shape[1], x : x + part.shape[2]] = part
    return canvas
