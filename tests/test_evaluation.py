"""Measuring with resume, any method's folder, and the evaluation program."""

import dataclasses
import json
import signal
import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import feedback
import sample
from evaluation import metrics, run, tables
from evaluation.__main__ import main
from evaluation.cases import Case, for_others, grid_of, held_out_cases, seeds_of
from parts import clip
from parts.cli import UserError
from parts.files import write_rows
from parts.pipeline import TINY, load_generator
from tests import launch
from tests.launch import locked
from tiny import scenes

QUICK = ["--sample-steps", "2", "--size", "64"]
JUDGE = TINY / "judge"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def render(case, rng=None):
    return scenes.render(scenes.random_scene(rng or np.random.default_rng(0)), case.v, case.a, 64)


METER = run.Instruments(run.readers_of({}, meter=True))


def figures_of(cases, draw, folder, instruments=METER):
    path = folder / "form.jsonl"
    run.measure(draw, cases, seeds_of(cases, 0), path, instruments, 7)
    return tables.figures(tables.Method("method", "form", sorted(lines(path), key=lambda r: r["id"]), {}))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def test_a_generator_that_draws_the_scenes_themselves_is_measured_as_nearly_perfect(tmp_path):
    cases, rng = held_out_cases(30), np.random.default_rng(0)
    result = figures_of(cases, lambda part, seeds: [render(case, rng) for case in part], tmp_path)
    assert result["meter_v_error"] < 0.5 and result["meter_a_error"] < 0.5
    assert min(result["meter_v_spearman"], result["meter_a_spearman"]) > 0.9 and result["meter_unreadable"] == 0


def test_a_grid_of_scenes_is_in_order_and_one_turned_round_is_not(tmp_path):
    cases = grid_of(held_out_cases(2), 3)
    scene = scenes.random_scene(np.random.default_rng(3))
    result = figures_of(cases, lambda part, seeds: [scenes.render(scene, c.v, c.a, 64) for c in part], tmp_path)
    assert min(result["meter_v_order"], result["meter_a_order"]) > 0.9
    (tmp_path / "form.jsonl").unlink()
    turned = figures_of(cases, lambda part, seeds: [scenes.render(scene, 10 - c.v, c.a, 64) for c in part], tmp_path)
    assert turned["meter_v_order"] < 0.1 and turned["meter_a_order"] > 0.9


def test_measuring_goes_on_where_it_was_and_repeats_no_case(tmp_path):
    cases, drawn = held_out_cases(20), []

    def draw(part, seeds):
        drawn.extend(seeds)
        if len(drawn) > 14:
            raise KeyboardInterrupt
        return [render(case) for case in part]

    with pytest.raises(KeyboardInterrupt):
        figures_of(cases, draw, tmp_path)
    path = tmp_path / "form.jsonl"
    assert len(lines(path)) == 14
    path.write_bytes(path.read_bytes() + b'{"id": "half')
    again = []
    figures_of(cases, lambda part, seeds: again.extend(seeds) or [render(case) for case in part], tmp_path)
    assert again == list(range(14, 20)) and [r["id"] for r in lines(path)] == [case.id for case in cases]


def test_memory_does_not_grow_with_the_cases(tmp_path):
    blank = np.zeros((512, 512, 3), np.uint8)

    def peak(count, folder):
        folder.mkdir()
        tracemalloc.start()
        run.measure(lambda part, seeds: [Image.fromarray(blank.copy()) for _ in part], held_out_cases(count),
                    range(count), folder / "form.jsonl", run.Instruments({}), 4)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(4, tmp_path / "warm")
    assert peak(64, tmp_path / "many") < 1.5 * peak(8, tmp_path / "few")


def test_a_judge_that_says_nothing_readable_is_counted_and_left_out(tmp_path):
    answers = iter(['<think>t</think><answer>{"valence": 5, "arousal": 4}</answer>', "no idea"] * 2)
    readers = run.readers_of({"judge": lambda conversations: [next(answers) for _ in conversations]}, meter=False)
    result = figures_of([Case(str(i), "a lake", 6, 6) for i in range(4)], lambda part, seeds: [render(c) for c in part],
                        tmp_path, run.Instruments(readers))
    assert result["judge_v_error"] == 1 and result["judge_a_error"] == 2 and result["judge_unreadable"] == 0.5


def test_scores_of_clip_are_those_of_its_functions(tmp_path):
    scorer, cases = clip.CLIP.from_pretrained(TINY / "clip"), held_out_cases(9)
    width = scorer.vision.visual_projection.out_features
    head = [(torch.randn(1, width, generator=torch.Generator().manual_seed(0)), torch.zeros(1))]
    figures_of(cases, lambda part, seeds: [render(case) for case in part], tmp_path, run.Instruments({}, scorer, head=head))
    pictures, found = [render(case) for case in cases], lines(tmp_path / "form.jsonl")
    for key, expected in (("clip_score", 100 * clip.cosines(scorer, pictures, [case.neutral for case in cases])),
                          ("clip_iqa", metrics.clip_iqa(scorer, pictures)),
                          ("aesthetic", metrics.aesthetic_score(scorer, head, pictures))):
        assert torch.allclose(torch.tensor([r[key] for r in found]), expected, atol=1e-3)


def test_the_shipped_miniature_follows_emotion_words_and_numbers_less_well(tmp_path):
    args = run.parse_args(["--sample-steps", "8"])
    generator, cases, result = load_generator(TINY), held_out_cases(24, seed=9), {}
    for form in ("numbers", "words"):
        (tmp_path / form).mkdir()
        result[form] = figures_of(cases, partial(run.draw_with, generator, form, args, None), tmp_path / form)
    assert min(result["words"]["meter_v_spearman"], result["words"]["meter_a_spearman"]) >= 0.7
    assert result["numbers"]["meter_a_error"] > result["words"]["meter_a_error"]


# ---------------------------------------------------------------------------------------------------------------------
# The program


def test_the_program_prints_a_table_writes_json_and_goes_on_or_refuses_another_run(tmp_path, capsys):
    flags = ["run", "--cases", "4", *QUICK, "--out", str(tmp_path)]
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert all(head in printed for head in ("V-Error ↓", "CLIP-IQA ↑", "Aes-Score ↑", "weights, numbers", "weights, words"))
    written = json.loads((tmp_path / "evaluate.json").read_text())
    assert set(written["results"]) == {"numbers", "words"} and written["settings"]["count"] == 4
    before = (tmp_path / "words.jsonl").stat().st_mtime_ns
    assert main(flags) == 0 and capsys.readouterr().out == printed
    assert (tmp_path / "words.jsonl").stat().st_mtime_ns == before
    assert main([*flags, "--sample-steps", "3"]) == 2
    assert "holds another evaluation (sample_steps changed)" in capsys.readouterr().err
    with pytest.raises(BlockingIOError), locked(tmp_path / ".lock"):
        pass


def test_a_judge_may_be_an_address_with_or_without_a_name():
    args = run.parse_args(["--judge", "http://h:1/v1#a=b", "--judge", "other=https://h:2/v1", "--judge", "third=lr=3/judge"])
    run.complete(args)
    assert args.judge == {"judge": "http://h:1/v1#a=b", "other": "https://h:2/v1", "third": "lr=3/judge"}


def test_kept_pictures_are_measured_again_as_another_methods_are(tmp_path, capsys):
    flags = ["run", "--cases", "3", *QUICK, "--forms", "words", "--keep-pictures", "--out", str(tmp_path / "drawn")]
    assert main(flags) == 0
    again = ["run", "--cases", "3", "--images", str(tmp_path / "drawn" / "words"), "--out", str(tmp_path / "read")]
    assert main(again) == 0
    drawn, read = (json.loads((tmp_path / name / "evaluate.json").read_text())["results"] for name in ("drawn", "read"))
    assert drawn["words"]["meter_v_error"] == read["images"]["meter_v_error"]
    file = sorted((tmp_path / "drawn" / "words").iterdir())[0]
    assert file.stem in {case.id for case in held_out_cases(3)} and Image.open(file).text.keys() == {"neutral", "valence", "arousal", "seed"}
    capsys.readouterr()
    assert main([flag for flag in flags if flag != "--keep-pictures"]) == 2
    assert "keep_pictures changed" in capsys.readouterr().err


def test_two_judges_and_the_meter_each_have_columns(tmp_path, capsys):
    flags = ["run", "--cases", "3", "--num-inference-steps", "4", "--forms", "words", "--out", str(tmp_path),
             "--judge", str(JUDGE), "--judge", f"independent={JUDGE}"]
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert all(f"V-Error, {reader} ↓" in printed for reader in ("meter", "judge", "independent"))
    result = json.loads((tmp_path / "evaluate.json").read_text())["results"]["words"]
    assert result["judge_v_error"] == result["independent_v_error"] and 0 < result["clip_score"] <= 100


def test_feedback_takes_the_best_picture_of_all_rounds_by_the_judge(tmp_path, capsys):
    flags = ["run", "--cases", "2", *QUICK, "--forms", "feedback", "--rounds", "2", "--n", "2", "--out", str(tmp_path)]
    assert main(flags) == 2 and "needs a --judge" in capsys.readouterr().err
    assert main([*flags, "--judge", str(JUDGE)]) == 0
    assert len(lines(tmp_path / "feedback.jsonl")) == 2


def test_feedback_is_chosen_by_as_many_readings_as_sample_py_takes(monkeypatch):
    asked = []

    def refine(*given, readings, **options):
        asked.append(readings)
        return [feedback.Round("", [feedback.Picture(None, 0, feedback.Judgement(), 16.0)], 0, 0, None, None, "", {})]

    monkeypatch.setattr(feedback, "refine", refine)
    for flags in ([], ["--preset", "paper"], ["--readings", "logits"]):
        run.draw_with(None, "feedback", run.parse_args(flags), None, held_out_cases(1), [0])
    assert asked == [8, 1, "logits"] and sample.parse_args(["--v", "5", "--a", "5"]).readings == 8


def test_a_run_with_a_head_of_emotions_does_not_go_on_without_it(tmp_path):
    args = run.parse_args(["--images", str(tmp_path)])
    args.device = "cpu"
    args.out = tmp_path / "run"
    args.judge = {}
    args.emotion_head = "head.safetensors"
    run.open_run(args, "", [], None)
    args.emotion_head = None
    with pytest.raises(UserError, match=r"\(emotion_head changed\)"):
        run.open_run(args, "", [], None)


def save_pictures(folder, cases, draw=render):
    folder.mkdir()
    for case in cases:
        draw(case).save(folder / f"{case.id}.png")


def test_any_methods_pictures_are_evaluated_from_a_folder(tmp_path, capsys):
    cases = held_out_cases(5)
    save_pictures(tmp_path / "FLUX", cases)
    main(["cases", "--count", "5", "--out", str(tmp_path / "cases.jsonl")])
    flags = ["run", "--cases", str(tmp_path / "cases.jsonl"), "--images", str(tmp_path / "FLUX"), "--out",
             str(tmp_path / "run"), "--seconds", "17", "--parameters", "12"]
    assert main(flags) == 0
    assert "| FLUX |" in capsys.readouterr().out and len(lines(tmp_path / "run" / "images.jsonl")) == 5
    assert main([*flags, "--size", "64"]) == 2 and "another evaluation (size changed)" in capsys.readouterr().err
    turned = [for_others(dataclasses.replace(case, v=10 - case.v)) for case in cases]
    write_rows(tmp_path / "cases.jsonl", turned)
    assert main(flags) == 2 and "another evaluation (cases changed)" in capsys.readouterr().err
    main(["cases", "--count", "5", "--out", str(tmp_path / "cases.jsonl")])
    Image.new("RGB", (64, 64), "red").save(tmp_path / "FLUX" / f"{cases[3].id}.png")
    assert main(flags) == 2 and "another evaluation (pictures changed)" in capsys.readouterr().err
    (tmp_path / "FLUX" / f"{cases[3].id}.png").write_bytes(b"broken")
    flags[6] = str(tmp_path / "run2")
    assert main(flags) == 2 and f"{cases[3].id}.png: cannot be read" in capsys.readouterr().err
    (tmp_path / "FLUX" / f"{cases[3].id}.png").unlink()
    assert main(flags) == 2 and f"1 of 5 pictures are missing: {cases[3].id}" in capsys.readouterr().err


def test_a_killed_program_goes_on_to_the_same_figures(tmp_path):
    def start(out, before=None):
        return launch.start("evaluation.__main__", "run", "--cases", 6, *QUICK, "--forms", "words", "--micro", 2, "--out",
                            tmp_path / out, before=before)

    # while it measures its second batch
    launch.finish(start("killed", partial(launch.signal_at, 2, "evaluation.run.scores_of", signal.SIGKILL)), -signal.SIGKILL)
    assert len(lines(tmp_path / "killed" / "words.jsonl")) == 2
    for out in ("killed", "whole"):
        launch.finish(start(out))
    first, second = ([{k: v for k, v in r.items() if k != "seconds"} for r in lines(tmp_path / out / "words.jsonl")]
                     for out in ("killed", "whole"))
    assert first == second and len(first) == 6


@pytest.mark.parametrize("flags", [[], ["--help"], ["run", "--help"], ["cases", "-h"], ["table", "-h"], ["rate", "-h"]])
def test_help_names_the_program_and_its_flags(capsys, flags):
    with pytest.raises(SystemExit) as end:
        main(flags)
    said = capsys.readouterr().out
    name = " ".join(["python -m evaluation", *flags[:-1]])
    assert end.value.code == 0 and said.startswith(f"usage: {name} ") and f"    {name} " in said


@pytest.mark.parametrize("flags, message", [
    (["paint"], "invalid choice: 'paint' (choose from"), (["run", "--micro", "x"], "expected a whole number"),
    (["run", "--micro", "0"], "--micro: expected a whole number in 1..10,000, got 0"),
    (["run", "--forms", "verse"], "--forms: expected some of numbers, words, both, feedback, got verse"),
    (["run", "--size", "100"], "--size: expected a multiple of 16"), (["cases"], "required: --out"),
    (["cases", "--count", "0", "--out", "x"], "--count: expected a whole number in 1..1,000,000, got 0"),
    (["rate"], "required: --cases, --images"), (["table", "x", "--form", "9"], "--form: invalid choice: '9'")])
def test_options_that_cannot_be_read_are_one_line_and_code_2(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        main(flags)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize("flags, message", [
    (["--cases", "1"], "--cases 1: expected at least 2"),
    (["--cases", "none.jsonl"], "none.jsonl: no such file"), (["--model", "./nowhere"], "no such file"),
    (["--judge", "./nowhere"], "no such file"), (["--judge", "a=x", "--judge", "a=y"], "a name of its own"),
    (["--clip", "none", "--aesthetic", "head.pth"], "--aesthetic: needs the CLIP"),
    (["--aesthetic", "head.pth"], "head.pth: no such file"),
    pytest.param(["--device", "cuda"], "--device cuda: this torch sees no GPU",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")),
    (["--images", "nowhere", "--cases", "3"], "3 of 3 pictures are missing"),
    (["cases", "--data", "nowhere", "--out", "c.jsonl"], "test.jsonl: missing"),
    (["table"], "no run given"), (["table", "nowhere"], "nowhere: no run of `python -m evaluation run`"),
    (["table", "--form", "3"], "needs people's ratings")])
def test_what_cannot_work_is_one_line_and_code_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert main(flags if flags[0] in ("cases", "table") else ["run", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_no_two_cases_of_feedback_share_a_seed_and_the_result_is_the_one_asked_for(monkeypatch):
    seeds = []

    def refine(*given, seed, rounds, images_per_round, readings):
        seeds.extend(range(seed, seed + rounds * images_per_round))
        return [feedback.Round("", [feedback.Picture(name, 0, feedback.Judgement(), loss)], 0, 0, None, None, "", {})
                for name, loss in (("better", 1.0), ("last", 2.0))]

    monkeypatch.setattr(feedback, "refine", refine)
    for result in ("best", "last"):
        seeds.clear()
        args = run.parse_args(["--rounds", "2", "--n", "3", "--result", result])
        images = run.draw_with(None, "feedback", args, None, held_out_cases(3), [4, 5, 6])
        assert images == [{"best": "better"}.get(result, result)] * 3 and len(set(seeds)) == len(seeds) == 3 * 2 * 3
