"""Kokanee: detailed, accurate captions of what a video shows and what it sounds like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kokanee.captioner import Captioner
    from kokanee.captions import Caption, Request
    from kokanee.errors import KokaneeError

    __version__: str

__all__ = ["Caption", "Captioner", "KokaneeError", "Request", "__version__"]


def __getattr__(name: str) -> Any:
    """The names of `__all__`, when they are first asked for: importing kokanee alone loads no torch."""
    if name == "Captioner":
        from kokanee.captioner import Captioner

        return Captioner
    if name in ("Caption", "Request"):
        from kokanee import captions

        return getattr(captions, name)
    if name == "KokaneeError":
        from kokanee.errors import KokaneeError

        return KokaneeError
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("kokanee")
        except PackageNotFoundError:
            return "0+unknown"
    raise AttributeError(f"module 'kokanee' has no attribute {name!r}")
