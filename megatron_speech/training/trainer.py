"""Training: a recipe in, a run directory out.

    set_up (run.py) ─► Run ─► TrainingLoop (loop.py) ─► TrainStep (step.py)
                                    └─► events: profile, roll back, log, stop, validate, end early, save

`run.py` puts the parts together, `loop.py` says what runs next, `step.py` what an optimizer step is, and the events
what happens between steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_speech.training.events.event import Event
from megatron_speech.training.events.log_metrics import LogMetrics
from megatron_speech.training.events.profile import Profile
from megatron_speech.training.events.rollback import RollBackOnSpikes
from megatron_speech.training.events.save import LogFinishedSaves, SaveCheckpoint
from megatron_speech.training.events.stop import StopOnRequest
from megatron_speech.training.events.validate import EndStageEarly, Validate
from megatron_speech.training.loop import TrainingLoop
from megatron_speech.training.run import Run
from megatron_speech.training.telemetry.goodput import SAVING, sentence


def make_loop(run: Run, more: Sequence[Event] = ()) -> TrainingLoop:
    """The loop of a run, with its events in their order.

    Skipped steps are dealt with before their losses are logged, and what a line of the log sets off (a stop) is known
    before anything is saved; a checkpoint comes last, so that it holds what the others have done.

    Args:
        run: the run.
        more: events that come before all others.
    """
    events: list[Event] = [*more]
    loop = TrainingLoop(run, events)
    if run.recipe.profile is not None:
        events.append(Profile(run, run.recipe.profile))
    rollback = RollBackOnSpikes(run, run.spikes) if run.spikes is not None else None
    if rollback is not None:
        events.append(rollback)
    events += [LogMetrics(run), StopOnRequest(run, rollback), LogFinishedSaves(run)]
    events += [Validate(run), EndStageEarly(run), SaveCheckpoint(run, loop.event_states)]
    return loop


def train(run: Run, *, max_steps: int | None = None, through: str | None = None, events: Sequence[Event] = ()) -> str:
    """Train to the end of the recipe, of stage `through`, or for `max_steps` more steps. A collective.

    Args:
        run: as :func:`~megatron_speech.training.run.set_up` made it; it cannot be trained again.
        max_steps: steps at most; None: as many as there are.
        through: name of the last stage; None: all.
        events: called before those of the recipe.

    Returns:
        The state left in status.json; `paused` when stages are left that were not asked for.
    """
    recipe, progress = run.recipe, run.progress
    names = [stage.name for stage in recipe.stages]
    end = len(names) if through is None else names.index(through) + 1
    if progress.position.stage_index >= end:
        return _nothing_left(run, recipe.name if end == len(names) else f"{recipe.name} through {through}")
    limit = progress.total_steps if max_steps is None else progress.position.step + max_steps
    run.write_status("running")
    run.safety.stop.catch_interrupts()
    loop = make_loop(run, events)
    state, message = "preempted", "stopped on request; start the same command to continue"
    try:
        with run.safety.guard():
            if loop.run_stages(end, limit):
                at = progress.position.stage_index
                state = "finished" if progress.finished else "paused" if at == end else "preempted"
                message = ""
            saving = run.safety.progress.doing("writing and copying the last checkpoint")
            with saving, run.ledger.spending(SAVING):
                run.checkpoints.finish(copied=state != "preempted")
            run.ledger.note(progress.position.step, event="end")
            if (found := run.ledger.summary()) is not None:
                run.log.info(sentence(found))
            run.write_status(state, message)
            run.safety.finish()
        return state
    except BaseException as error:
        run.checkpoints.close(failed=True)
        run.write_status("failed", str(error) or type(error).__name__)
        raise
    finally:
        loop.close()
        run.ledger.close()
        run.log.close()


def _nothing_left(run: Run, what: str) -> str:
    """End a run that has all that was asked for."""
    run.log.info(f"{what} is finished: nothing left to do in {run.directory}")
    run.checkpoints.finish(copied=True)
    state = "finished" if run.progress.finished else "paused"
    run.write_status(state)
    run.log.close()
    run.safety.finish()
    return state
