"""Kokanee: detailed, accurate captions of what a video shows and what it sounds like."""
