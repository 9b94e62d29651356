"""Every number of the paper that we have is an entry; entries name methods, commands and ranges that exist."""

import json
from pathlib import Path

import pytest

from restuning.cli.main import parse
from restuning.data import KINDS
from restuning.errors import RestuningError
from restuning.methods.named import find_method
from restuning.methods.spec import on_blocks, resize
from restuning.paper.experiments import EXPERIMENTS, SUITES, find

PAPER = Path(__file__).parents[2] / "shared/design/paper_tables.json"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_whole(name: str) -> None:
    found = EXPERIMENTS[name]
    assert found.rows and len({row.name for row in found.rows}) == len(found.rows)
    assert len({task.name for task in found.tasks}) == len(found.tasks)
    for row in found.rows:
        assert set(row.paper) <= set(found.columns)
        if row.method is not None and name != "tab6":
            method = find_method(row.method)
            on_blocks(method if row.size is None else resize(method, row.size), row.blocks or (0,))
    for task in found.tasks:
        assert task.spec.partition(":")[0] in KINDS
        spec = task.spec.format(root="DATA", seed=0)
        assert "{" not in spec
        assert task.name in found.columns and set(task.targets or ()) <= set(found.columns)
    for command in filter(None, (found.said, *(row.command for row in found.rows))):
        if not command.startswith("python -m pytest "):
            assert command.startswith("restuning ")
            parse(command.split()[1:])


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's tables are not beside this checkout")
def test_the_numbers_are_the_papers() -> None:
    paper = json.loads(PAPER.read_text())
    for key in ("2a", "2b", "2c", "3a", "3b", "3c", "4", "5", "6", "12", "13", "14", "15", "16"):
        given = [v for row in paper[key]["rows"].values() for v in (row if isinstance(row, list) else [row])]
        ours = [v for row in EXPERIMENTS[f"tab{key}"].rows for v in row.paper.values()]
        assert sorted(v for v in ours if v is not None) == sorted(v for v in given if v is not None), key
    table = paper["4"]["rows"]
    for row in EXPERIMENTS["tab4"].rows:
        assert list(row.paper.values()) == table[row.name]
    roberta = [list(row.paper.values()) for row in EXPERIMENTS["tab17"].rows]
    assert roberta == [[r[0], r[2], r[5], r[6]] for r in paper["17"]["rows"].values()]
    assert sorted(r.paper["saved"] for r in EXPERIMENTS["intro"].rows) == sorted(paper["intro"]["rows"].values())
    assert [r.paper["time saved"] for r in EXPERIMENTS["fig4"].rows] == list(paper["fig4"]["rows"].values())


def test_means_of_the_paper_are_means_of_its_tasks() -> None:
    table = EXPERIMENTS["tab4"]
    for row in table.rows:
        groups: dict[str, list[float]] = {}
        for task in table.tasks:
            groups.setdefault(task.group, []).append(row.paper[task.name])
        assert list(map(len, groups.values())) == [7, 4, 8]
        means = [sum(g) / len(g) for g in groups.values()]
        every = [v for g in groups.values() for v in g]
        assert sum(means) / 3 == pytest.approx(row.paper["Group"], abs=0.16)
        assert sum(every) / 19 == pytest.approx(row.paper["All"], abs=0.16)


def test_finding() -> None:
    assert [e.name for e in find("small")] == list(SUITES["small"])
    assert find("tab4")[0].accepts(find("tab4")[0].rows[0], "EuroSAT") == (92.7, 98.7)
    assert find("tab4")[0].accepts(find("tab4")[0].rows[0], "memory_GB") is None
    with pytest.raises(RestuningError, match="did you mean 'tab4'"):
        find("tab44")
