"""Finds out what a source is and makes a pipeline of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tintype.backends import Backend, choose
from tintype.bundle import MANIFEST, Bundle, is_bundle, open_bundle
from tintype.errors import CheckpointError
from tintype.families.conditioning import TextTokenizer
from tintype.families.latent_diffusion import LatentDiffusion
from tintype.pipeline import Pipeline
from tintype.t5_tokenizer import T5Tokenizer
from tintype.tokenizer import ClipTokenizer
from tintype_kernels.cache import cache_folder

if TYPE_CHECKING:
    from tintype.checkpoints import Checkpoint

BOX = Path(__file__).parent / "assets"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A hub repository often repeats its weights in formats that we do not read.
_HUB_FILES = ["*.json", "*.txt", "*/*.safetensors", "*/*.onnx", "*/*/*.safetensors"]


def load(
    source: str | Path = "postcard",
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    *,
    allow_pickle: bool = False,
    batch_invariant: bool | None = None,
) -> Pipeline:
    """Load a model and return its pipeline.

    `source` is a bundle folder, a checkpoint folder in diffusers layout, a single `.safetensors` file, the
    name of a model in the box, or a hub id. `backend` is auto, onnxruntime, openvino, tensorrt
    or torch; bundles run without torch. `device` and `dtype` are the backend's own names, such as "cpu" and "float32".
    `batch_invariant` gives every picture the bytes that it has alone, wherever it is in a batch; None means on CPU.
    """
    path = resolve(source)
    options = {"device": device, "dtype": dtype, "batch_invariant": batch_invariant}
    if is_bundle(path) and not (backend == "torch" and is_checkpoint(path)):
        choose(backend, "bundle")  # an absent backend is told before gigabytes are hashed
        return bundle_pipeline(open_bundle(path), backend, **options)
    choose(backend, "checkpoint")  # opening one imports what an absent backend lacks
    return checkpoint_pipeline(open_source(path, allow_pickle=allow_pickle), backend, **options)


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


def bundle_pipeline(bundle: Bundle, backend: str = "auto", **options: Any) -> Pipeline:
    """The pipeline of a bundle that has been opened, with `load`'s options."""
    name, reason = choose(backend, "bundle")
    family = LatentDiffusion(
        backend=_bundle_backend(name)(bundle, **options),
        tokenizers=[ClipTokenizer(bundle.path(folder)) for folder in bundle.tokenizers],
        scheduler_config=bundle.scheduler,
        defaults=bundle.defaults,
        kind=bundle.family,
    )
    return Pipeline(bundle.name, family, reason)


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

    family = LatentDiffusion(
        backend=TorchBackend(checkpoint, **options),
        tokenizers=_tokenizers(checkpoint),
        scheduler_config=checkpoint.scheduler_config,
        defaults=checkpoint.defaults,
        kind=checkpoint.family,
    )
    path = checkpoint.source
    return Pipeline(path.stem if path.is_file() else path.name, family, reason)


def _tokenizers(checkpoint: Checkpoint) -> list[TextTokenizer]:
    """One a text encoder, of the encoder's kind."""
    encoders = [name for name in checkpoint.components if name.startswith("text_encoder")]
    return [
        T5Tokenizer(folder, checkpoint.defaults["text_tokens"])
        if checkpoint.components[name].architecture == "T5EncoderModel"
        else ClipTokenizer(folder)
        for name, folder in zip(encoders, checkpoint.tokenizer_folders, strict=True)
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
