"""The synthetic audio-visual world: scenes, their pictures and sounds, and exact ground truth about both."""
