"""What a user of the library sees: the names, their examples, and how light the import is."""

import doctest
import importlib
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

import lillama

ROOT = Path(__file__).parents[1]
MODULES = [module.name for module in pkgutil.walk_packages(lillama.__path__, "lillama.")]


def examples(name: str) -> list[doctest.DocTest]:
    module = importlib.import_module(name)
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module, name) if test.examples]


def test_the_names_are_sorted_few_and_there():
    assert sorted(lillama.__all__) == lillama.__all__ == dir(lillama)
    assert len(set(lillama.__all__)) == len(lillama.__all__) and 12 <= len(lillama.__all__) <= 24
    for name in lillama.__all__:
        assert getattr(lillama, name).__doc__, name
    with pytest.raises(AttributeError, match="'lillama' has no attribute 'compres'"):
        _ = lillama.compres


def test_functions_are_not_hidden_by_modules():
    for name in MODULES:
        importlib.import_module(name)
    for name in lillama.__all__:
        assert not isinstance(getattr(lillama, name), ModuleType), name


def test_the_import_is_light():
    code = "import sys, lillama; print(sorted({'torch', 'transformers', 'pydantic'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lillama", *MODULES])
def test_examples(name, monkeypatch, tmp_path):
    """Examples are written to be run from the project's root."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in examples(name):
        runner.run(test)
    assert not runner.failures


@pytest.mark.parametrize("name", lillama.__all__)
def test_every_public_name_has_an_example(name):
    value = getattr(lillama, name)
    assert any(test.name == f"{value.__module__}.{value.__qualname__}" for test in examples(value.__module__))
