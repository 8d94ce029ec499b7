"""YAML from outside, read strictly: what PyYAML drops without a word, or would never finish, is an error."""

from collections.abc import Iterator
from typing import Any

import yaml

from vjepa_scale.core.errors import UserError

# What SafeLoader raises for text that is no YAML: beside YAMLError whatever its conversions of values do, such as
# ValueError for a date of month 13 or a number of 5,000 digits.
_NOT_YAML = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# Aliases of aliases make a billion values of nine lines.
_MAX_VALUES = 1_000_000
_MERGE = "tag:yaml.org,2002:merge"


def parse_yaml(text: str, loader: type[yaml.SafeLoader], *, where: object, key: str = "") -> Any:
    """The value of one YAML document.

    key: the dotted key that the value is of, which stands before the keys inside it in errors

    Raises UserError naming ``where:key`` for a key that a mapping has twice (PyYAML takes the last one) and for
    aliases that go in circles or too far, and for what is no YAML or is nested too deeply.
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
    """One walk over the nodes of a document, each looked at once."""

    def __init__(self, parser: yaml.SafeLoader, where: object) -> None:
        self._parser, self._where = parser, where
        self._sizes: dict[yaml.Node, int | None] = {}  # None: being walked

    def size(self, node: yaml.Node, key: tuple[str, ...]) -> int:
        """How many values a node is, its aliases written out."""
        if node in self._sizes:
            known = self._sizes[node]
            if known is None:
                raise self._error("an alias of what it is itself a part of", key)
            return known
        self._sizes[node] = None
        total = 1 + sum(self.size(child, (*key, name)) for name, child in self._children(node, key))
        if total > _MAX_VALUES:
            raise self._error(f"more than {_MAX_VALUES:,} values, its aliases written out", key)
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
