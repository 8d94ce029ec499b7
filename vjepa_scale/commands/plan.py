"""Plan a robot's next actions from the current picture to a goal picture, and draw the energy landscape.

python tools/plan.py runs/demo --now now.png --goal goal.png --state 0.45 0.02 0.31 3.14 0 0 0.1
python tools/plan.py ac.pt --model vit_giant --now now.png --goal goal.png --state … --landscape energy.png --axes 0 2

docs/planning.md explains the numbers. Execute the first action, then take a new picture and plan again.
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from vjepa_scale.core.errors import run_command
from vjepa_scale.core.installed import as_called, run_console_command
from vjepa_scale.planning import PlanConfig, check_landscape, draw_landscape, load_world_model


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=as_called(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a run, an action checkpoint, a consolidated folder, a published .pt")
    parser.add_argument("--model", help="for a published .pt of others: vit_giant … or heads=22,predictor_heads=16")
    parser.add_argument("--now", type=Path, required=True, metavar="IMAGE", help="what the camera sees")
    parser.add_argument("--goal", type=Path, required=True, metavar="IMAGE", help="what it should see")
    parser.add_argument(
        "--state", type=float, nargs=7, required=True, metavar="N", help="x y z (m), roll pitch yaw (rad), gripper 0…1"
    )
    parser.add_argument("--camera", type=float, nargs=6, metavar="N", help="pose of the camera, where the model has it")
    for field in fields(PlanConfig):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="the same plan for the same seed")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--landscape", type=Path, metavar="FILE", help="draw energies over two numbers of the action")
    parser.add_argument("--axes", type=int, nargs=2, choices=range(7), default=(0, 1), help="0 1 2 are x y z")
    arguments = parser.parse_args(argv)
    if arguments.landscape is not None:
        check_landscape(arguments.landscape, arguments.axes)
    config = PlanConfig(**{field.name: getattr(arguments, field.name) for field in fields(PlanConfig)})
    world = load_world_model(arguments.source, arguments.device, model=arguments.model)
    now, goal = world.encode(arguments.now), world.encode(arguments.goal)
    plan = world.plan(now, arguments.state, goal, config, seed=arguments.seed, extrinsics=arguments.camera)
    for number, action in enumerate(plan.actions[0].tolist(), start=1):
        print(f"action {number}: " + " ".join(f"{value:+.4f}" for value in action))
    print(f"energy: {float(world.energy(now, goal)):.4f} now, {float(plan.energy[0]):.4f} imagined after the plan")
    if arguments.landscape is not None:
        first, second = arguments.axes
        landscape = world.landscape(
            now,
            arguments.state,
            goal,
            axes=(first, second),
            limits=(config.limits[first] or 0.05, config.limits[second] or 0.05),  # rotations may be off
            around=plan.actions[0],
            extrinsics=arguments.camera,
        )
        draw_landscape(arguments.landscape, landscape, planned_7=plan.actions[0, 0])
        print(f"written: {arguments.landscape}")
    return 0


def run() -> NoReturn:
    """The console command."""
    run_console_command(main)


if __name__ == "__main__":
    run_command(main)
