"""The results page holds what the records say."""

import json
import math

import pytest

from parts.cli import UserError
from parts.files import write_json, write_rows
from tiny import results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(results, "PAGE", tmp_path / "results.md")
    (tmp_path / "records").mkdir()
    (tmp_path / "results.md").write_text("# Page\n\nbefore\n<!-- table one -->\nold\n<!-- end -->\nafter\n")
    return tmp_path


def evaluated(folder, name, off, content=100.0):
    """A made-up run of `python -m evaluation run` of four cases, whose readings are off by so much."""
    out = folder / name
    out.mkdir()
    write_json(out / "settings.json", {"cases": ["4", "abc"]})
    write_rows(out / "numbers.jsonl", [
        {"id": f"c{i}", "v": 2.0 * i + 1, "a": 5.0, "read": {"meter": [2.0 * i + 1 + off, 5.0 - off], "judge": None},
         "content": content, "clip_score": 70.1234, "other_clip_score": 60.0} for i in range(4)])
    return out


def test_a_row_has_the_means_of_its_runs_and_intervals_over_cases(folder):
    for seed, off in ((0, 0.5), (1, 1.5)):
        out = evaluated(folder, f"run{seed}", off)
        results.add_run("one", "ours", f"run{seed}", seed, out, "numbers", ["python x.py"], "d1")
    results.add_run("one", "base", "base", 0, evaluated(folder, "base", 2.0, 50.0), "numbers", ["python y.py"], "d1")
    head, _, ours, base = results.table_of("one").splitlines()
    assert head.startswith("|  | seeds | V-Error ↓ | A-Error ↓ |")
    assert ours.startswith("| ours | 2 | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] | nan [nan, nan] |")
    assert base.startswith("| base | 1 | 2.00 [2.00, 2.00] |") and "50.0 [50.0, 50.0]" in base
    assert "| 1.00 | nan |" in ours  # V is in order; A has no spread


def test_a_run_that_is_added_again_takes_its_own_place(folder):
    for off in (3.0, 1.0):
        name = f"run{off}"
        results.add_run("one", "ours", "run", 0, evaluated(folder, name, off), "numbers", ["python x.py"], "d1")
    lines = (folder / "records" / "one.jsonl").read_text().splitlines()
    assert len(lines) == 5 and json.loads(lines[0])["commands"] == ["python x.py"]
    assert json.loads(lines[0])["data"] == "d1" and json.loads(lines[0])["cases"] == "abc"
    assert "| ours | 1 | 1.00 [" in results.table_of("one")


def test_a_row_that_is_added_again_keeps_its_place(folder):
    for off in (1.0, 2.0):
        for row, run in (("before", None), ("after", "seed0"), ("after", "seed1")):
            records = [{"id": str(i), "v": 5.0, "a": 5.0, "judge": [5 + off, 5.0] if i else None, "class": i % 2,
                        "format": 1.0} for i in range(3)]
            results.add_figures("judge", row, {"seed": 0}, records, run)
            if off == 2.0:
                break  # only the first row is added again
    head, _, before, after = results.table_of("judge").splitlines()
    assert head == "|  | seeds | format, % ↑ | V-Error ↓ | A-Error ↓ | class, % ↑ |"
    assert before.startswith("| before | 1 | 100.0 [100.0, 100.0] | 2.00 [2.00, 2.00] | 0.00 [0.00, 0.00] | 33.3 [")
    assert after.startswith("| after | 2 | 100.0 [100.0, 100.0] | 1.00 [1.00, 1.00] |")


def test_the_page_is_written_from_the_records_and_checked_against_them(folder, capsys):
    results.add_run("one", "ours", "run", 0, evaluated(folder, "run", 1.0), "numbers", ["python x.py"], "d1")
    assert results.main(["--check"]) == 2
    assert "differs from docs/records; run `python -m tiny.results`" in capsys.readouterr().err
    assert results.main([]) == 0 and results.main(["--check"]) == 0
    text = (folder / "results.md").read_text()
    assert text.startswith("# Page\n\nbefore\n<!-- table one -->\n|  | seeds |") and text.endswith("<!-- end -->\nafter\n")


def test_a_table_without_records_is_named(folder, capsys):
    assert results.main([]) == 2
    assert "one.jsonl: missing" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"one.jsonl: missing"):
        results.rows_of("one")


def test_the_page_of_this_repository_has_what_its_records_say():
    assert results.main(["--check"]) == 0


def test_a_case_that_one_seed_could_not_read_counts_by_the_others(folder):
    columns = {"off": (lambda record: record["off"], 2)}
    runs = [[{"off": 1.0}, {"off": 0.0}], [{"off": math.nan}, {"off": 0.0}]]
    assert results.cells_of(runs, columns)[0].startswith("0.50 [")
    assert results.cells_of([[{"off": math.nan}], [{"off": math.nan}]], columns) == ["nan [nan, nan]"]


def test_recipes_are_means_over_their_seeds_at_the_steps_that_all_have(folder):
    write_rows(folder / "records" / "recipes.jsonl", [
        {"run": "a0", "recipe": "a", "passes": 36, "seconds": [1.0, 0.5], "evaluations": [[10, 1.0, 1.5, 0.75], [20, 0.5, 1.0, 0.5]]},
        {"run": "a1", "recipe": "a", "passes": 36, "seconds": [2.0, 0.5], "evaluations": [[10, 1.0, 0.5, 0.25]]},
        {"run": "tried", "evaluations": []}])
    assert results.table_of("recipes").splitlines()[2:] == ["| a | 2 | 36 | 2.00 | 2.00 (50) | – | – | – | – | – |"]


def test_a_recipe_is_said_to_be_as_good_as_the_papers_end_from_its_first_such_step_on(folder):
    write_rows(folder / "records" / "recipes.jsonl", [
        {"run": "paper", "recipe": "as the paper trains", "passes": 100, "seconds": [1.0, 1.0],
         "evaluations": [[0, 2.0, 2.0, 1.0], [10, 1.0, 1.5, 1.0], [20, 1.0, 1.0, 1.0]]},
        {"run": "soon", "recipe": "soon", "passes": 50,  # without seconds: not on the GPU that the others ran on
         "evaluations": [[0, 2.0, 2.0, 1.0], [10, 1.0, 0.5, 1.0], [20, 1.0, 1.5, 1.0]]},
        {"run": "late", "recipe": "late", "passes": 50, "seconds": [1.0, 1.0], "evaluations": [[0, 2.0, 2.0, 1.0]]}])
    paper, soon, late = results.table_of("recipes").splitlines()[2:]
    assert paper.endswith("| step 20, 2,000 passes |") and late.endswith("| – |")
    assert soon.startswith("| soon | 1 | 50 | – | 1.50 (100) |") and soon.endswith("| step 10, 500 passes |")
