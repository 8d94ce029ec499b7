"""Strict parsing of users' YAML: a duplicate key, which PyYAML drops silently, and an alias bomb are errors."""

from collections.abc import Iterator
from typing import Any

import yaml

from vjepa_scale.core.errors import UserError

# What SafeLoader raises for invalid YAML: YAMLError, and the errors of its conversions of values, such as ValueError
# for a date of month 13 or a number of 5,000 digits.
_NOT_YAML = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# Nested aliases can expand nine lines to a billion values.
_MAX_VALUES = 1_000_000
_MERGE = "tag:yaml.org,2002:merge"


def parse_yaml(text: str, loader: type[yaml.SafeLoader], *, where: object, key: str = "") -> Any:
    """Returns the value of one YAML document.

    key: the dotted key of the value; errors put it before the keys inside the value

    Raises UserError naming ``where:key`` for a key that occurs twice in a mapping (PyYAML takes the last one), for
    aliases that contain themselves or expand to too many values, for invalid YAML, and for too deep nesting.
    """
    place = f"{where}:{key}" if key else where
    parser = None
    try:
        parser = loader(text)  # reads the first characters
        node = parser.get_single_node()
        if node is None:
            return None
        _Check(parser, where).size(node, tuple(key.split(".")) if key else ())
        return parser.construct_document(node)
    except RecursionError:
        raise UserError("not readable as YAML: nested too deeply", where=place) from None
    except _NOT_YAML as error:
        raise UserError(f"not readable as YAML: {' '.join(str(error).split())}", where=place) from None
    finally:
        if parser is not None:
            parser.dispose()


class _Check:
    """Checks the nodes of a document. Visits each node once."""

    def __init__(self, parser: yaml.SafeLoader, where: object) -> None:
        self._parser, self._where = parser, where
        self._sizes: dict[yaml.Node, int | None] = {}  # None: the node is being visited

    def size(self, node: yaml.Node, key: tuple[str, ...]) -> int:
        """Returns the number of values in a node, with its aliases expanded."""
        if node in self._sizes:
            known = self._sizes[node]
            if known is None:
                raise self._error("an alias that contains itself", key)
            return known
        self._sizes[node] = None
        total = 1 + sum(self.size(child, (*key, name)) for name, child in self._children(node, key))
        if total > _MAX_VALUES:
            raise self._error(f"more than {_MAX_VALUES:,} values, with aliases expanded", key)
        self._sizes[node] = total
        return total

    def _children(self, node: yaml.Node, key: tuple[str, ...]) -> Iterator[tuple[str, yaml.Node]]:
        if isinstance(node, yaml.SequenceNode):
            yield from ((str(number), item) for number, item in enumerate(node.value))
        elif isinstance(node, yaml.MappingNode):
            lines: dict[Any, int] = {}
            for name, value in node.value:
                if isinstance(name, yaml.ScalarNode) and name.tag != _MERGE:
                    self._refuse_second(name, lines, key)
                yield str(name.value) if isinstance(name, yaml.ScalarNode) else "?", value

    def _refuse_second(self, name: yaml.ScalarNode, lines: dict[Any, int], key: tuple[str, ...]) -> None:
        known, line = self._parser.construct_object(name), name.start_mark.line + 1
        if known in lines:
            raise self._error(
                f"{name.value!r} is there twice, in lines {lines[known]} and {line}", (*key, name.value), fix="keep one"
            )
        lines[known] = line

    def _error(self, what: str, key: tuple[str, ...], fix: str | None = None) -> UserError:
        return UserError(what, where=f"{self._where}:{'.'.join(key)}" if key else self._where, fix=fix)
