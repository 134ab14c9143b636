"""Standalone repositories: they carry the model's code and load with `trust_remote_code=True` alone.

The loaders of diffusers and transformers fetch one file for each class, without the files that it imports.
Such a file is made from this package's modules: the unchanged definitions that the class needs.
"""

import ast
import builtins
import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module
from importlib.util import resolve_name
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from .. import _MODULE_OF, __version__
from ..families import BASELINES
from .selection import read_saved, select_files

_GUIDED_PIPELINES = ("ClassifierGuidedPipeline", "ClassifierGuidedUpscalePipeline")
PIPELINES = (*_GUIDED_PIPELINES, *(family.pipeline for family in BASELINES.values()))
# The auto classes of a model, by the config file that names them.
AUTO_CLASSES = {
    "ADMUNet2DModel": {"config.json": {"AutoModel": "ADMUNet2DModel"}},
    "ADMForImageClassification": {
        "config.json": {
            "AutoConfig": "ADMClassifierConfig",
            "AutoModelForImageClassification": "ADMForImageClassification",
        },
        "preprocessor_config.json": {"AutoImageProcessor": "ADMImageProcessor"},
    },
}

_HEADER = f"""\
# Generated from hf-guided {__version__} by `hf-guided push --standalone`: do not edit, change the package instead.
# Licence: Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0
"""
_ONLY_IN_THE_PACKAGE = "register_with_diffusers"  # a decorator for classes that are loaded by the package's name
_LINE_LENGTH = 120


def write_standalone(
    folder: str | os.PathLike, destination: str | os.PathLike, include: Sequence[str] | None = None
) -> Path:
    """Copies a saved pipeline or model and adds its code, so that it loads where this package is not installed.

    A pipeline then loads with diffusers' `DiffusionPipeline`, a UNet with diffusers' `AutoModel`, and a classifier with
    `AutoModelForImageClassification`. Weights are hard-linked if the file system allows it.

    Args:
        folder (`str` or `os.PathLike`): A folder that `save_pretrained` or training wrote.
        destination (`str` or `os.PathLike`): An empty or new folder, which is returned.
        include (`Sequence[str]`, *optional*): Further files to copy, see [`select_files`].

    Raises:
        `ValueError`: If the folder is not a saved model, has a component of another library, or has code already; or if
            the destination is not empty.
    """
    folder, destination = Path(folder), Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} is not empty: give an empty or a new folder.")
    added = _code_and_configs(folder)
    for path in {*select_files(folder, include), *added}:
        target = destination / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path in added:
            target.write_text(added[path], encoding="utf-8")
            continue
        if target.suffix in (".safetensors", ".bin"):  # large, and replaced rather than changed in place
            with suppress(OSError):
                os.link((folder / path).resolve(), target)
                continue
        shutil.copyfile(folder / path, target)
    return destination


def _code_and_configs(folder: Path) -> dict[str, str]:
    """The added code files and the configs that refer to them, by path."""
    index, config = read_saved(folder / "model_index.json"), read_saved(folder / "config.json")
    name = saved_class(index, config)
    if isinstance(name, list) or "auto_map" in config:
        raise ValueError(f"{folder} carries its code already: push it without --standalone.")
    if name not in (PIPELINES if index else AUTO_CLASSES):
        known = " or ".join([*PIPELINES, *AUTO_CLASSES])
        raise ValueError(f"{folder} holds {name or 'no model'}; code can be added to a saved {known}.")
    added = {f"{_code_module(name)}.py": _code(name)}
    if not index:
        for path, found in AUTO_CLASSES[name].items():
            if config := read_saved(folder / path):
                auto_map = {auto: f"{_code_module(name)}.{class_name}" for auto, class_name in found.items()}
                added[path] = json.dumps({**config, "auto_map": auto_map}, indent=2) + "\n"
        return added
    for component, value in index.items():
        if not isinstance(value, list) or value[0] in (None, "diffusers", "transformers"):
            continue
        library, class_name = value
        if library != "hf_guided":
            raise ValueError(
                f"The component {component} of {folder} is {class_name} of {library}, whose code cannot be added; take "
                "one of hf_guided, diffusers or transformers."
            )
        added[f"{component}/{_code_module(class_name)}.py"] = _code(class_name)
        index[component] = [_code_module(class_name), class_name]
    index["_class_name"] = [_code_module(name), name]
    return added | {"model_index.json": json.dumps(index, indent=2) + "\n"}


def saved_class(index: dict[str, Any], config: dict[str, Any]) -> Any:
    """The class that `model_index.json` or `config.json` names; a list with its module if the folder has its code."""
    return index.get("_class_name") or config.get("_class_name") or next(iter(config.get("architectures") or ()), None)


def _code_module(name: str) -> str:
    return _MODULE_OF[name].rpartition(".")[2]


@cache
def _code(name: str) -> str:
    """The code of a class; a guided pipeline's file includes all kinds of guidance."""
    roots = [(f"hf_guided.{_MODULE_OF[name]}", name)]
    if name in _GUIDED_PIPELINES:
        roots += [("hf_guided.guidance", kind) for kind in _module("hf_guided.guidance").exported]
    return inline(roots)


def inline(roots: Sequence[tuple[str, str]]) -> str:
    """The source of one file with some definitions of a package, by module and name, and all that they use of it.

    It has their comments and docstrings, the docstring of the first module, and no import of the package. Raises a
    `ValueError` if a definition would change its meaning in a single file, or be undefined.
    """
    meanings: dict[str, tuple[str, str]] = {}  # definition of each name of the file, as in `_Module`
    needs: dict[str, list[str]] = {}  # the modules that a module needs
    pending = [*reversed(roots)]
    while pending:
        user, name = pending.pop()
        meaning = _meaning(user, name)
        if meaning is None:  # a builtin, or a name local to a function
            continue
        source = meaning[0]
        is_ours = _package(source) == _package(user)
        if is_ours and source not in (user, *needs.setdefault(user, [])):
            needs[user].append(source)
        if name not in meanings:
            meanings[name] = meaning
            if is_ours:
                needs.setdefault(source, [])
                pending += [(source, used) for used in _module(source).names_used_by(name)]
        elif meanings[name] != meaning:
            one, other = (module or spelled.split()[0] for module, spelled in (meanings[name], meaning))
            raise ValueError(f"{name} of {one} and {name} of {other} cannot be in one file: rename one.")
        if is_ours and hasattr(builtins, name):
            raise ValueError(f"{name} of {source} would replace Python's own in the whole file: rename it.")

    package = _package(roots[0][0])
    docstring = _module(roots[0][0]).docstring
    parts = [_HEADER + f'"""{docstring}"""', _import_lines({m for m in meanings.values() if _package(m[0]) != package})]
    for name in TopologicalSorter(needs).static_order():
        if text := _module(name).text_of({found for found, (source, _) in meanings.items() if source == name}):
            title = "\n".join(f"# {line}".rstrip() for line in [name, *_module(name).docstring.splitlines()])
            parts.append(f"\n{title}\n\n{text}" if name != roots[0][0] else f"\n{text}")
    return "\n\n".join(parts) + "\n"


def _package(module: str) -> str:
    return module.partition(".")[0]


def _meaning(module: str, name: str) -> tuple[str, str] | None:
    """The definition of a name in a module, through imports of this package; `None` if it has no such name."""
    meaning = _module(module).meanings.get(name)
    if meaning is None or meaning[0] == module or _package(meaning[0]) != _package(module):
        return meaning
    if (found := _meaning(meaning[0], name)) is None:
        raise ValueError(f"{module} imports {name} from {meaning[0]}, which does not define it.")
    return found


def _import_lines(meanings: set[tuple[str, str]]) -> str:
    """Import statements, the standard library's first."""
    lines = []
    for source, group in groupby(sorted(meanings, key=lambda m: (m[0].lower(), m[1])), key=itemgetter(0)):
        names = [spelled for _, spelled in group]
        if not source:  # whole modules
            lines += [(name, f"import {name}") for name in names]
            continue
        line = f"from {source} import {', '.join(names)}"
        if len(line) > _LINE_LENGTH:
            line = f"from {source} import (\n" + "".join(f"    {name},\n" for name in names) + ")"
        lines.append((source, line))
    groups: tuple[list[str], list[str]] = ([], [])
    for source, line in lines:
        groups[_package(source.split()[0]) not in sys.stdlib_module_names].append(line)
    return "\n\n".join("\n".join(group) for group in groups if group)


class _Module:
    """A module's source, split into its top-level statements.

    `exported` is its `__all__`, `meanings` the definition of each name: for a local one, the names of the module and
    the definition; for an imported one, the source module and the name as an import spells it (`"x"`, `"x as y"`), the
    source of a whole module being `""`.
    """

    def __init__(self, name: str):
        self.name = name
        path = Path(import_module(_package(name)).__path__[0], *name.split(".")[1:])
        is_package = path.is_dir()
        text = (path / "__init__.py" if is_package else path.with_suffix(".py")).read_text(encoding="utf-8")
        tree, lines = ast.parse(text), text.splitlines()
        self.docstring = ast.get_docstring(tree, clean=False) or ""
        self.exported: list[str] = []
        self.meanings: dict[str, tuple[str, str]] = {}
        self._definitions: dict[str, tuple[ast.stmt, str]] = {}  # statement, and text with its comments
        end = 0
        for statement in tree.body:
            defined = None
            match statement:
                case ast.Import():
                    for alias in statement.names:
                        self._define(alias.asname or _package(alias.name), ("", ast.unparse(alias)))
                case ast.ImportFrom():
                    source = statement.module or ""
                    if statement.level:
                        package = name if is_package else name.rpartition(".")[0]
                        source = resolve_name("." * statement.level + source, package)
                    for alias in statement.names:
                        if alias.asname not in (None, alias.name) and _package(source) == _package(name):
                            self._refuse(statement, f"imports {ast.unparse(alias)}: import it by its own name")
                        self._define(alias.asname or alias.name, (source, ast.unparse(alias)))
                case ast.FunctionDef() | ast.ClassDef():
                    defined = statement.name
                case ast.Assign(targets=[ast.Name(id="__all__")]):
                    self.exported = ast.literal_eval(statement.value)
                case ast.Assign(targets=[ast.Name(id=target)]) | ast.AnnAssign(target=ast.Name(id=target)):
                    defined = target
                case ast.Expr(value=ast.Constant()):
                    pass  # the docstring
                case ast.Expr(value=ast.Call(func=ast.Attribute(attr="register"))):
                    pass  # the auto classes read `auto_map` instead
                case _:
                    self._refuse(statement, "runs code on import: define names only")
            stop = statement.end_lineno or end
            if defined is not None:
                self._define(defined, (name, defined))
                kept = lines[end:stop]
                for decorator in list(getattr(statement, "decorator_list", ())):
                    if isinstance(decorator, ast.Name) and decorator.id == _ONLY_IN_THE_PACKAGE:
                        statement.decorator_list.remove(decorator)  # type: ignore[attr-defined]
                        del kept[decorator.lineno - 1 - end]
                self._definitions[defined] = statement, "\n".join(kept)
            end = stop

    def names_used_by(self, name: str) -> list[str]:
        """Names that a definition uses, including attributes that are spelled like them."""
        statement, _ = self._definitions[name]
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom) and (node.level or _package(node.module or "") == _package(self.name)):
                self._refuse(node, f"imports inside {name}: import at the top")
        return sorted({node.id for node in ast.walk(statement) if isinstance(node, ast.Name)} - {name})

    def text_of(self, names: set[str]) -> str:
        """The source of some definitions, in order."""
        return "\n".join(text for name, (_, text) in self._definitions.items() if name in names).strip("\n")

    def _define(self, name: str, meaning: tuple[str, str]) -> None:
        if name in self.meanings:
            raise ValueError(f"{self.name} defines {name} twice: rename one.")
        self.meanings[name] = meaning

    def _refuse(self, node: ast.stmt, what: str) -> None:
        raise ValueError(f"{self.name}, line {node.lineno}, cannot be put into one file, because it {what}.")


_module = cache(_Module)
