"""TrivialAugment and RandAugment: random operations of published magnitudes on raw uint8 images, on any device.

Operations and magnitudes are those of torchvision's `TrivialAugmentWide` (Müller and Hutter 2021,
https://arxiv.org/abs/2103.10158) and `RandAugment` (Cubuk et al. 2020, https://arxiv.org/abs/1909.13719), which for
tensors differ from those of PIL in rounding. Products and sums are rounded alike on all devices.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.transforms.augmentation import Augmentation, AugmentationParams
from pipeline.transforms.ops.foreground import histograms

OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "auto_contrast", "equalize"),
)
_ROTATE, _BRIGHTNESS, _SHARPNESS = (OPERATIONS.index(name) for name in ("rotate", "brightness", "sharpness"))
_BINS = 31  # magnitudes of an operation


class AutoAugment:
    """Applies the operations that the parameters select, `Augmentation.auto_augment_rounds` to each image.

    The images of one operation are processed together. Their indices are computed on the host, so their number is known
    without waiting for a GPU.

    Args:
        augmentation: Selects the operations and their magnitudes.
        shape: (H, W) of the upright images.
        transposed: Whether rows and columns of the images are exchanged.
    """

    def __init__(self, augmentation: Augmentation, shape: tuple[int, int], transposed: bool) -> None:
        self._augmentation = augmentation
        self._shape = shape
        self._transposed = transposed
        self._fill = 0 if augmentation.fill == "border" else augmentation.fill
        self._magnitudes = magnitudes(augmentation.auto_augment, shape)

    def op_params(self, params: AugmentationParams) -> dict[str, NDArray]:
        """Compute, for each round and operation that is applied, the indices of its images and their parameters."""
        operations, bins, signs = self._augmentation.auto_augment_numbers(params)
        arrays: dict[str, NDArray] = {}
        for number in range(operations.shape[1]):
            operation = (operations[:, number] * len(OPERATIONS)).astype(np.int64)
            if self._augmentation.auto_augment == "trivial_augment":
                column = (bins[:, number] * _BINS).astype(np.int64)
            else:
                column = np.full_like(operation, self._augmentation.rand_augment_magnitude)
            magnitude = self._magnitudes[operation, column]
            is_signed = (operation > 0) & (operation <= _SHARPNESS)
            magnitude = np.where(is_signed & (signs[:, number] <= 0.5), -magnitude, magnitude)
            moved = np.flatnonzero((operation > 0) & (operation <= _ROTATE))
            arrays[f"affine_{number}_images"] = moved
            arrays[f"affine_{number}"] = self._affine_matrices(operation[moved], magnitude[moved])
            for index, name in enumerate(OPERATIONS[_BRIGHTNESS:], _BRIGHTNESS):
                images = np.flatnonzero(operation == index)
                arrays[f"{name}_{number}_images"] = images
                arrays[f"{name}_{number}"] = _operation_params(name, magnitude[images])
        return {name: array for name, array in arrays.items() if len(array)}

    def __call__(self, images: torch.Tensor, params: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Apply the operations to uint8 [B, H, W, C], as stored; the input is not changed."""
        images = images.clone()
        for number in range(self._augmentation.auto_augment_rounds):
            for name in ("affine", *OPERATIONS[_BRIGHTNESS:]):
                if f"{name}_{number}" not in params:
                    continue
                indices, amounts = params[f"{name}_{number}_images"], params[f"{name}_{number}"]
                selected = images.index_select(0, indices)
                if name == "affine":
                    changed = move_nearest(selected, amounts, self._fill)
                else:
                    changed = _FUNCTIONS[name](selected, amounts)
                images.index_copy_(0, indices, changed)
        return images

    def _affine_matrices(self, operations: NDArray[np.int64], amounts: NDArray[np.float64]) -> NDArray[np.float32]:
        """Compute the inverse maps of the geometric operations, [n, 2, 3], in pixels from the centre of the image.

        A shear keeps the upper left corner in place.
        """
        name = np.array(OPERATIONS)[operations]
        matrices = np.zeros((len(name), 2, 3))
        matrices[:, [0, 1], [0, 1]] = 1
        for axis, letter in enumerate("xy"):
            sheared, shifted = name == f"shear_{letter}", name == f"translate_{letter}"
            matrices[sheared, axis, 1 - axis] = amounts[sheared]
            matrices[sheared, axis, 2] = amounts[sheared] * (self._shape[axis] / 2)
            matrices[shifted, axis, 2] = -np.trunc(amounts[shifted])
        turned = name == "rotate"  # counterclockwise
        cosine, sine = np.cos(np.deg2rad(amounts[turned])), np.sin(np.deg2rad(amounts[turned]))
        matrices[turned, :, :2] = np.stack([cosine, -sine, sine, cosine], axis=1).reshape(-1, 2, 2)
        if self._transposed:
            matrices = matrices[:, ::-1, [1, 0, 2]]
        return matrices.astype(np.float32)


def magnitudes(policy: str, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Return the magnitudes of each operation for images of shape (H, W), [14, 31]; 0 where there is none.

    They are rounded to float32 as in torchvision, because integer parts are taken of some.
    """
    if policy == "trivial_augment":
        shear, rotate, blend, bits = 0.99, 135.0, 0.99, 6
        translate = [32.0, 32.0]
    else:
        shear, rotate, blend, bits = 0.3, 30.0, 0.9, 4
        translate = [150 / 331 * side for side in shape[::-1]]
    ends = (0.0, shear, shear, *translate, rotate, *[blend] * 4)
    rows = [torch.linspace(0, end, _BINS) for end in ends]
    rows.append((8 - torch.arange(_BINS) / ((_BINS - 1) / bits)).round())
    rows.append(torch.linspace(1, 0, _BINS))
    return torch.stack([*rows, *[torch.zeros(_BINS)] * 2]).double().numpy()


def _operation_params(name: str, amounts: NDArray[np.float64]) -> NDArray:
    """Compute what an operation on pixel values needs of n images, [n, ...]."""
    if name == "posterize":  # the bits that are kept
        return (256 - 2 ** (8 - amounts.astype(np.int64))).astype(np.uint8)
    if name == "solarize":  # the smallest value that is inverted
        return np.ceil((255 * amounts).astype(np.float32)).astype(np.uint8)
    factors = 1 + amounts  # of the image, and of what is mixed with it
    return np.stack([factors, 1 - factors], axis=1).astype(np.float32)


def move_nearest(images: torch.Tensor, matrices: torch.Tensor, fill: int) -> torch.Tensor:
    """Move the pixels of each image to the nearest pixel.

    The arithmetic is that of torchvision: of an exact half it decides which pixel is the nearest.

    Args:
        images: uint8 [n, H, W, C].
        matrices: float32 [n, 2, 3]; maps (x, y, 1) of the output to (x, y) of the input, pixels from the centre.
        fill: Value of pixels from outside the image.
    """
    count, height, width, channels = images.shape
    x, y = (torch.arange(side, device=images.device, dtype=torch.float32) - (side - 1) / 2 for side in (width, height))
    sources = []
    for axis, side in enumerate((width, height)):
        # A tensor, because CUDA multiplies by the reciprocal of a number, which rounds otherwise.
        half = matrices.new_full((), side / 2)
        to_x, to_y, shift = (matrices[:, axis] / half).T[:, :, None, None]
        positions = x * to_x + y[:, None] * to_y + shift  # -1 .. 1
        sources.append(((positions + 1) * (side / 2) - 0.5).round_().long())  # [n, H, W]
    column, row = sources
    is_inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = (row.clamp_(0, height - 1) * width + column.clamp_(0, width - 1)).view(count, -1, 1)
    moved = images.reshape(count, -1, channels).gather(1, source.expand(-1, -1, channels))
    return moved.masked_fill_(~is_inside.view(count, -1, 1), fill).view(images.shape)


def _multiply_add(base: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return base + x * y of float32 tensors, rounded once, as vectorized code of CPUs does."""
    return (base.double() + x.double() * y.double()).float()


def _to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.clamp_(0, 255).to(torch.uint8)


def _blend(pixels: torch.Tensor, others: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Mix float32 pixels [n, H, W, C] with others by factors float32 [n, 2]."""
    own, other = factors.T[:, :, None, None, None]
    return _to_bytes(_multiply_add(pixels * own, others, other))


def _luminance(pixels: torch.Tensor) -> torch.Tensor:
    """Return the floor of the luminance of float32 [n, H, W, C], with one channel."""
    if pixels.shape[3] == 1:
        return pixels
    red, green, blue = pixels.split(1, dim=3)
    green_weight, blue_weight = (pixels.new_full((), weight) for weight in (0.587, 0.114))  # rounded to float32
    return _multiply_add(_multiply_add(red * 0.2989, green, green_weight), blue, blue_weight).floor_()


def _brightness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return _to_bytes(images.float() * factors[:, :1, None, None])


def _color(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    if images.shape[3] == 1:
        return images
    pixels = images.float()
    return _blend(pixels, _luminance(pixels), factors)


def _contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    pixels = images.float()
    mean = _luminance(pixels).double().mean(dim=(1, 2, 3), keepdim=True).float()
    return _blend(pixels, mean, factors)


def _sharpness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Blend the inner pixels with their mean over 3 x 3 pixels, of which the middle one counts five times."""
    height, width = images.shape[1:3]
    if min(height, width) <= 2:
        return images
    values = images.int()
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * values[:, 1:-1, 1:-1]
    blurred = torch.div(2 * sums + 13, 26, rounding_mode="floor")  # 13 is odd: there are no halves to round
    inner = values[:, 1:-1, 1:-1]
    sharpened = _multiply_add(inner.float(), (blurred - inner).float(), factors[:, 1:, None, None])
    result = images.clone()
    result[:, 1:-1, 1:-1] = _to_bytes(sharpened)
    return result


def _posterize(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    return images & masks.view(-1, 1, 1, 1)


def _solarize(images: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    return torch.where(images >= thresholds.view(-1, 1, 1, 1), ~images, images)


def _auto_contrast(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Scale each channel to 0 .. 255; a channel with a single value is not changed."""
    lowest, highest = (extreme(dim=(1, 2), keepdim=True).float() for extreme in (images.amin, images.amax))
    is_constant = lowest == highest
    scale = ((highest - lowest) * (1 / 255)).masked_fill_(is_constant, 1)
    return _to_bytes((images - lowest.masked_fill_(is_constant, 0)) / scale)


def _equalize(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Equalize the histogram of each channel as PIL does, whose table differs from that of `foreground.equalize`."""
    count, height, width, channels = images.shape
    planes = images.permute(0, 3, 1, 2).reshape(count * channels, -1)
    counts = histograms(planes)
    cumulative = counts.cumsum(dim=1)
    brightest = cumulative.argmax(dim=1, keepdim=True)  # the first with all pixels
    step = (planes.shape[1] - counts.gather(1, brightest)) // 255
    table = ((cumulative - counts + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device)).to(torch.uint8)
    equalized = table.gather(1, planes.long()).view(count, channels, height, width)
    return equalized.permute(0, 2, 3, 1)


_FUNCTIONS = {
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
}
