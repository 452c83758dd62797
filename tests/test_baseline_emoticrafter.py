"""EmotiCrafter against a network of transformers' GPT-2 pieces, and its pictures against diffusers' SDXL; bad files."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention

from baselines import emoticrafter
from baselines.case import Case
from parts import weights
from parts.cli import UserError
from tests.test_baseline_unet import difference, make_pipeline, shake

WIDTH, CONTEXT, POSITIONS = 48, 80, 90  # the second is that of the small SDXL


class ReferenceBlock(nn.Module):
    """GPT-2's block with three attentions of transformers', each of the kind that reads other tokens."""

    def __init__(self, c):
        super().__init__()
        self.attn, self.attn_a, self.attn_v = (GPT2Attention(c, is_cross_attention=True) for _ in range(3))
        self.ln_1, self.ln_a, self.ln_v, self.ln_2 = (nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon) for _ in range(4))
        self.mlp = GPT2MLP(4 * c.n_embd, c)

    def forward(self, x, arousal, valence):
        h = self.ln_1(x)
        x = self.ln_a(x + self.attn(h, encoder_hidden_states=h)[0])
        x = self.ln_v(x + self.attn_a(x, encoder_hidden_states=arousal)[0])
        x = x + self.attn_v(x, encoder_hidden_states=valence)[0]
        return x + self.mlp(self.ln_2(x))


class Reference(nn.Module):
    def __init__(self, layers, width, context, positions, hidden=256, tokens=16, vocab=50):
        super().__init__()
        c = GPT2Config(n_embd=width, n_layer=layers, n_head=12, n_positions=positions, vocab_size=vocab)
        c._attn_implementation = "eager"
        self.width = width
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(positions, width)
        self.xl_feature2gpt_feature = nn.Linear(context, width, bias=False)
        self.gpt_feature2xl_feature = nn.Linear(width, context, bias=False)
        self.ln_xl_feature, self.ln_f = nn.LayerNorm(context), nn.LayerNorm(width)
        self.a_f, self.v_f = (nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, tokens * width))
                              for _ in range(2))
        self.attn_proj = nn.Linear(width, width, bias=False)
        self.h = nn.ModuleList(ReferenceBlock(c) for _ in range(layers))

    def forward(self, context, valence, arousal):
        a, v = (self.attn_proj(f(n[:, None]).view(len(n), -1, self.width)) for f, n in
                ((self.a_f, arousal), (self.v_f, valence)))
        x = self.xl_feature2gpt_feature(context) + self.wpe(torch.arange(context.shape[1]))
        for block in self.h:
            x = block(x, a, v)
        return context + self.ln_xl_feature(self.gpt_feature2xl_feature(self.ln_f(x)))

    def published(self):
        """Its tensors as the authors' file has them: queries are the first third of a c_attn, keys and values c_z."""
        tensors = {}
        for name, tensor in self.state_dict().items():
            if ".attn" in name and ".c_attn." in name:
                name = name.replace("c_attn", "c_z")
            elif ".q_attn." in name:
                name = name.replace("q_attn", "c_attn")
                tensor = torch.cat([tensor, torch.randn_like(tensor), torch.randn_like(tensor)], dim=-1)
            tensors[f"module.{name}"] = tensor
        return tensors


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(the reference, its tensors in the authors' pickle)."""
    reference = Reference(3, WIDTH, CONTEXT, POSITIONS)
    shake(reference, torch.Generator().manual_seed(4))
    file = tmp_path_factory.mktemp("network") / "best_model.pth"
    torch.save(reference.published(), file)
    return reference, file


@pytest.fixture(scope="module")
def converted(published):
    file = published[1].with_name("converted.safetensors")
    assert emoticrafter.main(["convert", str(published[1]), str(file)]) == 0
    return file


# ---------------------------------------------------------------------------------------------------------------------
# The network


@torch.no_grad()
def test_the_network_equals_one_of_gpt2s_pieces(published):
    reference, file = published
    context, valence, arousal = torch.randn(2, 77, CONTEXT), torch.tensor([-3.0, 1.2]), torch.tensor([0.5, 3.0])
    change = reference(context, valence, arousal) - context
    network = emoticrafter.load_network(file)
    out = network(context, valence, arousal) - context
    assert float((out - change).norm() / change.norm()) < 1e-4
    for swapped in ((arousal, valence), (valence, -arousal), (-valence, arousal)):
        assert float((network(context, *swapped) - context - change).norm() / change.norm()) > 0.05


def test_the_converted_file_is_the_same_network_without_the_table_of_words(published, converted):
    networks = [emoticrafter.load_network(file) for file in (published[1], converted)]
    assert networks[0].config == networks[1].config == emoticrafter.NetworkConfig(3, WIDTH, CONTEXT, POSITIONS)
    for name, tensor in networks[0].state_dict().items():
        assert torch.equal(tensor, networks[1].state_dict()[name]), name
    names = {f"module.{name}" for name in load_file(converted)}
    assert names == set(published[0].published()) - {"module.wte.weight"}


def test_full_size_names_shapes_and_count():
    with torch.device("meta"):
        ours, theirs = emoticrafter.Network(), Reference(12, 768, 2048, 1024, vocab=50_257)
        expected = {name.removeprefix("module."): tuple(t.shape) for name, t in theirs.published().items()}
    assert expected.pop("wte.weight") == (50_257, 768)
    assert weights.shapes(ours.views()) == expected
    assert weights.count_parameters(ours) == 195_155_456


# ---------------------------------------------------------------------------------------------------------------------
# The method


@torch.no_grad()
def test_it_draws_what_diffusers_sdxl_draws_of_the_changed_embeddings(published, converted, tmp_path, capsys):
    theirs = make_pipeline("sdxl")
    theirs.save_pretrained(tmp_path)
    ours = emoticrafter.EmotiCrafter.from_pretrained(converted, sdxl=tmp_path)
    assert (ours.steps, ours.guidance, ours.size) == (25, 7.5, 1024)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    prompts = ["a lone tree over the lake at night", "a dark horse"]
    context, _, pooled, _ = theirs.encode_prompt(prompts, do_classifier_free_guidance=True)
    # 9 and 1 are 3 and -3, 5 is 0
    context = published[0](context, torch.tensor([3.0, 0.0]), torch.tensor([-3.0, 1.5]))
    expected = theirs(prompt_embeds=context, pooled_prompt_embeds=pooled, latents=noise.clone(), num_inference_steps=4,
                      guidance_scale=7.5, height=64, width=64, output_type="np").images
    cases = [Case(prompts[0], 9, 1), Case(prompts[1], 5, 7)]
    out = ours.draw(cases, [0, 1], 64, 4, noise=noise)
    assert difference(out, expected) <= 2
    other = ours.draw([Case(prompts[0], 2, 1)], [0], 64, 4, noise=noise[:1])
    assert (out[:1].int() - other.int()).abs().max() > 4  # V of 9 and of 2 are different pictures
    (tmp_path / "network").mkdir()
    (tmp_path / "network" / "model.safetensors").write_bytes(converted.read_bytes())
    emoticrafter.EmotiCrafter.from_pretrained(tmp_path / "network", sdxl=tmp_path)
    assert "pickle" not in capsys.readouterr().err
    emoticrafter.EmotiCrafter.from_pretrained(published[1], sdxl=tmp_path)
    assert f"emoticrafter convert {published[1]} OUT.safetensors` makes a plain file" in capsys.readouterr().err
    narrow = tmp_path / "narrow.safetensors"
    save_file(Reference(1, WIDTH, 72, POSITIONS).published(), narrow)
    with pytest.raises(UserError, match="72 numbers, those of .* have 80"):
        emoticrafter.EmotiCrafter.from_pretrained(narrow, sdxl=tmp_path)


class Code:
    def __reduce__(self):
        return (print, ("this must not be run",))


def test_foreign_damaged_and_dangerous_files_are_refused_in_one_line(published, tmp_path, capsys):
    tensors = published[0].published()
    short = {name: tensor for name, tensor in tensors.items() if name != "module.h.1.attn_v.c_z.bias"}
    for name, content, message in (
            ("code", {"module.wpe.weight": Code()}, "not a file of plain tensors"),
            ("list", [torch.ones(1)], "not EmotiCrafter's network"),
            ("other", {"weight": torch.ones(1)}, "not EmotiCrafter's network"),
            ("short", short, r"missing h.1.attn_v.c_z.bias \[96\]"),
            ("variant", tensors | {"module.ff.weight": torch.ones(CONTEXT, CONTEXT)}, "unexpected 'ff.weight'"),
            ("lora", {"module.h.0.attn.c_attn.lora_A.weight": torch.ones(1)}, "not EmotiCrafter's network")):
        file = tmp_path / f"{name}.pth"
        torch.save(content, file)
        with pytest.raises(UserError, match=message) as told:
            emoticrafter.load_network(file)
        assert "\n" not in str(told.value) and str(file) in str(told.value)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Code(), 2))
    (tmp_path / "half.pth").write_bytes(published[1].read_bytes()[:5000])
    for name in ("bare", "half", "absent"):
        assert emoticrafter.main(["convert", str(tmp_path / f"{name}.pth"), str(tmp_path / "out.safetensors")]) == 2
    assert emoticrafter.main(["convert", str(published[1]), str(tmp_path / "out.pth")]) == 2
    said = capsys.readouterr()
    assert said.err.count("error: ") == said.err.count("\n") == 4 and not said.out
    assert not list(tmp_path.glob("out*"))
