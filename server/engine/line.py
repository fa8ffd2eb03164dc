"""Who waits, and which of them starts next.

The first by rank starts as soon as slots and pages reach, and until then nobody passes it, with one exception. Pages
that groups have pinned come back only when these groups' members have ended. So while the first does not fit beside
what is pinned, however few run, members of pinned groups go past it, and nobody else: no further prompt is pinned, the
members that are there come to their end, a group without members gives up its pages, and the first fits.
"""

from __future__ import annotations

from .groups import Groups, OpenGroup
from .meter import Meter
from .running import Running
from .sequence import Flight, Sequence
from .waiting import Waiting


class Line:
    """`waiting` has ordinary sequences and the groups' anchors, `groups` the members.

    Whoever frees a slot or pages says so: what did not fit is tried again only then, or when another model makes room.
    """

    def __init__(self, waiting: Waiting, groups: Groups, running: Running, meter: Meter) -> None:
        self._waiting, self._groups, self._running, self._meter = waiting, groups, running, meter
        self._stuck: set[Sequence] = set()  # did not fit, and nothing was freed since

    def __len__(self) -> int:
        return len(self._waiting) + self._groups.waiting

    def freed(self) -> None:
        self._stuck.clear()

    def push(self, sequence: Sequence) -> None:
        """A member's prompt comes with it, if it is not there."""
        if not sequence.member:
            self._waiting.push(sequence)
            return
        self._groups.push(sequence)
        opened = sequence.group
        assert opened is not None
        if not (opened.pinned or opened.coming):
            self._groups.come(opened)
            self._waiting.push(opened.anchor)

    def remove(self, sequence: Sequence) -> None:
        """It waits no longer, because it is over."""
        self.freed()
        if sequence.member:
            self._groups.remove(sequence)
        else:
            self._waiting.remove(sequence)

    def start_first(self, version: int, flight: Flight | None) -> Sequence | None:
        """Starts the first that waits, if it fits, or else a member that may pass it."""
        self._listen()
        first = self._first()
        if first is None or self._start(first, version, flight):
            return first
        member = self._groups.first()
        if member and member is not first and self._kept_out(first) and self._start(member, version, flight):
            return member
        return None

    def start_urgent(self, version: int, flight: Flight | None) -> None:
        """Starts what waits with a better priority than something that runs, ahead of everything else.

        The last running ones are preempted for it, unless even all of worse priority would not make enough room.
        """
        running = self._running
        self._listen()
        while (first := self._first()) and (last := running.last()) and first.rank[0] < last.rank[0]:
            if self._start(first, version, flight):
                continue
            if self._kept_out(first) or (flight and flight.holds(first)):
                return
            lower = [sequence for sequence in running.all() if sequence.rank[0] > first.rank[0]]
            room = running.pages.available + running.pages.freed_by([sequence.table for sequence in lower])
            if running.needed(first) + len(running) - len(lower) > room:
                return
            self.preempt(last)

    def _listen(self) -> None:
        pages = self._running.pages
        if pages.relieved:
            pages.relieved = False
            self.freed()

    def preempt(self, sequence: Sequence) -> None:
        """Takes its slot and pages; it keeps its tokens and waits."""
        self._meter.preempted(sequence)
        self._running.leave(sequence)
        if sequence.anchors:
            self._groups.give_up(sequence.anchors)
        self.push(sequence)
        self.freed()

    def make_room(self) -> bool:
        """Gives up the pages of a group that does not need them now; whether there was one."""
        opened = self._groups.idle()
        if opened is None:
            return False
        self.give_up(opened)
        return True

    def give_up(self, opened: OpenGroup) -> None:
        """The pages of a pinned prompt. It is computed again for members that wait, or come later."""
        self._groups.give_up(opened)
        self.freed()
        if opened.waiting:
            self._groups.come(opened)
            self._waiting.push(opened.anchor)

    def _first(self) -> Sequence | None:
        first, member = self._waiting.first(), self._groups.first()
        return member if first is None or (member and member.rank < first.rank) else first

    def _start(self, sequence: Sequence, version: int, flight: Flight | None) -> bool:
        """One that this plan preempted, and whose last token is not known yet, does not start."""
        if self._running.full or sequence in self._stuck or (flight and flight.holds(sequence)):
            return False
        while not self._fits(sequence, version):
            if not self.make_room():
                self._stuck.add(sequence)
                return False
        if sequence.anchors:
            self._groups.keep(sequence.anchors)
        if sequence.member:
            self._groups.remove(sequence)
        else:
            self._waiting.pop()
        job = sequence.job
        if job.cached_tokens is None:
            job.cached_tokens = sequence.computed - sequence.shared
            self._waiting.discharge(job)
            self._meter.started(sequence)
        return True

    def _fits(self, sequence: Sequence, version: int) -> bool:
        admitted = sequence.anchors is None or self._groups.admits(sequence.anchors)
        return admitted and self._running.start(sequence, version)

    def _kept_out(self, sequence: Sequence) -> bool:
        """Whether pinned pages alone keep it from starting."""
        if sequence.member:
            return False
        if sequence.anchors and not self._groups.admits(sequence.anchors):
            return True
        pages = self._running.pages
        return self._running.needed(sequence) > pages.staying - self._groups.pinned_pages
