"""Finds out what a source is and makes a pipeline of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tintype.backends import Backend, choose
from tintype.bundle import MANIFEST, Bundle, is_bundle, open_bundle, require_whole
from tintype.errors import CheckpointError, RequestError
from tintype.families.conditioning import STAGES, TextTokenizer
from tintype.families.latent_diffusion import LatentDiffusion
from tintype.families.unclip import Unclip
from tintype.pipeline import Family, Pipeline
from tintype.t5_tokenizer import T5Tokenizer
from tintype.tokenizer import ClipTokenizer
from tintype_kernels.cache import cache_folder

if TYPE_CHECKING:
    from tintype.backends.torch import TorchBackend
    from tintype.checkpoints import Checkpoint
    from tintype.checkpoints.lora_files import Lora

BOX = Path(__file__).parent / "assets"
_T5_STAGES = {"sd3": "encode_3", "flux": "encode_2"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A hub repository often repeats its weights in formats that we do not read.
_HUB_FILES = ["*.json", "*.txt", "*/*.safetensors", "*/*.onnx", "*/*/*.safetensors"]


def load(  # noqa: PLR0913 - they are what users type
    source: str | Path = "postcard",
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    *,
    allow_pickle: bool = False,
    batch_invariant: bool | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    without: Collection[str] = (),
    controlnet: str | Path | None = None,
    offload: str | None = None,
    vae_tiling: bool = False,
    attention_slicing: bool = False,
    execution: str = "eager",
) -> Pipeline:
    """Load a model and return its pipeline.

    `source` is a bundle folder, a checkpoint folder in diffusers layout, a single `.safetensors` file, the
    name of a model in the box, or a hub id. `backend` is auto, onnxruntime, openvino, tensorrt
    or torch; bundles run without torch. `device` and `dtype` are the backend's own names, such as "cpu" and "float32";
    torch also keeps the denoiser's linear layers in "int8", "fp8" or "int4".
    `batch_invariant` gives every picture the bytes that it has alone, wherever it is in a batch; None means on CPU.
    `lora` is a file of low-rank updates, or several, each as FILE or FILE:SCALE; bundles in fp32, fp16, bf16 and int8
    take them, too, and of TensorRT's engines those without weights.
    `without` names text encoders to leave out, such as "text_encoder_3", the T5 of SD3 and most of its memory.
    `controlnet` is a ControlNet, a folder in diffusers' layout or a file in the original one, which steers a checkpoint
    of Stable Diffusion 1, 2 or XL by a picture; a bundle that was exported with one has it in it.
    `offload` "model" keeps one component on the device at a time, "sequential" one block and the next; `vae_tiling`
    encodes and decodes in overlapping tiles; `attention_slicing` bounds the scores that attention holds where the
    device has no fused kernel for it, and changes nothing elsewhere. All three are for checkpoints; `tintype inspect
    MODEL --memory` tells what each saves.
    `execution` of a checkpoint is "eager", "compiled" by torch, or a CUDA "graph"; compiled ones are graphs there, too.
    Of a bundle it is "eager", or "graph" for engines by tensorrt-rtx.
    """
    path = resolve(source)
    options = {"device": device, "dtype": dtype, "batch_invariant": batch_invariant}
    if is_bundle(path) and not (backend == "torch" and is_checkpoint(path)):
        choose(backend, "bundle")  # an absent backend is told before gigabytes are hashed
        asked = _for_checkpoints(
            without=without,
            controlnet=controlnet,
            offload=offload,
            vae_tiling=vae_tiling,
            attention_slicing=attention_slicing,
        )
        if asked:
            raise RequestError(
                f"{asked} is for checkpoints; a bundle runs what it was exported with"
            )
        bundle = open_bundle(path)
        require_whole(bundle)
        return bundle_pipeline(bundle, backend, lora=lora, execution=execution, **options)
    choose(backend, "checkpoint")  # opening one imports what an absent backend lacks
    if is_bundle(path):
        open_bundle(path)  # whose files are the checkpoint's, and are checked as such
    checkpoint = open_source(path, allow_pickle=allow_pickle)
    checkpoint = checkpoint.without(without) if without else checkpoint
    if controlnet is not None:
        checkpoint = checkpoint.steered_by(Path(controlnet), allow_pickle=allow_pickle)
    options |= {"offload": offload, "vae_tiling": vae_tiling, "execution": execution}
    options |= {"attention_slicing": attention_slicing}
    return checkpoint_pipeline(with_loras(checkpoint, lora), backend, **options)


def _for_checkpoints(**arguments: Any) -> str:
    """The first of the arguments that was given, as it was."""
    return next((f"{name}={value!r}" for name, value in arguments.items() if value), "")


def with_loras(checkpoint: Checkpoint, files: str | Path | Sequence[str | Path]) -> Checkpoint:
    """The checkpoint with the low-rank updates of these files, each FILE or FILE:SCALE."""
    loras = _loras(files)
    return checkpoint.with_loras(loras) if loras else checkpoint


def _loras(files: str | Path | Sequence[str | Path]) -> list[Lora]:
    texts = [files] if isinstance(files, (str, Path)) else files
    if not isinstance(texts, Sequence):
        raise RequestError(f"lora={files!r} is neither a file nor a list of files")
    if not texts:
        return []
    from tintype.checkpoints.lora_files import Lora

    return [Lora.parse(str(text)) for text in texts]


def resolve(source: str | Path) -> Path:
    """The folder or file of a source, fetched from the hub where it is a hub id."""
    text = str(source)
    if isinstance(source, str) and text in boxed():
        return BOX / text
    path = Path(source)
    if path.is_dir():
        if not is_bundle(path) and not is_checkpoint(path):
            raise CheckpointError(f"{path} holds neither bundle.json nor model_index.json")
        return path
    if path.is_file():
        return path
    if isinstance(source, str) and _HUB_ID.fullmatch(text):
        return _fetch(text)
    raise CheckpointError(
        f"{text} is not a folder, a file, a hub id or a model in the box ({', '.join(boxed()) or 'none'})"
    )


def boxed() -> list[str]:
    """The names of the models in the box."""
    return sorted(path.name for path in BOX.glob("*") if is_bundle(path))


def is_checkpoint(path: Path) -> bool:
    """Whether the folder has diffusers' layout."""
    return (path / "model_index.json").is_file()


def open_source(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a checkpoint: its configurations, not yet its weights."""
    from tintype.checkpoints import open_checkpoint

    return open_checkpoint(path, allow_pickle=allow_pickle)


def bundle_pipeline(
    bundle: Bundle,
    backend: str = "auto",
    *,
    lora: str | Path | Sequence[str | Path] = (),
    execution: str = "eager",
    **options: Any,
) -> Pipeline:
    """The pipeline of a bundle that has been opened, with `load`'s options."""
    name, reason = choose(backend, "bundle")
    if name == "tensorrt":
        options["execution"] = execution
    elif execution != "eager":
        raise RequestError(
            f"execution={execution!r} is for checkpoints on torch, 'graph' for tensorrt-rtx's engines too; leave it out"
        )
    kind = _bundle_backend(name)
    fewer = _fewer_codes(kind, bundle, **options)
    if (loras := _loras(lora)) or fewer:
        from tintype.backends.updated_weights import UpdatedWeights

        options["updated"] = UpdatedWeights(bundle, loras, **fewer)
    family = _family(
        bundle.family,
        backend=kind(bundle, **options),
        tokenizers=open_tokenizers(
            bundle.family,
            bundle.stages,
            [bundle.path(folder) for folder in bundle.tokenizers],
            bundle.defaults,
        ),
        scheduler_config=bundle.scheduler,
        defaults=bundle.defaults,
    )
    return Pipeline(bundle.name, family, reason)


def _fewer_codes(
    kind: Callable[..., Backend], bundle: Bundle, device: str = "auto", **_: Any
) -> dict[str, int]:
    """What codes are rounded to where the backend cannot add products of larger ones."""
    if bundle.precision != "int8" or not hasattr(kind, "largest_code"):
        return {}
    largest: int | None = kind.largest_code(device)
    return {} if largest is None else {"largest_code": largest}


def _bundle_backend(name: str) -> Callable[..., Backend]:
    """The class of that name; only its own package is imported."""
    if name == "openvino":
        from tintype.backends.openvino import OpenVinoBackend

        return OpenVinoBackend
    if name == "tensorrt":
        from tintype.backends.tensorrt import TensorRtBackend

        return TensorRtBackend
    from tintype.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend


def checkpoint_pipeline(checkpoint: Checkpoint, backend: str = "auto", **options: Any) -> Pipeline:
    """The pipeline of a checkpoint that has been opened, with `load`'s options."""
    _, reason = choose(backend, "checkpoint")
    from tintype.backends.torch import TorchBackend

    return torch_pipeline(checkpoint, TorchBackend(checkpoint, **options), reason)


def torch_pipeline(checkpoint: Checkpoint, backend: TorchBackend, reason: str) -> Pipeline:
    """The pipeline of a checkpoint on a backend that there is."""
    family = _family(
        checkpoint.family,
        backend=backend,
        tokenizers=checkpoint_tokenizers(checkpoint),
        scheduler_config=checkpoint.scheduler_config,
        defaults=checkpoint.defaults,
    )
    path = checkpoint.source
    return Pipeline(path.stem if path.is_file() else path.name, family, reason)


def _family(kind: str, **parts: Any) -> Family:
    return (Unclip if kind == "unclip" else LatentDiffusion)(kind=kind, **parts)


def checkpoint_tokenizers(checkpoint: Checkpoint) -> list[TextTokenizer]:
    """One a text encoder."""
    from tintype.models.stages import stage_names

    folders = checkpoint.tokenizer_folders
    stages = stage_names(checkpoint.components)
    tokenizers = open_tokenizers(checkpoint.family, stages, folders, checkpoint.defaults)
    encoders = [name for name in checkpoint.components if name.startswith("text_encoder")]
    for name, tokenizer in zip(encoders, tokenizers, strict=True):
        places = checkpoint.configs[name].get("max_position_embeddings")
        if isinstance(tokenizer, ClipTokenizer) and isinstance(places, int):
            _check_places(name, places, tokenizer.length)
    return tokenizers


def _check_places(encoder: str, places: int, length: int) -> None:
    if places < length:
        raise CheckpointError(
            f"{encoder} has places for {places} tokens, and its tokenizer gives {length}; "
            "the tokenizer folder belongs to another model, or its model_max_length is wrong"
        )


def open_tokenizers(
    family: str, stages: Iterable[str], folders: Iterable[Path], defaults: Mapping[str, Any]
) -> list[TextTokenizer]:
    """A tokenizer for each encoder among the stages, of the encoder's kind."""
    encoders = [stage for stage in STAGES if stage in stages]
    return [
        T5Tokenizer(folder, defaults["text_tokens"])
        if stage == _T5_STAGES.get(family)
        else ClipTokenizer(folder)
        for stage, folder in zip(encoders, folders, strict=True)
    ]


def _fetch(hub_id: str) -> Path:
    """Download a hub repository, or take it from the hub's local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        manifest = Path(snapshot_download(hub_id, allow_patterns=[MANIFEST]))
        # The hub's cache is made of links, and a bundle holds its files itself.
        own_folder = cache_folder() / "hub" / hub_id if is_bundle(manifest) else None
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES, local_dir=own_folder))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{hub_id} is neither a local path nor reachable on the hub: {reason}"
        ) from error
