"""Reading a configuration: file, environment and arguments, and what is said of all that is wrong in them.

Precedence, lowest first: the defaults of the sections, the YAML file, ``HL_SCALE_<SECTION>__<KEY>`` environment
variables, ``section.key=value`` arguments. Unknown keys are refused with the nearest known name, and all errors are
reported at once. A variable or argument that gives a section another `kind` leaves out what the file says of keys that
this kind has not, so that one file serves for a run and its control.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import Tag, ValidationError

from hl_scale.config.section import Section
from hl_scale.config.sections import Config

Root = typing.TypeVar("Root", bound=Section)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every problem with its path, value, reason and fix."""


def load_config(
    path: str | os.PathLike[str],
    overrides: typing.Sequence[str] = (),
    environment: typing.Mapping[str, str] | None = None,
) -> Config:
    """Read a YAML file into a `Config`.

    Args:
        path: YAML file.
        overrides: ``section.key=value`` strings; values are read as YAML.
        environment: variables to read ``HL_SCALE_SECTION__KEY`` from; the process environment unless given.

    Raises:
        ConfigError: the file is missing or not a mapping, or any key or value is wrong; every problem is listed.
    """
    return read_sections(Config, path, overrides, environment)


def read_sections(
    root: type[Root],
    path: str | os.PathLike[str],
    overrides: typing.Sequence[str] = (),
    environment: typing.Mapping[str, str] | None = None,
) -> Root:
    """A YAML file as an object of `root`; see `load_config`."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"configuration file not found: {path}\n  fix: pass an existing file, for example one of configs/"
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML:\n  {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, found {type(tree).__name__}")
    assignments = _environment_overrides(os.environ if environment is None else environment)
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or "." not in key:
            raise ConfigError(f"override {item!r} is not of the form section.key=value")
        assignments.append((key.split("."), _parse_value(text, f"override {item!r}")))
    for keys, value in assignments:
        if keys[1:] == ["kind"]:
            _leave_out_other_kinds(root, tree, keys[0], value)
    for keys, value in assignments:
        _assign(tree, keys, value)
    return _validated(root, tree, str(path))


def parse_config(tree: typing.Mapping[str, Any], source: str = "configuration") -> Config:
    """Validate a nested mapping; raise `ConfigError` that lists every problem found in it."""
    return _validated(Config, tree, source)


def _validated(root: type[Root], tree: typing.Mapping[str, Any], source: str) -> Root:
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_describe(root, error, source)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _environment_overrides(environment: typing.Mapping[str, str]) -> list[tuple[list[str], Any]]:
    prefix = "HL_SCALE_"
    found = []
    for name, text in sorted(environment.items()):
        if name.startswith(prefix) and "__" in name:
            found.append((name[len(prefix) :].lower().split("__"), _parse_value(text, f"{name}={text!r}")))
    return found


def _parse_value(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} does not hold a YAML value:\n  {error}\n  fix: quote or complete it") from None


def _leave_out_other_kinds(root: type[Section], tree: dict[str, Any], name: str, kind: Any) -> None:
    """Remove the keys of a section that its new kind has not; a kind that does not exist is refused later."""
    chosen, section = _sections_by_kind(root, name).get(str(kind)), tree.get(name)
    if chosen is not None and isinstance(section, dict):
        tree[name] = {key: value for key, value in section.items() if key in chosen.model_fields}


def _assign(tree: dict[str, Any], keys: typing.Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"cannot set {'.'.join(keys)}: {key} is not a section")
        tree = child
    tree[keys[-1]] = value


def _describe(root: type[Section], error: ValidationError, source: str) -> str:
    problems = error.errors(include_url=False)
    lines = [f"{source}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"]
    for problem in problems:
        path = _without_tags(root, problem["loc"])
        location = ".".join(str(part) for part in path) or "(top level)"
        value = "" if problem["type"] == "missing" else f" = {problem['input']!r}"
        lines.append(f"  {location}{value[:120]}")
        lines.append(f"    why: {problem['msg']}")
        lines.append(f"    fix: {_fix(root, problem)}")
    return "\n".join(lines)


def _fix(root: type[Section], problem: Any) -> str:
    location = problem["loc"]
    if problem["type"] == "extra_forbidden":
        known = list(_fields_at(root, location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        return f"did you mean {near[0]!r}?" if near else f"remove it; known keys here: {', '.join(known)}"
    if problem["type"] == "missing":
        return "add this key"
    if problem["type"] == "literal_error":
        return f"use one of {problem['ctx']['expected']}"
    if problem["type"] == "union_tag_invalid":
        return f"use one of {', '.join(map(repr, _sections_by_kind(root, str(location[0]))))}"
    for end in range(len(location), 0, -1):  # an element of a tuple or a branch of a union has its field's help
        field = _fields_at(root, location[: end - 1]).get(str(location[end - 1]))
        if field is not None and field.description:
            return str(field.description)
    return "correct the value"


def _without_tags(root: type[Section], location: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pydantic names the kind of a section that has several after the section; users wrote no such key."""
    field = root.model_fields.get(str(location[0])) if len(location) > 1 else None
    tagged = field is not None and location[1] in _kinds(field.annotation)
    return (location[0], *location[2:]) if tagged else location


def _fields_at(root: type[Section], location: typing.Sequence[Any]) -> dict[str, Any]:
    """Fields of the section that `location` points at, looking through tuples, kinds and unions."""
    section: Any = root
    kinds: dict[str, Any] = {}
    for part in location:
        if isinstance(part, int):
            continue
        if part in kinds:
            section, kinds = kinds[part], {}
            continue
        field = section.model_fields.get(part) if isinstance(section, type) and issubclass(section, Section) else None
        kinds = _kinds(field.annotation) if field is not None else {}
        section = _section_in(field.annotation) if field is not None else None
        if section is None:
            return {}
    return dict(section.model_fields)


def _kinds(annotation: Any) -> dict[str, Any]:
    """Tag -> section, of a section that comes in several kinds."""
    found = {}
    for branch in typing.get_args(annotation):
        for mark in getattr(branch, "__metadata__", ()):
            if isinstance(mark, Tag):
                found[mark.tag] = typing.get_args(branch)[0]
    return found


def _sections_by_kind(root: type[Section], name: str) -> dict[str, type[Section]]:
    """Value of `kind` -> section, of a section that comes in several; kinds may share a section, and its tag."""
    field = root.model_fields.get(name)
    sections = [] if field is None else _kinds(field.annotation).values()
    return {kind: section for section in sections for kind in typing.get_args(section.model_fields["kind"].annotation)}


def _section_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for argument in typing.get_args(annotation):
            found = _section_in(argument)
            if found is not None:
                return found
    return None
