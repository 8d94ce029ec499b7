"""What of a stage's finished steps a changed recipe would contradict, key by key."""

import json
from collections.abc import Iterator
from typing import Any

from vjepa_scale.recipe import Phase, Recipe, Stage
from vjepa_scale.recipe.networks import NETWORKS


def recipe_changes(done: Stage, today: Stage, *, first: int, step: int, same_source: bool = False) -> list[str]:
    """``KEY: THEN then, NOW now`` for all that the steps from ``first`` to ``step`` depended on; none: they agree.

    done: the stage by the recipe that trained these steps. Later steps may differ, and so may what no number depends
          on.
    same_source: what the stage starts from is known to be the same, whatever path ``continue_from`` or ``init_from`` is
    """
    if done.kind != today.kind:
        return [f"{today.name}.kind: {done.kind} then, {today.kind} now"]
    decisive = _decisive(done), _decisive(today)
    if same_source:
        for values in decisive:
            del values[f"{today.name}.{today.starts_by}"]
    changed = list(_differences(*decisive))
    then, now = (_trained(stage.recipe, stage.phases_from(first), step) for stage in (done, today))
    if list(then) != list(now):
        return [*changed, f"{today.name}.phases: {', '.join(then)} then, {', '.join(now)} now"]
    for steps in then:
        changed += _differences(then[steps], now[steps], f"{today.name} ({steps})")
    return changed


def _decisive(stage: Stage) -> dict[str, Any]:
    """What the numbers of a stage depend on in all of its steps, by the recipe's keys."""
    recipe, whole = stage.recipe, stage.recipe.model_dump(mode="json")
    data = {key: value for key, value in whole["data"].items() if key not in ("workers", "prefetch", "faults")}
    elsewhere = set(NETWORKS) - set(stage.networks)
    own = whole[stage.name]
    return {
        **{f"{stage.name}.{word}": own[word] for word in ("continue_from", "init_from", "init_without")},
        "run": {"seed": recipe.run.seed},
        "engine": {"precision": recipe.engine.precision},
        "data": data | {"sets": stage.data_sets},  # the rest of the sets: by identity and mixture
        "model": {key: value for key, value in whole["model"].items() if key not in elsewhere},
        "optimizer": stage.optimizer.model_dump(mode="json"),
        **stage.decisive(),
    }


def _trained(recipe: Recipe, phases: list[Phase], step: int) -> dict[str, dict[str, Any]]:
    """What the steps before ``step`` were trained with: a section for ``steps FIRST to LAST`` of each phase."""
    out = {}
    for phase in phases:
        if phase.first >= step:
            break
        last = min(phase.end, step) - 1
        out[f"steps {phase.first} to {last}"] = {
            f"lr at step {phase.first}": phase.lr(phase.first),
            f"lr at step {last}": phase.lr(last),
            "clip.frames": phase.frames,
            "clip.size": list(phase.size),
            "global_batch": phase.global_batch,
            "mixture": phase.mixture,
            "frames of their own": phase.own_frames,
            "fps of their own": {
                name: fps for name in phase.mixture if (fps := recipe.data.fps_of(name)) != recipe.data.fps
            },
        }
    return out


def _differences(then: Any, now: Any, key: str = "") -> Iterator[str]:
    """``KEY: THEN then, NOW now`` for every value that differs, down to the deepest key."""
    then_parts, now_parts = _parts(then), _parts(now)
    if then_parts and list(then_parts) == list(now_parts):
        for name in then_parts:
            yield from _differences(then_parts[name], now_parts[name], f"{key}.{name}" if key else name)
    elif then != now or then_parts:  # with parts: of other names, or in another order
        yield f"{key}: {_said(then)} then, {_said(now)} now"


def _parts(value: Any) -> dict[Any, Any]:
    """What a value is made of: keys of a section, items of a list of sections."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else {}


def _said(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return f"{len(value)} item{'s' * (len(value) != 1)}"
    if isinstance(value, float):
        return f"{value:.12g}"  # without the noise of the last digits
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
