"""A pipeline whose backend notes what the denoiser was asked for."""

from __future__ import annotations

from dataclasses import replace


class Watched:
    """The backend `inner`; `ran` lists the (profile, rows) of each denoiser run. Keywords take an attribute's place."""

    def __init__(self, inner, **instead):
        self.inner, self.ran = inner, []
        vars(self).update(instead)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def run(self, stage, profile, inputs):
        if stage == "denoise":
            self.ran.append((profile, len(inputs["sample"])))
        return self.inner.run(stage, profile, inputs)

    def run_placed(self, stage, profile, inputs):
        rows = len(inputs["sample"])
        self.ran.append((profile, 2 * rows if stage == "guided_step" else rows))
        return self.inner.run_placed(stage, profile, inputs)

    @property
    def rows(self):
        """The rows of each denoiser run."""
        return [rows for _, rows in self.ran]


def with_backend(pipeline, backend):
    """The same pipeline on another backend."""
    return replace(pipeline, family=replace(pipeline.family, backend=backend))


def watched(pipeline, **instead):
    """The pipeline with a watched backend, and that backend."""
    backend = Watched(pipeline.family.backend, **instead)
    return with_backend(pipeline, backend), backend
