"""The batches of a planned training, without values."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastpeft.errors import UserError
from fastpeft.models.tasks import SOUND
from fastpeft_kernels.common.shapes import imitating

from ..trace.live import LiveBytes, rounded
from .given import SEEN
from .media import SMALL, least_tokens, pixels, rows_with_pictures, takes_patches, tokens_of, tokens_of_patches
from .sound import sound

if TYPE_CHECKING:
    from .predicting import Setting


class Batches:
    """Of rows as a setting has them.

    Args:
        model: without values, as `skeleton.build` makes it.

    Attributes:
        each: tokens of a picture.
    """

    def __init__(self, setting: Setting, model: Any) -> None:
        self.setting = setting
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.each = 0
        if setting.pictures is not None:
            if setting.task != "image-text-to-text":
                raise UserError(f"images: expected 0 for {setting.task}, got {self.pictures}")
            if setting.config.model_type == "llava_onevision" and self.pictures > 1:  # more are not cut up
                raise UserError(f"images: expected at most 1 for llava_onevision, got {self.pictures}")
            self.each = self._tokens_of_a_picture()
            self.check(setting.tokens)
        if setting.seconds is not None and not self.hears:
            raise UserError(f"seconds: expected none for {setting.task}, got {setting.seconds:g}")

    @property
    def pictures(self) -> int:
        """Of a row."""
        return 0 if self.setting.pictures is None else self.setting.pictures.count

    @property
    def hears(self) -> bool:
        """Whether each row is a recording."""
        return self.setting.task in SOUND

    def count(self, rows: int) -> int:
        """Pictures or recordings of so many rows; all that was given counts as one."""
        if self.setting.given is not None:
            return 1
        return rows if self.hears else rows * self.pictures

    @property
    def least(self) -> int:
        """Tokens of the shortest row."""
        return least_tokens(self.pictures, self.each) if self.pictures else 1

    @property
    def shrinks(self) -> bool:
        """Whether a picture may have the size of a few patches."""
        return self.setting.pictures is not None and takes_patches(self.model)

    def described(self) -> dict[str, Any]:
        """Settings of a plan that only rows with pictures have."""
        if self.hears:
            return {} if self.setting.seconds is None else {"seconds": f"{self.setting.seconds:g}"}
        if self.setting.pictures is None:
            return {}
        size = self.setting.pictures.size
        sized = {"image_size": f"{size[0]}x{size[1]}"} if size else {}
        return {"images": self.pictures, **sized, "image_tokens": self.each}

    def check(self, tokens: int) -> None:
        """Raises UserError for rows that are too short for their pictures."""
        if tokens < self.least:
            raise UserError(
                f"seq: expected at least {self.least}, for {self.pictures} pictures of {self.each} tokens, got {tokens}"
            )

    def of(self, rows: int, tokens: int, pictures: int, small: bool = False) -> dict[str, Tensor]:
        """A batch with so many pictures in all, in its first rows; what are numbers has values then.

        Args:
            small: pictures of the least size.
        """
        setting = self.setting
        if setting.given is not None:
            return setting.given.batch("pixel_attention_mask" in inspect.signature(self.model.forward).parameters)
        if setting.pictures is not None:
            seen = pixels(self.model, setting.config, SMALL if small else setting.pictures.size, pictures)
            each = tokens_of_patches(setting.config, seen) if small else self.each
            return seen | rows_with_pictures(self.model, setting.config, rows, tokens, self.pictures, pictures, each)
        ids = torch.empty((rows, tokens), dtype=torch.int64, device="meta")
        if self.hears:
            labels = _label(setting.config, ids[:, 0]) if setting.task == "audio-classification" else ids
            heard = sound(self.model, setting.config, rows, setting.seconds)
            cast = {name: each.to(setting.dtype) for name, each in heard.items()}  # as autocast does at once
            return cast | {"labels": labels}
        if setting.task == "sequence-classification":
            return {"input_ids": ids, "labels": _label(setting.config, ids[:, 0])}
        if setting.task == "question-answering":
            return {"input_ids": ids, "start_positions": ids[:, 0], "end_positions": ids[:, 0]}
        return {"input_ids": ids, "labels": ids}

    def nbytes(self, rows: int) -> int:
        """Of what so many rows see or hear, which lies on the device during the step."""
        return sum(rounded(self.count(rows) * size, self.setting.device) for size in self._sizes)

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        """Bytes of what one picture or recording is given as; a search for what fits asks for them again and again."""
        one: dict[str, Tensor] = {}
        if self.setting.given is not None:
            return self.setting.given.nbytes
        if self.hears:
            one = sound(self.model, self.setting.config, 1, self.setting.seconds)
        elif self.setting.pictures is not None:
            one = self._picture()
        return tuple(one[name].nbytes for name in SEEN if name in one)

    def _picture(self) -> dict[str, Tensor]:
        assert self.setting.pictures is not None
        return pixels(self.model, self.setting.config, self.setting.pictures.size, 1)

    def _tokens_of_a_picture(self) -> int:
        with torch.no_grad(), imitating(self.setting.device), LiveBytes(self.setting.device, some=True):
            return tokens_of(self.model.get_image_features(**self._picture()))


def _label(config: Any, classes: Tensor) -> Tensor:
    """A class a row, several, or a number, as the model's loss wants it."""
    if getattr(config, "problem_type", None) == "multi_label_classification":
        return torch.empty((len(classes), config.num_labels), device="meta")
    return classes.float() if config.num_labels == 1 else classes
