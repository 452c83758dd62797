"""The examiner of content: which subject and which place does a picture show?

    python -m tiny.examiner                    # its accuracy, on rendered and on drawn pictures
    python -m tiny.examiner --train            # train it again, about 10 minutes on two cores

The meter of `tiny.scenes` reads the mood of a picture and cannot see what is in it: plain yellow
reads as (9, 9). This small classifier sees nothing else. It learnt from rendered scenes of its own
seeds and of all moods, also of the pairs of subject and place that no other training has, and from
blurred and noisy copies, since drawn pictures are softer than rendered ones. Its answer is never a
reward: it tells whether reward feedback keeps the subject.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn
from tqdm import tqdm

from parts import cli, weights
from parts.pipeline import TINY, load_generator, to_images
from tiny import scenes
from tiny.subjects import NAMES

FILE = TINY / "examiner.safetensors"
SUBJECTS = tuple(NAMES)
PLACES = tuple(scenes.PLACES)
SIDE = 64  # pixels that it looks at
SEED = 50  # other scenes than those of pretraining (20), of datasets (30) and of the head (40)


class Examiner(nn.Module):
    """A picture [B,3,64,64] in -1..1 -> logits of its subject [B,13] and of its place [B,8]."""

    def __init__(self, widths=(16, 32, 64, 96)):
        super().__init__()
        layers = []
        before = 3
        for width in widths:  # each halves the side: 64, 32, 16, 8, 4
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1),
                       nn.GroupNorm(8, width), nn.SiLU(),
                       nn.Conv2d(width, width, 3, padding=1),
                       nn.GroupNorm(8, width), nn.SiLU()]
            before = width
        self.trunk = nn.Sequential(*layers)
        # Where a thing stands matters (a castle on the hill, water below it), so no pooling.
        self.subject = nn.Linear(16 * before, len(SUBJECTS))
        self.place = nn.Linear(16 * before, len(PLACES))

    def forward(self, pixels):
        seen = self.trunk(pixels).flatten(1)
        return self.subject(seen), self.place(seen)

    @torch.no_grad()
    def recognise(self, images):
        """[(subject, place)] of PIL images."""
        found = []
        for start in range(0, len(images), 100):
            subject, place = self(to_pixels(images[start:start + 100]))
            for s, p in zip(subject.argmax(1).tolist(), place.argmax(1).tolist(), strict=True):
                found.append((SUBJECTS[s], PLACES[p]))
        return found

    def shows(self, images, prompts):
        """[N] float64: 1 where a picture shows the subject that its prompt names, else 0."""
        found = [subject for subject, _ in self.recognise(images)]
        wanted = [subject_of(prompt) for prompt in prompts]
        return torch.tensor([a == b for a, b in zip(found, wanted, strict=True)]).double()

    @classmethod
    def from_pretrained(cls, path=FILE):
        """Raises UserError for a file of another model."""
        return weights.build(cls, weights.named_views, weights.index(Path(path)), path)


def to_pixels(images):
    """PIL images -> [B,3,64,64] in -1..1."""
    small = [image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    pixels = np.stack([np.asarray(image) for image in small])  # [B,64,64,3]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def subject_of(prompt):
    """The subject that a prompt names, as `scenes.neutral_caption` does, or None."""
    named = [subject for subject, name in NAMES.items() if name in prompt]
    return named[0] if len(named) == 1 else None


# --------------------------------------------------------------------------------------------------
# Training


def draw_row(seed):
    """(subject, place, picture [64,64,3] uint8) of a scene of any pair, V and A uniform on 1..9."""
    rng = np.random.default_rng([seed, SEED])
    scene = scenes.random_scene(rng, reserved=rng.random() < 0.22)  # as many pairs are reserved
    image = scenes.render(scene, *rng.uniform(1, 9, 2), 128)
    kind = rng.integers(3)
    if kind == 1:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 2))))
    if kind == 2:
        image = scenes.add_noise(image, rng, float(rng.uniform(2, 12)))
    return scene.subject, scene.place, np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def draw_rows(first, count):
    """(subjects [N], places [N], pictures [N,64,64,3]) of the rows of `count` seeds."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = pool.map(draw_row, range(first, first + count), chunksize=16)
        subjects, places, pictures = zip(*tqdm(rows, "scenes", count))
    return ([SUBJECTS.index(s) for s in subjects], [PLACES.index(p) for p in places],
            np.stack(pictures))


def train(count, epochs, seed=0, batch=64):
    """An Examiner, after `epochs` passes over `count` scenes; every second picture is mirrored."""
    subjects, places, pictures = draw_rows(seed * 10_000_000, count)
    subjects = torch.tensor(subjects)
    places = torch.tensor(places)
    torch.manual_seed(seed)
    model = Examiner().to(memory_format=torch.channels_last)
    steps = epochs * (count // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    bar = tqdm(range(steps), "examiner")
    for step in bar:
        if step % (count // batch) == 0:
            order = torch.randperm(count)
        own = order[step % (count // batch) * batch:][:batch]
        pixels = torch.from_numpy(pictures[own]).permute(0, 3, 1, 2).float() / 127.5 - 1
        if step % 2:
            pixels = pixels.flip(3)
        subject, place = model(pixels)
        loss = F.cross_entropy(subject, subjects[own]) + F.cross_entropy(place, places[own])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)
    return model.eval()


# --------------------------------------------------------------------------------------------------
# How right it is


def on_rendered(model, count, seed=1):
    """{"subject", "place": share of right answers} on scenes of other seeds than training's."""
    subjects, places, pictures = draw_rows(seed * 10_000_000, count)
    found = model.recognise([Image.fromarray(picture) for picture in pictures])
    right = [(SUBJECTS[s] == subject, PLACES[p] == place)
             for s, p, (subject, place) in zip(subjects, places, found, strict=True)]
    return dict(zip(("subject", "place"), np.mean(right, axis=0).tolist(), strict=True))


def on_drawn(model, generator, count, seed=1):
    """The same on pictures that a generator drew from emotional captions of training's pairs."""
    rng = np.random.default_rng([seed, SEED])
    rows = [(scenes.random_scene(rng), *rng.uniform(1, 9, 2).tolist()) for _ in range(count)]
    right = []
    for start in tqdm(range(0, count, 20), "drawn"):
        part = rows[start:start + 20]
        prompts = [scenes.emotional_caption(*row) for row in part]
        images = to_images(generator.draw(prompts, range(start, start + len(part)), 128))
        for (scene, *_), (subject, place) in zip(part, model.recognise(images), strict=True):
            right.append((scene.subject == subject, scene.place == place))
    return dict(zip(("subject", "place"), np.mean(right, axis=0).tolist(), strict=True))


def main(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--train", action="store_true", help="train it and write its weights")
    parser.add_argument("--scenes", type=cli.integer(64, 10**6), default=24_000,
                        help="rendered for training (default: %(default)s)")
    parser.add_argument("--epochs", type=cli.integer(1, 1000), default=12,
                        help="passes over them (default: %(default)s)")
    parser.add_argument("--test", type=cli.integer(2, 10**6), default=1000,
                        help="pictures of each kind to examine (default: %(default)s)")
    args = parser.parse_args(argv)

    def work():
        if args.train:
            trained = train(args.scenes, args.epochs)
            weights.save(FILE, weights.named_views(trained), torch.bfloat16)
        model = Examiner.from_pretrained()
        rows = [["pictures", "subject", "place"]]
        for name, figures in (
                ("rendered", on_rendered(model, args.test)),
                ("drawn by the base", on_drawn(model, load_generator(TINY), args.test // 5))):
            rows.append([name, *(f"{share:.1%}" for share in figures.values())])
        print(cli.markdown(rows))

    return cli.run_program(work)


if __name__ == "__main__":
    sys.exit(main())
