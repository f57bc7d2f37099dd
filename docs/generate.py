"""make docs: writes docs/run_file.md from the config models, so that the page cannot say something else than the code."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from raypar.config import OWNED_BY_RAYPAR, RunConfig

PAGE = Path(__file__).parent / "run_file.md"
HEAD = """# The run file

One YAML file holds a run: a section for each verb, the same file for all of them. `make docs` writes this page from `raypar/config.py`.

```
raypar VERB RUN_FILE [section.key=value ...] [--dry-run]
```

A misspelt key is an error that names the nearest one; so is a key written twice. Numbers may be written `1e-3`; only `true` and `false`
are booleans. `--dry-run` prints the resolved file and makes every check that needs no cluster.
"""


def page() -> str:
    parts = [HEAD, "## The top\n", table(RunConfig)]
    for name, field in RunConfig.model_fields.items():
        for model in models(field.annotation):
            title = name if model.__name__ != "ShapesConfig" else f"{name}.shapes"
            parts += [f"## `{title}:`\n", f"{(model.__doc__ or '').strip()}\n", table(model)]
    owned = "\n".join(f"| `{key}` | {place} |" for key, place in OWNED_BY_RAYPAR.items())
    parts.append(
        "## What goes under `train.yolo:`\n\nEvery setting of Ultralytics that raypar does not own, unchanged and with Ultralytics' defaults: "
        "`epochs`, `imgsz`, `lr0`, `lrf`, `optimizer`, `momentum`, `weight_decay`, `warmup_epochs`, `cos_lr`, `patience`, `freeze`, `multi_scale`, "
        "`single_cls`, `close_mosaic`, `mosaic`, `mixup`, `cutmix`, `degrees`, `translate`, `scale`, `shear`, `perspective`, `hsv_h`, `hsv_s`, "
        "`hsv_v`, `fliplr`, `flipud`, `box`, `cls`, `dfl`, `nbs` ... They are checked on the driver before Ray starts. "
        "These are refused, because raypar has a place of its own for them:\n\n| setting | write instead |\n|---|---|\n" + owned + "\n"
    )
    return "\n".join(parts)


def table(model: type[BaseModel]) -> str:
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        default = (
            "required"
            if field.is_required()
            else ""
            if field.default is PydanticUndefined or isinstance(field.default, BaseModel)
            else f"`{shown(field.default)}`"
        )
        rows.append(f"| `{name}` | {kind(field.annotation)} | {default} | {field.description or ''} |")
    return "\n".join(rows) + "\n"


def shown(value: Any) -> str:
    return (
        {None: "nothing", True: "true", False: "false"}.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)
    )


def kind(annotation: Any) -> str:
    """A type in a reader's words."""
    if annotation is type(None):
        return "nothing"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section" if annotation.__name__.endswith("Config") else "{" + ", ".join(annotation.model_fields) + "}"
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{a}`" for a in get_args(annotation))
    if get_origin(annotation) in (types.UnionType, getattr(types, "UnionType", None)) or str(get_origin(annotation)) == "typing.Union":
        return " or ".join(kind(a) for a in get_args(annotation) if a is not type(None))
    if get_origin(annotation) in (list, dict):
        return {list: "list", dict: "mapping"}[get_origin(annotation)]
    if hasattr(annotation, "__metadata__"):
        return kind(annotation.__origin__)
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}.get(annotation, str(annotation))


def models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        nested = [m for f in annotation.model_fields.values() for m in models(f.annotation) if m.__name__ == "ShapesConfig"]
        return [annotation, *nested]
    return [m for a in get_args(annotation) for m in models(a)]


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"wrote {PAGE}\n")
