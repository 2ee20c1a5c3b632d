"""Temporary."""

from pathlib import Path

BOX = Path(__file__).parent / "box"
