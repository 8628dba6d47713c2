"""Make mutants: copies of a module with one small error each."""

import ast
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

COMPARISONS: dict[type[ast.cmpop], ast.cmpop] = {
    ast.Eq: ast.NotEq(), ast.NotEq: ast.Eq(), ast.Lt: ast.LtE(), ast.LtE: ast.Lt(),
    ast.Gt: ast.GtE(), ast.GtE: ast.Gt(), ast.Is: ast.IsNot(), ast.IsNot: ast.Is(),
    ast.In: ast.NotIn(), ast.NotIn: ast.In(),
}  # fmt: skip
OPERATORS: dict[type[ast.operator], ast.operator] = {
    ast.Add: ast.Sub(), ast.Sub: ast.Add(), ast.Mult: ast.Div(), ast.Div: ast.Mult(),
    ast.FloorDiv: ast.Mult(), ast.Mod: ast.Mult(), ast.Pow: ast.Mult(),
    ast.BitOr: ast.BitAnd(), ast.BitAnd: ast.BitOr(),
}  # fmt: skip
# Fields of a node that hold no behaviour.
SKIPPED = {"annotation", "returns", "decorator_list", "ctx", "type_comment"}


class Place(NamedTuple):
    """A place in a syntax tree, and a node that makes an error there."""

    parent: ast.AST
    field: str
    index: int | None
    old: ast.AST
    new: ast.AST


class Mutant(NamedTuple):
    """A module with one error.

    Attributes:
        line: line of the error in the module.
        change: the code before and after the error, separated by an arrow.
        source: text of the module with the error.
    """

    line: int
    change: str
    source: str


def places(tree: ast.AST, functions: Collection[str] = ()) -> list[Place]:
    """Return every place of an error, in the order of the source.

    Args:
        tree: the module.
        functions: names of the functions and classes to change; empty for the whole module.
    """
    if functions:
        assert isinstance(tree, ast.Module)
        chosen = [node for node in tree.body if getattr(node, "name", None) in functions]
        assert len(chosen) == len(functions), f"not all of {functions} are defined"
        return [place for node in chosen for place in _within(node)]
    return list(_within(tree))


def keys(tree: ast.Module, chosen: Sequence[Place]) -> list[str]:
    """Return the name of each place: the same in another revision that has the same statement.

    A name holds the definitions around the error, the statement and the change, but no line number.
    """
    around: dict[ast.AST, tuple[str, str]] = {}

    def visit(node: ast.AST, scope: str, statement: str) -> None:
        if isinstance(node, ast.stmt):
            statement = _shown(node)
        around[node] = scope, statement
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            scope = f"{scope}.{node.name}"
        for child in ast.iter_child_nodes(node):
            visit(child, scope, statement)

    visit(tree, "", "")
    names, seen = [], Counter[str]()
    for place in chosen:
        scope, statement = around[place.old]
        name = f"{scope} | {statement} | {_change(place)}"
        seen[name] += 1
        names.append(f"{name} | {seen[name]}")
    return names


def apply(tree: ast.AST, place: Place) -> Mutant:
    """Return the module with the error; `tree` is as before afterwards."""
    _put(place, place.new)
    source = ast.unparse(tree)
    _put(place, place.old)
    return Mutant(getattr(place.old, "lineno", 0), _change(place), source)


def _within(node: ast.AST) -> Iterator[Place]:
    for field, value in ast.iter_fields(node):
        if field in SKIPPED:
            continue
        several = isinstance(value, list)
        for index, child in enumerate(value if several else [value]):
            if not isinstance(child, ast.AST) or _is_text(child):
                continue
            for new in _errors(child):
                yield Place(node, field, index if several else None, child, new)
            yield from _within(child)


def _is_text(node: ast.AST) -> bool:
    """Return whether a node is prose, an import or a list of exported names."""
    match node:
        case ast.Import() | ast.ImportFrom() | ast.JoinedStr() | ast.Expr(ast.Constant()):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
        case ast.Constant(value=str(text)):
            return " " in text
    return False


def _errors(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that replace this one, each of which is an error."""
    match node:
        case ast.Compare(left, [operator], right):
            yield ast.Compare(left, [COMPARISONS[type(operator)]], right)
        case ast.BinOp(left, operator, right) if type(operator) in OPERATORS:
            yield ast.BinOp(left, OPERATORS[type(operator)], right)
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(ast.And() if isinstance(operator, ast.Or) else ast.Or(), values)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(float(value)):
            yield ast.Constant(value * 2 if value else 1.0)
        case ast.Constant(str(value)):
            yield ast.Constant(f"{value}x")
        case ast.If(test, body, otherwise):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, otherwise)
        case ast.IfExp(test, body, otherwise):
            yield ast.IfExp(test, otherwise, body)
        case ast.Call(function, [first, second, *rest], keywords):
            yield ast.Call(function, [second, first, *rest], keywords)
        case ast.Return(value) if value is not None and not _is_none(value):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Delete():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _put(place: Place, node: ast.AST) -> None:
    if place.index is None:
        setattr(place.parent, place.field, node)
    else:
        getattr(place.parent, place.field)[place.index] = node


def _change(place: Place) -> str:
    return f"{_shown(place.old)} -> {_shown(place.new)}"


def _shown(node: ast.AST) -> str:
    text = ast.unparse(node).splitlines()[0]
    return text if len(text) <= 80 else f"{text[:77]}..."
