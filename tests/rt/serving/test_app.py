"""The protocol as OpenAI's own client speaks it, and the pictures that come back."""

from __future__ import annotations

import base64
import io
import json

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from served import as_file, opened, pixels
from tintype.cli import main
from tintype.png import read_png

PROMPT = "a red lighthouse on a rocky coast at dusk"
SHORT = {"num_inference_steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def photo(postcard):
    return postcard(PROMPT, num_inference_steps=2, seed=1).images[0]


@pytest.fixture(scope="module")
def left_half():
    shade = np.zeros((128, 128), np.uint8)
    shade[:, :64] = 255
    return Image.fromarray(shade)


def post(server, path, **content):
    return httpx.post(f"{server.url}{path}", timeout=30, **content)


def generate(server, **body):
    content = json.dumps({"prompt": PROMPT, **SHORT, **body})
    return post(server, "/v1/images/generations", content=content)


def edit(server, photo, data=(), **files):
    sent = {"image": ("a.png", as_file(photo))} | files
    form = {"prompt": PROMPT, "num_inference_steps": "4", "seed": "7", **dict(data)}
    return post(server, "/v1/images/edits", data=form, files=sent)


def refusal(response):
    """The status, field and message of an error, which is one line in OpenAI's form and nothing else."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert "Traceback" not in response.text
    return response.status_code, error["param"], error["message"]


def test_pictures_are_those_of_the_same_call_in_python(client, postcard):
    answer = client.images.generate(
        prompt=PROMPT,
        model="postcard",
        n=2,
        size="128x128",
        extra_body={
            **SHORT,
            "guidance_scale": 3,
            "negative_prompt": "fog",
            "scheduler": "euler",
        },
    )
    expected = postcard(
        PROMPT,
        "fog",
        num_images_per_prompt=2,
        guidance_scale=3,
        scheduler="euler",
        num_inference_steps=2,
        seed=7,
    )
    assert [each.seed for each in answer.data] == [7, 8]
    assert [pixels(opened(each)) for each in answer.data] == [
        pixels(image) for image in expected.images
    ]
    assert (answer.size, answer.output_format) == ("128x128", "png")
    assert set(answer.timings) == {"encode", "denoise", "decode"}


def test_a_png_is_the_file_that_generate_writes(client, tmp_path):
    target = tmp_path / "a.png"
    flags = "--steps 2 --seed 7 -n fog --guidance 3 --backend onnxruntime -o"
    assert main(["generate", PROMPT, *flags.split(), str(target)]) == 0
    body = {**SHORT, "negative_prompt": "fog", "guidance_scale": 3}
    (sent,) = client.images.generate(prompt=PROMPT, extra_body=body).data
    assert base64.b64decode(sent.b64_json) == target.read_bytes()
    assert read_png(target).negative_prompt == "fog"


def test_a_seed_that_was_drawn_makes_the_same_bytes_again(client):
    drawn, again = {"num_inference_steps": 2}, {}
    (first,) = client.images.generate(prompt=PROMPT, extra_body=drawn).data
    again = {**drawn, "seed": first.seed}
    (second,) = client.images.generate(prompt=PROMPT, extra_body=again).data
    assert first.b64_json == second.b64_json


@pytest.mark.parametrize(("kind", "name"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_output_format_is_what_is_sent(client, kind, name):
    (sent,) = client.images.generate(prompt=PROMPT, output_format=kind, extra_body=SHORT).data
    assert opened(sent).format == name


def test_output_compression_makes_files_smaller(client):
    small, large = (
        client.images.generate(
            prompt=PROMPT, output_format="jpeg", output_compression=quality, extra_body=SHORT
        ).data[0]
        for quality in (10, 95)
    )
    assert len(small.b64_json) < len(large.b64_json) / 2


@pytest.mark.parametrize(
    "taken",
    [
        {"response_format": "b64_json", "background": "opaque", "quality": "standard"},
        {"moderation": "low", "user": "someone", "stream": False, "partial_images": 0},
        {"size": "auto", "background": "auto", "quality": "auto", "moderation": "auto"},
        {"model": None, "n": None, "size": None, "style": None, "scheduler": None, "stream": None},
    ],
)
def test_what_changes_nothing_here_changes_nothing(server, taken):
    plain, told = generate(server), generate(server, **taken)
    assert told.status_code == 200
    assert told.json()["data"] == plain.json()["data"]


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": 3}, "prompt", "not a string"),
        ({"prompt": ["a", "b"]}, "prompt", "not a string"),
        ({"prompt": "a" * 40_000}, "prompt", "32000"),
        ({"prompt": "\ud800"}, "prompt", "Unicode"),
        ({"negative_prompt": 3}, "negative_prompt", "not a string"),
        ({"model": "dall-e-3"}, "model", "ask for postcard"),
        ({"n": 0}, "n", "from 1 to 10"),
        ({"n": 11}, "n", "from 1 to 10"),
        ({"n": True}, "n", "from 1 to 10"),
        ({"n": "2"}, "n", "from 1 to 10"),
        ({"n": 1.5}, "n", "from 1 to 10"),
        ({"size": "big"}, "size", "such as 512x768"),
        ({"size": 128}, "size", "not a string"),
        ({"size": "64x64"}, "size", "it has 128x128"),
        ({"size": "0x0"}, "size", "at least 1"),
        ({"size": f"{10**20}x64"}, "size", "memory"),
        ({"response_format": "url"}, "response_format", "not kept"),
        ({"response_format": True}, "response_format", "b64_json"),
        ({"output_format": "gif"}, "output_format", "png, jpeg, webp"),
        ({"output_compression": 50}, "output_compression", "jpeg and webp"),
        (
            {"output_compression": 101, "output_format": "jpeg"},
            "output_compression",
            "from 0 to 100",
        ),
        ({"background": "transparent"}, "background", "opaque"),
        ({"quality": "hd"}, "quality", "num_inference_steps"),
        ({"moderation": "high"}, "moderation", "low"),
        ({"user": 3}, "user", "not a string"),
        ({"style": "vivid"}, "style", "the prompt"),
        ({"stream": True}, "stream", "when they are done"),
        ({"stream": 0}, "stream", "false"),
        ({"partial_images": 1}, "partial_images", "when they are done"),
        ({"seed": -1}, "seed", "from 0 to"),
        ({"seed": 2**64}, "seed", "from 0 to"),
        ({"seed": 1.5}, "seed", "from 0 to"),
        ({"seed": [1]}, "seed", "from 0 to"),
        ({"seed": "x" * 10_000}, "seed", "from 0 to"),
        ({"num_inference_steps": 0}, "num_inference_steps", "at least 1"),
        ({"num_inference_steps": 1001}, "num_inference_steps", "1..1000"),
        ({"num_inference_steps": "2"}, "num_inference_steps", "whole number"),
        ({"guidance_scale": "4"}, "guidance_scale", "not a finite number"),
        ({"guidance_scale": True}, "guidance_scale", "not a finite number"),
        ({"guidance_scale": [1, 2]}, "guidance_scale", "not a finite number"),
        ({"guidance_scale": 10**400}, "guidance_scale", "not a finite number"),
        ({"scheduler": "warp"}, "scheduler", "euler"),
        ({"scheduler": "flow_euler"}, "scheduler", "does not sample"),
        ({"scheduler": ""}, "scheduler", "euler"),
        ({"scheduler": ["euler"]}, "scheduler", "euler"),
        ({"strength": 0.5}, "strength", "not a field"),
        ({"image": "aGk="}, "image", "not a field"),
        ({"steps": 4}, "steps", "num_inference_steps"),
        ({"\ud800": 4}, "\ud800", "not a field"),
        ({"a\nb": 4}, "a\nb", "not a field"),
    ],
)
def test_a_bad_field_is_400_with_its_name_before_anything_is_queued(server, body, field, says):
    made = server.figures()["tintype_pictures_total",]
    status, named, message = refusal(generate(server, **body))
    assert (status, named) == (400, field)
    assert says in message
    assert len(message) < 500
    assert server.figures()["tintype_pictures_total",] == made


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_400(server, number):
    body = f'{{"prompt": "a", "guidance_scale": {number}}}'
    status, field, _ = refusal(post(server, "/v1/images/generations", content=body))
    assert (status, field) == (400, "guidance_scale")


@pytest.mark.parametrize("body", ["", "{", "[]", "3", "null", '"a"', "\xff", "[" * 100_000])
def test_a_body_that_is_no_json_object_is_400(server, body):
    response = post(server, "/v1/images/generations", content=body.encode("latin-1"))
    status, field, message = refusal(response)
    assert (status, field) == (400, None)
    assert "JSON" in message


def test_an_openai_client_raises_its_own_error_with_the_field(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, style="vivid")
    assert (caught.value.param, caught.value.type) == ("style", "invalid_request_error")


def test_an_edit_is_the_same_call_with_image_and_mask(client, postcard, photo, left_half):
    answer = client.images.edit(
        prompt=PROMPT,
        image=("a.png", as_file(photo)),
        mask=("m.png", as_file(left_half)),
        n=2,
        extra_body={"seed": 7, "num_inference_steps": 4, "strength": 0.5},
    )
    expected = postcard(
        PROMPT,
        image=photo,
        mask_image=left_half,
        num_images_per_prompt=2,
        seed=7,
        num_inference_steps=4,
        strength=0.5,
    )
    assert [pixels(opened(each)) for each in answer.data] == [
        pixels(image) for image in expected.images
    ]
    assert read_png(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).strength == 0.5


def test_one_picture_in_a_list_is_taken(client, postcard, photo):
    (sent,) = client.images.edit(
        prompt=PROMPT,
        image=[("a.png", as_file(photo))],
        extra_body={"seed": 7, "num_inference_steps": 4},
    ).data
    (expected,) = postcard(PROMPT, image=photo, seed=7, num_inference_steps=4).images
    assert pixels(opened(sent)) == pixels(expected)


def test_a_mask_repaints_where_its_alpha_is_0_as_ours_does_where_it_is_white(
    server, photo, left_half
):
    clear = photo.copy()
    clear.putalpha(Image.fromarray(255 - np.asarray(left_half)))
    ours, theirs, none = (
        edit(server, photo, **files).json()["data"][0]["b64_json"]
        for files in (
            {"mask": ("m.png", as_file(left_half))},
            {"mask": ("m.png", as_file(clear))},
            {},
        )
    )
    assert ours == theirs != none


@pytest.mark.parametrize(
    ("data", "files", "field", "says"),
    [
        ({"n": "two"}, {}, "n", "from 1 to 10"),
        ({"n": "true"}, {}, "n", "from 1 to 10"),
        ({"n": "0"}, {}, "n", "from 1 to 10"),
        ({"guidance_scale": "NaN"}, {}, "guidance_scale", "not a finite number"),
        ({"guidance_scale": "much"}, {}, "guidance_scale", "not a finite number"),
        ({"stream": "true"}, {}, "stream", "when they are done"),
        ({"strength": "0"}, {}, "strength", "outside (0, 1]"),
        ({"strength": "0.1"}, {}, "strength", "leaves no step"),
        ({"size": "64x64"}, {}, "size", "it has 128x128"),
        ({"size": "big"}, {}, "size", "such as 512x768"),
        ({"steps": "4"}, {}, "steps", "num_inference_steps"),
        ({"prompt": ["a", "b"]}, {}, "prompt", "more than once"),
        ({"image": "text"}, {"image": ("a.txt", b"")}, "image", "more than once"),
        ({"mask": "text"}, {}, "mask", "not a file"),
        ({}, {"image": ("a.png", b"no picture")}, "image", "cannot be read"),
        ({}, {"mask": ("m.png", b"no picture")}, "mask", "cannot be read"),
        ({}, {"mask": ("m.png", as_file(Image.new("L", (8, 8))))}, "mask", "the same size"),
        ({}, {"mask": ("m.png", as_file(Image.new("RGBA", (128, 128), "red")))}, "mask", "alpha"),
        ({}, {"user": ("a.txt", b"7")}, "user", "sent as a file"),
        ({}, {"image[]": ("b.png", b"")}, "image", "more than once"),
    ],
)
def test_a_bad_field_of_an_edit_is_400_with_its_name(server, photo, data, files, field, says):
    status, named, message = refusal(edit(server, photo, data, **files))
    assert (status, named) == (400, field)
    assert says in message


def test_an_edit_without_a_picture_is_400(server):
    response = post(server, "/v1/images/edits", files={"prompt": (None, "a")})
    assert refusal(response)[:2] == (400, "image")
    response = post(server, "/v1/images/edits", json={"prompt": "a"})
    assert "multipart/form-data" in refusal(response)[2]


def test_a_damaged_form_is_400(server):
    kind = {"content-type": "multipart/form-data; boundary=x"}
    for body, headers in ((b"no form", kind), (b"", {"content-type": "multipart/form-data"})):
        response = post(server, "/v1/images/edits", content=body, headers=headers)
        assert refusal(response)[0] == 400


def test_a_body_beyond_the_limit_is_413(server, photo):
    for response, most in (
        (generate(server, user="a" * 1_000_000), 1_000_000),
        (edit(server, photo, image=("a.png", bytes(60_000_000))), 50_000_000),
    ):
        status, field, message = refusal(response)
        assert (status, field) == (413, None)
        assert message.startswith(f"the request has more than {most} bytes")


def test_models_are_the_one_that_is_served(client):
    (listed,) = client.models.list().data
    assert (listed.id, listed.object, listed.owned_by) == ("postcard", "model", "tintype")
    assert listed.defaults["size"] == "128x128"
    assert "euler" in listed.schedulers
    assert "flow_euler" not in listed.schedulers
    assert client.models.retrieve("postcard") == listed
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("some/other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/images/generations", 405), ("POST", "/", 405)],
)
def test_what_no_route_takes_is_told_in_the_same_form(server, method, path, status):
    response = httpx.request(method, server.url + path)
    told, _, message = refusal(response)
    assert told == status
    assert message.startswith(f"{method} {path}: ")


def test_health_is_200(server):
    response = httpx.get(f"{server.url}/healthz")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_the_page_brings_all_that_it_shows(server):
    response = httpx.get(server.url)
    assert response.headers["content-type"].startswith("text/html")
    for name in ("prompt", "negative_prompt", "size", "num_inference_steps", "seed", "scheduler"):
        assert f'name="{name}"' in response.text
    assert "http://" not in response.text
    assert "https://" not in response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]


def test_metrics_count_requests_pictures_and_seconds(server):
    before = server.figures()
    generate(server, n=2)
    generate(server, n=0)
    after = server.figures()
    path = "/v1/images/generations"
    for name, grown in {
        ("tintype_requests_total", path, "200"): 1,
        ("tintype_requests_total", path, "400"): 1,
        ("tintype_pictures_total",): 2,
        ("tintype_stage_seconds_count", "queue"): 1,
        ("tintype_stage_seconds_count", "denoise"): 1,
        ("tintype_jobs_cancelled_total",): 0,
    }.items():
        assert after[name] - before.get(name, 0) == grown, name
    assert after["tintype_stage_seconds_sum", "denoise"] > 0
    assert (after["tintype_jobs_waiting",], after["tintype_jobs_running",]) == (0, 0)


def test_json_of_any_encoding_is_read(server):
    body = json.dumps({"prompt": "été", **SHORT}, ensure_ascii=False)
    for encoding in ("utf-8", "utf-16"):
        response = post(server, "/v1/images/generations", content=body.encode(encoding))
        assert response.status_code == 200
