"""EmoEdit's adapter against transformers' Q-Former; what reaches the editor; words, sizes and bad input."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from baselines import emoedit
from baselines.case import Case
from parts import clip, weights
from parts.cli import UserError
from tests.test_baseline_image_reward import lively
from tests.test_baseline_unet import difference, make_pipeline, source_picture
from tests.test_clip import error, noise, random_clip

SMALL = emoedit.QFormerConfig(width=24, layers=3, heads=3, mlp=40, queries=5, image_width=24)


class Published(torch.nn.Module):
    """The adapter as its authors put it together from transformers' Q-Former."""

    def __init__(self, c):
        super().__init__()
        self.model = Blip2QFormerModel(Blip2QFormerConfig(
            hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads, intermediate_size=c.mlp,
            encoder_hidden_size=c.image_width, attention_probs_dropout_prob=0.0))
        self.query_tokens = torch.nn.Parameter(torch.zeros(1, c.queries, c.width))
        self.layer_norm = torch.nn.LayerNorm(c.width, eps=1e-12)

    def forward(self, image, word):
        queries = torch.cat([self.query_tokens.expand(len(word), -1, -1), word[:, None]], dim=1)
        states = self.model(query_embeds=queries, encoder_hidden_states=image[:, None],
                            encoder_attention_mask=torch.ones(len(image), 1)).last_hidden_state
        return self.layer_norm(states)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder with a random Q-Former.pth, the module it is of)."""
    folder = tmp_path_factory.mktemp("emoedit")
    theirs = lively(Published(SMALL))
    torch.save(theirs.state_dict(), folder / "Q-Former.pth")
    return folder, theirs


@torch.no_grad()
def test_the_adapter_equals_the_q_former_of_transformers(written):
    folder, theirs = written
    ours = emoedit.QFormer.from_pretrained(folder, config=SMALL)
    generator = torch.Generator().manual_seed(1)
    image, word = (torch.randn(4, 24, generator=generator) for _ in range(2))
    expected = theirs(image, word)
    assert expected.shape == (4, 6, 24) and error(ours(image, word), expected) < 1e-4
    for other in (ours(image[:1].expand(4, -1), word), ours(image, word[:1].expand(4, -1))):
        assert error(other, expected) > 0.02  # both count


def test_full_size_names_shapes_and_count_are_those_of_the_published_adapter():
    with torch.device("meta"):
        ours, theirs = emoedit.QFormer(), Published(emoedit.QFormerConfig())
    assert weights.shapes(ours.views()) == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert weights.count_parameters(ours) == weights.count_parameters(theirs)


class Editor:
    """Stands for InstructPix2Pix: keeps what it was asked, and hands the sources back."""

    def encode(self, prompts):
        return torch.zeros(len(prompts), 6, 24)

    def draw_embedded(self, contexts, sources, seeds, size, steps, guidance, noise, progress):
        self.asked = contexts, seeds, size, steps, guidance, noise
        return torch.stack([torch.from_numpy(np.array(source)).permute(2, 0, 1) for source in sources])


@pytest.fixture(scope="module")
def parts(written, tmp_path_factory):
    """(adapter, clip.CLIP, transformers' CLIPModel and processor of the same weights)."""
    folder, model, processor = random_clip(tmp_path_factory.mktemp("clip"))
    return emoedit.QFormer.from_pretrained(written[0], config=SMALL), clip.CLIP.from_pretrained(folder), model, processor


@torch.no_grad()
def test_the_editor_gets_the_published_embeddings_and_settings(written, parts):
    adapter, encoder, theirs, processor = parts
    method = emoedit.EmoEdit(adapter, encoder, Editor())
    sources = [noise((64, 64)), noise((64, 64), seed=1)]
    cases = [Case("a lake", 7, 3, "awe", sources[0]), Case("a tree", 2.5, 6, None, sources[1])]
    pixels = method.draw(cases, [4, 5], noise="of another")
    inputs = processor(text=["awe", "anger"], return_tensors="pt", padding="max_length", max_length=77)
    looks = CLIPImageProcessorPil(size=32, crop_size=32, image_mean=(0.4, 0.5, 0.6))(sources, return_tensors="pt")
    embedded = theirs(input_ids=inputs.input_ids, pixel_values=looks.pixel_values)
    (context, empty), *rest = method.editor.asked
    assert error(context, written[1](embedded.image_embeds, embedded.text_embeds)) < 1e-4
    assert empty.shape == context.shape and rest == [[4, 5], 512, 100, (7.5, 1.5), "of another"]
    assert np.array_equal(pixels[1].permute(1, 2, 0), np.array(sources[1]))


def test_settings_may_be_others_and_a_wide_source_stays_wide(parts):
    method = emoedit.EmoEdit(*parts[:2], Editor())
    wide = Image.new("RGB", (300, 100), "red")
    pixels = method.draw([Case("a lake", 5, 5, "fear", wide)], [0], size=64, steps=7, guidance=1.0)
    assert method.editor.asked[2:5] == (64, 7, (1.0, 1.5)) and pixels.shape == (1, 3, 100, 300)


@torch.no_grad()
def test_a_picture_is_changed_as_by_the_published_adapter_in_diffusers_pipeline(tmp_path, monkeypatch):
    config = emoedit.QFormerConfig(width=32, layers=2, heads=4, mlp=40, queries=76, image_width=32)
    adapter = lively(Published(config))
    torch.save(adapter.state_dict(), tmp_path / "Q-Former.pth")
    _, encoder, processor = random_clip(tmp_path / "clip", projection=32)
    pipeline = make_pipeline("pix2pix")
    pipeline.save_pretrained(tmp_path / "editor")
    source = source_picture()
    inputs = processor(text="fear", images=source, return_tensors="pt", padding="max_length")
    seen = encoder(input_ids=inputs.input_ids, pixel_values=inputs.pixel_values)
    expected = pipeline(image=source, prompt_embeds=adapter(seen.image_embeds, seen.text_embeds), num_inference_steps=4,
                        guidance_scale=7.5, image_guidance_scale=1.5, generator=torch.Generator().manual_seed(3),
                        output_type="np").images
    monkeypatch.setattr(emoedit.QFormer, "from_pretrained", partial(emoedit.QFormer.from_pretrained, config=config))
    method = emoedit.EmoEdit.from_pretrained(tmp_path, editor=tmp_path / "editor", encoder=tmp_path / "clip")
    pixels = method.draw([Case("a lake", 5, 5, "fear", source)], [3], size=64, steps=4)
    assert difference(pixels, expected) <= 2


@pytest.mark.parametrize("case, message", [
    (Case("a lake", 5, 5, "joy", noise((8, 8))), "EmoEdit knows amusement, awe, .* not 'joy'"),
    (Case("a lake", 5, 5, "awe"), "give every case a source picture")])
def test_a_case_that_cannot_be_drawn_is_told(parts, case, message):
    with pytest.raises(UserError, match=message):
        emoedit.EmoEdit(*parts[:2], Editor()).draw([case], [0])


def test_another_adapter_and_another_clip_are_one_line(written, parts, tmp_path):
    with pytest.raises(UserError, match="no Q-Former.pth in it"):
        emoedit.QFormer.from_pretrained(tmp_path)
    tensors = written[1].state_dict() | {"model.encoder.layer.1.crossattention.output.dense.bias": torch.zeros(24)}
    tensors.pop("query_tokens")
    torch.save(tensors, tmp_path / "Q-Former.pth")
    with pytest.raises(UserError, match=r"missing query_tokens \[1, 5, 24\]; unexpected 'model.encoder.layer.1.cross"):
        emoedit.QFormer.from_pretrained(tmp_path, config=SMALL)
    with torch.device("meta"):
        full = emoedit.QFormer()
    with pytest.raises(UserError, match="reads embeddings of 768 numbers and this CLIP makes 24"):
        emoedit.EmoEdit(full, parts[1], Editor())
