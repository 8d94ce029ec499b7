"""Builds a Recipe from a YAML file and dotted overrides. Raises one error that names file and key."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.installed import find_shipped, suggest_shipped
from vjepa_scale.core.yaml_text import parse_yaml
from vjepa_scale.recipe.registry import STAGES, class_of
from vjepa_scale.recipe.schema import Recipe


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does: 1e-4 is a number (in YAML 1.1 it is text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    path:      a YAML file, or the name of a shipped recipe. Its keys override those of the recipe that its ``extends``
               names (a path relative to the file, or a shipped recipe).
    overrides: ``dotted.key=value`` with YAML values; list items by number (``pretrain.phases.0.steps=10``).
    Raises UserError naming ``file:key`` and what would work; the file is the one that has the key.
    """
    path = recipe_file(path)
    layers = _read(path, seen=())
    tree: dict[str, Any] = {}
    for _, layer in reversed(layers):
        tree = _merged(tree, layer)
    for override in overrides:
        _apply(tree, override)
    _drop_nulls(tree)
    for name in [name for name, value in tree.items() if value is None and _is_stage(name, layers)]:
        del tree[name]
    try:
        return validate_recipe(tree, source=path)
    except UserError as error:
        source, _, key = str(error.where).rpartition(":")
        if source != str(path):
            raise
        origin = _origin(key.split("."), layers, [override.partition("=")[0].split(".") for override in overrides])
        raise type(error)(error.what, where=f"{origin}:{key}", fix=error.fix) from None


def recipe_file(given: str | Path) -> Path:
    """Returns the file of a recipe, from a path or from the name of a shipped recipe. An existing path has priority.

    Raises UserError if it is neither.
    """
    if (found := _file_of(str(given), folder=Path())) is not None:
        return found
    fix = f"give the path of a YAML file, or a name: {suggest_shipped('recipes', str(given))}"
    raise UserError("no such recipe", where=given, fix=fix)


def _file_of(given: str, *, folder: Path, extending: Path | None = None) -> Path | None:
    """Returns a path relative to a folder, with ``.yaml`` appended if it has no suffix; else the shipped recipe.

    extending: the file that names it, which can only mean the shipped one by a name of its own
    """
    paths = [folder / given] + ([folder / f"{given}.yaml"] if given and not Path(given).suffix else [])
    # A folder is not a recipe: a folder demo/ does not hide the shipped recipe of that name.
    own = [path for path in paths if path.exists() and not path.is_dir()]
    shipped = find_shipped("recipes", given)
    if own and not (extending and shipped and own[0].samefile(extending)):
        return own[0]
    return shipped or (paths[0] if paths[0].is_dir() else None)


def validate_recipe(tree: dict[str, Any], *, source: object) -> Recipe:
    """Checks a parsed tree against the schema and across sections. Returns the recipe."""
    if "others" in tree:  # a field of the schema, but not a key of files
        known = ", ".join(_known_keys(Recipe, [], {}))
        raise UserError("unknown key", where=f"{source}:others", fix=f"known here: {known}")
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise explain_invalid(error, source, Recipe, sections=_sections_by_kind(tree)) from None
    _cross_check(recipe, source)
    return recipe


def recipe_yaml(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML. Loading it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False)


def _read(path: Path, seen: tuple[Path, ...], above: Path | None = None) -> list[tuple[Path, dict[str, Any]]]:
    """Returns a file and those that it extends, that one first. above: the file that extends it"""
    if path.resolve() in seen:
        raise UserError("extends itself", where=f"{above}:extends", fix="name another file, or leave extends out")
    try:
        text = path.read_text()
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"not readable as YAML: {' '.join(str(error).split())}", where=path) from None
    tree = _copied(parse_yaml(text, _Loader, where=path))
    if not isinstance(tree, dict):
        raise UserError("a recipe is a mapping of sections", where=path)
    parent = tree.pop("extends", None)
    if not isinstance(parent, str | None):
        raise UserError(f"must be the path of one file, not {parent!r}", where=f"{path}:extends")
    if parent is None:
        return [(path, tree)]
    if (extended := _file_of(parent, folder=path.parent, extending=path)) is None:
        raise UserError(
            f"no such recipe: {path.parent / parent}",
            where=f"{path}:extends",
            fix=f"a path relative to the folder of this file, {path.parent.resolve()}, an absolute one, or a name: "
            + suggest_shipped("recipes", parent),
        )
    return [(path, tree), *_read(extended, (*seen, path.resolve()), path)]


def _copied(node: Any) -> Any:
    """Copies a tree with its aliases expanded: an override of one stage must not change another one."""
    if isinstance(node, dict):
        return {key: _copied(value) for key, value in node.items()}
    return [_copied(item) for item in node] if isinstance(node, list) else node


def _is_stage(name: str, layers: list[tuple[Path, dict[str, Any]]]) -> bool:
    """Returns whether a file has a stage of this name. ``NAME: null``, above it or as override, removes it."""
    return any(isinstance(layer.get(name), dict) and "kind" in layer[name] for _, layer in layers)


# Keys of mappings that list data sets. Like a list, a mapping replaces the one of the extended file.
_MIXTURES = ("sets", "mixture")


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Merges ``top`` over ``base``: sections merge key by key, everything else (lists and mixtures too) replaces.

    A mixture whose values are all null does not replace: it removes these data sets from the one of ``base``.
    """
    out = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        replaces = key in _MIXTURES and both and not (value and all(item is None for item in value.values()))
        out[key] = _merged(out[key], value) if both and not replaces else value
    return out


def _drop_nulls(node: Any) -> None:
    """Removes the data sets that a mixture has as ``NAME: null``."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key in _MIXTURES and isinstance(value, dict):
            node[key] = {name: item for name, item in value.items() if item is not None}
        else:
            _drop_nulls(value)


def _origin(key: list[str], layers: list[tuple[Path, dict[str, Any]]], overridden: list[list[str]]) -> object:
    """Returns where a key, or else the section that lacks it, was given: the command line or a file."""
    for length in range(len(key), 0, -1):
        if any(name[:length] == key[:length] for name in overridden):
            return "command line"
        for path, layer in layers:
            if _has(layer, key[:length]):
                return path
    return layers[0][0]


def _has(node: Any, key: list[str]) -> bool:
    for part in key:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            return False
    return True


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not an override", where="command line", fix="write dotted.key=value")
    value = parse_yaml(text, _Loader, where="command line", key=key)
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        where = f"command line:{'.'.join(parents[: depth + 1])}"
        index = _list_index(node, part, where) if isinstance(node, list) else part
        if isinstance(node, list) or isinstance(node.get(part), (dict, list)):
            node = node[index]
            if not isinstance(node, (dict, list)):
                raise UserError(f"{node!r} has no keys below it", where=where)
        else:
            node[part] = _expanded(node.get(part), key, where)
            node = node[part]
    node[_list_index(node, last, f"command line:{key}") if isinstance(node, list) else last] = value


def _expanded(value: Any, key: str, where: str) -> dict[str, Any]:
    """Returns the mapping for an override of a key below ``value``: empty for None, the sizes of a named encoder."""
    if value is None:
        return {}
    if isinstance(value, str) and key.startswith("model.encoder."):
        from vjepa_scale.recipe.schema import ENCODERS

        if value in ENCODERS:
            return dict(zip(("width", "depth", "heads", "mlp_hidden"), ENCODERS[value], strict=True))
    raise UserError(f"{value!r} has no keys below it", where=where)


def _list_index(node: list[Any], part: str, where: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(f"{part!r} is not an item of this list", where=where, fix=f"0 to {len(node) - 1}")
    return int(part)


_NUMBER, _WHOLE, _BOOL = "must be a number", "must be a whole number", "must be true or false"
_SECTION, _LIST = "must be a section of keys", "must be a list"

# Messages for pydantic's types of errors. In braces: what the schema allows.
_PLAIN_WORDS = {
    "missing": "missing",
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "must be a finite number",
    "bool_type": _BOOL,
    "bool_parsing": _BOOL,
    "string_type": "must be text",
    "list_type": _LIST,
    "tuple_type": _LIST,
    "dict_type": _SECTION,
    "model_type": _SECTION,
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "too_short": "must have at least {min_length} item(s)",
    "too_long": "must have at most {max_length} item(s)",
}


def explain_invalid(
    error: ValidationError,
    source: object,
    schema: type[BaseModel],
    *,
    sections: Mapping[str, type[BaseModel]] | None = None,
) -> UserError:
    """Returns pydantic's first error about a file as one line that names ``source:key`` and what would work.

    sections: of keys that are not fields of the schema
    """
    first = error.errors()[0]
    location = [
        str(part)
        for part in first["loc"]
        if not str(part).startswith(("function-", "lax-or-strict", "constrained", "[key]"))
    ]
    if location[:1] == ["others"]:  # not a key of files
        del location[0]
    more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(schema, location[:-1], sections or {})
        close = difflib.get_close_matches(location[-1], known, n=1)
        fix = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        if schema is Recipe and len(location) == 1 and isinstance(first["input"], dict) and "phases" in first["input"]:
            fix = f"a stage of this name needs kind: {', '.join(STAGES)}"
        return UserError(f"unknown key{more}", where=f"{source}:{'.'.join(location)}", fix=fix)
    plain = _PLAIN_WORDS.get(first["type"])
    what = plain.format(**first.get("ctx", {})) if plain else first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    if not isinstance(given, (dict, list)) and first["type"] not in ("missing", "value_error"):
        what = f"{what}, not {given!r}"
    # Without a location the error is about several sections, which its message names.
    return UserError(f"{what}{more}", where=f"{source}:{'.'.join(location)}" if location else source)


def _sections_by_kind(tree: dict[str, Any]) -> dict[str, type[BaseModel]]:
    """Returns the section classes of stages that have a ``kind`` key."""
    kinds = {name: value.get("kind") for name, value in tree.items() if isinstance(value, dict)}
    known = {name: kind for name, kind in kinds.items() if isinstance(kind, str) and kind in STAGES}
    return {name: class_of(STAGES, kind).section for name, kind in known.items()}


def _known_keys(schema: type[BaseModel], location: list[str], sections: Mapping[str, type[BaseModel]]) -> list[str]:
    """Returns the keys of the section at a location of the schema."""
    section: Any = schema
    if location[:1] and location[0] in sections and location[0] not in schema.model_fields:
        section, location = sections[location[0]], location[1:]
    for part in location:
        if part.isdigit() or not (isinstance(section, type) and issubclass(section, BaseModel)):
            continue
        field = section.model_fields.get(part)
        section = _section_of(field.annotation) if field is not None else section
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return []
    return [name for name in section.model_fields if (section, name) != (Recipe, "others")]


def _section_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_of(inner)) is not None:
            return found
    return None


def _cross_check(recipe: Recipe, source: object) -> None:
    """Checks keys of several sections against each other."""
    from vjepa_scale.recipe.stage import check_stages

    check_stages(recipe, source)
