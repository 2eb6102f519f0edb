"""Pictures from anywhere, turned into what the network was trained on.

Fashion-MNIST shows one garment from the front, light on black, its longest side filling the
28 pixels. It was made from shop photos on a nearly white backdrop (Xiao, Rasul & Vollgraf 2017,
arXiv:1708.07747, section 2): trim edges within 5 % of the corners' color, take the longest edge
to 28, sharpen with a Gaussian of radius and sd 1, center on 28x28, negate, turn gray. `prepare`
does the same with three changes that bring other people's photos nearer to that:

* it reduces by averaging areas, since skipping rows and columns of a 12 megapixel photo turns
  fabric into noise, where the authors started from thumbnails of 51x73;
* it divides by the backdrop, so that a gray, tinted or shaded one becomes black, not dark gray;
* it negates only a garment that is darker than its backdrop.

Nothing is segmented: a floor, a hanger, a person or a strong shadow counts as garment,
and a garment of the backdrop's own color counts as nothing. A plain backdrop works best.

Handwriting for MNIST and Kuzushiji-MNIST goes the same way and ends as theirs does, see `FORMS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from fashionnet.data import picture_files
from fashionnet.data.picture_files import decoded, named, open_file
from fashionnet.errors import UserError

SIDE = 28
# What makes a picture upright that was stored with this EXIF orientation.
_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Larger pictures are averaged down to this first; a garment across a tenth of one still has 50.
_WORKING_SIDE = 512
_CLOSE = 0.05 * 255  # the paper's "within 5 % of the maximum possible intensity"
_UNEVEN = 0.15 * 255  # a backdrop that varies more than this is not used as one
_HALO = 0.15  # of a garment's contrast: what blur and JPEG leave around it
# ImageMagick's "sharpen" of radius 1 and standard deviation 1; its weights add up to 1.
_CORNER, _EDGE = -0.0624, -0.1028
_SHARPEN = ImageFilter.Kernel(
    (3, 3),
    [_CORNER, _EDGE, _CORNER, _EDGE, 1 - 4 * (_CORNER + _EDGE), _EDGE, _CORNER, _EDGE, _CORNER],
    scale=1,
)

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Size = tuple[int, int]  # width, height, as Pillow has it
Box = tuple[int, int, int, int]  # left, upper, right, lower


@dataclass(frozen=True)
class Picture:
    """A picture as the network takes it.

    Attributes:
        path: the file, as it was asked for.
        pixels: uint8, of the shape of the data set's pictures.
        steps: what was done to the picture, in order and in plain words; () for nothing.
    """

    path: str
    pixels: Tensor
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Form:
    """How the pictures of a data set show their subject, light on black on 28x28 pixels.

    Attributes:
        longest: pixels of the subject's longest side.
        by_mass: whether its center of mass is in the middle, not the center of its box.
        is_sharpened: whether it is sharpened; otherwise it is scaled to have a white pixel.
    """

    longest: int = SIDE
    by_mass: bool = False
    is_sharpened: bool = False


FORMS = {
    "fashion_mnist": Form(is_sharpened=True),
    "mnist": Form(longest=20, by_mass=True),  # LeCun et al. 1998, section III.A
    "kmnist": Form(),
}


def read(path: str | Path, form: Form = FORMS["fashion_mnist"]) -> Picture:
    """Reads a picture file and prepares it for the network, see `prepare`.

    Raises:
        UserError: the file is missing, is not a picture, is damaged, or is too large to be opened
            safely.
    """
    with named(path), open_file(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about oddities that do no harm
        with decoded(file) as image:
            pixels, steps = prepare(image, form)
    return Picture(str(path), pixels, steps)


def prepare(
    image: Image.Image, form: Form = FORMS["fashion_mnist"]
) -> tuple[Tensor, tuple[str, ...]]:
    """Turns `image` into a picture like those of a data set.

    An opaque gray picture of 28x28 counts as one already and keeps its values. The current frame of
    an animation is used.

    Returns:
        (28, 28) uint8, and the steps that were taken, in plain words.

    Raises:
        UserError: the picture is empty, or its color space cannot be converted to RGB.
    """
    steps: list[str] = []
    factor = -(-max(image.size) // _WORKING_SIDE)
    rgba, full_size = _upright(image, factor, steps)
    if rgba.size == (SIDE, SIDE):
        red, green, blue, alpha = np.moveaxis(np.asarray(rgba), 2, 0)
        if alpha.min() == 255 and (red == green).all() and (green == blue).all():
            return torch.from_numpy(red.copy()), tuple(steps)

    rgb = _on_white(rgba, steps)
    backdrop, tolerance = _backdrop(rgb, steps)
    stands_out = _stands_out(rgb, backdrop, tolerance)
    brightness = _brightness(rgb, backdrop, stands_out, tolerance, steps)
    box = _box(stands_out, full_size, steps)
    return _fitted(brightness, box, form, steps), tuple(steps)


def read_resized(path: str | Path, shape: Sequence[int]) -> Picture:
    """Reads a picture file and brings it to a shape, (H, W) gray or (3, H, W) RGB; see `read`."""
    steps: list[str] = []
    with named(path), open_file(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about oddities that do no harm
        with decoded(file) as opened:
            rgba, _ = _upright(opened, 1, steps)
            rgb = Image.fromarray(np.rint(_on_white(rgba, steps)).astype(np.uint8))
    image = rgb if len(shape) == 3 else rgb.convert("L")
    height, width = shape[-2:]
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        steps.append(f"resized to {width}x{height}")
    pixels = torch.from_numpy(np.array(image))
    pixels = pixels.permute(2, 0, 1).contiguous() if pixels.ndim == 3 else pixels
    return Picture(str(path), pixels, tuple(steps))


def _upright(image: Image.Image, factor: int, steps: list[str]) -> tuple[Image.Image, Size]:
    """Returns a picture as RGBA, upright and smaller by a factor, and its full size."""
    if 0 in image.size:
        raise UserError("it has no pixels; choose another picture")
    if _is_animated(image):
        steps.append("used one frame of an animation")
    rgba, full_size = reduced_rgba(image, factor, steps), image.size
    if (orientation := exif_orientation(image)) in TURNS:
        rgba = rgba.transpose(TURNS[orientation])
        full_size = full_size if orientation < 5 else full_size[::-1]
        steps.append("rotated as its EXIF tag says")
    return rgba, full_size


def reduced_rgba(image: Image.Image, factor: int, steps: list[str]) -> Image.Image:
    """Returns `image` in mode RGBA, each side divided by `factor` by averaging.

    Raises:
        UserError: its color space cannot be converted to RGB.
    """
    if image.mode.startswith("I;"):
        image = image.convert("I")
    elif image.mode in ("1", "P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")  # bits and indices into a palette cannot be averaged
    if factor > 1:
        image = image.reduce(factor)
    if image.mode in ("I", "F"):
        image = _eight_bit(image, steps)
    try:
        return image.convert("RGBA")
    except ValueError as error:
        raise UserError(f"mode {image.mode} cannot be converted to RGB; save it as RGB") from error


def _eight_bit(image: Image.Image, steps: list[str]) -> Image.Image:
    """Returns a picture of wide numbers in mode L, by the smallest full scale that holds them."""
    values = np.asarray(image)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low).astype(np.float64)
    scales = [1.0, 255.0, 65535.0] if image.mode == "F" else [255.0, 65535.0]
    full = next((scale for scale in scales if low >= 0 and high <= scale), None)
    if full is None:  # no scale in common use
        values, full = values - low, high - low or 1.0
    if full != 255:
        steps.append("scaled its values to 8 bits")
    return Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8))


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # damage behind the first frame, the only one that is used
        return False


def exif_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 (upright) where there is none that can be read."""
    try:
        picture_files.check_exif(image.info.get("exif", b""))
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF does no harm to the picture
        return 1


def _on_white(rgba: Image.Image, steps: list[str]) -> Floats:
    """Returns (height, width, 3), 0..255."""
    if np.asarray(rgba)[..., 3].min() < 255:
        steps.append("laid on white where transparent")
        rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(rgba.convert("RGB"), dtype=np.float32)


def _backdrop(rgb: Floats, steps: list[str]) -> tuple[Floats, float]:
    """Estimates what the picture would be without its garment.

    A quadratic in x and y, per channel, fitted to the border: flat, evenly shaded and vignetted
    backdrops are of that form. The fit starts from the corners, as in the paper, since a garment
    may touch the edges, and goes on to all of the border that is like them.

    Returns:
        The backdrop, (height, width, 3), and how far from it a pixel may be and still belong to it.
    """
    height, width, _ = rgb.shape
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    terms = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], axis=2).astype(np.float32)
    margin = max(1, min(height, width) // 50)
    border = np.ones((height, width), dtype=bool)
    border[margin:-margin, margin:-margin] = False
    in_corners = (np.abs(x) > 0.75) & (np.abs(y) > 0.75)

    seen, design = rgb[border], terms[border]
    weights = np.zeros((terms.shape[2], 3), dtype=np.float32)
    weights[0] = np.median(seen[in_corners[border]], axis=0)
    ridge = np.diag([0, 1, 1, 1, 1, 1]).astype(np.float32) * 1e-3
    tolerance = 0.2 * 255
    for _ in range(4):
        distance = np.abs(seen - design @ weights).max(axis=1)
        alike = distance <= tolerance
        if not alike.any():
            break
        chosen = design[alike]
        weights = np.linalg.solve(chosen.T @ chosen + ridge * len(chosen), chosen.T @ seen[alike])
        tolerance = float(np.clip(6 * np.median(distance[alike]), _CLOSE, _UNEVEN))
    if (distance <= _CLOSE).mean() < 0.6:  # of shop photos cropped to the garment 0.73 or more
        steps.append("the backdrop is uneven or hidden, so take the answer with care")
    return np.clip(terms @ weights, 0, 255), tolerance


def _stands_out(rgb: Floats, backdrop: Floats, tolerance: float) -> Mask:
    """Returns (height, width), true where something covers the backdrop."""
    distance = np.abs(rgb - backdrop).max(axis=2)
    outside = distance[distance > tolerance]
    if outside.size:
        tolerance = max(tolerance, _HALO * float(np.quantile(outside, 0.9)))
    mask: Mask = distance > tolerance
    return mask


def _brightness(
    rgb: Floats, backdrop: Floats, stands_out: Mask, tolerance: float, steps: list[str]
) -> Floats:
    """Returns gray (height, width) values: 0 for the backdrop, up to 255 for the garment."""
    luma = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # as Pillow turns RGB into gray
    if (np.ptp(rgb, axis=2) > 0).any():
        steps.append("turned gray")
    gray, level = rgb @ luma, backdrop @ luma
    if stands_out.any():
        is_dark_on_light = (gray - level)[stands_out].sum() < 0
    else:
        is_dark_on_light = level.mean() >= 128
    if is_dark_on_light:
        what = "it was dark on light" if stands_out.any() else "the picture was light"
        steps.append(f"negated: {what}")
    else:  # the mirror image of the other case
        gray, level = 255 - gray, 255 - level
    if level.min() < 255 - _CLOSE:
        steps.append("evened the backdrop to black")
    # Below 0 as far as noise goes, so that the average of a noisy backdrop is black.
    brightness: Floats = np.clip(255 * (level - gray) / np.maximum(level, 32), -tolerance, 255)
    return brightness


def _box(stands_out: Mask, full_size: Size, steps: list[str]) -> Box:
    """Returns the box around what stands out, without specks.

    `full_size` is the size of the file's picture, for the words only.
    """
    height, width = stands_out.shape
    mask = Image.fromarray(stands_out.astype(np.uint8) * 255)
    speck = 1 + 2 * round(max(mask.size) / 128)  # a quarter of a pixel of the result
    # Pillow 12 ends the process on a filter of one pixel, which would change nothing.
    smooth = mask.filter(ImageFilter.MedianFilter(speck)) if speck > 1 else mask
    box = smooth.getbbox() or mask.getbbox()
    if box is None:
        steps.append("nothing stands out from the backdrop, so used it whole")
        return 0, 0, width, height
    if box != (0, 0, width, height):
        wide, high = full_size
        left, upper, right, lower = box
        rest = f"{round((right - left) * wide / width)}x{round((lower - upper) * high / height)}"
        steps.append(f"trimmed the backdrop: {wide}x{high} -> {rest}")
    return box


def _fitted(brightness: Floats, box: Box, form: Form, steps: list[str]) -> Tensor:
    """Returns (28, 28) uint8: the box, scaled, sharpened or brightened, and centered."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = form.longest / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if size != (width, height):
        steps.append(f"scaled to {size[0]}x{size[1]}")
    small = np.asarray(Image.fromarray(brightness).resize(size, Image.Resampling.BOX, box=box))
    small = np.clip(small, 0, 255)
    if not form.is_sharpened:
        small = small * (255 / max(small.max(), 1))
    # A black margin of one more pixel, which Pillow's filter leaves as it is.
    values = np.zeros((SIDE + 2, SIDE + 2), dtype=np.uint8)
    left, upper = ((SIDE + 3 - side) // 2 for side in size)  # an odd pixel goes left and above
    if form.by_mass and small.any():
        left, upper = (_start(small.sum(axis), side) for axis, side in enumerate(size))
    values[upper : upper + size[1], left : left + size[0]] = np.rint(small)
    sharp = Image.fromarray(values)
    if form.is_sharpened:
        steps.append("sharpened")
        sharp = sharp.filter(_SHARPEN)
    if size != (SIDE, SIDE):
        steps.append("padded to 28x28")
    return torch.from_numpy(np.array(sharp)[1:-1, 1:-1].copy())


def _start(mass: Floats, side: int) -> int:
    """Returns where a side begins whose center of mass comes to the middle; 1 is the first pixel.

    Args:
        mass: of each row or column of the side.
    """
    center = mass @ np.arange(side) / mass.sum()
    return int(np.clip(round(1 + SIDE / 2 - center), 1, SIDE + 1 - side))
