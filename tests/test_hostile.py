"""The corpus of hostile.py: each of its files is read right, or refused in one line, soon and in little memory."""

import resource
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from evaluation import rate
from evaluation.cases import load_cases
from parts.cli import UserError
from parts.prompts import load_prompts
from prepare import check
from tests import hostile

SECONDS = 2.0  # of a processor
MEMORY = 400  # MiB


@contextmanager
def watched():
    """Raise TimeoutError in what waits for ever, and AssertionError after what took too much."""
    def stop(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 100)
    started = time.process_time()
    memory = peak()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    seconds = time.process_time() - started
    assert seconds < SECONDS, f"{seconds:.1f} s"
    assert peak() - memory < MEMORY, f"{peak() - memory} MiB more"


def peak():
    """MiB that this process had at most; where Linux can, since it was asked last."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) // 2**10


def fault(read, expected, where):
    """What is wrong with the way in which something is read or refused, else None."""
    said = None
    try:
        with watched():
            read()
    except UserError as error:
        said = str(error)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]!r}"
    if said is None:
        return None if expected in (hostile.READ, hostile.EITHER) else "it was read"
    if not said.isprintable() or len(said) > 3000 or str(where) not in said:
        return f"not a line that names the file: {said[:200]!r} … {len(said)}"
    if expected is hostile.READ:
        return f"it was refused: {said[:300]}"
    return None if expected is hostile.EITHER or expected in said else f"expected {expected!r}: {said[:300]}"


def judge(corpus, tmp_path, read, put, where=None):
    """Read a whole corpus; all that is wrong is told at once. put(folder, content) makes the hostile thing; every refusal
    names what lies in that folder, or in `where`."""
    faults = []
    for number, (name, content, expected) in enumerate(corpus):
        folder = tmp_path / str(number)
        folder.mkdir()
        put(folder, content)
        if found := fault(lambda folder=folder, name=name: read(folder, name), expected, where or folder):
            faults.append(f"{name}: {found}")
    assert not faults, f"{len(faults)} of {number + 1}:\n" + "\n".join(faults)


def written(name):
    return lambda folder, content: (folder / name).write_bytes(content)


def made(folder, make):
    make(folder)


def test_headers(tmp_path):
    judge(hostile.headers(), tmp_path, lambda folder, _: hostile.read_header(folder), written("x.safetensors"))


def test_indexes(tmp_path):
    judge(hostile.indexes(), tmp_path, lambda folder, _: hostile.read_index(folder), made)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return hostile.make_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_3", "judge", "clip", "tokenizer",
                                  "other"])
def test_configurations(models, tmp_path, part):
    def of_part(name):
        first = name.partition("/")[0]
        return first == part or (part == "other" and first not in hostile.CONFIGURED)

    folder = tmp_path / "models"
    hostile.link_all(models, folder)
    last = []

    def put(_, content):  # one folder for all, for links take time, too
        if last:
            hostile.relink(folder / last[0], models / last.pop())
        file, change = content
        change(folder / file)
        last.append(file)

    corpus = [case for case in hostile.configurations(models) if of_part(case[0])]
    judge(corpus, tmp_path, lambda _, name: hostile.read_models(folder, name), put, folder)


def test_a_folder_of_models_as_it_is(models):
    for part in ("judge", "clip", "vae"):
        hostile.read_models(models, part)


def test_single_files(models, tmp_path):
    judge(hostile.single_files(models), tmp_path, lambda folder, _: hostile.read_single_file(folder), made)


def test_adapters(tmp_path):
    judge(hostile.adapters(), tmp_path, lambda folder, _: hostile.read_adapter(folder), made)


def test_rows_by_the_loader_and_by_the_check(tmp_path, capsys):
    def put(folder, content):
        hostile.make_pictures(folder)
        (folder / "train.jsonl").write_bytes(content)

    judge(hostile.rows(), tmp_path, lambda folder, _: hostile.read_rows(folder), put)
    for number, (name, _, expected) in enumerate(hostile.rows()):
        with watched():
            code = check.main([str(tmp_path / str(number))])
        said = capsys.readouterr().out
        assert all(line.isprintable() for line in said.splitlines()), name
        assert expected is hostile.EITHER or code == (expected is not hostile.READ), (name, said)


def test_cases(tmp_path):
    judge(hostile.cases(), tmp_path, lambda folder, _: load_cases(folder / "x.jsonl"), written("x.jsonl"))


def test_answers():
    for name, text, expected in hostile.answers():
        with watched():
            assert hostile.read_answers(text) == expected, name


def test_pictures(tmp_path):
    judge(hostile.pictures(), tmp_path, lambda folder, _: hostile.read_picture(folder), written("x.png"))


def test_requests(tmp_path, capsys):
    study = hostile.make_study(tmp_path)
    faults = []
    for name, request, status in hostile.requests(study):
        with watched():
            found, body = hostile.ask_server(study, request)
        if found != status or b"\x1b" in body or b"<b>" in body:
            faults.append((name, found, body[:200]))
    assert not faults
    assert not study.rows and not rate.read_ratings(study.out) and not capsys.readouterr().err
    assert hostile.ask_server(study, hostile.post(hostile.whole_form(study)))[0] == 303 and len(study.rows) == 2


def test_ratings(tmp_path):
    judge(hostile.ratings(), tmp_path, lambda folder, _: rate.read_ratings(folder / "x.csv"), written("x.csv"))


def test_questions(tmp_path):
    def read(folder, name):
        load_prompts(folder / "x.json", dict.fromkeys(("system", "regression"), ""), {}, {})

    judge(hostile.questions(), tmp_path, read, written("x.json"))


def test_runs(tmp_path):
    hostile.make_run(tmp_path / "run")

    def put(folder, change):
        shutil.copytree(tmp_path / "run", folder, dirs_exist_ok=True)
        change(folder)

    judge(hostile.runs(), tmp_path, lambda folder, _: hostile.read_run(folder), put)
