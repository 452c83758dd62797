"""ImageReward and HPSv2.1, models of what people prefer, as rewards and metrics beside PickScore.

    python train_gen.py --reward-weights emotion=1,imagereward=0.2
    python -m evaluation run --scorer imagereward --scorer hpsv2=FOLDER
    python -m baselines.image_reward convert ImageReward.pt ImageReward.safetensors

ImageReward-v1.0 (Xu et al. 2023) is a BLIP (Li et al. 2022): a text encoder reads the prompt and,
in every block, the picture's tokens; five linear layers make a number of its first token. HPSv2.1
(Wu et al. 2023) is a CLIP ViT-H/14 that was trained further on people's choices; its score is the
cosine of picture and prompt.

Both are published as pickles, from which only plain tensors are read; `convert` writes them as
safetensors. Names of tensors, constants and preparation are those of the packages image-reward
(github.com/THUDM/ImageReward) and hpsv2 (github.com/tgxs002/HPSv2). Left out: dropout, and the
projections of BLIP's contrastive loss, which the score does not use.

Shapes: B pictures with a prompt each, L text tokens (35), N image tokens with the class token
(197), D width, S side of the pictures in pixels (224).
"""

import argparse
import functools
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from baselines import bert
from parts import cli, clip, weights
from parts.cli import UserError
from parts.files import to_rgb

IMAGE_REWARD_FILE = "ImageReward.pt"  # in THUDM/ImageReward
BERT = "google-bert/bert-base-uncased"  # whose tokenizer ImageReward was trained with
HPS_FILE = "HPS_v2.1_compressed.pt"  # in xswu/HPSv2

IMAGE = clip.VisionConfig(  # BLIP's ViT-L/16
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
    hidden_act="gelu", image_size=224, patch_size=16, layer_norm_eps=1e-6)
TEXT = clip.TextConfig(  # BERT-base, with two more tokens for BLIP's other tasks
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    vocab_size=30_524, max_position_embeddings=512)
TOKENS = 35  # that a prompt is cut and padded to
HEAD = (1024, 128, 64, 16, 1)  # outputs of the five layers
MEAN = 0.16717362830052426  # of the head's output over the training set, and its deviation
STD = 1.0333394966054072


# --------------------------------------------------------------------------------------------------
# ImageReward


class ImageEncoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        tokens = (c.image_size // c.patch_size) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, c.hidden_size))
        self.patch_embed = nn.Conv2d(3, c.hidden_size, c.patch_size, stride=c.patch_size)
        self.blocks = nn.ModuleList(clip.Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, pixels):  # normalised, [B,3,S,S] -> [B,N,D]
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)  # [B,N-1,D]
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x, causal=False)
        return self.norm(x)


class TextEncoder(nn.Module):
    def __init__(self, c, image_width):
        super().__init__()
        D = c.hidden_size
        self.word_embeddings = nn.Embedding(c.vocab_size, D)
        self.position_embeddings = nn.Embedding(c.max_position_embeddings, D)
        self.LayerNorm = nn.LayerNorm(D, eps=bert.EPS)
        self.layer = nn.ModuleList(
            bert.Block(D, c.num_attention_heads, c.intermediate_size, image_width)
            for _ in range(c.num_hidden_layers))

    def forward(self, ids, mask, image):
        """ids and mask [B,L], True where a token is, image tokens [B,N,·] -> states [B,L,D]."""
        x = self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]
        x = self.LayerNorm(x)
        for block in self.layer:
            x = block(x, image, mask[:, None, None])
        return x


class ImageReward(nn.Module):
    def __init__(self, image=IMAGE, text=TEXT, tokenizer=None):
        """tokenizer: BERT's, set to cut and pad to TOKENS."""
        super().__init__()
        self.visual_encoder = ImageEncoder(image)
        self.text_encoder = TextEncoder(text, image.hidden_size)
        first, second, third, fourth, last = (
            nn.Linear(*sides) for sides in pairwise((text.hidden_size, *HEAD)))
        # In training dropout stood where nn.Identity does; there never was an activation.
        self.mlp = nn.Sequential(first, nn.Identity(), second, nn.Identity(), third, nn.Identity(),
                                 fourth, last)
        self.image_size = image.image_size
        self.tokenizer = tokenizer

    def forward(self, pixels, ids, mask):
        """pixels [B,3,S,S], ids and mask [B,L] -> scores [B] float32, about standard normal."""
        x = self.text_encoder(ids, mask, self.visual_encoder(pixels))[:, 0]  # [B,D]
        return (self.mlp(x)[:, 0] - MEAN) / STD

    def views(self):
        """The published names."""
        table = (
            *bert.names("self"),
            (r"^text_encoder\.(\w+_embeddings|LayerNorm)\.", r"text_encoder.embeddings.\1."),
            (r"^text_encoder\.layer\.", "text_encoder.encoder.layer."),
            (r"\.layer_norm([12])\.", r".norm\1."),
            (r"\.qkv_proj\.", ".attn.qkv."),
            (r"\.out_proj\.", ".attn.proj."),
            (r"\.(fc[12])\.", r".mlp.\1."),
            (r"patch_embed", "patch_embed.proj"),
            (r"^(visual|text)_encoder", r"blip.\1_encoder"),
            (r"^mlp\.", "mlp.layers."))
        return weights.renamed(weights.named_views(self), table)


def load_image_reward(source, device="cpu", image=IMAGE, text=TEXT):
    """ImageReward from a hub id, a folder with ImageReward.pt (or .safetensors), or such a file.

    Its tokenizer is that of BERT-base from the hub, or a tokenizer.json beside the file. Raises
    UserError.
    """
    path, entries = weights.find_tensors(source, IMAGE_REWARD_FILE)
    folder = weights.root(beside(source, "tokenizer.json", BERT), "tokenizer.json")
    tokenizer = weights.read_tokenizer(folder, assemble=None)
    weights.check_vocabulary(tokenizer, text.vocab_size, folder)
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS, pad_id=tokenizer.token_to_id("[PAD]"))
    make = functools.partial(ImageReward, image, text, tokenizer)
    unused = ("blip.vision_proj.*", "blip.text_proj.*", "*.position_ids")
    # As published, in float32 on a GPU, too: pictures of one prompt differ by little.
    return weights.build(make, ImageReward.views, entries, path, device, torch.float32, unused)


def files_of_image_reward(source):
    """What `load_image_reward` reads, for hub.fetch."""
    return [(source, [IMAGE_REWARD_FILE]), (beside(source, "tokenizer.json", BERT), ["*.json"])]


def beside(source, name, hub_id):
    """The local folder of a model, if it also holds the file `name` of a tokenizer, else hub_id."""
    path = Path(source).expanduser()
    folder = path.parent if path.is_file() else path
    return folder if (folder / name).exists() else hub_id


@torch.no_grad()
def image_reward(model, images, prompts):
    """ImageReward of pairs -> [B] float32, about 0 ± 1 over the pictures it was trained with.

    images: B PIL images, or uint8 [B,3,H,W]. prompts: B strings, cut to 35 tokens. Raises
    ValueError.
    """
    config = clip.ImageConfig(model.image_size)
    pixels = clip.preprocess(images, config)  # [B,3,S,S]
    if isinstance(prompts, str) or len(prompts) != len(pixels):
        raise ValueError(f"every picture needs its prompt: {len(pixels)} pictures, {prompts!r:.80}")
    encodings = model.tokenizer.encode_batch(list(prompts))
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings]).bool()
    device = model.visual_encoder.cls_token.device
    return model(pixels.to(device), ids.to(device), mask.to(device))


# --------------------------------------------------------------------------------------------------
# HPSv2.1


def open_clip_views(model):
    """Views of a clip.CLIP by the names of open_clip, in which HPSv2.1 is published."""
    table = (
        (r"^layers\.", "transformer.resblocks."),
        (r"\.layer_norm([12])\.", r".ln_\1."),
        (r"\.qkv_proj\.", ".attn.in_proj_"),
        (r"\.out_proj\.", ".attn.out_proj."),
        (r"\.fc1\.", ".mlp.c_fc."),
        (r"\.fc2\.", ".mlp.c_proj."),
        (r"^position_embedding\.weight", "positional_embedding"),
        (r"^patch_embedding\.", "conv1."),
        (r"^pre_layrnorm\.", "ln_pre."),
        (r"^post_layernorm\.", "ln_post."),
        (r"^final_layer_norm\.", "ln_final."),
        (r"^text_projection\.weight", "text_projection"),
        (r"^visual_projection\.weight", "proj"))
    text = weights.renamed(weights.named_views(model.text), table)
    image = weights.renamed(weights.named_views(model.vision), [*table, (r"^", "visual.")])
    views = {"logit_scale": [model.logit_scale], **text, **image}
    for name in ("text_projection", "visual.proj"):  # open_clip multiplies by them from the right
        views[name] = [views[name][0].T]
    return views


def load_hps(source, device="cpu", text=clip.PICKSCORE_TEXT, vision=clip.PICKSCORE_VISION):
    """HPSv2.1 from a hub id, a folder with HPS_v2.1_compressed.pt or .safetensors, or such a file.

    Its tokenizer is that of the CLIP it began from, as PickScore's, or one beside the file. Raises
    UserError.
    """
    path, entries = weights.find_tensors(source, HPS_FILE)
    home = beside(source, "tokenizer_config.json", clip.PICKSCORE_PROCESSOR)
    processor = clip.Processor.from_pretrained(home, text, vision)
    make = functools.partial(clip.CLIP, text, vision, processor)
    return weights.build(make, open_clip_views, entries, path, device, torch.float32)


def files_of_hps(source):
    """What `load_hps` reads, for hub.fetch."""
    home = beside(source, "tokenizer_config.json", clip.PICKSCORE_PROCESSOR)
    return [(source, [HPS_FILE]), (home, ["*.txt", "*.json"])]


@torch.no_grad()
def hps_score(model, images, prompts):
    """HPSv2.1 of pairs -> [B] float32, a cosine, about 0.15 to 0.35.

    As the package hpsv2 gives it; its tables show a hundred times that. images, prompts: those of
    `image_reward`, but prompts are cut to 77 tokens. Raises ValueError.
    """
    pixels = letterbox(images, model.processor.image)
    embedded = model.embed_images(pixels.to(model.vision.class_embedding))  # [B,P]
    return clip.cosines(model, embedded, prompts)


def letterbox(images, config):
    """Whole pictures as hpsv2 prepares them: [B,3,S,S] float32 on the CPU.

    The longer side becomes S, black bars fill the rest. images: those of clip.preprocess.
    """
    side = config.size
    squares = []
    for image in clip.to_pil(images):
        pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)[None] / 255  # [1,3,H,W]
        scale = side / max(image.size)
        height, width = (max(1, round(length * scale)) for length in pixels.shape[2:])
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
        top = (side - height) // 2
        left = (side - width) // 2
        bars = (left, side - width - left, top, side - height - top)
        squares.append(F.pad(pixels, bars))
    return clip.normalised(torch.cat(squares), config)


# --------------------------------------------------------------------------------------------------
# From a pickle to safetensors


def convert(pickle, out):
    """Write the tensors of a pickle, under the names they have, as safetensors."""
    tensors = weights.read_tensors(pickle)
    if not tensors or out.suffix != ".safetensors":
        raise UserError(f"{pickle} to {out}: expected a pickle of named tensors, which has "
                        f"{len(tensors)}, and a file that ends in .safetensors")
    weights.save(out, {name: [tensor] for name, tensor in tensors.items()})
    print(out)


def main(argv=None):
    parser = cli.parser(__doc__, prog="python -m baselines.image_reward")
    parser.add_argument("command", choices=("convert",), help=argparse.SUPPRESS)
    parser.add_argument("pickle", type=Path, help="file of torch.save, of any model")
    parser.add_argument("out", type=Path, help="file to write, .safetensors")
    args = parser.parse_args(argv)
    return cli.run_program(lambda: convert(args.pickle, args.out))


if __name__ == "__main__":
    sys.exit(main())
