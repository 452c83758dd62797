"""A group of answers to one picture and question: `QwenVL.generate` against transformers' `generate`.

    python -m bench.judge_generate  # about a minute on 2 idle cores, 3 GB
    python -m bench.judge_generate --width 64 --layers 2 --vocabulary 1000 --new-tokens 8 --group 2 --image 112  # seconds

Both read the same folder, a random Qwen2.5-VL that transformers writes (by default 192 million parameters: width 512, 8
layers, 8 heads, 2 key-value heads, and a vision tower of 8 blocks), and answer without a stop token, sampling at
temperature 1. First their greedy tokens are compared; then they take turns in one process. Each is timed for one new token
(the prefill: picture and prompt) and for all of them; what lies between is the decode. The shares are of two rates
measured in the same run: the prefill's, by its FLOP, of that of one large matrix product; the decode's, by the bytes of the
weights (blocks and head, once a step for the whole group), of that of reading memory. float32, on the CPU. The machine must
be idle: threads that wait for a core slow both many times over, and not alike.
"""

import functools
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import qwen_vl
from bench import timing
from parts import chat, weights
from parts.files import write_json

SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def write_model(folder, width, layers, vocabulary):
    """A random Qwen2.5-VL with heads of 64 channels; the last ids of its vocabulary are SPECIAL."""
    ids = {token: vocabulary - len(SPECIAL) + i for i, token in enumerate(SPECIAL)}
    heads = width // 64
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config={"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
                     "num_key_value_heads": heads // 4 if heads % 4 == 0 else heads, "intermediate_size": 3 * width,
                     "vocab_size": vocabulary, "rms_norm_eps": 1e-6, "bos_token_id": None, "eos_token_id": None,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}},
        vision_config={"depth": 8, "hidden_size": 320, "intermediate_size": 852, "num_heads": 4, "out_hidden_size": width,
                       "fullatt_block_indexes": [1, 3, 5, 7], "window_size": 112, "patch_size": 14},
        tie_word_embeddings=False, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"]))
    for p in model.parameters():  # lively: at transformers' small initial values every token is nearly as likely
        p.data.normal_(0, p[0].numel() ** -0.5) if p.dim() > 1 else p.data.normal_(0.8, 0.2)
    model.save_pretrained(folder)
    Tokenizer(models.WordLevel(ids, "<|endoftext|>")).save(str(folder / "tokenizer.json"))
    write_json(folder / "preprocessor_config.json", {"patch_size": 14})


def make_prompt(config, side, text_tokens):
    """A square picture of `side` pixels, as noise, among `text_tokens` tokens of text."""
    generator = torch.Generator().manual_seed(1)
    grid = (1, side // config.patch, side // config.patch)
    pixels = torch.randn(grid[1] * grid[2], 3 * config.frames * config.patch**2, generator=generator)
    image = torch.full((len(pixels) // config.merge**2,), config.image_token)
    start, end = (torch.tensor([config.image_token + i]) for i in (-2, -1))  # <|vision_start|>, <|vision_end|>
    before, after = torch.randint(config.vocab - len(SPECIAL), (text_tokens - 2,), generator=generator).split(
        [14, text_tokens - 16])
    return chat.Prompt(torch.cat([before, start, image, end, after]), pixels, (grid,))


def ours_tokens(model, prompt, n, new_tokens, sample=True):
    answers = model.generate([prompt], n=n, max_new_tokens=new_tokens, temperature=float(sample),
                             generator=torch.Generator().manual_seed(0))[0]
    return torch.stack([answer.tokens for answer in answers])


def theirs_tokens(model, prompt, n, new_tokens, sample=True):
    torch.manual_seed(0)
    ids = prompt.ids[None]
    kinds = (ids == model.config.image_token_id).int()  # 1 at the picture's tokens
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=prompt.pixels,
                         image_grid_thw=torch.tensor(prompt.grids), mm_token_type_ids=kinds,
                         num_return_sequences=n, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0, **settings)
    return out[:, ids.shape[1]:]


def weight_bytes(model):
    """What every step of the decode must read: the blocks and the head."""
    return sum(t.nbytes for t in (*model.model.layers.parameters(), model.head_weight))


def make_rows(model, prompt, args, seconds):
    """(rows, note): the whole group, its prefill and its decode. seconds: {(path, new tokens): [seconds]}."""
    whole, prefill = ([seconds[name, n] for name in ("transformers", "ours")] for n in (args.new_tokens, 1))
    decode = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(whole, prefill, strict=True)]
    flop, read = timing.flop_of(lambda: ours_tokens(model, prompt, args.group, 1)), weight_bytes(model)
    matmul, memory = timing.matmul_rate(), timing.read_rate()
    shares = ("", timing.share(flop, prefill[1], matmul, "the matmul rate"),
              timing.share(read * (args.new_tokens - 1), decode[1], memory, "memory bandwidth"))
    size = (f"{args.new_tokens} tokens each, {args.image}×{args.image} pixels, {len(prompt.ids)} prompt tokens, "
            f"{weights.count_parameters(model) / 1e6:,.0f} M parameters")
    peer, rows = f"transformers {transformers.__version__}", []
    for part, pair, share in zip(("group of", "prefill for", "decode of"), (whole, prefill, decode), shares, strict=True):
        rows.append(timing.row(f"{part} {args.group} answers, {size}", peer, *pair, share=share))
    note = (f"Greedy tokens of the two are equal ({args.new_tokens} of {args.new_tokens}). Prefill {flop / 1e9:,.0f} GFLOP, "
            f"matmul rate {matmul / 1e9:,.0f} GFLOP/s; weights {read / 1e6:,.0f} MB a step, memory {memory / 1e9:.1f} GB/s.")
    return rows, note


def checked(parser, argv):
    args = parser.parse_args(argv)
    if args.width < 64 or args.width % 64 or args.image < 28 or args.image % 28:
        parser.error("--width must be a multiple of 64 and --image one of 28")
    if min(args.layers, args.group, args.repeats, args.threads) < 1 or args.new_tokens < 2:
        parser.error("every size must be at least 1, and --new-tokens 2")
    if args.vocabulary < 100 or args.text_tokens < 20:
        parser.error("--vocabulary must be at least 100, --text-tokens 20")
    return args


def main(argv=None):
    parser = timing.make_parser(__doc__, repeats=3)
    for name, default, about in (
            ("width", 512, "of the text, a multiple of 64"), ("layers", 8, "of the text"),
            ("vocabulary", 152_064, "tokens; the default is Qwen2.5's"), ("image", 504, "side in pixels, a multiple of 28"),
            ("text-tokens", 170, "beside the picture's"), ("group", 8, "answers"), ("new-tokens", 64, "of each answer")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{about} (default: %(default)s)")
    args = checked(parser, argv)
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.width, args.layers, args.vocabulary)
        ours = qwen_vl.QwenVL.from_pretrained(folder)
        theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    ours.processor.stop = (-1,)  # no answer ends by itself
    theirs.eval()
    prompt = make_prompt(ours.config, args.image, args.text_tokens)
    if args.profile:
        return timing.profile(lambda: ours_tokens(ours, prompt, args.group, args.new_tokens))
    greedy = [tokens(model, prompt, 1, args.new_tokens, sample=False)
              for tokens, model in ((theirs_tokens, theirs), (ours_tokens, ours))]
    if not torch.equal(*greedy):
        print("the greedy tokens of the two differ; their times cannot be compared", file=sys.stderr)
        return 1

    def run(tokens, model, n):
        assert tokens(model, prompt, args.group, n).shape == (args.group, n)

    paths = {(name, n): functools.partial(run, tokens, model, n) for n in (1, args.new_tokens)
             for name, tokens, model in (("transformers", theirs_tokens, theirs), ("ours", ours_tokens, ours))}
    rows, note = make_rows(ours, prompt, args, timing.in_turn(paths, args.repeats))
    if timing.usual(parser, args):
        rows[0].asked, rows[2].asked = "ratio ≥ 4", "ratio ≥ 3"
    return timing.show(rows, args, note)


if __name__ == "__main__":
    sys.exit(main())
