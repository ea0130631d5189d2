"""Pictures: whatever file, mode and size comes, right or one line; and what backbones make of them, as transformers."""

import io
import itertools
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distill.config import ImageTokenizerConfig
from distill.errors import BadInput, CorruptFile, DistillError
from distill.events import Event
from distill.vision import backbones
from distill.vision.dinov2 import CONFIG, backbone_of, dinov2_small, fields
from distill.vision.image_tokenizer import ImageTokenizer
from distill.vision.pictures import MOST_PIXELS, Preparation, prepare, read_picture

RED = (200, 30, 60)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def two_colours(mode: str = "RGB") -> Image.Image:
    """40 × 20: the left half red, the right half white."""
    image = Image.new("RGB", (40, 20), "white")
    image.paste(RED, (0, 0, 20, 20))
    return image.convert(mode)


def noise(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def turned() -> bytes:
    """Lies on its side; EXIF says that it is to be turned by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(two_colours().rotate(90, expand=True), "JPEG", exif=exif, quality=95)


def transparent(mode: str) -> bytes:
    image = two_colours("RGBA")
    image.putalpha(Image.fromarray(np.repeat([[255] * 20 + [0] * 20], 20, 0).astype(np.uint8)))
    image.paste((9, 9, 9, 0), (20, 0, 40, 20))
    return encoded(image.convert(mode))


def animated(format: str) -> bytes:
    frames = [two_colours(), Image.new("RGB", (40, 20), "blue")]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, lossless=True)


def sixteen(format: str) -> bytes:
    grey = np.asarray(two_colours("L"), np.uint16) * 257
    return encoded(Image.fromarray(grey), format)


def large(width: int, height: int) -> bytes:
    """A PNG's head that claims a size; there are no pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    crc = struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + crc + b"\0\0\0\0IDAT" + struct.pack(">I", 0x35AF061E)


GREY = tuple([round(0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2])] * 3)


@pytest.mark.parametrize(
    ("data", "left"),
    [
        (encoded(two_colours()), RED),
        (encoded(two_colours("L")), GREY),
        (encoded(two_colours().quantize(8)), RED),
        (encoded(two_colours(), "BMP"), RED),
        (encoded(two_colours(), "JPEG", quality=95), RED),
        (encoded(two_colours("CMYK"), "JPEG", quality=95), RED),
        (encoded(two_colours("CMYK"), "TIFF"), RED),
        (turned(), RED),
        (transparent("RGBA"), RED),
        (transparent("LA"), GREY),
        (transparent("P"), RED),
        (animated("GIF"), RED),
        (animated("PNG"), RED),
        (animated("WEBP"), RED),
        (sixteen("PNG"), GREY),
        (sixteen("TIFF"), GREY),
        (encoded(Image.fromarray(np.asarray(two_colours("L"), np.float32) / 255), "TIFF"), GREY),
    ],
)
def test_of_every_kind_the_pixels_are_right(data: bytes, left: tuple[int, ...]) -> None:
    image = read_picture(data)
    assert (image.size, image.mode) == ((40, 20), "RGB")
    pixels = np.asarray(image, np.int64)
    assert np.abs(pixels[8:12, 5:10] - left).max() <= 10
    assert pixels[8:12, 30:35].min() >= 245


def broken() -> dict[str, tuple[bytes, str]]:
    jpeg = encoded(two_colours().resize((400, 200)), "JPEG", quality=95)
    return {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "broken"),
        "empty.png": (b"", "is empty"),
        "text.png": (b"I am a text.\n" * 9, "is not a picture that we read"),
        "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is not a picture that we read"),
        "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture that we read"),
        "huge.png": (large(20_000, 20_000), f"more than {MOST_PIXELS:,} pixels"),
        "large.png": (large(10_000, 10_000), f"10000 × 10000 pixels; a picture has 1 to {MOST_PIXELS:,}"),
        "hollow.png": (large(10, 10), "broken"),
    }


def lite(listen: Callable[[Event], None] = lambda event: None, **settings: Any) -> ImageTokenizer:
    return ImageTokenizer(ImageTokenizerConfig(**settings), "cpu", "lite", listen)


def test_bad_files_get_a_line_each_and_the_rest_goes_on(tmp_path: Path) -> None:
    good = tmp_path / "a PNG in fact.jpg"
    good.write_bytes(encoded(two_colours()))
    (tmp_path / "folder.png").mkdir()
    paths = [good]
    for name, (data, _) in broken().items():
        (tmp_path / name).write_bytes(data)
        paths += [tmp_path / name, good]
    paths += [tmp_path / "folder.png", tmp_path / "missing.png", tmp_path / "n\0l.png"]
    told: list[Event] = []
    tokens = lite(told.append).tokenize(
        [*paths, torch.rand(2, 5, 5), torch.full((3, 9, 9), torch.nan), Image.open(tmp_path / "cut.jpg")], batch_size=4
    )
    assert [token is not None for token in tokens] == [True] + [False, True] * len(broken()) + [False] * 6
    lines = [event.message for event in told]
    assert all(event.kind == "warning" and "\n" not in event.message for event in told)
    for line, (name, (_, reason)) in zip(lines, broken().items(), strict=False):
        assert name in line
        assert reason in line
    assert [line.split(": ")[-1] for line in lines[len(broken()) :][:2]] == [
        "Is a directory",
        "No such file or directory",
    ]
    assert all(token is None or torch.equal(token, tokens[0]) for token in tokens)  # pyright: ignore[reportArgumentType]


def test_cut_and_altered_files_are_pictures_or_a_line() -> None:
    whole = [encoded(two_colours(), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO")]

    @settings(max_examples=250, deadline=None)
    @given(
        st.sampled_from(whole), st.integers(0, 10**6), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)))
    )
    def check(data: bytes, cut: int, changes: list[tuple[int, int]]) -> None:
        altered = bytearray(data[: cut % (len(data) + 1)] if cut % 2 else data)
        for place, value in changes:
            if altered:
                altered[place % len(altered)] = value
        try:
            image = read_picture(bytes(altered))
        except BadInput as error:
            told = str(error)
        else:
            told = ""
            assert image.mode == "RGB"
            assert image.width * image.height <= MOST_PIXELS
        assert "\n" not in told

    check()


@given(st.integers(1, 300), st.integers(1, 300), st.booleans(), st.sampled_from([1, 7, 32]))
@settings(max_examples=60, deadline=None)
def test_any_size_fits_and_none_takes_much_memory(width: int, height: int, crop: bool, size: int) -> None:
    how = Preparation(size, crop, size + 3)
    image = Image.new("RGB", (width, height), "white")
    for source in (image, torch.ones(3, height, width), torch.full((1, height, width), 255, dtype=torch.uint8)):
        pixels = prepare(source, how)
        assert pixels.shape == (3, size, size)
        middle = pixels[:, size // 2, size // 2]
        assert torch.allclose(middle, (1 - torch.tensor(how.mean)) / torch.tensor(how.std), atol=1e-4)
    assert prepare(read_picture(Image.new("L", (40_000, 1))), how).shape == (3, size, size)


def test_tensors_of_whole_numbers_fractions_and_normalized_ones() -> None:
    how = Preparation(16)
    image = noise(0, (16, 16))
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    wanted = prepare(image, how)
    assert torch.allclose(prepare(whole, how), wanted)
    assert torch.allclose(prepare(whole.float() / 255, how), wanted)
    assert torch.equal(prepare(wanted, how), wanted)
    assert torch.equal(prepare(whole[0], how), prepare(whole[:1].expand(3, -1, -1), how))


def test_embeddings_depend_on_content_alone(tmp_path: Path) -> None:
    pictures = [noise(i, (20, 30)) for i in range(5)]
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    tokenizer = lite()
    seen: list[int] = []
    forward = tokenizer.backbone.forward
    tokenizer.backbone.forward = lambda pixels: seen.append(len(pixels)) or forward(pixels)
    first = tokenizer.tokenize([*pictures, *pictures], batch_size=4)
    assert seen == [4, 1]
    again = tokenizer.tokenize([*paths, *(path.read_bytes() for path in paths), *map(str, paths)])
    assert seen == [4, 1]
    for tokens in (first[5:], again[:5], again[5:10], again[10:]):
        torch.testing.assert_close(tokens, first[:5], atol=1e-5, rtol=1e-5)
    assert len({tuple(token.tolist()) for token in first if token is not None}) == 5
    kept = again[0].clone()  # pyright: ignore[reportOptionalMemberAccess]
    again[0].zero_()  # pyright: ignore[reportOptionalMemberAccess]
    assert torch.equal(tokenizer.tokenize(pictures[:1])[0], kept), "it keeps another than it hands out"  # pyright: ignore


def test_a_stream_holds_one_batch() -> None:
    taken = itertools.count()
    stream = lite(image_size=16).stream((torch.full((3, 4, 4), next(taken) / 1e4) for _ in range(10_000)), 8)
    assert next(stream) is not None
    assert next(taken) == 8


def test_the_example_of_the_documentation() -> None:
    config = ImageTokenizerConfig(embedding_dim=512, patch_size=16)
    images = [torch.randn(3, 224, 224) for _ in range(3)]
    tokens = ImageTokenizer(config, device="cpu", backbone="lite").tokenize(images, batch_size=32)
    assert [token.shape for token in tokens if token is not None] == [(512,)] * 3
    with pytest.warns(DeprecationWarning, match="clip"):
        tokenizer = ImageTokenizer(config, backbone="patch")
    assert (tokenizer.patch_size, tokenizer.embedding_dim) == (16, 512)
    assert tokenizer.tokenize(images)[0].shape == (512,)  # pyright: ignore[reportOptionalMemberAccess]
    assert tokenizer.backbone.patches(torch.zeros(2, 3, 224, 224)).shape == (2, 196, 512)


def test_narrow_and_wide_embeddings_keep_what_is_near_to_what() -> None:
    images = torch.rand(12, 3, 32, 32)
    own = torch.stack([token for token in lite(embedding_dim=0).tokenize(images) if token is not None])
    for dim in (512, 1024):
        given = torch.stack([token for token in lite(embedding_dim=dim).tokenize(images) if token is not None])
        assert given.shape[1] == dim
        kept = torch.cosine_similarity(given[:, None], given[None], -1)
        assert (kept - torch.cosine_similarity(own[:, None], own[None], -1)).abs().max() < (0.08 if dim < 768 else 1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backbone": "vgg"}, "vision.backbone=vgg: choose one of clip, dinov2, resnet, lite, patch"),
        ({"backbone": "lite", "embedding_dim": -1}, "vision.embedding_dim=-1: must be at least 0"),
        ({"backbone": "patch", "patch_size": 0}, "vision.patch_size=0: must be at least 1"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        ImageTokenizer(ImageTokenizerConfig(**settings))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each kind, with random weights, as transformers writes them."""
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "intermediate_size": 64, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**small, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "clip": transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)  # pyright: ignore
        ),
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**small, image_size=28, patch_size=7)),
        "resnet": transformers.ResNetModel(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], layer_type="basic")
        ),
    }
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in made}
    for kind, model in made.items():
        model.save_pretrained(folders[kind])
    return folders


def tokenizer_of(models: dict[str, Path], kind: str, **settings: Any) -> ImageTokenizer:
    config = ImageTokenizerConfig(backbone=kind, weights=str(models[kind]), embedding_dim=0, **settings)
    return ImageTokenizer(config, "cpu")


SNIPPET = """
from image_token_llm.image_tokenizer import ImageTokenizer
from image_token_llm.config import ImageTokenizerConfig
import torch

config = ImageTokenizerConfig(embedding_dim=512, patch_size=16)
tokenizer = ImageTokenizer(config, device="cuda")  # Uses CLIP by default, on GPU
images = [torch.randn(3, 224, 224) for _ in range(128)]
tokens = tokenizer.tokenize(images, batch_size=32)  # Efficient large-batch
print(tokens[0].shape)  # (512,)
"""


@pytest.mark.filterwarnings("ignore:device='cuda'")
def test_the_users_snippet(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it was written, but for where it imports from, and for whose weights a CLIP is taken without a name."""
    monkeypatch.setitem(backbones.HUB, "clip", str(models["clip"]))
    exec(SNIPPET.replace("image_token_llm.image", "distill.vision.image").replace("image_token_llm", "distill"), {})
    assert capsys.readouterr().out == "torch.Size([512])\n"


@pytest.mark.parametrize("size", [(32, 32), (57, 40), (33, 90), (300, 500)])
def test_clip_is_transformers_own(models: dict[str, Path], size: tuple[int, int]) -> None:
    """The pictures prepared by its processor, too, embedded by `get_image_features`."""
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pictures = [noise(i, size) for i in range(3)]
    processor: Any = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model: Any = CLIPModel.from_pretrained(models["clip"]).eval()
    with torch.no_grad():
        wanted = model.get_image_features(**processor(pictures, return_tensors="pt")).pooler_output
    tokens = tokenizer_of(models, "clip").tokenize(pictures)
    torch.testing.assert_close(torch.stack(tokens), wanted, atol=1e-5, rtol=1e-5)  # pyright: ignore


@pytest.mark.parametrize("size", [(32, 32), (57, 40), (33, 90), (300, 500)])
def test_resnet_cuts_the_middle_out_as_its_processor_does(
    models: dict[str, Path], tmp_path: Path, size: tuple[int, int]
) -> None:
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

    said: Any = {"crop_pct": 0.875, "size": 56, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    shutil.copytree(models["resnet"], tmp_path / "resnet")
    (tmp_path / "resnet" / "preprocessor_config.json").write_text(json.dumps(said), encoding="utf-8")
    picture = noise(1, size)
    for asked, wanted in (({}, 56), ({"image_size": 48}, 48)):
        tokenizer = tokenizer_of({"resnet": tmp_path / "resnet"}, "resnet", **asked)
        how: Any = {**said, "size": {"shortest_edge": wanted}}
        processor: Any = ConvNextImageProcessorPil(**how)
        pixels = processor([picture], return_tensors="pt")["pixel_values"][0]
        assert tokenizer.backbone.preparation.resize == int(wanted / 0.875)
        torch.testing.assert_close(prepare(picture, tokenizer.backbone.preparation), pixels, atol=1e-5, rtol=1e-5)
    large = Preparation.of(said | {"size": 384}, 224)
    assert (large.crop, large.size) == (False, 384), "nothing is cut off"


def test_dinov2_and_resnet_are_transformers_own(models: dict[str, Path]) -> None:
    from transformers import Dinov2Model, ResNetModel

    pixels = torch.randn(3, 3, 56, 56)
    for kind, model in (("dinov2", Dinov2Model), ("resnet", ResNetModel)):
        own: Any = model.from_pretrained(models[kind]).eval()
        tokenizer = tokenizer_of(models, kind, image_size=56)
        with torch.no_grad():
            seen = own(pixels)
            assert tokenizer.backbone.patches(pixels).shape == ((3, 64, 32) if kind == "dinov2" else (3, 49, 24))
        tokens = torch.stack(tokenizer.tokenize(pixels))  # pyright: ignore
        torch.testing.assert_close(tokens, seen.pooler_output.flatten(1), atol=1e-5, rtol=1e-5)
    assert tokenizer_of(models, "dinov2", image_size=56).patch_size == 7


def test_clip_at_another_size_than_its_own(models: dict[str, Path]) -> None:
    tokenizer = tokenizer_of(models, "clip", image_size=48)
    assert tokenizer.tokenize(torch.rand(2, 3, 60, 48))[1].shape == (24,)  # pyright: ignore
    assert tokenizer.backbone.patches(torch.zeros(1, 3, 48, 48)).shape == (1, 36, 32)
    with pytest.raises(BadInput, match=r"vision\.image_size=50: not a multiple of 8"):
        tokenizer_of(models, "clip", image_size=50)


def test_weights_that_are_none(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="its weights lack"):
        tokenizer_of({"dinov2": models["resnet"]}, "dinov2")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8")
    shutil.copytree(models["resnet"], tmp_path / "resnet")
    (tmp_path / "resnet" / "preprocessor_config.json").write_text('{"size": "large"}', encoding="utf-8")
    with pytest.raises(CorruptFile, match=r"resnet: its preprocessor_config\.json can't be read"):
        tokenizer_of({"resnet": tmp_path / "resnet"}, "resnet")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(CorruptFile, match=r"can't load it as a clip model .*config\.json and model\.safetensors"):
        tokenizer_of({"clip": tmp_path}, "clip")


# DINOv2 out of an ONNX file.


def message(*parts: tuple[int, int | bytes]) -> bytes:
    """Protobuf as its documentation has it."""

    def varint(value: int) -> bytes:
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    return b"".join(
        varint(number << 3) + varint(value)
        if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(value)) + value
        for number, value in parts
    )


def as_onnx(state: dict[str, torch.Tensor]) -> bytes:
    """A DINOv2 as PyTorch exports it: matrices transposed and without names, places apart."""
    parts: list[tuple[int, int | bytes]] = []
    for name, tensor in state.items():
        if name.endswith("position_embeddings"):
            named = [("onnx::Concat_1", tensor[:, :1]), ("onnx::Reshape_2", tensor[:, 1:])]
        elif tensor.ndim == 2 and name.endswith(".weight"):
            own = f"onnx::MatMul_{len(parts)}"
            path = "/backbone/" + name.removesuffix(".weight")
            path = path.replace(".attention.attention.", ".attention/attention/").replace(".mlp.", "/mlp/")
            path = path.replace(".attention.output.", ".attention/output/").replace("encoder.", "encoder/")
            parts.append(
                (1, message((1, b"x"), (1, own.encode()), (2, f"{path}/MatMul_output_0".encode()), (4, b"MatMul")))
            )
            named = [(own, tensor.T)]
        elif name.endswith("mask_token"):
            continue
        else:
            named = [(f"backbone.{name}", tensor)]
        for own, array in named:
            shape = [(1, size) for size in array.shape]
            data = array.contiguous().numpy().tobytes()
            parts.append((5, message(*shape, (2, 1), (8, own.encode()), (9, data))))
    return message((1, 7), (2, b"test"), (7, message(*parts)))


def hub_names(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_weights_come_out_of_an_onnx_file_as_they_went_in(models: dict[str, Path]) -> None:
    state = hub_names(models["dinov2"])
    data = as_onnx(state)
    found = backbone_of(data)
    assert found.keys() == state.keys()
    for name, array in found.items():
        if not name.endswith("mask_token"):
            np.testing.assert_array_equal(array, state[name].numpy())
    for cut in (1, len(data) // 2, len(data) - 1):
        with pytest.raises(CorruptFile, match="not the ONNX file"):
            backbone_of(data[:cut])


@given(st.binary(max_size=60))
@settings(max_examples=500, deadline=None)
def test_bytes_that_are_no_protobuf(data: bytes) -> None:
    try:
        for number, _ in fields(memoryview(data)):
            assert number >= 0
    except (ValueError, IndexError):
        pass


def test_dinov2_sees_what_is_alike() -> None:
    """The real weights: the same thing elsewhere, and otherwise lit, is nearer than another thing."""
    try:
        folder = dinov2_small()
    except DistillError as error:
        pytest.skip(f"no DINOv2: {error}")
    assert (folder / "model.safetensors").stat().st_size > 88_000_000
    tokenizer = ImageTokenizer(ImageTokenizerConfig(backbone="dinov2", embedding_dim=0, image_size=112), "cpu")
    assert (tokenizer.embedding_dim, tokenizer.patch_size) == (CONFIG["hidden_size"], CONFIG["patch_size"])

    def drawn(round: bool, x: int, colour: str) -> Image.Image:
        from PIL import ImageDraw

        image = Image.new("RGB", (112, 112), "white")
        draw = ImageDraw.Draw(image)
        if round:
            draw.ellipse((x, 30, x + 40, 70), colour)
        else:
            for i in range(6):
                draw.line((x + 8 * i, 20, x + 8 * i, 90), colour, 3)
        return image

    tokens = tokenizer.tokenize(
        [drawn(round, x, c) for round in (True, False) for x, c in ((20, "red"), (50, "maroon"))]
    )
    a, b, c, d = torch.nn.functional.normalize(torch.stack(tokens), dim=1)  # pyright: ignore
    assert min(a @ b, c @ d) > max(a @ c, a @ d, b @ c, b @ d)
