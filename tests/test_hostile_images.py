"""Picture files and folders from strangers: each is read within bounds, or named in one sentence."""

import io
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from PIL import Image, ImageFile

from avit_jax import AViT, AViTConfig, Preprocessing, preprocess
from avit_jax.commands import predict_images
from avit_jax.commands.predict_images import picture_path, predict_files
from avit_jax.data import decode as decode_module
from avit_jax.data import elements, preprocessing
from avit_jax.data.crop import RandomResizedCrop
from avit_jax.data.decode import BadImage, decode
from avit_jax.data.pipeline import evaluation_batches, training_batches
from avit_jax.data.preprocessing import LARGEST_RESIZED, RESAMPLING, resize_and_crop
from avit_jax.data.settings import AugmentSettings
from tests.harness.builders import small_config
from tests.test_image_files import MODEL, image_folder, opened, own_cache, photograph

__all__ = ["own_cache"]  # a fixture: every test here has a cache of its own

FULL_SIZE = AViTConfig()


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A grey PNG written by hand, with more chunks before the pixels."""
    header = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 1) * height)) if width * height < 10**6 else b""
    chunks = ((b"IHDR", header), *extra, (b"IDAT", rows), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The areas that are made by resizing; a larger one than a model may need is refused before it is made."""
    areas: list[int] = []
    resize = Image.Image.resize

    def counted(self: Image.Image, size: tuple[int, int], *arguments: object, **options: object) -> Image.Image:
        areas.append(size[0] * size[1])
        assert areas[-1] <= LARGEST_RESIZED, f"{size} pixels are made of a picture of {self.size}"
        return resize(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", counted)
    return areas


@pytest.mark.parametrize("tall", [True, False])
@pytest.mark.parametrize("length", [20_001, 65_001, 900_001])
def test_long_thin_pictures_are_cropped_before_they_are_resized(bounded: list[int], length: int, tall: bool) -> None:
    """The oracle is the middle of the picture, far more than the crop needs: the scale is 256, so edges are exact."""
    shape = (length, 1, 3) if tall else (1, length, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    middle = slice(length // 2 - 20, length // 2 + 21)
    near = Image.fromarray(pixels[middle] if tall else pixels[:, middle])
    size = (256, 256 * 41) if tall else (256 * 41, 256)
    left, top = ((side - 224) // 2 for side in size)
    expected = near.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    found = resize_and_crop(Image.fromarray(pixels), FULL_SIZE)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert preprocess(pixels, FULL_SIZE).shape == (1, 224, 224, 3)
    assert len(bounded) == 3


@pytest.mark.parametrize("size", [(300, 1), (1, 300), (500, 7), (7, 500), (41, 3000), (900, 20)])
@pytest.mark.parametrize(("interpolation", "fraction"), [("bicubic", 0.9), ("bilinear", 0.875), ("bicubic", 1.0)])
def test_what_is_cropped_first_differs_by_a_level_at_most(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], interpolation: str, fraction: float
) -> None:
    height, width = size
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8))
    settings = Preprocessing(crop_fraction=fraction, interpolation=interpolation)
    model = AViTConfig(image_size=48, patch_size=16, preprocessing=settings)
    short = int(48 / fraction)
    columns, rows = (max(short, int(short * side / min(size))) for side in (width, height))
    left, top = round((columns - 48) / 2), round((rows - 48) / 2)
    whole = picture.resize((columns, rows), RESAMPLING[interpolation]).crop((left, top, left + 48, top + 48))
    np.testing.assert_array_equal(np.asarray(resize_and_crop(picture, model)), np.asarray(whole))
    monkeypatch.setattr(preprocessing, "LARGEST_RESIZED", 0)
    found = np.asarray(resize_and_crop(picture, model)).astype(int)
    assert abs(found - np.asarray(whole)).max() <= 1


@pytest.mark.parametrize("size", [(1, 65_000), (65_000, 1), (1, 2), (900_000, 3)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (3.0, 4.0), (0.1, 0.2)])
def test_training_crops_of_any_shape_fit(bounded: list[int], size: tuple[int, int], ratio: tuple[float, float]) -> None:
    crop, picture = RandomResizedCrop((32, 32), (0.08, 1.0), ratio), Image.new("RGB", size)
    for seed in range(5):
        assert crop.random_map({"image": picture}, np.random.default_rng(seed))["image"].size == (32, 32)
    assert set(bounded) == {32 * 32}


def test_seven_formats_are_read_and_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a file started a program"))
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a file started a program"))
    picture = photograph(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        assert decode(saved(picture, kind), "x").size == (40, 30), kind
    files = {kind: saved(picture, kind) for kind in ("TGA", "PCX", "ICO", "SGI", "EPS")}
    for kind, content in files.items():
        file = tmp_path / f"{kind}.jpg"
        file.write_bytes(content)
        with pytest.raises(BadImage, match=rf"{kind}.jpg is not an image that Pillow can read as JPEG, PNG"):
            decode(file, str(file))


def scans(count: int) -> bytes:
    """A progressive JPEG of 400 x 300 with its last scan `count` times more."""
    whole = saved(photograph(0, (400, 300)), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * count + whole[-2:]


def bmp(width: int, height: int, body: bytes) -> bytes:
    """A run-length encoded BMP."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    offset = 14 + len(header) + 1024
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + header + bytes(1024) + body


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: png(1, 10_000_000), "is 1 x 10000000 pixels, and a side may have at most 1,000,000"),
        (lambda: scans(20_000), r"is a JPEG of 200\d\d scans, too many for 400 x 300 pixels"),
        (lambda: bmp(3000, 3000, b"\x01\x07\0\0" * 10), "is a run-length encoded BMP of more than 4,000,000 pixels"),
        (lambda: b"P3 2000 2000 255\n" + b"1 " * 2_000_001, "is a PPM in plain text of more than 4 MB"),
    ],
)
def test_pictures_that_take_long_to_decode_are_refused(content: object, reason: str) -> None:
    with pytest.raises(BadImage, match=f"x.jpg {reason}"):
        decode(content(), "x.jpg")


def test_scans_are_counted_in_the_picture_alone() -> None:
    """Not in thumbnails, comments or what a telephone appends; and no comment hides the rest."""
    plain, progressive = saved(photograph(0), "JPEG"), saved(photograph(0), "JPEG", progressive=True)
    comment = b"\xff\xfe\0\x0c" + b"\xff\xd9\xff\xda" * 2 + b"\0\0"
    for content, expected in ((plain, 1), (progressive, 10)):
        dressed = content[:2] + comment + content[2:-2] + comment + b"\xff\xd9" + b"\xff\xda" * 9
        assert [decode_module._count_scans(c) for c in (content, dressed)] == [expected] * 2
        decode(dressed, "x")


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP", b"iTXt"])
def test_chunks_that_unpack_to_much_stay_packed(name: bytes) -> None:
    packed = zlib.compress(bytes(50_000_000))
    body = b"a\0\1\0\0\0" + packed if name == b"iTXt" else b"a\0\0" + packed
    tracemalloc.start()
    try:
        decode(png(20, 20, (name, body)), "x")
    except BadImage as error:
        assert "cannot be read" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20e6


def test_of_an_animation_only_the_first_picture_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [Image.new("L", (16, 16), level) for level in range(200)]
    content = saved(pictures[0], "GIF", save_all=True, append_images=pictures[1:])
    loads: list[int] = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: loads.append(1) or load(self))
    assert np.asarray(decode(content, "x")).max() == 0
    assert len(loads) <= 3


def unmade(model_config: AViTConfig) -> AViT:
    """A model without weights."""
    return nnx.eval_shape(lambda: AViT(model_config, rngs=nnx.Rngs(0)))


@pytest.fixture
def any_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """predict_files without the model's computation, which other tests look at: class 0 and depth 1 for every image."""

    def program(model: AViT, *_: object, **__: object) -> Callable[[np.ndarray], SimpleNamespace]:
        config = model.config
        return lambda x: SimpleNamespace(
            logits=np.zeros((len(x), config.num_classes)), token_depth=np.ones((len(x), config.num_tokens), int)
        )

    monkeypatch.setattr(predict_images, "compile", program)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of each tag
def test_damaged_exif_does_not_cost_the_picture(tmp_path: Path, any_answer: None) -> None:
    """A tag that says what it cannot be used to be an error in the middle of a run."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 1.5
    whole = saved(photograph(0), "JPEG", exif=exif)
    assert decode(whole, "x", upright=True).size == (30, 40)
    start = whole.index(b"Exif\0\0") + 6
    for position in range(start, start + 40):
        for value in (0, 5, 255):
            damaged = whole[:position] + bytes([value]) + whole[position + 1 :]
            assert decode(damaged, "x", upright=True).size in ((30, 40), (40, 30))
    model = unmade(small_config(in_channels=3))
    (tmp_path / "a.jpg").write_bytes(whole[:start] + b"\xff" * 30 + whole[start + 30 :])
    (tmp_path / "b.png").write_bytes(png(1, 10_000_000))
    (tmp_path / "c.png").write_bytes(png(1, 20_000))
    files = sorted(tmp_path.iterdir())
    first, second, third, *_ = predict_files(model, files, tmp_path, None, "masked")
    assert first.startswith("unreadable: b.png is 1 x 10000000 pixels")
    assert (second.split()[0], third.split()[0]) == ("a.jpg", "c.png")


@pytest.mark.parametrize("place", ["evaluation", "training", "prediction"])
def test_errors_after_decoding_are_bad_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, any_answer: None, place: str
) -> None:
    root = image_folder(tmp_path / "set", train=34, val=34)
    marked = root / ("train" if place == "training" else "val") / "dog/dog_3.JPEG"
    photograph(0, (61, 30)).save(marked, quality=95)

    def failing(picture: Image.Image, *_: object) -> Image.Image:
        if picture.width == 61:
            raise MemoryError
        return picture.resize((16, 16))

    monkeypatch.setattr(elements, "resize_and_crop", failing)
    monkeypatch.setattr(preprocessing, "resize_and_crop", failing)
    monkeypatch.setattr(RandomResizedCrop, "random_map", lambda _, element, __: {"image": failing(element["image"])})
    if place == "prediction":
        model = unmade(AViTConfig(image_size=16, patch_size=8, num_classes=3))
        lines = list(predict_files(model, sorted(marked.parent.iterdir()), marked.parent, None, "masked"))
        assert lines[0] == "unreadable: dog_3.JPEG cannot be resized (MemoryError): replace the file"
        return
    augment = AugmentSettings(crop_scale=(0.08, 1.0))
    if place == "evaluation":
        batches = evaluation_batches(opened(root, on_bad_image="skip").val, MODEL, 102)
    else:
        split = opened(root, on_bad_image="skip").train
        batches = training_batches(split, MODEL, batch_size=102, seed=0, augment=augment)
    assert next(batches)["weight"].sum() == 101
    batches.close()
    if place == "evaluation":
        batches = evaluation_batches(opened(root).val, MODEL, 102)
    else:
        batches = training_batches(opened(root).train, MODEL, batch_size=102, seed=0, augment=augment)
    with pytest.raises(BadImage, match=r"dog_3.JPEG cannot be resized \(MemoryError\)"):
        next(batches)


def test_only_regular_files_of_a_sane_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with (tmp_path / "sparse.jpg").open("wb") as stream:
        stream.truncate(6_000_000_000)
    for name, reason in (
        ("pipe.jpg", "is not a regular file"),
        ("sparse.jpg", "is larger than 256 MB"),
        ("..", r"cannot be read \(Is a directory\)|is not a regular file"),
    ):
        with pytest.raises(BadImage, match=reason):
            decode(tmp_path / name, name)
    with pytest.raises(BadImage, match="is not a regular file|cannot be read"):
        decode(Path("/dev/zero"), "zero")


def mutated(seeds: list[bytes], count: int) -> list[bytes]:
    """Damaged files: flipped bits, other bytes, parts missing or put in, cut off; the beginning is hit most."""
    rng, found = random.Random(0), []
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            place = rng.randrange(len(data) if rng.random() < 0.6 else min(len(data), 120))
            kind = rng.random()
            if kind < 0.4:
                data[place] ^= 1 << rng.randrange(8)
            elif kind < 0.75:
                data[place] = rng.choice([0, 127, 255, rng.randrange(256)])
            elif kind < 0.95:
                data[place : place + rng.randrange(40)] = rng.randbytes(rng.randrange(20))
            else:
                data = data[: place + 1]
            data = data or bytearray(b"x")
        found.append(bytes(data))
    return found


@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_are_pictures_or_bad_images(capfd: pytest.CaptureFixture[str]) -> None:
    picture, exif = photograph(0), Image.Exif()
    exif[0x0112] = 6
    seeds = [saved(picture, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")]
    seeds += [saved(picture, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP")]
    seeds += [saved(picture, "TIFF", compression=kind) for kind in ("tiff_lzw", "tiff_deflate", "jpeg")]
    seeds += [saved(picture, "JPEG", progressive=True), saved(picture.convert("P"), "BMP")]
    seeds += [saved(picture, "GIF", save_all=True, append_images=[photograph(1)])]
    crop, kinds = RandomResizedCrop((16, 16), (0.08, 1.0), (3 / 4, 4 / 3)), set()
    for number, content in enumerate(mutated(seeds, 500)):
        try:
            found = decode(content, f"x{number}", upright=True)
            assert resize_and_crop(found, MODEL).size == (16, 16)
            crop.random_map({"image": found}, np.random.default_rng(0))
            kinds.add("picture")
        except BadImage as error:
            assert str(error).startswith(f"x{number} ") and str(error).isprintable()
            kinds.add("bad")
    assert kinds == {"picture", "bad"}


def test_names_are_printed_escaped_and_pictures_of_them_are_written(tmp_path: Path, any_answer: None) -> None:
    long = b"x" * 246 + b".png"
    names = [b"a\x1b[31m.png", b"b\nc.png", b"d\xff.png", long, "é漢字.png".encode()]
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in names:
        (folder / os.fsdecode(name)).write_bytes(saved(photograph(0), "PNG"))
    classes = ("a\x1b[2J", "b\udc80", "c\nd", "e", "f")
    model = unmade(small_config(in_channels=3, class_names=classes))
    lines = list(predict_files(model, sorted(folder.iterdir()), folder, out, "masked"))
    assert len(lines) == len(names) + 2
    assert all(line.isprintable() for line in lines)
    "\n".join(lines).encode()
    written = list(out.iterdir())
    assert len(written) == len(names)
    for file in written:
        assert file.name.endswith(".depth.png") and file.name.isprintable() and len(os.fsencode(file.name)) <= 255
    assert picture_path(out, Path("plain/é.jpg")) == out / "plain/é.jpg.depth.png"
    deep = picture_path(out, Path(*["y" * 250] * 12, "z.png"))
    assert deep.parent == out and len(deep.name) <= 255


def strips(count: int) -> bytes:
    """A TIFF of one column in `count` strips, which all have the same bytes."""
    tables = 16 + 8 * count
    tags = [(256, 1), (257, count), (258, 8), (259, 1), (262, 1), (277, 1), (278, 1)]
    entries = [struct.pack("<2H2I", tag, 4, 1, value) for tag, value in tags]
    entries.insert(5, struct.pack("<2H2I", 273, 4, count, 16))
    entries.append(struct.pack("<2H2I", 279, 4, count, 16 + 4 * count))
    lengths = struct.pack("<I", 8) * count + struct.pack("<I", 1) * count
    return struct.pack("<2sHI8x", b"II", 42, tables) + lengths + struct.pack("<H", 9) + b"".join(entries) + bytes(4)


def jpeg_with(part: bytes, times: int) -> bytes:
    plain = saved(Image.new("L", (8, 8)), "JPEG")
    return plain[:2] + part * times + plain[2:]


GIF = b"GIF89a" + struct.pack("<2H3B", 4, 4, 0x80, 0, 0) + bytes(6)
BMP_RLE = struct.pack("<2sI4xI", b"BM", 0, 54) + struct.pack("<I2i2H6I", 40, 2000, 1999, 1, 8, 1, 0, 0, 0, 256, 0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: b"P6\n#" + b"c" * 200_000, "has a header far larger"),
        (lambda: b"P6\n" + b" " * 200_000, "has a header far larger"),
        (lambda: GIF + b"!\xfe\x01a\0" * 50_000, "has a header far larger"),
        (lambda: GIF + bytes(200_000), "has a header far larger"),
        (lambda: png(4, 4, *[(b"tEXt", b"a\0b")] * 50_000), "has a header far larger"),
        (lambda: jpeg_with(b"\xff\xfe\0\x02", 100_000), "has a header far larger"),
        (lambda: jpeg_with(b"\xff\xe1\xff\xffExif\0\0" + bytes(65527), 300), "has a header far larger"),
        (lambda: strips(100_001), "strips"),
        (lambda: b"P5\n1000 1001\n100\n" + bytes(1_001_000), "unusual depth"),
        (lambda: BMP_RLE + bytes(1024 + 8_000_001), "run-length"),
    ],
)
def test_files_that_pillow_reads_piece_by_piece_in_python_are_refused_in_time(
    content: Callable[[], bytes], reason: str
) -> None:
    with pytest.raises(BadImage, match=f"a.jpg .*{reason}"):
        decode(content(), "a.jpg")


def test_ordinary_metadata_is_no_reason_to_refuse() -> None:
    picture = saved(Image.effect_noise((64, 48), 50), "PNG")
    long_comment = b"P6\n#" + b"c" * 2000 + b"\n2 2\n255\n" + bytes(12)
    many_parts = jpeg_with(b"\xff\xe2\xff\xff" + bytes(65533), 100)  # 6.5 MB before the picture
    sixteen_bits = b"P6\n20 20\n1000\n" + bytes(2400)
    for content in (picture, long_comment, many_parts, sixteen_bits, strips(2000)):
        decode(content, "a picture")


def test_pillow_does_not_fill_the_terminal_with_what_it_says_of_damaged_tags() -> None:
    # In a process of its own: pytest sets its own filters.
    tags = b"".join(struct.pack("<2H2I", tag, 4, 2**30, 8) for tag in range(2000))
    tiff = struct.pack("<2sHIH", b"II", 42, 8, 2000) + tags + bytes(4)
    code = (
        "import sys; from avit_jax.data.decode import decode\n"
        "try: decode(sys.stdin.buffer.read(), 'x')\nexcept ValueError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code], input=tiff, capture_output=True, timeout=60)
    assert done.returncode == 0
    assert (done.stdout, done.stderr) == (b"refused\n", b"")


@pytest.mark.parametrize(
    ("mode", "form", "side"), [("L", "PNG", 6_800), ("RGBA", "PNG", 5_200), ("RGB", "WEBP", 3_600)]
)
def test_small_files_of_large_pictures_are_bombs(mode: str, form: str, side: int) -> None:
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, form, compress_level=6, lossless=True, quality=0, method=0)
    with pytest.raises(BadImage, match="takes about .* MB to decode and its file has 0.. MB, .* decompression bomb"):
        decode(file.getvalue(), "bomb")
    file = io.BytesIO()
    Image.new(mode, (side // 2, side // 2)).save(file, form, compress_level=6, lossless=True, quality=0, method=0)
    assert decode(file.getvalue(), "flat").size == (side // 2, side // 2)
