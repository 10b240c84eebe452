"""YAML as people mean it: 1e-4 is a number, and a key that comes twice is a mistake."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

LARGEST = 1 << 20
"""Characters of a text, and values that it may stand for: aliases make many of few."""
BITS = 64
"""Of a whole number: no key wants more, and Python will not write down those of several thousand digits."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-4 for text, and lets a later key silently replace an earlier one."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (AttributeError, IndexError, KeyError, TypeError) as error:  # how PyYAML refuses what a tag does not fit
            raise _wrong(f"expected what the tag {node.tag} says, got {str(node.value)[:40]!r}", node) from error
        if isinstance(value, int) and value.bit_length() > BITS:
            raise _wrong(f"expected whole numbers of at most {BITS} bits, got one of {value.bit_length()}", node)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for name in [self.construct_object(key, deep=True) for key, _ in node.value]:
            if not isinstance(name, Hashable):
                continue  # which PyYAML refuses, in its own words
            if name in seen:
                raise _wrong(f"the key {name!r} comes twice", node)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _wrong(message: str, node: yaml.Node) -> Exception:
    return yaml.constructor.ConstructorError(None, None, message, node.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:timestamp"]  # a date is a name here
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Args:
        where: what the message calls the text: a file or a key.

    Raises:
        ValueError: it is no YAML, a key comes twice in one mapping, something holds itself, or it is too large.
    """
    if len(text) > LARGEST:
        raise ValueError(f"{where}: expected at most {LARGEST} characters, got more")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if (size := _size(node, {})) > LARGEST:
            raise ValueError(f"its aliases stand for {float(size):.0e} values, at most {LARGEST} are allowed")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _size(node: yaml.Node, known: dict[int, int | None]) -> int:
    """How many values a node stands for, each alias as often as it comes; ValueError for one that holds itself."""
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise ValueError("something in it holds itself")
        return found
    known[id(node)] = None
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        below = [each for pair in node.value for each in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    known[id(node)] = size = 1 + sum(_size(each, known) for each in below)
    return size
