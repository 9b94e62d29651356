"""The pages of the site, the extras and the workflows name what is there."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

import restuning as rt

ROOT = Path(__file__).parent.parent


def test_every_page_of_the_menu_is_there() -> None:
    pages = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    assert len(pages) > 15
    assert not {page for page in pages if not (ROOT / "docs" / page).exists()}


def test_the_api_page_has_every_public_name() -> None:
    names = re.findall(r"^::: restuning[\w.]*\.(\w+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.M)
    assert set(names) == set(rt.__all__) - {"__version__", "METHODS"}


def test_what_language_models_read_links_to_what_is_there() -> None:
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "llms.txt").read_text(encoding="utf-8"))
    assert len(links) > 5 and all((ROOT / link).exists() for link in links)


def test_the_generated_pages_are_as_the_code_has_them() -> None:
    pages = runpy.run_path(str(ROOT / "scripts/make_pages.py"))["PAGES"]
    for name, make in pages.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == make(), f"python scripts/make_pages.py: {name}"


def test_every_extra_has_a_check_of_what_it_is_for() -> None:
    checks = runpy.run_path(str(ROOT / "scripts/check_extras.py"))["CHECKS"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {"images", "text", "diffusion", "serve", "app", "ray", "export", "heic", "all", ""} == set(checks)
    assert set(checks) - {""} <= set(extras)
    for text in checks.values():
        compile(text, "check", "exec")


def test_every_extra_that_an_error_names_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert project["dependencies"] == ["torch>=2.8"]
    assert {"images", "text", "diffusion", "ray", "all", "dev", "docs"} <= set(extras)
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    named = {extra for text in sources for extra in re.findall(r'MissingExtra\("[^"]+", "(\w+)"\)', text)}
    own = {name for lines in extras.values() for line in lines for name in re.findall(r"^restuning\[(.*)\]$", line)}
    assert named | {name for names in own for name in names.split(",")} <= set(extras)


def test_the_first_five_minutes_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(block.replace("200", "40").replace("epochs=20", "epochs=2"), {})
    assert capsys.readouterr().out.strip() and (tmp_path / "my-task/adapter_model.safetensors").exists()


def test_workflows_try_every_python_that_is_promised() -> None:
    text = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    for version in ("3.11", "3.12", "3.13", "3.14"):
        assert f'"{version}"' in text
    assert "lowest-direct" in text and "id-token: write" in (ROOT / ".github/workflows/release.yml").read_text()


@pytest.mark.parametrize("page", ["which.md", "memory.md"])
def test_the_figures_of_a_page_stand_in_the_tables_that_it_names(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    tables = "".join(
        (ROOT / "docs" / page).read_text(encoding="utf-8") for page in re.findall(r"\]\((results/[^)]+)\)", text)
    )
    figures = re.findall(r"\d+\.\d+", text)
    assert len(figures) > 6
    assert not [figure for figure in figures if not re.search(rf"(?<![\d.,]){re.escape(figure)}(?!\d)", tables)]
