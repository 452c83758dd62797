"""Valence and arousal of a picture as the judge expects them, by its probabilities.

    expected_va(judge, questions)  # [(V, A)], in one forward pass
    expected_va(judge, questions, thoughts)  # after what the judge has thought of each

A judge that answers in text says one of a few numbers that it likes, so many pictures of one prompt
tie. Its probabilities say more. The answer's opening is put into its mouth, up to the first digit
of the valence, and the expected value over all digits is taken, then over the tenths, and the same
of the arousal. Nothing is decoded, and nothing can be unreadable.

Shapes: P questions, 9 first digits, L tokens of an opening, D width.
"""

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from parts import ops

OPENING = '<think>{thought}</think><answer>{{"valence": {digit}.5, "arousal": {digit}.5'


@torch.no_grad()
def expected_va(model, questions, thoughts=None, batch=32, progress=False):
    """[(V, A)] in 1..9, by a QwenVL, of conversations that each ask for both of a picture.

    thoughts: of each question; default: none.
    """
    thoughts = thoughts or [""] * len(questions)
    found = []
    starts = tqdm(range(0, len(questions), batch), "reading", leave=False, disable=not progress)
    for start in starts:
        part = slice(start, start + batch)
        found += read_batch(model, questions[part], thoughts[part])
    return found


def read_batch(model, questions, thoughts):
    tokenizer = model.processor.tokenizer
    device = model.head_weight.device
    prompts = [model.processor(question) for question in questions]
    P = len(prompts)
    # 1. nine openings of each, one for each first digit of both numbers, share a prompt's pass
    openings = []
    for thought in thoughts:
        texts = [OPENING.format(thought=thought, digit=digit) for digit in range(1, 10)]
        openings.append(torch.tensor([each.ids for each in tokenizer.encode_batch(texts)]).T)
    places = [(own[:, 0] != own[:, 1]).nonzero()[:, 0] for own in openings]  # of the two digits
    v_at, a_at = torch.stack(places).T.to(device)  # [P] each
    openings = pad_sequence(openings, batch_first=True).transpose(1, 2).to(device)  # [P,9,L]
    hidden = model.completion_hidden(prompts, openings)  # [P,9,L,D]
    digits = [tokenizer.token_to_id(str(digit)) for digit in range(10)]

    # 2. probabilities of the digits that may stand there, and expected values
    def probabilities(at, first):
        """Of the digits from `first` on, as token `at` [P] of each opening: [P,9,digits]."""
        states = hidden[torch.arange(P, device=device), :, at].flatten(0, 1)  # [P·9,D]
        logits = ops.logits(states, model.head_weight[digits[first:]])
        return logits.view(P, 9, -1).softmax(-1)

    def value(of_digit, at):
        """Expected value [P] of a number whose first digit has the probabilities [P,9]."""
        tenths = probabilities(at + 2, 0) @ torch.arange(10.0, device=device) / 10  # [P,9]
        first = torch.arange(1.0, 10.0, device=device)
        return (of_digit * (first + tenths)).sum(1).clamp(max=9.0)

    of_v = probabilities(v_at, 1)[:, 0]  # nothing before it differs, so all openings agree
    # An opening has its digit in the valence, too, so the arousal's is averaged over valences.
    of_a = (of_v[:, :, None] * probabilities(a_at, 1)).sum(1)  # [P,9]
    return list(zip(value(of_v, v_at).tolist(), value(of_a, a_at).tolist(), strict=True))
