"""The last stage of the miniature's judge: feedback again, after GRPO.

    python -m tiny.advice --minutes 60  # after tiny.judge_study; writes tiny/weights/judge

GRPO asks the judge about valence and arousal alone. Here it goes through the lessons of feedback
(tiny/lessons.py) once more, and is held to what it says of single pictures: on answers that the
judge of GRPO draws, the divergence from it is the loss. Both judges' figures on held-out rows are
printed at the end and kept beside the weights.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import copy
import math
import re
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import feedback
import qwen_vl
from parts import cli, weights
from parts.cli import UserError
from parts.files import as_json, write_json
from parts.pipeline import judge_of
from tiny import pretrain
from tiny.judge_study import STUDY

TRAINED = STUDY / "step_seed0" / "judge"  # by GRPO
SHIPPED = pretrain.WEIGHTS / "judge"
TASKS = ("compare", "brief", "brief", "regression", "compare", "brief", "brief", "class")
SCHEDULE = pretrain.Schedule(samples=96_000, batch=32, lr=1e-3, weight_decay=0.01, ema=0.99)
ANSWERS = 2  # drawn of each picture
EXAMINED = 128  # held-out rows


def drawn_answers(judge, prompts, generator):
    """Ids [P,G,C] of answers that a judge draws, padded by -1."""
    drawn = judge.generate(prompts, ANSWERS, feedback.ANSWER_LIMIT, generator=generator)
    ids = [completion.tokens for each in drawn for completion in each]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    return ids.view(len(prompts), ANSWERS, -1)


def divergence(model, before, prompts, ids):
    """KL of `before`'s next token from the model's, over the tokens of answers [P,G,C]."""
    said = ids.flatten() >= 0
    new = pretrain.answer_logits(model, prompts, ids)[said].log_softmax(-1)
    with torch.no_grad():
        old = pretrain.answer_logits(before, prompts, ids)[said].log_softmax(-1)
    return F.kl_div(new, old, reduction="batchmean", log_target=True)


@torch.no_grad()
def examine(model, material):
    """{figure: number} of a judge on held-out rows: its errors; in how many comparisons it says
    rightly by how much the better picture misses; how far the prompt's figures are off."""
    first = pretrain.training_rows(len(material.rows))
    examined = range(first, len(material.rows))[:EXAMINED]
    pictures = [Image.fromarray(material.pictures[i]) for i in examined]
    read = np.array([said.va for said in feedback.judge_images(judge_of(model), pictures)])
    off = np.abs(read - [material.rows[i][1:] for i in examined])

    rng = np.random.default_rng(0)
    pairs = [pretrain.advising(material, "compare", i, rng) for i in examined]
    said = model.generate([prompt for prompt, _ in pairs], 1, feedback.REWRITE_LIMIT, 0.0)
    told = [parts_of(own.text) for (own,) in said]
    right = [parts_of(answer) for _, (answer,) in pairs]
    asked = np.array([each[1] for each in told])  # [n,2]
    return {"v_error": float(np.nanmean(off[:, 0])), "a_error": float(np.nanmean(off[:, 1])),
            "misses_right": np.mean([x[0] == y[0] for x, y in zip(told, right, strict=True)]),
            "figures_off": float(np.nanmean(np.abs(asked - [each[1] for each in right])))}


def parts_of(text):
    """(what an analysis says that the first picture misses, the V and A that its prompt has)."""
    miss = re.search(r"The first is (.*?)\. In place", text)
    asked = re.findall(r"valence ([\d.]+), arousal ([\d.]+)", text)
    return miss and miss[1], [float(x) for x in asked[-1]] if asked else [math.nan] * 2


def train(args):
    if not (TRAINED / "tokenizer_config.json").exists():
        raise UserError(f"{TRAINED}: missing; run `python -m tiny.judge_study --rows step` first")
    rows, pictures = pretrain.load_data()
    before = qwen_vl.QwenVL.from_pretrained(TRAINED, "cpu", torch.float32)
    model = copy.deepcopy(before).requires_grad_()
    material = pretrain.judge_material(model.processor, rows, pictures)

    def loss_of(step, generator, rng, batch):
        task = TASKS[step % len(TASKS)]
        prompts, ids = pretrain.lesson(material, task, batch, rng)
        if task in feedback.TASKS:
            ids = drawn_answers(before, list(prompts), generator)
            loss = divergence(model, before, prompts, ids)
        else:
            loss = pretrain.answer_loss(model, prompts, ids)
        return loss, {task: float(loss.detach())}

    pretrain.train("advice", [model], loss_of, args, SCHEDULE, weights.fingerprint([TRAINED]))
    model.requires_grad_(False)
    model.save_pretrained(SHIPPED, torch.bfloat16)
    saved = qwen_vl.QwenVL.from_pretrained(SHIPPED, "cpu", torch.float32)
    figures = {"after GRPO": examine(before, material), "with feedback": examine(saved, material)}
    write_json(SHIPPED / "figures.json", figures)
    print(as_json(figures), end="")


def main(argv=None):
    parser = cli.parser(__doc__)
    pretrain.add_training_flags(parser)
    args = parser.parse_args(argv)
    return cli.run_program(lambda: train(args))


if __name__ == "__main__":
    sys.exit(main())
