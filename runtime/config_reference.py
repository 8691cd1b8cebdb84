"""The reference of all settings, generated from the code: `python -m runtime.config_reference`."""

from __future__ import annotations

from collections.abc import Iterator

from kv_transfer.settings import Settings
from runtime.config import Config

HEAD = """# Settings

One YAML file. Unknown keys are refused with the nearest name; `baton check FILE` prints the settings resolved.
This page is generated from the code by `make docs`.

| key | default | meaning |
|---|---|---|"""


def reference() -> str:
    """The page, in Markdown."""
    return "\n".join([HEAD, *rows(Config, "")]) + "\n"


def rows(model: type[Settings], prefix: str) -> Iterator[str]:
    """The table of a record's settings, those of its parts with the part's name before them."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        key = f"{prefix}{name}"
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            yield f"| **`{key}`** | | {field.description} |"
            yield from rows(annotation, f"{key}.")
        else:
            default = field.get_default(call_default_factory=True)
            yield f"| `{key}` | `{default!r}` | {field.description} |"


if __name__ == "__main__":
    print(reference(), end="")
