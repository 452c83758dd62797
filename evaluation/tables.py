"""The paper's tables (1, 2, 3, 4, 5, 6, 7 and 10) from runs of evaluate.py and from people's ratings.

    python evaluate.py table runs/SD3.5-L runs/FLUX ours=runs/ours --form 1 --out tables/1
    python evaluate.py table runs/ours --form 6 --human ratings.csv
    python evaluate.py table --form 3 --human ratings.csv

Every figure comes with a bootstrap 95 % interval over the cases; those of one group (one scene's grid) are kept together.
Methods are compared with the last one on the cases they share, by the interval of the difference over the same resamples.
The best figure of a column is bold, the second best italic. `--out` writes the table as Markdown and as JSON, with the
command, the seed and the models of each run.
"""

import argparse
import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from parts import cli
from parts.cli import UserError
from parts.files import read_json, read_records, write_json

RESAMPLES = 2000
SCORES = {"clip_score": "CLIP-Score", "clip_iqa": "CLIP-IQA", "aesthetic": "Aes-Score"}


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def ranks(x):
    """Ranks 0..n-1 of a sequence; equal values share their mean rank."""
    _, inverse, counts = np.unique(np.asarray(x, float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def spearman(x, y):
    """Rank correlation in -1..1; NaN if one side has no spread."""
    x, y = ranks(x), ranks(y)
    spread = x.std() * y.std()
    return float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread else math.nan


def correlation(pairs):
    """Spearman of [n,2] without the rows that hold a NaN; NaN if fewer than two are left."""
    pairs = pairs[~np.isnan(pairs).any(axis=1)]
    return spearman(*pairs.T) if len(pairs) > 1 else math.nan


def mean(values):
    """Mean of [n] without the NaN; NaN if nothing is left."""
    return float(np.nanmean(values)) if not np.isnan(values).all() else math.nan


def resamples(groups, seed=0, count=RESAMPLES):
    """`count` bootstrap samples of cases, as arrays of their places. groups: of each case; None stands alone."""
    rng = np.random.default_rng(seed)
    if not any(groups):
        return list(rng.integers(len(groups), size=(count, len(groups))))
    units = {}
    for place, group in enumerate(groups):
        units.setdefault(group or place, []).append(place)
    units = list(units.values())
    return [np.concatenate([units[i] for i in rng.integers(len(units), size=len(units))]) for _ in range(count)]


def interval(values):
    """The middle 95 % of a statistic's values over resamples, [low, high]; NaN are left out."""
    values = np.asarray(values)[~np.isnan(values)]
    return [float(x) for x in np.quantile(values, (0.025, 0.975))] if len(values) else [math.nan, math.nan]


def icc(ratings):
    """Agreement of raters: two-way random effects, absolute agreement -> (ICC(2,1) of one rater, ICC(2,k) of their mean).

    ratings [n,k]: n pictures, each rated by the same k raters. Shrout & Fleiss (1979). NaN without spread or with one rater.
    """
    x = np.asarray(ratings, float)
    (n, k), whole = x.shape, x.mean()
    if n < 2 or k < 2:
        return math.nan, math.nan
    rows, columns = k * ((x.mean(1) - whole) ** 2).sum(), n * ((x.mean(0) - whole) ** 2).sum()
    of_rows, of_columns = rows / (n - 1), columns / (k - 1)  # mean squares
    error = (((x - whole) ** 2).sum() - rows - columns) / ((n - 1) * (k - 1))
    single, average = of_rows + (k - 1) * error + k * (of_columns - error) / n, of_rows + (of_columns - error) / n
    return tuple(float((of_rows - error) / d) if d else math.nan for d in (single, average))


# ---------------------------------------------------------------------------------------------------------------------
# Runs and their figures


@dataclass(frozen=True)
class Method:
    """One method's records, as evaluate.measure writes them, in the order of their ids."""
    label: str
    form: str
    records: list
    facts: dict  # settings of its run


def read_run(folder, label=None):
    """The methods of a run's folder: one, or one for each way in which its generator got the target. Raises UserError."""
    folder = Path(folder)
    files = sorted(folder.glob("*.jsonl"))
    if not files or not (folder / "settings.json").is_file():
        raise UserError(f"{folder}: no run of evaluate.py; expected settings.json and a .jsonl of records in it")
    facts = read_json(folder / "settings.json")
    methods = []
    for file in files:
        records = sorted(read_records(file), key=lambda record: record["id"])
        if len(records) != facts["count"]:
            raise UserError(f"{file}: {len(records)} of {facts['count']} cases; run `{facts['command']}` to its end")
        name = (label or facts["name"]) + (f", {file.stem}" if len(files) > 1 else "")
        methods.append(Method(name, file.stem, records, facts))
    return methods


def error_of(reader, axis):
    """|V̂ − V| (axis 0) or |Â − A| (axis 1) of each record by a reader; NaN where its answer could not be read."""
    def values(records):
        return np.array([abs(r["read"][reader][axis] - r["va"[axis]]) if r["read"][reader] else math.nan for r in records])
    return values


def pairs_of(reader, axis):
    """(wanted, read) of each record, [n,2]; NaN as read where an answer could not be read."""
    def values(records):
        return np.array([(r["va"[axis]], r["read"][reader][axis] if r["read"][reader] else math.nan) for r in records])
    return values


def order_of(reader, axis):
    """1 where a record's neighbour in its grid, one step higher on the axis, was read as higher, 0 where not; NaN at the
    upper border, outside of grids, and where an answer could not be read."""
    def values(records):
        places = {(r["group"], r["v"], r["a"]): i for i, r in enumerate(records) if r.get("group")}
        out, lines = np.full(len(records), math.nan), {}
        for (group, v, a), i in places.items():
            lines.setdefault((group, (a, v)[axis]), []).append(((v, a)[axis], i))
        for line in lines.values():
            for (_, low), (_, high) in zip(sorted(line), sorted(line)[1:]):
                if records[low]["read"][reader] and records[high]["read"][reader]:
                    out[low] = records[high]["read"][reader][axis] > records[low]["read"][reader][axis]
        return out
    return values


def columns_of(method):
    """{key: (head, ↑ or ↓, values of records -> [n] or [n,2], statistic of those)} of what a run measured."""
    first, out = method.records[0], {}
    for reader in first["read"]:
        by = "" if len(first["read"]) == 1 else f", {reader}"
        for axis, letter in enumerate("VA"):
            out[f"{reader}_{letter.lower()}_error"] = (f"{letter}-Error{by}", "↓", error_of(reader, axis), mean)
    for key, head in SCORES.items():
        if key in first:
            out[key] = (head, "↑", lambda records, k=key: np.array([r[k] for r in records]),
                        (lambda x: max(mean(x), 0.0)) if key == "clip_score" else mean)
    for reader in first["read"]:
        by = "" if len(first["read"]) == 1 else f", {reader}"
        for axis, letter in enumerate("VA"):
            out[f"{reader}_{letter.lower()}_spearman"] = (f"Spearman {letter}{by}", "↑", pairs_of(reader, axis), correlation)
            if first.get("group"):
                out[f"{reader}_{letter.lower()}_order"] = (f"order {letter}{by}", "↑", order_of(reader, axis), mean)
    return out


def shared_keys(methods):
    """The columns that all of some methods have, in the order of the first one's."""
    return [key for key in columns_of(methods[0]) if all(key in columns_of(method) for method in methods)]


def unreadable(method):
    """Share of the cases that a reader gave no readable answer for, {reader: 0..1}."""
    return {reader: mean(np.array([r["read"][reader] is None for r in method.records], float))
            for reader in method.records[0]["read"]}


def figures(method):
    """{key: figure} of a run, without intervals, and what else is worth knowing of it."""
    out = {key: statistic(values(method.records)) for key, (_, _, values, statistic) in columns_of(method).items()}
    return out | {f"{reader}_unreadable": share for reader, share in unreadable(method).items()} | {
        "seconds": mean(np.array([r["seconds"] for r in method.records]))}


def compared(methods, keys, seed):
    """{label: {key: {"value", "low", "high", and against the last method "difference", "difference_low", …}}}."""
    out, last = {}, methods[-1]
    theirs = {(r["id"], r["v"], r["a"]): r for r in last.records}
    for method in tqdm(methods, "intervals", unit="method", leave=False):
        samples, found = samples_of(method.records, seed), out.setdefault(method.label, {})
        pairs = [(r, theirs[key]) for r in method.records if (key := (r["id"], r["v"], r["a"])) in theirs]
        pair_samples = samples_of([r for r, _ in pairs], seed) if pairs and method is not last else []
        for key in keys:
            _, _, values, statistic = columns_of(method)[key]
            own = values(method.records)
            low, high = interval([statistic(own[s]) for s in samples])
            found[key] = {"value": statistic(own), "low": low, "high": high}
            if pair_samples:
                a, b = (values(list(side)) for side in zip(*pairs))
                low, high = interval([statistic(a[s]) - statistic(b[s]) for s in pair_samples])
                found[key] |= {"difference": statistic(a) - statistic(b), "difference_low": low, "difference_high": high,
                               "cases": len(pairs)}
    return out


def samples_of(records, seed):
    return resamples([r.get("group") for r in records], seed)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def markdown(rows):
    """Rows of cells, the first of them the head, as a Markdown table."""
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]])


def marked(cells, values, arrow):
    """The cells, the best value's bold and the second best's italic."""
    order = sorted({v for v in values if not math.isnan(v)}, reverse=arrow == "↑")
    marks = dict(zip(order, ("**", "*"))) if len(order) > 1 else {}
    return [f"{marks.get(v, '')}{cell}{marks.get(v, '')}" for cell, v in zip(cells, values, strict=True)]


def overview(methods):
    """All figures of some methods, one row each, as a Markdown table without intervals."""
    keys = shared_keys(methods)
    rows = [["method", *(" ".join(columns_of(methods[0])[k][:2]) for k in keys), "seconds per picture"]]
    for method in methods:
        found = figures(method)
        rows.append([method.label, *(f"{found[k]:.2f}" for k in keys), f"{found['seconds']:.2f}"])
    return markdown(rows)


def figure_table(methods, keys, head, seed, transposed=False):
    """(Markdown, figures) of the methods' figures with intervals and, below, their differences to the last method."""
    found, columns = compared(methods, keys, seed), columns_of(methods[0])
    labels = [m.label for m in methods]
    table = {}  # by key, a cell for each method
    for key in keys:
        values = [found[label][key]["value"] for label in labels]
        cells = ["{value:.3f} [{low:.3f}, {high:.3f}]".format(**found[label][key]) for label in labels]
        table[key] = marked(cells, values, columns[key][1])
    names = [" ".join(columns[key][:2]) for key in keys]
    if transposed:
        rows = [[head, *labels], *([name, *table[key]] for name, key in zip(names, keys, strict=True))]
    else:
        rows = [[head, *names], *([label, *(table[key][i] for key in keys)] for i, label in enumerate(labels))]
    text = markdown(rows)
    if others := [label for label in labels[:-1] if "difference" in found[label][keys[0]]]:
        form = "{difference:+.3f} [{difference_low:+.3f}, {difference_high:+.3f}]"
        text += f"\n\nDifference to {labels[-1]} on the same cases:\n\n" + markdown(
            [[head, *names, "cases"], *([label, *(form.format(**found[label][key]) for key in keys),
                                         found[label][keys[0]]["cases"]] for label in others)])
    return text, found


def latency_table(methods):
    """Table 7: seconds for a picture, and billions of parameters of the base generator."""
    seconds = [m.facts.get("seconds_given") if m.facts["images"] else figures(m)["seconds"] for m in methods]
    sizes = [m.facts["billions"] for m in methods]
    rows = [["metric", *(m.label for m in methods)]]
    for head, values, form in (("inference latency (s)", seconds, "{:.2f}"), ("model size (B)", sizes, "{:.3g}")):
        rows.append([head, *("–" if value is None else form.format(value) for value in values)])
    return markdown(rows), {m.label: {"seconds": s, "billions": b} for m, s, b in zip(methods, seconds, sizes, strict=True)}


def people(ratings, method=None):
    """{case: (mean V, mean A)} of people's ratings of one method's pictures (default: the only one). Raises UserError."""
    methods = sorted({r["method"] for r in ratings})
    if method is None and len(methods) > 1:
        raise UserError(f"the ratings are of {', '.join(methods)}; name one, as in --human FILE:{methods[0]}")
    if method is not None and method not in methods:
        raise UserError(f"no ratings of {method!r}; there are some of {', '.join(methods)}")
    by_case = {}
    for r in ratings:
        if r["method"] == (method or methods[0]):
            by_case.setdefault(r["case"], []).append((r["v"], r["a"]))
    return {case: tuple(np.mean(said, axis=0).tolist()) for case, said in by_case.items()}


def agreement(ratings):
    """{"v": {…}, "a": {…}, "quality": {…}}: ICC(2,1), ICC(2,k), pictures and raters, over the pictures that all rated."""
    raters, out = sorted({r["rater"] for r in ratings}), {}
    for key in ("v", "a", "quality"):
        by_picture = {}
        for r in ratings:
            by_picture.setdefault((r["case"], r["method"]), {})[r["rater"]] = r[key]
        rows = [[said[rater] for rater in raters] for said in by_picture.values() if len(said) == len(raters)]
        single, average = icc(rows) if rows else (math.nan, math.nan)
        out[key] = {"single": single, "mean": average, "pictures": len(rows), "raters": len(raters)}
    return out


def agreement_line(ratings):
    found = agreement(ratings)
    return (f"{found['v']['raters']} raters, {found['v']['pictures']} pictures rated by all; ICC(2,1) and ICC(2,k): "
            + ", ".join(f"{name} {found[key]['single']:.2f}, {found[key]['mean']:.2f}"
                        for key, name in (("v", "V"), ("a", "A"), ("quality", "quality")))), found


def human_table(methods, human, seed):
    """Table 6: the readings of a method's pictures against the target, and against what people said of the case."""
    method = methods[-1]
    rated = [r for r in method.records if r["id"] in human]
    if not rated:
        raise UserError(f"{method.label}: none of its cases was rated; the ratings must be of the run's cases")
    relabelled = [{**r, "v": human[r["id"]][0], "a": human[r["id"]][1]} for r in rated]
    keys = [key for key in columns_of(method) if key.endswith("_error")]
    sides = [Method("Lexicon-based annotation", method.form, rated, method.facts),
             Method("Human annotation", method.form, relabelled, method.facts)]
    return figure_table(sides, keys, "annotator", seed, transposed=True)


def preference_table(ratings, seed):
    """Table 3: how often a method's picture was chosen as best, and the mean quality 1..5, each with its interval."""
    methods, found = sorted({r["method"] for r in ratings}), {}
    for name in methods:
        own = [r for r in ratings if r["method"] == name]
        samples = resamples([r["case"] for r in own], seed)  # a case's raters stay together
        for key, values in (("preference", [math.nan if r["best"] is None else 100.0 * r["best"] for r in own]),
                            ("quality", [r["quality"] for r in own])):
            values = np.array(values, float)
            low, high = interval([mean(values[s]) for s in samples])
            found.setdefault(name, {})[key] = {"value": mean(values), "low": low, "high": high}
    rows = [["metric", *methods]]
    for head, key, form in (("Emotional preference ↑", "preference", "{value:.1f} % [{low:.1f}, {high:.1f}]"),
                            ("Image quality ↑", "quality", "{value:.2f} [{low:.2f}, {high:.2f}]")):
        cells = [form.format(**found[name][key]) for name in methods]
        rows.append([head, *marked(cells, [found[name][key]["value"] for name in methods], "↑")])
    return markdown(rows), found


HEADS = {"1": "method", "2": "method", "4": "model", "5": "task", "10": "reward", "all": "method"}


def table(form, methods, ratings, human, seed):
    """(Markdown, figures) of one of the paper's tables; "all" has every column. Raises UserError for what it lacks."""
    if form == "3":
        return preference_table(ratings, seed)
    if form == "6":
        return human_table(methods, human, seed)
    if form == "7":
        return latency_table(methods)
    keys = shared_keys(methods)
    if form != "all":
        scores = () if form in ("4", "5") else SCORES
        keys = [key for key in keys if key.endswith("_error") or key in scores]
    if not keys:
        raise UserError(f"the runs {', '.join(m.label for m in methods)} have no figure in common; evaluate them "
                                f"with the same judges")
    text, found = figure_table(methods, keys, HEADS[form], seed, transposed=form in ("4", "5"))
    lost = [f"{m.label}, {reader} {share:.1%}" for m in methods for reader, share in unreadable(m).items() if share]
    return text + ("\n\nAnswers that could not be read, left out above: " + "; ".join(lost) if lost else ""), found


def about(label, facts):
    """A line on where the figures of a method come from."""
    sources = {key: facts.get(key) for key in ("model", "adapter", "clip", "aesthetic")}
    sources |= {f"judge {name}": source for name, source in facts["judges"].items()}
    named = [f"{what} {source[0] if isinstance(source, list) else source}" for what, source in sources.items() if source]
    return ", ".join([f"- {label}: `{facts['command']}`", f"seed {facts['seed']}", *named]) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="evaluate.py table", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = cli.stop_parsing
    parser.add_argument("runs", nargs="*", metavar="[LABEL=]RUN", help="folders of runs; the last is compared with")
    parser.add_argument("--form", choices=["all", "1", "2", "3", "4", "5", "6", "7", "10"], default="all",
                        help="which of the paper's tables (default: every column)")
    parser.add_argument("--human", metavar="FILE[:METHOD]", help="ratings of `evaluate.py rate` (tables 3 and 6)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json too")
    args = parser.parse_args(argv)
    if args.form in ("3", "6") and args.human is None:
        raise UserError(f"--form {args.form}: needs people's ratings, --human ratings.csv")
    if args.form != "3" and not args.runs:
        raise UserError("no run given; expected folders that evaluate.py wrote")
    methods = [m for text in args.runs for m in read_run(text.rpartition("=")[2], text.rpartition("=")[0] or None)]
    twice = {m.label for m in methods if sum(m.label == other.label for other in methods) > 1}
    if twice:
        raise UserError(f"several methods are called {', '.join(sorted(twice))}; give labels, as in ours=FOLDER")
    ratings, human = [], {}
    if args.human is not None:
        from evaluation import rate
        path, _, method = args.human.partition(":")
        ratings = rate.read_ratings(path)
        human = people(ratings, method or None) if args.form == "6" else {}
    text, found = table(args.form, methods, ratings, human, args.seed)
    if ratings:
        line, found["agreement"] = agreement_line(ratings)
        text += f"\n\n{line}"
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        runs = {m.label: m.facts for m in methods}
        write_json(args.out.with_name(args.out.name + ".json"), {
            "command": "python " + shlex.join(sys.argv), "form": args.form, "seed": args.seed, "resamples": RESAMPLES,
            "runs": runs, "figures": json.loads(json.dumps(found, default=float))})
        temporary = args.out.with_name(args.out.name + ".md.tmp")
        temporary.write_text(f"{text}\n\n" + "".join(about(*run) for run in runs.items()), encoding="utf-8")
        temporary.replace(args.out.with_name(args.out.name + ".md"))
    return 0
