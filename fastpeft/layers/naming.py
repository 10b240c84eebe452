"""PEFT's name of a layer's class where it is printed: `get_layer_status` and many a test read it there."""

from __future__ import annotations


class NamedAsPeft:
    """Mixed in before a PEFT layer class."""

    def _get_name(self) -> str:
        return next(kind.__name__ for kind in type(self).__mro__ if kind.__module__.startswith("peft."))
