"""The training loop: what runs next, and nothing of how.

    for every stage:  begin → (before_step → batch → step → after_step)* → at_stage_end

What a step is says `step.py`; what happens between steps say the events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_speech.training.events.event import Boundary, Event, StageRun
from megatron_speech.training.run import Run
from megatron_speech.training.telemetry.goodput import DATA, SAVING
from megatron_speech.training.telemetry.timing import Clock


class TrainingLoop:
    """Takes the steps of a run's stages, and calls its events between them.

    Args:
        run: what is trained.
        events: in the order in which they are called.
    """

    def __init__(self, run: Run, events: Sequence[Event]) -> None:
        self._run, self._events = run, events

    def run_stages(self, end: int, limit: int) -> bool:
        """Take steps until stage `end` comes next, or `limit` steps of the run are taken; a collective.

        Returns:
            False where the run was asked to stop before that.
        """
        progress = self._run.progress
        while progress.position.stage_index < end and progress.position.step < limit:
            if not self._run_stage(limit):
                return False
        return True

    def _run_stage(self, limit: int) -> bool:
        """Train the running stage from where it stands; False when the run was asked to stop."""
        run, progress = self._run, self._run.progress
        with run.safety.progress.doing("writing a checkpoint"), run.ledger.spending(SAVING):
            run.checkpoints.wait()
        stage = self.begin_stage()
        boundary: Boundary | None = None
        run.safety.progress.begin_steps()
        with stage.source.batches(progress.position.stage_step) as batches:
            while progress.position.stage_index == stage.index and progress.position.step < limit:
                self._call(lambda event: event.before_step(stage))
                before_wait = time.perf_counter()
                with run.ledger.spending(DATA):
                    batch = next(batches)
                stage.clock.waited += time.perf_counter() - before_wait
                if not run.ledger.begun:
                    path = run.directory / "goodput.jsonl" if run.is_main else None
                    run.ledger.begin(path, progress.position.step, run.world_size)
                    run.log.info(run.ledger.start_sentence())
                run.ledger.steps += 1
                norm = run.step.take(batch, stage.meter, stage.config.loss, stage.scheduler)
                stage.clock.steps += 1
                progress.move_to(progress.position.step + 1)
                step = progress.position.step
                ended = progress.position.stage_index != stage.index
                boundary = Boundary(step, norm, last=step == limit, stage_ended=ended)
                boundary.due = any([event.is_due(stage, boundary) for event in self._events])
                for event in self._events:
                    event.after_step(stage, boundary)
                    if boundary.rolled_back:
                        break
                if boundary.rolled_back or boundary.stop:
                    break
        assert boundary is not None
        if progress.position.stage_index != stage.index:
            self._call(lambda event: event.at_stage_end(stage, boundary))
        return boundary.rolled_back or not boundary.stop

    def begin_stage(self) -> StageRun:
        """The running stage, ready for its next step."""
        run, position = self._run, self._run.progress.position
        index = position.stage_index
        config, source = run.recipe.stages[index], run.sources[index]
        begins = position.stage_step == 0
        if begins and index > 0 and not config.carry_optimizer:
            run.engine.optimizer.reset_state()
        scheduler = run.engine.optimizer.start_stage(config)
        scheduler.step(position.stage_step)
        meter = run.make_meter(config, source.groups)
        stage = StageRun(index, config, source, scheduler, meter, Clock(), begins)
        self._call(lambda event: event.at_stage_start(stage))
        if run.loaded and not begins:
            meter.restore(run.loaded["meter"], run.loaded["groups"])
            self._call(lambda event: event.load_state(run.loaded))
        run.loaded = {}
        stage.clock = Clock()  # what came before is no time of a step
        return stage

    def _call(self, method: Callable[[Event], None]) -> None:
        for event in self._events:
            method(event)

    def event_states(self) -> dict[str, Any]:
        """What the events want to have in a checkpoint."""
        return {name: value for event in self._events for name, value in event.state().items()}

    def close(self) -> None:
        """The run has ended, perhaps by an error."""
        self._call(lambda event: event.close())
