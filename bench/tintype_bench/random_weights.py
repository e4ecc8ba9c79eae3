"""Shapes as checkpoints with random weights: full size without a download, in diffusers' layout or never written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tintype.checkpoints import Checkpoint, open_checkpoint
from tintype.checkpoints.architectures import builder
from tintype_bench.shapes import Part, Shape

_SHARD_BYTES = 4 << 30
_STEMS = {
    "diffusers": "diffusion_pytorch_model",
    "unclip": "diffusion_pytorch_model",
    "transformers": "model",
}
# The last layers of residual branches. Trained ones add little to what flows past them; drawn as wide as the others
# they would amplify what 16 and 8 bits round from block to block.
_BRANCH_ENDS = tuple(
    f"{layer}.weight"
    for layer in (
        "conv2",
        "to_out.0",
        "to_add_out",
        "net.2",
        "proj_out",
        "out_proj",
        "fc2",
        "o",
        "wo",
    )
)
_BRANCH_GAIN = 0.5
# What says which noise there is in pixels: their steps clip, and where the noise were random they would turn pixels
# over for every rounding. A trained model's is near the noise that there is.
_PIXELS_ENDS = tuple(
    f"{component}.conv_out.weight" for component in ("decoder", "super_res_first", "super_res_last")
)
_PIXELS_GAIN = 0.1
_CLIP_CLASS, _T5_CLASS = "CLIPTokenizer", "T5TokenizerFast"
_CLIP_TOKENS, _T5_TOKENS = 77, 512
_CLIP_WORDS = 49_408  # of which the last two begin and end a text


def write_checkpoint(shape: Shape, folder: Path, dtype: torch.dtype, device: str = "cpu") -> None:
    """Fill `folder`; weights are drawn on `device`, a shard at a time, the same ones for the same device."""
    draw = _draw(torch.Generator(device).manual_seed(0), dtype)
    _write_configurations(shape, folder)
    for name, part in shape.parts.items():
        _write_weights(part, name, folder / name, draw)


@dataclass(frozen=True)
class Unwritten(Checkpoint):
    """A shape whose components draw their weights, the same ones each time, on the device that they are asked for."""

    def component(
        self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> nn.Module:
        draw = _draw(torch.Generator(device).manual_seed(0), dtype or torch.float32)
        part = self.components[name]
        with torch.device("meta"):
            module = builder(name, part.architecture, part.config)()
        state = {key: draw(f"{name}.{key}", like) for key, like in module.state_dict().items()}
        module.load_state_dict(state, assign=True)
        return module.eval()


def unwritten(shape: Shape, folder: Path) -> Unwritten:
    """The shape with its configurations and tokenizers in `folder`, and no weights there."""
    _write_configurations(shape, folder)
    for name, part in shape.parts.items():
        (folder / name / f"{_STEMS[part.library]}.safetensors").touch()
    return Unwritten(**vars(open_checkpoint(folder)))


def _write_configurations(shape: Shape, folder: Path) -> None:
    for name, part in shape.parts.items():
        (folder / name).mkdir(parents=True)
        config = {"_class_name": part.architecture, **part.config}
        _write_json(folder / name / "config.json", config)
    for name, kind in zip(_tokenizer_names(shape), shape.tokenizers, strict=True):
        (_write_clip_tokenizer if kind == "clip" else _write_t5_tokenizer)(folder / name)
    for name, scheduler in shape.schedulers.items():
        (folder / name).mkdir()
        _write_json(folder / name / "scheduler_config.json", scheduler)
    _write_json(folder / "model_index.json", _index(shape))


def _draw(generator: torch.Generator, dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    """Values that keep activations near unit variance, so that 16 bits hold them at every depth."""

    def draw(name: str, like: Tensor) -> Tensor:
        """Of a tensor by its component's name and its own."""
        if like.ndim < 2:  # norms scale by 1 and shift by 0, as biases do
            ones = float(name.endswith("weight"))
            return torch.full(like.shape, ones, dtype=dtype, device=generator.device)
        values = torch.randn(like.shape, generator=generator, device=generator.device)
        gain = _BRANCH_GAIN if name.endswith(_BRANCH_ENDS) else 1.0
        gain = _PIXELS_GAIN if name in _PIXELS_ENDS else gain
        scaled: Tensor = gain * values / like[0].numel() ** 0.5
        return scaled.to(dtype)

    return draw


def _write_weights(
    part: Part, name: str, folder: Path, draw: Callable[[str, Tensor], Tensor]
) -> None:
    from safetensors.torch import save_file

    with torch.device("meta"):
        state = builder(name, part.architecture, part.config)().state_dict()
    stem, shards = _STEMS[part.library], list(_shards(state))
    files = [_shard_name(stem, number, len(shards)) for number in range(len(shards))]
    for file, keys in zip(files, shards, strict=True):
        tensors = {key: draw(f"{name}.{key}", state[key]).cpu().contiguous() for key in keys}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        places = {key: file for file, keys in zip(files, shards, strict=True) for key in keys}
        _write_json(
            folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": places}
        )


def _shards(state: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of tensors that are held in memory and written together."""
    keys: list[str] = []
    size = 0
    for key, tensor in state.items():
        if keys and size + 2 * tensor.numel() > _SHARD_BYTES:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += 2 * tensor.numel()
    yield keys


def _shard_name(stem: str, number: int, count: int) -> str:
    middle = f"-{number + 1:05d}-of-{count:05d}" if count > 1 else ""
    return f"{stem}{middle}.safetensors"


def _tokenizer_names(shape: Shape) -> list[str]:
    encoders = [name for name in shape.parts if name.startswith("text_encoder")]
    return [name.replace("text_encoder", "tokenizer") for name in encoders]


def _index(shape: Shape) -> dict[str, Any]:
    classes = {"clip": _CLIP_CLASS, "t5": _T5_CLASS}
    tokenizers = zip(_tokenizer_names(shape), shape.tokenizers, strict=True)
    index: dict[str, Any] = {
        "_class_name": shape.pipeline,
        "_diffusers_version": "0.31.0",
        **{name: ["diffusers", config["_class_name"]] for name, config in shape.schedulers.items()},
        **{name: [part.library, part.architecture] for name, part in shape.parts.items()},
        **{name: ["transformers", classes[kind]] for name, kind in tokenizers},
    }
    if shape.pipeline == "StableDiffusionPipeline":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        index |= {"requires_safety_checker": False}
    return index


def _write_clip_tokenizer(folder: Path) -> None:
    """CLIP's byte alphabet and its ends, at the ids that they have there, without the merges between."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir()
    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    begin, end = "<|startoftext|>", "<|endoftext|>"
    ids = {word: number for number, word in enumerate(words)}
    _write_json(folder / "vocab.json", {**ids, begin: _CLIP_WORDS - 2, end: _CLIP_WORDS - 1})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": begin, "eos_token": end, "pad_token": end, "unk_token": end}
    _write_json(folder / "special_tokens_map.json", special)
    settings = {"model_max_length": _CLIP_TOKENS, "tokenizer_class": _CLIP_CLASS, **special}
    _write_json(folder / "tokenizer_config.json", settings)


def _write_t5_tokenizer(folder: Path) -> None:
    """One piece a letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    folder.mkdir()
    letters = ["\u2581", *(chr(code) for code in range(33, 127))]
    pieces = [(word, 0.0) for word in ("<pad>", "</s>", "<unk>")]
    pieces += [(letter, -4.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, 2, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": _T5_CLASS,
        "model_max_length": _T5_TOKENS,
        "extra_ids": 0,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
