"""A run file and its overrides, read strictly: what is misspelt or ambiguous is an error with its place and the nearest name.

Runs in: the driver, before Ray starts. Imports no Ray, no torch and no Ultralytics.

PyYAML follows YAML 1.1: ``1e-3`` is text, ``off`` is False, ``1:30`` is 90, ``010`` is 8, and the last of two equal keys wins in silence.
Here numbers, booleans and nulls are those of YAML 1.2, dates stay text, and equal keys are an error.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from raypar.config import RunConfig
from raypar.storage import Folder
from raypar.versions import versions

Location = tuple[str, ...]  # ("train", "num_workers")


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's scalars and without silent duplicates."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen and isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"'{key_node.value}' is written twice", key_node.start_mark)
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
        ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+0123456789."),
        ("merge", "<<", "<"),
    ]
)
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


class Dumper(yaml.SafeDumper):
    """Puts quotes around what would be no text to this loader or to an ordinary one."""


Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *Loader.yaml_implicit_resolvers}
}


def load(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a run file, applies the overrides and checks the whole.

    Args:
        path: the YAML file.
        overrides: ``section.key=value``, the value as YAML, or ``@FILE``, the settings in a YAML file (a path or a URI), laid out as in a
            run file; the later of two wins.

    Raises:
        ValueError: one line a mistake, each with file, line and key.
    """
    data, lines = _read(str(path))
    places = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        if override.startswith("@"):
            more, lines = _read(override[1:])
            _merge(data, more)
            places |= {key: f"{override[1:]}:{line}" for key, line in lines.items()}
            continue
        key, value = parse_override(override)
        put(data, key, value)
        places = {k: v for k, v in places.items() if k[: len(key)] != key} | {key: override}
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(error, data, places, str(path)))) from None
    if unknown := _unknown_yolo(config.train.yolo, places, str(path)):
        raise ValueError("\n".join(unknown))
    return config


def dump(config: RunConfig) -> str:
    """The resolved run file, every setting spelt out, as YAML that ``load`` reads back to the same."""
    settings = {
        k: v for k, v in config.model_dump(mode="json").items() if v is not None or _section_at((k,)) is None
    }  # `prepare:` is not none
    return str(yaml.dump(settings, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120))


def written_by() -> str:
    """A comment that says what wrote a run file."""
    found = versions("ray", "ultralytics", "torch", "albumentations", "pyarrow")
    return f"# written by {', '.join(f'{name} {number}' for name, number in found.items())}; Python {sys.version.split()[0]}\n"


def parse_override(text: str) -> tuple[Location, Any]:
    """``train.yolo.lr0=1e-3`` -> (("train", "yolo", "lr0"), 0.001).

    Raises:
        ValueError: no key, no ``=``, or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(parts):
        raise ValueError(f"'{text}' is not an override: write section.key=value, e.g. train.num_workers=2, or @FILE")
    try:
        return parts, yaml.load(value, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{text}: the value is not YAML: {_problem(error)}") from None


def _read(path: str) -> tuple[dict[str, Any], dict[Location, int]]:
    """A run file's content, and the line (from 1) of every key in it."""
    try:
        text = _read_remote(path) if "://" in path else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the run file: {getattr(error, 'strerror', None) or error}") from None
    try:
        loader = Loader(text)  # reads the first characters: they may already be wrong
        node = loader.get_single_node()
        data = loader.construct_document(node) if node is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"{path}{f':{mark.line + 1}' if mark else ''}: {_problem(error)}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a run file holds settings (name: ..., train: ...), this one holds {type(data).__name__}")
    empty = {k for k, v in data.items() if v is None and _section_at((str(k),))}  # `train:` and nothing below it
    return {str(k): {} if k in empty else v for k, v in data.items()}, dict(_lines(node, ()))


def _read_remote(uri: str) -> str:
    folder, name = Folder.holding(uri)
    return folder.read(name).decode()


def _lines(node: yaml.Node | None, parent: Location) -> Iterable[tuple[Location, int]]:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = (*parent, str(key_node.value))
            yield key, key_node.start_mark.line + 1
            yield from _lines(value_node, key)


def _merge(data: dict[str, Any], more: dict[str, Any]) -> None:
    """Puts settings into a run file's content, section by section."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            _merge(data[key], value)
        else:
            data[key] = value


def _problem(error: yaml.YAMLError) -> str:
    return " ".join(str(part) for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part) or str(error)


def put(data: dict[str, Any], key: Location, value: Any) -> None:
    """Sets a value under a dotted key, cut at its dots."""
    for part in key[:-1]:
        if not isinstance(data.get(part), dict):
            data[part] = {}  # absent, or a short form: a number where {min, max} may stand
        data = data[part]
    data[key[-1]] = value


def _explain(error: ValidationError, data: dict[str, Any], places: dict[Location, str], path: str) -> list[str]:
    """One line a setting that is wrong."""
    messages: dict[Location, list[str]] = {}
    inputs: dict[Location, Any] = {}
    for detail in error.errors(include_url=False):
        key = _written(detail["loc"], data)
        if detail["type"] == "extra_forbidden":
            message = "no such setting" + _did_you_mean(key)
        elif detail["type"] == "missing":
            key, message = (*key, str(detail["loc"][-1])), "is missing"
        else:
            message = detail["msg"].removeprefix("Value error, ").replace("Input should", "should").replace("String should", "should")
            if not isinstance(detail["input"], dict):
                inputs[key] = detail["input"]
        messages.setdefault(key, []).append(message)
    deepest = [key for key in messages if not any(other[: len(key)] == key and other != key for other in messages)]
    return [
        f"{_place(key, places, path)}: {'.'.join(key) or 'the run file'}: {' or '.join(dict.fromkeys(messages[key]))}"
        + (f", not {inputs[key]!r}" if key in inputs else "")
        for key in deepest
    ]


def _unknown_yolo(settings: dict[str, Any], places: dict[Location, str], path: str) -> list[str]:
    """One line for every name under ``train.yolo`` that Ultralytics does not have; it checks the values itself, seconds later."""
    known = yolo_settings() if settings else {}
    lines = []
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            key = ("train", "yolo", name)
            where = f"{_place(key, places, path)}: {'.'.join(key)}"
            lines.append(f"{where}: no such setting of Ultralytics" + (f"; did you mean '{close[0]}'?" if close else ""))
    return lines


def _written(location: Sequence[str | int], data: Any) -> Location:
    """The part of pydantic's location that a user wrote: pydantic mixes in the names of a union's members."""
    key: list[str] = []
    for part in location:
        if isinstance(data, dict) and part in data:
            data = data[str(part)]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            continue
        key.append(str(part))
    return tuple(key)


def _place(key: Location, places: dict[Location, str], path: str) -> str:
    """Where a setting was written, or else the nearest thing above it."""
    return next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), path)


def _section_at(key: Location) -> type[BaseModel] | None:
    """The section class that a key leads to."""
    section: type[BaseModel] | None = RunConfig
    for part in key:
        field = section.model_fields.get(part) if section else None
        section = _section_in(field.annotation) if field else None
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section class in an annotation such as ``PrepareConfig | None``."""
    arguments = get_args(annotation) if get_origin(annotation) is not dict else ()
    if not arguments:
        return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return next((found for argument in arguments if (found := _section_in(argument))), None)


def _did_you_mean(key: Location) -> str:
    section = _section_at(key[:-1])
    known = list(section.model_fields) if section else []
    if close := difflib.get_close_matches(key[-1], known, n=1):
        return f"; did you mean '{close[0]}'?"
    if key[0] == "train" and key[-1] in yolo_settings():
        return f"; did you mean 'train.yolo.{key[-1]}'?"
    sections = {name: _section_in(field.annotation) for name, field in RunConfig.model_fields.items()}
    elsewhere = [f"{name}.{key[-1]}" for name, s in sections.items() if s and key[-1] in s.model_fields]
    return f"; did you mean '{elsewhere[0]}'?" if elsewhere else f"; there are {', '.join(known)}" if known else ""


def yolo_settings() -> dict[str, Any]:
    """Names and defaults of Ultralytics' settings, read without importing Ultralytics (seconds)."""
    from importlib.util import find_spec

    spec = find_spec("ultralytics")
    assert spec is not None
    assert spec.submodule_search_locations
    defaults: dict[str, Any] = yaml.safe_load(Path(spec.submodule_search_locations[0], "cfg", "default.yaml").read_text())
    return defaults
