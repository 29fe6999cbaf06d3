"""The world's judge: a caption against the truth, fact by fact, with nothing left to opinion.

As in the paper's metric, an error is a *missed* fact of the truth, an *incorrect* one (told with a wrong value), or a
*hallucinated* one of the caption; see `events.py` for the rates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kokanee.events import Incorrect, Verdict
from kokanee.world.facts import Event, Fact, facts_of, statement, sync_action
from kokanee.world.language import parse

UNREADABLE = "Unreadable: "


@dataclass(frozen=True)
class ExactVerdict(Verdict):
    """A verdict in statements of facts, and the facts that the caption told rightly."""

    told: tuple[Fact, ...] = ()


def judge(truth: Iterable[Event | Fact], caption: str) -> ExactVerdict:
    """Compares what a caption says with the truth; `told` of the verdict holds the facts told rightly.

    Figures and sounds are matched by name. Those of the caption that are left are matched, in order of mention, with
    those of the truth that are left: a figure with one that shares its colour or its shape, a sound with any; of
    several, the one of which most is told, or else the first. Such a match makes the figure or the sound itself
    incorrect; all else is compared as if it had been named rightly, but that the pitch and the count of a sound of
    another kind are incorrect too: else it would pay to guess sounds. Then, for every figure, sound and kind of fact,
    the values of both sides are compared as sets: what both have is told; what is left is paired off as incorrect; the
    rest is missed or hallucinated. A sentence that cannot be read is one hallucination. Saying a thing twice is no
    error here (see `events.repetition_rate`).
    """
    true_facts = tuple(dict.fromkeys(facts_of(truth)))
    parsed = parse(caption)
    claimed = tuple(dict.fromkeys(parsed.facts))
    names = _match(true_facts, claimed)
    claims = [(_renamed(fact, names), fact) for fact in claimed]
    actions: dict[Fact, Fact] = {}
    told, wrong, missed, extra = [], [], [], []
    slots = dict.fromkeys((fact.kind, fact.subject) for fact in (*true_facts, *(as_true for as_true, _ in claims)))
    for slot in sorted(slots, key=lambda slot: slot[0] == "sync"):
        wanted = [fact for fact in true_facts if (fact.kind, fact.subject) == slot]
        given = [(as_true, said) for as_true, said in claims if (as_true.kind, as_true.subject) == slot]
        if slot[0] == "sync":
            given = [(_sync_as_true(as_true, actions), said) for as_true, said in given]
        right, pairs, absent, surplus = _compare(wanted, given)
        actions.update({_renamed(said, names): true for true, said in pairs if true.kind == "action"})
        told, wrong, missed, extra = told + right, wrong + pairs, missed + absent, extra + surplus
    return ExactVerdict(
        tuple(statement(fact) for fact in missed),
        tuple(Incorrect(statement(true), statement(said)) for true, said in wrong),
        (*(statement(fact) for fact in extra), *(f'{UNREADABLE}"{text}"' for text in parsed.unparsed)),
        len(true_facts),
        tuple(told),
    )


def _match(truth: Sequence[Fact], claimed: Sequence[Fact]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Which true figure or sound each claimed one that is not in the truth stands for."""
    names = {}
    for kind in ("figure", "sound"):
        true_names = [fact.subject for fact in truth if fact.kind == kind]
        said_names = [fact.subject for fact in claimed if fact.kind == kind]
        left = [name for name in true_names if name not in said_names]
        for said in said_names:
            if said in true_names:
                continue
            like = [name for name in left if kind == "sound" or name[0] == said[0] or name[1] == said[1]]
            if like:
                about = {(fact.kind, fact.value) for fact in claimed if fact.subject == said}
                names[said] = max(
                    like, key=lambda name: sum((f.kind, f.value) in about for f in truth if f.subject == name)
                )
                left.remove(names[said])
    return names


def _renamed(fact: Fact, names: dict[tuple[str, ...], tuple[str, ...]]) -> Fact:
    value = fact.value
    if fact.kind == "sync":
        action = sync_action(fact)
        value = f"{' '.join(names.get(action.subject, action.subject))} {action.value}"
    return Fact(fact.kind, names.get(fact.subject, fact.subject), value)


def _sync_as_true(fact: Fact, actions: dict[Fact, Fact]) -> Fact:
    """A sync fact whose action, if that was told wrong, is replaced by the true action it stands for."""
    action = sync_action(fact)
    true = actions.get(action, action)
    return Fact("sync", fact.subject, f"{' '.join(true.subject)} {true.value}")


def _compare(
    wanted: list[Fact], given: list[tuple[Fact, Fact]]
) -> tuple[list[Fact], list[tuple[Fact, Fact]], list[Fact], list[Fact]]:
    """The facts of one slot that are right, (true, said) pairs that differ, true ones absent, said ones too many.

    `given` holds (the fact under its true names, the fact as said). A figure or sound under a wrong name is a pair, and
    so are that sound's pitch and count.
    """
    right, pairs = [], []
    for as_true, said in given:
        if as_true in wanted:
            misnamed = said.kind in ("figure", "sound", "pitch", "count") and said != as_true
            pairs.append((as_true, said)) if misnamed else right.append(as_true)
    absent = [fact for fact in wanted if all(fact != as_true for as_true, _ in given)]
    surplus = [said for as_true, said in given if as_true not in wanted]
    surplus.sort(key=lambda fact: all(fact.value.split()[:1] != true.value.split()[:1] for true in absent))
    for said in list(surplus):
        if not absent:
            break
        alike = [true for true in absent if true.value.split()[:1] == said.value.split()[:1]]
        true = (alike or absent)[0]
        pairs.append((true, said))
        absent.remove(true)
        surplus.remove(said)
    return right, pairs, absent, surplus
