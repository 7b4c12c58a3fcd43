import os
from pathlib import Path

import pytest


@pytest.fixture
def assets() -> Path:
    folder = Path(os.environ.get("LILLAMA_ASSETS", Path(__file__).parents[2].parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"real models and texts not found at {folder}; set LILLAMA_ASSETS")
    return folder
