"""YAML as recipes are read and printed: plain values only, bounded in size and depth.

Values are those of JSON, with YAML's words for truth: no tags, no dates, no base 60 (`2:4` is a text), no anchors, so
that a file of a few bytes cannot stand for a value of gigabytes.
"""

import re
from typing import Any

import yaml

from shardprune.storage.malformed import Malformed, shown
from shardprune.storage.text_file import decode

LIMIT = 1_000_000  # bytes of a file
DEPTH = 32  # of lists and fields inside one another

PLAIN = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:null"}
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]{0,24}|0x[0-9a-fA-F]{1,16})$")
HALF_PAIR = re.compile("[\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """A loader that says what it refuses where it first meets it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _refused("anchors and aliases are not read", event.start_mark)
        if getattr(event, "tag", None):
            raise _refused("tags are not read", event.start_mark)
        self._depth += 1
        if self._depth > DEPTH:
            raise _refused(f"it is nested deeper than {DEPTH}", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise _refused(f"{shown(key.value)} stands there twice", key.start_mark)
                names.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and HALF_PAIR.search(value):
            raise _refused("half a surrogate pair", node.start_mark)
        return value


_Loader.yaml_implicit_resolvers = {}
for _first, _resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
    for _tag, _form in _resolvers:
        if _tag in PLAIN:
            _Loader.add_implicit_resolver(_tag, _form, [_first])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))


def parse_yaml(content: bytes) -> Any:
    """Return the value of a YAML document.

    Raises:
        Malformed: it is larger than `LIMIT` or no YAML; it is nested deeper than `DEPTH`, or holds a name twice, a tag,
            an anchor or half a surrogate pair.
    """
    if len(content) > LIMIT:
        raise Malformed(f"is too large for a recipe: {len(content):,} bytes, at most {LIMIT:,}")
    text = decode(content)
    try:
        return yaml.load(text, _Loader)
    except Malformed:
        raise
    except yaml.MarkedYAMLError as error:
        raise _refused(error.problem or error.context or "it cannot be read", error.problem_mark) from error
    except yaml.YAMLError as error:
        raise Malformed(f"is not YAML: {str(error).splitlines()[0]}") from error
    except (ValueError, OverflowError) as error:  # of a code point that does not exist
        raise Malformed(f"is not YAML: {error}") from error


def check_depth(content: bytes) -> None:
    """Check the depth of YAML that another library reads: deeper content ends the process in libyaml's loader.

    Raises:
        Malformed: it is nested deeper than `DEPTH`, or no YAML.
    """
    depth = 0
    try:
        for event in yaml.parse(decode(content), yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > DEPTH:
                    raise _refused(f"it is nested deeper than {DEPTH}", event.start_mark)
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
    except yaml.MarkedYAMLError as error:
        raise _refused(error.problem or error.context or "it cannot be read", error.problem_mark) from error


def _refused(reason: str, mark: Any) -> Malformed:
    place = f" at line {mark.line + 1}" if mark else ""
    return Malformed(f"is not YAML: {reason}{place}")


def dump_yaml(value: Any) -> str:
    """Return plain values as YAML, in their order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
