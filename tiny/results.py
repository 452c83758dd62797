"""The tables of docs/results.md, written from the records in docs/records.

    python -m tiny.results            # writes every table anew
    python -m tiny.results --check    # only says whether the page has what the records say

A study of the miniature evaluates each of its runs case by case and keeps the cases here, as JSON
lines: the run's own line (row of the table, seed, commands, digest of its data), then a line for
each case. On the page a table stands between two comments that name its records:

    <!-- table reward_feedback -->
    <!-- end -->

A figure is the mean over cases, with its 95 % interval over cases: what another set of prompts
might have given. A row of several seeds first takes the mean of a case over its seeds. NAME_pairs
compares rows of the table NAME case by case, feedback_rounds follows feedback over its rounds, and
recipes follows trainings over their steps.
"""

import math
import re
import statistics
import sys
import warnings
from operator import itemgetter
from pathlib import Path

import numpy as np

from evaluation.metrics import mean, spearman
from evaluation.tables import estimate, resamples
from parts import cli
from parts.cli import UserError
from parts.files import read_json, read_records, write_rows, write_whole

DOCS = Path(__file__).resolve().parent.parent / "docs"
RECORDS = DOCS / "records"
PAGE = DOCS / "results.md"
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = {  # head: (figure of a case's record, digits)
    "V-Error ↓": (lambda r: abs(r["meter"][0] - r["v"]), 2),
    "A-Error ↓": (lambda r: abs(r["meter"][1] - r["a"]), 2),
    "V-Error by judge ↓": (lambda r: error_by_judge(r, 0), 2),
    "A-Error by judge ↓": (lambda r: error_by_judge(r, 1), 2),
    "content, % ↑": (lambda r: r["content"], 1),
    "CLIP-Score ↑": (lambda r: r["clip_score"], 1),
    "other CLIP-Score ↑": (lambda r: r["other_clip_score"], 1),
}
JUDGE = {
    "format, % ↑": (lambda r: 100 * r["format"], 1),
    "V-Error ↓": (lambda r: error_by_judge(r, 0), 2),
    "A-Error ↓": (lambda r: error_by_judge(r, 1), 2),
    "class, % ↑": (lambda r: 100 * r["class"], 1),
}
CONTROL = {
    "pictures, V ↑": (itemgetter("v_pictures"), 1),
    "Spearman V ↑": (itemgetter("v_spearman"), 2),
    "pictures, A ↑": (itemgetter("a_pictures"), 1),
    "Spearman A ↑": (itemgetter("a_spearman"), 2),
    "order V ↑": (itemgetter("v_order"), 3),
    "order A ↑": (itemgetter("a_order"), 3),
}
READING = {
    "V to the meter ↓": (itemgetter("v_off"), 2),
    "A to the meter ↓": (itemgetter("a_off"), 2),
    "ties in a group, % ↓": (lambda r: 100 * r["ties"], 1),
    "Spearman in a group ↑": (itemgetter("order"), 2),
    "seconds a picture ↓": (itemgetter("seconds"), 3),
}
TABLES = {"judge": JUDGE, "control": CONTROL, "reading": READING}  # others have COLUMNS
PAPER = "as the paper trains"  # a recipe; the table says how soon others are where it ends
WATCHED = (10, 20, 30, 60, 100)  # steps at which recipes are compared
SEEING = "feedback"  # what the controls of textual feedback are compared with
UNSETTLED = 0.5  # loss of a round's best picture above which its prompt should change


def error_by_judge(record, axis):
    if record["judge"] is None:
        return float("nan")
    return abs(record["judge"][axis] - record["va"[axis]])


# --------------------------------------------------------------------------------------------------
# Records


def add_run(table, row, run, seed, folder, form, commands, data):
    """Put an evaluation's cases into the records of a table, in place of the run's older ones.

    folder: of `python -m evaluation run`; form: of the target; data: digest of the training rows.
    """
    head = {"run": run, "row": row, "seed": seed, "form": form, "commands": commands, "data": data,
            "cases": read_json(folder / "settings.json")["cases"][1]}
    lines = [head]
    for record in read_records(folder / f"{form}.jsonl"):
        read = record["read"]
        case = {"run": run, "id": record["id"], "v": record["v"], "a": record["a"],
                "meter": read["meter"], "judge": read.get("judge")}
        for name in ("content", "clip_score", "other_clip_score"):
            case[name] = record.get(name)
        lines.append({name: rounded(value) for name, value in case.items()})
    put(table, run, lines)


def add_figures(table, row, head, records, run=None):
    """Put records, one a case with its figures, into a row of a table in place of older ones.

    head: what the row's own line says of it, such as its command. run: of a row that has several.
    """
    run = run or row
    lines = [{"run": run, "row": row, **head}]
    for record in records:
        figures = {name: rounded(value) for name, value in record.items()}
        lines.append({"run": run, **figures})
    put(table, run, lines)


def put(table, run, lines):
    """Write a run's lines into the records of a table, in the place of its older ones."""
    path = RECORDS / f"{table}.jsonl"
    before = read_records(path)
    runs = [record["run"] for record in before]
    at = runs.index(run) if run in runs else len(runs)
    after = [record for record in before[at:] if record["run"] != run]
    write_rows(path, before[:at] + lines + after)


def rounded(value):
    """Numbers with three decimals: a record is for the table, and pixels have 256 levels."""
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 3) if isinstance(value, float) else value


def rows_of(table):
    """{row: {run: [its cases' records]}} of a table's records. Raises UserError."""
    path = RECORDS / f"{table}.jsonl"
    if not path.exists():
        raise UserError(f"{path}: missing, but {PAGE} has a table of it; run its study")
    rows = {}
    row_of = {}
    for record in read_records(path):
        if "row" in record:
            row_of[record["run"]] = record["row"]
            rows.setdefault(record["row"], {})[record["run"]] = []
        else:
            rows[row_of[record["run"]]][record["run"]].append(record)
    return rows


# --------------------------------------------------------------------------------------------------
# Tables


def cells_of(runs, columns):
    """A row's cells: the figures of each column with intervals over cases."""
    samples = resamples([None] * len(runs[0]))
    cells = []
    for figure, digits in columns.values():
        if figure(runs[0][0]) is None:
            cells.append("–")
            continue
        cells.append(shown(estimate(means_of(runs, figure), mean, samples), digits))
    return cells


def means_of(runs, figure):
    """A figure of each case [n] or [n,·], the mean over the runs in which it could be read."""
    values = np.array([[figure(record) for record in records] for records in runs])  # [runs,n,·]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where it could be read in none, NaN stays
        return np.nanmean(values, axis=0)


def correlations(runs):
    """A row's rank correlations of target and meter, each the mean over its runs."""
    cells = []
    for axis in (0, 1):
        ranks = [spearman([record["va"[axis]] for record in records],
                          [record["meter"][axis] for record in records]) for records in runs]
        cells.append(f"{statistics.mean(ranks):.2f}")
    return cells


def by_case(runs, figure):
    """A figure of each case [n], the mean over a row's runs, in the order of the cases' names."""
    ordered = [sorted(records, key=itemgetter("id")) for records in runs.values()]
    return means_of(ordered, figure)


def pairs_of(rows):
    """[(row, the row it is compared with)] of a table."""
    if "base" in rows:
        return [(row, "base") for row in rows if row != "base"]
    pairs = []
    for row in rows:
        generator, method = row.split(": ")
        if method != SEEING:
            pairs.append((f"{generator}: {SEEING}", row))
    return pairs


def pairs_table(name):
    """Markdown of how rows differ on the same cases: errors in per cent, the rest in points."""
    rows = rows_of(name)
    lines = [["", "beside", *(f"{head.split()[0]}, %" for head in list(COLUMNS)[:2]), "both, %",
              "content, points"]]
    for row, other in pairs_of(rows):
        errors = [[by_case(rows[each], COLUMNS[head][0]) for head in list(COLUMNS)[:2]]
                  for each in (row, other)]  # [2 rows][2 scales] of [n]
        samples = resamples([None] * len(errors[0][0]))
        cells = []
        for mine, theirs in (*zip(*errors), [sum(both) for both in errors]):
            pair = np.stack([mine, theirs], axis=1)  # [n,2]
            cells.append(shown(estimate(pair, change, samples), 0))
        content = [by_case(rows[each], COLUMNS["content, % ↑"][0]) for each in (row, other)]
        cells.append(shown(estimate(content[0] - content[1], mean, samples), 1))
        lines.append([row, other, *cells])
    return cli.markdown(lines)


def change(pair):
    """How much less the mean of [n,2]'s first column is than that of its second, in per cent."""
    mine, theirs = pair.mean(axis=0)
    return 100 * (mine / theirs - 1)


def rounds_table(name):
    """Markdown of feedback by round: the error of its pictures and how often its prompt changed.

    The last line counts only cases whose best picture's loss, by the judge, is above UNSETTLED.
    """
    rows = {row: runs for row, runs in rows_of(name).items() if row.endswith(f": {SEEING}")}
    count = len(next(iter(next(iter(rows.values())).values()))[0]["losses"])
    lines = [["V-Error + A-Error by the meter", *(f"round {number}" for number in range(count))]]
    for row, runs in rows.items():
        for title, key in (("all pictures of the round", "round_errors"),
                           ("the best so far by the judge", "best_errors")):
            values = by_case(runs, itemgetter(key))  # [n,rounds]
            samples = resamples([None] * len(values))
            cells = [shown(estimate(own, mean, samples), 2) for own in values.T]
            lines.append([f"{row}: {title}", *cells])
        records = [record for own in runs.values() for record in own]
        cells = []
        for number in range(count - 1):
            changed = [record["changed"][number] for record in records
                       if record["losses"][number] > UNSETTLED]
            cells.append(f"{100 * statistics.mean(changed):.0f} % of {len(changed)}"
                         if changed else "–")
        lines.append([f"{row}: its prompt is changed, loss above {UNSETTLED}", *cells, "–"])
    return cli.markdown(lines)


def recipes_table():
    """Markdown of how far recipes of reward feedback get in how many steps, on watched rows.

    A record is a run: its recipe, the passes of the MMDiT that a picture takes in a step, seconds
    of rollout and update if the GPU's, and [step, V-Error, A-Error, content] of its evaluations.
    """
    recipes = {}
    for record in read_records(RECORDS / "recipes.jsonl"):
        if "recipe" in record:
            recipes.setdefault(record["recipe"], []).append(record)
    paper = evaluations_of(recipes[PAPER]) if PAPER in recipes else {}
    aim = paper[max(paper)][0] if paper else -math.inf
    lines = [["V-Error + A-Error by the meter (content, %)", "seeds", "passes a step", "s a step",
              *(f"step {step}" for step in WATCHED), "as good as the paper's end"]]
    for recipe, runs in recipes.items():
        seconds = mean([sum(run["seconds"]) for run in runs if "seconds" in run])
        passes = runs[0]["passes"]
        cells = [recipe, len(runs), passes, "–" if math.isnan(seconds) else f"{seconds:.2f}"]
        evaluations = evaluations_of(runs)
        for step in WATCHED:
            error, content = evaluations.get(step, (None, None))
            cells.append("–" if error is None else f"{error:.2f} ({100 * content:.0f})")
        reached = [step for step, (error, _) in evaluations.items() if error <= aim]
        cells.append(f"step {reached[0]}, {reached[0] * passes:,.0f} passes" if reached else "–")
        lines.append(cells)
    return cli.markdown(lines)


def evaluations_of(runs):
    """{step: (V-Error + A-Error, content)} at the steps that all runs have, means over the runs."""
    found = [{each[0]: each[1:] for each in run["evaluations"]} for run in runs]
    means = {}
    for step in found[0]:
        if all(step in own for own in found):
            v, a, content = np.mean([own[step] for own in found], axis=0)
            means[step] = v + a, content
    return means


def shown(found, digits):
    return "{value:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(**found, d=digits)


def table_of(name):
    """Markdown of a table."""
    if name.endswith("_pairs"):
        return pairs_table(name.removesuffix("_pairs"))
    if name.endswith("_rounds"):
        return rounds_table(name.removesuffix("_rounds"))
    if name == "recipes":
        return recipes_table()
    columns = TABLES.get(name, COLUMNS)
    head = ["", "seeds", *columns]
    if columns is COLUMNS:
        head += ["Spearman V ↑", "Spearman A ↑"]
    lines = [head]
    for row, runs in rows_of(name).items():
        runs = [sorted(records, key=itemgetter("id")) for records in runs.values()]
        cells = cells_of(runs, columns)
        if columns is COLUMNS:
            cells += correlations(runs)
        lines.append([row, len(runs), *cells])
    return cli.markdown(lines)


def page():
    """docs/results.md with every table as its records have it."""
    text = PAGE.read_text(encoding="utf-8")
    return TABLE.sub(lambda found: f"{found[1]}{table_of(found[2])}\n{found[3]}", text)


def main(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 2 if it differs")
    args = parser.parse_args(argv)

    def work():
        new = page()
        if new == PAGE.read_text(encoding="utf-8"):
            return
        if args.check:
            raise UserError(f"{PAGE}: differs from docs/records; run `python -m tiny.results`")
        write_whole(PAGE, new)

    return cli.run_program(work)


if __name__ == "__main__":
    sys.exit(main())
