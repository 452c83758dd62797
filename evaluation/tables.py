"""Print the paper's tables (1, 2, 3, 4, 5, 6, 7 and 10) from measured runs and people's ratings.

    python -m evaluation table out/SD3.5-L out/FLUX ours=out/ours --form 1 --out tables/1
    python -m evaluation table out/ours --form 6 --human ratings.csv
    python -m evaluation table --form 3 --human ratings.csv

Every figure comes with a bootstrap 95 % interval over the cases; those of one group (one scene's
grid) are kept together. Methods are compared with the last one on the cases they share, by the
interval of the difference over the same resamples. The best figure of a column is bold, the second
best italic. --out writes Markdown and JSON, with the command, the seed and the models of each run.
"""

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluation import rate
from evaluation.metrics import correlation, errors, mean, neighbours_in_order, targets_and_readings
from parts import cli, scorers
from parts.cli import UserError, markdown
from parts.files import read_json, read_records, write_json, write_whole

RESAMPLES = 2000  # bootstrap samples behind an interval
SCORES = {"clip_score": "CLIP-Score", "other_clip_score": "CLIP-Score, other CLIP",
          "content": "content, %", "clip_iqa": "CLIP-IQA", "aesthetic": "Aes-Score",
          "emo_a": "Emo-A, %", **scorers.TITLES}
HEADS = {"1": "method", "2": "method", "4": "model", "5": "task", "10": "reward", "all": "method"}


def resamples(groups, seed=0, count=RESAMPLES):
    """`count` bootstrap samples of cases, as arrays of their indices. groups: each case's, or None.

    The cases of a group share a scene and are no independent evidence, so they are drawn together.
    """
    rng = np.random.default_rng(seed)
    if not any(groups):
        return list(rng.integers(len(groups), size=(count, len(groups))))
    by_group = {}  # {group, or the index of a case that stands alone: its indices}
    for index, group in enumerate(groups):
        by_group.setdefault(group or index, []).append(index)
    units = list(by_group.values())
    return [np.concatenate([units[i] for i in rng.integers(len(units), size=len(units))])
            for _ in range(count)]


def interval(values):
    """The middle 95 % of a statistic's values over resamples, [low, high]; NaN are left out."""
    values = np.asarray(values)[~np.isnan(values)]
    return np.quantile(values, (0.025, 0.975)).tolist() if len(values) else [math.nan, math.nan]


def estimate(values, statistic, samples):
    """A statistic of [n], {"value", "low", "high"}, with its interval over resamples of the n."""
    low, high = interval([statistic(values[sample]) for sample in samples])
    return {"value": statistic(values), "low": low, "high": high}


def icc(ratings):
    """Agreement of raters (Shrout & Fleiss 1979): (ICC(2,1) of one rater, ICC(2,k) of their mean).

    Two-way random effects, absolute agreement. ratings [n,k]: n pictures, each rated by the same k
    raters. NaN without spread, or with fewer than two pictures or raters.
    """
    x = np.asarray(ratings, float)
    n, k = x.shape
    if n < 2 or k < 2:
        return math.nan, math.nan
    pictures = k * ((x.mean(1) - x.mean()) ** 2).sum()  # sum of squares between pictures,
    raters = n * ((x.mean(0) - x.mean()) ** 2).sum()  # between raters,
    rest = ((x - x.mean()) ** 2).sum() - pictures - raters  # and of what neither explains
    bms = pictures / (n - 1)  # the mean squares, as their paper names them
    jms = raters / (k - 1)
    ems = rest / ((n - 1) * (k - 1))
    single = bms + (k - 1) * ems + k * (jms - ems) / n
    average = bms + (jms - ems) / n
    return tuple(float((bms - ems) / d) if d else math.nan for d in (single, average))


# --------------------------------------------------------------------------------------------------
# Runs and their figures


@dataclass(frozen=True)
class Method:
    """One method's records, as run.measure writes them, in the order of their ids."""
    label: str
    form: str  # how the generator got the target, or "images"
    records: list
    facts: dict  # settings of its run


@dataclass(frozen=True)
class Column:
    """One figure of a method: statistic(values(records))."""
    head: str  # ends with ↑ or ↓ for what is better
    values: Callable  # records -> [n], or [n,2] for a correlation
    statistic: Callable  # of those, or of a resample of their rows -> float


def read_run(folder, label=None):
    """The Methods of a run's folder, one for each form of the target. Raises UserError."""
    folder = Path(folder)
    files = sorted(folder.glob("*.jsonl"))  # one for each form of the target
    if not files or not (folder / "settings.json").is_file():
        raise UserError(f"{folder}: no run of `python -m evaluation run`; expected settings.json "
                        f"and records in it")
    facts = read_json(folder / "settings.json")
    methods = []
    for file in files:
        records = sorted(read_records(file), key=lambda record: record["id"])
        if len(records) != facts["count"]:
            raise UserError(f"{file}: {len(records)} of {facts['count']} cases; run "
                            f"`{facts['command']}` to its end")
        name = (label or facts["name"]) + (f", {file.stem}" if len(files) > 1 else "")
        methods.append(Method(name, file.stem, records, facts))
    return methods


def columns_of(method):
    """{key: Column} of what a run measured."""
    first = method.records[0]
    accuracy = {}  # the order of the columns: accuracy, scores, continuity
    continuity = {}
    for reader in first["read"]:
        by = "" if len(first["read"]) == 1 else f", {reader}"  # one reader needs no name
        for axis, letter in enumerate("VA"):
            key = f"{reader}_{letter.lower()}"
            of = {"reader": reader, "axis": axis}
            values = partial(errors, **of)
            accuracy[f"{key}_error"] = Column(f"{letter}-Error{by} ↓", values, mean)
            values = partial(targets_and_readings, **of)
            head = f"Spearman {letter}{by} ↑"
            continuity[f"{key}_spearman"] = Column(head, values, correlation)
            if first.get("group"):  # only cases of a grid have neighbours
                values = partial(neighbours_in_order, **of)
                continuity[f"{key}_order"] = Column(f"order {letter}{by} ↑", values, mean)
    scores = {key: Column(f"{name} ↑", partial(score_of, key=key), mean)
              for key, name in SCORES.items() if key in first}
    if "clip_score" in scores:  # records hold cosines: torchmetrics cuts their mean off at 0
        scores["clip_score"] = replace(scores["clip_score"], statistic=lambda x: max(mean(x), 0.0))
    return accuracy | scores | continuity


def score_of(records, key):
    return np.array([record[key] for record in records])


def shared_keys(methods):
    """The columns that all of some methods have, in the order of the first one's."""
    return [key for key in columns_of(methods[0]) if all(key in columns_of(m) for m in methods)]


def unreadable(method):
    """{reader: share of the cases, 0..1, that it gave no readable answer for}."""
    return {reader: mean(np.array([r["read"][reader] is None for r in method.records], float))
            for reader in method.records[0]["read"]}


def figures(method):
    """{key: figure} of a run, without intervals, and what else is worth knowing of it."""
    found = {key: column.statistic(column.values(method.records))
             for key, column in columns_of(method).items()}
    found |= {f"{reader}_unreadable": share for reader, share in unreadable(method).items()}
    return found | {"seconds": mean(score_of(method.records, "seconds"))}


def compared(methods, keys, seed):
    """{label: {key: {"value", "low", "high"}}}; if a method shares cases with the last one also
    "difference", "difference_low" and "difference_high" to it, on so many "cases"."""
    last = methods[-1]
    of_last = {(r["id"], r["v"], r["a"]): r for r in last.records}
    found = {}
    for method in tqdm(methods, "intervals", unit="method", leave=False):
        # 1. the method's own figures
        columns = columns_of(method)
        samples = resamples([r.get("group") for r in method.records], seed)
        found[method.label] = {
            key: estimate(columns[key].values(method.records), columns[key].statistic, samples)
            for key in keys}
        # 2. differences on the same cases: how hard a case is drops out of them
        mine = [r for r in method.records if (r["id"], r["v"], r["a"]) in of_last]
        if method is last or not mine:
            continue
        theirs = [of_last[r["id"], r["v"], r["a"]] for r in mine]
        samples = resamples([r.get("group") for r in mine], seed)
        for key in keys:
            statistic = columns[key].statistic
            a = columns[key].values(mine)
            b = columns[key].values(theirs)
            low, high = interval([statistic(a[s]) - statistic(b[s]) for s in samples])
            found[method.label][key] |= {
                "difference": statistic(a) - statistic(b), "difference_low": low,
                "difference_high": high, "cases": len(mine)}
    return found


# --------------------------------------------------------------------------------------------------
# Tables: each is (Markdown, its figures for JSON)


def marked(cells, values, head):
    """The cells, the best value's bold and the second best's italic, by the arrow of the head."""
    order = sorted({v for v in values if not math.isnan(v)}, reverse=head.endswith("↑"))
    marks = dict(zip(order, ("**", "*"))) if len(order) > 1 else {}
    return [f"{marks.get(v, '')}{cell}{marks.get(v, '')}" for cell, v in zip(cells, values)]


def overview(methods):
    """All figures of some methods, one row each, as Markdown alone and without intervals."""
    columns = columns_of(methods[0])
    keys = shared_keys(methods)
    rows = [["method", *(columns[key].head for key in keys), "seconds per picture"]]
    for method in methods:
        found = figures(method)
        rows.append([method.label, *(f"{found[key]:.2f}" for key in (*keys, "seconds"))])
    return markdown(rows)


def figure_table(methods, keys, head, seed, transposed=False):
    """The methods' figures with intervals and, below, their differences to the last method's.

    transposed: with methods as columns, as in the paper's tables 4 to 6.
    """
    found = compared(methods, keys, seed)
    columns = columns_of(methods[0])
    heads = [columns[key].head for key in keys]
    table = [[head, *found]]  # a line for each key, which most tables have as a column
    for key, name in zip(keys, heads, strict=True):
        cells = ["{value:.3f} [{low:.3f}, {high:.3f}]".format(**of[key]) for of in found.values()]
        table.append([name, *marked(cells, [of[key]["value"] for of in found.values()], name)])
    text = markdown(table if transposed else list(zip(*table)))
    rows = [[head, *heads, "cases"]]  # of differences
    for label, of in found.items():
        if "difference" in of[keys[0]]:
            form = "{difference:+.3f} [{difference_low:+.3f}, {difference_high:+.3f}]"
            cells = [form.format(**of[key]) for key in keys]
            rows.append([label, *cells, of[keys[0]]["cases"]])
    if len(rows) > 1:
        text += f"\n\nDifference to {methods[-1].label} on the same cases:\n\n{markdown(rows)}"
    return text, found


def latency_table(methods):
    """Table 7: seconds for a case and for a picture, and billions of parameters of the generator.

    Feedback draws many pictures for a case, every other method one.
    """
    found = {}
    for method in methods:
        given = method.facts.get("seconds_given")  # of pictures that were only read here
        seconds = given if method.facts["images"] else figures(method)["seconds"]
        drawn = method.facts["rounds"] * method.facts["n"] if method.form == "feedback" else 1
        each = None if seconds is None else seconds / drawn
        found[method.label] = {"seconds": seconds, "picture": each,
                               "billions": method.facts["billions"]}
    rows = [["metric", *found]]
    for head, key, form in (("inference latency (s), a case", "seconds", "{:.2f}"),
                            ("the same, a picture drawn", "picture", "{:.2f}"),
                            ("model size (B)", "billions", "{:.3g}")):
        values = [of[key] for of in found.values()]
        rows.append([head, *("–" if value is None else form.format(value) for value in values)])
    return markdown(rows), found


def preference_table(ratings, seed):
    """Table 3: how often a method's picture was chosen as best, and the mean quality, 1..5."""
    found = {}
    for name in sorted({r["method"] for r in ratings}):  # as no run gives their order
        own = [r for r in ratings if r["method"] == name]
        best = np.array([math.nan if r["best"] is None else 100.0 * r["best"] for r in own])
        quality = np.array([r["quality"] for r in own])
        samples = resamples([r["case"] for r in own], seed)  # a case's raters stay together
        found[name] = {"preference": estimate(best, mean, samples),
                       "quality": estimate(quality, mean, samples)}
    rows = [["metric", *found]]
    for head, key, form in (
            ("Emotional preference ↑", "preference", "{value:.1f} % [{low:.1f}, {high:.1f}]"),
            ("Image quality ↑", "quality", "{value:.2f} [{low:.2f}, {high:.2f}]")):
        cells = [form.format(**of[key]) for of in found.values()]
        rows.append([head, *marked(cells, [of[key]["value"] for of in found.values()], head)])
    return markdown(rows), found


def human_table(method, human, seed):
    """Table 6: errors against the target, and against what people said, human {case: (V, A)}."""
    rated = [r for r in method.records if r["id"] in human]
    if not rated:
        raise UserError(f"{method.label}: none of its cases was rated; give ratings of its cases")
    relabelled = [r | dict(zip("va", human[r["id"]])) for r in rated]
    keys = [key for key in columns_of(method) if key.endswith("_error")]  # scores know no target
    sides = [replace(method, label="Lexicon-based annotation", records=rated),
             replace(method, label="Human annotation", records=relabelled)]
    return figure_table(sides, keys, "annotator", seed, transposed=True)


def people(ratings, method=None):
    """{case: (mean V, mean A)} by people, of one method's pictures (default: the only one's)."""
    methods = sorted({r["method"] for r in ratings})
    if method is None and len(methods) > 1:
        raise UserError(f"the ratings are of {', '.join(methods)}; name one, as in "
                        f"--human FILE:{methods[0]}")
    if method not in (None, *methods):
        raise UserError(f"no ratings of {method!r}; there are some of {', '.join(methods)}")
    by_case = {}  # {case: what each rater said}
    for r in ratings:
        if r["method"] == method or method is None:
            by_case.setdefault(r["case"], []).append((r["v"], r["a"]))
    return {case: tuple(np.mean(said, axis=0).tolist()) for case, said in by_case.items()}


def agreement(ratings):
    """(a line on how far raters agree, {scale: ICC(2,1) as "single", ICC(2,k) as "mean", …})."""
    by_picture = {}  # {(case, method): values on the scales, by rater}
    for r in sorted(ratings, key=lambda r: r["rater"]):
        values = [r[scale] for scale in rate.SCALES]
        by_picture.setdefault((r["case"], r["method"]), []).append(values)
    raters = len({r["rater"] for r in ratings})
    said = [rows for rows in by_picture.values() if len(rows) == raters]  # pictures that all rated
    said = np.array(said).reshape(-1, raters, len(rate.SCALES))  # [n,k,scales], n may be 0
    found = {}
    for i, scale in enumerate(rate.SCALES):
        single, average = icc(said[:, :, i])
        found[scale] = {"single": single, "mean": average, "pictures": len(said), "raters": raters}
    figures = ", ".join(f"{name} {found[scale]['single']:.2f}, {found[scale]['mean']:.2f}"
                        for scale, name in (("v", "V"), ("a", "A"), ("quality", "quality")))
    line = f"{raters} raters, {len(said)} pictures rated by all; ICC(2,1) and ICC(2,k): {figures}"
    return line, found


def table(form, methods, ratings, human, seed):
    """One of the paper's tables; "all" has every column. Raises UserError for what it lacks."""
    if form == "3":
        return preference_table(ratings, seed)
    if form == "6":
        forms = [method.form for method in methods if method.facts is methods[-1].facts]
        if len(forms) > 1:
            raise UserError(f"--form 6: the last run has its target as {' and as '.join(forms)}; "
                            f"give one of a single form, of `evaluation run --forms {forms[0]}`")
        return human_table(methods[-1], human, seed)
    if form == "7":
        return latency_table(methods)
    keys = shared_keys(methods)
    if form != "all":
        scores = () if form in ("4", "5") else SCORES
        keys = [key for key in keys if key.endswith("_error") or key in scores]
    if not keys:
        raise UserError(f"the runs {', '.join(m.label for m in methods)} have no figure in common; "
                        f"evaluate them with the same judges")
    text, found = figure_table(methods, keys, HEADS[form], seed, transposed=form in ("4", "5"))
    lost = [f"{method.label}, {reader} {share:.1%}"
            for method in methods for reader, share in unreadable(method).items() if share]
    if lost:
        text += "\n\nAnswers that could not be read, left out above: " + "; ".join(lost)
    return text, found


def about(label, facts):
    """A line on where the figures of a method come from."""
    keys = ("model", "adapter", "clip", "aesthetic", "emotion_head", "sources")
    sources = {key: facts.get(key) for key in keys}
    sources |= {f"judge {name}": source for name, source in facts["judges"].items()}
    # A local checkpoint is a list, of its name and of its files.
    named = [f"{what} {source[0] if isinstance(source, list) else source}"
             for what, source in sources.items() if source]
    return ", ".join([f"- {label}: `{facts['command']}`", f"seed {facts['seed']}", *named]) + "\n"


def print_table(args, command):
    # 1. read runs and ratings
    if args.form in ("3", "6") and args.human is None:
        raise UserError(f"--form {args.form}: needs people's ratings, --human ratings.csv")
    if args.form != "3" and not args.runs:
        raise UserError("no run given; expected folders that `python -m evaluation run` wrote")
    methods = []
    for text in args.runs:
        label, _, folder = text.rpartition("=")  # [LABEL=]FOLDER
        methods += read_run(folder, label or None)
    facts = {method.label: method.facts for method in methods}
    if len(facts) < len(methods):
        labels = ", ".join(method.label for method in methods)
        raise UserError(f"{labels}: some have the same label; give another, as in ours=FOLDER")
    path, _, rated_method = (args.human or "").partition(":")  # FILE[:METHOD]
    ratings = rate.read_ratings(path) if path else []
    human = people(ratings, rated_method or None) if args.form == "6" else {}
    # 2. the table
    text, found = table(args.form, methods, ratings, human, args.seed)
    if ratings:
        line, found["agreement"] = agreement(ratings)
        text += f"\n\n{line}"
    print(text)
    # 3. the files
    if args.out is not None:
        write_json(args.out.with_name(args.out.name + ".json"), {
            "command": command, "form": args.form, "seed": args.seed, "resamples": RESAMPLES,
            "runs": facts, "figures": found})
        sources = "".join(about(label, of) for label, of in facts.items())
        write_whole(args.out.with_name(args.out.name + ".md"), f"{text}\n\n{sources}")


def main(argv):
    parser = cli.parser(__doc__, prog="python -m evaluation table")
    parser.add_argument("runs", nargs="*", metavar="[LABEL=]RUN",
                        help="folders of runs; the others are compared with the last one")
    parser.add_argument("--form", choices=["all", "1", "2", "3", "4", "5", "6", "7", "10"],
                        default="all", help="which of the paper's tables (default: every column)")
    parser.add_argument("--human", metavar="FILE[:METHOD]",
                        help="ratings of `python -m evaluation rate`, for tables 3 and 6")
    parser.add_argument("--seed", type=cli.integer(0, 2**31), default=0,
                        help="of the resamples (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json too")
    args = parser.parse_args(argv)
    command = f"python -m evaluation table {shlex.join(argv)}"
    return cli.run_program(lambda: print_table(args, command))
