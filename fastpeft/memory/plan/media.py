"""What a model that sees is given: pictures as its processor makes them, without values, and rows with their tokens."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import UserError

AROUND = 2
"""Tokens of text around each picture, which mark where it begins and ends."""
SIDE = 1024
"""Pixels of a square picture where the model takes any size, and nothing was said."""
SMALL = (56, 56)
"""A picture of few patches."""
MOST = 1 << 16
MOST_TILES = 12
"""Of a picture that InternVL cuts up, as its processor does by default."""
SPLIT = 4
"""Tiles along the longer side of a picture that Idefics 3 and SmolVLM split, as their processors do by default."""


@dataclass(frozen=True)
class Pictures:
    """Of each row.

    Attributes:
        count: at least 1.
        size: height and width in pixels; None for what the model takes by default.
    """

    count: int
    size: tuple[int, int] | None = None


def pictures_of(count: int, size: int | tuple[int, int] | None) -> Pictures | None:
    """What `fastpeft.plan` is told of pictures.

    Raises:
        ValueError: no number of pictures, or no size.
    """
    if not isinstance(count, int) or not 0 <= count <= MOST:
        raise ValueError(f"images: expected 0 to {MOST}, got {count!r}")
    both = (size, size) if isinstance(size, int) else size
    if both is None:
        return Pictures(count) if count else None
    if len(both) != 2 or not all(isinstance(each, int) and 1 <= each <= MOST for each in both):
        raise ValueError(f"image_size: expected height and width of 1 to {MOST} pixels, got {size!r}")
    if not count:
        raise ValueError("image_size: expected images to be given with it, got 0")
    return Pictures(count, both)


def parse_image_size(text: str | None) -> int | tuple[int, int] | None:
    """What `--image-size` says.

    Raises:
        ValueError: neither one number nor two.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--image-size: expected pixels, such as 448 or HEIGHTxWIDTH, got {text!r}")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def pixels(model: Any, config: Any, size: tuple[int, int] | None, count: int) -> dict[str, Tensor]:
    """What the model is given of `count` pictures; numbers have values, pixels none where nothing looks into them.

    Args:
        model: of transformers, an image-text-to-text one.
        size: as of `Pictures`.

    Raises:
        UserError: it takes pictures in a form that is not known.
    """
    vision, names = config.vision_config, inspect.signature(model.forward).parameters
    if takes_patches(model):
        return _patches(vision, size, count)
    cut = getattr(config, "image_grid_pinpoints", None)
    if "pixel_values" not in names or (cut and "image_sizes" not in names):
        raise UserError(f"images: {type(model).__name__} takes pictures in a form that no plan is made for")
    side = _side(vision)
    if cut:
        return _cut(size or (SIDE, SIDE), cut, side, count)
    if config.model_type == "internvl":
        return {"pixel_values": _floats(count * _shaped(size or (SIDE, SIDE), side), 3, side, side)}
    if "pixel_attention_mask" in names:
        tiles = torch.ones((1, count * _tiles(side, size), 3, side, side))  # those of zeros alone would be left out
        return {"pixel_values": tiles}
    if "image_sizes" in names and getattr(vision, "model_type", "") == "pixtral":
        step = vision.patch_size * getattr(config, "spatial_merge_size", 1)
        height, width = (max(1, round(each / step)) * step for each in size or (side, side))
        return {
            "pixel_values": _floats(count, 3, height, width),
            "image_sizes": torch.tensor([[height, width]] * count),
        }
    if size is not None and size != (side, side):
        raise UserError(
            f"image_size: {type(model).__name__} makes every picture {side}x{side}, got {size[0]}x{size[1]}"
        )
    return {"pixel_values": _floats(count, 3, side, side)}


def _side(vision: Any) -> int:
    """Pixels of a square picture as the model takes it."""
    found: Any = getattr(vision, "image_size", None) or SIDE
    return int(found[0] if isinstance(found, (list, tuple)) else found)


def takes_patches(model: Any) -> bool:
    """Whether it is given pictures of any size as rows of patches, as Qwen-VL is."""
    return "image_grid_thw" in inspect.signature(model.forward).parameters


def tokens_of_patches(config: Any, seen: dict[str, Tensor]) -> int:
    """Of each picture of what `pixels` gives such a model."""
    return int(seen["image_grid_thw"][0].prod()) // config.vision_config.spatial_merge_size**2


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _patches(vision: Any, size: tuple[int, int] | None, count: int) -> dict[str, Tensor]:
    """Qwen-VL's: rows of patches, of every picture's one after the other, and how many there are of each."""
    merge, patch = vision.spatial_merge_size, vision.patch_size
    height, width = (max(1, round(each / (patch * merge))) * merge for each in size or (SIDE, SIDE))
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
    features = channels * vision.temporal_patch_size * patch**2
    return {
        "pixel_values": _floats(count * height * width, features),
        "image_grid_thw": torch.tensor([[1, height, width]] * count),
    }


def _tiles(side: int, size: tuple[int, int] | None) -> int:
    """Of a picture whose longer side becomes SPLIT tiles; and one of the whole picture."""
    height, width = size or (1, 1)
    scale = SPLIT / max(height, width)
    return max(1, ceil(height * scale - 1e-6)) * max(1, ceil(width * scale - 1e-6)) + 1


def _cut(size: tuple[int, int], resolutions: list[Any], side: int, count: int) -> dict[str, Tensor]:
    """LLaVA-NeXT's and LLaVA-OneVision's: tiles of the resolution that fits a picture best, and one of the whole."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    tiles = image_size_to_num_patches(size, [list(each) for each in resolutions], side)
    return {"pixel_values": _floats(count, tiles, 3, side, side), "image_sizes": torch.tensor([size] * count)}


def _shaped(size: tuple[int, int], side: int) -> int:
    """InternVL's tiles of a picture, in the grid whose shape is nearest, of several the one with most tiles that the
    picture fills half; and one of the whole picture."""
    height, width = size
    sides = range(1, MOST_TILES + 1)
    grids = sorted((wide * high, wide, high) for wide in sides for high in sides if wide * high <= MOST_TILES)
    filled = [each for each in grids if each[0] == 1 or height * width > each[0] * side**2 / 2]
    least = min(abs(width / height - wide / high) for _, wide, high in grids)
    nearest = [each for each in grids if abs(width / height - each[1] / each[2]) == least]
    tiles = max([each[0] for each in nearest if each in filled], default=nearest[0][0])
    return tiles + 1 if tiles > 1 else 1


def tokens_of(features: Any) -> int:
    """Of what `get_image_features` gave."""
    found = getattr(features, "pooler_output", features)
    found = [found] if isinstance(found, Tensor) else found
    return sum(each.numel() // each.shape[-1] for each in found)


def least_tokens(pictures: int, each: int) -> int:
    """Of a row that has so many pictures."""
    return pictures * (each + AROUND) + 1


def rows_with_pictures(
    model: Any, config: Any, rows: int, tokens: int, most: int, pictures: int, each: int
) -> dict[str, Tensor]:
    """Token IDs of rows with so many pictures in all, with values, and what goes with them.

    Args:
        most: pictures of a row; the first rows get as many.
        each: tokens of a picture.
    """
    here = image_token(config)
    others = {value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))}
    word = next(number for number in range(len(others) + 1) if number not in others)
    ids = torch.full((rows, tokens), word)
    for index in range(pictures):
        row, place = divmod(index, most)
        begin = 1 + place * (each + AROUND)
        ids[row, begin : begin + each] = here
    found = {"input_ids": ids, "labels": torch.empty((rows, tokens), dtype=torch.int64, device="meta")}
    names = inspect.signature(model.forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in names:
            found[name] = (ids == here).long()
    return found


def image_token(config: Any) -> int:
    """The ID that stands where a picture's features go."""
    for name in ("image_token_id", "image_token_index"):
        if (found := getattr(config, name, None)) is not None:
            return int(found)
    raise UserError(f"MODEL: {type(config).__name__} does not say which token stands for a picture")
