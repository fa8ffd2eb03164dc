"""Everything that was asked of one model and is not finished: from admission to the last output, whatever ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from .groups import Groups, OpenGroup
from .groups import too_long as group_too_long
from .line import Line
from .meter import Meter
from .pages import Pages
from .request import EngineError, Finish, Group, Output, Request
from .running import Running
from .sequence import Job, Rank, Sequence
from .waiting import Deadlines, Waiting, too_long


class Jobs:
    """Requests, and groups with their members. `version` of the weights is told with every output."""

    def __init__(
        self,
        pages: Pages,
        max_seqs: int,
        context: int,
        end_ids: Iterable[int],
        max_waiting_requests: int,
        max_waiting_tokens: int,
        prefix_caching: bool,
        ahead: bool,
        pools: bool,
        version: int,
        meter: Meter,
        clock: Callable[[], float],
    ) -> None:
        self.version, self.meter = version, meter
        self.running = Running(pages, max_seqs, prefix_caching)
        self.groups = Groups(pages, pins=max_seqs)
        self._waiting = Waiting(max_waiting_requests, max_waiting_tokens, meter.refused)
        self.line = Line(self._waiting, self.groups, self.running, meter)
        self._pages, self._context, self._end_ids, self._ahead = pages, context, frozenset(end_ids), ahead
        self._pools = pools
        self._clock, self._arrivals = clock, 0
        self._jobs = dict[int, Job]()
        self._deadlines = Deadlines()

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    @property
    def busy(self) -> bool:
        """Whether anything is to be computed or told."""
        return bool(self._jobs) or self.groups.coming > 0

    def add(self, request: Request) -> EngineError | None:
        """Takes a request, or says why it cannot run: too long, no such group, or too many wait already."""
        assert request.id not in self._jobs, f"request {request.id} is known already"
        own, now = len(request.token_ids), self._clock()
        if request.group:
            error = self.groups.refusal(request)
        else:
            error = too_long(request, self._context, self._pages.count * self._pages.page_size)
        error = error or self._waiting.refusal(own, now)
        if error:
            return error
        self.meter.admitted(request)
        if request.group:
            request = self.groups.whole(request)
        job = self._jobs[request.id] = Job(request, now, shared=len(request.token_ids) - own)
        self._waiting.enlist(job)
        self._deadlines.add(job)
        if request.group:
            self.line.push(self.groups.join(job))
        else:
            rank = self._next_rank(request.priority)
            self.line.push(job.first_sequence(rank, self._context, self._end_ids, self._ahead))
        return None

    def open(self, group: Group, error: EngineError | None = None) -> None:
        """Begins a group. Its members are told `error`, or what else keeps it from having any."""
        assert self.groups.get(group.id) is None, f"group {group.id} is known already"
        now = self._clock()
        error = error or group_too_long(group, self._context, self._pages)
        error = error or self._waiting.refusal(len(group.token_ids), now)
        request = Request(
            group.id,
            group.model,
            group.token_ids,
            want=frozenset(),
            first_needed_row=0 if self._pools else None,
            priority=group.priority,
            deadline=group.deadline,
            cache_salt=group.cache_salt,
            adapter=group.adapter,
        )
        job = Job(request, now)
        anchor = job.first_sequence(self._next_rank(group.priority), self._context)
        opened = OpenGroup(group, job, anchor, error)
        self.groups.open(opened)
        self._deadlines.add(job)
        if error is None:
            self._waiting.enlist(job)
            self.groups.come(opened)
            self.line.push(anchor)

    def close(self, group_id: int) -> list[Output]:
        """Ends a group; its members that are not finished are aborted."""
        opened = self.groups.get(group_id)
        if opened is None:
            return []
        outputs = [output for member in list(opened.members) for output in self.abort(member)]
        self._forget(opened)
        self.groups.close(opened)
        return outputs

    def prompt_of(self, group_id: int) -> list[int]:
        """Of an open group; of any other nothing."""
        opened = self.groups.get(group_id)
        return opened.group.token_ids if opened else []

    def abort(self, request_id: int, choice: int | None = None, finish: Finish = "abort") -> list[Output]:
        """Ends a request, or one choice of it, and frees its pages; what is unknown or finished is left alone. Metrics
        count it as `finish`."""
        job = self._jobs.get(request_id)
        ended: list[int] = []
        for sequence in list(job.sequences.values()) if job else []:
            if choice is None:
                ended += [sequence.choice, *sequence.siblings]
                self.end(sequence, finish)
            elif choice in sequence.siblings:
                ended.append(choice)
                sequence.siblings.remove(choice)
            elif choice == sequence.choice:
                ended.append(choice)
                self._hand_over(sequence, finish)
        return [Output(request_id, one, finish="abort", weight_version=self.version) for one in ended]

    def expire(self, now: float) -> list[Output]:
        """Ends the requests whose deadline has come, waiting or running, and the groups."""
        outputs: list[Output] = []
        for job in self._deadlines.due(now):
            began = "the group was opened" if self.groups.get(job.request.id) else "the request"
            message = f"the deadline came {now - job.arrived:.1f} s after {began}"
            outputs += self.fail(job, EngineError("deadline", message))
            self.close(job.request.id)
        return outputs

    def fail(self, job: Job, error: EngineError) -> list[Output]:
        """Ends a request; or, where the job computes a group's prompt, all members that the group has or will have."""
        opened = self.groups.get(job.request.id)
        if opened is not None:
            opened.error = error
            outputs = [output for member in list(opened.members.values()) for output in self.fail(member, error)]
            self._forget(opened)
            return outputs
        if not job.sequences:
            return []
        for sequence in list(job.sequences.values()):
            self.end(sequence, "error")
        return [Output(job.request.id, finish="error", error=error, weight_version=self.version)]

    def end(self, sequence: Sequence, finish: Finish) -> None:
        """A choice, and what would have forked from it, is done with."""
        job = sequence.job
        self._drop(sequence)
        if sequence.member:
            self.groups.leave(sequence)
            self.line.freed()  # its group may have no other
        del job.sequences[sequence.choice]
        if not job.sequences:
            del self._jobs[sequence.id]
            if job.cached_tokens is None:
                self._waiting.discharge(job)
        self.meter.ended(sequence, finish)

    def land(self, sequence: Sequence) -> None:
        """All of it is computed; only what the flight brings is still to be told. Its slot and pages are free."""
        self.running.leave(sequence)
        self.line.freed()
        sequence.landed = True

    def pin(self, opened: OpenGroup) -> None:
        """Its prompt is computed. The slot is free, the pages stay."""
        self.running.pin(opened.anchor)
        self.groups.pin(opened)
        self.line.freed()

    def start_over(self, sequences: Iterable[Sequence], groups: Iterable[OpenGroup]) -> None:
        """Takes slots and pages of these sequences and of these groups' prompts; all of it is computed again."""
        for sequence in sequences:
            self.line.preempt(sequence)
        for opened in groups:
            if opened.pinned:
                self.line.give_up(opened)

    def readdress(self, before: str, now: str) -> None:
        """What carried one adapter's key carries another one's."""
        for job in (*self._jobs.values(), *(opened.job for opened in self.groups)):
            if job.request.adapter == before:
                job.request = replace(job.request, adapter=now)

    def uses(self, adapter: str) -> bool:
        """Whether a request, or an open group, carries that adapter's key."""
        jobs = (*self._jobs.values(), *(opened.job for opened in self.groups))
        return any(job.request.adapter == adapter for job in jobs)

    def _next_rank(self, priority: int) -> Rank:
        self._arrivals += 1
        return priority, self._arrivals, 0

    def _drop(self, sequence: Sequence) -> None:
        """It neither runs nor waits any more."""
        if sequence.slot >= 0:
            self.running.leave(sequence)
            self.line.freed()
        elif not sequence.landed:
            self.line.remove(sequence)
        sequence.gone = True

    def _forget(self, opened: OpenGroup) -> None:
        """Nothing of its prompt is kept or computed."""
        if opened.coming:
            self._drop(opened.anchor)
            if opened.job.cached_tokens is None:
                self._waiting.discharge(opened.job)
        self.groups.forget(opened)
        self.line.freed()

    def _hand_over(self, sequence: Sequence, finish: Finish) -> None:
        """Ends a choice; if others wait for its prompt to be computed, the first of them takes its place."""
        if not sequence.siblings:
            self.end(sequence, finish)
            return
        sequences = sequence.job.sequences
        del sequences[sequence.choice]
        sequence.choice = sequence.siblings.pop(0)
        sequences[sequence.choice] = sequence
        self.running.replace(sequence)
