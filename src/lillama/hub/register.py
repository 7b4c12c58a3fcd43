"""Make `import lillama` enough for `from_pretrained`, without importing torch or transformers.

transformers has no entry points: a quantization method exists once somebody has registered it in the process. When
transformers' table of methods is already there, `register` fills it at once. Otherwise it leaves a finder on
`sys.meta_path` that waits for the table's module, lets the usual finders import it, and registers right after.
"""

import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TABLE = "transformers.quantizers.auto"
QUANTIZER = "lillama.modeling.quantizer"


class TableFinder(MetaPathFinder):
    """Import `TABLE` as everybody else would, then `QUANTIZER`."""

    searching = False

    def find_spec(
        self, fullname: str, path: Iterable[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the usual spec of `TABLE` with our step added to its execution; None for any other module."""
        if fullname != TABLE or self.searching:
            return None
        self.searching = True  # the other finders are asked below, and this one again among them
        try:
            spec = find_spec(fullname)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            import_module(QUANTIZER)

        spec.loader.exec_module = execute_and_register
        return spec


FINDER = TableFinder()


def register() -> None:
    """Register the quantizer now if transformers' table is imported, else as soon as it is; twice is harmless."""
    if TABLE in sys.modules:
        import_module(QUANTIZER)
    elif FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
