"""Measure the shape of the code: what a reader must find his way through. `make house` prints it.

Entries at the package's top, `# fmt: skip`, the longest function, parameters of the widest function, tensors as parameters
without a shape, class names with more than one home, and functions named by a participle.
"""

import ast
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "lillama"
IRREGULAR = (
    "made",
    "cut",
    "spent",
    "found",
    "held",
    "kept",
    "written",
    "told",
    "shown",
    "drawn",
    "seen",
    "chosen",
    "taught",
    "bound",
)
VERBS = (
    "is",
    "refuse",
    "warn",
    "note",
    "open",
    "build",
    "install",
    "speed",
)  # what begins with one is no bare participle
LIMITS = {
    "entries at the top": 24,
    "fmt: skip": 0,
    "bare Tensor parameters, %": 15,
    "class names with several homes": 0,
    "functions named by a participle": 0,
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files() -> dict[str, ast.Module]:
    """Return path within the package -> syntax tree of every module."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def functions(trees: dict[str, ast.Module]) -> Iterator[tuple[str, Function]]:
    """Yield every function with its place."""
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{file}:{node.lineno} {node.name}", node


def parameters(function: Function) -> list[ast.arg]:
    """Return the parameters of a function, `self` and `cls` excepted."""
    spec = function.args
    found = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
    return [arg for arg in found if arg.arg not in ("self", "cls")]


def lines(function: Function) -> int:
    """Return the lines of a function without its docstring."""
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        total -= (first.end_lineno or first.lineno) - first.lineno + 1
    return total


def tensors(trees: dict[str, ast.Module]) -> tuple[int, int]:
    """Return how many parameters are tensors, and how many of these say no shape."""
    bare = shaped = 0
    for _, function in functions(trees):
        for arg in parameters(function):
            kind = ast.unparse(arg.annotation) if arg.annotation else ""
            bare += kind in ("Tensor", "torch.Tensor", "Tensor | None", "torch.Tensor | None")
            shaped += "[Tensor," in kind and kind.split("[")[0] in ("Float", "Int", "Bool", "Shaped", "Integer", "Num")
    return bare + shaped, bare


def homes(trees: dict[str, ast.Module]) -> dict[str, list[str]]:
    """Return name -> files, for each class or alias that stands at the top of more than one file."""
    found = defaultdict(list)
    for file, tree in trees.items():
        for node in tree.body:
            names = [node.name] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names = [
                    target.id
                    for target in node.targets
                    if isinstance(target, ast.Name) and target.id[:1].isupper() and not target.id.isupper()
                ]
            for name in names:
                if not name.startswith("_"):
                    found[name].append(file)
    return {name: places for name, places in found.items() if len(places) > 1}


def participles(trees: dict[str, ast.Module]) -> list[str]:
    """Return the functions at the top of modules that are named by what was done, not by what they do."""
    return [
        f"{file}:{node.lineno} {node.name}"
        for file, tree in trees.items()
        for node in tree.body
        if isinstance(node, Function)
        and (node.name.rpartition("_")[2].endswith("ed") or node.name.strip("_") in IRREGULAR)
        and node.name.strip("_").partition("_")[0] not in VERBS
        and not any(
            isinstance(mark, ast.Name | ast.Attribute) and "property" in ast.unparse(mark)
            for mark in node.decorator_list
        )
    ]


def measure() -> dict[str, object]:
    """Return every figure by name."""
    trees = files()
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    longest = max(functions(trees), key=lambda item: lines(item[1]))
    widest = max(functions(trees), key=lambda item: len(parameters(item[1])))
    total, bare = tensors(trees)
    largest = max(PACKAGE.rglob("*.py"), key=lambda path: len(path.read_text().splitlines()))
    return {
        "entries at the top": len(entries),
        "modules": len(trees),
        "lines": sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")),
        "largest module": f"{len(largest.read_text().splitlines())} lines, {largest.relative_to(PACKAGE).as_posix()}",
        "fmt: skip": sum(path.read_text().count("# fmt: skip") for path in PACKAGE.rglob("*.py")),
        "longest function": f"{lines(longest[1])} lines, {longest[0]}",
        "most parameters": f"{len(parameters(widest[1]))}, {widest[0]}",
        "tensors as parameters": total,
        "bare Tensor parameters, %": round(100 * bare / max(1, total)),
        "class names with several homes": len(homes(trees)),
        "functions named by a participle": len(participles(trees)),
    }


def main() -> int:
    """Print the figures; with `--json` as JSON, with `--list` what stands behind them. Exit status 1 above a limit."""
    found = measure()
    if "--json" in sys.argv:
        print(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
            limit = f"  (at most {LIMITS[name]})" if name in LIMITS else ""
            print(f"{name:34} {value}{limit}")
    if "--list" in sys.argv:
        for name, places in sorted(homes(files()).items()):
            print(f"{name}: {', '.join(places)}")
        print(*participles(files()), sep="\n")
    return int(any(int(str(found[name])) > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
