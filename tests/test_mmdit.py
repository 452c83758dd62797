"""The MMDiT against diffusers' SD3Transformer2DModel, full-size names and counts, file layouts, bad input."""

import functools
from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

import mmdit
from parts import layouts, lora, ops, weights
from tiny.initialise import initialise

SMALL = mmdit.MMDiTConfig(depth=3, heads=4, head_dim=16, dual_blocks=(0, 1), context_dim=40, pooled_dim=24,
                          positions=12, sample_size=16)


def reference(c, device="cpu"):
    with torch.device(device):
        return SD3Transformer2DModel(
            sample_size=c.sample_size, patch_size=c.patch, in_channels=c.channels, out_channels=c.channels,
            num_layers=c.depth, num_attention_heads=c.heads, attention_head_dim=c.head_dim,
            joint_attention_dim=c.context_dim, caption_projection_dim=c.width, pooled_projection_dim=c.pooled_dim,
            pos_embed_max_size=c.positions, dual_attention_layers=c.dual_blocks,
            qk_norm="rms_norm" if c.qk_norm else None).eval()


def shake(model, seed=0):
    """Random weights everywhere: norms away from one, biases away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * (0.1 if p.dim() > 1 else 0.5) + (p.dim() == 1) * 0.3)
    return model


def inputs(c, batch=2, height=8, width=12, length=7):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(batch, c.channels, height, width, generator=g), torch.rand(batch, generator=g) * 1000,
            torch.randn(batch, length, c.context_dim, generator=g), torch.randn(batch, c.pooled_dim, generator=g))


def stability_file(model):
    return {name: part.detach().clone() for name, (part,) in weights.named_views(model).items()}


def relative_error(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL, replace(SMALL, dual_blocks=()), replace(SMALL, qk_norm=False)],
                         ids=["medium", "large", "sd3"])
def test_the_velocity_equals_diffusers(config, tmp_path):
    theirs = shake(reference(config))
    theirs.save_pretrained(tmp_path / "transformer")
    ours = mmdit.MMDiT.from_pretrained(tmp_path)
    assert ours.config == config
    latents, timestep, context, pooled = inputs(config)
    expected = theirs(latents, context, pooled, timestep).sample
    assert relative_error(ours(latents, timestep, context, pooled), expected) < 1e-4


@pytest.mark.one_form
@pytest.mark.parametrize("config, count", [(mmdit.SD35_MEDIUM, 2_243_171_520), (mmdit.SD35_LARGE, 8_056_627_520)],
                         ids=["medium", "large"])
def test_full_size_names_shapes_and_counts_equal_the_published_models(config, count):
    with torch.device("meta"):
        ours = mmdit.MMDiT(config)
    assert weights.count_parameters(ours) == count
    expected = {name: tuple(t.shape) for name, t in reference(config, "meta").state_dict().items()}
    found = weights.shapes(layouts.mmdit_views(ours))
    assert found == expected


@pytest.mark.one_form
def test_stabilitys_names_mean_what_diffusers_converter_takes_them_for():
    """The single file's layout, read by diffusers' own converter, gives the tensors that our diffusers layout has."""
    model = shake(mmdit.MMDiT(SMALL))
    model.pos_embed.normal_()
    converted = convert_sd3_transformer_checkpoint_to_diffusers(stability_file(model))
    views = layouts.mmdit_views(model)
    assert set(converted) == set(views)
    for name, parts in views.items():
        assert torch.equal(converted[name], torch.cat([p.detach() for p in parts])), name


@pytest.mark.one_form
@torch.no_grad()
def test_saving_and_the_single_file_give_the_same_model(tmp_path):
    theirs = shake(reference(SMALL))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = mmdit.MMDiT.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in theirs.state_dict().items())
    file = tmp_path / "sd3.5_medium.safetensors"
    save_file({f"model.diffusion_model.{n}": t for n, t in stability_file(ours).items()}, file)
    single = mmdit.MMDiT.from_pretrained(file)
    assert replace(single.config, sample_size=SMALL.sample_size) == SMALL
    assert all(torch.equal(t, single.state_dict()[n]) for n, t in ours.state_dict().items())


@pytest.mark.one_form
def test_shards_are_read_like_one_file(tmp_path):
    theirs = shake(reference(SMALL))
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = (mmdit.MMDiT.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "shards"))
    assert all(torch.equal(whole[name], shards[name]) for name in whole)


@torch.no_grad()
def test_a_new_model_starts_at_zero_velocity_with_diffusers_position_table():
    with torch.device("meta"):
        model = mmdit.MMDiT(SMALL)
    model = initialise(model.to_empty(device="cpu"))
    assert torch.equal(model(*inputs(SMALL)), torch.zeros(2, 16, 8, 12))
    table = reference(SMALL).pos_embed.pos_embed
    assert (model.pos_embed - table).abs().max() < 1e-5


def test_gradients_flow_to_every_parameter():
    model = shake(mmdit.MMDiT(SMALL))
    model.pos_embed.normal_()
    model(*inputs(SMALL)).square().mean().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # the last block's text queries are computed for nobody: their rows of the bias get no gradient, nor does their norm
    assert idle == ["joint_blocks.2.context_block.attn.ln_q.weight"]


@pytest.mark.parametrize("adapted", [False, True])
def test_checkpointing_changes_neither_output_nor_gradients(adapted):
    torch.manual_seed(0)
    model = mmdit.MMDiT(SMALL)
    model.pos_embed.normal_()
    if adapted:
        lora.add_lora(model, model.lora_targets(), 4, 8)
    shake(model)
    outputs, gradients, recomputed = [], [], []
    for block in model.joint_blocks:
        block.register_forward_pre_hook(lambda *_: recomputed.append(model.checkpointing))
    for model.checkpointing in (False, True):
        model.zero_grad()
        outputs.append(model(*inputs(SMALL)))
        outputs[-1].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert recomputed == [False] * 3 + [True] * 6  # each block starts twice
    assert torch.equal(*outputs)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())
    with torch.no_grad():
        assert torch.equal(model(*inputs(SMALL)), outputs[0])
    assert len(recomputed) == 12  # without gradients nothing is run again


@pytest.mark.one_form
@torch.no_grad()
def test_compiled_blocks_are_whole_graphs_and_give_the_same(monkeypatch):
    model, texts = shake(mmdit.MMDiT(SMALL)), []
    model.pos_embed.normal_()
    expected = model(*inputs(SMALL))

    def count(graph, example):  # in place of a compiler
        texts.append(graph)
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=count,
                                                                            fullgraph=True))
    torch._dynamo.reset()
    for block in model.joint_blocks:
        block.compile()
    with ops.fast_linears(model):  # which leaves compiled modules alone
        out = model(*inputs(SMALL))
    torch._dynamo.reset()
    assert relative_error(out, expected) < 1e-6
    assert len(texts) == 2  # of blocks with dual attention, and of the last


@pytest.mark.one_form
def test_latents_that_do_not_fit_are_refused():
    model = mmdit.MMDiT(SMALL)
    for size in ((7, 8), (8, 26)):
        with pytest.raises(ValueError, match="multiples of 2"):
            model(torch.zeros(1, 16, *size), torch.zeros(1), torch.zeros(1, 7, 40), torch.zeros(1, 24))
