"""The YAML run file and ``key=value`` overrides -> a checked :class:`RunConfig`; every mistake becomes one clear line.

Runs in: the driver. YAML as people expect it: ``1e-3`` is a number, ``off`` is a word, a key written twice is an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from raypar.config import RunConfig


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader without YAML 1.1's surprises."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key in seen:
                raise ValueError(f"line {line}: '{key}' is written twice (first in line {seen[key]})")
            seen[key] = line
        return super().construct_mapping(node, deep)


# Only true and false are booleans, and floats need no point or sign before the exponent.
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?(?:\d[\d_]*)?\.?\d[\d_]*(?:\.\d*)?[eE][-+]?\d+|[-+]?\d[\d_]*\.\d*|[-+]?\.\d+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def load(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run file and applies overrides.

    Args:
        path: of the YAML file.
        overrides: ``section.key=value``; the value is YAML.

    Raises:
        ValueError: one line for each mistake, with the file, the setting's path and the nearest known name.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{path}: no such run file")
    try:
        value = yaml.load(file.read_text(), Loader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a run file holds sections (name:, prepare:, train: ...), this one holds {type(value).__name__}")
    for override in overrides:
        _apply(value, override)
    try:
        return RunConfig.model_validate(value)
    except ValidationError as error:
        raise ValueError("\n".join(f"{path}: {_explain(item)}" for item in error.errors())) from error


def dump(config: RunConfig) -> str:
    """The resolved run file as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _apply(value: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"'{override}' is not of the form section.key=value")
    *parents, last = path.split(".")
    place = value
    for i, name in enumerate(parents):
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
        if not isinstance(place, dict):
            raise ValueError(f"{override}: '{'.'.join(parents[: i + 1])}' is a value, not a section")
    try:
        place[last] = yaml.load(text, Loader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{override}: {' '.join(str(error).split())}") from error


def _explain(item: Any) -> str:
    """One of pydantic's errors in one line."""
    # Names of union branches are no part of what the user wrote.
    location = [str(x) for x in item["loc"] if not re.search(r"[\[\]()]|^(bool|int|float|str|literal|NumWorkers|Autoscaling)", str(x))]
    path = ".".join(location) or "the run file"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _settings(location[:-1]), n=1)
        return f"{path}: no such setting" + (f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(_settings(location[:-1]))}")
    if item["type"] == "missing":
        return f"{path}: is missing"
    return f"{path}: {item['msg'].removeprefix('Value error, ')}" + ("" if isinstance(item["input"], dict) else f" (it is {item['input']!r})")


def _settings(path: Sequence[str]) -> list[str]:
    """Names of the settings in a section."""
    model: type[BaseModel] = RunConfig
    for name in path:
        found = [a for a in _models(model.model_fields[name].annotation)] if name in model.model_fields else []
        if not found:
            return []
        model = found[0]
    return list(model.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The section classes in a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models(argument)]
