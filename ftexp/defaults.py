"""Defaults lists of a user's own files, read before Hydra follows them: it names neither the line nor what there is."""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from ftexp.errors import ConfigError

FLAGS = ("override", "optional")
"""Words that may stand before a group."""
Folders = dict[str, list[Path]]
"""Group -> where its options lie."""


def check(path: Path, group: str, folders: Folders, seen: tuple[Path, ...] = ()) -> None:
    """Check the defaults list of an option, and of the options it leads to.

    Args:
        path: the option's file; one that is no YAML is told elsewhere.
        group: that it is of.
        folders: of all groups.
        seen: files that led here.

    Raises:
        ConfigError: names file, line and key, and what there is.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return
    pairs = root.value if isinstance(root, MappingNode) else []
    node = next((value for key, value in pairs if key.value == "defaults"), None)
    if node is None:
        return
    if not isinstance(node, SequenceNode):
        raise ConfigError(f"{_where(path, node)}: defaults must be a list, as - override /model: tiny")
    for item in node.value:
        for next_group, name in _led_to(item, _where(path, item), group, folders):
            files = [place / f"{name}.yaml" for place in folders[next_group]]
            file = next(file for file in files if file.exists())
            if file in (*seen, path):
                raise ConfigError(f"{_where(path, item)}: defaults lead back to {file}")
            check(file, next_group, folders, (*seen, path))


def _where(path: Path, node: Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _led_to(item: Node, where: str, group: str, folders: Folders) -> list[tuple[str, str]]:
    """Return the options that one line of a defaults list leads to, each of which is there."""
    if isinstance(item, ScalarNode) and item.tag.endswith(":str"):
        return _plain(item.value, where, group, folders)
    if not isinstance(item, MappingNode) or len(item.value) != 1 or not isinstance(item.value[0][0], ScalarNode):
        raise ConfigError(f"{where}: a line of defaults must be one group and its option, as - override /model: tiny")
    (key, value), words = item.value[0], item.value[0][0].value.split()
    if not words or not set(words[:-1]) <= set(FLAGS):
        near = difflib.get_close_matches((words or [""])[0], FLAGS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{where}: {key.value} must be a group, after override or optional or nothing{hint}")
    name, _, package = words[-1].partition("@")
    chosen = [one.value for one in (value.value if isinstance(value, SequenceNode) else [value])
              if isinstance(one, ScalarNode) and not one.tag.endswith(":null") and "${" not in one.value]  # fmt: skip
    if name.lstrip("/") == "hydra/launcher" and {*chosen} - {"basic"}:
        raise ConfigError(f"{where}: {name} must be left out: ftexp brings its own workers; see sweep.workers")
    if "${" in name or name.lstrip("/").startswith("hydra/"):  # Hydra's own, as its logging
        return []
    found = _group(name, where, group, folders)
    if found in ("sweep", group):
        raise ConfigError(f"{where}: {name} must be chosen on the command line, as {found}=...")
    if found == name.lstrip("/") and not (package or "override" in words):
        told = ", ".join(chosen) or "null"
        raise ConfigError(f"{where}: {name} is chosen already, write - override {name}: {told}")
    optional = "optional" in words
    return [(found, one.removesuffix(".yaml")) for one in chosen if _is_there(found, one, where, folders, optional)]


def _plain(text: str, where: str, group: str, folders: Folders) -> list[tuple[str, str]]:
    """Return the option that a line without a group leads to: one of the file's own group, or by its whole path."""
    name = text.partition("@")[0]
    if name == "_self_" or "${" in text:
        return []
    if " " in name.strip():
        raise ConfigError(f"{where}: {text} must have a colon after the group, as - override /model: tiny")
    found, _, option = name.lstrip("/").rpartition("/") if name.startswith("/") else (group, "", name)
    option = option.removesuffix(".yaml")
    if found not in folders:
        return []
    return [(found, option)] if _is_there(found, option, where, folders, False) else []


def _group(name: str, where: str, group: str, folders: Folders) -> str:
    """Return the group that a line means: a slash begins one of all, and none one below the file's own."""
    found = name.lstrip("/") if name.startswith("/") else f"{group}/{name}"
    if found in folders:
        return found
    if name in folders:
        raise ConfigError(f"{where}: {name} must be written /{name}: without a slash it is a group below {group}/")
    near = difflib.get_close_matches(name.lstrip("/"), folders, n=1)
    hint = f"; did you mean /{near[0]}?" if near else ""
    raise ConfigError(f"{where}: there is no group {name}{hint}; groups are {', '.join(sorted(folders))}")


def _is_there(group: str, option: str, where: str, folders: Folders, optional: bool) -> bool:
    """Whether a group has an option; one that need not be there may be missing."""
    options = sorted(path.stem for place in folders[group] for path in place.glob("*.yaml"))
    if option.removesuffix(".yaml") in options:
        return True
    if optional:
        return False
    near = difflib.get_close_matches(option, options, n=1, cutoff=0.5)
    hint = f"; did you mean {group}={near[0]}?" if near else ""
    raise ConfigError(f"{where}: {group} must be one of {', '.join(options)}, got {option!r}{hint}")
