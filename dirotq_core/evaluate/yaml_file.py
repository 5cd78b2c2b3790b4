"""YAML whose scalars stay what is written: an id ``0010`` is no octal number, a prompt ``yes`` no truth value."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Scalars as text, but for null; ValueError for a key that is there twice or is no scalar."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {key.start_mark.line + 1}: a key must be a text, not a list or an object")
            if key.value in seen:
                raise ValueError(f"id {key.value!r} is there twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        self.flatten_mapping(node)  # after the check: what is merged in may be overridden
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


def _as_written(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return node.value


for _kind in ("bool", "int", "float", "timestamp", "binary"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _as_written)


def load_yaml(text: str) -> Any:
    """The one document of `text`. yaml.YAMLError if it is none, ValueError as of the loader."""
    return yaml.load(text, _Loader)
