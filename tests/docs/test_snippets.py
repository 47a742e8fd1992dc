"""Python blocks of the documentation run, each page in a namespace of its own, and leave nothing behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(["tutorial.md", "integrations.md", *(f"how-to/{path.name}" for path in (DOCS / "how-to").glob("*.md"))])


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_page_runs(page, tmp_path, monkeypatch):
    if "import peft" in "".join(blocks(page)):
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict = {}
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)


def test_pages_have_snippets():
    assert sum(len(blocks(page)) for page in PAGES) >= 10
