"""Data sets that ``grace data prepare`` makes: easy-VQA's own pictures, generated scenes, and both."""

from grace_vlm.data.sources.prepare import SOURCES, PreparedInfo, prepare

__all__ = ["SOURCES", "PreparedInfo", "prepare"]
