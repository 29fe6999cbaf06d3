"""The words of the world: how each value is said. The writer picks among them, the reader knows them all."""

from __future__ import annotations

from kokanee.world.scene import COLOURS

PLACE_PHRASES = {
    "top left": "at the top left",
    "top": "at the top",
    "top right": "at the top right",
    "left": "on the left",
    "middle": "in the middle",
    "right": "on the right",
    "bottom left": "at the bottom left",
    "bottom": "at the bottom",
    "bottom right": "at the bottom right",
}
SIZE_WORDS = {"small": ("small", "little"), "big": ("big", "large")}
ACTION_PHRASES = {
    "moves left": ("moves left", "moves to the left", "goes left", "slides to the left"),
    "moves right": ("moves right", "moves to the right", "goes right", "slides to the right"),
    "moves up": ("moves up", "goes up", "rises"),
    "moves down": ("moves down", "goes down", "sinks"),
    "jumps": ("jumps", "hops", "jumps up and down"),
    "shakes": ("shakes", "trembles"),
    "spins": ("spins", "rotates", "spins around"),
    "blinks": ("blinks", "flashes"),
    "grows": ("grows", "gets bigger", "becomes big"),
    "shrinks": ("shrinks", "gets smaller", "becomes small"),
    "appears": ("appears", "shows up"),
    "disappears": ("disappears", "vanishes", "goes away"),
    **{f"turns {colour}": (f"turns {colour}", f"becomes {colour}", f"changes to {colour}") for colour in COLOURS},
}
SOURCES = {
    "bell": "a bell",
    "drum": "a drum",
    "whistle": "a whistle",
    "buzzer": "a buzzer",
    "chirp": "a bird",
    "horn": "a horn",
    "knock": "someone",
    "hiss": "something",
}
SOUND_VERBS = {
    "bell": "rings",
    "drum": "beats",
    "whistle": "blows",
    "buzzer": "buzzes",
    "chirp": "chirps",
    "horn": "honks",
    "knock": "knocks",
    "hiss": "hisses",
}
PLURALS = {"chirp": "chirps", "knock": "knocks", "hiss": "hisses"}
COUNT_PHRASES = {"1": "once", "2": "twice", "3": "three times"}
NUMERALS = {"1": "one", "2": "two", "3": "three"}
LIGHT_SENTENCES = {
    "out": ("the light goes out", "the light goes off", "it gets dark"),
    "on": ("the light comes on", "the light goes on", "it gets bright"),
}
CHANGES = ("turns", "becomes", "changes to")
SYNC_WORDS = ("while", "as", "when", "just as")
THEN_WORDS = ("then", "next", "after that", "later")
EXISTS_WORDS = ("there is", "there are", "we see", "the scene shows")
HEARD_BEFORE = ("we hear", "we can hear")
HEARD_AFTER = ("is heard", "sounds", "can be heard", "are heard", "sound")
VISIBLE_WORDS = ("can be seen", "is there")
NOTHING = ("nothing happens", "there is nothing to tell")


def with_article(noun_phrase: str) -> str:
    """The noun phrase with "a" or "an" in front."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def sentence(text: str) -> str:
    """A capital at the front, a full stop at the end."""
    return text[0].upper() + text[1:] + "."
