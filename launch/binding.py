"""From a resolved config tree to specs: every key checked, every class on the allow-list.

This stands in for hydra's `instantiate`, which runs whatever a `_target_` names and accepts unknown
keys until the constructor fails. Here a target must be one of our frozen dataclasses, each value
must have its field's type, and an unknown key is an error with the nearest name. The same function
reads a stored config.
"""

import dataclasses
import types
from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

ALLOWED_PACKAGES = ("trainer", "models", "launch")
TARGET = "_target_"


def bind(tree: Mapping[str, Any], path: str = "") -> Any:
    """Return the spec that `tree` describes; ValueError names the key path of what is wrong."""
    if TARGET not in tree:
        raise ValueError(
            f"{path or 'the config'} has no {TARGET}; name the class that it describes"
        )
    return _bind_as(_resolve(tree[TARGET], path), tree, path)


def bind_run(tree: Mapping[str, Any]) -> Any:
    """Return the Run of a resolved config; `launch`, how it is started, is no part of it."""
    return bind({key: value for key, value in tree.items() if key != "launch"})


def _resolve(target: Any, path: str) -> type:
    """Return the class of a target: a frozen dataclass that is defined in one of our packages."""
    module_name, _, class_name = str(target).rpartition(".")
    if module_name.partition(".")[0] in ALLOWED_PACKAGES:
        try:
            found: Any = getattr(import_module(module_name), class_name, None)
        except ModuleNotFoundError:
            found = None
        is_spec = isinstance(found, type) and dataclasses.is_dataclass(found)
        # The resolved object decides: an alias of something foreign has another module.
        if is_spec and found.__module__ == module_name and found.__dataclass_params__.frozen:
            return found
    raise ValueError(
        f"{_join(path, TARGET)}={target!r} is not one of Tessera's specs; "
        "see `tessera list` for the choices of each group"
    )


def _bind_as(spec: type, tree: Mapping[str, Any], path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(spec)}
    hints = get_type_hints(spec)
    for key in tree:
        if key != TARGET and key not in fields:
            from trainer.near_names import did_you_mean  # here: who mistypes may wait

            hint = did_you_mean(str(key), fields, prefix=_join(path, "")) or "remove it. "
            raise ValueError(f"unknown key {_join(path, key)}; {hint}Known: {', '.join(fields)}")
    for name, field in fields.items():
        has_default = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if name not in tree and not has_default:
            raise ValueError(f"{_join(path, name)} is missing; set {_join(path, name)}=...")
    values = {
        key: convert(value, hints[key], _join(path, key))
        for key, value in tree.items()
        if key != TARGET
    }
    try:
        return spec(**values)
    except ValueError as error:
        # Specs name their own fields; say which part of the config they belong to.
        raise ValueError(
            f"{path}: {error}" if path and path not in str(error) else str(error)
        ) from None


def convert(value: Any, hint: Any, path: str) -> Any:
    """Return `value` as the type `hint`: ints become floats, lists tuples; all else is an error."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        if value is None and len(options) < len(get_args(hint)):
            return None
        for option in options[:-1]:  # words, or any text, that stand in place of the value
            if isinstance(value, str) and (option is str or value in get_args(option)):
                return value
        if isinstance(value, str) and len(options) > 1:
            names = " or ".join([*map(_name, options[:-1]), "a group of keys"])
            raise ValueError(f"{path}={value!r} is unknown; needed {names}")
        return convert(value, options[-1], path)
    if isinstance(value, Mapping) and TARGET in value:
        return _check_kind(bind(value, path), hint, path)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        assert isinstance(hint, type)
        return _bind_as(hint, value, path)
    if origin in (list, tuple):
        return _convert_sequence(value, hint, path)
    if origin is dict and isinstance(value, Mapping):
        return {k: convert(v, get_args(hint)[1], _join(path, k)) for k, v in value.items()}
    if hint is Any:  # another tool's settings, which its own spec checks
        return value
    if origin is Literal and value in get_args(hint):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"{path}={value!r} is {_kind(value)}; needed {_name(hint)}")


def _check_kind(spec: Any, hint: Any, path: str) -> Any:
    """Return `spec` if it fits the field: is of its class, or has all names of its protocol."""
    if _is_protocol(hint):
        fits = all(_has(spec, hint, n) for n in dir(hint) if not n.startswith("_"))
    else:
        fits = isinstance(hint, type) and isinstance(spec, hint)  # list[str] is no type
    if not fits:
        raise ValueError(
            f"{_join(path, TARGET)}={type(spec).__module__}.{type(spec).__name__} is no "
            f"{hint.__name__}; choose one of the group: {path}=..."
        )
    return spec


def _has(spec: Any, protocol: type, name: str) -> bool:
    """Whether `spec` has what the protocol calls `name`; a method with the same parameters."""
    wanted, found = getattr(protocol, name), getattr(type(spec), name, None)
    if not callable(wanted):  # a property is not read: it may look into files
        return found is not None or name in {field.name for field in dataclasses.fields(spec)}
    return (
        callable(found)
        and signature(wanted).parameters.keys() == signature(found).parameters.keys()
    )


def _convert_sequence(value: Any, hint: Any, path: str) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{path}={value!r} is {_kind(value)}; needed a list: {path}=[...]")
    if origin is tuple and options[-1] is not Ellipsis:
        if len(value) != len(options):
            raise ValueError(
                f"{path}={list(value)} has {len(value)} entries; needed {len(options)}"
            )
        hints = list(options)
    else:
        hints = [options[0]] * len(value)
    items = [
        convert(item, kind, f"{path}[{number}]")
        for number, (item, kind) in enumerate(zip(value, hints, strict=True))
    ]
    return tuple(items) if origin is tuple else items


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", dict: "a group of keys", str: "text"}
    return names.get(type(value), type(value).__name__)


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or _is_protocol(hint)):
        return f"a group with {TARGET}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
        hint, str(hint)
    )


def _is_protocol(hint: Any) -> bool:
    return bool(getattr(hint, "_is_protocol", False))
