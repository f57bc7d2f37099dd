"""Writes docs/run_file.md and docs/yolo_keys.md from the code: `make docs`. A test holds them together."""

from __future__ import annotations

import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

PAGE = Path(__file__).with_name("run_file.md")
KEYS_PAGE = Path(__file__).with_name("yolo_keys.md")
sys.path.insert(0, str(PAGE.parent.parent))  # a checkout that is not installed

from raypar.config import RunConfig  # noqa: E402
from raypar.yolo_keys import HONOURED, REFUSED, TASKS  # noqa: E402

INTRODUCTION = """\
# The run file

Written by `make docs` from `raypar/config.py`; do not edit by hand.

One YAML file holds a run: settings at the top, and one section for each verb. An unknown key is an error that names its line and the nearest key.
Any setting can be replaced on the command line, `raypar train RUN_FILE train.batch=32 train.yolo.epochs=50`: dots lead into sections, the value is YAML,
the later of two wins. `raypar VERB RUN_FILE --dry-run` prints the whole, defaults included, and makes every check.

YAML is read as version 1.2 has it: `1e-3` is a number, only `true` and `false` are booleans (`on`, `off`, `yes`, `no` are words), `010` is ten,
and a key written twice is an error. Relative paths start at the folder in which the command runs; `storage` in a Ray job must be absolute or a URI to outlive it.
"""
YOLO = """\
## Under `train.yolo`

Ultralytics' own settings under their own names, checked by Ultralytics before Ray starts: `epochs`, `imgsz`, `optimizer`, `lr0`, `lrf`, `momentum`, `weight_decay`,
`warmup_epochs`, `cos_lr`, `patience`, `close_mosaic`, `freeze`, `box`, `cls`, `dfl`, `nbs`, and the augmentations `mosaic`, `mixup`, `cutmix`, `hsv_h`, `hsv_s`, `hsv_v`, `degrees`, `translate`, `scale`,
`shear`, `perspective`, `flipud`, `fliplr` ... [Their meaning](https://docs.ultralytics.com/usage/cfg/) is Ultralytics'.

What raypar decides itself, and what a training cannot use, is refused there with the reason: [every setting of Ultralytics](yolo_keys.md).
"""
KEYS_INTRODUCTION = """\
# Ultralytics' settings under `train.yolo`

Written by `make docs` from `raypar/yolo_keys.py`; do not edit by hand. The names are those of Ultralytics 8.4.190 (`ultralytics/cfg/default.yaml`).

A setting is honoured, or refused in one line that says why and what to write instead; none is accepted without effect. A setting that is honoured
for some tasks is refused for the others, unless its value is Ultralytics' default or switches it off. Two depend on others: `optimizer: auto`, the default, chooses `lr0`, `momentum` and
`warmup_bias_lr` itself, and `time` decides the number of epochs; raypar says so when both are written. `tune.space` takes settings that are honoured.

`cfg` names a YAML file of settings, as `yolo cfg=FILE` does: `train.yolo: {cfg: hyp.yaml, epochs: 50}`. Settings in the run file and on the command line win over the file, and the run
keeps the merged ones, in `run.yaml` too. In the file, refused settings are skipped as long as they have Ultralytics' default values, so a copy of its whole `default.yaml` will do.

## Honoured

| setting | tasks | effect |
|---|---|---|
"""
KEYS_REFUSED = """
## Refused

| setting | why | write instead |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Top level\n\n" + _table(RunConfig, "", only_plain=True)]
    for name, field in RunConfig.model_fields.items():
        for section in _sections(field.annotation):
            parts.append(f"## `{name}`\n\n{section.__doc__ or ''}\n\n{_table(section, f'{name}.')}")
    return "\n".join([*parts, YOLO])


def keys_page() -> str:
    """The page of Ultralytics' settings."""
    honoured = "".join(
        f"| `{key}` | {'all' if found.tasks == TASKS else ', '.join(found.tasks)} | {found.effect} |\n"
        for key, found in HONOURED.items()
    )
    refused = "".join(
        f"| `{key}` | {found.reason} | {_instead(found.instead)} |\n" for key, found in REFUSED.items()
    )
    return KEYS_INTRODUCTION + honoured + KEYS_REFUSED + refused


def _instead(text: str) -> str:
    setting, comma, rest = text.partition(",")
    return f"`{setting}`{comma}{rest}".rstrip(",") if text else ""


def _table(section: type[BaseModel], prefix: str, *, only_plain: bool = False) -> str:
    rows = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        inner = _sections(field.annotation)
        if inner and only_plain:
            continue
        if inner and not _plain(field.annotation):
            rows += [row for row in _table(inner[0], f"{prefix}{name}.").splitlines()[2:]]
            continue
        rows.append(
            f"| `{prefix}{name}` | {_values(field)} | {_default(field)} | {(field.description or '').replace('|', chr(92) + '|')} |"
        )
    return "\n".join(rows) + "\n"


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) is dict:
        return []
    if isinstance(annotation, type) and not get_args(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [s for a in get_args(annotation) for s in _sections(a)]


def _plain(annotation: Any) -> list[Any]:
    """The members of a union that are neither a section nor nothing."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    return [m for m in members if m is not NoneType and not _sections(m)]


def _values(field: FieldInfo) -> str:
    members = (
        get_args(field.annotation)
        if get_origin(field.annotation) in (Union, UnionType)
        else [field.annotation]
    )
    words = [word for m in members if m is not NoneType for word in _words(m)]
    limits = _limits(field.metadata) or next(
        (found for m in members if (found := _limits(getattr(m, "__metadata__", ())))), ""
    )
    return ", ".join(words) + limits


def _words(annotation: Any) -> list[str]:
    if get_origin(annotation) is Annotated:
        return _words(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return [f"`{value}`" for value in get_args(annotation)]
    if section := _sections(annotation):
        return ["{" + ", ".join(section[0].model_fields) + "}"]
    if annotation is bool:
        return ["`true`", "`false`"]
    named = {int: "integer", float: "number", str: "text", dict: "mapping", list: "list"}
    return [named.get(get_origin(annotation) or annotation, str(annotation))]


def _limits(metadata: Any) -> str:
    signs = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
    found = [f"{signs[type(m)][0]} {getattr(m, signs[type(m)][1]):g}" for m in metadata if type(m) in signs]
    return " " + ", ".join(found) if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page())
    KEYS_PAGE.write_text(keys_page())
