"""Patched runs by the thousand, which run only what a patch can change."""

from spade_lens.replay.run import capture_for_replay, replay

__all__ = ["capture_for_replay", "replay"]
