"""The paper's evaluation on the miniature: a dataset, cases, two methods, two judges, people, and every table."""

from types import SimpleNamespace

from evaluation import rate, tables
from evaluation.__main__ import main
from evaluation.cases import load_cases
from evaluation.run import draw_with
from parts.pipeline import TINY, load_generator
from tiny.dataset import write_tiny

JUDGE = TINY / "judge"


def test_every_table_of_the_paper_comes_from_the_miniature(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables.resamples, "__defaults__", (0, 20))  # of its seed and count
    dataset, cases, other = tmp_path / "dataset", tmp_path / "cases.jsonl", tmp_path / "other"
    write_tiny(dataset, train=4, test=4)
    assert main(["cases", "--data", str(dataset), "--out", str(cases)]) == 0

    # another method's pictures, a folder of <id>.png
    generator, wished = load_generator(TINY), load_cases(cases)
    other.mkdir()
    args = SimpleNamespace(size=64, sample_steps=2, guidance=4.5)
    for case, image in zip(wished, draw_with(generator, "words", args, None, wished, range(4)), strict=True):
        image.save(other / f"{case.id}.png")

    judges = ["run", "--judge", f"trained={JUDGE}", "--judge", f"independent={JUDGE}", "--cases", str(cases),
              "--sample-steps", "2", "--size", "64"]
    runs = [str(tmp_path / name) for name in ("run_other", "run_ours")]
    assert main([*judges, "--images", str(other), "--seconds", "2", "--out", runs[0]]) == 0
    assert main([*judges, "--name", "ours", "--adapter", str(TINY / "adapter"), "--forms", "words",
                          "--out", runs[1]]) == 0

    ratings = tmp_path / "ratings.csv"
    study = rate.prepare(SimpleNamespace(cases=cases, images=[f"other={other}", f"again={other}"], out=ratings, seed=0))
    for shift, rater in enumerate(("ann", "bob")):
        for place, case in enumerate(study.cases.values()):
            answers = {f"{scale}{i}": str(1 + place + shift) for scale in rate.SCALES for i in range(2)}
            rate.save(study, rater, case, answers | {"best": "0"})

    capsys.readouterr()
    for form, extra, expected in (
            ("1", [], "| ours | "), ("2", [], "Aes-Score ↑ |"), ("3", ["--human", f"{ratings}"], "Image quality ↑"),
            ("4", [], "| model | other | ours |"), ("5", [], "| V-Error, independent ↓ | "),
            ("6", ["--human", f"{ratings}:other"], "| annotator | Lexicon-based annotation | Human annotation |"),
            ("7", [], "| inference latency (s), a case | 2.00 | "), ("10", [], "| reward | V-Error, meter ↓ | "),
            ("all", [], "Difference to ours on the same cases:")):
        assert main(["table", *runs, "--form", form, *extra, "--out", str(tmp_path / "tables" / form)]) == 0
        assert expected in capsys.readouterr().out
        assert all((tmp_path / "tables" / f"{form}.{ending}").stat().st_size for ending in ("md", "json"))
