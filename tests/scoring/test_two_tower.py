"""Adapters give the embeddings and logits that each library's own model gives.

Real open_clip and transformers models, tiny and with random weights.
Run: pytest tests/scoring/test_two_tower.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.models import Plain
from torch import Tensor, nn
from torch.nn import functional as F

from jest_stream.scoring.two_tower import embed_in_micro_batches, has_bias, two_tower, unwrap
from jest_stream.types import Embeddings

VISION = {"layers": 2, "width": 32, "head_width": 16, "image_size": 16, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}


def build_clip(**settings: object) -> nn.Module:
    import open_clip

    torch.manual_seed(0)
    return open_clip.CLIP(24, dict(VISION), dict(TEXT), **settings).eval()


def build_siglip() -> nn.Module:
    import open_clip

    torch.manual_seed(0)
    return open_clip.CustomTextCLIP(24, dict(VISION), dict(TEXT), init_logit_bias=-10.0).eval()


def build_nonscalar_siglip() -> nn.Module:
    model = build_siglip()  # open_clip's nonscalar_logit_scale=True, which fully_shard asks for
    model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))
    model.logit_bias = nn.Parameter(model.logit_bias.detach().reshape(1))
    return model


def build_coca() -> nn.Module:
    from open_clip.coca_model import CoCa

    torch.manual_seed(0)
    vision = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    decoder = {**TEXT, "attn_pooler_heads": 2}
    return CoCa(32, decoder, text, vision).eval()  # its decoder needs embed_dim == width


def open_clip_inputs(num_rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(num_rows, 3, 16, 16, generator=generator)
    text = torch.randint(1, 64, (num_rows, 8), generator=generator)
    return image, text


def build_hugging_face(name: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "bos_token_id": 1}
    text |= {"eos_token_id": 2, "pad_token_id": 0}
    if name == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        return transformers.CLIPModel(config).eval()
    config = transformers.SiglipConfig(
        text_config={**text, "projection_size": 32}, vision_config=vision
    )
    return transformers.SiglipModel(config).eval()


def hugging_face_inputs(num_rows: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    image, tokens = open_clip_inputs(num_rows)
    mask = torch.ones_like(tokens)
    mask[:, 6:] = 0
    return {"pixel_values": image}, {"input_ids": tokens, "attention_mask": mask}


def logits(embeddings: Embeddings) -> Tensor:
    product = embeddings.image @ embeddings.text.T
    return embeddings.logit_scale * product + embeddings.logit_bias


def test_a_module_worked_by_hand():
    model = Plain(dimension=2)
    with torch.no_grad():
        model.visual.weight.zero_()
        model.visual.bias.copy_(torch.tensor([3.0, 4.0]))  # unit norm: (0.6, 0.8)
        model.textual.weight.zero_()
        model.textual.bias.copy_(torch.tensor([2.0, 0.0]))  # unit norm: (1, 0)
        model.logit_scale.copy_(torch.tensor(10.0).log())
    got = embed_in_micro_batches(two_tower(model), torch.ones(1, 6), torch.ones(1, 3))
    torch.testing.assert_close(got.image, torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(got.text, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(logits(got), torch.tensor([[6.0]]))
    assert got.logit_bias == 0.0


@pytest.mark.parametrize("build", [build_clip, build_siglip, build_nonscalar_siglip])
def test_logits_equal_those_of_the_open_clip_model(build: Callable[[], nn.Module]):
    model, (image, text) = build(), open_clip_inputs()
    with torch.no_grad():
        expected, _ = model.get_logits(image, text)
        own_image = model.encode_image(image, normalize=True)
    got = embed_in_micro_batches(two_tower(model), image, text)
    torch.testing.assert_close(logits(got), expected)
    torch.testing.assert_close(got.image, own_image)
    assert got.logit_scale.shape == ()


def test_embeddings_equal_those_of_coca():
    model, (image, text) = build_coca(), open_clip_inputs()
    with torch.no_grad():
        expected = model(image, text)
    got = embed_in_micro_batches(two_tower(model), image, text)
    torch.testing.assert_close(got.image, expected["image_features"])
    torch.testing.assert_close(got.text, expected["text_features"])
    torch.testing.assert_close(got.logit_scale, expected["logit_scale"].detach())


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_logits_equal_those_of_the_transformers_model(name: str):
    model, (image, text) = build_hugging_face(name), hugging_face_inputs()
    with torch.no_grad():
        expected = model(**image, **text)
    got = embed_in_micro_batches(two_tower(model), image, text, micro_batch_size=2)
    torch.testing.assert_close(logits(got), expected.logits_per_image)
    torch.testing.assert_close(got.image, expected.image_embeds)
    torch.testing.assert_close(got.text, expected.text_embeds)


def test_a_transformers_model_takes_plain_tensors_too():
    model, (image, text) = build_hugging_face("clip"), hugging_face_inputs()
    expected = embed_in_micro_batches(two_tower(model), image, {"input_ids": text["input_ids"]})
    got = embed_in_micro_batches(two_tower(model), image["pixel_values"], text["input_ids"])
    torch.testing.assert_close(logits(got), logits(expected), rtol=0, atol=0)


def test_a_processors_batch_passes_through_as_it_is():
    from transformers import BatchEncoding

    model, (image, text) = build_hugging_face("clip"), hugging_face_inputs()
    expected = embed_in_micro_batches(two_tower(model), image, text)
    got = embed_in_micro_batches(two_tower(model), image, BatchEncoding(text))
    assert torch.equal(got.text, expected.text)


class OldTransformers(nn.Module):
    """Methods as in older transformers: they return tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()
        self.logit_scale = nn.Parameter(torch.tensor([1.0]))
        self.logit_bias = nn.Parameter(torch.tensor([-3.0]))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.inner.encode_image(pixel_values)

    def get_text_features(self, input_ids: Tensor) -> Tensor:
        return self.inner.encode_text(input_ids)

    def encode_image(self, path: str) -> Tensor:
        raise AssertionError("takes files, as some models on the hub do")


def test_methods_that_return_tensors_are_preferred_to_those_that_take_files():
    model = OldTransformers()
    image, text = {"pixel_values": torch.randn(3, 6)}, {"input_ids": torch.randn(3, 3)}
    got = embed_in_micro_batches(two_tower(model), image, text)
    expected = F.normalize(model.inner.visual(image["pixel_values"]), dim=-1)
    torch.testing.assert_close(got.image, expected.detach())
    assert (got.logit_scale.shape, got.logit_bias.shape) == ((), ())


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 7, 10, 99, None])
def test_micro_batches_that_do_not_divide_give_the_same_rows(micro_batch_size: int | None):
    model, (image, text) = build_siglip(), open_clip_inputs(10)
    expected = embed_in_micro_batches(two_tower(model), image, text)
    got = embed_in_micro_batches(two_tower(model), image, text, micro_batch_size=micro_batch_size)
    torch.testing.assert_close(got.image, expected.image)
    torch.testing.assert_close(got.text, expected.text)


def test_a_bias_tells_sigmoid_from_softmax():
    assert has_bias(build_siglip())
    assert not has_bias(build_clip())  # its logit_bias is None
    assert not has_bias(Plain())
    assert has_bias(build_hugging_face("siglip"))
    assert not has_bias(build_hugging_face("clip"))


def test_scale_and_bias_do_not_change_with_the_module_afterwards():
    model = build_siglip()
    got = embed_in_micro_batches(two_tower(model), *open_clip_inputs())
    before = (got.logit_scale.clone(), got.logit_bias.clone())
    with torch.no_grad():
        model.logit_scale.add_(1.0)
        model.logit_bias.add_(1.0)
    assert torch.equal(got.logit_scale, before[0])
    assert torch.equal(got.logit_bias, before[1])


def test_autocast_is_on_where_asked_for_and_off_otherwise():
    model, (image, text) = build_clip(), open_clip_inputs()
    seen: list[torch.dtype] = []
    model.visual.conv1.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    exact = embed_in_micro_batches(two_tower(model), image, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the caller's own does not reach inside
        embed_in_micro_batches(two_tower(model), image, text)
        half = embed_in_micro_batches(two_tower(model), image, text, autocast_dtype=torch.bfloat16)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    assert half.image.dtype == half.logit_scale.dtype == torch.float32
    # bfloat16 keeps 8 bits: cosines agree within about 2^-8 after two layers.
    assert (half.image * exact.image).sum(dim=1).min() > 0.999
    norms = half.image.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_stored_in_half_precision_takes_float_images(dtype: torch.dtype):
    from open_clip.model import convert_weights_to_lp

    model, (image, text) = build_clip(), open_clip_inputs()
    exact = embed_in_micro_batches(two_tower(model), image, text)
    convert_weights_to_lp(model, dtype)
    model = model.to(dtype)  # open_clip's "pure" precision
    got = embed_in_micro_batches(two_tower(model), image, text)
    assert got.image.dtype == torch.float32
    assert (got.image * exact.image).sum(dim=1).min() > 0.999


def test_gradient_mode_and_autocast_are_as_before_even_after_an_error():
    model = Plain()
    for image in (torch.ones(2, 6), torch.ones(2, 5)):  # the second has a wrong width
        try:
            embed_in_micro_batches(
                two_tower(model), image, torch.ones(2, 3), autocast_dtype=torch.bfloat16
            )
        except RuntimeError as error:
            assert image.shape[1] == 5, error
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_inference_mode_enabled()


def test_embeddings_are_ordinary_tensors_even_under_inference_mode():
    model = Plain()
    with torch.inference_mode():
        got = embed_in_micro_batches(two_tower(model), torch.ones(2, 6), torch.ones(2, 3))
    assert not got.image.is_inference()
    weight = torch.ones(4, requires_grad=True)
    (got.image * weight).sum().backward()  # an inference tensor could not be saved for this
    assert weight.grad is not None


def test_scoring_draws_nothing_from_the_global_random_state():
    model, inputs = build_siglip(), open_clip_inputs()
    before = torch.get_rng_state()
    embed_in_micro_batches(two_tower(model), *inputs, micro_batch_size=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_adapter_itself_keeps_gradients():
    model = Plain()
    two_tower(model).embed(torch.ones(2, 6), torch.ones(2, 3)).image.sum().backward()
    assert model.visual.weight.grad is not None


def test_wrappers_are_looked_through_in_any_nesting():
    model = Plain()
    averaged = torch.optim.swa_utils.AveragedModel(model)  # has `.module`, like data parallel
    for wrapped in (
        torch.compile(model, backend="eager"),
        nn.DataParallel(model),
        torch.compile(nn.DataParallel(model), backend="eager"),
        nn.DataParallel(torch.compile(model, backend="eager")),
    ):
        assert unwrap(wrapped) is model
        assert two_tower(wrapped).module is model
    assert unwrap(averaged) is averaged.module


def test_distributed_data_parallel_is_looked_through(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Plain()
        wrapped = nn.parallel.DistributedDataParallel(
            torch.compile(model, backend="eager"), find_unused_parameters=True
        )
        assert unwrap(wrapped) is model
        assert unwrap(torch.compile(wrapped, backend="eager")) is model
    finally:
        dist.destroy_process_group()


def test_a_model_around_a_model_keeps_its_own_methods():
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Plain()
            self.logit_scale = nn.Parameter(torch.tensor(0.0))

        def encode_image(self, image: Tensor) -> Tensor:
            return -self.module.encode_image(image)

        def encode_text(self, text: Tensor) -> Tensor:
            return self.module.encode_text(text)

    model = Doubled()
    assert unwrap(model) is model
    got = embed_in_micro_batches(two_tower(model), torch.ones(1, 6), torch.ones(1, 3))
    inner = embed_in_micro_batches(two_tower(model.module), torch.ones(1, 6), torch.ones(1, 3))
    assert torch.equal(got.image, -inner.image)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_are_moved_to_the_models_device_pass_by_pass():
    model, (image, text) = build_siglip(), open_clip_inputs(7)
    expected = embed_in_micro_batches(two_tower(model), image, text)
    got = embed_in_micro_batches(
        two_tower(model.cuda()), image.pin_memory(), text, micro_batch_size=3
    )
    assert got.image.is_cuda and got.logit_bias.is_cuda
    torch.testing.assert_close(got.image.cpu(), expected.image, atol=1e-3, rtol=0)
