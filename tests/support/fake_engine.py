"""A scheduler with a runner that has no model, and what became of the requests given to it."""

from dataclasses import replace

from fake_runner import FakeRunner

from tandem.server.engine.plan import Plan
from tandem.server.engine.request import EngineError, Group, Output, Request, Sampling
from tandem.server.engine.scheduler import Scheduler

FOREVER = Sampling(max_tokens=1000, seed=0, ignore_eos=True)


def sampled(tokens: int, **more) -> Sampling:
    return replace(FOREVER, max_tokens=tokens, **more)


class FakeEngine:
    def __init__(
        self, pages=64, page_size=4, max_seqs=8, max_batched_tokens=64, context=100, end_ids=(), highest=None, **options
    ) -> None:
        """`highest`: page numbers are below it, where `pages` is a pool that borrows some."""
        self.now = 0.0
        self.scheduler = Scheduler(
            pages=pages,
            page_size=page_size,
            max_seqs=max_seqs,
            max_batched_tokens=max_batched_tokens,
            context=context,
            end_ids=end_ids,
            clock=lambda: self.now,
            **options,
        )
        self.runner = FakeRunner(highest or pages, page_size, max_seqs, max_batched_tokens)
        self.outputs: list[Output] = []
        self.requests = 0

    def add(self, prompt: list[int], sampling: Sampling | None = FOREVER, **more) -> int:
        request = Request(self.requests, "m", prompt, sampling, **more)
        self.requests += 1
        error = self.scheduler.add(request)
        assert error is None, error
        return request.id

    def refuse(self, prompt: list[int], sampling: Sampling | None = FOREVER) -> EngineError:
        self.requests += 1
        error = self.scheduler.add(Request(self.requests - 1, "m", prompt, sampling))
        assert error is not None
        return error

    def open(self, prompt: list[int], longest: int, **more) -> int:
        group = Group(1000 + self.requests, "m", prompt, longest, **more)
        self.requests += 1
        self.scheduler.open(group)
        return group.id

    def member(self, group: int, tokens: list[int], **more) -> Request:
        return Request(self.requests, "m", tokens, group=group, **({"want": frozenset({"score"})} | more))

    def join(self, group: int, tokens: list[int], **more) -> int:
        member = self.member(group, tokens, **more)
        self.requests += 1
        error = self.scheduler.add(member)
        assert error is None, error
        return member.id

    def step(self, budget: int | None = None) -> Plan:
        plan = self.scheduler.plan(budget)
        assert plan is not None
        self.outputs += self.scheduler.commit(plan, self.runner.execute(plan, budget))
        return plan

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.step()
        assert self.scheduler.pages.used == 0

    def tokens(self, request_id: int, choice: int = 0) -> list[int]:
        mine = [output for output in self.outputs if (output.request_id, output.choice) == (request_id, choice)]
        return [token for output in mine for token in output.token_ids]

    def running(self, plan: Plan) -> list[int]:
        """Request ids by row."""
        return [self.runner.slots[slot].request.id for slot in plan.slots]

    def cached(self, request_id: int) -> int | None:
        return next(output.cached_tokens for output in self.outputs if output.request_id == request_id)
