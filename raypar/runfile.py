"""A run file and its overrides, read strictly: what is misspelt or ambiguous is an error with its place and the nearest name.

Runs in: the driver, before Ray starts. Imports no Ray, no torch and no Ultralytics.

PyYAML follows YAML 1.1: ``1e-3`` is text, ``off`` is False, ``1:30`` is 90, ``010`` is 8, and the last of two equal keys wins in silence.
Here numbers, booleans and nulls are those of YAML 1.2, dates stay text, and equal keys are an error.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from raypar.config import OWNED_BY_RAYPAR, RunConfig
from raypar.storage import Folder
from raypar.versions import versions

Location = tuple[str, ...]  # ("train", "num_workers")
# where settings were written and what they are, once one more file or override is read
Stage = tuple[dict[Location, str], dict[str, Any]]
# What users of Ultralytics may call a setting, and what it is called in the sections that have it.
ALSO_CALLED = {
    "device": "use_gpu",
    "weights": "model",
    "model": "weights",
    "half": "precision",
    "exist_ok": "overwrite",
}
KINDS = {
    "model": "a section of settings", "dict": "a section of settings", "list": "a list", "string": "text",
    "int": "an integer", "float": "a number", "bool": "true or false",
}  # fmt: skip
PATTERNS = {
    **dict.fromkeys(
        ("name", "inspect.name", "evaluate.name", "predict.name", "export.name"),
        "should consist of the letters a-z and A-Z, digits, '-', '_' and '.' (no '.' in front)",
    ),
    "serve.route_prefix": "should begin with '/' and hold no '{' and no '}'",
}


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


def load(path: str | Path, overrides: Iterable[str] = (), verb: str = "train") -> RunConfig:
    """Reads a run file, applies the overrides and checks the whole.

    Args:
        path: the YAML file.
        overrides: ``section.key=value``, the value as YAML, or ``@FILE``, the settings in a YAML file (a path or a URI), laid out as in a
            run file; the later of two wins.
        verb: whose section an unknown setting at the top level was probably meant for.

    Raises:
        ValueError: one line a mistake, each with the key, and the file and line or the override that it comes from.
    """
    stages = list(_stages(str(path), overrides))
    try:
        config = RunConfig.model_validate(stages[-1][1])
    except ValidationError as error:
        raise ValueError(
            "\n".join(_explain(error.errors(include_url=False), stages, str(path), verb))
        ) from None
    if unknown := _unknown_yolo(config.train.yolo, stages[-1][0], str(path)):
        raise ValueError("\n".join(unknown))
    return config


def _stages(path: str, overrides: Iterable[str]) -> Iterator[Stage]:
    data, places = _read(path)
    yield places, deepcopy(data)
    for override in overrides:
        if override.startswith("@"):
            more, its_places = _read(override[1:])
            _merge(data, more)
        else:
            key, value = parse_override(override)
            put(data, key, value)
            places = {k: v for k, v in places.items() if k[: len(key)] != key}
            its_places = {key[:n]: override for n in range(1, len(key) + 1)}
        places = places | its_places
        yield places, deepcopy(data)


def dump(config: RunConfig) -> str:
    """The resolved run file, every setting spelt out, as YAML that ``load`` reads back to the same."""
    # `prepare:` with nothing below it would be a section
    settings = {
        k: v for k, v in config.model_dump(mode="json").items() if v is not None or _section_at((k,)) is None
    }
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
        raise ValueError(
            f"'{text}' is not an override: write section.key=value, e.g. train.num_workers=2, or @FILE"
        )
    try:
        return parts, yaml.load(value, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{text}: the value is not YAML: {_problem(error)}") from None


def _read(path: str) -> tuple[dict[str, Any], dict[Location, str]]:
    """A run file's content, and the file and line (from 1) of every key in it."""
    try:
        text = _read_remote(path) if "://" in path else Path(path).read_text(encoding="utf-8")
        loader = Loader(text)  # reads the first characters: they may already be wrong
        node = loader.get_single_node()
        data = loader.construct_document(node) if node is not None else {}
    except OSError as error:
        raise ValueError(f"{path}: cannot read the run file: {error.strerror or error}") from None
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        at = error.start if isinstance(error, UnicodeDecodeError) else error.position
        raise ValueError(
            f"{path}: no run file: byte {at} is no text in UTF-8 (a run file names weights, as train.model)"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"{path}{f':{mark.line + 1}' if mark else ''}: {_problem(error)}") from None
    if not isinstance(data, dict):
        raise ValueError(
            f"{path}: a run file holds settings (name: ..., train: ...), this one holds {type(data).__name__}"
        )
    if "name" not in data:
        _refuse_ultralytics(path, data)
    # `train:` and nothing below it
    empty = {k for k, v in data.items() if v is None and _section_at((str(k),))}
    places = {key: f"{path}:{line}" for key, line in _lines(node, ())}
    return {str(k): {} if k in empty else v for k, v in data.items()}, places


def _refuse_ultralytics(path: str, data: dict[Any, Any]) -> None:
    """Says where a file of Ultralytics belongs that was given as a run file."""
    if "backbone" in data:
        raise ValueError(
            f"{path}: this is a model's YAML, no run file: name it in one, as train: {{model: {path}}}"
        )
    if "names" in data or isinstance(data.get("train"), (str, list)):
        raise ValueError(
            f"{path}: this is a data.yaml, no run file: name it in one, as prepare: {{source: {path}}}"
        )


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
    return " ".join(
        str(part) for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part
    ) or str(error)


def put(data: dict[str, Any], key: Location, value: Any) -> None:
    """Sets a value under a dotted key, cut at its dots."""
    for part in key[:-1]:
        if not isinstance(data.get(part), dict):
            data[part] = {}  # absent, or a short form: a number where {min, max} may stand
        data = data[part]
    data[key[-1]] = value


def _explain(mistakes: Sequence[ErrorDetails], stages: Sequence[Stage], path: str, verb: str) -> list[str]:
    """One line a setting that is wrong."""
    messages: dict[Location, list[str]] = {}
    inputs: dict[Location, Any] = {}
    places: dict[Location, str] = {}
    for mistake in mistakes:
        key = _written(mistake["loc"], stages[-1][1])
        if mistake["type"] == "missing":
            key = (*key, str(mistake["loc"][-1]))
        message = (
            f"no such setting{_did_you_mean(key, verb)}"
            if mistake["type"] == "extra_forbidden"
            else _in_words(key, mistake)
        )
        messages.setdefault(key, []).append(message)
        of_section = isinstance(mistake["input"], dict)
        places[key] = _place(
            key, (_origin(mistake, stages) if of_section or key not in stages[-1][0] else stages[-1])[0], path
        )
        if not of_section and mistake["type"] != "extra_forbidden":
            inputs[key] = mistake["input"]
    deepest = [
        key for key in messages if not any(other[: len(key)] == key and other != key for other in messages)
    ]
    return [
        f"{places[key]}: {'.'.join(key)}: {' or '.join(dict.fromkeys(messages[key])).replace(' or should be ', ' or ')}"
        + (f", not {inputs[key]!r}" if key in inputs else "")
        for key in deepest
    ]


def _origin(mistake: ErrorDetails, stages: Sequence[Stage]) -> Stage:
    """What a mistake in a section as a whole came in with: an override may be right by itself, and at odds with the file."""
    last = len(stages) - 1
    while last and any(
        (m["loc"], m["msg"]) == (mistake["loc"], mistake["msg"]) for m in _mistakes(stages[last - 1][1])
    ):
        last -= 1
    return stages[last]


def _mistakes(settings: dict[str, Any]) -> list[ErrorDetails]:
    try:
        RunConfig.model_validate(settings)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


def _in_words(key: Location, mistake: ErrorDetails) -> str:
    """Pydantic's message without its jargon."""
    of, _, what = mistake["type"].rpartition("_")
    if what in ("type", "parsing") and of in KINDS:
        return f"should be {KINDS[of]}"
    if mistake["type"] == "string_pattern_mismatch":
        return PATTERNS[".".join(key)]
    message = (
        mistake["msg"]
        .removeprefix("Value error, ")
        .replace("Input should", "should")
        .replace("String should", "should")
    )
    return message.replace("Field required", "is missing")


def _unknown_yolo(settings: dict[str, Any], places: dict[Location, str], path: str) -> list[str]:
    """One line for every name under ``train.yolo`` that Ultralytics does not have; it checks the values itself, seconds later."""
    keys = [("train", "yolo", name) for name in settings if name not in yolo_settings()]
    return [
        f"{_place(key, places, path)}: {'.'.join(key)}: no such setting of Ultralytics{_did_you_mean(key, 'train')}"
        for key in keys
    ]


def _written(location: Sequence[str | int], data: Any) -> Location:
    """The part of pydantic's location that a user wrote: pydantic mixes in the names of a union's members."""
    key: list[str] = []
    for part in location:
        is_there = (
            part in data
            if isinstance(data, dict)
            else isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if is_there:
            data = data[part]
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


def _did_you_mean(key: Location, verb: str) -> str:
    """What to write for a setting that is not there: one of the same name elsewhere, or else one of nearly that name."""
    section = _section_at(key[:-1])
    known = (
        list(section.model_fields)
        if section
        else [name for name in yolo_settings() if name not in OWNED_BY_RAYPAR]
    )
    elsewhere = _elsewhere(key[0] if len(key) > 1 else verb) if len(key) < 3 or not section else {}
    if key[-1] in elsewhere:
        return elsewhere[key[-1]]
    if close := difflib.get_close_matches(key[-1], known, n=1):
        return f"; did you mean '{close[0]}'?"
    if close := difflib.get_close_matches(key[-1], elsewhere, n=1, cutoff=0.75):
        return elsewhere[close[0]]
    return f"; there are {', '.join(known)}" if section else ""


def _elsewhere(verb: str) -> dict[str, str]:
    """The words for settings, each with what to write: in that verb's section where it has it, else in ``train``, else in another."""
    found = {name: f"; did you mean '{name}', at the top level?" for name in RunConfig.model_fields}
    sections = {
        name: section
        for name, field in RunConfig.model_fields.items()
        if (section := _section_in(field.annotation))
    }
    for name in dict.fromkeys(name for name in (verb, "train", *sections) if name in sections):
        fields = sections[name].model_fields
        words = {field: f"; did you mean '{name}.{field}'?" for field in fields}
        also = {word: words[field] for word, field in ALSO_CALLED.items() if field in fields}
        if name == "train":
            owned = {
                word: f"; '{word}' is raypar's: write {instead}" for word, instead in OWNED_BY_RAYPAR.items()
            }
            also = {word: f"; did you mean 'train.yolo.{word}'?" for word in yolo_settings()} | also | owned
        found = also | words | found
    return found


@cache
def yolo_settings() -> dict[str, Any]:
    """Names and defaults of Ultralytics' settings, read without importing Ultralytics (seconds)."""
    from importlib.util import find_spec

    spec = find_spec("ultralytics")
    assert spec is not None
    assert spec.submodule_search_locations
    defaults: dict[str, Any] = yaml.safe_load(
        Path(spec.submodule_search_locations[0], "cfg", "default.yaml").read_text()
    )
    return defaults
