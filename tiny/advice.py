"""The last stage of the miniature's judge: feedback again, after GRPO.

    python -m tiny.advice        # after tiny.judge_study; writes tiny/weights/judge

GRPO asks the judge about valence and arousal alone. Here it goes through the lessons of feedback
(tiny/lessons.py) once more, and is held to what it says of single pictures: on answers that the
judge of GRPO draws, the divergence from it is the loss. Both judges' figures on held-out rows are
printed at the end and kept beside the weights.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import copy
import json
import re
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import feedback
import qwen_vl
from parts import cli
from parts.cli import UserError
from parts.files import write_whole
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
    """{figure: number} of a judge on held-out rows: its errors, and in how many of its rewrites
    both figures are right to a tenth."""
    first = pretrain.training_rows(len(material.rows))
    examined = range(first, len(material.rows))[:EXAMINED]
    pictures = [Image.fromarray(material.pictures[i]) for i in examined]
    read = np.array([said.va for said in feedback.judge_images(judge_of(model), pictures)])
    off = np.abs(read - [material.rows[i][1:] for i in examined])

    rng = np.random.default_rng(0)
    pairs = [pretrain.advising(material, "compare", i, rng) for i in examined]
    said = model.generate([prompt for prompt, _ in pairs], 1, feedback.REWRITE_LIMIT, 0.0)
    right = [figures_in(own.text) == figures_in(answer)
             for (own,), (_, (answer,)) in zip(said, pairs, strict=True)]
    return {"v_error": float(np.nanmean(off[:, 0])), "a_error": float(np.nanmean(off[:, 1])),
            "figures_right": sum(right) / len(right)}


def figures_in(text):
    """The V and A that a rewrite asks for, as it writes them."""
    return re.findall(r"valence ([\d.]+), arousal ([\d.]+)", text)[-1:]


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

    pretrain.train("advice", [model], loss_of, args, SCHEDULE)
    model.requires_grad_(False)
    model.save_pretrained(SHIPPED, torch.bfloat16)
    saved = qwen_vl.QwenVL.from_pretrained(SHIPPED, "cpu", torch.float32)
    figures = {"after GRPO": examine(before, material), "with feedback": examine(saved, material)}
    write_whole(SHIPPED / "figures.json", json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def main(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--seed", type=cli.integer(0, 2**31), default=0)
    add("--samples", type=cli.integer(1, 10**9),
        help=f"of lessons (default: {SCHEDULE.samples:,})")
    add("--minutes", type=cli.number(0, 10**6),
        help="also stop after this time, the learning rate decayed to it")
    add("--save-every", type=cli.number(0, 10**6), default=60,
        help="seconds between states on disk (default: %(default)s)")
    args = parser.parse_args(argv)
    return cli.run_program(lambda: train(args))


if __name__ == "__main__":
    sys.exit(main())
