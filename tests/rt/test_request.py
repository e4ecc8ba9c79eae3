"""What a request takes as latents and as pictures: numpy's arrays and torch's tensors, whoever keeps them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from tintype import images
from tintype.errors import RequestError
from tintype.request import share, starts

NOISE = np.random.default_rng(4).standard_normal((2, 4, 3, 5)).astype(np.float32)
PIXELS = np.random.default_rng(2).integers(0, 256, (6, 8, 3), dtype=np.uint8)
CODES = torch.from_numpy(PIXELS).permute(2, 0, 1)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.from_numpy(NOISE),
        torch.from_numpy(NOISE).requires_grad_(),
        torch.from_numpy(NOISE).double(),
        torch.from_numpy(NOISE).transpose(2, 3).contiguous().transpose(2, 3),
    ],
    ids=["plain", "with a gradient", "doubles", "strided"],
)
def test_latents_of_torch_are_those_of_numpy(tensor):
    found = starts(tensor, 2)
    np.testing.assert_array_equal(np.concatenate(found), NOISE)
    assert all(each.dtype == np.float32 and each.flags.c_contiguous for each in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8])
def test_latents_of_other_types_are_widened(dtype):
    tensor = (torch.from_numpy(NOISE).abs() * 3).to(dtype)
    expected = tensor.double().numpy()  # as torch counts them, which is exact
    np.testing.assert_array_equal(np.concatenate(starts(tensor, 2)), expected)


def as_numpy(tensor):
    return np.moveaxis(tensor.numpy(), 0, -1)


@pytest.mark.parametrize("name", ["image", "mask_image"])
def test_bytes_of_torch_count_as_bytes_of_numpy_do(name):
    codes = CODES if name == "image" else CODES[:1]
    expected = images.to_numpy(as_numpy(codes), name, len(codes))
    np.testing.assert_array_equal(images.to_numpy(codes, name, len(codes)), expected)
    np.testing.assert_array_equal(images.to_numpy(codes[None], name, len(codes)), expected)


def test_a_picture_keeps_no_gradient_and_may_be_of_bfloat16():
    tensor = (CODES / 255).requires_grad_()
    np.testing.assert_array_equal(images.to_numpy(tensor), images.to_numpy(PIXELS))
    rounded = tensor.bfloat16()
    np.testing.assert_array_equal(images.to_numpy(rounded)[0], as_numpy(rounded.detach().double()))


def test_a_mask_of_truths_is_black_and_white():
    mask = CODES[:1] > 9
    np.testing.assert_array_equal(
        images.to_numpy(mask, "mask_image", 1)[0], as_numpy(mask).astype(np.float32)
    )


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(4).to_sparse(), torch.empty(1, 4, 3, 5, device="meta")],
    ids=["sparse", "meta"],
)
@pytest.mark.parametrize("name", ["latents", "image", "mask_image"])
def test_a_tensor_without_plain_numbers_is_refused_in_one_line(name, tensor):
    with pytest.raises(RequestError, match=f"^{name} is a Tensor that gives no plain") as refused:
        starts(tensor, 1) if name == "latents" else images.to_numpy(tensor, name)
    assert "\n" not in str(refused.value)


def test_a_list_of_tensors_with_gradients_is_no_noise():
    with pytest.raises(RequestError, match="latents is a list that holds more than real"):
        starts([torch.ones(3, requires_grad=True)], 1)


def test_complex_numbers_are_no_picture_and_no_noise():
    with pytest.raises(RequestError, match="latents is a Tensor that holds more than real"):
        starts(torch.ones(1, 4, 3, 5, dtype=torch.complex64), 1)
    with pytest.raises(RequestError, match="image holds complex64"):
        images.to_numpy(torch.ones(3, 4, 4, dtype=torch.complex64))


def test_a_stream_is_no_tensor_and_is_not_detached():
    stream = io.TextIOWrapper(io.BytesIO())
    with pytest.raises(RequestError, match="image is a TextIOWrapper; expected a PIL image"):
        images.to_numpy(stream)
    assert stream.buffer.closed is False


@pytest.mark.parametrize("value", ["0.5", True, np.True_, b"1", None, [0.5], np.nan])
def test_a_share_is_a_number(value):
    with pytest.raises(RequestError, match="^strength=.*outside"):
        share("strength", value, least=0)
    assert share("strength", np.float16(0.5), least=0) == 0.5
