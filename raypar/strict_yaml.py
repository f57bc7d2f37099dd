"""YAML as version 1.2 has it, strictly: for run files, and for files of settings that they name.

Runs in: the driver. PyYAML follows YAML 1.1: ``1e-3`` is text, ``off`` is False, ``1:30`` is 90, ``010`` is 8, and the last of two equal
keys wins in silence. Here numbers, booleans and nulls are those of YAML 1.2, dates stay text, and equal keys are an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's scalars and without silent duplicates."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen and isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key_node.value}' is written twice", key_node.start_mark
                )
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep)


def _resolvers(patterns: Iterable[tuple[str, str, str]]) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's table: first character -> (tag, pattern)."""
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first_characters in patterns:
        for first in [*first_characters] or [""]:
            table.setdefault(first, []).append((f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$")))
    return table


Loader.yaml_implicit_resolvers = _resolvers(
    [
        ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
        ("null", "~|null|Null|NULL", "~nN"),
        ("null", "", ""),
        ("int", "[-+]?[0-9]+", "-+0123456789"),
        (
            "float",
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
            "-+0123456789.",
        ),
        ("merge", "<<", "<"),
    ]
)
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


class Dumper(yaml.SafeDumper):
    """Puts quotes around what would be no text to this loader or to an ordinary one."""


Dumper.yaml_implicit_resolvers = {
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        *Loader.yaml_implicit_resolvers.get(first, []),
    ]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *Loader.yaml_implicit_resolvers}
}
