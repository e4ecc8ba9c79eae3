"""The errors that a caller can act on. Each message says what was asked, what is possible, and what to do."""

from __future__ import annotations


class TintypeError(Exception):
    """Base of all errors that Tintype raises on purpose."""


class RequestError(TintypeError, ValueError):
    """A bad argument of a call."""


class ProfileError(TintypeError, ValueError):
    """A size or batch that a bundle was not built for."""


class CheckpointError(TintypeError):
    """A checkpoint that is unreadable, incomplete or of an unknown layout."""


class BundleError(TintypeError):
    """A bundle with a missing file, a wrong hash or a newer format."""


class BackendUnavailable(TintypeError, ImportError):
    """A backend whose package or device is absent; the message names the extra to install."""


class Cancelled(TintypeError):
    """A request that its own `callback_on_step_end` ended by returning False."""
