"""Tables of parts: a name chosen in a config -> the module (and class) that implements it.

A table is a plain dict `name -> "package.module:Attribute"` in the package it describes, so `grep` finds every entry
and importing a package imports none of its parts. This module is only the mechanism: look a name up, import it,
and say what is valid when it is not there.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
    """A mistake of the user: printed as one line `error: ...`, exit status 2, no traceback."""


def unknown(what: str, name: Any, valid: Iterable[Any]) -> UserError:
    """The error for a name that is not in a set of valid ones; names the nearest and lists the rest."""
    valid = [str(v) for v in valid]
    near = difflib.get_close_matches(str(name), valid, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"{what}={name!r} is not known{hint} (valid: {', '.join(valid) or 'none'})")


def load(table: Mapping[str, str], name: str, *, field: str) -> Any:
    """Imports and returns the part that `table` calls `name`.

    Args:
      table: name -> "package.module:Attribute", or "package.module" for the module itself.
      name: the user's choice.
      field: the config field that holds it, for the error text.

    Raises:
      UserError: the name is not in the table.
    """
    if not isinstance(name, str) or name not in table:
        raise unknown(field, name, table)
    module, _, attribute = table[name].partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded


def config_fields(config_class: type) -> dict[str, Any]:
    """Field name -> default of a `Config` dataclass, every default required (a config file states differences only)."""
    values = {}
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
        else:
            raise TypeError(f"{config_class.__qualname__}.{field.name} needs a default")
    return values
