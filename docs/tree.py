"""Write the tree of docs/design.md from the first lines of the modules, so that the page cannot drift from the code.

`python docs/tree.py` writes it between the markers; `--check` only tells whether it is up to date.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE, PACKAGE = ROOT / "docs" / "design.md", ROOT / "src" / "lillama"
BEGIN, END = "<!-- begin: written by docs/tree.py -->", "<!-- end -->"
FLOORS = (  # from the top down, as import-linter's layers in pyproject.toml
    "cli", "pipeline", "hub", "report", "runs", "recipes", "ranks", "probing", "probing/stimuli", "recovery", "evaluation",
    "calibration", "distill", "moments", "stream", "corpus", "lowrank", "model", "modeling", "system", "files",
)  # fmt: skip


def summary(module: Path) -> str:
    """Return the first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].rstrip(".")


def tree() -> str:
    """Return the tree as a block of Markdown."""
    lines = [f"    {'errors.py':22}{summary(PACKAGE / 'errors.py')}", f"    {'version.py':22}The version"]
    for folder in FLOORS:
        indent = " " * (4 * folder.count("/") + 4)
        lines.append(f"{indent}{folder.rpartition('/')[2] + '/':22}{summary(PACKAGE / folder / '__init__.py')}")
        modules = sorted(path for path in (PACKAGE / folder).glob("*.py") if path.name != "__init__.py")
        lines += [f"{indent}  {module.name:24}{summary(module)}" for module in modules]
    return "\n".join(lines)


def main() -> int:
    """Write the page, or with `--check` compare it."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n\n{tree()}\n\n{END}{after}"
    if "--check" in sys.argv:
        if new != page:
            print("docs/design.md is not what docs/tree.py writes; run python docs/tree.py")
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
