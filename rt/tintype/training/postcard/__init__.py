"""Postcard: small illustrated landscapes with captions, drawn on demand from a few attributes."""

from .captions import WORDS, caption, caption_with_stated, full_caption
from .dataset import contact_sheet, labels, render_many, render_scenes, sample_scenes
from .render import render
from .scene import (
    ATTRIBUTES,
    COLOURS,
    COUNTS,
    PLACES,
    POSITIONS,
    SKIES,
    SUBJECTS,
    TIMES,
    WEATHERS,
    Scene,
    is_held_out,
    sample_scene,
)
from .store import PostcardStore, open_store, write_store

__all__ = [
    "ATTRIBUTES",
    "COLOURS",
    "COUNTS",
    "PLACES",
    "POSITIONS",
    "SKIES",
    "SUBJECTS",
    "TIMES",
    "WEATHERS",
    "WORDS",
    "PostcardStore",
    "Scene",
    "caption",
    "caption_with_stated",
    "contact_sheet",
    "full_caption",
    "is_held_out",
    "labels",
    "open_store",
    "render",
    "render_many",
    "render_scenes",
    "sample_scene",
    "sample_scenes",
    "write_store",
]
