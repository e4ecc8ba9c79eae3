"""Fields by themselves: what a form's texts mean, and which field an error is about."""

from __future__ import annotations

import pytest

from tintype.errors import ProfileError, RequestError
from tintype.serving.fields import EDIT, GENERATION, FieldError, asked, field_of, from_form


def test_a_forms_numbers_are_numbers_and_its_texts_stay_texts():
    sent = {"prompt": "7", "negative_prompt": "null", "seed": "7", "guidance_scale": "2.5"}
    sent |= {"n": "2", "stream": "false", "user": "true"}
    found = from_form(sent.items())
    assert found == {
        "prompt": "7",
        "negative_prompt": "null",
        "seed": 7,
        "guidance_scale": 2.5,
        "n": 2,
        "stream": False,
        "user": "true",
    }
    arguments = asked(found, GENERATION, "postcard").arguments
    assert arguments == {
        "prompt": "7",
        "negative_prompt": "null",
        "seed": 7,
        "guidance_scale": 2.5,
        "num_images_per_prompt": 2,
    }


def test_what_is_left_open_is_left_to_the_pipeline():
    found = asked({"prompt": "a", "size": "auto", "seed": None}, GENERATION, "postcard")
    assert found.arguments == {"prompt": "a"}
    assert (found.output_format, found.quality) == ("png", 100)


def test_an_edit_takes_all_that_a_generation_does():
    assert EDIT.keys() - GENERATION.keys() == {"image", "mask", "strength"}
    assert GENERATION.keys() <= EDIT.keys()


@pytest.mark.parametrize(
    ("error", "field"),
    [
        (RequestError("num_images_per_prompt=0 is not a whole number of at least 1"), "n"),
        (RequestError("width=0 is not a whole number of at least 1"), "size"),
        (RequestError("mask_image is 8x8 and image 32x32; make them the same size"), "mask"),
        (RequestError("strength=0.1 of num_inference_steps=4 leaves no step to run"), "strength"),
        (ProfileError("encode_image has no profile 64x64-b1; it has 128x128-b1"), "size"),
        (RequestError("this model inpaints: it needs image and mask_image"), None),
        (RequestError(""), None),
        (FieldError("warp", "'warp' is not a field here"), "warp"),
    ],
)
def test_an_error_is_about_the_field_whose_argument_it_begins_with(error, field):
    assert field_of(error) == field
