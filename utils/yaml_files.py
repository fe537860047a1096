"""Untrusted YAML: plain values only, with time and memory bounded by the text's size.

YAML can name classes to build, and a few lines of aliases and merge keys can expand to a gigabyte. Safe loading makes
plain values only, with aliases as references to one value: so never print a value whole (utils.untrusted.shown
truncates it), and merged keys are counted here.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from utils.errors import UsageError, UserError, nearest
from utils.files import PathLike, open_regular

MAX_BYTES = 1 << 18
"""Larger than any configuration, and parsed within a few seconds."""
_MAX_MERGED = 100000
_MAX_DIGITS = 40
_MERGE = "tag:yaml.org,2002:merge"


class _BoundedLoader(yaml.SafeLoader):
    """Safe YAML with limits on merged keys and on the length of numbers."""

    merged = 0

    def flatten_mapping(self, node: Any) -> None:
        """Expand merge keys: each key once, from the first source that has it.

        Source: https://yaml.org/type/merge.html; PyYAML 6.0.4 takes the last source, older ones keep every copy.
        """
        inherited: dict[Any, Any] = {}
        own = []
        for key, value in node.value:
            if key.tag != _MERGE:
                own.append((key, value))
                continue
            for source in reversed(value.value) if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    raise yaml.constructor.ConstructorError(None, None, "<< takes mappings only", source.start_mark)
                self.flatten_mapping(source)
                self.merged += len(source.value)
                if self.merged > _MAX_MERGED:
                    raise yaml.constructor.ConstructorError(None, None, "too many merged keys", node.start_mark)
                for pair in source.value:
                    scalar = isinstance(pair[0], yaml.ScalarNode)
                    inherited[(pair[0].tag, pair[0].value) if scalar else id(pair[0])] = pair
        node.value = [*inherited.values(), *own]
        super().flatten_mapping(node)

    def short_number(self, node: Any) -> Any:
        if len(self.construct_scalar(node)) > _MAX_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, "a number with too many digits", node.start_mark)
        return (self.construct_yaml_int if node.tag.endswith("int") else self.construct_yaml_float)(node)


for _kind in ("int", "float"):
    _BoundedLoader.add_constructor("tag:yaml.org,2002:" + _kind, _BoundedLoader.short_number)


class _UniqueKeyLoader(_BoundedLoader):
    """A duplicate key is an error (PyYAML would silently take the last)."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key '{key.value}' is given twice", key.start_mark
                    )
                seen.add(key.value)
        return node


def parse_yaml(content: bytes, where: str, unique_keys: bool = False) -> Any:
    """Return the plain values of a YAML text. Raises UserError, one line that starts with `where` and names the line.

    unique_keys: a key given twice in one mapping is an error.
    """
    if len(content) > MAX_BYTES:
        raise UserError(f"{where}: too large to be a configuration ({MAX_BYTES} bytes at most)")
    try:
        return yaml.load(content, Loader=_UniqueKeyLoader if unique_keys else _BoundedLoader)
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())[:200]
        raise UserError(f"{where}{line}: {problem}") from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        # PyYAML's constructors raise these for an invalid date, an empty number, !!bool of a word, ...
        raise UserError(f"{where}: a value that does not match its type ({str(error)[:100]})") from error


def read_yaml(path: PathLike, what: str = "", unique_keys: bool = False) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises UserError, one line that starts with `what` and the file's name.

    what: the flag that names the file, or what it is. unique_keys: of `parse_yaml`.
    """
    where = f"{what} {path}".strip()
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from error
    document = parse_yaml(content, f"{where} is not valid YAML", unique_keys)
    if not isinstance(document, dict):
        raise UserError(f"{where} must be a YAML mapping")
    return document


def load_configuration(config_file: Path, name: str) -> dict[str, Any]:
    """The keys and values of the configuration `name`, as parsed from YAML.

    Names that start with a dot and `defaults` are only inherited by others (`<<: *anchor`) and cannot be chosen.
    """
    try:
        configurations = read_yaml(config_file, "--config-file", unique_keys=True)
    except UserError as error:
        raise UsageError(str(error)) from None
    names = [key for key in configurations if isinstance(key, str) and not key.startswith(".") and key != "defaults"]
    if name not in names:
        raise UsageError("--config: {} has no configuration '{}'.{} It has: {}".format(
            config_file.name, name, nearest(name, names), ", ".join(names)))
    if not isinstance(configurations[name], dict):
        raise UsageError(f"{config_file.name}: configuration '{name}' must be a mapping of options")
    return configurations[name]
