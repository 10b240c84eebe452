"""Which pages there are."""

from __future__ import annotations

from pathlib import Path

from tests.fresh import ROOT

DOCS = ROOT / "docs"
UNNAMED = ("README.md", "docs/architecture.md")
"""May hold blocks without a language, which are not run: trees of files, commands for a checkout."""

PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md"))]

# The README shows no comments where a site would hide them, so what its one example needs stands here.
README_SETUP = """
from tests.docs.tiny import base_model as model

class Trainer:
    def __init__(self, model, *_):
        self.model = model

    def train(self):
        from tests.docs.tiny import batch

        self.model(**batch()).loss.backward()
"""


def read(page: str) -> str:
    return Path(ROOT, page).read_text(encoding="utf-8")
