"""A run file and its overrides, read strictly: what is misspelt or ambiguous is an error with its place and the nearest name.

Runs in: the driver, before Ray starts. Imports no Ray, no torch and no Ultralytics.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from raypar.config import RunConfig
from raypar.storage import Folder
from raypar.strict_yaml import Dumper, Loader
from raypar.versions import versions
from raypar.yolo_keys import HONOURED, KEYS, REFUSED, Honoured, nearest, yolo_settings

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
    "batch": "max_batch_size",
    "augmentations": "albumentations",
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
    """What to write for a setting that is not there. A setting of another section is named only if its word cannot mean anything else."""
    if len(key) == 1:
        return _at_the_top(key[0], verb)
    section = _section_at(key[:-1])
    if key[:-1] == ("train", "yolo"):
        return _of_train(key[-1]) or nearest(key[-1]) or _nearly_refused(key[-1])
    if section is None:
        return ""
    hint = (_of_section(key[-1], key[0]) or _of_the_top(key[-1])) if len(key) == 2 else ""
    return hint or _near(key[-1], section.model_fields) or f"; there are {', '.join(section.model_fields)}"


def _at_the_top(word: str, verb: str) -> str:
    """For a word that stands in no section: what the verb's section calls it, or else the only place that has such a setting."""
    hint = _of_section(word, verb)
    places = [
        f"{name}.{word}"
        for name, section in _sections().items()
        if word in section.model_fields and word not in KEYS
    ]
    if not hint and len(places) == 1:
        hint = _meant(places[0])
    known = list(RunConfig.model_fields)
    return hint or _near(word, known) or _nearly_of_training(word) or f"; there are {', '.join(known)}"


def _of_section(word: str, name: str) -> str:
    """For a word that was meant for a section: its own setting of that meaning, or one that only training has."""
    section = _sections().get(name)
    for own in (word, ALSO_CALLED.get(word)):
        if section is not None and own in section.model_fields:
            return _meant(f"{name}.{own}")
    if name in ("train", "tune"):
        return _of_train(word) or (_nearly_of_training(word) if name == "train" else "")
    found = KEYS.get(word)
    return _meant(f"train.yolo.{word}") if isinstance(found, Honoured) and found.is_of_training_alone else ""


def _of_train(word: str) -> str:
    """For a word that was meant for training: where it is written, or why it is not."""
    fields = _sections()["train"].model_fields
    for own in (word, ALSO_CALLED.get(word)):
        if own in fields:
            return _meant(f"train.{own}")
    if word in HONOURED:
        return _meant(f"train.yolo.{word}")
    return _of_the_top(word) or (f"; '{word}' is refused: {REFUSED[word]}" if word in REFUSED else "")


def _nearly_of_training(word: str) -> str:
    """For a misspelt word that only training has."""
    words = [key for key, found in HONOURED.items() if found.is_of_training_alone]
    return "".join(
        _meant(f"train.yolo.{near}") for near in difflib.get_close_matches(word, words, n=1, cutoff=0.75)
    )


def _nearly_refused(word: str) -> str:
    near = difflib.get_close_matches(word, REFUSED, n=1, cutoff=0.75)
    return f"; '{near[0]}' is refused: {REFUSED[near[0]]}" if near else ""


def _of_the_top(word: str) -> str:
    return f"; did you mean '{word}', at the top level?" if word in RunConfig.model_fields else ""


def _near(word: str, known: Iterable[str]) -> str:
    """For a misspelt word, the nearest one that is known; a word of Ultralytics or of another section is not misspelt."""
    is_word = word in KEYS or any(word in section.model_fields for section in _sections().values())
    near = [] if is_word else difflib.get_close_matches(word, list(known), n=1)
    return "".join(map(_meant, near))


def _meant(setting: str) -> str:
    return f"; did you mean '{setting}'?"


def _sections() -> dict[str, type[BaseModel]]:
    """The sections of the run file."""
    return {
        name: section
        for name, field in RunConfig.model_fields.items()
        if (section := _section_in(field.annotation))
    }
