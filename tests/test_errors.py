import pytest

from lillama import errors
from lillama.errors import LillamaError, suggestion

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LillamaError)]


def test_one_base_serves_all_and_only_training_is_the_machines_failure() -> None:
    assert len(KINDS) == 10
    assert {kind.__name__: kind.exit_status for kind in KINDS if kind.exit_status != 2} == {"TrainingError": 1}


@pytest.mark.parametrize(
    ("word", "wanted"),
    [("uniforn", "; did you mean 'uniform'?"), ("botom", "; did you mean 'bottom'?"), ("xyz", ""), ("", "")],
)
def test_the_nearest_word_is_suggested_if_one_is_near(word: str, wanted: str) -> None:
    assert suggestion(word, ["uniform", "bottom", "top"]) == wanted
    assert suggestion(word, []) == ""
