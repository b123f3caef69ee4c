"""A function that another package calls says in its docstring what its signature cannot.

None is needed where a reader sees all at once: of a single statement, or of three lines with every type written. A docstring of the
signature's own words alone says nothing.
"""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "ted_scale"
TREES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
        path.read_text()
    )
    for path in PACKAGE.rglob("*.py")
}
FUNCTIONS = {
    (module, node.name): node
    for module, tree in TREES.items()
    for node in tree.body
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
}
FILLERS = {
    "a",
    "an",
    "and",
    "are",
    "as",
    "by",
    "for",
    "from",
    "in",
    "is",
    "it",
    "its",
    "of",
    "on",
    "or",
    "the",
    "to",
    "with",
}


def package_of(module: str) -> str:
    """A function that the __init__ of its package exports belongs to all."""
    return module.split(".")[1] if module.count(".") > 1 else ""


def used_by(module: str) -> set[tuple[str, str]]:
    """(module, name) of the project, imported or read as an attribute of an imported module."""
    found, modules, attributes = set(), {}, set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ted_scale"):
            found |= {(node.module, alias.name) for alias in node.names}
            modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            attributes.add((node.value.id, node.attr))
    return found | {(modules[name], attribute) for name, attribute in attributes if name in modules}


def is_seen_at_once(node: ast.FunctionDef) -> bool:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    is_typed = node.returns is not None and all(argument.annotation for argument in arguments)
    is_simple = len(node.body) == 1 and not hasattr(node.body[0], "body")
    return is_simple or (is_typed and node.end_lineno - node.body[0].lineno < 3)


def words(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text.lower())) - FILLERS


def test_a_function_that_another_package_calls_says_what_its_signature_cannot():
    public = {
        key
        for module in TREES
        for key in used_by(module)
        if key in FUNCTIONS and (package_of(module) != package_of(key[0]) or module == key[0].rpartition(".")[0])
    }
    silent = [
        f"{module}.{name}"
        for module, name in sorted(public)
        if not module.startswith("ted_scale.kernels.triton")
        and not ast.get_docstring(FUNCTIONS[module, name])
        and not is_seen_at_once(FUNCTIONS[module, name])
    ]
    assert len(public) > 200 and not silent


def test_no_docstring_has_only_the_words_of_its_signature():
    repeats = [
        f"{module}.{name}"
        for (module, name), node in FUNCTIONS.items()
        if (said := ast.get_docstring(node)) and words(said) <= words(f"{name} {ast.unparse(node.args)}")
    ]
    assert not repeats
