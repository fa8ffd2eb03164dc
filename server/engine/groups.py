"""Open groups of one model: prompts that stay computed while members that continue them come and go.

A group's prompt is computed by its *anchor*, a sequence that has no answer. Once computed it gives up its slot and is
*pinned*: its pages stay, and so does, in the runner, its last hidden state. Members wait for that with their group,
then like all others for a slot and pages, at the rank of their group. One that starts takes over the anchor's full
pages, copies the last one if it is not full, and computes its own tokens.

A pinned prompt is never preempted. It is given up, and computed again before the next member starts, when the weights
change, when a step fails, and, where a group has no unfinished members, when somebody else needs the room: no client
holds memory by being slow. An anchor starts only if all prompts that are kept then, and the longest member of any of
these groups, fit into the pages together, and so many are promised (`Pages.promise`) while they are kept. So a member
of a pinned group can run whatever else is pinned, and whatever other models need.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from operator import attrgetter

from .pages import Pages
from .request import EngineError, Group, Request
from .running import by_rank
from .sequence import Job, Sequence

by_group_rank = attrgetter("anchor.rank")


@dataclass(slots=True, eq=False)
class OpenGroup:
    """`job` is the anchor's, and unfinished as long as the group is open. `error`: why the group has no members.

    `coming`: the anchor waits or runs. `pinned`: it is computed and keeps its pages. Neither: the pages went, and
    nobody has asked for them since.
    """

    group: Group
    job: Job
    anchor: Sequence
    error: EngineError | None = None
    members: dict[int, Job] = field(default_factory=dict[int, Job])  # unfinished, by request
    waiting: list[Sequence] = field(default_factory=list[Sequence])  # members, by rank
    numbered: int = 0  # members so far
    coming: bool = False
    pinned: bool = False
    pin: int = -1  # where the runner keeps the hidden state, from the anchor's start on

    def __post_init__(self) -> None:
        self.anchor.group = self


def prompt_pages(group: Group, size: int) -> int:
    return -(-len(group.token_ids) // size)


def member_pages(group: Group, size: int) -> int:
    """The most that a member takes beside the prompt's: a prompt's last page that is not full counts again."""
    prompt = len(group.token_ids)
    return -(-(prompt + group.longest) // size) - prompt // size


def too_long(group: Group, context: int, pages: Pages) -> EngineError | None:
    """Why the group could not have its longest member even with all pages to itself."""
    prompt, longest, size = len(group.token_ids), group.longest, pages.page_size
    needed = prompt_pages(group, size) + member_pages(group, size)
    both = f"the group's prompt ({prompt}) and longest member ({longest})"
    if prompt == 0:
        message = "the prompt of a group has no tokens"
    elif longest < 1:
        message = f"the longest member of a group has {longest} tokens; it has at least 1"
    elif prompt + longest > context:
        message = f"{both} have {prompt + longest} tokens, the context {context}"
    elif needed > pages.count:
        message = f"{both} need {needed} pages of {size} tokens, the KV cache has {pages.count}"
    else:
        return None
    return EngineError("invalid", message)


class Groups:
    """`pins`: how many hidden states the runner keeps."""

    def __init__(self, pages: Pages, pins: int) -> None:
        self.coming = 0  # groups whose anchor waits or runs
        self._pages = pages
        self._open: dict[int, OpenGroup] = {}
        self._kept: list[OpenGroup] = []  # pinned, or the anchor runs; the longest kept first
        self._ready: list[OpenGroup] = []  # pinned and with members that wait, by rank
        self._pins = list(range(pins - 1, -1, -1))  # free ones

    @property
    def waiting(self) -> int:
        """Members that wait."""
        return sum(len(opened.waiting) for opened in self._open.values())

    @property
    def pinned_pages(self) -> int:
        """At most: a page that several prompts begin with counts for each."""
        return sum(len(opened.anchor.table) for opened in self._kept if opened.pinned)

    def __iter__(self) -> Iterator[OpenGroup]:
        return iter(self._open.values())

    def get(self, group_id: int) -> OpenGroup | None:
        return self._open.get(group_id)

    def open(self, opened: OpenGroup) -> None:
        self._open[opened.group.id] = opened

    def close(self, opened: OpenGroup) -> None:
        """Its members have ended, and its prompt is forgotten."""
        opened.job.sequences.clear()
        del self._open[opened.group.id]

    # -- members

    def refusal(self, request: Request) -> EngineError | None:
        """Why the request cannot be a member."""
        opened, tokens = self._open.get(request.group), len(request.token_ids)
        if opened is None:
            message = f"there is no open group {request.group}: it was closed, its deadline came, or it never was"
        elif opened.error:
            return opened.error
        elif not 0 < tokens <= opened.group.longest:
            message = f"a member has {tokens} tokens; in its group it has at least 1, at most {opened.group.longest}"
        else:
            return None
        return EngineError("invalid", message)

    def whole(self, request: Request) -> Request:
        """A member as a request by itself: behind the group's prompt, under the group's terms."""
        prompt = self._open[request.group].job.request
        return replace(
            request,
            token_ids=[*prompt.token_ids, *request.token_ids],
            first_needed_row=len(prompt.token_ids) - 1,
            priority=prompt.priority,
            cache_salt=prompt.cache_salt,
            adapter=prompt.adapter,
        )

    def join(self, job: Job) -> Sequence:
        """The sequence of a member, which is a request by itself now."""
        opened = self._open[job.request.group]
        opened.members[job.request.id] = job
        opened.numbered += 1
        sequence = job.first_sequence((*opened.anchor.rank[:2], opened.numbered), job.prompt)
        sequence.group = opened
        return sequence

    def leave(self, sequence: Sequence) -> None:
        """A member has ended, and does not wait."""
        assert sequence.group is not None
        del sequence.group.members[sequence.id]

    def push(self, sequence: Sequence) -> None:
        """A member waits."""
        opened = sequence.group
        assert opened is not None
        insort(opened.waiting, sequence, key=by_rank)
        if opened.pinned and len(opened.waiting) == 1:
            insort(self._ready, opened, key=by_group_rank)

    def first(self) -> Sequence | None:
        """The first of the members that may start."""
        return self._ready[0].waiting[0] if self._ready else None

    def remove(self, sequence: Sequence) -> None:
        """A member waits no longer."""
        opened = sequence.group
        assert opened is not None
        opened.waiting.remove(sequence)
        if opened.pinned and not opened.waiting:
            self._ready.remove(opened)

    # -- prompts

    def come(self, opened: OpenGroup) -> None:
        """Its anchor waits from now on."""
        opened.coming = True
        self.coming += 1

    def admits(self, opened: OpenGroup) -> bool:
        """Whether its anchor may start."""
        return bool(self._pins) and self._pages.secure(self._needed([*self._kept, opened]))

    def keep(self, opened: OpenGroup) -> None:
        """Its anchor has started."""
        opened.pin = self._pins.pop()
        self._kept.append(opened)
        self._pages.promise(self._needed(self._kept))

    def pin(self, opened: OpenGroup) -> None:
        """Its anchor is computed and has left its slot: members may start."""
        self._settle(opened)
        opened.pinned = True
        if opened.waiting:
            insort(self._ready, opened, key=by_group_rank)

    def idle(self) -> OpenGroup | None:
        """A pinned group without unfinished members."""
        return next((opened for opened in self._kept if opened.pinned and not opened.members), None)

    def give_up(self, opened: OpenGroup) -> None:
        """The prompt is kept no longer, if it was; its anchor has no slot."""
        if opened not in self._kept:
            return
        self._kept.remove(opened)
        self._pins.append(opened.pin)
        if opened in self._ready:
            self._ready.remove(opened)
        anchor = opened.anchor
        self._pages.release(anchor.table)
        anchor.table, anchor.chain, anchor.computed = [], None, 0
        opened.pinned = False
        self._pages.promise(self._needed(self._kept))

    def forget(self, opened: OpenGroup) -> None:
        """Its anchor neither waits nor runs, and nothing of the prompt is kept."""
        self.give_up(opened)
        self._settle(opened)

    def _needed(self, kept: list[OpenGroup]) -> int:
        """Pages of all these prompts and of the longest member of any of them."""
        size, groups = self._pages.page_size, [opened.group for opened in kept]
        members = max((member_pages(group, size) for group in groups), default=0)
        return sum(prompt_pages(group, size) for group in groups) + members

    def _settle(self, opened: OpenGroup) -> None:
        """Its anchor neither waits nor runs."""
        self.coming -= opened.coming
        opened.coming = False
