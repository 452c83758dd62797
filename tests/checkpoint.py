"""A small random StableDiffusion3Pipeline, written by the reference libraries, for tests to read."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tiny.pretrain import learn_bpe

T5 = {"d_model": 96, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64, "vocab_size": 384,
      "feed_forward_proj": "gated-gelu"}
WORDS = "a the lake tree storm storms horse horses cafe lone over in at night morning bright dark calm wild".split()


def t5_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(["<pad>", "</s>", "<unk>", *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                   model_max_length=512)


def make_pipeline(seed=0):
    torch.manual_seed(seed)
    vocab, merges = learn_bpe([" ".join(WORDS)] * 3, 700)
    sizes = {"vocab_size": len(vocab), "num_hidden_layers": 3, "num_attention_heads": 4, "eos_token_id": 2}
    clips = [CLIPTextModelWithProjection(CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, hidden_act=activation, projection_dim=width, **sizes))
        for width, activation in ((32, "quick_gelu"), (48, "gelu"))]
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16, num_layers=3, num_attention_heads=4, attention_head_dim=16, joint_attention_dim=96,
            caption_projection_dim=64, pooled_projection_dim=80, pos_embed_max_size=24, out_channels=16,
            dual_attention_layers=(0, 1), qk_norm="rms_norm"),
        vae=AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[32, 32, 64, 64], layers_per_block=1, latent_channels=16, norm_num_groups=32,
            scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clips[0], text_encoder_2=clips[1], text_encoder_3=T5EncoderModel(T5Config(**T5)),
        tokenizer=CLIPTokenizer(vocab, merges, model_max_length=77),
        tokenizer_2=CLIPTokenizer(vocab, merges, pad_token="!", model_max_length=77),
        tokenizer_3=t5_tokenizer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    generator = torch.Generator().manual_seed(seed)
    for name in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        for p in getattr(pipeline, name).eval().parameters():  # lively weights: an untrained model hides mistakes
            p.data.copy_(torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3)
                         + (p.dim() == 1) * 0.5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
