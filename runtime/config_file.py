"""Reads a settings file, and says what is wrong with it in words that tell what to change."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from kv_transfer.settings import Settings
from runtime.config import Config, FrontEndSettings
from runtime.errors import ConfigError


def load(path: str | Path) -> Config:
    """Read and check a settings file.

    Raises:
        ConfigError: naming every key that is wrong, and for an unknown one the nearest that exists.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # noqa: S506  # a SafeLoader
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # not UTF-8, or a date that is none
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if data is None:
        data = {}  # an empty file: every setting has a default
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold settings as `key: value`, not a {type(data).__name__}")
    return parse(data, str(path))


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice: YAML forbids it, PyYAML takes the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.composer.ComposerError(None, None, f"`{key.value}` is there twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add((key.tag, key.value))
        return node


def listening_at(config: Config, **changes: Any) -> Config:
    """The settings with some of the front end's changed. Raises as `load`."""
    try:
        front_end = FrontEndSettings.model_validate({**config.front_end.model_dump(), **changes})
    except ValidationError as error:
        problems = [explain(item, FrontEndSettings, "front_end") for item in error.errors()]
        raise ConfigError("\n".join(problems)) from error
    return config.model_copy(update={"front_end": front_end})


def parse(data: dict[str, Any], source: str = "settings") -> Config:
    """Check settings that were read already. Raises as `load`."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        problems = [explain(item) for item in error.errors()]
        raise ConfigError(f"{source}:\n" + "\n".join(f"  - {problem}" for problem in problems)) from error


def explain(item: Any, root: type[Settings] | None = None, prefix: str = "") -> str:
    """One of pydantic's complaints about `root` (all settings by default): where, what, and the nearest key."""
    path = [str(part) for part in item["loc"]]
    where = ".".join([prefix, *path]) if prefix else ".".join(path)
    if item["type"] != "extra_forbidden":
        message = item["msg"].removeprefix("Value error, ")
        return f"{where}: {message} (got {item['input']!r})" if where else message
    names = _keys_at(path[:-1], root or Config)
    near = difflib.get_close_matches(path[-1], names, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(sorted(names))}"
    return f"{where}: unknown key; {hint}"


def _keys_at(path: list[str], model: type[Settings]) -> list[str]:
    for part in path:
        if part not in model.model_fields:
            continue  # a name in a mapping of settings
        annotation = model.model_fields[part].annotation
        annotation = next(iter(get_args(annotation)[1:]), annotation)  # the values of such a mapping
        if not (isinstance(annotation, type) and issubclass(annotation, Settings)):
            return []
        model = annotation
    return list(model.model_fields)
