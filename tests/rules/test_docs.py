"""Pages that are made from the code are what the code says today."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = ["recipes", "cli", "training", "performance", "numerics", "engine", "kernels", "evaluation", "analyze"]


@pytest.mark.parametrize("page", PAGES)
def test_generated_page_is_up_to_date(generate: ModuleType, page: str) -> None:
    assert (ROOT / "docs" / f"{page}.md").read_text() == getattr(generate, page)(), "run make docs"


def test_the_plots_are_those_of_the_measured_rows(generate: ModuleType, tmp_path: Path) -> None:
    assert generate._plots().main(["--out", str(tmp_path)]) == 0
    for name in ("loss_time.svg", "loss_memory.svg"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / "images" / name).read_text(), "run make docs"


def test_the_readmes_tables_and_the_analysis_pictures_are_of_the_records(generate: ModuleType) -> None:
    assert (ROOT / "README.md").read_text() == generate.readme(), "run make docs"
    for name, text in generate.analyze_pictures().items():
        assert (ROOT / "docs" / "images" / name).read_text() == text, "run make docs"


def test_every_picture_is_shown() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    pictures = [path.name for path in (ROOT / "docs" / "images").iterdir()]
    assert pictures
    assert [name for name in pictures if f"images/{name}" not in pages] == []


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
