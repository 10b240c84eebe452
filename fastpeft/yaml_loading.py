"""YAML as people mean it: 1e-4 is a number, and a key that comes twice is a mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-4 for text, and lets a later key silently replace an earlier one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


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
        ValueError: it is no YAML, a key comes twice in one mapping, or something holds itself.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
        json.dumps(value, default=str, skipkeys=True)  # refuses what holds itself
        return value
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
