"""Readers: files, folders, URLs and data sets as sources of documents, one module a format."""

from .base import Log, ReaderOptions, Skipped, Source
from .recognise import Seen, open_source

__all__ = ["Log", "ReaderOptions", "Seen", "Skipped", "Source", "open_source"]
