"""sample.py as its users meet it."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import feedback
import sample
from parts import lora, page, pipeline, sheets
from parts.pipeline import TINY, Generator, load_generator
from tiny import scenes

ROOT = Path(sample.__file__).parent


def run(*arguments):
    """Exit code of sample.py; argparse ends by SystemExit."""
    try:
        return sample.main([str(a) for a in arguments])
    except SystemExit as end:
        return end.code


def read(folder):
    return json.loads((folder / "run.json").read_text())


def test_it_draws_the_same_file_twice_with_all_facts_in_it(tmp_path, capsys):
    for name in ("one", "two"):
        assert run("--v", 7, "--a", 3, "--sample-steps", 3, "--seed", 4, "--out", tmp_path / name) == 0
    out, err = capsys.readouterr()
    paths = [tmp_path / name / "round0_seed4.png" for name in ("one", "two")]
    assert "preset paper would need" in err and "s for the first 1 pictures" in err
    assert paths[0].read_bytes() == paths[1].read_bytes()
    image = Image.open(paths[0])
    assert image.size == (128, 128)
    assert image.text["prompt"] == data.with_numbers(sample.DEFAULT_PROMPT, 7, 3)
    facts = {k: image.text[k] for k in ("valence", "arousal", "seed", "steps", "guidance")}
    assert facts == {"valence": "7.0", "arousal": "3.0", "seed": "4", "steps": "3", "guidance": "4.5"}
    assert image.text["parameters"] == (f"{image.text['prompt']}\nSteps: {facts['steps']}, Sampler: Euler, CFG scale: 4.5, Seed: 4, "
                                        "Size: 128x128, Model: tiny/weights with tiny/weights/adapter, Valence: 7.0, Arousal: 3.0")
    assert image.text["model"] == "tiny/weights with tiny/weights/adapter" and image.text["judge"] == "tiny/weights/judge"
    said = [image.text[f"judged_{what}"] for what in ("valence", "arousal", "emotion")]
    numbers = f"V {float(said[0]):.2f}  A {float(said[1]):.2f}  {said[2]}"
    assert out.splitlines()[:3] == [f"{paths[0]}  {numbers}", f"    {image.text['reasoning']}",
                                    str(tmp_path / "one" / "index.html")]
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"round0_seed4.png", "run.json", "contact.png", "index.html"}
    record = read(tmp_path / "one")
    assert record["model"] == image.text["model"] and record["cells"][0]["rounds"][0]["images"][0]["seed"] == 4


def test_pictures_of_another_prompt_are_never_overwritten(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--v", 7, "--a", 3, "--judge", "none", "--sample-steps", 1, "--size", 32]
    assert run(*quick) == 0 and run(*quick) == 0  # the same wish again is the same pictures
    assert run(*quick, "--prompt", "a swan on the lake!") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"v7_a3_seed0", "v7_a3_seed0_a-swan-on-the-lake"}
    assert run(*quick, "--no-adapter") == 0 and (tmp_path / "out" / "v7_a3_seed0_no-adapter").is_dir()
    assert sample.parse_args(["--grid", "3", "--adapter", "runs/gen"]).out == Path("out/grid3_seed0_runs-gen")
    before = (tmp_path / "out/v7_a3_seed0/run.json").read_bytes()
    capsys.readouterr()
    assert run(*quick, "--prompt", "a horse at noon", "--out", "out/v7_a3_seed0") == 2
    assert "holds pictures of 'a lighthouse on the sea coast in the evening'; give another --out" in capsys.readouterr().err
    assert (tmp_path / "out/v7_a3_seed0/run.json").read_bytes() == before


@pytest.mark.parametrize("form, expected", [("words", data.with_words), ("both", data.with_both), ("numbers", data.with_numbers)])
def test_the_target_enters_the_prompt_in_the_form_that_is_asked_for(tmp_path, form, expected):
    assert run("--v", 6.8, "--a", 3, "--form", form, "--judge", "none", "--sample-steps", 1, "--size", 32, "--out", tmp_path) == 0
    record = read(tmp_path)
    assert record["form"] == form and record["cells"][0]["rounds"][0]["prompt"] == expected(sample.DEFAULT_PROMPT, 6.8, 3)


def test_a_tenth_is_another_picture(tmp_path):
    for v in (6.8, 6.9):
        assert run("--v", v, "--a", 3, "--judge", "none", "--sample-steps", 4, "--size", 64, "--out", tmp_path / str(v)) == 0
    pictures = [(tmp_path / str(v) / "round0_seed0.png").read_bytes() for v in (6.8, 6.9)]
    assert pictures[0] != pictures[1]


def scripted(moods, advice):
    """A judge for pipeline.judge_of: it finds moods[i] in the i-th picture it sees and answers advice(question)."""
    moods = iter(moods)

    def judge(conversations, attempt=0):
        texts = []
        for messages in conversations:
            text = messages[1]["content"][-1]["text"]
            if "optimized_prompt" in text:
                texts.append(advice(text))
            elif "emotion_class" in text:
                texts.append('{"emotion_class": "awe"}')
            else:
                mood = next(moods)
                texts.append("" if mood is None else
                             f'<think>calm <water></think>{{"valence": {mood[0]}, "arousal": {mood[1]}}}')
        return texts

    return lambda *_, **__: judge


QUICK = ("--v", 7, "--a", 3, "--sample-steps", 2, "--size", 64, "--readings", 1)


def test_several_pictures_are_listed_by_how_near_the_judge_finds_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "judge_of", scripted([(2.0, 2.0), (7.0, 3.5), (6.0, 3.0), None], None))
    assert run(*QUICK, "--n", 4, "--out", tmp_path) == 0
    out = capsys.readouterr().out.splitlines()
    assert [Path(line.split("  ")[0]).name for line in out if line[0] != " "] == [
        "round0_seed1.png", "round0_seed2.png", "round0_seed0.png", "round0_seed3.png", "index.html"]
    assert out[0].endswith("V 7.00  A 3.50  awe") and "cannot be read" in out[4] and out[1] == "    calm <water>"
    assert "calm &lt;water&gt;" in (tmp_path / "index.html").read_text()


def test_rounds_of_feedback_are_recorded_whole(tmp_path, capsys, monkeypatch):
    better = f"{sample.DEFAULT_PROMPT}, golden"
    advice = json.dumps({"analysis": "dull water", "optimized_prompt": better})
    monkeypatch.setattr(sample, "judge_of", scripted([(5, 3), (4, 3), (7, 3.5), (2, 2)], lambda _: advice))
    assert run(*QUICK, "--rounds", 2, "--n", 2, "--json", "--out", tmp_path) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record == read(tmp_path)
    first, second = record["cells"][0]["rounds"]
    assert (first["best"], first["worst"], first["analysis"], first["next_prompt"]) == (0, 1, "dull water", better)
    assert second["prompt"] == better and second["analysis"] is None
    assert record["cells"][0]["best"] == {"round": 1, "image": 0}
    assert [i["file"] for r in (first, second) for i in r["images"]] == [
        "round0_seed0.png", "round0_seed1.png", "round1_seed2.png", "round1_seed3.png"]
    assert second["images"][0]["emotion"] == "awe" and second["images"][0]["loss"] == 0.5
    assert Image.open(tmp_path / "round1_seed2.png").text["prompt"] == better
    for text in ("loss 2.00", "loss 0.50, result so far 0.50 (round 1)", "dull water", "2 rounds", "first 2 pictures"):
        assert text in err
    assert record["seconds"]["total"] > sum(second["seconds"].values()) > 0


def test_the_result_may_be_the_best_of_the_last_round(tmp_path, capsys, monkeypatch):
    advice = json.dumps({"analysis": "dull", "optimized_prompt": f"{sample.DEFAULT_PROMPT}, golden"})
    monkeypatch.setattr(sample, "judge_of", scripted([(7, 3.5), (4, 3), (5, 3), (2, 2)], lambda _: advice))
    assert run(*QUICK, "--rounds", 2, "--n", 2, "--result", "last", "--out", tmp_path) == 0
    out, err = capsys.readouterr()
    record = read(tmp_path)
    assert record["result"] == "last" and record["cells"][0]["best"] == {"round": 1, "image": 0}
    assert Path(out.split("  ")[0]).name == "round1_seed2.png" and "awe" in out.splitlines()[0]
    assert "result so far 2.00 (round 1)" in err and "The best of 2 pictures" in (tmp_path / "index.html").read_text()


def test_other_questions_are_asked_and_recorded(tmp_path, monkeypatch):
    own = {"system": "Be brief."}
    (tmp_path / "own.json").write_text(json.dumps(own))
    monkeypatch.setitem(feedback.PROMPTS, "system", feedback.PROMPTS["system"])  # to be put back
    asked = []
    answer = '{"valence": 7, "arousal": 3, "emotion_class": "awe"}'
    monkeypatch.setattr(sample, "judge_of", lambda *_, **__: lambda questions: asked.extend(questions) or [answer])
    assert run(*QUICK, "--questions", tmp_path / "own.json", "--out", tmp_path / "run") == 0
    assert read(tmp_path / "run")["questions"] == own and {messages[0]["content"] for messages in asked} == {"Be brief."}


def test_the_tolerance_ends_the_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "judge_of", scripted([(6.9, 3), (4, 3)], None))
    assert run(*QUICK, "--rounds", 3, "--n", 2, "--tolerance", 0.2, "--out", tmp_path) == 0
    assert len(read(tmp_path)["cells"][0]["rounds"]) == 1


def test_an_interruption_keeps_every_finished_round_and_every_picture(tmp_path, capsys, monkeypatch):
    def advice(question):
        if "golden" in question:
            raise KeyboardInterrupt
        return json.dumps({"analysis": "dull", "optimized_prompt": f"{sample.DEFAULT_PROMPT}, golden"})

    monkeypatch.setattr(sample, "judge_of", scripted([(5, 3)] * 4, advice))
    assert run(*QUICK, "--rounds", 3, "--n", 2, "--out", tmp_path) == 130
    assert "kept" in capsys.readouterr().err
    assert len(read(tmp_path)["cells"][0]["rounds"]) == 1
    assert len(list(tmp_path.glob("round?_seed?.png"))) == 4 and (tmp_path / "index.html").exists()


def test_the_shipped_judge_rewrites_the_prompt_and_keeps_its_subject(tmp_path):
    assert run("--v", 2, "--a", 7, "--rounds", 2, "--n", 2, "--rewrite", "--sample-steps", 6, "--out", tmp_path) == 0
    first, second = read(tmp_path)["cells"][0]["rounds"]
    assert first["note"] == second["note"] == "" and first["analysis"].startswith("The first has")
    for prompt in (first["prompt"], second["prompt"]):
        assert prompt != data.with_numbers(sample.DEFAULT_PROMPT, 2, 7) and prompt.startswith(sample.DEFAULT_PROMPT)


def test_several_pictures_and_the_grid(tmp_path, capsys):
    assert run("--v", 2, "--a", 8.5, "--n", 2, "--sample-steps", 2, "--size", 64, "--judge", "none", "--out", tmp_path) == 0
    assert {p.name for p in tmp_path.glob("round*")} == {"round0_seed0.png", "round0_seed1.png"}
    assert run("--grid", 3, "--sample-steps", 2, "--size", 64, "--out", tmp_path / "grid") == 0
    assert capsys.readouterr().out.splitlines()[-2] == str(tmp_path / "grid" / "grid3.png")
    grid = Image.open(tmp_path / "grid" / "grid3.png")
    assert grid.width > 3 * 64 and grid.height > 3 * 64
    record = read(tmp_path / "grid")
    assert [(c["v"], c["a"]) for c in record["cells"]] == [(v, a) for a in (9, 5, 1) for v in (1, 5, 9)]
    assert (tmp_path / "grid" / record["cells"][0]["rounds"][0]["images"][0]["file"]).name == "v1_a9_round0_seed0.png"


def test_a_grid_with_feedback_shows_the_best_of_each_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "judge_of", scripted([(5, 5)] * 16, lambda _: json.dumps(
        {"analysis": "dull", "optimized_prompt": f"{sample.DEFAULT_PROMPT}, golden"})))
    assert run(*QUICK[4:], "--grid", 2, "--rounds", 2, "--n", 2, "--out", tmp_path) == 0
    record = read(tmp_path)
    assert [len(c["rounds"]) for c in record["cells"]] == [2] * 4 and record["grid"] == "grid2.png"
    assert all(c["best"] == {"round": 1, "image": 0} for c in record["cells"])  # the later among equals
    framed = [best["file"] for _, _, best in sheets.sheet_rows(record)]
    assert framed == [c["rounds"][1]["images"][0]["file"] for c in record["cells"]]


def test_among_equals_prints_page_record_and_contact_sheet_have_the_same_best(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "judge_of", scripted([(5, 3)] * 4, lambda _: json.dumps(
        {"analysis": "dull", "optimized_prompt": f"{sample.DEFAULT_PROMPT}, golden"})))
    assert run(*QUICK, "--rounds", 2, "--n", 2, "--out", tmp_path) == 0
    out, err = capsys.readouterr()
    record = read(tmp_path)
    assert record["cells"][0]["best"] == {"round": 1, "image": 0} and "result so far 2.00 (round 1)" in err
    listed = [Path(line.split("  ")[0]).name for line in out.splitlines() if line[0] != " "]
    assert listed == ["round1_seed2.png", "round1_seed3.png", "round0_seed0.png", "round0_seed1.png", "index.html"]
    assert [best["seed"] for _, _, best in sheets.sheet_rows(record)] == [0, 2]  # of each round
    assert page.best_of(record["cells"][0])[:2] == (1, 0)
    assert record["cells"][0]["rounds"][1]["images"][0]["emotion"] == "awe"


def test_the_seconds_of_a_grid_are_those_of_its_rows(tmp_path, capsys, monkeypatch):
    def slow(*args):
        time.sleep(0.2)
        return [Image.new("RGB", (64, 64))] * len(args[2])

    monkeypatch.setattr(sample, "draw", slow)
    assert run("--grid", 2, "--size", 64, "--out", tmp_path) == 0
    seconds = [cell["rounds"][0]["seconds"]["draw"] for cell in read(tmp_path)["cells"]]
    assert min(seconds) >= 0.1 and 0.4 <= read(tmp_path)["seconds"]["draw"] == pytest.approx(sum(seconds))
    assert f"4 targets: drawing {sum(seconds):.1f} s · " in capsys.readouterr().err


def test_a_row_of_a_grid_is_drawn_in_batches_of_micro(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sample, "draw", lambda *args: drawn.append(len(args[2])) or [Image.new("RGB", (64, 64))] * len(args[2]))
    assert run("--grid", 3, "--micro", 2, "--size", 64, "--judge", "none", "--out", tmp_path) == 0
    assert drawn == [2, 1] * 3


def test_the_miniature_says_which_words_it_never_learned(tmp_path, capsys):
    assert run(*QUICK, "--judge", "none", "--sample-steps", 1, "--prompt", "a cat on a sofa", "--out", tmp_path) == 0
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("the miniature never learned 'cat', 'sofa'; it draws a lone tree, ") and "meadow" in line


@pytest.mark.parametrize("flag, kind, message", [
    ("--model", "adapter", "it is an adapter, as --adapter takes it"), ("--model", "judge", "it is a judge, as --judge takes it"),
    ("--judge", ".", "it is a whole generator, as sample.py --model takes it"), ("--adapter", "judge", "it is a judge"),
    ("--model", "adapter/adapter_model.safetensors", "it is an adapter, as --adapter takes it"),
    ("--model", "clip", "it is a 'clip'")])
def test_a_folder_in_the_wrong_place_is_told_what_it_is(flag, kind, message, tmp_path, capsys):
    assert run("--v", 5, "--a", 5, flag, TINY / kind, "--out", tmp_path) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1 and "again" not in err


def test_meter_and_judge_tell_the_four_corners_of_the_plane_apart(tmp_path):
    metered, judged = {}, {}
    for v, a in ((8, 7), (2, 3), (8, 3), (2, 7)):
        out = tmp_path / f"v{v}a{a}"
        assert run("--v", v, "--a", a, "--n", 2, "--sample-steps", 12, "--out", out) == 0
        pictures = [Image.open(out / f"round0_seed{s}.png") for s in range(2)]
        metered[v, a] = np.mean([scenes.measure_va(p) for p in pictures], axis=0)
        judged[v, a] = np.mean([[float(p.text[f"judged_{what}"]) for what in ("valence", "arousal")] for p in pictures], axis=0)
    for seen in (metered, judged):
        assert min(seen[8, 7][0], seen[8, 3][0]) > max(seen[2, 7][0], seen[2, 3][0]) + 1.5
        assert seen[8, 7][1] > seen[8, 3][1] + 0.75 and seen[2, 7][1] > seen[2, 3][1] + 0.75


def test_an_interruption_keeps_the_finished_pictures(tmp_path, monkeypatch, capsys):
    draw = Generator.draw

    def interrupted(self, prompts, seeds, **options):
        if seeds == [1]:
            raise KeyboardInterrupt
        return draw(self, prompts, seeds, **options)

    monkeypatch.setattr(Generator, "draw", interrupted)
    assert run(*QUICK, "--n", 3, "--micro", 1, "--out", tmp_path) == 130
    assert [p.name for p in tmp_path.iterdir()] == ["round0_seed0.png"]
    assert "kept" in capsys.readouterr().err


def test_an_adapter_changes_the_picture_and_is_named_in_it(tmp_path):
    model = load_generator(TINY).mmdit
    torch.manual_seed(0)
    lora.add_lora(model, model.lora_targets(), 4, 8.0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    lora.save_lora(tmp_path / "adapter", model, "tiny/weights")
    pictures = {}
    for name, extra in {"with": ("--adapter", tmp_path / "adapter"), "without": ("--no-adapter",)}.items():
        assert run("--v", 7, "--a", 3, "--sample-steps", 2, "--judge", "none", "--out", tmp_path / name, *extra) == 0
        pictures[name] = Image.open(tmp_path / name / "round0_seed0.png")
    assert pictures["with"].tobytes() != pictures["without"].tobytes()
    assert pictures["with"].text["model"] == f"tiny/weights with {tmp_path / 'adapter'}"
    assert pictures["without"].text["model"] == "tiny/weights"


def test_offloaded_judge_and_generator_take_turns_and_draw_the_same(tmp_path, monkeypatch):
    events = []

    @contextmanager
    def recorded(device, *modules):
        if device is not None:
            events.append(("in", type(modules[0]).__name__, len(modules)))
        yield
        if device is not None:
            events.append("out")

    monkeypatch.setattr(pipeline, "brought", recorded)
    for name, extra in (("usual", ()), ("offload", ("--offload",))):
        assert run(*QUICK, "--device", "cpu", "--n", 2, "--out", tmp_path / name, *extra) == 0
    first, second = (read(tmp_path / name)["cells"][0]["rounds"][0]["images"] for name in ("usual", "offload"))
    assert first == second
    # the pictures, their V and A, the emotion of the best; two CLIPs draw with MMDiT and VAE
    assert events == [("in", "MMDiT", 4), "out", ("in", "QwenVL", 1), "out", ("in", "QwenVL", 1), "out"]


def test_text_encoders_may_leave_or_stay_on_the_cpu(tmp_path, capsys):
    drawn = []
    for where in ("gpu", "cpu", "leave"):
        assert run(*QUICK, "--judge", "none", "--encoders", where, "--out", tmp_path / where) == 0
        drawn.append(np.asarray(Image.open(tmp_path / where / "round0_seed0.png"), int))
    assert np.abs(drawn[0] - drawn[1]).max() == 0 and np.abs(drawn[0] - drawn[2]).max() <= 2
    assert run(*QUICK, "--rounds", 2, "--encoders", "leave", "--out", tmp_path) == 2
    assert "--encoders leave: --rounds and --rewrite write prompts later on; give cpu" in capsys.readouterr().err


BAD = {
    "v too high": (("--v", 12, "--a", 3), "1..9"),
    "v not a number": (("--v", "nan", "--a", 3), "expected a number in 1..9, got nan"),
    "v a word": (("--v", "happy", "--a", 3), "expected a number in 1..9, got happy"),
    "no target": ((), "--v and --a"),
    "no arousal": (("--v", 5), "--v and --a"),
    "long prompt": (("--v", 5, "--a", 5, "--prompt", "x" * 10_000), "10,000 characters"),
    "broken prompt": (("--v", 5, "--a", 5, "--prompt", "a \udc80 swan"), "UTF-8"),
    "empty prompt": (("--v", 5, "--a", 5, "--prompt", "  "), "characters"),
    "odd size": (("--v", 5, "--a", 5, "--size", 100), "multiple of 16"),
    "huge size": (("--v", 5, "--a", 5, "--size", 2048), "at most"),
    "no steps": (("--v", 5, "--a", 5, "--sample-steps", 0), "--sample-steps"),
    "steps a word": (("--v", 5, "--a", 5, "--sample-steps", "many"), "--sample-steps"),
    "feedback without a judge": (("--v", 5, "--a", 5, "--rounds", 2, "--judge", "none"), "need a judge"),
    "one picture to compare": (("--v", 5, "--a", 5, "--rounds", 2, "--n", 1), "--n 1: expected 2"),
    "no rounds": (("--v", 5, "--a", 5, "--rounds", 0), "--rounds: expected a whole number in 1..100, got 0"),
    "missing questions": (("--v", 5, "--a", 5, "--questions", "./none.json"), "none.json"),
    "tolerance": (("--v", 5, "--a", 5, "--tolerance", -1), "--tolerance"),
    "one-cell grid": (("--grid", 1), "2..9"),
    "missing judge": (("--v", 5, "--a", 5, "--judge", "./nobody"), "no such file or folder"),
    "a generator as judge": (("--v", 5, "--a", 5, "--judge", TINY / "vae"), "not a Qwen2.5-VL"),
    "missing adapter": (("--v", 5, "--a", 5, "--adapter", "./nothing"), "no such file or folder"),
    "a judge as adapter": (("--v", 5, "--a", 5, "--adapter", TINY / "judge"), "no adapter in this folder; it is a judge"),
    "grid and a target": (("--grid", 3, "--v", 5), "leave out --v and --a"),
    "adapter and none": (("--v", 5, "--a", 5, "--adapter", "a", "--no-adapter"), "give one of them"),
    "missing folder": (("--v", 5, "--a", 5, "--model", "./nowhere"), "no such file or folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_wishes_end_with_code_2_and_one_line(case, tmp_path, capsys):
    arguments, message = BAD[case]
    assert run(*arguments, "--out", tmp_path) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("--v", 5, "--a", 5, "--out", tmp_path / "file") == 2
    assert "cannot write" in capsys.readouterr().err


def test_damaged_checkpoints_are_refused_before_anything_is_loaded(tmp_path, capsys):
    def refused(change, message):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        change(Path(shutil.copytree(TINY, tmp_path / "model")))
        assert run("--v", 5, "--a", 5, "--model", tmp_path / "model", "--out", tmp_path / "out") == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and err.count("\n") == 1

    def truncate(folder):
        os.truncate(folder / "transformer/diffusion_pytorch_model.safetensors", 1_000_000)

    refused(truncate, "truncated")
    refused(lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"not a checkpoint"), "not a readable")
    for part in ("transformer", "vae", "text_encoder_2", "tokenizer"):
        refused(lambda f, part=part: shutil.rmtree(f / part), part)
    refused(lambda f: (f / "model_index.json").unlink(), "model_index.json")
    refused(lambda f: (f / "text_encoder/config.json").write_text("{"), "config.json")
    index = json.loads((TINY / "vae/config.json").read_text())
    refused(lambda f: (f / "vae/config.json").write_text(json.dumps(index | {"layers_per_block": 2})), "missing")


def test_an_unreachable_hub_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "sample.py", "--v", "5", "--a", "5", "--preset", "paper", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HOME": str(tmp_path)})
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "hub cannot be reached" in done.stderr
