"""Datasets of photographs: tiny folders in the layout of EmoSet-118K and EMOTIC, made-up captioners, stops and resumes."""

import csv
import json
import os
import signal
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import data
import feedback
from parts import run as training
from parts.cli import UserError
from prepare import build, captions, check
from prepare import emoset as emoset_program
from prepare import emotic as emotic_program
from tests import launch
from tests.test_judge_server import said, serving

TINY = launch.ROOT / "tiny" / "weights" / "judge"
ONE = training.Processes(0, 1, torch.device("cpu"))


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(noise).resize((64, 64)).save(path)


def write_emoset(folder, each=3):
    """A folder of EmoSet-118K's layout with `each` pictures a class; its lists have entries of both published forms."""
    labels = ["amusement", "awe", "contentment", "excitement", "anger", "disgust", "fear", "sadness"]
    index = {label: i for i, label in enumerate(labels)}
    folder.mkdir()
    (folder / "info.json").write_text(json.dumps({
        "emotion": {"label2idx": index, "idx2label": {str(i): label for label, i in index.items()}},
        "brightness": {"label2idx": {"0.0": 0, "0.1": 1}}}))
    lists = {"train": [], "val": [], "test": []}
    for label in labels:
        for number in range(each):
            name = f"{label}/{label}_{number:05d}"
            picture(folder / "image" / f"{name}.jpg", [index[label], number])
            annotation = folder / "annotation" / f"{name}.json"
            annotation.parent.mkdir(parents=True, exist_ok=True)
            annotation.write_text(json.dumps({
                "image_id": f"{label}_{number:05d}", "emotion": label, "brightness": 0.4, "colorfulness": 0.7,
                **({"scene": "beach", "object": ["Person", "Boat"], "human_action": "sailing"} if number else {})}))
            entry = [label, f"{label}_{number:05d}", f"image/{name}.jpg", f"annotation/{name}.json"]
            split = ("train", "val", "test")[number % 3]
            lists[split].append(entry if split != "val" else [entry[0], *entry[2:]])
    for split, entries in lists.items():
        (folder / f"{split}.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def emoset(tmp_path_factory):
    return write_emoset(tmp_path_factory.mktemp("source") / "emoset")


@pytest.fixture
def own_emoset(tmp_path):
    return write_emoset(tmp_path / "emoset")


def flags(emoset, out, *more, train=8, test=4):
    return ["--emoset", str(emoset), "--out", str(out), "--captioner", str(TINY), "--train", str(train), "--test",
            str(test), "--device", "cpu", "--micro", "4", *more]


def captioner(asked):
    """A made-up one that notes its questions: its caption tells the picture by its mean colour."""
    def answer(conversations):
        texts = []
        for _, user in conversations:
            image, text = user["content"][0]["image"], user["content"][1]["text"]
            colour = "-".join(str(int(x)) for x in np.asarray(image).mean((0, 1)))
            emotional = "makes one feel" in text
            asked.append((colour, emotional))
            texts.append(f'Caption: "A picture of {colour}{", strongly felt" * emotional}."\n')
        return texts

    return lambda args, processes: answer


def run(argv, asked=None, load=None, program=emoset_program):
    """The rows {split: [row]} that a program writes with a made-up captioner."""
    args = program.parse_args(argv)
    build.build(args, ONE, program.choose_rows, load or captioner([] if asked is None else asked))
    return {split: data.load_rows(args.out, split) for split in ("train", "test") if (args.out / f"{split}.jsonl").exists()}


def raw_rows(out, split):
    return [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# EmoSet


def test_a_captioner_may_be_a_server(emoset, tmp_path):
    with serving(lambda body: said("A lake.")) as mock:
        argv = flags(emoset, tmp_path / "out", "--captioner", mock.url, train=8, test=4)
        rows = run(argv, load=captions.load_captioner)
    assert {row.neutral for row in rows["train"] + rows["test"]} == {"A lake."} and len(mock.bodies) == 20


def test_a_dataset_is_built_checked_and_read(emoset, tmp_path, capsys):
    asked = []
    rows = run(flags(emoset, tmp_path / "out"), asked)
    assert len(rows["train"]) == 8 and len(rows["test"]) == 4 and len(asked) == 20
    assert sum(emotional for _, emotional in asked) == 8
    for number, row in enumerate(rows["train"] + rows["test"]):
        assert row.id.rpartition("_")[0] == row.label
        assert (row.v, row.a) == pytest.approx(data.draw_va(row.label, np.random.default_rng([0, number])), abs=1e-4)
        source = emoset / "image" / row.label / f"{row.id}.jpg"
        assert row.image.samefile(source) or row.image.read_bytes() == source.read_bytes()
        assert row.neutral.startswith("A picture of ") and "felt" not in row.neutral
        assert (row.emotional is None) == (number >= 8) and (number >= 8 or row.emotional.endswith("strongly felt."))
    first = raw_rows(tmp_path / "out", "train")[0]
    assert list(first) == ["id", "image", "label", "v", "a", "neutral", "emotional", "labels", "seed", "version"]
    assert first["seed"] == 0 and first["version"] == build.VERSION and first["labels"] == "drawn"
    output = capsys.readouterr().out
    assert "|  | train | test |" in output and "0 pictures unusable, 0 repeats, 0 without a caption" in output
    facts = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert facts["captioner"] == str(TINY) and facts["arguments"]["train"] == 8
    assert sum(facts["counts"]["test"].values()) == 4
    assert check.main([str(tmp_path / "out")]) == 0
    assert "12 rows, 0 problems" in capsys.readouterr().out


def test_the_choice_depends_on_the_seed_only(emoset, tmp_path):
    def ids(out, *more):
        return [(row.id, row.v) for split in run(flags(emoset, tmp_path / out, *more)).values() for row in split]

    first = ids("a")
    assert first == ids("b", "--micro", "3") and first != ids("c", "--seed", "1")
    assert len({name for name, _ in first}) == 12


def test_unusable_pictures_are_named_and_replaced_and_repeats_passed_over(own_emoset, tmp_path, capsys):
    args = emoset_program.parse_args(flags(own_emoset, tmp_path, train=4, test=2))
    whole = {row["source"] for row in emoset_program.choose_rows(args).rows}
    cut, gone, other, double, bare, *_ = sorted(whole)
    path = own_emoset / cut
    path.write_bytes(path.read_bytes()[:300])
    (own_emoset / gone).unlink()
    wrong = own_emoset / other.replace("image/", "annotation/").replace(".jpg", ".json")
    wrong.write_text(wrong.read_text().replace(other.split("/")[1], "joy"))
    (own_emoset / double).write_bytes((own_emoset / sorted(whole)[5]).read_bytes())
    (own_emoset / bare.replace("image/", "annotation/").replace(".jpg", ".json")).unlink()
    rows = run(flags(own_emoset, tmp_path / "out", train=12, test=6))
    assert len(rows["train"]) == 12 and len(rows["test"]) == 6
    contents = [row.image.read_bytes() for row in rows["train"] + rows["test"]]
    assert len(set(contents)) == 18
    said, facts = capsys.readouterr(), json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert {name for name, _ in facts["broken"]} == {cut, gone, other, bare} and facts["repeats"] == 1
    for name, why in ((cut, "cannot be read"), (gone, "cannot be read (FileNotFoundError)"),
                      (other, "'joy' in its annotation"),
                      (bare, "no readable annotation")):
        assert any(line.startswith(name) and why in line for line in said.err.splitlines()), name
    assert "4 pictures unusable, 1 repeats" in said.out


def test_with_too_few_pictures_it_goes_on_with_those_there_are(emoset, tmp_path, capsys):
    rows = run(flags(emoset, tmp_path / "out", train=40, test=20))
    assert len(rows["train"]) == 16 and len(rows["test"]) == 8
    assert "24 usable pictures of 60 asked for: 16 for training, 8 for the test" in capsys.readouterr().err


def test_a_row_without_a_caption_is_named_and_left_out(emoset, tmp_path, capsys):
    def load(args, processes):
        good = captioner([])(args, processes)
        calls = iter(range(100))
        return lambda conversations: [*good(conversations)[:-1], good(conversations)[-1] if next(calls) else "..."]

    rows = run(flags(emoset, tmp_path / "out"), load=load)
    facts = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert len(rows["train"]) == 7 and len(facts["without_caption"]) == 1
    assert f"{facts['without_caption'][0][0]}: an answer cannot be used" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of its captions of train rows"):
        run(flags(emoset, tmp_path / "none"), load=lambda *_: lambda conversations: [""] * len(conversations))


def test_the_miniature_judge_captions_alike_in_one_process_and_in_two(emoset, tmp_path, capsys):
    short = ("--max-new-tokens", "12")
    assert emoset_program.main(flags(emoset, tmp_path / "one", *short, train=3, test=2)) == 0
    assert check.main([str(tmp_path / "one")]) == 0
    launch.together(2, "prepare.emoset", *flags(emoset, tmp_path / "two", *short, train=3, test=2))
    for split in ("train", "test"):
        assert raw_rows(tmp_path / "one", split) == raw_rows(tmp_path / "two", split)
    assert {p.name for p in (tmp_path / "two").glob("captions-*")} == {"captions-0.jsonl", "captions-1.jsonl"}
    run(flags(emoset, tmp_path / "two", *short, train=3, test=2), load=lambda *_: pytest.fail("nothing is missing"))


# ---------------------------------------------------------------------------------------------------------------------
# Stops and resumes

def stop_at_third_question(number):
    """Let prepare.emoset caption with a made-up captioner, and get a signal when that is asked for the third time."""
    def load(args, processes):
        answer, calls = captioner([])(args, processes), []

        def stopping(conversations):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), number)
            return answer(conversations)

        return stopping

    build.build.__defaults__ = (load,)


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_without_a_second_look_or_question(emoset, tmp_path, number, code, monkeypatch):
    out = tmp_path / "out"
    said = launch.finish(launch.start("prepare.emoset", *flags(emoset, out), before=partial(stop_at_third_question, number)),
                         code)
    assert number != signal.SIGINT or "stopped; the same command goes on" in said
    assert "Traceback" not in said and not (out / "train.jsonl").exists()
    if number == signal.SIGKILL:
        with open(out / "captions-0.jsonl", "a") as f:
            f.write('{"id": "awe_000')  # as if inside the writing
    monkeypatch.setattr(build, "choose", None)  # the choice is kept
    asked, fresh = [], []
    rows = run(flags(emoset, out), asked)
    assert len(asked) == 20 - 8
    monkeypatch.undo()
    run(flags(emoset, tmp_path / "fresh"), fresh)
    assert len(fresh) == 20
    assert all(raw_rows(out, split) == raw_rows(tmp_path / "fresh", split) for split in rows)
    run(flags(emoset, out), load=lambda *_: pytest.fail("nothing is missing"))


def test_a_run_goes_on_with_the_same_settings_only(emoset, tmp_path):
    out = tmp_path / "out"
    run(flags(emoset, out))
    with pytest.raises(UserError, match=r"built with other settings \(train\); repeat them"):
        run(flags(emoset, out, train=9))
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"caption": "What is it?", "emotional_caption": "What makes one feel $label, $mood, $v, $a?"}))
    with pytest.raises(UserError, match=r"other settings \(questions\)"):
        run(flags(emoset, out, "--questions", str(own)))
    (out / "selection.json").unlink()
    with pytest.raises(UserError, match="there is another dataset; choose another --out"):
        run(flags(emoset, out))


# ---------------------------------------------------------------------------------------------------------------------
# Lexicon


def family_words():
    """Entries of all words but the classes' names, so that each family has its mean and spread."""
    entries = {}
    for label, words in check.WORDS.items():
        others = words.split()[1:]
        columns = []
        for name, mean, sd in zip(data.LEXICON[label][::2], data.FAMILIES[label][::2], data.FAMILIES[label][1::2]):
            rest = (8 * mean - name) / 7
            off = ((7 * sd**2 + 8 * mean**2 - name**2 - 7 * rest**2) / 2) ** 0.5
            columns.append([rest + off, rest - off, *[rest] * 5])
        entries |= {word: (round(v, 4), 1, round(a, 4), 1) for word, v, a in zip(others, *columns, strict=True)}
    return entries


def write_lexicon(path, change=(), quoting=csv.QUOTE_MINIMAL, encoding="utf-8"):
    kinds = [f"{x}.{y}.Sum" for x in "VAD" for y in ("Mean", "SD", "Rat")]
    with open(path, "w", newline="", encoding=encoding) as f:
        table = csv.writer(f, quoting=quoting)
        table.writerow(["", "Word", *kinds])
        entries = {"aardvark": (6.26, 2.21, 2.41, 1.4)} | data.LEXICON | family_words() | dict(change)
        for number, (word, entry) in enumerate(entries.items(), 1):
            if entry:
                v, v_sd, a, a_sd = entry
                table.writerow([number, word, v, v_sd, 19, a, a_sd, 22, 4.27, 1.75, 15])
    return path


@pytest.mark.parametrize("quoting, encoding", [(csv.QUOTE_MINIMAL, "utf-8"), (csv.QUOTE_NONNUMERIC, "utf-8-sig")])
def test_the_published_lexicon_is_accepted_quoted_or_not(tmp_path, quoting, encoding):
    path = write_lexicon(tmp_path / "BRM-emot-submit.csv", quoting=quoting, encoding=encoding)
    check.check_lexicon(path)


def test_all_that_differs_from_the_lexicon_is_listed(emoset, tmp_path, capsys):
    path = write_lexicon(tmp_path / "own.csv", {"awe": (6.86, 1.79, 3.83, 2.85), "fear": None,
                                                "anger": ("NA", 1.36, 5.93, 2.8)})
    assert emoset_program.main(flags(emoset, tmp_path / "out", "--lexicon", str(path))) == 2
    said = capsys.readouterr().err
    for text in ("awe V.Mean.Sum is 6.86, here 6.85", "fear V.Mean.Sum is missing, here 2.93",
                 "anger V.Mean.Sum is NA", "anger A.SD.Sum is 2.8,"):
        assert text in said
    # the other words of a class are right, its name is one of them
    assert "the words of anger have V [nan nan], here [2.84, 0.33]" in said and "words of awe" not in said
    assert said.count("\n") == 1 and "sadness" not in said
    path.write_text("Word,V.Mean.Sum\nawe,1\n")
    with pytest.raises(UserError, match=r"awe V.Mean.Sum is 1, here 6.85; awe V.SD.Sum is missing, here 1.79"):
        check.check_lexicon(path)


# ---------------------------------------------------------------------------------------------------------------------
# EMOTIC

# picture: [(v, a) of each person]; None for a file that is not there
EMOTIC = {("mscoco/images", "COCO_val2014_000000562243.jpg"): [(6, 4), (8, 8)], ("emodb_small/images", "1jj.png"): [(1, 10)],
          ("framesdb/images", "frame_a.jpg"): [(float("nan"), 5)], ("ade20k/images", "missing.jpg"): [(5, 5)]}
EXPECTED = {"mscoco_images_COCO_val2014_000000562243": (1 + 6 * 8 / 9, 1 + 5 * 8 / 9), "emodb_small_images_1jj": (1, 9)}


@pytest.fixture(scope="module")
def emotic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emotic")
    for number, (where, name) in enumerate(EMOTIC):
        if name != "missing.jpg":
            picture(folder / where / name, [99, number])
    return folder


def write_mat(path):
    """Nested structs as in the published file: one or several persons, one or several annotators, combined values."""
    def continuous(v, a):
        return {"valence": v, "arousal": a, "dominance": 5}

    images = []
    for number, ((folder, name), persons) in enumerate(EMOTIC.items()):
        structs = []
        for v, a in persons:
            person = {"body_bbox": [1, 2, 3, 4], "annotations_categories": {"categories": np.array(["Peace"], object)},
                      "annotations_continuous": continuous(v, a), "gender": "Male", "age": "Adult"}
            if number == 0:  # annotators who disagree, and their mean
                person |= {"annotations_continuous": np.array([continuous(1, 1), continuous(2, 9)]),
                           "combined_continuous": continuous(v, a)}
            elif number == 1:  # annotators only
                person |= {"annotations_continuous": np.array([continuous(v, a), continuous(float("nan"), a)]),
                           "combined_continuous": continuous(float("nan"), float("nan"))}
            structs.append(person)
        images.append({"filename": name, "folder": folder, "image_size": {"n_col": 64, "n_row": 64}, "original_database":
                       {"name": "mscoco"}, "person": np.array(structs) if len(structs) > 1 else structs[0]})
    savemat(path, {"train": images[0], "test": np.array(images)})
    return path


def write_csv(path, lists):
    with open(path, "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["Index", "Folder", "Filename", "Image Size", "BBox", *(
            ["Categorical_Labels", "Continuous_Labels"] if lists else
            ["Peace", "Valence", "Arousal", "Dominance", "Gender", "Age", "Arr_name", "Crop_name"])])
        for number, (v, a, folder, name) in enumerate((v, a, *key) for key, persons in EMOTIC.items() for v, a in persons):
            start = [number, folder, name, "[64, 64]", "[1, 2, 3, 4]"]
            table.writerow([*start, "['Peace']", f"[{v}, {a}, 5.0]"] if lists else
                           [*start, 1, v, a, 5, "Male", "Adult", f"img_arr_{number}.npy", f"crop_arr_{number}.npy"])
    return path


@pytest.mark.parametrize("form", ["mat", "columns", "lists"])
def test_emotic_becomes_test_rows_on_our_scale(emotic, tmp_path, form, capsys):
    path = write_mat(tmp_path / "a.mat") if form == "mat" else write_csv(tmp_path / "a.csv", form == "lists")
    out = tmp_path / "out"
    rows = run(["--annotations", str(path), "--images", str(emotic), "--out", str(out), "--captioner", str(TINY)],
               program=emotic_program)
    assert list(rows) == ["test"] and {r.id: (r.v, r.a) for r in rows["test"]} == {
        name: pytest.approx(va, abs=1e-4) for name, va in EXPECTED.items()}
    assert all(r.label == data.nearest_emotion(r.v, r.a) and r.emotional is None for r in rows["test"])
    said = capsys.readouterr().err
    assert "frame_a.jpg has no person with V and A in 1..10; passed over" in said and "missing.jpg cannot be read" in said
    assert "seed" not in raw_rows(out, "test")[0] and check.main([str(out)]) == 0


def test_without_scipy_a_mat_file_is_one_line(emotic, tmp_path, monkeypatch, capsys):
    path = write_mat(tmp_path / "a.mat")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert emotic_program.main(["--annotations", str(path), "--images", str(emotic), "--out", str(tmp_path / "out"),
                                "--captioner", str(TINY), "--device", "cpu"]) == 2
    assert "and scipy to read it; or give a CSV" in capsys.readouterr().err


@pytest.mark.parametrize("more, message", [
    (["--annotations", "none.csv"], "none.csv"), (["--images", "none"], "--images none: no such folder"),
    (["--annotations", "foreign.csv"], "no CSV with columns Folder, Filename and either"),
    (["--annotations", "empty.csv"], "0 of 0 pictures usable"), (["--annotations", "foreign.mat"], "and scipy to read it"),
    (["--annotations", "a.mat", "--split", "val"], "expected EMOTIC's Annotations.mat with a split val"),
    (["--annotations", "other.mat"], "expected EMOTIC's"), (["--images", "bare"], "0 of 4 pictures usable")])
def test_what_is_not_emotic_ends_with_one_line(emotic, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    write_mat("a.mat")
    savemat("other.mat", {"test": {"filename": "x"}})
    (tmp_path / "foreign.mat").write_text("text" * 100)
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("Folder,Filename,Valence,Arousal\n")
    (tmp_path / "bare").mkdir()
    assert emotic_program.main(["--annotations", "a.mat", "--images", str(emotic), "--out", "out", "--captioner",
                                str(TINY), "--device", "cpu", *more]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("name, content, message", [
    ("train.json", None, "train.json: [Errno 2]"), ("val.json", "{", "val.json: Expecting"),
    ("train.json", '[["awe", "x"]]', "expected a list of [emotion, id, picture, annotation]"),
    ("train.json", "3", "train.json"),    ("train.json", '{"a": 1}', "train.json"),
    (".", None, "0 of 24 pictures usable, expected at least 2"),
    ("..", None, "0 of 0 pictures usable")])
def test_what_is_not_emoset_ends_with_one_line(own_emoset, tmp_path, capsys, name, content, message):
    if name == ".":
        for path in own_emoset.glob("image/*/*"):
            path.unlink()
    elif name == "..":
        for split in ("train", "val", "test"):
            (own_emoset / f"{split}.json").write_text("[]")
    elif content is None:
        (own_emoset / name).unlink()
    else:
        (own_emoset / name).write_text(content)
    assert emoset_program.main(flags(own_emoset, tmp_path / "out")) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize("more, message", [
    (["--train", "0"], "--train: expected a whole number in 1..1,000,000, got 0"), (["--test", "-1"], "--test: expected"),
    (["--micro", "0"], "--micro: expected"), (["--seed", "-1"], "--seed: expected"),
    (["--max-new-tokens", "0"], "--max-new-tokens: expected"), (["--train", "many"], "--train: expected"),
    (["--emoset", "nowhere"], "nowhere/train.json: "), (["--captioner", "no/such/folder"], "no such file or folder"),
    (["--lexicon", "none.csv"], "none.csv"), (["--questions", "none.json"], "none.json"),
    (["--picture", "x"], "unrecognized")])
def test_senseless_settings_end_with_one_line(emoset, tmp_path, capsys, more, message):
    try:
        code = emoset_program.main(flags(emoset, tmp_path / "out", *more))
    except SystemExit as stop:  # argparse
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and message in said and said.count("\n") == 1, said


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize("answer", [
    "A boat on the lake.", '"A boat on the lake."', "Caption: A boat on the lake.", '**Caption:** "A boat on the lake."',
    "Here is the caption:\n\nA boat\non the lake.", "“Neutral caption: A boat on the lake.”", "- A boat  on the lake.\n",
    "<think>calm</think>\n```\nA boat on the lake.\n```", "'A boat on the lake.'"])
def test_a_caption_is_one_line_without_what_surrounds_it(answer):
    assert captions.read_caption(answer) == "A boat on the lake."


def test_quotes_within_a_caption_stay():
    assert captions.read_caption('"Stop" on a sign, "Go" on another; "end"') == '"Stop" on a sign, "Go" on another; "end"'


@pytest.mark.parametrize("answer", ["", "\n", "...", '""', "Here is the caption:", "<answer></answer>", "word " * 1000])
def test_an_answer_without_a_caption_is_unusable(answer):
    with pytest.raises(feedback.Unusable, match="expected words"):
        captions.read_caption(answer)


def test_the_emotional_question_names_label_and_mood_and_the_neutral_one_neither(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    row = {"image": "x.png", "label": "awe", "v": 8.9, "a": 1.2}
    text = captions.ask(row, "emotional", tmp_path)[1]["content"][1]["text"]
    assert "awe" in text and "blissful" in text and "utterly still" in text and "$" not in text
    assert not any(label in captions.ask(row, "neutral", tmp_path)[1]["content"][1]["text"] for label in data.EMOTIONS)


def test_pictures_are_shuffled_by_the_seed_before_they_are_split(emoset, tmp_path):
    def sources(*more):
        return [row["source"] for row in emoset_program.choose_rows(emoset_program.parse_args(flags(emoset, tmp_path, *more))).rows]

    first = sources()
    assert first != sorted(first) and len({source.split("/")[1] for source in first[:8]}) > 3  # EmoSet is sorted by class
    assert first == sources() and first != sources("--seed", "1")


def test_labels_may_be_drawn_from_the_family_of_a_class(emoset, tmp_path):
    args = emoset_program.parse_args(flags(emoset, tmp_path, "--labels", "family"))
    for number, row in enumerate(emoset_program.choose_rows(args).rows):
        drawn = data.draw_va(row["label"], np.random.default_rng([0, number]), data.FAMILIES)
        assert (row["v"], row["a"]) == pytest.approx(drawn, abs=1e-4) and row["labels"] == "family"


def test_a_dollar_in_the_captioner_s_system_prompt_is_written_twice(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = captions.ask({"image": "a.png"}, "neutral", tmp_path, captions.PROMPTS | {"caption_system": "worth $$5"})
    assert asked[0] == {"role": "system", "content": "worth $5"}
